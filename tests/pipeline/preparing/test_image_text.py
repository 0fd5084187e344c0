"""The ids of a prompt with images are those that the model's own processor gives."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoTokenizer

from prefcache.pipeline import image_processor
from prefcache.pipeline.config import Prepare
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.images import decode
from prefcache.pipeline.preparing.example import IMAGE_MARK
from prefcache.pipeline.preparing.part_worker import LateImagesError, PartWorker, PreparedPart
from prefcache.pipeline.preparing.resolved_config import resolve_config
from prefcache.pipeline.preparing.sources import open_source
from prefcache.pipeline.progress import Progress
from tests.helpers import vision_models
from tests.helpers.vision_models import picture

FAMILIES = tuple(vision_models.FAMILIES)
A, SAME_SIZE, B = picture(60, 40, 1), picture(60, 40, 2), picture(33, 61, 3)


def inline(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def turn(role: str, *parts: Any) -> dict[str, Any]:
    """A message of texts and pictures, as the processor itself takes it."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": role, "content": content}


def record(prompt: list[dict[str, Any]], chosen: Any = "Yes.", rejected: Any = "No.") -> dict[str, Any]:
    """The same messages in JSON, with each picture in its part."""
    written = json.loads(json.dumps(prompt, default=inline))
    return {"prompt": written, "chosen": chosen, "rejected": rejected} | (
        {}
        if isinstance(chosen, list)
        else {"chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}
    )


def prepare(folder: Path, tmp_path: Path, records: list[dict[str, Any]], **settings: Any) -> PreparedPart:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return prepare_file(folder, tmp_path, path, **settings)


def prepare_file(folder: Path, tmp_path: Path, path: Path, **settings: Any) -> PreparedPart:
    config = Prepare.model_validate({"data": [str(path)], "max_length": 4096} | settings)
    sources = [open_source(entry, tmp_path) for entry in config.sources]
    worker = PartWorker(resolve_config(config, folder, sources, Progress(quiet=True)))
    (chunk,) = sources[0].chunks()
    return worker.prepare(0, chunk)


def expected_ids(folder: Path, messages: list[dict[str, Any]], **asks: bool) -> list[int]:
    """What Transformers gives: the template's text, then the processor, called on the whole as TRL does."""
    processor = image_processor.load(folder)._processor
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False, **asks)
    pictures = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    images = [pictures] if pictures else None
    return list(processor(text=[text], images=images, add_special_tokens=False)["input_ids"][0])


PROMPTS = {
    "one picture": [turn("user", A, "What is it?")],
    "a picture after text": [turn("user", "Look: ", A, " What is it?")],
    "pictures of one size": [turn("user", A, SAME_SIZE, "Which is first?")],
    "pictures of several sizes": [turn("user", A, "or", B, "?")],
    "a picture in a later turn": [turn("user", "Hi."), turn("assistant", "Hello."), turn("user", B, "And this?")],
    "pictures in two turns": [turn("user", A, "This?"), turn("assistant", "A box."), turn("user", B, "And this?")],
    "text alone": [turn("user", "What is it?")],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_ids_are_the_processors_own(family, tmp_path):
    folder = vision_models.save(family)
    part = prepare(folder, tmp_path, [record(prompt) for prompt in PROMPTS.values()])
    assert not part.quarantined
    for (name, prompt), row in zip(PROMPTS.items(), part.table.to_pylist(), strict=True):
        assert row["prompt_ids"] == expected_ids(folder, prompt, add_generation_prompt=True), name
        for answer, text in (("chosen", "Yes."), ("rejected", "No.")):
            whole = expected_ids(folder, [*prompt, turn("assistant", text)])
            assert row["prompt_ids"] + row[f"{answer}_ids"] == whole, name


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl", "gemma3", "llava-onevision", "internvl", "mistral3"])
def test_trls_vision_collator_gives_the_same_ids(family, tmp_path):
    # SmolVLM's processor renders no template without what processes videos. All rows have pictures: TRL passes an empty list for
    # a row without, which not every processor takes.
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    folder = vision_models.save(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = image_processor.load(folder)._processor
    processor.chat_template = tokenizer.chat_template
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    collate = trainer.DataCollatorForVisionPreference(processor)
    asked = {name: prompt for name, prompt in PROMPTS.items() if name != "text alone"}
    rows = prepare(folder, tmp_path, [record(prompt) for prompt in asked.values()]).table.to_pylist()
    for (name, prompt), row in zip(asked.items(), rows, strict=True):
        pictures = [part["image"] for each in prompt for part in each["content"] if part["type"] == "image"]
        bare = [
            each | {"content": [{"type": "image"} if part["type"] == "image" else part for part in each["content"]]}
            for each in prompt
        ]
        example = {"images": pictures, "prompt": bare}
        example |= {"chosen": [turn("assistant", "Yes.")], "rejected": [turn("assistant", "No.")]}
        batch = collate([example])
        for answer, ids, mask in zip(("chosen", "rejected"), batch["input_ids"], batch["attention_mask"], strict=True):
            assert row["prompt_ids"] + row[f"{answer}_ids"] == ids[mask.bool()].tolist(), name


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name != "mistral3"]
)  # whose template has no system turn
def test_a_system_message_goes_before_the_picture(family, tmp_path):
    folder = vision_models.save(family)
    prompt = [turn("system", "Be brief."), turn("user", A, "What is it?")]
    (row,) = prepare(folder, tmp_path, [record(prompt)]).table.to_pylist()
    assert row["prompt_ids"] == expected_ids(folder, prompt, add_generation_prompt=True)


