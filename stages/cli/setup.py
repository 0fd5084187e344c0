"""Setting up: a first config, the meaning of each setting, and shell completion."""

import json
from pathlib import Path

import click

from prefcache.cli.app import force, main


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


@main.command()
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
    from prefcache import terminal_output
    from prefcache.commands.config import describe

    if schema:
        from prefcache.pipeline.config_settings import json_schema

        click.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))
        return
    settings = describe(key)
    if as_json:
        click.echo(json.dumps([vars(setting) for setting in settings], indent=1, ensure_ascii=False))
    else:
        terminal_output.settings(settings)


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
