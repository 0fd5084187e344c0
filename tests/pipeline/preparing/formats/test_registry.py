"""A format is told from its columns, reads its records exactly, and refuses others for a reason that can be counted."""

import json
import random
from typing import Any

import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing.example import IMAGE_MARK, Label, Pair, Ranking, Unusable, plain_text
from prefcache.pipeline.preparing.formats import (
    FORMATS,
    fields,
    frameworks,
    get_format,
    public,
    public_images,
    recognise,
    trl,
)
from prefcache.pipeline.preparing.formats.registry import Format

USER, SYSTEM = {"role": "user", "content": "why?"}, {"role": "system", "content": "be kind"}
GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no"}


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def message(role="assistant", content="because", **more):
    return [{"role": role, "content": content, **more}]


def read(record: dict, name: str = "pairs", **options: Any) -> Any:
    return get_format(name).bind(options)(record)


# One row of each format that can be recognised, as its publisher documents it.
ROWS: dict[str, dict] = {
    "hh": {
        "chosen": "\n\nHuman: why?\n\nAssistant: because",
        "rejected": "\n\nHuman: why?\n\nAssistant: no",
    },
    "ultrafeedback_binarized": {
        "prompt": "why?",
        "prompt_id": "5f2a",
        "chosen": [USER, *answer("because")],
        "rejected": [USER, *answer("no")],
        "messages": [USER, *answer("because")],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "argilla_ultrafeedback": {
        "source": "sharegpt",
        "instruction": "why?",
        "chosen_response": "because",
        "rejected_response": "no",
        "chosen_avg_rating": 4.5,
        "rejected_avg_rating": 2.0,
        "chosen_model": "bard",
    },
    "ultrafeedback": {
        "source": "evol_instruct",
        "instruction": "why?",
        "models": ["bard", "alpaca-7b"],
        "completions": [
            {"model": "bard", "response": "because", "overall_score": 7.0, "fine-grained_score": 4.25},
            {"model": "alpaca-7b", "response": "no", "overall_score": 8.0, "fine-grained_score": 2.5},
        ],
        "correct_answers": ["None"],
    },
    "distilabel_orca": {
        "system": "be kind",
        "input": "why?",
        "chosen": "because",
        "rejected": "no",
        "generations": ["no", "because"],
        "order": ["rejected", "chosen"],
        "rating": [3.0, 9.0],
        "status": "unchanged",
        "chosen_score": 9.0,
        "in_gsm8k_train": False,
    },
    "orca_dpo_pairs": {"system": "be kind", "question": "why?", "chosen": "because", "rejected": "no"},
    "helpsteer2": {
        "split": "train",
        "prompt": "why?",
        "response_1": "because",
        "response_2": "no",
        "preference_strength": -2,
        "preference_statement": "Response 1 is better.",
    },
    "helpsteer3": {
        "domain": "general",
        "language": "english",
        "context": [USER],
        "response1": "no",
        "response2": "because",
        "overall_preference": 3,
        "individual_preference": [{"score": 3, "reasoning": "It answers."}],
    },
    "nectar": {
        "prompt": "\n\nHuman: why?\n\nAssistant: ",
        "answers": [
            {"answer": "because", "model": "gpt-4", "rank": 1.0},
            {"answer": "no", "model": "anthropic", "rank": 2.0},
        ],
        "turns": 1,
        "num_responses": 2,
        "source": ["anthropic-hh"],
        "good_natured": True,
    },
    "pku_saferlhf": {
        "prompt": "why?",
        "response_0": "no",
        "response_1": "because",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": 1,
        "safer_response_id": 0,
    },
    "stack_exchange_paired": {
        "qid": 17,
        "question": "why?",
        "date": "2011/01/01",
        "metadata": ["https://example.org"],
        "response_j": "because",
        "response_k": "no",
    },
    "shp": {
        "post_id": "x1",
        "domain": "askscience_train",
        "history": "why?",
        "human_ref_A": "no",
        "human_ref_B": "because",
        "labels": 0,
        "score_A": 3,
        "score_B": 30,
        "score_ratio": 10.0,
    },
    "webgpt": {
        "question": {"dataset": "eli5", "id": "a1", "full_text": "why?"},
        "quotes_0": {"title": [], "extract": []},
        "answer_0": "no",
        "score_0": -0.5,
        "answer_1": "because",
        "score_1": 0.5,
    },
    "arena": {
        "question_id": "q1",
        "model_a": "vicuna",
        "model_b": "koala",
        "winner": "model_b",
        "judge": "arena_user_1",
        "conversation_a": [USER, *answer("no")],
        "conversation_b": [USER, *answer("because")],
        "turn": 1,
    },
    "llamafactory_alpaca": {"instruction": "why?", "input": "", "chosen": "because", "rejected": "no"},
    "llamafactory_alpaca_kto": {"instruction": "why?", "input": "", "output": "because", "kto_tag": True},
    "llamafactory_sharegpt": {
        "conversations": [{"from": "human", "value": "why?"}],
        "chosen": {"from": "gpt", "value": "because"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "llamafactory_sharegpt_kto": {
        "conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}],
        "kto_tag": True,
    },
    "llamafactory_openai": {"messages": [USER], "chosen": answer("because")[0], "rejected": answer("no")[0]},
    "ms_swift": {"messages": [USER, *answer("because")], "rejected_response": "no"},
    "messages_label": {"messages": [USER, *answer("because")], "label": True},
    "nemo": {
        "context": [USER],
        "completions": [
            {"rank": 0, "completion": answer("because")},
            {"rank": 1, "completion": answer("no")},
        ],
        "task_name": "math",
    },
    "rlaif_v": {
        "ds_name": "RLAIF-V",
        "image": {"bytes": b"...", "path": "1.jpg"},
        "question": "why?",
        "chosen": "because",
        "rejected": "no",
        "image_path": "images/1.jpg",
    },
    "rlhf_v": {
        "ds_name": "RLHF-V",
        "image": {"bytes": b"...", "path": "1.jpg"},
        "text": '{"question": "why?", "chosen": "because", "rejected": "no"}',
        "origin_dataset": "VQAv2",
    },
    "vlfeedback": {
        "prompt": "why?",
        "image": {"bytes": b"...", "path": "1.jpg"},
        "models": ["gpt4v", "llava-v1.5-7b"],
        "completions": {
            "annotations": [
                {"Helpfulness": {"Rating": "4", "Rationale": "x"}, "Visual Faithfulness": {"Rating": "5"}},
                {"Helpfulness": {"Rating": "4", "Rationale": "x"}, "Visual Faithfulness": {"Rating": "2"}},
            ],
            "model": ["gpt4v", "llava-v1.5-7b"],
            "response": ["because", "no"],
        },
    },
    "povid": {
        "id": "1",
        "image": "coco/1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nwhy?"}, {"from": "gpt", "value": "because"}],
        "rejected_conversations": [{"from": "human", "value": "<image>\nwhy?"}, {"from": "gpt", "value": "no"}],
    },
    "llava_rlhf": {
        "id": "1",
        "image": "1.jpg",
        "conversations": [{"from": "human", "value": "why?\n<image>"}],
        "output_1": {"from": "llava", "value": "no"},
        "output_2": {"from": "llava", "value": "because"},
        "preference": 2,
    },
    "pairs": GOOD,
    "implicit_prompt": {"chosen": [USER, *answer("because")], "rejected": [USER, *answer("no")]},
    "labels": {"prompt": "why?", "completion": "because", "label": True},
}
MORE = {"id": 3, "source": "web", "metadata": {"lang": "en"}}
OF_THESE_FILES = [
    each
    for each in FORMATS.values()
    if each.reader.__module__ in {m.__name__ for m in (public, frameworks, trl, public_images)}
]


def name_of(found: Format | None) -> str | None:
    return found and found.name


@pytest.mark.parametrize("name", ROWS)
def test_a_documented_row_is_recognised_and_read(name):
    assert name_of(recognise([ROWS[name]])) == name
    assert best_and_worst(read(ROWS[name], name)) == (
        "why?",
        "because",
        None if FORMATS[name].makes == "labels" else "no",
    )


def best_and_worst(example: Any) -> tuple[str, str, str | None]:
    """What was asked last, and the better and the worse answer: the same in every row above."""
    asked = example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]
    asked = asked.replace(IMAGE_MARK, "").strip()
    if isinstance(example, Label):
        assert example.label
        return asked, plain_text(example.completion), None
    if isinstance(example, Ranking):
        ordered = sorted(example.answers, key=lambda each: -each.standing)
        assert ordered[0].standing > ordered[-1].standing
        return asked, plain_text(ordered[0].turns), plain_text(ordered[-1].turns)
    return asked, plain_text(example.chosen), plain_text(example.rejected)


