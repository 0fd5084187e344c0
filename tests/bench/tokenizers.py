"""Compare fastokens with the tokenizers library on texts made to tell them apart.

    make compare-tokenizers MODEL=path/to/model
    python -m tests.bench.tokenizers FOLDER --minutes 10 --data pairs.jsonl

FOLDER has a tokenizer. Every code point is encoded, every token of the vocabulary, each added token in many surroundings, long
texts, and for some minutes random ones. A difference is printed with the shortest text that shows it; the exit code is 1 if there
is one.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from prefcache.pipeline.preparing import fast_tokenizer, tokenizer_facts
from prefcache.pipeline.preparing.probe_texts import PROBES
from prefcache.pipeline.preparing.token_ids import Ids, encode_batch, split_flat

SURROGATES = range(0xD800, 0xE000)
_BATCH = 2000
_MOST_REPORTED = 20  # differences by kind of text
SPACES = (
    " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2007\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
)
SCRIPTS = {
    "ascii": "".join(map(chr, range(32, 127))),
    "letters": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "contractions": "'\u2019sStTrReEvVmMlLdD\u017f\u212a ",
    "digits": "0123456789\u0660\u0969\uff11\u00b2\u00bd\u2460\u2167",
    "spaces": SPACES,
    "line ends": "\r\n\r\n \t",
    "control": "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)])),
    "latin": "".join(map(chr, range(0xC0, 0x250))),
    "marks": "aeiou\u0300\u0301\u0302\u0308\u0327\u0338\u0345\u05b0\u064b\u093e\u0e31\u1ab0\u20dd\ufe20\u3099",
    "composed": "e\u0301\u00e9\u1ea5\ua7b5A\u030a\u212b\uac00\u1100\u1161\u11a8\ufb01\u0958\u0344\u2126\u2adc",
    "han": "\u4e2d\u6587\u5b57\u7684\u4e00\u662f\u4e0d\u4e86\u4eba\u6211\uff0c\u3002\uff01\uff1f\U00020000\u2f00\uf900",
    "kana": "".join(map(chr, range(0x3040, 0x3100))),
    "hangul": "".join(map(chr, range(0xAC00, 0xD7A0, 97))),
    "greek": "".join(map(chr, [*range(0x370, 0x400), *range(0x1F00, 0x2000)])),
    "cyrillic": "".join(map(chr, range(0x400, 0x500))),
    "rtl": "".join(map(chr, [*range(0x5D0, 0x5EB), *range(0x620, 0x660), 0x200E, 0x200F, 0x202B])),
    "indic": "".join(map(chr, [*range(0x900, 0x980), *range(0xE00, 0xE60)])),
    "emoji": "\U0001f600\U0001f468\u200d\U0001f469\U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd\u2764\ufe0f\U000e0067\U000e007f",
    "joiners": "a\u200b\u200c\u200d\u2060\u00ad\ufe0f\u034f ",
    "symbols": "\u2581\u0120\u010a<>|[]{}()#*_=-+/\\.,;:!?@$%^&~`\"'\u2014\u2026\u20ac\u2211",
    "rare": "\ufffd\uffff\ufffe\U0010ffff\ue000\U000f0000\u0378\U0001d400\U00010400\U00016800\U0001e900",
}


class Comparison:
    """One tokenizer by both libraries; counts what is compared, and keeps what differs."""

    def __init__(self, backend: str) -> None:
        self.exact = tokenizer_facts.load_backend(backend)
        self.native = fast_tokenizer.load_fastokens(backend)
        self.n_texts = self.n_characters = 0
        self.seconds = [0.0, 0.0]  # exact, fast
        self.differences: dict[str, list[tuple[str, str]]] = {}

    def encode_exact(self, texts: list[str]) -> list[Ids]:
        return encode_batch(self.exact, texts)

    def encode_fast(self, texts: list[str]) -> list[Ids]:
        flat, bounds = self.native.encode_batch_flat(texts)
        return split_flat(flat, bounds)

    def compare(self, kind: str, texts: list[str]) -> None:
        start = time.process_time()
        expected = self.encode_exact(texts)
        middle = time.process_time()
        try:
            encoded = self.encode_fast(texts)
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            if len(texts) == 1:
                self._keep(kind, texts[0], f"{type(error).__name__}: {error}")
            else:
                for text in texts:
                    self.compare(kind, [text])
            return
        self.seconds[0] += middle - start
        self.seconds[1] += time.process_time() - middle
        self.n_texts += len(texts)
        self.n_characters += sum(map(len, texts))
        for text, ids, exact_ids in zip(texts, encoded, expected, strict=True):
            if ids != exact_ids:
                short = text if len(self.differences.get(kind, [])) >= _MOST_REPORTED else self._shorten(text)
                found = "only after other texts" if short is None else self._explain(short)
                self._keep(kind, text if short is None else short, found)

    def _keep(self, kind: str, text: str, found: str) -> None:
        kept = self.differences.setdefault(kind, [])
        kept.append((text, found))
        if len(kept) <= _MOST_REPORTED:
            shown = ascii(text if len(text) < 300 else f"{text[:200]}...{text[-80:]}")
            print(f"  {kind}: {len(text)} characters {shown}\n    {found}", flush=True)

    def differs(self, text: str) -> bool:
        try:
            return self.encode_exact([text]) != self.encode_fast([text])
        except Exception:
            return True

    def _explain(self, text: str) -> str:
        (exact,), (fast,) = self.encode_exact([text]), self.encode_fast([text])
        n = next((n for n, (a, b) in enumerate(zip(exact, fast, strict=False)) if a != b), min(len(exact), len(fast)))
        tokens = [[self.exact.id_to_token(i) for i in ids[n : n + 4]] for ids in (exact, fast)]
        return f"from token {n}: {exact[n : n + 4].tolist()} {tokens[0]}, not {fast[n : n + 4].tolist()} {tokens[1]}"

    def _shorten(self, text: str) -> str | None:
        """Remove what can be removed while the ids differ; None if the text alone does not differ."""
        if not self.differs(text):
            return None
        until = time.monotonic() + 20
        size = len(text) // 2
        while size and time.monotonic() < until:
            at = 0
            while at < len(text) and time.monotonic() < until:
                shorter = text[:at] + text[at + size :]
                if shorter and self.differs(shorter):
                    text = shorter
                else:
                    at += size
            size //= 2
        return text


# -- texts -----------------------------------------------------------------------------------------------------------


def code_points() -> Iterator[str]:
    """Yield every code point alone, and between others."""
    for number in range(sys.maxunicode + 1):
        if number not in SURROGATES:
            c = chr(number)
            yield c
            yield f"a{c}b {c} {c}{c}1{c}\n{c}!{c}"


def around_tokens(added: list[str]) -> Iterator[str]:
    for token in added:
        yield token
        yield token * 2
        for a, b in (
            (" ", " "),
            ("\n", "\n"),
            ("a", "b"),
            ("  ", "  "),
            ("1", "2"),
            (" a ", " b "),
            (".", "."),
            ("\t", "\u3000"),
        ):
            yield f"x{a}{token}{b}y"
            yield f"{a}{token}{b}{token}{token}{a}"
        yield token[:-1]
        yield token[1:]
        yield token.upper() + token.lower()
        yield f"e\u0301{token}\u0301"


def random_texts(random_: random.Random, added: list[str], pieces: list[str], words: list[str]) -> Iterator[str]:
    alphabets = list(SCRIPTS.values())
    units = [" ", "\n", "\r\n", "'s", "'LL", " 12", "a", "\u2019re", "\n\n", "   ", "\t"]
    while True:
        chosen = random_.sample(alphabets, random_.randint(1, 4))
        tokens = random_.sample(added, min(len(added), 4)) if added else []
        parts: list[str] = []
        for _ in range(random_.choice((3, 10, 30, 100))):
            match random_.randrange(8):
                case 0 if tokens:
                    part = random_.choice(tokens)
                    part = part[random_.randint(0, 1) :] if random_.random() < 0.2 else part
                case 1:
                    part = random_.choice(pieces)
                case 2:
                    part = random_.choice(words)
                case 3:
                    part = random_.choice(SPACES) * random_.choice((1, 1, 2, 3, 8))
                case 4:
                    part = random_.choice(units)
                case 5:
                    part = chr(random_.choice((random_.randrange(0xD800), random_.randrange(0xE000, 0x110000))))
                case _:
                    part = "".join(random_.choices(random_.choice(chosen), k=random_.choice((1, 1, 2, 4, 9))))
            parts.append(part * (random_.choice((1, 1, 1, 1, 1, 2, 3, 17))))
        yield "".join(parts)


def mutated(random_: random.Random, texts: list[str], added: list[str]) -> Iterator[str]:
    """Yield pieces of real texts, changed in a few places."""
    letters = "".join(SCRIPTS.values())
    while True:
        text = random_.choice(texts)
        begin = random_.randrange(len(text))
        cut = list(text[begin : begin + random_.choice((20, 200, 2000))])
        for _ in range(random_.randint(0, 6)):
            at = random_.randint(0, len(cut))
            cut[at : at + random_.randint(0, 3)] = random_.choice(
                (random_.choice(letters), random_.choice(added or ["\n"]))
            )
        yield "".join(cut)


def long_texts(random_: random.Random, added: list[str], texts: list[str]) -> Iterator[str]:
    """Yield texts beyond the sizes at which an implementation may work in chunks."""
    units = [
        "a",
        " ",
        "\n",
        "\r\n",
        "1",
        "!",
        "\U0001f600",
        "\u4e2d",
        "e\u0301",
        "\u3000",
        "ab ",
        "a1",
        " a",
        "'s",
        "\t ",
    ]
    units += [random_.choice(added)] if added else []
    for unit in units:
        for size in (255, 1023, 1025, 4097, 8191, 16_385, 32_769, 65_535, 65_537, 100_003):
            yield unit * (size // len(unit))
            yield "x" + unit * (size // len(unit)) + "y"
    for size in (5000, 17_000, 40_000, 70_000, 140_000, 300_000):
        for _ in range(6):
            parts, length = [], 0
            while length < size:
                part = random_.choice(texts)[: random_.choice((50, 3000))]
                if random_.random() < 0.3:
                    part += random_.choice(units) * random_.choice((1, 3, 600, 1100, 3000))
                parts.append(part)
                length += len(part)
            yield "".join(parts)


def extended(random_: random.Random, texts: list[str]) -> Iterator[str]:
    """Yield texts that begin like the one before, cut anywhere: what a cache of prefixes could get wrong."""
    long = [text for text in texts if len(text) > 1000] or texts
    ends = ["", " ", "  ", "\n", "s", "'s", "1", "!", "\u0301", "\u4e2d", "\r", "a b", " 12", "\u200d"]
    while True:
        whole = "".join(random_.choices(long, k=8))
        for _ in range(6):
            yield whole[: random_.randint(len(whole) // 2, len(whole))] + random_.choice(ends) * random_.randint(1, 3)


def vocabulary(exact: Tokenizer) -> Iterator[str]:
    """Yield every token as the vocabulary has it, and as text: alone, as a word, and within one."""
    for token, number in exact.get_vocab(with_added_tokens=False).items():
        yield token
        yield exact.decode([number], skip_special_tokens=False)
        yield f"a {token} {token}b"


def vocabulary_pairs(random_: random.Random, pieces: list[str]) -> Iterator[str]:
    while True:
        yield "".join(random_.choices(pieces, k=random_.choice((2, 2, 3, 8))))


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Return the strings in JSON or JSON Lines files."""

    def strings(value: object) -> Iterator[str]:
        if isinstance(value, str) and value:
            yield value
        elif isinstance(value, dict | list):
            for each in value.values() if isinstance(value, dict) else value:
                yield from strings(each)

    texts: list[str] = []
    for path in paths:
        content = path.read_text(encoding="utf-8")
        try:
            texts += strings(json.loads(content))
        except json.JSONDecodeError:
            texts += strings([json.loads(line) for line in content.splitlines() if line.strip()])
    return list(dict.fromkeys(texts))


