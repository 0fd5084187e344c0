"""What a command may write onto: nothing that prefcache or the user's data owns, and else what --force allows."""

import json
import os
import threading
from pathlib import Path

import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.overwrite_guard import Inputs, refuse_overwrite, write_bytes
from prefcache.pipeline.stored.records import PreparedManifest

SEALED = [
    "runs/x/prepared/manifest.json",
    "runs/x/scored/manifest.json",
    "runs/x/trained/provenance.json",
    "cache/tiny-0123/reference.json",
]
PLAIN = [
    "runs/x/prepared/train-0-00000.arrow",
    "runs/x/prepared/.parts-1/0.json",
    "runs/x/trained/config.yaml",
    "runs/x/trained/steps/to-00000001.parquet",
    "runs/x/trained/report.html",
    "runs/x/stdin/records",
    "runs/x/report.html",
    "runs/x/.settings",
    "runs/clear.parquet",
    "runs/new/prepared/.parts-1/0.json",
    "cache/tiny-0123/a.parquet",
    "cache/.verified-tiny-0123.json",
    "cache/.standalone/0/prepared/quarantine.parquet",
    "cache/mine.parquet",
    "model/config.json",
    "model/model.safetensors",
    "adapter/adapter_config.json",
    "data/a.jsonl",
    "data/b/c.jsonl",
    "raw.jsonl",
    "config.yaml",
    "old.jsonl",
]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in PLAIN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in SEALED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(artifact.seal({}))
    PreparedManifest.make(
        inputs={"data": [[{"file": "raw.jsonl"}]]},
        kind="pairs",
        shards=[],
        quarantine={"file": "quarantine.parquet", "bytes": 0, "xxh3_128": "0" * 32, "rows": 0},
    ).commit(tmp_path / "runs/x/prepared/manifest.json")
    (tmp_path / "link.jsonl").symlink_to("raw.jsonl")
    os.link(tmp_path / "raw.jsonl", tmp_path / "hard.jsonl")
    os.link(tmp_path / "data/b/c.jsonl", tmp_path / "hard-too.jsonl")
    (tmp_path / "elsewhere").symlink_to("runs/x/prepared")
    return tmp_path


READ = Inputs(files=(Path("config.yaml"),), data=("data", "r*.jsonl"), experiment=Path("runs/x"))
NEVER = [
    *SEALED,
    *(
        name
        for name in PLAIN
        if name not in ("runs/clear.parquet", "cache/mine.parquet", "old.jsonl", "runs/x/report.html")
    ),
    "runs/x/prepared/new.parquet",
    "runs/x/trained/new/new.parquet",
    "cache/tiny-0123/new.parquet",
    "elsewhere/new.parquet",
    "link.jsonl",
    "hard.jsonl",
    "hard-too.jsonl",
]


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("force", [False, True])
def test_what_is_owned_is_never_replaced(project, name, force):
    with pytest.raises(UsageError, match="Name a") as refused:
        refuse_overwrite(project / name, READ, force=force)
    assert "with --force" not in str(refused.value)


@pytest.mark.parametrize("name", ["runs/clear.parquet", "cache/mine.parquet", "old.jsonl", "runs/x/report.html"])
def test_another_file_is_replaced_with_force_only(project, name):
    with pytest.raises(UsageError, match=r"exists already\. .* --force"):
        refuse_overwrite(Path(name), READ, force=False)
    refuse_overwrite(Path(name), READ, force=True)


@pytest.mark.parametrize("name", ["runs/new.parquet", "runs/x/new.html", "new/folder/a.csv", "model/new.jsonl"])
def test_a_new_file_needs_no_force(project, name):
    refuse_overwrite(Path(name), READ, force=False)


def test_data_of_an_experiment_in_runs_is_kept_by_a_command_that_reads_another(project):
    with pytest.raises(UsageError, match="data that runs/x was made from"):
        refuse_overwrite(Path("raw.jsonl"), Inputs(), force=True)


@pytest.mark.parametrize("name", ["runs/x/report.html", "runs/x/trained/report.html"])
def test_a_report_takes_the_place_of_an_older_one_and_nothing_else_does(project, name):
    refuse_overwrite(Path(name), READ, force=False, is_report=True)
    with pytest.raises(UsageError):
        refuse_overwrite(Path(name), READ, force=False)
    Path(name).unlink()
    Path(name).symlink_to(project / "raw.jsonl")
    with pytest.raises(UsageError):
        refuse_overwrite(Path(name), READ, force=True, is_report=True)


@pytest.mark.parametrize("way", ["/proc/self/cwd/{}", "/proc/self/root{cwd}/{}", "/dev/fd/../../..{cwd}/{}"])
@pytest.mark.parametrize("name", ["raw.jsonl", "cache/tiny-0123/a.parquet", "model/config.json"])
def test_a_path_through_proc_is_no_way_around(project, way, name):
    with pytest.raises(UsageError):
        refuse_overwrite(Path(way.format(name, cwd=project)), Inputs(data=("raw.jsonl",)), force=True)


def test_standard_output_sent_onto_data_is_refused(project):
    with open(project / "raw.jsonl", "ab") as file, pytest.raises(UsageError, match="data that"):
        refuse_overwrite(Path(f"/dev/fd/{file.fileno()}"), Inputs(data=("raw.jsonl",)), force=True)
    with open(project / "new.jsonl", "ab") as file:
        refuse_overwrite(Path(f"/dev/fd/{file.fileno()}"), Inputs(data=("raw.jsonl",)), force=False)


def test_pipes_and_devices_are_written_into(project):
    os.mkfifo(project / "pipe.jsonl")
    read = []
    reader = threading.Thread(target=lambda: read.append((project / "pipe.jsonl").read_bytes()))
    reader.start()
    refuse_overwrite(project / "pipe.jsonl", READ, force=False)
    write_bytes(project / "pipe.jsonl", b"row\n")
    reader.join()
    assert read == [b"row\n"] and (project / "pipe.jsonl").is_fifo()
    for device in ("/dev/null", "/dev/stdout"):
        refuse_overwrite(Path(device), READ, force=False)
    write_bytes(Path("/dev/null"), b"row\n")
    assert Path("/dev/null").is_char_device()


def test_what_a_shell_has_opened_as_stdout_is_written_into(process, tmp_path):
    (tmp_path / "dpo.yaml").write_text(json.dumps({"model_name_or_path": "org/name", "dataset_name": "org/data"}))
    shown = process("from-trl", "dpo.yaml").stdout
    assert process("from-trl", "dpo.yaml", "--output", "/dev/stdout").stdout == shown
    assert Path("/dev/stdout").is_symlink()
