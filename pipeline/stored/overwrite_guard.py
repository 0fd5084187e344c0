"""Where a command may write what a user asked for: the one place that decides, and how it is written.

Files of prefcache's and of the user's data are never replaced, with --force or without: files in a folder that a stage
wrote, in a reference's cache or in a working folder of ours; hidden files next to those; the data, config and models
that a command reads, or that an experiment in runs/ was made from; the files of any model or adapter. They are
recognized by what they are (a sealed manifest, a config.json next to weights), and by inode where links lead to them.
Any other existing file is replaced only with --force. Pipes, devices and /dev/stdout are written into.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.images import read_stamps
from prefcache.pipeline.stored.records import PreparedManifest
from prefcache.pipeline.stored_paths import candidate_places

REPORT = "report.html"  # in the folder of a run or of an experiment: a newer report takes its place
# Sealed files that say whose folder it is.
_SEALED = {
    artifact.MANIFEST: "a stage of prefcache wrote",
    "provenance.json": "holds a run",
    "reference.json": "is a reference's cache",
    "tower.json": "keeps what a vision tower made of pictures",
}
# Files that this process has open; no other path below /proc or /dev is written to.
_OPENED = re.compile(r"/dev/(stdout|stderr|fd/\d+)|/proc/(self|\d+)/fd/\d+")


@dataclass(frozen=True)
class Inputs:
    """What a command reads, and therefore must not overwrite."""

    files: tuple[Path, ...] = ()
    data: tuple[str, ...] = ()  # as prepare.data names it: a file, a folder or a pattern
    folders: tuple[Path, ...] = ()  # of models and adapters
    experiment: Path | None = None  # whose data its manifest names

    @classmethod
    def from_config(cls, config: Config, path: str | None = None) -> "Inputs":
        """`path`: the config's own file."""
        models = [config.model, config.adapter, config.train.model]
        files = [path, config.prepare.chat_template, *(each for each in models if each and Path(each).is_file())]
        return cls(
            files=tuple(Path(file) for file in files if file),
            data=tuple(source.path for source in config.prepare.sources if source.path is not None),
            folders=tuple(Path(folder) for folder in models if folder and Path(folder).is_dir()),
            experiment=Path(config.out),
        )

    def with_files(self, *paths: str | Path | None) -> "Inputs":
        return replace(self, files=(*self.files, *(Path(path) for path in paths if path)))


def refuse_overwrite(path: Path, inputs: Inputs, *, force: bool, is_report: bool = False) -> None:
    """Raise UsageError if the file may not be written, for whatever reason. Call it before any work."""
    if is_stream(path):
        if path.is_file():  # standard output, sent into a file
            refuse_owned(path)
            _refuse_inputs(path, inputs)
        return
    artifact.refuse_unwritable(path)
    is_place = _is_sealed(path.parent / "provenance.json") or (path.parent / "prepared").is_dir()
    replaces_report = is_report and path.name == REPORT and is_place and not path.is_symlink()
    if not replaces_report:
        refuse_owned(path)
    if not os.path.lexists(path):
        return
    _refuse_inputs(path, inputs)
    if not force and not replaces_report:
        raise UsageError(f"{path} exists already. Name another file, or replace it with --force.")


def _refuse_inputs(path: Path, inputs: Inputs) -> None:
    if owner := _name_owner(path, inputs):
        raise UsageError(f"{path} is {owner}. Name another file; --force does not replace it.")


def refuse_owned(path: Path) -> None:
    """UsageError if `path` is, or would be, one of the files that prefcache keeps for itself."""
    for place in {path.parent.resolve() / path.name, path.resolve()}:
        for folder in place.parents:
            if why := _why_kept(folder):
                raise UsageError(f"{path} lies in {folder}, which {why}. Name a file elsewhere.")
        # Hidden files next to experiments, runs and caches.
        sealed = (file for name in _SEALED for file in place.parent.glob(f"*/{name}"))
        if place.name.startswith(".") and any(map(_is_sealed, sealed)):
            raise UsageError(f"{path} is a file that prefcache keeps for itself. Name another.")


