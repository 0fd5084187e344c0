"""prepare, as a user runs it: exact ids out, every record accounted for."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from prefcache.commands import prepare as prepare_command
from prefcache.pipeline.preparing import text_tokenizer
from prefcache.pipeline.preparing.fast_tokenizer import FastTokenizer
from prefcache.pipeline.schema import sequence_key
from prefcache.pipeline.stored.prepared import Prepared
from tests.helpers.examples import make_older
from tests.helpers.processes import is_gone, launch
from tests.helpers.project import PREFCACHE, pair, start, write_config, write_pairs
from tests.helpers.tokenizers import facts, resolved_config
from tests.helpers.wrong_tokenizer import WrongTokenizer

Prepare = Callable[..., dict[str, Any]]


@pytest.fixture
def prepare(prefcache, model, tmp_path) -> Prepare:
    """The command on pairs.jsonl with these settings: what it prints as JSON, and its messages as `stderr`."""
    if not (tmp_path / "config.yaml").exists():
        write_config(tmp_path, model)

    def run(*settings: str, code: int = 0) -> dict[str, Any]:
        done = prefcache("prepare", "config.yaml", "--json", *as_options(settings), code=code)
        return (json.loads(done.stdout) if code == 0 else {}) | {"stderr": done.stderr}

    return run


def as_options(settings: tuple[str, ...] | list[str]) -> list[str]:
    return [argument for setting in settings for argument in ("--set", setting)]


def data_is(*entries: str | dict) -> str:
    return f"prepare.data={json.dumps(entries)}"


def write_lines(path: Path, *records: dict | bytes) -> Path:
    raw = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def rows_of(folder: Path, split: str | None = None) -> list[dict]:
    return Prepared(folder / "runs/tiny/prepared").table(split).to_pylist()


def quarantine_of(folder: Path) -> list[dict]:
    return pq.read_table(folder / "runs/tiny/prepared/quarantine.parquet").to_pylist()


def files_of(folder: Path) -> dict[str, bytes]:
    prepared = folder / "runs/tiny/prepared"
    return {str(file.relative_to(prepared)): file.read_bytes() for file in prepared.rglob("*") if file.is_file()}


def take_files(folder: Path) -> dict[str, bytes]:
    """Read every file of the prepared folder, and remove it."""
    files = files_of(folder)
    shutil.rmtree(folder / "runs/tiny/prepared")
    return files


def test_prompt_ids_are_what_the_model_sees_when_asked(prepare, config, model, tmp_path):
    from transformers import AutoTokenizer

    prepare()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = rows_of(tmp_path)
    assert len(rows) == 60
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert row["prompt_ids"] == ids
        for side in ("chosen", "rejected"):
            whole = [*asked, {"role": "assistant", "content": row[side]}]
            assert ids + row[f"{side}_ids"] == tokenizer.apply_chat_template(whole, return_dict=False)


def test_strings_and_message_lists_give_the_same_ids(prepare, tmp_path):
    as_text = [pair(i) for i in range(30)]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    as_messages = [{name: [{"role": roles[name], "content": text}] for name, text in p.items()} for p in as_text]
    keys = []
    for name, records in (("text", as_text), ("messages", as_messages)):
        write_lines(tmp_path / "pairs.jsonl", *records)
        prepare(f"out={name}")
        table = Prepared(tmp_path / name / "prepared").table()
        keys.append(table.select(["example_id", "split", "chosen_key", "rejected_key", "prompt"]).to_pylist())
    assert keys[0] == keys[1]


# -- quarantine ------------------------------------------------------------------------------------------------------

# A template that insists on turns that alternate, and that has no place for an answer it wants to hide.
STRICT = """
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
<|im_start|>{{ message['role'] }}\n
{%- if 'hidden' not in message['content'] -%}{{ message['content'] }}{%- endif -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}
"""
TWICE_USER = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
TWO_TURNS = [{"role": "assistant", "content": "hidden"}, *TWICE_USER[:1], {"role": "assistant", "content": "c"}]
BAD = [
    ("malformed JSON", b'{"prompt": "a"'),
    ("invalid UTF-8", b'{"prompt": "\xff"}'),
    ("not an object", b"[1, 2]"),
    ("not an object", b"null"),
    ("missing column", {"prompt": "a", "chosen": "b"}),
    ("wrong type", {"prompt": "a", "chosen": "b", "rejected": None}),
    ("wrong type", {"prompt": "a", "chosen": 7, "rejected": "b"}),
    ("wrong type", b'{"prompt": NaN, "chosen": "b", "rejected": "c"}'),
    ("wrong type", {"prompt": "a", "chosen": [{"role": "assistant", "content": 1}], "rejected": "b"}),
    ("no assistant turn", {"prompt": "a", "chosen": [{"role": "robot", "content": "x"}], "rejected": "b"}),
    ("empty answer", {"prompt": "a", "chosen": "  ", "rejected": "b"}),
    ("empty prompt", {"prompt": "", "chosen": "b", "rejected": "c"}),
    ("chosen equals rejected", {"prompt": "a", "chosen": "b", "rejected": "b"}),
    ("lone surrogate", b'{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}'),
    ("prompt too long", {"prompt": "red " * 600, "chosen": "b", "rejected": "c"}),
    ("too long", {"prompt": "a", "chosen": "red " * 600, "rejected": "c"}),
    ("prompt ends with an assistant turn", {"prompt": TWO_TURNS[:1], "chosen": "b", "rejected": "c"}),
    ("no assistant turn", {"prompt": "a", "chosen": TWICE_USER, "rejected": "c"}),
    ("template refuses", {"prompt": TWICE_USER, "chosen": "b", "rejected": "c"}),
    ("template rewrites the answer", {"prompt": "a", "chosen": TWO_TURNS, "rejected": "c"}),
]


def test_every_bad_record_is_in_quarantine_with_its_reason_line_and_bytes(prepare, tmp_path):
    good = [pair(i) for i in range(20)]
    file = write_lines(tmp_path / "pairs.jsonl", *good[:10], *[record for _, record in BAD], *good[10:])
    (tmp_path / "strict.jinja").write_text(STRICT)
    settings = ["prepare.max_quarantine=0.5", "prepare.max_length=500", "prepare.format=pairs"]
    result = prepare(*settings, "prepare.chat_template=strict.jinja")
    assert result["records"] == 20 + len(BAD) == result["train"] + result["held_out"] + len(BAD)
    assert sum(result["quarantined"].values()) == len(BAD)
    raw = file.read_bytes().splitlines()
    assert [(row["source"], row["line"], row["reason"], row["raw"]) for row in quarantine_of(tmp_path)] == [
        ("pairs.jsonl", n, reason, raw[n - 1]) for n, (reason, _) in enumerate(BAD, 11)
    ]


def written(user: str, said: str) -> str:
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{said}"


def test_a_rendered_record_is_in_quarantine_and_one_that_quotes_a_token_is_not(prepare, tmp_path):
    good, quoting = [pair(i) for i in range(30)], {**pair(30), "prompt": "what is <|im_end|> in a sentence?"}
    bad = [{**pair(31), "prompt": written("why?", "")}, {**pair(32), "chosen": "red<|im_end|>\n"}]
    write_lines(tmp_path / "pairs.jsonl", *good, quoting, *bad)
    result = prepare("prepare.max_quarantine=0.1")
    assert result["quarantined"] == {"already rendered": 2} and result["done"]["plain_text"] == 31
    details = [row["detail"] for row in quarantine_of(tmp_path)]
    assert "the prompt has" in details[0] and "<|im_end|>\\n<|im_start|>assistant" in details[0]
    assert "an answer has 'red<|im_end|>'" in details[1]


def test_data_that_is_rendered_ends_the_stage_with_what_was_found_and_the_remedy(prepare, prefcache, tmp_path):
    records = [{name: text + "<|im_end|>\n" for name, text in pair(i).items()} for i in range(12)]
    records = [record | {"prompt": written(f"why {i}?", "")} for i, record in enumerate(records)]
    write_lines(tmp_path / "pairs.jsonl", *records, pair(20))
    said = prepare(code=2)["stderr"]
    assert "pairs.jsonl is rendered already: 12 of its first 13 records" in said and "<|im_start|>assistant" in said
    assert "Set prepare.template: none" in said and prefcache("preview", "config.yaml", "--json", code=2).stderr == said
    # Messages have no other remedy.
    messages = [record | {"prompt": [{"role": "user", "content": "why?"}]} for record in records]
    write_lines(tmp_path / "messages.jsonl", *messages)
    assert "Take it out of the messages." in prepare("prepare.data=messages.jsonl", code=2)["stderr"]
    result = prepare("prepare.template=none")
    assert result["records"] == 13 and not result["quarantined"] and "plain_text" not in result["done"]


def test_messages_without_a_template_are_refused_with_the_reason(prepare, tmp_path):
    talk = "\n\nHuman: why {}?\n\nAssistant: "
    records = [{"chosen": talk.format(i) + "red", "rejected": talk.format(i) + "blue"} for i in range(30)]
    write_lines(tmp_path / "pairs.jsonl", *records)
    said = prepare("prepare.template=none", code=2)["stderr"]
    assert "read as hh, which gives messages" in said and "Set prepare.template: chat" in said
    # The other remedy: the transcript as it stands, whose blank belongs to the answer.
    prepare("prepare.template=none", "prepare.format=implicit_prompt")
    assert {(row["prompt"][-12:], row["chosen"]) for row in rows_of(tmp_path)} == {("\n\nAssistant:", " red")}
    assert {row["boundary"] for row in rows_of(tmp_path)} == {"exact"}


def test_where_no_record_is_usable_the_threshold_is_no_remedy(prepare, tmp_path):
    write_lines(tmp_path / "pairs.jsonl", *({**pair(i), "chosen": ""} for i in range(3)))
    said = prepare("prepare.max_quarantine=1", code=3)["stderr"]
    assert "3 of 3 records cannot be used (3 empty answer" in said and "max_quarantine" not in said


def test_more_bad_records_than_allowed_end_with_exit_code_3_after_the_quarantine_is_written(prepare, tmp_path):
    write_lines(tmp_path / "pairs.jsonl", *[pair(i) for i in range(8)], {"prompt": "a"}, {"prompt": "b"})
    error = prepare("prepare.format=pairs", code=3)["stderr"]
    assert "2 of 10 records" in error and "2 missing column (the first: line 9: 'chosen'" in error
    assert pq.read_metadata(tmp_path / "runs/tiny/prepared/quarantine.parquet").num_rows == 2
    assert not (tmp_path / "runs/tiny/prepared/manifest.json").exists()


def test_a_second_run_does_nothing_and_says_so(prepare, config, tmp_path, monkeypatch):
    prepare()
    manifest = tmp_path / "runs/tiny/prepared/manifest.json"
    before = manifest.read_bytes()
    assert "nothing to do" in prepare()["stderr"]
    assert manifest.read_bytes() == before
    # Unless another version prepared it.
    monkeypatch.setattr("prefcache.pipeline.preparing.prepared_inputs.PREPARED_VERSION", 2)
    assert prepare()["changed"] is True


def test_a_folder_of_an_earlier_version_is_prepared_again_and_no_token_is_scored_twice(
    prepare, prefcache, config, tmp_path
):
    prepare()
    prefcache("score", config)
    make_older(tmp_path / "runs/tiny/prepared")
    for stage in ("score", "train"):
        error = prefcache(stage, config, code=2).stderr
        assert "was prepared by an earlier version, which did not store which tokens of an answer count" in error
        assert "Prepare again (prefcache prepare CONFIG): what is scored is kept" in error
    # Who only looks sees what it holds.
    (row,) = json.loads(
        prefcache(
            "sql", "select count(*) as n, min(n_chosen_counted - n_chosen) as d from pairs", "runs/tiny", "--json"
        ).stdout
    )
    assert row["n"] > 0 and row["d"] == 0
    assert prepare()["changed"] is True
    scored = json.loads(prefcache("score", config, "--json").stdout)
    assert (scored["tokens"], scored["scored"]) == (0, 0)


def test_raising_the_threshold_does_not_prepare_again(prepare, tmp_path):
    (tmp_path / "data").mkdir()
    for n in range(4):
        write_lines(tmp_path / f"data/{n}.jsonl", *[pair(10 * n + i) for i in range(10)], {"prompt": "a"})
    settings = [data_is("data"), "prepare.workers=1"]
    assert "4 of 44 records" in prepare(*settings, code=3)["stderr"]
    bad = [(f"data/{n}.jsonl", 11) for n in range(4)]
    assert [(row["source"], row["line"]) for row in quarantine_of(tmp_path)] == bad
    again = prepare(*settings, "prepare.max_quarantine=0.1")
    assert "4 of 4 parts were there already" in again["stderr"]
    assert len(rows_of(tmp_path)) == 40 and len(quarantine_of(tmp_path)) == 4


def test_appended_data_moves_no_example_to_the_other_split(prepare, config, tmp_path):
    prepare()
    opened = Prepared(tmp_path / "runs/tiny/prepared")
    table = opened.table()
    before = {row["example_id"]: row["split"] for row in table.to_pylist()}
    write_pairs(tmp_path / "pairs.jsonl", 30, start=60, mode="a")
    prepare()
    after = {row["example_id"]: row["split"] for row in rows_of(tmp_path)}
    assert len(after) == 90 and before.items() <= after.items()
    # Old shards are gone, but a process that has them open still reads them.
    assert len(list((tmp_path / "runs/tiny/prepared").glob("*.arrow"))) == 2
    assert {row["example_id"]: row["split"] for row in table.to_pylist()} == before
    assert Prepared(tmp_path / "runs/tiny/prepared").id != opened.id


def test_datasets_maps_every_shard_and_nothing_of_the_work_is_left(prepare, config, tmp_path):
    from datasets import Dataset

    prepare("prepare.rows_per_shard=15")
    folder = tmp_path / "runs/tiny/prepared"
    shards = Prepared(folder).manifest.shards
    others = ["manifest.json", "quarantine.parquet", "inputs.mk"]
    assert {path.name for path in folder.rglob("*")} == {*(shard.file for shard in shards), *others}
    found = [row for shard in shards for row in Dataset.from_file(str(folder / shard.file))]
    assert len(shards) > 3 and found == rows_of(tmp_path)
    # A split of several shards is read in order.
    table = Prepared(folder).table("train")
    assert table["line"].to_pylist() == sorted(table["line"].to_pylist()) and table["prompt_ids"].num_chunks > 3


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_remedy(prepare, config, model, tmp_path):
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    error = prepare(f"model={bare}", code=2)["stderr"]
    assert "no chat template" in error and "prepare.template: none" in error
    prepare(f"model={bare}", "prepare.template=none")


def test_prompts_that_differ_in_spaces_alone_fall_on_one_side(prepare, tmp_path):
    records = [{**pair(i), "prompt": f"{space}why {i}?{space}"} for i in range(40) for space in ("", " ", "\n")]
    write_lines(tmp_path / "pairs.jsonl", *records)
    prepare()
    sides: dict[str, set[str]] = {}
    for row in rows_of(tmp_path):
        sides.setdefault(row["prompt"].strip(), set()).add(row["split"])
    assert len(sides) == 40 and all(len(side) == 1 for side in sides.values())


def test_whatever_a_template_raises_sends_the_record_to_quarantine(prepare, config, tmp_path):
    (tmp_path / "odd.jinja").write_text("{{ [][3]() }}")
    error = prepare("prepare.chat_template=odd.jinja", code=3)["stderr"]
    assert "60 of 60 records" in error and "template refuses" in error


def test_a_text_far_too_long_is_not_tokenized_first(prepare, tmp_path):
    # One word of 5 MB: the tokenizer's merges would take minutes over it.
    write_lines(tmp_path / "pairs.jsonl", *[pair(i) for i in range(20)], {**pair(20), "prompt": "x" * 5_000_000})
    assert prepare()["quarantined"] == {"too long": 1}


# -- the same bytes, whoever makes them ------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path, model) -> Path:
    """A config for 12 small files, each of which is a part: pairs, some twice, and a bad record each."""
    (tmp_path / "data").mkdir()
    for n in range(12):
        records = [pair(random.Random(100 * n + i).randrange(2000)) for i in range(60)]
        write_lines(tmp_path / f"data/{n:02}.jsonl", *records, {"prompt": f"a {n}"})
    config = write_config(tmp_path, model)
    config.write_text(config.read_text().replace("data: pairs.jsonl", "data: data"))
    return config


@pytest.fixture
def expected(many, prepare, tmp_path) -> dict[str, bytes]:
    """The files that one process prepares."""
    prepare("prepare.workers=1")
    return take_files(tmp_path)


@pytest.mark.parametrize("kind", ["pairs", pytest.param("labels", marks=pytest.mark.slow)])
def test_the_number_of_workers_changes_no_byte(many, prepare, tmp_path, kind):
    prepared = []
    for workers in (1, 2, 3):
        prepare(f"prepare.workers={workers}", f"prepare.examples={kind}", "prepare.rows_per_shard=100")
        prepared.append(take_files(tmp_path))
    assert prepared[0] == prepared[1] == prepared[2] and len(prepared[0]) > 8


def test_a_large_file_is_cut_into_parts_that_make_no_difference(prepare, tmp_path):
    # 4,200 records are two chunks of 2,048 and one of 104.
    write_pairs(tmp_path / "pairs.jsonl", 4200)
    prepared = []
    for workers in (1, 2):
        assert "4,200 examples in 3 parts" in prepare(f"prepare.workers={workers}")["stderr"]
        prepared.append(take_files(tmp_path))
    assert prepared[0] == prepared[1]


def test_the_fast_tokenizer_changes_no_byte(many, prepare, expected, tmp_path, monkeypatch):
    loaded: list[str] = []
    monkeypatch.setattr(prepare_command, "break_even", lambda backend: 0)
    monkeypatch.setattr(
        text_tokenizer, "FastTokenizer", lambda backend, exact: loaded.append(backend) or FastTokenizer(backend, exact)
    )
    prepare("prepare.workers=1", "prepare.fast_tokenizer=false")
    assert take_files(tmp_path) == expected and not loaded
    prepare("prepare.workers=1")
    assert take_files(tmp_path) == expected and len(loaded) == 1


@pytest.mark.parametrize("unnoticed", [0, 5])
def test_nothing_of_a_fast_tokenizer_that_is_wrong_is_kept(many, prepare, expected, tmp_path, monkeypatch, unnoticed):
    monkeypatch.setattr(prepare_command, "break_even", lambda backend: 0)
    monkeypatch.setattr(
        text_tokenizer, "FastTokenizer", lambda backend, exact: WrongTokenizer(backend, exact, unnoticed)
    )
    assert "is prepared again, with the usual tokenizer" in prepare("prepare.workers=1")["stderr"]
    files = files_of(tmp_path)
    assert files.keys() == expected.keys()
    assert {name for name in files if files[name] != expected[name]} == {"manifest.json"}
    manifest = Prepared(tmp_path / "runs/tiny/prepared").manifest
    assert "fastokens gives other ids than tokenizers" in manifest.fast_tokenizer_mismatch


def test_a_little_data_is_not_worth_loading_the_fast_tokenizer(many, prepare, tmp_path, monkeypatch):
    n_bytes = sum(file.stat().st_size for file in (tmp_path / "data").iterdir())
    monkeypatch.setattr(prepare_command, "break_even", lambda backend: n_bytes)
    monkeypatch.setattr(text_tokenizer, "FastTokenizer", lambda *given: pytest.fail("it was loaded"))
    prepare("prepare.workers=1")


def test_where_it_is_not_installed_much_data_gets_a_hint(many, prepare, monkeypatch):
    monkeypatch.setattr(prepare_command, "fastokens_version", lambda: None)
    assert "prefcache[fast]" not in prepare("prepare.workers=1", "prepare.fast_tokenizer=false")["stderr"]
    monkeypatch.setattr(prepare_command, "break_even", lambda backend: 0)
    assert "pip install 'prefcache[fast]' would tokenize" in prepare("prepare.workers=1", "prepare.seed=1")["stderr"]
    # A tokenizer that fastokens is not used with would gain nothing from it.
    monkeypatch.setattr(prepare_command, "find_untested", lambda exact: "its model is Unigram")
    assert "prefcache[fast]" not in prepare("prepare.workers=1", "prepare.seed=2")["stderr"]


def test_there_are_as_many_workers_as_there_is_data_for(monkeypatch):
    monkeypatch.setattr(prepare_command.process_pool, "cores", lambda: 8)
    MB = 1 << 20

    def workers(n_bytes: int, tokenizer_size: int, **settings: Any) -> int:
        tokenizer = replace(facts("byte-level"), backend="x" * tokenizer_size)
        return prepare_command._count_workers(resolved_config(tokenizer, None, **settings), n_bytes)

    # 4 MB for each, and as much again for each 2 MB of the tokenizer: 4 * (1 + 4 / 2) = 12 MB.
    assert [workers(n * MB, 4 * MB) for n in (1, 23, 25, 60, 10_000)] == [1, 1, 2, 5, 8]
    assert [workers(n * MB, 0) for n in (0, 7, 9)] == [1, 1, 2]
    assert workers(0, 4 * MB, workers=3) == 3


def test_ranks_one_after_another_make_what_one_machine_makes(many, prefcache, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = prefcache("prepare", many, "--set", "prepare.workers=1")
    assert "6 of 12 parts are finished" in done.stdout and "RANK, WORLD_SIZE" in done.stdout
    assert not list((tmp_path / "runs/tiny/prepared").glob("*.json"))
    # The first again has nothing to do, and still waits.
    assert json.loads(prefcache("prepare", many, "--json").stdout)["waiting"] is True
    monkeypatch.setenv("RANK", "1")
    prefcache("prepare", many, "--set", "prepare.workers=1")
    assert take_files(tmp_path) == expected


def test_after_a_mismatch_in_one_rank_the_others_run_again(many, prefcache, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_command, "break_even", lambda backend: 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, unnoticed in (("0", 99), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(
            text_tokenizer, "FastTokenizer", lambda *given, unnoticed=unnoticed: WrongTokenizer(*given, unnoticed)
        )
        done = prefcache("prepare", many, "--set", "prepare.workers=1")
    # Those of the first rank no longer count.
    assert "6 of 12 parts are finished" in done.stdout and "Run all other ranks again" in done.stderr
    monkeypatch.setenv("RANK", "0")
    prefcache("prepare", many, "--set", "prepare.workers=1")
    files = take_files(tmp_path)
    assert {name for name in files | expected if files.get(name) != expected.get(name)} == {"manifest.json"}


def test_ranks_at_once_make_what_one_machine_makes(many, expected, tmp_path):
    launch(tmp_path, ["prepare", many, "--set", "prepare.workers=1"])
    assert take_files(tmp_path) == expected


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("0", "0"), ("x", "2"), ("0", "")])
def test_a_rank_that_cannot_be_is_refused(prefcache, config, monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    done = prefcache("prepare", config, code=2)
    assert f"RANK={rank} and WORLD_SIZE={world}" in done.stderr and "Unset both" in done.stderr


# -- killed, interrupted, damaged ------------------------------------------------------------------------------------


@pytest.fixture
def slow(many, tmp_path) -> Path:
    """The same with 40 parts of 150 records, which takes long enough to be met at work."""
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").mkdir()
    for n in range(40):
        write_pairs(tmp_path / f"data/{n:02}.jsonl", 150, start=150 * n)
    return many


def finished(folder: Path) -> list[Path]:
    return list((folder / "runs/tiny/prepared").glob(".parts-*/part-*.json"))


def at_work(config: Path, n_finished: int) -> subprocess.Popen:
    """The command in a process group of its own, once so many parts are finished."""
    command = [PREFCACHE, "prepare", config, "--set", "prepare.workers=2"]
    child = start(*command, cwd=config.parent, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until = time.monotonic() + 60
    while len(finished(config.parent)) < n_finished and child.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    return child


def workers_of(process: int) -> Iterator[int]:
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended meanwhile
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                yield int(child)


@pytest.mark.parametrize("n_kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_random_points_it_ends_with_the_same_bytes(prefcache, slow, tmp_path, n_kills):
    prefcache("prepare", slow, "--set", "prepare.workers=1")
    expected, rng, n = take_files(tmp_path), random.Random(0), 0
    for _ in range(n_kills):
        n += rng.randrange(1, 12)
        child = at_work(slow, n)
        # The command alone: its workers must end with it.
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert is_gone(child.pid)
        n = len(finished(tmp_path))
    assert 0 < n < 40
    done = prefcache("prepare", slow, "--set", "prepare.workers=1")
    assert f"{n} of 40 parts were there already" in done.stderr
    assert take_files(tmp_path) == expected


def test_a_killed_worker_ends_the_command_with_exit_code_6(prefcache, slow, tmp_path):
    child = at_work(slow, 1)
    os.kill(next(workers_of(child.pid)), signal.SIGKILL)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 6 and "Traceback" not in said
    assert "A worker process was killed" in said and "prepare.workers" in said
    assert is_gone(child.pid)
    assert "parts were there already" in prefcache("prepare", slow).stderr


@pytest.mark.parametrize(
    ("sent", "when"),
    [
        pytest.param(signal.SIGINT, 3, marks=pytest.mark.slow),
        (signal.SIGINT, 0),
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGHUP, 1, marks=pytest.mark.slow),
    ],
)
def test_interrupted_it_ends_with_exit_code_130_and_leaves_no_process(slow, tmp_path, sent, when):
    child = at_work(slow, when)
    while not when and not list(workers_of(child.pid)):  # at the moment when the first worker starts
        time.sleep(0.002)
    time.sleep(0 if when else 0.1)
    # Ctrl-C and the end of a terminal reach the workers as well; whoever ends a service tells the command alone.
    child.send_signal(sent) if sent == signal.SIGTERM else os.killpg(child.pid, sent)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: interrupted. Finished work is kept")
    assert is_gone(child.pid)
    assert not (tmp_path / "runs/tiny/prepared/manifest.json").exists() and len(finished(tmp_path)) >= when


@pytest.mark.parametrize("suffix", [".json", ".arrow", ".quarantine"])
def test_a_damaged_part_is_made_again(prefcache, many, expected, tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    prefcache("prepare", many, "--set", "prepare.workers=1")
    part = sorted(finished(tmp_path))[2].with_suffix(suffix)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 4
    part.write_bytes(data)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    done = prefcache("prepare", many, "--set", "prepare.workers=1")
    # Six were finished, of which one is damaged.
    assert "5 of 12 parts were there already" in done.stderr
    assert take_files(tmp_path) == expected


# -- what is counted adds up -----------------------------------------------------------------------------------------


def test_duplicates_are_kept_or_dropped_as_asked(prepare, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 80)
    write_pairs(tmp_path / "pairs.jsonl", 20, mode="a")
    kept = prepare()
    assert kept["train"] + kept["held_out"] == 100 and kept["done"]["duplicates"] == 20
    ids = {row["example_id"] for row in rows_of(tmp_path)}
    assert len(ids) == 100 and sum(name.endswith("-2") for name in ids) == 20
    dropped = prepare("prepare.duplicates=drop")
    assert dropped["train"] + dropped["held_out"] == 80
    assert dropped["done"]["dropped"] == dropped["done"]["duplicates"] == 20
    assert {row["line"] for row in rows_of(tmp_path)} == set(range(1, 81))


@pytest.mark.parametrize("weight", [0.5, 2, 2.5])
def test_a_weight_is_a_share_or_repeats_training_rows(prepare, tmp_path, weight):
    write_pairs(tmp_path / "pairs.jsonl", 100)
    plain, source = prepare(), data_is({"path": "pairs.jsonl", "weight": weight})
    result = prepare(source)
    done = result["done"]
    assert result["train"] + result["held_out"] == 100 - done.get("left_out", 0) + done.get("repeated", 0)
    if weight < 1:
        assert 25 < done["left_out"] < 75
    else:
        assert result["held_out"] == plain["held_out"]
        assert abs(result["train"] - weight * plain["train"]) <= 15 * (weight % 1 > 0)
    before = {row["example_id"] for row in rows_of(tmp_path)}
    write_pairs(tmp_path / "pairs.jsonl", 50, start=100, mode="a")
    prepare(source)
    assert {row["example_id"] for row in rows_of(tmp_path) if row["line"] <= 100} == before


def test_the_first_records_of_each_source_are_read_counted_and_said(prepare, tmp_path):
    write_pairs(tmp_path / "a.jsonl", 30)
    write_lines(tmp_path / "b.jsonl", b"{", *(pair(i) for i in range(40, 45)))
    write_lines(tmp_path / "c.jsonl", pair(50), pair(51))
    data = data_is("a.jsonl", {"path": "b.jsonl", "max_records": 3}, "c.jsonl")
    found = prepare(data, "prepare.max_records=10", "prepare.max_quarantine=1")
    # a gives ten records. b gives a line that is not a record, and two pairs. c has fewer than the limit, and gives all.
    assert (found["records"], found["train"] + found["held_out"], found["quarantined"]) == (
        15,
        14,
        {"malformed JSON": 1},
    )
    assert sorted({row["prompt"] for row in rows_of(tmp_path)}) == sorted(
        pair(i)["prompt"] for i in (*range(10), 40, 41, 50, 51)
    )
    assert found["done"]["limited"] == 2
    manifest = json.loads((tmp_path / "runs/tiny/prepared/manifest.json").read_text())
    assert manifest["done"]["limited"] == 2 and manifest["records"] == 15
    # Another number is another preparation, and the same is none.
    assert "nothing to do" in prepare(data, "prepare.max_records=10", "prepare.max_quarantine=1")["stderr"]
    again = prepare(data, "prepare.max_records=11", "prepare.max_quarantine=1")
    assert again["records"] == 16


def test_reading_no_more_than_some_records_is_said(prefcache, config):
    said = prefcache("prepare", config, "--set", "prepare.max_records=5").stdout
    assert "1 of the sources gave as many records as prepare.max_records allows; what may follow was not read" in said


def test_sources_have_formats_columns_and_weights_of_their_own(prepare, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 20)
    answers = [{"answer": text, "rank": n} for n, text in enumerate(("first", "second", "third"), 1)]
    ranked = [{"prompt": f"Human: which {i}?\n\nAssistant:", "answers": answers} for i in range(10)]
    write_lines(tmp_path / "nectar.jsonl", *ranked)
    write_lines(tmp_path / "other.jsonl", *[{"q": f"how {i}?", "good": f"so {i}", "bad": "no"} for i in range(10)])
    entries = [
        "pairs.jsonl",
        {"path": "nectar.jsonl", "weight": 2},
        {"path": "other.jsonl", "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
    ]
    result = prepare(data_is(*entries), "prepare.pairing=all", "prepare.held_out=0")
    assert "nectar.jsonl is read as nectar" in result["stderr"] and "other.jsonl is read as pairs" in result["stderr"]
    # Three answers make three pairs: two more than the record. All thirty are used twice.
    assert (result["records"], result["further"], result["done"]["repeated"]) == (40, 20, 30)
    assert result["train"] == 40 + 20 + 30
    rows = rows_of(tmp_path)
    assert {(row["chosen"], row["rejected"]) for row in rows if row["source"] == "nectar.jsonl"} == {
        ("first", "second"),
        ("first", "third"),
        ("second", "third"),
    }
    fourth = [row for row in rows if row["source"] == "other.jsonl"][3]
    assert (fourth["prompt"], fourth["chosen"]) == ("how 3?", "so 3")


def test_ties_are_quarantined_or_kept_as_asked(prepare, tmp_path):
    same = [{"prompt": f"same {i}?", "chosen": "b", "rejected": "b"} for i in range(2)]
    write_lines(tmp_path / "pairs.jsonl", *[pair(i) for i in range(60)], *same)
    tie = {"prompt": "tie?", "response_1": "x", "response_2": "y", "preference_strength": 0}
    ranked = [tie | {"prompt": f"{i}?", "preference_strength": -1} for i in range(20)]
    write_lines(tmp_path / "ranked.jsonl", tie, *ranked)
    data = data_is("pairs.jsonl", "ranked.jsonl")
    result = prepare(data)
    assert result["quarantined"] == {"chosen equals rejected": 2, "tie": 1}
    assert result["train"] + result["held_out"] == 60 + 20 and result["records"] == 83
    result = prepare(data, "prepare.ties=keep")
    assert result["quarantined"] == {} and result["train"] + result["held_out"] == 83
    assert [(r["chosen"], r["rejected"]) for r in rows_of(tmp_path) if r["prompt"] == "tie?"] == [("x", "y")]


def test_weights_that_leave_nothing_are_refused(prepare, config):
    source = data_is({"path": "pairs.jsonl", "weight": 0.00001})
    assert "None of 60 examples is left" in prepare(source, code=3)["stderr"]


# -- labels ----------------------------------------------------------------------------------------------------------


def test_labels_of_pairs_have_mismatched_answers(prepare, config, tmp_path):
    result = prepare("prepare.examples=labels")
    assert (result["kind"], result["records"], result["further"]) == ("labels", 60, 60)
    assert result["train"] + result["held_out"] == 120
    rows = rows_of(tmp_path)
    by_name = {row["example_id"]: row for row in rows}
    assert sum(row["label"] for row in rows) == 60
    for row in rows:
        other = by_name[row["kl_of"]]
        assert other["completion"] != row["completion"] and other["prompt"] != row["prompt"]
        assert row["kl_ids"] == other["completion_ids"]
        assert row["kl_key"] == sequence_key(row["prompt_ids"], row["kl_ids"])
    prepare("prepare.examples=labels", "prepare.seed=1")
    changed = {row["example_id"]: row["kl_of"] for row in rows_of(tmp_path)}
    assert sum(changed[name] != row["kl_of"] for name, row in by_name.items()) > 100
    # They can be left out.
    assert "unmatched" not in prepare("prepare.examples=labels", "prepare.kl_pairs=false")["done"]
    assert {row["kl_key"] for row in rows_of(tmp_path)} == {None}


def test_labels_without_another_answer_are_counted(prepare, prefcache, tmp_path):
    labels = [{"prompt": f"{i}?", "completion": "so", "label": i == 0} for i in range(2)]
    write_lines(tmp_path / "pairs.jsonl", *labels)
    done = prefcache("prepare", "config.yaml")
    assert "2 have no mismatched answer" in done.stdout and "is read as labels" in done.stderr
    assert [row["kl_ids"] for row in rows_of(tmp_path)] == [None, None]
    # So are answers that are cut to the row's own: both begin alike, and where they differ is cut.
    labels = [{"prompt": f"why {i}?", "completion": "red " * 40 + end, "label": True} for i, end in enumerate("ab")]
    write_lines(tmp_path / "pairs.jsonl", *labels)
    assert prepare("prepare.max_length=24", "prepare.too_long=keep_start")["done"]["unmatched"] == 2
    assert [row["kl_key"] for row in rows_of(tmp_path)] == [None, None]


def test_pairs_next_to_labels_have_to_be_taken_apart(prepare, config, tmp_path):
    labels = [{"prompt": f"{i}?", "completion": "so", "label": True} for i in range(9)]
    write_lines(tmp_path / "labels.jsonl", *labels)
    both = data_is("pairs.jsonl", "labels.jsonl")
    error = prepare(both, code=2)["stderr"]
    assert "labels.jsonl has labelled answers" in error and "prepare.examples: labels" in error
    assert "no pairs can be made" in prepare(both, "prepare.examples=pairs", code=2)["stderr"]
    result = prepare(both, "prepare.examples=labels")
    assert (result["records"], result["further"], result["train"] + result["held_out"]) == (69, 60, 129)


def test_sql_shows_pairs_and_labels(prepare, prefcache, config):
    query = "select count(chosen), count(completion), count(kl_key), count(label) from examples"
    for kind, counts in (("pairs", [60, 0, 0, 0]), ("labels", [0, 120, 120, 120])):
        prepare(f"prepare.examples={kind}")
        (row,) = json.loads(prefcache("sql", query, "--json").stdout)
        assert list(row.values()) == counts


# -- formats ---------------------------------------------------------------------------------------------------------


def test_the_format_that_was_recognised_is_said_and_recorded(prepare, config, tmp_path):
    assert "prepare: pairs.jsonl is read as pairs (" in prepare()["stderr"]
    (recorded,) = Prepared(tmp_path / "runs/tiny/prepared").manifest.formats
    assert recorded.facts() == {"format": "pairs", "arguments": {}, "columns": {}}


def test_columns_of_no_format_are_named_and_can_be_renamed(prepare, tmp_path):
    write_lines(tmp_path / "pairs.jsonl", *[{"q": f"how {i}?", "good": f"so {i}", "bad": "no"} for i in range(10)])
    error = prepare(code=2)["stderr"]
    assert "its columns (q, good, bad)" in error and "prepare.columns" in error
    prepare("prepare.columns={prompt: q, chosen: good, rejected: bad}")
    assert {row["prompt"] for row in rows_of(tmp_path)} == {f"how {i}?" for i in range(10)}


@pytest.mark.parametrize(
    ("setting", "errors"),
    [
        ("prepare.format_args={by: safer}", ["prepare.format_args: format pairs has no option 'by'"]),
        ("prepare.columns={promt: prompt}", ["no format reads a column 'promt'. The nearest is prompt"]),
        (
            "prepare.columns={prompt: question}",
            ["pairs.jsonl has no column 'question'; found chosen, prompt, rejected"],
        ),
        (
            "prepare.format=orca_dpo_pairs",
            [
                "none of its first 60 records has the columns question, chosen, rejected",
                "They are those of pairs.",
            ],
        ),
    ],
)
def test_a_wrong_format_is_refused_before_any_record_is_prepared(prepare, config, tmp_path, setting, errors):
    found = prepare(setting, code=2)["stderr"]
    assert all(error in found for error in errors)
    assert finished(tmp_path) == [] and not (tmp_path / "runs/tiny/prepared/quarantine.parquet").exists()


def test_a_refused_preparation_leaves_the_finished_one_as_it_was(prepare, config, tmp_path):
    prepare()
    before = files_of(tmp_path)
    error = prepare("prepare.max_length=20", code=3)["stderr"]
    refused = tmp_path / "runs/tiny/prepared/quarantine-refused.parquet"
    assert str(refused.relative_to(tmp_path)) in error and len(pq.read_table(refused)) > 3
    after = files_of(tmp_path)
    assert {name: after[name] for name in before} == before
    prepare("prepare.max_length=100")
    assert not refused.exists()


# -- templates -------------------------------------------------------------------------------------------------------


def test_tools_that_the_template_does_not_print_are_counted_and_calls_are_refused(prepare, tmp_path):
    tools = [{"type": "function", "function": {"name": "find"}}]
    call = [{"role": "assistant", "content": "", "tool_calls": tools}]
    write_lines(tmp_path / "pairs.jsonl", pair(0) | {"tools": tools}, pair(1), pair(2) | {"chosen": call})
    result = prepare("prepare.max_quarantine=1")
    assert result["done"]["unseen_tools"] == 1
    assert result["quarantined"] == {"template prints no tool calls": 1}


def test_a_record_that_is_too_much_for_the_template_is_one_bad_record(prepare, tmp_path, monkeypatch):
    # Twice a text of 40,000 characters is over the limit, which is set to 60,000 here; three records are not.
    monkeypatch.setattr("prefcache.pipeline.preparing.chat_template.CHARACTERS", 60_000)
    (tmp_path / "twice.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    records = [pair(0), pair(1), {"prompt": "a" * 40_000, "chosen": "b", "rejected": "c"}, pair(2)]
    write_lines(tmp_path / "pairs.jsonl", *records)
    result = prepare("prepare.chat_template=twice.jinja", "prepare.max_quarantine=0.5")
    assert result["quarantined"] == {"template takes too much": 1}
    # Where it is every record, the template is to blame.
    (tmp_path / "much.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' and m.content != 'x' %}{{ 'a' * 50000 }}"
        "{{ 'a' * 50000 }}{% endif %}{% endfor %}"
    )
    write_pairs(tmp_path / "pairs.jsonl", 60)
    error = prepare("prepare.chat_template=much.jinja", code=2)["stderr"]
    assert "The chat template takes too much" in error


def test_a_changed_template_for_tools_is_prepared_again(prepare, config, model, tmp_path):
    own = shutil.copytree(model, tmp_path / "own")
    prepare(f"model={own}")
    (own / "additional_chat_templates").mkdir()
    (own / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    assert prepare(f"model={own}")["changed"]
