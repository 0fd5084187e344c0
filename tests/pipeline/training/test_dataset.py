"""Every example once per epoch, in an order that a resumed run finds again, with all that is known of it."""

import numpy as np
import pytest

from prefcache.pipeline.stored.token_logps import token_logps
from prefcache.pipeline.training.dataset import Examples, SplitData, n_steps, steps
from tests.helpers.examples import MINE, cache_for, floats, label, logps_of, pair, table

NAN = float("nan")


def pair_rows(n: int) -> list[dict]:
    """Prompts of 1 to 5 tokens, chosen answers of 1 to 7, rejected ones of 1 to 3."""
    return [pair(i, [i] * (1 + i % 5), [100 + i] * (1 + i % 7), [200 + i] * (1 + i % 3)) for i in range(n)]


def pairs(n: int, without: tuple[int, ...] = (), **more) -> Examples:
    reference = {"ref_chosen_logp": -1.0 * np.arange(n), "ref_rejected_logp": -2.0 * np.arange(n)}
    reference["ref_chosen_logp"][list(without)] = NAN
    return Examples(SplitData(table(pair_rows(n), "pairs"), reference | more, ("chosen", "rejected")))


def labels(**more) -> Examples:
    """Four labels, of which the second has no mismatched answer."""
    kl = ([5, 5], None, [6] * 9, [7])
    rows = [label(i, [i] * 2, [10 + i] * (i + 1), i % 2 == 0, kl=kl[i]) for i in range(4)]
    columns = {"label": np.array([1.0, 0, 1, 0]), "ref_completion_logp": -np.arange(4.0)}
    columns["ref_kl_logp"] = np.array([-1, NAN, -3, -4])
    return Examples(SplitData(table(rows, "labels"), columns | more, ("completion",), ("kl",)))


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_examples", "batch_size", "epochs", "expected"),
    [
        *[(10, 4, 1, 3), (8, 4, 1, 2), (10, 4, 2, 6), (10, 4, 0.5, 2)],
        *[(3, 32, 1, 1), (3, 32, 0.01, 1), (100, 10, 0.25, 2), (1, 1, 3, 3)],
    ],
)
def test_steps_are_counted_by_hand(n_examples, batch_size, epochs, expected):
    # ceil(10 / 4) = 3 steps an epoch; half of 3 is 1.5, rounded to the even 2; a quarter of 10 is 2.5, to 2; at least 1.
    assert n_steps(n_examples, batch_size, epochs) == expected
    assert len(list(steps(n_examples, batch_size, epochs, 0, 0))) == expected


@pytest.mark.parametrize(("n_examples", "batch_size"), [(10, 4), (8, 4), (1, 1), (7, 100), (33, 2)])
def test_every_example_is_seen_once_per_epoch(n_examples, batch_size):
    per_epoch = n_steps(n_examples, batch_size, 1)
    run = list(steps(n_examples, batch_size, 3, 0, 0))
    for epoch in range(3):
        seen = np.concatenate([indices for _, _, indices in run[epoch * per_epoch : (epoch + 1) * per_epoch]])
        assert sorted(seen) == list(range(n_examples))
    assert all(len(indices) <= batch_size for _, _, indices in run)


def test_steps_count_from_one_and_say_how_far_the_epochs_are():
    # 10 examples in steps of 4 are 3 steps an epoch.
    assert [(step, epoch) for step, epoch, _ in steps(10, 4, 2, 0, 0)] == [(i, i / 3) for i in range(1, 7)]


@pytest.mark.parametrize("after", range(7))
def test_a_resumed_run_sees_the_steps_that_were_left(after):
    def plain(run):
        return [(step, epoch, indices.tolist()) for step, epoch, indices in run]

    assert plain(steps(10, 4, 2, 7, after)) == plain(steps(10, 4, 2, 7, 0))[after:]


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        run = list(steps(50, 50, 2, seed, 0))
        return run[epoch][2].tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), list(range(50))]
    assert all(orders[i] != orders[k] for i in range(4) for k in range(i))
    assert order(0, 0) == order(0, 0)


def test_ranks_sort_and_leave_equal_ones_in_the_order_of_the_shuffle():
    ranks = (np.array([2, 1, 2, 1, 1]), np.zeros(5, int))
    sorted_, plain = ([indices.tolist() for _, _, indices in steps(5, 5, 3, 4, 0, each)] for each in (ranks, ()))
    assert sorted_[0] == [i for rank in (1, 2) for i in plain[0] if ranks[0][i] == rank]
    assert sorted_[1:] == plain[1:]  # of the second epoch; and of those after the last


