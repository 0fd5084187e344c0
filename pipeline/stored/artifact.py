"""How a file gets to disk, and how it is verified later.

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
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from safetensors import SafetensorError

from prefcache.pipeline import stored_paths
from prefcache.pipeline.cache_place import explain_mirror
from prefcache.pipeline.errors import IntegrityError, ResourceError, UsageError
from prefcache.pipeline.progress import counting

MANIFEST = "manifest.json"
SEAL = "seal_xxh3_128"
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HOST = socket.gethostname().replace("-", "_")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if isinstance(error, SafetensorError):
            match = re.search(r"os error (\d+)", str(error))
            code = int(match[1]) if match else None
        if code in _FULL_DISK:
            raise ResourceError(
                f"{path}: the disk is full ({os.strerror(code)}). Finished work is kept: free some space, then run the same "
                f"command again.{explain_mirror(path)}"
            ) from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UsageError(
                f"{path}: cannot be written ({os.strerror(code)}). Name a folder that you may write to.{explain_mirror(path)}"
            ) from error
        raise


def refuse_unwritable(path: Path) -> None:
    """Raise UsageError if no file could be written at `path`. Call it before long work."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Name a file for what is written.")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        # Permissions alone do not tell: a file system may be read-only, or not take such files.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({folder}: {error.strerror}). Name a folder that you may write to."
        ) from None


# The name of a temporary of any machine: hidden, with the process that writes it.
TEMPORARY = re.compile(r"\..+\.[^-]+-[0-9]+\.tmp", re.DOTALL)


def temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Stream:
    """A file that is being written; its bytes are counted and hashed as they pass."""

    closed = False
    is_first = True  # False where another writer won the name

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
def commit_stream(path: Path, *, once: bool = False, durable: bool = True) -> Iterator[Stream]:
    """Write to the yielded stream, of any length; it appears at `path` whole, or not at all.

    With `once` the first writer wins, and `is_first` of the stream says whether it was this one. If not `durable`, do not
    wait for the disk: for files that a checksum verifies and that can be made again.
    """
    temporary = temporary_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                stream = Stream(file)
                yield stream
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            if once:
                # A hard link, unlike a rename, fails where the name is taken.
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    stream.is_first = False
            else:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if durable:
            sync_folder(path.parent)


def commit_bytes(path: Path, data: bytes | memoryview, *, once: bool = False, durable: bool = True) -> bool:
    """Write `data` to `path`, whole or not at all; return whether this writer was first. See commit_stream."""
    with commit_stream(path, once=once, durable=durable) as stream:
        stream.write(data)
    return stream.is_first


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder next to `path`, deleted after the block; if the process dies in it, by `remove_leftovers`."""
    temporary = temporary_path(path)
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def commit_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Fill the yielded folder; it appears at `path` complete, replacing what was there, or not at all.

    Without `replace`, UsageError if something has appeared at `path` meanwhile.
    """
    with scratch_folder(path) as temporary:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
            else:
                sync_folder(file)
        sync_folder(temporary)
        if os.path.lexists(path):
            if not replace:
                raise UsageError(
                    f"{path} has appeared meanwhile, and is not replaced. Name another place, or delete it."
                )
            remove_folder(path)
        os.replace(temporary, path)
        sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder; if it is a link, only the link: its target may be somebody else's."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def discard(path: Path) -> None:
    """Delete a file or folder that counts as whole or as gone, however far this gets: a folder becomes a temporary first."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def find_leftovers(folder: Path) -> list[Path]:
    """List the temporaries below `folder` of this machine's processes that have ended."""
    if not Path("/proc/self").exists():
        return []
    own = filter(is_own_temporary, find_temporaries(folder))
    return [path for path in own if not Path(f"/proc/{_process(path)}").exists()]


def find_temporaries(folder: Path) -> list[Path]:
    """List the temporaries below `folder` of any machine's processes."""
    return sorted(path for path in folder.rglob(".*.tmp") if TEMPORARY.fullmatch(path.name))


def is_own_temporary(path: Path) -> bool:
    """Whether a process of this machine wrote the temporary."""
    return path.name.endswith(f".{_HOST}-{_process(path)}.tmp")


def _process(temporary: Path) -> str:
    return temporary.name.removesuffix(".tmp").rpartition("-")[2]


def remove_leftovers(folder: Path) -> None:
    """Delete the temporaries of this machine's processes that have ended."""
    for path in find_leftovers(folder):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# -- checksums and sealed JSON ---------------------------------------------------------------------------------------


