"""preview: a few examples as the model will see them. Nothing is written."""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from prefcache.command_results import PreviewExample, PreviewPart, PreviewResult, PreviewToken, PreviewUnusable
from prefcache.pipeline import identity
from prefcache.pipeline.config import Config
from prefcache.pipeline.preparing.encoder import Encoder
from prefcache.pipeline.preparing.example import Example, Unusable, count_images, plain_text
from prefcache.pipeline.preparing.part_worker import PartWorker, Quarantine
from prefcache.pipeline.preparing.render_chat import split_system
from prefcache.pipeline.preparing.resolved_config import resolve_config
from prefcache.pipeline.preparing.sources import Line, open_source
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import ANSWERS
from prefcache.pipeline.spans import counted_positions


def run(config: Config, progress: Progress, n: int) -> PreviewResult:
    """Return the examples of the first `n` records of each source in tokens, or why there are none."""
    model = identity.find_reference(config, weights=False).tokenizer
    with tempfile.TemporaryDirectory() as spool:
        sources = [open_source(entry, Path(spool)) for entry in config.prepare.sources]
        resolved = resolve_config(config.prepare, model, sources, progress)
        worker = PartWorker(resolved)
        examples: list[PreviewExample | PreviewUnusable] = []
        for number, source in enumerate(sources):
            lines = (line for chunk in source.chunks() for line in chunk.lines())
            for line in islice(lines, n):
                examples += _preview_line(worker, line, number)
    formats = {source.name: each.format for source, each in zip(sources, resolved.source_formats, strict=True)}
    return PreviewResult(kind=resolved.kind, formats=formats, date=resolved.date, examples=examples)


def _preview_line(worker: PartWorker, line: Line, source: int) -> Iterator[PreviewExample | PreviewUnusable]:
    quarantine = Quarantine()
    for example in worker.read_examples(line, source, quarantine):
        try:
            yield _preview_example(line, worker, example)
        except Unusable as unusable:
            yield PreviewUnusable(
                source=line.source, line=line.number, reason=unusable.reason, detail=unusable.description
            )
    for row in quarantine.rows:
        why = Unusable(row["reason"], row["detail"], n_found=row["n_found"], n_limit=row["n_limit"])
        yield PreviewUnusable(source=line.source, line=line.number, reason=why.reason, detail=why.description)


def _preview_example(line: Line, worker: PartWorker, example: Example) -> PreviewExample:
    full, truncated = worker.tokenize_one(example)
    kept, cut_prompt = truncated.tokens, truncated.cut_prompt
    # keep_end leaves out whole turns. The text begins anew after them, so they are shown as text.
    cut_turns = _show_cut_turns(example, truncated.example) if cut_prompt else ""
    parts = [_preview_part("prompt", worker.encoder, kept.prompt, [], [], cut_turns)]
    names = ANSWERS[worker.resolved.kind][: len(kept.answers)]
    for name, ids, spans, whole in zip(names, kept.answers, kept.spans, full.answers, strict=True):
        # keep_end leaves the answers whole; after keep_start they have lost their end.
        parts.append(_preview_part(name, worker.encoder, ids, spans, whole[len(ids) :] if not cut_prompt else []))
    return PreviewExample(
        source=line.source,
        line=line.number,
        label=getattr(example, "label", None),
        boundary="exact" if kept.exact else "split",
        plain_text=worker.puts_text_into_template(example),
        cut_prompt=cut_prompt,
        parts=parts,
    )


def _show_cut_turns(example: Example, kept: Example) -> str:
    """Return the turns after the system message that were left out, with their pictures."""
    assert isinstance(example.prompt, list)
    head, turns = split_system(example.prompt)
    cut = turns[: len(example.prompt) - len(kept.prompt)]
    n_head = count_images(head)
    return plain_text(cut, example.images[n_head : n_head + count_images(cut)])


def _preview_part(
    name: str, encoder: Encoder, ids: Sequence[int], spans: list[int], cut: Sequence[int], cut_turns: str | None = None
) -> PreviewPart:
    texts = encoder.token_texts([*ids, *cut])
    counted = set(counted_positions(np.asarray(spans, np.int32)).tolist())
    tokens = [
        PreviewToken(number, text, special=number in encoder.specials, cut=n >= len(ids), counts=n in counted)
        for n, (number, text) in enumerate(zip([*ids, *cut], texts, strict=True))
    ]
    return PreviewPart(
        name=name, n_tokens=len(ids), n_counted=len(counted), n_cut=len(cut), tokens=tokens, cut_turns=cut_turns
    )
