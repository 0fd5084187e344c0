"""score: run the frozen reference once over every sequence that the cache lacks."""

import json
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import artifact, identity
from pipeline.cache import REFERENCE_FILE, Cache, Plan, identify
from pipeline.config import Config, Score
from pipeline.engines import PACKAGES, Engine, engine_module
from pipeline.engines.loading import plain_scores
from pipeline.errors import IdentityError, IntegrityError, UsageError
from pipeline.prepared import Prepared, Sequences, answers_of, sequence_table
from pipeline.progress import Progress
from pipeline.schema import CACHE, OK, Sequence

# Largest deviation of one token's log-prob from the plain float32 forward that is still rounding.
TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.75}


def run(config: Config, progress: Progress, dry_run: bool = False) -> dict[str, Any]:
    prepared = Prepared(config.prepared)
    model = identity.find_model(config.model)
    loadable = identity.Reference(model)
    reference = identify(model, Path(config.cache))
    cache = Cache.create(Path(config.cache), config.model, reference)
    inputs = _inputs(config, prepared, reference)
    if (done := _already_done(config, cache, inputs)) and not dry_run:
        progress.say(f"score: nothing to do, {cache.folder} has every sequence of {config.prepared}")
        return {**done, "changed": False}

    _check_same_tokenizer(prepared, model, config)
    engine = engine_module(config.score.engine)
    numerics = engine.numerics(loadable, config.score)
    accepted = [identity.numerics_id(numerics), *config.score.accept_numerics]
    _discard_damaged(cache, progress, dry_run)
    table = prepared.table()
    plan = cache.plan(sequence_table(table), accepted, config.score.tokens_per_shard)
    if dry_run:
        return _dry_summary(cache, plan, config.score)
    _refuse_mixed_numerics(cache, plan, numerics, config.score)
    if plan.n_missing:
        _check_fits(model, table)
        _score(config.score, loadable, engine, numerics, cache, Sequences(table), plan, progress)
    return _commit(config, cache, table, accepted, inputs, plan)


# -- before any model is loaded --------------------------------------------------------------------------------------


def _inputs(config: Config, prepared: Prepared, reference: dict[str, Any]) -> dict[str, Any]:
    # What only changes speed changes nothing stored.
    speed = {"tokens_per_batch", "tokens_per_shard", "parity_sample", "rescore"}
    return {
        "prepared": prepared.id,
        "model_id": reference["model_id"],
        "cache": config.cache,
        "config": config.score.model_dump(mode="json", exclude=speed),
        "versions": identity.versions(PACKAGES[config.score.engine]),
    }


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


def _score(
    score: Score,
    reference: identity.Reference,
    module: Any,
    numerics: dict[str, str],
    cache: Cache,
    sequences: Sequences,
    plan: Plan,
    progress: Progress,
) -> None:
    numerics_id = identity.numerics_id(numerics)
    engine, parity = _load_and_check(score, reference, module, numerics, sequences, plan, progress)
    with progress.count("score", plan.n_tokens, "tokens") as counter:
        for slots in plan.chunks:
            chunk = [sequences[slot] for slot in slots]
            keys = [sequence.key() for sequence in chunk]
            if not cache.has_chunk(keys, numerics_id):
                cache.commit(
                    _rows(keys, chunk, engine.score(chunk), numerics_id, score.logps), numerics, numerics_id, parity
                )
            counter.add(sum(sequence.n_tokens for sequence in chunk))


def _load_and_check(
    score: Score,
    reference: identity.Reference,
    module: Any,
    numerics: dict[str, str],
    sequences: Sequences,
    plan: Plan,
    progress: Progress,
) -> tuple[Engine, dict[str, Any] | None]:
    """The engine, and how far it is from the plain forward on a sample."""
    sample = [sequences[slot] for slot in plan.probe[: score.parity_sample]]
    # First the plain model, then the engine: never two models in memory.
    plain = plain_scores(reference, sample) if sample else []
    engine: Engine = module.load(reference, score)
    if not sample:
        return engine, None
    deviation = np.abs(np.concatenate(engine.score(sample)) - np.concatenate(plain))
    parity = {
        "sequences": len(sample),
        "p50": float(np.quantile(deviation, 0.5)),
        "p99": float(np.quantile(deviation, 0.99)),
        "max": float(deviation.max()),
    }
    tolerance = TOLERANCE[numerics["dtype"]]
    if not parity["max"] <= tolerance:
        raise IntegrityError(
            f"Engine {score.engine} ({numerics['dtype']}) deviates from the plain float32 forward by up to {parity['max']:.3g} "
            f"nats per token on {len(sample)} sequences; {tolerance} is allowed. Try score.dtype=float32 or "
            "score.attention=eager, and report it."
        )
    progress.say(
        f"score: engine within {parity['max']:.1e} nats per token of the plain float32 forward ({len(sample)} sequences)"
    )
    return engine, parity


def _rows(
    keys: list[bytes], chunk: SequenceOf[Sequence], scores: list[np.ndarray], numerics_id: str, keep_logps: bool
) -> pa.Table:
    rows = []
    for key, sequence, logps in zip(keys, chunk, scores, strict=True):
        assert len(logps) == len(sequence.completion_ids)
        finite = bool(np.isfinite(logps).all())
        rows.append(
            {
                "key": key,
                "n_prompt": len(sequence.prompt_ids),
                "n_completion": len(sequence.completion_ids),
                "logp_sum": float(logps.sum(dtype=np.float64)) if finite else None,
                "logps": logps if finite and keep_logps else None,
                "numerics_id": numerics_id,
                "status": OK if finite else "failed: a log-prob is not finite",
            }
        )
    return pa.Table.from_pylist(rows, schema=CACHE)


# -- what is said about it -------------------------------------------------------------------------------------------


def _commit(
    config: Config, cache: Cache, table: pa.Table, accepted: list[str], inputs: dict[str, Any], plan: Plan
) -> dict[str, Any]:
    """Read back what is on disk, and only then vouch for it."""
    cache = Cache(cache.folder, cache.reference["model_id"])
    after = cache.plan(sequence_table(table), accepted, config.score.tokens_per_shard)
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
    weights = sorted(identity.find_model(config.model).glob("*.safetensors"))
    artifact.commit_make_inputs(config.scored, [*weights, cache.folder / REFERENCE_FILE])
    return {**_summary(manifest, plan.n_missing, plan.n_tokens), "changed": True}


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


def _dry_summary(cache: Cache, plan: Plan, score: Score) -> dict[str, Any]:
    # Per row: the key, two counts, the sum, and four bytes per token's log-prob; before compression.
    n_bytes = plan.n_missing * 32 + (4 * plan.n_completion_tokens if score.logps else 0)
    return {
        "dry_run": True,
        "cache": str(cache.folder),
        "sequences": plan.n_sequences,
        "cached_before": plan.n_hits,
        "to_score": plan.n_missing,
        "tokens": plan.n_tokens,
        "bytes": n_bytes,
        "other_numerics": plan.other_numerics,
    }
