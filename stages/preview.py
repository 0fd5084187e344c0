"""preview: a few examples as the model will see them. Nothing is written."""

import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline import identity
from pipeline.config import Config
from pipeline.preparing.encoder import Encoder, Tokens
from pipeline.preparing.example import Example, Unusable, plain_text
from pipeline.preparing.lengths import Fitted
from pipeline.preparing.parts import Maker, Quarantine
from pipeline.preparing.recipe import make_recipe
from pipeline.preparing.sources import Line, open_source
from pipeline.progress import Progress
from pipeline.schema import ANSWERS


def run(config: Config, progress: Progress, n: int) -> dict[str, Any]:
    """The first `n` records of each source: their examples in tokens, or why there is none."""
    model = identity.find_reference(config).tokenizer
    with tempfile.TemporaryDirectory() as spool:
        opened = [open_source(entry, Path(spool)) for entry in config.prepare.sources]
        recipe = make_recipe(config.prepare, model, opened, progress)
        maker = Maker(recipe)
        shown = []
        for number, source in enumerate(opened):
            lines = (line for chunk in source.chunks() for line in chunk.lines())
            for line in islice(lines, n):
                shown += list(_shown(maker, line, number))
    formats = {source.name: reading.format for source, reading in zip(opened, recipe.readings, strict=True)}
    return {"kind": recipe.kind, "formats": formats, "date": recipe.date, "examples": shown}


def _shown(maker: Maker, line: Line, source: int) -> Iterator[dict[str, Any]]:
    where = {"source": line.source, "line": line.number}
    unread = Quarantine()
    for _, example in maker.examples(line, source, unread):
        try:
            yield where | _example(maker, example, *maker.one(example))
        except Unusable as unusable:
            yield where | {"reason": unusable.reason, "detail": unusable.detail}
    for row in unread.rows:
        yield where | {"reason": row["reason"], "detail": row["detail"]}


def _example(maker: Maker, example: Example, full: Tokens, fitted: Fitted) -> dict[str, Any]:
    kept, encoder = fitted.tokens, maker.encoder
    # What keep_end leaves out is whole turns: the text begins anew after them, so they are shown as text.
    left_out = len(example.prompt) - len(fitted.example.prompt) if fitted.cut_prompt else 0
    turns = [turn for turn in example.prompt if isinstance(turn, dict) and turn["role"] != "system"][:left_out]
    parts = [_part("prompt", encoder, kept.prompt, []) | {"cut_turns": plain_text(turns) if turns else ""}]
    names = ANSWERS[maker.recipe.kind][: len(kept.answers)]
    for name, ids, whole in zip(names, kept.answers, full.answers, strict=True):
        # After keep_end the answers are as they were; after keep_start they have lost their end.
        parts.append(_part(name, encoder, ids, whole[len(ids) :] if not fitted.cut_prompt else []))
    label = {} if maker.recipe.kind == "pairs" else {"label": getattr(example, "label", None)}
    return label | {"boundary": "exact" if kept.exact else "split", "cut_prompt": fitted.cut_prompt, "parts": parts}


def _part(name: str, encoder: Encoder, ids: list[int], cut: list[int]) -> dict[str, Any]:
    pieces = encoder.pieces([*ids, *cut])
    tokens = [
        {"id": number, "text": piece, "special": number in encoder.specials, "cut": n >= len(ids)}
        for n, (number, piece) in enumerate(zip([*ids, *cut], pieces, strict=True))
    ]
    return {"name": name, "n_tokens": len(ids), "n_cut": len(cut), "tokens": tokens}
