"""config, init and completion: what a user types to find a setting and to start."""

import json
import os
import re
import subprocess

import pytest
import yaml

from prefcache.pipeline import config_file
from tests.helpers.project import PREFCACHE, write_pairs


def test_a_section_is_listed_with_type_default_and_meaning(prefcache):
    listed = prefcache("config", "train.lora").stdout
    assert "train.lora.r (integer >= 1) = 16\n    Rank of the adapter.\n" in listed
    assert "train.scheduler" not in listed
    assert "train.scheduler (cosine | linear | constant) = cosine" in prefcache("config").stdout
    assert prefcache("config", "scheduler").stdout.startswith("train.scheduler ")  # a name that only one section has


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lr", "use train.learning_rate"),
        ("train.lora.rnk", "did you mean train.lora.r"),
        ("zzzzzz", "`prefcache config` lists them all"),
    ],
)
def test_an_unknown_setting_leads_to_the_right_one(prefcache, key, hint):
    assert hint in prefcache("config", key, code=2).stderr


def test_json_has_every_setting(prefcache):
    rows = json.loads(prefcache("config", "--json").stdout)
    assert {"key": "train.seed", "type": "integer", "default": "0", "is_section": False}.items() <= next(
        row for row in rows if row["key"] == "train.seed"
    ).items()
    assert json.loads(prefcache("config", "--schema").stdout)["properties"]["model"]["type"] == "string"


def test_a_new_config_runs_as_it_is(prefcache, model, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 8)
    prefcache("init", "my.yaml", "--model", model, "--data", "pairs.jsonl")
    assert "8 records" in prefcache("prepare", "my.yaml").stdout
    loaded = config_file.load(tmp_path / "my.yaml")
    assert (loaded.out, loaded.train.loss) == ("runs/my", "sigmoid")
    # Existing files are kept.
    assert "my.yaml" in prefcache("init", "my.yaml", code=2).stderr
    prefcache("init", "my.yaml", "--force", "--data", "a: b.jsonl", "--data", "c.jsonl")
    assert [source.path for source in config_file.load(tmp_path / "my.yaml").prepare.sources] == [
        "a: b.jsonl",
        "c.jsonl",
    ]


def test_what_a_new_config_offers_is_valid_once_it_is_uncommented(prefcache, tmp_path):
    prefcache("init", "my.yaml")
    offered = re.sub(r"^  #(?=\w)", "  ", (tmp_path / "my.yaml").read_text(), flags=re.MULTILINE)
    (tmp_path / "all.yaml").write_text(offered)
    assert config_file.load(tmp_path / "all.yaml").train.lora.r == 16
    assert len(yaml.safe_load(offered)["train"]) == 14


@pytest.mark.parametrize(
    ("words", "expected"), [("prefcache pre", "prepare"), ("prefcache train --set train.lora.r", "train.lora.r=")]
)
def test_bash_completes_commands_and_settings(words, expected):
    script = subprocess.run([PREFCACHE, "completion", "bash"], capture_output=True, text=True, check=True).stdout
    assert "_PREFCACHE_COMPLETE=bash_complete" in script
    parts = words.split()
    environment = {
        **os.environ,
        "_PREFCACHE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(parts) - 1),
    }
    completed = subprocess.run([PREFCACHE], env=environment, capture_output=True, text=True, check=True).stdout
    assert f"plain,{expected}" in completed.splitlines()
