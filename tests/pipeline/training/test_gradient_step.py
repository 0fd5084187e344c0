"""What a step asks of a device: few kernels more than supervised fine-tuning's, and one wait."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from prefcache.pipeline.config import Train
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model.traced_gpu import trace_gpu
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.training.dataset import Examples, Scores, SplitData
from prefcache.pipeline.training.distributed import make_accelerator
from prefcache.pipeline.training.gradient_step import accumulate_gradient
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.policy import Policy
from prefcache.pipeline.training.step_trace import Lengths, TracedPolicy, make_examples, make_model
from tests.helpers.examples import label, pair, table
from tests.helpers.models import build
from tests.helpers.waits import Waits, count_waits

torch.set_num_threads(1)
N = 12
DICE = np.random.default_rng(0)
PAIRS = [pair(i, *(DICE.integers(2, 60, n).tolist() for n in (5 + i, 3 + i % 3, 6))) for i in range(N)]
LABELS = [label(i, row["prompt_ids"], row["chosen_ids"], is_good=i % 2 == 0) for i, row in enumerate(PAIRS)]


def examples_of(objective: Objective) -> Examples:
    if objective.kind == "labels":
        columns = {"ref_completion_logp": np.full(N, -20.0), "density_ratio": np.ones(N)}
        columns["label"] = np.array([row["label"] for row in LABELS])
        return Examples(SplitData(table(LABELS, "labels"), columns, ("completion",)))
    columns = {name: np.full(N, -30.0) for name in ("ref_chosen_logp", "ref_rejected_logp")}
    columns |= {f"n_{side}_counted": np.array([row[f"n_{side}"] for row in PAIRS]) for side in ("chosen", "rejected")}
    return Examples(SplitData(table(PAIRS, "pairs"), columns, ("chosen", "rejected")))


def updated(model: Path, **settings) -> Waits:
    """What the second step of a run asks for; the first makes the optimizer's state."""
    train = Train(learning_rate=1e-3, batch_size=N, **settings)
    objective = Objective(train)
    data = examples_of(objective)
    policy = Policy(Reference(model), None, train, make_accelerator(train), data.longest(2), print)
    step = policy.update(data, np.arange(N), objective, {}, 1e-3)
    # For a checkpoint's JSON.
    assert all(isinstance(value, float) for state in step.running_stats.values() for value in state.values())
    with count_waits() as waits:
        policy.update(data, np.arange(N), objective, step.running_stats, 1e-3)
    return waits


# -- waits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tokens_per_micro_batch": 60},
        {"weighting": "wpo", "lora": {"r": 2}},
        # Statistics of the batch, running ones among them, and gradients that flow between examples.
        {"loss": {"sigmoid": 1, "sft": 0.5}, "tokens_per_micro_batch": 60},
        {"loss": "kto_pair", "tokens_per_micro_batch": 60},
        {"loss": "alpha_dpo", "tokens_per_micro_batch": 60},
        {"loss": "aot", "tokens_per_micro_batch": 60},
        {"loss": "bco"},
    ],
    ids=str,
)
def test_a_step_waits_for_the_device_once(model, settings):
    assert updated(model, **settings).counts == {"to_host": 1}


def test_a_padded_forward_waits_in_the_models_own_code(model):
    # Transformers looks at the values of position_ids before it makes a mask.
    assert updated(model, rows="padded").counts == {"to_host": 1, "_local_scalar_dense": 1}


def test_pairs_that_are_drawn_by_their_margins_are_drawn_on_the_host(model):
    # beta_dpo has two statistics, each of which reads the batch's margins.
    assert updated(model, loss="beta_dpo").counts["to_host"] == 3


def test_an_evaluation_waits_once(model):
    train = Train(batch_size=N, tokens_per_micro_batch=60)
    objective = Objective(train)
    data = examples_of(objective)
    policy = Policy(Reference(model), None, train, make_accelerator(train), data.longest(2), print)
    with count_waits() as waits:
        policy.evaluate(data, np.arange(N), objective, {})
    assert waits.counts == {"to_host": 1}


# -- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "most"),
    # Weighing tokens takes the same 50 kernels however many layers a model has: here it has four.
    [({}, 1.15), ({"loss": "kto_pair"}, 1.15), ({"tokens": {"decay": 0.9, "clamp": (-1, 1)}}, 1.2)],
    ids=str,
)
def test_a_micro_batch_has_hardly_more_kernels_than_in_supervised_fine_tuning(settings, most):
    """Both of the same row, forward and backward; supervised fine-tuning is the mean log-prob of its tokens."""
    train = Train(batch_size=N, weights="bfloat16", **settings)
    objective = Objective(train)
    with trace_gpu() as trace:
        model = build("llama", num_hidden_layers=4).config
        policy = TracedPolicy(make_model(model, train, trace), train, trace)
        data, everything = make_examples([Lengths(8 + i, 20, 30) for i in range(N)]), np.arange(N)
        tokens = {"chosen": [np.zeros(20, np.float32)] * N, "rejected": [np.zeros(30, np.float32)] * N}
        data.take_reference(Scores(everything, {}, tokens if train.tokens.weighs else {}))
        answers = data.batch(everything, ("chosen", "rejected")).answers
        counts = []
        for compute in (
            lambda: accumulate_gradient(policy._logps, data, everything, objective, {}, 0),
            lambda: fine_tune(policy, zip(answers["chosen"], answers["rejected"], strict=True)),
        ):
            policy._optimizer.zero_grad()
            trace.restart()
            compute()
            assert trace.attention == {"_varlen_attn"} and not trace.syncs
            counts.append(trace.total(lambda op: op.kernels))
    assert counts[1] < counts[0] <= most * counts[1]


def fine_tune(policy: Policy, groups: Iterable[Sequence[TokenSequence]]) -> None:
    with policy.accelerator.autocast():
        logps = policy.forward.logps(list(groups))
    logps.values_N.mean().neg().backward()
