"""An engine is one file: its name is known to the config, and everything else about it is in its SPEC."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from prefcache.pipeline.config import Score, engine_names
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.scoring import engines
from prefcache.pipeline.scoring.engines import EngineSpec, find_engine, vllm
from tests.helpers.project import ROOT
from tests.helpers.scored import rows_of

CONSTANT = """
import numpy as np
from prefcache.pipeline.scoring import engines
from prefcache.pipeline.scoring.engines import EngineSpec

class Constant:
    def __init__(self, reference, score, images):
        self.facts = {"constant": -1}
    def score(self, sequences):
        return [np.full(len(sequence.completion_ids), -1, np.float32) for sequence in sequences]
    def close(self):
        pass

SPEC = EngineSpec(
    numerics=lambda reference, score: {"engine": "constant", "dtype": "float32"},
    load=Constant,
    remedy="Take a real engine.",
)
"""


# Commands of that tree, in one process; it prints their exit codes and what they say.
SCRIPT = """
import json, sys
from click.testing import CliRunner
from prefcache.cli import main

def run(command, *arguments):
    done = CliRunner().invoke(main, [command, sys.argv[1], "--set", "score.engine=constant", *arguments])
    return done.exit_code, done.stderr if done.exit_code else done.stdout

json.dump([run("score"), run("score", "--json", "--set", "score.parity_sample=0"), run("doctor")], sys.stdout)
"""


def test_a_new_engine_is_one_file(prefcache, config, tmp_path):
    package = tmp_path / "site/prefcache"
    shutil.copytree(ROOT / "pipeline", package / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (ROOT / "stages").iterdir():
        (package / path.name).symlink_to(path)
    (package / "pipeline/scoring/engines/constant.py").write_text(CONSTANT)
    (tmp_path / "script.py").write_text(SCRIPT)
    prefcache("prepare", config)
    done = subprocess.run(
        [sys.executable, "script.py", config],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    (refused, why), (_, result), (_, said) = json.loads(done.stdout)
    assert refused == 4
    assert "engine constant (float32) deviates" in why and "Take a real engine." in why
    assert json.loads(result)["scored"] == 120
    assert all(row["logp_sum"] == -row["n_completion"] for row in rows_of(tmp_path).values())
    assert f"constant (this config): dtype float32; runs in {sys.executable}" in said


def raise_missing(name: str) -> str:
    raise PackageNotFoundError(name)


def test_an_engine_whose_package_is_missing_is_refused_with_its_install(prefcache, config, monkeypatch):
    monkeypatch.setattr(engines, "version", raise_missing)
    prefcache("prepare", config)
    assert "needs torch. Install it: pip install torch." in prefcache("score", config, code=2).stderr


def test_every_engine_has_a_spec_and_a_wrong_name_is_refused_with_the_nearest(prefcache, config):
    assert engine_names() == ["server", "transformers", "vllm"]
    assert all(isinstance(find_engine(name), EngineSpec) for name in engine_names())
    error = prefcache("score", config, "--set", "score.engine=vlm", code=2).stderr
    assert "score.engine: expected one of server, transformers, vllm (did you mean vllm?), found 'vlm'" in error


@pytest.fixture
def has_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this environment had vLLM."""
    monkeypatch.setattr(vllm, "version", lambda name: "0.32.0")


def test_vllm_runs_in_this_environment_if_that_has_it_and_the_config_names_no_other(has_vllm, tmp_path):
    other = Path(shutil.copy("/bin/true", tmp_path / "python"))
    for named, chosen in {
        Score().vllm.python: sys.executable,
        "nowhere/python": sys.executable,
        str(other): str(other),
    }.items():
        python = vllm.choose_python(Score(vllm={"python": named}))
        assert python.path == chosen and python.reason in ("this environment has vLLM", "score.vllm.python")


def test_a_missing_vllm_is_refused_with_how_to_install_it_here(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm, "version", raise_missing)
    with pytest.raises(UsageError, match=r"nowhere/python.*pip install 'prefcache\[vllm\]', or `make vllm`"):
        vllm.choose_python(Score(vllm={"python": "nowhere/python"}))
    # Outside a checkout there is no Makefile.
    assert vllm.describe_install(tmp_path) == "pip install 'prefcache[vllm]'"


@pytest.mark.parametrize(
    ("engine", "remedy"), [("vllm", "hf_overrides.head_dtype instead"), ("server", "Leave it out")]
)
def test_an_engine_that_does_not_follow_the_heads_dtype_refuses_it(engine, remedy):
    engines.refuse_unused(Score(engine=engine))
    engines.refuse_unused(Score(head_dtype="bfloat16"))
    with pytest.raises(UsageError, match=f"score.head_dtype is bfloat16, .* engine {engine} .*{remedy}"):
        engines.refuse_unused(Score(engine=engine, head_dtype="bfloat16"))
