"""fetch: take rows that somebody else has published into the cache, after a sample was computed again here."""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from prefcache.command_results import FetchPlan, FetchResult
from prefcache.hub import THREADS, HubDataset
from prefcache.pipeline import identity
from prefcache.pipeline.cache_place import is_url
from prefcache.pipeline.config import Config
from prefcache.pipeline.daemon_threads import map_parallel
from prefcache.pipeline.errors import IdentityError, IntegrityError, PrefcacheError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.preparing import prepared_inputs
from prefcache.pipeline.progress import Progress, counting
from prefcache.pipeline.schema import CACHE, KEY
from prefcache.pipeline.scoring.engines import find_engine
from prefcache.pipeline.scoring.sample_check import Sample, compare_with_plain_forward
from prefcache.pipeline.stored import artifact, cache_maintenance, shards
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import CacheWriter, create_cache
from prefcache.pipeline.stored.key_index import KeyIndex, Keys, read_keys
from prefcache.pipeline.stored.mirror import find_mirror, open_root, show_place
from prefcache.pipeline.stored.model_ids import identify, is_same_model
from prefcache.pipeline.stored.prepared import Prepared, Sequences, sequence_table
from prefcache.pipeline.stored.records import (
    REFERENCE_FILE,
    SHARD_RECORD_FILE,
    STATEMENT_FILE,
    ReferenceRecord,
    ShardRecord,
)
from prefcache.pipeline.stored.signatures import Signatures, require_key
from prefcache.pipeline.visible_text import count

_MOST_BYTES = 64 << 20  # of a file that is not a shard
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def run(
    config: Config,
    place: str,
    progress: Progress,
    *,
    revision: str | None = None,
    allowed_signers: Path | None = None,
    dry_run: bool = False,
) -> FetchResult | FetchPlan:
    """Find the rows that the data need and the cache lacks, check them, and only then commit them."""
    prepared = Prepared(config.prepared)
    prepared.refuse_older()
    prepared_inputs.warn_if_stale(config, progress)
    reference, root = identity.find_reference(config), open_root(config.cache)
    described = identify(reference, root, remember=not dry_run)
    cache = Cache.preview(root, config.model, described, config.signers_file)
    key = None if dry_run else require_key(config.score.sign_with, config.signers_file)
    allowed_signers = allowed_signers or config.signers_file
    wanted = _Wanted.find(prepared, cache)
    # A dry run changes nothing, not even for a moment.
    folder = tempfile.TemporaryDirectory() if dry_run else artifact.scratch_folder(Path(config.out) / "fetched")
    with folder as scratch:
        source = _open_source(place, revision, Path(scratch), described["model_id"])
        with _naming(source):
            published = ReferenceRecord.read(source.folder / REFERENCE_FILE)
            if not is_same_model(published.model_id, reference, root, remember=not dry_run):
                raise IdentityError(
                    f"{source.place} holds log-probs of {published.name}@{published.model_id[:8]}; this config names "
                    f"{config.model}@{described['model_id'][:8]}. Name a source of this model, or set model to that one."
                )
            signed = None if allowed_signers is None else Signatures.read(source.folder, published, allowed_signers)
            needed = _find_needed(source, wanted, signed)
            plan = _describe(source, cache, wanted, needed, signed, dry_run)
            progress.say(
                f"fetch: {plan.rows:,} of {count(plan.needed, 'row')}, {count(plan.shards, 'shard')} of {plan.bytes:,} bytes"
            )
            if dry_run or not needed:
                return plan if dry_run else FetchResult(plan=plan, compared=0, deviation=None, use=None)
            CacheWriter(cache).refuse_read_only()
            source.fetch([each.record for each in needed])
            _refuse_bad_shards(source, published, needed, signed)
            needed = list(_drop_failures(source.folder, needed))
            plan = _describe(source, cache, wanted, needed, signed, dry_run)
            samples = _draw_samples(source.folder, needed, wanted, config.score.parity_sample)
            means = _compare(config, reference, prepared, source, samples, progress)
        opened = create_cache(root, config.model, described, config.signers_file)
        _commit(source.folder, needed, CacheWriter(opened, key), progress)
    return FetchResult(
        plan=plan,
        compared=sum(len(mean) for mean in means),
        deviation=max((float(mean.max()) for mean in means), default=None),
        use=_name_settings(config, reference, list(plan.numerics)),
    )


@contextlib.contextmanager
def _naming(source: "_Source") -> Iterator[None]:
    """Say in every refusal which source it is, and that nothing of it was taken."""
    try:
        yield
    except IntegrityError as error:
        reason = str(error).replace(str(source.folder), source.place).rstrip(". ")
        raise type(error)(f"{reason}. Nothing was taken from {source.place}.") from error


# -- sources ---------------------------------------------------------------------------------------------------------


