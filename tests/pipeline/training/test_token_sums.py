"""How tokens become sums: each way of weighing them by hand, and from a real model's logits."""

import numpy as np
import pytest
import torch

from prefcache.pipeline.config import Tokens
from prefcache.pipeline.model.logprobs import padded_logps
from prefcache.pipeline.training.token_sums import Seed
from tests.helpers.models import build, sequence
from tests.helpers.token_lists import answer_sums, wpo_weights

torch.set_num_threads(1)


def lists(*rows):
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


# The first pair has 4 and 2 tokens, the second 1 and 3. All numbers are exact in float32.
POLICY = {"chosen": lists([-1, -2, -4, -8], [-0.5]), "rejected": lists([-3, -5], [-1, -1, -2])}
REFERENCE = {"chosen": lists([-2, -2, -2, -2], [-1]), "rejected": lists([-4, -4], [-1, -2, -4])}
SEED = Seed(0, 1, [0, 1])


def sums(policy=POLICY, reference=REFERENCE, seed=SEED, **tokens):
    return {name: x.tolist() for name, x in answer_sums(policy, reference, Tokens(**tokens), seed).items()}


PLAIN = {"chosen_logp": [-15, -0.5], "rejected_logp": [-8, -4]}
PLAIN_REFERENCE = {"ref_chosen_logp": [-8, -1], "ref_rejected_logp": [-8, -7]}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({}, PLAIN),
        # LD-DPO weighs what lies beyond the shorter answer, of policy and reference.
        # First pair: -1 - 2 + 0.5 (-4 - 8) = -9 of the chosen, the reference's -4 + 0.5 * -4 = -6. Second: -1 + 0.5 * -3.
        (
            {"ld_alpha": 0.5},
            {"chosen_logp": [-9, -0.5], "rejected_logp": [-8, -2.5]}
            | {"ref_chosen_logp": [-6, -1], "ref_rejected_logp": [-8, -4]},
        ),
        # Of the policy alone, it leaves the reference's sums to the cache.
        ({"ld_alpha": 0.5, "ld_alpha_of": "policy"}, {"chosen_logp": [-9, -0.5], "rejected_logp": [-8, -2.5]}),
        # Other weights are of both: decay 0.5 weighs 1, 1/2, 1/4, 1/8; ld_alpha halves the policy's last two.
        (
            {"ld_alpha": 0.5, "ld_alpha_of": "policy", "decay": 0.5},
            {"chosen_logp": [-1 - 1 - 0.5 - 0.5, -0.5], "rejected_logp": [-5.5, -1 - 0.25 - 0.25]}
            | {"ref_chosen_logp": [-2 - 1 - 0.5 - 0.25, -1], "ref_rejected_logp": [-6, -1 - 1 - 1]},
        ),
        (
            {"ld_alpha": 0.5, "ld_alpha_of": "policy", "clamp": (-100, 100)},
            {"chosen_logp": [-9, -0.5], "rejected_logp": [-8, -2.5]} | PLAIN_REFERENCE,
        ),
        # An ld_alpha of 1 is plain.
        ({"ld_alpha": 1}, PLAIN | PLAIN_REFERENCE),
        ({"ld_alpha": 1, "ld_alpha_of": "policy"}, PLAIN),
        # Each token counts half of the one before: -1 - 1 - 1 - 1; -3 - 2.5; -1 - 0.5 - 0.5
        (
            {"decay": 0.5},
            {"chosen_logp": [-4, -0.5], "rejected_logp": [-5.5, -2]}
            | {"ref_chosen_logp": [-3.75, -1], "ref_rejected_logp": [-6, -3]},
        ),
        ({"decay": 1}, PLAIN | PLAIN_REFERENCE),
        # Humanline: ratios 1, 0, -2, -6 become 1, 0, -1.5, -1.5 on the reference's -2 each; -0.5 - -1 = 0.5 stays.
        # Rejected: 1, -1 stay; 0, 1, 2 become 0, 1, 1.5 on -1, -2, -4.
        (
            {"clamp": (-1.5, 1.5)},
            {"chosen_logp": [-10, -0.5], "rejected_logp": [-8, -4.5]} | PLAIN_REFERENCE,
        ),
        # Clamped -1, -2, -3.5, -3.5 times 1, 1/2, 1/4, 1/8; -3, -5 times 1, 1/2; -1, -1, -2.5.
        (
            {"clamp": (-1.5, 1.5), "decay": 0.5},
            {"chosen_logp": [-1 - 1 - 0.875 - 0.4375, -0.5], "rejected_logp": [-5.5, -1 - 0.5 - 0.625]}
            | {"ref_chosen_logp": [-3.75, -1], "ref_rejected_logp": [-6, -3]},
        ),
    ],
)
def test_sums_by_hand(tokens, expected):
    assert sums(**tokens) == expected


