"""score: run the frozen reference once over every sequence that the cache lacks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prefcache.command_results import ScorePlan, ScoreResult
from prefcache.pipeline import identity, older_ids, process_pool
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import IdentityError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.preparing import prepared_inputs
from prefcache.pipeline.preparing.tokenizer_fingerprint import read_fingerprint
from prefcache.pipeline.progress import Progress, working
from prefcache.pipeline.scoring import actors, refusals
from prefcache.pipeline.scoring.engines import find_engine, refuse_unused
from prefcache.pipeline.scoring.scored_inputs import find_inputs
from prefcache.pipeline.scoring.scorer import Scorer, Share, follow, plan_after_repairs, sample_slots
from prefcache.pipeline.stored import artifact, claims, cut_answers
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import CacheWriter, create_cache
from prefcache.pipeline.stored.freshness import Freshness, check_scoring
from prefcache.pipeline.stored.gguf_conversion import convert_models
from prefcache.pipeline.stored.mirror import find_mirror, open_root
from prefcache.pipeline.stored.model_ids import identify
from prefcache.pipeline.stored.prepared import CountedTokens, Prepared, Sequences, answer_names, sequence_table
from prefcache.pipeline.stored.records import REFERENCE_FILE, ScoredManifest
from prefcache.pipeline.stored.scored import describe_cache_place
from prefcache.pipeline.stored.scoring_plan import Plan, count_sums_only, plan_scoring
from prefcache.pipeline.stored.signatures import find_key


def run(config: Config, progress: Progress, dry_run: bool = False) -> ScoreResult | ScorePlan:
    refuse_unused(config.score)
    prepared = Prepared(config.prepared)
    prepared.refuse_older()
    prepared_inputs.warn_if_stale(config, progress)
    if not dry_run:
        convert_models(config, progress)
    reference = identity.find_reference(config)
    root = open_root(config.cache)
    described = identify(reference, root, remember=not dry_run)
    inputs = find_inputs(config, prepared, reference, described["model_id"])
    if dry_run:
        cache = Cache.preview(root, config.model, described, config.signers_file)
        _explain(check_scoring(config.scored, inputs, cache), progress)
        return _estimate(_Task.load(config, prepared, reference), cache, progress)
    cache = create_cache(root, config.model, described, config.signers_file)
    # Scorers of the same inputs share the work and write the same manifest; scorers of other inputs would overwrite it.
    job = artifact.checksum_bytes(artifact.canonical_json(inputs))
    with claims.claim_stage(Path(config.out), "score", "name another place (out)", job):
        freshness = check_scoring(config.scored, inputs, cache)
        if freshness.is_fresh and not config.score.rescore:
            progress.say(f"score: nothing to do, {cache.place} has every sequence of {config.prepared}")
            artifact.touch_manifest(config.scored)
            manifest = ScoredManifest.read(config.scored / artifact.MANIFEST)
            return _summarize(manifest, n_missing=0, share=Share(0, 0), changed=False)
        _explain(freshness, progress)
        with working(f"load engine {config.score.engine} and read {config.prepared}"):
            task = _Task.load(config, prepared, reference)
        return _score(task, cache, inputs, progress)


def _explain(freshness: Freshness, progress: Progress) -> None:
    if freshness.is_stored and freshness.reasons:
        progress.say(f"score: {freshness.explain()}")


@dataclass(frozen=True)
class _Task:
    """What is to be scored, and how."""

    config: Config
    prepared: Prepared
    reference: Reference
    numerics: dict[str, str]
    accepted: list[str]  # numerics ids whose rows are used, this engine's first
    examples: pa.Table
    sequences: pa.Table  # one row per sequence that needs a log-prob

    @staticmethod
    def load(config: Config, prepared: Prepared, reference: Reference) -> "_Task":
        numerics = find_engine(config.score.engine).numerics(reference, config.score)
        accepted = [identity.numerics_id(numerics), *config.score.accept_numerics]
        examples = prepared.table()
        return _Task(config, prepared, reference, numerics, accepted, examples, sequence_table(examples))

    def plan(self, cache: Cache) -> Plan:
        return plan_scoring(cache, self.sequences, self.accepted, self.config.score.tokens_per_shard)


def _estimate(task: _Task, cache: Cache, progress: Progress) -> ScorePlan:
    """Say what there is to score, and change nothing."""
    _refuse_other_tokenizer(task, remember=False)
    plan = task.plan(cache)
    refusals.warn_about_damage(cache, progress)
    refusals.warn_about_unsigned(cache, progress)
    _warn_about_sums(task, cache, plan, progress)
    n_cut = sum(map(len, _cut_answers(task, cache, plan)))
    # Per row: the key, two counts, the sum, and four bytes per token's log-prob; before compression.
    n_bytes = plan.n_missing * 32 + (4 * plan.n_completion_tokens if task.config.score.logps else 0)
    return ScorePlan(
        cache=cache.place,
        sequences=plan.n_sequences,
        cached_before=plan.n_hits,
        to_score=plan.n_missing - n_cut,
        cut_from_longer=n_cut,
        tokens=plan.n_tokens,
        bytes=n_bytes,
        other_numerics=plan.other_numerics,
    )


def _score(task: _Task, cache: Cache, inputs: dict[str, Any], progress: Progress) -> ScoreResult:
    """Score what is missing, read it back, and only then vouch for it."""
    _refuse_other_tokenizer(task, remember=True)
    plan = plan_after_repairs(cache, task.sequences, task.accepted, task.config.score, progress)
    _warn_about_sums(task, cache, plan, progress)
    n_cut = 0
    if plan.n_missing:
        CacheWriter(cache).refuse_read_only()
        refusals.refuse_unsigned(cache, plan, Sequences(task.examples), task.accepted[0], task.config.score)
        if n_cut := _commit_cut_answers(task, cache):
            progress.say(f"score: {n_cut:,} cut answers are the beginning of scored ones and take their values")
            cache = cache.reopen()
            plan = task.plan(cache)
    refusals.refuse_mixed_numerics(cache, plan, task.numerics, task.config.score)
    share = Share(0, 0)
    if plan.n_missing:
        refusals.refuse_unfit(task.reference.folder, task.sequences, task.examples)
        share = _compute(task, cache, plan, progress)
    manifest = _commit_manifest(task, cache.reopen(), inputs)
    return _summarize(manifest, plan.n_missing, share, changed=True, n_cut=n_cut)


def _compute(task: _Task, cache: Cache, plan: Plan, progress: Progress) -> Share:
    score, sequences = task.config.score, Sequences(task.examples)
    scorer: Scorer | actors.Pool
    if score.ray is None:
        images = task.prepared.prompt_images(task.reference.processor, cache.folder.parent)
        scorer = Scorer(score, task.reference, task.numerics, cache, sequences, progress, images)
    else:
        n_chunks = len(plan.chunks)
        scorer = actors.Pool(task.config, task.reference, task.numerics, cache, task.prepared, n_chunks, progress)
    rank, world = process_pool.rank_and_world()
    try:
        scorer.check(sample_slots(plan, sequences, score.parity_sample))
        share = follow(scorer.run(plan, rank, world), plan, progress)
    finally:
        scorer.close()
    # Scorers merge their own; actors of Ray do not know when the last one is done.
    CacheWriter(cache, find_key(score.sign_with)).merge_statements()
    return share


# -- before a model is loaded ----------------------------------------------------------------------------------------


def _refuse_other_tokenizer(task: _Task, *, remember: bool) -> None:
    config, inputs, folder = task.config, task.prepared.manifest.inputs, task.reference.tokenizer
    # Compared by the files: other installed software changes no id that is already prepared.
    if inputs.tokenizer_id in (identity.tokenizer_id(folder), older_ids.older_tokenizer_id(folder)):
        return
    loads = inputs.fingerprint and inputs.fingerprint.loads
    if loads is None or loads != read_fingerprint(folder, Path(config.out), remember=remember).loads:
        raise IdentityError(
            f"{config.prepared} was tokenized with another tokenizer than that of {config.model}. "
            "Prepare again for this model (prefcache prepare CONFIG), or set model back."
        )


def _warn_about_sums(task: _Task, cache: Cache, plan: Plan, progress: Progress) -> None:
    counted = [CountedTokens(task.examples, name) for name in answer_names(task.examples)]
    if not task.config.score.logps and (n := sum(int(each.is_partial.sum()) for each in counted)):
        progress.warn(
            f"score.logps is false, and {n:,} answers have tokens that do not count (prepare.train_on). Training needs the "
            "log-probs of single tokens for these: leave score.logps at true, or set prepare.train_on to all."
        )
    if task.config.score.logps and plan.n_hits and (n := count_sums_only(cache, task.sequences, task.accepted)):
        progress.warn(
            f"{cache.place} keeps only the sums of {n:,} sequences (scored with score.logps=false, or imported), and they "
            "stay as they are. For every token's log-prob, score into another place (cache)."
        )


# -- cut answers -----------------------------------------------------------------------------------------------------


def _cut_answers(task: _Task, cache: Cache, plan: Plan) -> Iterator[pa.Table]:
    """Yield rows of missing answers that are the beginning of a scored one."""
    if plan.n_missing:
        yield from cut_answers.find_rows(task.examples, np.concatenate(plan.chunks), cache, task.accepted)


def _commit_cut_answers(task: _Task, cache: Cache) -> int:
    """Commit the rows of cut answers, and return their number.

    One scorer at a time: it reopens the cache under the claim, and so finds what the one before has committed.
    """
    if not cut_answers.has_cut_answers(task.examples):
        return 0
    with CacheWriter(cache).claim_work("cut-answers"):
        writer = CacheWriter(cache := cache.reopen(), find_key(task.config.score.sign_with))
        n_rows, known = 0, cache.numerics()
        for rows in _cut_answers(task, cache, task.plan(cache)):
            numerics_id = rows["numerics_id"][0].as_py()
            writer.commit(rows, known[numerics_id], numerics_id, None)
            n_rows += len(rows)
        writer.discard_damaged()
    return n_rows


# -- the manifest ----------------------------------------------------------------------------------------------------


def _commit_manifest(task: _Task, cache: Cache, inputs: dict[str, Any]) -> ScoredManifest:
    config, plan = task.config, task.plan(cache)
    refusals.refuse_unscored(cache, plan)
    manifest = ScoredManifest.make(
        inputs=inputs,
        reference={"name": config.model, "model_id": cache.reference.model_id},
        **describe_cache_place(cache.folder, config.scored),
        **({"allowed_signers": str(config.signers_file.absolute())} if config.signers_file else {}),
        accepted_numerics=task.accepted,
        numerics={name: record for name, record in cache.numerics().items() if name in task.accepted},
        parity=cache.worst_parity(task.accepted),
        shards=[record.file for record in cache.records],
        sequences=plan.n_sequences,
        failed=plan.n_failed,
    )
    manifest.commit(config.scored / artifact.MANIFEST)
    indexes = task.reference.folder.glob("*.safetensors.index.json")
    # A mirror is not an input: it may be deleted.
    reference = [] if find_mirror(cache.folder) else [cache.folder / REFERENCE_FILE]
    artifact.commit_make_inputs(config.scored, [*task.reference.weight_files, *indexes, *reference])
    return manifest


def _summarize(
    manifest: ScoredManifest, n_missing: int, share: Share, *, changed: bool, n_cut: int | None = None
) -> ScoreResult:
    return ScoreResult(
        cache=manifest.cache,
        sequences=manifest.sequences,
        cached_before=manifest.sequences - n_missing,
        scored=share.n_sequences,
        tokens=share.n_tokens,
        scored_by_others=n_missing - share.n_sequences,
        failed=manifest.failed,
        parity=manifest.parity,
        cut_from_longer=n_cut,
        changed=changed,
    )
