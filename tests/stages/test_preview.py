"""preview: what the model will see, and nothing written."""

import json

from conftest import write_config


def shown(prefcache, *arguments):
    return json.loads(prefcache("preview", *arguments, "--json").stdout)


def test_ids_are_those_that_prepare_writes(prefcache, config, tmp_path):
    from pipeline.stored.prepared import Prepared

    previewed = shown(prefcache, config, "-n", 5)["examples"]
    assert not (tmp_path / "runs").exists()
    prefcache("prepare", config)
    rows = {row["line"]: row for row in Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist()}
    assert len(previewed) == 5
    for example in previewed:
        row = rows[example["line"]]
        for part in example["parts"]:
            assert [token["id"] for token in part["tokens"]] == row[f"{part['name']}_ids"]


def test_pieces_are_the_text_and_special_tokens_are_marked(prefcache, model, tmp_path):
    record = {"prompt": "why \u00e9\u4e2d\U0001f600?", "chosen": "the \u4e2d\u6587", "rejected": "a\tb"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    (example,) = shown(prefcache, write_config(tmp_path, model))["examples"]
    text = {part["name"]: "".join(token["text"] for token in part["tokens"]) for part in example["parts"]}
    assert text == {
        "prompt": f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n",
        "chosen": f"{record['chosen']}<|im_end|>\n",
        "rejected": f"{record['rejected']}<|im_end|>\n",
    }
    special = [token["text"] for part in example["parts"] for token in part["tokens"] if token["special"]]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_end|>"]


def test_what_keep_start_cuts_is_shown_as_cut(prefcache, model, tmp_path):
    record = {"prompt": "why?", "chosen": "red " * 60, "rejected": "blue"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    config = write_config(tmp_path, model)
    settings = ["--set", "prepare.max_length=40", "--set", "prepare.too_long=keep_start"]
    prompt, chosen, rejected = shown(prefcache, config, *settings)["examples"][0]["parts"]
    assert prompt["n_tokens"] + chosen["n_tokens"] == 40
    assert sum(token["cut"] for token in chosen["tokens"]) == chosen["n_cut"] > 0
    assert rejected["n_cut"] == 0
    plain = prefcache("preview", config, *settings).stdout
    assert "[cut here]" in plain and f"{chosen['n_cut']} more cut" in plain


def test_what_keep_end_leaves_out_is_shown(prefcache, model, tmp_path):
    turns = [("user", "the first question, long ago"), ("assistant", "red"), ("user", "the last one?")]
    record = {"prompt": [{"role": r, "content": c} for r, c in turns], "chosen": "green", "rejected": "blue"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    config = write_config(tmp_path, model)
    full = shown(prefcache, config)["examples"][0]["parts"][0]["n_tokens"]
    settings = ["--set", f"prepare.max_prompt_length={full - 1}", "--set", "prepare.too_long=keep_end"]
    (example,) = shown(prefcache, config, *settings)["examples"]
    assert example["parts"][0]["cut_turns"] == "user: the first question, long ago\nassistant: red"
    assert example["cut_prompt"] == full - example["parts"][0]["n_tokens"] > 0


def test_a_record_for_the_quarantine_says_why(prefcache, model, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "why?", "chosen": "a", "rejected": "b"}\n{"prompt": 1}\nnot json\n'
    )
    examples = shown(prefcache, write_config(tmp_path, model))["examples"]
    assert [example.get("reason") for example in examples] == [None, "wrong type", "malformed JSON"]


def test_control_characters_do_not_reach_the_terminal(prefcache, model, tmp_path):
    record = {"prompt": "why \x1b[2J?", "chosen": "\x1b]0;title\x07a", "rejected": "b"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    assert "\x1b" not in prefcache("preview", write_config(tmp_path, model)).stdout


def test_ids_are_printed_when_asked_for(prefcache, config):
    (first, *_) = shown(prefcache, config, "-n", 1)["examples"][0]["parts"]
    line = " ".join(str(token["id"]) for token in first["tokens"])
    assert line in " ".join(prefcache("preview", config, "-n", 1, "--ids").stdout.split())


def test_formats_lists_every_format_with_its_columns(prefcache):
    from pipeline.preparing.formats import FORMATS

    listed = prefcache("formats").stdout
    for each in FORMATS.values():
        assert f"\n{each.name}\n" in f"\n{listed}" and each.help in listed
        assert all(column in listed for column in each.columns)
    assert prefcache("formats", "hh").stdout.startswith("hh\n")
    assert "The nearest is nectar" in prefcache("formats", "nektar", code=2).stderr


def test_no_place_to_write_to_need_be_named(prefcache, model, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "why?", "chosen": "a", "rejected": "b"}\n')
    settings = ["--set", f"model={model}", "--set", "prepare.data=pairs.jsonl"]
    assert "chosen (" in prefcache("preview", *settings).stdout
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_formats_as_json(prefcache):
    (found,) = json.loads(prefcache("formats", "pku_saferlhf", "--json").stdout)
    assert found["options"] == {"by": "better"} and "response_0" in found["columns"] and found["recognised"]
