"""Updates within the backward pass give the weights of an ordinary step, bit by bit, and leave no gradient behind."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.training import optimizers
from prefcache.pipeline.training.dataset import Examples, SplitData
from prefcache.pipeline.training.distributed import make_accelerator
from prefcache.pipeline.training.gradient_step import NotFinite
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.policy import Policy
from prefcache.pipeline.training.released_gradients import ReleasedGradients, refuse_copies
from tests.helpers.examples import pair, table
from tests.helpers.models import save_mixture
from tests.helpers.project import options, write_config, write_pairs
from tests.helpers.runs import metrics, weights

torch.set_num_threads(1)
N, STEPS = 6, 3
DICE = np.random.default_rng(0)
PAIRS = [pair(i, *(DICE.integers(3, 280, n).tolist() for n in (5 + i, 3 + i % 3, 6))) for i in range(N)]
UNCLIPPED: dict[str, Any] = {"max_grad_norm": None}


def policy_of(model: Path, **settings: Any) -> tuple[Policy, Examples, Objective]:
    train = Train(learning_rate=1e-2, batch_size=N, **UNCLIPPED | settings)
    columns = {name: np.full(N, -30.0) for name in ("ref_chosen_logp", "ref_rejected_logp")}
    columns |= {f"n_{side}_counted": np.array([row[f"n_{side}"] for row in PAIRS]) for side in ("chosen", "rejected")}
    data = Examples(SplitData(table(PAIRS, "pairs"), columns, ("chosen", "rejected")))
    policy = Policy(Reference(model), None, train, make_accelerator(train), data.longest(2), print)
    return policy, data, Objective(train)


def trained(model: Path, **settings: Any) -> tuple[Policy, list[dict[str, float]]]:
    """A policy after some steps, and what they logged."""
    policy, data, objective = policy_of(model, **settings)
    logged = [policy.update(data, np.arange(N), objective, {}, 1e-2 / (i + 1)).logged for i in range(STEPS)]
    return policy, logged


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def tied(model, tmp_path_factory) -> Path:
    """One matrix is embedding and head, so that two gradients make its own."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tied") / "it"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(model, tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("model", {"weight_decay": 0.1}),
        ("tied", {"gradient_checkpointing": True}),
        ("model", {"optimizer": "adamw_8bit"}),
        ("tied", {"weights": "bfloat16"}),
        ("tied", {"weights": "bfloat16", "optimizer": "adamw_4bit", "gradient_checkpointing": True}),
        ("mixture", {"router_aux_loss": 0.1, "loss": "aot"}),
    ],
    ids=["adamw", "tied-recomputed", "8-bit", "tied-bf16", "tied-bf16-4-bit", "mixture"],
)
def test_weights_state_and_norm_are_those_of_ordinary_steps(
    kind, settings, model, tied, tmp_path, torchao, monkeypatch
):
    monkeypatch.syspath_prepend(torchao)
    folder = save_mixture(model, tmp_path / "mixture") if kind == "mixture" else {"model": model, "tied": tied}[kind]
    # All examples in one forward, as where gradients are released.
    ordinary, expected = trained(folder, tokens_per_micro_batch=10_000, **settings)
    released, found = trained(folder, release_gradients=True, **settings)
    assert found == expected and all(step["grad_norm"] > 0 for step in found)
    assert_same(released.weights(), ordinary.weights())
    assert_same(released.optimizer_state(), ordinary.optimizer_state())


def test_no_gradient_outlives_its_parameters_update(tied):
    policy, data, objective = policy_of(tied, release_gradients=True)
    alive: list[int] = []
    n_updates: dict[int, int] = {}

    def count(parameter: torch.Tensor) -> None:  # runs after the update's own hook
        n_updates[id(parameter)] = n_updates.get(id(parameter), 0) + 1
        alive.append(sum(p.grad is not None for p in policy.parameters.values()))

    for parameter in policy.parameters.values():
        parameter.register_post_accumulate_grad_hook(count)
    policy.update(data, np.arange(N), objective, {}, 1e-2)
    assert set(alive) == {0}
    # Once each, the tied matrix too: its two gradients are one by then.
    assert set(n_updates.values()) == {1} and len(n_updates) == len(policy.parameters)


