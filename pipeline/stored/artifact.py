"""How a file gets to disk, and how it is believed later.

Commit protocol, everywhere: a temporary name in the same folder, fsync, rename, fsync the folder; the record or
manifest that vouches for the files the same way, last. JSON that vouches for something carries its own checksum.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from safetensors import SafetensorError

from pipeline.errors import IntegrityError, ResourceError, UsageError

MANIFEST = "manifest.json"
_SEAL = "seal_xxh3_128"
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HOST = socket.gethostname().replace("-", "_")


def _full(path: Path, reason: str) -> ResourceError:
    return ResourceError(
        f"{path}: the disk took no more ({reason}). What was finished is kept: make room, then run the same command again."
    )


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None or int(code[1]) not in _FULL_DISK:
            raise
        raise _full(path, os.strerror(int(code[1]))) from error
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise _full(path, str(error.strerror)) from error
        if isinstance(error, PermissionError) or error.errno in (errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UsageError(
                f"{path}: cannot be written ({error.strerror}). Name a folder that you may write to."
            ) from error
        raise


def refuse_unwritable(path: Path) -> None:
    """A file that could not be written at `path`; for who has much to do before it is."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Name a file for what is written.")
    at = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        # Rights alone do not tell: a file system may be read-only, or not one for files of ours.
        tempfile.TemporaryFile(dir=at).close()
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({at}: {error.strerror}). Name a folder that you may write to."
        ) from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes | memoryview, durable: bool = True) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def commit_bytes(path: Path, data: bytes | memoryview, *, once: bool = False, durable: bool = True) -> bool:
    """Put `data` at `path`, whole or not at all. With `once` the first writer wins; returns whether it was this one.

    Not `durable`, it does not wait for the disk: for what a checksum vouches for and what can be made again.
    """
    temporary = _temporary(path)
    won = True
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_synced(temporary, data, durable)
            if once:
                # A hard link, unlike a rename, fails where the name is taken.
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    won = False
            else:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if durable:
            _sync_folder(path.parent)
    return won


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is gone after the block; if the process dies in it, `remove_leftovers` deletes it."""
    temporary = _temporary(path)
    with _disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def commit_folder(path: Path) -> Iterator[Path]:
    """Fill the yielded folder; it appears at `path` complete, in place of what was there, or not at all."""
    with scratch_folder(path) as temporary:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
            else:
                _sync_folder(file)
        _sync_folder(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete temporaries of processes of this machine that are gone."""
    for path in list(folder.rglob(f".*.{_HOST}-*.tmp")):
        process = path.name.removesuffix(".tmp").rpartition("-")[2]
        if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# -- checksums and sealed JSON ---------------------------------------------------------------------------------------


def checksum_bytes(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def seal(content: dict[str, Any]) -> bytes:
    """`content` as readable JSON that carries a checksum of itself."""
    assert _SEAL not in content
    sealed = {**content, _SEAL: checksum_bytes(canonical_json(content))}
    return json.dumps(sealed, indent=1, ensure_ascii=False).encode() + b"\n"


def unseal(path: Path, remedy: str = "") -> dict[str, Any]:
    """The content of a sealed JSON file, or IntegrityError with what to do about it."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        expected = content.pop(_SEAL)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise IntegrityError(f"{path} cannot be read as a sealed JSON record ({error}). {remedy}".strip()) from error
    if checksum_bytes(canonical_json(content)) != expected:
        raise IntegrityError(
            f"{path} does not match its own checksum: it was changed after it was written. {remedy}".strip()
        )
    return content


# -- files that a manifest vouches for -------------------------------------------------------------------------------


def commit_file(path: Path, data: bytes | memoryview, *, durable: bool = True, **facts: Any) -> dict[str, Any]:
    """Commit `data` and return the entry with which a manifest or a record vouches for it."""
    commit_bytes(path, data, durable=durable)
    return {"file": path.name, "bytes": len(data), "xxh3_128": checksum_bytes(data), **facts}


class Stream:
    """A file while it is written: what it holds so far is hashed and counted."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file, self._digest, self.n_bytes = file, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        block = memoryview(data)
        self._file.write(block)
        self._digest.update(block)
        self.n_bytes += block.nbytes
        return block.nbytes

    def flush(self) -> None:
        self._file.flush()

    def entry(self, path: Path, **facts: Any) -> dict[str, Any]:
        return {"file": path.name, "bytes": self.n_bytes, "xxh3_128": self._digest.hexdigest(), **facts}


@contextlib.contextmanager
def commit_stream(path: Path) -> Iterator[Stream]:
    """Write to the yielded stream, which is in memory at no time; it appears at `path` whole, or not at all."""
    temporary = _temporary(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield Stream(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def describe(path: Path) -> dict[str, Any]:
    """The entry of a file that another library wrote."""
    return {"file": path.name, "bytes": path.stat().st_size, "xxh3_128": checksum(path)}


def damage(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with the file of a manifest entry; None when it is as it was written."""
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"has {size} bytes, {entry['bytes']} were written"
        return None if checksum(path) == entry["xxh3_128"] else "has other bytes than were written (checksum)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def commit_manifest(folder: Path, content: dict[str, Any]) -> None:
    commit_bytes(folder / MANIFEST, seal(content))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage, or None where the stage has not finished."""
    path = folder / MANIFEST
    return unseal(path, f"Delete {path} and run the stage again.") if path.exists() else None


def retract_manifest(folder: Path) -> None:
    """Take back what a manifest vouched for and no longer can, so that make runs the stage again."""
    (folder / MANIFEST).unlink(missing_ok=True)


def touch_manifest(folder: Path) -> None:
    """Tell make that the manifest is up to date with inputs whose times changed but whose content did not."""
    os.utime(folder / MANIFEST)


def commit_make_inputs(folder: Path, paths: Iterable[Path | str]) -> None:
    """Tell make what the manifest was made from. An input that vanishes is no error of make's: the stage reports it."""
    # Make gives meaning to most other characters; an input of such a name is left to the stage.
    inputs = sorted({str(path) for path in paths if re.fullmatch(r"[\w./+,@~-]+", str(path))})
    lines = [f"{folder / MANIFEST}: {path}\n{path}:\n" for path in inputs]
    commit_bytes(folder / "inputs.mk", "".join(lines).encode())


# -- tables as bytes -------------------------------------------------------------------------------------------------


def arrow_stream(table: pa.Table) -> memoryview:
    """The stream format, which `datasets` memory-maps."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def open_arrow_stream(path: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def parquet(table: pa.Table, *, float_lists: Iterable[str] = ()) -> memoryview:
    """zstd with page checksums; float lists byte-split, which is what makes them compress."""
    split = [f"{name}.list.element" for name in float_lists]
    plain = [name for name in table.schema.names if name not in set(float_lists)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=[name for name in plain if table.schema.field(name).type == pa.string()],
        use_byte_stream_split=split or False,
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue())
