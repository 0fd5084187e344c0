"""What an objective reads comes from data and cache, or is missing and then refused before any model is loaded."""

import numpy as np
import pytest

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.training import cache_join, loss_columns
from prefcache.pipeline.training.bco_density_ratio import density_ratios
from prefcache.pipeline.training.selection import Selection
from tests.helpers.examples import (
    MINE,
    answers,
    cache_for,
    cache_of,
    floats,
    label,
    logps_of,
    masked,
    objective,
    pair,
    prepared,
    scored,
)

SCORES = {"chosen_score": 3.0, "rejected_score": 1.0}
PAIRS = [
    pair(0, [1], [2, 3, 4], [5], chosen_score=4.0, rejected_score=1.5),
    pair(1, [1, 1], [6], [7, 8], chosen_score=None, rejected_score=2.0),
    pair(2, [2], [5], [9, 9], chosen_score=float("nan"), rejected_score=0.0),
    pair(3, [3], [4], [8], split="held_out", **SCORES),
]
LABELS = [
    label(0, [1, 7], [2, 3], True, kl=[4]),
    label(1, [1, 9], [5], False),  # has no mismatched answer
    label(2, [1, 7], [6], True, kl=[7, 8]),
    label(3, [1, 9], [4], False, kl=[2]),
    label(4, [3], [4], True, kl=[9], split="held_out"),
]
EVERY = np.arange(10)


def without_scores(rows):
    return [row | {"chosen_score": None, "rejected_score": None} for row in rows]


def without_kl(rows):
    return [row | {"kl_ids": None, "kl_key": None, "n_kl": None} for row in rows]


def examples(tmp_path, rows, failed=(), **train):
    """Training and held-out examples of these rows, with all their answers scored but for those that failed."""
    chosen, data = objective(**train), prepared(tmp_path / "prepared", rows)
    loss_columns.refuse_missing(chosen, data)
    cache = cache_for(tmp_path / "cache", rows, failed) if chosen.reference_answers else None
    density_ratio = bool(train.get("density_ratio"))
    found = cache_join.join_cache(chosen, data, cache, [MINE], density_ratio=density_ratio)
    return found["train"], found["held_out"]


def batch(split, *answers):
    return split.batch(np.arange(len(split)), answers)


def values(split) -> dict[str, list[float]]:
    return {name: each.tolist() for name, each in batch(split).columns.items()}


def refusal(tmp_path, rows, **train) -> str:
    with pytest.raises(UsageError) as caught:
        loss_columns.refuse_missing(objective(**train), prepared(tmp_path / "prepared", rows))
    return str(caught.value)


# -- what is missing -------------------------------------------------------------------------------------------------


def test_pairs_for_a_loss_of_labels_are_refused_with_losses_that_would_work(tmp_path):
    message = refusal(tmp_path, without_scores(PAIRS), loss="kto")
    assert (
        f"Loss 'kto' reads completion_logp, ref_completion_logp, label, kl_logp, ref_kl_logp, and {tmp_path}" in message
    )
    assert "prepared holds pairs, not labelled answers" in message and "prepare.examples: labels" in message
    works = message.partition("Losses for the data as it is: ")[2].rstrip(".").split(", ")
    assert {"sigmoid", "ipo", "simpo", "sft"} <= set(works)
    # Neither those for labels nor those that read grades, which these pairs lack.
    assert not {"kto", "bco", "rpo", "odpo"} & set(works)


def test_labels_for_a_loss_of_pairs_are_refused_with_losses_that_would_work(tmp_path):
    message = refusal(tmp_path, LABELS, loss="sigmoid")
    assert "holds labelled answers, not pairs" in message and "prepare.examples: pairs" in message
    assert message.endswith("Losses for the data as it is: kto, apo_zero_unpaired, bco.")


def test_pairs_without_grades_are_refused_for_a_loss_that_reads_them(tmp_path):
    message = refusal(tmp_path, without_scores(PAIRS), loss=["sigmoid", "rpo"])
    assert "Loss '1 sigmoid + 1 rpo' reads chosen_score, rejected_score, and" in message and "lacks that" in message
    assert "Data whose answers have grades gives it (prefcache formats)" in message and "sigmoid, " in message


