"""Texts to ids: by the tokenizers library, by a faster one that is compared with it, or by Transformers in Python.

The faster library takes seconds to load, so it is used once a process has encoded enough text to make up for them. Which
one encodes a text makes no difference to its ids.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefcache.pipeline.preparing.fast_tokenizer import (
    FastTokenizer,
    FastTokenizerMismatch,
    FastTokenizerUnavailable,
    break_even,
    fastokens_version,
)
from prefcache.pipeline.preparing.token_ids import Ids, to_ids
from prefcache.pipeline.preparing.tokenizer_facts import TokenizerFacts, load_backend
from prefcache.pipeline.tokenizer import load_tokenizer


class TextTokenizer:
    """Encodes texts without special tokens of the tokenizer's own, and without a limit on their length."""

    def __init__(self, facts: TokenizerFacts, *, fast: bool = False) -> None:
        """`fast`: use fastokens, if it is installed and gives the same ids."""
        self._facts = facts
        self.fast_unavailable = self.fast_mismatch = ""  # why fastokens is not used, if it should be
        self._fast: FastTokenizer | None = None
        self._until_fast = math.inf  # characters
        self.in_python: Any = None
        self.library: Any = None  # a tokenizers.Tokenizer
        if facts.backend is None:
            self.in_python = load_tokenizer(Path(facts.folder))
            return
        self.library = load_backend(facts.backend)
        if fast and fastokens_version():
            self._until_fast = break_even(facts.backend)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Encode texts; raise FastTokenizerMismatch if the faster library turns out to give other ids."""
        if not texts:
            return []
        if self.in_python is not None:
            return [to_ids(ids) for ids in self.in_python(list(texts), add_special_tokens=False)["input_ids"]]
        if self._until_fast <= 0:
            self._load_fast()
        if self._fast is not None:
            return self._fast.encode(texts)
        self._until_fast -= sum(map(len, texts))
        return [to_ids(each.ids) for each in self.library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        decoder = self.library if self.in_python is None else self.in_python
        return str(decoder.decode(list(ids), skip_special_tokens=False))

    def _load_fast(self) -> None:
        assert self._facts.backend is not None
        self._until_fast = math.inf
        try:
            self._fast = FastTokenizer(self._facts.backend, self.library)
        except FastTokenizerUnavailable as error:
            self.fast_unavailable = str(error)

    def reset(self) -> None:
        """Start a part: which of its texts are compared depends on the part alone."""
        if self._fast is not None:
            self._fast.reset()

    def refuse_fast(self, mismatch: FastTokenizerMismatch) -> None:
        """Encode with the tokenizers library from now on."""
        self._fast, self.fast_mismatch = None, str(mismatch)
