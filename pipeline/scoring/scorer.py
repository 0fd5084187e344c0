"""The scorer: an engine that was checked, and the chunks of a plan that it turns into shards of the cache.

Several scorers may fill one cache, here or on other machines. Each does its own share first and then helps with the rest,
so none waits for one that died. A chunk is claimed before it is computed, and its first record wins.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from prefcache.pipeline import identity
from prefcache.pipeline.config import Score
from prefcache.pipeline.errors import IdentityError, IntegrityError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import CACHE, OK, OK_IN_FLOAT32, TokenSequence
from prefcache.pipeline.scoring import refusals
from prefcache.pipeline.scoring.engines import Engine, find_engine
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import CacheWriter
from prefcache.pipeline.stored.model_ids import is_same_model
from prefcache.pipeline.stored.prepared import Sequences
from prefcache.pipeline.stored.records import Parity
from prefcache.pipeline.stored.scoring_plan import Plan, plan_scoring
from prefcache.pipeline.stored.signatures import find_key

# Largest deviation of one token's log-prob from the plain float32 forward that still counts as rounding.
TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.75}


class FinishedChunk(NamedTuple):
    """A chunk that is in the cache now."""

    n_sequences: int
    n_tokens: int
    is_mine: bool  # False: another scorer has computed it


class Share(NamedTuple):
    """What this command has computed of a plan; other scorers have computed the rest."""

    n_sequences: int
    n_tokens: int


def plan_after_repairs(
    cache: Cache, sequences: pa.Table, accepted: Sequence[str], score: Score, progress: Progress
) -> Plan:
    """Plan to score what is missing once damaged shards are discarded, including those whose damage only planning reveals."""
    refusals.warn_about_unsigned(cache, progress)
    _discard_damaged(cache, progress)
    plan = plan_scoring(cache, sequences, accepted, score.tokens_per_shard)
    _discard_damaged(cache, progress)
    return plan


def _discard_damaged(cache: Cache, progress: Progress) -> None:
    refusals.warn_about_damage(cache, progress)
    CacheWriter(cache).discard_damaged()


def follow(chunks: Iterator[FinishedChunk], plan: Plan, progress: Progress) -> Share:
    """Show how far a scoring is until it ends, and return the share of this command."""
    n_sequences = n_tokens = 0
    with progress.count("score", plan.n_tokens, "tokens") as counter:
        for chunk in chunks:
            counter.add(chunk.n_tokens)
            if chunk.is_mine:
                n_sequences += chunk.n_sequences
                n_tokens += chunk.n_tokens
    return Share(n_sequences, n_tokens)


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
        images: PromptImages | None = None,
    ) -> None:
        self._images = images
        self._score, self._reference, self._numerics = score, reference, numerics
        self._numerics_id = identity.numerics_id(numerics)
        self._cache, self._sequences, self._progress = cache, sequences, progress
        self._key = find_key(score.sign_with)
        self._writer = CacheWriter(cache, self._key)
        self._engine: Engine | None = None
        self._parity: Parity | None = None
        self._stamps: list[str] | None = None  # of the model's files when they last matched the cache's model
        self._retries_in_float32 = True  # until a retry rescued nothing: then rounding is not the cause

    def turn_to(self, cache: Cache, sequences: Sequences) -> None:
        """Score other sequences from now on, with the engine as it is."""
        self._cache, self._sequences, self._writer = cache, sequences, CacheWriter(cache, self._key)

    def check(self, sample: list[int]) -> None:
        """Load the engine and compare it with the plain float32 forward on a sample of slots."""
        from prefcache.pipeline.model.weights import check_tensors
        from prefcache.pipeline.scoring.baseline import score_plainly

        sequences = [self._sequences[slot] for slot in sample]
        # A large model takes minutes, and vLLM one at least, before there is anything to count.
        plainly = f"plainly for {len(sequences)} sequences, then " if sequences else ""
        self._progress.say(f"score: loading {self._reference.folder}, {plainly}for engine {self._score.engine}")
        # Loading a model here warns about missing tensors; without a sample another engine loads it out of sight.
        if not sequences and self._score.engine != "transformers" and (reason := check_tensors(self._reference)):
            self._progress.warn(reason)
        # The plain model is gone before the engine loads: never two models in memory.
        plain = score_plainly(self._reference, sequences, self._images) if sequences else []
        self._engine = engine = find_engine(self._score.engine).load(self._reference, self._score, self._images)
        if sequences:
            scores = engine.score(sequences)
            self._parity = measure_parity(self._score, self._numerics, engine.facts, scores, plain, self._progress)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def run(self, plan: Plan, rank: int, world: int) -> Iterator[FinishedChunk]:
        """Score what is missing; yield each finished chunk, whoever finished it."""
        chunks = order_chunks(plan, rank, world)
        with self._writer.flushing():
            for wait in (False, True):
                taken = []
                for slots, following in itertools.zip_longest(chunks, chunks[1:]):
                    if (finished := self._score_chunk(slots, wait, following)) is None:
                        taken.append(slots)
                    else:
                        yield finished
                chunks = taken
        self.merge_statements()

    def score(self, chunks: Sequence[np.ndarray], wait: bool, seconds: float = math.inf) -> list[FinishedChunk | None]:
        """Score chunks one after another, until the time is over; return those that it came to.

        None stands for a chunk that another scorer has claimed, unless `wait` waits for it.
        """
        finished, until = list[FinishedChunk | None](), time.monotonic() + seconds
        with self._writer.flushing():
            for slots, following in itertools.zip_longest(chunks, chunks[1:]):
                finished.append(self._score_chunk(slots, wait, following))
                if time.monotonic() > until:
                    break
        return finished

    def merge_statements(self) -> None:
        """Replace the signed statements about single shards by one about all that this scorer has written."""
        self._writer.merge_statements()

    def _score_chunk(self, slots: np.ndarray, wait: bool, following: np.ndarray | None) -> FinishedChunk | None:
        """Score a chunk, which an object store may not have yet when this returns; claim the following one meanwhile."""
        chunk = [self._sequences[slot] for slot in slots]
        keys = [sequence.key() for sequence in chunk]
        with self._writer.claim(keys, self._numerics_id, wait=wait) as claim:
            if claim == "taken":
                return None
            if claim == "mine":
                if following is not None:
                    self._writer.claim_ahead([self._sequences[slot].key() for slot in following], self._numerics_id)
                rows = self._compute_rows(keys, chunk)
                self._refuse_changed_weights()
                self._writer.commit(rows, self._numerics, self._numerics_id, self._parity, in_background=True)
        return FinishedChunk(len(chunk), sum(sequence.n_tokens for sequence in chunk), is_mine=claim == "mine")

    def _refuse_changed_weights(self) -> None:
        """Refuse rows of a model that is no longer the cache's: loaded weights may be the mapped file, which others can overwrite.

        Where the files were not touched, this only looks at their sizes and times.
        """
        stamps = self._reference.stamps()
        if stamps == self._stamps:
            return
        if not is_same_model(self._cache.reference.model_id, self._reference, self._cache.folder.parent):
            raise IdentityError(
                f"{self._reference.folder} has changed since scoring began. Nothing was kept that was computed with other "
                "weights: run the same command again, and do not change the folder meanwhile."
            )
        self._stamps = stamps

    def _compute_rows(self, keys: list[bytes], chunk: list[TokenSequence]) -> pa.Table:
        assert self._engine is not None
        scores, retried = self._engine.score(chunk), self._retries_in_float32
        rescued = self._rescue(chunk, scores)
        rows = []
        for i, (key, sequence) in enumerate(zip(keys, chunk, strict=True)):
            logps = rescued.get(i, scores[i])
            assert logps.dtype == np.float32 and len(logps) == len(sequence.completion_ids)
            if is_finite := bool(np.isfinite(logps).all()):
                status = OK_IN_FLOAT32 if i in rescued else OK
            else:
                at = int(np.flatnonzero(~np.isfinite(logps))[0])
                also = ", also in float32" if retried else ""
                status = f"failed: the log-prob of answer token {at} is {logps[at]}{also}"
            rows.append(
                {
                    "key": key,
                    "n_prompt": len(sequence.prompt_ids),
                    "n_completion": len(sequence.completion_ids),
                    "logp_sum": float(logps.sum(dtype=np.float64)) if is_finite else None,
                    "logps": logps if is_finite and self._score.logps else None,
                    "numerics_id": self._numerics_id,
                    "status": status,
                }
            )
        return pa.Table.from_pylist(rows, schema=CACHE)

    def _rescue(self, chunk: list[TokenSequence], scores: list[np.ndarray]) -> dict[int, np.ndarray]:
        """Recompute sequences without finite log-probs by the plain float32 forward; return those that have some there."""
        from prefcache.pipeline.scoring.baseline import score_plainly

        failed = [i for i, logps in enumerate(scores) if not np.isfinite(logps).all()]
        if not failed or not self._retries_in_float32:
            return {}
        plain = score_plainly(self._reference, [chunk[i] for i in failed], self._images)
        rescued = {i: logps for i, logps in zip(failed, plain, strict=True) if np.isfinite(logps).all()}
        self._retries_in_float32 = bool(rescued)
        self._progress.warn(
            f"{len(failed)} sequences have a log-prob that is not finite; {len(rescued)} of them have finite ones in float32"
        )
        return rescued


def measure_parity(
    score: Score,
    numerics: dict[str, str],
    facts: dict[str, Any],
    scores: list[np.ndarray],
    plain: list[np.ndarray],
    progress: Progress,
) -> Parity:
    """Return how far an engine's log-probs are from the plain ones; fail where that is more than rounding."""
    n, tolerance = len(scores), TOLERANCE.get(identity.coarsest_dtype(numerics), max(TOLERANCE.values()))
    dtypes = [numerics["dtype"], numerics.get("head_dtype", "float32")]
    name = f"engine {score.engine} ({dtypes[0]}{'' if dtypes[1] in ('float32', dtypes[0]) else f', head {dtypes[1]}'})"
    finer = "score.dtype=float32, " if dtypes[0] != "float32" else ""
    finer += "score.head_dtype=float32, " if score.head_dtype not in (None, "float32") else ""
    remedy = find_engine(score.engine).remedy.format(finer)
    n_lost = sum(
        bool(np.isfinite(plain_T).all() and not np.isfinite(logps_T).all())
        for plain_T, logps_T in zip(plain, scores, strict=True)
    )
    logps, plain_logps = np.concatenate(scores), np.concatenate(plain)
    is_finite = np.isfinite(logps)
    # Sequences without finite log-probs are recomputed in float32 with their chunk. A finite log-prob where the plain
    # forward has none is more than rounding.
    deviation = np.nan_to_num(np.abs(logps[is_finite] - plain_logps[is_finite]), nan=np.inf)
    if 2 * n_lost > n or (n_lost and not len(deviation)):
        raise IntegrityError(
            f"{name} returns no finite log-prob for {n_lost} of {n} sequences, where the plain float32 forward does. {remedy}"
        )
    if not len(deviation):
        raise IntegrityError(
            f"{name} returns no finite log-prob for any of {n} sequences, and neither does the plain float32 forward. The "
            "weights may be broken; score.parity_sample=0 scores without this check and marks every such row as failed."
        )
    worst = float(deviation.max())
    if worst > tolerance:
        raise IntegrityError(
            f"{name} deviates from the plain float32 forward by up to {worst:.3g} nats per token on {n} sequences; "
            f"{tolerance} is allowed. {remedy}"
        )
    if n_lost:
        progress.warn(f"{name} returns no finite log-prob for {n_lost} of {n} sequences in the sample")
    description = ", ".join(f"{fact} {value}" for fact, value in facts.items())
    progress.say(
        f"score: {name} within {worst:.1e} nats per token of the plain float32 forward ({n} sequences); {description}"
    )
    p50, p99 = (float(np.quantile(deviation, q)) for q in (0.5, 0.99))
    return Parity(sequences=n, p50=p50, p99=p99, max=worst)


def order_chunks(plan: Plan, rank: int, world: int) -> list[np.ndarray]:
    """Return the chunks of a plan: the share of this process first, then the others'."""
    return [*plan.chunks[rank::world], *(chunk for i, chunk in enumerate(plan.chunks) if i % world != rank)]


def sample_slots(plan: Plan, sequences: Sequences, n: int) -> list[int]:
    """Return the slots of the longest, the shortest and random sequences, each followed by its prompt's other answer.

    Sequences that share a forward are checked together, as they will be computed. If any prompt has images, one such prompt is the
    first: whether images are computed rightly shows only there.
    """
    slots: dict[int, None] = {}
    illustrated = sequences.slot_with_images
    for slot in [*([] if illustrated is None else [illustrated]), *map(int, plan.probe)]:
        for answer in (slot, slot ^ 1):
            if len(sequences[answer].completion_ids):
                slots[answer] = None
    return list(slots)[:n]
