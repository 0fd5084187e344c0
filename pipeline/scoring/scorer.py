"""Scoring: an engine that has been checked, and the chunks of work that it turns into rows of the cache.

Several scorers may work on one cache, here or on other machines. Each does its own share first and then helps with what
is left, so none waits for one that has died; a chunk is claimed before it is computed, and its first record wins.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import identity
from pipeline.config import Score
from pipeline.errors import IdentityError, IntegrityError
from pipeline.identity import Reference
from pipeline.progress import Progress
from pipeline.schema import CACHE, OK, OK_IN_FLOAT32, Sequence
from pipeline.scoring.engines import Engine, engine_module
from pipeline.stored.cache import Cache, Plan, identify
from pipeline.stored.prepared import Sequences

# Largest deviation of one token's log-prob from the plain float32 forward that is still rounding.
TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.75}

_REMEDIES = {
    "transformers": "Try {}score.rows=padded or score.attention=eager, and report it.",
    "vllm": "Try {}score.vllm.prefix_caching=false or score.engine=transformers, and report it.",
    "server": "See whether it serves these very weights, and in which dtype (score.dtype), or try score.engine=transformers.",
}
_NONE = (
    "Its weights may be broken; score.parity_sample=0 scores without this check, and says of each row what it lacks."
)


class Scorer:
    """A loaded engine and the cache that it fills."""

    def __init__(
        self,
        score: Score,
        reference: Reference,
        numerics: dict[str, str],
        cache: Cache,
        sequences: Sequences,
        progress: Progress,
    ) -> None:
        self._score, self._reference, self._numerics = score, reference, numerics
        self._numerics_id = identity.numerics_id(numerics)
        self._cache, self._sequences, self._progress = cache, sequences, progress
        self._engine: Engine | None = None
        self._parity: dict[str, Any] | None = None
        self._retries = True  # until one has rescued nothing: then rounding is not what fails

    def check(self, sample: list[int]) -> None:
        """Load the engine and compare it with the plain float32 forward on some slots."""
        from pipeline.scoring.engines.loading import plain_scores

        chosen = [self._sequences[slot] for slot in sample]
        # A large model takes minutes before there is anything to count, vLLM one at least.
        plainly = f"plainly for {len(chosen)} sequences, then " if chosen else ""
        self._progress.say(f"score: loads {self._reference.folder}, {plainly}for engine {self._score.engine}")
        # First the plain model, then the engine: never two models in memory.
        plain = plain_scores(self._reference, chosen) if chosen else []
        self._engine = engine = engine_module(self._score.engine).load(self._reference, self._score)
        self._parity = self._compared(engine, engine.score(chosen), plain) if chosen else None

    def _compared(self, engine: Engine, found: list[np.ndarray], plain: list[np.ndarray]) -> dict[str, Any]:
        how = f"engine {self._score.engine} ({self._numerics['dtype']})"
        n_lost = sum(bool(np.isfinite(x).all() and not np.isfinite(y).all()) for x, y in zip(plain, found, strict=True))
        theirs, right = np.concatenate(found), np.concatenate(plain)
        there = np.isfinite(theirs)
        # What is not finite is computed in float32 when its chunk is. A value where that has none is no rounding.
        deviation = np.nan_to_num(np.abs(theirs[there] - right[there]), nan=np.inf)
        if 2 * n_lost > len(found) or not len(deviation):
            raise IntegrityError(
                f"{how} gives no finite log-prob of {n_lost if n_lost else 'any'} of {len(found)} sequences, where the "
                f"plain float32 forward gives {'one' if n_lost else 'none either'}. {self._remedy() if n_lost else _NONE}"
            )
        worst, allowed = float(deviation.max()), TOLERANCE[self._numerics["dtype"]]
        if worst > allowed:
            raise IntegrityError(
                f"{how} deviates from the plain float32 forward by up to {worst:.3g} nats per token on "
                f"{len(found)} sequences; {allowed} is allowed. {self._remedy()}"
            )
        parity = {
            "sequences": len(found),
            "p50": float(np.quantile(deviation, 0.5)),
            "p99": float(np.quantile(deviation, 0.99)),
            "max": worst,
        }
        if n_lost:
            self._progress.warn(f"{how} gives no finite log-prob of {n_lost} of {len(found)} sequences in the sample")
        facts = ", ".join(f"{name} {value}" for name, value in engine.facts.items())
        self._progress.say(
            f"score: {how} within {parity['max']:.1e} nats per token of the plain float32 forward "
            f"({len(found)} sequences); {facts}"
        )
        return parity

    def _remedy(self) -> str:
        exact = "" if self._numerics["dtype"] == "float32" else "score.dtype=float32, "
        return _REMEDIES[self._score.engine].format(exact)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def run(self, plan: Plan, rank: int, world: int) -> Iterator[int]:
        """Score what is missing; yields the tokens of each chunk that is done, by this process or another."""
        chunks = in_order(plan, rank, world)
        for wait in (False, True):
            left = []
            for slots in chunks:
                if (n_tokens := self.score(slots, wait)) is None:
                    left.append(slots)
                else:
                    yield n_tokens
            chunks = left

    def score(self, slots: np.ndarray, wait: bool) -> int | None:
        """The tokens of a chunk that is in the cache now; None where another scorer is at it, which `wait` waits for."""
        chunk = [self._sequences[slot] for slot in slots]
        keys = [sequence.key() for sequence in chunk]
        with self._cache.claim(keys, self._numerics_id, wait=wait) as claim:
            if claim == "taken":
                return None
            if claim == "mine":
                rows = self._rows(keys, chunk)
                self._refuse_other_weights()
                self._cache.commit(rows, self._numerics, self._numerics_id, self._parity)
        return sum(sequence.n_tokens for sequence in chunk)

    def _refuse_other_weights(self) -> None:
        """That what has just computed is what the cache is of. Loaded weights may be the file itself, mapped: one that
        is written over meanwhile changes them. While it is not touched, this costs a look at its size and times."""
        if identify(self._reference, self._cache.folder.parent)["model_id"] != self._cache.reference["model_id"]:
            raise IdentityError(
                f"{self._reference.folder} has changed since scoring began. Nothing was kept that was computed with other "
                "weights: run the same command again, and leave the folder alone meanwhile."
            )

    def _rows(self, keys: list[bytes], chunk: list[Sequence]) -> pa.Table:
        assert self._engine is not None
        scores, tried = self._engine.score(chunk), self._retries
        rescued = self._in_float32(chunk, scores)
        rows = []
        for i, (key, sequence, logps) in enumerate(zip(keys, chunk, scores, strict=True)):
            logps = rescued.get(i, logps)
            assert logps.dtype == np.float32 and len(logps) == len(sequence.completion_ids)
            finite = bool(np.isfinite(logps).all())
            rows.append(
                {
                    "key": key,
                    "n_prompt": len(sequence.prompt_ids),
                    "n_completion": len(sequence.completion_ids),
                    "logp_sum": float(logps.sum(dtype=np.float64)) if finite else None,
                    "logps": logps if finite and self._score.logps else None,
                    "numerics_id": self._numerics_id,
                    "status": (OK_IN_FLOAT32 if i in rescued else OK) if finite else _failure(logps, tried),
                }
            )
        return pa.Table.from_pylist(rows, schema=CACHE)

    def _in_float32(self, chunk: list[Sequence], scores: list[np.ndarray]) -> dict[int, np.ndarray]:
        """What the plain float32 forward makes of those that have no finite log-prob."""
        from pipeline.scoring.engines.loading import plain_scores

        failed = [i for i, logps in enumerate(scores) if not np.isfinite(logps).all()]
        if not failed or not self._retries:
            return {}
        again = plain_scores(self._reference, [chunk[i] for i in failed])
        rescued = {i: logps for i, logps in zip(failed, again, strict=True) if np.isfinite(logps).all()}
        self._retries = bool(rescued)
        self._progress.warn(
            f"{len(failed)} sequences got a log-prob that is not finite; {len(rescued)} of them have one in float32"
        )
        return rescued


def _failure(logps: np.ndarray, tried: bool) -> str:
    """Why there is no value, as the status of the row."""
    at = int(np.flatnonzero(~np.isfinite(logps))[0])
    return f"failed: the log-prob of answer token {at} is {logps[at]}{', also in float32' if tried else ''}"


def in_order(plan: Plan, rank: int, world: int) -> list[np.ndarray]:
    """The chunks of a plan: the share of this process, then the others'."""
    return [*plan.chunks[rank::world], *(chunk for i, chunk in enumerate(plan.chunks) if i % world != rank)]


def sample_slots(plan: Plan, sequences: Sequences, n: int) -> list[int]:
    """The longest and the shortest sequence and random ones, each beside its prompt's other answer: what shares a
    forward is tried together, as it will be computed."""
    slots: dict[int, None] = {}
    for slot in map(int, plan.probe):
        for each in (slot, slot ^ 1):
            if len(sequences[each].completion_ids):
                slots[each] = None
    return list(slots)[:n]
