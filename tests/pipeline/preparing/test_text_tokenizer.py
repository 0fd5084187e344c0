"""Texts have the same ids, whichever library encodes them."""

import pytest
from tokenizers import Tokenizer

from prefcache.pipeline.preparing import text_tokenizer
from prefcache.pipeline.preparing.fast_tokenizer import FastTokenizer, FastTokenizerMismatch
from prefcache.pipeline.preparing.probe_texts import PROBES
from prefcache.pipeline.preparing.text_tokenizer import TextTokenizer
from tests.helpers.tokenizers import facts
from tests.helpers.wrong_tokenizer import WrongTokenizer

TEXTS = [*PROBES, "<|im_start|>user\nwhy?<|im_end|>\n", "the cat sings, the dog reads"]


def load(*, fast: bool) -> TextTokenizer:
    tokenizer = TextTokenizer(facts("byte-level"), fast=fast)
    tokenizer.start_part()
    return tokenizer


def test_the_fast_tokenizer_encodes_parts_and_gives_the_same_ids():
    fast, usual = load(fast=True), load(fast=False)
    assert fast.fast_unavailable == "" and fast.is_fast and not usual.is_fast
    assert fast.encode(TEXTS) == usual.encode(TEXTS)
    assert [fast.decode(ids) for ids in fast.encode(TEXTS)] == [usual.decode(ids) for ids in usual.encode(TEXTS)]


def test_it_is_not_loaded_before_there_is_a_part():
    tokenizer = TextTokenizer(facts("byte-level"), fast=True)
    tokenizer.encode(TEXTS)
    assert not tokenizer.is_fast


def test_after_a_mismatch_it_is_never_used_again(monkeypatch):
    monkeypatch.setattr(text_tokenizer, "FastTokenizer", WrongTokenizer)
    tokenizer = load(fast=True)
    with pytest.raises(FastTokenizerMismatch) as mismatch:
        tokenizer.encode(TEXTS)
    tokenizer.refuse_fast(str(mismatch.value))
    tokenizer.start_part()
    assert tokenizer.encode(TEXTS) == load(fast=False).encode(TEXTS)
    assert "other ids" in tokenizer.fast_mismatch


def test_without_it_there_is_a_reason_and_the_usual_one(monkeypatch):
    def differ(backend: str, exact: Tokenizer) -> FastTokenizer:
        # Its probes are compared with another tokenizer's.
        return FastTokenizer(facts("tiktoken").backend or "", exact)

    monkeypatch.setattr(text_tokenizer, "FastTokenizer", differ)
    tokenizer = load(fast=True)
    assert "other ids" in tokenizer.fast_unavailable
    assert tokenizer.encode(TEXTS) == load(fast=False).encode(TEXTS)
