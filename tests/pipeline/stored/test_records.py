"""What is read from disk is not believed: a crafted file, its checksum right, is refused in one sentence or does no harm."""

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from prefcache.pipeline.errors import IntegrityError, PrefcacheError
from prefcache.pipeline.preparing import part_table, part_worker
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.stored import artifact, cache_maintenance, memos, records
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.training import checkpoints, existing_run
from tests.helpers.project import write_pairs

OUT = Path("runs/tiny")
SCORED = OUT / "scored/manifest.json"
FINISHED, BEGUN = OUT / "trained", OUT / "begun"
# Where each kind of file lies in the experiment, and which commands read it without loading a model.
SQL = {
    name: ["sql", f"select * from {name}", OUT, "--json"] for name in ("examples", "reference", "runs", "checkpoints")
}
SCORE, VERIFY, DOCTOR = ["score", "config.yaml", "--dry-run"], ["verify", "cache"], ["doctor", "config.yaml"]
RUNS, CLEAN = ["runs", OUT], ["clean", OUT]
# These take a second or more: in the sweep of all that a field may hold.
REPORT = ["report", OUT, "--output", "report.html"]
SLOW = (REPORT, DOCTOR)
KINDS: dict[str, tuple[type[records.StoredRecord], str, list[list[Any]]]] = {
    "shard": (records.ShardRecord, "cache/tiny-*/[0-9a-f]*.json", [VERIFY, SCORE, SQL["reference"], DOCTOR]),
    "reference": (records.ReferenceRecord, "cache/tiny-*/reference.json", [VERIFY, SCORE, SQL["reference"]]),
    "memo": (memos.VerifiedMemo, "cache/.verified-*.json", [VERIFY, SCORE]),
    "removal": (records.RemovalRecord, "cache/tiny-*/.removing", [VERIFY]),
    "prepared": (records.PreparedManifest, "runs/tiny/prepared/manifest.json", [SQL["examples"], SCORE, REPORT]),
    "scored": (records.ScoredManifest, "runs/tiny/scored/manifest.json", [SQL["reference"], DOCTOR, REPORT]),
    "run": (records.RunManifest, "runs/tiny/trained/manifest.json", [SQL["runs"], RUNS, CLEAN, DOCTOR, REPORT]),
    "provenance": (records.Provenance, "runs/tiny/trained/provenance.json", [SQL["runs"], RUNS, DOCTOR, REPORT]),
    "before": (records.Before, "runs/tiny/begun/before.json", [RUNS]),
    "checkpoint": (
        records.CheckpointManifest,
        "runs/tiny/begun/checkpoints/step-00000004/manifest.json",
        [SQL["checkpoints"], RUNS, CLEAN, DOCTOR],
    ),
    "trackers": (records.TrackerRecord, "runs/tiny/begun/trackers.json", []),
    "part": (records.PartRecord, "parts/part-000000.json", []),
}
# Not read field by field, but compared and shown as a whole.
TREES = {"inputs.config", "inputs.data", "inputs.versions", "loss_arguments", "inputs.loss", "inputs.rewards", "config"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, model) -> Iterator[Path]:
    """A small experiment with each kind of file, and outside of it a file that is nobody's but the user's."""
    from prefcache.cli import main

    folder, before = tmp_path_factory.mktemp("stored") / "work", Path.cwd()
    folder.mkdir()
    (folder.parent / "thesis.txt").write_text("years of work\n" * 100)
    os.chdir(folder)
    write_pairs(folder / "pairs.jsonl", 24)
    shutil.copytree(model, folder / "tiny")
    train = {"learning_rate": 1e-3, "batch_size": 4, "checkpoint_every": 2, "samples": 0, "eval_every": 2}
    train |= {"best": {"metric": "eval_loss"}, "checkpoints_at_end": "keep"}
    tree = {"model": "tiny", "out": str(OUT), "prepare": {"data": "pairs.jsonl", "held_out": 0.2}, "train": train}
    (folder / "config.yaml").write_text(yaml.safe_dump({**tree, "score": {"tokens_per_shard": 400}}))
    for stage in ("prepare", "score", "train"):
        done = CliRunner().invoke(main, [stage, "config.yaml"])
        assert done.exit_code == 0, done.output
    shutil.copytree(FINISHED, BEGUN)
    (BEGUN / "manifest.json").unlink()
    records.TrackerRecord.make(id="0123456789ab").commit(BEGUN / "trackers.json")
    cache = Cache(next(Path("cache").glob("tiny-*")), None)
    memos.VerifiedMemo.make(known={cache.records[0].file: (1, 2, 3, 4, "0" * 32)}).commit(
        Path("cache") / f".verified-{cache.folder.name}.json"
    )
    records.RemovalRecord.make(files=["a.parquet"]).commit(cache.folder / ".removing")
    _write_part(Path("parts"))
    shutil.copy(SCORED, ".scored")
    yield folder
    os.chdir(before)


