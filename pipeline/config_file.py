"""Read a configuration from a YAML file and from `--set key=value` overrides."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from prefcache.pipeline.config import Config
from prefcache.pipeline.config_errors import describe_problem, problem_origin
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.foreign_programs import refuse_foreign

_MAX_NESTING = 100  # of brackets in a file
_DATA_SUFFIXES = (".jsonl", ".parquet", ".arrow", ".csv", ".tsv")  # files of records; .json may be a config
_START = "Name a YAML file; `prefcache init my.yaml` writes one to start from."


# As `key=value` with a value in YAML, from the command line; or from Python, by key.
Overrides = Iterable[str] | Mapping[str, Any]


@contextlib.contextmanager
def open_config(path: str | Path | None, overrides: Overrides = ()) -> Iterator[tuple[Config, Path | None]]:
    """Load a configuration, and work in the folder that its paths are relative to, which is yielded unless it is the current one."""
    base = base_of_run_config(path) if path is not None else None
    absolute = path if path is None or base is None else Path(path).absolute()
    with contextlib.chdir(base) if base is not None else contextlib.nullcontext():
        yield load(absolute, overrides), base


def load(path: str | Path | None, overrides: Overrides = ()) -> Config:
    """Load the configuration in `path` (None: empty) and apply overrides."""
    tree = read_yaml(Path(path)) if path else {}
    refuse_foreign(tree, path)
    return from_tree(tree, overrides, f"{path}: " if path else "")


def from_tree(tree: Mapping[str, Any], overrides: Overrides = (), source: str = "") -> Config:
    """Build the configuration from a tree such as a YAML file's, and apply overrides."""
    changed = copy.deepcopy(dict(tree))
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            if isinstance(value, Mapping) and key in ("prepare", "score", "train"):
                named = f"{key}.{next(iter(value), 'KEY')}"
                raise UsageError(
                    f"overrides: {key} would replace the whole section. Name single keys, as in {named!r}."
                )
            _put(changed, key, to_plain(value), "overrides: ")
        return validate(changed, source, overrides, "overrides: ")
    overridden = []
    for override in overrides:
        key, value = _parse(override)
        _put(changed, key, value, f"--set {override}: ")
        overridden.append(key)
    return validate(changed, source, overridden)


def validate(
    tree: dict[str, Any], source: str = "", overridden: Iterable[str] = (), override_source: str = "--set "
) -> Config:
    """Build the configuration. The error begins with `source`, or for keys that were overridden with `override_source`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        keys = list(overridden)
        by_origin: dict[str, list[str]] = {"file": [], "either": [], "override": []}
        for problem in error.errors():
            origin = problem_origin(problem, keys)
            by_origin[origin].append(describe_problem(problem, on_command_line=origin == "override"))
        parts = [
            prefix + "; ".join(problems)
            for prefix, problems in ((source, by_origin["file"]), ("", by_origin["either"]))
            if problems
        ]
        parts += [f"{override_source}{problem}" for problem in by_origin["override"]]
        raise UsageError("; ".join(parts)) from None


def base_of_run_config(path: str | Path) -> Path | None:
    """Return the folder that the paths in a run's own config.yaml are relative to, if it is not the working directory.

    It is the folder from which the run's `out` leads to the run; for an absolute `out`, the nearest parent that has the
    cache. None for any other config, and for a run that was moved out of its `out`.
    """
    path = Path(path)
    if path.name != "config.yaml" or not (path.parent / "provenance.json").exists():
        return None
    tree = read_yaml(path)
    out, cache, experiment = Path(str(tree.get("out"))), str(tree.get("cache", "cache")), path.resolve().parent.parent
    try:
        if out.is_absolute():
            base = next((folder for folder in experiment.parents if (folder / cache).is_dir()), None)
        else:
            base = next((folder for folder in experiment.parents if (folder / out).resolve() == experiment), None)
    except ValueError:  # a path cannot contain a null character
        return None
    return base if base != Path.cwd().resolve() else None


def to_yaml(config: Config) -> str:
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def read_yaml(path: Path) -> dict[str, Any]:
    is_data = UsageError(f"{path} is data, not a config. Name a config, or --set prepare.data={path}.")
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith(_DATA_SUFFIXES) and path.is_file():
        raise is_data
    try:
        text = path.read_text(encoding="utf-8")
        # YAML's reader takes hours when brackets nest too deep, so count them first, including those within strings.
        steps = [1 if character in "[{" else -1 for character in text if character in "[]{}"]
        if max(accumulate(steps), default=0) > _MAX_NESTING:
            raise UsageError(f"{path} is not a config: its brackets nest more than {_MAX_NESTING} deep.")
        tree = yaml.safe_load(text)
    except FileNotFoundError:
        raise UsageError(f"No config at {path}. {_START}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a config: {error}. {_START}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        if name.endswith(".json"):
            raise is_data from None
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if isinstance(tree, list) and name.endswith(".json"):
        raise is_data
    if not isinstance(tree, dict):
        content = "nothing" if tree is None else type(tree).__name__
        raise UsageError(f"{path}: found {content}, expected sections such as `prepare:`.")
    return tree


def _parse(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {override}: expected KEY=VALUE, as in --set train.beta=0.2.")
    try:
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}.") from None


def _put(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UsageError(f"{source}{section} is a value, not a section.")
    tree[last] = value


def to_plain(value: Any) -> Any:
    """Copy a value as YAML would give it: a path from Python becomes text, and a number of NumPy one of Python."""
    if isinstance(value, Mapping):
        return {key: to_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value
