"""Token ids as 4-byte integers: a text's ids as one array, without a Python object for each of them."""

from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    Ids: TypeAlias = array[int]
else:
    Ids = array  # which Python 3.11 does not subscript


def to_ids(ids: Iterable[int]) -> Ids:
    return array("i", ids)


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Encode with a tokenizer of the tokenizers library, without special tokens of its own."""
    return [to_ids(each.ids) for each in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def split_flat(flat: bytes, bounds: bytes) -> list[Ids]:
    """Return the ids of each text, from 4-byte ids of all texts in a row and 8-byte bounds, the first of them 0."""
    ids, ends = array("i", flat), array("Q", bounds)
    assert ids.itemsize == 4 and ends.itemsize == 8
    return [ids[begin:end] for begin, end in pairwise(ends)]
