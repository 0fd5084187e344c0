"""The settings are documented from their fields, and the JSON Schema accepts every config that the command accepts."""

import datetime
import json
import re

import jsonschema
import pytest
import yaml

from prefcache.pipeline import config, config_settings
from prefcache.pipeline.config_errors import ALIASES, section_at
from tests.helpers.project import ROOT

SETTINGS = {setting.key: setting for setting in config_settings.settings()}
SCHEMA = config_settings.json_schema()


def as_an_editor_reads(value):
    """YAML 1.2 reads 1e-3 as a number; JSON has no dates."""
    if isinstance(value, dict):
        return {str(key): as_an_editor_reads(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [as_an_editor_reads(entry) for entry in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?e-?\d+", value) else value


def check(text: str) -> None:
    jsonschema.validate(as_an_editor_reads(yaml.safe_load(text)), SCHEMA)


def test_every_setting_has_a_meaning_of_one_line():
    assert len(SETTINGS) > 100
    assert not [key for key, setting in SETTINGS.items() if not setting.meaning or "\n" in setting.meaning]


def test_type_default_and_meaning_of_some():
    found = {key: (SETTINGS[key].type, SETTINGS[key].default) for key in SETTINGS}
    assert found["train.learning_rate"] == ("number > 0", "1e-06")
    assert found["train.scheduler"] == ("cosine | linear | constant", "cosine")
    assert found["train.lora.r"] == ("integer >= 1", "16") and found["model"] == ("text", None)
    assert found["prepare.held_out"] == ("number >= 0, < 1", "0.05")


def test_the_schema_describes_every_key():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    documented = json.dumps(SCHEMA)
    assert all(json.dumps(setting.meaning)[1:-1] in documented for setting in SETTINGS.values())


@pytest.mark.parametrize("path", sorted(path.relative_to(ROOT) for path in ROOT.glob("data/**/*.yaml")), ids=str)
def test_the_schema_accepts_every_config_of_the_repository(path):
    check((ROOT / path).read_text())


@pytest.mark.parametrize(
    "settings",
    [
        "prepare: {data: pairs.jsonl}",
        "prepare: {data: [a.jsonl, {path: b, weight: 2}, {hub: org/set, split: test}]}",
        "prepare: {data: a, date: 2026-01-01}\nscore: {accept_numerics: abc, ray: {actors: 2, gpus: 0.5}}",
        "prepare: {data: a}\ntrain: {loss: [sigmoid, sft], tokens_per_micro_batch: auto, report_to: wandb}",
        "prepare: {data: a}\ntrain: {loss: {ipo: 1, sft: 0.2}, loss_args: {ipo: {beta: 0.2}}, best: eval_loss}",
        "prepare: {data: a}\ntrain: {learning_rate: 3e-5, lora: {target_modules: q_proj}, moving_reference: {}}",
        "prepare: {data: a}\ntrain: {best: {metric: loss, patience: 3}, tokens: {clamp: [-1.5, 1.5]}, where: true}",
    ],
)
def test_the_schema_accepts_what_the_command_accepts(settings):
    text = f"model: m\nout: o\n{settings}\n"
    config.Config.model_validate(yaml.safe_load(text))
    check(text)


@pytest.mark.parametrize("wrong", ["train: {lr: 1}", "train: {epochs: none}", "score: {rows: dense}", "revision: [1]"])
def test_the_schema_refuses_what_the_command_refuses(wrong):
    with pytest.raises(jsonschema.ValidationError):
        check(f"model: m\nout: o\nprepare: {{data: a}}\n{wrong}")


def test_each_alias_leads_to_a_key_that_exists():
    for alias, target in ALIASES.items():
        for key in re.findall(r"(?:prepare|score|train)(?:\.\w+)+|^(?:model|out|revision)$", target):
            *sections, name = key.split(".")
            section = section_at(sections)
            is_argument = sections[-1:] == ["loss_args"]
            assert is_argument or (section is not None and name in section.model_fields), (alias, target)
        assert (
            "." in target
            or target in ("model", "out", "revision")
            or "no setting" in target
            or "prefcache score" in target
        ), (alias, target)
