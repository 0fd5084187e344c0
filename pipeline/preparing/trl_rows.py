"""Examples as TRL's trainers take them, and a check that TRL makes of each the very ids that were prepared.

What DPOTrainer and KTOTrainer of TRL 1.16 do with a row:

- they tokenize the prompt, and the prompt with each answer, each as one whole: messages by `apply_chat_template`, with the row's
  `tools` (which may be JSON) and `chat_template_kwargs`; text by the tokenizer, once an answer that lacks the end token has got it;
- the prompt's ids are those with which all of these begin, and an answer's ids are the rest of its whole;
- a whole that is longer than `max_length` loses its end;
- ids that the row has already are replaced.
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.example import Message, Turns
from prefcache.pipeline.preparing.render_chat import ChatRenderer
from prefcache.pipeline.preparing.resolved_config import ResolvedConfig
from prefcache.pipeline.preparing.truncation import TruncatedExample
from prefcache.pipeline.spans import count_common
from prefcache.pipeline.tokenizer import load_tokenizer

# The argument by which templates that print today's date, such as those of Llama 3, can be given another one.
_DATE_ARGUMENT, _DATE_FORMAT = "date_string", "%d %b %Y"


@dataclass(frozen=True)
class TrlRow:
    """What a trainer reads of one row."""

    prompt: Turns
    answers: tuple[Turns, ...]
    tools: str | None  # as JSON
    template_kwargs: str  # as JSON


class TrlTokens(NamedTuple):
    prompt: list[int]
    answers: list[list[int]]


class Mismatch(Exception):
    """A row of which TRL makes other ids than were prepared; the message says why."""


class TrlRows:
    """Makes rows of one preparation, and checks them with the model's own tokenizer, called as TRL calls it."""

    def __init__(self, resolved: ResolvedConfig, renderer: ChatRenderer, tokenizer: Path, as_text: bool) -> None:
        """`as_text`: the rows of this file have text, not messages. A data set of TRL's has one or the other."""
        self.as_text, self._renderer, self._tokenizer = as_text, renderer, load_tokenizer(tokenizer)
        if resolved.prepare.chat_template is not None:
            self._tokenizer.chat_template = resolved.template
        self._date = {} if as_text else fix_date(resolved)

    def make_row(self, truncated: TruncatedExample) -> TrlRow:
        """Return the row of an example, as it was scored: without turns that were left out of its prompt."""
        example = truncated.example
        if takes_text(self._renderer, example.rendered) != self.as_text:
            kinds = ("messages", "text that is rendered already")
            mine, others = kinds if self.as_text else kinds[::-1]
            raise Mismatch(f"they are {mine} in a file of {others}: export sources of both kinds on their own")
        if self.as_text:
            return TrlRow(example.prompt, example.answers, None, "{}")
        prompt, answers = self._renderer.messages(example)
        return TrlRow(
            prompt,
            tuple(answers),
            None if example.tools is None else _json(example.tools),
            _json(self._date | (example.template_kwargs or {})),
        )

    def check(self, rows: Sequence[TrlRow], examples: Sequence[TruncatedExample]) -> list[TrlTokens | Mismatch]:
        """Return the ids that TRL makes of each row, or why they are others than those that were prepared."""
        return [
            tokens if isinstance(tokens, Mismatch) else self._compare(tokens, example)
            for tokens, example in zip(self.tokenize(rows), examples, strict=True)
        ]

    def tokenize(self, rows: Sequence[TrlRow]) -> list[TrlTokens | Mismatch]:
        """Return the ids that TRL makes of each row before it cuts them."""
        with ChatTemplate.limits():
            texts = [self._write_out(row) for row in rows]
        flat = [text for each in texts if not isinstance(each, Mismatch) for text in each]
        # A text that a template wrote has its special tokens already.
        ids = iter(self._tokenizer(flat, add_special_tokens=self.as_text)["input_ids"] if flat else [])
        return [each if isinstance(each, Mismatch) else _split([next(ids) for _ in each]) for each in texts]

    def _write_out(self, row: TrlRow) -> list[str] | Mismatch:
        """Return the text of the prompt, then of the prompt with each answer."""
        if isinstance(row.prompt, str):
            return [row.prompt, *(row.prompt + self._end(str(answer)) for answer in row.answers)]
        # As they are read back from the file.
        prompt, *answers = (json.loads(_json(turns)) for turns in (row.prompt, *row.answers))
        tools, kwargs = json.loads(row.tools) if row.tools else None, json.loads(row.template_kwargs)

        def render(messages: list[Message], **asks: bool) -> str:
            # As TRL does for models that see images.
            messages = [
                self._renderer.template.split_content(each) if self._renderer.template else each for each in messages
            ]
            return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **asks, **kwargs))

        try:
            return [render(prompt, add_generation_prompt=True), *(render(prompt + answer) for answer in answers)]
        except Exception as error:  # A template can raise anything.
            return Mismatch(f"the chat template refuses them, called as TRL calls it ({type(error).__name__}: {error})")

    def _compare(self, tokens: TrlTokens, truncated: TruncatedExample) -> TrlTokens | Mismatch:
        """Compare TRL's ids with those that were prepared, before they were cut."""
        ours = truncated.tokens
        prompt = ours.prompt.tolist()
        answers = [(ids + cut).tolist() for ids, cut in zip(ours.answers, truncated.cut_answers, strict=True)]
        if tokens == (prompt, answers):
            return tokens
        if not ours.exact:
            reason = "a token reaches from the prompt into an answer: prepare splits the text there, and TRL moves the border"
        elif ours.ended and any(len(ids) < len(mine) for ids, mine in zip(tokens.answers, answers, strict=True)):
            reason = "prepare adds the end token that the chat template does not write, and TRL adds none to messages"
        elif [tokens.prompt + ids for ids in tokens.answers] == [prompt + ids for ids in answers]:
            reason = (
                "the chat template writes the prompt in another way once an answer follows, and TRL moves the border"
            )
        elif self.as_text:
            reason = "TRL adds other special tokens to the text, or its end token to text that has another one"
        else:
            reason = "the chat template changes an answer, which prepare puts in as it is and TRL does not"
        return Mismatch(reason)

    def _end(self, answer: str) -> str:
        end = self._tokenizer.eos_token
        return answer if answer.endswith(end) else answer + end


