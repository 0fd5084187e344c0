"""Files made for other training frameworks are read as those read them."""

import json
from typing import Any

import pytest

from pipeline.preparing.example import Label, Pair, Ranked, Ranking, Unusable
from pipeline.preparing.formats import get_format, recognise

SYSTEM = {"role": "system", "content": "be kind"}
TOOLS = [{"name": "look", "parameters": {}}]


def read(name: str, record: dict) -> Any:
    return get_format(name).reader(record)


def refused(name: str, record: dict) -> tuple[str, str]:
    with pytest.raises(Unusable) as caught:
        read(name, record)
    return caught.value.reason, caught.value.detail


def user(said: str) -> dict:
    return {"role": "user", "content": said}


def assistant(said: str) -> dict:
    return {"role": "assistant", "content": said}


def human(said: str) -> dict:
    return {"from": "human", "value": said}


def gpt(said: str) -> dict:
    return {"from": "gpt", "value": said}


# LLaMA-Factory, alpaca

ALPACA = {"instruction": "translate", "input": "a word", "chosen": "because", "rejected": "no"}


def test_alpaca_asks_with_the_instruction_and_the_input_under_it():
    assert read("llamafactory_alpaca", ALPACA) == Pair(prompt="translate\na word", chosen="because", rejected="no")


@pytest.mark.parametrize("nothing", ["", None])
def test_alpaca_without_an_input_asks_with_the_instruction(nothing):
    assert read("llamafactory_alpaca", ALPACA | {"input": nothing}).prompt == "translate"


def test_alpaca_history_goes_before_the_question_and_the_system_before_both():
    history = [["hi", "hello"], ["how?", "well"]]
    pair = read("llamafactory_alpaca", ALPACA | {"history": history, "system": "be kind", "tools": json.dumps(TOOLS)})
    turns = [user("hi"), assistant("hello"), user("how?"), assistant("well"), user("translate\na word")]
    assert pair.prompt == [SYSTEM, *turns]
    assert pair.tools == TOOLS


@pytest.mark.parametrize("history", ["hi", [["hi"]], [["hi", None]], ["hi"], [["a", "b", "c"]], {}])
def test_alpaca_refuses_a_history_that_is_no_pairs(history):
    assert refused("llamafactory_alpaca", ALPACA | {"history": history})[0] == "wrong type"


def test_alpaca_refuses_an_empty_question():
    empty = {"instruction": " ", "input": ""}
    assert refused("llamafactory_alpaca", ALPACA | empty | {"system": "be kind"})[0] == "empty prompt"


def test_alpaca_with_a_tag_is_a_label():
    row = {"instruction": "why?", "output": "because", "kto_tag": False, "history": []}
    assert read("llamafactory_alpaca_kto", row) == Label(prompt="why?", completion="because", label=False)
    assert refused("llamafactory_alpaca_kto", row | {"kto_tag": "true"})[0] == "label is no boolean"


# LLaMA-Factory, sharegpt

SHAREGPT = {
    "conversations": [human("hi"), gpt("hello"), human("why?")],
    "chosen": gpt("because"),
    "rejected": gpt("no"),
}


def test_sharegpt_is_a_conversation_and_one_more_turn():
    assert read("llamafactory_sharegpt", SHAREGPT) == Pair(
        prompt=[user("hi"), assistant("hello"), user("why?")],
        chosen=[assistant("because")],
        rejected=[assistant("no")],
    )


def test_sharegpt_has_its_system_in_a_column_or_as_a_turn_which_wins():
    assert read("llamafactory_sharegpt", SHAREGPT | {"system": "be kind"}).prompt[0] == SYSTEM
    first = {"from": "system", "value": "be brief"}
    row = SHAREGPT | {"conversations": [first, human("why?")], "system": "be kind"}
    assert read("llamafactory_sharegpt", row).prompt == [{"role": "system", "content": "be brief"}, user("why?")]


def test_function_calls_are_tool_calls_and_observations_are_the_tools():
    call = {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'}
    row = SHAREGPT | {"conversations": [human("why?"), call, {"from": "observation", "value": "blue"}]}
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
    assert read("llamafactory_sharegpt", row).prompt == [
        user("why?"),
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "blue"},
    ]
    assert read("llamafactory_sharegpt", SHAREGPT | {"chosen": call}).chosen[0]["tool_calls"] == calls


@pytest.mark.parametrize("called", ["look at the sky", "{}", "[]", "[1]", '{"name": 3}', ""])
def test_a_function_call_that_is_no_json_is_refused(called):
    row = SHAREGPT | {"chosen": {"from": "function_call", "value": called}}
    assert refused("llamafactory_sharegpt", row) == (
        "wrong type",
        "chosen: a function_call is no JSON with name and arguments",
    )


