"""The package fastokens: the ids of the tokenizers library in less time, and never trusted blindly.

It is refused if it does not load the tokenizer, or if it gives other ids for texts that are known to be difficult. While it
encodes, some texts of every part are encoded by the tokenizers library, too. A difference ends its use.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from prefcache.pipeline.preparing.probe_texts import PROBES
from prefcache.pipeline.preparing.token_ids import Ids, split_flat, to_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

COMPARED_FIRST = 16  # texts of each part
COMPARED_EVERY = 64


class FastTokenizerUnavailable(Exception):
    """It cannot be used for this tokenizer; the message says why."""


class FastTokenizerMismatch(Exception):
    """It gave other ids than the tokenizers library, or failed where that did not."""


def fastokens_version() -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version("fastokens")
    return None


class FastTokenizer:
    """Encodes without special tokens of the tokenizer's own, without truncation and padding."""

    def __init__(self, backend: str, exact: "Tokenizer") -> None:
        """backend: the JSON that `exact` was made from."""
        self._exact = exact
        self._fast = _load(backend)
        self.n_compared = 0
        self._n_encoded = 0
        texts = list(_probes(exact))
        try:
            self._compare(texts, self._encode(texts))
        except FastTokenizerMismatch as mismatch:
            raise FastTokenizerUnavailable(str(mismatch)) from None
        self.reset()

    def reset(self) -> None:
        """Begin a part: which of its texts are compared depends on the part alone."""
        self._n_encoded = self.n_compared = 0

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        encoded = self._encode(texts)
        chosen = [
            n
            for n, number in enumerate(range(self._n_encoded, self._n_encoded + len(texts)))
            if number < COMPARED_FIRST or number % COMPARED_EVERY == 0
        ]
        self._n_encoded += len(texts)
        self._compare([texts[n] for n in chosen], [encoded[n] for n in chosen])
        return encoded

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        with _failures_as(FastTokenizerMismatch):
            return split_flat(*self._fast.encode_batch_flat(list(texts)))

    def _compare(self, texts: Sequence[str], encoded: Sequence[Ids]) -> None:
        expected = self._exact.encode_batch_fast(list(texts), add_special_tokens=False)
        for text, ids, encoding in zip(texts, encoded, expected, strict=True):
            if ids != to_ids(encoding.ids):
                raise FastTokenizerMismatch(_describe(text, ids, to_ids(encoding.ids)))
        self.n_compared += len(texts)


def _load(backend: str) -> Any:
    try:
        from fastokens._native import Tokenizer as Native
    except ImportError as error:
        raise FastTokenizerUnavailable(f"the package fastokens is not installed ({error})") from None
    with _own_environment(), _failures_as(FastTokenizerUnavailable):
        native = Native.from_json_str(backend)
        native.no_truncation()
        native.no_padding()
        native.enable_segment_cache(0)
    return native


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Drop settings meant for other programs that use fastokens; in a worker process, keep it to one thread."""
    for name in [name for name in os.environ if name.startswith("FASTOKENS_")]:
        del os.environ[name]
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "off", "no"):
        os.environ["FASTOKENS_BPE_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"
    yield


@contextlib.contextmanager
def _failures_as(kind: type[Exception]) -> Iterator[None]:
    """Turn errors, and panics of its Rust code, which are no Exception, into errors of our kind."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"fastokens failed: {type(error).__name__}: {str(error)[:300]}") from error


def _probes(exact: "Tokenizer") -> Iterator[str]:
    yield from PROBES
    for token in exact.get_added_tokens_decoder().values():
        text = token.content
        yield text
        yield f"a{text}b{text}{text} {text}\n{text}  c"


def _describe(text: str, ids: Ids, expected: Ids) -> str:
    n = next((n for n, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected)))
    shown = ascii(text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}")
    return (
        f"fastokens gives other ids than tokenizers for a text of {len(text)} characters, {shown}: from token {n} on, "
        f"{ids[n : n + 4].tolist()} instead of {expected[n : n + 4].tolist()}"
    )


def break_even(backend: str) -> int:
    """Return the number of characters that have to be encoded for loading to pay off."""
    return len(backend) // 2