def test_labels_without_mismatched_answers_are_refused_for_kto(tmp_path):
    message = refusal(tmp_path, without_kl(LABELS), loss="kto")
    assert "reads kl_logp, ref_kl_logp" in message and "prepare.kl_pairs: true" in message
    assert message.endswith("Losses for the data as it is: apo_zero_unpaired, bco.")


@pytest.mark.parametrize(("rows", "loss"), [(PAIRS, "rpo"), (PAIRS, "sigmoid"), (LABELS, "kto"), (LABELS, "bco")])
def test_what_some_examples_have_is_there(tmp_path, rows, loss):
    loss_columns.refuse_missing(objective(loss=loss), prepared(tmp_path, rows))


def test_a_single_label_has_no_mismatched_answer_and_the_remedy_says_why(tmp_path):
    message = refusal(tmp_path, without_kl(LABELS[:1]), loss="kto")
    assert "if all answers are the same, no answer can be mismatched" in message


# -- where columns come from -----------------------------------------------------------------------------------------


def sums(rows, name):
    return [sum(logps_of(row["prompt_ids"], row[f"{name}_ids"])) for row in rows]


def test_pairs_have_lengths_and_the_references_sums(tmp_path):
    train, held_out = examples(tmp_path, PAIRS, loss="sigmoid")
    assert values(train) == {
        "n_chosen_counted": [3, 1, 1],
        "n_rejected_counted": [1, 2, 2],
        "ref_chosen_logp": sums(PAIRS[:3], "chosen"),
        "ref_rejected_logp": sums(PAIRS[:3], "rejected"),
    }
    # By hand: -(2 + 2*3 + 3*4) / 8 and -(7 + 2*8) / 8
    assert values(train)["ref_chosen_logp"][0] == -2.5 and values(train)["ref_rejected_logp"][1] == -2.875
    assert values(held_out) == {
        "n_chosen_counted": [1],
        "n_rejected_counted": [1],
        "ref_chosen_logp": [-0.5],
        "ref_rejected_logp": [-1],
    }


def test_grades_that_are_null_or_not_a_number_leave_their_pair_out_and_are_counted(tmp_path):
    train, held_out = examples(tmp_path, PAIRS, loss="rpo")
    assert train.example_ids(np.arange(1)) == ["e0"] and len(train) == 1
    assert (train.left_out, held_out.left_out) == ({"chosen_score": 2}, {})
    assert (values(train)["chosen_score"], values(train)["rejected_score"]) == ([4], [1.5])


def test_a_pair_without_two_columns_is_counted_once(tmp_path):
    # Pair 1 has no grade; its failed log-prob adds nothing. Pair 0's does.
    failed = (PAIRS[0]["rejected_key"], PAIRS[1]["chosen_key"])
    train, _ = examples(tmp_path, [*PAIRS[:2], PAIRS[3] | {"split": "train"}], failed, loss="rpo")
    assert train.left_out == {"chosen_score": 1, "ref_rejected_logp": 1} and train.example_ids(EVERY[:1]) == ["e3"]


def test_a_loss_of_chosen_answers_alone_is_judged_by_both(tmp_path):
    train, _ = examples(tmp_path, PAIRS, loss="sft")
    assert values(train) == {"n_chosen_counted": [3, 1, 1], "n_rejected_counted": [1, 2, 2]}
    # (1 + 3) + (2 + 1) + (1 + 1) tokens to learn from
    assert train.n_tokens(np.arange(3)) == 9 and len(batch(train, "rejected").answers["rejected"]) == 3


def test_a_loss_that_reads_no_grades_leaves_nobody_out_for_them(tmp_path):
    train, _ = examples(tmp_path, PAIRS, loss="sigmoid")
    assert len(train) == 3 and train.left_out == {}


def test_without_a_reference_there_are_no_scores_to_lack(tmp_path):
    train, held_out = examples(tmp_path, PAIRS, loss="simpo")
    assert values(train) == {"n_chosen_counted": [3, 1, 1], "n_rejected_counted": [1, 2, 2]} and len(held_out) == 1
    free, _ = examples(tmp_path, PAIRS, loss="sigmoid", reference_free=True)
    assert values(free)["ref_chosen_logp"] == values(free)["ref_rejected_logp"] == [0, 0, 0]