class _Source(Protocol):
    """A published cache: in a folder of ours are reference.json, records and statements, and shards once they are fetched."""

    place: str
    folder: Path

    def read_keys(self, records: Sequence[ShardRecord]) -> Iterator[Keys]:
        """Yield the keys of each shard."""
        ...

    def fetch(self, records: Sequence[ShardRecord]) -> None:
        """Have these shards in the folder as a whole."""
        ...


def _open_source(place: str, revision: str | None, scratch: Path, model_id: str) -> _Source:
    if is_url(place) or Path(place).is_dir():
        if revision is not None:
            raise UsageError(f"--revision is for a data set on the hub, and {place} is none. Leave it out.")
        return _FolderSource(_find_reference_folder(place, model_id), scratch)
    if not _HUB_NAME.fullmatch(place):
        raise UsageError(
            f"{place} is neither a folder, nor the name of a data set on the hub (org/name), nor a URL (s3://bucket/refs/...)."
        )
    return _HubSource(place, revision, scratch)


def _find_reference_folder(place: str, model_id: str) -> Path:
    """The folder of a reference's cache: the place itself, or the one in it that is of this model, or the only one."""
    folders = [each for each in cache_maintenance.find_caches([place]) if (each / REFERENCE_FILE).is_file()]
    for folder in folders:
        with contextlib.suppress(IntegrityError):
            if ReferenceRecord.read(folder / REFERENCE_FILE).model_id == model_id:
                return folder
    if len(folders) != 1:
        raise IdentityError(f"{place} has no cache of this model (@{model_id[:8]}), but {len(folders)} of others.")
    return folders[0]


class _FolderSource:
    """The folder of a reference's cache, here or in an object store. It may change, so what is checked is a copy."""

    def __init__(self, origin: Path, scratch: Path) -> None:
        self._origin, self.folder, self.place = origin, scratch, show_place(origin)
        if (mirror := find_mirror(origin)) is not None:
            mirror.refresh(origin)
        for name in sorted(path.name for path in origin.iterdir() if path.is_file()):
            if name == REFERENCE_FILE or _is_small(name):
                self._copy(name)

    def read_keys(self, records: Sequence[ShardRecord]) -> Iterator[Keys]:
        if (mirror := find_mirror(self._origin)) is not None:
            mirror.prefetch(self._origin, records)
        for record in records:
            try:
                rows = shards.read_rows(self._origin, record, ["key"])
            except FileNotFoundError:
                raise IntegrityError(f"{record.file} of {self.place} is missing") from None
            yield _keys_of(rows, record, self.place)

    def fetch(self, records: Sequence[ShardRecord]) -> None:
        if (mirror := find_mirror(self._origin)) is not None:
            for reason in mirror.fetch(self._origin, records).values():
                raise IntegrityError(f"A shard of {self.place} {reason}.")
        for record in records:
            self._copy(record.file)

    def _copy(self, name: str) -> None:
        if not artifact.is_inside(self._origin, name):
            raise IntegrityError(f"{name} of {self.place} is a link that leads out of it.")
        try:
            shutil.copyfile(self._origin / name, self.folder / name)
        except FileNotFoundError:
            raise IntegrityError(f"{name} of {self.place} is missing") from None


class _HubSource:
    """A data set on the hub. Of a shard, its keys are read first, and the rest only if a key is needed."""

    def __init__(self, name: str, revision: str | None, scratch: Path) -> None:
        self._files, self.folder = HubDataset(name, revision), scratch
        self.place = f"{name}@{self._files.commit[:8]}"
        names = [file for file in self._files.sizes if file == REFERENCE_FILE or _is_small(file)]
        if REFERENCE_FILE not in names:
            raise UsageError(f"{name} is not a published cache: there is no {REFERENCE_FILE} in it.")
        if large := [file for file in names if self._files.sizes[file] > _MOST_BYTES]:
            raise IntegrityError(f"{large[0]} of {self.place} is larger than any record. Nothing was taken from it.")
        self._files.download(names, scratch)

    def read_keys(self, records: Sequence[ShardRecord]) -> Iterator[Keys]:
        return map_parallel(self._read_keys, records, THREADS)

    def _read_keys(self, record: ShardRecord) -> Keys:
        if self._files.sizes.get(record.file) != record.bytes:
            raise IntegrityError(f"{record.file} of {self.place} is missing, or has another length than was written")
        return _keys_of(self._files.read_column(record.file, "key", record.rows), record, self.place)

    def fetch(self, records: Sequence[ShardRecord]) -> None:
        self._files.download([record.file for record in records], self.folder)


def _is_small(name: str) -> bool:
    return bool(SHARD_RECORD_FILE.fullmatch(name) or STATEMENT_FILE.fullmatch(name.removesuffix(".sig")))