# -- the run ---------------------------------------------------------------------------------------------------------


def run(
    backend: str, *, minutes: float, seed: int, data: list[Path], only: str = "", report: Callable[[str], None] = print
) -> Comparison:
    comparison = Comparison(backend)
    random_ = random.Random(seed)
    added = [token.content for token in comparison.exact.get_added_tokens_decoder().values() if token.content]
    ids = random_.sample(range(comparison.exact.get_vocab_size()), min(20_000, comparison.exact.get_vocab_size()))
    pieces = [
        text for i in ids if (text := comparison.exact.decode([i], skip_special_tokens=False)) and "\ufffd" not in text
    ] or ["a"]
    texts = read_texts(data) or [probe for probe in PROBES if probe]
    words = [word for text in texts[:2000] for word in text.split()] or ["word"]
    endless = {
        "random": random_texts(random_, added, pieces, words),
        "mutated": mutated(random_, texts, added),
        "extended": extended(random_, texts),
        "tokens": vocabulary_pairs(random_, pieces),
    }
    fixed = {
        "probes": iter(PROBES),
        "added tokens": around_tokens(added),
        "data": iter(texts),
        "vocabulary": vocabulary(comparison.exact),
        "long": long_texts(random_, added, texts),
        "code points": code_points(),
    }
    for kind, source in {**fixed, **endless}.items():
        if only and kind not in only.split(","):
            continue
        until = time.monotonic() + minutes * 60 / len(endless)
        n_texts, n_characters, (exact, fast) = comparison.n_texts, comparison.n_characters, comparison.seconds
        size = {"long": 4, "extended": 12, "data": 200}.get(kind, _BATCH)
        while (batch := list(islice(source, size))) and (kind in fixed or time.monotonic() < until):
            comparison.compare(kind, batch)
        report(
            f"{kind:14} {comparison.n_texts - n_texts:9,} texts {comparison.n_characters - n_characters:13,} characters "
            f"{len(comparison.differences.get(kind, [])):6,} differ; CPU s: {comparison.seconds[0] - exact:7.2f} with "
            f"tokenizers {comparison.seconds[1] - fast:7.2f} with fastokens"
        )
    return comparison


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=4, help="for random texts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data", type=Path, nargs="*", default=[], help="JSON or JSON Lines whose strings are used, too"
    )
    parser.add_argument("--only", default="", help="kinds of texts, with commas")
    arguments = parser.parse_args()
    backend = tokenizer_facts.load_facts(arguments.folder).backend
    if backend is None:
        print(f"{arguments.folder} has a tokenizer that runs in Python")
        return 2
    try:
        fast_tokenizer.FastTokenizer(backend, tokenizer_facts.load_backend(backend))
    except fast_tokenizer.FastTokenizerUnavailable as unavailable:
        print(f"prepare does not use fastokens: {unavailable}")
    comparison = run(backend, minutes=arguments.minutes, seed=arguments.seed, data=arguments.data, only=arguments.only)
    return bool(comparison.differences)


if __name__ == "__main__":
    sys.exit(main())
