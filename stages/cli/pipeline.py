"""The stages, and what is done with a model that was trained."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import UsageError
from stages.cli.program import loaded, main, print_result, stage

if TYPE_CHECKING:
    from pipeline.training.sweep import Combination


@main.command()
@stage
def prepare(config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Turn preference data into exact token ids.

    \b
        prefcache prepare data/demo/config.yaml
        prefcache prepare --set model=MODEL --set prepare.data=pairs.jsonl --set out=runs/mine

    The format is recognised from the columns; `prefcache formats` lists those that are known. Unusable records go to OUT/prepared/quarantine.parquet with the reason. Safe to interrupt: finished parts are kept. With RANK and WORLD_SIZE set, several machines share the work.
    """
    with loaded(config, overrides, quiet) as (settings, progress):
        from stages import prepare

        print_result(prepare.run(settings, progress), as_json, "prepared")


@main.command()
@click.option("-n", "n", type=click.IntRange(min=1), default=3, show_default=True, help="Records of each source.")
@click.option("--ids", is_flag=True, help="Print the token ids as well.")
@stage
def preview(config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool, n: int, ids: bool) -> None:
    """Show a few examples as the model will see them.

    \b
        prefcache preview data/demo/config.yaml
        prefcache preview --set model=MODEL --set prepare.data=pairs.jsonl --ids

    Tokens of prompt and answers have colours of their own, special tokens stand out, and what would be cut is struck through. Nothing is written.
    """
    # Nothing is written, so a place to write to need not be named.
    with loaded(config, ("out=.", *overrides), quiet) as (settings, progress):
        from stages import preview, tables

        result = preview.run(settings, progress, n)
        if as_json:
            print_result(result, as_json, "previewed")
        else:
            tables.previewed(result, ids)


@main.command()
@click.option("--dry-run", is_flag=True, help="Say what there is to score, and score nothing.")
@click.option("--input", "inputs", multiple=True, metavar="DATA", help="Score these files instead of a config's data.")
@click.option("--model", metavar="MODEL", help="With --input: the reference, a folder or a hub id.")
@click.option("--output", metavar="FILE", help="With --input: where the rows go, .parquet, .arrow, .jsonl or .csv.")
@click.option("--cache", metavar="FOLDER", help="With --input: folder of the log-probs.  [default: cache]")
@click.option("--per-token", is_flag=True, help="With --input: write every token's log-prob as well.")
@stage
def score(
    config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool, dry_run: bool, **files: Any
) -> None:
    """Score every prepared sequence that the cache lacks.

    \b
        prefcache score data/demo/config.yaml
        prefcache score data/demo/config.yaml --dry-run

    Safe to interrupt: finished shards are kept. When nothing is missing, no model is loaded.

    \b
        prefcache score --input data/demo/pairs.jsonl --model data/demo/reference --output runs/scored.parquet

    With --input no config is needed: the same rows come out with ref_chosen_logps, ref_rejected_logps, the numbers of tokens, and prefcache_status, which says of a row without values why. DATA is whatever prepare reads, and may be given more than once. --set has the other settings, such as prepare.max_length.
    """
    if files["inputs"]:
        _score_files(config, overrides, quiet, as_json, dry_run, **files)
        return
    if strange := next((name for name, value in files.items() if value), None):
        raise UsageError(
            f"--{strange.replace('_', '-')} belongs to --input. With a config, say it there; `prefcache export` writes the rows."
        )
    with loaded(config, overrides, quiet) as (settings, progress):
        from stages import score

        print_result(score.run(settings, progress, dry_run), as_json, "scored")


def _score_files(
    config: str | None,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    dry_run: bool,
    *,
    inputs: tuple[str, ...],
    model: str | None,
    output: str | None,
    cache: str | None,
    per_token: bool,
) -> None:
    """Prepare, score and export in one go, in a working folder of its own."""
    if config is not None:
        raise UsageError(f"Both --input and the config {config} say what to score. Leave one of them out.")
    if output is None and not dry_run:
        raise UsageError("--input needs --output FILE: .parquet, .arrow, .jsonl or .csv.")
    named = {"--input": ("prepare.data", list(inputs)), "--model": ("model", model), "--cache": ("cache", cache)}
    set_as_well = {override.partition("=")[0] for override in overrides}
    for flag, (key, value) in named.items():
        if value is not None and key in set_as_well:
            raise UsageError(f"Both {flag} and --set {key} say what {key} is. Leave one of them out.")
    if model is None and "model" not in set_as_well:
        raise UsageError("--input needs --model MODEL: the reference, a folder or a hub id.")
    # Rows come out in the order of the data, and nobody reads mismatched answers but who asks for them.
    settings = ["out=.", "prepare.held_out=0", "prepare.kl_pairs=false", *overrides]
    settings += [f"{key}={json.dumps(value)}" for key, value in named.values() if value is not None]
    with loaded(None, tuple(settings), quiet) as (asked, progress):
        from stages import export, prepare, score

        if output is not None:
            export.check_output(Path(output))
        with export.standalone(asked, progress) as scratch:
            results = {"prepared": prepare.run(scratch, progress)}
            if output is not None:
                export.check_data(scratch, Path(output), per_token)
            results["scored"] = score.run(scratch, progress, dry_run)
            if dry_run or output is None:
                print_result(results["scored"], as_json, "scored")
                return
            results["exported"] = export.run(scratch, Path(output), per_token, progress)
            print_result(results, as_json, "scored_files")


