"""Whether a stored result is what its current inputs would give, and if not, why.

Each stage records what its output was made from. Here that is compared with the current inputs: `prepare`, `score` and
`train` ask whether there is anything to do, and `prefcache doctor --why` prints the answer. Each stage collects its own
inputs: preparing/prepared_inputs.py, scoring/scored_inputs.py, training/run_inputs.py.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.records import Manifest, NewerError, PreparedManifest, ScoredManifest
from prefcache.pipeline.stored.scoring_plan import Plan
from prefcache.pipeline.visible_text import count

_LONGEST_VALUE = 200
M = TypeVar("M", bound=Manifest)


@dataclass(frozen=True)
class Difference:
    """An input that has changed."""

    what: str  # `train.beta`, `data.0.pairs.jsonl.xxh3_128`
    stored: Any
    now: Any
    words: str | None = None  # instead of the values, where those say little

    def __str__(self) -> str:
        return self.words or f"{self.what} {_show(self.stored)} (now {_show(self.now)})"


@dataclass(frozen=True)
class Freshness:
    """Whether something stored is up to date, and if not, why."""

    what: str  # preparation, scoring, rows or run
    path: Path | str  # a cache in an object store has a URL
    is_stored: bool = True
    differences: tuple[Difference, ...] = ()
    damage: str | None = None  # why it must be made again although its inputs are the same

    @property
    def is_fresh(self) -> bool:
        return self.is_stored and not self.reasons

    @property
    def reasons(self) -> list[str]:
        return [*map(str, self.differences), *([self.damage] if self.damage else [])]

    def explain(self) -> str:
        """One sentence for a person."""
        if not self.is_stored:
            return f"{self.path} does not exist yet"
        return f"{self.path} is {'out of date: ' + '; '.join(self.reasons) if self.reasons else 'up to date'}"


def find_differences(
    stored: Mapping[str, Any], now: Mapping[str, Any], ignore: Collection[str] = ()
) -> tuple[Difference, ...]:
    """Compare inputs, key by key. A key that an earlier version did not write counts as null."""
    return tuple(
        difference
        for key in sorted((stored.keys() | now.keys()) - set(ignore))
        for difference in _compare(key, stored.get(key), now.get(key))
    )


def _compare(what: str, stored: Any, now: Any) -> Iterator[Difference]:
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in sorted(stored.keys() | now.keys()):
            yield from _compare(f"{what}.{key}", stored.get(key), now.get(key))
    elif isinstance(stored, list) and isinstance(now, list) and stored != now:
        by_name, other = _by_name(stored), _by_name(now)
        changed = [*_compare(what, by_name, other)]
        yield from changed or [Difference(what, stored, now)]  # in another order
    elif stored != now:
        yield Difference(what, stored, now)


def _by_name(items: list[Any]) -> dict[str, Any]:
    """Name the items of a list by their file, or by their place."""
    names = [item["file"] if isinstance(item, dict) and "file" in item else f"{i}" for i, item in enumerate(items)]
    return dict(zip(names, items, strict=True))


def _show(value: Any) -> str:
    if value is None:
        return "none"
    text = re.sub(r"\b([0-9a-f]{8})[0-9a-f]{8,}\b", r"\1", f"{value}")
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def check_preparation(folder: Path, inputs: Mapping[str, Any], ignore: Collection[str] = ()) -> Freshness:
    """Compare a preparation with what its inputs are now; hash its files where those are the same."""
    manifest = _find_manifest(PreparedManifest, "preparation", folder)
    if isinstance(manifest, Freshness):
        return manifest
    if differences := find_differences(manifest.inputs.facts(), inputs, ignore):
        return Freshness("preparation", folder, differences=differences)
    for entry in [*manifest.shards, *manifest.images, *manifest.image_files, manifest.quarantine]:
        if reason := artifact.damage(folder, entry):
            return Freshness("preparation", folder, damage=f"{entry.file} {reason}")
    return Freshness("preparation", folder)


def check_scoring(scored: Path, inputs: Mapping[str, Any], cache: Cache) -> Freshness:
    """Compare a finished scoring with what its inputs are now, and its shards with those of the cache."""
    manifest = _find_manifest(ScoredManifest, "scoring", scored)
    if isinstance(manifest, Freshness):
        return manifest
    differences, damage = find_differences(manifest.inputs.facts(), inputs), None
    if any(difference.what == "cache" for difference in differences):
        return Freshness("scoring", scored, differences=differences)  # what another cache holds says nothing about it
    files = {record.file for record in cache.records}
    accepted = {record.file for record in cache.records if record.numerics_id in manifest.accepted_numerics}
    if cache.damaged:
        damage = next(iter(cache.damaged.values())).rstrip(".")
    elif reasons := cache.explain_unsigned(manifest.shards):
        damage = f"{count(len(reasons), 'shard')} that it read cannot be used: {reasons[0]}"
    elif n_gone := len(set(manifest.shards) - files):
        damage = f"{n_gone:,} of the {len(manifest.shards):,} shards that it read are no longer in {cache.place} (gc merges shards and loses no row)"
    elif n_new := len(accepted - set(manifest.shards)):
        # A later shard may contradict an earlier one, so all are looked at again.
        damage = f"{count(n_new, 'shard')} came to {cache.place} since"
    return Freshness("scoring", scored, differences=differences, damage=damage)


def _find_manifest(kind: type[M], what: str, folder: Path) -> M | Freshness:
    """Read the manifest of a stage, or say why the stage has to run. A newer version's manifest is an error."""
    try:
        manifest = kind.find(folder)
    except NewerError:
        raise
    except IntegrityError as error:
        return Freshness(what, folder, damage=str(error))
    return Freshness(what, folder, is_stored=False) if manifest is None else manifest


def check_rows(cache: Cache, plan: Plan, numerics: Mapping[str, str]) -> Freshness:
    """Explain which sequences have no row in the cache, by the numerics of the rows that they have instead."""
    known = cache.numerics()
    differences = [
        Difference(
            f"numerics.{key}",
            known[other].get(key),
            numerics.get(key),
            f"{n:,} of {plan.n_sequences:,} sequences were scored with {key} {known[other].get(key, 'none')} "
            f"(now {numerics.get(key, 'none')})",
        )
        for other, n in sorted(plan.other_numerics.items())
        for key in sorted(known[other].keys() | numerics.keys())
        if known[other].get(key) != numerics.get(key)
    ]
    n_never = plan.n_missing - sum(plan.other_numerics.values())
    damage = f"{n_never:,} of {plan.n_sequences:,} sequences were never scored" if n_never > 0 else None
    return Freshness("rows", cache.place, bool(cache.records), tuple(differences), damage)
