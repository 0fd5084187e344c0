"""The three stages, preview before them, and merge and push."""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefcache.cli.app import force_with_input, main, open_config, print_result, result_options, stage
from prefcache.pipeline.errors import UsageError

if TYPE_CHECKING:
    from prefcache.pipeline.config import Config


def load_tokenizer_early(settings: "Config") -> contextlib.AbstractContextManager[None]:
    """Begin to load the tokenizer in another process: importing what a command needs takes nearly as long."""
    from prefcache.pipeline import gguf_files, identity
    from prefcache.pipeline.preparing import tokenizer_facts

    if gguf_files.is_gguf(settings.model):
        return contextlib.nullcontext()
    return tokenizer_facts.load_early(identity.find_reference(settings, weights=False).tokenizer)


@main.command()
@stage
def prepare(config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Turn preference data into exact token ids.

    \b
        prefcache prepare data/demo/config.yaml
        prefcache prepare --set model=M --set prepare.data=F --set out=runs/m

    The format is recognised from the columns; `prefcache formats` lists the known ones. Unusable records go to OUT/prepared/quarantine.parquet with the reason; if there are too many (prepare.max_quarantine), the exit code is 3. Safe to interrupt: finished parts are kept. With RANK and WORLD_SIZE set, several machines share the work.
    """
    with open_config(config, overrides, quiet) as (settings, progress), contextlib.ExitStack() as loading:
        if not (settings.prepared / "manifest.json").exists():  # else there may be nothing to do
            loading.enter_context(load_tokenizer_early(settings))
        from prefcache.commands import prepare

        print_result(prepare.run(settings, progress), as_json)


@main.command()
@click.option(
    "-n", "n", type=click.IntRange(min=1), default=3, show_default=True, help="Records to show from each source."
)
@click.option("--ids", is_flag=True, help="Print the token ids as well.")
@stage
def preview(config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool, n: int, ids: bool) -> None:
    """Show a few examples as the model will see them.

    \b
        prefcache preview data/demo/config.yaml
        prefcache preview --set model=MODEL --set prepare.data=pairs.jsonl --ids

    Prompt and answer tokens have different colours, special tokens are marked, tokens that would be cut are struck through, and tokens of an answer that do not count are dim. Writes nothing.
    """
    # Nothing is written, so a place to write to need not be named.
    with open_config(config, ("out=.", *overrides), quiet) as (settings, progress), load_tokenizer_early(settings):
        from prefcache.commands import preview
        from prefcache.terminal_output import coloured_tokens

        result = preview.run(settings, progress, n)
        if as_json:
            print_result(result, as_json)
        else:
            coloured_tokens.print_preview(result, ids)


@main.command()
@click.option("--dry-run", is_flag=True, help="Report what there is to score, without scoring it.")
@click.option("--input", "inputs", multiple=True, metavar="DATA", help="Score these files instead of a config's data.")
@click.option("--model", metavar="MODEL", help="With --input: the reference, a folder or a hub id.")
@click.option(
    "--output", "--out", metavar="FILE", help="With --input: file for the rows, .parquet, .arrow, .jsonl or .csv."
)
@click.option("--cache", metavar="FOLDER", help="With --input: folder of the cached log-probs.  [default: cache]")
@click.option("--per-token", is_flag=True, help="With --input: also write the log-prob of every token.")
@force_with_input
@stage
def score(
    config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool, dry_run: bool, **files: Any
) -> None:
    """Score every prepared sequence that the cache lacks.

    \b
        prefcache score data/demo/config.yaml
        prefcache score data/demo/config.yaml --dry-run

    Safe to interrupt: finished shards are kept. If nothing is missing, no model is loaded. Exit code 4 if a sample differs from the plain float32 forward by more than rounding.

    \b
        prefcache score --input d.jsonl --model org/name --output d.parquet

    --input needs no config. It writes the rows of DATA with ref_chosen_logps, ref_rejected_logps, the token counts, and prefcache_status, which says why a row has no values. DATA is anything that prepare reads; repeat --input for several. Change other settings, such as prepare.max_length, with --set. CSV files hold texts unchanged, including those that a spreadsheet takes for formulas (=, +, -, @): import such columns as text.
    """
    if files["inputs"]:
        _score_files(config, overrides, quiet, as_json, dry_run, **files)
        return
    if strange := next((name for name, value in files.items() if value), None):
        raise UsageError(
            f"--{strange.replace('_', '-')} needs --input. To write a config's rows use `prefcache export "
            f"{config or 'CONFIG'} --output FILE`."
        )
    with open_config(config, overrides, quiet) as (settings, progress):
        from prefcache.commands import score

        print_result(score.run(settings, progress, dry_run), as_json)


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
    force: bool,
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
    # No example is held out, and mismatched answers are made only if --set asks for them.
    settings = ["out=.", "prepare.held_out=0", "prepare.kl_pairs=false", *overrides]
    settings += [f"{key}={json.dumps(value)}" for key, value in named.values() if value is not None]
    with open_config(None, tuple(settings), quiet) as (asked, progress):
        from prefcache.command_results import ScoreFilesResult
        from prefcache.commands import export, prepare, score
        from prefcache.working_folder import keep_working_folder, use_temporary_folder

        if output is not None:
            export.check_output(asked, Path(output), force)
        # A working folder that the next command of this kind finds again; none is made for a dry run.
        with use_temporary_folder(asked) if dry_run else keep_working_folder(asked, progress) as scratch:
            prepared = prepare.run(scratch, progress)
            if output is not None:
                export.check_data(scratch, per_token)
            scored = score.run(scratch, progress, dry_run)
            if dry_run or output is None:
                print_result(scored, as_json)
                return
            exported = export.run(scratch, Path(output), per_token, progress, force)
            print_result(ScoreFilesResult(prepared, scored, exported), as_json)


@main.command()
@click.option(
    "--sweep", metavar="SETTINGS", help="Train every combination, as in 'train.loss=sigmoid,ipo train.beta=0.05,0.1'."
)
@click.option("--dry-run", is_flag=True, help="Report the memory, steps and time that the run needs, without training.")
@click.option("--gpu", metavar="NAME", help="With --dry-run: estimate the time on this GPU, such as H100.")
@click.option(
    "--processes", type=click.IntRange(min=1), metavar="N", help="With --dry-run: number of processes, a GPU each."
)
@stage
def train(
    config: str | None,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    sweep: str | None,
    dry_run: bool,
    gpu: str | None,
    processes: int | None,
) -> None:
    """Train the policy against the cached log-probs.

    \b
        prefcache train data/demo/config.yaml
        prefcache train my.yaml --set train.loss=ipo --set train.run=ipo
        prefcache train my.yaml --sweep "train.loss=sigmoid,ipo train.beta=0.1,1"
        prefcache train my.yaml --dry-run --gpu H100

    --dry-run needs prepared data and the model's config.json, but no scores, no weights and no GPU.

    The trained model is in OUT/RUN/model. After an interruption, the same command continues from the last checkpoint. A sweep trains one run after another, each in a folder named after its settings, and compares them on the held-out examples. Exit code 4 if a loss or gradient is not finite, 5 if the scores belong to other data or another reference, 7 at the first alert if train.alerts is strict.
    """
    from prefcache.command_results import SweepResult
    from prefcache.commands import train
    from prefcache.pipeline import process_pool
    from prefcache.pipeline.training.sweep import combinations

    if dry_run:
        if sweep is not None:
            raise UsageError("--dry-run describes a single run. Leave --sweep out, and --set the keys of one.")
        with open_config(config, overrides, quiet) as (settings, progress):
            print_result(train.estimate(settings, progress, gpu, processes or 1), as_json)
        return
    if strange := next((name for name, value in (("--gpu", gpu), ("--processes", processes)) if value), None):
        raise UsageError(
            f"{strange} needs --dry-run. The run itself uses the GPUs and processes that it is started with."
        )
    runs = [overrides] if sweep is None else [(*overrides, *each.overrides) for each in combinations(sweep)]
    if sweep is not None:
        # All settings are checked before the first run trains.
        for each in runs:
            with open_config(config, each, quiet=True) as (settings, _):
                train.check(settings)
    results = []
    # Only the main process of a launch prints.
    silent = process_pool.rank_and_world()[0] != 0
    for n, each in enumerate(runs, start=1):
        label = "" if sweep is None else f"run {n} of {len(runs)}"
        with open_config(config, each, quiet, label=label, silent=silent) as (settings, progress):
            # Only the process that wrote has a result.
            if (result := train.run(settings, progress)) is not None:
                results.append(result)
    if results:
        print_result(results[0] if sweep is None else SweepResult(results), as_json)


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--output", metavar="FOLDER", help="Folder for the merged model.  [default: RUN/merged]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of its weights.  [default: that of the adapter's base model]",
)
@result_options
def merge(run: str, output: str | None, dtype: str | None, quiet: bool, as_json: bool) -> None:
    """Merge a trained adapter into its model's weights.

    \b
        prefcache merge runs/demo/lora
        prefcache merge runs/demo/lora --output runs/kind --dtype float32

    RUN is the folder of a run with train.lora, or of any adapter that PEFT saved. The result is a whole model that needs no PEFT. Its log-probs are compared with those of the unmerged adapter; if they differ by more than rounding, nothing is written.
    """
    from prefcache.commands import merge
    from prefcache.pipeline.progress import Progress

    with Progress(quiet, command="merge") as progress:
        result = merge.run(Path(run), Path(output) if output else None, dtype, progress)
    print_result(result, as_json)


@main.command()
@click.argument("run", metavar="RUN")
@click.argument("name", metavar="NAME")
@click.option("--public", is_flag=True, help="Create a public repository. An existing one keeps its visibility.")
@result_options
def push(run: str, name: str, public: bool, quiet: bool, as_json: bool) -> None:
    """Send a finished run's model to the hub.

    \b
        prefcache push runs/demo/trained me/kind
        prefcache push runs/demo/trained me/kind --public

    Sends the files of RUN/model: weights, tokenizer and model card, whose text names the reference and the data. The repository is created if it does not exist, and private unless you pass --public. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from prefcache.commands import push
    from prefcache.pipeline.progress import Progress

    with Progress(quiet, command="push") as progress:
        result = push.run(Path(run), name, public, progress)
    print_result(result, as_json)