def test_more_epochs_do_not_change_the_first():
    one, two = (list(steps(10, 4, epochs, 0, 0)) for epochs in (1, 2))
    assert [indices.tolist() for *_, indices in one] == [indices.tolist() for *_, indices in two[:3]]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_a_number_of_steps_replaces_the_epochs_and_runs_through_as_many_as_it_takes(n):
    # 3 steps an epoch, so 7 steps end one into the third epoch; the order is that of three epochs.
    assert n_steps(10, 4, 0.5, n) == n
    run, whole = (list(steps(10, 4, epochs, 7, 0, (), most)) for epochs, most in ((0.5, n), (3, None)))
    assert [(step, epoch, rows.tolist()) for step, epoch, rows in run] == [
        (step, epoch, rows.tolist()) for step, epoch, rows in whole[:n]
    ]


# -- examples --------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_tokens_and_columns_of_its_pairs():
    batch = pairs(10).batch(np.array([7, 2]), ("chosen", "rejected"))
    # Pair 7: prompt 1 + 7 % 5 = 3 tokens, chosen 1 + 0, rejected 1 + 1; pair 2: 3, 3 and 3.
    chosen, rejected = batch.answers["chosen"], batch.answers["rejected"]
    assert [s.prompt_ids.tolist() for s in chosen] == [[7, 7, 7], [2, 2, 2]]
    assert [s.completion_ids.tolist() for s in chosen] == [[107], [102, 102, 102]]
    assert [s.completion_ids.tolist() for s in rejected] == [[207, 207], [202, 202, 202]]
    assert batch.rows == [7, 2] and batch.reference_tokens == {}
    assert {name: values.tolist() for name, values in batch.columns.items()} == {
        "ref_chosen_logp": [-7, -2],
        "ref_rejected_logp": [-14, -4],
    }
    assert all(values.dtype == np.float64 for values in batch.columns.values())


def test_only_the_answers_that_are_asked_for_have_their_tokens():
    for names in ((), ("rejected",)):
        assert tuple(pairs(3).batch(np.array([0]), names).answers) == names


def test_examples_without_a_value_are_left_out_and_counted_by_the_column_that_lacks_it():
    scores = np.array([1.0, 2, NAN, NAN, 5, 6])
    found = pairs(6, without=(0, 3), chosen_score=scores)
    # Pairs 0 and 3 for their log-prob, 2 for its score; 3 lacks both and is counted once.
    assert (len(found), found.left_out) == (3, {"ref_chosen_logp": 2, "chosen_score": 1})
    everything = np.arange(3)
    assert found.example_ids(everything) == ["e1", "e4", "e5"]
    batch = found.batch(everything, ("rejected",))
    assert batch.rows == [1, 4, 5] and batch.columns["ref_chosen_logp"].tolist() == [-1, -4, -5]
    assert [s.prompt_ids[0] for s in batch.answers["rejected"]] == [1, 4, 5]
    texts, ids = found.prompts(np.array([2, 0]))
    assert texts == ["why 5?", "why 1?"] and [list(row) for row in ids] == [[5], [1, 1]]


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_no_examples_are_none(kind):
    answers, optional = (("chosen", "rejected"), ()) if kind == "pairs" else (("completion",), ("kl",))
    found = Examples(SplitData(table([], kind), {f"ref_{answers[0]}_logp": np.empty(0)}, answers, optional))
    assert (len(found), found.left_out) == (0, {})
    assert found.micro_batches(np.arange(0), 10) == found.micro_batches(np.arange(0), 10, 2) == []
    assert found.batch(np.arange(0), answers).rows == []


@pytest.mark.parametrize(
    ("without", "n", "left_out"), [((), 3, {}), ((0, 1, 2), 0, {"ref_chosen_logp": 3})], ids=["none", "all"]
)
def test_none_or_all_examples_may_lack_something(without, n, left_out):
    found = pairs(3, without)
    assert (len(found), found.left_out) == (n, left_out)


def test_tokens_of_a_step_are_those_of_both_sequences():
    # Pair 0: (1 + 1) + (1 + 1) = 4; pair 7: (3 + 1) + (3 + 2) = 9
    assert pairs(10).n_tokens(np.array([0, 7])) == 13
    assert pairs(10).n_counted_tokens("rejected", np.array([7, 0])).tolist() == [2, 1]
    assert pairs(10, without=(0,)).n_tokens(np.array([6])) == 9  # of the seventh that is left


