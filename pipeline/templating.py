"""From an example to token ids.

The prompt's ids are those of the rendered prompt with the generation prompt, on its own: what the model sees when it
is asked. An answer's ids are the rest of the rendered whole where the prompt's ids are a prefix of it (`exact`).
Where the tokenizer would merge text across the boundary, the text is cut there and the answer encoded on its own
(`split`). So chosen and rejected always share the prompt's ids.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UsageError
from pipeline.example import Example, Message, Turns, Unusable

# Batches are encoded on all cores; without this the tokenizer warns when a process forks later.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class Rendered(NamedTuple):
    """Text as the model sees it: `prompt + chosen` and `prompt + rejected` are whole conversations."""

    prompt: str
    chosen: str
    rejected: str


class Tokens(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    boundary: str


class Templater:
    def __init__(self, model_folder: Path, template: str, chat_template: str | None) -> None:
        self.tokenizer = _load_tokenizer(model_folder)
        self.plain = template == "none"
        if chat_template is not None:
            self.tokenizer.chat_template = _read_template(chat_template)
        if not self.plain and not self.tokenizer.chat_template:
            raise UsageError(
                f"The tokenizer in {model_folder} has no chat template. Name one (prepare.chat_template: FILE.jinja), "
                "or train on plain text (prepare.template: none)."
            )
        if self.plain and self.tokenizer.eos_token_id is None:
            raise UsageError(
                f"The tokenizer in {model_folder} has no end token, which plain text needs after an answer."
            )

    @property
    def text(self) -> str | None:
        """The chat template in use; None for plain text."""
        return None if self.plain else str(self.tokenizer.get_chat_template())

    def render(self, example: Example) -> Rendered:
        if self.plain:
            return self._render_plain(example)
        prompt = _as_messages(example.prompt, "user")
        if prompt[-1]["role"] == "assistant":
            raise Unusable("prompt ends with an assistant turn")
        asked = self._apply(prompt, add_generation_prompt=True)
        return Rendered(asked, *(self._answer(prompt, asked, turns) for turns in (example.chosen, example.rejected)))

    def encode(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """Token ids of a batch: every whole is encoded once, and the prompt once on its own."""
        if not rendered:
            return []
        prompts = self._ids([r.prompt for r in rendered])
        chosen = self._ids([r.prompt + r.chosen for r in rendered])
        rejected = self._ids([r.prompt + r.rejected for r in rendered])
        return [self._cut(*row) for row in zip(rendered, prompts, chosen, rejected, strict=True)]

    def _render_plain(self, example: Example) -> Rendered:
        for column in ("prompt", "chosen", "rejected"):
            if not isinstance(getattr(example, column), str):
                raise Unusable("messages where plain text is asked for", f"{column}; set prepare.template: chat")
        return Rendered(*(str(turns) for turns in (example.prompt, example.chosen, example.rejected)))

    def _answer(self, prompt: list[Message], asked: str, turns: Turns) -> str:
        answer = _as_messages(turns, "assistant")
        if answer[0]["role"] != "assistant":
            raise Unusable("answer is no assistant turn", f"its role is {answer[0]['role']!r}")
        whole = self._apply([*prompt, *answer], add_generation_prompt=False)
        if not whole.startswith(asked):
            raise Unusable(
                "template rewrites the prompt", "with the answer added, it no longer begins as it did when asked"
            )
        return whole[len(asked) :]

    def _apply(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # A template is a stranger's program, and can raise anything.
            raise Unusable("template refuses", f"{type(error).__name__}: {error}") from None
        return str(text)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids without special tokens of the tokenizer's own: a rendered template brings its own."""
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return ids

    def _cut(self, rendered: Rendered, prompt: list[int], chosen: list[int], rejected: list[int]) -> Tokens:
        n = len(prompt)
        boundary = "exact"
        if chosen[:n] == prompt and rejected[:n] == prompt:
            chosen, rejected = chosen[n:], rejected[n:]
        else:
            boundary = "split"
            chosen, rejected = self._ids([rendered.chosen, rendered.rejected])
        if self.plain:
            end = [self.tokenizer.eos_token_id]
            prompt, chosen, rejected = (
                self._beginning(prompt) + prompt,
                *(ids if ids[-1:] == end else ids + end for ids in (chosen, rejected)),
            )
        return Tokens(prompt, chosen, rejected, boundary)

    def _beginning(self, prompt: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return (
            [bos] if bos is not None and prompt[:1] != [bos] and self.tokenizer("x")["input_ids"][:1] == [bos] else []
        )


def _as_messages(turns: Turns, role: str) -> list[Message]:
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns


def _load_tokenizer(folder: Path) -> Any:
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


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prepare.chat_template: {path} cannot be read ({error}).") from None
