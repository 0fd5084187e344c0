"""Facts read without PyTorch are those that Transformers gives with it: every field, and every error."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoConfig, ByT5Tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing.tokenizer_facts import load_facts
from tests.helpers import vision_models
from tests.helpers.tokenizers import CHATML, FAMILIES, build, saved

# What config.json and tokenizer_config.json may say of a tokenizer's class, in agreement or not.
CONFIGS = (None, "llama", "qwen2", "qwen3", "gemma3_text", "deepseek_v3", "mistral", "bert", "no_such_model")
CLASSES = (None, "LlamaTokenizer", "Qwen2TokenizerFast", "GemmaTokenizer", "PreTrainedTokenizer", "NoSuchTokenizer")
PRINT_ALL = """
import sys
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing.tokenizer_facts import print_facts
for folder in sys.argv[1:]:
    try:
        print_facts(folder)
    except UsageError as error:
        print(error)
assert sys.modules["torch"] is None
"""
LOAD = """
import sys
from pathlib import Path
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing import tokenizer_facts
try:
    print(tokenizer_facts.load_facts(Path(sys.argv[1])))
except UsageError as error:
    print(error)
print("torch" in sys.modules, "transformers" in sys.modules)
"""


def run_python(code: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def describe(folder: Path) -> str:
    """What a process with PyTorch, which this one is, loads or says."""
    try:
        return json.dumps(asdict(load_facts(folder)))
    except UsageError as error:
        return str(error)


def edit(file: Path, **settings: object) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | settings))


def copy(folder: Path, target: Path, model_type: str | None = None, **settings: object) -> Path:
    shutil.copytree(folder, target)
    if model_type:
        edit(target / "config.json", model_type=model_type)
    edit(target / "tokenizer_config.json", **settings)
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    found = [saved(family, bos=bos)[0] for family in FAMILIES for bos in (False, True)]
    for family in ("byte-level", "llama-2", "gemma", "unigram"):
        plain = saved(family, bos=True)[0]
        found += [copy(plain, root / f"{family} {name}", name) for name in CONFIGS]
        found += [copy(plain, root / f"{family} of {name}", tokenizer_class=name) for name in CLASSES]
        found.append(copy(plain, root / f"{family} slow", "llama", use_fast=False))
    templates = build("byte-level", template=CHATML)
    templates.chat_template = {"default": CHATML, "tool_use": f"{CHATML}!"}
    templates.save_pretrained(root / "templates")
    ByT5Tokenizer().save_pretrained(root / "python")
    names = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]}}
    own = copy(saved("byte-level")[0], root / "own", "llama", **names)
    no_json = copy(saved("byte-level")[0], root / "no json")
    (no_json / "tokenizer.json").unlink()
    no_config = copy(saved("byte-level")[0], root / "no config")
    (no_config / "tokenizer_config.json").unlink()
    damaged = copy(saved("byte-level")[0], root / "damaged")
    (damaged / "tokenizer.json").write_text("{")
    return [*found, root / "templates", root / "python", own, no_json, no_config, damaged]


def test_hiding_torch_changes_nothing_of_what_is_loaded(folders):
    there = run_python(PRINT_ALL, *folders)
    assert there == [describe(folder) for folder in folders]
    assert any("needs Python code of its own" in line for line in there)
    assert any("has no tokenizer that loads" in line for line in there)
    assert sum(line.startswith("{") for line in there) > 60


def test_loading_imports_neither_torch_nor_transformers(folders):
    facts, loaded = run_python(LOAD, folders[0])
    assert facts == str(load_facts(folders[0]))
    assert loaded == "False False"


def test_what_does_not_load_without_torch_is_loaded_and_refused_with_it(folders):
    (own,) = (folder for folder in folders if folder.name == "own")
    sentence, loaded = run_python(LOAD, own)
    assert sentence == describe(own)
    assert "needs Python code of its own" in sentence
    assert loaded == "True True"


def test_a_file_of_the_working_folder_is_not_imported(folders, tmp_path, monkeypatch):
    (tmp_path / "transformers.py").write_text("raise SystemExit('imported')")
    (tmp_path / "tokenizers.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    code = f"import sys; sys.path.remove(''); sys.argv[1:] = [{str(folders[0])!r}]\n{LOAD}"
    assert run_python(code) == [str(load_facts(folders[0])), "False False"]


def test_entries_of_the_import_path_that_are_no_texts_are_skipped(folders):
    code = f"import pathlib, sys\nsys.path.append(pathlib.Path('/no such folder'))\n{LOAD}"
    assert run_python(code, folders[0]) == [str(load_facts(folders[0])), "False False"]


def test_a_load_that_nobody_waited_for_is_ended(folders):
    code = """
import sys
from pathlib import Path
from prefcache.pipeline.preparing import tokenizer_facts
with tokenizer_facts.load_early(Path(sys.argv[1])):
    (process,) = tokenizer_facts._early.values()
print(process.returncode, tokenizer_facts._early)
"""
    assert run_python(code, folders[0]) == ["-9 {}"]


@pytest.mark.slow
def test_configs_of_all_models_are_the_same_without_torch():
    # The tokenizer's class depends on the config, which Transformers reads on its own where the config's class fails.
    code = (
        "import sys; sys.modules['torch'] = None\n"
        + """
from transformers import AutoConfig
for name in sys.argv[1:]:
    try:
        config = AutoConfig.for_model(name)
        print(type(config).__name__, getattr(config, "tokenizer_class", None))
    except Exception as error:
        print(type(error).__name__)
"""
    )

    def describe_config(name: str) -> str:
        try:
            config = AutoConfig.for_model(name)
        except Exception as error:
            return type(error).__name__
        return f"{type(config).__name__} {getattr(config, 'tokenizer_class', None)}"

    names = sorted(CONFIG_MAPPING_NAMES)
    assert run_python(code, *names) == [describe_config(name) for name in names]


# -- the template of a model that sees images --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"]
)
def test_a_processors_template_is_found_wherever_it_lies(name, tmp_path):
    folder = shutil.copytree(vision_models.save("qwen2.5-vl"), tmp_path / "model")
    template = "{{ messages[0].content }}!"
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template="{# for text alone #}")
    if name == "chat_template.jinja":
        (folder / name).write_text(template)
    elif name == "chat_template.json":
        (folder / name).write_text(json.dumps({"chat_template": template}))
    else:
        edit(folder / name, chat_template=template)
    assert load_facts(folder).chat_template == template
    process = [line for line in run_python(PRINT_ALL, folder) if line.startswith("{")]
    assert json.loads(process[-1])["chat_template"] == template


def test_a_tokenizer_alone_keeps_its_own_template(tmp_path):
    folder = shutil.copytree(saved("byte-level")[0], tmp_path / "model")
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "another"}))
    assert load_facts(folder).chat_template == CHATML
