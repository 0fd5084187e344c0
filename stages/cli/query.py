"""Query data, references and rewards: SQL, ready-made questions, the report, single examples."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefcache.cli.app import force, main, open_config, output_path, print_result, stage
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.visible_text import count, visible

if TYPE_CHECKING:
    from prefcache.commands.query import Experiment
    from prefcache.pipeline.questions import Question
    from prefcache.pipeline.views.query_worker import Answer


def output_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options for the output of a query."""
    for option in (
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=600,
            show_default=True,
            help="Seconds after which the query is ended.",
        ),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            default=50,
            show_default=True,
            help="Maximum number of rows in a table. Other formats print all rows.",
        ),
        force,
        click.option(
            "--out", "--output", metavar="FILE", help="Write all rows to FILE: .parquet, .arrow, .jsonl or .csv."
        ),
        click.option(
            "--json",
            "as_json",
            is_flag=True,
            help="Same as --format json, with invisible characters escaped.",
        ),
        click.option(
            "--format",
            "form",
            type=click.Choice(["table", "csv", "json", "parquet", "markdown"]),
            default="table",
            show_default=True,
            help="Format of the printed rows.",
        ),
    ):
        function = option(function)
    return function


@main.command()
@click.argument("query", required=False)
@click.argument("folder", required=False)
@click.option("--views", "list_views", is_flag=True, help="Describe the views and their columns.")
@output_options
def sql(query: str | None, folder: str | None, list_views: bool, **output: Any) -> None:
    """Query an experiment in SQL, once or at a prompt.

    \b
        prefcache sql runs/demo
        prefcache sql "select run, avg(margin) from rewards group by run"
        prefcache sql "select * from examples where n_chosen > 99" runs/demo
        prefcache sql "select * from pairs where margin < 0" --out pairs.csv

    Without QUERY it opens a prompt. --views describes the views, among them examples, pairs, reference, rewards and runs. FOLDER is a config or its `out`; leave it out if runs/ has only one experiment. A query is one SELECT and reads the views only. CSV output holds texts unchanged, including those that a spreadsheet takes for formulas (=, +, -, @): import such columns as text.
    """
    from prefcache.commands.query import Experiment
    from prefcache.pipeline import views
    from prefcache.terminal_output import choices

    if list_views:
        where = folder or query
        choices.print_views(Experiment(where).describe() if where else views.describe())
        return
    if query and folder is None and _exists(query):
        query, folder = None, query
    if query is not None:
        _answer(Experiment(folder), query, _Output(**output))
        return
    if not sys.stdin.isatty():
        raise UsageError("No query. Ask one, as in `prefcache sql 'select * from rewards'`, or see --views.")
    from prefcache import sql_repl

    experiment = Experiment(folder)
    sql_repl.run(lambda query: _answer(experiment, query, _Output(**output)), list(experiment.describe()))


@main.command()
@click.argument("name", required=False)
@click.argument("folder", required=False)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Set a parameter of the question, e.g. limit=5."
)
@click.option("--sql", "as_sql", is_flag=True, help="Print the SQL of the question, as a starting point.")
@output_options
def ask(name: str | None, folder: str | None, settings: tuple[str, ...], as_sql: bool, **output: Any) -> None:
    """Ask a ready-made question; without NAME, list them. The rows are followed by a verdict: what was found, and what to do.

    \b
        prefcache ask
        prefcache ask length-bias runs/demo
        prefcache ask reference-probability runs/demo --out clear.parquet
        prefcache train my.yaml --set train.only=clear.parquet

    FOLDER is a config or its `out`; leave it out if runs/ has only one experiment. A file of rows with an example_id selects training examples (train.only). CSV output holds texts unchanged, including those that a spreadsheet takes for formulas (=, +, -, @): import such columns as text.
    """
    from prefcache.commands import query
    from prefcache.pipeline import questions
    from prefcache.terminal_output import choices

    if name is None:
        choices.print_questions(questions.QUESTIONS.values())
        return
    question = questions.get_question(name)
    if as_sql:
        click.echo(question.sql, nl=False)
        return
    values = dict(setting.partition("=")[::2] for setting in settings)
    _answer_question(query.Experiment(folder), question, values, _Output(**output))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # too long for a path, as queries may be
        return False


@dataclass(frozen=True)
class _Output:
    """What the options of `output_options` ask for."""

    form: str
    as_json: bool
    out: str | None
    force: bool
    limit: int
    timeout: float

    @property
    def format(self) -> str:
        return "json" if self.as_json else self.form

    def check(self, experiment: "Experiment") -> None:
        """Refuse a file that cannot or must not be written, before the query runs."""
        from prefcache import query_output

        if self.out is not None:
            query_output.check_output(Path(self.out), experiment.inputs, self.force)

    def write(self, answer: "Answer") -> None:
        """Print the rows, or write them into the file."""
        from prefcache import query_output
        from prefcache.terminal_output import answer_rows

        if self.out is not None:
            click.echo(visible(f"{self.out}: {count(query_output.save(answer, Path(self.out)), 'row')}"))
        elif self.format == "table":
            answer_rows.print_rows(answer.columns, answer.rows(), self.limit)
        else:
            query_output.print_answer(answer, self.format)