def _write_part(folder: Path) -> None:
    import pyarrow as pa

    from prefcache.pipeline.schema import QUARANTINE

    facts = {
        "records": 1,
        "further": 0,
        "quarantined": {"empty": 1},
        "first": {"empty": "line 1"},
        "done": {"exact": 0},
    }
    made = part_worker.PreparedPart(part_table.SCHEMAS["pairs"].empty_table(), QUARANTINE.empty_table(), **facts)
    assert isinstance(made.table, pa.Table)
    part_worker.commit_part(folder, 0, 0, made)


# -- what a file may hold instead ------------------------------------------------------------------------------------


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def instead(victim: Path) -> list[Any]:
    """Other types, signs and sizes; paths; deep nesting."""
    return [
        *("many", "", 3.5, True, None, [], {}, [1], {"a": 1}, -1, 0, 10**30, 1e308, float("nan"), float("-inf")),
        *(str(victim), "../../thesis.txt", "a/b", "..", "x\x00y", "x\x1b[2J\ny", "z" * 5000, "f" * 32),
        *(nested(150), nested(400), {"a": nested(300)}),
    ]


ABSENT = object()


def fields(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each field is; of a list its first element."""
    if at and ".".join(map(str, at)) in TREES:
        yield at
        return
    inner = (
        content.items() if isinstance(content, dict) else enumerate(content[:1]) if isinstance(content, list) else ()
    )
    if at:
        yield at
    for key, value in inner:
        yield from fields(value, (*at, key))


def changed(content: dict[str, Any], at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    found = copy.deepcopy(content)
    holder: Any = found
    for key in at[:-1]:
        holder = holder[key]
    if value is ABSENT:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return found


def changes(path: Path, victim: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    content = artifact.unseal(path)
    for at in fields(content):
        for value in (ABSENT, *instead(victim)):
            yield f"{'.'.join(map(str, at))} = {str(value)[:60]}", changed(content, at, value)
    yield "an unknown key", {**content, "unknown": 1}


@pytest.fixture
def path(world: Path, kind: str) -> Iterator[Path]:
    """The file of a kind, which is afterwards as it was."""
    (world / SCORED).write_bytes((world / ".scored").read_bytes())
    path = sorted(world.glob(KINDS[kind][1]))[0]
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


def refusal(kind: str, path: Path) -> str | None:
    """The sentence with which the record is refused; None where it is taken."""
    try:
        KINDS[kind][0].read(path)
    except IntegrityError as error:
        return str(error)
    return None


def run(arguments: list[Any], what: str, codes: tuple[int, ...] = (0, 2, 4, 5)) -> Any:
    from prefcache.cli import main

    done = CliRunner().invoke(main, [str(each) for each in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise AssertionError(f"{what}: {arguments[0]} ended in a traceback") from done.exception
    assert done.exit_code in codes, f"{what}: {arguments}\n{done.output}"
    return done


@pytest.fixture
def victim(world: Path) -> Iterator[Path]:
    """A file outside of everything, which nothing may change."""
    path = world.parent / "thesis.txt"
    before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino
    yield path
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert sorted(each.name for each in world.parent.iterdir()) == ["thesis.txt", "work"]


def read_by_training(kind: str, path: Path) -> None:
    """As train reads a run's folder before it loads a model."""
    run = path.parents[2] if kind == "checkpoint" else path.parent
    if kind == "run":
        existing_run.retract_damaged(run, Progress(quiet=True))
    elif kind == "checkpoint":
        checkpoints.find_newest(run, lambda line: None)
    elif kind == "part":
        part_worker.find_finished(path.parent, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_of_a_stored_file_is_believed(path, victim, kind):
    """Each is refused in one line, or taken; what is taken is then read by the commands, which end in one line as well."""
    taken, dice = [], random.Random(kind)
    quick = [command for command in KINDS[kind][2] if command not in SLOW]
    for what, content in changes(path, victim):
        if dice.random() < 0.7:  # all of them in the slow sweep
            continue
        path.write_bytes(artifact.seal(content))
        if (sentence := refusal(kind, path)) is None:
            taken.append((what, content))
        else:
            assert str(path.name) in sentence and "\n" not in sentence and len(sentence) < 800, what
    assert taken and not any("thesis" in what and ".file" in what for what, _ in taken)
    for what, content in dice.sample(taken, min(len(taken), 4)):
        path.write_bytes(artifact.seal(content))
        if quick:
            run(dice.choice(quick), what)
        path.write_bytes(artifact.seal(content))
        try:
            read_by_training(kind, path)
        except PrefcacheError as error:
            assert "\n" not in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][2]])