def test_a_label_without_a_mismatched_answer_is_kept_with_nothing_for_it(tmp_path):
    train, held_out = examples(tmp_path, LABELS, loss="kto")
    found = values(train)
    assert (len(train), train.left_out) == (4, {})
    assert (found["label"], found["n_completion_counted"]) == ([1, 0, 1, 0], [2, 1, 1, 1])
    assert found["ref_completion_logp"] == sums(LABELS[:4], "completion")
    assert found["ref_kl_logp"][0] == -0.5 and np.isnan(found["ref_kl_logp"][1])
    assert [answer is None for answer in batch(train, "kl").answers["kl"]] == [False, True, False, False]
    assert values(held_out)["label"] == [1]


def test_a_mismatched_answer_whose_reference_failed_counts_as_none(tmp_path):
    # Else a clamp would compare its tokens with none.
    train, _ = examples(tmp_path, LABELS, (LABELS[2]["kl_key"],), loss="kto", tokens={"clamp": (-1, 1)})
    found = batch(train, "completion", "kl")
    assert len(train) == 4 and train.left_out == {}
    assert [answer is None for answer in found.answers["kl"]] == [False, True, True, False]
    assert [len(tokens) for tokens in found.reference_tokens["completion"]] == [2, 1, 1, 1]
    assert floats(found.reference_tokens["kl"][0]) == [-0.5] and floats(found.reference_tokens["kl"][3]) == [-0.25]


def test_a_loss_without_the_divergence_reads_no_mismatched_answer(tmp_path):
    train, _ = examples(tmp_path, LABELS, (LABELS[0]["kl_key"],), loss="apo_zero_unpaired")
    assert values(train).keys() == {"n_completion_counted", "ref_completion_logp", "label"} and len(train) == 4


def test_tokens_of_the_reference_are_there_only_where_they_are_weighed(tmp_path):
    plain, _ = examples(tmp_path, PAIRS, loss="sigmoid")
    assert batch(plain, "chosen").reference_tokens == {}
    train, held_out = examples(tmp_path, PAIRS, loss="sigmoid", tokens={"decay": 0.9})
    found = batch(train, "chosen", "rejected").reference_tokens
    assert [floats(each) for each in found["chosen"]] == [logps_of([], row["chosen_ids"]) for row in PAIRS[:3]]
    assert [floats(each) for each in batch(held_out, "rejected").reference_tokens["rejected"]] == [[-1]]
    assert list(batch(train, "chosen").reference_tokens) == ["chosen"]  # of those that are asked for


@pytest.mark.parametrize("rows", [PAIRS[:3], [row for row in PAIRS if row["split"] == "held_out"]])
def test_an_empty_split_is_empty(tmp_path, rows):
    train, held_out = examples(tmp_path, rows, loss="sigmoid", tokens={"decay": 0.9})
    assert sorted([len(train), len(held_out)]) == [0, len(rows)]


# -- which tokens count ----------------------------------------------------------------------------------------------

MASKED = [
    masked(pair(0, [1], [2, 3, 4], [5]), chosen=[0, 1, 2, 3]),
    masked(pair(1, [1, 1], [6], [7, 8]), rejected=[1, 2]),
    pair(2, [3], [4], [8], split="held_out"),
]


def test_lengths_and_sums_are_of_the_tokens_that_count(tmp_path):
    train, held_out = examples(tmp_path, MASKED, loss="sigmoid")
    assert values(train) == {
        "n_chosen_counted": [2, 1],
        "n_rejected_counted": [1, 1],
        "ref_chosen_logp": [-1.75, -0.75],  # -(2 + 12)/8, -6/8
        "ref_rejected_logp": [-0.625, -2.0],  # -5/8, -16/8
    }
    assert values(held_out)["n_chosen_counted"] == [1]
    found = batch(train, "chosen", "rejected").answers
    # The forward sees whole answers, and is told whose log-probs are wanted.
    assert [each.completion_ids.tolist() for each in found["chosen"]] == [[2, 3, 4], [6]]
    assert found["chosen"][0].counted.tolist() == [0, 2] and found["chosen"][1].counted is None
    assert found["rejected"][1].counted.tolist() == [1]
    # What a step costs is a matter of all tokens.
    assert train.n_tokens(np.arange(2)) == (1 + 3) + (1 + 1) + (2 + 1) + (2 + 2)


