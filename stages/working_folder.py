"""Where `prefcache score --input` works: it has no config, and so no `out`."""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from prefcache.pipeline import process_pool
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import DataError, UsageError
from prefcache.pipeline.preparing.sources import refuse_undecodable
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored import artifact, claims

_SECONDS_UNUSED = 7 * 24 * 3600.0


@contextlib.contextmanager
def keep_working_folder(config: Config, progress: Progress) -> Iterator[Config]:
    """Yield the config with a working folder in place of `out`, which is used again by the same command.

    It lies in the cache, under a name that stands for data, model and how they are prepared: the same command finds it
    again and prepares nothing, and changed data replaces the old. A folder that was not used for a week is removed. A
    second command with the same name waits, because what they prepare may differ, as from standard input.
    """
    if process_pool.rank_and_world()[1] > 1:
        raise UsageError(
            "WORLD_SIZE is set, but --input runs in one process. For several, prepare and score with a config, then "
            "`prefcache export`."
        )
    job = [
        str(Path.cwd()),
        config.model,
        config.adapter,
        config.prepare.model_dump(mode="json", exclude=config.prepare.NEUTRAL),
    ]
    for source in config.prepare.sources:
        refuse_undecodable(source.path or "")
    root = config.cache_folder / ".standalone"
    folder = root / artifact.checksum_bytes(artifact.canonical_json(job))[:16]
    root.mkdir(parents=True, exist_ok=True)
    with _claim_alone(folder, progress):
        folder.mkdir(exist_ok=True)
        os.utime(folder)
        _remove_unused(root)
        yield config.model_copy(update={"out": str(folder)})


@contextlib.contextmanager
def use_temporary_folder(config: Config) -> Iterator[Config]:
    """Yield the config with an `out` that is removed afterwards, for a dry run, which changes nothing."""
    folder = tempfile.mkdtemp(prefix="prefcache-")
    try:
        yield config.model_copy(update={"out": folder})
    except DataError:
        raise  # it names the quarantine in the folder
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


@contextlib.contextmanager
def _claim_alone(folder: Path, progress: Progress) -> Iterator[None]:
    claim = claims.claim_path(folder.parent, folder.name)
    with claims.claim(claim, wait=False) as is_mine:
        if is_mine:
            yield
            return
    progress.say("score: waits for another command that scores the same --input")
    with claims.claim(claim, wait=True):
        yield


def _remove_unused(root: Path) -> None:
    if root.is_symlink():
        return
    for folder in root.iterdir():
        if not re.fullmatch(r"[0-9a-f]{16}", folder.name) or folder.is_symlink():
            continue
        with (
            contextlib.suppress(FileNotFoundError),
            claims.claim(claims.claim_path(root, folder.name), wait=False) as is_free,
        ):
            if is_free and folder.stat().st_mtime < time.time() - _SECONDS_UNUSED:
                shutil.rmtree(folder, ignore_errors=True)
