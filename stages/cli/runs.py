"""Runs on disk: list them, and remove what nobody needs."""

from typing import Any

import click

from prefcache.cli.app import main, print_result


@main.command(short_help="List runs: state, results, disk.")
@click.argument("folder", required=False, metavar="[FOLDER]")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON, with invisible characters escaped.")
def runs(folder: str | None, as_json: bool) -> None:
    """List an experiment's runs: state, steps, results, disk.

    \b
        prefcache runs
        prefcache runs runs/demo
        prefcache runs data/demo/config.yaml --json

    FOLDER is a config or its `out`; leave it out if runs/ has only one experiment. A run is finished, stopped (by a callback, before its last step), running, unfinished (the command that resumes it is shown) or damaged. Accuracy, margin and loss are those of the held-out examples after training, or at the latest evaluation of an unfinished run. Reads records and hashes no weights; `prefcache doctor` does that.
    """
    from prefcache.commands import runs

    print_result(runs.run(folder), as_json)


@main.command(short_help="Remove what no run needs any more.")
@click.argument("folder", required=False, metavar="[FOLDER]")
@click.option("--yes", is_flag=True, help="Remove what is listed. Without it, nothing is removed.")
@click.option("--run", "names", multiple=True, metavar="NAME", help="Look only at this run; repeat it for several.")
@click.option(
    "--also",
    "also",
    multiple=True,
    type=click.Choice(["kept", "stopped", "parts", "other-machines"]),
    help="Include what somebody may still want; repeat it for several.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, with invisible characters escaped.")
def clean(folder: str | None, yes: bool, names: tuple[str, ...], also: tuple[Any, ...], as_json: bool) -> None:
    """Say what of an experiment no command needs any more, and remove it with --yes.

    \b
        prefcache clean
        prefcache clean runs/demo --yes
        prefcache clean runs/demo --run trained --also kept --yes

    Listed are checkpoints of finished runs, and unfinished files of processes that were killed. Only if named by --also: checkpoints that train.checkpoints_at_end kept (kept), the checkpoint from which a stopped run can be continued (stopped), parts of an interrupted preparation (parts), unfinished files of processes on other machines (other-machines).

    Never removed: models, data, scores and tables, the checkpoints of an unfinished run, files of your own, what another command is at work on, and what lies behind a link. The cache is cleaned by `prefcache gc`. FOLDER is a config or its `out`; leave it out if runs/ has only one experiment.
    """
    from prefcache.commands import clean

    result = clean.run(folder, names, also, yes)
    print_result(result, as_json)
    clean.refuse_failure(result)
