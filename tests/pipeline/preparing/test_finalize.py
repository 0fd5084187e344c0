"""The whole is decided from all rows alone: not from the parts they are in, nor from the shards they go to."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.config import Prepare
from prefcache.pipeline.errors import DataError
from prefcache.pipeline.preparing import finalize, part_table, part_worker
from prefcache.pipeline.schema import PREPARED, QUARANTINE, sequence_key
from prefcache.pipeline.spans import whole_span
from prefcache.pipeline.stored import artifact
from tests.helpers.project import entry_of

N = 400


def identity(i: int) -> str:
    """Like a hash: 16 hexadecimal digits that say nothing."""
    return artifact.checksum_bytes(f"example {i}".encode())[:16]


def pair(i: int, split: str = "") -> dict:
    split = split or ("held_out" if i % 4 == 3 else "train")
    return {"example_id": identity(i), "whole_id": int(identity(i), 16), "split": split, "line": i + 1}


def number(text: str) -> int:
    return int(artifact.checksum_bytes(text.encode())[:16], 16)


def label(i: int, prompt: int, answer: int) -> dict:
    prompt_ids, completion_ids = [prompt + 1] * 3, [answer + 1] * (1 + answer % 5)
    return pair(i) | {
        "label": i % 2 == 0,
        "prompt_ids": prompt_ids,
        "completion": f"answer {answer}",
        "completion_ids": completion_ids,
        "completion_cut_ids": [],
        "completion_spans": whole_span(len(completion_ids)),
        "completion_key": sequence_key(prompt_ids, completion_ids),
        "prompt_hash": number(f"prompt {prompt}"),
        "text_hash": number(f"answer {answer}"),
        "ids_hash": number(f"ids {answer}"),
    }


def parts_of(folder, rows, cuts=(), kind="pairs", sources=None, bad=()) -> finalize.Parts:
    """These rows as finished parts, cut before the rows that `cuts` names; part n is of source sources[n]."""
    records = []
    for n, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(rows)], strict=True)):
        table = pa.Table.from_pylist(rows[begin:end], schema=part_table.SCHEMAS[kind])
        quarantine = pa.Table.from_pylist(bad[n] if bad else [], schema=QUARANTINE)
        made = part_worker.PreparedPart(
            table, quarantine, records=end - begin, further=0, quarantined={}, first={}, done={}
        )
        records.append(part_worker.commit_part(folder, n, sources[n] if sources else 0, made))
    return finalize.Parts(folder, records)


def assembled(tmp_path, rows, cuts=(), kind="pairs", weights=(1.0,), sources=None, **config) -> tuple[dict, dict]:
    """The rows of both splits, and what was done."""
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    made = parts_of(folder / ".parts", rows, cuts, kind, sources)
    of_parts = [weights[record.source] for record in made.records]
    entries, _, done = finalize.commit_shards(folder, made, kind, "aaaa", Prepare(data="x", **config), of_parts)
    found = {"train": [], "held_out": []}
    for entry in entries:
        table = artifact.open_arrow_stream(folder / entry["file"])
        assert artifact.damage(folder, entry_of(entry)) is None and table.schema == PREPARED[kind]
        assert 0 < len(table) == entry["rows"] <= config.get("rows_per_shard", 50_000)
        found[entry["split"]] += table.to_pylist()
    # A row is kept, dropped or left out, and the rest is repetitions.
    kept = len(found["train"]) + len(found["held_out"])
    assert kept == len(rows) - done["left_out"] - done.get("dropped", 0) + done["repeated"]
    names = [row["example_id"] for split in found.values() for row in split]
    assert len(set(names)) == len(names)
    return found, done


def names(rows: list[dict]) -> list[str]:
    return [row["example_id"] for row in rows]


def numbers(rows: list[dict]) -> list[int]:
    """Which examples they are, copies with the number of what they are a copy of."""
    known = {identity(i): i for i in range(2 * N)}
    return [known[row["example_id"].partition("-")[0]] for row in rows]


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_shard", [1, 7, 100, 1000])
@pytest.mark.parametrize("cuts", [(), (1, 2, 150, 150, 399)], ids=["one part", "six parts, one empty"])
def test_rows_come_in_the_order_of_the_input_however_they_are_cut(tmp_path, cuts, rows_per_shard):
    found, _ = assembled(tmp_path, [pair(i) for i in range(N)], cuts, rows_per_shard=rows_per_shard)
    assert numbers(found["train"]) == [i for i in range(N) if i % 4 != 3]
    assert numbers(found["held_out"]) == [i for i in range(N) if i % 4 == 3]


def test_rows_at_once_make_no_difference(tmp_path, monkeypatch):
    rows = [pair(i % 90) for i in range(N)]
    once, _ = assembled(tmp_path, rows, (200,), weights=(2.5,))
    monkeypatch.setattr(finalize, "_BLOCK_ROWS", 3)
    assert assembled(tmp_path, rows, (200,), weights=(2.5,))[0] == once


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_where_no_rows_are_left_it_says_so(tmp_path, kind):
    with pytest.raises(DataError, match="None of 0 examples is left"):
        assembled(tmp_path, [], kind=kind)


def test_after_a_failure_there_is_no_half_shard(tmp_path, monkeypatch):
    made = parts_of(tmp_path / ".parts", [pair(i) for i in range(N)], (300,))
    monkeypatch.setattr(
        finalize, "_name_copies", lambda block, numbers: 1 / 0 if block["line"][0].as_py() > 300 else block
    )
    with pytest.raises(ZeroDivisionError):
        finalize.commit_shards(tmp_path, made, "pairs", "aaaa", Prepare(data="x"), [1.0, 1.0])
    assert [file.name for file in tmp_path.iterdir()] == [".parts"]


def test_the_quarantine_is_that_of_all_parts_in_order(tmp_path):
    raw = [b"\xff\x00{", b"x", b""]
    numbers = {"n_found": 2, "n_limit": 1, "n_tokens": None}
    bad = [{"source": "a", "line": i, "reason": "r", "detail": "", **numbers, "raw": raw[i % 3]} for i in range(5)]
    made = parts_of(tmp_path, [pair(0), pair(1), pair(2)], (1, 2), bad=[bad[:2], [], bad[2:]])
    entry = finalize.commit_quarantine(tmp_path / "quarantine.parquet", made)
    table = pq.read_table(tmp_path / entry["file"])
    assert table.schema.equals(QUARANTINE) and table.to_pylist() == bad
    assert entry["rows"] == 5 and artifact.damage(tmp_path, entry_of(entry)) is None


def test_the_quarantine_of_a_part_that_an_earlier_version_made_has_no_numbers(tmp_path):
    bad = {"source": "a", "line": 1, "reason": "too long", "detail": "5 + 6 tokens", "raw": b"x"}
    made = parts_of(tmp_path, [pair(0)], bad=[[bad]])
    file = tmp_path / made.records[0].quarantine.file
    earlier = pa.Table.from_pylist([bad], schema=pa.schema([field for field in QUARANTINE if field.name in bad]))
    file.write_bytes(_stream(earlier))
    entry = finalize.commit_quarantine(tmp_path / "quarantine.parquet", made)
    (row,) = pq.read_table(tmp_path / entry["file"]).to_pylist()
    assert row == bad | {"n_found": None, "n_limit": None, "n_tokens": None}


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


# -- duplicates and weights ------------------------------------------------------------------------------------------

TWICE = [0, 1, 0, 0, 1, 2]


@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 4, 5)], ids=["one part", "six parts"])
def test_duplicates_are_kept_under_names_of_their_own(tmp_path, cuts):
    found, done = assembled(tmp_path, [pair(i) for i in TWICE], cuts)
    a, b, c = (identity(i) for i in range(3))
    assert names(found["train"]) == [a, b, f"{a}-2", f"{a}-3", f"{b}-2", c]
    assert done["duplicates"] == 3 and done["repeated"] == 0 and "dropped" not in done


@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 4, 5)], ids=["one part", "six parts"])
def test_of_duplicates_the_first_is_kept_where_they_are_dropped(tmp_path, cuts):
    found, done = assembled(tmp_path, [pair(i) for i in TWICE], cuts, duplicates="drop")
    assert [row["line"] for row in found["train"]] == [1, 2, 3] and names(found["train"]) == [
        identity(i) for i in range(3)
    ]
    assert done["dropped"] == done["duplicates"] == 3


def test_what_a_weight_left_out_makes_nothing_a_duplicate(tmp_path):
    # The same examples from two sources. Of the first a tenth is used; of the second what that did not bring.
    rows = [pair(i, "train") for i in range(N)] * 2
    found, done = assembled(tmp_path, rows, (N,), weights=(0.1, 1.0), sources=[0, 1], duplicates="drop")
    assert sorted(numbers(found["train"])) == list(range(N))
    used_of_first = N - done["left_out"]
    assert done["dropped"] == used_of_first and 10 < used_of_first < 80


def test_a_weight_below_one_takes_a_share_that_grows_with_it(tmp_path):
    shares = [numbers(assembled(tmp_path, [pair(i) for i in range(N)], weights=(w,))[0]["train"]) for w in (0.2, 0.5)]
    # 300 training rows: 60 and 150 are expected, with standard deviations of 7 and 9.
    assert abs(len(shares[0]) - 60) < 35 and abs(len(shares[1]) - 150) < 45
    assert set(shares[0]) < set(shares[1])


def test_a_share_does_not_change_when_data_is_added(tmp_path):
    before, _ = assembled(tmp_path, [pair(i) for i in range(N)], weights=(0.5,))
    after, _ = assembled(tmp_path, [pair(i) for i in range(N, 2 * N)] + [pair(i) for i in range(N)], weights=(0.5,))
    for split in ("train", "held_out"):
        assert [i for i in numbers(after[split]) if i < N] == numbers(before[split])


def test_another_seed_takes_another_share(tmp_path):
    shares = [
        numbers(assembled(tmp_path, [pair(i) for i in range(N)], weights=(0.5,), seed=seed)[0]["train"])
        for seed in (0, 1, -1)
    ]
    # Half of one half is expected in the other: 75 of 150.
    assert 40 < len(set(shares[0]) & set(shares[1])) < 110 and shares[2] != shares[0]


@pytest.mark.parametrize("weight", [2.0, 2.5])
def test_a_weight_above_one_repeats_training_rows_alone(tmp_path, weight):
    found, done = assembled(tmp_path, [pair(i) for i in range(N)], weights=(weight,))
    times = np.bincount(numbers(found["train"]), minlength=N)[[i for i in range(N) if i % 4 != 3]]
    assert set(times) == ({2} if weight == 2 else {2, 3}) and abs(times.mean() - weight) < 0.15
    assert sorted(numbers(found["held_out"])) == [i for i in range(N) if i % 4 == 3]
    assert done["repeated"] == len(found["train"]) - 300
    # Copies stand together, each under a name of its own.
    first = identity(0)
    assert names(found["train"])[:2] == [first, f"{first}-2"]


def test_each_source_has_its_own_weight(tmp_path):
    rows = [pair(i, "train") for i in range(30)]
    found, _ = assembled(tmp_path, rows, (10, 20), weights=(3.0, 1.0), sources=[0, 1, 0])
    assert np.bincount(numbers(found["train"])).tolist() == [3] * 10 + [1] * 10 + [3] * 10


# -- mismatched answers ----------------------------------------------------------------------------------------------

# 60 labels: 20 prompts with three answers each, and every answer occurs under two or more prompts.
LABELS = [label(i, prompt=i // 3, answer=i * 7 % 25) for i in range(60)]
# 60 labels with answers of 1 to 5 tokens, of which no two begin alike.
APART = [label(i, prompt=i, answer=i) for i in range(60)]


def all_rows(found: dict) -> list[dict]:
    return sorted(found["train"] + found["held_out"], key=lambda row: row["line"])


def test_a_mismatched_answer_is_another_examples_to_another_prompt(tmp_path):
    found, done = assembled(tmp_path, LABELS, kind="labels")
    by_name = {row["example_id"]: row for row in all_rows(found)}
    assert done["unmatched"] == 0 and len(by_name) == 60
    for row in by_name.values():
        other = by_name[row["kl_of"]]
        assert other["completion"] != row["completion"] and other["prompt_ids"] != row["prompt_ids"]
        assert row["kl_ids"] == other["completion_ids"] and row["n_kl"] == len(row["kl_ids"])
        assert row["kl_cut_ids"] == []
        assert row["kl_key"] == sequence_key(row["prompt_ids"], row["kl_ids"])
    # And they are spread: no one answer stands in for all.
    assert len({row["kl_of"] for row in by_name.values()}) > 30


def test_mismatched_answers_do_not_depend_on_parts_or_shards(tmp_path):
    once, _ = assembled(tmp_path, LABELS, kind="labels")
    again, _ = assembled(tmp_path, LABELS, (1, 20, 20, 59), "labels", (1.0,), rows_per_shard=7)
    assert again == once


def test_mismatched_answers_depend_on_the_seed(tmp_path):
    first, other = (assembled(tmp_path, LABELS, kind="labels", seed=seed)[0] for seed in (0, 1))
    changed = [a["kl_of"] != b["kl_of"] for a, b in zip(all_rows(first), all_rows(other), strict=True)]
    assert sum(changed) > 40


def test_the_same_prompt_has_to_do_where_there_is_no_other(tmp_path):
    rows = [label(i, prompt=0, answer=i % 3) for i in range(9)]
    found, done = assembled(tmp_path, rows, kind="labels")
    assert done["unmatched"] == 0
    assert all(row["kl_ids"] != row["completion_ids"] for row in all_rows(found))


def test_one_odd_answer_among_many_alike_serves_them_all(tmp_path):
    # Farther apart than the neighbours that are tried.
    rows = [label(i, prompt=i, answer=0) for i in range(300)] + [label(300, prompt=300, answer=1)]
    found, done = assembled(tmp_path, rows, kind="labels")
    assert done["unmatched"] == 0
    assert {row["kl_of"] for row in all_rows(found)[:300]} == {identity(300)}
    assert all_rows(found)[300]["kl_of"] in {identity(i) for i in range(300)}


@pytest.mark.parametrize("n", [1, 2, 5])
def test_where_all_answers_are_one_there_is_none_that_does_not_belong(tmp_path, n):
    found, done = assembled(tmp_path, [label(i, prompt=i, answer=0) for i in range(n)], kind="labels")
    assert done["unmatched"] == n
    for row in all_rows(found):
        assert [row[name] for name in ("kl_of", "kl_ids", "kl_cut_ids", "kl_key", "n_kl")] == [None] * 5


def test_within_batches_each_row_takes_the_answer_of_the_one_before_and_the_first_that_of_the_last(tmp_path):
    found, done = assembled(tmp_path, LABELS, kind="labels", kl_batch_size=8)
    for split, rows in found.items():
        by_name, left = {row["example_id"]: row for row in rows}, {row["example_id"] for row in rows}
        sizes = []
        while left:
            ring = [left.pop()]
            while (name := by_name[ring[-1]]["kl_of"]) in left:
                left.remove(name)
                ring.append(name)
            assert name == ring[0], split
            sizes.append(len(ring))
        assert sorted(sizes) == [len(rows) % 8, *[8] * (len(rows) // 8)]
        # Even an answer that is the row's own.
        assert all(row["kl_ids"] == by_name[row["kl_of"]]["completion_ids"] for row in rows)
    assert done["unmatched"] == 0


def test_within_batches_a_mismatched_answer_is_the_whole_one_cut_anew(tmp_path):
    own = APART[0] | {"prompt_ids": [1], "completion_ids": [7, 7], "completion_spans": [0, 2]}
    other = APART[1] | {"prompt_ids": [2, 2, 2, 2], "completion_ids": [8], "completion_spans": [0, 1]}
    other |= {"completion_cut_ids": [9, 9, 9]}
    found, _ = assembled(tmp_path, [own, other], kind="labels", max_length=5, kl_batch_size=2)
    assert [row["kl_ids"] for row in all_rows(found)] == [[8, 9, 9, 9], [7]]
    assert [row["kl_spans"] for row in all_rows(found)] == [[0, 4], [0, 1]]


def test_without_kl_pairs_their_columns_are_null(tmp_path):
    found, done = assembled(tmp_path, LABELS, kind="labels", kl_pairs=False)
    assert "unmatched" not in done and len(all_rows(found)) == 60
    assert {row["kl_key"] for row in all_rows(found)} == {row["kl_of"] for row in all_rows(found)} == {None}


def test_answers_that_were_left_out_stand_in_for_none(tmp_path):
    rows = [label(i, prompt=i, answer=i) for i in range(60)]
    found, done = assembled(tmp_path, rows, kind="labels", weights=(0.5,))
    used = {row["example_id"] for row in all_rows(found)}
    assert 10 < len(used) == 60 - done["left_out"] < 50
    assert {row["kl_of"] for row in all_rows(found)} <= used


def test_a_repeated_label_has_one_mismatched_answer(tmp_path):
    found, _ = assembled(tmp_path, LABELS, kind="labels", weights=(2.0,))
    of: dict[int, set] = {}
    for row in found["train"]:
        of.setdefault(row["line"], set()).add(row["kl_of"])
    assert len(of) == math.ceil(60 * 3 / 4) and all(len(each) == 1 for each in of.values())


def test_a_mismatched_answer_is_cut_to_the_length(tmp_path):
    # Prompts of 3 tokens, answers of 1 to 5: with at most 5 tokens, 2 of an answer are left.
    found, _ = assembled(tmp_path, LABELS, kind="labels", max_length=5)
    by_name = {row["example_id"]: row for row in all_rows(found)}
    for row in by_name.values():
        assert row["kl_ids"] == by_name[row["kl_of"]]["completion_ids"][:2]
        assert row["kl_cut_ids"] == by_name[row["kl_of"]]["completion_ids"][2:]
        assert row["kl_key"] == sequence_key(row["prompt_ids"], row["kl_ids"])


def test_a_mismatched_answer_that_cut_is_the_rows_own_is_none(tmp_path):
    # Of the other answer, the first row has room for two tokens, which are its own. The second keeps all three.
    own, other = APART[0], APART[1]
    own = own | {"prompt_ids": [1, 1, 1], "completion_ids": [7, 7]}
    other = other | {"prompt_ids": [2], "completion_ids": [7, 7, 8]}
    found, done = assembled(tmp_path, [own, other], kind="labels", max_length=5)
    rows = [row["kl_ids"] for row in all_rows(found)]
    assert (rows, done["unmatched"]) == ([None, [7, 7]], 1)


def cut_to(row: dict, n: int) -> dict:
    """The label with its answer cut to n tokens: other tokens, another key and another id."""
    ids = row["completion_ids"]
    cut = {"completion_ids": ids[:n], "completion_cut_ids": ids[n:], "ids_hash": number(f"ids {ids[:n]}")}
    return row | cut | {"example_id": artifact.checksum_bytes(f"{row['example_id']} {n}".encode())[:16]}


def test_what_is_cut_off_a_mismatched_answer_is_what_its_own_row_and_this_one_lack(tmp_path):
    # The answers are cut to 3 tokens for their own prompts; with at most 5 tokens, 2 are left of each here.
    found, _ = assembled(tmp_path, [cut_to(row, 3) for row in APART], kind="labels", max_length=5)
    by_name = {row["example_id"]: row for row in all_rows(found)}
    whole = {row["line"]: row["completion_ids"] for row in APART}
    for row in by_name.values():
        other = whole[by_name[row["kl_of"]]["line"]]
        assert (row["kl_ids"], row["kl_cut_ids"]) == (other[:2], other[2:])


def test_where_answers_are_cut_changes_no_partner_and_no_share(tmp_path):
    partners = []
    for rows in (APART, [cut_to(row, 3) for row in APART]):
        found, _ = assembled(tmp_path, rows, kind="labels", weights=(0.5,))
        lines = {row["example_id"]: row["line"] for row in all_rows(found)}
        partners.append({row["line"]: lines[row["kl_of"]] for row in all_rows(found)})
    assert partners[0] == partners[1] and 10 < len(partners[0]) < 50
