"""What is refused or warned of before a reference is loaded, and after its scoring."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from prefcache.pipeline import identity, model_config, model_files
from prefcache.pipeline.config import Score
from prefcache.pipeline.errors import IdentityError, IntegrityError, UsageError
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import CacheWriter
from prefcache.pipeline.stored.prepared import Sequences, answer_names
from prefcache.pipeline.stored.scoring_plan import Plan
from prefcache.pipeline.stored.signatures import require_key
from prefcache.pipeline.visible_text import count


def warn_about_damage(cache: Cache, progress: Progress) -> None:
    cache.refuse_malformed()
    for reason in cache.damaged.values():
        progress.warn(f"{reason.rstrip('.')}. Its sequences are scored again.")


def refuse_mixed_numerics(cache: Cache, plan: Plan, numerics: dict[str, str], score: Score) -> None:
    """Refuse to score sequences that other numerics have scored, unless the user accepts those or rescores."""
    if not plan.other_numerics or score.rescore:
        return
    known = cache.numerics()
    others = "; ".join(
        f"{n} under {other} ({identity.differences(numerics, known[other])})"
        for other, n in sorted(plan.other_numerics.items())
    )
    raise IdentityError(
        f"{cache.place} has {others}, of {plan.n_missing} sequences that this engine has not scored. Use those rows "
        f"(--set score.accept_numerics=[{','.join(sorted(plan.other_numerics))}]), or compute them again "
        "(--set score.rescore=true)."
    )


def warn_about_unsigned(cache: Cache, progress: Progress) -> None:
    for reason in list(cache.unsigned.values())[:1]:
        progress.warn(f"{count(len(cache.unsigned), 'shard')} of {cache.place} not used, because {reason}")


def refuse_unsigned(cache: Cache, plan: Plan, sequences: Sequences, numerics_id: str, score: Score) -> None:
    """Refuse to score what would not be used afterwards: unsigned, or in the place of an unsigned shard, whose record was first."""
    require_key(score.sign_with, cache.allowed_signers)
    if not cache.unsigned:
        return
    writer = CacheWriter(cache)
    found = [writer.find_unsigned([sequences[slot].key() for slot in slots], numerics_id) for slots in plan.chunks]
    if in_the_way := [reason for reason in found if reason]:
        raise IntegrityError(
            f"{count(len(in_the_way), 'shard')} of {cache.place} that cannot be used stand where this would write: {in_the_way[0]}. "
            f"Have them signed by somebody whom you trust (prefcache sign {cache.place} --key KEY), or remove their .json files."
        )


def refuse_unfit(model: Path, sequences: pa.Table, examples: pa.Table) -> None:
    """Refuse sequences that are too long for the model in this folder, and ids outside its vocabulary."""
    longest, limit = pc.max(sequences["n"]).as_py(), model_files.longest_sequence(model)
    if longest > limit:
        raise UsageError(
            f"The longest sequence has {longest} tokens; {model} takes {limit}. Set prepare.max_length={limit}; in TRL, "
            f"DPOConfig(max_length={limit}); or cut the ids."
        )
    vocabulary = model_config.read(model).text_model.vocab_size
    largest = max(
        int(part.flatten().to_numpy().max())
        for name in ("prompt_ids", *(f"{answer}_ids" for answer in answer_names(examples)))
        for part in examples[name].chunks
        if len(part.flatten())
    )
    if vocabulary and largest >= vocabulary:
        raise IdentityError(
            f"Token id {largest} is not in the vocabulary of {model} ({vocabulary}). Its tokenizer is another model's."
        )


def refuse_unscored(cache: Cache, plan: Plan) -> None:
    """Refuse to vouch for a scoring that left sequences out."""
    if plan.n_missing:
        raise IntegrityError(
            f"{plan.n_missing} sequences are still missing in {cache.place}. Run the same command again."
        )
