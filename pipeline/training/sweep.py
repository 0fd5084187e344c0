"""Many runs over one cache: every combination of some settings, each a run with a name that says which."""

import itertools
import re
from dataclasses import dataclass

import yaml

from pipeline.errors import UsageError

_MOST = 1000


@dataclass(frozen=True)
class Combination:
    name: str
    overrides: tuple[str, ...]  # as --set takes them


def combinations(text: str) -> list[Combination]:
    """Of `train.loss=sigmoid,ipo train.beta=0.05,0.1`: the four runs that it means, in the order written."""
    axes = [_axis(word) for word in _words(text)]
    if not axes:
        raise UsageError("--sweep: names nothing; expected KEY=VALUE,VALUE ..., as in 'train.beta=0.05,0.1'.")
    keys = [key for key, _ in axes]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UsageError(f"--sweep: names {twice} twice; give all of its values at once.")
    found = [_combination(chosen) for chosen in itertools.product(*([(key, v) for v in vs] for key, vs in axes))]
    if len(found) > _MOST:
        raise UsageError(f"--sweep: that is {len(found):,} runs; {_MOST:,} are the most. Name fewer values.")
    if len({each.name for each in found}) < len(found):
        raise UsageError(f"--sweep: some of its runs would have one name. Values differ only in signs: {text}.")
    return found


def _words(text: str) -> list[str]:
    """What stands between blanks, but for blanks in brackets or quotes."""
    words: list[str] = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*'|\S)+", text)
    return words


def _axis(word: str) -> tuple[str, list[str]]:
    key, equals, values = word.partition("=")
    if not equals or not values:
        raise UsageError(f"--sweep {word}: expected KEY=VALUE,VALUE, as in train.beta=0.05,0.1.")
    if not key.startswith("train.") or key == "train.run":
        raise UsageError(
            f"--sweep {key}: expected keys of train, which all share one cache. For other data or another reference, name another "
            "config; runs of a sweep are named by what they vary."
        )
    return key, _values(word, values)


def _values(word: str, text: str) -> list[str]:
    """Separated by commas, those in brackets or quotes aside; a value is YAML."""
    parts: list[str] = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*'|[^,])+", text)
    for part in parts:
        try:
            yaml.safe_load(part)
        except yaml.YAMLError:
            raise UsageError(f"--sweep {word}: {part} is not YAML.") from None
    return parts


def _combination(chosen: tuple[tuple[str, str], ...]) -> Combination:
    """The run's name has only what a folder may be called on any system."""
    said = "+".join(f"{key.removeprefix('train.')}={value}" for key, value in chosen)
    name = re.sub(r"-*([=+]|$)-*", r"\1", re.sub(r"[^\w.=+-]+", "-", said))
    return Combination(name, (*(f"{key}={value}" for key, value in chosen), f"train.run={name}"))