@pytest.mark.parametrize("name", ROWS)
def test_columns_of_no_concern_change_nothing(name):
    assert name_of(recognise([ROWS[name] | MORE])) == name
    assert read(ROWS[name] | MORE, name) == read(ROWS[name], name)


@pytest.mark.parametrize("name", ROWS)
def test_columns_of_other_formats_that_are_null_change_nothing(name):
    # A table of several shapes has null where a row lacks a column.
    everything = dict.fromkeys(column for row in ROWS.values() for column in row) | {"tools": None, "history": None}
    assert name_of(recognise([everything | ROWS[name]])) == name
    assert read(everything | ROWS[name], name) == read(ROWS[name], name)


def test_every_format_that_can_be_recognised_has_its_row_here():
    assert {each.name for each in OF_THESE_FILES if each.recognises} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_missing_column_is_named(name):
    for column in FORMATS[name].columns:
        if column == "rejected_response":
            continue  # where it is missing, rejected_messages may be there
        with pytest.raises(Unusable) as caught:
            read({key: value for key, value in ROWS[name].items() if key != column}, name)
        assert (caught.value.reason, column in caught.value.detail) == ("missing column", True), column


def test_some_odd_records_do_not_hide_the_format():
    rows = [ROWS["shp"]] * 9 + [{"history": "why?"}]
    assert name_of(recognise(rows)) == "shp"
    assert name_of(recognise([ROWS["shp"]] * 5 + [{}] * 5)) == "shp"
    assert recognise([ROWS["shp"]] * 4 + [{}] * 6) is None


