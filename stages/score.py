"""score: run the frozen reference once over every sequence that the cache lacks."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import identity, pool
from pipeline.config import Config, Score
from pipeline.errors import IdentityError, IntegrityError, UsageError
from pipeline.progress import Progress
from pipeline.scoring import actors
from pipeline.scoring.engines import PACKAGES, engine_module
from pipeline.scoring.scorer import Scorer, sample_slots
from pipeline.stored import artifact, claims, shorten
from pipeline.stored.cache import REFERENCE_FILE, Cache, Plan, identify
from pipeline.stored.prepared import Prepared, Sequences, answers_of, sequence_table


def run(config: Config, progress: Progress, dry_run: bool = False) -> dict[str, Any]:
    prepared = Prepared(config.prepared)
    reference = identity.find_reference(config)
    described = identify(reference, Path(config.cache), remember=not dry_run)
    cache = (Cache.look if dry_run else Cache.create)(Path(config.cache), config.model, described)
    inputs = _inputs(config, prepared, reference, described["model_id"])
    if not dry_run and (done := _already_done(config, cache, inputs)):
        progress.say(f"score: nothing to do, {cache.folder} has every sequence of {config.prepared}")
        return {**done, "changed": False}

    _check_same_tokenizer(prepared, reference.tokenizer, config)
    numerics = engine_module(config.score.engine).numerics(reference, config.score)
    accepted = [identity.numerics_id(numerics), *config.score.accept_numerics]
    _discard_damaged(cache, progress, dry_run)
    table = prepared.table()
    needed = sequence_table(table)

    def planned(cache: Cache) -> Plan:
        return cache.plan(needed, accepted, config.score.tokens_per_shard)

    plan = planned(cache)
    _discard_damaged(cache, progress, dry_run)  # what only reading has shown
    _warn_of_sums(cache, needed, plan, accepted, config.score, progress)
    if dry_run:
        return _dry_summary(cache, plan, config.score, sum(map(len, _shorter(cache, table, plan, accepted))))
    if plan.n_missing:
        cache.refuse_read_only()
    n_cut = _commit_shorter(cache, table, planned, accepted) if plan.n_missing and shorten.any_cut(table) else 0
    if n_cut:
        progress.say(f"score: {n_cut:,} cut answers are the beginning of scored ones, whose values they get")
        cache = cache.reopened()
        plan = planned(cache)
    _refuse_mixed_numerics(cache, plan, numerics, config.score)
    if plan.n_missing:
        _check_fits(reference.folder, table)
        sequences = Sequences(table)
        sample = sample_slots(plan, sequences, config.score.parity_sample)
        scorer: Scorer | actors.Pool
        if config.score.ray is None:
            scorer = Scorer(config.score, reference, numerics, cache, sequences, progress)
        else:
            n_chunks = len(plan.chunks)
            scorer = actors.Pool(config.score, reference, numerics, cache, prepared, n_chunks, progress)
        _score(scorer, plan, sample, progress)
    return _commit(config, cache, needed, accepted, inputs, plan, n_cut)


# -- before any model is loaded --------------------------------------------------------------------------------------


def _inputs(config: Config, prepared: Prepared, reference: identity.Reference, model_id: str) -> dict[str, Any]:
    # What only changes speed changes nothing stored.
    speed = {"tokens_per_batch", "tokens_per_shard", "parity_sample", "rescore", "rows", "ray"}
    return {
        "prepared": prepared.id,
        "model_id": model_id,
        "cache": config.cache,
        "config": config.score.model_dump(mode="json", exclude=speed),
        "versions": _versions(config.score, reference),
    }


def _versions(score: Score, reference: identity.Reference) -> dict[str, str]:
    if score.engine in PACKAGES:
        return identity.versions(PACKAGES[score.engine])
    return dict(engine_module(score.engine).numerics(reference, score))


def _already_done(config: Config, cache: Cache, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if it was made from these inputs and every shard it relied on is still whole."""
    try:
        manifest = artifact.read_manifest(config.scored)
    except IntegrityError:
        return None
    if manifest is None or manifest["inputs"] != inputs or cache.damaged or config.score.rescore:
        return None
    if not set(manifest["shards"]) <= {record["file"] for record in cache.records}:
        return None
    artifact.touch_manifest(config.scored)
    return _summary(manifest, n_scored=0, n_tokens=0)


def _check_same_tokenizer(prepared: Prepared, model: Path, config: Config) -> None:
    if prepared.manifest["inputs"]["tokenizer_id"] != identity.tokenizer_id(model):
        raise IdentityError(
            f"{config.prepared} was tokenized with another tokenizer than that of {config.model}. "
            "Prepare again for this model (make prepare), or set model back."
        )


def _discard_damaged(cache: Cache, progress: Progress, dry_run: bool) -> None:
    for reason in cache.damaged.values():
        progress.warn(f"{reason.rstrip('.')}. Its sequences are scored again.")
    if not dry_run:
        cache.discard_damaged()


def _warn_of_sums(
    cache: Cache, needed: pa.Table, plan: Plan, accepted: list[str], score: Score, progress: Progress
) -> None:
    if score.logps and plan.n_hits and (n := cache.n_sums_only(needed, accepted)):
        progress.warn(
            f"of {n:,} sequences {cache.folder} keeps the sums only (they were scored with score.logps=false, or imported), "
            "and nothing is added to them. For every token's log-prob, score into another place (cache)."
        )


