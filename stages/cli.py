"""The command `prefcache`: parse, load the config, call one stage, turn errors into exit codes.

Nothing heavy is imported before a command is known, so that help answers at once.
"""

import contextlib
import errno
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import INTERRUPTED, PrefcacheError, ResourceError, UsageError

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.training.sweep import Combination
    from stages.inspect import Experiment

# PyTorch reads this when it loads. Threads that spin while they wait slow a busy machine several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_OUT_OF_MEMORY = (
    "out of memory. Lower score.tokens_per_batch or train.tokens_per_micro_batch; neither changes a result."
)


class Commands(click.Group):
    """Errors are translated here, once: a line on stderr and the exit code that says what kind it was."""

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().invoke(ctx)
        except PrefcacheError as error:
            _fail(str(error), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _fail("interrupted. What was finished is kept: run the same command to go on.", INTERRUPTED)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(0)
        except MemoryError:
            _fail(_OUT_OF_MEMORY, ResourceError.exit_code)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                _fail(
                    f"{error.filename or 'a file'}: the disk took no more ({error.strerror}).", ResourceError.exit_code
                )
            if error.filename is None:
                raise
            _fail(
                f"{error.filename}: {error.strerror}. Name a place that exists and may be used.", UsageError.exit_code
            )
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
                raise
            _fail(f"{_OUT_OF_MEMORY} ({error})", ResourceError.exit_code)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    from pipeline.progress import printable

    click.echo(f"error: {printable(message)}", err=True)
    sys.exit(code)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="prefcache")
def main() -> None:
    """Run the reference model once; train on its log-probs as often as you like.

    \b
        prefcache prepare data/demo/config.yaml
        prefcache score data/demo/config.yaml
        prefcache train data/demo/config.yaml
        prefcache sql "select prompt, margin from rewards join examples using (example_id)"

    The stages meet only on disk. Each is safe to interrupt and does nothing that is already done.

    Exit codes: 0 ok, 2 usage, 3 bad data, 4 integrity, 5 identity mismatch, 6 disk or memory, 7 alerts of a strict run, 130 interrupted.
    """


def stage(function: Callable[..., None]) -> Callable[..., None]:
    """The arguments that every stage takes."""
    function = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)
    function = click.option("-q", "--quiet", is_flag=True, help="Say nothing while working.")(function)
    function = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a key of the config, e.g. train.beta=0.2.",
    )(function)
    return click.argument("config", required=False, metavar="[CONFIG]")(function)


