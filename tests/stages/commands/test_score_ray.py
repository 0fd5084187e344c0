"""score with actors of Ray: a real Ray of two cores on this machine, and actors that are killed."""

import contextlib
import json
import os
import pickle
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from prefcache.pipeline import config_file
from prefcache.pipeline.config import Ray, Score
from prefcache.pipeline.errors import IdentityError, ResourceError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.scoring import actors
from prefcache.pipeline.scoring.engines.transformers import numerics
from prefcache.pipeline.stored.cache_writer import create_cache
from prefcache.pipeline.stored.model_ids import identify
from prefcache.pipeline.stored.object_store import open_store
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.prepared_store import send_prepared
from tests.helpers.project import PREFCACHE, start
from tests.helpers.scored import fingerprint, rows_of
from tests.helpers.ssh_keys import make_key
from tests.helpers.store_proxy import Fault, Rule
from tests.helpers.stores import KEY_ID, SECRET, use_environment

N_PAIRS = 150
SMALL_CHUNKS = ["--set", "score.tokens_per_shard=200"]


def with_actors(n: int) -> list[str]:
    return ["--set", f"score.ray.actors={n}"]


@pytest.fixture(autouse=True)
def _ray_leaves_nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    # Its sockets want a short path; its token goes into the home.
    folder = tempfile.mkdtemp(prefix="ray-")
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def pool(n_prepared: Path, model: Path, tmp_path: Path) -> actors.Pool:
    """Before it has begun an actor."""
    config = config_file.load(n_prepared, ["score.ray.actors=2", "score.parity_sample=2"])
    cache = create_cache(tmp_path / "cache", "tiny", {"model_id": "0" * 64})
    here, folder = numerics(Reference(model), config.score), Prepared(tmp_path / "runs/tiny/prepared")
    return actors.Pool(config, Reference(model), here, cache, folder, 2, Progress(quiet=True))


