"""What a scoring is made from: prepared data, reference, cache, settings and the versions of the engine."""

from typing import Any

from prefcache.pipeline import identity
from prefcache.pipeline.cache_place import spell_uniformly
from prefcache.pipeline.config import Config
from prefcache.pipeline.scoring.engines import find_engine
from prefcache.pipeline.stored.prepared import Prepared

# Settings that change only how fast it is, or who vouches for it.
_SPEED = {"tokens_per_batch", "tokens_per_shard", "parity_sample", "rescore", "rows", "ray", "sign_with"}


def find_inputs(config: Config, prepared: Prepared, reference: identity.Reference, model_id: str) -> dict[str, Any]:
    return {
        "prepared": prepared.id,
        "model_id": model_id,
        "cache": spell_uniformly(config.cache),
        **({"allowed_signers": config.allowed_signers} if config.allowed_signers else {}),
        "config": config.score.model_dump(mode="json", exclude=_SPEED),
        "versions": find_engine(config.score.engine).versions(reference, config.score),
    }
