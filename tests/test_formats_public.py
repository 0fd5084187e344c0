"""Public data sets are read as their publishers lay them out: what was asked, which answer is better, what is a tie."""

from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.preparing.example import Pair, Ranked, Ranking, Unusable
from pipeline.preparing.examples import expand
from pipeline.preparing.formats import get_format, recognise


def read(name: str, record: dict, **options: Any) -> Any:
    return get_format(name).bind(options)(record)


def refused(name: str, record: dict, **options: Any) -> tuple[str, str]:
    with pytest.raises(Unusable) as caught:
        read(name, record, **options)
    return caught.value.reason, caught.value.detail


def user(said: str) -> dict:
    return {"role": "user", "content": said}


def assistant(said: str) -> dict:
    return {"role": "assistant", "content": said}


def pairs(ranking: Ranking, ties: bool = False) -> list[tuple[Any, Any]]:
    made = expand(ranking, pairing="best_worst", ties=ties, as_labels=False)
    return [(pair.chosen, pair.rejected) for pair in made if isinstance(pair, Pair)]


def is_tie(ranking: Ranking) -> bool:
    try:
        pairs(ranking)
    except Unusable as unusable:
        assert unusable.reason == "tie"
        return True
    return False


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


def test_hh_answers_that_begin_alike_are_cut_at_the_turn():
    pair = hh("\n\nHuman: why?\n\nAssistant: I know", "\n\nHuman: why?\n\nAssistant: I do not")
    assert (pair.chosen, pair.rejected) == ([assistant("I know")], [assistant("I do not")])


def test_hh_markers_without_a_blank_line_are_speech():
    said = "he wrote Human: stop\nAssistant: no"
    pair = hh(f"\n\nHuman: {said}\n\nAssistant: a\nHuman: b", f"\n\nHuman: {said}\n\nAssistant: c")
    assert (pair.prompt, pair.chosen) == ([user(said)], [assistant("a\nHuman: b")])


def test_hh_without_the_leading_blank_line_is_the_same():
    assert hh("Human: why?\n\nAssistant: a", "Human: why?\n\nAssistant: b") == hh(
        "\n\nHuman: why?\n\nAssistant: a", "\n\nHuman: why?\n\nAssistant: b"
    )


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
def test_hh_refuses_what_is_no_transcript_with_an_answer(chosen, reason, detail):
    found = refused("hh", {"chosen": chosen, "rejected": "\n\nHuman: why?\n\nAssistant: b"})
    assert found[0] == reason
    assert detail in found[1]


def test_transcripts_beside_a_prompt_are_not_hh():
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert recognise([row]).name == "hh"
    assert recognise([row | {"prompt": "a"}]).name == "pairs"


# UltraFeedback and what was made of it

WHOLE = {
    "prompt": "why?",
    "chosen": [user("why?"), assistant("because")],
    "rejected": [user("why?"), assistant("no")],
}


def test_ultrafeedback_binarized_does_not_ask_twice():
    pair = read("ultrafeedback_binarized", WHOLE | {"score_chosen": 8.5, "score_rejected": 3})
    assert pair == Pair(
        prompt=[user("why?")],
        chosen=[assistant("because")],
        rejected=[assistant("no")],
        chosen_score=8.5,
        rejected_score=3.0,
    )


def test_equal_scores_of_ultrafeedback_binarized_are_a_pair():
    pair = read("ultrafeedback_binarized", WHOLE | {"score_chosen": 7.0, "score_rejected": 7.0})
    assert (pair.chosen_score, pair.rejected_score) == (7.0, 7.0)


@pytest.mark.parametrize(
    ("better", "worse"), [("chosen-rating", "rejected-rating"), ("chosen_score", "rejected_score")]
)
def test_its_kin_name_their_scores_otherwise(better, worse):
    row = WHOLE | {better: 5, worse: 1}
    assert recognise([row]).name == "ultrafeedback_binarized"
    pair = read("ultrafeedback_binarized", row)
    assert (pair.chosen_score, pair.rejected_score) == (5.0, 1.0)


def test_answers_alone_beside_a_prompt_are_our_pairs():
    assert recognise([WHOLE | {"chosen": [assistant("a")], "rejected": [assistant("b")]}]).name == "pairs"