@main.command()
@stage
def prepare(config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Turn preference data into exact token ids.

    \b
        prefcache prepare data/demo/config.yaml
        prefcache prepare --set model=MODEL --set prepare.data=pairs.jsonl --set out=runs/mine

    The format is recognised from the columns; `prefcache formats` lists those that are known. Unusable records go to OUT/prepared/quarantine.parquet with the reason. Safe to interrupt: finished parts are kept. With RANK and WORLD_SIZE set, several machines share the work.
    """
    with _loaded(config, overrides, quiet) as (settings, progress):
        from stages import prepare

        _print(prepare.run(settings, progress), as_json, "prepared")


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
    with _loaded(config, ("out=.", *overrides), quiet) as (settings, progress):
        from stages import preview, tables

        result = preview.run(settings, progress, n)
        if as_json:
            _print(result, as_json, "previewed")
        else:
            tables.previewed(result, ids)


@main.command()
@click.argument("example", metavar="EXAMPLE")
@stage
def show(example: str, config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Show one example token by token, as reference and policy see its answers.

    \b
        prefcache show 3f2a data/demo/config.yaml
        prefcache show 3f2a data/demo/config.yaml --set train.run=ipo --json

    EXAMPLE is an example_id, as every view has it, or its beginning. The reference's log-probs come from the cache, the policy's are computed now from the model of the run (train.run). Colours show where the policy gained on its reference and where it lost.
    """
    with _loaded(config, overrides, quiet) as (settings, progress):
        from stages import show

        _print(show.run(settings, progress, example), as_json, "shown")


@main.command()
@stage
def doctor(config: str | None, overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Say what is installed, what would be used, and what is wrong, with its remedy.

    \b
        prefcache doctor
        prefcache doctor data/demo/config.yaml

    Packages, machine, GPU and disk; with a config also its reference, the engines that can score it and why the others cannot, and whether data, scores and runs are whole. Nothing is changed. Exit code 0 whatever is found; --json counts the problems.
    """
    from pipeline import config as configuration
    from stages import doctor

    settings = configuration.load(config, overrides) if config or overrides else None
    _print(doctor.run(settings), as_json, "examined")


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
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def losses(name: str | None, as_json: bool) -> None:
    """List the losses: what each reads, its hyperparameters and when to use it.

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
    with _loaded(config, overrides, quiet) as (settings, progress):
        from stages import score

        _print(score.run(settings, progress, dry_run), as_json, "scored")


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
    with _loaded(None, tuple(settings), quiet) as (loaded, progress):
        from stages import export, prepare, score

        if output is not None:
            export.check_output(Path(output))
        with export.standalone(loaded, progress) as loaded:
            results = {"prepared": prepare.run(loaded, progress)}
            if output is not None:
                export.check_data(loaded, Path(output), per_token)
            results["scored"] = score.run(loaded, progress, dry_run)
            if dry_run or output is None:
                _print(results["scored"], as_json, "scored")
                return
            results["exported"] = export.run(loaded, Path(output), per_token, progress)
            _print(results, as_json, "scored_files")


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
    with _loaded(config, overrides, quiet) as (settings, progress):
        from stages import export

        _print(export.run(settings, Path(output), per_token, progress), as_json, "exported")


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
    with _loaded(config, overrides, quiet) as (settings, progress):
        from stages import adopt

        _print(adopt.run(settings, columns, dtype, progress), as_json, "imported")


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
    with _loaded(config, overrides, quiet) as (settings, progress):
        from stages import parity

        _print(parity.run(settings, a, b, n, progress), as_json, "compared")


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
    _print(result, as_json, "verified")
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
    _print(result, as_json, "collected")
    upkeep.refuse_damage(result)


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
        with _loaded(config, each, quiet) as (settings, progress):
            results.append(train.run(settings, progress))
    # Only the process that wrote has a result.
    if results[0] is not None:
        _print({"runs": results} if sweep else results[0], as_json, "swept" if sweep else "trained")


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
    _print(result, as_json, "merged")


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

    _print(push.run(Path(run), name, public, Progress(quiet)), as_json, "pushed")


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


def answer(function: Callable[..., None]) -> Callable[..., None]:
    """How the answer to a query is given."""
    for option in (
        click.option(
            "--timeout", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True, help="Seconds."
        ),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            default=50,
            show_default=True,
            help="Most rows of the table; else all.",
        ),
        click.option("--out", metavar="FILE", help="Write all rows there: .parquet, .arrow, .jsonl or .csv."),
        click.option("--json", "as_json", is_flag=True, help="The same as --format json."),
        click.option(
            "--format",
            "form",
            type=click.Choice(["table", "csv", "json", "parquet", "markdown"]),
            default="table",
            show_default=True,
            help="How rows are printed.",
        ),
    ):
        function = option(function)
    return function


@main.command()
@click.argument("query", required=False)
@click.argument("folder", required=False)
@click.option("--views", "list_views", is_flag=True, help="Describe the views and their columns.")
@answer
def sql(query: str | None, folder: str | None, list_views: bool, **answered: Any) -> None:
    """Ask one SELECT about an experiment, or several at a prompt.

    \b
        prefcache sql runs/demo
        prefcache sql "select run, avg(margin), avg(correct::int) from rewards group by run"
        prefcache sql "select * from examples where n_chosen > 2 * n_rejected" runs/demo
        prefcache sql "select * from pairs where margin < -20" runs/demo --out runs/against.parquet

    Without QUERY it opens a prompt. --views describes the views, among them examples, pairs, reference, rewards and runs. FOLDER is a config, or its `out`; it can be left out where runs/ has only one. Queries read nothing else.
    """
    from stages import inspect, tables

    if list_views:
        where = folder or query
        tables.views(inspect.Experiment(where).describe() if where else inspect.describe())
        return
    if query and folder is None and _exists(query):
        query, folder = None, query
    if query is not None:
        _answer(inspect.Experiment(folder), query, None, **answered)
        return
    if not sys.stdin.isatty():
        raise UsageError("No query. Ask one, as in `prefcache sql 'select * from rewards'`, or see --views.")
    from stages import prompt

    experiment = inspect.Experiment(folder)
    names = [name for view, _, columns in experiment.describe() for name in (view, *(column for column, _ in columns))]
    prompt.run(lambda query: _print_answer(experiment, query, None, **answered), experiment.cancel, names)


@main.command()
@click.argument("name", required=False)
@click.argument("folder", required=False)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the question, e.g. limit=5."
)
@click.option("--sql", "as_sql", is_flag=True, help="Print the question's SQL, to begin from.")
@answer
def ask(name: str | None, folder: str | None, settings: tuple[str, ...], as_sql: bool, **answered: Any) -> None:
    """Ask a question that comes up again and again; without NAME, list them.

    \b
        prefcache ask
        prefcache ask length-bias runs/demo
        prefcache ask reference-probability runs/demo --set share=0.3 --out runs/clear.parquet
        prefcache train data/demo/config.yaml --set train.run=clear --set train.only=runs/clear.parquet

    FOLDER is a config, or its `out`; it can be left out where runs/ has only one. Rows with an example_id can be trained on: train.only.
    """
    from pipeline import questions
    from stages import inspect, tables

    if name is None:
        tables.questions(questions.QUESTIONS.values())
        return
    question = questions.question(name)
    if as_sql:
        click.echo(question.sql, nl=False)
        return
    said = dict(setting.partition("=")[::2] for setting in settings)
    _answer(inspect.Experiment(folder), question.sql, question.values(said), **answered)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # longer than a name may be, as queries are
        return False


