"""Scoring by Ray actors, where one machine is not enough: each actor is a Scorer, and all fill the same cache.

Plain actors that are handed chunks, not ray.data: a data set would carry nothing. Where the cache is a folder, all machines share
a disk with model, prepared data and cache. Where it is in an object store, they share nothing else: an actor fetches the prepared
data into its machine's mirror, finds the model there by the name in the config, and compares its identity. The cache is the
checkpoint. The chunk of a dead actor goes to another one, and as between any scorers its first record wins.

Nothing else imports ray.
"""

import contextlib
import os
import platform
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefcache.pipeline import cache_place, identity
from prefcache.pipeline.config import Config, Ray
from prefcache.pipeline.errors import IdentityError, ResourceError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.scoring.engines import find_engine
from prefcache.pipeline.scoring.scorer import FinishedChunk, Scorer, order_chunks
from prefcache.pipeline.stored import artifact, prepared_store
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import create_cache
from prefcache.pipeline.stored.gguf_conversion import convert_models
from prefcache.pipeline.stored.mirror import open_root
from prefcache.pipeline.stored.model_ids import identify
from prefcache.pipeline.stored.object_store import ObjectStore, open_store
from prefcache.pipeline.stored.prepared import Prepared, Sequences
from prefcache.pipeline.stored.scoring_plan import Plan
from prefcache.pipeline.stored.signatures import require_key

# After so many deaths at one chunk, or per actor before any has started, scoring fails.
_MAX_DEATHS = 3
_START_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
# An actor that sends to a store is given several chunks, so that it computes the next one meanwhile. What it has sent it says
# at the latest after the first chunk that ends after this time.
_CHUNKS_AT_ONCE = 8
_ANSWER_SECONDS = 10.0
# Only slots and counts go through Ray's object store: the smallest size that Ray accepts.
_STORE_BYTES = 80 << 20
# Read when ray is imported. By default it sends usage statistics and prints to stdout what prefcache reports itself.
_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_RESERVED = {
    "num_cpus": "score.ray.cpus sets",
    "num_gpus": "score.ray.gpus sets",
    "max_restarts": "is fixed: a new actor replaces a dead one",
    "max_task_retries": "is fixed: another actor gets the chunk of a dead one",
    "max_concurrency": "is fixed: an actor has one chunk at a time",
    "lifetime": "is fixed: actors end with the command",
    "name": "is fixed: actors have no names",
}


@dataclass(frozen=True)
class SharedDisk:
    """What is under the same paths on every machine."""

    reference: Reference
    cache: Path
    prepared: Path


@dataclass(frozen=True)
class Work:
    """Everything that an actor needs, wherever it runs. There are no credentials in it but the key of a completions server."""

    config: Config  # without Ray, and with the device that was chosen
    disk: SharedDisk | None  # None: the machines share an object store
    model_id: str
    numerics: dict[str, str]
    prepared_id: str
    sample: tuple[int, ...]
    folder: Path  # where the command runs; paths are relative to it
    code: str
    variables: dict[str, str]


class Message(NamedTuple):
    text: str
    is_warning: bool


class Answer(NamedTuple):
    chunks: list[FinishedChunk | None]  # that the actor came to; None for one that another scorer has claimed
    messages: list[Message]


def _code_checksum() -> str:
    """Return a hash of this package's code, which must be the same in an actor."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return artifact.checksum_bytes(b"".join(file.read_bytes() for file in files))


# -- in an actor's process -------------------------------------------------------------------------------------------


class ScoringActor:
    """A Scorer in a Ray process."""

    def __init__(self, work: Work) -> None:
        self._work, self._progress = work, _RecordedProgress()
        self._scorer: Scorer | None = None

    def begin(self) -> Answer:
        """Load the engine and compare it with the plain forward."""
        work, score = self._work, self._work.config.score
        os.environ.update(work.variables)
        _refuse_other_code(work)
        open_inputs = _open_shared if work.disk else _open_own
        reference, prepared, cache = open_inputs(work, self._progress)
        with _naming_machine("An actor signs what it scores, with the key of score.sign_with on its own machine."):
            require_key(score.sign_with, None)
        numerics = find_engine(score.engine).numerics(reference, score)
        if numerics != work.numerics:
            raise IdentityError(
                f"An actor of Ray on {platform.node()} would compute differently from the machine that started it "
                f"({identity.differences(numerics, work.numerics)}). Install the same versions on every machine of the cluster."
            )
        sequences = Sequences(prepared.table())
        images = prepared.prompt_images(reference.processor, cache.folder.parent)
        self._scorer = Scorer(score, reference, numerics, cache, sequences, self._progress, images)
        self._scorer.check(list(work.sample))
        return Answer([], self._progress.take())

    def score(self, chunks: list[np.ndarray], wait: bool) -> Answer:
        assert self._scorer is not None
        return Answer(self._scorer.score(chunks, wait, _ANSWER_SECONDS), self._progress.take())

    def merge_statements(self) -> None:
        assert self._scorer is not None
        self._scorer.merge_statements()


class _RecordedProgress(Progress):
    """Records messages for the process that has a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: list[Message] = []

    def say(self, line: str) -> None:
        self._messages.append(Message(line, is_warning=False))

    def warn(self, line: str) -> None:
        self._messages.append(Message(line, is_warning=True))

    def take(self) -> list[Message]:
        messages, self._messages = self._messages, []
        return messages


def _refuse_other_code(work: Work) -> None:
    if _code_checksum() != work.code:
        raise UsageError(
            f"An actor of Ray on {platform.node()} has another prefcache than the machine that started it. Install the same "
            "one on every machine of the cluster."
        )


Inputs = tuple[Reference, Prepared, Cache]


def _open_shared(work: Work, progress: Progress) -> Inputs:
    """Open what is under the same paths on every machine."""
    disk = work.disk
    assert disk is not None
    for path in (work.folder, *(work.folder / path for path in (disk.reference.folder, disk.prepared, disk.cache))):
        if not path.exists():
            raise UsageError(
                f"{platform.node()}, where an actor of Ray runs, has no {path}. While the cache is a folder, model, prepared "
                "data and cache must have the same paths on every machine of the cluster; with a cache in an object store (such as "
                "cache: s3://bucket/refs), machines share nothing else."
            )
    os.chdir(work.folder)
    prepared = Prepared(disk.prepared)
    if prepared.id != work.prepared_id:
        raise IdentityError(f"{disk.prepared} was prepared again meanwhile. Run the same command again.")
    return disk.reference, prepared, Cache(disk.cache, work.model_id)


def _open_own(work: Work, progress: Progress) -> Inputs:
    """Find this machine's copy of the model, and fetch prepared data and the records of the cache from the store."""
    # A machine without this folder looks paths up where Ray was started on it.
    with contextlib.suppress(OSError):
        os.chdir(work.folder)
    with _naming_machine(f"Every machine of the cluster needs the model {work.config.model}, under this name."):
        convert_models(work.config, progress)
        reference = identity.find_reference(work.config)
    with _naming_machine("Each machine takes its credentials from the environment in which Ray was started there."):
        root = open_root(work.config.cache)
        described = identify(reference, root)
        if described["model_id"] != work.model_id:
            raise IdentityError(
                f"{reference.folder} on {platform.node()}, where an actor of Ray runs, has other weights than on the machine "
                f"that started it (@{described['model_id'][:8]}, expected @{work.model_id[:8]}). Copy the model, or set revision."
            )
        folder = root / prepared_store.FOLDER / work.prepared_id
        prepared_store.fetch_prepared(_open_store(work.config), work.prepared_id, folder)
        return reference, Prepared(folder), create_cache(root, work.config.model, described)


@contextlib.contextmanager
def _naming_machine(remedy: str) -> Iterator[None]:
    """Say on which machine a mistake shows, and what that machine needs."""
    try:
        yield
    except (UsageError, ResourceError) as error:
        raise type(error)(f"{platform.node()}, where an actor of Ray runs in {Path.cwd()}: {error} {remedy}") from None


def _open_store(config: Config) -> ObjectStore:
    return open_store(cache_place.parse_url(config.cache))


# -- in the command's process ----------------------------------------------------------------------------------------


