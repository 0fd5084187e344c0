"""A fast tokenizer that goes wrong: one that lacks a merge of the tokenizer that it is compared with."""

import json

from tokenizers import Tokenizer

from prefcache.pipeline.preparing.fast_tokenizer import FastTokenizer


def without_a_merge(backend: str, merge: int = -1) -> str:
    """Return a tokenizer's JSON without one of its merges."""
    tokenizer = json.loads(backend)
    del tokenizer["model"]["merges"][merge]
    return json.dumps(tokenizer)


def load_wrong_tokenizer(backend: str, exact: Tokenizer) -> FastTokenizer:
    """Load one that passes its probes, and is then compared with the right one."""
    wrong = without_a_merge(backend, merge=0)
    fast = FastTokenizer(wrong, Tokenizer.from_str(wrong))
    fast._exact = exact
    return fast
