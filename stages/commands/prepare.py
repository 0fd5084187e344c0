"""prepare: preference data in, exact token ids out, nothing lost on the way.

sources -> chunks of records -> parts, by all workers and ranks -> shards and manifest, by whoever finishes last
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefcache.command_results import PrepareResult, PrepareWaiting
from prefcache.pipeline import gguf_files, identity, process_pool
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import DataError, IntegrityError, UsageError
from prefcache.pipeline.preparing import finalize, part_worker, prepared_inputs
from prefcache.pipeline.preparing.fast_tokenizer import break_even, fastokens_version, find_untested
from prefcache.pipeline.preparing.resolved_config import ResolvedConfig, resolve_config
from prefcache.pipeline.preparing.sources import Chunk, DataSource, open_source
from prefcache.pipeline.preparing.tokenizer_facts import load_backend
from prefcache.pipeline.preparing.tokenizer_fingerprint import read_fingerprint
from prefcache.pipeline.progress import Progress, working
from prefcache.pipeline.schema import HELD_OUT, TRAIN
from prefcache.pipeline.stored import artifact, claims, prepared
from prefcache.pipeline.stored.freshness import check_preparation
from prefcache.pipeline.stored.gguf_conversion import convert_models
from prefcache.pipeline.stored.records import PartRecord, PreparedInputs, PreparedManifest

REFUSED_FILE = "quarantine-refused.parquet"
_LATE_IMAGES = "late-images.txt"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# The names of our shards; any other file in the folder is kept.
_SHARD = r"[a-z][a-z0-9_-]*-[0-9a-f]{8}-\d{5,}\.arrow"
# Data that makes a worker worth its start, and the size of a tokenizer, as JSON, that takes as long to load as Python to start.
_WORKER_BYTES, _WORKER_TOKENIZER = 4 << 20, 2 << 20
# Settings that apply after the parts are finished, so that parts stay valid when they change.
_NOT_IN_PARTS = {
    "data",
    "max_quarantine",
    "rows_per_shard",
    "duplicates",
    "kl_pairs",
    "kl_batch_size",
    "seed",
}


def run(config: Config, progress: Progress) -> PrepareResult | PrepareWaiting:
    convert_models(config, progress)
    model = identity.find_reference(config, weights=False).tokenizer
    Path(config.out).mkdir(parents=True, exist_ok=True)
    with claims.claim_stage(Path(config.out), "prepare", "name another place (out)", process_pool.job()):
        return _prepare(config, model, progress)


def _prepare(config: Config, model: Path, progress: Progress) -> PrepareResult | PrepareWaiting:
    sources = [open_source(entry, Path(config.out)) for entry in config.prepare.sources]
    _refuse_own_files(config, sources)
    inputs = prepared_inputs.find_inputs(config.prepare, model, sources)
    freshness = prepared_inputs.check_freshness(config, model, inputs)
    if freshness.is_fresh:
        progress.say(f"prepare: nothing to do, {config.prepared} is what this data and config give")
        artifact.touch_manifest(config.prepared)
        return _summarize(config, changed=False)
    if freshness.is_stored:
        progress.say(f"prepare: {freshness.explain()}")
    _refuse_in_use(config)
    share = _prepare_all_parts(config, model, sources, inputs, progress)
    try:
        parts = _find_finished(share)
        if parts is not None:
            _refuse_in_use(config)
            _refuse_bad_data(parts, config)
            _finalize(parts, share, config, progress)
            tokenizer = [path for name in _TOKENIZER_FILES if (path := model / name).exists()]
            gguf = [config.model] if gguf_files.is_gguf(config.model) else []
            artifact.commit_make_inputs(
                config.prepared, [*gguf, *tokenizer, *(file for each in sources for file in each.files)]
            )
    except FileNotFoundError:
        parts = None  # another rank has finalized meanwhile
    if parts is None and not check_preparation(config.prepared, share.inputs.facts()).is_fresh:
        n_parts = len(share.part_sources)
        n_finished = sum(part_worker.read_record(share.folder, number) is not None for number in range(n_parts))
        return PrepareWaiting(prepared=config.prepared, parts=n_parts, finished=n_finished)
    return _summarize(config, changed=True)


# -- refusals --------------------------------------------------------------------------------------------------------


def _refuse_own_files(config: Config, sources: list[DataSource]) -> None:
    """Refuse data in the folder that this preparation replaces, such as its own quarantine."""
    for file in (file for source in sources for file in source.files):
        if file.resolve().is_relative_to(config.prepared.resolve()):
            raise UsageError(
                f"{file} lies in {config.prepared}, whose files prepare replaces. Copy it elsewhere, or name another place (out)."
            )


def _refuse_in_use(config: Config) -> None:
    """Refuse to replace data that a stage is reading: its output would belong to data that no longer exists.

    On a disk shared by machines, its memory-mapped files would vanish, too.
    """
    if not (config.prepared / artifact.MANIFEST).exists():
        return
    for stage in ("score", "train", "upload"):
        for path, holder in claims.find_holders(Path(config.out), stage):
            raise UsageError(
                f"{config.prepared} is being read by {stage} ({holder or path.name}), and this data or config gives other "
                "examples. Wait for it, stop it, or name another place (out)."
            )


def _refuse_bad_data(parts: finalize.Parts, config: Config) -> None:
    quarantined = parts.sum_counts("quarantined")
    n_bad, n_good = sum(quarantined.values()), parts.n_rows
    if n_good and n_bad <= config.prepare.max_quarantine * (n_bad + n_good):
        return
    if not n_bad:
        names = ", ".join(entry.path or str(entry.hub) for entry in config.prepare.sources)
        raise DataError(f"{names}: no records, only blank lines.")
    # The quarantine of a finished preparation belongs to its manifest, and stays.
    is_prepared = (config.prepared / artifact.MANIFEST).exists()
    path = config.prepared / (REFUSED_FILE if is_prepared else prepared.QUARANTINE_FILE)
    finalize.commit_quarantine(path, parts)
    first: dict[str, str] = {}
    for record in parts.records:
        first = record.first | first
    by_count = sorted(quarantined.items(), key=lambda item: -item[1])
    reasons = "; ".join(f"{n} {reason} (the first: {first[reason]})" for reason, n in by_count)
    allowed = f"; prepare.max_quarantine allows {config.prepare.max_quarantine:.0%}" if n_good else ""
    remedy = "Fix the data, or raise the threshold." if n_good else "Fix the data, or what the reason names."
    raise DataError(
        f"{n_bad} of {n_bad + n_good} records cannot be used ({reasons}){allowed}. Each is in {path} with its line and "
        f"reason. {remedy}"
    )


# -- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DoneShare:
    """A preparation of which this process has done its share."""

    resolved: ResolvedConfig
    inputs: PreparedInputs
    folder: Path  # of the parts
    part_sources: list[int]  # the source of each part, of all processes


def _parts_folder(config: Config, inputs: PreparedInputs) -> Path:
    """Name the folder of the parts by what they depend on."""
    data = [{name: value for name, value in entry.items() if name != "weight"} for entry in inputs.config["data"]]
    settings = {name: value for name, value in inputs.config.items() if name not in _NOT_IN_PARTS}
    return config.prepared / f".parts-{_short_hash(inputs.facts() | {'config': settings | {'data': data}})}"


def _short_hash(facts: Mapping[str, Any]) -> str:
    return artifact.checksum_bytes(artifact.canonical_json(facts))[:8]


def _prepare_all_parts(
    config: Config,
    model: Path,
    sources: list[DataSource],
    inputs: PreparedInputs,
    progress: Progress,
    *,
    late_images: str = "",
) -> _DoneShare:
    """Prepare this process's share of the parts; again if there are images only after the first records.

    The `inputs` lack what loading the tokenizer and the image processor shows; those that are returned are complete.
    """
    pa.array([])  # pyarrow imports pandas with its first array, so have it do so while the tokenizer loads
    with working("load the tokenizer and look at the data"):
        resolved = resolve_config(config.prepare, model, sources, progress, late_images=late_images)
    resolved, n_workers = _plan_workers(resolved, sources, progress)
    # Created here in any case, so that an error in the template or the options is raised here and not in a worker process.
    worker = part_worker.PartWorker(resolved)
    found: dict[str, Any] = {"fingerprint": read_fingerprint(model, Path(config.out), worker.encoder)}
    if worker.image_text:
        processor = worker.image_text.processor
        found["processor_id"] = prepared_inputs.read_processor_id(model, Path(config.out), processor)
    complete = inputs.model_copy(update=found)
    folder = _parts_folder(config, complete)
    # The other ranks, whose records may have no images, and a later run find it here.
    notice = folder / _LATE_IMAGES
    if worker.image_text or not notice.exists():
        try:
            part_sources = _prepare_parts(folder, worker, n_workers, sources, progress)
            return _DoneShare(resolved, complete, folder, part_sources)
        except part_worker.LateImagesError as error:
            artifact.commit_bytes(notice, error.where.encode(), durable=False)
    where = notice.read_text(encoding="utf-8")
    progress.say(f"prepare: {where}, has images, unlike the first records: all are prepared with the image processor")
    return _prepare_all_parts(config, model, sources, inputs, progress, late_images=where)


def _prepare_parts(
    folder: Path, worker: part_worker.PartWorker, n_workers: int, sources: list[DataSource], progress: Progress
) -> list[int]:
    """Prepare the missing parts of this process's share, again if the fast tokenizer turns out to be wrong.

    Return the source of every part of the preparation.
    """
    part_sources = _prepare_missing_parts(folder, worker, n_workers, sources, progress)
    if mismatch := part_worker.find_mismatch(folder):
        ranks = ". Run all other ranks again" if process_pool.rank_and_world()[1] > 1 else ""
        progress.warn(
            f"prepare: {mismatch}. All that fastokens encoded is prepared again, with the usual tokenizer{ranks}"
        )
        part_sources = _prepare_missing_parts(folder, worker, n_workers, sources, progress)
    return part_sources


def _prepare_missing_parts(
    folder: Path, worker: part_worker.PartWorker, n_workers: int, sources: list[DataSource], progress: Progress
) -> list[int]:
    rank, world = process_pool.rank_and_world()
    artifact.remove_leftovers(folder.parent)
    part_sources: list[int] = []
    reasons: set[str] = set()  # why the fast tokenizer cannot be used
    n_prepared = n_finished = n_bytes_read = 0
    n_bytes = sum(source.estimate_bytes() for source in sources)

    def tasks() -> Iterator[tuple[int, int, Chunk]]:
        nonlocal n_prepared, n_finished, n_bytes_read
        for source, chunk in ((n, chunk) for n, each in enumerate(sources) for chunk in each.chunks()):
            number = len(part_sources)
            part_sources.append(source)
            n_bytes_read += chunk.n_bytes
            if number % world == rank:
                if _find_finished_part(folder, number, source):
                    n_finished += 1
                else:
                    n_prepared += 1
                    yield number, source, chunk

    with progress.count("prepare", None, "records") as counter:
        start = partial(part_worker.start_worker, worker.resolved, folder)
        for n_done, record in enumerate(process_pool.run(start, tasks(), n_workers, worker.task(folder)), start=1):
            # Some of what was read is still being prepared.
            counter.estimate(n_done / n_prepared * n_bytes_read / max(n_bytes, 1))
            counter.add(record.records)
            reasons.add(record.fast_tokenizer_unavailable)
    if n_finished and len(part_sources) > n_prepared:
        progress.say(f"prepare: {n_finished:,} of {len(part_sources):,} parts were there already")
    for reason in sorted(filter(None, reasons)):
        progress.say(f"prepare: fastokens is not used, which would be faster: {reason}")
    return part_sources


def _plan_workers(
    resolved: ResolvedConfig, sources: list[DataSource], progress: Progress
) -> tuple[ResolvedConfig, int]:
    """Return the config with the tokenizer that suits the amount of data, and the number of workers that does."""
    _, world = process_pool.rank_and_world()
    n_bytes = sum(source.estimate_bytes() for source in sources) // world
    n_workers = _count_workers(resolved, n_bytes)
    return replace(resolved, fast_tokenizer=_use_fast_tokenizer(resolved, n_bytes // n_workers, progress)), n_workers


def _count_workers(resolved: ResolvedConfig, n_bytes: int) -> int:
    """Return the number in the config, or as many as there is enough data for, up to one per core.

    A worker takes as long to start, with its tokenizer, as to prepare some megabytes.
    """
    tokenizer_size = len(resolved.tokenizer.backend or "")
    enough = _WORKER_BYTES * (1 + tokenizer_size / _WORKER_TOKENIZER)
    return resolved.prepare.workers or max(1, min(process_pool.cores(), int(n_bytes // enough)))


def _use_fast_tokenizer(resolved: ResolvedConfig, n_bytes: int, progress: Progress) -> bool:
    """Return whether the fast tokenizer is installed, and a worker has enough data for loading it to pay off."""
    backend = resolved.tokenizer.backend
    if not resolved.prepare.fast_tokenizer or backend is None or n_bytes <= break_even(backend):
        return False
    if fastokens_version() is not None:
        return True
    if find_untested(load_backend(backend)) is None:
        progress.say(
            "prepare: pip install 'prefcache[fast]' would tokenize so much data several times faster, with the same ids"
        )
    return False


def _find_finished_part(folder: Path, number: int, source: int) -> PartRecord | None:
    record = part_worker.find_finished(folder, number)
    return record if record is not None and record.source == source else None


def _find_finished(share: _DoneShare) -> finalize.Parts | None:
    """Return all parts, or None if some are not finished."""
    records = []
    for number, source in enumerate(share.part_sources):
        record = _find_finished_part(share.folder, number, source)
        if record is None:
            return None
        records.append(record)
    return finalize.Parts(share.folder, records)


# -- the whole -------------------------------------------------------------------------------------------------------


def _finalize(parts: finalize.Parts, share: _DoneShare, config: Config, progress: Progress) -> None:
    folder, prepare, resolved = config.prepared, config.prepare, share.resolved
    quarantine = finalize.commit_quarantine(folder / prepared.QUARANTINE_FILE, parts)
    if len(parts.records) > 1:
        progress.say(f"prepare: {parts.n_rows:,} examples in {len(parts.records):,} parts, now put together")
    sources = prepare.sources
    weights = [sources[record.source].weight for record in parts.records]
    generation = _name_generation(share.inputs, parts)
    committed = finalize.commit_shards(folder, parts, resolved.kind, generation, prepare, weights)
    image_files = finalize.commit_image_files(folder, parts, generation)
    if n_leaked := committed.done.get("leaked"):
        progress.warn(
            f"{n_leaked:,} examples of prepare.held_out_data have a prompt that is also trained on: their evaluation does not show "
            "what the policy does with other prompts. They are kept; take these prompts out of one of the two"
        )
    done = parts.sum_counts("done")
    if n_limited := _count_limited(parts, config):
        done["limited"] = n_limited
    if resolved.template is None:
        done.pop("ended", None)  # plain text has no end tokens, so adding them is not worth a message
    manifest = PreparedManifest.make(
        inputs=share.inputs,
        kind=resolved.kind,
        formats=[asdict(source_format) for source_format in resolved.source_formats],
        records=sum(record.records for record in parts.records),
        further=sum(record.further for record in parts.records),
        quarantined=parts.sum_counts("quarantined"),
        boundaries={name: done.pop(name) for name in ("exact", "split") if name in done},
        done=done | {name: n for name, n in sorted(committed.done.items()) if n},
        fast_tokenizer_mismatch=part_worker.find_mismatch(parts.folder),
        template=resolved.template,
        date=resolved.date,
        shards=committed.shards,
        **({"images": committed.images} if committed.images else {}),
        **({"image_files": image_files} if image_files else {}),
        quarantine=quarantine,
    )
    manifest.commit(folder / artifact.MANIFEST)
    _remove_old_files(folder, {entry["file"] for entry in (*committed.shards, *committed.images, *image_files)})


def _name_generation(inputs: PreparedInputs, parts: finalize.Parts) -> str:
    """Name the files of a preparation by what they depend on, so that none of an earlier one is overwritten."""
    if not any(record.image_files or record.images for record in parts.records):
        return _short_hash(inputs.facts())
    # The inputs do not say what is in files of pictures.
    files = [[entry.xxh3_128 for entry in record.files.values()] for record in parts.records]
    return _short_hash(inputs.facts() | {"parts": files})


def _count_limited(parts: finalize.Parts, config: Config) -> int:
    """Count the sources that gave as many records as they may."""
    read: Counter[int] = Counter()
    for record in parts.records:
        read[record.source] += record.records
    return sum(read[number] == entry.max_records for number, entry in enumerate(config.prepare.sources))


def _remove_old_files(folder: Path, current: set[str]) -> None:
    for old in folder.glob("*.arrow"):
        if old.name not in current and re.fullmatch(_SHARD, old.name):
            old.unlink(missing_ok=True)
    (folder / REFUSED_FILE).unlink(missing_ok=True)
    for old in folder.glob(".parts-*"):
        shutil.rmtree(old, ignore_errors=True)


def _summarize(config: Config, *, changed: bool) -> PrepareResult:
    manifest = prepared.Prepared(config.prepared).manifest
    rows = dict.fromkeys((TRAIN, HELD_OUT, *config.prepare.held_out_data), 0)
    for shard in manifest.shards:
        rows[shard.split] += shard.rows
    train, held_out = rows.pop(TRAIN), rows.pop(HELD_OUT)
    done, n_in = manifest.done, manifest.records + manifest.further
    n_unused = sum(manifest.quarantined.values()) + done.get("left_out", 0) + done.get("dropped", 0)
    n_out = train + held_out + sum(rows.values()) + n_unused - done.get("repeated", 0)
    if n_in != n_out:
        raise IntegrityError(
            f"{config.prepared / artifact.MANIFEST} counts {n_in} records, but says what became of {n_out}. "
            f"Delete {config.prepared} and prepare again (prefcache prepare CONFIG)."
        )
    return PrepareResult(
        prepared=config.prepared,
        changed=changed,
        kind=manifest.kind,
        records=manifest.records,
        train=train,
        held_out=held_out,
        evaluation=rows,
        further=manifest.further,
        quarantined=manifest.quarantined,
        boundaries=manifest.boundaries,
        done=done,
        date=manifest.date,
    )