def test_nothing_is_recognised_in_nothing():
    assert recognise([]) is None
    assert recognise([{}]) is None
    assert recognise([{"text": "why?"}]) is None


def test_answers_beside_a_prompt_under_another_name_are_no_whole_conversations():
    assert recognise([{"query": "why?", "chosen": "The sun", "rejected": "The moon"}]) is None


ODD: list[Any] = [
    None,
    True,
    0,
    -3,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "",
    " ",
    "text",
    "\n\nHuman: why?\n\nAssistant:",
    "\n\nAssistant: because",
    "[1",
    "<extra_id_1>User\n",
    [],
    [None],
    [[]],
    [[1, 2]],
    [["why?", "because"]],
    {},
    [{}],
    [{"role": "assistant", "content": "a"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": "why?"}],
    [{"role": [], "content": {}}],
    [{"from": "function_call", "value": "{}"}],
    [{"from": {}, "value": "a"}],
    {"role": "assistant", "content": "a"},
    {"role": "tool_call", "content": {}},
    [{"role": "user", "content": "why?"}, {"role": "tool_call", "content": {"name": "look", "arguments": "{"}}],
    [{"role": "assistant", "content": None, "tool_calls": [3, {}, {"function": {"arguments": "["}}]}],
    ["because", "no"],
    {"from": "gpt", "value": "a"},
    {"from": "function_call", "value": "[]"},
    {"full_text": 3},
    [{"response": 1, "overall_score": "x", "fine-grained_score": None}],
    [{"answer": "a", "rank": True}],
    [{"rank": 0, "completion": []}],
]


@pytest.mark.parametrize("name", [each.name for each in OF_THESE_FILES])
def test_no_json_in_any_column_raises_anything_but_unusable(name):
    each = FORMATS[name]
    columns = [*each.columns, *each.optional]
    by_chance = random.Random(0)
    records = [ROWS[name] | {column: odd} for column in columns for odd in ODD]
    records += [{column: by_chance.choice(ODD) for column in columns} for _ in range(400)]
    records += [ROWS[name] | {by_chance.choice(columns): by_chance.choice(ODD) for _ in range(2)} for _ in range(400)]
    for record in records:
        for other in OF_THESE_FILES:
            assert other.recognises is None or other.recognises(record) in (True, False)
        try:
            assert isinstance(each.reader(record), Pair | Label | Ranking)
        except Unusable as reason:
            assert len(reason.detail) < 500, json.dumps(record)[:500]


def test_an_option_that_a_format_lacks_is_refused():
    with pytest.raises(UsageError, match=r"format pairs has no option 'by'. It has: none"):
        read(GOOD, by="better")


# Ours


NAMED = [{"role": "user", "content": "why?", "name": "Ann"}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (GOOD, Pair(**GOOD)),
        (
            {"prompt": [SYSTEM, USER], "chosen": answer("because"), "rejected": answer("no")},
            Pair(prompt=[SYSTEM, USER], chosen=answer("because"), rejected=answer("no")),
        ),
        (GOOD | {"chosen": answer("because")}, Pair(prompt="why?", chosen=answer("because"), rejected="no")),
        # Other columns and other keys of messages make no difference, and whitespace is kept.
        (GOOD | {"prompt": NAMED, "mood": 3}, Pair(prompt=NAMED, chosen="because", rejected="no")),
        (GOOD | {"chosen": " because\n"}, Pair(prompt="why?", chosen=" because\n", rejected="no")),
        (
            GOOD | {"chosen_score": 4, "rejected_score": 1.5},
            Pair(**GOOD, columns={"chosen_score": 4.0, "rejected_score": 1.5}),
        ),
        (GOOD | {"chosen_score": None}, Pair(**GOOD)),
        # `system` goes before the prompt, unless it is empty or the prompt has a system message of its own.
        (GOOD | {"system": "be kind"}, Pair(**GOOD | {"prompt": [SYSTEM, USER]})),
        (GOOD | {"system": "be kind", "prompt": [USER]}, Pair(**GOOD | {"prompt": [SYSTEM, USER]})),
        *((GOOD | {"system": system}, Pair(**GOOD)) for system in (None, "", " \n", float("nan"))),
        *(
            (GOOD | {"system": "be kind", "prompt": [own, USER]}, Pair(**GOOD | {"prompt": [own, USER]}))
            for own in ({"role": role, "content": "be brief"} for role in ("system", "developer"))
        ),
    ],
)
def test_a_pair_is_read(record, expected):
    assert read(record) == expected


def test_a_turn_that_only_calls_a_tool_says_nothing():
    calls = message(content=None, tool_calls=[{"function": {"name": "look", "arguments": {}}}])
    assert read(GOOD | {"chosen": calls}).chosen == calls


BAD = [
    ("missing column", {"prompt": "why?", "chosen": "because"}, "'rejected'; found prompt, chosen"),
    ("missing column", {}, "'prompt'; found none"),
    ("wrong type", GOOD | {"chosen": None}, "chosen is null"),
    ("wrong type", GOOD | {"chosen": 7}, "chosen is int"),
    ("wrong type", GOOD | {"chosen": float("nan")}, "chosen is NaN"),
    ("wrong type", GOOD | {"prompt": {"role": "user"}}, "prompt is dict"),
    ("wrong type", GOOD | {"prompt": ["why?"]}, "prompt holds str"),
    ("wrong type", GOOD | {"prompt": [None]}, "prompt holds null"),
    ("wrong type", GOOD | {"chosen": [{"role": "assistant"}]}, "content is null"),
    ("wrong type", GOOD | {"chosen": message(content=["a", "b"])}, "content is list"),
    ("wrong type", GOOD | {"chosen": message(role=1)}, "role is int"),
    ("wrong type", GOOD | {"chosen_score": "4"}, "chosen_score is str"),
    ("wrong type", GOOD | {"chosen_score": 10**400}, "chosen_score is int"),
    ("wrong type", GOOD | {"tools": "none of them"}, "tools is not a list"),
    ("wrong type", GOOD | {"tools": [1]}, "tools is not a list"),
    ("wrong type", GOOD | {"chat_template_kwargs": "thinking"}, "chat_template_kwargs is str"),
    ("wrong type", GOOD | {"system": ["be kind"]}, "system is list"),
    ("empty prompt", GOOD | {"prompt": []}, "prompt"),
    ("empty answer", GOOD | {"rejected": []}, "rejected"),
]


@pytest.mark.parametrize(
    ("reason", "record", "detail"), BAD, ids=[f"{reason}-{i}" for i, (reason, *_) in enumerate(BAD)]
)
def test_a_bad_record_says_why(reason, record, detail):
    with pytest.raises(Unusable) as caught:
        read(record)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_calls_as_openai_writes_them_are_those_that_templates_expect():
    # Arguments are JSON text, and every key that the message lacks is null.
    called = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    nothing = dict.fromkeys(("refusal", "function_call", "audio"))
    asked = [USER, *message(content=None, tool_calls=[called], **nothing)]
    result = {"role": "tool", "content": "blue", "tool_call_id": "call_1", "name": "look"}
    decoded = called | {"function": {"name": "look", "arguments": {"at": "sky"}}}
    expected = [USER, {"role": "assistant", "content": None, "tool_calls": [decoded]}, result]
    assert read(GOOD | {"prompt": [*asked, result]}).prompt == expected
    # A table keeps calls as JSON text for want of a type.
    asked = [USER, *message(content=None, tool_calls=json.dumps([called]))]
    assert read(GOOD | {"prompt": [*asked, result]}).prompt == expected
    assert read(GOOD | {"chosen": message(tool_calls=[])}).chosen == message()


@pytest.mark.parametrize(
    ("written", "expected"), [("", {}), ('{"a": null}', {"a": None}), ("look up", "look up"), ({"a": 1}, {"a": 1})]
)
def test_arguments_are_decoded_where_they_are_json(written, expected):
    calls = [{"function": {"name": "look", "arguments": written}}]
    (answered,) = read(GOOD | {"chosen": message(tool_calls=calls)}).chosen
    assert answered["tool_calls"] == [{"function": {"name": "look", "arguments": expected}}]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_of_an_answer_stay_with_it(key):
    thinking = message(**{key: "the sky scatters"})
    assert read(GOOD | {"chosen": thinking}).chosen == thinking


def test_tools_of_both_sides_are_those_of_the_prompt_or_refused():
    look, hear = ([{"type": "function", "function": {"name": name}}] for name in ("look", "hear"))
    for same in (
        {"tools": look},
        {"tools": look, "rejected_tools": json.dumps(look)},
        {"chosen_tools": look, "rejected_tools": look},
        {"tools": hear, "chosen_tools": look, "rejected_tools": look},
        {"tools": [json.dumps(tool) for tool in look], "chosen_tools": None},
    ):
        assert read(GOOD | same) == Pair(**GOOD, tools=look)
    for different in ({"tools": look, "rejected_tools": hear}, {"chosen_tools": look}, {"rejected_tools": look}):
        with pytest.raises(Unusable) as caught:
            read(GOOD | different)
        assert caught.value.reason == "different tools"


def test_tools_and_template_arguments_are_kept():
    tools = [{"type": "function", "function": {"name": "look"}}]
    pair = read(GOOD | {"tools": tools, "chat_template_kwargs": {"thinking": True}})
    assert (pair.tools, pair.template_kwargs) == (tools, {"thinking": True})
    assert read(GOOD | {"tools": json.dumps(tools)}).tools == tools
    assert read(GOOD | {"tools": "[]", "chat_template_kwargs": {}}) == read(GOOD | {"tools": ""}) == read(GOOD)


def test_labels_are_read():
    record = {"prompt": "why?", "completion": answer("no"), "label": False, "system": "be kind"}
    assert read(record, "labels") == Label(prompt=[SYSTEM, USER], completion=answer("no"), label=False)


@pytest.mark.parametrize("label", [1, 0, "true", None, 1.0, [True]])
def test_a_label_that_is_no_boolean_is_refused(label):
    with pytest.raises(Unusable) as caught:
        read({"prompt": "why?", "completion": "no", "label": label}, "labels")
    assert caught.value.reason == "label is no boolean"


# The implicit prompt


def implied(chosen: Any, rejected: Any, **more: Any) -> Pair:
    return read({"chosen": chosen, "rejected": rejected} | more, "implicit_prompt")


def test_the_messages_that_both_begin_with_are_the_prompt():
    pair = implied([SYSTEM, USER, *answer("because")], [SYSTEM, USER, *answer("no")])
    assert pair == Pair(prompt=[SYSTEM, USER], chosen=answer("because"), rejected=answer("no"))


def test_conversations_that_part_early_leave_answers_of_several_turns():
    more = {"role": "user", "content": "more"}
    pair = implied([USER, *answer("a"), more, *answer("b")], [USER, *answer("c"), more, *answer("d")])
    assert pair == Pair(
        prompt=[USER], chosen=[*answer("a"), more, *answer("b")], rejected=[*answer("c"), more, *answer("d")]
    )


def test_answers_begin_with_the_assistant_where_a_user_turn_differs():
    # They part at the third message, the user's: the answers go back to the assistant's first turn.
    pair = implied([USER, *answer("a"), USER, *answer("b")], [USER, *answer("a"), SYSTEM, *answer("b")])
    assert (pair.prompt, pair.chosen[0], pair.rejected[0]) == ([USER], *answer("a"), *answer("a"))


def test_one_conversation_that_goes_on_from_the_other_leaves_both_an_answer():
    pair = implied([USER, *answer("a")], [USER, *answer("a"), USER, *answer("b")])
    assert (pair.prompt, pair.chosen) == ([USER], answer("a"))
    assert implied([USER, *answer("a")], [USER, *answer("a")]).chosen == answer("a")


def test_an_answer_in_two_messages_is_not_cut_between_them():
    pair = implied([USER, *answer("a"), *answer("b")], [USER, *answer("a"), *answer("c")])
    assert (pair.prompt, pair.chosen) == ([USER], [*answer("a"), *answer("b")])


def test_tool_turns_that_both_share_belong_to_the_prompt():
    asked = [USER, *message(content="", tool_calls=[{}]), {"role": "tool", "content": "42"}]
    assert implied([*asked, *answer("a")], [*asked, *answer("b")]).prompt == asked


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (answer("a"), answer("b"), "empty prompt"),
        ([USER], [USER], "empty prompt"),
        ([USER, *answer("a")], [SYSTEM, *answer("a")], "empty prompt"),
        ([USER, USER], [USER, SYSTEM], "no assistant turn"),
        ([USER, *answer("a")], [USER, SYSTEM, *answer("a")], "no assistant turn"),
        ([USER, *answer("a")], "text", "wrong type"),
        ("one word", "another", "empty prompt"),
        ("", "", "empty prompt"),
    ],
)
def test_conversations_without_a_shared_prompt_are_refused(chosen, rejected, reason):
    with pytest.raises(Unusable) as caught:
        implied(chosen, rejected)
    assert caught.value.reason == reason


