"""A file is known by the keys that only its program has."""

import itertools
import json

import pytest
import yaml

from prefcache.pipeline.foreign_programs import AXOLOTL, LLAMAFACTORY, PROGRAMS, TRL, recognise
from tests.helpers import foreign_files

FILES = {
    TRL: {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "learning_rate": 1e-6},
    AXOLOTL: yaml.safe_load(foreign_files.AXOLOTL),
    LLAMAFACTORY: yaml.safe_load(foreign_files.LLAMAFACTORY),
}
NO_ONES = {"learning_rate": 1e-6, "epochs": 3, "layers": [1, 2], "model": "m", "loss": "dpo"}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_programs_own_file_is_recognised(program):
    assert recognise(FILES[program]) is program


def test_ours_and_no_ones_are_not():
    assert recognise({"model": "m", "out": "o", "prepare": {"data": "d"}, "sequence_len": 512}) is None
    assert recognise(NO_ONES) is None and recognise({}) is None


def test_no_two_programs_share_a_key_that_tells_them_apart():
    for program in PROGRAMS:
        others = [other for other in PROGRAMS if other is not program]
        assert not any(program.own_keys & other.own_keys for other in others)


@pytest.mark.parametrize("asked", PROGRAMS, ids=lambda program: program.name)
def test_another_programs_file_is_refused_with_its_command(prefcache, tmp_path, asked):
    for program in PROGRAMS:
        if program is asked:
            continue
        (tmp_path / "their file.yaml").write_text(yaml.safe_dump(FILES[program]))
        error = prefcache(asked.command, "their file.yaml", "--output", "new.yaml", code=2).stderr
        assert f"these are {program.name}'s settings, and {asked.command} converts {asked.name}'s" in error
        assert f"`prefcache {program.command} 'their file.yaml' --output my.yaml`" in error
        assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize(
    ("tree", "found"), [(NO_ONES, "of its 5 keys are not TRL's"), ({"epochs": None}, "no settings")]
)
def test_a_file_of_no_known_program_is_refused(prefcache, tmp_path, tree, found):
    (tmp_path / "some.yaml").write_text(yaml.safe_dump(tree))
    assert found in prefcache("from-trl", "some.yaml", code=2).stderr


@pytest.mark.parametrize("command", ["prepare", "preview", "score", "train", "doctor"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_every_command_that_takes_a_config_names_the_conversion(prefcache, tmp_path, command, program):
    """Also where --set makes a section of ours."""
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(FILES[program]))
    error = prefcache(command, "theirs.yaml", "--set", "prepare.data=d", code=2).stderr
    assert error == (
        f"error: theirs.yaml: these are {program.name}'s settings. Convert them with `prefcache {program.command} theirs.yaml "
        "--output my.yaml`, and use my.yaml.\n"
    )


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_the_report_is_there_as_json_with_every_key_in_one_list(prefcache, tmp_path, program):
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(FILES[program]))
    plain = prefcache(program.command, "theirs.yaml")
    done = prefcache(program.command, "theirs.yaml", "--json", "--output", "ours.yaml")
    result = json.loads(done.stdout)
    assert not done.stderr and result["output"] == "ours.yaml"
    assert result["config"] == yaml.safe_load((tmp_path / "ours.yaml").read_text()) == yaml.safe_load(plain.stdout)
    assert list(result["config"])[:2] == ["model", "out"]
    lists = [set(result[name]) for name in ("became", "ignored", "differs")]
    given = {key for key, value in FILES[program].items() if value is not None}
    assert given <= set.union(*lists) and not any(given & a & b for a, b in itertools.combinations(lists, 2))
    for name in set.union(*lists):
        assert f"{name}: " in plain.stderr
