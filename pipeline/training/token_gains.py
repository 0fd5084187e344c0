"""Which evaluated examples a run moved most, in the right direction and in the wrong one, token by token.

An example's gain is how far its answers' summed log-probs moved as they should from before the first step to after the last: the
chosen answer's up, the rejected one's down. The table depends on the run's visits, its last weights and the cache alone, so a
resumed run writes the same.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.schema import HELD_OUT, KEY, TOKENS, TokenSequence
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.token_logps import token_logps
from prefcache.pipeline.token_text import token_texts
from prefcache.pipeline.training.run_log import RunLog

FILE = "tokens.parquet"
SHOWN = 4  # examples from each end
Sequences = Mapping[str, list[TokenSequence]]  # by answer


def measure_gains(log: RunLog, last: int, split: str = HELD_OUT) -> dict[str, float]:
    """Return the gain of each example of an evaluated split, the largest first."""
    before, after = (_scores(log.visits(step, split)) for step in (0, last))
    if before.keys() != after.keys():
        raise IntegrityError(
            f"The steps of {log.folder} hold other held-out examples at step {last} than at step 0. Delete it and train again."
        )
    gains = ((example_id, score - before[example_id]) for example_id, score in after.items())
    finite = [(example_id, gain) for example_id, gain in gains if math.isfinite(gain)]
    return dict(sorted(finite, key=lambda item: (-item[1], item[0])))


def _scores(visits: pa.Table) -> dict[str, float]:
    """The sum that should rise: log-probs of good answers minus those of bad ones."""
    columns = {name: visits[name].to_numpy(zero_copy_only=False) for name in visits.column_names}
    if visits["completion_logp"].null_count < len(visits):
        scores = np.where(columns["label"].astype(bool), 1, -1) * columns["completion_logp"]
    else:
        scores = columns["chosen_logp"] - columns["rejected_logp"]
    return dict(zip(columns["example_id"].tolist(), scores.tolist(), strict=True))


def extremes(gains: Mapping[str, float]) -> list[str]:
    """The examples with the largest and the smallest gains, in the order of `gains`."""
    ids = list(gains)
    return ids if len(ids) <= 2 * SHOWN else ids[:SHOWN] + ids[-SHOWN:]


def read_reference(cache: Cache, sequences: Sequences, accepted: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """Read the reference's log-prob of every token that counts, by answer."""
    keys = [pa.chunked_array([[sequence.key() for sequence in column]], KEY) for column in sequences.values()]
    logps: dict[str, list[np.ndarray]] = {}
    for (answer, column), lists in zip(
        sequences.items(), token_logps(cache, keys, cache.logps(keys, accepted), accepted), strict=True
    ):
        if any(len(lists[row]) != len(sequence.completion_ids) for row, sequence in enumerate(column)):
            raise IntegrityError(
                f"{cache.place} has lost rows since the run began. Score again (prefcache score CONFIG)."
            )
        logps[answer] = [lists[row][sequence.counted_positions] for row, sequence in enumerate(column)]
    return logps


def token_table(
    gains: Mapping[str, float],
    sequences: Sequences,
    tokenizer: Any,
    logps: Mapping[str, list[np.ndarray]],
    reference: Mapping[str, list[np.ndarray]],
) -> pa.Table:
    """Make a table of schema.TOKENS; sequences and log-probs of counted tokens are in the order of `extremes(gains)`."""

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return pa.Table.from_pylist(
        [
            {
                "example_id": example_id,
                "gain": gains[example_id],
                "answer": answer,
                "tokens": token_texts(decode, column[i].completion_ids.tolist()),
                "logps": _spread(logps[answer][i], column[i]),
                "ref_logps": _spread(reference[answer][i], column[i]) if answer in reference else None,
            }
            for i, example_id in enumerate(extremes(gains))
            for answer, column in sequences.items()
        ],
        schema=TOKENS,
    )


def _spread(logps: np.ndarray, sequence: TokenSequence) -> list[float | None]:
    """Put the log-probs of counted tokens at their places in the answer, None at the others."""
    spread: list[float | None] = [None] * len(sequence.completion_ids)
    for position, logp in zip(sequence.counted_positions, logps.tolist(), strict=True):
        spread[position] = logp
    return spread
