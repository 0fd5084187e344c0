"""A part depends on its records and the config alone, and counts as finished only if it is undamaged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prefcache.pipeline.config import Prepare
from prefcache.pipeline.preparing import part_table, part_worker, text_tokenizer
from prefcache.pipeline.preparing.example import Unusable
from prefcache.pipeline.preparing.part_worker import PartWorker, PreparedPart, Quarantine
from prefcache.pipeline.preparing.resolved_config import SourceFormat, resolve_config
from prefcache.pipeline.preparing.sources import Chunk, Line, open_source
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import sequence_key
from prefcache.pipeline.stored import artifact
from tests.helpers.project import pair
from tests.helpers.tokenizers import chunk_of, facts, resolved_config, saved
from tests.helpers.wrong_tokenizer import WrongTokenizer

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "why one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "why three?"},
]
RECORDS = [
    *[pair(i) for i in range(20)],
    {"prompt": CHAT, "chosen": "a cat", "rejected": "a dog"},
    {"prompt": "a"},
    *[pair(i) for i in range(20, 30)],
    {"prompt": "a", "chosen": "b", "rejected": "b"},
    [1],
]


def worker_of(folder: Path, model: Path, records: list = RECORDS, **prepare) -> tuple[PartWorker, Chunk]:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = Prepare(data=str(path), **prepare)
    opened = [open_source(entry, folder) for entry in config.sources]
    (chunk,) = opened[0].chunks()
    return PartWorker(resolve_config(config, model, opened, Progress(quiet=True))), chunk


def counts(part: PreparedPart) -> tuple:
    return part.records, part.further, part.quarantined, part.first, part.done


def same(a: PreparedPart, b: PreparedPart) -> bool:
    """Compare two parts of the same records in files of different names."""
    tables = ((a.table, b.table), (a.quarantine, b.quarantine))
    rows_are_same = all(x.drop_columns(["source"]).equals(y.drop_columns(["source"])) for x, y in tables)
    return rows_are_same and counts(a) == counts(b)


@pytest.fixture(scope="module")
def made(tmp_path_factory, model) -> PreparedPart:
    worker, chunk = worker_of(tmp_path_factory.mktemp("part"), model)
    return worker.prepare(0, chunk)


def test_every_record_is_an_example_or_in_quarantine(made):
    assert made.records == len(RECORDS) == len(made.table) + len(made.quarantine)
    assert made.quarantined == {"chosen equals rejected": 1, "missing column": 1, "not an object": 1}
    assert made.first["missing column"] == "line 22: 'chosen'; found prompt"
    assert made.quarantine["line"].to_pylist() == [22, 33, 34]
    assert json.loads(made.quarantine["raw"][0].as_py()) == {"prompt": "a"}
    assert made.table["line"].to_pylist() == [*range(1, 22), *range(23, 33)]


def test_a_row_holds_its_ids_their_numbers_and_their_keys(made):
    for row in made.table.to_pylist():
        assert row["n_prompt"] == len(row["prompt_ids"]) > 0
        for side in ("chosen", "rejected"):
            assert row[f"n_{side}"] == len(row[f"{side}_ids"]) > 0
            assert row[f"{side}_key"] == sequence_key(row["prompt_ids"], row[f"{side}_ids"])
            assert (row[f"cut_{side}"], row[f"{side}_cut_ids"]) == (0, [])
        assert len(bytes.fromhex(row["example_id"])) == 8
    assert len(set(made.table["example_id"].to_pylist())) == len(made.table)


def test_what_was_made_before_makes_no_difference(tmp_path, model, made):
    worker, chunk = worker_of(tmp_path, model)
    other = worker_of(tmp_path, model, [pair(i) for i in range(500)])[1]
    worker.prepare(0, other)
    assert same(worker.prepare(0, chunk), made) and same(worker.prepare(0, chunk), made)


def test_the_size_of_a_batch_makes_no_difference(tmp_path, model, made, monkeypatch):
    monkeypatch.setattr(part_worker, "BATCH", 3)
    worker, chunk = worker_of(tmp_path, model)
    assert same(worker.prepare(0, chunk), made)


def test_without_the_template_cache_the_part_is_the_same(tmp_path, model, made, monkeypatch):
    worker, chunk = worker_of(tmp_path, model)
    monkeypatch.setattr(worker.renderer.cache, "render", lambda prompt, answers: None)
    assert same(worker.prepare(0, chunk), made)


def test_a_template_cache_that_is_wrong_is_noticed_and_nothing_of_it_stays(tmp_path, model, made, monkeypatch):
    worker, chunk = worker_of(tmp_path, model)
    check, seen = worker.renderer.cache._check, []

    def at_the_third(prompt, answers, text):
        seen.append(text)
        check(prompt, answers, text._replace(prompt="something else") if len(seen) == 3 else text)

    monkeypatch.setattr(worker.renderer.cache, "_check", at_the_third)
    assert same(worker.prepare(0, chunk), made) and len(seen) == 3


def test_with_the_fast_tokenizer_the_part_is_the_same(tmp_path, model, made):
    worker, chunk = worker_of(tmp_path, model)
    fast = PartWorker(replace(worker.resolved, fast_tokenizer=True))
    part = fast.prepare(0, chunk)
    assert same(part, made) and part.fast_tokenizer and not made.fast_tokenizer


def test_a_fast_tokenizer_that_is_wrong_is_noticed_and_nothing_of_it_stays(tmp_path, model, made, monkeypatch):
    monkeypatch.setattr(text_tokenizer, "FastTokenizer", WrongTokenizer)
    worker, chunk = worker_of(tmp_path, model)
    fast = PartWorker(replace(worker.resolved, fast_tokenizer=True))
    assert same(fast.prepare(0, chunk), made) and not fast.prepare(0, chunk).fast_tokenizer
    assert "fastokens gives other ids than tokenizers" in fast.encoder.tokenizer.fast_mismatch


def test_taken_apart_a_pair_is_two_rows_of_which_one_is_further(tmp_path, model):
    worker, chunk = worker_of(tmp_path, model, examples="labels")
    labels = worker.prepare(0, chunk)
    # 31 pairs are 62 labels: 31 more than there were records.
    assert len(labels.table) == 62 and labels.further == 31
    assert labels.table["label"].to_pylist() == [True, False] * 31
    assert labels.records + labels.further == len(labels.table) + len(labels.quarantine)


def test_no_records_make_an_empty_part(tmp_path, model):
    worker, chunk = worker_of(tmp_path, model, [{"prompt": "a"}], format="pairs")
    empty = worker.prepare(0, chunk)
    assert empty.table.equals(part_table.SCHEMAS["pairs"].empty_table()) and len(empty.quarantine) == 1


def test_a_prompt_falls_on_one_side_by_its_words_alone():
    assert (
        part_table.split_fraction("why  one\n")
        == part_table.split_fraction(" why one")
        != part_table.split_fraction("why two")
    )
    assert part_table.split_fraction("caf\u00e9") == part_table.split_fraction("cafe\u0301")
    shares = [part_table.split_fraction(f"why {i}?") for i in range(1000)]
    # A quarter of 1000, with a standard deviation of 14.
    assert 190 < sum(share < 0.25 for share in shares) < 310 and 0 <= min(shares) <= max(shares) < 1


def test_a_detail_with_half_a_character_can_be_written():
    bad = Quarantine()
    bad.add(Line("a", 1, b"{}", None, "", ""), Unusable("missing column", "found \ud800"))
    assert bad.table()["detail"].to_pylist() == ["found \\ud800"]


# -- on disk ---------------------------------------------------------------------------------------------------------


def test_a_part_is_finished_once_its_record_is_there(tmp_path, made):
    folder = tmp_path / "parts"
    assert part_worker.find_finished(folder, 7) is None
    record = part_worker.commit_part(folder, 7, 2, made)
    assert part_worker.find_finished(folder, 7) == record and record.source == 2
    assert artifact.open_arrow_stream(part_worker.table_file(folder, 7)).equals(made.table)
    assert part_worker.find_finished(folder, 6) is None
    part_worker.record_file(folder, 7).unlink()
    assert part_worker.find_finished(folder, 7) is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".json", ".arrow", ".quarantine"])
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-8])])
def test_a_damaged_part_is_not_finished(tmp_path, made, suffix, damage):
    part_worker.commit_part(tmp_path, 0, 0, made)
    damage(part_worker.table_file(tmp_path, 0).with_suffix(suffix))
    assert part_worker.find_finished(tmp_path, 0) is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("red \u65e5\u672c\u8a9e", "red \u65e5\u672c\u4eba", "red"),  # the whole word is one token, with its blank
        ("\u65e5\u672c\u7a7a\u9752", "\u65e5\u672c\u7a7a\u8d64", "\u65e5\u672c\u7a7a"),
        ("the answer is blue", "the answer is black", "the answer is"),
    ],
)
def test_an_implicit_prompt_of_plain_text_ends_where_tokens_of_both_texts_do(chosen, rejected, prompt):
    resolved = resolved_config(facts("byte-level"), None)
    worker = PartWorker(replace(resolved, source_formats=(SourceFormat("implicit_prompt", {}, {}),)))
    part = worker.prepare(0, chunk_of([{"chosen": chosen, "rejected": rejected}]))
    (row,) = part.table.to_pylist()
    assert (row["prompt"], row["boundary"]) == (prompt, "exact")
    tokenizer = saved("byte-level")[1]
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        assert row["prompt_ids"] + row[f"{name}_ids"] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert row["prompt"] + row[name] == text


def test_a_prompt_of_its_own_column_is_never_moved():
    worker = PartWorker(resolved_config(facts("byte-level"), None))
    part = worker.prepare(0, chunk_of([{"prompt": "red \u65e5\u672c", "chosen": "\u8a9e", "rejected": "\u4eba"}]))
    assert part.table["prompt"].to_pylist() == ["red \u65e5\u672c"] and part.done["split"] == 1