def test_sharegpt_with_other_tags_is_read():
    row = {"conversations": [user("why?")], "chosen": assistant("because"), "rejected": assistant("no")}
    assert recognise([row]).name == "llamafactory_sharegpt"
    assert read("llamafactory_sharegpt", row).prompt == [user("why?")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": [human("why?"), gpt("because")]}, "prompt ends with an answer"),
        ({"conversations": []}, "empty prompt"),
        ({"conversations": "why?"}, "wrong type"),
        ({"conversations": [{"from": "narrator", "value": "once"}]}, "unknown role"),
        ({"conversations": [{"from": "human"}]}, "wrong type"),
        ({"conversations": [3]}, "wrong type"),
        ({"chosen": None}, "wrong type"),
        ({"chosen": "because"}, "wrong type"),
    ],
)
def test_a_bad_sharegpt_row_says_why(change, reason):
    assert refused("llamafactory_sharegpt", SHAREGPT | change)[0] == reason


def test_the_last_turn_of_a_tagged_conversation_is_the_answer():
    row = {"conversations": [human("hi"), gpt("hello"), human("why?"), gpt("because")], "kto_tag": True}
    assert read("llamafactory_sharegpt_kto", row) == Label(
        prompt=[user("hi"), assistant("hello"), user("why?")], completion=[assistant("because")], label=True
    )


@pytest.mark.parametrize(
    ("turns", "reason"),
    [([human("why?")], "no assistant turn"), ([gpt("because")], "empty prompt"), ([], "empty prompt")],
)
def test_a_tagged_conversation_without_question_or_answer_is_refused(turns, reason):
    assert refused("llamafactory_sharegpt_kto", {"conversations": turns, "kto_tag": True})[0] == reason


# Messages

TALK = [SYSTEM, user("hi"), assistant("hello"), user("why?")]


def test_labelled_messages_end_with_the_answer():
    row = {"messages": [*TALK, assistant("because")], "label": False, "tools": json.dumps(TOOLS)}
    assert read("messages_label", row) == Label(
        prompt=TALK, completion=[assistant("because")], label=False, tools=TOOLS
    )


def test_messages_with_a_number_for_a_label_are_no_preferences():
    assert recognise([{"messages": [user("a nice day")], "label": 1}]) is None


def test_swift_rejects_another_answer_to_the_same_messages():
    row = {"messages": [*TALK, assistant("because")], "rejected_response": "no"}
    assert read("ms_swift", row) == Pair(prompt=TALK, chosen=[assistant("because")], rejected="no")


@pytest.mark.parametrize("rejected", [[assistant("no")], [*TALK, assistant("no")]])
def test_swift_rejects_messages_with_or_without_what_was_asked(rejected):
    row = {"messages": [*TALK, assistant("because")], "rejected_messages": rejected}
    assert recognise([row]).name == "ms_swift"
    assert read("ms_swift", row) == Pair(prompt=TALK, chosen=[assistant("because")], rejected=[assistant("no")])


def test_swift_without_an_answer_is_refused():
    assert refused("ms_swift", {"messages": TALK, "rejected_response": "no"})[0] == "no assistant turn"
    assert refused("ms_swift", {"messages": [], "rejected_response": "no"})[0] == "empty prompt"


# NeMo RL


def test_the_lowest_rank_of_nemo_is_best():
    completions = [{"rank": rank, "completion": [assistant(said)]} for rank, said in ((1, "no"), (0, "because"))]
    assert read("nemo", {"context": TALK, "completions": completions}) == Ranking(
        prompt=TALK, answers=(Ranked([assistant("no")], -1.0), Ranked([assistant("because")], 0.0))
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context": []}, "empty prompt"),
        ({"context": "why?"}, "wrong type"),
        ({"completions": [{"rank": 0, "completion": []}]}, "empty answer"),
        ({"completions": [{"completion": [assistant("a")]}]}, "missing column"),
        ({"completions": [{"rank": "first", "completion": [assistant("a")]}]}, "wrong type"),
        ({"completions": ["because"]}, "wrong type"),
    ],
)
def test_a_bad_nemo_row_says_why(change, reason):
    good = {"context": TALK, "completions": [{"rank": 0, "completion": [assistant("a")]}]}
    assert refused("nemo", good | change)[0] == reason


def test_answers_of_sharegpt_may_be_lists_of_turns():
    record = {
        "conversations": [{"from": "human", "value": "why?"}],
        "chosen": [{"from": "gpt", "value": "because"}],
        "rejected": [{"from": "gpt", "value": "no"}],
    }
    assert recognise([record]).name == "llamafactory_sharegpt"
    pair = get_format("llamafactory_sharegpt").reader(record)
    assert pair.chosen == [{"role": "assistant", "content": "because"}]
