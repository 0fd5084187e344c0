"""Kill a process at any of its steps on the disk."""

import os
import signal
from collections.abc import Callable

from prefcache.pipeline.stored import artifact

STEPS = {artifact.Stream: ["write"], os: ["fsync", "link", "replace", "unlink"]}


def killed_at(step: int, act: Callable[[], None]) -> bool:
    """Run `act` in a process that is killed at its n-th step on the disk; whether it came to that.

    Even steps are just before one, odd ones just after it; a write is killed when half of it is done.
    """
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
        return os.WIFSIGNALED(status)
    code = 1
    try:
        _die_at(step)
        act()
        code = 0
    finally:
        os._exit(code)


def _die_at(step: int) -> None:
    count = 0

    def reached(n: int) -> None:
        nonlocal count
        for _ in range(n):
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    def dying(call):
        def instead(*arguments, **options):
            reached(1)
            if call.__name__ == "write" and count == step:
                stream, data = arguments
                call(stream, memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
                stream.flush()
                reached(1)
            result = call(*arguments, **options)
            reached(1)
            return result

        return instead

    for module, names in STEPS.items():
        for name in names:
            setattr(module, name, dying(getattr(module, name)))
