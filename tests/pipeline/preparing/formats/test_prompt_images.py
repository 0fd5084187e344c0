"""Each picture of a prompt has one place in its text, and what does not add up goes to quarantine with its numbers."""

import random
from typing import Any

import pytest

from prefcache.pipeline.preparing.example import IMAGE_MARK, Unusable, count_images
from prefcache.pipeline.preparing.formats import FORMATS, recognise
from tests.helpers.formats import read

M = IMAGE_MARK
PNG = {"bytes": b"...", "path": "a.png"}
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "why?"}


def user(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content}]


def refused(name: str, record: dict[str, Any]) -> Unusable:
    with pytest.raises(Unusable) as caught:
        read(name, record)
    return caught.value


ANSWERS = {"chosen": assistant("because"), "rejected": assistant("no")}


def asked(*parts: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": list(parts)}], **ANSWERS}


# -- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "image": PNG}, PNG),
        ({"type": "image", "url": "https://host/a.png"}, "https://host/a.png"),
        ({"type": "image", "path": "/data/a.png", "url": None}, "/data/a.png"),
        ({"type": "image", "base64": "iVBORw0KGgo="}, "data:image;base64,iVBORw0KGgo="),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,x", "detail": "low"}},
            "data:image/png;base64,x",
        ),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"image": "a.png"}, "a.png"),
        ({"type": "image", "image": "a.png", "text": None}, "a.png"),
    ],
)
def test_a_part_may_hold_its_picture(part, value):
    pair = read("pairs", asked(part, TEXT))
    assert (pair.prompt, pair.images) == (user(f"{M}why?"), (value,))


def test_parts_without_a_picture_take_those_of_the_column_in_order():
    pair = read("pairs", asked(IMAGE, TEXT, IMAGE) | {"images": ["a.png", PNG]})
    assert (pair.prompt, pair.images) == (user(f"{M}why?{M}"), ("a.png", PNG))
    mixed = read("pairs", asked(IMAGE, {"type": "image", "image": "own.png"}, IMAGE) | {"images": ["a.png", "b.png"]})
    assert mixed.images == ("a.png", "own.png", "b.png")
    assert read("pairs", asked(IMAGE, TEXT) | {"image": "a.png"}).images == ("a.png",)


def test_pictures_of_several_turns_are_in_their_order():
    prompt = [
        {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, TEXT]},
        *assistant("so"),
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "image": "b.png"}]},
    ]
    pair = read("pairs", {"prompt": prompt, **ANSWERS})
    assert [turn["content"] for turn in pair.prompt] == ["be kind", f"{M}why?", "so", f"and{M}"]
    assert pair.images == ("a.png", "b.png") and all(set(turn) == {"role", "content"} for turn in pair.prompt)


def test_an_implicit_prompt_has_its_pictures_once():
    question = {"role": "user", "content": [IMAGE, TEXT]}
    record = {"chosen": [question, *assistant("because")], "rejected": [question, *assistant("no")], "images": [PNG]}
    pair = read("implicit_prompt", record)
    assert (pair.prompt, pair.images, pair.chosen) == (user(f"{M}why?"), (PNG,), assistant("because"))