def test_equal_ratings_of_argilla_are_a_tie():
    row = {"instruction": "why?", "chosen_response": "because", "rejected_response": "no"}
    name = "argilla_ultrafeedback"
    assert pairs(read(name, row)) == [("because", "no")]
    assert pairs(read(name, row | {"chosen_avg_rating": 4.5, "rejected_avg_rating": 4.0})) == [("because", "no")]
    assert is_tie(read(name, row | {"chosen_avg_rating": 4.5, "rejected_avg_rating": 4.5}))


def test_ultrafeedback_ranks_by_the_mean_or_by_the_overall_score():
    grades = {"a": (2.0, 10.0), "b": (4.5, 7.0), "c": (3.0, 1.0)}
    completions = [
        {"response": name, "fine-grained_score": mean, "overall_score": overall}
        for name, (mean, overall) in grades.items()
    ]
    row = {"instruction": "why?", "completions": completions}
    assert pairs(read("ultrafeedback", row)) == [("b", "a")]
    assert pairs(read("ultrafeedback", row, by="overall")) == [("a", "c")]
    assert read("ultrafeedback", row).answers[1] == Ranked("b", 4.5, 4.5)


def test_ultrafeedback_without_a_grade_is_refused():
    row = {"instruction": "why?", "completions": [{"response": "a"}]}
    assert refused("ultrafeedback", row) == ("missing column", "'fine-grained_score'; found response")
    row["completions"][0]["fine-grained_score"] = None
    assert refused("ultrafeedback", row)[0] == "wrong type"


# Orca

ORCA = {"system": "be kind", "question": "why?", "chosen": "because", "rejected": "no"}


def test_orca_has_a_system_message_where_the_row_has_one():
    asked = [{"role": "system", "content": "be kind"}, user("why?")]
    assert read("orca_dpo_pairs", ORCA) == Pair(prompt=asked, chosen="because", rejected="no")
    assert read("orca_dpo_pairs", ORCA | {"system": ""}).prompt == "why?"


DISTILABEL = {"system": "", "input": "why?", "chosen": "because", "rejected": "no"}


@pytest.mark.parametrize("status", ["unchanged", "swapped"])
def test_distilabel_gives_the_higher_rating_to_the_chosen(status):
    # rating is in the judge's order, here rejected first
    ranking = read("distilabel_orca", DISTILABEL | {"rating": [3.0, 9.0], "status": status})
    assert [(answer.turns, answer.score) for answer in ranking.answers] == [("because", 9.0), ("no", 3.0)]
    assert pairs(ranking) == [("because", "no")]


@pytest.mark.parametrize("rating", [[5.0, 5.0], None, [None, None], []])
def test_a_tie_of_distilabel_is_governed_by_ties(rating):
    ranking = read("distilabel_orca", DISTILABEL | {"rating": rating, "status": "tie"})
    assert is_tie(ranking)
    assert pairs(ranking, ties=True) == [("because", "no")]


def test_equal_ratings_of_distilabel_tie_without_a_status():
    assert is_tie(read("distilabel_orca", DISTILABEL | {"rating": [5.0, 5.0]}))


# HelpSteer


@pytest.mark.parametrize(
    ("strength", "expected"), [(-3, ("one", "two")), (-1, ("one", "two")), (1, ("two", "one")), (3, ("two", "one"))]
)
def test_below_zero_helpsteer_prefers_the_first(strength, expected):
    row = {"prompt": "why?", "response_1": "one", "response_2": "two", "preference_strength": strength}
    assert pairs(read("helpsteer2", row)) == [expected]
    row = {"context": [user("why?")], "response1": "one", "response2": "two", "overall_preference": strength}
    ranking = read("helpsteer3", row)
    assert (pairs(ranking), ranking.prompt) == ([expected], [user("why?")])


def test_zero_is_a_tie_in_helpsteer():
    row = {"prompt": "why?", "response_1": "one", "response_2": "two", "preference_strength": 0}
    assert is_tie(read("helpsteer2", row))
    row = {"context": [user("why?")], "response1": "one", "response2": "two", "overall_preference": 0}
    assert is_tie(read("helpsteer3", row))


