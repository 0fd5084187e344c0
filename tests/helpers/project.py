"""The checkout, its command, and small real data and models."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
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


def entry_of(facts: dict[str, Any]) -> Any:
    """As it is read back from the manifest into which these facts of a file were written."""
    from prefcache.pipeline.stored.records import FileEntry

    return FileEntry(file=facts["file"], bytes=facts["bytes"], xxh3_128=facts["xxh3_128"])


@dataclass
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def invoke(folder: Path, *arguments: Any, code: int | None = 0, stdin: str | None = None) -> Done:
    """Run the command as a user does in `folder`, but in this process, which spares importing PyTorch."""
    from click.testing import CliRunner

    from prefcache.cli import main

    with contextlib.chdir(folder):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return checked(Done(result.exit_code, result.stdout, result.stderr), code)


def default_signals() -> None:
    """As a shell starts a command in the foreground, however the tests themselves were started: a background job of a script
    ignores Ctrl-C, and nohup the end of the terminal, and so would whatever they start."""
    for each in (signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)


def start(*command: Any, **options: Any) -> subprocess.Popen:
    """A process that is to be interrupted."""
    return subprocess.Popen(list(map(str, command)), preexec_fn=default_signals, **options)


def has_handlers(process: subprocess.Popen) -> bool:
    """Whether the program's first lines have run. Before, the interpreter itself begins, and no program can answer a signal."""
    with open(f"/proc/{process.pid}/status") as status:
        caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
    return all(caught >> number - 1 & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


def checked(done: Done, code: int | None) -> Done:
    assert code is None or done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def options(*settings: str) -> list[str]:
    """The command line's options for these settings."""
    return [word for setting in settings for word in ("--set", setting)]


def write_config(folder: Path, model: Path, **train: Any) -> Path:
    import yaml

    tree = {
        "model": str(model),
        "out": "runs/tiny",
        "prepare": {"data": "pairs.jsonl", "held_out": 0.2},
        "score": {"tokens_per_shard": 400, "tokens_per_batch": 512},
        # Tests go back to the checkpoints of a finished run, as if it had been interrupted there.
        "train": {"learning_rate": 1e-3, "batch_size": 8, "epochs": 2, "samples": 4, "sample_tokens": 8}
        | {"checkpoints_at_end": "keep"}
        | train,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def link_tree(checkout: Path) -> Path:
    """Make the tree in which a checkout's folders lie as they are imported; return what goes onto PYTHONPATH."""
    package = checkout / ".links/prefcache"
    if not package.exists():
        package.mkdir(parents=True)
        for each in (checkout / "pipeline", *(checkout / "stages").iterdir()):
            (package / each.name).symlink_to(each)
    return package.parent


@dataclass
class Clone:
    """A fresh copy of the repository, with this environment as its .venv, an empty home and no network."""

    folder: Path
    demo_output: str = ""  # of the README's first command, once it has run

    def run(self, command: str, code: int = 0) -> Done:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder.parent / "home"),
            "PYTHONPATH": str(
                link_tree(self.folder)
            ),  # this copy's code, not the one the environment was installed from
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=900
        )
        return checked(Done(done.returncode, done.stdout, done.stderr), code)


@contextlib.contextmanager
def open_folder(kept: Path | None) -> Iterator[Path]:
    """Open this folder, made if need be and kept, or a temporary one."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
