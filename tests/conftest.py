"""What the tests share: a tiny real model, small real data, and the command as a user runs it."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Models here are tiny: more threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "tests/constraints.txt"
PREFCACHE = Path(sys.executable).parent / "prefcache"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "red",
    "green",
    "blue",
    "yellow",
    "one",
    "two",
    "three",
    "four",
    "cat",
    "dog",
    "bird",
    "fish",
    "runs",
    "sleeps",
    "eats",
    "sings",
    "a",
    "the",
    "and",
    "why",
]


def pair(i: int) -> dict[str, str]:
    """A small pair; every number gives another."""
    words = [WORDS[(i * 7 + k * (k + i % 5 + 3)) % len(WORDS)] for k in range(12)]
    return {
        "prompt": f"{i}: why {' '.join(words[: 2 + i % 5])}?",
        "chosen": f"the {' '.join(words[3 : 6 + i % 6])} {i}",
        "rejected": f"a {' '.join(words[5 : 7 + i % 4])}",
    }


def write_pairs(path: Path, n: int, start: int = 0, mode: str = "w") -> Path:
    with open(path, mode, encoding="utf-8") as file:
        for i in range(start, start + n):
            file.write(json.dumps(pair(i)) + "\n")
    return path


def build_model(folder: Path, seed: int = 0) -> Path:
    """A tiny Llama with random weights, its tokenizer and a ChatML template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS), "user assistant system\n"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # wide enough that log-probs differ visibly between tokens
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape and tokenizer, other weights."""
    return build_model(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python of .venv-vllm, which is built where it is missing: minutes, once."""
    with open(ROOT / "Makefile") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        subprocess.run(["make", "vllm", f"PYTHON={sys.executable}"], cwd=ROOT, check=True, timeout=1800)
    return ROOT / ".venv-vllm/bin/python"


@pytest.fixture(scope="session")
def torchao() -> Path:
    """A folder with torchao, filled where it is missing. It is kept from all others: wherever it can be found, Transformers
    imports it, which takes a second and prints warnings."""
    folder = Path(sys.prefix) / "torchao"
    with open(ROOT / "Makefile") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        if not (folder / "torchao").exists():
            pinned = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torchao=="))
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "--target", folder, pinned], check=True, timeout=600)
    return folder


@dataclass
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def prefcache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The command with a user's arguments, in a temporary folder. In this process, which spares importing PyTorch."""
    from stages.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any, code: int | None = 0) -> Done:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return _checked(Done(result.exit_code, result.stdout, result.stderr), code)

    return run


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Done]:
    """The command as a process of its own, for what depends on that."""

    def run(*arguments: Any, code: int | None = 0, **options: Any) -> Done:
        command = [PREFCACHE, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, **options)
        assert "Traceback" not in done.stderr, done.stderr
        return _checked(Done(done.returncode, done.stdout, done.stderr), code)

    return run


def _checked(done: Done, code: int | None) -> Done:
    assert code is None or done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    """A config for 60 pairs, in the temporary folder."""
    write_pairs(tmp_path / "pairs.jsonl", 60)
    return write_config(tmp_path, model)


def write_config(folder: Path, model: Path, **train: Any) -> Path:
    import yaml

    tree = {
        "model": str(model),
        "out": "runs/tiny",
        "prepare": {"data": "pairs.jsonl", "held_out": 0.2},
        "score": {"tokens_per_shard": 400, "tokens_per_batch": 512},
        "train": {"learning_rate": 1e-3, "batch_size": 8, "epochs": 2, "samples": 4, "sample_tokens": 8} | train,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@dataclass
class Clone:
    """A fresh copy of the repository, with this environment as its .venv, an empty home and no network."""

    folder: Path
    demo_output: str = ""  # of the README's first command, once it has run

    def run(self, command: str, code: int = 0) -> Done:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder.parent / "home"),
            "PYTHONPATH": str(self.folder),  # this copy's code, not the one the environment was installed from
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=900
        )
        return _checked(Done(done.returncode, done.stdout, done.stderr), code)


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    folder = tmp_path_factory.mktemp("clone") / "prefcache"
    (folder.parent / "home").mkdir()
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listing.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return Clone(folder)


@pytest.fixture(scope="session")
def demo(clone: Clone) -> Clone:
    """The clone after the README's first command."""
    clone.demo_output = clone.run("make prepare score train").stdout
    return clone
