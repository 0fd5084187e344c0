"""Send prepared data to an object store, and fetch it on another machine."""

from pathlib import Path

import click

from prefcache.cli.app import main, open_config, print_result, result_options, stage


@main.command()
@stage
def upload(config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Send prepared data to the object store of the cache.

    \b
        prefcache upload my.yaml
        prefcache upload my.yaml --set cache=s3://bucket/refs

    Prints the URL that `prefcache download` takes on other machines. The data has all texts, also those of quarantined records. What is there already is not sent again. Credentials come from the environment (AWS_ACCESS_KEY_ID, ...). `score` with Ray and such a cache sends the data itself.
    """
    with open_config(config, overrides, quiet) as (settings, progress):
        from prefcache.commands import upload

        print_result(upload.run(settings, progress), as_json)


@main.command()
@click.argument("url", metavar="URL")
@click.option("--out", required=True, metavar="FOLDER", help="The config's out, where prepared/ is to be.")
@result_options
def download(url: str, out: str, quiet: bool, as_json: bool) -> None:
    """Fetch prepared data that another machine sent.

    \b
        prefcache download s3://bucket/refs/prepared/ID --out runs/my

    URL is what `prefcache upload` printed. FOLDER/prepared is then as if prepare had run here: score and train need nothing else of the data. Every byte is checked. Safe to interrupt: files that are whole are kept.
    """
    from prefcache.commands import download
    from prefcache.pipeline.progress import Progress

    with Progress(quiet, command="download") as progress:
        print_result(download.run(url, Path(out), progress), as_json)