def test_a_loss_of_chosen_answers_alone_counts_no_rejected_tokens():
    # Also where an evaluation looks at both.
    found = Examples(SplitData(table(pair_rows(10), "pairs"), {}, ("chosen", "rejected"), learned=("chosen",)))
    assert found.n_tokens(np.array([0, 7])) == 2 + 4
    assert list(found.batch(np.array([0]), ("rejected",)).answers) == ["rejected"]


# -- labels ----------------------------------------------------------------------------------------------------------


def test_a_label_without_a_mismatched_answer_stays_and_has_none():
    found = labels()
    assert (len(found), found.left_out) == (4, {})
    batch = found.batch(np.array([1, 0]), ("completion", "kl"))
    assert [s.completion_ids.tolist() for s in batch.answers["completion"]] == [[11, 11], [10]]
    assert batch.answers["kl"][0] is None
    assert batch.answers["kl"][1].prompt_ids.tolist() == [0, 0]
    assert batch.answers["kl"][1].completion_ids.tolist() == [5, 5]
    assert batch.columns["label"].tolist() == [0, 1] and np.isnan(batch.columns["ref_kl_logp"][0])


@pytest.mark.parametrize("ref_kl_logp", [[NAN] * 4, [NAN, NAN, -3, -4]], ids=["all", "two"])
def test_a_mismatched_answer_without_a_reference_value_is_no_answer(ref_kl_logp):
    answers = labels(ref_kl_logp=np.array(ref_kl_logp)).batch(np.arange(4), ("kl",)).answers["kl"]
    assert [each is None for each in answers] == np.isnan(ref_kl_logp).tolist()


def test_a_label_lacking_its_own_value_is_left_out_also_of_the_others():
    found = labels(ref_completion_logp=np.array([0, -1, NAN, -3]))
    assert found.left_out == {"ref_completion_logp": 1}
    assert found.batch(np.arange(3)).columns["ref_kl_logp"].tolist()[::2] == [-1, -4]


def test_tokens_of_labels_are_those_of_their_own_answers():
    # (2 + 1) + (2 + 2) + (2 + 3) + (2 + 4): mismatched answers are not learned from.
    assert labels().n_tokens(np.arange(4)) == 18
    assert labels().n_counted_tokens("kl", np.arange(4)).tolist() == [2, 0, 9, 1]


def test_the_references_tokens_follow_the_examples(tmp_path):
    rows = pair_rows(6)
    cache, examples = cache_for(tmp_path, rows, without=(rows[1]["rejected_key"],)), table(rows, "pairs")
    keys = [examples["chosen_key"], examples["rejected_key"]]
    sums = cache.logps(keys, [MINE])
    columns = {
        f"ref_{name}_logp": np.ma.filled(values, NAN) for name, values in zip(("chosen", "rejected"), sums, strict=True)
    }
    tokens = dict(zip(("chosen", "rejected"), token_logps(cache, keys, sums, [MINE]), strict=True))
    found = Examples(SplitData(examples, columns, ("chosen", "rejected"), tokens=tokens))
    assert found.left_out == {"ref_rejected_logp": 1}
    batch = found.batch(np.array([4, 1]), ("chosen", "rejected"))
    # Without row 1, the fifth is row 5 and the second row 2.
    assert batch.rows == [5, 2]
    for name in ("chosen", "rejected"):
        expected = [logps_of(rows[i]["prompt_ids"], rows[i][f"{name}_ids"]) for i in (5, 2)]
        assert [floats(each) for each in batch.reference_tokens[name]] == expected
        assert [sum(each) for each in expected] == batch.columns[f"ref_{name}_logp"].tolist()


# -- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [None, 1, 7, 1000])
@pytest.mark.parametrize("budget", [1, 20, 50, 10_000])
def test_micro_batches_hold_every_pair_once_within_the_budget(budget, most):
    found = pairs(40, without=(5,))
    indices = np.random.default_rng(0).permutation(len(found))[:30]
    parts = found.micro_batches(indices, budget, most)
    assert sorted(np.concatenate(parts)) == sorted(indices)
    for part in parts:
        batch = found.batch(part, ("chosen", "rejected"))
        longest = max(sequence.n_tokens for answers in batch.answers.values() for sequence in answers)
        # Both answers of every pair, padded to the longest.
        assert len(part) == 1 or 2 * len(part) * longest <= budget
        assert len(part) <= (most or 30)
    if budget == 10_000:
        assert len(parts) == {None: 1, 1: 30, 7: 5, 1000: 1}[most]


def test_at_most_so_many_examples_are_those_that_follow_one_another():
    # What statistics are taken over with train.scope micro must not depend on how long the examples are.
    found, indices = pairs(40), np.random.default_rng(0).permutation(40)[:10]
    parts = found.micro_batches(indices, 10_000, 4)
    assert [sorted(part) for part in parts] == [sorted(indices[at : at + 4]) for at in (0, 4, 8)]


