"""A record's examples: which pairs a ranking makes, what a tie becomes, and what holds nothing to learn from."""

import datetime
from typing import Any

import pytest

from prefcache.pipeline.preparing.example import Candidate, Label, Pair, Ranking, Turns, Unusable
from prefcache.pipeline.preparing.expand_rankings import check, expand
from tests.helpers.formats import assistant, user

TOOLS = [{"name": "look"}]


def ranking(**standings: float) -> Ranking:
    answers = tuple(Candidate(name, standing, standing * 10) for name, standing in standings.items())
    return Ranking(prompt="why?", tools=TOOLS, template_kwargs={"thinking": True}, answers=answers)


def made(read: Any, pairing: Any = "best_worst", ties: bool = False) -> list[str]:
    examples = expand(read, pairing=pairing, ties=ties, as_labels=False)
    return [f"{each.chosen}>{each.rejected}" for each in examples if isinstance(each, Pair)]


def reason(function: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(Unusable) as caught:
        function(*arguments, **options)
    return caught.value.reason


def pair(chosen: Turns = "because", rejected: Turns = "no", prompt: Turns = "why?", **more: Any) -> Pair:
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, **more)


def label(completion: Turns = "because", prompt: Turns = "why?", **more: Any) -> Label:
    return Label(prompt=prompt, completion=completion, label=True, **more)


# Pairings


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        ("best_worst", ["b>c"]),
        ("best_rest", ["b>a", "b>d", "b>c"]),
        ("adjacent", ["b>a", "a>d", "d>c"]),
        ("all", ["b>a", "b>d", "b>c", "a>d", "a>c", "d>c"]),
    ],
)
def test_a_ranking_makes_the_pairs_that_were_asked_for(pairing, expected):
    assert made(ranking(a=3, b=4, c=1, d=2), pairing) == expected


@pytest.mark.parametrize("pairing", ["best_worst", "best_rest", "adjacent", "all"])
def test_two_answers_make_one_pair_however_they_are_paired(pairing):
    assert made(ranking(a=1, b=2), pairing) == ["b>a"]


def test_a_pair_of_a_ranking_keeps_scores_and_what_goes_beside_the_prompt():
    (first,) = expand(ranking(a=1, b=2), pairing="all", ties=False, as_labels=False)
    scores = {"chosen_score": 20, "rejected_score": 10}
    assert first == pair("b", "a", columns=scores, tools=TOOLS, template_kwargs={"thinking": True})


@pytest.mark.parametrize(
    ("pairing", "without", "with_ties"),
    [
        # b and c tie at the top: b is named first
        ("best_worst", ["b>a"], ["b>a"]),
        ("best_rest", ["b>a"], ["b>c", "b>a"]),
        ("adjacent", ["c>a"], ["b>c", "c>a"]),
        ("all", ["b>a", "c>a"], ["b>c", "b>a", "c>a"]),
    ],
)
def test_answers_that_tie_are_paired_only_where_ties_are_kept(pairing, without, with_ties):
    assert made(ranking(a=1, b=2, c=2), pairing) == without
    assert made(ranking(a=1, b=2, c=2), pairing, ties=True) == with_ties


@pytest.mark.parametrize("pairing", ["best_worst", "best_rest", "adjacent", "all"])
def test_answers_that_all_tie_are_a_tie(pairing):
    assert reason(made, ranking(a=1, b=1, c=1), pairing) == "tie"
    assert made(ranking(a=1, b=1), pairing, ties=True) == ["a>b"]


def test_one_answer_is_nothing_to_compare():
    assert reason(made, ranking(a=1)) == "nothing to compare"
    assert reason(made, ranking()) == "nothing to compare"


# Labels


def test_a_pair_taken_apart_is_a_yes_and_a_no():
    read = pair(tools=TOOLS, template_kwargs={"thinking": True}, rendered=True)
    beside = {"prompt": "why?", "tools": TOOLS, "template_kwargs": {"thinking": True}, "rendered": True}
    assert expand(read, pairing="best_worst", ties=False, as_labels=True) == [
        Label(completion="because", label=True, **beside),
        Label(completion="no", label=False, **beside),
    ]


def test_a_label_stays_one():
    assert expand(label(), pairing="best_worst", ties=False, as_labels=True) == [label()]
    assert expand(label(), pairing="best_worst", ties=False, as_labels=False) == [label()]


@pytest.mark.parametrize("ties", [False, True])
def test_one_answer_is_never_labelled_both_yes_and_no(ties):
    for same in (pair("no", "no"), pair([assistant("no")], "no")):
        assert reason(expand, same, pairing="all", ties=ties, as_labels=True) == "chosen equals rejected"


# What can be learnt from


@pytest.mark.parametrize(
    "good",
    [
        pair(),
        pair([assistant("because")]),
        pair([assistant("a"), user("b"), assistant("c")]),
        pair([{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]),
        pair([{"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}]),
        pair(prompt=[{"role": "system", "content": "be kind"}]),
        pair([user("rendered")], rendered=True),
        label(),
    ],
)
def test_an_example_with_a_question_and_answers_is_fine(good):
    check(good, ties=False)


BAD = [
    ("empty prompt", pair(prompt="")),
    ("empty prompt", pair(prompt=" \n\t")),
    ("empty prompt", pair(prompt=[])),
    ("empty prompt", pair(prompt=[user("")])),
    ("empty prompt", pair(prompt=[user(" "), assistant("")])),
    ("empty prompt", label(prompt=[user("")])),
    ("empty answer", pair("")),
    ("empty answer", pair(rejected=" \n")),
    ("empty answer", pair([])),
    ("empty answer", pair(rejected=[assistant("")])),
    ("empty answer", pair([assistant(""), assistant(" ")])),
    ("empty answer", label("")),
    ("no assistant turn", pair([user("because")])),
    ("no assistant turn", label([{"role": "tool", "content": "42"}])),
    ("chosen equals rejected", pair("no", "no")),
    ("chosen equals rejected", pair([assistant("no")], [assistant("no")])),
    ("chosen equals rejected", pair([assistant("no")], "no")),
]


@pytest.mark.parametrize(("why", "bad"), BAD, ids=[f"{why}-{i}" for i, (why, _) in enumerate(BAD)])
def test_a_bad_example_says_why(why, bad):
    assert reason(check, bad, ties=False) == why


def test_identical_answers_are_let_be_where_ties_are_kept():
    check(pair("no", "no"), ties=True)


def test_what_a_table_may_hold_in_a_message_is_let_be():
    check(pair([assistant("because") | {"said_at": datetime.datetime(2024, 5, 1), "raw": b"x"}]), ties=False)


def test_the_detail_names_the_column():
    with pytest.raises(Unusable) as caught:
        check(pair(rejected=[user("no")]), ties=False)
    assert caught.value.detail == "rejected has turns of user"
