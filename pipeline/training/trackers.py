"""train.report_to: a run's metrics in TensorBoard, Weights & Biases or Trackio, through accelerate's trackers.

The Parquet files remain the record. A tracker gets the same rows under the same names, and no step twice: after an interruption
TensorBoard's files are rewritten from those rows, and the others continue the run that they know by its id.
"""

import contextlib
import importlib.util
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored.records import TrackerRecord

Row = Mapping[str, Any]
_RECORD = "trackers.json"  # in a run's folder: its id with the trackers


def refuse_missing(names: Iterable[str]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"train.report_to: {name} is not installed. Install it (pip install {name}), or leave it out."
            )


@contextlib.contextmanager
def reporting(config: Config, rows: Iterable[Row], step: int) -> Iterator[Callable[[Row], None]]:
    """Yield a function that reports a step's row. `rows` are those on disk, up to the step that the run resumes from."""
    trackers: dict[str, Any] = {name: _start(name, config) for name in config.train.report_to}

    def report(row: Row, to: Iterable[str] = trackers) -> None:
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        for name in to:
            trackers[name].log(values, step=row["step"])

    try:
        for row in rows if trackers else ():
            # Other trackers already have the rows of a resumed run.
            report(row, [name for name in trackers if name == "tensorboard" or not step])
        yield report
    finally:
        for tracker in trackers.values():
            tracker.finish()


def _start(name: str, config: Config) -> Any:
    # Takes seconds to import.
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    run, project = config.run, Path(config.out).name
    if name == "tensorboard":
        # The files of a killed run may have steps that are taken again.
        shutil.rmtree(run / name, ignore_errors=True)
        arguments: dict[str, Any] = {"run_name": name, "logging_dir": run, "purge_step": 0}
    elif name == "wandb":
        arguments = {"run_name": project, "name": run.name, "id": _run_id(run), "resume": "allow", "dir": run}
    else:
        arguments = {"run_name": project, "name": f"{run.name}-{_run_id(run)}", "resume": "allow"}
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](**arguments)
        tracker.start()
        tracker.store_init_configuration(_flatten(config.model_dump(mode="json")))
    except Exception as error:  # anything, without a login or a connection
        raise UsageError(f"train.report_to: {name} did not start ({error}). Set it up, or leave it out.") from error
    return tracker


def _run_id(run: Path) -> str:
    """A random id kept in the folder: the same settings in another folder are another run."""
    path = run / _RECORD
    if not path.exists():
        TrackerRecord.make(id=uuid.uuid4().hex[:12]).commit(path)
    return TrackerRecord.read(path, f"Delete {path}.").id


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return keys as --set names them (`{"train.beta": 0.1}`); lists and null become JSON text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat
