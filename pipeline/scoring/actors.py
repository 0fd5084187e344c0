"""Scoring by Ray actors, where one machine is not enough: each actor is a Scorer, and all fill the same cache.

Plain actors that are handed chunks, not ray.data: the sequences lie on a disk that all machines share and the rows go
there too, so a data set would carry nothing. The cache is the checkpoint. The chunk of a dead actor goes to another one,
and as between any scorers its first record wins.

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

from prefcache.pipeline import identity
from prefcache.pipeline.config import Ray, Score
from prefcache.pipeline.errors import IdentityError, ResourceError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.scoring.engines import find_engine
from prefcache.pipeline.scoring.scorer import Scorer, order_chunks
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.prepared import Prepared, Sequences
from prefcache.pipeline.stored.scoring_plan import Plan

# After so many deaths at one chunk, or per actor before any has started, scoring fails.
_MAX_DEATHS = 3
_START_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
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
class Work:
    """Everything that an actor needs, wherever it runs."""

    score: Score
    reference: Reference
    numerics: dict[str, str]
    cache: Path
    model_id: str
    prepared: Path
    prepared_id: str
    sample: tuple[int, ...]
    folder: Path  # where the command runs; paths are relative to it
    code: str
    variables: dict[str, str]


class Message(NamedTuple):
    text: str
    is_warning: bool


class Answer(NamedTuple):
    n_tokens: int | None  # of the chunk; None if another scorer has claimed it
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
        work = self._work
        os.environ.update(work.variables)
        _check_machine(work)
        os.chdir(work.folder)
        prepared, cache = Prepared(work.prepared), Cache(work.cache, work.model_id)
        if prepared.id != work.prepared_id:
            raise IdentityError(f"{work.prepared} was prepared again meanwhile. Run the same command again.")
        numerics = find_engine(work.score.engine).numerics(work.reference, work.score)
        if numerics != work.numerics:
            raise IdentityError(
                f"An actor of Ray on {platform.node()} would compute differently from the machine that started it "
                f"({identity.differences(numerics, work.numerics)}). Install the same versions on every machine of the cluster."
            )
        sequences = Sequences(prepared.table())
        images = prepared.prompt_images(work.reference.processor, cache.folder.parent)
        self._scorer = Scorer(work.score, work.reference, work.numerics, cache, sequences, self._progress, images)
        self._scorer.check(list(work.sample))
        return Answer(None, self._progress.take())

    def score(self, slots: np.ndarray, wait: bool) -> Answer:
        assert self._scorer is not None
        return Answer(self._scorer.score(slots, wait), self._progress.take())


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


def _check_machine(work: Work) -> None:
    if _code_checksum() != work.code:
        raise UsageError(
            f"An actor of Ray on {platform.node()} has another prefcache than the machine that started it. Install the same "
            "one on every machine of the cluster."
        )
    for path in (work.folder, *(work.folder / path for path in (work.reference.folder, work.prepared, work.cache))):
        if not path.exists():
            raise UsageError(
                f"{platform.node()}, where an actor of Ray runs, has no {path}. Model, prepared data and cache must have "
                "the same paths on every machine of the cluster."
            )


# -- in the command's process ----------------------------------------------------------------------------------------


class Pool:
    """Actors in place of one Scorer, with the same check, run and close."""

    def __init__(
        self,
        score: Score,
        reference: Reference,
        numerics: dict[str, str],
        cache: Cache,
        prepared: Prepared,
        n_chunks: int,
        progress: Progress,
    ) -> None:
        assert score.ray is not None
        self._settings, self._progress = score.ray, progress
        self._n_actors = min(score.ray.actors, n_chunks)
        device = numerics.get("device", score.device)
        self._n_gpus = score.ray.gpus or (1 if device == "cuda" else 0)
        key = score.server.key_variable
        self._work = Work(
            score=score.model_copy(update={"ray": None, "device": device}),
            reference=reference,
            numerics=numerics,
            cache=cache.folder,
            model_id=cache.reference.model_id,
            prepared=prepared.folder,
            prepared_id=prepared.id,
            sample=(),
            folder=Path.cwd(),
            code=_code_checksum(),
            variables={key: os.environ[key]} if score.engine == "server" and key in os.environ else {},
        )
        self._ray: Any = None
        self._resources = contextlib.ExitStack()
        self._pending: dict[Any, tuple[Any, int | None]] = {}  # future -> its actor, and the chunk's number
        self._idle: list[Any] = []
        self._deaths: Counter[int | None] = Counter()
        self._said: set[str] = set()

    def check(self, sample: list[int]) -> None:
        """Start the actors, each of which compares its engine with the plain forward; return once the first one has."""
        if reserved := next((name for name in self._settings.options if name in _RESERVED), None):
            raise UsageError(f"score.ray.options has {reserved}, which {_RESERVED[reserved]}. Leave it out there.")
        self._work = replace(self._work, sample=tuple(sample))
        self._ray = self._resources.enter_context(connect(self._settings, self._n_actors))
        self._warn_if_none_starts([self._start_actor() for _ in range(self._n_actors)])
        while not self._idle:
            for _ in self._answers():
                pass

    def run(self, plan: Plan, rank: int, world: int) -> Iterator[int]:
        """Score what is missing; yield the tokens of each finished chunk, by an actor or another scorer."""
        chunks = order_chunks(plan, rank, world)
        todo, taken = deque(range(len(chunks))), deque[int]()
        n_left = len(chunks)
        while n_left:
            while self._idle and (todo or taken):
                wait = not todo
                number = (taken if wait else todo).popleft()
                actor = self._idle.pop()
                self._pending[actor.score.remote(chunks[number], wait)] = actor, number
            for number, answer in self._answers():
                if answer is None:
                    todo.appendleft(number)
                elif answer.n_tokens is None:
                    taken.append(number)
                else:
                    n_left -= 1
                    yield answer.n_tokens

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
        self._pending[actor.begin.remote()] = actor, None
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

    def _answers(self) -> Iterator[tuple[int, Answer | None]]:
        """Wait for answers; yield each chunk's number with its answer, or with None if its actor died.

        An actor that has answered is idle; a dead one is replaced.
        """
        done, _ = self._ray.wait(list(self._pending))
        for future in done:
            actor, number = self._pending.pop(future)
            answer: Answer | None = None
            try:
                answer = self._ray.get(future)
            except self._ray.exceptions.RayTaskError as error:
                # The actor's own error, as if it had been raised here.
                raise error.cause from error
            except self._ray.exceptions.RayError as error:
                self._count_death(number, error)
                self._start_actor()
            if answer is not None:
                self._idle.append(actor)
                if number is None:
                    self._deaths[None] = 0
                for text, is_warning in answer.messages:
                    if is_warning:
                        self._progress.warn(text)
                    elif text not in self._said:  # once for all actors
                        self._said.add(text)
                        self._progress.say(text)
            if number is not None:
                yield number, answer

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