def test_a_step_is_one_forward_whatever_a_micro_batch_would_hold(model, monkeypatch):
    policy, data, objective = policy_of(model, release_gradients=True)
    policy._budget.tokens = 20
    assert len(policy._logps.turns(data, np.arange(N))) > 1
    backward, calls = policy.accelerator.backward, []
    monkeypatch.setattr(policy.accelerator, "backward", lambda loss: calls.append(loss) or backward(loss))
    policy.update(data, np.arange(N), objective, {}, 1e-2)
    assert len(calls) == 1


# -- what is not finite ----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_changes_no_weight(model):
    policy, data, objective = policy_of(model, release_gradients=True)
    before = {name: each.detach().clone() for name, each in policy.parameters.items()}
    data._columns["ref_chosen_logp"][2] = np.nan
    with pytest.raises(NotFinite, match="loss is nan; the step was not taken") as caught:
        policy.update(data, np.arange(N), objective, {}, 1e-2)
    assert not caught.value.is_taken
    assert_same(policy.parameters, before)


def test_a_gradient_that_is_not_finite_ends_the_run_with_the_checkpoint_it_resumes_from(
    prefcache, scored, tmp_path, monkeypatch
):
    measure, n_steps = optimizers.total_norm, []

    def is_broken_in_step_5(norms: Any) -> torch.Tensor:
        n_steps.append(1)
        return measure(norms) * (float("inf") if len(n_steps) == 5 else 1)

    monkeypatch.setattr(optimizers, "total_norm", is_broken_in_step_5)
    settings = options("train.release_gradients=true", "train.max_grad_norm=null", "train.checkpoint_every=2")
    error = prefcache("train", scored, *settings, code=4).stderr
    run = tmp_path / "runs/tiny/trained"
    assert "Step 5: grad_norm is inf; weights were updated before that was known (train.release_gradients)" in error
    assert f"They are dropped; the run resumes from {Path('runs/tiny/trained/checkpoints/step-00000004')}" in error
    assert sorted(each.name for each in (run / "checkpoints").iterdir())[-1] == "step-00000004"
    assert "resuming from step 4" in prefcache("train", scored, *settings).stderr


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_resumes_bit_by_bit_with_or_without_releasing(prefcache, model, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 30)
    more = {"max_grad_norm": None, "samples": 0, "epochs": 1, "checkpoint_every": 2, "weights": "bfloat16"}
    config = write_config(tmp_path, model, **more)
    for stage in ("prepare", "score"):
        prefcache(stage, config)
    released = options("train.release_gradients=true")
    prefcache("train", config, *released)
    run = tmp_path / "runs/tiny/trained"
    expected, rows = weights(run), metrics(run)
    for settings in (released, []):  # to release gradients is no other run
        (run / "manifest.json").unlink()
        shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
        assert "resuming from step 2" in prefcache("train", config, *settings).stderr
        assert weights(run) == expected and metrics(run) == rows


def test_restoring_creates_the_state_one_parameter_at_a_time(model, monkeypatch):
    policy, *_ = policy_of(model, release_gradients=True)
    step, alive = optimizers.update_group, []

    def counted(optimizer: Any, group: dict[str, Any]) -> None:
        alive.append(sum(p.grad is not None for p in policy.parameters.values()))
        step(optimizer, group)

    monkeypatch.setattr(optimizers, "update_group", counted)
    state = {f"{i}.step": torch.zeros(()) for i in range(len(policy.parameters))}
    with pytest.raises(Exception, match="lacks"):
        optimizers.restore(policy._optimizer, state.items(), Path("step-1"))
    assert set(alive) == {1} and len(alive) == len(policy.parameters)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm is 1. Set max_grad_norm: null"),
        ({"micro_batch_size": 2}, "micro_batch_size is 2. Leave it out; if memory runs out, lower batch_size"),
        ({"tokens_per_micro_batch": "auto"}, "tokens_per_micro_batch is auto"),
        ({"lora": {}}, "as small as the adapter"),
    ],
)
def test_what_needs_the_whole_gradient_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Train.model_validate({"release_gradients": True, "max_grad_norm": None} | settings)


def test_copies_of_the_model_are_refused():
    with pytest.raises(UsageError, match=r"2 processes hold a copy .*\(train.shard=fsdp\)"):
        refuse_copies(2)
    refuse_copies(1)


def test_gradients_outside_of_a_step_change_nothing():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = optimizers.make_optimizer([parameter], Train(release_gradients=True, **UNCLIPPED), torch.device("cpu"))
    ReleasedGradients(optimizer, [parameter])
    parameter.sum().backward()
    assert parameter.grad is not None and torch.equal(parameter.detach(), torch.ones(2, 2))