def _keys_of(table: pa.Table, record: ShardRecord, place: str) -> Keys:
    if table.schema.names != ["key"] or table.schema.field("key").type != KEY or len(table) != record.rows:
        raise IntegrityError(f"{record.file} of {place} has other keys than its record says.")
    return read_keys([table["key"]])


# -- which rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """The sequences without a value in the cache, by rank."""

    index: KeyIndex
    slot: np.ndarray
    n_prompt: np.ndarray
    n_completion: np.ndarray
    sequences: Sequences

    @classmethod
    def find(cls, prepared: Prepared, cache: Cache) -> "_Wanted":
        examples = prepared.table()
        table = sequence_table(examples)
        every = KeyIndex(read_keys([table["key"]]))
        has_value = cache.find_rows(every, list(cache.numerics()))[1]
        table = table.filter(pa.array(~has_value[every.rank]))
        index = KeyIndex(read_keys([table["key"]]))
        slot, n, n_completion = (np.zeros(len(index), np.int64) for _ in range(3))
        for values, name in ((slot, "slot"), (n, "n"), (n_completion, "n_completion")):
            values[index.rank] = table[name].to_numpy()
        return cls(index, slot, n - n_completion, n_completion, Sequences(examples))


@dataclass
class _Needed:
    """The rows of one shard that are wanted: their places in it, and their ranks."""

    record: ShardRecord
    places: np.ndarray
    ranks: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def _find_needed(source: _Source, wanted: _Wanted, signed: Signatures | None) -> list[_Needed]:
    """Find the shards with wanted rows; of rows under several numerics, those under which most are there."""
    found: dict[str, list[_Needed]] = {}
    paths = shards.list_records(source.folder) if len(wanted.index) else []
    records = [ShardRecord.read(path) for path in paths]
    if signed is not None:
        records = _keep_signed(records, source, signed)
    with counting(f"read keys of {source.place}", len(records), "shards") as counter:
        for record, keys in zip(records, source.read_keys(records), strict=True):
            places, ranks = wanted.index.find(keys)
            if len(places):
                found.setdefault(record.numerics_id, []).append(_Needed(record, places, ranks))
            counter.add(1)
    is_taken = np.zeros(len(wanted.index), bool)
    needed = []
    for numerics_id in sorted(found, key=lambda each: -sum(len(shard.places) for shard in found[each])):
        for shard in found[numerics_id]:
            is_new = ~is_taken[shard.ranks]
            is_taken[shard.ranks] = True
            if is_new.any():
                needed.append(_Needed(shard.record, shard.places[is_new], shard.ranks[is_new]))
    return needed


def _keep_signed(records: list[ShardRecord], source: _Source, signed: Signatures) -> list[ShardRecord]:
    """The records that an allowed signer vouches for; nothing of another shard is read.

    IntegrityError if there is none, or if one was replaced after it was signed.
    """
    kept = [record for record in records if record.name in signed.signed]
    if replaced := next((record for record in kept if not signed.covers(record)), None):
        raise IntegrityError(f"{replaced.name} of {source.place} is not what was signed: it has been replaced")
    if records and not kept:
        reasons = "".join(f" {reason}." for reason in list(signed.refused.values())[:1])
        raise IntegrityError(
            f"{records[0].file} of {source.place} is not signed by anybody in {signed.allowed_signers}.{reasons}"
        )
    return kept


def _describe(
    source: _Source, cache: Cache, wanted: _Wanted, needed: list[_Needed], signed: Signatures | None, dry_run: bool
) -> FetchPlan:
    numerics: dict[str, int] = {}
    for each in needed:
        numerics[each.record.numerics_id] = numerics.get(each.record.numerics_id, 0) + len(each.places)
    return FetchPlan(
        dry_run=dry_run,
        source=source.place,
        cache=cache.place,
        needed=len(wanted.index),
        rows=sum(numerics.values()),
        shards=len(needed),
        bytes=sum(each.record.bytes for each in needed),
        numerics=numerics,
        signers=None if signed is None else sorted(set(signed.signers.values())),
    )


# -- trust -----------------------------------------------------------------------------------------------------------


def _refuse_bad_shards(
    source: _Source, published: ReferenceRecord, needed: list[_Needed], signed: Signatures | None
) -> None:
    """IntegrityError unless every shard is as it was written, as a scorer writes it and, if demanded, as it was signed."""
    names = {each.record.name for each in needed}
    for path in shards.list_records(source.folder):
        if path.name not in names:
            path.unlink()  # its shard was not fetched
    for each in needed:
        if reason := artifact.damage(source.folder, each.record):
            raise IntegrityError(f"{each.record.file} of {source.place} {reason}.")
        if signed is not None and (reason := signed.why_refused(each.record)):
            raise IntegrityError(f"{reason}.")
    opened = Cache(source.folder, published.model_id, remember="nothing")
    opened.records = [record for record in opened.records if record.name in names]
    cache_maintenance.refuse_impossible(opened)


