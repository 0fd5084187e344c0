"""The text of single tokens, whichever library decodes them."""

from collections.abc import Callable, Sequence


def token_texts(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """Return the text of each token. The last of several tokens that share a character has its text."""
    texts, begin = [], 0
    for end in range(1, len(ids) + 1):
        # Decode with the tokens before it: alone, some tokenizers take a token's space for the beginning of a text.
        before = decode(ids[max(0, begin - 4) : begin])
        text = decode(ids[max(0, begin - 4) : end])[len(before) :]
        is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or end - begin >= 4 or end == len(ids)
        texts.append(text if is_whole else "")
        begin = end if is_whole else begin
    return texts
