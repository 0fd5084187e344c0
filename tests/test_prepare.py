"""prepare, as a user runs it: exact ids out, every record accounted for."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import pair, write_config, write_pairs

from pipeline.prepared import Prepared


def lines(path: Path, *records) -> Path:
    raw = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def test_prompt_ids_are_what_the_model_sees_when_asked(prefcache, config, model, tmp_path):
    from transformers import AutoTokenizer

    prefcache("prepare", config)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist()
    assert len(rows) == 60
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert row["prompt_ids"] == ids
        for side in ("chosen", "rejected"):
            whole = [*asked, {"role": "assistant", "content": row[side]}]
            assert ids + row[f"{side}_ids"] == tokenizer.apply_chat_template(whole, return_dict=False)


def test_strings_and_message_lists_give_the_same_ids(prefcache, model, tmp_path):
    as_text = [pair(i) for i in range(30)]
    as_messages = [
        {
            "prompt": [{"role": "user", "content": p["prompt"]}],
            "chosen": [{"role": "assistant", "content": p["chosen"]}],
            "rejected": [{"role": "assistant", "content": p["rejected"]}],
        }
        for p in as_text
    ]
    keys = []
    for name, records in (("text", as_text), ("messages", as_messages)):
        lines(tmp_path / "pairs.jsonl", *records)
        prefcache("prepare", write_config(tmp_path, model), "--set", f"out={name}")
        table = Prepared(tmp_path / name / "prepared").table()
        keys.append(table.select(["example_id", "split", "chosen_key", "rejected_key", "prompt"]).to_pylist())
    assert keys[0] == keys[1]


BAD = {
    "malformed JSON": b'{"prompt": "a"',
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "not an object": [1, 2],
    "missing column": {"prompt": "a", "chosen": "b"},
    "wrong type": {"prompt": "a", "chosen": 7, "rejected": "b"},
    "empty answer": {"prompt": "a", "chosen": "  ", "rejected": "b"},
    "empty prompt": {"prompt": "", "chosen": "b", "rejected": "c"},
    "chosen equals rejected": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "lone surrogate": b'{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}',
    "prompt too long": {"prompt": "red " * 600, "chosen": "b", "rejected": "c"},
    "too long": {"prompt": "a", "chosen": "red " * 600, "rejected": "c"},
    "prompt ends with an assistant turn": {
        "prompt": [{"role": "assistant", "content": "a"}],
        "chosen": "b",
        "rejected": "c",
    },
}


def test_every_bad_record_is_in_quarantine_with_its_reason_and_line(prefcache, model, tmp_path):
    good = [pair(i) for i in range(20)]
    lines(tmp_path / "pairs.jsonl", *good[:10], *BAD.values(), *good[10:])
    arguments = ["--set", "prepare.max_quarantine=0.5", "--set", "prepare.max_length=500"]
    done = prefcache("prepare", write_config(tmp_path, model), "--json", *arguments)
    result = json.loads(done.stdout)
    assert result["records"] == 20 + len(BAD) == result["train"] + result["held_out"] + len(BAD)
    rows = pq.read_table(tmp_path / "runs/tiny/prepared/quarantine.parquet").to_pylist()
    assert {row["reason"]: row["line"] for row in rows} == {reason: 11 + i for i, reason in enumerate(BAD)}
    assert rows[0]["raw"] == BAD["malformed JSON"]


def test_more_bad_records_than_allowed_end_with_exit_code_3_after_the_quarantine_is_written(prefcache, model, tmp_path):
    lines(tmp_path / "pairs.jsonl", *[pair(i) for i in range(8)], {"prompt": "a"}, {"prompt": "b"})
    done = prefcache("prepare", write_config(tmp_path, model), code=3)
    assert "2 of 10 records" in done.stderr and "2 missing column: 'chosen'" in done.stderr
    assert pq.read_metadata(tmp_path / "runs/tiny/prepared/quarantine.parquet").num_rows == 2
    assert not (tmp_path / "runs/tiny/prepared/manifest.json").exists()


def test_a_second_run_does_nothing_and_says_so(prefcache, config, tmp_path):
    prefcache("prepare", config)
    manifest = tmp_path / "runs/tiny/prepared/manifest.json"
    before = manifest.read_bytes()
    assert "nothing to do" in prefcache("prepare", config).stderr
    assert manifest.read_bytes() == before


def test_the_same_input_gives_the_same_bytes(prefcache, config, tmp_path):
    shards = []
    for _ in range(2):
        prefcache("prepare", config)
        folder = tmp_path / "runs/tiny/prepared"
        shards.append({file.name: file.read_bytes() for file in folder.iterdir()})
        for file in folder.iterdir():
            file.unlink()
    assert shards[0] == shards[1]


def test_appended_data_moves_no_example_to_the_other_split(prefcache, config, tmp_path):
    def splits() -> dict[str, str]:
        table = Prepared(tmp_path / "runs/tiny/prepared").table()
        return dict(zip(table["example_id"].to_pylist(), table["split"].to_pylist(), strict=True))

    prefcache("prepare", config)
    before = splits()
    write_pairs(tmp_path / "pairs.jsonl", 30, start=60, mode="a")
    prefcache("prepare", config)
    after = splits()
    assert len(after) == 90 and before.items() <= after.items()
    # Old shards are gone: the folder holds what its manifest names.
    assert len(list((tmp_path / "runs/tiny/prepared").glob("*.arrow"))) == 2


def test_a_split_of_several_shards_is_read_in_order(prefcache, config, tmp_path):
    prefcache("prepare", config, "--set", "prepare.rows_per_shard=7")
    table = Prepared(tmp_path / "runs/tiny/prepared").table("train")
    assert table["line"].to_pylist() == sorted(table["line"].to_pylist())
    assert table["prompt_ids"].num_chunks > 3


@pytest.mark.parametrize("shape", ["text", "messages"])
def test_a_tokenizer_without_a_chat_template_is_refused_with_the_remedy(prefcache, config, model, tmp_path, shape):
    import shutil

    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    done = prefcache("prepare", config, "--set", f"model={bare}", code=2)
    assert "no chat template" in done.stderr and "prepare.template: none" in done.stderr
    if shape == "text":
        prefcache("prepare", config, "--set", f"model={bare}", "--set", "prepare.template=none")


def test_prompts_that_differ_in_spaces_alone_fall_on_one_side(prefcache, model, tmp_path):
    records = [{**pair(i), "prompt": f"{space}why {i}?{space}"} for i in range(40) for space in ("", " ", "\n")]
    lines(tmp_path / "pairs.jsonl", *records)
    prefcache("prepare", write_config(tmp_path, model))
    rows = Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist()
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["prompt"].strip(), set()).add(row["split"])
    assert len(sides) == 40 and all(len(side) == 1 for side in sides.values())


@pytest.mark.parametrize(
    "expression", ["1 / 0", "range(10**9) | list", "messages[99].content.x", "none.x.y", "[][3]()"]
)
def test_whatever_a_template_raises_sends_the_record_to_quarantine(prefcache, config, tmp_path, expression):
    (tmp_path / "odd.jinja").write_text("{{ " + expression + " }}")
    done = prefcache("prepare", config, "--set", "prepare.chat_template=odd.jinja", code=3)
    assert "60 of 60 records" in done.stderr and "template refuses" in done.stderr


def test_a_text_far_too_long_is_not_tokenized_first(prefcache, model, tmp_path):
    # One word of 5 MB: the tokenizer's merges would take minutes over it.
    lines(tmp_path / "pairs.jsonl", *[pair(i) for i in range(20)], {**pair(20), "prompt": "x" * 5_000_000})
    result = json.loads(prefcache("prepare", write_config(tmp_path, model), "--json").stdout)
    assert result["quarantined"] == {"too long": 1}
