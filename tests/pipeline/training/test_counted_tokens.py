"""What a step computes where only some tokens of an answer count, against the model's plain forward in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prefcache.pipeline.config import Train
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.training import cache_join
from prefcache.pipeline.training.distributed import make_accelerator
from prefcache.pipeline.training.gradient_step import accumulate_gradient
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.policy import Policy
from tests.helpers.examples import MINE, answers, cache_of, label, masked, pair, prepared, scored

torch.set_num_threads(1)
DICE = np.random.default_rng(0)
NAMES = ("chosen", "rejected")
# Answers of two turns with text between them that does not count; one that counts from its middle, one as a whole.
SPANS = [([0, 3, 6, 9], [0, 2]), ([2, 7], [1, 3, 4, 6]), ([4, 5], [0, 7]), ([0, 9], [3, 4])]
ROWS = [
    masked(pair(i, *(DICE.integers(3, 280, n).tolist() for n in (4 + i, 9, 7))), chosen=chosen, rejected=rejected)
    for i, (chosen, rejected) in enumerate(SPANS)
]
N = len(ROWS)
REFERENCE = {
    (tuple(prompt), tuple(answer)): (-5.7 + DICE.normal(0, 0.5, len(answer))).astype(np.float32)
    for prompt, answer in answers(ROWS)
}


@pytest.fixture
def start(model, tmp_path):
    """A policy, the examples of ROWS with the reference's log-probs from a cache of whole answers, and an objective."""

    def make(**settings: Any) -> tuple[Policy, Any, Objective]:
        train = Train(learning_rate=1e-2, batch_size=N, **settings)
        objective, data = Objective(train), prepared(tmp_path / "prepared", ROWS)
        rows = [
            scored(list(prompt), list(answer), logps=logps.tolist(), logp_sum=float(logps.sum(dtype=np.float64)))
            for (prompt, answer), logps in REFERENCE.items()
        ]
        examples = cache_join.join_cache(
            objective, data, cache_of(tmp_path / "cache", rows), [MINE], density_ratio=False
        )
        like = examples["train"].longest(4)
        return Policy(Reference(model), None, train, make_accelerator(train), like, print), examples["train"], objective

    return make


def plain(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)


def counted(row: dict, name: str) -> list[int]:
    spans = row[f"{name}_spans"]
    return [t for begin, end in zip(spans[::2], spans[1::2], strict=True) for t in range(begin, end)]


def logits(loaded: Any, row: dict, name: str) -> torch.Tensor:
    """Log-softmax where each token of the answer is predicted. Shape: [tokens, V]."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
    return loaded(ids).logits[0].log_softmax(-1)[len(row["prompt_ids"]) - 1 : -1]


def policy_tokens(loaded: Any, row: dict, name: str) -> torch.Tensor:
    """The policy's log-probs of the tokens that count."""
    at = torch.tensor(row[f"{name}_ids"])[:, None]
    return logits(loaded, row, name).gather(-1, at)[:, 0][counted(row, name)]


def reference_tokens(row: dict, name: str) -> torch.Tensor:
    logps = REFERENCE[tuple(row["prompt_ids"]), tuple(row[f"{name}_ids"])]
    return torch.from_numpy(logps.astype(np.float64))[counted(row, name)]


def dpo(chosen: Any, rejected: Any, beta: float = 0.1) -> torch.Tensor:
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))


def both(row: dict, loaded: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (policy_tokens(loaded, row, name), reference_tokens(row, name)) for name in NAMES}


# -- the loss and its gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"rows": "packed"}, {"rows": "padded"}, {"micro_batch_size": 1}], ids=str)
def test_the_loss_and_its_gradient_are_those_of_the_tokens_that_count(start, model, settings):
    policy, examples, objective = start(**settings)
    pending = accumulate_gradient(policy._logps, examples, np.arange(N), objective, {}, 0)
    loaded = plain(model)
    ratios = [{name: (p - r).sum() for name, (p, r) in both(row, loaded).items()} for row in ROWS]
    losses = torch.stack([dpo(ratio["chosen"], ratio["rejected"]) for ratio in ratios])
    losses.mean().backward()
    assert pending.read().visit["loss"] == pytest.approx(losses.detach().numpy(), abs=1e-5)
    for name, parameter in loaded.named_parameters():
        found = policy.parameters[name].grad
        assert (found - parameter.grad).abs().max() < 1e-5 * max(1, parameter.grad.abs().max()), name


