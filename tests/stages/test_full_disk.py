"""Wherever a disk is full, the command ends with exit code 6, and run again it ends as if nothing had been."""

import hashlib
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from prefcache.pipeline.errors import ResourceError
from prefcache.pipeline.stored import artifact
from tests.helpers.processes import read_stderr, start_process
from tests.helpers.project import invoke, write_config, write_pairs

# -- every writer ----------------------------------------------------------------------------------------------------

DATA = b"x" * 9000


def stream(path: Path) -> None:
    with artifact.commit_stream(path) as written:
        written.write(DATA)


def folder(path: Path) -> None:
    with artifact.commit_folder(path) as temporary:
        (temporary / "big").write_bytes(DATA)


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: artifact.commit_bytes(path, DATA),
    "bytes once": lambda path: artifact.commit_bytes(path, DATA, once=True),
    "bytes that may be lost": lambda path: artifact.commit_bytes(path, DATA, durable=False),
    "file": lambda path: artifact.commit_file(path, DATA),
    "stream": stream,
    "folder": folder,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside Arrow's threads, which are idle
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_a_resource_error_and_keeps_what_was_there(tmp_path, writer):
    path, report = tmp_path / "there" / "a", tmp_path / "report"
    path.parent.mkdir()
    path.write_bytes(b"old") if writer != "folder" else path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    else:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            WRITERS[writer](path)
        except ResourceError as error:
            report.write_text(str(error))
            os._exit(0)
        finally:
            os._exit(1)
    assert f"{path}: the disk is full" in report.read_text()
    assert "run the same command again" in report.read_text()
    report.unlink()
    assert sorted(tmp_path.rglob("*")) == before and (path.is_dir() or path.read_bytes() == b"old")


# -- every stage -----------------------------------------------------------------------------------------------------


# What says that something is finished.
FINISHED = {
    "prepare": ("runs/tiny/prepared/manifest.json", "runs/tiny/prepared/.parts-*/part-*.json"),
    "score": ("runs/tiny/scored/manifest.json", "cache/*/[0-9a-f]*.json"),
    "train": ("runs/tiny/trained/manifest.json", "runs/tiny/trained/checkpoints/*/manifest.json"),
}
STAGES = tuple(FINISHED)


@pytest.fixture(scope="module")
def made(tmp_path_factory, model) -> dict[str, Path]:
    """The folder before each stage, and `whole` after all of them."""
    root = tmp_path_factory.mktemp("disk")
    at = root / "prepare"
    (at / "data").mkdir(parents=True)
    for n in range(4):
        write_pairs(at / f"data/{n}.jsonl", 60, start=60 * n)
    (at / "config.yaml").write_text(
        write_config(at, model, epochs=0.2, samples=0).read_text().replace("data: pairs.jsonl", "data: data")
    )
    found = {}
    for stage, after in zip(STAGES, (*STAGES[1:], "whole"), strict=True):
        found[stage], found[after] = root / stage, root / after
        shutil.copytree(root / stage, root / after)
        invoke(root / after, stage, "config.yaml")
    return found


def contents(root: Path) -> dict[str, str]:
    """What the stages have made, byte for byte."""
    names = ("runs/tiny/prepared/*.arrow", "runs/tiny/prepared/*.parquet", "cache/*/*", "runs/tiny/trained/model/*")
    files = (path for name in names for path in root.glob(name) if not path.name.startswith("."))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("stage", "most_bytes", "n_finished"),
    [
        pytest.param("prepare", 8_000, 0, marks=pytest.mark.slow),  # in a part, which a worker writes
        ("prepare", 80_000, 4),  # in a shard, of all the parts
        ("score", 2_000, 0),  # in a shard, before its record
        ("train", 150_000, 0),  # in a checkpoint: the optimizer's state is larger
    ],
)
def test_a_full_disk_ends_with_exit_code_6_and_a_clean_resume(made, tmp_path, stage, most_bytes, n_finished):
    root = Path(shutil.copytree(made[stage], tmp_path / "here"))
    settings = ["--set", "prepare.workers=2"] if stage == "prepare" else []
    process = start_process(root, stage, "config.yaml", *settings, most_bytes=most_bytes)
    process.join()
    told = read_stderr(root, process)
    assert process.exitcode == 6, told
    assert "the disk is full" in told and "run the same command again" in told and "Traceback" not in told
    assert len([path for name in FINISHED[stage] for path in root.glob(name)]) == n_finished
    for each in STAGES[STAGES.index(stage) :]:
        invoke(root, each, "config.yaml")
    assert contents(root) == contents(made["whole"])
    assert not [path for path in root.rglob(".*") if path.name.endswith(".tmp")]