def test_the_references_tokens_are_those_that_count(tmp_path):
    train, _ = examples(tmp_path, MASKED, loss="sigmoid", tokens={"decay": 0.9})
    found = batch(train, "chosen", "rejected").reference_tokens
    assert [floats(each) for each in found["chosen"]] == [[-0.25, -1.5], [-0.75]]
    assert [floats(each) for each in found["rejected"]] == [[-0.625], [-2.0]]


def test_a_mask_over_sums_alone_is_refused_and_whole_answers_are_not(tmp_path):
    cache = cache_of(tmp_path / "cache", [scored(*each, logps=None) for each in answers(MASKED)])
    chosen = objective(loss="sigmoid")
    with pytest.raises(UsageError, match=r"2 answers have tokens that do not count.*prepare\.train_on to all"):
        cache_join.join_cache(chosen, prepared(tmp_path / "masked", MASKED), cache, [MINE], density_ratio=False)
    whole = [masked(row, chosen=[0, len(row["chosen_ids"])], rejected=[0, len(row["rejected_ids"])]) for row in MASKED]
    found = cache_join.join_cache(chosen, prepared(tmp_path / "whole", whole), cache, [MINE], density_ratio=False)
    assert values(found["train"])["ref_chosen_logp"] == [-2.5, -0.75]


def test_a_loss_without_a_reference_needs_no_cache_for_a_mask(tmp_path):
    train, _ = examples(tmp_path, MASKED, loss="simpo")
    assert values(train) == {"n_chosen_counted": [2, 1], "n_rejected_counted": [1, 1]}


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ("n_chosen_counted < n_chosen", ["e0"]),
        ("ref_chosen_logp <> ref_chosen_logp_all", ["e0"]),
        ("ref_rejected_logp_all = -2.875", ["e1"]),
        ("margin = -1.125 and margin_per_token = -0.25 and length_difference = 1", ["e0"]),
    ],
)
def test_a_selection_reads_sums_of_counted_and_of_all_tokens(tmp_path, where, chosen):
    # e0: -1.75 + 0.625 = -1.125 and -1.75/2 + 0.625/1 = -0.25
    data, cache = prepared(tmp_path / "prepared", MASKED), cache_for(tmp_path / "cache", MASKED)
    selection = Selection(Train(where=where), "pairs")
    found = cache_join.join_cache(objective(), data, cache, [MINE], density_ratio=False, selection=selection)["train"]
    assert found.example_ids(np.arange(len(found))) == chosen


# -- density ratios --------------------------------------------------------------------------------------------------


def test_density_ratios_are_one_unless_asked_for(tmp_path):
    train, held_out = examples(tmp_path, LABELS, loss="bco")
    assert values(train)["density_ratio"] == [1] * 4 and values(held_out)["density_ratio"] == [1]


def test_density_ratios_are_fitted_on_the_training_split(tmp_path):
    train, held_out = examples(tmp_path, LABELS, loss="bco", density_ratio=True)
    found = values(train)["density_ratio"]
    prompts = [np.array(row["prompt_ids"], np.int32) for row in LABELS]
    expected = density_ratios(prompts, np.array([1, 0, 1, 0]))
    assert found == pytest.approx(expected[:4]) and values(held_out)["density_ratio"] == pytest.approx(expected[4:])
    # Word 7 is in desirable prompts only, 9 in undesirable ones only.
    assert found[0] > 1 > found[1]


def test_tokens_of_another_number_than_the_answer_has_are_refused(tmp_path):
    # The row agrees with itself, one token for one; the answer has two.
    row = pair(0, [1], [2, 3], [4])
    short = {**scored([1], [2, 3], logps=[-1.0], logp_sum=-1.0), "n_completion": 1}
    cache = cache_of(tmp_path / "cache", [short, scored([1], [4])])
    chosen = objective(loss="sigmoid", tokens={"decay": 0.9})
    data = prepared(tmp_path / "prepared", [row, pair(1, [1], [4], [4], split="held_out")])
    with pytest.raises(IntegrityError, match="another number of log-probs for an answer than the answer has tokens"):
        cache_join.join_cache(chosen, data, cache, [MINE], density_ratio=False)
