"""preview: what the model will see, and nothing written."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from prefcache.pipeline.preparing.formats import FORMATS
from prefcache.pipeline.stored.prepared import Prepared
from tests.helpers import vision_models
from tests.helpers.conversations import assistant, user
from tests.helpers.project import options, write_config
from tests.helpers.vision_models import picture


def shown(prefcache, *arguments) -> dict[str, Any]:
    return json.loads(prefcache("preview", *arguments, "--json").stdout)


@pytest.fixture
def preview(prefcache, model, tmp_path) -> Callable[..., Any]:
    """The preview of one record with these settings: its text for a person, and the example as JSON."""
    config = write_config(tmp_path, model)

    def run(record: dict[str, Any], *settings: str) -> tuple[str, dict[str, Any]]:
        (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
        options = [argument for setting in settings for argument in ("--set", setting)]
        (example,) = shown(prefcache, config, *options)["examples"]
        return prefcache("preview", config, *options).stdout, example

    return run


def test_ids_are_those_that_prepare_writes(prefcache, config, tmp_path):
    previewed = shown(prefcache, config, "-n", 5)["examples"]
    assert not (tmp_path / "runs").exists()
    prefcache("prepare", config)
    rows = {row["line"]: row for row in Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist()}
    assert len(previewed) == 5
    for example in previewed:
        for part in example["parts"]:
            ids = [token["id"] for token in part["tokens"]]
            assert ids == rows[example["line"]][f"{part['name']}_ids"]
    # They are printed when asked for.
    line = " ".join(str(token["id"]) for token in previewed[0]["parts"][0]["tokens"])
    assert line in " ".join(prefcache("preview", config, "-n", 1, "--ids").stdout.split())


def test_texts_of_tokens_add_up_and_special_tokens_are_marked(preview):
    record = {"prompt": "why \u00e9\u4e2d\U0001f600?", "chosen": "the \u4e2d\u6587", "rejected": "a\tb"}
    _, example = preview(record)
    text = {part["name"]: "".join(token["text"] for token in part["tokens"]) for part in example["parts"]}
    assert text == {
        "prompt": f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n",
        "chosen": f"{record['chosen']}<|im_end|>\n",
        "rejected": f"{record['rejected']}<|im_end|>\n",
    }
    special = [token["text"] for part in example["parts"] for token in part["tokens"] if token["special"]]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_end|>"]


def test_plain_text_that_becomes_a_turn_is_said(preview):
    record = {"prompt": "why?", "chosen": "red", "rejected": "blue"}
    plain, example = preview(record)
    assert example["plain_text"] and "plain text as one turn of the chat template" in plain
    plain, example = preview(record, "prepare.template=none")
    assert not example["plain_text"] and "plain text" not in plain
    assert not preview(record | {"prompt": [{"role": "user", "content": "why?"}]})[1]["plain_text"]


def test_tokens_that_do_not_count_are_told(preview):
    turns = [assistant("four"), user("and 2 + 3?")]
    record = {"prompt": [user("2 + 2?")], "chosen": [*turns, assistant("five")], "rejected": "no"}
    plain, example = preview(record)
    prompt, chosen, rejected = example["parts"]
    assert "".join(token["text"] for token in chosen["tokens"] if token["counts"]) == "four<|im_end|>\nfive<|im_end|>\n"
    assert rejected["n_counted"] == rejected["n_tokens"] and prompt["n_counted"] == 0
    assert f"chosen ({chosen['n_tokens']} tokens, {chosen['n_counted']} of them count)" in plain
    _, example = preview(record, "prepare.train_on=last_turn")
    chosen = example["parts"][1]
    assert "".join(token["text"] for token in chosen["tokens"] if token["counts"]) == "five<|im_end|>\n"
    _, example = preview(record, "prepare.train_on=all")
    assert all(token["counts"] for token in example["parts"][1]["tokens"])


def test_what_keep_start_cuts_is_shown_as_cut(preview):
    record = {"prompt": "why?", "chosen": "red " * 60, "rejected": "blue"}
    plain, example = preview(record, "prepare.max_length=40", "prepare.too_long=keep_start")
    prompt, chosen, rejected = example["parts"]
    assert prompt["n_tokens"] + chosen["n_tokens"] == 40
    assert sum(token["cut"] for token in chosen["tokens"]) == chosen["n_cut"] > 0
    assert rejected["n_cut"] == 0
    assert "[cut here]" in plain and f"{chosen['n_cut']} more cut" in plain


def test_what_keep_end_leaves_out_is_shown(preview):
    turns = [("user", "the first question, long ago"), ("assistant", "red"), ("user", "the last one?")]
    record = {"prompt": [{"role": r, "content": c} for r, c in turns], "chosen": "green", "rejected": "blue"}
    full = preview(record)[1]["parts"][0]["n_tokens"]
    _, example = preview(record, f"prepare.max_prompt_length={full - 1}", "prepare.too_long=keep_end")
    assert example["parts"][0]["cut_turns"] == "user: the first question, long ago\nassistant: red"
    assert example["cut_prompt"] == full - example["parts"][0]["n_tokens"] > 0


def test_a_record_for_the_quarantine_says_why(prefcache, model, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "why?", "chosen": "a", "rejected": "b"}\n{"prompt": 1}\nnot json\n'
    )
    examples = shown(prefcache, write_config(tmp_path, model))["examples"]
    assert [example.get("reason") for example in examples] == [None, "wrong type", "malformed JSON"]


def test_control_characters_do_not_reach_the_terminal(preview):
    assert "\x1b" not in preview({"prompt": "why \x1b[2J?", "chosen": "\x1b]0;title\x07a", "rejected": "b"})[0]


def test_words_and_emoji_are_whole_whatever_their_tokens(preview):
    # A joiner in an emoji and a non-joiner in a Persian word, each in tokens of its own: the tokenizer knows neither.
    emoji, persian = "\U0001f469\u200d\U0001f52c", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    plain, _ = preview({"prompt": "why?", "chosen": f"{emoji} {persian}", "rejected": "b\u200dc"})
    assert emoji in plain and persian in plain and "b<U+200D>c" in plain and "\ufffd" not in plain


def test_formats_lists_every_format_with_its_columns(prefcache):
    listed = prefcache("formats").stdout
    for each in FORMATS.values():
        assert f"\n{each.name}\n" in f"\n{listed}" and each.help in listed
        assert all(column in listed for column in each.columns)
    assert prefcache("formats", "hh").stdout.startswith("hh\n")
    # What one may stumble over, where one asks for the format.
    for name, note in (("llamafactory_openai", "detailed thinking off"), ("ms_swift", "send the record to quarantine")):
        assert note in " ".join(prefcache("formats", name).stdout.split()) and note not in listed
    assert "The nearest is nectar" in prefcache("formats", "nektar", code=2).stderr
    (one,) = json.loads(prefcache("formats", "pku_saferlhf", "--json").stdout)
    assert one["options"] == {"by": "better"} and "response_0" in one["columns"] and one["recognised"]


def test_no_place_to_write_to_need_be_named(prefcache, model, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "why?", "chosen": "a", "rejected": "b"}\n')
    settings = ["--set", f"model={model}", "--set", "prepare.data=pairs.jsonl"]
    assert "chosen (" in prefcache("preview", *settings).stdout
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_pictures_are_shown_by_their_tokens_and_left_out_ones_by_their_tags(prefcache, tmp_path):
    picture(60, 40, 1).save(tmp_path / "a.png")
    picture(33, 61, 2).save(tmp_path / "b.png")
    config = write_config(tmp_path, vision_models.save("qwen2.5-vl"))
    turns = [user("<image>the first?"), assistant("red"), user("<image>the last?")]
    record = {"messages": [*turns, assistant("green")], "rejected_response": "blue", "images": ["a.png", "b.png"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    (example,) = shown(prefcache, config)["examples"]
    prompt = example["parts"][0]
    n_image = [token["text"] for token in prompt["tokens"]].count("<|image_pad|>")
    assert n_image > 20 and prompt["n_tokens"] > n_image
    plain = prefcache("preview", config).stdout
    assert plain.count("<|image_pad|>[") == 2 and plain.count("<|image_pad|>") == 2
    settings = options(f"prepare.max_prompt_length={prompt['n_tokens'] - 1}", "prepare.too_long=keep_end")
    (example,) = shown(prefcache, config, *settings)["examples"]
    left_out = example["parts"][0]["cut_turns"]
    assert left_out.startswith("user: [image 60x40 ") and left_out.endswith("] the first?\nassistant: red")


def test_numbers_that_do_not_fit_are_shown(prefcache, tmp_path):
    config = write_config(tmp_path, vision_models.save("qwen2.5-vl"))
    good = {"prompt": [user("what?")], "chosen": [assistant("red")], "rejected": [assistant("blue")], "images": []}
    bad = good | {"prompt": [user("<image> and <image>?")], "images": ["a.png", "a.png", "a.png"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    (_, unusable) = shown(prefcache, config)["examples"]
    assert unusable["reason"] == "wrong number of images" and unusable["detail"].endswith(": 2, limit 3")
