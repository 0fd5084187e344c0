"""What train.report_to names: a run's metrics in TensorBoard, Weights & Biases or Trackio, by accelerate's trackers.

The Parquet files stay the record. A tracker is told the same rows under the same names, and no step twice: after an interruption
TensorBoard's files are written anew from those rows, and the others go on with the run that they know by its id.
"""

import contextlib
import importlib.util
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.stored import artifact

Row = Mapping[str, Any]
_RECORD = "trackers.json"  # in a run's folder: the id by which others know the run


def refuse_missing(names: Iterable[str]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"train.report_to: {name} is not installed. Install it (pip install {name}), or leave it out."
            )


@contextlib.contextmanager
def reporting(config: Config, rows: Iterable[Row], step: int) -> Iterator[Callable[[Row], None]]:
    """Yields what reports a step's row. `rows` are those that are on disk, up to the step that the run goes on from."""
    trackers: dict[str, Any] = {name: _started(name, config) for name in config.train.report_to}

    def report(row: Row, to: Iterable[str] = trackers) -> None:
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        for name in to:
            trackers[name].log(values, step=row["step"])

    try:
        for row in rows if trackers else ():
            # Another has heard them already where the run goes on from a checkpoint.
            report(row, [name for name in trackers if name == "tensorboard" or not step])
        yield report
    finally:
        for tracker in trackers.values():
            tracker.finish()


def _started(name: str, config: Config) -> Any:
    run, project = config.run, Path(config.out).name
    if name == "tensorboard":
        # Of a run that was killed they may have steps that are done again.
        shutil.rmtree(run / name, ignore_errors=True)
        of_run: dict[str, Any] = {"run_name": name, "logging_dir": run, "purge_step": 0}
    elif name == "wandb":
        of_run = {"run_name": project, "name": run.name, "id": _id(run), "resume": "allow", "dir": run}
    else:
        of_run = {"run_name": project, "name": f"{run.name}-{_id(run)}", "resume": "allow"}
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](**of_run)
        tracker.start()
        tracker.store_init_configuration(_flat(config.model_dump(mode="json")))
    except Exception as error:  # whatever they raise where no one is logged in or nothing can be reached
        raise UsageError(f"train.report_to: {name} did not start ({error}). Set it up, or leave it out.") from error
    return tracker


def _id(run: Path) -> str:
    """Not one that the settings give: a run that is made again in another folder is another one to them."""
    path = run / _RECORD
    if not path.exists():
        artifact.commit_bytes(path, artifact.seal({"id": uuid.uuid4().hex[:12]}))
    found: str = artifact.unseal(path, f"Delete {path}.")["id"]
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train.beta": 0.1}`, as --set names it; what is not a number is told as JSON has it."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found