def test_no_command_ends_in_a_traceback_whatever_a_field_holds(world, path, victim, kind):
    for n, (what, content) in enumerate(changes(path, victim)):
        path.write_bytes(artifact.seal(content))
        commands = KINDS[kind][2]
        # What is refused is refused to all of them in the same place.
        for command in commands if refusal(kind, path) is None else [commands[n % len(commands)]]:
            path.write_bytes(artifact.seal(content))
            (world / SCORED).exists() or shutil.copy(world / ".scored", world / SCORED)
            run(command, what)


GARBAGE = {
    "nothing": b"",
    "half": b'{"file": "a',
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "not text": b"\xff\xfe{}\x00",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "many digits": b"9" * 5000,
    "half a character": b'{"a": "\\ud800", "seal_xxh3_128": "0"}',
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_garbage_is_one_sentence(path, victim, kind):
    for n, (what, data) in enumerate(GARBAGE.items()):
        path.write_bytes(data)
        sentence = refusal(kind, path)
        assert sentence is not None and "\n" not in sentence and len(sentence) < 800, what
        commands = [command for command in KINDS[kind][2] if command not in SLOW]
        if commands and n % 4 == 0:
            run(commands[n % len(commands)], what)


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_version_is_refused_with_the_remedy_and_a_file_without_a_version_is_read(path, kind):
    content = artifact.unseal(path)
    path.write_bytes(artifact.seal({**content, "schema_version": 99}))
    sentence = refusal(kind, path)
    assert sentence and "has schema version 99" in sentence and "Upgrade prefcache" in sentence
    path.write_bytes(artifact.seal({key: value for key, value in content.items() if key != "schema_version"}))
    assert refusal(kind, path) is None


# -- a planted record of the cache -----------------------------------------------------------------------------------


@pytest.fixture
def planted(world, victim, tmp_path) -> tuple[Path, Path]:
    """A copy of the cache and its only rule-abiding shard's record, to be changed."""
    root = tmp_path / "cache"
    shutil.copytree(world / "cache", root)
    folder = next(root.glob("tiny-*"))
    return folder, sorted(folder.glob("[0-9a-f]*.json"))[0]


def vouch_for(victim: Path, record: Path, name: str, **more: Any) -> Path:
    """A record that names the victim, with its true size and checksum and a seal that is right."""
    facts = {**artifact.unseal(record), **artifact.describe(victim), "file": name, "blocks": None, **more}
    path = record.with_name(f"{'e' * 32}.json")
    path.write_bytes(artifact.seal(facts))
    return path


@pytest.mark.parametrize("name", ["absolute", "relative"])
@pytest.mark.parametrize("command", ["gc", "verify", "score"])
def test_a_record_that_names_a_file_elsewhere_is_refused_and_the_file_stays(planted, victim, command, name):
    folder, record = planted
    named = str(victim) if name == "absolute" else os.path.relpath(victim, folder)
    path = vouch_for(victim, record, named, rows=0, numerics_id="nunknown", numerics={})
    arguments = {"gc": ["gc", folder], "verify": ["verify", folder]}
    arguments["score"] = ["score", "config.yaml", "--set", f"cache={folder.parent}"]
    done = run(arguments[command], name, codes=(4,))
    assert path.name in done.output and path.exists()


@pytest.mark.parametrize("command", ["gc", "verify"])
def test_a_shard_that_is_a_link_out_of_the_cache_is_refused(planted, victim, command):
    folder, record = planted
    name = f"{'e' * 32}-00000000.parquet"
    (folder / name).symlink_to(victim)
    vouch_for(victim, record, name, rows=1)
    done = run([command, folder], "a link", codes=(4,))
    assert name in done.output and "leads out of it" in done.output


def test_what_gc_had_begun_to_remove_are_names_in_the_folder(planted, victim):
    folder, _ = planted
    (folder / ".removing").write_bytes(artifact.seal({"files": [str(victim), "../../../thesis.txt"]}))
    run(["gc", folder], "removing", codes=(0,))


def test_deleting_is_guarded_where_it_happens(tmp_path):
    # Whatever let a name through: nothing but a file of the folder gets a path to be written or deleted.
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "thesis.txt")
    for name in ("../thesis.txt", str(tmp_path / "thesis.txt"), "..", "", "link", "a\x00b"):
        with pytest.raises(IntegrityError, match="nothing outside of that folder"):
            artifact.member(tmp_path / "cache", name)
    assert artifact.member(tmp_path / "cache", "a.parquet") == tmp_path / "cache" / "a.parquet"


