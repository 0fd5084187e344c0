"""The model card of a trained model: everything that the run was made from, and what it measured.

It names no date, host or path, so the same run gives the same card, and the card can be published.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prefcache.pipeline.schema import HELD_OUT, metric_prefix
from prefcache.pipeline.stored.records import BestEntry, Provenance, StoppedEntry
from prefcache.pipeline.visible_text import visible

_MEASURED = (
    ("reward accuracy", "rewards/accuracies"),
    ("reward margin", "rewards/margins"),
    ("chosen answer more likely than rejected", "preference_accuracy"),
    ("loss", "loss"),
)


def render(
    provenance: Provenance,
    *,
    kind: str,
    n_examples: int,
    n_steps: int,
    before: Mapping[str, float],
    after: Mapping[str, float],
    n_evaluated: Mapping[str, int],
    best: BestEntry | None = None,
    stopped: StoppedEntry | None = None,
) -> str:
    """`before` and `after` are the run's evaluations, `n_evaluated` the examples of each split that they are over."""
    model = provenance.model or "a model"
    folder = Path(model) if Path(model).is_dir() else None
    head = {
        # The hub refuses a card whose base model is not one of its ids.
        **({} if folder else {"base_model": model}),
        "library_name": "transformers",
        "tags": ["prefcache", *provenance.loss_arguments],
    }
    inputs, reference = provenance.inputs, provenance.inputs.reference
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=False)}---",
        f"# {_cell(folder.name if folder else model)}, trained on preferences",
        f"Trained by prefcache with the loss {_cell(provenance.loss)}, on {n_examples:,} {kind}, {n_steps:,} steps. "
        + (f"It was {_cell(stopped.describe())}. " if stopped else "")
        + "The whole configuration is config.yaml in the folder above this one; `prefcache train` with it makes the run again."
        + (
            f" The weights are those of step {best.step:,}, the best of its evaluations by {_cell(best.metric)}."
            if best
            else ""
        ),
        "## Made from",
        _table(
            ("what", "which"),
            [
                ("prepared data", inputs.prepared),
                ("policy's start", inputs.policy),
                ("reference", reference or "none was read"),
                *([("numerics of its log-probs", ", ".join(inputs.numerics or []))] if reference else []),
                *([("along the run", moves)] if (moves := provenance.moving_reference) else []),
                *(
                    (f"{name}'s {key}", value)
                    for name, own in provenance.loss_arguments.items()
                    for key, value in own.items()
                ),
                *(provenance.versions.items()),
                ("precision", provenance.precision),
            ],
        ),
    ]
    for split, n in n_evaluated.items():
        names = [(title, f"{metric_prefix(split)}{name}") for title, name in _MEASURED]
        rows = [(title, before.get(name), after[name]) for title, name in names if name in after]
        measured = [(title, "" if old is None else f"{old:.4f}", f"{new:.4f}") for title, old, new in rows]
        which = f"held-out {kind}" if split == HELD_OUT else f"{kind} of the evaluation data {split}"
        lines += [f"## On {n:,} {which}", _table(("", "before", "after"), measured)]
    return "\n\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    """Escape a value for a table cell."""
    return " ".join(visible(str(value)).replace("|", "\\|").replace("<", "&lt;").split())