def test_log_probs_are_added_up_in_float64():
    # 2**24 + 1 is no float32.
    big = answer_sums({"chosen": lists([-16777216.0, -1.0])}, {}, Tokens(), Seed(0, 0, [0]))["chosen_logp"]
    assert big.dtype == torch.float64 and big.tolist() == [-16777217]


@pytest.mark.parametrize("of", ["both", "policy"])
def test_an_ld_alpha_of_zero_is_the_common_length(of):
    cut = sums(ld_alpha=0, ld_alpha_of=of)
    assert (cut["chosen_logp"], cut["rejected_logp"]) == ([-3, -0.5], [-8, -1])


def test_decay_and_ld_alpha_multiply():
    # -1 - 1 and half of -1 - 1
    assert sums(decay=0.5, ld_alpha=0.5)["chosen_logp"] == [-3, -0.5]


def test_a_label_has_weights_without_another_answer():
    one = {"completion": lists([-2, -4])}
    weighed = sums(one, one, Seed(0, 1, [0]), decay=0.5)
    assert weighed == {"completion_logp": [-4], "ref_completion_logp": [-4]}


def test_without_a_reference_only_the_policy_is_weighed():
    assert sums(reference={}, decay=0.5) == {"chosen_logp": [-4, -0.5], "rejected_logp": [-5.5, -2]}


def test_if_policy_and_reference_agree_a_clamp_changes_nothing():
    clamped = sums(policy=REFERENCE, clamp=(-1.5, 1.5))
    assert clamped["chosen_logp"] == clamped["ref_chosen_logp"] == [-8, -1]


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [
        ({"clamp": (-1.5, 1.5)}, {"chosen": [[1, 1, 0, 0], [1]], "rejected": [[1, 1], [1, 1, 0]]}),
        (
            {"decay": 0.5, "ld_alpha": 0.25},
            {"chosen": [[1, 0.5, 0.0625, 0.03125], [1]], "rejected": [[1, 0.5], [1, 0.125, 0.0625]]},
        ),
    ],
)
def test_each_tokens_gradient_is_its_weight_and_nothing_is_learned_beyond_a_clamp(tokens, weights):
    policy = {name: [each.clone().requires_grad_() for each in rows] for name, rows in POLICY.items()}
    weighed = answer_sums(policy, REFERENCE, Tokens(**tokens), SEED)
    (weighed["chosen_logp"].sum() + weighed["rejected_logp"].sum()).backward()
    assert {name: [each.grad.tolist() for each in rows] for name, rows in policy.items()} == weights
    assert not weighed["ref_chosen_logp"].requires_grad


# -- SamPO -----------------------------------------------------------------------------------------------------------

# Token n has -2**n, so that a sum says which tokens it is of.
N_LONG, N_SHORT = 20, 7
POWERS = [-(2.0**n) for n in range(N_LONG)]
LONG = {"chosen": lists(POWERS), "rejected": lists(POWERS[:N_SHORT])}


def drawn(seed=0, epoch=1, row=0, policy=LONG, name="chosen"):
    total = -int(sums(policy, policy, Seed(seed, epoch, [row]), sampo=True)[f"{name}_logp"][0])
    return {n for n in range(N_LONG) if total >> n & 1}


def test_sampo_takes_as_many_tokens_of_the_longer_answer_as_the_shorter_has():
    assert len(drawn()) == N_SHORT and drawn(name="rejected") == set(range(N_SHORT))


