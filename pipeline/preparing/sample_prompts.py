"""Prompts of the user's own, to be answered before and after training (train.samples_from).

They are read, templated and encoded by what prepares the examples, so the model is asked exactly as in its training data.
"""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.encoder import Encoder
from prefcache.pipeline.preparing.example import Label, Unusable, plain_text
from prefcache.pipeline.preparing.expand_rankings import has_content
from prefcache.pipeline.preparing.formats import fields, place_images
from prefcache.pipeline.preparing.render_chat import ChatRenderer
from prefcache.pipeline.preparing.tokenizer_facts import load_facts
from prefcache.pipeline.stored.records import PreparedManifest

_EXPECTED = "Expected text, a list of messages with role and content, or a mapping with one of these as its prompt."


def read_prompts(path: Path) -> list[Label]:
    """Read a file of prompts: a line of text each (.txt), or text, messages or records in JSON (.json, .jsonl)."""
    prompts = []
    for number, entry in enumerate(_entries(path), start=1):
        try:
            prompts.append(_read_prompt(entry))
        except Unusable as unusable:
            raise _refusal(path, number, unusable) from None
    if not prompts:
        raise UsageError(f"train.samples_from: {path} holds no prompt. {_EXPECTED}")
    return prompts


def encode_prompts(path: Path, tokenizer: Path, manifest: PreparedManifest) -> list[tuple[str, np.ndarray]]:
    """Return each prompt as text and as the ids that this preparation would give it."""
    facts, template = load_facts(tokenizer), None
    if manifest.template is not None:
        # A template of the user's own serves conversations with tools too.
        tool_text = facts.tool_template if manifest.template == facts.chat_template else None
        date = datetime.date.fromisoformat(manifest.date or "2025-01-01")  # printed by no template without a date
        template = ChatTemplate(manifest.template, facts.special, date, tool_text=tool_text)
    renderer, prompts, texts = ChatRenderer(template), read_prompts(path), []
    with ChatTemplate.limits():
        for number, prompt in enumerate(prompts, start=1):
            try:
                texts.append(renderer.render_prompt(prompt))
            except Unusable as unusable:
                raise _refusal(path, number, unusable) from None
    encoded = Encoder(facts).encode(texts)
    return [
        (plain_text(prompt.prompt), np.asarray(tokens.prompt, np.int32))
        for prompt, tokens in zip(prompts, encoded, strict=True)
    ]


def _entries(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"train.samples_from: {path} cannot be read ({error}). Name a file of prompts.") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".txt":
        yield from (line.strip() for line in lines)
        return
    if path.suffix not in (".json", ".jsonl"):
        raise UsageError(f"train.samples_from: {path} is not a file of prompts: expected .txt, .json or .jsonl.")
    try:
        if path.suffix == ".jsonl":
            yield from map(json.loads, lines)
            return
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"train.samples_from: {path} is not {path.suffix[1:].upper()} ({error}). Repair it.") from None
    if not isinstance(entries, list):
        raise UsageError(
            f"train.samples_from: {path} holds no list, but {fields.type_name(entries)}; expected a list of prompts."
        )
    yield from entries


def _read_prompt(entry: Any) -> Label:
    record = entry if isinstance(entry, dict) else {"prompt": entry}
    turns = fields.turns(record, "messages" if "messages" in record and "prompt" not in record else "prompt")
    prompt = fields.with_system(record, turns)
    if not has_content(prompt):
        raise Unusable("empty prompt")
    example = Label(prompt=prompt, completion="", label=True, **fields.template_inputs(record))
    if place_images(example, record).images:
        raise Unusable("image in the prompt", "prompts to sample from are text alone")
    return example


def _refusal(path: Path, number: int, unusable: Unusable) -> UsageError:
    detail = f" ({unusable.description})" if unusable.description else ""
    return UsageError(
        f"train.samples_from: {path}, prompt {number} cannot be used: {unusable.reason}{detail}. {_EXPECTED}"
    )