@main.command()
@click.option(
    "--sweep", metavar="SETTINGS", help="Train every combination, as in 'train.loss=sigmoid,ipo train.beta=0.05,0.1'."
)
@stage
def train(config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool, sweep: str | None) -> None:
    """Train the policy against the cached log-probs.

    \b
        prefcache train data/demo/config.yaml
        prefcache train data/demo/config.yaml --set train.loss=ipo --set train.run=ipo
        prefcache train data/demo/config.yaml --sweep "train.loss=sigmoid,ipo train.beta=0.05,0.1"

    The trained model is in OUT/RUN/model. Interrupted, the same command goes on from the last checkpoint. A sweep trains one run after another, each in a folder that is named by its settings, and compares them by the held-out examples.
    """
    if sweep is None:
        _train(config, overrides, quiet, as_json, [])
        return
    from pipeline.training.sweep import combinations

    _train(config, overrides, quiet, as_json, combinations(sweep))


def _train(
    config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool, sweep: "list[Combination]"
) -> None:
    """One run, or those of a sweep. All settings are checked before the first of them trains."""
    from pipeline import config as configuration
    from stages import train

    runs = [(*overrides, *each.overrides) for each in sweep] or [overrides]
    if sweep:
        for each in runs:
            train.check(configuration.load(config, each))
    results = []
    for each in runs:
        with loaded(config, each, quiet) as (settings, progress):
            results.append(train.run(settings, progress))
    # Only the process that wrote has a result.
    if results[0] is not None:
        print_result({"runs": results} if sweep else results[0], as_json, "swept" if sweep else "trained")


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--output", metavar="FOLDER", help="Where the model goes.  [default: RUN/merged]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of its weights.  [default: what the adapter's model was saved in]",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing while working.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def merge(run: str, output: str | None, dtype: str | None, quiet: bool, as_json: bool) -> None:
    """Add a trained adapter to its model's own weights.

    \b
        prefcache merge runs/demo/lora
        prefcache merge runs/demo/lora --output runs/kind --dtype float32

    RUN is the folder of a run with train.lora, or of any adapter as PEFT saves it. What comes out is a whole model, which needs no PEFT. Its log-probs are compared with those of the adapter beside its model, and nothing is written where they differ by more than rounding.
    """
    from pipeline.progress import Progress
    from stages import merge

    result = merge.run(Path(run), Path(output) if output else None, dtype, Progress(quiet))
    print_result(result, as_json, "merged")


@main.command()
@click.argument("run", metavar="RUN")
@click.argument("name", metavar="NAME")
@click.option("--public", is_flag=True, help="Everyone may see it. A repository that is there stays as it is.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing while working.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def push(run: str, name: str, public: bool, quiet: bool, as_json: bool) -> None:
    """Send a finished run's model to the hub.

    \b
        prefcache push runs/demo/trained me/kind
        prefcache push runs/demo/trained me/kind --public

    What is sent are the files of RUN/model: the weights, the tokenizer and the model card, whose text names what it was made from. The repository is private unless said otherwise, and is made where it is missing. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from pipeline.progress import Progress
    from stages import push

    print_result(push.run(Path(run), name, public, Progress(quiet)), as_json, "pushed")


@main.command("from-trl")
@click.argument("file", metavar="FILE")
@click.option("--output", metavar="CONFIG", help="Where the config goes.  [default: stdout]")
def from_trl(file: str, output: str | None) -> None:
    """Turn a YAML file of TRL's DPO or KTO settings into a config.

    \b
        prefcache from-trl dpo.yaml --output my.yaml
        prefcache prepare my.yaml

    What each of its keys became is said on stderr, and which have no meaning here, and why. What TRL's defaults decide is written down. The config serves all stages, since the reference is run in one of its own.
    """
    import yaml

    from pipeline import config
    from pipeline.progress import printable
    from pipeline.stored import artifact
    from pipeline.training import from_trl

    found = from_trl.convert(config.read_yaml(Path(file)))
    from_trl.check(found)
    for title, entries in (("", found.became), ("has no meaning here: ", found.ignored), ("DIFFERS: ", found.cannot)):
        for theirs, ours in entries.items():
            click.echo(printable(f"{theirs}: {title}{ours}"), err=True)
    text = yaml.safe_dump(found.config, sort_keys=False, allow_unicode=True)
    if output is None:
        click.echo(text, nl=False)
    else:
        artifact.commit_bytes(Path(output), text.encode())