def begun(config: Path, *arguments: str) -> subprocess.Popen:
    """`prefcache score`, in a session of its own as in a terminal."""
    command = [PREFCACHE, "score", config, "--json", *arguments]
    return start(
        *command, cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def in_session(process: subprocess.Popen) -> list[int]:
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == process.pid:
                found.append(pid)
        except OSError:
            continue
    return found


def actors_at(process: subprocess.Popen, method: str) -> list[int]:
    """Of the actors that are just at this method."""
    title = f"ray::ScoringActor.{method}"
    found = []
    for pid in in_session(process):
        try:
            if psutil.Process(pid).cmdline()[:1] == [title]:
                found.append(pid)
        except psutil.Error:
            continue
    return found


def until(process: subprocess.Popen, happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def killed_at_a_chunk(pids: list[int]) -> bool:
    """Whether one of them had a chunk claimed and not yet committed, and was killed at that."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        for claim in open_files(pid):
            if claim.suffix == ".claim" and not claim.with_name(f"{claim.stem[1:]}.json").exists():
                os.kill(pid, signal.SIGKILL)
                return True
        os.kill(pid, signal.SIGCONT)
    return False


def open_files(pid: int) -> Iterator[Path]:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            yield link.readlink()


def n_shards(root: Path) -> int:
    return len(list(root.glob("cache/*/*.parquet")))


def test_an_actor_is_killed_and_nothing_is_lost_or_doubled(prefcache, n_prepared, tmp_path, monkeypatch):
    prefcache("score", n_prepared, *SMALL_CHUNKS)
    expected = fingerprint(tmp_path)
    n_chunks = n_shards(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "runs/tiny/scored")

    scorer = begun(n_prepared, *SMALL_CHUNKS, *with_actors(2))
    until(scorer, lambda: n_shards(tmp_path) >= 2)
    until(scorer, lambda: killed_at_a_chunk(actors_at(scorer, "score")))
    assert n_shards(tmp_path) < n_chunks  # there was more to do
    out, said = scorer.communicate(timeout=120)
    assert scorer.returncode == 0, said
    assert json.loads(out)["scored"] == 2 * N_PAIRS  # and nothing of Ray's on stdout
    said = but_for_waiting(said)
    assert said.count("warning: ") == 1 and "an actor of Ray died at a chunk" in said
    assert all(line.startswith(("score: ", "warning: ")) for line in said.splitlines()), said
    assert said.count("of the plain float32 forward") == 1  # each compares, one says so
    assert len(rows_of(tmp_path)) == 2 * N_PAIRS  # rows_of fails where a sequence was stored twice
    # The records too, so each names the parity of its actor, which is that of a plain run.
    assert fingerprint(tmp_path) == expected

    # Nothing is missing now, so Ray is not imported: with the manifest, and for the same rows without it.
    monkeypatch.setitem(sys.modules, "ray", None)
    for _ in range(2):
        again = prefcache("score", n_prepared, *SMALL_CHUNKS, *with_actors(2), "--json")
        assert json.loads(again.stdout)["scored"] == 0
        shutil.rmtree(tmp_path / "runs/tiny/scored")
    assert fingerprint(tmp_path) == expected


@pytest.mark.slow  # Ray takes ten seconds to start
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_the_end_of_the_terminal_end_the_actors_and_all_of_ray(n_prepared, tmp_path, sent):
    # So many chunks that, however late it is seen that some are there, others are not.
    scorer = begun(n_prepared, "--set", "score.tokens_per_shard=40", *with_actors(1))
    until(scorer, lambda: n_shards(tmp_path) >= 2)
    os.killpg(scorer.pid, sent)  # as a terminal does
    _, said = scorer.communicate(timeout=60)
    assert scorer.returncode == 130 and "interrupted" in said and "Traceback" not in said
    deadline = time.monotonic() + 30
    while left := in_session(scorer):
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in left]
        time.sleep(0.1)


@pytest.mark.slow
def test_an_error_in_an_actor_is_one_line_and_its_own_exit_code(prefcache, n_prepared, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    save_file({"x": torch.zeros(2)}, broken / "model.safetensors", {"format": "pt"})
    prefcache("prepare", n_prepared, "--set", "model=broken")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with actors.connect(Ray(actors=1), 1) as ray:
        assert signal.getsignal(signal.SIGTERM) == on_sigterm  # Ray would end the process without a word
        done = prefcache("score", n_prepared, "--set", "model=broken", "--quiet", *with_actors(1), code=2)
        assert ray.is_initialized()  # a Ray that was there stays there
    said = but_for_waiting(done.stderr)
    assert said.startswith("error: broken lacks tensors of LlamaForCausalLM")
    assert said.count("\n") == 1 and not done.stdout


def but_for_waiting(said: str) -> str:
    """On a busy machine an actor takes longer to begin than goes without a word."""
    return "".join(line for line in said.splitlines(keepends=True) if "Ray has not started an actor" not in line)


def test_a_chunk_at_which_every_actor_dies_ends_the_command(pool):
    for number in (0, 1, 0, 1):
        pool._count_death(number, RuntimeError("gone"))
    with pytest.raises(ResourceError, match=r"3 actors of Ray died at a chunk.*gone.*score\.ray\.actors"):
        pool._count_death(1, RuntimeError("gone"))


def test_actors_that_die_before_their_first_chunk_end_the_command(pool):
    # There are two: each may die twice, and then one more.
    for _ in range(5):
        pool._count_death(None, RuntimeError("gone"))
    with pytest.raises(ResourceError, match="6 actors of Ray died before a chunk"):
        pool._count_death(None, RuntimeError("gone"))


OTHERS = {
    "code": ("0", UsageError, "has another prefcache"),
    "folder": (Path("/nowhere"), UsageError, "has no /nowhere"),
    "numerics": ({"torch": "1.0"}, IdentityError, "torch 1.0 -> "),
    "prepared_id": ("0", IdentityError, "was prepared again"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_machine_unlike_the_one_that_asks_is_refused(pool, what):
    other, kind, said = OTHERS[what]
    other = pool._work.numerics | other if what == "numerics" else other
    # As Ray would call it, in its process.
    with pytest.raises(kind, match=said):
        actors.ScoringActor(replace(pool._work, **{what: other})).begin()


# -- machines that share only an object store ------------------------------------------------------------------------


@pytest.fixture
def work(n_prepared: Path, model: Path, s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> actors.Work:
    """What a command somewhere else hands to an actor here, where the model is `models/tiny` in the folder where Ray was started."""
    config = config_file.load(n_prepared, [f"cache={s3.url}", "model=models/tiny", "score.parity_sample=2"])
    config = config.model_copy(update={"score": config.score.model_copy(update={"device": "cpu"})})
    shutil.copytree(model, tmp_path / "there/models/tiny")
    monkeypatch.chdir(tmp_path / "there")
    reference, here = Reference(model), Prepared(tmp_path / "runs/tiny/prepared")
    described = identify(reference, tmp_path / "elsewhere")
    send_prepared(here, open_store(s3.url))
    return actors.Work(
        config=config,
        disk=None,
        model_id=described["model_id"],
        numerics=numerics(reference, config.score),
        prepared_id=here.id,
        sample=(0, 1),
        folder=Path("/nowhere"),
        code=actors._code_checksum(),
        variables={},
    )


def test_an_actor_scores_with_its_machines_model_into_the_store(work, s3, tmp_path):
    shutil.rmtree(tmp_path / "runs")
    actor = actors.ScoringActor(work)
    said = [message.text for message in actor.begin().messages]
    assert any("of the plain float32 forward (2 sequences)" in text for text in said)
    chunks = actor.score([np.arange(6), np.arange(6, 12)], wait=False).chunks
    assert [(chunk.n_sequences, chunk.is_mine) for chunk in chunks] == [(6, True)] * 2
    assert [chunk.is_mine for chunk in actor.score([np.arange(6)], wait=False).chunks] == [False]
    names = [name for name in s3.objects() if not name.startswith("prepared/")]
    # Both have arrived, and no claim is left.
    assert sorted(name.rpartition(".")[2] for name in names) == ["json"] * 3 + ["parquet"] * 2


def test_an_actor_signs_with_its_machines_key_and_at_the_end_once_for_all(work, s3, tmp_path):
    make_key(tmp_path / "there/mine")
    signing = work.config.score.model_copy(update={"sign_with": "mine"})
    actor = actors.ScoringActor(replace(work, config=work.config.model_copy(update={"score": signing})))
    actor.begin()
    actor.score([np.arange(6), np.arange(6, 12)], wait=False)
    assert len([name for name in s3.objects() if name.endswith(".sig")]) == 2
    actor.merge_statements()
    assert len([name for name in s3.objects() if name.endswith(".sig")]) == 1


def test_a_machine_without_the_model_is_named_with_what_it_lacks(work, tmp_path):
    shutil.rmtree(tmp_path / "there/models")
    with pytest.raises(
        UsageError, match=rf"{platform.node()}.*{tmp_path}/there: .*models/tiny.*Every machine of the cluster needs"
    ):
        actors.ScoringActor(work).begin()


def test_a_machine_with_other_weights_under_the_same_name_is_refused(work, other_model, tmp_path):
    shutil.rmtree(tmp_path / "there/models/tiny")
    shutil.copytree(other_model, tmp_path / "there/models/tiny")
    with pytest.raises(IdentityError, match=r"models/tiny on .* has other weights than on the machine that started it"):
        actors.ScoringActor(work).begin()


def test_a_machine_that_may_not_read_the_store_is_named(work, s3, monkeypatch):
    with s3.through_proxy([Rule(Fault.FORBIDDEN)]) as proxy:
        use_environment(s3.environment_of(proxy.url, s3.mirror), monkeypatch)
        with pytest.raises(UsageError, match=rf"{platform.node()}.*access was refused.*in which Ray was started there"):
            actors.ScoringActor(work).begin()


def test_a_machine_without_the_key_to_sign_with_is_named(work):
    signing = work.config.score.model_copy(update={"sign_with": "keys/mine"})
    with pytest.raises(UsageError, match=rf"{platform.node()}.*keys/mine.*score.sign_with on its own machine"):
        actors.ScoringActor(replace(work, config=work.config.model_copy(update={"score": signing}))).begin()


def test_what_is_handed_to_other_machines_has_no_credentials(work):
    assert KEY_ID.encode() not in pickle.dumps(work) and SECRET.encode() not in pickle.dumps(work)


def test_ray_that_is_missing_is_named_with_how_to_install_it(prefcache, n_prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = prefcache("score", n_prepared, *with_actors(1), "--quiet", code=2)
    assert "pip install 'prefcache[ray]'" in done.stderr and done.stderr.count("\n") == 1


def test_options_that_are_said_elsewhere_are_refused(prefcache, n_prepared):
    done = prefcache("score", n_prepared, *with_actors(1), "--set", "score.ray.options={num_gpus: 1}", "-q", code=2)
    assert "score.ray.options has num_gpus, which score.ray.gpus sets" in done.stderr


def test_an_address_where_nothing_answers_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with (
        pytest.raises(UsageError, match="Cannot connect to Ray at"),
        actors.connect(Ray(actors=1, address=address), 1),
    ):
        pass


def test_actors_with_gpus_compute_on_them_wherever_they_are_asked_from(model):
    reference = Reference(model)
    assert numerics(reference, Score(ray={"actors": 1, "gpus": 1}))["device"] == "cuda"
    assert numerics(reference, Score(ray={"actors": 1, "gpus": 1}, device="cpu"))["device"] == "cpu"
    assert numerics(reference, Score(ray={"actors": 1})) == numerics(reference, Score())
