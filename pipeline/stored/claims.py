"""Claims: which of several processes is at a piece of work, so that no other begins it too.

A claim is a lock on a hidden file, which the kernel lets go of when its process ends, however it ends. Nothing depends
on it for being right: where the file system knows no locks, everyone gets every claim.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".claim"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def path_of(folder: Path, name: str) -> Path:
    return folder / f".{name}{SUFFIX}"


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process has the claim, until the block ends. With `wait` it waits for whoever has it now."""
    descriptor = _lock(path, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # Before the lock goes: afterwards the file may be another's claim.
            path.unlink(missing_ok=True)
            os.close(descriptor)


def remove_free(folder: Path) -> int:
    """Remove the files of claims that nobody has: of processes that were killed."""
    n = 0
    for path in folder.glob(f".*{SUFFIX}"):
        with claimed(path, wait=False) as free:
            n += free
    return n


def _lock(path: Path, wait: bool) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        # Whoever had it has removed the file meanwhile: this lock is on a file that no other process can open.
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
