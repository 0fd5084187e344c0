"""fastokens gives the ids of the tokenizers library, or is not used."""

import functools
import json
import os
import random
import subprocess
import sys
import time
from array import array

import pytest
from tokenizers import Tokenizer

from prefcache.pipeline.preparing import fast_tokenizer, tokenizer_facts
from prefcache.pipeline.preparing.fast_tokenizer import (
    COMPARED_EVERY,
    COMPARED_FIRST,
    FastTokenizer,
    FastTokenizerMismatch,
    FastTokenizerUnavailable,
    fastokens_version,
    find_untested,
)
from prefcache.pipeline.preparing.token_ids import split_flat, to_ids
from prefcache.pipeline.preparing.tokenizer_facts import load_backend
from tests.bench import tokenizers as comparison
from tests.helpers import tokenizers
from tests.helpers.real_tokenizers import fetch_or_skip
from tests.helpers.tokenizers import GPT2, LLAMA3

pytest.importorskip("fastokens")
# Unlike the tokenizers here, real ones of this kind have a token for each character that occurs within tokens.
USABLE = ["byte-level", "tiktoken", "byte-level split", "complete gemma"]


@functools.cache
def backend_of(family: str) -> str:
    if not family.startswith("complete "):
        return tokenizers.facts(family).backend
    settings = json.loads(tokenizers.facts(family.removeprefix("complete ")).backend)
    vocabulary = settings["model"]["vocab"]
    for letter in sorted(set("".join(vocabulary)) - vocabulary.keys()):
        vocabulary[letter] = len(vocabulary)
    return json.dumps(settings)


def changed(family: str, **changes) -> str:
    settings = json.loads(backend_of(family))
    settings["model"] |= changes.pop("model", {})
    return json.dumps(settings | changes)


