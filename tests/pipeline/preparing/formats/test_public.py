"""Public data sets are read as their publishers lay them out: what was asked, which answer is better, what is a tie."""

from typing import Any

import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing.example import Candidate, Pair, Ranking, Unusable
from prefcache.pipeline.preparing.expand_rankings import expand
from prefcache.pipeline.preparing.formats import recognise
from tests.helpers.formats import assistant, read, refused, user


def best_and_worst(ranking: Ranking, ties: bool = False) -> list[tuple[Any, Any]]:
    """The pair that a ranking gives; none if it is a tie."""
    try:
        examples = expand(ranking, pairing="best_worst", ties=ties, as_labels=False)
    except Unusable as unusable:
        assert unusable.reason == "tie"
        return []
    return [(pair.chosen, pair.rejected) for pair in examples if isinstance(pair, Pair)]


# Anthropic's HH


def hh(chosen: str, rejected: str) -> Pair:
    return read("hh", {"chosen": chosen, "rejected": rejected})


def test_hh_gives_turns_without_the_space_after_the_marker():
    start = "\n\nHuman: hi there\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    assert hh(f"{start} because ", f"{start}  no\nreally") == Pair(
        prompt=[user("hi there"), assistant("hello"), user("why?")],
        chosen=[assistant("because ")],
        rejected=[assistant(" no\nreally")],
    )


def test_hh_answers_hold_several_turns_where_the_transcripts_part_early():
    pair = hh(
        "\n\nHuman: why?\n\nAssistant: a\n\nHuman: and?\n\nAssistant: b",
        "\n\nHuman: why?\n\nAssistant: c\n\nHuman: so?\n\nAssistant: d",
    )
    assert pair.prompt == [user("why?")]
    assert pair.chosen == [assistant("a"), user("and?"), assistant("b")]
    assert pair.rejected == [assistant("c"), user("so?"), assistant("d")]


def test_hh_markers_without_a_blank_line_are_speech():
    said = "he wrote Human: stop\nAssistant: no"
    pair = hh(f"\n\nHuman: {said}\n\nAssistant: a\nHuman: b", f"\n\nHuman: {said}\n\nAssistant: c")
    assert (pair.prompt, pair.chosen) == ([user(said)], [assistant("a\nHuman: b")])


def test_hh_transcripts_may_lack_the_first_blank_line_and_answers_may_begin_alike():
    for start in ("\n\nHuman: why?\n\nAssistant:", "Human: why?\n\nAssistant:"):
        pair = hh(f"{start} I know", f"{start} I do not")
        assert (pair.chosen, pair.rejected) == ([assistant("I know")], [assistant("I do not")])


@pytest.mark.parametrize(
    ("chosen", "reason", "detail"),
    [
        ("\n\nHuman: why?\n\nAssistant:", "empty answer", "chosen"),
        ("\n\nHuman: why?\n\nAssistant: a\n\nHuman: b\n\nAssistant: ", "empty answer", "chosen"),
        ("\n\nHuman: why?\n\nAssistant: a\n\nHuman: b", "no assistant turn", "human"),
        ("\n\nHuman: who?\n\nAssistant: a", "empty prompt", "different messages"),
        ("\n\nHuman: why?\n\nHuman: who?\n\nAssistant: a", "no assistant turn", "in both"),
        ("because", "no transcript", "chosen"),
        ("so: \n\nHuman: why?\n\nAssistant: a", "no transcript", "chosen"),
        (None, "wrong type", "chosen is null"),
    ],
)
def test_hh_refuses_what_is_not_a_transcript_with_an_answer(chosen, reason, detail):
    found = refused("hh", {"chosen": chosen, "rejected": "\n\nHuman: why?\n\nAssistant: b"})
    assert found[0] == reason
    assert detail in found[1]


def test_transcripts_beside_a_prompt_are_not_hh():
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert recognise([row]).name == "hh"
    assert recognise([row | {"prompt": "a"}]).name == "pairs"


# Pairs

WHOLE = {
    "prompt": "why?",
    "chosen": [user("why?"), assistant("because")],
    "rejected": [user("why?"), assistant("no")],
}
ORCA = {"system": "be kind", "question": "why?", "chosen": "because", "rejected": "no"}
PKU = {"prompt": "why?", "response_0": "r0", "response_1": "r1", "better_response_id": 0, "safer_response_id": 1}
SHP = {"history": "why?", "human_ref_A": "a", "human_ref_B": "b", "score_A": 3, "score_B": 30}
STACK = {"question": "why?", "response_j": "because", "response_k": "no"}