TEXTS = [
    # chosen, rejected, and the prompt that both imply
    ("The sky is blue.", "The sky is green.", "The sky is"),
    ("The sky is bright blue", "The sky is bright", "The sky is"),
    ("The sky is bright", "The sky is brown", "The sky is"),
    ("Two lines\nhere", "Two lines\nthere", "Two lines\n"),
    ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", "\n\nHuman: a\n\nAssistant:"),
    # Both answers begin alike: it is still the answer that begins at the marker.
    ("\n\nHuman: a\n\nAssistant: I am", "\n\nHuman: a\n\nAssistant: I was", "\n\nHuman: a\n\nAssistant:"),
    ("<|im_start|>assistant\nI do", "<|im_start|>assistant\nI do not", "<|im_start|>assistant\n"),
    ("[INST] a [/INST] b", "[INST] a [/INST] c", "[INST] a [/INST]"),
    ("USER: a ASSISTANT: b", "USER: a ASSISTANT: c", "USER: a ASSISTANT:"),
    ("### Response:\nb", "### Response:\nc", "### Response:\n"),
    (
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
    ),
    # The last turn that both share, not one that only one of them has.
    (
        "\n\nAssistant: a\n\nHuman: b\n\nAssistant: c",
        "\n\nAssistant: a\n\nHuman: d\n\nAssistant: c",
        "\n\nAssistant:",
    ),
    # Scripts without blanks are cut where they part, but a word of letters among them stays whole.
    ("\u5929\u7a7a\u662f\u84dd\u8272", "\u5929\u7a7a\u662f\u7eff\u8272", "\u5929\u7a7a\u662f"),
    ("\u5929\u7a7a\u662fblue", "\u5929\u7a7a\u662fblack", "\u5929\u7a7a\u662f"),
    ("A \u7a7a\u306f\u9752\u3044", "A \u7a7a\u306f\u8d64\u3044", "A \u7a7a\u306f"),
    # A vowel sign of Thai is not torn from its consonant.
    ("\u0e1f\u0e49\u0e32\u0e2a\u0e35", "\u0e1f\u0e49\u0e32\u0e2a\u0e38", "\u0e1f\u0e49\u0e32"),
]