def is_stream(path: Path) -> bool:
    """Whether this is written into and not replaced: a pipe, a device, an open file."""
    if not path.exists() or path.is_dir():
        return False
    return not path.is_file() or _OPENED.fullmatch(str(path)) is not None


def write_bytes(path: Path, data: bytes) -> None:
    with open_stream(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[artifact.Stream]:
    """Open a file that appears whole or not at all; write into pipes and devices directly."""
    if not is_stream(path):
        with artifact.commit_stream(path) as stream:
            yield stream
        return
    with open(path, "ab") as file:
        yield artifact.Stream(file)


# -- files of prefcache ----------------------------------------------------------------------------------------------


def _why_kept(folder: Path) -> str | None:
    if folder.name == ".standalone" or folder.name.startswith(".parts-"):
        return "is a working folder of prefcache"
    if folder.name == "stdin" and (folder.parent / "prepared").is_dir():
        return "keeps what prepare read from standard input"
    if folder.name == "prepared" and any(folder.glob(".parts-*")):
        return "is being prepared"
    return next((why for name, why in _SEALED.items() if _is_sealed(folder / name)), None)


def _is_sealed(file: Path) -> bool:
    """Whether prefcache wrote the file, whole or damaged."""
    try:
        return file.is_file() and artifact.SEAL.encode() in file.read_bytes()
    except OSError:
        return False


# -- files of the user -----------------------------------------------------------------------------------------------


def _name_owner(path: Path, inputs: Inputs) -> str | None:
    """What an existing file is to the user; None if it may be replaced."""
    if _is_any(path, inputs.files):
        return "read by this command"
    if any(_is_data(path, name) for name in inputs.data):
        return "data that this command reads (prepare.data)"
    experiments = [manifest.parent.parent for manifest in Path("runs").glob("*/prepared/*.json")]
    for experiment in dict.fromkeys([*([inputs.experiment] if inputs.experiment else []), *experiments]):
        if _is_any(path, _find_data(experiment)):
            return f"data that {experiment} was made from"
    # Only files directly in a model's folder are the model's: a project may lie in one, with folders of its own.
    folders = [path.parent, path.resolve().parent]
    if any(folder.samefile(model) for folder in folders for model in inputs.folders) or any(map(_is_model, folders)):
        return "a file of a model"
    return None


def _is_any(path: Path, files: Iterable[Path]) -> bool:
    """Whether the path leads to one of these files, under this name or another."""
    return path.exists() and any(file.exists() and path.samefile(file) for file in files)


def _is_data(path: Path, name: str) -> bool:
    if not Path(name).is_dir():
        found = [Path(name)] if Path(name).exists() else [Path(match) for match in glob.glob(name, recursive=True)]  # noqa: PTH207
        return _is_any(path, found)
    if path.exists() and path.resolve().is_relative_to(Path(name).resolve()):
        return True
    is_linked = path.exists() and path.stat().st_nlink > 1
    return is_linked and _is_any(path, (Path(root, file) for root, _, files in os.walk(name) for file in files))


def _find_data(experiment: Path) -> Iterator[Path]:
    """Yield the files that an experiment was prepared from, as its manifest names them."""
    try:
        manifest = PreparedManifest.find(experiment / "prepared")
    except IntegrityError:
        return
    entries = [entry for source in manifest.inputs.data for entry in source] if manifest else []
    names = [entry["file"] for entry in entries if isinstance(entry.get("file"), str)]
    images = read_stamps(experiment / "prepared", manifest.image_files) if manifest else []
    for name in chain(names, (stamp.path for stamp in images)):
        yield from candidate_places(name, experiment / "prepared")


def _is_model(folder: Path) -> bool:
    if (folder / "adapter_config.json").exists():
        return True
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
