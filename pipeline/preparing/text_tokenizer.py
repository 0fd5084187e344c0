"""Texts to ids: by the tokenizers library, by a faster one that is compared with it, or by Transformers in Python.

Which one encodes a text makes no difference to its ids.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefcache.pipeline.preparing.fast_tokenizer import FastTokenizer, FastTokenizerUnavailable
from prefcache.pipeline.preparing.token_ids import Ids, encode_batch, to_ids
from prefcache.pipeline.preparing.tokenizer_facts import TokenizerFacts, load_backend
from prefcache.pipeline.tokenizer import load_tokenizer


class TextTokenizer:
    """Encodes texts without special tokens of the tokenizer's own, and without a limit on their length."""

    def __init__(self, facts: TokenizerFacts, *, fast: bool = False) -> None:
        """`fast`: encode the texts of parts with fastokens, if it gives the same ids. It takes seconds to load."""
        self._facts, self._wants_fast = facts, fast and facts.backend is not None
        self._fast: FastTokenizer | None = None
        self.fast_unavailable = self.fast_mismatch = ""  # why fastokens is not used, if it should be
        self.in_python: Any = None
        self.library: Any = None  # a tokenizers.Tokenizer
        if facts.backend is None:
            self.in_python = load_tokenizer(Path(facts.folder))
        else:
            self.library = load_backend(facts.backend)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Encode texts; raise FastTokenizerMismatch if the faster library turns out to give other ids."""
        return self._fast.encode(texts) if self._fast is not None else self.encode_exactly(texts)

    def encode_exactly(self, texts: Sequence[str]) -> list[Ids]:
        """Encode texts without the faster library."""
        if self.library is not None:
            return encode_batch(self.library, texts)
        found = self.in_python(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [to_ids(ids) for ids in found]

    def decode(self, ids: Sequence[int]) -> str:
        decoder = self.library if self.in_python is None else self.in_python
        return str(decoder.decode(list(ids), skip_special_tokens=False))

    def start_part(self) -> None:
        """Which texts of a part are compared depends on the part alone."""
        if self._fast is not None:
            self._fast.reset()
        elif self._wants_fast:
            assert self._facts.backend is not None
            self._wants_fast = False
            try:
                self._fast = FastTokenizer(self._facts.backend, self.library)
            except FastTokenizerUnavailable as error:
                self.fast_unavailable = str(error)

    @property
    def is_fast(self) -> bool:
        return self._fast is not None

    def refuse_fast(self, mismatch: str) -> None:
        """Encode with the tokenizers library from now on, because the faster one differs."""
        self._fast, self._wants_fast, self.fast_mismatch = None, False, mismatch