def _answer(experiment: "Experiment", query: str, parameters: dict[str, Any] | None, **answered: Any) -> None:
    # What is being written has a temporary to remove.
    with _killed_by_signals() if answered["out"] is None else contextlib.nullcontext():
        _print_answer(experiment, query, parameters, **answered)


def _print_answer(
    experiment: "Experiment",
    query: str,
    parameters: dict[str, Any] | None,
    *,
    form: str,
    as_json: bool,
    out: str | None,
    limit: int,
    timeout: float,
) -> None:
    """As a table, for a machine, or into a file."""
    from stages import answers, tables

    form = "json" if as_json else form
    with experiment.asked(query, parameters, timeout) as result:
        if out is not None:
            click.echo(f"{out}: {answers.save(result, Path(out)):,} rows")
        elif form == "table":
            tables.rows(result.columns, result.rows(), limit)
        else:
            answers.show(result, form)
        for line in result.why_empty():
            click.echo(line, err=True)


@main.command()
@click.option("--run", "names", multiple=True, metavar="RUN", help="A run of the experiment. Several are compared.")
@click.option("--output", "--out", metavar="FILE", help="Where the page goes.  [default: OUT/RUN/report.html]")
@stage
def report(
    config: str | None,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    names: tuple[str, ...],
    output: str | None,
) -> None:
    """Write what an experiment has come to as one HTML page.

    \b
        prefcache report data/demo/config.yaml
        prefcache report runs/demo --run trained --run ipo --output runs/compared.html

    CONFIG is a config, for its run, or the `out` of one, for all runs in it. What is not there yet is named, with the command that makes it, so an unfinished run has a page too; so have prepared data alone. The page needs no other file and no network, and runs no script. That of several runs, or of none, is OUT/report.html.
    """
    from pipeline.progress import Progress
    from stages import report

    path = Path(output) if output else None
    if config is not None and Path(config).is_dir():
        if overrides:
            raise UsageError(f"--set changes a config, and {config} is an experiment's folder. Leave one of them out.")
        result = report.of_folder(Path(config), names, path, Progress(quiet))
    else:
        with _loaded(config, overrides, quiet) as (settings, progress):
            said = shlex.join([*([config] if config else []), *(f"--set={each}" for each in overrides)])
            result = report.of_config(settings, said, names, path, progress)
    _print(result, as_json, "reported")


@contextlib.contextmanager
def _killed_by_signals() -> Iterator[None]:
    """A running query does not let Python's handlers run; and it has nothing to lose."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- loading and printing --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _loaded(path: str | None, overrides: tuple[str, ...], quiet: bool) -> Iterator[tuple["Config", Any]]:
    from pipeline import config
    from pipeline.progress import Progress

    if path is None and not overrides:
        raise UsageError("No config. Name one, as in `prefcache prepare data/demo/config.yaml`, or --set its keys.")
    progress, began = Progress(quiet), time.monotonic()
    yield config.load(path, overrides), progress
    progress.say(f"{click.get_current_context().info_name}: {time.monotonic() - began:.1f} s in all")


def _print(result: dict[str, Any], as_json: bool, table: str) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=1, ensure_ascii=sys.stdout.isatty()))
    else:
        from stages import tables

        getattr(tables, table)(result)
