"""Export, import, compare, verify, clean up, sign and share cached log-probs."""

from pathlib import Path

import click

from prefcache.cli.app import force, main, open_config, output_path, print_result, result_options, set_option, stage
from prefcache.pipeline.errors import UsageError


@main.command()
@click.option(
    "--output", "--out", required=True, metavar="FILE", help="File for the rows: .parquet, .arrow, .jsonl or .csv."
)
@click.option("--per-token", is_flag=True, help="Also write the log-prob of every token.")
@click.option(
    "--for", "target", type=click.Choice(["trl"]), help="Write the rows that TRL's trainers take as they are."
)
@force
@stage
def export(
    config: str | None,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    output: str,
    per_token: bool,
    target: str | None,
    force: bool,
) -> None:
    """Write the data's rows with the reference's log-probs.

    \b
        prefcache export data/demo/config.yaml --output runs/demo.parquet
        prefcache export my.yaml --output scored.jsonl.gz --per-token
        prefcache export my.yaml --for trl --output rows.parquet

    Writes the rows of the config's data in their order, with all their columns and the reference's log-probs of their answers. The sums are of whole answers, as TRL adds them up. Where some tokens do not count (prepare.train_on), ref_chosen_counted_logps and ref_rejected_counted_logps (labels: ref_counted_logps) have the sums of those that do. Prepare and score the experiment first. CSV files hold texts unchanged, including those that a spreadsheet takes for formulas (=, +, -, @): import such columns as text.

    --for trl writes rows that DPOTrainer and KTOTrainer of TRL 1.16 take as they are: prompts and answers as messages, or as text with prepare.template: none. Each is checked to give the ids that were scored under the settings that are printed; others are left out, with their reason. Log-probs are not written, because TRL ignores such columns or refuses them (precompute_ref_log_probs): prefcache.trl looks them up.
    """
    path = output_path(output, config)
    assert path is not None
    with open_config(config, overrides, quiet) as (settings, progress):
        from prefcache.commands import export, export_trl

        if target == "trl":
            if per_token:
                raise UsageError(
                    "--for trl writes no log-probs: TRL ignores or refuses such columns. Leave --per-token out."
                )
            print_result(export_trl.run(settings, path, progress, force, config), as_json)
            return
        print_result(export.run(settings, path, per_token, progress, force, config), as_json)


@main.command("import")
@click.option("--chosen", metavar="COLUMN", help="The chosen answers' log-probs.  [default: ref_chosen_logps]")
@click.option("--rejected", metavar="COLUMN", help="The rejected answers' log-probs.  [default: ref_rejected_logps]")
@click.option("--completion", metavar="COLUMN", help="For labelled data: the answers' log-probs.  [default: ref_logps]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Dtype in which they were computed; it sets how exact they must be.",
)
@stage
def import_(
    config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool, dtype: str, **columns: str | None
) -> None:
    """Import log-probs computed elsewhere into the cache.

    \b
        prefcache import my.yaml
        prefcache import my.yaml --chosen their_chosen --dtype bfloat16

    Prepare the experiment first. The log-probs are columns of the config's data, each a sum over all tokens of an answer, whichever of them count (prepare.train_on); sums alone serve training only where all do. A sample is compared with the plain float32 forward (score.parity_sample=0 skips this). To use them, name them in score.accept_numerics; the command to do so is printed.
    """
    with open_config(config, overrides, quiet) as (settings, progress):
        from prefcache.commands import import_logps

        print_result(import_logps.run(settings, columns, dtype, progress), as_json)


@main.command()
@click.option("-n", "n", type=click.IntRange(min=1), default=32, show_default=True, help="Sequences to compare.")
@click.argument("config", metavar="CONFIG")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@set_option
@result_options
def parity(config: str, a: str, b: str, overrides: tuple[str, ...], quiet: bool, as_json: bool, n: int) -> None:
    """Compare two engines or dtypes on the same sequences.

    \b
        prefcache parity data/demo/config.yaml plain transformers
        prefcache parity my.yaml transformers transformers:bfloat16 -n 64
        prefcache parity my.yaml transformers:eager transformers:packed

    A and B are `plain` (the one-by-one float32 forward) or ENGINE[:DTYPE][:ATTENTION][:ROWS], with transformers, vllm or server for ENGINE; parts that you leave out are taken from the config. Prepare the experiment first. The sample has the longest examples and random ones.
    """
    with open_config(config, overrides, quiet) as (settings, progress):
        from prefcache.commands import parity

        print_result(parity.run(settings, a, b, n, progress), as_json)


