"""report: an experiment as one HTML page. Reads what the other stages wrote, and loads no model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefcache import view_sources
from prefcache.command_results import ReportResult
from prefcache.pipeline import views
from prefcache.pipeline.config import Config
from prefcache.pipeline.config_file import read_yaml
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.progress import Progress, working
from prefcache.pipeline.report import data_section, page, pictures, reference_section, runs_section
from prefcache.pipeline.schema import SAMPLES, TOKENS
from prefcache.pipeline.stored import artifact, overwrite_guard
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import Provenance, RunManifest, ScoredManifest
from prefcache.pipeline.training import existing_run, sample_answers, token_gains
from prefcache.pipeline.training.run_log import PARTS, PROVENANCE


def refuse_unprepared(path: Path) -> None:
    """Refuse a path that is neither a config nor the folder of an experiment."""
    if not path.exists() or (path.is_dir() and not (path / "prepared").is_dir()):
        raise UsageError(
            f"{path} is neither a config nor an experiment's folder. Name one, as in `prefcache report data/demo/config.yaml`."
        )


def run_config(
    config: Config,
    arguments: str,
    names: Sequence[str],
    output: Path | None,
    progress: Progress,
    force: bool = False,
    path: str | None = None,
    *,
    names_run: bool = False,
) -> ReportResult:
    """Report on the named runs; without names, on the config's own run.

    `arguments` name the config on a command line; `path` is its file; `names_run`: they set train.run. A run that has not
    begun is an error, except before the first one, when the page is about the data.
    """
    names = names or ([config.train.run] if names_run or view_sources.list_runs(Path(config.out)) else [])
    inputs = overwrite_guard.Inputs.from_config(config, path)
    return _run(Path(config.out), arguments, names, output, progress, force, inputs)


def run_folder(
    folder: Path, names: Sequence[str], output: Path | None, progress: Progress, force: bool = False
) -> ReportResult:
    """Report on the named runs of an experiment; without names, on all of them."""
    names = names or [path.name for path in view_sources.list_runs(folder)]
    return _run(folder, "CONFIG", names, output, progress, force, overwrite_guard.Inputs(experiment=folder))


def _run(
    folder: Path,
    arguments: str,
    names: Sequence[str],
    output: Path | None,
    progress: Progress,
    force: bool,
    inputs: overwrite_guard.Inputs,
) -> ReportResult:
    view_sources.refuse_unknown_runs(folder, names)
    if len(names) > page.MOST_RUNS:
        raise UsageError(
            f"{len(names)} runs are too many for one page, which compares up to {page.MOST_RUNS}. Name some (--run): "
            f"{', '.join(names)}."
        )
    path = output or (folder / names[0] if len(names) == 1 else folder) / overwrite_guard.REPORT
    overwrite_guard.refuse_overwrite(path, inputs, force=force, is_report=True)
    with working("read the experiment and draw the page"):
        text = page.render(gather_facts(folder, arguments, names)).encode()
    overwrite_guard.write_bytes(path, text)
    progress.say(f"report: {', '.join(names) if names else 'no run yet'} of {folder}")
    return ReportResult(report=path, runs=list(names), bytes=len(text))


def gather_facts(folder: Path, arguments: str, names: Sequence[str]) -> page.Facts:
    """Read everything that the page shows of the experiment and of these of its runs."""
    prepared = Prepared(folder / "prepared")
    records = [_read_record(folder / name) for name in names]
    sources = view_sources.collect(folder, view_sources.EVERYTHING, only=names, other_references=False)
    con, scored = views.connect(sources), ScoredManifest.find(folder / "scored")
    runs = [runs_section.read(con, record) for record in records]
    prompts = [prompt for run in runs for prompt in run.prompts]
    return page.Facts(
        experiment=str(folder),
        config=arguments,
        prepared=prepared.manifest,
        prepared_id=prepared.id,
        scored=scored,
        data=data_section.read(con, prepared.manifest),
        reference=reference_section.read(con, scored, prepared.kind) if scored else None,
        runs=runs,
        pictures=pictures.read(con, prepared.images(), prompts),
    )


def _read_record(folder: Path) -> runs_section.Record:
    remedy = f"Delete {folder} and train it again, or move it away."
    manifest = RunManifest.find(folder)
    config = folder / "config.yaml"
    try:
        train = read_yaml(config).get("train")
        text = config.read_text(encoding="utf-8")
    except UsageError as error:
        raise IntegrityError(f"{error} {remedy}") from None
    if not isinstance(train, dict):
        raise IntegrityError(f"{config} has no section train. {remedy}")
    tokens, samples = manifest and manifest.tokens, folder / sample_answers.FILE
    if tokens and (reason := artifact.damage(folder, tokens)):
        raise IntegrityError(f"{folder / tokens.file} {reason}. {existing_run.remedy(folder)}")
    # Only a manifest vouches for the samples: those in an unfinished run's folder may be an earlier run's.
    sample_rows = _read_rows(samples, SAMPLES, remedy) if manifest and samples.exists() else []
    token_rows = _read_rows(folder / token_gains.FILE, TOKENS, remedy) if tokens else []
    return runs_section.Record(
        folder=folder,
        provenance=Provenance.read(folder / PROVENANCE, remedy),
        config=text,
        watched=train.get("alerts") != "off",
        manifest=manifest,
        parts={table: manifest.table_files(table) if manifest else [] for table in PARTS},
        samples=[runs_section.Sample(**row) for row in sample_rows],
        tokens=[runs_section.MovedAnswer(**row) for row in token_rows],
    )


def _read_rows(file: Path, schema: pa.Schema, remedy: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(
            file.absolute(), columns=schema.names, page_checksum_verification=True
        ).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{file} cannot be read ({str(error).splitlines()[0]}). {remedy}") from error
    return rows
