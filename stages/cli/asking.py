"""Questions about data, references and rewards: SQL, saved questions, the report, single examples."""

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import UsageError
from stages.cli.program import loaded, main, print_result, stage

if TYPE_CHECKING:
    from stages.inspect import Experiment


def answer(function: Callable[..., None]) -> Callable[..., None]:
    """How the answer to a query is given."""
    for option in (
        click.option(
            "--timeout", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True, help="Seconds."
        ),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            default=50,
            show_default=True,
            help="Most rows of the table; else all.",
        ),
        click.option("--out", metavar="FILE", help="Write all rows there: .parquet, .arrow, .jsonl or .csv."),
        click.option("--json", "as_json", is_flag=True, help="The same as --format json."),
        click.option(
            "--format",
            "form",
            type=click.Choice(["table", "csv", "json", "parquet", "markdown"]),
            default="table",
            show_default=True,
            help="How rows are printed.",
        ),
    ):
        function = option(function)
    return function


@main.command()
@click.argument("query", required=False)
@click.argument("folder", required=False)
@click.option("--views", "list_views", is_flag=True, help="Describe the views and their columns.")
@answer
def sql(query: str | None, folder: str | None, list_views: bool, **answered: Any) -> None:
    """Ask one SELECT about an experiment, or several at a prompt.

    \b
        prefcache sql runs/demo
        prefcache sql "select run, avg(margin), avg(correct::int) from rewards group by run"
        prefcache sql "select * from examples where n_chosen > 2 * n_rejected" runs/demo
        prefcache sql "select * from pairs where margin < -20" runs/demo --out runs/against.parquet

    Without QUERY it opens a prompt. --views describes the views, among them examples, pairs, reference, rewards and runs. FOLDER is a config, or its `out`; it can be left out where runs/ has only one. Queries read nothing else.
    """
    from stages import inspect, tables

    if list_views:
        where = folder or query
        tables.views(inspect.Experiment(where).describe() if where else inspect.describe())
        return
    if query and folder is None and _exists(query):
        query, folder = None, query
    if query is not None:
        _answer(inspect.Experiment(folder), query, None, **answered)
        return
    if not sys.stdin.isatty():
        raise UsageError("No query. Ask one, as in `prefcache sql 'select * from rewards'`, or see --views.")
    from stages import prompt

    experiment = inspect.Experiment(folder)
    names = [name for view, _, columns in experiment.describe() for name in (view, *(column for column, _ in columns))]
    prompt.run(lambda query: _print_answer(experiment, query, None, **answered), experiment.cancel, names)


@main.command()
@click.argument("name", required=False)
@click.argument("folder", required=False)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the question, e.g. limit=5."
)
@click.option("--sql", "as_sql", is_flag=True, help="Print the question's SQL, to begin from.")
@answer
def ask(name: str | None, folder: str | None, settings: tuple[str, ...], as_sql: bool, **answered: Any) -> None:
    """Ask a ready question; without NAME, list them.

    \b
        prefcache ask
        prefcache ask length-bias runs/demo
        prefcache ask reference-probability runs/demo --set share=0.3 --out runs/clear.parquet
        prefcache train data/demo/config.yaml --set train.run=clear --set train.only=runs/clear.parquet

    FOLDER is a config, or its `out`; it can be left out where runs/ has only one. Rows with an example_id can be trained on: train.only.
    """
    from pipeline import questions
    from stages import inspect, tables

    if name is None:
        tables.questions(questions.QUESTIONS.values())
        return
    question = questions.question(name)
    if as_sql:
        click.echo(question.sql, nl=False)
        return
    said = dict(setting.partition("=")[::2] for setting in settings)
    _answer(inspect.Experiment(folder), question.sql, question.values(said), **answered)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # longer than a name may be, as queries are
        return False


def _answer(experiment: "Experiment", query: str, parameters: dict[str, Any] | None, **answered: Any) -> None:
    # What is being written has a temporary to remove.
    with _killed_by_signals() if answered["out"] is None else contextlib.nullcontext():
        _print_answer(experiment, query, parameters, **answered)


def _print_answer(
    experiment: "Experiment",
    query: str,
    parameters: dict[str, Any] | None,
    *,
    form: str,
    as_json: bool,
    out: str | None,
    limit: int,
    timeout: float,
) -> None:
    """As a table, for a machine, or into a file."""
    from stages import answers, tables

    form = "json" if as_json else form
    with experiment.asked(query, parameters, timeout) as result:
        if out is not None:
            click.echo(f"{out}: {answers.save(result, Path(out)):,} rows")
        elif form == "table":
            tables.rows(result.columns, result.rows(), limit)
        else:
            answers.show(result, form)
        for line in result.why_empty():
            click.echo(line, err=True)


@contextlib.contextmanager
def _killed_by_signals() -> Iterator[None]:
    """A running query does not let Python's handlers run; and it has nothing to lose."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@main.command()
@click.option("--run", "names", multiple=True, metavar="RUN", help="A run of the experiment. Several are compared.")
@click.option("--output", "--out", metavar="FILE", help="Where the page goes.  [default: OUT/RUN/report.html]")
@stage
def report(
    config: str | None,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    names: tuple[str, ...],
    output: str | None,
) -> None:
    """Write what an experiment has come to as one HTML page.

    \b
        prefcache report data/demo/config.yaml
        prefcache report runs/demo --run trained --run ipo --output runs/compared.html

    CONFIG is a config, for its run, or the `out` of one, for all runs in it. What is not there yet is named, with the command that makes it, so an unfinished run has a page too; so have prepared data alone. The page needs no other file and no network, and runs no script. That of several runs, or of none, is OUT/report.html.
    """
    from pipeline.progress import Progress
    from stages import report

    path = Path(output) if output else None
    if config is not None and Path(config).is_dir():
        if overrides:
            raise UsageError(f"--set changes a config, and {config} is an experiment's folder. Leave one of them out.")
        result = report.of_folder(Path(config), names, path, Progress(quiet))
    else:
        with loaded(config, overrides, quiet) as (settings, progress):
            said = shlex.join([*([config] if config else []), *(f"--set={each}" for each in overrides)])
            result = report.of_config(settings, said, names, path, progress)
    print_result(result, as_json, "reported")


@main.command()
@click.argument("example", metavar="EXAMPLE")
@stage
def show(example: str, config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Show one example token by token, as both models see it.

    \b
        prefcache show 3f2a data/demo/config.yaml
        prefcache show 3f2a data/demo/config.yaml --set train.run=ipo --json

    EXAMPLE is an example_id, as every view has it, or its beginning. The reference's log-probs come from the cache, the policy's are computed now from the model of the run (train.run). Colours show where the policy gained on its reference and where it lost.
    """
    with loaded(config, overrides, quiet) as (settings, progress):
        from stages import show

        print_result(show.run(settings, progress, example), as_json, "shown")