def checksum_bytes(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file, counting(f"read {path.name}", path.stat().st_size, "bytes") as counter:
        while block := file.read(1 << 22):
            digest.update(block)
            counter.add(len(block))
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def seal(content: dict[str, Any]) -> bytes:
    """Write `content` as readable JSON with a checksum of itself."""
    assert SEAL not in content
    sealed = {**content, SEAL: checksum_bytes(canonical_json(content))}
    return json.dumps(sealed, indent=1, ensure_ascii=False).encode() + b"\n"


def unseal(path: Path, remedy: str = "") -> dict[str, Any]:
    """Read the content of a sealed JSON file; IntegrityError, with the remedy, if it is not as it was written."""
    try:
        # Opening a named pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _unreadable(path, "is not a regular file", remedy)
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}", remedy) from error
    return unseal_bytes(data, path, remedy)


def unseal_bytes(data: bytes, path: Path, remedy: str = "") -> dict[str, Any]:
    """Read the content of a sealed file; `path` says in errors where it came from."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, "is not JSON", remedy) from error
    if not isinstance(content, dict):
        raise _unreadable(path, "is not a JSON object", remedy)
    if SEAL not in content:
        raise _unreadable(path, "has no checksum", remedy)
    expected = content.pop(SEAL)
    try:
        found = checksum_bytes(canonical_json(content))
    except (ValueError, RecursionError) as error:  # such as half a surrogate pair
        raise _unreadable(path, "is not JSON as it is written here", remedy) from error
    if found != expected:
        raise IntegrityError(
            f"{path} does not match its own checksum: it was changed after it was written. {remedy}".strip()
        )
    return content


def _unreadable(path: Path, reason: str, remedy: str) -> IntegrityError:
    return IntegrityError(f"{path} {reason}. {remedy}".strip())


# -- files that a manifest vouches for -------------------------------------------------------------------------------


def commit_file(path: Path, data: bytes | memoryview, *, durable: bool = True, **facts: Any) -> dict[str, Any]:
    """Commit `data` and return the entry with which a manifest or a record vouches for it."""
    commit_bytes(path, data, durable=durable)
    return {"file": path.name, "bytes": len(data), "xxh3_128": checksum_bytes(data), **facts}


def describe(path: Path) -> dict[str, Any]:
    """Make the entry of a file that another library wrote."""
    return {"file": path.name, "bytes": path.stat().st_size, "xxh3_128": checksum(path)}


class Vouched(Protocol):
    """What a manifest or a record says about a file."""

    @property
    def file(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def xxh3_128(self) -> str: ...


def damage(folder: Path, entry: Vouched, *, every_byte: bool = True) -> str | None:
    """What is wrong with the file of a manifest entry; None if it is as it was written, or else at least of the size."""
    path = folder / entry.file
    if not is_inside(folder, entry.file):
        return "is not a file of its folder, or is a link that leads out of it"
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"has {size} bytes, {entry.bytes} were written"
        return (
            None
            if not every_byte or checksum(path) == entry.xxh3_128
            else "has other bytes than were written (checksum)"
        )
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def is_inside(folder: Path, name: str) -> bool:
    """Whether a file of this name is in the folder itself, and not where a path or a symbolic link leads."""
    # Only a link can lead out; resolving every file would cost more than checking for one.
    path = folder / name
    return stored_paths.is_bare(name) and (not path.is_symlink() or path.resolve().parent == folder.resolve())


def member(folder: Path, name: str) -> Path:
    """The path of a file that is about to be written or deleted; IntegrityError if it would not be in the folder."""
    if not is_inside(folder, name):
        raise IntegrityError(
            f"{folder / name} is not a file of {folder}: nothing outside of that folder is written or deleted. Find out "
            "who made it, and remove it."
        )
    return folder / name


def retract_manifest(folder: Path) -> None:
    """Delete a manifest that no longer holds, so that make runs the stage again."""
    (folder / MANIFEST).unlink(missing_ok=True)


def touch_manifest(folder: Path) -> None:
    """Tell make that the manifest is up to date: the times of inputs have changed, not their content."""
    os.utime(folder / MANIFEST)


def commit_make_inputs(folder: Path, paths: Iterable[Path | str]) -> None:
    """Tell make what the manifest was made from; an input that vanishes is reported by the stage, not by make."""
    # Most other characters mean something to make; only the stage follows an input with such a name.
    inputs = sorted({str(path) for path in paths if re.fullmatch(r"[\w./+,@~-]+", str(path))})
    lines = [f"{folder / MANIFEST}: {path}\n{path}:\n" for path in inputs]
    commit_bytes(folder / "inputs.mk", "".join(lines).encode())


# -- tables as bytes -------------------------------------------------------------------------------------------------


def arrow_stream(table: pa.Table) -> memoryview:
    """Write the stream format, which `datasets` memory-maps."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def open_arrow_stream(path: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def parquet(table: pa.Table, *, float_lists: Iterable[str] = (), rows_per_group: int | None = None) -> memoryview:
    """Write Parquet with zstd and page checksums; float lists byte-split, so that they compress."""
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
        row_group_size=rows_per_group,
    )
    return memoryview(sink.getvalue())
