"""Run the reference model once; train on its log-probs as often as you like.

    import prefcache

    prefcache.prepare("my.yaml")
    prefcache.score("my.yaml")
    run = prefcache.train("my.yaml", overrides={"train.beta": 0.2})
    prefcache.sql("select avg(margin) from rewards", "runs/my").df()
    print(prefcache.ask("length-bias", "runs/my").verdict.sentence)

Each function does what the command of its name does, and returns the record that `--json` prints, with absolute paths. `open_cache`
looks log-probs up by token ids, and `prefcache.trl` puts them into TRL's trainers. Nothing heavy is imported before a function needs it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prefcache.pipeline.errors import (
    AlertError,
    CallbackError,
    DataError,
    IdentityError,
    IntegrityError,
    PrefcacheError,
    ResourceError,
    UsageError,
)
from prefcache.pipeline.training.callbacks import (
    Stop,
    TrainCallback,
    TrainCheckpoint,
    TrainEnd,
    TrainEvaluation,
    TrainStart,
    TrainStep,
)

if TYPE_CHECKING:
    from prefcache.command_results import (
        PrepareResult,
        PrepareWaiting,
        ReportResult,
        ScorePlan,
        ScoreResult,
        TrainResult,
    )
    from prefcache.pipeline.config import Config
    from prefcache.pipeline.progress import Progress
    from prefcache.pipeline.training.run_summary import RunSummary
    from prefcache.reference_cache import ReferenceCache
    from prefcache.sql_result import AskResult, SqlResult

    __version__: str

_Result = TypeVar("_Result", bound=Any)

__all__ = [
    "AlertError",
    "CallbackError",
    "DataError",
    "IdentityError",
    "IntegrityError",
    "PrefcacheError",
    "ResourceError",
    "Stop",
    "TrainCallback",
    "TrainCheckpoint",
    "TrainEnd",
    "TrainEvaluation",
    "TrainStart",
    "TrainStep",
    "UsageError",
    "__version__",
    "ask",
    "open_cache",
    "prepare",
    "report",
    "runs",
    "score",
    "sql",
    "train",
]


def prepare(
    config: "str | Path | Mapping[str, Any] | Config",
    *,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> "PrepareResult | PrepareWaiting":
    """Turn preference data into exact token ids.

    `config` is the path of a YAML file, the same as a nested dict, or a loaded config. `overrides` maps keys to values, as
    `{"prepare.max_length": 1024}`.
    """
    from prefcache.commands import prepare as command

    with _progress("prepare", quiet) as progress, _open_config(config, overrides) as loaded:
        return _make_absolute(command.run(loaded, progress))


def score(
    config: "str | Path | Mapping[str, Any] | Config",
    *,
    overrides: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> "ScoreResult | ScorePlan":
    """Score every prepared sequence that the cache lacks; with `dry_run`, only say what there is to score."""
    from prefcache.commands import score as command

    with _progress("score", quiet) as progress, _open_config(config, overrides) as loaded:
        return _make_absolute(command.run(loaded, progress, dry_run))


def train(
    config: "str | Path | Mapping[str, Any] | Config",
    *,
    overrides: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainCallback] = (),
    continue_stopped: bool = False,
    quiet: bool = False,
) -> "TrainResult | None":
    """Train the policy against the cached log-probs.

    Each of `callbacks` sees the steps, evaluations and checkpoints, and may stop the run; `continue_stopped` takes the remaining steps
    of a run that one has stopped. A run that is already finished trains nothing and calls none of them.

    Started by torchrun or accelerate, every process calls `train`. Callbacks are called in the main process, which returns the result;
    the others return None.
    """
    from prefcache.commands import train as command
    from prefcache.pipeline.process_pool import rank_and_world

    silent = rank_and_world()[0] != 0  # the main process prints for all
    with _progress("train", quiet, silent) as progress, _open_config(config, overrides) as loaded:
        result = command.run(loaded, progress, callbacks, continue_stopped=continue_stopped)
        return None if result is None else _make_absolute(result)


def report(
    experiment: "str | Path | Mapping[str, Any] | Config",
    output: str | Path | None = None,
    *,
    runs: Sequence[str] = (),
    force: bool = False,
    quiet: bool = False,
) -> "ReportResult":
    """Write an experiment's HTML report. `experiment` is its config or its folder (`out`); `runs` names some of its runs."""
    from prefcache.commands import report as command

    path = Path(output).absolute() if output is not None else None
    if isinstance(experiment, str | Path):
        command.refuse_unprepared(Path(experiment))
        if Path(experiment).is_dir():
            with _progress("report", quiet) as progress:
                return _make_absolute(command.run_folder(Path(experiment), runs, path, progress, force))
    named = str(experiment) if isinstance(experiment, str | Path) else None
    with _progress("report", quiet) as progress, _open_config(experiment, None) as loaded:
        return _make_absolute(command.run_config(loaded, named or "CONFIG", runs, path, progress, force, named))


