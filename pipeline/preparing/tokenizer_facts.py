"""What preparing reads off a model's tokenizer.

Transformers imports PyTorch with its auto classes, which takes seconds, though tokenizers do not need it. A process that has
not imported PyTorch therefore starts another one, in which PyTorch is hidden and Transformers loads the tokenizer as
always. If that fails, the tokenizer is loaded here, with PyTorch; so errors are the same.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from prefcache.pipeline.preparing.garbage_collection import without_garbage_collection
from prefcache.pipeline.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHILD = """
import json, sys
sys.path[:], folder = json.loads(sys.argv[1])
from prefcache.pipeline.preparing import tokenizer_facts
tokenizer_facts.print_facts(folder)
"""


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer as it is sent to a worker: loading it there takes neither Transformers nor PyTorch."""

    folder: str
    backend: str | None  # as JSON of the tokenizers library; None if Transformers runs it in Python
    special: dict[str, str]  # bos_token, eos_token and the like, as templates print them
    added_tokens: tuple[str, ...]  # the texts that are one token each, special or not
    bos: int | None  # None unless the tokenizer begins a text with it
    eos: int | None
    chat_template: str | None
    tool_template: str | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "TokenizerFacts":
        facts = json.loads(text)
        return cls(**facts | {"added_tokens": tuple(facts["added_tokens"])})


@lru_cache(maxsize=1)
def load_backend(backend: str) -> "Tokenizer":
    """Build a tokenizer of the tokenizers library, which takes up to a second. It is shared: do not change it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(backend)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_facts(folder: Path) -> TokenizerFacts:
    """Load whatever tokenizer the folder has."""
    with load_early(folder):
        process = _early.pop(folder, None)
        output = process.communicate()[0] if process else b""
    if process and process.returncode == 0:
        # A library may have printed something before.
        return TokenizerFacts.from_json(output.splitlines()[-1])
    return _read_facts(folder)


_early: dict[Path, subprocess.Popen[bytes]] = {}


@contextmanager
def load_early(folder: Path) -> Iterator[None]:
    """Start to load a folder's tokenizer while this process does other things; load_facts waits for the result."""
    if "torch" in sys.modules or folder in _early:
        yield
        return
    # -P: the working folder may hold anything, such as a json.py.
    path = [entry for entry in sys.path if isinstance(entry, str)]  # Python skips all others, too
    command = [sys.executable, "-P", "-c", _CHILD, json.dumps([path, str(folder)])]
    silent = subprocess.DEVNULL  # errors are raised where it is loaded again
    with subprocess.Popen(command, stdin=silent, stdout=subprocess.PIPE, stderr=silent) as process:
        _early[folder] = process
        try:
            yield
        finally:
            _early.pop(folder, None)
            process.kill()


def print_facts(folder: str) -> None:
    """Print the facts as a line of JSON. This is for a process of its own: it hides PyTorch for good."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
    with without_garbage_collection():
        print(_read_facts(Path(folder)).to_json())


def _read_facts(folder: Path) -> TokenizerFacts:
    tokenizer = load_tokenizer(folder)
    template = tokenizer.chat_template
    templates = template if isinstance(template, dict) else {"default": template}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    bos = tokenizer.bos_token_id
    return TokenizerFacts(
        folder=str(folder),
        backend=backend.to_str() if backend is not None else None,
        special={name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        added_tokens=tuple(token.content for token in tokenizer.added_tokens_decoder.values()),
        bos=bos if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else None,
        eos=tokenizer.eos_token_id,
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
    )