def test_a_mismatched_answer_that_is_longer_counts_for_the_budget():
    # Padded: 3, 4, 5 and 6 tokens of completions; 4, 2, 11 and 3 of mismatched answers.
    parts = labels().micro_batches(np.arange(4), 12)
    assert sorted(np.concatenate(parts)) == [0, 1, 2, 3]
    assert [part.tolist() for part in parts if 2 in part] == [[2]]  # two of 11 would be 22
    assert [sorted(part.tolist()) for part in labels().micro_batches(np.arange(4), 44)] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_processes_share_a_step_by_tokens(n):
    found, indices = pairs(40), np.random.default_rng(1).permutation(40)[:20]
    parts = found.shares(indices, n, "packed")
    assert sorted(np.concatenate(parts)) == sorted(indices) and len(parts) == n
    # Packed: what both answers' sequences have, but for their last tokens.
    tokens = [found.n_tokens(part) - 2 * len(part) for part in parts]
    assert max(tokens) - min(tokens) <= max(found.n_tokens(indices[i : i + 1]) - 2 for i in range(20))
    assert n > 1 or parts[0].tolist() == indices.tolist()


# Three pairs of a ranking, and two pairs of prompts of their own.
A, B, C = [5, 6, 7], [5, 6, 8, 8], [9, 9]
RANKING = [(1, [1, 2], A, B), (2, [3], [4, 4], [4, 5, 5]), (3, [1, 2], A, C), (4, [1, 2, 2], A, C), (5, [1, 2], B, C)]


def ranking() -> Examples:
    rows = [pair(*row) for row in RANKING]
    columns = {f"ref_{name}_logp": np.zeros(len(rows)) for name in ("chosen", "rejected")}
    return Examples(SplitData(table(rows, "pairs"), columns, ("chosen", "rejected")))


def test_what_answers_begin_with_is_counted_once():
    found, everything = ranking(), np.arange(5)
    # Inputs: the prompt's 2, A's 5 6, B's 5 6 8, C's 9. A and B share 5 6. The second pair: 3, then 4, then 4 5 that shares 4.
    assert found.sizes(everything, "shared").tolist() == [2 + 3, 1 + 2, 2 + 2 + 1, 3 + 2 + 1, 2 + 3 + 1]
    assert found.sizes(everything, "packed").tolist() == [9, 5, 7, 9, 8]
    # The three pairs of one prompt together: 1 2 5 6 8, which holds A's inputs, and 9.
    assert found.count_tokens(np.array([0, 2, 4]), "shared") == 6
    assert found.count_tokens(everything, "shared") == 6 + 3 + 6
    assert found.count_tokens(everything, "packed") == 9 + 5 + 7 + 9 + 8
    assert found.count_tokens(everything, "padded") == 5 * 2 * 6
    assert [found.count_tokens(everything[:0], layout) for layout in ("shared", "packed", "padded")] == [0, 0, 0]


def test_examples_of_a_prompt_fall_into_one_micro_batch_if_it_has_room():
    found, everything = ranking(), np.arange(5)

    def split(budget: int, most: int | None = None) -> list[list[int]]:
        return sorted(sorted(part.tolist()) for part in found.micro_batches(everything, budget, most, "shared"))

    assert split(15) == [[0, 1, 2, 3, 4]]
    assert split(9) == [[0, 1, 2, 4], [3]]
    # Each of the three takes 5 or 6, and all of them 6.
    assert split(6) == [[0, 2, 4], [1], [3]]
    assert split(5) == [[0], [1], [2], [3], [4]]
    assert split(100, 2) == [[0, 1], [2, 3], [4]]


def test_processes_share_the_examples_of_one_prompt_if_it_is_most_of_the_step():
    found = ranking()
    assert [part.tolist() for part in found.shares(np.arange(5), 1, "shared")] == [[0, 1, 2, 3, 4]]
    assert sorted(part.tolist() for part in found.shares(np.arange(5), 2, "shared")) == [[0, 1, 2, 4], [3]]
    # Of a prompt alone, no process would have anything to do but one.
    parts = found.shares(np.array([0, 2, 4]), 2, "shared")
    assert sorted(np.concatenate(parts)) == [0, 2, 4] and all(map(len, parts))


def test_a_process_may_have_no_example():
    assert [len(part) for part in pairs(3).shares(np.array([1, 2]), 4, "shared")] == [1, 1, 0, 0]