@pytest.mark.parametrize(
    "columns",
    [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"), ("chosen_score", "rejected_score")],
)
@pytest.mark.parametrize("scores", [(8.5, 3.0), (7.0, 7.0)])
def test_ultrafeedback_binarized_does_not_ask_twice_and_its_equal_scores_are_a_pair(columns, scores):
    row = WHOLE | dict(zip(columns, scores, strict=True))
    assert recognise([row]).name == "ultrafeedback_binarized"
    assert read("ultrafeedback_binarized", row) == Pair(
        prompt=[user("why?")],
        chosen=[assistant("because")],
        rejected=[assistant("no")],
        columns=dict(zip(("chosen_score", "rejected_score"), scores, strict=True)),
    )


def test_answers_alone_next_to_a_prompt_are_trls_pairs():
    assert recognise([WHOLE | {"chosen": [assistant("a")], "rejected": [assistant("b")]}]).name == "pairs"


def test_orca_has_a_system_message_where_the_row_has_one():
    asked = [{"role": "system", "content": "be kind"}, user("why?")]
    assert read("orca_dpo_pairs", ORCA) == Pair(prompt=asked, chosen="because", rejected="no")
    assert read("orca_dpo_pairs", ORCA | {"system": ""}).prompt == "why?"


@pytest.mark.parametrize(
    ("name", "row", "options", "chosen", "rejected", "columns"),
    [
        ("pku_saferlhf", PKU, {}, "r0", "r1", {}),
        ("pku_saferlhf", PKU, {"by": "safer"}, "r1", "r0", {}),
        ("stack_exchange_paired", STACK, {}, "because", "no", {}),
        ("shp", SHP | {"labels": 1}, {}, "a", "b", {"chosen_score": 3.0, "rejected_score": 30.0}),
        ("shp", SHP | {"labels": 0}, {}, "b", "a", {"chosen_score": 30.0, "rejected_score": 3.0}),
    ],
)
def test_which_answer_is_the_better_one(name, row, options, chosen, rejected, columns):
    assert read(name, row, **options) == Pair(prompt="why?", chosen=chosen, rejected=rejected, columns=columns)


# Rankings

ARGILLA = {"instruction": "why?", "chosen_response": "because", "rejected_response": "no"}
ULTRAFEEDBACK = {
    "instruction": "why?",
    "completions": [
        {"response": "a", "fine-grained_score": 2.0, "overall_score": 10.0},
        {"response": "b", "fine-grained_score": 4.5, "overall_score": 7.0},
        {"response": "c", "fine-grained_score": 3.0, "overall_score": 1.0},
    ],
}
DISTILABEL = {"system": "", "input": "why?", "chosen": "because", "rejected": "no"}
HELPSTEER2 = {"prompt": "why?", "response_1": "one", "response_2": "two"}
HELPSTEER3 = {"context": [user("why?")], "response1": "one", "response2": "two"}
WEBGPT = {"question": {"full_text": "why?"}, "answer_0": "a", "answer_1": "b", "score_0": -0.25, "score_1": 0.25}
ARENA = {f"conversation_{name}": [user("why?"), assistant(name)] for name in "ab"}
A, B = [assistant("a")], [assistant("b")]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("argilla_ultrafeedback", ARGILLA, [("because", "no")]),
        (
            "argilla_ultrafeedback",
            ARGILLA | {"chosen_avg_rating": 4.5, "rejected_avg_rating": 4.0},
            [("because", "no")],
        ),
        ("argilla_ultrafeedback", ARGILLA | {"chosen_avg_rating": 4.5, "rejected_avg_rating": 4.5}, []),
        ("ultrafeedback", ULTRAFEEDBACK, [("b", "a")]),
        # The ratings are in the judge's order, here rejected first, whatever the status.
        ("distilabel_orca", DISTILABEL | {"rating": [3.0, 9.0], "status": "unchanged"}, [("because", "no")]),
        ("distilabel_orca", DISTILABEL | {"rating": [3.0, 9.0], "status": "swapped"}, [("because", "no")]),
        ("distilabel_orca", DISTILABEL | {"rating": [5.0, 5.0]}, []),
        *(
            ("distilabel_orca", DISTILABEL | {"rating": rating, "status": "tie"}, [])
            for rating in ([5.0, 5.0], None, [None, None], [])
        ),
        *(
            (name, row | {column: strength}, expected)
            for name, row, column in (
                ("helpsteer2", HELPSTEER2, "preference_strength"),
                ("helpsteer3", HELPSTEER3, "overall_preference"),
            )
            for strength, expected in (
                (-3, [("one", "two")]),
                (-1, [("one", "two")]),
                (0, []),
                (1, [("two", "one")]),
                (3, [("two", "one")]),
            )
        ),
        ("webgpt", WEBGPT, [("b", "a")]),
        ("webgpt", WEBGPT | {"score_0": 0.0, "score_1": 0.0}, []),
        ("arena", ARENA | {"winner": "model_a"}, [(A, B)]),
        ("arena", ARENA | {"winner": "model_b"}, [(B, A)]),
        ("arena", ARENA | {"winner": "tie"}, []),
        ("arena", ARENA | {"winner": "tie (bothbad)"}, []),
    ],
)
def test_the_better_answer_of_a_ranking_or_a_tie(name, row, expected):
    ranking = read(name, row)
    assert best_and_worst(ranking) == expected
    assert ranking.prompt in ("why?", [user("why?")])
    if not expected:
        assert len(best_and_worst(ranking, ties=True)) == 1


