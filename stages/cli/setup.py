"""Setting up: a first config, those of other programs, the meaning of each setting, and shell completion."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefcache.cli.app import force, main, print_result

if TYPE_CHECKING:
    from prefcache.pipeline.foreign_programs import Program


@main.command()
@click.argument("output", metavar="FILE.yaml", type=click.Path())
@click.option("--model", default="Qwen/Qwen3-0.6B", show_default=True, help="The reference: a folder or a hub id.")
@click.option(
    "--data", multiple=True, default=("pairs.jsonl",), show_default=True, help="A file, folder or pattern of records."
)
@force
def init(output: str, model: str, data: tuple[str, ...], force: bool) -> None:
    """Write a commented config for a model and data.

    \b
        prefcache init my.yaml --model Qwen/Qwen3-0.6B --data pairs.jsonl
        prefcache preview my.yaml
    """
    from prefcache.commands.config import write_starter

    write_starter(Path(output), model, data, force)
    click.echo(f"{output}: written. Look at the data with `prefcache preview {output}`.")


@main.command(short_help="Explain the settings, with types and defaults.")
@click.argument("key", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of a config file, with which editors complete it.")
@click.option("--json", "as_json", is_flag=True, help="Print the settings as JSON.")
def config(key: str | None, schema: bool, as_json: bool) -> None:
    """Explain the settings: type, default and meaning of each.

    \b
        prefcache config
        prefcache config train.lora
        prefcache config --schema > prefcache.schema.json

    KEY is a setting or a section. To use the schema in an editor, begin a config with the line

    \b
        # yaml-language-server: $schema=prefcache.schema.json
    """
    from prefcache.commands.config import describe
    from prefcache.terminal_output import config_text

    if schema:
        from prefcache.pipeline.config_settings import json_schema

        click.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))
        return
    settings = describe(key)
    if as_json:
        click.echo(json.dumps([vars(setting) for setting in settings], indent=1, ensure_ascii=False))
    else:
        config_text.print_settings(settings)


def converter(function: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments of a command that converts another program's file."""
    function = click.option("--json", "as_json", is_flag=True, help="Print config and report as JSON.")(function)
    function = click.option("--output", "--out", metavar="CONFIG", help="File for the config.  [default: stdout]")(
        force(function)
    )
    return click.argument("file", metavar="FILE")(function)


def _convert(program: "Program", file: str, output: str | None, force: bool, as_json: bool) -> None:
    from prefcache.commands import convert

    print_result(convert.run(program, file, Path(output) if output else None, force), as_json)


@main.command("from-trl", short_help="Convert TRL's DPO or KTO settings.")
@converter
def from_trl(file: str, output: str | None, force: bool, as_json: bool) -> None:
    """Convert a YAML file of TRL's DPO or KTO settings into a config.

    \b
        prefcache from-trl dpo.yaml --output my.yaml
        prefcache prepare my.yaml

    Reports on stderr what each key became, which keys have no meaning here and why, and what differs. TRL's defaults are written out where they differ. Data of text, and not messages, gets no chat template, as in TRL: if the data is a file or folder here, its first record tells. The config serves all stages: prepare, score and train.
    """
    from prefcache.pipeline.foreign_programs import TRL

    _convert(TRL, file, output, force, as_json)


@main.command("from-axolotl", short_help="Convert Axolotl's preference settings.")
@converter
def from_axolotl(file: str, output: str | None, force: bool, as_json: bool) -> None:
    """Convert a YAML file of Axolotl's preference settings (rl: dpo, ipo, kto, orpo, simpo) into a config.

    \b
        prefcache from-axolotl dpo.yaml --output my.yaml
        prefcache prepare my.yaml

    The `type` of a data set becomes a format that produces the same text. Reports on stderr what each key became, which keys have no meaning here and why, and what differs. Axolotl's defaults are written out where they differ.
    """
    from prefcache.pipeline.foreign_programs import AXOLOTL

    _convert(AXOLOTL, file, output, force, as_json)


@main.command("from-llamafactory", short_help="Convert LLaMA-Factory's preference settings.")
@converter
def from_llamafactory(file: str, output: str | None, force: bool, as_json: bool) -> None:
    """Convert a YAML file of LLaMA-Factory's preference settings (stage: dpo, kto) into a config.

    \b
        prefcache from-llamafactory dpo.yaml --output my.yaml
        prefcache prepare my.yaml

    The names in `dataset` are looked up in DATASET_DIR/dataset_info.json, in the working folder or next to FILE, and become sources with their formats and columns. Reports on stderr what each key became, which keys have no meaning here and why, and what differs. LLaMA-Factory's defaults are written out where they differ.
    """
    from prefcache.pipeline.foreign_programs import LLAMAFACTORY

    _convert(LLAMAFACTORY, file, output, force, as_json)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a completion script for your shell.

    \b
        prefcache completion bash >> ~/.bashrc
        prefcache completion zsh >> ~/.zshrc
        prefcache completion fish > ~/.config/fish/completions/prefcache.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "prefcache", "_PREFCACHE_COMPLETE").source())
