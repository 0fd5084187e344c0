"""The package as a script uses it: the functions, what they accept, and what importing it costs."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import prefcache
from prefcache.pipeline import config_file
from prefcache.pipeline.errors import UsageError
from tests.helpers.project import ROOT, default_signals, link_tree, write_config, write_pairs
from tests.helpers.runs import weights


@pytest.fixture
def script(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run lines of Python as a file, script.py, in the temporary folder."""

    def run(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "script.py").write_text(text)
        command = [sys.executable, "script.py"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return run


# -- importing ---------------------------------------------------------------------------------------------------------


def test_importing_it_loads_nothing_heavy_and_star_gives_the_functions(script):
    done = script(
        "import sys\nfrom prefcache import *\nimport prefcache\n"
        "print(prefcache.__version__, sorted(set(prefcache.__all__) - set(dir())))\n"
        "print({'torch', 'transformers', 'pyarrow', 'duckdb', 'pydantic', 'yaml', 'rich'} & set(sys.modules))\n"
    )
    assert done.stdout == "0.1.0 []\nset()\n", done.stderr


def test_a_function_stays_one_after_its_command_was_imported(script):
    done = script(
        "import prefcache, prefcache.cli\n"
        "from prefcache.commands import prepare, query, report, score, train\n"
        "names = ('prepare', 'score', 'train', 'report', 'sql', 'open_cache')\n"
        "print({type(getattr(prefcache, name)).__name__ for name in names})\n"
    )
    assert done.stdout == "{'function'}\n", done.stderr


def test_a_name_that_it_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'prefcache' has no attribute 'trian'"):
        prefcache.trian  # noqa: B018


@pytest.mark.slow  # half a minute, unless make lint has filled the type checker's cache
def test_a_script_with_types_passes_a_strict_type_checker(tmp_path):
    (tmp_path / "script.py").write_text(
        "import prefcache\n\n\n"
        "class EarlyStop(prefcache.TrainCallback):\n"
        "    def on_step(self, step: prefcache.TrainStep) -> prefcache.Stop | None:\n"
        "        return prefcache.Stop('low') if step.metrics['loss'] < 0.1 else None\n\n\n"
        "version: str = prefcache.__version__\n"
        "run = prefcache.train('my.yaml', overrides={'train.beta': 0.2}, callbacks=[EarlyStop()])\n"
        "assert run is not None\n"
        "loss: float = run.evaluation['loss']\n"
        "rows: int = len(prefcache.sql('select 1', 'runs/my'))\n"
        "prefcache.trian  # type: ignore[attr-defined]\n"
    )
    link_tree(ROOT)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", tmp_path / "script.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "Success: no issues found" in done.stdout, done.stdout


# -- configs -----------------------------------------------------------------------------------------------------------


def test_a_config_may_be_a_path_a_dict_or_loaded_and_paths_and_numpy_numbers_are_values(
    prepared, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tree = yaml.safe_load(prepared.read_text())
    loaded = config_file.load(prepared)
    as_paths = tree | {"model": Path(tree["model"]), "prepare": tree["prepare"] | {"data": (Path("pairs.jsonl"),)}}
    for given in (prepared, str(prepared), tree, loaded):
        result = prefcache.prepare(given, quiet=True)
        assert (
            not result.changed
            and result.prepared == tmp_path / "runs/tiny/prepared"
            and result.train + result.held_out == 60
        )
    # Another spelling of the same data, and a dict of the caller's that stays as it is.
    assert prefcache.prepare(as_paths, quiet=True).train == result.train
    assert isinstance(as_paths["model"], Path)
    for beta in np.array([0.2, 0.4], dtype=np.float32):
        overrides = {"train.beta": beta, "train.batch_size": np.int64(4), "out": tmp_path / "elsewhere"}
        for given in (prepared, tree, loaded):
            with prefcache._open_config(given, overrides) as config:
                assert (config.train.beta, config.train.batch_size) == (float(beta), 4)
                assert config.out == str(tmp_path / "elsewhere") and config.prepare.held_out == 0.2


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"train.bta": 0.1}, r"^overrides: train\.bta.*beta"),
        ({"train.beta": "much"}, r"^overrides: train\.beta"),
        ({"model.beta": 1}, r"^overrides: model is a value, not a section"),
        (
            {"train": {"beta": 1}},
            r"^overrides: train would replace the whole section\. Name single keys, as in 'train\.beta'",
        ),
    ],
)
def test_overrides_that_are_wrong_are_named_as_such(prepared, overrides, sentence):
    with pytest.raises(UsageError, match=sentence):
        prefcache.train(prepared, overrides=overrides)


