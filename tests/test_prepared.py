"""What was written is read back row by row, across shards, and a damaged shard is never read."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import IntegrityError, UsageError
from pipeline.prepared import IdLists, Prepared, Sequences, Writer, is_current
from pipeline.schema import PREPARED, QUARANTINE, sequence_key


def row(i: int, split: str = "train") -> dict:
    prompt, chosen, rejected = list(range(i + 1)), [100 + i] * (1 + i % 3), [200 + i] * (1 + i % 2)
    return {
        "example_id": f"id{i}",
        "split": split,
        "source": "a.jsonl",
        "line": i + 1,
        "prompt": f"why {i}?",
        "chosen": "yes",
        "rejected": "no",
        "prompt_ids": prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "chosen_key": sequence_key(prompt, chosen),
        "rejected_key": sequence_key(prompt, rejected),
        "boundary": "exact",
        "n_prompt": len(prompt),
        "n_chosen": len(chosen),
        "n_rejected": len(rejected),
    }


def write(folder, rows, per_shard=3, generation="aaaa", inputs=None) -> dict:
    writer = Writer(folder, generation, per_shard)
    for one in rows:
        writer.add(dict(one))
    return writer.commit({"inputs": inputs or {}})


# Training rows 0 to 6 and held-out rows 7 to 9, in the order train, held out, train, ...
ROWS = [row(i, "held_out" if i in (7, 8, 9) else "train") for i in (0, 7, 1, 2, 8, 3, 4, 9, 5, 6)]


@pytest.fixture
def prepared(tmp_path) -> Prepared:
    write(tmp_path / "prepared", ROWS)
    return Prepared(tmp_path / "prepared")


def test_rows_come_back_as_they_were_training_first(prepared):
    assert prepared.table().to_pylist() == [row(i, "held_out" if i > 6 else "train") for i in range(10)]
    assert prepared.table("train").to_pylist() == [row(i) for i in range(7)]
    assert prepared.table("held_out").to_pylist() == [row(i, "held_out") for i in (7, 8, 9)]
    assert prepared.table().schema == PREPARED


def test_shards_hold_no_more_rows_than_asked(prepared):
    shards = prepared.manifest["shards"]
    # 7 training rows are 3 + 3 + 1, the 3 held out are one shard.
    assert sorted((shard["split"], shard["rows"]) for shard in shards) == [
        ("held_out", 3),
        ("train", 1),
        ("train", 3),
        ("train", 3),
    ]
    assert {path.name for path in prepared.folder.glob("*.arrow")} == {shard["file"] for shard in shards}


def test_an_empty_split_is_an_empty_table(tmp_path):
    write(tmp_path, [row(0)])
    assert Prepared(tmp_path).table("held_out").equals(PREPARED.empty_table())


def test_datasets_maps_a_shard(prepared):
    from datasets import Dataset

    shard = next(s for s in prepared.manifest["shards"] if s["split"] == "held_out")
    found = Dataset.from_file(str(prepared.folder / shard["file"]))
    assert found["example_id"] == ["id7", "id8", "id9"] and found[1]["prompt_ids"] == list(range(9))


# -- duplicates and quarantine ---------------------------------------------------------------------------------------


def test_duplicates_are_kept_under_ids_of_their_own(tmp_path):
    writer = Writer(tmp_path, "aaaa", 2)
    for one in [row(0), row(1), row(0), row(0), row(1)]:
        writer.add(one)
    writer.commit({"inputs": {}})
    assert writer.duplicates == 3
    table = Prepared(tmp_path).table()
    assert table["example_id"].to_pylist() == ["id0", "id1", "id0-2", "id0-3", "id1-2"]
    # The sequences are the same, and so are scored once.
    assert len(set(table["chosen_key"].to_pylist())) == 2


def test_quarantined_records_are_kept_with_their_bytes_and_counted(tmp_path):
    writer = Writer(tmp_path, "aaaa", 2)
    bad = [
        {"source": "a.jsonl", "line": 3, "reason": "malformed JSON", "detail": "char 0", "raw": b"\xff\x00{"},
        {"source": "a.jsonl", "line": 9, "reason": "malformed JSON", "detail": "", "raw": b"x"},
        {"source": "a.jsonl", "line": 11, "reason": "empty prompt", "detail": "", "raw": b"{}"},
    ]
    for one in bad:
        writer.quarantine(one)
    writer.add(row(0))
    manifest = writer.commit({"inputs": {}})
    assert writer.n_quarantined == 3 and writer.reasons == {"malformed JSON": 2, "empty prompt": 1}
    table = pq.read_table(tmp_path / "quarantine.parquet")
    assert table.schema.equals(QUARANTINE) and table.to_pylist() == bad
    assert manifest["quarantine"]["rows"] == 3


# -- manifest --------------------------------------------------------------------------------------------------------


def test_before_the_manifest_there_is_no_preparation(tmp_path):
    writer = Writer(tmp_path, "aaaa", 1)
    writer.add(row(0))  # its shard is on disk, its manifest is not
    assert list(tmp_path.glob("*.arrow"))
    with pytest.raises(UsageError, match="no finished preparation"):
        Prepared(tmp_path)
    assert not is_current(tmp_path, {})


def test_a_new_preparation_replaces_the_old_and_drops_its_shards(tmp_path):
    write(tmp_path, ROWS, generation="aaaa")
    old = Prepared(tmp_path)
    first = old.table("train")
    write(tmp_path, [row(3)], generation="bbbb")
    new = Prepared(tmp_path)
    assert new.table().to_pylist() == [row(3)] and new.id != old.id
    assert [path.name for path in tmp_path.glob("*.arrow")] == ["train-bbbb-00000.arrow"]
    # Who had the old one open still reads it.
    assert first["example_id"].to_pylist() == [f"id{i}" for i in range(7)]


def test_the_same_rows_give_the_same_id(tmp_path):
    write(tmp_path / "a", ROWS)
    write(tmp_path / "b", ROWS)
    assert Prepared(tmp_path / "a").id == Prepared(tmp_path / "b").id


def test_current_means_the_same_inputs_and_no_damage(tmp_path):
    write(tmp_path, ROWS, inputs={"data": "x"})
    assert is_current(tmp_path, {"data": "x"}) is True
    assert is_current(tmp_path, {"data": "y"}) is False
    next(tmp_path.glob("train-*.arrow")).unlink()
    assert is_current(tmp_path, {"data": "x"}) is False


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damages", "found"),
    [
        (flip, "other bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "were written"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_a_damaged_shard_is_an_integrity_error_that_names_it(prepared, damages, found):
    shard = prepared.manifest["shards"][-1]["file"]
    damages(prepared.folder / shard)
    with pytest.raises(IntegrityError, match=f"{shard} .*{found}.*prepare again"):
        Prepared(prepared.folder)


# -- id lists and sequences ------------------------------------------------------------------------------------------

LISTS = [[1], [2, 3], [], [4, 5, 6], [7], [8, 9]]


@pytest.mark.parametrize("cuts", [[6], [1, 5], [2, 0, 1, 3], [1] * 6], ids=str)
def test_id_lists_are_right_across_chunks(cuts):
    chunks, start = [], 0
    for n in cuts:
        chunks.append(pa.array(LISTS[start : start + n], pa.list_(pa.int32())))
        start += n
    lists = IdLists(pa.chunked_array(chunks))
    assert [lists[i].tolist() for i in range(6)] == LISTS
    assert lists[3].dtype == np.int32
    with pytest.raises(IndexError):
        lists[6]


def test_id_lists_are_right_in_a_slice():
    column = pa.chunked_array([pa.array(LISTS[:3], pa.list_(pa.int32())), pa.array(LISTS[3:], pa.list_(pa.int32()))])
    lists = IdLists(column.slice(1, 4))
    assert [lists[i].tolist() for i in range(4)] == LISTS[1:5]


def test_id_lists_are_views_of_the_map(prepared):
    before = pa.total_allocated_bytes()
    lists = IdLists(prepared.table()["prompt_ids"])
    ids = lists[9]
    assert ids.base is not None and not ids.flags.owndata and not ids.flags.writeable
    assert pa.total_allocated_bytes() == before


def test_slots_alternate_chosen_and_rejected(prepared):
    table = prepared.table()
    sequences = Sequences(table)
    for i, expected in enumerate(table.to_pylist()):
        chosen, rejected = sequences[2 * i], sequences[2 * i + 1]
        assert chosen.prompt_ids.tolist() == rejected.prompt_ids.tolist() == expected["prompt_ids"]
        assert chosen.completion_ids.tolist() == expected["chosen_ids"]
        assert rejected.completion_ids.tolist() == expected["rejected_ids"]
        # What is read is what the key was made of.
        assert (chosen.key(), rejected.key()) == (expected["chosen_key"], expected["rejected_key"])


def test_pairs_come_in_the_order_asked_for(prepared):
    chosen, rejected = Sequences(prepared.table()).pairs([9, 0, 4])
    assert [len(sequence.prompt_ids) for sequence in chosen] == [10, 1, 5]
    assert [sequence.completion_ids[0] for sequence in rejected] == [209, 200, 204]
