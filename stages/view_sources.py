"""The files of an experiment that a query or a report reads, each verified first: DuckDB checks no checksums."""

import contextlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefcache.pipeline import config_file, views
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.stored import artifact, cache_maintenance
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import (
    REFERENCE_FILE,
    CheckpointManifest,
    PreparedManifest,
    Provenance,
    RunManifest,
)
from prefcache.pipeline.stored.scored import open_scored
from prefcache.pipeline.training.run_log import PROVENANCE

# Which tables of the schema `stored` need which files.
_PREPARED = {"prepared", "scored", "images"}
_REFERENCES = {"scored", "cached", "caches", "numerics"}
_RUN_PARTS = {"visits": "steps", "metrics": "metrics", "events": "events", "timed": "throughput"}
EVERYTHING = {"prepared", "images", "quarantine", "runs", "checkpoints", "tokens", *_REFERENCES, *_RUN_PARTS}


def collect(
    folder: Path,
    tables: set[str],
    *,
    only: Sequence[str] | None = None,
    other_references: bool = True,
    prepared: Prepared | None = None,
) -> views.Sources:
    """Open what these tables of the schema `stored` are made of; `only` names the runs to read, None for all.

    `prepared` is the preparation where it is open, and so verified, already.
    """
    sources: dict[str, Any] = {}
    if tables & _PREPARED:
        opened = prepared or Prepared(folder / "prepared")
        sources |= {"prepared": opened.table(), "images": opened.images().table}
    if "quarantine" in tables:
        sources["quarantine"] = [_find_quarantine(folder / "prepared")]
    if tables & _REFERENCES:
        sources["references"] = references = list(_open_references(folder / "scored", others=other_references))
        if "cached" in tables:
            sources["shards"] = [shard for reference in references for shard in _list_whole_shards(reference.cache)]
    runs = [path for path in list_runs(folder) if only is None or path.name in only]
    if tables & {"runs", "tokens", *_RUN_PARTS}:
        sources["runs"] = pa.Table.from_pylist([_describe_run(run) for run in runs], schema=views.RUNS)
    if "checkpoints" in tables:
        rows = [row for run in runs for row in _describe_checkpoints(run)]
        sources["checkpoints"] = pa.Table.from_pylist(rows, schema=views.CHECKPOINTS)
    for name in sorted(tables & set(_RUN_PARTS)):
        sources[_RUN_PARTS[name]] = [part for run in runs for part in _verify_parts(run, _RUN_PARTS[name])]
    if "tokens" in tables:
        sources["tokens"] = [file for run in runs for file in _find_tokens(run)]
    return views.Sources(**sources)


def find_experiment(where: str | None) -> Path:
    """Return the folder of the experiment that a config or its `out` names; without a name, the only one in runs/."""
    if where is not None:
        folder = Path(where)
        if folder.is_file():
            folder = (config_file.base_of_run_config(where) or Path()) / config_file.load(where).out
        if not (folder / "prepared").is_dir():
            raise UsageError(f"{folder} is not an experiment: it has no prepared/. Name a config, or its `out`.")
        return folder
    folders = sorted(path.parent.parent for path in Path("runs").glob("*/prepared/manifest.json"))
    if len(folders) == 1:
        return folders[0]
    if not folders:
        raise UsageError("No experiment in runs/. Prepare one (prefcache prepare CONFIG), or name its folder.")
    names = ", ".join(path.name for path in folders)
    raise UsageError(f"runs/ has several experiments: {names}. Name one, such as {folders[0]}.")


def list_runs(folder: Path) -> list[Path]:
    """Return the folders of all runs, finished or not."""
    return [path.parent for path in sorted(folder.glob(f"*/{PROVENANCE}"))]


def refuse_unknown_runs(folder: Path, names: Collection[str]) -> None:
    """UsageError if the experiment has no run of one of these names."""
    known = [path.name for path in list_runs(folder)]
    if unknown := [name for name in names if name not in known]:
        has = f"It has {', '.join(known)}." if known else "It has none yet: train one (prefcache train CONFIG)."
        raise UsageError(f"{folder} has no run {unknown[0]!r}. {has}")


