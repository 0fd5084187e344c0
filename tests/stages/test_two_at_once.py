"""Two processes at the same work: the second ends with the first one's name, and takes over when the first is dead."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored.claims import claim_path, claim_stage, find_holders
from tests.helpers.processes import start_process

HOLD = (
    "import sys; from pathlib import Path; from prefcache.pipeline.stored.claims import claim_stage\n"
    "with claim_stage(Path(sys.argv[1]), 'score', 'give up', sys.argv[2] or None):\n"
    "    print('in', flush=True); sys.stdin.read()\n"
)


def hold(folder: Path, job: str = "") -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder, job], text=True, **pipes)
    assert process.stdout.readline() == "in\n"
    return process


def enter(folder: Path, job: str | None = None) -> None:
    with claim_stage(folder, "score", "give up", job):
        pass


def test_the_second_is_told_who_the_first_is_and_takes_over_when_it_was_killed(tmp_path):
    first = hold(tmp_path)
    whose = rf"Another score is at work on {tmp_path} \(process {first.pid} on {socket.gethostname()}\)\. .*give up"
    with pytest.raises(UsageError, match=whose):
        enter(tmp_path)
    assert [holder.pid for _, holder in find_holders(tmp_path, "score")] == [first.pid]
    first.kill()
    first.wait()
    assert claim_path(tmp_path, "score").exists() and not find_holders(tmp_path, "score")
    enter(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_processes_of_one_job_share_a_claim_until_the_last_has_left(tmp_path):
    first, second = hold(tmp_path, "a"), hold(tmp_path, "a")
    for job in ("b", None):
        with pytest.raises(UsageError, match=f"process {first.pid} on"):
            enter(tmp_path, job)
    # The one that wrote its name into the claim leaves; the other still keeps strangers off.
    first.communicate("")
    with pytest.raises(UsageError):
        enter(tmp_path, "b")
    enter(tmp_path, "a")
    second.communicate("")
    assert list(tmp_path.iterdir()) == []
    enter(tmp_path, "b")


def test_of_many_that_race_no_two_jobs_are_in_at_once(tmp_path):
    # Each writes the name of its job and reads it again: who finds another's was not alone.
    code = (
        "import sys; from pathlib import Path; from prefcache.pipeline.errors import UsageError\n"
        "from prefcache.pipeline.stored.claims import claim_stage\n"
        "folder, job, n = Path(sys.argv[1]), sys.argv[2], 0\n"
        "while n < 50:\n"
        "    try:\n"
        "        with claim_stage(folder, 'score', 'give up', job):\n"
        "            (folder / 'inside').write_text(job); n += 1\n"
        "            assert (folder / 'inside').read_text() in (job, '')\n"
        "    except UsageError: pass\n"
    )
    racers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, job]) for job in "aabb"]
    assert [racer.wait(60) for racer in racers] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_where_there_are_no_locks_everyone_is_let_in(tmp_path, monkeypatch):
    import errno

    from prefcache.pipeline.stored import claims

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(claims.fcntl, "flock", no_locks)
    with claim_stage(tmp_path, "score", "give up"):
        enter(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["prepare", "score", "train"])
def test_a_stage_keeps_another_off_its_folder_and_a_killed_one_does_not(prefcache, tmp_path, stage, request):
    config = request.getfixturevalue({"prepare": "config", "score": "prepared", "train": "scored"}[stage])
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 0.2").replace("samples: 4", "samples: 0"))
    claim = tmp_path / "runs/tiny" / {"train": ".train-trained.claim"}.get(stage, f".{stage}.claim")
    first = start_process(tmp_path, stage, config)
    entry = claim.with_name(f"{claim.name}.entry")
    while first.is_alive() and not (claim.exists() and claim.read_bytes() and not entry.exists()):
        time.sleep(0.0002)
    os.kill(first.pid, signal.SIGSTOP)
    # Scorers of the same settings share the work (test_crash.py); one of other settings would vouch for something else.
    other = ["--set", "score.dtype=bfloat16"] if stage == "score" else []
    said = prefcache(stage, config, *other, code=2).stderr
    assert f"Another {stage} is at work on" in said and f"process {first.pid} on {socket.gethostname()}" in said
    if stage != "prepare":
        with open(tmp_path / "pairs.jsonl", "a") as file:
            file.write('{"prompt": "new?", "chosen": "yes", "rejected": "no"}\n')
        said = prefcache("prepare", config, code=2).stderr
        assert re.search(rf"prepared is being read by {stage} \(process {first.pid} on", said)
    first.kill()
    first.join()
    stages = ("prepare", "score", "train")
    for each in stages[: stages.index(stage) + 1]:
        prefcache(each, config)
    assert not list((tmp_path / "runs/tiny").glob(".*claim*"))


def test_prepare_leaves_what_it_did_not_write_and_refuses_data_that_it_would_replace(prefcache, prepared, tmp_path):
    folder = tmp_path / "runs/tiny/prepared"
    theirs, quarantine = folder / "theirs.arrow", folder / "quarantine.parquet"
    theirs.write_bytes(b"mine")
    before = quarantine.read_bytes()
    assert "Copy it elsewhere" in prefcache("prepare", prepared, "--set", f"prepare.data={quarantine}", code=2).stderr
    prefcache("prepare", prepared, "--set", "prepare.seed=1", "--set", "prepare.max_length=300")
    assert theirs.read_bytes() == b"mine" and quarantine.read_bytes() == before
    assert len(list(folder.glob("train-*.arrow"))) == 1