@main.command()
@click.argument("caches", nargs=-1, metavar="[CACHE]...")
@result_options
def verify(caches: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Check every byte and every row of a cache.

    \b
        prefcache verify
        prefcache verify cache/reference-4f1c0a9b77e2 --json

    CACHE is the `cache` of a config (default: cache), a folder or a URL such as s3://bucket/refs, or the folder of one reference in it. Exit code 4 if anything is damaged.
    """
    from prefcache.commands import verify
    from prefcache.pipeline.progress import Progress

    with Progress(quiet, command="verify") as progress:
        result = verify.run(caches or ["cache"], progress)
    print_result(result, as_json)
    verify.refuse_damage(result)


@main.command()
@click.argument("caches", nargs=-1, metavar="[CACHE]...")
@click.option("--dry-run", is_flag=True, help="Report what would be done, and do nothing.")
@click.option(
    "--target-mib",
    type=click.FloatRange(min=0, min_open=True),
    default=128,
    show_default=True,
    help="Size of a merged shard, before compression.",
)
@click.option(
    "--features-unused-for",
    type=click.FloatRange(min=1),
    metavar="DAYS",
    help="Also remove the features of pictures that no command has opened for this many days.",
)
@result_options
def gc(
    caches: tuple[str, ...],
    dry_run: bool,
    target_mib: float,
    features_unused_for: float | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Remove leftovers from a cache and merge small shards.

    \b
        prefcache gc
        prefcache gc cache --dry-run
        prefcache gc --features-unused-for 30

    Deletes files that no process can still need. No value is lost or changed. Safe to interrupt, and safe while others score or train.

    The features of pictures (cache/vision-*), as a frozen vision tower computes them, may be large. They are kept, unless you give a number of days: those that no command has opened for so long are removed, and a later run computes them again.
    """
    from prefcache.commands import gc, verify
    from prefcache.pipeline.progress import Progress

    with Progress(quiet, command="gc") as progress:
        result = gc.run(caches or ["cache"], progress, target_mib, dry_run, features_unused_for)
    print_result(result, as_json)
    verify.refuse_damage(result)


@main.command()
@click.argument("caches", nargs=-1, metavar="[CACHE]...")
@click.option(
    "--key", required=True, metavar="FILE", help="SSH key to sign with; a .pub file for a key that the agent holds."
)
@result_options
def sign(caches: tuple[str, ...], key: str, quiet: bool, as_json: bool) -> None:
    """Sign the rows of a cache with an SSH key.

    \b
        prefcache sign --key ~/.ssh/id_ed25519
        prefcache sign cache/reference-4f1c0a9b77e2 --key ~/.ssh/id_ed25519.pub

    CACHE is the `cache` of a config (default: cache), a folder or a URL such as s3://bucket/refs, or the folder of one reference in it. All of it is verified first, and shards that this key has signed are not signed again. Whoever sets `allowed_signers` in a config reads only what somebody in that file has signed. Needs ssh-keygen of OpenSSH 8.9 or later; no passphrase is asked for (ssh-add puts a key into the agent).
    """
    from prefcache.commands import sign
    from prefcache.pipeline.progress import Progress

    with Progress(quiet, command="sign") as progress:
        result = sign.run(caches or ["cache"], Path(key), progress)
    print_result(result, as_json)


@main.command()
@click.argument("config", metavar="CONFIG")
@click.argument("name", metavar="REPO")
@click.option("--public", is_flag=True, help="Make a new data set public.  [default: private]")
@click.option("--sign", "key", metavar="FILE", help="Sign the rows with this SSH key, as `prefcache sign` does.")
@click.option("--license", "license_id", metavar="ID", help="License to state in the card, such as cc-by-4.0.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent, and send nothing.")
@set_option
@result_options
def publish(
    config: str,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    name: str,
    public: bool,
    key: str | None,
    license_id: str | None,
    dry_run: bool,
) -> None:
    """Send cached log-probs to the hub as a data set.

    \b
        prefcache publish my.yaml me/log-probs --dry-run
        prefcache publish my.yaml me/log-probs --license cc-by-4.0

    Sends the cached rows of the prepared data and no others, their records, and a card that names the model, its identity, how the rows were computed and how exactly. There is no text in them, but whoever has the model and guesses a text can tell whether it is among them. The data set is created if it does not exist, and private unless you pass --public. The token is that of `hf auth login`, or HF_TOKEN. If it is interrupted, run it again. `prefcache fetch` takes the rows.
    """
    key_file = None if key is None else Path(key).expanduser().absolute()
    with open_config(config, overrides, quiet) as (settings, progress):
        from prefcache.commands import publish

        result = publish.run(
            settings, name, progress, public=public, key_file=key_file, license_id=license_id, dry_run=dry_run
        )
        print_result(result, as_json)


@main.command()
@click.argument("config", metavar="CONFIG")
@click.argument("source", metavar="SOURCE")
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit of a data set on the hub.")
@click.option("--allowed-signers", metavar="FILE", help="Take only rows that one of these people has signed.")
@click.option("--dry-run", is_flag=True, help="Print what would be taken, and take nothing.")
@set_option
@result_options
def fetch(
    config: str,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    source: str,
    revision: str | None,
    allowed_signers: str | None,
    dry_run: bool,
) -> None:
    """Take published log-probs into the cache.

    \b
        prefcache fetch my.yaml me/log-probs
        prefcache fetch my.yaml me/log-probs --allowed-signers team.signers

    SOURCE is a data set on the hub that `prefcache publish` made, a cache folder, or its URL in an object store. Prepare the experiment first. The rows that its data need and the cache lacks are taken, if they are of the very model of the config: keys are read first, then only those shards that have a needed one. Before any row is stored, a sample drawn by lot is compared with the plain float32 forward of your own model (score.parity_sample=0 skips this). If anything is wrong, nothing is taken. Rows of another engine, version or dtype than yours have to be named in score.accept_numerics; the setting is printed.
    """
    signers = None if allowed_signers is None else Path(allowed_signers).expanduser().absolute()
    with open_config(config, overrides, quiet) as (settings, progress):
        from prefcache.commands import fetch

        result = fetch.run(settings, source, progress, revision=revision, allowed_signers=signers, dry_run=dry_run)
        print_result(result, as_json)
