"""A hash of the ids that a tokenizer gives fixed texts: the same files may give other ids in another software version.

Encoding them means loading the tokenizer, which takes seconds; so the result is remembered in the experiment's folder, by
a hash of the files and the versions of the software.
"""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefcache.pipeline import identity, older_ids
from prefcache.pipeline.preparing import tokenizer_facts
from prefcache.pipeline.preparing.encoder import Encoder, ExampleText
from prefcache.pipeline.preparing.tokenizer_facts import TokenizerFacts
from prefcache.pipeline.stored.memos import TokenizersMemo
from prefcache.pipeline.stored.records import Fingerprint, PreparedInputs

# What normalizers, pre-tokenizers and added tokens treat differently. Changing these texts changes all fingerprints.
PROBES = (
    "",
    " ",
    "   two   spaces   and more    ",
    "\n",
    "\n\n\n a line \r\n and another \t\ttab\t",
    "Hello world",
    " Hello world",
    "hello, WORLD! It's 3.14159 o'clock; 1234567890 12,345.67 -- 'quoted' \"twice\" (and) [so] {on} <tag> & more...",
    "don't you'll we've I'm they'd",
    "naïve café \u0065\u0301 ﬁ ﬂ Å Å ½ ① Ⅳ ²",
    "中文字符\uff0c日本語のテキスト。한국어 텍스트",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",  # noqa: RUF001
    "😀👩\u200d👩\u200d👧\u200d👦🇩🇪👍🏽 ❤\ufe0f",
    "می\u200cخواهم \u200b\u00a0\u2028\ufeff\u0000\u0007",  # noqa: RUF001
    "def f(x):\n    if x > 0:\n\t\treturn x ** 2  # comment\n    return None\n\n```python\nprint('hi')\n```\n",
    "https://example.org/a/b?c=d&e=%20f user@example.org C:\\path\\file.txt $x^2 + \\frac{1}{2}$",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s>",
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><bos><start_of_turn>model\n<end_of_turn>",
    "▁▁under Ġspace ##ing <0x0A> <unk> <pad> [MASK]",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!----------------================",
)


def read_fingerprint(
    folder: Path, experiment: Path, loaded: TokenizerFacts | None = None, *, remember: bool = True
) -> Fingerprint:
    """Return the fingerprint of a folder's tokenizer, which is loaded only if the experiment has no memo of it."""
    path, stamp = TokenizersMemo.path(experiment), identity.tokenizer_stamp(folder)
    memo = TokenizersMemo.recall(path) or TokenizersMemo()
    if stamp not in memo.encoded:
        memo = memo.with_another(stamp, _encode(loaded or tokenizer_facts.load_facts(folder)))
        if remember:
            memo.remember(path)
    return memo.encoded[stamp]


def _encode(facts: TokenizerFacts) -> Fingerprint:
    encoder = Encoder(facts)
    specials = sorted({*facts.special.values(), *encoder.decoded_specials()})
    # Each special token on its own, within a text, and all in a row.
    texts = [*PROBES, *specials, *(f"a {token} b" for token in specials), "".join(specials)]
    plain = encoder.encode([ExampleText("A question", (" and its answer.",), plain=True)])
    ids = {"texts": encoder.ids(texts), "plain": [list(each) for each in plain], "specials": specials}
    loads = None  # for a tokenizer run in Python
    if facts.backend is not None:
        # A hash of all that encoding and templates depend on, however it is saved. Truncation and padding are not used
        # here, and training loops leave theirs behind.
        backend = json.loads(facts.backend) | {"truncation": None, "padding": None}
        loads = _hash(asdict(facts) | {"folder": None, "backend": backend})
    return Fingerprint(ids=_hash(ids), loads=loads)


def _hash(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def explain_change(
    recorded: PreparedInputs, inputs: dict[str, Any], folder: Path, experiment: Path, *, remember: bool = True
) -> str | None:
    """Explain why a preparation's ids may differ from those that its tokenizer gives now; None if they cannot."""
    then = recorded.fingerprint
    if then is None:
        # Prepared before there were fingerprints.
        is_same = recorded.tokenizer_id == older_ids.older_tokenizer_id(folder)
        return None if is_same else "its tokenizer has changed"
    now = read_fingerprint(folder, experiment, remember=remember)
    has_same_files = recorded.tokenizer_id == inputs["tokenizer_id"]
    if then.ids != now.ids and has_same_files:
        versions = identity.versions(["transformers", "tokenizers"])
        software = ", ".join(f"{name} {version}" for name, version in versions.items())
        return f"its tokenizer gives other ids in these versions ({software})"
    loads_same = then.loads is not None and then.loads == now.loads
    is_same = then.ids == now.ids and (has_same_files or loads_same)
    return None if is_same else "its tokenizer has changed"