def test_a_run_stores_the_sums_and_lengths_of_the_tokens_that_count(start, model):
    policy, examples, objective = start()
    visit, _ = policy.evaluate(examples, np.arange(N), objective, {})
    loaded = plain(model)
    with torch.no_grad():
        for name in NAMES:
            expected = [policy_tokens(loaded, row, name).sum().item() for row in ROWS]
            assert visit[f"{name}_logp"] == pytest.approx(expected, abs=1e-4)
            assert visit[f"n_{name}_counted"].tolist() == [len(counted(row, name)) for row in ROWS]
            assert visit[f"ref_{name}_logp"] == pytest.approx(
                [reference_tokens(row, name).sum().item() for row in ROWS], abs=1e-9
            )


def test_a_moved_reference_is_of_the_tokens_that_count(start, model):
    policy, examples, objective = start(tokens={"decay": 0.9})
    scores = policy.score(examples, np.arange(N), objective.reference_answers, tokens=True)
    loaded = plain(model)
    for name in NAMES:
        expected = [policy_tokens(loaded, row, name).detach().numpy() for row in ROWS]
        assert scores.sums[name] == pytest.approx([each.sum() for each in expected], abs=1e-4)
        for tokens, each in zip(scores.tokens[name], expected, strict=True):
            assert tokens == pytest.approx(each, abs=1e-4)
    examples.forget_reference()
    examples.take_reference(scores)
    visit, _ = policy.evaluate(examples, np.arange(N), objective, {})
    # The reference is the policy: however tokens are weighed, every margin is 0.
    assert visit["loss"] == pytest.approx(np.full(N, np.log(2)), abs=1e-6)


def test_labels_and_their_mismatched_answers_are_of_the_tokens_that_count(model, tmp_path):
    rows = [
        masked(
            label(i, row["prompt_ids"], row["chosen_ids"], i % 2 == 0, kl=ROWS[i - 1]["rejected_ids"]),
            completion=row["chosen_spans"],
            kl=ROWS[i - 1]["rejected_spans"],
        )
        for i, row in enumerate(ROWS)
    ]
    train = Train(loss="kto", batch_size=N)
    cached = {
        (tuple(prompt), tuple(answer)): DICE.normal(-5.7, 0.5, len(answer)).astype(np.float32)
        for prompt, answer in answers(rows)
    }
    chunk = [
        scored(list(prompt), list(answer), logps=logps.tolist(), logp_sum=float(logps.sum(dtype=np.float64)))
        for (prompt, answer), logps in cached.items()
    ]
    objective, data = Objective(train), prepared(tmp_path / "prepared", rows)
    cache = cache_of(tmp_path / "cache", chunk)
    examples = cache_join.join_cache(objective, data, cache, [MINE], density_ratio=False)["train"]
    policy = Policy(Reference(model), None, train, make_accelerator(train), examples.longest(4), print)
    visit, logged = policy.evaluate(examples, np.arange(N), objective, {})
    loaded = plain(model)

    def log_ratio(row: dict, name: str) -> float:
        logps = cached[tuple(row["prompt_ids"]), tuple(row[f"{name}_ids"])].astype(np.float64)[counted(row, name)]
        return policy_tokens(loaded, row, name).sum().item() - logps.sum()

    with torch.no_grad():
        ratios = np.array([log_ratio(row, "completion") for row in rows])
        z = max(0.0, np.mean([log_ratio(row, "kl") for row in rows]))
    # Ethayarajh et al. 2024: 1 - s(beta (a - z)) of a desirable answer, 1 - s(beta (z - a)) of another.
    sign = np.array([1 if row["label"] else -1 for row in rows])
    assert logged["kl"] == pytest.approx(z, abs=1e-4)
    assert visit["loss"] == pytest.approx(1 / (1 + np.exp(0.1 * sign * (ratios - z))), abs=1e-5)
    assert visit["n_completion_counted"].tolist() == [len(counted(row, "completion")) for row in rows]