def test_marked_prompts_of_helpsteer2_are_turns():
    prompt = "why?\n<extra_id_1>Assistant\nbecause\nso\n<extra_id_1>User\nand then?"
    row = {"prompt": prompt, "response_1": "one", "response_2": "two", "preference_strength": -1}
    assert read("helpsteer2", row).prompt == [user("why?"), assistant("because\nso"), user("and then?")]
    row["prompt"] = prompt + "\n<extra_id_1>Assistant\n"
    assert read("helpsteer2", row).prompt == [user("why?"), assistant("because\nso"), user("and then?")]


def test_helpsteer3_without_a_context_is_refused():
    row = {"context": [], "response1": "one", "response2": "two", "overall_preference": 1}
    assert refused("helpsteer3", row)[0] == "empty prompt"


# The others


def test_nectar_ranks_from_one_downwards():
    answers = [{"answer": name, "rank": rank} for name, rank in (("b", 2.0), ("c", 3.0), ("a", 1.0))]
    row = {"prompt": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant: ", "answers": answers}
    ranking = read("nectar", row)
    assert ranking.prompt == [user("hi"), assistant("hello"), user("why?")]
    assert pairs(ranking) == [("a", "c")]


@pytest.mark.parametrize(
    ("prompt", "reason"), [("why?", "no transcript"), ("\n\nAssistant: ", "empty prompt"), ("", "no transcript")]
)
def test_nectar_without_a_question_is_refused(prompt, reason):
    assert refused("nectar", {"prompt": prompt, "answers": []})[0] == reason


PKU = {"prompt": "why?", "response_0": "r0", "response_1": "r1", "better_response_id": 0, "safer_response_id": 1}


def test_pku_is_read_by_what_is_better_or_by_what_is_safer():
    assert read("pku_saferlhf", PKU) == Pair(prompt="why?", chosen="r0", rejected="r1")
    assert read("pku_saferlhf", PKU, by="safer") == Pair(prompt="why?", chosen="r1", rejected="r0")


def test_an_unknown_by_is_the_users_mistake():
    with pytest.raises(UsageError, match=r"no by: 'kinder'. It has: better, safer"):
        read("pku_saferlhf", PKU, by="kinder")
    with pytest.raises(UsageError, match=r"no by: 'mean'. It has: fine-grained, overall"):
        read("ultrafeedback", {"instruction": "a", "completions": []}, by="mean")


@pytest.mark.parametrize("better", [-1, 2, 0.5])
def test_pku_refuses_a_third_answer(better):
    assert refused("pku_saferlhf", PKU | {"better_response_id": better})[0] == "wrong type"


def test_j_is_the_better_answer_of_stack_exchange():
    row = {"question": "why?", "response_j": "because", "response_k": "no"}
    assert read("stack_exchange_paired", row) == Pair(prompt="why?", chosen="because", rejected="no")


@pytest.mark.parametrize(("label", "chosen", "scores"), [(1, "a", (3.0, 30.0)), (0, "b", (30.0, 3.0))])
def test_label_one_of_shp_is_for_a(label, chosen, scores):
    row = {"history": "why?", "human_ref_A": "a", "human_ref_B": "b", "labels": label, "score_A": 3, "score_B": 30}
    pair = read("shp", row)
    assert (pair.chosen, pair.chosen_score, pair.rejected_score) == (chosen, *scores)


def test_webgpt_prefers_the_positive_score_and_zero_is_a_tie():
    row = {"question": {"full_text": "why?"}, "answer_0": "a", "answer_1": "b", "score_0": -0.25, "score_1": 0.25}
    assert pairs(read("webgpt", row)) == [("b", "a")]
    assert is_tie(read("webgpt", row | {"score_0": 0.0, "score_1": 0.0}))


@pytest.mark.parametrize(("winner", "expected"), [("model_a", ("a", "b")), ("model_b", ("b", "a"))])
def test_arena_prefers_the_winner(winner, expected):
    row = {f"conversation_{name}": [user("why?"), assistant(name)] for name in "ab"}
    assert pairs(read("arena", row | {"winner": winner})) == [([assistant(expected[0])], [assistant(expected[1])])]


def test_arena_has_two_kinds_of_ties():
    row = {f"conversation_{name}": [user("why?"), assistant(name)] for name in "ab"}
    assert is_tie(read("arena", row | {"winner": "tie"}))
    assert is_tie(read("arena", row | {"winner": "tie (bothbad)"}))
    assert refused("arena", row | {"winner": "nobody"})[0] == "unknown winner"
