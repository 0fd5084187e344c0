"""The chapter on other trainers: from TRL and back into it for real, and its files and options as the other programs read them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefcache.guide import CHAPTERS
from tests.helpers import foreign_files
from tests.helpers.documents import blocks, commands
from tests.helpers.project import CONSTRAINTS, pair

CHAPTER = CHAPTERS["other-trainers"]
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


def messages(i: int) -> dict[str, list[dict[str, str]]]:
    """A pair as TRL's conversational format has it."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": role, "content": pair(i)[name]}] for name, role in roles.items()}


def test_from_trl_and_back(prefcache, model, tmp_path, monkeypatch, capsys):
    """SFT in TRL, DPO here from TRL's file, and the result in TRL: the margins on the test pairs are those that train reported."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    folder = tmp_path / "data"
    folder.mkdir()
    for split, numbers in (("train", range(40)), ("test", range(40, 56))):
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(messages(i))}\n" for i in numbers))
    answered = [{"prompt": each["prompt"], "completion": each["chosen"]} for each in map(messages, range(40))]
    settings = SFTConfig("sft-steps", max_steps=3, learning_rate=1e-3, **QUIET)
    trainer = SFTTrainer(str(model), settings, train_dataset=datasets.Dataset.from_list(answered))
    trainer.train()
    trainer.save_model("sft")

    theirs = {"model_name_or_path": "sft", "dataset_name": "data", "output_dir": "runs/dpo", "eval_strategy": "steps"}
    theirs |= {"learning_rate": 1e-3, "max_steps": 5, "per_device_train_batch_size": 8, "beta": 0.1}
    Path("dpo.yaml").write_text(yaml.safe_dump(theirs))
    prefcache("from-trl", "dpo.yaml", "--output", "my.yaml")
    for stage in ("prepare", "score"):
        prefcache(stage, "my.yaml")
    reported = [
        json.loads(prefcache("train", "my.yaml", "--json", *more).stdout)["after"]["evaluation"]["data_rewards/margins"]
        for more in ([], ["--set", "train.run=lora", "--set", "train.lora.r=4"])
    ]
    (code,) = blocks("python", CHAPTER)
    quiet = f'DPOConfig("evaluated", {", ".join(f"{key}={value!r}" for key, value in QUIET.items())})'
    code = code.replace('DPOConfig("evaluated", report_to="none")', quiet)
    capsys.readouterr()
    exec(compile(code, CHAPTER, "exec"), {"__name__": "chapter"})
    printed = [float(line) for line in capsys.readouterr().out.splitlines() if line[0] in "-0123456789"]
    assert printed == pytest.approx(reported, abs=1e-4)
    # The two runs learned, and not the same.
    assert all(margin > 0.01 for margin in printed) and abs(printed[0] - printed[1]) > 0.01


# -- as the other programs read them ------------------------------------------------------------------------------------

FILES = {"axolotl": [foreign_files.AXOLOTL], "llamafactory": [foreign_files.LLAMAFACTORY]}
FILES = {
    name: [*files, *(text for text in blocks("yaml", CHAPTER) if text.startswith(f"# {name}"))]
    for name, files in FILES.items()
}
SCHEMAS = {
    "axolotl": """
from axolotl.utils.schemas.config import AxolotlInputConfig

def check(tree):
    AxolotlInputConfig(**tree)
""",
    # Its Transformers still has warmup_ratio, which is warmup_steps below 1 in ours; bf16 asks for a GPU.
    "llamafactory": """
from llamafactory.hparams import DataArguments, FinetuningArguments, GeneratingArguments, ModelArguments, TrainingArguments
from transformers import HfArgumentParser

def check(tree):
    renamed = {"warmup_steps" if key == "warmup_ratio" else key: value for key, value in tree.items() if key != "bf16"}
    parts = ModelArguments, DataArguments, TrainingArguments, FinetuningArguments, GeneratingArguments
    HfArgumentParser(parts).parse_dict(renamed)
