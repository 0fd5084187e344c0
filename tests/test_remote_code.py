"""Code that a model's folder brings is never run, and nobody is asked whether it may be."""

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefcache.pipeline import identity
from prefcache.pipeline.config import Score
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.scoring.engines import vllm
from tests.helpers.project import ROOT, invoke, write_pairs

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "unheard_of"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def marker(tmp_path) -> Iterator[Path]:
    """A file that the code writes when it is imported. It never is."""
    yield tmp_path / "code-was-run"
    assert not (tmp_path / "code-was-run").exists()


def write_code(folder: Path, marker: Path) -> None:
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))


def edit(path: Path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.fixture
def own_model(model, tmp_path, marker) -> Path:
    """A model of a class that only its folder has."""
    folder = Path(shutil.copytree(model, tmp_path / "own"))
    write_code(folder, marker)
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": "code.Tokenizer"}
    edit(folder / "config.json", model_type="unheard_of", auto_map=classes)
    return folder


@pytest.fixture
def own_tokenizer(model, tmp_path, marker) -> Path:
    """A model that Transformers knows, and a tokenizer that it does not."""
    folder = Path(shutil.copytree(model, tmp_path / "words"))
    write_code(folder, marker)
    own = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=own)
    return folder


def write_adapter(folder: Path, base: Path) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(b"never read")
    return folder


def refused(*arguments: object, code: int = 2) -> str:
    """What the command says to someone who answers yes to every question."""
    done = invoke(Path.cwd(), *arguments, code=code, stdin="y\n" * 100)
    assert "[y/N]" not in done.stdout + done.stderr
    return done.stdout + done.stderr


SENTENCE = "needs Python code of its own (auto_map in its config), which prefcache never runs"


def test_no_command_runs_the_code_of_a_model(prefcache, scored, own_model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", own_model)
    for command in ("prepare", "preview", "score"):
        for model in (own_model, adapter):
            assert SENTENCE in refused(command, scored, "--set", f"model={model}")
    assert SENTENCE in refused("train", scored, "--set", f"train.model={own_model}")
    assert SENTENCE in refused("doctor", scored, "--set", f"model={own_model}", code=0)
    assert SENTENCE in refused("merge", adapter)


def test_no_command_runs_the_code_of_a_tokenizer(prefcache, scored, own_tokenizer, tmp_path):
    assert SENTENCE in refused("train", scored, "--set", f"train.model={own_tokenizer}")
    write_pairs(tmp_path / "pairs.jsonl", 70)  # so that there is something to prepare
    for command in ("prepare", "preview"):
        assert SENTENCE in refused(command, scored, "--set", f"model={own_tokenizer}")


def test_code_beside_a_class_that_transformers_has_is_passed_over(prefcache, config, model, tmp_path, marker):
    folder = Path(shutil.copytree(model, tmp_path / "known"))
    write_code(folder, marker)
    edit(folder / "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    prefcache("prepare", config, "--set", f"model={folder}")
    prefcache("score", config, "--set", f"model={folder}")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (
            {"trust_remote_code": True},
            "trust_remote_code, which is fixed: code in a model's folder is never run",
        ),
        ({"load_format": "pt"}, "load_format is pt; expected one that reads the model's safetensors files"),
        ({"load_format": "dummy"}, "load_format is dummy"),
    ],
)
def test_options_of_vllm_that_would_run_code_or_read_other_files_are_refused(model, options, found):
    score = Score(engine="vllm", vllm={"options": options})
    with pytest.raises(UsageError, match=found):
        vllm.numerics(identity.Reference(model), score)


def test_vllm_is_not_given_a_folder_with_weights_that_transformers_leaves_out(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "two"))
    shutil.copy(model / "model.safetensors", folder / "more.safetensors")
    with pytest.raises(UsageError, match=r"vLLM would load more\.safetensors .* as well, which Transformers does not"):
        vllm.VllmEngine(identity.Reference(folder), Score(engine="vllm"))


def test_an_adapter_that_names_a_module_to_import_is_refused(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", model)
    edit(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="os")
    with pytest.raises(UsageError, match="names a Python module that PEFT would import"):
        identity.find_adapter(adapter)


def _loads(function: str) -> bool:
    return function.endswith(".from_pretrained") or (function.startswith("Auto") and function.endswith(".from_config"))


def loads() -> Iterator[tuple[str, ast.Call]]:
    """Every call of a from_pretrained in what is shipped."""
    for file in sorted(path for room in ("pipeline", "stages", "data") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and _loads(ast.unparse(node.func)):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", node


def test_every_load_says_that_no_code_is_trusted():
    found = dict(loads())
    assert len(found) >= 4
    for where, call in found.items():
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("trust_remote_code") == "False", where


def test_nothing_shipped_reads_pickles():
    """torch.load, pickle and their kin stand nowhere."""
    for file in sorted(path for room in ("pipeline", "stages", "data") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "pickle.load", "pickle.loads", "joblib.load"), f"{file}: {called}"
                unsafe = [k for k in node.keywords if k.arg == "use_safetensors" and ast.unparse(k.value) != "True"]
                assert not unsafe, file