@pytest.mark.parametrize("train_on", ["all", "assistant", "last_turn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_several_turns_follow_a_picture(family, train_on, tmp_path):
    folder = vision_models.save(family)
    prompt = [turn("user", A, "What is it?")]
    chosen, rejected = (
        [turn("assistant", "A box."), turn("user", "Sure?"), turn("assistant", last)] for last in ("Yes.", "No.")
    )
    (row,) = prepare(folder, tmp_path, [record(prompt, chosen, rejected)], train_on=train_on).table.to_pylist()
    assert row["prompt_ids"] + row["chosen_ids"] == expected_ids(folder, prompt + chosen)
    ids, spans = row["chosen_ids"], row["chosen_spans"]
    decode_ids = AutoTokenizer.from_pretrained(folder).decode
    said = [decode_ids(ids[a:b]) for a, b in zip(spans[::2], spans[1::2], strict=True)]
    turns = {"all": ["A box."], "assistant": ["A box.", "Yes."], "last_turn": ["Yes."]}[train_on]
    assert len(said) == len(turns) and all(
        text.strip().startswith(turn) for text, turn in zip(said, turns, strict=True)
    )


def test_the_prompts_text_has_a_tag_for_each_picture(tmp_path):
    folder = vision_models.save("qwen2.5-vl")
    (row,) = prepare(folder, tmp_path, [record(PROMPTS["pictures of several sizes"])]).table.to_pylist()
    tags = [decode(base64.b64decode(inline(image).partition(",")[2])).tag for image in (A, B)]
    assert row["prompt"] == f"{tags[0]} or {tags[1]}?" and tags[0].startswith("[image 60x40 ")


def test_a_picture_of_a_size_seen_before_is_written_out_the_same_way(tmp_path):
    # The processor is asked for the first; the others are checked as a whole only in the first prompts of a part.
    folder = vision_models.save("internvl")
    pictures = [picture(90, 30, seed) for seed in range(12)]
    part = prepare(folder, tmp_path, [record([turn("user", each, "?")]) for each in pictures])
    for each, row in zip(pictures, part.table.to_pylist(), strict=True):
        assert row["prompt_ids"] == expected_ids(folder, [turn("user", each, "?")], add_generation_prompt=True)


def test_pictures_may_lie_in_the_cells_of_a_table_as_datasets_stores_them(tmp_path):
    folder = vision_models.save("qwen2.5-vl")
    encoded = base64.b64decode(inline(A).partition(",")[2])
    rows = [
        {"image": {"bytes": encoded, "path": "a.png"}, "question": "What is it?", "chosen": "Yes.", "rejected": "No."}
    ]
    rows.append(rows[0] | {"rejected": "Yes."})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    part = prepare_file(folder, tmp_path, tmp_path / "data.parquet")
    (row,) = part.table.to_pylist()
    assert row["prompt_ids"] == expected_ids(folder, [turn("user", A, "What is it?")], add_generation_prompt=True)
    (bad,) = part.quarantine.to_pylist()
    assert bad["reason"] == "chosen equals rejected"
    # Of the picture, the quarantine has the size.
    assert json.loads(bad["raw"])["image"] == {"bytes": f"({len(encoded):,} bytes)", "path": "a.png"}


# -- texts that look like pictures -----------------------------------------------------------------------------------


def quarantine_reasons(part: PreparedPart) -> list[str]:
    return part.quarantine["reason"].to_pylist()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_never_becomes_a_token_that_stands_for_a_picture(family, tmp_path):
    folder = vision_models.save(family)
    processor = image_processor.load(folder)
    tokens = {processor._processor.tokenizer.convert_ids_to_tokens(number) for number in processor.token_ids}
    hostile = sorted({processor.placeholder, *tokens})
    records = [record([turn("user", A, "What is it?")])]
    for text in hostile:
        records.append(record([turn("user", A, f"What is {text}?")]))
        records.append(record([turn("user", f"What is {text}?")]))
        records.append(record([turn("user", A, "What is it?")], f"It is {text}."))
    part = prepare(folder, tmp_path, records)
    assert len(part.table) == 1
    assert quarantine_reasons(part) == ["image placeholder in the text"] * (len(records) - 1)


def test_a_placeholder_cannot_take_the_place_of_a_picture_that_the_template_leaves_out(tmp_path):
    # The picture of the assistant's turn is not printed; the text would make up for it.
    folder = vision_models.save("mistral3")
    prompt = [turn("user", A, "one"), turn("assistant", B, "two"), turn("user", "three [IMG]")]
    part = prepare(
        folder, tmp_path, [record(PROMPTS["one picture"]), record(prompt), record([*prompt[:2], turn("user", "?")])]
    )
    assert quarantine_reasons(part) == ["image placeholder in the text", "template prints other images"]


def test_a_marker_is_text_in_a_record_without_a_column_of_images(tmp_path):
    folder = vision_models.save("qwen2.5-vl")
    asked = [turn("user", "What does <image> mean in HTML?")]
    part = prepare(folder, tmp_path, [record(PROMPTS["one picture"]), record(asked)])
    assert part.table["prompt_ids"].to_pylist()[1] == expected_ids(folder, asked, add_generation_prompt=True)


def test_the_character_that_marks_a_picture_is_reserved(tmp_path):
    folder = vision_models.save("qwen2.5-vl")
    records = [
        record([turn("user", A, f"What{IMAGE_MARK}?")]),
        record([turn("user", f"What{IMAGE_MARK}?")]),
        record([turn("user", A, "What?")], f"{IMAGE_MARK}"),
        {"prompt": f"{IMAGE_MARK}?", "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "user", "content": "a", IMAGE_MARK: ["x"]}], "chosen": "a", "rejected": "b"},
    ]
    part = prepare(folder, tmp_path, records)
    assert quarantine_reasons(part) == ["reserved characters"] * 5


# -- what cannot be used ---------------------------------------------------------------------------------------------


def test_a_model_without_a_processor_is_refused_in_one_sentence(model, tmp_path):
    with pytest.raises(UsageError, match=r"data.jsonl has images.* for which Transformers has no processor"):
        prepare(model, tmp_path, [record(PROMPTS["one picture"])])


@pytest.mark.parametrize("column", [{"image": None}, {"images": []}])
def test_an_empty_column_of_images_is_no_matter_to_a_model_without_a_processor(model, tmp_path, column):
    part = prepare(model, tmp_path, [{"prompt": "why?", "chosen": "a", "rejected": "b"} | column] * 2)
    assert len(part.table) == 2


def test_a_picture_may_come_after_many_records_without(tmp_path):
    rows = [{"prompt": [turn("user", str(n))], "images": None} for n in range(120)]
    data = [record(row["prompt"]) | row for row in rows] + [record(PROMPTS["one picture"])]
    part = prepare(vision_models.save("qwen2.5-vl"), tmp_path, data)
    assert len(part.table) == 121
    for row in data[:-1]:
        del row["images"]
    with pytest.raises(LateImagesError, match=r"line 121, has images, and the first records of all sources have none"):
        prepare(vision_models.save("qwen2.5-vl"), tmp_path, data)


def test_a_template_that_prints_no_picture_is_refused_in_one_sentence(tmp_path):
    template = tmp_path / "blind.jinja"
    template.write_text(
        "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}{{ part['text'] }}"
        "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(UsageError, match=r"the chat template prints no <\|image_pad\|>"):
        prepare(
            vision_models.save("qwen2.5-vl"), tmp_path, [record(PROMPTS["one picture"])], chat_template=str(template)
        )


def test_a_processor_that_takes_no_single_picture_is_refused_in_one_sentence(tmp_path, monkeypatch):
    def process(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(image_processor.ImageProcessor, "process", process)
    with pytest.raises(UsageError, match=r"cannot process one by itself \(NotImplementedError"):
        prepare(vision_models.save("qwen2.5-vl"), tmp_path, [record(PROMPTS["one picture"])])


def test_plain_text_has_no_place_for_a_picture(tmp_path):
    data = [{"prompt": "Look: <image>", "chosen": "a", "rejected": "b", "images": [inline(A)]}]
    with pytest.raises(UsageError, match=r"prepare.template: none has no place"):
        prepare(vision_models.save("qwen2.5-vl"), tmp_path, data, template="none")


def test_what_the_processor_refuses_goes_to_quarantine(tmp_path):
    # Qwen's takes no picture that is more than 200 times as long as it is wide.
    folder = vision_models.save("qwen2.5-vl")
    part = prepare(folder, tmp_path, [record(PROMPTS["one picture"]), record([turn("user", picture(1000, 4), "?")])])
    assert quarantine_reasons(part) == ["processor refuses the image"]


def test_other_ids_than_the_processors_stop_the_preparation(tmp_path, monkeypatch):
    encode = image_processor.ImageProcessor.encode
    monkeypatch.setattr(image_processor.ImageProcessor, "encode", lambda *arguments: [*encode(*arguments), 5])
    with pytest.raises(IntegrityError, match="processor of this model"):
        prepare(vision_models.save("qwen2.5-vl"), tmp_path, [record(PROMPTS["one picture"])])


# -- too long --------------------------------------------------------------------------------------------------------


def test_tokens_of_a_picture_count_for_the_length(tmp_path):
    folder = vision_models.save("qwen2.5-vl")
    prompt = PROMPTS["one picture"]
    n = len(expected_ids(folder, [*prompt, turn("assistant", "Yes.")]))
    for most, reasons in ((n, []), (n - 1, ["too long"])):
        part = prepare(folder, tmp_path, [record(prompt, "Yes.", "No")], max_length=most)
        assert quarantine_reasons(part) == reasons


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava-onevision"])
def test_old_turns_are_left_out_with_their_pictures(family, tmp_path):
    # Of LLaVA-OneVision, what is left is a picture alone, which is cut into tiles.
    folder = vision_models.save(family)
    prompt = [
        turn("system", "Be brief."),
        turn("user", A, "This? " * 40),
        turn("assistant", "A box."),
        turn("user", B, "And?"),
    ]
    kept = [prompt[0], prompt[3]]
    n = len(expected_ids(folder, [*kept, turn("assistant", "Yes.")]))
    (row,) = prepare(folder, tmp_path, [record(prompt)], max_length=n, too_long="keep_end").table.to_pylist()
    assert row["prompt_ids"] == expected_ids(folder, kept, add_generation_prompt=True)
    assert row["prompt"].startswith("system: Be brief.\nuser: [image 33x61 ")
    n_full = len(expected_ids(folder, prompt, add_generation_prompt=True))
    assert row["cut_prompt"] == n_full - len(row["prompt_ids"])


def test_a_mark_without_images_is_counted(tmp_path):
    records = [
        {"prompt": f"{mark}What?", "img": "a.png", "chosen": "Yes", "rejected": "No"} for mark in ("<image>\n", "")
    ]
    part = prepare(vision_models.save("qwen2.5-vl"), tmp_path, records)
    assert part.done["image_marks"] == 1 and part.table["prompt"].to_pylist() == ["<image>\nWhat?", "What?"]


def test_a_prompt_is_never_cut_within_a_picture(tmp_path):
    folder = vision_models.save("qwen2.5-vl")
    prompt = PROMPTS["one picture"]
    n_prompt = len(expected_ids(folder, prompt, add_generation_prompt=True))
    for most in range(5, n_prompt + 1, 3):
        part = prepare(folder, tmp_path, [record(prompt)], max_length=most, too_long="keep_start")
        assert quarantine_reasons(part) == ["prompt too long"]
    (row,) = prepare(
        folder, tmp_path, [record(prompt)], max_length=n_prompt + 1, too_long="keep_start"
    ).table.to_pylist()
    assert row["n_prompt"] == n_prompt and row["n_chosen"] == 1