def test_a_record_of_a_newer_version_is_never_cleared_away(planted):
    folder, record = planted
    record.write_bytes(artifact.seal({**artifact.unseal(record), "schema_version": 2}))
    done = run(["score", "config.yaml", "--set", f"cache={folder.parent}"], "newer", codes=(4,))
    assert "Upgrade prefcache" in done.output and record.exists()
    assert cache_maintenance.verify(folder).damaged.keys() == {record.name}


def test_a_memo_without_a_seal_is_passed_over(planted):
    # As those of earlier versions are: it only costs time.
    folder, _ = planted
    memo = folder.parent / f".verified-{folder.name}.json"
    for content in (b"[]", b"null", b"3", json.dumps({"a.parquet": [1, 2, 3, 4, "0" * 32]}).encode()):
        memo.write_bytes(content)
        assert not Cache(folder, None).damaged


# -- a run's own configuration ---------------------------------------------------------------------------------------

CONFIGS = {
    "garbage": b"\xff\xfe\x00",
    "not YAML": b"a: [",
    "a tag": b"!!python/object/apply:os.system ['echo owned > owned.txt']",
    "a tag within": b"train: !!python/object/apply:os.system ['echo owned > owned.txt']",
    "a list": b"[1]",
    "nothing": b"",
    "no mapping": b"train: 3",
    "brackets": b"[" * 100_000,
    "a date": b"train: 2020-99-99",
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_of_a_run_that_is_none_is_one_sentence(world, victim, what):
    path = FINISHED / "config.yaml"
    whole = path.read_bytes()
    try:
        path.write_bytes(CONFIGS[what])
        report = ["report", OUT, "--run", "trained", "--output", "report.html"]
        also = [[*DOCTOR[:1], path], ["show", "0", path]] if what == "a tag within" else []
        for command in (report, *also):
            done = run(command, what, codes=(2, 4))
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert not Path("owned.txt").exists()
    finally:
        path.write_bytes(whole)