def takes_text(renderer: ChatRenderer, is_rendered: bool) -> bool:
    """Return whether an example is text to TRL, as it is without a template; else it is messages."""
    return renderer.template is None or is_rendered


def messages_column(turns: Sequence[list[Message]]) -> pa.Array:
    """Return a column of messages with any keys, which another row's messages need not have; `datasets` reads them as dicts."""
    texts = [[_json(message) for message in each] for each in turns]
    return pa.array(texts, pa.list_(pa.string())).cast(pa.list_(pa.json_()))


def fix_date(resolved: ResolvedConfig) -> dict[str, str]:
    """Return arguments that fix the date which the template prints; UsageError if it prints one and takes none."""
    if resolved.date is None or resolved.template is None:
        return {}
    arguments = {_DATE_ARGUMENT: resolved.prepare.date.strftime(_DATE_FORMAT)}
    texts = set()
    for date in (datetime.date(2001, 1, 1), datetime.date(2002, 2, 2)):
        template = ChatTemplate(resolved.template, resolved.tokenizer.special, date, tool_text=resolved.tool_template)
        with ChatTemplate.limits():
            question: Message = {"role": "user", "content": "x"}
            texts.add(template.render([question], add_generation_prompt=True, kwargs=arguments))
    if len(texts) > 1:
        raise UsageError(
            f"The chat template prints today's date: TRL would train on another one than {resolved.date}, which was scored. Name a "
            "template with a fixed date (prepare.chat_template: FILE.jinja), prepare and score with it, and give it to TRL's tokenizer too."
        )
    return arguments


def _split(wholes: list[list[int]]) -> TrlTokens:
    asked, *answered = wholes
    n = min(count_common(asked, whole) for whole in answered)
    return TrlTokens(asked[:n], [whole[n:] for whole in answered])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
