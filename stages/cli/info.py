"""The guide, the losses, formats and architectures, and the state of this machine and an experiment."""

import json
import shutil
import sys

import click

from prefcache.cli.app import main, open_config, print_result, stage


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def losses(name: str | None, as_json: bool) -> None:
    """List the losses: what each reads and when to use it.

    \b
        prefcache losses
        prefcache losses kto

    With NAME, show its formula, its paper, and what its metrics do in a healthy run. All losses train from one cache.
    """
    from prefcache.pipeline.training.losses import LOSSES, get_loss
    from prefcache.terminal_output import choices

    chosen = [get_loss(name)] if name else list(LOSSES.values())
    if as_json:
        click.echo(json.dumps([loss.describe() for loss in chosen], indent=1))
    elif name:
        choices.print_loss(chosen[0])
    else:
        choices.print_losses(chosen)


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def formats(name: str | None, as_json: bool) -> None:
    """List the data formats and the columns that each reads.

    \b
        prefcache formats
        prefcache formats hh

    `prepare.format: auto` takes the first format that fits the columns. Columns in brackets are optional.

    Images of a prompt are read in the same way for all of them. They stand in parts of a message ({"type": "image"}, with the image under image, url, path or base64, or OpenAI's image_url), or in a column `images` (or `image`), whose place is a part without an image, <image> in the text, or, with neither, before the first user turn. An image is a path relative to the data's file, bytes, base64 text, or {"bytes", "path"} as `datasets` stores it.
    """
    from prefcache.pipeline.preparing.formats import FORMATS, get_format
    from prefcache.terminal_output import choices

    chosen = [get_format(name)] if name else list(FORMATS.values())
    if as_json:
        click.echo(json.dumps([each.describe() for each in chosen], indent=1, default=str))
    else:
        choices.print_formats(chosen, notes=bool(name))


@main.command(short_help="List the architectures tried.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def architectures(name: str | None, as_json: bool) -> None:
    """List the model architectures that were tried, and how each is computed.

    \b
        prefcache architectures
        prefcache architectures qwen3

    The table has the classes that Transformers loads as causal language models: how sequences share a forward pass, and how far log-probs and gradients are from the plain forward of one sequence at a time. Measured on tiny random models in float32; each stage tries your model again when it starts. NAME is part of a model type or class name.
    """
    from dataclasses import asdict

    from prefcache.pipeline.model.architectures import load
    from prefcache.terminal_output import choices

    table = load(name)
    if as_json:
        click.echo(json.dumps(asdict(table), indent=1))
    else:
        choices.print_architectures(table)


@main.command(short_help="Check the installation, and a config's files.")
@stage
@click.option("--why", is_flag=True, help="Report what each stage would find out of date, and which input has changed.")
def doctor(config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool, why: bool) -> None:
    """Check the installation, and a config's data, scores and run.

    \b
        prefcache doctor
        prefcache doctor data/demo/config.yaml
        prefcache doctor data/demo/config.yaml --why

    Lists packages, machine, GPU and disk. With a config, also its reference, the engines that can score it and why the others cannot, and whether data, scores and runs are complete and undamaged. Each problem comes with its remedy. Changes nothing. The exit code is 0 whatever is found; --json counts the problems.
    """
    from prefcache.commands import doctor
    from prefcache.pipeline.progress import Progress

    if config is None and not overrides and not why:
        with Progress(quiet, command="doctor"):
            result = doctor.run(None)
    else:
        with open_config(config, overrides, quiet, timed=False) as (settings, _):
            result = doctor.run(settings, why)
    print_result(result, as_json)


@main.command()
@click.argument("topic", nargs=-1)
def guide(topic: tuple[str, ...]) -> None:
    """Read the guide; without TOPIC, list its chapters.

    \b
        prefcache guide
        prefcache guide trust
        prefcache guide many-machines > many-machines.md

    In a terminal, a chapter is wrapped to the width, and shown in your pager (PAGER) if it is longer than a screen. Redirected, it is plain Markdown.
    """
    from prefcache import guide

    if not topic:
        formatter = click.HelpFormatter(width=min(shutil.get_terminal_size((100, 24)).columns, 120))
        formatter.write_dl(list(guide.summaries().items()))
        click.echo(formatter.getvalue(), nl=False)
        click.echo("\nRead one with `prefcache guide TOPIC`. Their examples use the demo of a checkout.")
        return
    markdown = guide.chapter("-".join(topic))
    if not sys.stdout.isatty():
        click.echo(markdown, nl=False)
        return
    columns, lines = shutil.get_terminal_size()
    text = guide.render(markdown, columns)
    if text.count("\n") < lines:
        click.echo(text, nl=False)
    else:
        click.echo_via_pager(text)
