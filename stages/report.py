"""report: what an experiment has come to, as one HTML file. Reads what the other stages wrote, and loads no model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline import views
from pipeline.config import Config
from pipeline.errors import IntegrityError, UsageError
from pipeline.progress import Progress
from pipeline.report import data, page, reference, runs
from pipeline.stored import artifact
from pipeline.stored.prepared import Prepared
from pipeline.training import gains, samples
from pipeline.training.runlog import PARTS, PROVENANCE
from stages import sources


def of_config(
    config: Config, said: str, names: Sequence[str], output: Path | None, progress: Progress
) -> dict[str, Any]:
    """Of the config's run, unless others are named; before there is one, of what there is. `said`: the config, as a
    command names it."""
    own = [config.train.run] if (config.run / PROVENANCE).exists() else []
    return run(Path(config.out), said, names or own, output, progress)


def of_folder(folder: Path, names: Sequence[str], output: Path | None, progress: Progress) -> dict[str, Any]:
    """Of all runs of an experiment, unless some are named."""
    return run(folder, "CONFIG", names or [path.name for path in sources.runs_of(folder)], output, progress)


def run(folder: Path, said: str, names: Sequence[str], output: Path | None, progress: Progress) -> dict[str, Any]:
    _check_names(folder, names)
    path = output or (folder / names[0] if len(names) == 1 else folder) / "report.html"
    artifact.refuse_unwritable(path)
    artifact.commit_bytes(path, page.render(facts(folder, said, names)).encode())
    progress.say(f"report: {', '.join(names) if names else 'no run yet'} of {folder}")
    return {"report": str(path), "runs": list(names), "bytes": path.stat().st_size}


def facts(folder: Path, said: str, names: Sequence[str]) -> page.Facts:
    """All that is there of the experiment and of these of its runs."""
    prepared = Prepared(folder / "prepared")
    records = [_record(folder / name) for name in names]
    found = sources.gather(folder, sources.EVERYTHING, only=names, other_references=False)
    con, scored = views.connect(found), artifact.read_manifest(folder / "scored")
    return page.Facts(
        experiment=str(folder),
        config=said,
        prepared=prepared.manifest,
        prepared_id=prepared.id,
        scored=scored,
        data=data.read(con, prepared.manifest),
        reference=reference.read(con, scored, prepared.kind) if scored else None,
        runs=[runs.read(con, record) for record in records],
    )


def _check_names(folder: Path, names: Sequence[str]) -> None:
    there = [path.name for path in sources.runs_of(folder)]
    if strange := [name for name in names if name not in there]:
        raise UsageError(f"{folder} has no run {strange[0]!r}. It has {', '.join(there) if there else 'none yet'}.")
    if len(names) > page.MOST_RUNS:
        raise UsageError(
            f"{len(names)} runs are too many for one page; {page.MOST_RUNS} are the most. Name some (--run): {', '.join(names)}."
        )


def _record(folder: Path) -> runs.Record:
    remedy = f"Delete {folder} and train it again, or move it away."
    manifest = artifact.read_manifest(folder)
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    # Of an unfinished run, what lies there may be an earlier one's.
    tokens, answered = (manifest or {}).get("tokens"), folder / samples.FILE
    if tokens and (reason := artifact.damage(folder, tokens)):
        raise IntegrityError(f"{folder / tokens['file']} {reason}. Train again (make train): only that is made again.")
    return runs.Record(
        folder=folder,
        provenance=artifact.unseal(folder / PROVENANCE, remedy),
        config=config,
        settings=yaml.safe_load(config)["train"],
        manifest=manifest,
        parts={table: (manifest or {}).get(key, []) for table, key in PARTS.items()},
        samples=_rows(answered, remedy) if manifest and answered.exists() else [],
        tokens=_rows(folder / gains.FILE, remedy) if tokens else [],
    )


def _rows(file: Path, remedy: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = pq.read_table(file, page_checksum_verification=True).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{file} cannot be read ({str(error).splitlines()[0]}). {remedy}") from error
    return found
