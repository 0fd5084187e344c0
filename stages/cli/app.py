"""The command group: help sections, errors as exit codes, and the options that commands share."""

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from prefcache import interrupts
from prefcache.pipeline.errors import PrefcacheError, ResourceError, UsageError
from prefcache.pipeline.model.oom import is_out_of_memory
from prefcache.pipeline.visible_text import visible, visible_json, wrap_for

if TYPE_CHECKING:
    from prefcache.pipeline.config import Config
    from prefcache.pipeline.progress import Progress

# PyTorch reads this when it loads. Threads that spin while they wait slow a busy machine several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_OUT_OF_MEMORY = (
    "out of memory. Lower score.tokens_per_batch or train.tokens_per_micro_batch; neither changes a result."
)


_SECTIONS = {
    "Pipeline": ("prepare", "score", "train", "merge", "push"),
    "Query": ("preview", "show", "sql", "ask", "ui", "report"),
    "Runs": ("runs", "clean"),
    "Cache": ("export", "import", "parity", "verify", "gc", "sign", "publish", "fetch"),
    "Other machines": ("upload", "download"),
    "Setup": ("init", "config", "from-trl", "from-axolotl", "from-llamafactory", "completion"),
    "Info": ("guide", "losses", "formats", "architectures", "doctor"),
}


class Failure(click.ClickException):
    """An error as the command line shows it: one line on stderr, and the exit code of its kind."""

    def __init__(self, message: str, kind: str, exit_code: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(wrap_for(sys.stderr, f"error: {visible(self.message)}"), file=file, err=file is None)


class _UsageFailure(click.UsageError):
    """A usage error whose message wraps between words, as other errors do."""

    def show(self, file: IO[Any] | None = None) -> None:
        message = wrap_for(sys.stderr, f"Error: {self.format_message()}").removeprefix("Error: ")
        click.UsageError(message, self.ctx).show(file)


class Commands(click.Group):
    """Translate errors in one place."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        for title, names in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(width)) for name in names])

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """Run a command; with --json among its arguments, an error is JSON as well."""
        arguments = list(sys.argv[1:] if args is None else args)
        if "--json" not in arguments:
            return super().main(arguments, *more, **options)
        try:
            code = super().main(arguments, *more, **options | {"standalone_mode": False})
        except click.ClickException as error:
            content = {
                "kind": error.kind if isinstance(error, Failure) else UsageError.kind,
                "message": error.format_message(),
                "exit_code": error.exit_code,
            }
            click.echo(visible_json(json.dumps({"error": content}, ensure_ascii=False)), err=True)
            sys.exit(error.exit_code)
        sys.exit(code or 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with interrupts.raise_signals():
                return super().invoke(ctx)
        except click.UsageError as error:
            # It quotes arguments, which may be anything.
            raise _UsageFailure(visible(error.format_message()), error.ctx) from None
        except PrefcacheError as error:
            raise _failure(error) from None
        except (KeyboardInterrupt, click.Abort):
            raise Failure(interrupts.SENTENCE, "interrupted", interrupts.EXIT_CODE) from None
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(0)
        except OSError as error:
            from prefcache.pipeline.cache_place import explain_mirror

            mirror = explain_mirror(Path(str(error.filename)))
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                message = f"{error.filename or 'a file'}: cannot be written ({error.strerror}).{mirror}"
                raise _failure(ResourceError(message)) from None
            if error.filename is None:
                raise
            message = f"{error.filename}: {error.strerror}. Name a path that exists and that you may use.{mirror}"
            raise _failure(UsageError(message)) from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = f"{_OUT_OF_MEMORY} ({error})" if str(error) else _OUT_OF_MEMORY
            raise _failure(ResourceError(message)) from None


def _failure(error: PrefcacheError) -> Failure:
    return Failure(str(error), error.kind, error.exit_code)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="prefcache")
def main() -> None:
    """Run the reference model once; train on its log-probs as often as you like.

    \b
        prefcache prepare data/demo/config.yaml
        prefcache score data/demo/config.yaml
        prefcache train data/demo/config.yaml
        prefcache sql "select avg(margin) from rewards" runs/demo

    The stages meet only on disk. Each is safe to interrupt, and skips what is already done. `prefcache guide` has the documentation.

    Exit codes: 0 ok, 2 usage, 3 bad data, 4 integrity, 5 identity mismatch, 6 disk or memory, 7 alerts of a strict run, 130 interrupted. With --json, an error is a JSON object on stderr.
    """


def _complete_setting(ctx: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    from prefcache.pipeline.config_settings import settings

    keys = (setting.key for setting in settings() if not setting.is_section)
    return [f"{key}=" for key in keys if key.startswith(typed)]


def result_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add -q and --json, for a command that reports progress and prints a result."""
    function = click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print the result as JSON, with invisible characters escaped; an error too, on stderr.",
    )(function)
    return click.option("-q", "--quiet", is_flag=True, help="Print no progress.")(function)


def set_option(function: Callable[..., None]) -> Callable[..., None]:
    """Add --set, for a command that reads a config."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        shell_complete=_complete_setting,
        help="Override a config key, e.g. train.beta=0.2.",
    )(function)


def stage(function: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments that every stage takes."""
    function = set_option(result_options(function))
    return click.argument("config", required=False, metavar="[CONFIG]", type=click.Path())(function)


@contextlib.contextmanager
def open_config(
    path: str | None,
    overrides: tuple[str, ...],
    quiet: bool,
    *,
    label: str = "",
    silent: bool = False,
    timed: bool = True,
) -> Iterator[tuple["Config", "Progress"]]:
    """Load a config, and work in the folder that its paths are relative to; report the time it took at the end, if `timed`."""
    from prefcache.pipeline import config_file
    from prefcache.pipeline.progress import Progress

    if path is None and not overrides:
        raise UsageError("No config. Name one (`prefcache init my.yaml` writes one to start from), or --set its keys.")
    began, command = time.monotonic(), str(click.get_current_context().info_name)
    absolute = path and Path(path).absolute()
    with (
        Progress(quiet, command=command, label=label, silent=silent) as progress,
        config_file.open_config(path, overrides) as (config, base),
    ):
        if base is not None:
            progress.say(f"{absolute} is a run's own config: its paths are relative to {base}")
        yield config, progress
        if timed:
            progress.say(f"{command}: {time.monotonic() - began:.1f} s in total")


_FORCE = "Replace an existing file, but never data, a model, a cache or an experiment's files."


def force(function: Callable[..., None]) -> Callable[..., None]:
    """Add --force, for a command that writes a file that the user names."""
    return click.option("--force", is_flag=True, help=_FORCE)(function)


def force_with_input(function: Callable[..., None]) -> Callable[..., None]:
    """Add --force to a command that writes such a file only with --input."""
    return click.option("--force", is_flag=True, help=f"With --input: {_FORCE[0].lower()}{_FORCE[1:]}")(function)


def output_path(output: str | None, config: str | None) -> Path | None:
    """Return the output path, relative to the working directory even if the config's own paths are relative to another folder."""
    from prefcache.pipeline.config_file import base_of_run_config

    if output is None:
        return None
    return Path(output).absolute() if config is not None and base_of_run_config(config) else Path(output)


def print_result(result: object, as_json: bool) -> None:
    """Print what a stage returned, as JSON or for a person."""
    if as_json:
        from prefcache import command_results

        click.echo(command_results.to_json(result))
    else:
        from prefcache import terminal_output

        terminal_output.print_result(result)
