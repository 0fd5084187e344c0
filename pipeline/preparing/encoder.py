"""Text to token ids, exactly as the tokenizer gives them for the whole, without encoding the prompt with every answer.

A special token ends whatever the tokenizer could merge: text after it is encoded alike whatever stands before. So the
ids of `prompt + answer` are those of the prompt up to its last special token, then those of the rest of the text. With
no such token in the prompt, the whole is encoded with each answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UsageError
from pipeline.pieces import pieces

_MEMO = 4096
_NEAR_THE_END = 3  # a template may write a line end after the end token


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer as it travels to a worker: loading it there takes neither Transformers nor PyTorch."""

    folder: str
    backend: str | None  # as JSON of the tokenizers library; None where Transformers runs it in Python
    special: dict[str, str]  # bos_token, eos_token and the like, as templates print them
    bos: int | None  # only where the tokenizer begins a text with it
    eos: int | None
    chat_template: str | None
    tool_template: str | None


class Text(NamedTuple):
    """What the model sees: `prompt + answer` is a whole conversation."""

    prompt: str
    answers: tuple[str, ...]
    plain: bool = False  # no chat template wrote it, so the tokenizer's beginning is added
    closed: bool = False  # where plain: the answers bring an end of their own


class Tokens(NamedTuple):
    prompt: list[int]
    answers: tuple[list[int], ...]
    exact: bool  # prompt + answer are the ids of the whole, for every answer
    ended: bool  # an end token was added, for the text had none


def load(folder: Path) -> TokenizerFacts:
    """Whatever tokenizer the folder has."""
    tokenizer = _from_transformers(folder)
    template = tokenizer.chat_template
    named = template if isinstance(template, dict) else {"default": template}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    bos = tokenizer.bos_token_id
    return TokenizerFacts(
        folder=str(folder),
        backend=backend.to_str() if backend is not None else None,
        special={name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        bos=bos if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else None,
        eos=tokenizer.eos_token_id,
        chat_template=named.get("default"),
        tool_template=named.get("tool_use"),
    )


class Encoder:
    def __init__(self, facts: TokenizerFacts) -> None:
        self._bos, self._eos = facts.bos, facts.eos
        self._tails: dict[str, list[int]] = {}
        self._texts: dict[int, bool] = {}
        if facts.backend is None:
            self._python: Any = _from_transformers(Path(facts.folder))
            self._hard: dict[int, str] = {}
            self._cutter = ""
            self.specials = frozenset(self._python.all_special_ids) - {self._python.unk_token_id}
            return
        from tokenizers import Tokenizer

        self._python = None
        self._backend = Tokenizer.from_str(facts.backend)
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        # What stands for an unknown character ends nothing.
        unknown = facts.special.get("unk_token")
        self.specials = frozenset(n for n, token in added.items() if token.special and token.content != unknown)
        # A token that is matched on normalised text, or only between words, does not part the text by itself.
        parts = {
            n: token for n, token in added.items() if token.content and not token.normalized and not token.single_word
        }
        inside = _inside_others([token.content for token in added.values()])
        self._hard = {n: token.content for n, token in parts.items() if token.content not in inside}
        # One that also swallows the space after it would change what it is put before.
        self._cutter = next((self._hard[n] for n in self._hard if not parts[n].rstrip), "")

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Without special tokens of the tokenizer's own: a rendered template brings its own."""
        if self._python is not None:
            found: list[list[int]] = self._python(list(texts), add_special_tokens=False)["input_ids"] if texts else []
            return found
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        decoder = self._backend if self._python is None else self._python
        return str(decoder.decode(list(ids), skip_special_tokens=False))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token."""
        return pieces(self.decode, ids)

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """The prompt's ids are those of the prompt on its own. An answer's are the rest of the whole's where these begin
        with the prompt's; else the text is cut there, and they are those of the answer on its own."""
        distinct = list(dict.fromkeys(text.prompt for text in texts))
        prompts = dict(zip(distinct, self.ids(distinct), strict=True))
        tails = [self._tail(text.prompt, prompts[text.prompt]) for text in texts]
        wholes = iter(
            self.ids([tail + answer for text, (tail, _) in zip(texts, tails, strict=True) for answer in text.answers])
        )
        return [
            self._cut(text, prompts[text.prompt], tail_ids, [next(wholes) for _ in text.answers])
            for text, (_, tail_ids) in zip(texts, tails, strict=True)
        ]

    def _tail(self, prompt: str, ids: list[int]) -> tuple[str, list[int]]:
        """The end of the prompt from its last special token on, as text and as ids; else all of it."""
        n = next((n for n in range(len(ids) - 1, -1, -1) if ids[n] in self._hard), -1)
        at = prompt.rfind(self._hard[ids[n]]) if n >= 0 else -1
        if at < 0:
            return prompt, ids
        tail = prompt[at:]
        if tail not in self._tails:
            if len(self._tails) == _MEMO:
                self._tails.clear()
            self._tails[tail] = self.ids([tail])[0]
        tail_ids = self._tails[tail]
        # They differ where the token's text is part of something else.
        return (tail, tail_ids) if tail_ids == ids[n:] else (prompt, ids)

    def _cut(self, text: Text, prompt: list[int], tail: list[int], wholes: list[list[int]]) -> Tokens:
        n = len(tail)
        # Each answer for itself: what its ids are does not depend on what it is compared with.
        begins = [whole[:n] == tail for whole in wholes]
        answers = [
            whole[n:] if exact else self._alone(answer)
            for whole, exact, answer in zip(wholes, begins, text.answers, strict=True)
        ]
        ended = False
        for ids in answers:
            if self._eos is not None and ids and not self._is_ended(ids, text):
                ids.append(self._eos)
                ended = True
        if text.plain and self._bos is not None and prompt[:1] != [self._bos]:
            prompt = [self._bos, *prompt]
        return Tokens(prompt, tuple(answers), all(begins), ended)

    def _is_ended(self, ids: list[int], text: Text) -> bool:
        if text.plain and not text.closed:
            return ids[-1] == self._eos
        for number in reversed(ids[-_NEAR_THE_END:]):
            if number in self.specials or number == self._eos:
                return True
            if self._is_text(number):
                return False
        return False

    def _is_text(self, number: int) -> bool:
        """Whether a token says something, and not just spaces and line ends."""
        if number not in self._texts:
            self._texts[number] = bool(self.decode([number]).strip())
        return self._texts[number]

    def _alone(self, answer: str) -> list[int]:
        """Ids of a text as they are within a text: after a token, so that nothing is done that is done at a beginning."""
        return self.ids([self._cutter + answer])[0][1 if self._cutter else 0 :]


def _inside_others(tokens: list[str]) -> set[str]:
    """Tokens that stand in another one, not at its beginning: where a text has them, the other may yet come of it."""
    joined = "".join(f"\0{token}" for token in tokens)
    return {token for token in tokens if token and joined.count(token) > joined.count(f"\0{token}")}


def _from_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # else it warns of every text longer than the model
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # Whatever the loader says, the folder's tokenizer cannot be used.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{folder} has no tokenizer that loads ({first}). Expected tokenizer.json beside the model."
        ) from None
