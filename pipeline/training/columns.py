"""Where the columns that an objective reads come from: the prepared data, the cache, or a computation on them.

What is missing is found here, before any model is loaded.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.errors import UsageError
from pipeline.schema import ANSWERS, HELD_OUT, TRAIN
from pipeline.stored.cache import Cache
from pipeline.stored.prepared import IdLists, Prepared
from pipeline.training.batches import Examples
from pipeline.training.density import density_ratios
from pipeline.training.objective import WITHOUT_GRADIENT, Objective, losses_for
from pipeline.training.selection import Choice, Selection
from pipeline.training.token_logps import TokenLogps, token_logps

_KL = "Prepare again with prepare.kl_pairs: true; where all answers are the same, there is none that does not belong."
_REMEDY = {
    "chosen_score": "Data whose answers have grades gives it (prefcache formats).",
    "rejected_score": "Data whose answers have grades gives it (prefcache formats).",
    "kl_logp": _KL,
    "ref_kl_logp": _KL,
}


def refuse_missing(objective: Objective, prepared: Prepared) -> None:
    """Whether the data can give what the objective reads. The message names the losses that would work with it."""
    available = _available(prepared)
    missing = [name for name in objective.columns if name not in available]
    if not missing:
        return
    if objective.kind != prepared.kind:
        has, wants = ("pairs", "labelled answers") if prepared.kind == "pairs" else ("labelled answers", "pairs")
        remedy = (
            "Prepare labels (prepare.examples: labels takes pairs apart)."
            if prepared.kind == "pairs"
            else "Prepare data that has pairs (prepare.examples: pairs)."
        )
        what = f"{prepared.folder} holds {has}, not {wants}"
    else:
        remedy = _REMEDY.get(missing[0], "Prepare again.")
        what = f"{prepared.folder} lacks that"
    raise UsageError(
        f"Loss {objective.name!r} reads {', '.join(missing)}, and {what}. {remedy} "
        f"Losses for the data as it is: {', '.join(losses_for(available))}."
    )


def _available(prepared: Prepared) -> set[str]:
    """Every column that this data, once it is scored, has for a loss."""
    found = set()
    table = prepared.table()
    for answer in ANSWERS[prepared.kind]:
        if _has_values(table[f"n_{answer}"]):
            found |= {f"{answer}_logp", f"ref_{answer}_logp", f"n_{answer}"}
    if prepared.kind == "labels":
        return found | {"label", "density_ratio"}
    return found | {name for name in ("chosen_score", "rejected_score") if _has_values(table[name])}


def _has_values(column: pa.ChunkedArray) -> bool:
    return not len(column) or bool(np.isfinite(column.to_numpy().astype(np.float64)).any())


def examples(
    objective: Objective,
    prepared: Prepared,
    cache: Cache | None,
    accepted: Sequence[str],
    *,
    density_ratio: bool,
    selection: Selection | None = None,
) -> dict[str, Examples]:
    """Of each split, the examples that have all that the objective reads; of the training split, those that are chosen."""
    tables = {split: prepared.table(split) for split in (TRAIN, HELD_OUT)}
    columns = {split: _of_data(objective, table) for split, table in tables.items()}
    if "density_ratio" in objective.columns:
        for split, ratios in _density_ratios(tables, density_ratio).items():
            columns[split]["density_ratio"] = ratios
    tokens: dict[str, dict[str, TokenLogps]] = {split: {} for split in tables}
    reference: dict[str, np.ndarray] = {}  # of the training split, for the selection
    wanted = [(split, answer) for split in tables for answer in objective.reference_answers]
    chosen_by = selection.reference_answers if selection else ()
    also = [(TRAIN, answer) for answer in chosen_by if answer not in objective.reference_answers]
    if wanted or also:
        assert cache is not None
        # All at once: the cache is read a single time.
        keys = [tables[split][f"{answer}_key"] for split, answer in wanted + also]
        sums = cache.logps(keys, accepted)
        for (split, answer), values in zip(wanted + also, sums, strict=True):
            into = columns[split] if (split, answer) in wanted else reference
            into[f"ref_{answer}_logp"] = np.ma.filled(values, np.nan)
        if objective.reads_tokens:
            keys, sums = keys[: len(wanted)], sums[: len(wanted)]
            for (split, answer), lists in zip(wanted, token_logps(cache, keys, sums, accepted), strict=True):
                tokens[split][answer] = lists
    optional = objective.without_gradient
    answers = [name for name in objective.visited if name not in optional]

    def choose(rows: np.ndarray) -> Choice:
        if not selection:
            return Choice(rows)
        # Where the reference is taken to be 0, what chooses still sees it as it is.
        of_loss = columns[TRAIN] if objective.reference_answers else {}
        return selection.choose(tables[TRAIN], of_loss | reference, rows)

    return {
        split: Examples(
            table,
            answers,
            optional,
            columns[split],
            tokens[split],
            objective.answers,
            choose if split == TRAIN else Choice,
        )
        for split, table in tables.items()
    }


def _density_ratios(tables: dict[str, pa.Table], asked_for: bool) -> dict[str, np.ndarray]:
    """Fitted on the training split, so that an evaluation weighs as training does."""
    if not asked_for:
        return {split: np.ones(len(table)) for split, table in tables.items()}
    label = tables[TRAIN]["label"].to_numpy()
    ratios = density_ratios([*_prompts(tables[TRAIN]), *_prompts(tables[HELD_OUT])], label)
    return {TRAIN: ratios[: len(label)], HELD_OUT: ratios[len(label) :]}


def _of_data(objective: Objective, table: pa.Table) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    # Lengths always: a run's table has them.
    for name in dict.fromkeys(
        [*(f"n_{answer}" for answer in objective.visited if answer not in WITHOUT_GRADIENT), *objective.columns]
    ):
        if name.startswith("ref_") and not objective.reference_answers:
            found[name] = np.zeros(len(table))  # train.reference_free
        elif not name.endswith("_logp") and name != "density_ratio":
            found[name] = table[name].to_numpy().astype(np.float64)
    return found


def _prompts(table: pa.Table) -> list[np.ndarray]:
    ids = IdLists(table["prompt_ids"])
    return [ids[row] for row in range(len(table))]
