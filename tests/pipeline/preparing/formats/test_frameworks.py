"""Files made for other training frameworks are read as those read them."""

import json

import pytest

from prefcache.pipeline.preparing.example import Candidate, Label, Pair, Ranking
from prefcache.pipeline.preparing.expand_rankings import expand
from prefcache.pipeline.preparing.formats import recognise
from tests.helpers.formats import assistant, read, refused, user

SYSTEM = {"role": "system", "content": "be kind"}
TOOLS = [{"name": "look", "parameters": {}}]
# As both frameworks complete them for the template.
SCHEMAS = [{"type": "function", "function": TOOLS[0]}]


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
    assert pair.tools == SCHEMAS


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
        prompt=TALK, completion=[assistant("because")], label=False, tools=SCHEMAS
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


# Tools and agents

ASKED = [SYSTEM, user("hi"), assistant("hello"), user("what colour is the sky?")]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"colour": "blue"}'}
TRAJECTORY = [CALLING, RESULT, assistant("It is blue.")]


def as_swift(turns: list[dict]) -> list[dict]:
    """These turns under ms-swift's roles, as its documentation of agents has them."""
    written: list[dict] = []
    for turn in turns:
        if turn["role"] == "assistant" and "tool_calls" in turn:
            calls = [call["function"] for call in turn["tool_calls"]]
            written += [{"role": "tool_call", "content": json.dumps(call)} for call in calls]
        else:
            written.append(turn | {"role": "tool_response" if turn["role"] == "tool" else turn["role"]})
    return written


def test_swift_takes_all_after_the_last_question_for_the_answer():
    """As it does with rejected_response: the whole trajectory is replaced, calls and results included."""
    row = {
        "messages": as_swift([*ASKED, *TRAJECTORY]),
        "rejected_response": "I cannot look.",
        "tools": json.dumps(TOOLS),
    }
    assert recognise([row]).name == "ms_swift"
    assert read("ms_swift", row) == Pair(prompt=ASKED, chosen=TRAJECTORY, rejected="I cannot look.", tools=SCHEMAS)


def test_swift_reads_openais_calls_too():
    openai = CALLING | {
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}],
    }
    result = RESULT | {"tool_call_id": "1"}
    row = {"messages": [*ASKED, openai, result, assistant("It is blue.")], "rejected_response": "no"}
    assert read("ms_swift", row).chosen == [
        openai | {"tool_calls": [CALL | {"id": "1"}]},
        result,
        assistant("It is blue."),
    ]


def test_swifts_calls_in_a_row_are_one_turn_with_the_text_before_them():
    call = {"role": "tool_call", "content": {"name": "look", "arguments": {"at": "sky"}}}
    turns = [user("why?"), assistant("I look."), call, call, RESULT, RESULT | {"content": {"colour": "red"}}]
    row = {"messages": [*turns, assistant("because")], "label": True}
    assert read("messages_label", row).completion == [
        assistant("I look.") | {"tool_calls": [CALL, CALL]},
        RESULT,
        RESULT | {"content": '{"colour": "red"}'},
        assistant("because"),
    ]


def test_swifts_rejected_response_may_be_messages():
    worse = [CALLING, RESULT, assistant("It is red.")]
    row = {"messages": as_swift([*ASKED, *TRAJECTORY]), "rejected_response": as_swift(worse)}
    assert recognise([row]).name == "ms_swift"
    assert read("ms_swift", row) == Pair(prompt=ASKED, chosen=TRAJECTORY, rejected=worse)


def test_swifts_rejected_response_may_be_several():
    row = {"messages": [*ASKED, *TRAJECTORY], "rejected_response": ["no", "never"], "tools": TOOLS}
    assert recognise([row]).name == "ms_swift"
    ranking = read("ms_swift", row)
    assert ranking == Ranking(
        prompt=ASKED,
        answers=(Candidate(TRAJECTORY, 1.0), Candidate("no", 0.0), Candidate("never", 0.0)),
        tools=SCHEMAS,
    )
    pairs = expand(ranking, pairing="best_rest", ties=False, as_labels=False)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(TRAJECTORY, "no"), (TRAJECTORY, "never")]


def test_swifts_rejected_messages_begin_with_the_same_question():
    worse = [CALLING, RESULT, assistant("It is red.")]
    for rejected in (worse, [*ASKED, *worse]):
        row = {"messages": as_swift([*ASKED, *TRAJECTORY]), "rejected_messages": as_swift(rejected)}
        # They share the call and its result, which are part of both answers all the same.
        assert read("ms_swift", row) == Pair(prompt=ASKED, chosen=TRAJECTORY, rejected=worse)