def _refuse_mixed_numerics(cache: Cache, plan: Plan, numerics: dict[str, str], score: Score) -> None:
    if not plan.other_numerics or score.rescore:
        return
    known = cache.numerics()
    found = "; ".join(
        f"{n} under {other} ({identity.differences(numerics, known[other])})"
        for other, n in sorted(plan.other_numerics.items())
    )
    named = ",".join(sorted(plan.other_numerics))
    raise IdentityError(
        f"{cache.folder} has {found}, of {plan.n_missing} sequences that this engine has not scored. "
        f"Use those rows (--set score.accept_numerics=[{named}]), or compute them again (--set score.rescore=true)."
    )


def _check_fits(model: Path, table: pa.Table) -> None:
    longest, most = pc.max(sequence_table(table)["n"]).as_py(), identity.longest_sequence(model)
    if longest > most:
        raise UsageError(
            f"The longest sequence has {longest} tokens; {model} takes {most}. Set prepare.max_length={most}."
        )
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    vocabulary = config.get("vocab_size")
    largest = max(
        int(part.values.to_numpy().max())
        for name in ("prompt_ids", *(f"{answer}_ids" for answer in answers_of(table)))
        for part in table[name].chunks
        if len(part.values)
    )
    if vocabulary and largest >= vocabulary:
        raise IdentityError(
            f"Token id {largest} is not in the vocabulary of {model} ({vocabulary}). Its tokenizer is another model's."
        )


# -- the pass --------------------------------------------------------------------------------------------------------


def _shorter(cache: Cache, table: pa.Table, plan: Plan, accepted: list[str]) -> Iterator[pa.Table]:
    """Rows of missing answers that are the beginning of a scored one."""
    if plan.n_missing:
        yield from shorten.rows(table, np.concatenate(plan.chunks), cache, accepted)


def _commit_shorter(cache: Cache, table: pa.Table, plan: Callable[[Cache], Plan], accepted: list[str]) -> int:
    """How many there are. One scorer at a time, with the cache as it is then: the next finds them there."""
    with claims.claimed(claims.path_of(cache.folder, "cut-answers"), wait=True):
        cache = cache.reopened()
        n_rows, known = 0, cache.numerics()
        for rows in _shorter(cache, table, plan(cache), accepted):
            numerics_id = rows["numerics_id"][0].as_py()
            cache.commit(rows, known[numerics_id], numerics_id, None)
            n_rows += len(rows)
        cache.discard_damaged()
    return n_rows


def _score(scorer: Scorer | actors.Pool, plan: Plan, sample: list[int], progress: Progress) -> None:
    rank, world = pool.share()
    try:
        scorer.check(sample)
        with progress.count("score", plan.n_tokens, "tokens") as counter:
            for n_tokens in scorer.run(plan, rank, world):
                counter.add(n_tokens)
    finally:
        scorer.close()


# -- what is said about it -------------------------------------------------------------------------------------------


def _commit(
    config: Config,
    cache: Cache,
    needed: pa.Table,
    accepted: list[str],
    inputs: dict[str, Any],
    plan: Plan,
    n_cut: int,
) -> dict[str, Any]:
    """Read back what is on disk, and only then vouch for it."""
    cache = cache.reopened()
    after = cache.plan(needed, accepted, config.score.tokens_per_shard)
    if after.n_missing:
        raise IntegrityError(
            f"{after.n_missing} sequences are still missing in {cache.folder}. Run the same command again."
        )
    used = {numerics_id: record for numerics_id, record in cache.numerics().items() if numerics_id in accepted}
    manifest = {
        "inputs": inputs,
        "reference": {"name": config.model, "model_id": cache.reference["model_id"]},
        "cache": str(cache.folder),
        "accepted_numerics": accepted,
        "numerics": used,
        "parity": _worst_parity(cache, accepted),
        "shards": [record["file"] for record in cache.records],
        "sequences": after.n_sequences,
        "failed": after.n_failed,
    }
    artifact.commit_manifest(config.scored, manifest)
    weights = identity.find_reference(config).weight_files
    artifact.commit_make_inputs(config.scored, [*weights, cache.folder / REFERENCE_FILE])
    return {**_summary(manifest, plan.n_missing, plan.n_tokens), "cut_from_longer": n_cut, "changed": True}


def _worst_parity(cache: Cache, accepted: list[str]) -> dict[str, Any] | None:
    checked = [r["parity"] for r in cache.records if r["numerics_id"] in accepted and r["parity"]]
    return max(checked, key=lambda parity: parity["max"], default=None)


def _summary(manifest: dict[str, Any], n_scored: int, n_tokens: int) -> dict[str, Any]:
    return {
        "cache": manifest["cache"],
        "sequences": manifest["sequences"],
        "cached_before": manifest["sequences"] - n_scored,
        "scored": n_scored,
        "tokens": n_tokens,
        "failed": manifest["failed"],
        "parity": manifest["parity"],
    }


def _dry_summary(cache: Cache, plan: Plan, score: Score, n_cut: int) -> dict[str, Any]:
    # Per row: the key, two counts, the sum, and four bytes per token's log-prob; before compression.
    n_bytes = plan.n_missing * 32 + (4 * plan.n_completion_tokens if score.logps else 0)
    return {
        "dry_run": True,
        "cache": str(cache.folder),
        "sequences": plan.n_sequences,
        "cached_before": plan.n_hits,
        "to_score": plan.n_missing - n_cut,
        "cut_from_longer": n_cut,
        "tokens": plan.n_tokens,
        "bytes": n_bytes,
        "other_numerics": plan.other_numerics,
    }
