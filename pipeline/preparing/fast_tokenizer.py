"""The package fastokens: the ids of the tokenizers library in a fraction of the time, and never trusted blindly.

It is refused unless the tokenizer is built of parts for which no difference is known, and gives the same ids for texts
that are difficult. While it encodes, some texts of every part are encoded by the tokenizers library, too. Whatever it does
wrong ends in an error of one of two kinds, upon which the tokenizers library takes over.

`python -m tests.bench.tokenizers FOLDER` looks for differences for as long as one likes.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from prefcache.pipeline.preparing.probe_texts import PROBES
from prefcache.pipeline.preparing.token_ids import Ids, encode_batch, split_flat

if TYPE_CHECKING:
    from tokenizers import Tokenizer

COMPARED_FIRST = 16  # texts of each part
# Odd, as the answers of pairs alternate: an even number would compare the chosen ones alone.
COMPARED_EVERY = 61

# Patterns that Oniguruma and the engines of fastokens read alike: no anchors, possessive or lazy quantifiers, nested
# classes or ".", of the abbreviations those that were compared, and without regard to case only the English contractions,
# since one letter may match two (\u00df and ss).
_ESCAPED = r"\\(?:[pP]\{\w+\}|[rntsS]|[^\w\s])"
_CLASS = rf"\[\^?(?:{_ESCAPED}|(?!&&)[^\[\]\\])+\]"
_CONTRACTIONS = r"\(\?i:(?:'?(?:s|t|re|ve|m|ll|d|\[sdmt\])(?:\|(?!\))|(?=\))))+\)"
_QUANTIFIER = r"(?:[?*+]|\{\d+(?:,\d*)?\})(?![?*+{])"
_LITERAL = r"[^\\()\[\]{}.^$|?*+]"
_SAME_REGEX = re.compile(
    rf"(?:{_CONTRACTIONS}(?:{_QUANTIFIER})?|\||\((?:\?[:!])?|(?:{_ESCAPED}|{_CLASS}|\)|{_LITERAL})(?:{_QUANTIFIER})?)+"
)


class FastTokenizerUnavailable(Exception):
    """It cannot be used for this tokenizer; the message says why."""


class FastTokenizerMismatch(Exception):
    """It gave other ids than the tokenizers library, or failed where that did not."""


def fastokens_version() -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version("fastokens")
    return None


def break_even(backend: str) -> int:
    """Return how many characters a process has to encode for loading to pay off: it takes time in proportion to the JSON."""
    return len(backend) * 2 // 3


class FastTokenizer:
    """Encodes without special tokens of the tokenizer's own, without truncation and padding."""

    def __init__(self, backend: str, exact: "Tokenizer") -> None:
        """backend: the JSON that `exact` was made from, which must neither truncate nor pad."""
        reason = find_untested(exact)
        if reason is not None:
            raise FastTokenizerUnavailable(reason)
        self._exact = exact
        self.n_compared = self._n_encoded = 0
        self._native = load_fastokens(backend)
        probes = list(_probes(exact))
        try:
            self._compare(probes, self._encode(probes))
        except FastTokenizerMismatch as mismatch:
            raise FastTokenizerUnavailable(str(mismatch)) from None
        self.reset()

    def reset(self) -> None:
        """Begin a part: which of its texts are compared depends on the part alone."""
        self.n_compared = self._n_encoded = 0

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        encoded = self._encode(texts)
        first = self._n_encoded
        self._n_encoded += len(texts)
        compared = [
            n - first
            for n in range(first, self._n_encoded)
            if n < COMPARED_FIRST or (n - COMPARED_FIRST) % COMPARED_EVERY == 0
        ]
        self._compare([texts[n] for n in compared], [encoded[n] for n in compared])
        return encoded

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        with _failures_as(FastTokenizerMismatch):
            flat, bounds = self._native.encode_batch_flat(list(texts))
            encoded = split_flat(flat, bounds)
        if len(encoded) != len(texts):
            raise FastTokenizerMismatch(f"fastokens gives ids of {len(encoded)} texts for {len(texts)}")
        return encoded

    def _compare(self, texts: Sequence[str], encoded: Sequence[Ids]) -> None:
        for text, ids, expected in zip(texts, encoded, encode_batch(self._exact, texts), strict=True):
            if ids != expected:
                raise FastTokenizerMismatch(_describe(text, ids, expected))
        self.n_compared += len(texts)


def load_fastokens(backend: str) -> Any:
    """Return the tokenizer of fastokens, unchecked."""
    try:
        from fastokens._native import Tokenizer as Native
    except ImportError as error:
        raise FastTokenizerUnavailable(f"fastokens cannot be imported: {error}") from None
    with _own_environment(), _failures_as(FastTokenizerUnavailable):
        native = Native.from_json_str(backend)
        native.no_truncation()
        native.no_padding()
        native.encode_batch_flat(["a", "b"])  # reads how many threads it may have
        return native


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Keep it to one thread, as it was compared; hide settings meant for other programs that use it."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("FASTOKENS_")}
    os.environ["FASTOKENS_BPE_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["FASTOKENS_BPE_THREADS"]
        os.environ.update(hidden)


@contextlib.contextmanager
def _failures_as(kind: type[Exception]) -> Iterator[None]:
    """Turn errors, and panics of its Rust code, which derive from BaseException, into errors of our kind."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"fastokens failed with {type(error).__name__}: {str(error)[:300]}") from error


# -- what was compared for long, and found equal ---------------------------------------------------------------------


def find_untested(exact: "Tokenizer") -> str | None:
    """Return the part of a tokenizer for which a difference is known, or which was never compared; None if all are fine."""
    from tokenizers.models import BPE

    model = exact.model
    if not isinstance(model, BPE):
        return f"its model is {type(model).__name__}: fastokens has BPE alone"
    if model.dropout:
        return "its model drops merges at random"
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return "its model marks the pieces of words"
    normalizers = _steps(exact.normalizer, "normalizers")
    pre_tokenizers = _steps(exact.pre_tokenizer, "pretokenizers")
    is_byte_level = any(step["type"] == "ByteLevel" for step in pre_tokenizers)
    return (
        next((reason for step in normalizers if (reason := _untested_normalizer(step))), None)
        or next((reason for step in pre_tokenizers if (reason := _untested_pre_tokenizer(step))), None)
        or _untested_vocabulary(exact, is_byte_level)
        or next(
            (
                f"its added token {token.content!a} takes the spaces on both sides"
                for token in exact.get_added_tokens_decoder().values()
                if token.lstrip and token.rstrip
            ),
            None,
        )
    )


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """Return the settings of a normalizer or pre-tokenizer, or of those in a row."""

    def flatten(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if settings["type"] != "Sequence":
            yield settings
        for step in settings.get(name, []):
            yield from flatten(step)

    return [] if part is None else list(flatten(json.loads(part.__getstate__())))


def _untested_normalizer(settings: dict[str, Any]) -> str | None:
    if settings["type"] in ("NFC", "Prepend") or (settings["type"] == "Replace" and "String" in settings["pattern"]):
        return None
    return f"its normalizer {settings['type']} was not compared"


def _untested_pre_tokenizer(settings: dict[str, Any]) -> str | None:
    match settings:
        case {"type": "ByteLevel"} | {"type": "Split", "pattern": {"String": _}}:
            return None
        case {"type": "Split", "pattern": {"Regex": pattern}} if _SAME_REGEX.fullmatch(pattern):
            return None
        case {"type": "Split", "pattern": pattern}:
            return f"its pre-tokenizer splits at {pattern}, which regex engines may read differently"
    return f"its pre-tokenizer {settings['type']} was not compared"


def _untested_vocabulary(exact: "Tokenizer", is_byte_level: bool) -> str | None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = exact.get_vocab(with_added_tokens=False)
    if is_byte_level:
        return None if tokens.keys() >= set(ByteLevel.alphabet()) else "its vocabulary lacks bytes"
    # fastokens finds a token such as <0x0A> in a text, although no merges lead there, if it has characters that are
    # not tokens themselves.
    missing = set("".join(tokens)) - tokens.keys()
    if missing:
        return f"its vocabulary has {min(missing)!a} within tokens, but not as a token"
    has_bytes = exact.model.byte_fallback and all(f"<0x{byte:02X}>" in tokens for byte in range(256))
    return None if has_bytes or exact.model.unk_token in tokens else "it drops characters that it does not know"


# -- difficult texts -------------------------------------------------------------------------------------------------


def _probes(exact: "Tokenizer") -> Iterator[str]:
    yield from PROBES
    for token in exact.get_added_tokens_decoder().values():
        text = token.content
        yield text
        yield f"a{text}b{text}{text} {text}\n{text}  c {text[:-1]} {text[1:]}"
    yield from (f"<0x{byte:02X}>" for byte in range(256))
    # Characters of every kind, among them some that only newer versions of Unicode know.
    for numbers in (
        range(0x20, 0x3400, 3),
        range(0x3400, 0xD800, 97),
        range(0xE000, 0x20000, 53),
        range(0x2EBF0, 0x2EE60, 7),
    ):
        yield "".join(f"a{chr(number)}b {chr(number)}" for number in numbers)
    for letter in ("a", "A", " ", "\n", "\r\n", "\t", "1", "!", "\u00a0", "\u4e2d", "e\u0301", "\U0001f600", "'s"):
        yield from (letter * 2, letter * 3, f" {letter * 17}\n", f"x{letter * 1500}y")
    # Beyond the sizes at which texts are split into chunks, twice with the same beginning.
    long = "".join(f"{probe}\n{' ' * n}{'word ' * 60}{'long' * 40 * n}" for n, probe in enumerate(PROBES))
    yield from (long, f"{long[:-1]}s  end", long[: len(long) // 2] + " \u0301")


def _describe(text: str, ids: Ids, expected: Ids) -> str:
    n = next((n for n, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected)))
    shown = ascii(text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}")
    return (
        f"fastokens gives other ids than tokenizers for a text of {len(text)} characters, {shown}: from token {n} on, "
        f"{ids[n : n + 4].tolist()} instead of {expected[n : n + 4].tolist()}"
    )
