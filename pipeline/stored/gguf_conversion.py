"""Convert the GGUF files that a config names, each once, into a folder of the cache."""

import contextlib
from pathlib import Path

from prefcache.pipeline import gguf_files
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import PrefcacheError
from prefcache.pipeline.gguf_files import CONVERTED, NOTE, Note
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.safetensors_files import hash_file, stamp_file
from prefcache.pipeline.stored import artifact, claims


def convert_models(config: Config, progress: Progress) -> None:
    """Convert what `model` and `train.model` name, where they name GGUF files that the cache lacks."""
    for name in dict.fromkeys((config.model, config.train.model)):
        if name is not None and gguf_files.is_gguf(name):
            _convert(Path(name), config.cache_folder / CONVERTED, progress)


def _convert(file: Path, root: Path, progress: Progress) -> None:
    found = gguf_files.find_converted(file, root.parent)
    if found is None:
        root.mkdir(parents=True, exist_ok=True)
        with claims.claim(claims.claim_path(root, "convert"), wait=True):
            artifact.remove_leftovers(root)
            # Another process may have converted it meanwhile.
            found = gguf_files.find_converted(file, root.parent)
            if found is None:
                _write_folder(file, root, progress)
                return
    folder, note = found
    if (stamp := stamp_file(file)) not in note.stamps:
        # A cache that is only read from costs a hash of the file in every command.
        with contextlib.suppress(OSError, PrefcacheError):
            _commit_note(folder, note.model_copy(update={"stamps": [*note.stamps, stamp]}))


def _write_folder(file: Path, root: Path, progress: Progress) -> None:
    sha256 = hash_file(file)
    folder = root / f"{file.stem}-{sha256[:12]}"
    progress.say(f"model: {file} is converted once, into float32 safetensors in {folder}")
    with artifact.commit_folder(folder) as temporary:
        gguf_files.write_model(file, temporary)
        n_bytes = file.stat().st_size
        note = Note(file=str(file), n_bytes=n_bytes, sha256=sha256, stamps=[stamp_file(file)])
        _commit_note(temporary, note)
        n_written = sum(each.stat().st_size for each in temporary.iterdir())
    progress.say(f"model: converted, {n_written / 1e6:,.0f} MB on disk")


def _commit_note(folder: Path, note: Note) -> None:
    artifact.commit_bytes(folder / NOTE, note.model_dump_json(indent=1).encode() + b"\n")
