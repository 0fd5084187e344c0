"""Text to token ids, exactly as the tokenizer gives them for the whole, without encoding the prompt with every answer.

Tokenizers merge nothing across a special token: the text after it is encoded the same way whatever precedes it. So the
ids of `prompt + answer` are those of the prompt up to its last special token, then those of the rest of the text. With
no such token in the prompt, the whole is encoded with each answer.
"""

import bisect
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

from prefcache.pipeline.preparing.text_tokenizer import TextTokenizer
from prefcache.pipeline.preparing.token_ids import Ids, to_ids
from prefcache.pipeline.preparing.tokenizer_facts import TokenizerFacts, load_backend
from prefcache.pipeline.spans import count_common, whole_span
from prefcache.pipeline.token_text import token_texts

_MOST_TAILS = 4096
_NEAR_THE_END = 3  # a template may write a line end after the end token


Span = tuple[int, int]


class ExampleText(NamedTuple):
    """What the model sees: `prompt + answer` is a whole conversation."""

    prompt: str
    answers: tuple[str, ...]
    plain: bool = False  # not from a chat template, so the tokenizer's beginning is added
    closed: bool = False  # with plain: the answers bring an end token of their own
    # Begin and end of the characters of each answer that count, None for all of them; () if all of every answer count.
    counted: tuple[list[Span] | None, ...] = ()


class ExampleTokens(NamedTuple):
    prompt: Ids
    answers: tuple[Ids, ...]
    exact: bool  # prompt + answer are the ids of the whole, for every answer
    ended: bool  # an end token was added, because the text had none
    spans: tuple[list[int], ...]  # which tokens of each answer count, see spans.py


