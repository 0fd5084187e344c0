"""A fast tokenizer that goes wrong: it lacks a merge of the tokenizer that it is compared with."""

import json

from tokenizers import Tokenizer

from prefcache.pipeline.preparing.fast_tokenizer import FastTokenizer


def without_a_merge(backend: str, merge: int = -1) -> str:
    """Return a tokenizer's JSON without one of its merges."""
    tokenizer = json.loads(backend)
    del tokenizer["model"]["merges"][merge]
    return json.dumps(tokenizer)


class WrongTokenizer(FastTokenizer):
    """It passes its probes, and for some parts whatever it is compared with."""

    def __init__(self, backend: str, exact: Tokenizer, unnoticed_parts: int = 0) -> None:
        wrong = without_a_merge(backend, merge=0)
        self._right, self._n_unnoticed = exact, unnoticed_parts
        super().__init__(wrong, Tokenizer.from_str(wrong))

    def reset(self) -> None:
        """Start a part. The first call ends the probes."""
        super().reset()
        if self._n_unnoticed == 0:
            self._exact = self._right
        self._n_unnoticed -= 1