def test_swifts_conversations_with_questions_of_their_own_part_after_one_that_both_share():
    chosen = [*ASKED, *TRAJECTORY, user("and at night?"), assistant("black")]
    rejected = [*ASKED, *TRAJECTORY, user("really?"), assistant("no")]
    row = {"messages": chosen, "rejected_messages": rejected}
    assert read("ms_swift", row) == Pair(prompt=ASKED, chosen=chosen[4:], rejected=rejected[4:])


def test_swifts_tools_of_the_rejected_side_have_to_be_those_of_the_other():
    row = {"messages": [*ASKED, *TRAJECTORY], "rejected_messages": [*ASKED, assistant("no")], "tools": TOOLS}
    assert read("ms_swift", row | {"rejected_tools": json.dumps(TOOLS)}).tools == SCHEMAS
    assert refused("ms_swift", row | {"rejected_tools": [{"name": "hear"}]})[0] == "different tools"


def test_two_answers_in_a_row_are_one_of_two_turns():
    row = {"messages": [*TALK, assistant("because"), assistant("of the sky")]}
    both = [assistant("because"), assistant("of the sky")]
    assert read("messages_label", row | {"label": True}).completion == both
    assert read("ms_swift", row | {"rejected_response": "no"}) == Pair(prompt=TALK, chosen=both, rejected="no")


def test_sharegpt_asks_with_a_call_and_its_result_and_the_tools():
    call = {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'}
    turns = [human("what colour is the sky?"), call, {"from": "observation", "value": RESULT["content"]}]
    row = {"conversations": turns, "chosen": gpt("It is blue."), "rejected": call, "tools": json.dumps(TOOLS)}
    assert recognise([row]).name == "llamafactory_sharegpt"
    assert read("llamafactory_sharegpt", row) == Pair(
        prompt=[ASKED[-1], CALLING, RESULT], chosen=[assistant("It is blue.")], rejected=[CALLING], tools=SCHEMAS
    )


def test_a_function_call_may_begin_with_thoughts():
    call = {"from": "function_call", "value": '<think>\nup\n</think>\n\n{"name": "look", "arguments": {"at": "sky"}}'}
    (turn,) = read("llamafactory_sharegpt", SHAREGPT | {"chosen": call}).chosen
    assert turn == CALLING | {"content": "<think>\nup\n</think>"}


OPENAI = {
    "messages": [
        *ASKED,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}],
        },
        RESULT | {"tool_call_id": "1"},
    ],
    "chosen": assistant("It is blue."),
    "rejected": assistant("It is red."),
}


def test_openais_messages_for_llama_factory_keep_their_own_system_message():
    assert recognise([OPENAI]).name == "llamafactory_openai"
    pair = read("llamafactory_openai", OPENAI | {"tools": TOOLS})
    assert pair.prompt[:4] == ASKED and pair.prompt[4]["tool_calls"] == [CALL | {"id": "1"}]
    assert (pair.chosen, pair.rejected, pair.tools) == (
        [assistant("It is blue.")],
        [assistant("It is red.")],
        SCHEMAS,
    )
    # Without tools, its own converter would add a text to the system message, or write one.
    assert read("llamafactory_openai", OPENAI).prompt[0] == SYSTEM
    assert read("llamafactory_openai", OPENAI | {"messages": ASKED[1:]}).prompt == ASKED[1:]


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
    ("ms_swift", {"messages": [*ASKED, *TRAJECTORY[:2]], "rejected_response": "no"}, "no assistant turn"),
    ("ms_swift", {"messages": TRAJECTORY, "rejected_response": "no"}, "empty prompt"),
    (
        "ms_swift",
        {"messages": [*ASKED, {"role": "tool_call", "content": "look"}], "rejected_response": "n"},
        "wrong type",
    ),
    ("ms_swift", {"messages": [*TALK, assistant("a")], "rejected_response": [{"role": "assistant"}]}, "wrong type"),
    ("ms_swift", {"messages": [*TALK, assistant("a")], "rejected_response": ["a", assistant("b")]}, "wrong type"),
    ("llamafactory_openai", OPENAI | {"messages": [*ASKED, *TRAJECTORY]}, "prompt ends with an answer"),
    ("llamafactory_openai", OPENAI | {"messages": [{"role": "narrator", "content": "a"}]}, "unknown role"),
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
