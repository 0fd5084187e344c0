"""What a preparation wrote is read back row by row, across shards, and a damaged shard is never read."""

import numpy as np
import pyarrow as pa
import pytest

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.schema import PREPARED, QUARANTINE, sequence_key
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.freshness import check_preparation
from prefcache.pipeline.stored.prepared import IdLists, Prepared, Sequences, answer_names, sequence_table
from prefcache.pipeline.stored.records import PreparedManifest
from tests.helpers import examples
from tests.helpers.caches import flip
from tests.helpers.examples import pair


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
        "chosen_score": None,
        "rejected_score": None,
        "prompt_ids": prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "chosen_key": sequence_key(prompt, chosen),
        "rejected_key": sequence_key(prompt, rejected),
        "boundary": "exact",
        "n_prompt": len(prompt),
        "n_chosen": len(chosen),
        "n_rejected": len(rejected),
        "n_chosen_counted": 1,
        "n_rejected_counted": 1,
        "chosen_spans": [0, 1],
        "rejected_spans": [0, 1],
        "n_common": 0,
        "cut_prompt": 0,
        "images": [],
        "cut_chosen": 0,
        "cut_rejected": 0,
        "chosen_cut_ids": [],
        "rejected_cut_ids": [7] * (i % 2),
    }


def label(i: int, kl: list[int] | None) -> dict:
    prompt, completion = list(range(i + 1)), [100 + i] * (1 + i % 3)
    return {
        "example_id": f"id{i}",
        "split": "train",
        "prompt_ids": prompt,
        "completion_ids": completion,
        "completion_key": sequence_key(prompt, completion),
        "n_prompt": len(prompt),
        "n_completion": len(completion),
        "kl_ids": kl,
        "kl_key": kl and sequence_key(prompt, kl),
        "n_kl": kl and len(kl),
    }


def write(folder, rows, kind="pairs", inputs=None) -> None:
    """A prepared folder of shards of three rows at most; those of the held-out split are named first."""
    shards = []
    for split in ("held_out", "train"):
        table = pa.Table.from_pylist([one for one in rows if one["split"] == split], schema=PREPARED[kind])
        for at in range(0, len(table), 3):
            data = artifact.arrow_stream(table.slice(at, 3))
            path = folder / f"{split}-{at // 3}.arrow"
            shards.append(artifact.commit_file(path, data, split=split, rows=min(3, len(table) - at)))
    quarantine = artifact.commit_file(folder / "quarantine.parquet", artifact.parquet(QUARANTINE.empty_table()), rows=0)
    manifest = PreparedManifest.make(inputs=inputs or {}, kind=kind, shards=shards, quarantine=quarantine)
    manifest.commit(folder / artifact.MANIFEST)


# Training rows 0 to 6 and held-out rows 7 to 9.
ROWS = [row(i, "held_out" if i > 6 else "train") for i in range(10)]


@pytest.fixture
def prepared(tmp_path) -> Prepared:
    write(tmp_path / "prepared", ROWS)
    return Prepared(tmp_path / "prepared")


def test_rows_come_back_as_they_were_training_first(prepared):
    assert prepared.table().to_pylist() == [row(i, "held_out" if i > 6 else "train") for i in range(10)]
    assert prepared.table("train").to_pylist() == [row(i) for i in range(7)]
    assert prepared.table("held_out").to_pylist() == [row(i, "held_out") for i in (7, 8, 9)]
    assert prepared.table().schema == PREPARED["pairs"]


def test_an_empty_split_is_an_empty_table(tmp_path):
    write(tmp_path, [row(0)])
    assert Prepared(tmp_path).table("held_out").equals(PREPARED["pairs"].empty_table())
    write(tmp_path, [], "labels")
    assert Prepared(tmp_path).table().equals(PREPARED["labels"].empty_table())


def test_datasets_maps_a_shard(prepared):
    from datasets import Dataset

    shard = next(s for s in prepared.manifest.shards if s.split == "held_out")
    found = Dataset.from_file(str(prepared.folder / shard.file))
    assert found["example_id"] == ["id7", "id8", "id9"] and found[1]["prompt_ids"] == list(range(9))


# -- earlier versions ------------------------------------------------------------------------------------------------


def test_examples_of_an_earlier_version_are_read_with_all_their_tokens_counting(tmp_path):
    pairs = [pair(0, [1], [2, 3], [4]), pair(1, [1], [5], [6, 7, 8])]
    labels = [examples.label(0, [1], [2, 3], True, kl=[4]), examples.label(1, [1], [5], False)]
    for name, rows in (("pairs", pairs), ("labels", labels)):
        examples.prepared(tmp_path / name, rows)
        examples.make_older(tmp_path / name)
        found = Prepared(tmp_path / name).table().select(_common(name))
        assert found.to_pylist() == examples.table(rows, name).select(_common(name)).to_pylist()


def _common(kind):
    return [name for name in PREPARED[kind].names if name != "n_common"]


def test_an_earlier_version_is_refused_by_who_asks_what_counts(tmp_path):
    examples.prepared(tmp_path, [pair(0, [1], [2, 3], [4])]).refuse_older()
    examples.make_older(tmp_path)
    with pytest.raises(UsageError, match=r"prepared by an earlier version.*Prepare again.*what is scored is kept"):
        Prepared(tmp_path).refuse_older()


# -- manifest --------------------------------------------------------------------------------------------------------


def test_before_the_manifest_there_is_no_preparation(tmp_path):
    write(tmp_path, ROWS)
    artifact.retract_manifest(tmp_path)
    with pytest.raises(UsageError, match="no finished preparation"):
        Prepared(tmp_path)
    assert not check_preparation(tmp_path, {}).is_stored


def test_current_means_the_same_inputs_and_no_damage(tmp_path):
    write(tmp_path, ROWS, inputs={"made_from": "x"})
    assert check_preparation(tmp_path, {"made_from": "x"}).is_fresh
    assert check_preparation(tmp_path, {"made_from": "y"}).reasons == ["made_from x (now y)"]
    for damaged in ("train-0.arrow", "quarantine.parquet"):
        write(tmp_path, ROWS, inputs={"made_from": "x"})
        flip(tmp_path / damaged)
        (reason,) = check_preparation(tmp_path, {"made_from": "x"}).reasons
        assert reason == f"{damaged} has other bytes than were written (checksum)"


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
    shard = prepared.manifest.shards[-1].file
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


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def labels(tmp_path) -> pa.Table:
    """Five labels; the second has no mismatched answer."""
    write(tmp_path, [label(i, None if i == 1 else [7] * (i + 1)) for i in range(5)], "labels")
    return Prepared(tmp_path).table()


def test_slots_of_labels_alternate_completion_and_mismatched_answer_which_one_may_lack(prepared, labels):
    assert answer_names(labels) == ("completion", "kl")
    assert answer_names(prepared.table()) == ("chosen", "rejected")
    found = sequence_table(labels).to_pylist()
    # Slot 2 * 1 + 1 would be the missing one.
    assert sorted(row["slot"] for row in found) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    sequences = Sequences(labels)
    for i, expected in enumerate(labels.to_pylist()):
        assert sequences[2 * i].key() == expected["completion_key"]
        assert not expected["kl_key"] or sequences[2 * i + 1].key() == expected["kl_key"]
    for row in found:
        sequence = sequences[row["slot"]]
        assert (sequence.key(), sequence.n_tokens) == (row["key"], row["n"])
        assert len(sequence.completion_ids) == row["n_completion"]


def test_two_sequences_of_every_pair_are_scored(prepared):
    assert sorted(sequence_table(prepared.table())["slot"].to_pylist()) == list(range(20))
