"""The command itself: its help, its errors as exit codes, and what all commands share."""

import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import INTERRUPTED, PrefcacheError, ResourceError, UsageError

if TYPE_CHECKING:
    from pipeline.config import Config

# PyTorch reads this when it loads. Threads that spin while they wait slow a busy machine several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_OUT_OF_MEMORY = (
    "out of memory. Lower score.tokens_per_batch or train.tokens_per_micro_batch; neither changes a result."
)


_SECTIONS = {
    "From data to a model": ("prepare", "score", "train", "merge", "push"),
    "What is in it": ("preview", "show", "sql", "ask", "report"),
    "The cache": ("export", "import", "parity", "verify", "gc"),
    "What there is": ("losses", "formats", "doctor", "from-trl"),
}


class Commands(click.Group):
    """Errors are translated here, once: a line on stderr and the exit code that says what kind it was."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        for title, names in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(width)) for name in names])

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


@contextlib.contextmanager
def loaded(path: str | None, overrides: tuple[str, ...], quiet: bool) -> Iterator[tuple["Config", Any]]:
    from pipeline import config
    from pipeline.progress import Progress

    if path is None and not overrides:
        raise UsageError("No config. Name one, as in `prefcache prepare data/demo/config.yaml`, or --set its keys.")
    progress, began = Progress(quiet), time.monotonic()
    yield config.load(path, overrides), progress
    progress.say(f"{click.get_current_context().info_name}: {time.monotonic() - began:.1f} s in all")


def print_result(result: dict[str, Any], as_json: bool, table: str) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=1, ensure_ascii=sys.stdout.isatty()))
    else:
        from stages import tables

        getattr(tables, table)(result)
