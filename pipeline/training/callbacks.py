"""Callbacks: a user's code that watches a run and may stop it.

A callback gets numbers and paths, never the policy or the reference, so it cannot change what is computed. Callbacks run on the main
process; a stop or a failure there is agreed by all processes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefcache.pipeline.errors import CallbackError, UsageError

if TYPE_CHECKING:  # `import prefcache` reads this file, and loads no pydantic
    from prefcache.pipeline.stored.records import StoppedEntry

_LONGEST_REASON = 500  # characters of it that are stored


@dataclass(frozen=True)
class Stop:
    """Returned by a callback to stop the run. The run's manifest keeps the reason."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainStart:
    run: Path
    step: int  # 0, or the step from which the run resumes
    n_steps: int
    metrics: Mapping[str, float]  # of the evaluation before the first step, such as eval_loss


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    run: Path
    step: int  # the number of steps taken
    n_steps: int
    epoch: float
    metrics: Mapping[str, float]  # as logged: loss, learning_rate, rewards/accuracies, ...


@dataclass(frozen=True, kw_only=True)
class TrainEvaluation:
    run: Path
    step: int
    n_steps: int
    epoch: float
    metrics: Mapping[str, float]  # as logged: eval_loss, eval_rewards/accuracies, ...


@dataclass(frozen=True, kw_only=True)
class TrainCheckpoint:
    run: Path
    step: int
    n_steps: int
    folder: Path  # deleted once train.keep_checkpoints newer ones exist, and at the end (train.checkpoints_at_end)


@dataclass(frozen=True, kw_only=True)
class TrainEnd:
    run: Path
    step: int
    n_steps: int
    metrics: Mapping[str, float]  # of the evaluation of the weights that were kept
    model: Path
    stopped: bool  # by a callback


_Event = TrainStart | TrainStep | TrainEvaluation | TrainCheckpoint | TrainEnd
_METHODS = ("on_start", "on_step", "on_evaluation", "on_checkpoint", "on_end")
_MAY_STOP = ("on_step", "on_evaluation")


class TrainCallback:
    """Watch a run: override the methods you need.

    `on_step` and `on_evaluation` may return `Stop("why")`. The run then ends with this step, as one whose steps are all taken: it is
    evaluated, and its model is written.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A misspelt method would never be called, and nobody would notice.
        methods = (name for name, value in vars(cls).items() if name.startswith("on_") and callable(value))
        if strange := next((name for name in methods if name not in _METHODS), None):
            raise UsageError(f"{cls.__name__}.{strange} is never called. A callback has {', '.join(_METHODS)}.")

    def on_start(self, event: TrainStart, /) -> None:
        """The first step is about to be taken, or the first one after an interruption."""

    def on_step(self, event: TrainStep, /) -> Stop | None:
        """A step was taken."""
        return None

    def on_evaluation(self, event: TrainEvaluation, /) -> Stop | None:
        """The held-out examples were evaluated; `on_step` was called before."""
        return None

    def on_checkpoint(self, event: TrainCheckpoint, /) -> None:
        """A checkpoint was written."""

    def on_end(self, event: TrainEnd, /) -> None:
        """The run is finished and its model is written."""


def refuse_others(callbacks: Sequence[TrainCallback]) -> None:
    """Refuse what is not a list of instances of TrainCallback."""
    if not isinstance(callbacks, Sequence):
        raise UsageError(f"callbacks: found {callbacks!r}, expected a list, as in callbacks=[MyCallback()].")
    for each in callbacks:
        if isinstance(each, type):
            raise UsageError(f"callbacks: found the class {each.__name__}, expected an instance: {each.__name__}().")
        if not isinstance(each, TrainCallback):
            raise UsageError(f"callbacks: found {each!r}, expected instances of prefcache.TrainCallback.")


@dataclass(frozen=True)
class _Failure:
    sentence: str


class Callbacks:
    """The callbacks of a run. Every process calls the same methods in the same order."""

    def __init__(self, callbacks: Sequence[TrainCallback], is_main: bool, broadcast: Callable[[Any], Any]) -> None:
        self._callbacks, self._is_main, self._broadcast = callbacks, is_main, broadcast
        self.stop: StoppedEntry | None = None  # what a callback has asked for
        self._failure: _Failure | None = None
        self._error: Exception | None = None  # behind the failure; on the main process
        # Agreed once, so that a run without callbacks exchanges nothing.
        self._is_used: bool = broadcast(bool(callbacks))

    @property
    def ends_run(self) -> bool:
        return self.stop is not None or self.has_failed

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def call(self, method: str, event: _Event) -> None:
        """Call a method of every callback. Afterwards `stop` and `has_failed` are the same on all processes."""
        if not self._is_used or self.has_failed:
            return
        outcome = self._broadcast(self._call_each(method, event) if self._is_main else None)
        if isinstance(outcome, _Failure):
            self._failure, self.stop = outcome, None
        elif self.stop is None:
            self.stop = outcome

    def raise_failure(self, consequence: str) -> None:
        """End the run if a callback has failed, with its own traceback on the main process."""
        if self._failure is not None:
            raise CallbackError(f"{self._failure.sentence} {consequence}") from self._error

    def _call_each(self, method: str, event: _Event) -> "StoppedEntry | _Failure | None":
        from prefcache.pipeline.stored.records import StoppedEntry

        first = None
        for callback in self._callbacks:
            name = type(callback).__name__
            try:
                # Each gets metrics of its own, so none can change what another sees.
                own = event if isinstance(event, TrainCheckpoint) else replace(event, metrics=dict(event.metrics))
                asked = getattr(callback, method)(own)
                _refuse_answer(asked, f"{name}.{method}", method in _MAY_STOP)
            except Exception as error:
                self._error = error
                return _Failure(f"{name}.{method} failed at step {event.step} ({type(error).__name__}: {error}).")
            if asked is not None and first is None:
                # A lone surrogate cannot be written as UTF-8.
                reason = str(asked.reason)[:_LONGEST_REASON].encode(errors="replace").decode()
                first = StoppedEntry(step=event.step, of=event.n_steps, callback=name, reason=reason)
        return first


def _refuse_answer(asked: object, method: str, may_stop: bool) -> None:
    if asked is None or (may_stop and isinstance(asked, Stop)):
        return
    expected = "None or prefcache.Stop('why')" if may_stop else f"None: only {' and '.join(_MAY_STOP)} may stop a run"
    raise TypeError(f"{method} returned {asked!r}; expected {expected}")
