"""Files made for other training frameworks are read as those read them."""

import json

import pytest

from prefcache.pipeline.preparing.example import Candidate, Label, Pair, Ranking
from prefcache.pipeline.preparing.formats import recognise
from tests.helpers.formats import assistant, read, refused, user

SYSTEM = {"role": "system", "content": "be kind"}
TOOLS = [{"name": "look", "parameters": {}}]


def human(said: str) -> dict:
    return {"from": "human", "value": said}


def gpt(said: str) -> dict:
    return {"from": "gpt", "value": said}


# LLaMA-Factory, alpaca

ALPACA = {"instruction": "translate", "input": "a word", "chosen": "because", "rejected": "no"}


def test_alpaca_asks_with_the_instruction_and_the_input_under_it():
    assert read("llamafactory_alpaca", ALPACA) == Pair(prompt="translate\na word", chosen="because", rejected="no")
    for nothing in ("", None):
        assert read("llamafactory_alpaca", ALPACA | {"input": nothing}).prompt == "translate"


def test_alpaca_history_goes_before_the_question_and_the_system_before_both():
    history = [["hi", "hello"], ["how?", "well"]]
    pair = read("llamafactory_alpaca", ALPACA | {"history": history, "system": "be kind", "tools": json.dumps(TOOLS)})
    turns = [user("hi"), assistant("hello"), user("how?"), assistant("well"), user("translate\na word")]
    assert pair.prompt == [SYSTEM, *turns]
    assert pair.tools == TOOLS


def test_alpaca_with_a_tag_is_a_label():
    row = {"instruction": "why?", "output": "because", "kto_tag": False, "history": []}
    assert read("llamafactory_alpaca_kto", row) == Label(prompt="why?", completion="because", label=False)


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


def test_sharegpt_with_other_tags_is_read():
    row = {"conversations": [user("why?")], "chosen": assistant("because"), "rejected": assistant("no")}
    assert recognise([row]).name == "llamafactory_sharegpt"
    assert read("llamafactory_sharegpt", row).prompt == [user("why?")]


def test_the_last_turn_of_a_tagged_conversation_is_the_answer():
    row = {"conversations": [human("hi"), gpt("hello"), human("why?"), gpt("because")], "kto_tag": True}
    assert read("llamafactory_sharegpt_kto", row) == Label(
        prompt=[user("hi"), assistant("hello"), user("why?")], completion=[assistant("because")], label=True
    )


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


# NeMo RL


def test_the_lowest_rank_of_nemo_is_best():
    completions = [{"rank": rank, "completion": [assistant(said)]} for rank, said in ((1, "no"), (0, "because"))]
    assert read("nemo", {"context": TALK, "completions": completions}) == Ranking(
        prompt=TALK, answers=(Candidate([assistant("no")], -1.0), Candidate([assistant("because")], 0.0))
    )


NEMO = {"context": TALK, "completions": [{"rank": 0, "completion": [assistant("a")]}]}
NOT_CALLS = ["look at the sky", "{}", "[]", "[1]", '{"name": 3}', ""]
REFUSED = [
    *(
        ("llamafactory_alpaca", ALPACA | {"history": history}, "wrong type")
        for history in ("hi", [["hi"]], [["hi", None]], ["hi"], [["a", "b", "c"]], {})
    ),
    ("llamafactory_alpaca", ALPACA | {"instruction": " ", "input": "", "system": "be kind"}, "empty prompt"),
    ("llamafactory_alpaca_kto", {"instruction": "why?", "output": "a", "kto_tag": "true"}, "label is no boolean"),
    *(
        ("llamafactory_sharegpt", SHAREGPT | {"chosen": {"from": "function_call", "value": called}}, "wrong type")
        for called in NOT_CALLS
    ),
    *(
        ("llamafactory_sharegpt", SHAREGPT | {"conversations": turns}, reason)
        for turns, reason in (
            ([human("why?"), gpt("because")], "prompt ends with an answer"),
            ([], "empty prompt"),
            ("why?", "wrong type"),
            ([{"from": "narrator", "value": "once"}], "unknown role"),
            ([{"from": "human"}], "wrong type"),
            ([3], "wrong type"),
        )
    ),
    ("llamafactory_sharegpt", SHAREGPT | {"chosen": None}, "wrong type"),
    ("llamafactory_sharegpt", SHAREGPT | {"chosen": "because"}, "wrong type"),
    *(
        ("llamafactory_sharegpt_kto", {"conversations": turns, "kto_tag": True}, reason)
        for turns, reason in (
            ([human("why?")], "no assistant turn"),
            ([gpt("because")], "empty prompt"),
            ([], "empty prompt"),
        )
    ),
    ("ms_swift", {"messages": TALK, "rejected_response": "no"}, "no assistant turn"),
    ("ms_swift", {"messages": [], "rejected_response": "no"}, "empty prompt"),
    ("nemo", NEMO | {"context": []}, "empty prompt"),
    ("nemo", NEMO | {"context": "why?"}, "wrong type"),
    ("nemo", NEMO | {"completions": [{"rank": 0, "completion": []}]}, "empty answer"),
    ("nemo", NEMO | {"completions": [{"completion": [assistant("a")]}]}, "missing column"),
    ("nemo", NEMO | {"completions": [{"rank": "first", "completion": [assistant("a")]}]}, "wrong type"),
    ("nemo", NEMO | {"completions": ["because"]}, "wrong type"),
]


@pytest.mark.parametrize(("name", "row", "reason"), REFUSED)
def test_a_bad_row_says_why(name, row, reason):
    assert refused(name, row)[0] == reason


def test_a_function_call_that_is_not_json_is_named():
    row = SHAREGPT | {"chosen": {"from": "function_call", "value": "look"}}
    assert refused("llamafactory_sharegpt", row)[1] == "chosen: a function_call is not JSON with name and arguments"


def test_answers_of_sharegpt_may_be_lists_of_turns():
    record = {
        "conversations": [{"from": "human", "value": "why?"}],
        "chosen": [{"from": "gpt", "value": "because"}],
        "rejected": [{"from": "gpt", "value": "no"}],
    }
    assert recognise([record]).name == "llamafactory_sharegpt"
    pair = read("llamafactory_sharegpt", record)
    assert pair.chosen == [{"role": "assistant", "content": "because"}]
