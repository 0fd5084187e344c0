"""What the tests share: a tiny real model, small real data, and the command as a user runs it."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.caches import Cache
from tests.helpers.machines import Machine, open_cache
from tests.helpers.project import (
    CONSTRAINTS,
    PREFCACHE,
    ROOT,
    Clone,
    Done,
    build_model,
    checked,
    invoke,
    write_config,
    write_pairs,
)
from tests.helpers.stores import Bucket, S3Server, use_environment

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Models here are tiny: more threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, however slow the machine is.
settings.register_profile(
    "prefcache", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("prefcache")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape and tokenizer, other weights."""
    return build_model(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python of .venv-vllm, which is built where it is missing: minutes, once."""
    with open(ROOT / "Makefile") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        subprocess.run(["make", "vllm", f"PYTHON={sys.executable}"], cwd=ROOT, check=True, timeout=1800)
    return ROOT / ".venv-vllm/bin/python"


@pytest.fixture(scope="session")
def torchao() -> Path:
    """A folder with torchao, filled where it is missing. It is kept from all others: wherever it can be found, Transformers
    imports it, which takes a second and prints warnings."""
    folder = Path(sys.prefix) / "torchao"
    with open(ROOT / "Makefile") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        if not (folder / "torchao").exists():
            pinned = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torchao=="))
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "--target", folder, pinned], check=True, timeout=600)
    return folder


@pytest.fixture
def prefcache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The command with a user's arguments, in the working directory, which is a temporary folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, code=0: invoke(Path.cwd(), *arguments, code=code)


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Done]:
    """The command as a process of its own, for what depends on that."""

    def run(*arguments: Any, code: int | None = 0, **options: Any) -> Done:
        command = [PREFCACHE, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, **options)
        assert "Traceback" not in done.stderr, done.stderr
        return checked(Done(done.returncode, done.stdout, done.stderr), code)

    return run


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    """A config for 60 pairs, in the temporary folder."""
    write_pairs(tmp_path / "pairs.jsonl", 60)
    return write_config(tmp_path, model)


@pytest.fixture(scope="session")
def scored_once(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder whose 60 pairs were prepared and scored once."""
    folder = tmp_path_factory.mktemp("scored")
    write_pairs(folder / "pairs.jsonl", 60)
    config = write_config(folder, model)
    for stage in ("prepare", "score"):
        invoke(folder, stage, config)
    return folder


@pytest.fixture
def scored(scored_once: Path, tmp_path: Path) -> Path:
    """The config of a copy of it, in the temporary folder. Its manifest knows the original's cache as well."""
    shutil.copytree(scored_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "config.yaml"


@pytest.fixture
def prepared(scored_once: Path, tmp_path: Path) -> Path:
    """The config of a copy that is only prepared."""
    shutil.copytree(scored_once, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache", "scored"))
    return tmp_path / "config.yaml"


@pytest.fixture
def n_prepared(request: pytest.FixtureRequest, prefcache: Callable[..., Done], config: Path, tmp_path: Path) -> Path:
    """The config of prepared pairs, as many as the module's N_PAIRS."""
    write_pairs(tmp_path / "pairs.jsonl", request.module.N_PAIRS)
    prefcache("prepare", config)
    return config


@pytest.fixture(scope="session")
def trained_once(scored_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it that was trained once."""
    folder = shutil.copytree(scored_once, tmp_path_factory.mktemp("trained") / "it")
    invoke(folder, "train", "config.yaml")
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """The run of a copy, whose config is `config.yaml` in the temporary folder."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs/tiny/trained"


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    folder = tmp_path_factory.mktemp("clone") / "prefcache"
    (folder.parent / "home").mkdir()
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listing.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return Clone(folder)


@pytest.fixture(scope="session")
def demo(clone: Clone) -> Clone:
    """The clone after the README's first command."""
    clone.demo_output = clone.run("make prepare score train").stdout
    return clone


@pytest.fixture(scope="session")
def localstack_python() -> Path:
    """The Python of .venv-localstack, which is built where it is missing: a minute, once."""
    with open(ROOT / "Makefile") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        make = ["make", "localstack", f"PYTHON={sys.executable}"]
        done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, timeout=900)
    if done.returncode:
        pytest.skip(f"make localstack failed: {done.stderr[-200:]}")
    return ROOT / ".venv-localstack/bin/python"


# Whoever uses it is tested on both: on moto in every run, and on LocalStack, which shares no code with moto, in a slow one.
@pytest.fixture(scope="session", params=["moto", pytest.param("localstack", marks=pytest.mark.slow)])
def s3_server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """An S3 server, which the tests of a worker share."""
    is_moto = request.param == "moto"
    python = sys.executable if is_moto else request.getfixturevalue("localstack_python")
    with S3Server(request.param, python) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new bucket, which this process and those it starts can use."""
    bucket = Bucket(s3_server, tmp_path / "mirror")
    use_environment(bucket.environment, monkeypatch)
    return bucket


@pytest.fixture
def machine(s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Open the store's cache on a machine of a name, which is a mirror of its own."""

    def open_there(name: str) -> Cache:
        monkeypatch.setenv("PREFCACHE_MIRROR", str(tmp_path / name))
        return open_cache(s3.url)

    return open_there