# -- weighing tokens: by their number among those that count ---------------------------------------------------------


def ld_alpha(tokens: dict, i: int) -> dict[str, torch.Tensor]:
    shorter = min(len(p) for p, _ in tokens.values())
    weights = {name: torch.where(torch.arange(len(p)) < shorter, 1.0, 0.5) for name, (p, _) in tokens.items()}
    return {name: (weights[name] * (p - r)).sum() for name, (p, r) in tokens.items()}


def decay(tokens: dict, i: int) -> dict[str, torch.Tensor]:
    return {name: sum(0.8**t * (p[t] - r[t]) for t in range(len(p))) for name, (p, r) in tokens.items()}


def sampo(tokens: dict, i: int) -> dict[str, torch.Tensor]:
    shorter = min(len(p) for p, _ in tokens.values())
    drawn = {
        name: np.random.default_rng([42, 0, i, side]).permutation(len(p))[:shorter]
        for side, (name, (p, _)) in enumerate(tokens.items())
    }
    return {name: (p - r)[drawn[name]].sum() for name, (p, r) in tokens.items()}


def clamp(tokens: dict, i: int) -> dict[str, torch.Tensor]:
    return {name: (p - r).clamp(-0.4, 0.3).sum() for name, (p, r) in tokens.items()}


@pytest.mark.parametrize(
    ("tokens", "by_hand"),
    [({"ld_alpha": 0.5}, ld_alpha), ({"decay": 0.8}, decay), ({"sampo": True}, sampo), ({"clamp": (-0.4, 0.3)}, clamp)],
    ids=["ld_alpha", "decay", "sampo", "clamp"],
)
def test_tokens_are_weighed_by_their_number_among_those_that_count(start, model, tokens, by_hand):
    policy, examples, objective = start(tokens=tokens, seed=42)
    visit, _ = policy.evaluate(examples, np.arange(N), objective, {})
    loaded = plain(model)
    with torch.no_grad():
        ratios = [by_hand(both(row, loaded), i) for i, row in enumerate(ROWS)]
        expected = [dpo(ratio["chosen"], ratio["rejected"]).item() for ratio in ratios]
        unweighed = [{name: (p - r).sum() for name, (p, r) in both(row, loaded).items()} for row in ROWS]
        plain_losses = np.array([dpo(ratio["chosen"], ratio["rejected"]).item() for ratio in unweighed])
    assert visit["loss"] == pytest.approx(expected, abs=1e-5)
    assert np.abs(np.array(expected) - plain_losses).max() > 1e-3


def test_wpo_weighs_a_pair_by_its_tokens_that_count(start, model):
    policy, examples, objective = start(weighting="wpo")
    visit, _ = policy.evaluate(examples, np.arange(N), objective, {})
    loaded, expected = plain(model), []
    with torch.no_grad():
        for row in ROWS:
            tokens, means = both(row, loaded), 0.0
            for name in NAMES:
                at = logits(loaded, row, name)[counted(row, name)]
                # Zhou et al. 2024, Eq. 2: relative to how likely a sampled token is.
                means += (tokens[name][0] - (2 * at).logsumexp(-1)).mean().item()
            ratio = {name: (p - r).sum() for name, (p, r) in tokens.items()}
            expected.append(np.exp(means) * dpo(ratio["chosen"], ratio["rejected"]).item())
    assert visit["loss"] == pytest.approx(expected, rel=1e-4)


def test_means_per_token_are_over_the_tokens_that_count(start, model):
    policy, examples, objective = start(loss="simpo")
    visit, _ = policy.evaluate(examples, np.arange(N), objective, {})
    loaded = plain(model)
    with torch.no_grad():
        means = [{name: policy_tokens(loaded, row, name).mean() for name in NAMES} for row in ROWS]
        # Meng et al. 2024: beta times the difference of means, less a margin of 1.
        expected = [
            -torch.nn.functional.logsigmoid(2.0 * (mean["chosen"] - mean["rejected"]) - 1.0).item() for mean in means
        ]
    assert visit["loss"] == pytest.approx(expected, abs=1e-5)
