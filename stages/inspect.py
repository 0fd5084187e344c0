"""inspect: questions about data, references and rewards, in SQL.

Every file that a query reads is verified before: DuckDB checks no checksums. What it does not read is not opened.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import config, views
from pipeline.errors import IntegrityError, UsageError
from pipeline.stored import artifact, duck
from pipeline.stored.cache import REFERENCE_FILE, Cache, open_scored
from pipeline.stored.prepared import Prepared
from pipeline.training.runlog import PARTS, PROVENANCE

# What has to be opened for a table of the schema `stored`.
_PREPARED = {"prepared", "scored"}
_REFERENCES = {"scored", "cached", "caches", "numerics"}
_TABLES = {"visits": "steps", "metrics": "metrics", "events": "events", "timed": "throughput"}


describe = views.describe


class Experiment:
    """An experiment's folder, and a database over as much of it as was asked about."""

    def __init__(self, where: str | None) -> None:
        self.folder = _experiment(where)
        self._opened: set[str] = set()
        self._sources = views.Sources()
        self._con = views.connect(self._sources)

    @contextlib.contextmanager
    def asked(
        self, query: str, parameters: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> Iterator[views.Result]:
        """The answer to one SELECT, to be read within so many seconds."""
        self.open(views.behind(query))
        with views.limited(self._con, timeout):
            yield views.ask(self._con, query, self._sources.files, parameters)

    def cancel(self) -> None:
        self._con.interrupt()

    def describe(self) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
        """Every view with its columns, those of what its runs measure among them."""
        self.open({"metrics"})
        return views.describe(self._sources)

    def open(self, needed: set[str]) -> None:
        """Verify and open these tables of the schema `stored`, unless they are."""
        # A locked database takes nothing in any more: where a query reads more than the ones before, a new one is made.
        if not needed <= self._opened or duck.missing(self._sources.files):
            sources = _sources(self.folder, needed | self._opened)
            self._con, self._sources, self._opened = views.connect(sources), sources, needed | self._opened


def _experiment(where: str | None) -> Path:
    """The folder that is named, or that a config names as its `out`; or the only one there is."""
    if where is not None:
        folder = Path(config.load(where).out) if Path(where).is_file() else Path(where)
        if not (folder / "prepared").is_dir():
            raise UsageError(
                f"{folder} is no experiment: it has no prepared/ in it. Name a config, or the folder that is its `out`."
            )
        return folder
    found = sorted(path.parent.parent for path in Path("runs").glob("*/prepared/manifest.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError("No experiment in runs/. Prepare one (make prepare), or name its folder after the query.")
    raise UsageError(f"runs/ has {', '.join(path.name for path in found)}. Name one after the query: {found[0]}.")


# -- what a query reads, verified ------------------------------------------------------------------------------------


def _sources(folder: Path, needed: set[str]) -> views.Sources:
    found: dict[str, Any] = {}
    if needed & _PREPARED:
        found["prepared"] = Prepared(folder / "prepared").table()
    if "quarantine" in needed:
        found["quarantine"] = [_quarantine(folder / "prepared")]
    if needed & _REFERENCES:
        found["references"] = list(_references(folder / "scored"))
    runs = [path.parent for path in sorted(folder.glob(f"*/{PROVENANCE}"))]
    if needed & {"runs", *_TABLES}:
        found["runs"] = pa.Table.from_pylist([_run(run) for run in runs], schema=views.RUNS)
    if "checkpoints" in needed:
        rows = [row for run in runs for row in _checkpoints(run)]
        found["checkpoints"] = pa.Table.from_pylist(rows, schema=views.CHECKPOINTS)
    for table in [_TABLES[name] for name in sorted(needed & set(_TABLES))]:
        found[table] = [part for run in runs for part in _parts(run, table)]
    return views.Sources(**found)


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


def _references(scored: Path) -> Iterator[views.Reference]:
    """The one that scored this experiment, and the others beside it, which may have scored the same sequences."""
    if (found := open_scored(scored)) is None:
        return
    manifest, own = found
    yield views.Reference(own, manifest["accepted_numerics"])
    for record in sorted(own.folder.parent.glob(f"*/{REFERENCE_FILE}")):
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