def _find_quarantine(prepared: Path) -> str:
    manifest = PreparedManifest.find(prepared)
    if manifest is None:
        raise UsageError(f"{prepared} holds no finished preparation. Prepare first (prefcache prepare CONFIG).")
    path = prepared / manifest.quarantine.file
    if reason := artifact.damage(prepared, manifest.quarantine):
        raise IntegrityError(f"{path} {reason}. Delete {prepared} and prepare again (prefcache prepare CONFIG).")
    return str(path)


def _open_references(scored: Path, *, others: bool) -> Iterator[views.Reference]:
    """Yield the reference of this experiment, then the others in its cache, which may have scored the same sequences."""
    if (opened := open_scored(scored)) is None:
        return
    manifest, own = opened
    yield views.Reference(own, manifest.accepted_numerics)
    for record in sorted(own.folder.parent.glob(f"*/{REFERENCE_FILE}")) if others else ():
        if record.parent != own.folder:
            other = Cache(record.parent, None, every_byte=True, remember="nothing", allowed_signers=own.allowed_signers)
            other.refuse_damage()
            known = sorted(other.numerics(), key=lambda name: (name not in manifest.accepted_numerics, name))
            yield views.Reference(other, known, used=False)


def _list_whole_shards(cache: Cache) -> list[str]:
    """The files of all shards of a reference, each of them whole and none in contradiction to another."""
    cache.fetch_shards()
    cache.refuse_damage()
    cache_maintenance.refuse_contradictions(cache)
    return cache.shards


def _describe_run(folder: Path) -> dict[str, Any]:
    """Return a run's row; the columns about its end are empty until it is finished."""
    provenance = Provenance.read(folder / PROVENANCE, f"Move {folder} away.")
    settings, manifest = provenance.inputs.train, RunManifest.find(folder)
    reference = provenance.inputs.reference
    return {
        "folder": str(folder),
        "run": folder.name,
        "finished": manifest is not None,
        "policy": provenance.model,
        "model_id": reference and views.short_id(reference),
        "per_token": provenance.per_token,
        "settings": json.dumps(settings.facts(), sort_keys=True),
        **{name: getattr(provenance, name) for name in ("loss", "beta", "precision", "device", "processes")},
        **{name: getattr(settings, name) for name in ("learning_rate", "batch_size", "epochs", "seed")},
        **{name: getattr(manifest, name, None) for name in ("examples", "held_out", "steps", "seconds")},
    }


def _verify_parts(run: Path, table: str) -> list[str]:
    """Return the finished parts of a run's table, verified by the manifest or, while the run lasts, by their page checksums."""
    remedy = f"Delete {run} and train it again, or move it away."
    manifest = RunManifest.find(run)
    entries = {entry.file: entry for entry in (manifest.table_files(table) if manifest else [])}
    parts = sorted((run / table).glob("to-*.parquet"))
    for name, entry in entries.items():
        if reason := artifact.damage(run / table, entry):
            raise IntegrityError(f"{run / table / name} {reason}. {remedy}")
    for part in parts:
        if part.name in entries:
            continue
        try:
            with pq.ParquetFile(part.absolute(), page_checksum_verification=True) as file:
                for _ in file.iter_batches():
                    pass
        except FileNotFoundError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise IntegrityError(f"{part} cannot be read ({reason}). {remedy}") from error
    return [str(part) for part in parts]


def _find_tokens(run: Path) -> Iterator[str]:
    """Yield the verified file of the examples that a finished run moved most, token by token."""
    manifest = RunManifest.find(run)
    if manifest is not None and manifest.tokens is not None:
        if reason := artifact.damage(run, manifest.tokens):
            raise IntegrityError(
                f"{run / manifest.tokens.file} {reason}. Delete {run} and train it again, or move it away."
            )
        yield str(run / manifest.tokens.file)


def _describe_checkpoints(run: Path) -> Iterator[dict[str, Any]]:
    for folder in sorted((run / "checkpoints").glob("step-*")):
        # A run in progress removes old ones.
        with contextlib.suppress(FileNotFoundError):
            manifest = CheckpointManifest.find(folder)
            # Folders under other names are copies, from which no run resumes.
            if manifest and folder.name == f"step-{manifest.step:08}":
                yield {
                    "run": run.name,
                    "step": manifest.step,
                    "num_tokens": manifest.num_tokens,
                    "bytes": sum(entry.bytes for entry in manifest.files),
                    "folder": str(folder),
                }