def split_at(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def test_flat_ids_are_split_at_their_bounds():
    flat, bounds = array("I", [5, 6, 7, 8]).tobytes(), array("Q", [0, 3, 3, 4]).tobytes()
    assert [ids.tolist() for ids in split_flat(flat, bounds)] == [[5, 6, 7], [], [8]]
    assert split_flat(b"", array("Q", [0]).tobytes()) == []
    assert to_ids([1, 2]).tobytes() == array("i", [1, 2]).tobytes()


@pytest.mark.parametrize("family", USABLE)
def test_ids_are_those_of_the_tokenizers_library(family):
    exact = load_backend(backend_of(family))
    fast = FastTokenizer(backend_of(family), exact)
    added = [token.content for token in exact.get_added_tokens_decoder().values()]
    made = comparison.random_texts(random.Random(0), added, ["the", " dog"], ["word"])
    texts = ["", *(next(made) for _ in range(500))]
    expected = [encoding.ids for encoding in exact.encode_batch(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in fast.encode(texts)] == expected
    assert all(isinstance(ids, array) and ids.typecode == "i" for ids in fast.encode(texts[:2]))
    assert fast.encode([]) == []


@pytest.mark.parametrize("family", ["byte-level", "complete gemma"])
def test_long_random_comparison_finds_no_difference(family):
    found = comparison.run(
        backend_of(family),
        minutes=0.05,
        seed=1,
        data=[],
        only="probes,added tokens,vocabulary,random,mutated,extended,tokens",
    )
    assert found.n_texts > 1000 and not found.differences


@pytest.mark.slow
def test_every_code_point_gives_the_same_ids():
    found = comparison.run(backend_of("tiktoken"), minutes=0, seed=1, data=[], only="code points")
    assert found.n_texts == 2 * (0x110000 - 0x800) and not found.differences  # all but surrogates, in two texts each


# As Transformers loads them: it makes DeepSeek V3's and Llama 2's one with Metaspace.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gptoss", "gemma3", "gemma", "deepseek_v3", "llama2"])
def test_real_tokenizers_give_the_same_ids_or_are_refused(name):
    backend = tokenizer_facts.load_facts(fetch_or_skip(name)).backend
    exact = load_backend(backend)
    if name in ("deepseek_v3", "llama2"):
        with pytest.raises(FastTokenizerUnavailable, match="Metaspace was not compared"):
            FastTokenizer(backend, exact)
        return
    FastTokenizer(backend, exact)
    kinds = "probes,added tokens,vocabulary,long,random,mutated,extended,tokens"
    found = comparison.run(backend, minutes=0.2, seed=time.time_ns(), data=[], only=kinds)
    assert found.n_texts > 100_000 and not found.differences


@pytest.mark.slow
def test_deepseek_as_its_file_says_gives_the_same_ids():
    backend = (fetch_or_skip("deepseek_v3") / "tokenizer.json").read_text(encoding="utf-8")
    FastTokenizer(backend, load_backend(backend))
    kinds = "probes,added tokens,vocabulary,random,mutated,extended,tokens"
    assert not comparison.run(backend, minutes=0.2, seed=time.time_ns(), data=[], only=kinds).differences


def test_special_tokens_truncation_and_padding_are_left_out():
    settings = json.loads(tokenizers.facts("byte-level", bos=True).backend)
    settings["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    settings["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    backend = json.dumps(settings)
    (ids,) = FastTokenizer(backend, load_backend(backend)).encode(["the cat sings and the dog runs"])
    assert ids.tolist() == load_backend(backend_of("byte-level")).encode("the cat sings and the dog runs").ids


def test_a_tokenizer_that_encodes_otherwise_is_refused_at_the_start():
    other = json.loads(backend_of("byte-level"))
    other["model"]["merges"].reverse()
    with pytest.raises(FastTokenizerUnavailable, match="gives other ids than tokenizers for a text of"):
        FastTokenizer(json.dumps(other), load_backend(backend_of("byte-level")))


def without_probes(backend: str, exact: Tokenizer, monkeypatch) -> FastTokenizer:
    monkeypatch.setattr(fast_tokenizer, "_probes", lambda exact: iter(["x"]))
    return FastTokenizer(backend, exact)


def test_a_difference_is_found_while_it_encodes(monkeypatch):
    # One letter is another token. Text 16 is not among the first 16, but compared as the first of every 61.
    settings = json.loads(backend_of("byte-level"))
    vocabulary = settings["model"]["vocab"]
    vocabulary["q"], vocabulary["j"] = vocabulary["j"], vocabulary["q"]
    fast = without_probes(json.dumps(settings), load_backend(backend_of("byte-level")), monkeypatch)
    texts = ["the cat"] * 200
    texts[COMPARED_FIRST + 1] = "a q"  # not compared
    fast.encode(texts)
    assert fast.n_compared == COMPARED_FIRST + 4  # texts 16, 77, 138 and 199
    fast.reset()
    # "a", a space, three bytes and a space come before the letter: it is token 6.
    texts[COMPARED_FIRST + COMPARED_EVERY] = "a \u2028 q" + "z" * 100
    with pytest.raises(
        FastTokenizerMismatch, match=r"text of 105 characters, 'a \\u2028 qz+\.\.\.z+': from token 6 on"
    ):
        fast.encode(texts)


def test_which_texts_are_compared_depends_on_the_part_alone():
    exact = load_backend(backend_of("byte-level"))
    counts = []
    for sizes in ([300], [7] * 42 + [6], [1] * 300):
        fast = FastTokenizer(backend_of("byte-level"), exact)
        fast.encode(["an earlier part"] * 50)
        fast.reset()
        for size in sizes:
            fast.encode(["a text"] * size)
        counts.append(fast.n_compared)
    assert counts == [COMPARED_FIRST + 5] * 3  # 16, 77, 138, 199, 260
    assert COMPARED_EVERY % 2  # or only one of two alternating answers would be compared


UNTESTED = {
    "dropout": (changed, ["tiktoken"], {"model": {"dropout": 0.1}}, "at random"),
    "word ends": (changed, ["tiktoken"], {"model": {"end_of_word_suffix": "</w>"}}, "pieces of words"),
    "possessive": (changed, ["tiktoken"], {"pre_tokenizer": split_at(r"\p{N}{1,3}+|\p{L}+")}, "read differently"),
    "anchors": (changed, ["tiktoken"], {"pre_tokenizer": split_at(r"^\s+|\p{L}+")}, "read differently"),
    "folding": (changed, ["tiktoken"], {"pre_tokenizer": split_at("(?i:\u00df)|\\p{L}+")}, "read differently"),
    "no bytes": (changed, ["tiktoken"], {"pre_tokenizer": None}, "within tokens|does not know"),
    "normalizer": (changed, ["tiktoken"], {"normalizer": {"type": "Lowercase"}}, "Lowercase was not compared"),
    "pre-tokenizer": (changed, ["tiktoken"], {"pre_tokenizer": {"type": "BertPreTokenizer"}}, "was not compared"),
    "characters": (changed, ["gemma"], {}, "within tokens, but not as a token"),
    "unknown": (changed, ["complete gemma"], {"model": {"byte_fallback": False, "unk_token": None}}, "does not know"),
    "metaspace": (changed, ["metaspace first"], {}, "Metaspace was not compared"),
    "unigram": (changed, ["unigram"], {}, "its model is Unigram"),
    "wordpiece": (changed, ["wordpiece"], {}, "its model is WordPiece"),
}


@pytest.mark.parametrize("case", UNTESTED)
def test_what_is_known_to_differ_or_was_not_compared_is_refused(case):
    make, arguments, changes, reason = UNTESTED[case]
    backend = make(*arguments, **changes)
    with pytest.raises(FastTokenizerUnavailable, match=reason):
        FastTokenizer(backend, load_backend(backend))


def test_an_added_token_that_takes_the_spaces_on_both_sides_is_refused():
    settings = json.loads(backend_of("byte-level"))
    token = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False, "special": False}
    settings["added_tokens"].append({"id": len(settings["model"]["vocab"]), "content": "\n\n"} | token)
    assert "takes the spaces" in (find_untested(load_backend(json.dumps(settings))) or "")


@pytest.mark.parametrize(
    ("case", "text"),
    # Where the reasons come from: the libraries differ here, or the check could be dropped.
    [
        ("possessive", "4242"),
        ("anchors", "e\n\n`"),
        ("folding", "\u017fst"),
        ("no bytes", "e s"),
        ("characters", "<0x0A>"),
        ("unknown", " \u2163 "),
    ],
)
def test_libraries_do_differ_where_a_difference_is_known(case, text):
    make, arguments, changes, _ = UNTESTED[case]
    backend = make(*arguments, **changes)
    flat, bounds = fast_tokenizer.load_fastokens(backend).encode_batch_flat([text])
    assert split_flat(flat, bounds)[0].tolist() != load_backend(backend).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "pattern", [GPT2, LLAMA3, LLAMA3.replace("{1,3}", ""), r"[\p{Lu}\p{M}]+(?i:'s)?| ?[^\s\p{L}]+[\r\n/]*"]
)
def test_patterns_of_real_tokenizers_are_read_alike(pattern):
    assert find_untested(load_backend(changed("tiktoken", pre_tokenizer=split_at(pattern)))) is None


def test_a_text_that_cannot_be_encoded_is_left_to_the_exact_one():
    fast = FastTokenizer(backend_of("byte-level"), load_backend(backend_of("byte-level")))
    with pytest.raises(FastTokenizerMismatch, match="fastokens failed with UnicodeEncodeError"):
        fast.encode(["a lone surrogate: \ud800"])


def test_a_panic_is_a_failure_and_an_interrupt_is_not(monkeypatch):
    # The tokenizers library, which is made with PyO3 as fastokens is, panics here.
    panicking = json.loads(backend_of("byte-level"))
    panicking["model"]["continuing_subword_prefix"] = "##"
    with (
        pytest.raises(FastTokenizerMismatch, match="PanicException"),
        fast_tokenizer._failures_as(FastTokenizerMismatch),
    ):
        Tokenizer.from_str(json.dumps(panicking))
    with pytest.raises(KeyboardInterrupt), fast_tokenizer._failures_as(FastTokenizerMismatch):
        raise KeyboardInterrupt


def test_a_json_that_it_does_not_load_makes_it_unavailable():
    broken = changed("byte-level", decoder={"type": "Unheard"})
    with pytest.raises(FastTokenizerUnavailable, match="fastokens failed with ValueError"):
        FastTokenizer(broken, load_backend(backend_of("byte-level")))


def test_without_the_package_it_is_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    monkeypatch.setitem(sys.modules, "fastokens._native", None)
    with pytest.raises(FastTokenizerUnavailable, match="cannot be imported"):
        FastTokenizer(backend_of("byte-level"), load_backend(backend_of("byte-level")))


def test_the_version_is_told_without_importing_it():
    code = (
        "import sys; from prefcache.pipeline.preparing import fast_tokenizer; "
        "print(fast_tokenizer.fastokens_version(), 'fastokens' in sys.modules, 'tokenizers' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [fastokens_version(), "False", "False"]


# Of a process of its own: how many threads it has, and its memory after words that a cache would keep.
WORKER = """
import os, random, sys
from tokenizers import Tokenizer
from prefcache.pipeline.preparing.fast_tokenizer import FastTokenizer
backend = open(sys.argv[1]).read()
fast = FastTokenizer(backend, Tokenizer.from_str(backend))
random_ = random.Random(0)
letters = "abcdefghijklmnopqrstuvwxyz"
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
def encode(n):
    for _ in range(n):
        fast.encode([" ".join("".join(random_.choices(letters, k=24)) for _ in range(20)) for _ in range(250)])
encode(10)
before = resident()
encode(40)  # 200,000 distinct words: four times what fits into its cache
fast.encode(["word " * 400_000])
names = sorted(name for name in os.environ if name.startswith("FASTOKENS_"))
print(len(os.listdir("/proc/self/task")), resident() - before, *names)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_has_one_thread_and_bounded_memory(tmp_path):
    (tmp_path / "backend.json").write_text(backend_of("byte-level"))
    # The first two as process_pool.py sets them.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    environment["FASTOKENS_SEGMENT_CACHE"] = "512"
    command = [sys.executable, "-c", WORKER, str(tmp_path / "backend.json")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    assert said[0] == "1" and said[2:] == ["FASTOKENS_SEGMENT_CACHE"]
    assert float(said[1]) < 40  # MiB