def test_a_wrong_key_of_a_dict_is_named_as_one():
    with pytest.raises(UsageError, match=r"^config: train\.bta.*beta"):
        prefcache.prepare({"model": "m", "out": "o", "prepare": {"data": "d"}, "train": {"bta": 1}})


@pytest.mark.parametrize("config", [None, ["a.yaml"]], ids=str)
def test_what_is_no_config_is_named(config):
    with pytest.raises(UsageError, match="expected the path of a YAML file, a dict or a loaded config"):
        prefcache.train(config)


def test_small_numbers_survive_as_numbers(prepared):
    # YAML would read the text 1e-07 as a string.
    with prefcache._open_config(prepared, {"train.learning_rate": 1e-7, "train.warmup_steps": None}) as config:
        assert config.train.learning_rate == 1e-7 and config.train.warmup_steps is None


# -- results -----------------------------------------------------------------------------------------------------------


def test_results_have_absolute_paths_wherever_a_runs_own_config_is_used(trained, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = Path("../runs/tiny/trained/config.yaml")
    result = prefcache.train(config, quiet=True)
    assert not result.changed and result.run == trained and result.model == trained / "model"
    page = prefcache.report(config, "page.html", quiet=True)
    assert page.report == tmp_path / "elsewhere/page.html" and page.report.exists()
    assert Path.cwd() == tmp_path / "elsewhere"


def test_a_run_is_shown_in_a_line(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = prefcache.train("config.yaml", quiet=True)
    assert repr(result).startswith(f"TrainResult(run='{trained}', changed=False, steps=14, evaluation={{'loss': 0.")
    assert len(repr(result)) < 700 and result.steps == 14 and result.stopped is None


# -- scripts -----------------------------------------------------------------------------------------------------------

# A script as people write it, without `if __name__ == "__main__":`, that says when it is imported.
ONCE = "import os\nopen('imported', 'a').write(f'{os.getpid()}\\n')\nimport prefcache\n"


IN_A_THREAD = "import threading\nthread = threading.Thread(target=work)\nthread.start()\nthread.join()\n"


@pytest.mark.parametrize(
    ("start", "call"),
    [(["script.py"], "work()\n"), (["-m", "script"], IN_A_THREAD)],
    ids=["file", "module with a thread"],
)
def test_workers_do_not_run_a_script_without_a_main_guard_again(model, tmp_path, start, call):
    # Each file is a task of its own, and a single one would need no workers.
    for n in range(3):
        write_pairs(tmp_path / f"{n}.jsonl", 20, start=20 * n)
    write_config(tmp_path, model)
    (tmp_path / "script.py").write_text(
        f"{ONCE}def work():\n"
        "    result = prefcache.prepare('config.yaml', overrides={'prepare.workers': 2, 'prepare.data': '*.jsonl'})\n"
        "    print(result.train + result.held_out)\n"
        f"{call}print(__spec__ is None, __file__.endswith('script.py'))\n"
    )
    command = [sys.executable, *start]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"60\n{start == ['script.py']} True\n", done.stderr
    assert len((tmp_path / "imported").read_text().splitlines()) == 1


def test_ctrl_c_leaves_a_run_that_continues_to_the_same_bytes(scored, model, tmp_path):
    write_config(tmp_path, model, max_steps=20, checkpoint_every=3, samples=0)
    (tmp_path / "script.py").write_text(
        f"{ONCE}"
        "class Say(prefcache.TrainCallback):\n"
        "    def on_step(self, event):\n"
        "        open('step', 'w').write(str(event.step))\n"
        "run = prefcache.train('config.yaml', callbacks=[Say()])\n"
        "print(run.steps)\n"
    )
    command, pipes = [sys.executable, "script.py"], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=tmp_path, preexec_fn=default_signals, **pipes)
    step = tmp_path / "step"
    while child.poll() is None and not (step.exists() and int(step.read_text() or 0) >= 4):
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGINT and said.rstrip().endswith("KeyboardInterrupt"), said
    run = tmp_path / "runs/tiny/trained"
    assert not (run / "manifest.json").exists()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "train: resuming from step " in again.stderr and again.returncode == 0, again.stderr
    whole = prefcache.train(
        tmp_path / "config.yaml", overrides={"out": tmp_path / "runs/tiny", "train.run": "whole"}, quiet=True
    )
    assert again.stdout == f"{whole.steps}\n" and weights(run) == weights(whole.run)
