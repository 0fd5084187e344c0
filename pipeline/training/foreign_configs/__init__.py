"""Convert the settings of TRL, Axolotl and LLaMA-Factory into a config of ours, and account for every key of their files.

Where a file leaves out what would change a result, its program's default is written down, since ours may differ. What the
programs share is in hf_trainer.py and converted.py; pipeline/foreign_programs.py tells whose file it is.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.foreign_programs import AXOLOTL, LLAMAFACTORY, TRL, Program, refuse_other
from prefcache.pipeline.training.foreign_configs import axolotl, llamafactory, trl
from prefcache.pipeline.training.foreign_configs.converted import Converted

_CONVERTERS: dict[Program, Callable[[Mapping[str, Any], Path], Converted]] = {
    TRL: trl.convert,
    AXOLOTL: axolotl.convert,
    LLAMAFACTORY: llamafactory.convert,
}
_ORDER = ("model", "revision", "adapter", "out", "prepare", "score", "train")


def convert(program: Program, tree: Mapping[str, Any], file: Path) -> Converted:
    """Convert a program's file; refuse one that is ours, another program's, or no one's that is known."""
    refuse_other(tree, file, program)
    given = {key: _read_exponent(key, value) for key, value in tree.items() if value is not None}
    unknown = [str(key) for key in given if not isinstance(key, str)]
    if not given or unknown:
        raise UsageError(f"{file}: found {', '.join(unknown) or 'no settings'}, expected {program.name}'s settings.")
    converted = _CONVERTERS[program](given, file.parent)
    if len(unknown := converted.unknown_keys) > len(given) / 2:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise UsageError(
            f"{file}: {len(unknown)} of its {len(given)} keys are not {program.name}'s ({shown}). `prefcache {program.command}` "
            f"converts the files of {program.name} alone."
        )
    converted.config = {key: converted.config[key] for key in _ORDER if key in converted.config}
    return converted


def _read_exponent(key: Any, value: Any) -> Any:
    """Read 5e-7 as the number that it is for these programs: YAML 1.1 wants a point in it."""
    is_name = str(key).endswith(("name", "dir", "path"))
    is_number = isinstance(value, str) and not is_name and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if is_number else value