def test_rankings_keep_the_scores_of_their_answers():
    assert best_and_worst(read("ultrafeedback", ULTRAFEEDBACK, by="overall")) == [("a", "c")]
    assert read("ultrafeedback", ULTRAFEEDBACK).answers[1] == Candidate("b", 4.5, 4.5)
    ranking = read("distilabel_orca", DISTILABEL | {"rating": [3.0, 9.0]})
    assert [(answer.turns, answer.score) for answer in ranking.answers] == [("because", 9.0), ("no", 3.0)]


def test_marked_prompts_of_helpsteer2_are_turns():
    prompt = "why?\n<extra_id_1>Assistant\nbecause\nso\n<extra_id_1>User\nand then?"
    turns = [user("why?"), assistant("because\nso"), user("and then?")]
    row = HELPSTEER2 | {"preference_strength": -1}
    for text in (prompt, prompt + "\n<extra_id_1>Assistant\n"):
        assert read("helpsteer2", row | {"prompt": text}).prompt == turns
    # The line break before a mark belongs to the mark; no mark follows the last turn.
    assert read("helpsteer2", row | {"prompt": prompt + "\n"}).prompt == [*turns[:2], user("and then?\n")]


def test_nectar_ranks_from_one_downwards():
    answers = [{"answer": name, "rank": rank} for name, rank in (("b", 2.0), ("c", 3.0), ("a", 1.0))]
    row = {"prompt": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant: ", "answers": answers}
    ranking = read("nectar", row)
    assert ranking.prompt == [user("hi"), assistant("hello"), user("why?")]
    assert best_and_worst(ranking) == [("a", "c")]


@pytest.mark.parametrize(
    ("name", "row", "reason", "detail"),
    [
        (
            "ultrafeedback",
            {"instruction": "why?", "completions": [{"response": "a"}]},
            "missing column",
            "'fine-grained_score'; found response",
        ),
        (
            "ultrafeedback",
            {"instruction": "why?", "completions": [{"response": "a", "fine-grained_score": None}]},
            "wrong type",
            "fine-grained_score is null",
        ),
        ("helpsteer3", HELPSTEER3 | {"context": [], "overall_preference": 1}, "empty prompt", "context"),
        ("nectar", {"prompt": "why?", "answers": []}, "no transcript", "prompt"),
        ("nectar", {"prompt": "\n\nAssistant: ", "answers": []}, "empty prompt", ""),
        ("nectar", {"prompt": "", "answers": []}, "no transcript", "prompt"),
        *(("pku_saferlhf", PKU | {"better_response_id": n}, "wrong type", "expected 0 or 1") for n in (-1, 2, 0.5)),
        ("arena", ARENA | {"winner": "nobody"}, "unknown winner", "'nobody'"),
    ],
)
def test_a_record_that_cannot_be_read_says_why(name, row, reason, detail):
    found = refused(name, row)
    assert found[0] == reason and detail in found[1]


def test_an_unknown_by_is_the_users_mistake():
    with pytest.raises(UsageError, match=r"no by: 'kinder'. It has: better, safer"):
        read("pku_saferlhf", PKU, by="kinder")
    with pytest.raises(UsageError, match=r"no by: 'mean'. It has: fine-grained, overall"):
        read("ultrafeedback", ULTRAFEEDBACK, by="mean")
