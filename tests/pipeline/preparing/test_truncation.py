"""What is too long is dropped or cut, at the place that was asked for, and the row says by how much."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefcache.pipeline.config import Prepare
from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.encoder import Encoder, ExampleTokens
from prefcache.pipeline.preparing.example import Example, Label, Pair, Unusable
from prefcache.pipeline.preparing.part_worker import PartWorker
from prefcache.pipeline.preparing.render_chat import ChatRenderer
from prefcache.pipeline.preparing.token_ids import to_ids
from prefcache.pipeline.preparing.truncation import TruncatedExample, truncate
from prefcache.pipeline.spans import whole_span
from tests.helpers.tokenizers import CHATML, DATE, GEMMA_CHAT, chunk_of, facts, resolved_config

PAIR = Pair(prompt="p", chosen="c", rejected="r")
NONE = to_ids([])


def prepare(**settings: Any) -> Prepare:
    return Prepare(**{"data": "x"} | settings)


def never(example: Example) -> ExampleTokens:
    raise AssertionError("nothing is to be encoded anew")


def tokens(n_prompt: int, *n_answers: int, exact: bool = True) -> ExampleTokens:
    answers = tuple(to_ids(range(100, 100 + n)) for n in n_answers)
    return ExampleTokens(to_ids(range(n_prompt)), answers, exact, False, tuple(whole_span(n) for n in n_answers))


def refusal(given: ExampleTokens, example: Example = PAIR, encode: Any = never, **settings: Any) -> tuple[str, str]:
    with pytest.raises(Unusable) as caught:
        truncate(example, given, prepare(**settings), encode)
    return caught.value.reason, caught.value.description


# -- what fits is left as it is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("too_long", ["drop", "keep_start", "keep_end"])
def test_what_fits_to_the_last_token_is_left_as_it_is(too_long):
    # 4 + max(6, 3) = 10
    given = tokens(4, 6, 3)
    found = truncate(PAIR, given, prepare(max_length=10, max_prompt_length=4, too_long=too_long), never)
    assert found == TruncatedExample(given, PAIR, 0, (NONE, NONE))


@pytest.mark.parametrize("too_long", ["drop", "keep_start", "keep_end"])
def test_without_tokens_there_is_nothing_to_score(too_long):
    assert refusal(tokens(0, 1, 1), too_long=too_long) == ("empty prompt", "no tokens after templating")
    assert refusal(tokens(1, 0, 1), too_long=too_long) == ("empty answer", "no tokens after templating")
    assert refusal(tokens(1, 1, 0), too_long=too_long) == ("empty answer", "no tokens after templating")


# -- drop ------------------------------------------------------------------------------------------------------------


def test_drop_says_both_numbers():
    # 4 + max(3, 7) = 11, one more than 10
    assert refusal(tokens(4, 3, 7), max_length=10) == (
        "too long",
        "tokens in prompt and answer, against prepare.max_length: 11, limit 10",
    )
    assert refusal(tokens(10, 3, 7), max_length=10) == (
        "prompt too long",
        "tokens in the prompt, against prepare.max_length: 10, limit 10",
    )
    assert refusal(tokens(5, 1, 1), max_length=10, max_prompt_length=4) == (
        "prompt too long",
        "tokens in the prompt, against prepare.max_prompt_length: 5, limit 4",
    )


# -- keep_start ------------------------------------------------------------------------------------------------------


def test_keep_start_cuts_the_ends_of_the_answers():
    # Of 10, the prompt takes 4, which leaves 6: nothing of 3 is cut, 3 of 9.
    found = truncate(PAIR, tokens(4, 3, 9), prepare(max_length=10, too_long="keep_start"), never)
    assert found.tokens.answers == (to_ids([100, 101, 102]), to_ids([100, 101, 102, 103, 104, 105]))
    assert found.tokens.prompt == to_ids([0, 1, 2, 3])
    assert (found.cut_prompt, found.cut_answers) == (0, (NONE, to_ids([106, 107, 108])))


def test_keep_start_never_cuts_a_prompt():
    # With 9 of 10 there is room for one token of the answer, with 10 for none.
    found = truncate(PAIR, tokens(9, 3, 9), prepare(max_length=10, too_long="keep_start"), never)
    assert [len(answer) for answer in found.tokens.answers] == [1, 1]
    assert found.cut_answers == (to_ids([101, 102]), to_ids(range(101, 109)))
    assert refusal(tokens(10, 3, 9), max_length=10, too_long="keep_start")[0] == "prompt too long"
    assert refusal(tokens(5, 1, 1), max_length=10, max_prompt_length=4, too_long="keep_start")[0] == "prompt too long"


# -- keep_end --------------------------------------------------------------------------------------------------------


def chat(*contents: str, system: str = "") -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def words(example: Example) -> ExampleTokens:
    """One token per character of the prompt; answers of 2 and 4."""
    n = sum(len(turn["content"]) for turn in example.prompt if isinstance(turn, dict))
    return tokens(n, 2, 4)


@pytest.mark.parametrize(
    ("max_length", "left"),
    [
        # 12 of the prompt and 4 of the longer answer
        (16, ["a", "bb", "ccc", "ddd", "eee"]),
        (15, ["ccc", "ddd", "eee"]),
        (13, ["ccc", "ddd", "eee"]),
        (12, ["eee"]),
        (7, ["eee"]),
    ],
)
def test_keep_end_keeps_as_many_turns_as_fit(max_length, left):
    # Turns of 1, 2, 3, 3 and 3 tokens: 12. From the second question on 9, from the third 3.
    example = Pair(prompt=chat("a", "bb", "ccc", "ddd", "eee"), chosen="x", rejected="y")
    found = truncate(example, words(example), prepare(max_length=max_length, too_long="keep_end"), words)
    n_left = sum(map(len, left))
    assert [turn["content"] for turn in found.example.prompt] == left
    assert len(found.tokens.prompt) == n_left and found.cut_prompt == 12 - n_left
    assert found.tokens.answers == words(example).answers and found.cut_answers == (NONE, NONE)


def test_keep_end_says_that_even_the_last_turn_is_too_long():
    example = Pair(prompt=chat("a", "bb", "ccc", "ddd", "eee"), chosen="x", rejected="y")
    given = words(example)
    # 3 of the last turn and 4 of the answer are 7
    assert refusal(given, example, words, max_length=6, too_long="keep_end") == (
        "too long",
        "even with the last turn alone; tokens in prompt and answer, against prepare.max_length: 7, limit 6",
    )
    assert refusal(given, example, words, max_prompt_length=2, too_long="keep_end") == (
        "prompt too long",
        "even with the last turn alone; tokens in the prompt, against prepare.max_prompt_length: 3, limit 2",
    )


def test_keep_end_keeps_the_system_message():
    # 4 + 12 tokens of the prompt; of 13, 4 are the answer's and 4 the system's: 5 are left, the last turn has 3
    example = Pair(prompt=chat("a", "bb", "ccc", "ddd", "eee", system="SSSS"), chosen="x", rejected="y")
    found = truncate(example, words(example), prepare(max_length=13, too_long="keep_end"), words)
    assert [turn["content"] for turn in found.example.prompt] == ["SSSS", "eee"]
    assert found.cut_prompt == 16 - 7


def test_keep_end_minds_the_most_of_a_prompt():
    example = Pair(prompt=chat("a", "bb", "ccc", "ddd", "eee"), chosen="x", rejected="y")
    found = truncate(example, words(example), prepare(max_prompt_length=9, too_long="keep_end"), words)
    assert len(found.tokens.prompt) == 9 and found.cut_prompt == 3


@pytest.mark.parametrize("prompt", ["text", chat("one turn"), chat("one turn", system="S")])
def test_one_turn_is_never_cut(prompt):
    example = Pair(prompt=prompt, chosen="x", rejected="y")
    reason, detail = refusal(tokens(9, 2, 4), example, max_length=10, too_long="keep_end")
    assert reason == "too long"
    assert detail == (
        "the prompt is one turn, which is never cut; tokens in prompt and answer, against prepare.max_length: 13, limit 10"
    )


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=41), room=st.integers(5, 120))
@settings(max_examples=200)
def test_keep_end_finds_what_trying_all_finds(lengths, room):
    contents = ["x" * n for n in lengths]
    if len(contents) % 2 == 0:
        contents.pop()
    example = Label(prompt=chat(*contents), completion="x", label=True)
    # Every question begins a prompt that could be kept; the longest that fits is.
    starts = [n for n in range(0, len(contents), 2) if sum(map(len, contents[n:])) + 4 <= room]
    try:
        found = truncate(example, words(example), prepare(max_length=room, too_long="keep_end"), words)
    except Unusable:
        assert not starts
        return
    assert [turn["content"] for turn in found.example.prompt] == contents[starts[0] :]
    assert found.cut_prompt == sum(map(len, contents[: starts[0]]))


# -- with a real tokenizer, as rows ----------------------------------------------------------------------------------

CONVERSATION = chat("the cat sings", "and the dog", "why red", "the fish", "why green?", system="be brief")


def rows(records: list[dict[str, Any]], **settings: Any) -> Any:
    return PartWorker(resolved_config(facts("byte-level"), CHATML, **settings)).prepare(0, chunk_of(records))


def test_both_answers_share_the_cut_prompt_and_the_row_says_by_how_much():
    record = {"prompt": CONVERSATION, "chosen": "the cat", "rejected": "the dog runs"}
    (whole,) = rows([record]).table.to_pylist()
    assert whole["cut_prompt"] == 0
    most = whole["n_prompt"] + max(whole["n_chosen"], whole["n_rejected"])
    made = rows([record], max_length=most - 1, too_long="keep_end")
    (cut,) = made.table.to_pylist()
    encoder = Encoder(facts("byte-level"))
    template = ChatTemplate(CHATML, {}, DATE)
    expected = template.render([CONVERSATION[0], *CONVERSATION[3:]], add_generation_prompt=True)
    assert encoder.decode(cut["prompt_ids"]) == expected
    assert cut["n_prompt"] == len(cut["prompt_ids"]) == whole["n_prompt"] - cut["cut_prompt"]
    assert cut["chosen_ids"] == whole["chosen_ids"] and cut["rejected_ids"] == whole["rejected_ids"]
    assert (cut["cut_chosen"], cut["cut_rejected"]) == (0, 0)
    assert cut["chosen_cut_ids"] == cut["rejected_cut_ids"] == []
    # The text is that of what was kept.
    assert "the cat sings" not in cut["prompt"] and cut["prompt"].startswith("system: be brief\nuser: why red")
    assert made.done["cut_prompts"] == 1 and not made.done.get("cut_answers")


def test_a_cut_answer_loses_its_end_and_says_so():
    record = {"prompt": "why?", "chosen": "the cat sings", "rejected": "a"}
    (whole,) = rows([record]).table.to_pylist()
    made = rows([record], max_length=whole["n_prompt"] + 4, too_long="keep_start")
    (cut,) = made.table.to_pylist()
    # the, cat, sings, end, line end: 5 tokens, one too many
    assert whole["n_chosen"] == 5 and cut["chosen_ids"] == whole["chosen_ids"][:4]
    assert (cut["cut_chosen"], cut["cut_rejected"], cut["cut_prompt"]) == (1, 0, 0)
    assert (cut["chosen_cut_ids"], cut["rejected_cut_ids"]) == (whole["chosen_ids"][4:], [])
    assert cut["chosen_key"] != whole["chosen_key"] and cut["rejected_key"] == whole["rejected_key"]
    # Shares are drawn by what the example is before it is cut.
    assert cut["whole_id"] == whole["whole_id"] == int(whole["example_id"], 16) != int(cut["example_id"], 16)
    assert made.done["cut_answers"] == 1


def test_answers_that_are_equal_after_cutting_are_no_pair():
    record = {"prompt": "why?", "chosen": "the cat sings", "rejected": "the cat runs"}
    (whole,) = rows([record]).table.to_pylist()
    made = rows([record], max_length=whole["n_prompt"] + 2, too_long="keep_start")
    assert len(made.table) == 0
    assert made.quarantine.select(["reason", "detail"]).to_pylist() == [
        {"reason": "chosen equals rejected", "detail": "after cutting"}
    ]


def test_what_is_dropped_is_in_quarantine_with_the_arithmetic():
    record = {"prompt": "why?", "chosen": "the cat sings", "rejected": "a"}
    (whole,) = rows([record]).table.to_pylist()
    made = rows([record, record | {"chosen": "b"}], max_length=whole["n_prompt"] + 4)
    assert len(made.table) == 1
    (bad,) = made.quarantine.to_pylist()
    assert (bad["reason"], bad["line"]) == ("too long", 1)
    # The numbers have columns of their own, so that records of one reason have one detail.
    assert bad["detail"] == "tokens in prompt and answer, against prepare.max_length"
    assert bad["n_found"] == bad["n_tokens"] == whole["n_prompt"] + 5 and bad["n_limit"] == whole["n_prompt"] + 4


def test_what_is_far_too_long_is_not_even_encoded():
    record = {"prompt": "why?", "chosen": "x" * 10_000, "rejected": "a"}
    made = rows([record], max_length=16)
    (bad,) = made.quarantine.to_pylist()
    assert (bad["reason"], bad["detail"]) == ("too long", "more characters than prepare.max_length tokens can have")
    assert (bad["n_found"], bad["n_tokens"]) == (10_000, None) and bad["n_limit"] % 16 == 0


def test_the_templater_merges_a_system_message_into_what_is_left():
    renderer = ChatRenderer(ChatTemplate(GEMMA_CHAT, {"bos_token": "<s>"}, DATE))
    encoder = Encoder(facts("byte-level"))
    example = Label(prompt=CONVERSATION, completion="the cat", label=True)

    def encode(each: Example) -> ExampleTokens:
        return encoder.encode([renderer.render(each)])[0]

    whole = encode(example)
    most = len(whole.prompt) + len(whole.answers[0])
    found = truncate(example, whole, prepare(max_length=most - 1, too_long="keep_end"), encode)
    assert encoder.decode(found.tokens.prompt).startswith("<s><|im_start|>user\nbe brief\n\nwhy red<|im_end|>")
