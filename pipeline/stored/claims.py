"""Claims: which of several processes does a piece of work, so that no other starts it too.

A claim is a lock on a hidden file, which the kernel releases when its process ends, however it ends. Nothing depends on
it for correctness: where the file system has no locks, everyone gets every claim.

`claim` is for one process: a chunk of the cache, a gc. `claim_stage` is for a stage on its folder. It refuses a
second process with a sentence that names the first, unless both do the same job and share it by design:

- prepare: the processes of one launch (WORLD_SIZE above 1), which divide the parts among them;
- score: scorers of the same data, reference and settings, launched together or started by hand, since they share the
  chunks through the claims in the cache. Others would overwrite each other's scored/manifest.json;
- train: the main process claims the run's folder for all processes of its launch.

Processes of one job hold the lock shared. Entering and leaving happen one at a time, under a second lock: whoever then
gets the first lock exclusively is alone, and what the file says about others is out of date.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefcache.pipeline.errors import UsageError

SUFFIX = ".claim"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def claim_path(folder: Path, name: str) -> Path:
    return folder / f".{name}{SUFFIX}"


@contextlib.contextmanager
def claim(path: Path, *, wait: bool) -> Iterator[bool]:
    """Yield whether this process has the claim, until the block ends. With `wait`, wait for whoever has it now."""
    descriptor = _lock(path, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # Before the lock is released: afterwards the file may be another's claim.
            path.unlink(missing_ok=True)
            os.close(descriptor)


def remove_free(folder: Path) -> int:
    """Delete the claim files that no process holds, left by killed processes; return how many."""
    n_removed = 0
    for path in folder.glob(f".*{SUFFIX}"):
        if path.is_file():
            with claim(path, wait=False) as is_free:
                n_removed += is_free
    return n_removed


def _lock(path: Path, wait: bool) -> int | None:
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        # The holder has removed the file meanwhile: this lock is on a file that no other process can open.
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open or create the file of a claim; UsageError if it is a link, since its target is not ours to write."""
    link = UsageError(f"{path} is a link, where a command notes that it is at work. Remove it.")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise link if error.errno == errno.ELOOP else error from None
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
        os.close(descriptor)
        raise link
    return descriptor


# -- stages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    """The process that claimed a stage first, as it described itself."""

    pid: int
    host: str
    job: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def claim_stage(folder: Path, stage: str, remedy: str, job: str | None = None) -> Iterator[None]:
    """Keep others from `stage` on `folder` until the block ends; UsageError if another process has it.

    Processes with the same `job`, a word without blanks, share the claim. `remedy` says what to do instead of waiting.
    """
    if not folder.is_dir():  # nothing to protect; the stage says so
        yield
        return
    path = claim_path(folder, stage)
    me = Holder(os.getpid(), _to_word(socket.gethostname()), _to_word(job) if job else "-")
    with _entry(path):
        descriptor = _enter(path, me)
        other = _read_holder(path) if descriptor is None else None
    if descriptor is None:
        raise UsageError(
            f"Another {stage.partition('-')[0]} is at work on {folder} ({other or 'its process did not say which it is'}). "
            f"Wait for it, stop it, or {remedy}."
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError), _entry(path):
            if _try_lock(descriptor, fcntl.LOCK_EX):
                path.unlink(missing_ok=True)
        os.close(descriptor)


def find_holders(folder: Path, stage: str) -> list[tuple[Path, Holder | None]]:
    """The claims on a stage, or on a `stage-NAME`, that a living process has."""
    held = []
    for path in sorted([*folder.glob(f".{stage}{SUFFIX}"), *folder.glob(f".{stage}-*{SUFFIX}")]):
        try:
            with _entry(path):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if not _try_lock(descriptor, fcntl.LOCK_EX):
                        held.append((path, _read_holder(path)))
                finally:
                    os.close(descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
    return held


def probe_holder(folder: Path, stage: str) -> Holder | None:
    """Return who is at work on a stage, without writing anything: for commands that only look.

    A process of this machine that has ended holds nothing, so that the lock, which a starting stage needs, is tried rarely.
    """
    path = claim_path(folder, stage)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        holder = _read_holder(path)
        if holder and holder.host == _to_word(socket.gethostname()) and not _may_live(holder.pid):
            return None
        return None if _try_lock(descriptor, fcntl.LOCK_EX) else holder or Holder(0, "?", "-")
    finally:
        os.close(descriptor)


def _may_live(pid: int) -> bool:
    return not Path("/proc/self").exists() or Path(f"/proc/{pid}").exists()


def _entry(path: Path) -> contextlib.AbstractContextManager[bool]:
    """The second lock, held while a process enters or leaves."""
    return claim(path.with_name(f"{path.name}.entry"), wait=True)


def _enter(path: Path, me: Holder) -> int | None:
    """Lock the claim, alone or together with others of the same job; None if others have it."""
    descriptor = _open(path)
    is_mine = False
    try:
        if _try_lock(descriptor, fcntl.LOCK_EX):
            # The holder's name only serves an error message: a full disk must not end the stage here.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{me.pid} {me.host} {me.job}\n".encode(), 0)
            _try_lock(descriptor, fcntl.LOCK_SH)
            is_mine = True
        elif me.job != "-" and (other := _read_holder(path)) is not None and other.job == me.job:
            is_mine = _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        if not is_mine:
            os.close(descriptor)
    return descriptor if is_mine else None


def _try_lock(descriptor: int, kind: int) -> bool:
    """Return whether the lock could be had without waiting; on a file system without locks, always True."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _read_holder(path: Path) -> Holder | None:
    try:
        match = re.fullmatch(rb"(\d{1,20}) (\S{1,255}) (\S{1,255})\n", path.read_bytes()[:1024])
    except OSError:
        return None
    if match is None:
        return None
    return Holder(int(match[1]), match[2].decode(errors="replace"), match[3].decode(errors="replace"))


def _to_word(text: str) -> str:
    return re.sub(r"\s", "_", text)[:255] or "-"
