"""What a question or a report reads of an experiment's folder, every file of it verified: DuckDB checks no checksums."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import views
from pipeline.errors import IntegrityError, UsageError
from pipeline.stored import artifact
from pipeline.stored.cache import REFERENCE_FILE, Cache, open_scored
from pipeline.stored.prepared import Prepared
from pipeline.training.runlog import PARTS, PROVENANCE

# What has to be opened for a table of the schema `stored`.
_PREPARED = {"prepared", "scored"}
_REFERENCES = {"scored", "cached", "caches", "numerics"}
_TABLES = {"visits": "steps", "metrics": "metrics", "events": "events", "timed": "throughput"}
EVERYTHING = {"prepared", "quarantine", "runs", "checkpoints", *_REFERENCES, *_TABLES}


def gather(
    folder: Path, needed: set[str], *, only: Sequence[str] | None = None, other_references: bool = True
) -> views.Sources:
    """For the tables of the schema `stored` that are needed. `only`: the runs that count, where not all do."""
    found: dict[str, Any] = {}
    if needed & _PREPARED:
        found["prepared"] = Prepared(folder / "prepared").table()
    if "quarantine" in needed:
        found["quarantine"] = [_quarantine(folder / "prepared")]
    if needed & _REFERENCES:
        found["references"] = list(_references(folder / "scored", others=other_references))
    runs = [path for path in runs_of(folder) if only is None or path.name in only]
    if needed & {"runs", *_TABLES}:
        found["runs"] = pa.Table.from_pylist([_run(run) for run in runs], schema=views.RUNS)
    if "checkpoints" in needed:
        rows = [row for run in runs for row in _checkpoints(run)]
        found["checkpoints"] = pa.Table.from_pylist(rows, schema=views.CHECKPOINTS)
    for table in [_TABLES[name] for name in sorted(needed & set(_TABLES))]:
        found[table] = [part for run in runs for part in _parts(run, table)]
    return views.Sources(**found)


def runs_of(folder: Path) -> list[Path]:
    """Finished or not."""
    return [path.parent for path in sorted(folder.glob(f"*/{PROVENANCE}"))]


def _quarantine(prepared: Path) -> str:
    manifest = artifact.read_manifest(prepared)
    if manifest is None:
        raise UsageError(f"{prepared} holds no finished preparation. Prepare first (make prepare).")
    entry = manifest["quarantine"]
    if reason := artifact.damage(prepared, entry):
        raise IntegrityError(
            f"{prepared / entry['file']} {reason}. Delete {prepared} and prepare again (make prepare)."
        )
    return str(prepared / entry["file"])


def _references(scored: Path, *, others: bool) -> Iterator[views.Reference]:
    """The one that scored this experiment, and the others beside it, which may have scored the same sequences."""
    if (found := open_scored(scored)) is None:
        return
    manifest, own = found
    yield views.Reference(own, manifest["accepted_numerics"])
    for record in sorted(own.folder.parent.glob(f"*/{REFERENCE_FILE}")) if others else ():
        if record.parent != own.folder:
            other = Cache(record.parent, None, every_byte=True)
            other.refuse_damage()
            known = sorted(other.numerics(), key=lambda name: (name not in manifest["accepted_numerics"], name))
            yield views.Reference(other, known, used=False)


def _run(folder: Path) -> dict[str, Any]:
    """What a run says of itself; the end of it is known when it is finished."""
    facts = artifact.unseal(folder / PROVENANCE, f"Move {folder} away.")
    settings, manifest = facts["inputs"]["train"], artifact.read_manifest(folder)
    reference = facts["inputs"]["reference"]
    return {
        "folder": str(folder),
        "run": folder.name,
        "finished": manifest is not None,
        "policy": facts.get("model"),
        "model_id": reference and views.short_id(reference),
        "per_token": facts.get("per_token", False),
        "settings": json.dumps(settings, sort_keys=True),
        **{name: facts.get(name) for name in ("loss", "beta", "precision", "device", "processes")},
        **{name: settings.get(name) for name in ("learning_rate", "batch_size", "epochs", "seed")},
        **{name: (manifest or {}).get(name) for name in ("examples", "held_out", "steps", "seconds")},
    }


def _parts(run: Path, table: str) -> list[str]:
    """The finished parts of a run's table. Of a run that goes on, no manifest vouches for them yet: their pages do."""
    manifest = artifact.read_manifest(run) or {}
    vouched = {entry["file"]: entry for entry in manifest.get(PARTS[table], [])}
    parts = sorted((run / table).glob("to-*.parquet"))
    for name, entry in vouched.items():
        if reason := artifact.damage(run / table, entry):
            raise IntegrityError(f"{run / table / name} {reason}. Delete {run} and train it again, or move it away.")
    for part in parts:
        if part.name not in vouched:
            _refuse_damaged_pages(part, run)
    return [str(part) for part in parts]


def _refuse_damaged_pages(part: Path, run: Path) -> None:
    try:
        with pq.ParquetFile(part, page_checksum_verification=True) as file:
            for _ in file.iter_batches():
                pass
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise IntegrityError(
            f"{part} cannot be read ({reason}). Delete {run} and train it again, or move it away."
        ) from error


def _checkpoints(run: Path) -> Iterator[dict[str, Any]]:
    for folder in sorted((run / "checkpoints").glob("step-*")):
        # A run that goes on removes old ones.
        with contextlib.suppress(FileNotFoundError):
            if manifest := artifact.read_manifest(folder):
                n_bytes = sum(entry["bytes"] for entry in manifest["files"])
                facts = {"step": manifest["step"], "num_tokens": manifest["num_tokens"], "bytes": n_bytes}
                yield {"run": run.name, **facts, "folder": str(folder)}