""",
}


@pytest.fixture(scope="session")
def foreign(request) -> Path:
    """A folder with the programs' sources alone, without what they require."""
    folder = Path(sys.prefix) / "foreign"
    if not folder.exists():
        named = ("axolotl==", "llamafactory==", "ms-swift==", "omegaconf==", "antlr4-python3-runtime==")
        pins = [line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(named)]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", folder, *pins], check=True, timeout=600)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_the_files_pass_their_programs_schema(foreign, tmp_path, name):
    assert len(FILES[name]) == 3
    script = f"{SCHEMAS[name]}\nimport json, sys\nfor tree in json.load(sys.stdin):\n    check(tree)\nprint('valid')\n"
    trees = [{key: value for key, value in yaml.safe_load(text).items() if value is not None} for text in FILES[name]]
    environment = os.environ | {"PYTHONPATH": str(foreign), "DISABLE_VERSION_CHECK": "1"}

    def run(trees):
        given = {"input": json.dumps(trees), "capture_output": True, "text": True, "timeout": 300}
        return subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, **given)

    assert run(trees).stdout.endswith("valid\n"), run(trees).stderr
    # The schema does refuse: Axolotl a wrong value, LLaMA-Factory an unknown key.
    wrong = trees[0] | {"rl": "nothing", "no_such_key": 1}
    assert run([wrong]).returncode != 0


@pytest.mark.slow
def test_every_setting_of_the_programs_is_known(foreign):
    """Each key of their schemas became something, has no meaning here, or differs in a way that is said."""
    import transformers

    from prefcache.pipeline.foreign_programs import AXOLOTL, LLAMAFACTORY
    from prefcache.pipeline.training.foreign_configs import convert

    theirs = fields_of(foreign / "axolotl/utils/schemas/config.py")
    parts = (
        "HyperparametersConfig",
        "ModelInputConfig",
        "ModelOutputConfig",
        "LoraConfig",
        "ReLoRAConfig",
        "WandbConfig",
    )
    others = {
        name: names
        for file in (foreign / "axolotl/utils/schemas").glob("*.py")
        for name, names in fields_of(file).items()
    }
    names = {*theirs["AxolotlInputConfig"], *(name for part in parts for name in others[part])}
    data = [{"path": "d"}]
    values = {
        "rl": "dpo",
        "trl": {},
        "datasets": data,
        "test_datasets": data,
        "micro_batch_size": 1,
        "max_grad_norm": 1,
    }
    values |= {"gradient_accumulation_steps": 1, "dpo_loss_type": ["ipo"], "dpo_loss_weights": [1], "batch_size": 8}
    found = convert(AXOLOTL, dict.fromkeys(names, "1") | values, Path("a.yaml"))
    assert not found.unknown_keys and len(names) > 300

    parts = ("data_args", "finetuning_args", "model_args", "training_args")
    names = {
        name
        for part in parts
        for fields in fields_of(foreign / f"llamafactory/hparams/{part}.py").values()
        for name in fields
    } | {each.name for each in dataclasses.fields(transformers.Seq2SeqTrainingArguments)}
    values = {"stage": "dpo", "pref_loss": "sigmoid", "pref_bco_weight": 0.1, "pref_ftx": 0.1, "val_size": 0.1}
    values |= {"finetuning_type": "lora", "lora_rank": 8, "per_device_train_batch_size": 1, "dataset_dir": "nowhere"}
    values |= {"gradient_accumulation_steps": 1, "report_to": "none", "max_grad_norm": 1}
    found = convert(LLAMAFACTORY, dict.fromkeys(names, "1") | values, Path("l.yaml"))
    assert not found.unknown_keys and len(names) > 300


@pytest.mark.slow
def test_the_options_of_ms_swift_are_options(foreign):
    (command,) = (each for block in blocks("sh", CHAPTER) for each in commands(block) if each.startswith("swift rlhf"))
    used = {word.removeprefix("--") for word in command.split() if word.startswith("--")}
    files = [*(foreign / "swift/arguments").rglob("*.py"), *(foreign / "swift/trainers").glob("arguments.py")]
    known = {name for file in files for fields in fields_of(file).values() for name in fields}
    assert used - {"output_dir"} <= known and len(used) >= 5  # output_dir is Transformers'


def fields_of(file: Path) -> dict[str, list[str]]:
    """The annotated fields of each class in a file, without importing it."""
    import ast

    return {
        node.name: [each.target.id for each in node.body if isinstance(each, ast.AnnAssign)]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
