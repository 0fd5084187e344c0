"""A model in a GGUF file, and the folder of safetensors that it is converted into once.

The folder lies in the cache, under a name with the hash of the file, and notes the file's stamps: by one of these the
file is recognized without reading it. Here a folder is only found; stored/gguf_conversion.py makes it.
"""

import contextlib
import functools
import importlib.util
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.progress import working
from prefcache.pipeline.safetensors_files import hash_file, shorten_list, stamp_file

SUFFIX = ".gguf"
CONVERTED = ".gguf"  # folder of the cache that holds the converted models
NOTE = "gguf.json"
_MAGIC = b"GGUF"


class Note(BaseModel):
    """What a converted folder was made from."""

    model_config = ConfigDict(frozen=True, strict=True)

    version: Literal[1] = 1
    file: str
    n_bytes: int
    sha256: str
    stamps: list[str]  # each path and state in which the file was recognized


def is_gguf(name: str | Path) -> bool:
    """Whether a config names a GGUF file as its model."""
    return Path(name).suffix.lower() == SUFFIX and not Path(name).is_dir()


def find_converted(file: Path, cache: Path) -> tuple[Path, Note] | None:
    """Return the folder into which this file was converted, and its note; None if it was not."""
    _refuse_other(file)
    stamp, notes = stamp_file(file), {}
    for path in sorted((cache / CONVERTED).glob(f"*/{NOTE}")):
        try:
            notes[path.parent] = Note.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue  # converted again
    same_size = {folder: note for folder, note in notes.items() if note.n_bytes == file.stat().st_size}
    for folder, note in same_size.items():
        if stamp in note.stamps:
            return folder, note
    sha256 = hash_file(file) if same_size else None
    return next(((folder, note) for folder, note in same_size.items() if note.sha256 == sha256), None)


def _refuse_other(file: Path) -> None:
    try:
        with open(file, "rb") as opened:
            magic = opened.read(len(_MAGIC))
    except OSError as error:
        raise UsageError(f"model {file} cannot be read: {error.strerror}. Expected a GGUF file on this disk.") from None
    if magic != _MAGIC:
        raise UsageError(f"{file} is not a GGUF file: it begins with {magic!r}, expected {_MAGIC!r}. Fetch it again.")


# -- reading with Transformers ---------------------------------------------------------------------------------------


def describe(file: Path) -> Path:
    """Return a temporary folder with the model's config and tokenizer, for commands that need no weights."""
    return Path(_describe(file, stamp_file(file)).name)


@functools.lru_cache(maxsize=4)
def _describe(file: Path, stamp: str) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="prefcache-gguf-")  # deleted when the process ends
    with _read_alone(file) as source:
        from transformers import AutoConfig

        name, file_name = source["pretrained_model_name_or_path"], source["gguf_file"]
        config = AutoConfig.from_pretrained(name, gguf_file=file_name, trust_remote_code=False)
        _save_config(config, Path(folder.name))
        _save_tokenizer(source, Path(folder.name))
    return folder


def write_model(file: Path, folder: Path) -> None:
    """Write the model with float32 weights, its tokenizer and its chat template, as save_pretrained does."""
    with working(f"convert {file.name}"), _read_alone(file) as source:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        # Without `dequantize`, some architectures stay in blocks on a GPU, and such a model cannot be saved.
        model, info = AutoModelForCausalLM.from_pretrained(
            **source,
            trust_remote_code=False,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            device_map={"": "cpu"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info[what]:
                found = shorten_list({str(each) for each in info[what]})
                raise ValueError(f"{type(model).__name__} has {what.replace('_', ' ')}: {found}")
        _drop_own_name(model.config)
        model.save_pretrained(folder)
        _save_tokenizer(source, folder)


@contextlib.contextmanager
def _read_alone(file: Path) -> Iterator[dict[str, Any]]:
    """Yield what from_pretrained takes to read this file, and no other in its folder. Errors become UsageError."""
    _refuse_other(file)
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            f"{file} is read with the package gguf, which is not installed. Install it (pip install 'prefcache[gguf]'), or "
            "name the model's own folder or hub id."
        )
    from transformers.utils import logging

    logging.set_verbosity_error()
    # Their progress bars are written to standard error whatever the verbosity.
    with tempfile.TemporaryDirectory(prefix="prefcache-gguf-") as alone, contextlib.redirect_stderr(io.StringIO()):
        (Path(alone) / "model.gguf").symlink_to(file.resolve())
        try:
            yield {
                "pretrained_model_name_or_path": alone,
                "gguf_file": "model.gguf",
                "local_files_only": True,
            }
        except Exception as error:  # Transformers and gguf raise many kinds for a broken or unknown file.
            reason = " ".join(str(error).split())[:300]
            raise UsageError(
                f"{file} does not load as a causal language model ({type(error).__name__}: {reason}). Fetch it again if it "
                "is damaged; if Transformers does not know its kind, name the model's own folder or hub id."
            ) from None


def _save_config(config: Any, folder: Path) -> None:
    _drop_own_name(config)
    config.save_pretrained(folder)


def _drop_own_name(config: Any) -> None:
    """Drop the name that the file gives itself, which would make another model_id."""
    if hasattr(config, "_model_name_or_path"):
        del config._model_name_or_path


def _save_tokenizer(source: dict[str, Any], folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(folder)
