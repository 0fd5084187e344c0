"""Whether the prepared data has the columns that an objective reads. Checked before any model is loaded."""

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.schema import ANSWERS, DATA_COLUMNS, data_columns
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.training.objective import Objective, losses_for

_KL = "Prepare again with prepare.kl_pairs: true; if all answers are the same, no answer can be mismatched."
_REMEDIES = {column.name: column.remedy for column in DATA_COLUMNS} | {"kl_logp": _KL, "ref_kl_logp": _KL}


def refuse_missing(objective: Objective, prepared: Prepared) -> None:
    """Refuse data that lacks what the objective reads; name the losses that would work with it."""
    prepared.refuse_older()
    available = _available_columns(prepared)
    missing = [name for name in objective.columns if name not in available]
    if not missing:
        return
    if objective.kind == prepared.kind:
        problem, remedy = f"{prepared.folder} lacks that", _REMEDIES.get(missing[0], "Prepare again.")
    elif prepared.kind == "pairs":
        problem = f"{prepared.folder} holds pairs, not labelled answers"
        remedy = "Prepare labels (prepare.examples: labels takes pairs apart)."
    else:
        problem = f"{prepared.folder} holds labelled answers, not pairs"
        remedy = "Prepare data that has pairs (prepare.examples: pairs)."
    raise UsageError(
        f"Loss {objective.name!r} reads {', '.join(missing)}, and {problem}. {remedy} "
        f"Losses for the data as it is: {', '.join(losses_for(available))}."
    )


def _available_columns(prepared: Prepared) -> set[str]:
    """The columns that this data, once scored, has for a loss."""
    table, columns = prepared.table(), set[str]()
    for answer in ANSWERS[prepared.kind]:
        if _has_values(table[f"n_{answer}"]):
            columns |= {f"{answer}_logp", f"ref_{answer}_logp", f"n_{answer}_counted"}
    if prepared.kind == "labels":
        columns |= {"label", "density_ratio"}
    return columns | {name for name in data_columns(prepared.kind) if _has_values(table[name])}


def _has_values(column: pa.ChunkedArray) -> bool:
    return not len(column) or bool(np.isfinite(column.to_numpy().astype(np.float64)).any())
