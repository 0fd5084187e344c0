"""What is done with a cache as a whole: into files and out of them, compared, verified, tidied up."""

from pathlib import Path

import click

from stages.cli.program import loaded, main, print_result, stage


@main.command()
@click.option("--output", required=True, metavar="FILE", help="Where the rows go: .parquet, .arrow, .jsonl or .csv.")
@click.option("--per-token", is_flag=True, help="Write every token's log-prob as well.")
@stage
def export(
    config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool, output: str, per_token: bool
) -> None:
    """Write the data's rows with the reference's log-probs.

    \b
        prefcache export data/demo/config.yaml --output runs/demo.parquet
        prefcache export data/demo/config.yaml --output runs/demo.jsonl.gz --per-token

    The rows of the config's data, in their order and with all their columns, and beside them what the reference gives to their answers. The experiment has to be prepared and scored.
    """
    with loaded(config, overrides, quiet) as (settings, progress):
        from stages import export

        print_result(export.run(settings, Path(output), per_token, progress), as_json, "exported")


@main.command("import")
@click.option("--chosen", metavar="COLUMN", help="The chosen answers' log-probs.  [default: ref_chosen_logps]")
@click.option("--rejected", metavar="COLUMN", help="The rejected answers' log-probs.  [default: ref_rejected_logps]")
@click.option("--completion", metavar="COLUMN", help="Of labelled data: the answers' log-probs.  [default: ref_logps]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What they were computed in; how exact they must be follows from it.",
)
@stage
def import_(
    config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool, dtype: str, **columns: str | None
) -> None:
    """Take log-probs that were made elsewhere into the cache.

    \b
        prefcache import --set model=data/demo/reference --set prepare.data=runs/scored.parquet --set out=runs/theirs
        prefcache import my.yaml --chosen their_chosen --rejected their_rejected --dtype bfloat16

    The experiment has to be prepared. They are columns of the config's data, sums over an answer's tokens. A sample is compared with the plain float32 forward (score.parity_sample=0: none). They are used where score.accept_numerics names them; the command that does is printed.
    """
    with loaded(config, overrides, quiet) as (settings, progress):
        from stages import adopt

        print_result(adopt.run(settings, columns, dtype, progress), as_json, "imported")


@main.command()
@click.option("-n", "n", type=click.IntRange(min=1), default=32, show_default=True, help="Sequences to compare.")
@click.argument("config", metavar="CONFIG")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing while working.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def parity(config: str, a: str, b: str, overrides: tuple[str, ...], quiet: bool, as_json: bool, n: int) -> None:
    """Compare two engines or dtypes over the same sequences.

    \b
        prefcache parity data/demo/config.yaml plain transformers
        prefcache parity data/demo/config.yaml transformers transformers:bfloat16 -n 64
        prefcache parity data/demo/config.yaml transformers:eager transformers:packed

    A and B are `plain` (the one-by-one float32 forward) or ENGINE[:DTYPE][:ATTENTION][:ROWS], with transformers, vllm or server for ENGINE; what is not said is as in the config. The experiment has to be prepared. The sample is the longest examples and random ones.
    """
    with loaded(config, overrides, quiet) as (settings, progress):
        from stages import parity

        print_result(parity.run(settings, a, b, n, progress), as_json, "compared")


@main.command()
@click.argument("caches", nargs=-1, metavar="[CACHE]...")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing while working.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(caches: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Check every byte and every row of a cache.

    \b
        prefcache verify
        prefcache verify cache/demo-4f1c0a9b77e2 --json

    CACHE is the `cache` of a config, or one reference's folder in it; unless said, cache. Exit code 4 where anything is damaged.
    """
    from pipeline.progress import Progress
    from stages import upkeep

    result = upkeep.verify(list(caches) or ["cache"], Progress(quiet))
    print_result(result, as_json, "verified")
    upkeep.refuse_damage(result)


@main.command()
@click.argument("caches", nargs=-1, metavar="[CACHE]...")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option(
    "--target-mib",
    type=click.FloatRange(min=0, min_open=True),
    default=128,
    show_default=True,
    help="Size of a merged shard, before compression.",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing while working.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def gc(caches: tuple[str, ...], dry_run: bool, target_mib: float, quiet: bool, as_json: bool) -> None:
    """Remove leftovers from a cache and merge small shards.

    \b
        prefcache gc
        prefcache gc cache --dry-run

    What no process can need any more goes; no value is lost or changed. Safe to interrupt, and while others score or train.
    """
    from pipeline.progress import Progress
    from stages import upkeep

    result = upkeep.gc(list(caches) or ["cache"], Progress(quiet), target_mib, dry_run)
    print_result(result, as_json, "collected")
    upkeep.refuse_damage(result)
