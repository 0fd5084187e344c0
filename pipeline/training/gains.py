"""Which held-out examples a run moved most, the right way and the wrong way, token by token.

An example's gain is how far its answers' summed log-probs moved as they should from before the first step to after the
last: the chosen answer's up, the rejected one's down. What is written depends on the run's visits, its last weights and
the cache alone, so a resumed run writes the same.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import IntegrityError
from pipeline.pieces import pieces
from pipeline.schema import HELD_OUT, KEY, TOKENS, Sequence
from pipeline.stored.cache import Cache
from pipeline.training.runlog import RunLog
from pipeline.training.token_logps import token_logps

FILE = "tokens.parquet"
SHOWN = 4  # of the most gained, and of the most lost
Sequences = Mapping[str, list[Sequence]]  # by answer


def gains(log: RunLog, last: int) -> dict[str, float]:
    """By example, those gained most first."""
    before, after = (_scores(log.visits(step, HELD_OUT)) for step in (0, last))
    moved = {example_id: score - before[example_id] for example_id, score in after.items()}
    finite = [(example_id, gain) for example_id, gain in moved.items() if math.isfinite(gain)]
    return dict(sorted(finite, key=lambda item: (-item[1], item[0])))


def _scores(visits: pa.Table) -> dict[str, float]:
    """What is to rise: the log-prob of what is good, less that of what is not."""
    columns = {name: visits[name].to_numpy(zero_copy_only=False) for name in visits.column_names}
    if visits["completion_logp"].null_count < len(visits):
        scores = np.where(columns["label"].astype(bool), 1, -1) * columns["completion_logp"]
    else:
        scores = columns["chosen_logp"] - columns["rejected_logp"]
    return dict(zip(columns["example_id"].tolist(), scores.tolist(), strict=True))


def ends(by_gain: Mapping[str, float]) -> list[str]:
    """Of examples in the order of their gains, the first and the last."""
    ids = list(by_gain)
    return ids if len(ids) <= 2 * SHOWN else ids[:SHOWN] + ids[-SHOWN:]


def reference_tokens(cache: Cache, sequences: Sequences, accepted: SequenceOf[str]) -> dict[str, list[np.ndarray]]:
    """The reference's log-prob of every token, by answer."""
    keys = [pa.chunked_array([[each.key() for each in of_answer]], KEY) for of_answer in sequences.values()]
    lists = token_logps(cache, keys, cache.logps(keys, accepted), accepted)
    found = {
        answer: [of_answer[row] for row in range(len(sequences[answer]))]
        for answer, of_answer in zip(sequences, lists, strict=True)
    }
    pairs = [pair for answer in found for pair in zip(found[answer], sequences[answer], strict=True)]
    if any(len(logps) != len(sequence.completion_ids) for logps, sequence in pairs):
        raise IntegrityError(f"{cache.folder} has lost rows since the run began. Score again (make score).")
    return found


def rows(
    by_gain: Mapping[str, float],
    sequences: Sequences,
    tokenizer: Any,
    logps: Mapping[str, list[np.ndarray]],
    reference: Mapping[str, list[np.ndarray]],
) -> pa.Table:
    """Of schema.TOKENS. All lists are in the order of `ends`."""

    def decode(ids: SequenceOf[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return pa.Table.from_pylist(
        [
            {
                "example_id": example_id,
                "gain": by_gain[example_id],
                "answer": answer,
                "tokens": pieces(decode, of_answer[i].completion_ids.tolist()),
                "logps": logps[answer][i],
                "ref_logps": reference[answer][i] if answer in reference else None,
            }
            for i, example_id in enumerate(ends(by_gain))
            for answer, of_answer in sequences.items()
        ],
        schema=TOKENS,
    )
