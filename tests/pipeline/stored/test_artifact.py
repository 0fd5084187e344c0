"""A file is on disk whole or not at all, and is believed only while its bytes are those that were written."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.schema import CACHE
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import CheckpointManifest
from tests.helpers.project import entry_of


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


# -- commit_bytes ----------------------------------------------------------------------------------------------------


def test_committed_bytes_are_there_and_nothing_else_is(tmp_path):
    assert artifact.commit_bytes(tmp_path / "new" / "a", b"one") is True
    assert artifact.commit_bytes(tmp_path / "new" / "a", b"two") is True
    assert (tmp_path / "new" / "a").read_bytes() == b"two"
    assert names(tmp_path / "new") == ["a"]


def test_a_failed_rename_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    artifact.commit_bytes(tmp_path / "a", b"old")

    def fails(*_):
        raise RuntimeError("the machine stopped here")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(RuntimeError):
        artifact.commit_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.fixture
def waits(monkeypatch) -> list[str]:
    """What the disk is asked to keep, and when a name appears, in order: `keep NAME` and `name NAME`. Process ids are left out."""
    asked: list[str] = []
    own = f".{artifact._HOST}-{os.getpid()}"

    def synced(descriptor: int, real=os.fsync) -> None:
        asked.append(f"keep {Path(f'/proc/self/fd/{descriptor}').readlink().name.replace(own, '')}")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    for function in ("replace", "link"):
        real = getattr(os, function)
        monkeypatch.setattr(os, function, lambda a, b, real=real: (asked.append(f"name {Path(b).name}"), real(a, b))[1])
    return asked


@pytest.mark.parametrize("once", [False, True])
def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_it_returns(tmp_path, waits, once):
    artifact.commit_bytes(tmp_path / "run" / "a", b"x", once=once)
    with artifact.commit_stream(tmp_path / "run" / "b", once=once) as stream:
        stream.write(b"x")
    assert waits == ["keep .a.tmp", "name a", "keep run", "keep .b.tmp", "name b", "keep run"]
    waits.clear()
    artifact.commit_bytes(tmp_path / "run" / "c", b"x", durable=False)
    assert waits == ["name c"]


def test_all_of_a_folder_is_on_the_disk_before_its_name_and_the_name_before_it_returns(tmp_path, waits):
    with artifact.commit_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        for name in ("a", "deep/b", "z"):
            (folder / name).write_bytes(b"x")
    assert waits == ["keep a", "keep deep", "keep b", "keep z", "keep .out.tmp", "name out", f"keep {tmp_path.name}"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_killed_before_the_rename_leaves_the_old_file(tmp_path, step):
    artifact.commit_bytes(tmp_path / "a", b"old")
    killed = python(
        "import os, signal, sys; from pathlib import Path; from prefcache.pipeline.stored import artifact\n"
        "setattr(os, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))\n"
        "artifact.commit_bytes(Path(sys.argv[1]), b'new and longer')\n",
        tmp_path / "a",
        step,
    )
    assert killed.returncode == -9
    assert (tmp_path / "a").read_bytes() == b"old"
    # The dead process's temporary is all that is left, and the next one clears it away.
    assert len(names(tmp_path)) == 2
    artifact.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a"]


def test_once_the_first_writer_wins_also_among_racing_processes(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from prefcache.pipeline.stored import artifact\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "print(artifact.commit_bytes(Path(sys.argv[1]), str(os.getpid()).encode(), once=True), os.getpid())\n"
    )
    start = str(time.time() + 1.5)
    racers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / "a", start], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [racer.communicate(timeout=60)[0].split() for racer in racers]
    winners = [process for won, process in said if won == "True"]
    assert len(said) == 4 and len(winners) == 1
    assert artifact.commit_bytes(tmp_path / "a", b"late", once=True) is False
    assert (tmp_path / "a").read_text() == winners[0]
    assert names(tmp_path) == ["a"]


def test_a_file_where_a_folder_is_needed_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        artifact.commit_bytes(tmp_path / "file" / "a", b"x")


# -- commit_folder ---------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole_in_place_of_the_old_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with artifact.commit_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "new").write_text("new")
        assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["deep"]
    assert (tmp_path / "out" / "deep" / "new").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_interrupted_leaves_nothing_or_the_old_one(tmp_path, error):
    with pytest.raises(error), artifact.commit_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise error
    assert names(tmp_path) == []
    with artifact.commit_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(error), artifact.commit_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
        raise error
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "a").read_text() == "old"


@pytest.mark.parametrize("there", [True, False], ids=["moved", "dangling"])
def test_a_folder_takes_the_place_of_a_link_and_what_that_leads_to_stays(tmp_path, there):
    if there:
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "old").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with artifact.commit_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert not (tmp_path / "out").is_symlink() and names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == (["disk", "out"] if there else ["out"])
    assert not there or names(tmp_path / "disk") == ["old"]


# -- remove_leftovers ------------------------------------------------------------------------------------------------


def test_only_leftovers_of_dead_processes_of_this_machine_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = artifact.temporary_path(tmp_path / "a").name
    dead = mine.replace(f"-{os.getpid()}.", f"-{gone.pid}.")
    elsewhere = f".a.another_machine-{gone.pid}.tmp"
    for name in (mine, dead, elsewhere, "a", ".hidden.tmp"):
        (tmp_path / name).write_text("")
    folder = tmp_path / dead.replace(".a.", ".b.")
    folder.mkdir()
    (folder / "half").write_text("")
    assert len(names(tmp_path)) == 6
    artifact.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([mine, elsewhere, "a", ".hidden.tmp"])


# -- sealed JSON -----------------------------------------------------------------------------------------------------

CONTENT = {"name": "Qwen/ü", "rows": 12, "beta": 0.1, "nested": {"b": [1, 2.5, None, True], "a": ""}}


def test_sealed_json_reads_back_as_it_was(tmp_path):
    (tmp_path / "a.json").write_bytes(artifact.seal(CONTENT))
    assert artifact.unseal(tmp_path / "a.json") == CONTENT
    # It is readable: plain JSON with one more key.
    shown = json.loads((tmp_path / "a.json").read_text())
    assert shown.keys() - CONTENT.keys() == {"seal_xxh3_128"}


def test_every_flipped_bit_and_every_missing_end_of_sealed_json_is_noticed(tmp_path):
    path, sealed = tmp_path / "a.json", artifact.seal(CONTENT)
    changed = [sealed[:n] for n in range(len(sealed) - 1)]  # the last byte is a line's end
    for at in range(len(sealed)):
        for bit in random.Random(at).sample(range(8), 2):
            changed.append(sealed[:at] + bytes([sealed[at] ^ 1 << bit]) + sealed[at + 1 :])
    for content in changed:
        path.write_bytes(content)
        with pytest.raises(IntegrityError):
            artifact.unseal(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"{}", "has no checksum"),
        (b'{"rows": 1}', "has no checksum"),
        *((content, "is not a JSON object") for content in (b"null", b"[]", b'"text"', b"7")),
    ],
)
def test_what_is_not_a_sealed_record_is_refused_in_words(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(IntegrityError) as refused:
        artifact.unseal(tmp_path / "a.json", "Score again.")
    assert str(refused.value) == f"{tmp_path / 'a.json'} {reason}. Score again."


def test_no_manifest_means_not_finished_and_a_damaged_one_is_an_error(tmp_path):
    assert CheckpointManifest.find(tmp_path) is None
    path = tmp_path / artifact.MANIFEST
    CheckpointManifest.make(step=12, num_tokens=40).commit(path)
    assert CheckpointManifest.find(tmp_path).num_tokens == 40
    path.write_text(path.read_text().replace('"step": 12', '"step": 13'))
    with pytest.raises(IntegrityError, match="changed after it was written"):
        CheckpointManifest.find(tmp_path)


# -- damage ----------------------------------------------------------------------------------------------------------


def test_an_undamaged_file_has_no_damage(tmp_path):
    entry = artifact.commit_file(tmp_path / "a", b"hello", rows=3)
    # xxh3-128 of "hello", as xxhsum -H2 prints it.
    assert entry == {"file": "a", "bytes": 5, "xxh3_128": "b5e9c1ad071b3e7fc779cfaa5e523818", "rows": 3}
    assert artifact.damage(tmp_path, entry_of(entry)) is None
    assert artifact.describe(tmp_path / "a") == {key: entry[key] for key in ("file", "bytes", "xxh3_128")}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 2999 bytes, 3000 were written"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "has 3001 bytes, 3000 were written"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, 3000 were written"),
        (lambda path: path.write_bytes(b"\x01" + path.read_bytes()[1:]), "other bytes"),
    ],
    ids=["missing", "truncated", "longer", "empty", "changed"],
)
def test_damage_says_what_is_wrong(tmp_path, change, found):
    entry = artifact.commit_file(tmp_path / "a", bytes(3000))
    change(tmp_path / "a")
    assert found in artifact.damage(tmp_path, entry_of(entry))


def test_a_flipped_bit_anywhere_is_damage(tmp_path):
    data = random.Random(0).randbytes(5000)
    entry = artifact.commit_file(tmp_path / "a", data)
    for at in range(0, len(data), 97):
        (tmp_path / "a").write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert artifact.damage(tmp_path, entry_of(entry)), at


# -- make ------------------------------------------------------------------------------------------------------------


def make_runs(folder: Path, inputs: list[Path | str]) -> list[bool]:
    """Whether make runs the stage: at once, then after the first input changed, then after it vanished."""
    artifact.commit_bytes(folder / artifact.MANIFEST, artifact.seal({}))
    artifact.commit_make_inputs(folder, inputs)
    makefile = folder / "Makefile"
    makefile.write_text(f"{folder / artifact.MANIFEST}:\n\t@echo ran\ninclude {folder / 'inputs.mk'}\n")
    ran = []
    for change in (lambda path: None, lambda path: os.utime(path, (2e9, 2e9)), lambda path: path.unlink()):
        change(Path(inputs[0]))
        done = subprocess.run(["make", "-f", makefile], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        ran.append("ran" in done.stdout)
    return ran


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_runs_a_stage_again_when_an_input_changed_or_vanished(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    os.utime(tmp_path / "data.jsonl", (1e9, 1e9))
    assert make_runs(tmp_path / "out", [tmp_path / "data.jsonl"]) == [False, True, True]


@needs_make
@pytest.mark.parametrize("name", ["two words", "a#b", "a:b", "a$b", "a%b", "a;b", "a=b"])
def test_no_name_of_an_input_stops_make(tmp_path, name):
    (tmp_path / name).write_text("")
    make_runs(tmp_path / "out", [tmp_path / name])


# -- tables as bytes -------------------------------------------------------------------------------------------------

ROWS = [
    {
        "key": bytes([i] * 16),
        "n_prompt": i,
        "n_completion": 2,
        "logp_sum": -0.1 * i,
        "logps": [-0.5, -1.25],
        "status": "ok",
    }
    | {"numerics_id": "x"}
    for i in range(5)
] + [{"key": bytes(16), "n_prompt": 1, "n_completion": 1, "logp_sum": None, "logps": None, "status": "failed"}]


@pytest.mark.parametrize("rows", [ROWS, []], ids=["rows", "empty"])
def test_parquet_gives_the_same_table_back(tmp_path, rows):
    table = pa.Table.from_pylist(rows, schema=CACHE)
    artifact.commit_bytes(tmp_path / "a.parquet", artifact.parquet(table, float_lists=["logps"]))
    read = pq.read_table(tmp_path / "a.parquet")
    assert read.schema.equals(CACHE) and read.equals(table)


def test_parquet_is_the_same_bytes_for_the_same_rows():
    table = pa.Table.from_pylist(ROWS, schema=CACHE)
    assert artifact.parquet(table) == artifact.parquet(pa.Table.from_pylist(ROWS, schema=CACHE))


def test_an_arrow_stream_opens_here_and_in_datasets_without_a_copy(tmp_path):
    from datasets import Dataset

    table = pa.table({"n": pa.array([1, 2, 3], pa.int32()), "ids": pa.array([[1], [], [2, 3]], pa.list_(pa.int32()))})
    artifact.commit_bytes(tmp_path / "a.arrow", artifact.arrow_stream(table))
    before = pa.total_allocated_bytes()
    opened = artifact.open_arrow_stream(tmp_path / "a.arrow")
    assert opened.equals(table)
    assert pa.total_allocated_bytes() == before  # mapped, not read
    assert Dataset.from_file(str(tmp_path / "a.arrow")).to_list() == table.to_pylist()


# -- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_appears_whole_with_the_entry_of_its_bytes(tmp_path):
    path = tmp_path / "folder" / "a.bin"
    with artifact.commit_stream(path) as stream:
        assert stream.write(b"abc") == 3 and stream.write(memoryview(np.arange(4, dtype="<i4"))) == 16
        assert not path.exists()
    assert path.read_bytes() == b"abc" + np.arange(4, dtype="<i4").tobytes()
    # The same as the entry of a file that lies there, read again.
    assert stream.entry(path, rows=2) == artifact.describe(path) | {"rows": 2}
    assert artifact.damage(path.parent, entry_of(stream.entry(path))) is None


def test_a_stream_that_breaks_off_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), artifact.commit_stream(path) as stream:
        stream.write(b"new")
        raise ZeroDivisionError
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"] and path.read_bytes() == b"old"