def _answer(experiment: "Experiment", query: str, output: _Output) -> None:
    from prefcache.pipeline.progress import Progress

    output.check(experiment)
    with Progress(command="sql"), experiment.ask(query, None, output.timeout) as answer:
        output.write(answer)
        for line in answer.explain_empty():
            click.echo(visible(line), err=True)


def _answer_question(experiment: "Experiment", question: "Question", settings: dict[str, str], output: _Output) -> None:
    """Print the rows of a ready question and its verdict. Formats for machines have the verdict on stderr, JSON has it inside."""
    from prefcache import query_output
    from prefcache.pipeline.progress import Progress
    from prefcache.terminal_output import answer_rows

    output.check(experiment)
    if output.out is not None and "limit" in question.parameters:
        settings = {"limit": "null"} | settings  # a file is for use, and has all rows
    with Progress(command="ask"), experiment.ask_question(question, settings, output.timeout) as answered:
        if output.out is None and output.format == "json":
            query_output.print_question(answered)
            return
        output.write(answered.answer)
        verdict = answered.verdict()
    answer_rows.print_verdict(verdict, err=output.out is None and output.format != "table")


@main.command(short_help="Browse the examples in a web browser.")
@click.argument("folder", required=False)
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on.  [default: 8790, or the next free one]")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Others than this machine's own are not encrypted.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the address only.")
def ui(folder: str | None, port: int | None, host: str, quiet: bool) -> None:
    """Browse an experiment's examples in a web browser on this machine.

    \b
        prefcache ui runs/demo
        prefcache ui my.yaml --port 9000

    Prints an address with a token; whoever has it may read the experiment. The pages list examples by source, length, margin, outcome, text or SQL; show one with its tokens coloured by how likely each model finds them; answer the ready questions; and save selections for train.only in OUT/selections. Nothing else is written. FOLDER is a config or its `out`; leave it out if runs/ has only one experiment.

    Needs starlette and uvicorn: pip install 'prefcache[ui]'. From another machine, use `ssh -L 8790:localhost:8790`.
    """
    from prefcache import view_sources
    from prefcache.pipeline.progress import Progress
    from prefcache.ui import server

    server.run(view_sources.find_experiment(folder), host, port, Progress(quiet, command="ui"))


@main.command()
@click.option(
    "--run", "names", multiple=True, metavar="RUN", help="A run of the experiment; repeat it to compare several."
)
@click.option("--output", "--out", metavar="FILE", help="File for the page.  [default: OUT/RUN/report.html]")
@force
@stage
def report(
    config: str | None,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    names: tuple[str, ...],
    output: str | None,
    force: bool,
) -> None:
    """Write a report of an experiment as one HTML page.

    \b
        prefcache report data/demo/config.yaml
        prefcache report runs/demo --run trained --run ipo --output ab.html

    CONFIG is a config (its run) or its `out` (all runs in it). Unfinished runs, and data that no run has used yet, get a page too: it names what is missing and the command that makes it. A run that does not exist is an error, which names those that do. The page needs no other file, no network and no script. For several runs, or none, the default is OUT/report.html.
    """
    from prefcache.commands import report
    from prefcache.pipeline.progress import Progress

    path = output_path(output, config)
    if config is not None:
        report.refuse_unprepared(Path(config))
    if config is not None and Path(config).is_dir():
        if overrides:
            raise UsageError(f"--set changes a config, and {config} is an experiment's folder. Leave one of them out.")
        with Progress(quiet, command="report") as progress:
            result = report.run_folder(Path(config), names, path, progress, force)
    else:
        with open_config(config, overrides, quiet) as (settings, progress):
            arguments = shlex.join([*([config] if config else []), *(f"--set={override}" for override in overrides)])
            names_run = any(override.startswith("train.run=") for override in overrides)
            result = report.run_config(settings, arguments, names, path, progress, force, config, names_run=names_run)
    print_result(result, as_json)


@main.command()
@click.argument("example", metavar="EXAMPLE")
@stage
def show(example: str, config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Show one example token by token, as both models see it.

    \b
        prefcache show 5cf947 data/demo/config.yaml
        prefcache show 5cf947 data/demo/config.yaml --set train.run=ipo --json

    EXAMPLE is an example_id (a column of the views examples, pairs, steps and rewards) or its first characters. The reference's log-probs come from the cache; the policy's are computed now with the model of the run (train.run). Colours show where the policy gained on its reference and where it lost.
    """
    with open_config(config, overrides, quiet) as (settings, progress):
        from prefcache.commands import show

        print_result(show.run(settings, progress, example), as_json)
