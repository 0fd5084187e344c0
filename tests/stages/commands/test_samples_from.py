"""Prompts of one's own, answered before and after training: asked as prepare would ask them."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.preparing.sample_prompts import encode_prompts
from prefcache.pipeline.stored.prepared import Prepared
from tests.helpers.project import options, pair, write_config, write_pairs

TURNS = [
    {"role": "system", "content": "sing"},
    {"role": "user", "content": "why red"},
    {"role": "assistant", "content": "the bird"},
    {"role": "user", "content": "and blue"},
]
ENTRIES = ["why red and red", TURNS, {"prompt": "the cat", "system": "be a fish"}, {"messages": TURNS[1:]}]
FILES = {
    "own.txt": "why red and red\n\nthe cat\n",
    "own.json": json.dumps(ENTRIES),
    "own.jsonl": "".join(json.dumps(entry) + "\n" for entry in ENTRIES),
}


def own_rows(folder: Path) -> list[dict]:
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    return [row for row in rows if row["example_id"].startswith("prompt-")]


@pytest.mark.parametrize("template", ["chat", "none"])
def test_prompts_get_the_ids_that_prepare_gives_them(prefcache, config, model, tmp_path, template):
    prompts = [pair(i)["prompt"] for i in range(5)] + ([TURNS] if template == "chat" else [])
    answers = [[{"role": "assistant", "content": text}] if template == "chat" else text for text in ("yes", "no")]
    records = [
        {"prompt": [{"role": "user", "content": each}] if template == "chat" and isinstance(each, str) else each}
        | dict(zip(("chosen", "rejected"), answers, strict=True))
        for each in prompts
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "own.json").write_text(json.dumps(prompts))
    prefcache("prepare", config, *options("prepare.held_out=0", f"prepare.template={template}"))
    prepared = Prepared(tmp_path / "runs/tiny/prepared")
    encoded = encode_prompts(tmp_path / "own.json", model, prepared.manifest)
    assert [ids.tolist() for _, ids in encoded] == prepared.table()["prompt_ids"].to_pylist()
    # A file of preference data may be named as it is: its prompts are asked.
    again = encode_prompts(tmp_path / "pairs.jsonl", model, prepared.manifest)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(encoded, again, strict=True))


@pytest.mark.parametrize("name", FILES)
def test_answers_before_and_after_are_those_of_plain_transformers(prefcache, scored, model, tmp_path, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / name).write_text(FILES[name])
    settings = options(f"train.samples_from={name}", "train.samples=2", "train.learning_rate=1e-2")
    prefcache("train", scored, *settings)
    run = tmp_path / "runs/tiny/trained"
    rows = own_rows(run)
    asked = {
        "own.txt": [[{"role": "user", "content": text}] for text in ("why red and red", "the cat")],
    }.get(
        name,
        [
            [{"role": "user", "content": "why red and red"}],
            TURNS,
            [{"role": "system", "content": "be a fish"}, {"role": "user", "content": "the cat"}],
            TURNS[1:],
        ],
    )
    assert len(rows) == len(asked) and len(pq.read_table(run / "samples.parquet")) == 2 + len(asked)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for folder, when in ((model, "before"), (run / "model", "after")):
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        for row, messages in zip(rows, asked, strict=True):
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = plain.generate(**inputs, do_sample=False, max_new_tokens=8)
            text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert row[when] == text.strip()
    # It is the content of the file that makes the run, not its name.
    (tmp_path / f"copy{Path(name).suffix}").write_text(FILES[name])
    settings[1] = f"train.samples_from=copy{Path(name).suffix}"
    assert "nothing to do" in prefcache("train", scored, *settings).stderr


def test_only_ones_own_are_answered_without_any_held_out(prefcache, model, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 16)
    (tmp_path / "own.txt").write_text("why red\nwhy blue\n")
    config = write_config(
        tmp_path, model, samples=0, samples_from="own.txt", kinds={"preferred": "x.*", "rejected": "y"}
    )
    for stage in ("prepare", "score", "train"):
        done = prefcache(stage, config, "--set", "prepare.held_out=0")
    rows = own_rows(tmp_path / "runs/tiny/trained")
    assert [row["prompt"] for row in rows] == ["why red", "why blue"] and rows[0]["before_kind"] == "neither"
    assert "asked   why red" in done.stdout
    page = tmp_path / "report.html"
    prefcache("report", "runs/tiny", "--output", page)
    html = page.read_text()
    assert "your own prompts (<code>train.samples_from</code>)" in html and html.count("your prompt</span>") == 2


def test_other_prompts_make_another_run(prefcache, scored, tmp_path):
    (tmp_path / "own.txt").write_text("why red\n")
    settings = options("train.samples_from=own.txt", "train.max_steps=2")
    prefcache("train", scored, *settings)
    (tmp_path / "own.txt").write_text("why blue\n")
    assert "nothing to do" not in prefcache("train", scored, *settings).stderr
    assert [row["prompt"] for row in own_rows(tmp_path / "runs/tiny/trained")] == ["why blue"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.txt", "\n \n", "holds no prompt. Expected text, a list of messages"),
        ("own.csv", "prompt\nx\n", "expected .txt, .json or .jsonl"),
        ("own.json", "{}", "holds no list, but dict; expected a list of prompts"),
        ("own.json", "[1]", "prompt 1 cannot be used: wrong type"),
        ("own.jsonl", '"x"\n{"text": "y"}\n', "prompt 2 cannot be used: missing column"),
        ("own.jsonl", '"x"\n{\n', "is not JSONL"),
        ("own.json", '["x", " "]', "prompt 2 cannot be used: empty prompt"),
        (
            "own.jsonl",
            '{"prompt": "x", "image": "a.png"}\n',
            "prompt 1 cannot be used: image in the prompt (prompts to sample from are text alone)",
        ),
        (
            "own.json",
            '[[{"role": "assistant", "content": "x"}]]',
            "prompt 1 cannot be used: prompt ends with an assistant",
        ),
        ("own.txt", "word " * 600, "prompt 1 has "),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_before_any_model_is_loaded(
    prefcache, scored, tmp_path, name, content, message
):
    (tmp_path / name).write_text(content)
    done = prefcache("train", scored, *options(f"train.samples_from={name}"), code=2)
    assert "train.samples_from" in done.stderr and message in done.stderr
    assert not (tmp_path / "runs/tiny/trained/provenance.json").exists()


def test_a_missing_file_is_named(prefcache, scored):
    said = prefcache("train", scored, *options("train.samples_from=nowhere.txt"), code=2).stderr
    assert "nowhere.txt" in said and "train.samples_from" in said