def test_answers_to_different_pictures_have_no_common_prompt():
    def conversation(picture: str, text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image", "image": picture}, TEXT]}, *assistant(text)]

    record = {"chosen": conversation("a.png", "because"), "rejected": conversation("b.png", "no")}
    assert refused("implicit_prompt", record).reason == "empty prompt"
    assert refused("chat_template.argilla_chat", record).reason == "answers to different prompts"


# -- columns ---------------------------------------------------------------------------------------------------------


def test_pictures_without_a_place_come_before_the_first_user_turn():
    # As prepare_multimodal_messages of TRL has it.
    prompt = [{"role": "system", "content": "be kind"}, *user("why?"), *assistant("so"), *user("and?")]
    pair = read("pairs", {"prompt": prompt, **ANSWERS, "images": ["a.png", "b.png"]})
    assert [turn["content"] for turn in pair.prompt] == ["be kind", f"{M}{M}why?", "so", "and?"]
    assert pair.images == ("a.png", "b.png")
    assert read("pairs", {"prompt": "why?", "chosen": "a", "rejected": "b", "image": PNG}).prompt == f"{M}why?"


def test_trl_places_them_in_the_same_way():
    data_utils = pytest.importorskip("trl.data_utils")
    prompt = [{"role": "system", "content": "be kind"}, *user("why?"), *assistant("so"), *user("and?")]
    theirs = data_utils.prepare_multimodal_messages(prompt, images=["a.png", "b.png"])
    pair = read("pairs", {"prompt": theirs, **ANSWERS})
    assert pair.prompt == read("pairs", {"prompt": prompt, **ANSWERS, "images": ["a.png", "b.png"]}).prompt
    assert pair.images == ("a.png", "b.png")


def test_markers_in_text_are_the_places_of_the_columns_pictures():
    turns = [
        {"from": "human", "value": "<image>why?"},
        {"from": "gpt", "value": "so"},
        {"from": "human", "value": "and <image>?"},
    ]
    answers = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    pair = read("llamafactory_sharegpt", {"conversations": turns, **answers, "images": ["a.png", "b.png"]})
    assert [turn["content"] for turn in pair.prompt] == [f"{M}why?", "so", f"and {M}?"]
    assert pair.images == ("a.png", "b.png")
    swift = {"messages": [*user("<image>why?"), *assistant("a")], "rejected_response": "b", "images": [PNG]}
    assert read("ms_swift", swift).prompt == user(f"{M}why?")


def test_a_rankings_pairs_share_its_pictures():
    swift = {"messages": [*user("<image>why?"), *assistant("a")], "rejected_response": ["b", "c"], "images": [PNG]}
    assert read("ms_swift", swift).context()["images"] == (PNG,)


def test_a_record_without_pictures_is_what_it_was():
    for column in ({}, {"images": None}, {"images": []}, {"image": None}, {"image": ""}, {"image": float("nan")}):
        pair = read("pairs", {"prompt": user("why?"), **ANSWERS, **column})
        assert (pair.prompt, pair.images) == (user("why?"), ())
    assert read("pairs", {"prompt": "what is <image>?", "chosen": "a", "rejected": "b"}).prompt == "what is <image>?"


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "n_places", "n_pictures"),
    [
        (asked(IMAGE, IMAGE, TEXT) | {"images": ["a.png"]}, 2, 1),
        (asked(IMAGE, TEXT) | {"images": ["a.png", "b.png"]}, 1, 2),
        (asked(IMAGE, TEXT), 1, 0),
        (asked({"type": "image", "image": "own.png"}, TEXT) | {"images": ["a.png"]}, 0, 1),
        ({"prompt": "<image><image>why?", "chosen": "a", "rejected": "b", "images": ["a.png"]}, 2, 1),
        ({"prompt": "<image>why?", "chosen": "a", "rejected": "b", "images": ["a.png", "b.png"]}, 1, 2),
        ({"prompt": "<image>why?", "chosen": "a", "rejected": "b", "images": []}, 1, 0),
    ],
)
def test_other_numbers_of_places_and_pictures_are_named(record, n_places, n_pictures):
    unusable = refused("pairs", record)
    assert (unusable.reason, unusable.n_found, unusable.n_limit) == ("wrong number of images", n_places, n_pictures)


@pytest.mark.parametrize("kind", ["video", "audio", "video_url", "input_audio"])
def test_other_media_are_named(kind):
    unusable = refused("pairs", asked({"type": kind, "video": "a.mp4"}, TEXT))
    assert unusable.reason == f"{'video' if 'video' in kind else 'audio'} in a message"


def test_columns_of_other_media_are_named():
    record = {"prompt": "<video>why?", "chosen": "a", "rejected": "b"}
    assert refused("pairs", record | {"videos": ["a.mp4"]}).reason == "video in the record"
    assert refused("pairs", record | {"audios": ["a.wav"], "images": []}).reason == "audio in the record"
    assert read("pairs", record | {"videos": [], "audios": None}).prompt == record["prompt"]


def test_swifts_images_of_the_rejected_side_have_to_be_those_of_the_other():
    swift = {"messages": [*user("<image>why?"), *assistant("a")], "rejected_response": "b", "images": [PNG]}
    assert read("ms_swift", swift | {"rejected_images": [PNG]}) == read("ms_swift", swift)
    assert refused("ms_swift", swift | {"rejected_images": ["b.png"]}).reason == "different images"


