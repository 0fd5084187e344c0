"""What there is: losses, formats, and the state of this machine and an experiment."""

import json

import click

from stages.cli.program import main, print_result, stage


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def losses(name: str | None, as_json: bool) -> None:
    """List the losses: what each reads and when to use it.

    \b
        prefcache losses
        prefcache losses kto

    With NAME: its formula, its paper, and what its metrics do in a healthy run. All of them train from one cache.
    """
    from pipeline.training.losses import LOSSES, get_loss
    from stages import tables

    found = [get_loss(name)] if name else list(LOSSES.values())
    if as_json:
        click.echo(json.dumps([each.describe() for each in found], indent=1))
    elif name:
        tables.loss(found[0])
    else:
        tables.losses(found)


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def formats(name: str | None, as_json: bool) -> None:
    """List the data formats and the columns that each reads.

    \b
        prefcache formats
        prefcache formats hh

    With format `auto` the first one whose columns fit is taken. Columns in brackets are used where they are there.
    """
    from pipeline.preparing.formats import FORMATS, get_format
    from stages import tables

    found = [get_format(name)] if name else list(FORMATS.values())
    if as_json:
        click.echo(json.dumps([each.describe() for each in found], indent=1, default=str))
    else:
        tables.formats(found)


@main.command()
@stage
def doctor(config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Say what is installed and used, and what is wrong.

    \b
        prefcache doctor
        prefcache doctor data/demo/config.yaml

    Packages, machine, GPU and disk; with a config also its reference, the engines that can score it and why the others cannot, and whether data, scores and runs are whole. Nothing is changed. Exit code 0 whatever is found; --json counts the problems.
    """
    from pipeline import config as configuration
    from stages import doctor

    settings = configuration.load(config, overrides) if config or overrides else None
    print_result(doctor.run(settings), as_json, "examined")
