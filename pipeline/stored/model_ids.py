"""The id of a reference, with the hashes of its weight files remembered next to the caches.

A cache made under an id of an earlier version stays in use: cache, scores and runs are then found by that id.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefcache.pipeline import identity, older_ids
from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.safetensors_files import Digests
from prefcache.pipeline.stored.memos import WeightsMemo
from prefcache.pipeline.stored.records import REFERENCE_FILE, ReferenceRecord


def identify(reference: identity.Reference, root: Path, *, remember: bool = True) -> dict[str, Any]:
    """Return the reference's id and what it was made from."""
    with _digests(root, remember) as digests:
        described = identity.model_identity(reference, digests)
        if any(root.glob(f"*-{described['model_id'][:12]}/{REFERENCE_FILE}")):
            return described
        return _find_older_id(reference, root, digests) or described


def identify_tower(reference: identity.Reference, root: Path, *, remember: bool = True) -> dict[str, Any]:
    """Return the id of the reference's vision tower and what it was made from."""
    with _digests(root, remember) as digests:
        return identity.tower_identity(reference, digests)


def is_same_model(model_id: str, reference: identity.Reference, root: Path, *, remember: bool = True) -> bool:
    """Whether this id, of this version or an earlier one, is the reference's."""
    with _digests(root, remember) as digests:
        if identity.model_identity(reference, digests)["model_id"] == model_id:
            return True
        older = older_ids.older_identity(reference, digests)
        return older is not None and older["model_id"] == model_id


@contextlib.contextmanager
def _digests(root: Path, remember: bool) -> Iterator[Digests]:
    """Recall the hashes of weight files; afterwards remember new ones."""
    memo = WeightsMemo.recall(WeightsMemo.path(root)) or WeightsMemo()
    digests = memo.digests()
    yield digests
    if remember and {*digests.tensors, *digests.files} != {*memo.tensors, *memo.files}:
        WeightsMemo.make_from(digests).remember(WeightsMemo.path(root))


def _find_older_id(reference: identity.Reference, root: Path, digests: Digests) -> dict[str, Any] | None:
    """The earlier version's id, if a cache was made under it. Whole files are hashed only if one may have been."""
    for file in sorted(root.glob(f"*/{REFERENCE_FILE}")):
        with contextlib.suppress(IntegrityError):
            cached = ReferenceRecord.read(file).facts()
            hashes = cached.get("weights")
            facts = older_ids.older_facts(reference)
            has_same_files = isinstance(hashes, dict) and hashes.keys() == facts["weights"].keys()
            if has_same_files and cached.get("config") == facts["config"]:
                older = older_ids.older_identity(reference, digests)
                if older is not None and older["model_id"] == cached.get("model_id"):
                    return older
    return None
