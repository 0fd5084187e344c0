"""config and init: explain the settings, and write a first config."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from prefcache.pipeline import config_settings
from prefcache.pipeline.config_errors import suggest_alias
from prefcache.pipeline.config_file import validate
from prefcache.pipeline.config_settings import Setting
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored.overwrite_guard import Inputs, refuse_overwrite, write_bytes

# The settings that a new config has, and those that it offers as comments.
_SET: tuple[str, ...] = (
    *("model", "out", "cache", "prepare.data", "prepare.held_out", "prepare.max_length", "score.engine"),
    *("train.loss", "train.learning_rate", "train.epochs", "train.batch_size"),
)
_OFFERED: tuple[str, ...] = (
    *("prepare.format", "prepare.template", "prepare.too_long", "score.dtype"),
    *("train.beta", "train.run", "train.model", "train.lora", "train.gradient_checkpointing"),
    *("train.eval_every", "train.best", "train.where", "train.report_to", "train.samples"),
)
_EXAMPLES = {
    "train.beta": "0.1",
    "train.model": "org/sft-model",
    "train.lora": "{r: 16, alpha: 32}",
    "train.eval_every": "100",
    "train.best": "eval_loss",
    "train.where": "margin < 5 and n_chosen < 200",
    "train.report_to": "tensorboard",
}


def describe(key: str | None) -> list[Setting]:
    """Return the setting named `key` and those below it, or all settings."""
    settings = list(config_settings.settings())
    if key is None:
        return settings
    if chosen := [each for each in settings if each.key == key or each.key.startswith(f"{key}.")]:
        return chosen
    name = key.rpartition(".")[2]
    if same_name := [each for each in settings if each.key.rpartition(".")[2] == name]:
        return same_name
    if same := suggest_alias(name):
        raise UsageError(f"{key} is not a setting; {same}.")
    near = difflib.get_close_matches(key, [each.key for each in settings], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`prefcache config` lists them all."
    raise UsageError(f"{key} is not a setting; {hint}")


def write_starter(path: Path, model: str, data: tuple[str, ...], force: bool) -> None:
    """Write a commented config for a model and data."""
    refuse_overwrite(path, Inputs(data=data), force=force)
    values = {"model": model, "out": f"runs/{path.stem}", "prepare.data": data[0] if len(data) == 1 else list(data)}
    text = _starter(path, values)
    validate(yaml.safe_load(text), f"{path}: ")
    write_bytes(path, text.encode())


def _starter(path: Path, values: dict[str, Any]) -> str:
    settings = {setting.key: setting for setting in config_settings.settings()}
    lines = [
        f"# prefcache prepare {path} && prefcache score {path} && prefcache train {path}",
        "# The settings most often changed; `prefcache config` explains all of them. Uncomment what you want to change.",
    ]
    section = ""
    for key in sorted(_SET + _OFFERED, key=list(settings).index):
        setting, (parent, _, name) = settings[key], key.rpartition(".")
        indent = "  " if parent else ""
        if parent != section:
            lines += ["", f"{parent}:"]
            section = parent
        default = setting.default if setting.default not in (None, "", "not set") else ""
        value = _scalar(values[key]) if key in values else _EXAMPLES.get(key, default)
        mark = "" if key in _SET else "#"
        lines += [f"{indent}# {setting.meaning}", f"{indent}{mark}{name}: {value}"]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("\n...\n").strip()
    )