def test_sampo_takes_the_same_tokens_of_policy_and_reference():
    twice = {name: [2 * each[0]] for name, each in LONG.items()}
    drawn = sums(LONG, twice, Seed(0, 1, [0]), sampo=True)
    assert drawn["ref_chosen_logp"][0] == 2 * drawn["chosen_logp"][0] != 2 * sum(POWERS)


def test_what_sampo_draws_depends_on_seed_epoch_and_example():
    draws = [drawn(), drawn(seed=1), drawn(epoch=2), drawn(row=1)]
    assert all(draws[i] != draws[k] for i in range(4) for k in range(i))
    assert drawn() == draws[0]
    # Over many epochs every token has its turn, each in 7 of 20.
    counts = np.bincount([n for epoch in range(400) for n in drawn(epoch=epoch)], minlength=N_LONG)
    assert counts.sum() == 400 * N_SHORT and abs(counts / 400 - 0.35).max() < 0.1


def test_what_sampo_draws_does_not_depend_on_the_batch():
    three = {"chosen": lists(POWERS[:9], POWERS, POWERS[:3]), "rejected": lists(POWERS[:4], POWERS[:N_SHORT], POWERS)}
    together, alone = (
        sums(three, three, Seed(0, 1, [5, 8, 2]), sampo=True),
        sums(LONG, LONG, Seed(0, 1, [8]), sampo=True),
    )
    assert {name: [values[1]] for name, values in together.items()} == alone


def test_sampo_of_answers_of_one_length_takes_all():
    even = {"chosen": lists([-1, -2], [-3]), "rejected": lists([-4, -8], [-5])}
    assert sums(even, even, sampo=True) == sums(even, even, decay=1)


# -- WPO -------------------------------------------------------------------------------------------------------------


def test_wpo_weights_by_hand():
    # Means of own minus log-sum-squares: (-1 + 1.5 - 2 + 0.5) / 2 = -0.5 and -3 + 1 = -2 of one example.
    weights = wpo_weights(
        {"chosen": lists([-1, -2]), "rejected": lists([-3])}, {"chosen": lists([-1.5, -0.5]), "rejected": lists([-1])}
    )
    assert weights.dtype == torch.float64 and weights.tolist() == pytest.approx([np.exp(-2.5)], rel=1e-6)


def test_wpo_weights_are_those_of_the_models_own_distributions():
    """Eq. 2 and its alignment straight from softmax in float64: exp of the mean of log p(token) - log sum p^2, over both answers."""
    model = build("llama")
    answers = {"chosen": [sequence(3, 5), sequence(4, 1)], "rejected": [sequence(3, 2, 1), sequence(4, 6, 1)]}
    flat = [*answers["chosen"], *answers["rejected"]]
    result = padded_logps(model, flat, squares=True)
    logps, squares = result.logps, result.squares
    found = wpo_weights({"chosen": logps[:2], "rejected": logps[2:]}, {"chosen": squares[:2], "rejected": squares[2:]})
    assert logps[0].requires_grad and not found.requires_grad
    exact = build("llama").double()
    expected = np.ones(2)
    for sequences in answers.values():
        for i, answer in enumerate(sequences):
            prompt, completion = answer.prompt_ids, answer.completion_ids
            ids = torch.tensor([[*prompt.tolist(), *completion.tolist()]])
            with torch.no_grad():
                p_TV = exact(input_ids=ids).logits[0].softmax(-1)[len(prompt) - 1 : -1]
            own_N = p_TV[torch.arange(len(completion)), torch.from_numpy(completion).long()]
            expected[i] *= float((own_N / (p_TV**2).sum(-1)).log().mean().exp())
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert abs(found[0] - found[1]) > 1e-3


def test_an_answer_drawn_from_an_even_distribution_weighs_one():
    # Of four tokens of 1/4 each: log p = log 1/4, log sum p^2 = log 4/16: nothing to choose between.
    even = float(np.log(0.25))
    assert wpo_weights({"chosen": lists([even] * 3)}, {"chosen": lists([even] * 3)}).tolist() == [1]