class Pool:
    """Actors in place of one Scorer, with the same check, run and close."""

    def __init__(
        self,
        config: Config,
        reference: Reference,
        numerics: dict[str, str],
        cache: Cache,
        prepared: Prepared,
        n_chunks: int,
        progress: Progress,
    ) -> None:
        score = config.score
        assert score.ray is not None
        self._settings, self._progress = score.ray, progress
        self._n_actors = min(score.ray.actors, n_chunks)
        device = numerics.get("device", score.device)
        self._n_gpus = score.ray.gpus or (1 if device == "cuda" else 0)
        key = score.server.key_variable
        self._prepared, self._is_remote = prepared, cache_place.is_url(config.cache)
        here = score.model_copy(update={"ray": None, "device": device})
        self._work = Work(
            config=config.model_copy(update={"score": here}),
            disk=None if self._is_remote else SharedDisk(reference, cache.folder, prepared.folder),
            model_id=cache.reference.model_id,
            numerics=numerics,
            prepared_id=prepared.id,
            sample=(),
            folder=Path.cwd(),
            code=_code_checksum(),
            variables={key: os.environ[key]} if score.engine == "server" and key in os.environ else {},
        )
        self._ray: Any = None
        self._resources = contextlib.ExitStack()
        self._pending: dict[Any, tuple[Any, list[int]]] = {}  # future -> its actor, and the numbers of its chunks
        self._idle: list[Any] = []
        self._deaths: Counter[int | None] = Counter()
        self._printed: set[str] = set()

    def check(self, sample: list[int]) -> None:
        """Start the actors, each of which compares its engine with the plain forward; return once the first one has."""
        if reserved := next((name for name in self._settings.options if name in _RESERVED), None):
            raise UsageError(f"score.ray.options has {reserved}, which {_RESERVED[reserved]}. Leave it out there.")
        if self._is_remote:
            prepared_store.send_prepared(self._prepared, _open_store(self._work.config))
        self._work = replace(self._work, sample=tuple(sample))
        self._ray = self._resources.enter_context(connect(self._settings, self._n_actors))
        self._warn_if_none_starts([self._start_actor() for _ in range(self._n_actors)])
        while not self._idle:
            for _ in self._answers():
                pass

    def run(self, plan: Plan, rank: int, world: int) -> Iterator[FinishedChunk]:
        """Score what is missing; yield each finished chunk, by an actor or another scorer."""
        chunks = order_chunks(plan, rank, world)
        todo, taken = deque(range(len(chunks))), deque[int]()
        of_dead = set[int]()  # chunks that an actor may have finished before it died
        n_left = len(chunks)
        while n_left:
            while self._idle and (todo or taken):
                wait = not todo
                numbers = [taken.popleft()] if wait else [todo.popleft() for _ in range(self._share(len(todo)))]
                actor = self._idle.pop()
                self._pending[actor.score.remote([chunks[number] for number in numbers], wait)] = actor, numbers
            for numbers, answer in self._answers():
                if answer is None:
                    of_dead.update(numbers)
                done = answer.chunks if answer else []
                todo.extendleft(reversed(numbers[len(done) :]))
                for number, finished in zip(numbers, done, strict=False):
                    if finished is None:
                        taken.append(number)
                    else:
                        n_left -= 1
                        yield finished._replace(is_mine=finished.is_mine or number in of_dead)
        if self._work.config.score.sign_with:
            self._ray.get([actor.merge_statements.remote() for actor in self._idle])

    def _share(self, n_todo: int) -> int:
        """How many chunks to give to an actor at once: fewer towards the end, where others would wait for it."""
        return min(_CHUNKS_AT_ONCE, max(1, n_todo // (2 * self._n_actors))) if self._is_remote else 1

    def close(self) -> None:
        try:
            for actor in [*self._idle, *(actor for actor, _ in self._pending.values())]:
                self._ray.kill(actor)
        finally:
            self._resources.close()

    def _start_actor(self) -> Any:
        try:
            kind = self._ray.remote(ScoringActor).options(
                num_cpus=self._settings.cpus, num_gpus=self._n_gpus, **self._settings.options
            )
            actor = kind.remote(self._work)
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"score.ray: Ray refuses these options of an actor ({_shorten(error)}). See score.ray.options."
            ) from None
        self._pending[actor.begin.remote()] = actor, []
        return actor

    def _warn_if_none_starts(self, actors: list[Any]) -> None:
        built, _ = self._ray.wait([actor.__ray_ready__.remote() for actor in actors], timeout=_START_SECONDS)
        if not built:
            needs = {"CPU": self._settings.cpus, "GPU": f"{self._n_gpus:g}", **self._settings.options}
            has = self._ray.cluster_resources()
            self._progress.warn(
                f"Ray has not started an actor in {_START_SECONDS:g} s. One takes "
                f"{', '.join(f'{name} {n}' for name, n in needs.items())}; all machines together have "
                f"{', '.join(f'{name} {has.get(name, 0):g}' for name in ('CPU', 'GPU'))}. Still waiting."
            )

    def _answers(self) -> Iterator[tuple[list[int], Answer | None]]:
        """Wait for answers; yield the numbers of the chunks with the answer, or with None if the actor died.

        An actor that has answered is idle; a dead one is replaced.
        """
        done, _ = self._ray.wait(list(self._pending))
        for future in done:
            actor, numbers = self._pending.pop(future)
            answer: Answer | None = None
            try:
                answer = self._ray.get(future)
            except self._ray.exceptions.RayTaskError as error:
                # The actor's own error, as if it had been raised here.
                raise error.cause from error
            except self._ray.exceptions.RayError as error:
                self._count_death(numbers[0] if numbers else None, error)
                self._start_actor()
            if answer is not None:
                self._idle.append(actor)
                if not numbers:
                    self._deaths[None] = 0
                for text, is_warning in answer.messages:
                    if is_warning:
                        self._progress.warn(text)
                    elif text not in self._printed:  # once for all actors
                        self._printed.add(text)
                        self._progress.say(text)
            if numbers:
                yield numbers, answer

    def _count_death(self, number: int | None, error: Exception) -> None:
        if getattr(error, "actor_init_failed", False):
            # It cannot even import this file: another try would not help.
            reason = str(error).strip().splitlines()[-1]
            raise UsageError(
                f"An actor of Ray cannot start on its machine ({reason}). Install the same prefcache there, with all its "
                "dependencies."
            ) from None
        self._deaths[number] += 1
        where = "before a chunk" if number is None else "at a chunk"
        if self._deaths[number] < _MAX_DEATHS * (self._n_actors if number is None else 1):
            self._progress.warn(f"an actor of Ray died {where} ({_shorten(error)}); another one replaces it")
            return
        raise ResourceError(
            f"{self._deaths[number]} actors of Ray died {where}; the last one: {_shorten(error)}. If memory ran out, lower "
            "score.ray.actors or score.tokens_per_batch. Finished shards are kept: run the same command to resume."
        ) from error


@contextlib.contextmanager
def connect(settings: Ray, n_actors: int) -> Iterator[Any]:
    """Yield ray, connected to its cluster, or started on this machine and stopped afterwards."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise UsageError(
            "score.ray is set, but Ray is not installed. Install it (pip install 'prefcache[ray]'), or leave score.ray out."
        ) from None
    if ray.is_initialized():
        yield ray
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if address and host and port.isdigit():
        # Where nothing listens, Ray itself would wait many minutes, silently.
        try:
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise _no_ray_at(address, error) from None
    local = {"num_cpus": n_actors * settings.cpus, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    try:
        with _keep_sigterm_handler():
            try:
                ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else local))
            except Exception as error:  # Ray raises many types, for as many reasons.
                if address:
                    raise _no_ray_at(address, error) from None
                raise ResourceError(
                    f"Ray did not start on this machine ({_shorten(error)}). Leave score.ray out to score without it."
                ) from None
        yield ray
    finally:
        ray.shutdown()


def _no_ray_at(address: str, error: Exception) -> UsageError:
    return UsageError(
        f"Cannot connect to Ray at {address} ({_shorten(error)}). Start it there (ray start --head), set "
        "RAY_AUTH_MODE=token if it asks for a token, or leave out score.ray.address and RAY_ADDRESS to start one here."
    )


@contextlib.contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Restore our handler, which reports the interrupt; Ray's ends the process silently."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _shorten(error: Exception) -> str:
    """Return the sentence of Ray's paragraphs that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    prefix = "The actor is dead because "
    text = next((line.removeprefix(prefix) for line in lines if line.startswith(prefix)), lines[0] if lines else "")
    text = text.partition(" Some common causes")[0][:300].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