def runs(experiment: str | Path | None = None) -> "list[RunSummary]":
    """List an experiment's runs: state, steps, held-out figures, bytes on disk, as `prefcache runs` does.

    `experiment` is its folder or config; None means the only one in runs/.
    """
    from prefcache.commands import runs as command

    found = command.run(None if experiment is None else str(experiment))
    return [_make_absolute(run) for run in found.runs]


def sql(
    query: str,
    experiment: str | Path | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    timeout: float | None = None,
) -> "SqlResult":
    """Answer one SELECT over an experiment's views, as `prefcache sql` does: without file or network access.

    `experiment` is its folder or config; None means the only one in runs/.
    """
    from prefcache.commands.query import Experiment
    from prefcache.pipeline import config_file
    from prefcache.sql_result import SqlResult

    where = None if experiment is None else str(experiment)
    with Experiment(where).ask(query, config_file.to_plain(parameters), timeout) as answer:
        return SqlResult.read(answer)


def ask(
    question: str,
    experiment: str | Path | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    timeout: float | None = None,
) -> "AskResult":
    """Answer a ready question, as `prefcache ask` does: rows, and a verdict with a sentence and its numbers.

    `question` is its name, such as length-bias. `experiment` is as for `sql`.
    """
    from prefcache.commands.query import Experiment
    from prefcache.pipeline import config_file
    from prefcache.sql_result import AskResult

    where = None if experiment is None else str(experiment)
    with Experiment(where).ask_question(question, config_file.to_plain(parameters), timeout) as answered:
        return AskResult.read_question(answered)


def open_cache(
    cache: str | Path = "cache",
    *,
    model: str | Path,
    adapter: str | Path | None = None,
    revision: str | None = None,
    score: Mapping[str, Any] | None = None,
    allowed_signers: str | Path | None = None,
    quiet: bool = False,
) -> "ReferenceCache":
    """Open the cached log-probs of a reference model, or create a cache for it.

    `model` is a folder or a hub id, as in a config; `score` has settings of a config's section of that name, such as
    `{"engine": "vllm", "dtype": "bfloat16"}`. `allowed_signers` is a file of those whose rows alone are used.
    """
    from prefcache.reference_cache import ReferenceCache

    return ReferenceCache.open(cache, model, adapter, revision, score or {}, allowed_signers, _progress("score", quiet))


@contextmanager
def _open_config(
    config: "str | Path | Mapping[str, Any] | Config", overrides: Mapping[str, Any] | None
) -> "Iterator[Config]":
    """Load a config, and work in the folder that its paths are relative to."""
    from prefcache.pipeline import config_file
    from prefcache.pipeline.config import Config

    if isinstance(config, str | Path):
        with config_file.open_config(config, overrides or {}) as (loaded, _):
            yield loaded
    elif isinstance(config, Mapping):
        yield config_file.from_tree(config_file.to_plain(config), overrides or {}, "config: ")
    elif isinstance(config, Config):
        yield config_file.from_tree(config.model_dump(mode="json"), overrides) if overrides else config
    else:
        raise UsageError(f"config: found {config!r}, expected the path of a YAML file, a dict or a loaded config.")


def _make_absolute(result: _Result) -> _Result:
    """Make a result's paths absolute while the working folder is the one that they are relative to."""
    paths = {each.name: getattr(result, each.name) for each in fields(result)}
    return replace(result, **{name: path.absolute() for name, path in paths.items() if isinstance(path, Path)})


if not TYPE_CHECKING:  # a type checker would take every name for an attribute

    def __getattr__(name: str) -> str:
        if name == "__version__":
            from importlib.metadata import version

            return version("prefcache")
        raise AttributeError(f"module 'prefcache' has no attribute {name!r}")


def _progress(command: str, quiet: bool, silent: bool = False) -> "Progress":
    from prefcache.pipeline.progress import Progress

    return Progress(quiet, command=command, silent=silent)
