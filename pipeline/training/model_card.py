"""What a trained model's folder says of itself: a model card with everything that the run was made from.

It has no date, no host and no path, so that the same run gives the same card, and one that can be shown to others.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_MEASURED = (
    ("reward accuracy", "rewards/accuracies"),
    ("reward margin", "rewards/margins"),
    ("chosen answer more likely than rejected", "preference_accuracy"),
    ("loss", "loss"),
)


def text(
    facts: Mapping[str, Any], counts: Mapping[str, int], before: Mapping[str, float], after: Mapping[str, float]
) -> str:
    """`facts` are the run's provenance, `before` and `after` its evaluations of the held-out examples, perhaps empty."""
    folder = Path(facts["model"]) if Path(facts["model"]).is_dir() else None
    head = {
        # The hub knows models by its own ids, and refuses a card that names a folder.
        **({} if folder else {"base_model": facts["model"]}),
        "library_name": "transformers",
        "tags": ["prefcache", *facts["loss_arguments"]],
    }
    inputs = facts["inputs"]
    reference = inputs["reference"]
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {_plain(folder.name if folder else facts['model'])}, trained on preferences",
        f"Trained by prefcache with the loss {facts['loss']}, on {counts['examples']:,} {facts['kind']}, {counts['steps']:,} steps. "
        "The whole configuration is config.yaml in the folder above this one; `prefcache train` with it makes the run again."
        + _which(facts.get("best")),
        "## Made from",
        _table(
            ("what", "which"),
            [
                ("prepared data", inputs["prepared"]),
                ("policy's start", inputs["policy"]),
                ("reference", reference or "none was read"),
                *([("numerics of its log-probs", ", ".join(inputs["numerics"]))] if reference else []),
                *([("along the run", moves)] if (moves := facts.get("moving_reference")) else []),
                *(
                    (f"{name}'s {key}", value)
                    for name, own in facts["loss_arguments"].items()
                    for key, value in own.items()
                ),
                *(facts["versions"].items()),
                ("precision", facts["precision"]),
            ],
        ),
    ]
    if after:
        rows = [(title, before.get(name), after[name]) for title, name in _MEASURED if name in after]
        measured = [(title, "" if old is None else f"{old:.4f}", f"{new:.4f}") for title, old, new in rows]
        lines += [f"## On {counts['held_out']:,} held-out {facts['kind']}", _table(("", "before", "after"), measured)]
    return "\n\n".join(lines) + "\n"


def _which(best: Mapping[str, Any] | None) -> str:
    if best is None:
        return ""
    return f" The weights are those of step {best['step']:,}, the best of its evaluations by {best['metric']}."


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(value: Any) -> str:
    """As one cell of a table, whatever a name has in it."""
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())
