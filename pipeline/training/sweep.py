"""Sweeps: many runs over one cache, one for every combination of some settings, each named by its settings."""

import itertools
import re
from dataclasses import dataclass

import yaml

from prefcache.pipeline.errors import UsageError

_MOST = 1000
# A group in brackets or quotes is kept together.
_GROUPS = r"\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*'"


@dataclass(frozen=True)
class Combination:
    name: str
    overrides: tuple[str, ...]  # as --set takes them


def combinations(text: str) -> list[Combination]:
    """Return the runs of `train.loss=sigmoid,ipo train.beta=0.05,0.1`, here four, in the order written."""
    axes = [_parse_axis(word) for word in re.findall(rf"(?:{_GROUPS}|\S)+", text)]
    if not axes:
        raise UsageError("--sweep: names nothing; expected KEY=VALUE,VALUE ..., as in 'train.beta=0.05,0.1'.")
    keys = [key for key, _ in axes]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UsageError(f"--sweep: names {twice} twice; give all of its values at once.")
    runs = []
    for values in itertools.product(*(values for _, values in axes)):
        settings = list(zip(keys, values, strict=True))
        label = "+".join(f"{key.removeprefix('train.')}={value}" for key, value in settings)
        # Only characters that a folder's name may have on any system.
        name = re.sub(r"-*([=+]|$)-*", r"\1", re.sub(r"[^\w.=+-]+", "-", label))
        overrides = (*(f"{key}={value}" for key, value in settings), f"train.run={name}")
        runs.append(Combination(name, overrides))
    if len(runs) > _MOST:
        raise UsageError(f"--sweep: that is {len(runs):,} runs; at most {_MOST:,} are allowed. Name fewer values.")
    if len({run.name for run in runs}) < len(runs):
        raise UsageError(f"--sweep: some runs would have the same name. Values differ only in signs: {text}.")
    return runs


def _parse_axis(word: str) -> tuple[str, list[str]]:
    key, equals, text = word.partition("=")
    if not equals or not text:
        raise UsageError(f"--sweep {word}: expected KEY=VALUE,VALUE, as in train.beta=0.05,0.1.")
    if not key.startswith("train.") or key == "train.run":
        raise UsageError(
            f"--sweep {key}: expected keys of train, which all share one cache. For other data or another reference, name another "
            "config; runs of a sweep are named by what they vary."
        )
    values: list[str] = re.findall(rf"(?:{_GROUPS}|[^,])+", text)
    for value in values:
        try:
            yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--sweep {word}: {value} is not YAML.") from None
    return key, values