class Encoder:
    def __init__(self, facts: TokenizerFacts, *, fast: bool = False) -> None:
        """`fast`: use a faster library where it gives the same ids, see text_tokenizer.py."""
        self.facts, self.tokenizer = facts, TextTokenizer(facts, fast=fast)
        self.ids, self.decode = self.tokenizer.encode, self.tokenizer.decode
        self._bos, self._eos = facts.bos, facts.eos
        self._tail_ids: dict[str, Ids] = {}
        self._prints_text: dict[int, bool] = {}
        self._separators: dict[int, str] = {}  # tokens between which text is encoded by itself
        self._prefix = ""  # a separator that leaves the text after it as it is
        if self.tokenizer.library is None:
            python = self.tokenizer.in_python
            self.specials = frozenset(python.all_special_ids) - {python.unk_token_id}
            return
        added = self.tokenizer.library.get_added_tokens_decoder()
        # The token for unknown characters ends nothing.
        unknown = facts.special.get("unk_token")
        self.specials = frozenset(n for n, token in added.items() if token.special and token.content != unknown)
        # A token that stands inside another one, not at its beginning, does not separate: the other may yet follow.
        contents = [token.content for token in added.values()]
        joined = "".join(f"\0{content}" for content in contents)
        inside = {text for text in contents if text and joined.count(text) > joined.count(f"\0{text}")}
        # Nor does one that is matched on normalised text, or only between words.
        for n, token in added.items():
            if token.content and not token.normalized and not token.single_word and token.content not in inside:
                self._separators[n] = token.content
                # One that also swallows the space after it would change the text that follows.
                if not token.rstrip:
                    self._prefix = self._prefix or token.content

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token."""
        return token_texts(self.decode, ids)

    def decoded_specials(self) -> set[str]:
        """Return the texts of the special tokens."""
        return {self.decode([n]) for n in self.specials}

    def encode(self, texts: Sequence[ExampleText]) -> list[ExampleTokens]:
        """Encode examples.

        A prompt is encoded on its own. If the ids of prompt + answer begin with the prompt's, the answer's ids are the
        rest; else the answer is encoded on its own, too.
        """
        distinct = list(dict.fromkeys(text.prompt for text in texts))
        prompts = dict(zip(distinct, self.ids(distinct), strict=True))
        tails = [self._find_tail(text.prompt, prompts[text.prompt]) for text in texts]
        wholes = iter(
            self.ids([tail + answer for text, (tail, _) in zip(texts, tails, strict=True) for answer in text.answers])
        )
        return [
            self._split(text, prompts[text.prompt], tail, tail_ids, [next(wholes) for _ in text.answers])
            for text, (tail, tail_ids) in zip(texts, tails, strict=True)
        ]

    def _find_tail(self, prompt: str, ids: Ids) -> tuple[str, Ids]:
        """Return the end of the prompt from its last separator on, as text and as ids; else all of it."""
        n = next((n for n in range(len(ids) - 1, -1, -1) if ids[n] in self._separators), -1)
        at = prompt.rfind(self._separators[ids[n]]) if n >= 0 else -1
        if at < 0:
            return prompt, ids
        tail = prompt[at:]
        if tail not in self._tail_ids:
            if len(self._tail_ids) == _MOST_TAILS:
                self._tail_ids.clear()
            # Remembered from part to part: which texts the fast tokenizer is compared on should depend on the part alone.
            (self._tail_ids[tail],) = self.tokenizer.encode_exactly([tail])
        tail_ids = self._tail_ids[tail]
        # They differ if the token's text is part of something else.
        return (tail, tail_ids) if tail_ids == ids[n:] else (prompt, ids)

    def _split(self, text: ExampleText, prompt: Ids, tail: str, tail_ids: Ids, wholes: list[Ids]) -> ExampleTokens:
        n = len(tail_ids)
        # Decided per answer, so that its ids do not depend on the other answer. An answer on its own is encoded after a
        # token, because tokenizers may treat the beginning of a text differently.
        is_exact = [whole[:n] == tail_ids for whole in wholes]
        answers = [
            whole[n:] if exact else self.ids([self._prefix + answer])[0][1 if self._prefix else 0 :]
            for whole, exact, answer in zip(wholes, is_exact, text.answers, strict=True)
        ]
        spans = [
            whole_span(len(ids))
            if counted is None
            else self._token_spans(tail if exact else self._prefix, answer, ids, counted)
            for counted, exact, answer, ids in zip(
                text.counted or [None] * len(answers), is_exact, text.answers, answers, strict=True
            )
        ]
        ended = False
        for i, ids in enumerate(answers):
            if self._eos is not None and ids and not self._is_ended(ids, text):
                ids.append(self._eos)
                ended = True
                # It ends the last turn: it counts if that turn does.
                if spans[i][-1:] == [len(ids) - 1]:
                    spans[i][-1] += 1
        if text.plain and self._bos is not None and prompt[:1] != to_ids([self._bos]):
            prompt = to_ids([self._bos]) + prompt
        return ExampleTokens(prompt, tuple(answers), all(is_exact), ended, tuple(spans))

    def _token_spans(self, before: str, answer: str, ids: Ids, counted: Sequence[Span]) -> list[int]:
        """Return the spans of an answer's tokens that count: those that have no character that does not."""
        slow = self._find_python_tokens if self.tokenizer.library is None else self._find_tokens
        spans: list[int] = []
        for first, last in self._find_by_pieces(before, answer, ids, counted) or slow(before, answer, ids, counted):
            if spans[-1:] == [first]:  # no token between this part and the last
                spans[-1] = last
            elif first < last:
                spans += [first, last]
        return spans

    def _find_by_pieces(self, before: str, answer: str, ids: Ids, counted: Sequence[Span]) -> list[Span] | None:
        """Encode what lies between borders; None unless that gives the ids of the whole. It is faster than asking for offsets."""
        borders = [at for span in counted for at in span]
        texts = [answer[a:b] for a, b in pairwise([0, *borders, len(answer)])]
        pieces = self.ids([before + texts[0], *texts[1:]])
        n_before = sum(map(len, pieces)) - len(ids)
        if n_before < 0 or to_ids(chain.from_iterable(pieces))[n_before:] != ids:
            return None
        places = [n - n_before for n in accumulate(map(len, pieces))]
        return list(zip(places[:-1:2], places[1::2], strict=True))

    def _find_tokens(self, before: str, answer: str, ids: Ids, counted: Sequence[Span]) -> Iterator[Span]:
        encoding = self._offsets.encode(before + answer, add_special_tokens=False)
        assert encoding.ids[-len(ids) :] == ids.tolist()
        begins, ends = zip(*encoding.offsets[-len(ids) :], strict=True)
        for begin, end in counted:
            first, last = (bisect.bisect_left(begins, len(before) + at) for at in (begin, end))
            while last > first and ends[last - 1] > len(before) + end:
                last -= 1
            yield first, last

    def _find_python_tokens(self, before: str, answer: str, ids: Ids, counted: Sequence[Span]) -> Iterator[Span]:
        """Without offsets, compare with the ids of the text up to each border."""
        (whole,) = self.ids([before + answer])
        n_before = len(whole) - len(ids)
        for span in counted:
            texts = self.ids([before + answer[:at] for at in span])
            first, last = (count_common(whole, each) for each in texts)
            # A token across a border belongs to neither side.
            yield first - n_before + (first < len(texts[0])), last - n_before

    @cached_property
    def _offsets(self) -> Any:
        """The same tokenizer without its last step, which may leave the spaces of a token out of its offsets."""
        return load_backend(json.dumps(json.loads(self.tokenizer.library.to_str()) | {"post_processor": None}))

    def _is_ended(self, ids: Ids, text: ExampleText) -> bool:
        if text.plain and not text.closed:
            return ids[-1] == self._eos
        for n in reversed(ids[-_NEAR_THE_END:]):
            if n in self.specials or n == self._eos:
                return True
            if n not in self._prints_text:
                self._prints_text[n] = bool(self.decode([n]).strip())  # more than spaces and line ends
            if self._prints_text[n]:
                return False
        return False