@pytest.mark.parametrize(("chosen", "rejected", "prompt"), TEXTS)
def test_texts_are_cut_at_a_turn_or_after_a_whole_word_and_can_be_put_together_again(chosen, rejected, prompt):
    pair = implied(chosen, rejected)
    assert pair.prompt == prompt
    assert (prompt + pair.chosen, prompt + pair.rejected) == (chosen, rejected)


def test_any_two_texts_are_cut_at_white_space_that_begins_the_answers_if_it_is_a_blank():
    by_chance = random.Random(0)
    for _ in range(2000):
        start, a, b = ("".join(by_chance.choices("ab \n", k=by_chance.randrange(8))) for _ in range(3))
        try:
            pair = implied(start + a, start + b)
        except Unusable as unusable:
            assert unusable.reason == "empty prompt"
            continue
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (start + a, start + b)
        assert pair.prompt[-1] == "\n" or (pair.chosen + pair.rejected).startswith(" ")


def test_system_tools_and_scores_go_with_an_implicit_prompt():
    pair = implied(
        [USER, *answer("a")], [USER, *answer("b")], system="be kind", tools=[{"name": "look"}], chosen_score=2
    )
    assert (pair.prompt, pair.tools, pair.columns) == ([SYSTEM, USER], [{"name": "look"}], {"chosen_score": 2.0})


def test_plain_text_is_one_turns_text_or_named_turns():
    assert plain_text("why?") == "why?"
    assert plain_text([USER]) == "why?"
    assert plain_text([SYSTEM, USER]) == "system: be kind\nuser: why?"
    called = message(content="", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": {}}}])
    assert plain_text(called) == '[{"name": "look", "arguments": {}}]'


def test_content_in_parts_of_text_is_text():
    parts = [{"type": "text", "text": "why"}, {"type": "text", "text": "?"}]
    asked = {"role": "user", "content": parts, "name": "Ann"}
    assert fields.message(asked, "prompt") == {"role": "user", "content": "why?", "name": "Ann"}
    with pytest.raises(Unusable):
        fields.message({"role": "user", "content": [*parts, {"type": "thought", "text": "x"}]}, "prompt")
