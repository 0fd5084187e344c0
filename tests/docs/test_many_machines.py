"""What the chapter on many machines shows for machines without a common disk: run on two of them, with a store of the tests."""

from pathlib import Path

from prefcache.guide import CHAPTERS
from tests.helpers.documents import blocks, commands
from tests.helpers.project import invoke, write_pairs
from tests.helpers.stores import use_environment

CHAPTER = CHAPTERS["many-machines"]
FEW_STEPS = ["--set", "train.max_steps=2", "--set", "train.samples=0"]


def test_the_commands_for_machines_without_a_common_disk_run_as_shown(s3, model, tmp_path, monkeypatch):
    (config,) = blocks("yaml", CHAPTER)
    config = config.replace("Qwen/Qwen2.5-0.5B-Instruct", str(model)).replace("s3://bucket/refs", s3.url)
    on_first, on_second = (block for block in blocks("sh", CHAPTER) if "team.yaml" in block)
    first, second = tmp_path / "first", tmp_path / "second"
    for machine in (first, second):
        machine.mkdir()
        (machine / "team.yaml").write_text(config)
    write_pairs(first / "pairs.jsonl", 40)
    said = [run(first, command) for command in commands(on_first)]
    url = said[-1].splitlines()[-1]
    use_environment(s3.environment_of(s3.server.url, second / "mirror"), monkeypatch)
    said = [run(second, command.replace("s3://bucket/refs/prepared/ID", url)) for command in commands(on_second)]
    assert "80 scored now" in said[1] and (second / "runs/team/trained/model").is_dir()


def run(machine: Path, command: str) -> str:
    program, *arguments = command.split()
    assert program == "prefcache"
    return invoke(machine, *arguments, *(FEW_STEPS if arguments[0] == "train" else [])).stdout
