"""The text of single tokens, whichever library decodes them."""

from collections.abc import Callable, Sequence


def pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """The text of each token. Tokens that hold parts of one character are shown as one piece, the others as nothing."""
    found, begin = [], 0
    for end in range(1, len(ids) + 1):
        # Decoded after what is before it: alone, some tokenizers take a token's space for a text's beginning.
        before = decode(ids[max(0, begin - 4) : begin])
        text = decode(ids[max(0, begin - 4) : end])[len(before) :]
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or end - begin >= 4 or end == len(ids)
        found.append(text if whole else "")
        begin = end if whole else begin
    return found
