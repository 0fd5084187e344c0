"""A finished scoring: the manifest in scored/, and the cache that it names, wherever that is now."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from prefcache.pipeline import identity, stored_paths
from prefcache.pipeline.cache_place import is_url, spell_uniformly
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import IdentityError, IntegrityError, UsageError
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.mirror import find_mirror, open_root, show_place
from prefcache.pipeline.stored.model_ids import identify, is_same_model
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import REFERENCE_FILE, MalformedError, ReferenceRecord, ScoredManifest
from prefcache.pipeline.stored.verified_shards import Remember
from prefcache.pipeline.visible_text import count


class CacheMissing(IntegrityError):
    """The cache that a manifest names is nowhere."""


class UnsignedError(IntegrityError):
    """Shards that a finished scoring used are not signed by those who may."""


def open_scored(
    scored: Path,
    *,
    every_byte: bool = True,
    remember: Remember = "nothing",
    allowed_signers: Path | None = None,
) -> tuple[ScoredManifest, Cache] | None:
    """Open the cache that a finished scoring vouches for, and change nothing; None where nothing has been scored.

    `every_byte` is for readers that let something other than Cache read the shards. `allowed_signers` is what the config
    demands now; if nothing, what it demanded when it was scored still holds.
    """
    if (manifest := ScoredManifest.find(scored)) is None:
        return None
    folder = find_scored_cache(scored, manifest)
    if allowed_signers is None and manifest.allowed_signers is not None:
        allowed_signers = Path(manifest.allowed_signers)
    cache = Cache(
        folder,
        manifest.reference.model_id,
        every_byte=every_byte,
        remember=remember,
        allowed_signers=allowed_signers,
    )
    cache.refuse_damage()
    _refuse_unsigned(manifest, cache)
    return manifest, cache


def _refuse_unsigned(manifest: ScoredManifest, cache: Cache) -> None:
    """IntegrityError if a shard that was used when this was scored is not signed as it has to be."""
    if reasons := cache.explain_unsigned(manifest.shards):
        raise UnsignedError(
            f"{count(len(reasons), 'shard')} of {cache.place} cannot be used, because allowed_signers demands a signature: {reasons[0]}. "
            f"Have them signed (prefcache sign {cache.place} --key KEY), or score again (prefcache score CONFIG)."
        )


def require_scored(config: Config, prepared: Prepared, *, every_byte: bool) -> tuple[ScoredManifest, Cache]:
    """Open the scoring of these examples by the config's model; raise if there is none."""
    scored = open_scored(config.scored, every_byte=every_byte, allowed_signers=config.signers_file)
    if scored is None:
        raise UsageError(
            f"{config.prepared} has not been scored: there is no {config.scored}. Score first (prefcache score CONFIG)."
        )
    if scored[0].inputs.prepared != prepared.id:
        raise IdentityError(
            f"{config.scored} belongs to other data than {config.prepared} holds now. Score it (prefcache score CONFIG)."
        )
    refuse_other_reference(config, scored[0])
    refuse_other_cache(config, *scored)
    return scored


@contextlib.contextmanager
def retract_if_damaged(scored: Path) -> Iterator[None]:
    """Delete the manifest where its cache turns out to be damaged, so that make sees that there is work.

    For stages that write; a command that only reads leaves it.
    """
    try:
        yield
    except (MalformedError, CacheMissing, UnsignedError):
        raise  # a newer version's, planted, or on a disk that is not mounted: not ours to remove
    except IntegrityError:
        artifact.retract_manifest(scored)
        raise


def describe_cache_place(cache: Path, scored: Path) -> dict[str, str]:
    """What the manifest in `scored` says about where its cache is: the path as the command named it, a relative and an
    absolute one, so that it is found from any working directory and when the experiment moves with or without it."""
    if find_mirror(cache) is not None:
        return {"cache": show_place(cache)}
    absolute = cache.resolve()
    relative = os.path.relpath(absolute, scored.resolve())
    return {"cache": str(cache), "cache_relative": relative, "cache_absolute": str(absolute)}


def find_scored_cache(scored: Path, manifest: ScoredManifest) -> Path:
    """Find the folder of the cache that a manifest names; of a URL, the one in its mirror."""
    if is_url(manifest.cache):
        return _find_in_store(manifest)
    # Manifests of earlier versions have `cache` alone, relative to where score was run.
    stored = [
        *([scored / manifest.cache_relative] if manifest.cache_relative else []),
        *([Path(manifest.cache_absolute)] if manifest.cache_absolute else []),
    ]
    for place in [*stored, *stored_paths.candidate_places(manifest.cache, scored)]:
        try:
            is_it = ReferenceRecord.read(place / REFERENCE_FILE).model_id == manifest.reference.model_id
        except IntegrityError:
            is_it = (place / REFERENCE_FILE).exists()  # damaged, so it does not say whose it is
        if is_it:
            shown = Path(manifest.cache)
            return shown if shown.exists() and shown.samefile(place) else place.resolve()
    tried = ", ".join(dict.fromkeys(os.path.normpath(place) for place in [*stored, Path(manifest.cache)]))
    raise CacheMissing(
        f"The cache that {scored} was made with is gone: it is not at {tried}. Put it back, or score again "
        "(prefcache score CONFIG)."
    )


def _find_in_store(manifest: ScoredManifest) -> Path:
    root, _, name = manifest.cache.rpartition("/")
    folder = open_root(root) / name
    if not stored_paths.is_bare(name) or not (folder / REFERENCE_FILE).is_file():
        raise CacheMissing(
            f"The cache {manifest.cache} is gone: there is no {REFERENCE_FILE} in it. Put it back, or score again (prefcache score CONFIG)."
        )
    return folder


def refuse_other_cache(config: Config, scored: ScoredManifest, cache: Cache) -> None:
    """IdentityError if the config has been changed to name another cache than the one that was scored into.

    An experiment that was moved, or is used from another folder, names the same one by the same words.
    """
    if scored.inputs.cache in (None, config.cache, spell_uniformly(config.cache)):
        return
    if config.cache_folder.resolve() != cache.folder.parent.resolve():
        raise IdentityError(
            f"{config.scored} was scored into {scored.inputs.cache}; this run names {config.cache} as its cache. Score into that "
            "(prefcache score CONFIG), which computes only what it lacks, or set cache back."
        )


def refuse_other_reference(config: Config, scored: ScoredManifest, *, remember: bool = False) -> None:
    """IdentityError if the config now names other weights than those that scored, under whatever name."""
    reference, model, root = scored.reference, identity.find_reference(config), config.cache_folder
    if not is_same_model(reference.model_id, model, root, remember=remember):
        model_id = identify(model, root, remember=remember)["model_id"]
        raise IdentityError(
            f"{config.scored} was scored by {reference.name}@{reference.model_id[:8]}; this run names "
            f"{config.model}@{model_id[:8]}. Score with it (prefcache score CONFIG), or set model back."
        )
