"""What the processes of a launch agree on before they train.

Prepared data, cache and model may be copies of each machine's own: the ids of what a run is made from are compared. Only the main
process writes the run's folder. The others read it where a run is continued, for the best checkpoint, and where a moving reference
is a mixture; otherwise each machine may have a folder of its own.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import PrefcacheError, UsageError
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.freshness import find_differences
from prefcache.pipeline.stored.records import RunInputs
from prefcache.pipeline.training import checkpoints
from prefcache.pipeline.training.run_log import BEFORE, PROVENANCE

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

# A network file system may show what another machine wrote a moment later.
_SECONDS_TO_SEE = 3.0
_STATE = (PROVENANCE, BEFORE, artifact.MANIFEST, f"{checkpoints.FOLDER}/*/{artifact.MANIFEST}")


@dataclass(frozen=True)
class _View:
    """What the main process trains on, and what is in its folder of the run."""

    host: str
    inputs: RunInputs
    state: dict[str, str]  # checksums of the files that say how far the run is
    mark: str  # name of a file that it has just put there


def share(devices: "Accelerator", value: T) -> T:
    """Return the main process's value on every process."""
    from accelerate.utils import broadcast_object_list

    return value if devices.num_processes == 1 else broadcast_object_list([value])[0]


def call_on_main(devices: "Accelerator", function: Callable[[], None]) -> None:
    """Call a function on the main process, while the others wait; raise its error on all of them."""
    error: PrefcacheError | None = None
    if devices.is_main_process:
        try:
            function()
        except PrefcacheError as raised:
            error = raised
    if (error := share(devices, error)) is not None:
        raise error


def refuse_disagreement(config: Config, inputs: RunInputs, devices: "Accelerator", progress: Progress) -> None:
    """UsageError on every process if one of them would train on something else, or cannot read what it will need of the run."""
    if devices.num_processes == 1:
        return
    from accelerate.utils import gather_object

    with _mark(config.run) if devices.is_main_process else contextlib.nullcontext("") as mark:
        view = share(devices, _View(socket.gethostname(), inputs, _read_state(config.run), mark))
        sees = _waits_for(config.run / view.mark)
        problem = _explain(config, inputs, view, sees=sees)
        name = f"process {devices.process_index} on {socket.gethostname()}"
        answers: list[tuple[str, str | None, bool]] = gather_object([(name, problem, sees)])
    for name, problem, _ in answers:
        if problem:
            raise UsageError(f"{name[0].upper()}{name[1:]} {problem}")
    if apart := [name for name, _, sees in answers if not sees]:
        progress.say(
            f"train: {', '.join(apart)} {'has' if len(apart) == 1 else 'have'} another folder {config.run}; the run is written "
            f"on {view.host} only"
        )


@contextlib.contextmanager
def _mark(run: Path) -> Iterator[str]:
    with artifact.scratch_folder(run / "shared") as folder:
        yield folder.name


def _waits_for(path: Path) -> bool:
    """Whether this process sees what the main process has just written."""
    deadline = time.monotonic() + _SECONDS_TO_SEE
    while time.monotonic() < deadline:
        # Listing a folder makes a network file system look again.
        if all(below in _list(below.parent) for below in (path.parent, path)):
            return True
        time.sleep(0.2)
    return False


def _list(folder: Path) -> set[Path]:
    return set(folder.iterdir()) if folder.is_dir() else set()


def _read_state(run: Path) -> dict[str, str]:
    files = [file for pattern in _STATE for file in run.glob(pattern) if file.is_file()]
    return {str(file.relative_to(run)): artifact.checksum(file) for file in files}


def _explain(config: Config, inputs: RunInputs, view: _View, *, sees: bool) -> str | None:
    run, train = config.run, config.train
    if not sees and _read_state(run) != view.state:
        return (
            f"does not have the state of the run in {run} that the main process on {view.host} has. To continue a run, every process "
            f"reads its folder: copy it from {view.host} to the same place, or put it on a disk that all machines share."
        )
    if not sees and (train.best or (train.moving_reference and train.moving_reference.alpha < 1)):
        key = "train.best" if train.best else "train.moving_reference.alpha"
        return (
            f"does not see the folder {run} of the main process on {view.host}, and with {key} every process reads checkpoints "
            f"from it. Put it on a disk that all machines share, or leave {key} out."
        )
    if differences := find_differences(view.inputs.facts(), inputs.facts()):
        return (
            f"would train on something else than the main process on {view.host}: {'; '.join(map(str, differences))}. Give "
            "every machine the same prepared data, scores, model and settings."
        )
    return None
