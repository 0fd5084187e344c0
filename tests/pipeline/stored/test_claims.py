"""A claim keeps others off while its process lives, and no longer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored import claims
from prefcache.pipeline.stored.claims import claim, claim_path, remove_free

HOLD = (
    "import sys, time; from pathlib import Path; from prefcache.pipeline.stored.claims import claim\n"
    "with claim(Path(sys.argv[1]), wait=False) as mine:\n"
    "    print(mine, flush=True); time.sleep(float(sys.argv[2]))\n"
)


def holder(path: Path, seconds: float = 60) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, path, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    return process


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_a_link_leads_to_is_not_written(tmp_path, link):
    (tmp_path / "thesis.txt").write_text("precious")
    link(tmp_path / "thesis.txt", claim_path(tmp_path, "score"))
    with pytest.raises(UsageError, match="is a link"), claims.claim_stage(tmp_path, "score", "wait"):
        pass
    with pytest.raises(UsageError, match="is a link"), claim(claim_path(tmp_path, "score"), wait=False):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_claim_is_one_processs_until_it_ends(tmp_path):
    path = claim_path(tmp_path, "chunk")
    with claim(path, wait=False) as mine, claim(path, wait=False) as again:
        assert (mine, again) == (True, False)
    assert list(tmp_path.iterdir()) == []
    other = holder(path)
    with claim(path, wait=False) as mine:
        assert not mine
    other.kill()
    other.wait()
    with claim(path, wait=False) as mine:
        assert mine


def test_who_waits_gets_the_claim_when_its_holder_is_killed(tmp_path):
    path = claim_path(tmp_path, "chunk")
    other = holder(path)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {other.pid}"])
    began = time.monotonic()
    with claim(path, wait=True) as mine:
        assert mine and time.monotonic() - began > 0.3
    assert other.wait() == -signal.SIGKILL and killer.wait() == 0
    assert list(tmp_path.iterdir()) == []


def test_who_waited_for_one_that_finished_has_a_claim_that_others_see(tmp_path):
    # The file it waited on is gone by then; its claim must be on the one that others would open.
    path = claim_path(tmp_path, "chunk")
    other = holder(path, seconds=0.5)
    with claim(path, wait=True) as mine, claim(path, wait=False) as again:
        assert (mine, again) == (True, False) and path.exists()
    assert other.wait() == 0


def test_only_one_of_many_that_race_has_it_at_a_time(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from prefcache.pipeline.stored.claims import claim\n"
        "folder = Path(sys.argv[1])\n"
        "for _ in range(100):\n"
        "    with claim(folder / '.a.claim', wait=True):\n"
        "        os.close(os.open(folder / 'inside', os.O_CREAT | os.O_EXCL)); os.unlink(folder / 'inside')\n"
    )
    racers = [subprocess.Popen([sys.executable, "-c", code, tmp_path]) for _ in range(4)]
    assert [racer.wait(60) for racer in racers] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_claims_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path):
    dead, alive = claim_path(tmp_path, "dead"), claim_path(tmp_path, "alive")
    dead.write_bytes(b"")
    other = holder(alive)
    assert remove_free(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [alive]
    other.kill()
    other.wait()


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_where_the_file_system_has_no_locks_everyone_gets_the_claim(tmp_path, monkeypatch, code):
    import errno

    def no_locks(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(claims.fcntl, "flock", no_locks)
    path = claim_path(tmp_path, "chunk")
    with claim(path, wait=False) as mine, claim(path, wait=True) as again:
        assert mine and again
    assert list(tmp_path.iterdir()) == []