def test_an_answer_has_no_picture():
    answer = [{"role": "assistant", "content": [TEXT, {"type": "image", "image": "a.png"}]}]
    assert (
        refused("pairs", {"prompt": user("why?"), "chosen": answer, "rejected": assistant("no")}).reason
        == "image in an answer"
    )


def test_text_that_a_format_writes_out_has_no_place_for_a_picture():
    prompt = {"role": "user", "content": [{"type": "image", "image": "a.png"}, TEXT]}
    record = {"chosen": [prompt, *assistant("a")], "rejected": [prompt, *assistant("b")]}
    assert refused("chatml.argilla_chat", record).reason == "image in plain text"


ODD: list[Any] = [
    None,
    True,
    0,
    10**400,
    float("nan"),
    "",
    "a.png",
    [],
    [None],
    [[]],
    {},
    {"url": 3},
    [PNG],
    "<image>",
    M,
]
PARTS: list[Any] = [
    TEXT,
    IMAGE,
    {"type": "image", "image": PNG},
    {"type": "image", "image": [[]]},
    {"type": "image_url"},
    {"type": "image_url", "image_url": {}},
    {"type": [], "text": "x"},
    {"type": "text"},
    {"text": "x"},
    {},
    "text",
    None,
    {"type": "text", "text": M},
]


def test_whatever_stands_for_pictures_an_example_has_one_place_for_each():
    by_chance = random.Random(0)

    def content() -> Any:
        parts = [by_chance.choice(PARTS) for _ in range(by_chance.randrange(4))]
        return by_chance.choice([parts, "why?", "<image>why?", "why? <image>\n<image>"])

    n_read = 0
    for _ in range(4000):
        prompt = [{"role": role, "content": content()} for role in ("system", "user", "assistant", "user")]
        record = {"prompt": prompt[by_chance.randrange(4) :] or "<image>", **ANSWERS}
        record |= {by_chance.choice(["image", "images"]): by_chance.choice(ODD) for _ in range(by_chance.randrange(3))}
        try:
            pair = FORMATS["pairs"].bind({})(record)
        except Unusable:
            continue
        n_read += 1
        # The worker refuses data that has the mark itself; nothing else differs.
        if "ufdd2" not in repr(record):
            assert count_images(pair.prompt) == len(pair.images)
            assert None not in pair.images or any(value == [None] for value in record.values())
    assert n_read > 500


# -- public data sets ------------------------------------------------------------------------------------------------


def test_vlfeedback_is_graded_by_the_mean_of_its_ratings_in_either_layout():
    ratings = [{"Helpfulness": {"Rating": "3"}, "Ethics": {"Rating": "5"}}, {"Helpfulness": {"Rating": 1}}]
    rows = [{"annotations": each, "response": text, "model": "m"} for each, text in zip(ratings, "ab", strict=True)]
    columns = {"annotations": ratings, "response": ["a", "b"], "model": ["m", "m"]}
    for completions in (rows, columns):
        ranking = read("vlfeedback", {"prompt": "why?", "image": PNG, "completions": completions})
        assert [(each.turns, each.score) for each in ranking.answers] == [("a", 4.0), ("b", 1.0)]
        assert (ranking.prompt, ranking.images) == (f"{M}why?", (PNG,))


def test_llava_puts_the_marker_on_a_line_of_its_own():
    turns = [{"from": "human", "value": "<image>\nwhy?"}]
    record = {"conversations": turns, "preference": 1, "image": "1.jpg"}
    record |= {"output_1": {"from": "gpt", "value": "x"}, "output_2": {"from": "llava", "value": "y"}}
    pair = read("llava_rlhf", record)
    assert (pair.prompt, pair.chosen, pair.rejected) == (user(f"{M}\nwhy?"), assistant("x"), assistant("y"))
    assert refused("llava_rlhf", record | {"preference": 3}).reason == "wrong type"


def test_trls_own_vision_data_set_is_its_own_format():
    record = asked(IMAGE, TEXT) | {"images": [PNG]}
    found = recognise([record])
    assert found is not None and found.name == "pairs"