def _drop_failures(folder: Path, needed: list[_Needed]) -> Iterator[_Needed]:
    """Leave out rows that say that a sequence could not be scored, so that they count as missing."""
    for each in needed:
        has_value = ~np.isnan(shards.read_values(folder, each.record)[1][each.places])
        if has_value.any():
            yield _Needed(each.record, each.places[has_value], each.ranks[has_value])


def _read_needed(folder: Path, each: _Needed) -> tuple[pa.Table, np.ndarray]:
    """The wanted rows of a shard, in order of their places, and their ranks."""
    order = np.argsort(each.places)
    rows = shards.read_rows(folder, each.record).cast(CACHE).take(pa.array(each.places[order]))
    return rows, each.ranks[order]


def _draw_samples(folder: Path, needed: list[_Needed], wanted: _Wanted, n: int) -> list[Sample]:
    """Draw up to `n` rows of each numerics by lot, so that nobody can know which rows have to be right."""
    lots = np.random.default_rng()
    drawn: dict[str, list[tuple[float, str, int, pa.Table]]] = {}
    for each in needed:
        rows, ranks = _read_needed(folder, each)
        for name, lengths in (("n_prompt", wanted.n_prompt), ("n_completion", wanted.n_completion)):
            if (rows[name].to_numpy() != lengths[ranks]).any():
                raise IntegrityError(f"{each.record.file} has a row whose {name} is not that of its sequence.")
        dtype = identity.coarsest_dtype(each.record.numerics)
        lot = lots.random(len(rows))
        chosen = [(float(lot[i]), dtype, int(ranks[i]), rows.slice(i, 1)) for i in np.argsort(lot)[:n]]
        so_far = drawn.setdefault(each.record.numerics_id, [])
        so_far[:] = sorted([*so_far, *chosen], key=lambda each: each[0])[:n]
    return [_as_sample(chosen, wanted) for chosen in drawn.values() if chosen]


def _as_sample(chosen: list[tuple[float, str, int, pa.Table]], wanted: _Wanted) -> Sample:
    rows = pa.concat_tables([row for *_, row in chosen])
    return Sample(
        dtype=chosen[0][1],
        sequences=[wanted.sequences[int(wanted.slot[rank])] for _, _, rank, _ in chosen],
        sums=rows["logp_sum"].to_pylist(),
        token_logps=[None if each is None else np.array(each, np.float32) for each in rows["logps"].to_pylist()],
    )


def _compare(
    config: Config,
    reference: Reference,
    prepared: Prepared,
    source: _Source,
    samples: list[Sample],
    progress: Progress,
) -> list[np.ndarray]:
    if not samples:
        if not config.score.parity_sample:
            progress.warn("score.parity_sample is 0: nothing of what was fetched is compared with the model")
        return []
    n = sum(len(sample.sequences) for sample in samples)
    progress.say(f"fetch: computing {n} sequences plainly with {reference.folder}, to compare")
    means = compare_with_plain_forward(
        samples,
        reference,
        prepared.prompt_images(reference.processor),
        origin=f"{source.place} has",
        model=config.model,
        remedy="The source is wrong, or of another model or length.",
    )
    worst = max(float(mean.max()) for mean in means)
    progress.say(f"fetch: within {worst:.1e} nats per token of the plain float32 forward ({n} sequences)")
    return means


# -- into the cache --------------------------------------------------------------------------------------------------


def _commit(folder: Path, needed: list[_Needed], writer: CacheWriter, progress: Progress) -> None:
    """Commit the rows of each shard as a shard, with the numerics and the deviation that were measured where they were computed."""
    with progress.count("fetch", sum(len(each.places) for each in needed), "rows") as counter:
        for each in needed:
            rows, _ = _read_needed(folder, each)
            record = each.record
            if not writer.has_chunk(rows["key"].to_pylist(), record.numerics_id):
                writer.commit(rows, record.numerics, record.numerics_id, record.parity)
            counter.add(len(each.places))
    writer.merge_statements()


def _name_settings(config: Config, reference: Reference, numerics: list[str]) -> str | None:
    """The setting with which `score` uses rows of these numerics; None if it uses them anyway."""
    own = ""
    # An engine may not be installed here, or not answer: it may be used later.
    with contextlib.suppress(PrefcacheError):
        own = identity.numerics_id(find_engine(config.score.engine).numerics(reference, config.score))
    others = [each for each in numerics if each not in (own, *config.score.accept_numerics)]
    return f"--set score.accept_numerics=[{','.join([*config.score.accept_numerics, *others])}]" if others else None
