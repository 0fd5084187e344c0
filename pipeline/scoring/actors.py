"""Scoring by actors of Ray, where one machine is not enough: each is a Scorer of its own, and all fill the same cache.

Plain actors, to which chunks are handed out, and not ray.data: the sequences lie on a disk that all machines share and
the rows go there too, so there is nothing for a data set to carry. The cache is the checkpoint. A chunk whose actor died
goes to another one, and as between any scorers its first record wins.

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

from pipeline import identity
from pipeline.config import Ray, Score
from pipeline.errors import IdentityError, ResourceError, UsageError
from pipeline.identity import Reference
from pipeline.progress import Progress
from pipeline.scoring.engines import engine_module
from pipeline.scoring.scorer import Scorer, in_order
from pipeline.stored import artifact
from pipeline.stored.cache import Cache, Plan
from pipeline.stored.prepared import Prepared, Sequences

# Deaths at one chunk, or of each actor on average before any has begun, after which it is no accident.
_DEATHS = 3
_PATIENCE_SECONDS = 30.0
_ANSWER_SECONDS = 10.0
# Nothing but slots and counts goes through Ray: the least store that it takes.
_STORE_BYTES = 80 << 20
# Read when ray is imported. It reports to its makers unless told not to, and prints to stdout what is said here already.
_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_OURS = {
    "num_cpus": "score.ray.cpus",
    "num_gpus": "score.ray.gpus",
    "max_restarts": "nothing: a new actor takes the place of a dead one",
    "max_task_retries": "nothing: another actor gets the chunk of a dead one",
    "max_concurrency": "nothing: an actor has one chunk at a time",
    "lifetime": "nothing: actors end with the command",
    "name": "nothing: actors have no names",
}


@dataclass(frozen=True)
class Work:
    """What an actor has to know, wherever it runs."""

    score: Score
    reference: Reference
    numerics: dict[str, str]
    cache: Path
    model_id: str
    prepared: Path
    prepared_id: str
    sample: tuple[int, ...]
    folder: Path  # where the command was run, to which paths are relative
    code: str
    variables: dict[str, str]


class Answer(NamedTuple):
    n_tokens: int | None  # of the chunk; None: another scorer is at it
    said: list[tuple[str, str]]


# -- in the actor's process ------------------------------------------------------------------------------------------


class ScoringActor:
    """A Scorer in a process of Ray's."""

    def __init__(self, work: Work) -> None:
        self._work, self._progress = work, _Kept()
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
        _check_numerics(work)
        sequences = Sequences(prepared.table())
        self._scorer = Scorer(work.score, work.reference, work.numerics, cache, sequences, self._progress)
        self._scorer.check(list(work.sample))
        return Answer(None, self._progress.taken())

    def score(self, slots: np.ndarray, wait: bool) -> Answer:
        assert self._scorer is not None
        return Answer(self._scorer.score(slots, wait), self._progress.taken())


class _Kept(Progress):
    """Keeps what is said, for the process that has a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._said: list[tuple[str, str]] = []

    def say(self, line: str) -> None:
        self._said.append(("say", line))

    def warn(self, line: str) -> None:
        self._said.append(("warn", line))

    def taken(self) -> list[tuple[str, str]]:
        said, self._said = self._said, []
        return said


def _check_machine(work: Work) -> None:
    if _code() != work.code:
        raise UsageError(
            f"{platform.node()}, where an actor of Ray runs, has another prefcache than the machine that asks it. Install "
            "the same one on every machine of the cluster."
        )
    for path in (work.folder, *(work.folder / each for each in (work.reference.folder, work.prepared, work.cache))):
        if not path.exists():
            raise UsageError(
                f"{platform.node()}, where an actor of Ray runs, has no {path}. Model, prepared data and cache must have "
                "the same paths on every machine of the cluster."
            )


def _check_numerics(work: Work) -> None:
    found = engine_module(work.score.engine).numerics(work.reference, work.score)
    if found != work.numerics:
        raise IdentityError(
            f"{platform.node()}, where an actor of Ray runs, computes otherwise than the machine that asks it "
            f"({identity.differences(found, work.numerics)}). Install the same versions on every machine of the cluster."
        )


def _code() -> str:
    """A hash of what there is to import: an actor's must be that of the process that asks it."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return artifact.checksum_bytes(b"".join(file.read_bytes() for file in files))


# -- in the process that asks ----------------------------------------------------------------------------------------


