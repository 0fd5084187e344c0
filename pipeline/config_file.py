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

_MAX_NESTING = 100  # of brackets in a file
_DATA_SUFFIXES = (".jsonl", ".parquet", ".arrow", ".csv", ".tsv")  # files of records; .json may be a config
_START = "Name a YAML file; `prefcache init my.yaml` writes one to start from."


@contextlib.contextmanager
def open_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Iterator[tuple[Config, Path | None]]:
    """Load a configuration, and work in the folder that its paths are relative to, which is yielded unless it is the current one."""
    base = base_of_run_config(path) if path is not None else None
    absolute = path if path is None or base is None else Path(path).absolute()
    with contextlib.chdir(base) if base is not None else contextlib.nullcontext():
        yield load(absolute, overrides), base


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Load the configuration in `path` (None: empty) and apply `key=value` overrides."""
    return from_tree(read_yaml(Path(path)) if path else {}, overrides, f"{path}: " if path else "")


def from_tree(tree: Mapping[str, Any], overrides: Iterable[str] = (), source: str = "") -> Config:
    """Build the configuration from a tree such as a YAML file's, and apply `key=value` overrides."""
    overridden, changed = [], copy.deepcopy(dict(tree))
    for override in overrides:
        _apply(changed, override)
        overridden.append(override.partition("=")[0])
    return validate(changed, source, overridden)


def validate(tree: dict[str, Any], source: str = "", overridden: Iterable[str] = ()) -> Config:
    """Build the configuration. The error begins with `source`, except for keys that the command line has overridden."""
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
        parts += [f"--set {problem}" for problem in by_origin["override"]]
        raise UsageError("; ".join([*_foreign(source, tree), *parts])) from None


def _foreign(source: str, tree: dict[str, Any]) -> list[str]:
    """Say where settings of TRL belong, before each of them is refused."""
    if "prepare" in tree or not {"model_name_or_path", "dataset_name"} & tree.keys():
        return []
    return [f"{source}these are TRL's settings; `prefcache from-trl FILE --output my.yaml` converts them"]


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


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {override}: expected KEY=VALUE, as in --set train.beta=0.2.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}.") from None
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UsageError(f"--set {override}: {section} is a value, not a section.")
    tree[last] = value
