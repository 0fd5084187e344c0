"""inspect: questions about data, references and rewards, in SQL."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import views
from pipeline.errors import IntegrityError, UsageError
from pipeline.stored import artifact
from pipeline.stored.cache import open_scored
from pipeline.stored.prepared import Prepared
from pipeline.training.runlog import PARTS, PROVENANCE

describe = views.describe


def sql(query: str, folder: str | None) -> views.Result:
    """Answer one SELECT over the views of an experiment's folder."""
    sources = _sources(_experiment(folder))
    return views.ask(views.connect(sources), query, sources.files)


def _experiment(folder: str | None) -> Path:
    if folder is not None:
        if not (Path(folder) / "prepared").is_dir():
            raise UsageError(f"{folder} is no experiment: it has no prepared/ in it. Name the `out` of a config.")
        return Path(folder)
    found = sorted(path.parent.parent for path in Path("runs").glob("*/prepared/manifest.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError("No experiment in runs/. Prepare one (make prepare), or name its folder after the query.")
    raise UsageError(f"runs/ has {', '.join(path.name for path in found)}. Name one after the query: {found[0]}.")


def _sources(folder: Path) -> views.Sources:
    shards, references = _reference(folder)
    parts, runs = _runs(folder)
    prepared = Prepared(folder / "prepared").table()
    return views.Sources(
        prepared, shards, references, parts["steps"], runs, events=parts["events"], throughput=parts["throughput"]
    )


def _reference(folder: Path) -> tuple[list[str], pa.Table]:
    """The shards of the reference that scored this experiment, each verified."""
    schema = pa.schema([("folder", pa.string()), ("reference", pa.string())])
    found = open_scored(folder / "scored")
    if found is None:
        return [], schema.empty_table()
    _, cache = found
    row = {"folder": f"{cache.folder}/", "reference": cache.reference["name"]}
    return cache.shards, pa.Table.from_pylist([row], schema=schema)


def _runs(folder: Path) -> tuple[dict[str, list[str]], pa.Table]:
    """Every run in the folder, finished or not, and the parts of its tables."""
    parts: dict[str, list[str]] = {"steps": [], "events": [], "throughput": []}
    rows: list[dict[str, Any]] = []
    for record in sorted(folder.glob(f"*/{PROVENANCE}")):
        facts = artifact.unseal(record, f"Move {record.parent} away.")
        _refuse_damage(record.parent)
        for name, found in parts.items():
            found += sorted(str(part) for part in (record.parent / name).glob("to-*.parquet"))
        of_run = {name: facts.get(name, False) for name in ("loss", "beta", "per_token")}
        rows.append({"folder": f"{record.parent}/", "run": record.parent.name, **of_run})
    return parts, pa.Table.from_pylist(rows, schema=views.RUNS)


def _refuse_damage(run: Path) -> None:
    manifest = artifact.read_manifest(run)
    vouched = [(table, entry) for table, key in PARTS.items() for entry in (manifest or {}).get(key, [])]
    for table, entry in vouched:
        if reason := artifact.damage(run / table, entry):
            raise IntegrityError(
                f"{run / table / entry['file']} {reason}. Delete {run} and train it again, or move it away."
            )