class Pool:
    """Actors, in place of one Scorer: check, run and close are as its own."""

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
            model_id=cache.reference["model_id"],
            prepared=prepared.folder,
            prepared_id=prepared.id,
            sample=(),
            folder=Path.cwd(),
            code=_code(),
            variables={key: os.environ[key]} if score.engine == "server" and key in os.environ else {},
        )
        self._ray: Any = None
        self._resources = contextlib.ExitStack()
        self._under_way: dict[Any, tuple[Any, int | None]] = {}  # answer to come -> its actor, and number of the chunk
        self._idle: list[Any] = []
        self._deaths: Counter[int | None] = Counter()
        self._said: set[str] = set()

    def check(self, sample: list[int]) -> None:
        """Start the actors. Each compares its engine with the plain forward; returns once the first has."""
        if strange := next((name for name in self._settings.options if name in _OURS), None):
            raise UsageError(f"score.ray.options has {strange}, which is said by {_OURS[strange]}. Leave it out there.")
        self._work = replace(self._work, sample=tuple(sample))
        self._ray = self._resources.enter_context(_connected(self._settings, self._n_actors))
        actors = [self._started() for _ in range(self._n_actors)]
        self._say_where_there_is_no_room(actors)
        while not self._idle:
            for _ in self._answers():
                pass

    def run(self, plan: Plan, rank: int, world: int) -> Iterator[int]:
        """Score what is missing; yields the tokens of each chunk that is done, by an actor or another scorer."""
        chunks = in_order(plan, rank, world)
        todo, taken = deque(range(len(chunks))), deque[int]()
        n_left = len(chunks)
        while n_left:
            while self._idle and (todo or taken):
                wait = not todo
                number = (taken if wait else todo).popleft()
                actor = self._idle.pop()
                self._under_way[actor.score.remote(chunks[number], wait)] = actor, number
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
            for actor in [*self._idle, *(actor for actor, _ in self._under_way.values())]:
                self._ray.kill(actor)
        finally:
            self._resources.close()

    # -- actors ------------------------------------------------------------------------------------------------------

    def _started(self) -> Any:
        options = self._settings.options
        try:
            kind = self._ray.remote(ScoringActor).options(
                num_cpus=self._settings.cpus, num_gpus=self._n_gpus, **options
            )
            actor = kind.remote(self._work)
        except (ValueError, TypeError) as error:
            raise UsageError(f"score.ray: Ray takes no such actor ({_short(error)}). See score.ray.options.") from None
        self._under_way[actor.begin.remote()] = actor, None
        return actor

    def _say_where_there_is_no_room(self, actors: list[Any]) -> None:
        built, _ = self._ray.wait([actor.__ray_ready__.remote() for actor in actors], timeout=_PATIENCE_SECONDS)
        if not built:
            needs = {"CPU": self._settings.cpus, "GPU": f"{self._n_gpus:g}", **self._settings.options}
            has = self._ray.cluster_resources()
            self._progress.warn(
                f"Ray has not begun an actor in {_PATIENCE_SECONDS:g} s. One takes "
                f"{', '.join(f'{name} {n}' for name, n in needs.items())}; all machines together have "
                f"{', '.join(f'{name} {has.get(name, 0):g}' for name in ('CPU', 'GPU'))}. It is waited for."
            )

    def _answers(self) -> Iterator[tuple[int, Answer | None]]:
        """Of chunks, as they come; None where its actor died. An actor that has answered is idle, for a dead one
        another is started."""
        done, _ = self._ray.wait(list(self._under_way))
        for answer in done:
            actor, number = self._under_way.pop(answer)
            found: Answer | None = None
            try:
                found = self._ray.get(answer)
            except self._ray.exceptions.RayTaskError as error:
                # What the actor raised, as if it had been raised here.
                raise error.cause from error
            except self._ray.exceptions.RayError as error:
                _refuse_unbuilt(error)
                self._bury(number, error)
                self._started()
            if found is not None:
                self._welcome(actor, number, found)
            if number is not None:
                yield number, found

    def _welcome(self, actor: Any, number: int | None, found: Answer) -> None:
        self._idle.append(actor)
        if number is None:
            self._deaths[None] = 0
        for how, line in found.said:
            # Once for all actors; warnings each time.
            if how == "warn":
                self._progress.warn(line)
            elif line not in self._said:
                self._said.add(line)
                self._progress.say(line)

    def _bury(self, number: int | None, error: Exception) -> None:
        self._deaths[number] += 1
        at = "before a chunk" if number is None else "at a chunk"
        if self._deaths[number] < _DEATHS * (self._n_actors if number is None else 1):
            self._progress.warn(f"an actor of Ray died {at} ({_short(error)}); another takes its place")
            return
        raise ResourceError(
            f"{self._deaths[number]} actors of Ray died {at}, the last of them so: {_short(error)}. If it was memory, set "
            "score.ray.actors or score.tokens_per_batch lower. What was finished is kept: run the same command to go on."
        ) from error


@contextlib.contextmanager
def _connected(settings: Ray, n_actors: int) -> Iterator[Any]:
    """Ray, connected to its cluster, or begun here and ended again."""
    ray = _imported()
    if ray.is_initialized():
        yield ray
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_answers(address)
    alone = {"num_cpus": n_actors * settings.cpus, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    try:
        with _own_sigterm():
            try:
                ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else alone))
            except Exception as error:  # It has many, for as many reasons.
                if address:
                    raise _no_ray(address, error) from None
                raise ResourceError(
                    f"Ray did not start on this machine ({_short(error)}). Leave score.ray out to score without it."
                ) from None
        yield ray
    finally:
        ray.shutdown()


def _imported() -> Any:
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise UsageError(
            "score.ray is set, and Ray is not installed. Install it (pip install 'prefcache[ray]'), or leave score.ray out."
        ) from None
    return ray


def _check_answers(address: str) -> None:
    """That something listens there: Ray itself would wait for many minutes, without a word."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
        except OSError as error:
            raise _no_ray(address, error) from None


def _no_ray(address: str, error: Exception) -> UsageError:
    return UsageError(
        f"No Ray to be used at {address} ({_short(error)}). Start one there (ray start --head), set "
        "RAY_AUTH_MODE=token if it asks for a token, or leave score.ray.address and RAY_ADDRESS out for one on this machine."
    )


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray's handler ends a process without a word, ours says that it was interrupted."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _refuse_unbuilt(error: Exception) -> None:
    """Where the very import of this file fails, no other try will do better."""
    if getattr(error, "actor_init_failed", False):
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(
            f"An actor of Ray cannot begin on its machine ({reason}). Install prefcache there, the same one as here, with "
            "all that it needs."
        ) from None


def _short(error: Exception) -> str:
    """Of Ray's paragraphs, the sentences that say what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = "The actor is dead because "
    said = next((line.removeprefix(why) for line in lines if line.startswith(why)), lines[0] if lines else "")
    said = said.partition(" Some common causes")[0][:300].rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
