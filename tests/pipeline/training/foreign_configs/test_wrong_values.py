"""Whatever a value of a file is, the conversion succeeds or says in one sentence what it found."""

import math
from pathlib import Path

import pytest
import yaml

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.foreign_programs import AXOLOTL, LLAMAFACTORY, TRL
from prefcache.pipeline.preparing.formats import FORMATS
from prefcache.pipeline.training.foreign_configs import axolotl, convert, llamafactory, trl
from tests.helpers import foreign_files

SMALLEST = {
    TRL: {"dataset_name": "d", "model_name_or_path": "m", "use_peft": True, "eval_strategy": "steps"},
    AXOLOTL: yaml.safe_load(foreign_files.AXOLOTL),
    LLAMAFACTORY: yaml.safe_load(foreign_files.LLAMAFACTORY),
}
KEYS = {TRL: trl._READ_HERE, AXOLOTL: axolotl._READ_HERE, LLAMAFACTORY: llamafactory._READ_HERE}
VALUES = [
    "x",
    "",
    "1, 2",
    0,
    -1,
    0.5,
    10**9,
    math.inf,
    math.nan,
    True,
    [],
    [1],
    ["x", None],
    [{"path": 1}],
    {"a": 1},
    {"path": ["x"]},
]


@pytest.mark.parametrize("program", SMALLEST, ids=lambda program: program.name)
def test_any_value_of_any_key_is_converted_or_refused_in_words(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    foreign_files.write_dataset_info(tmp_path / "data", 2)
    n_refused = 0
    for key in {*KEYS[program], *SMALLEST[program]}:
        for value in VALUES:
            try:
                converted = convert(program, SMALLEST[program] | {key: value}, Path("a.yaml"))
                converted.drop_unknown_formats(FORMATS)
                converted.check()
            except UsageError as error:
                n_refused += 1
                assert len(str(error)) > 20 and "\n" not in str(error)
    assert n_refused > 50


def test_a_number_without_a_point_is_one():
    """YAML 1.1 reads 5e-7 as text, and the programs read it as a number."""
    found = convert(TRL, yaml.safe_load("dataset_name: d\nlearning_rate: 5e-7\nrun_name: 5e-7\n"), Path("a.yaml"))
    assert found.config["train"]["learning_rate"] == 5e-7 and found.config["train"]["run"] == "5e-7"
