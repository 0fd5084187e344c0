"""The policy between its tested parts: what a failed pass leaves behind, what an evaluation may not touch, how it answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefcache.pipeline.config import Lora, Train
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import layer_kernels, trainable
from prefcache.pipeline.model.device import traced_as
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.training.dataset import Examples, SplitData
from prefcache.pipeline.training.distributed import make_accelerator
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.policy import Policy
from tests.helpers.examples import label, pair, table

torch.set_num_threads(1)
CPU = torch.device("cpu")
N = 6
DICE = np.random.default_rng(0)
PAIRS = [pair(i, *(DICE.integers(3, 280, n).tolist() for n in (5 + i, 3 + i % 3, 6))) for i in range(N)]
LABELS = [label(i, row["prompt_ids"], row["chosen_ids"], is_good=i % 2 == 0) for i, row in enumerate(PAIRS)]
EVERYTHING = np.arange(N)


def policy_of(model: Path, **settings: Any) -> tuple[Policy, Examples, Objective]:
    train = Train(learning_rate=1e-2, batch_size=N, **settings)
    objective = Objective(train)
    if objective.kind == "pairs":
        columns = {name: np.full(N, -30.0) for name in ("ref_chosen_logp", "ref_rejected_logp")}
        columns |= {
            f"n_{side}_counted": np.array([row[f"n_{side}"] for row in PAIRS]) for side in ("chosen", "rejected")
        }
        data = Examples(SplitData(table(PAIRS, "pairs"), columns, ("chosen", "rejected")))
    else:
        # Every answer was as likely as its number says; what is good or bad is not what is likely.
        columns = {"ref_completion_logp": -20.0 - EVERYTHING, "density_ratio": np.ones(N)}
        columns["label"] = np.array([row["label"] for row in LABELS])
        data = Examples(SplitData(table(LABELS, "labels"), columns, ("completion",)))
    return Policy(Reference(model), None, train, make_accelerator(train), data.longest(2), print), data, objective


# -- a step that is begun anew ---------------------------------------------------------------------------------------


def test_a_pass_that_ran_out_of_memory_halfway_leaves_no_gradients_behind(model, monkeypatch):
    """The first micro-batch has its gradients by the time the second fails: they must not count twice."""
    smooth, data, objective = policy_of(model, micro_batch_size=3)
    _, expected, _ = smooth.update(data, EVERYTHING, objective, {}, 1e-2)
    bumpy, data, objective = policy_of(model, micro_batch_size=3)
    real, calls = bumpy.accelerator.backward, []

    def fails_once(loss, **options):
        calls.append(loss)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("of the second of two micro-batches")
        real(loss, **options)

    monkeypatch.setattr(bumpy.accelerator, "backward", fails_once)
    _, found, _ = bumpy.update(data, EVERYTHING, objective, {}, 1e-2)
    assert len(calls) > 4  # one and a half, and smaller ones over everything
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for name, value in smooth.parameters.items():
        assert (bumpy.parameters[name] - value).abs().max() < 1e-5, name


# -- evaluation ------------------------------------------------------------------------------------------------------


def after_a_step(model, loss: str) -> tuple[Policy, Examples, Objective, dict]:
    """A policy that has moved, with the running statistics of its batch."""
    policy, data, objective = policy_of(model, loss=loss)
    _, _, running_stats = policy.update(data, EVERYTHING, objective, {}, 1e-2)
    return policy, data, objective, running_stats


def margins(visit: dict[str, np.ndarray]) -> np.ndarray:
    return (visit["chosen_logp"] + 30) - (visit["rejected_logp"] + 30)


def test_evaluating_with_beta_dpo_moves_no_running_mean(model):
    policy, data, objective, running_stats = after_a_step(model, "beta_dpo")
    visit, logged = policy.evaluate(data, EVERYTHING, objective, running_stats)
    # beta (1 + alpha (mean margin - M)), M as the step left it; no pair is filtered out.
    m, mean = margins(visit), running_stats["beta_dpo/calibrated_beta"]["mean"]
    beta = 0.1 * (1 + objective.terms[0].arguments["alpha"] * (m.mean() - mean))
    assert abs(m.mean() - mean) > 1e-3  # the step has moved it, so that a mean with this batch in it would differ
    assert beta > 1e-3 and logged["calibrated_beta"] == pytest.approx(beta, rel=1e-6)
    assert visit["loss"] == pytest.approx(np.log1p(np.exp(-beta * m)), rel=1e-6)


def test_evaluating_with_bco_moves_no_delta(model):
    policy, data, objective, running_stats = after_a_step(model, "bco")
    visit, logged = policy.evaluate(data, EVERYTHING, objective, running_stats)
    delta = running_stats["bco/delta"]["mean"]
    rewards = 0.1 * (visit["completion_logp"] + 20 + EVERYTHING)
    assert abs(rewards.mean() - delta) > 1e-3
    assert logged["delta"] == pytest.approx(delta, rel=1e-6)
    sign = np.where([row["label"] for row in LABELS], 1, -1)
    assert visit["loss"] == pytest.approx(np.log1p(np.exp(-sign * (rewards - delta))), rel=1e-5)


def test_evaluating_with_alpha_dpo_moves_no_running_moments(model):
    policy, data, objective, running_stats = after_a_step(model, "alpha_dpo")
    visit, _ = policy.evaluate(data, EVERYTHING, objective, running_stats)
    # What a pair's loss is does not depend on the pairs that it is evaluated with.
    alone = [policy.evaluate(data, EVERYTHING[i : i + 1], objective, running_stats)[0]["loss"] for i in range(N)]
    assert visit["loss"] == pytest.approx(np.concatenate(alone), rel=1e-5)
    (moments,) = running_stats.values()
    a = [
        (visit[f"{side}_logp"] + 30) / np.array([row[f"n_{side}"] for row in PAIRS]) for side in ("chosen", "rejected")
    ]
    assert abs((a[0] - a[1]).mean() - moments["mean"]) > 1e-3


# -- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_same_alone_and_in_a_batch(model):
    """The shorter prompts of a batch are padded on the left, which the model must not see."""
    policy, _, _ = policy_of(model, sample_tokens=8)
    ids = [np.array(row["prompt_ids"][: 2 + 2 * (i % 4)]) for i, row in enumerate(PAIRS)]
    prompts = [TokenSequence(each, np.empty(0, np.int32)) for each in ids]
    alone = [policy.generate([prompt])[0] for prompt in prompts]
    assert len(set(alone)) == N and all(alone)
    assert policy.generate(prompts) == alone


# -- the start -------------------------------------------------------------------------------------------------------


def start_of(model: Path, seed: int, drawn_before: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(drawn_before)
    train = Train(lora=Lora(r=4), seed=seed)
    return trainable.load(Reference(model), train, "sdpa", CPU).parameters()


def test_a_new_adapter_starts_where_train_seed_says(model):
    """Whatever was drawn before it: a run that is begun anew is the same run."""
    one, again, other = start_of(model, 3, 1), start_of(model, 3, 2), start_of(model, 4, 1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


# -- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "n"), [("cuda", {}, 5), ("cuda", {"fuse_kernels": False}, 0), ("cpu", {}, 0)]
)
def test_norms_are_fused_by_a_gpus_rules_unless_turned_off(model, kind, settings, n):
    with traced_as(kind, lambda tensor: tensor.detach()):
        policy, _, _ = policy_of(model, **settings)
    norms = [each for each in policy.forward.model.modules() if type(each).__name__ == "LlamaRMSNorm"]
    assert len(norms) == 5 and sum("forward" in vars(norm) for norm in norms) == n


@pytest.mark.parametrize(("works", "n"), [(True, 0), (False, 5)])
def test_kernels_are_fused_where_layers_could_not_be_compiled(model, monkeypatch, works, n):
    def compile_layers(model):
        if not works:
            model.model.norm.forward = lambda hidden: 2 * hidden
        return lambda: delattr(model.model.norm, "forward")

    monkeypatch.setattr(layer_kernels, "compile_layers", compile_layers)
    with traced_as("cuda", lambda tensor: tensor.detach()):
        policy, _, _ = policy_of(model, compile=True)
    norms = [each for each in policy.forward.model.modules() if type(each).__name__ == "LlamaRMSNorm"]
    assert sum("forward" in vars(norm) for norm in norms) == n
    assert [note for note in policy.notes if note.startswith("train.compile is not followed")] == policy.notes[
        : not works
    ]


def test_a_change_that_is_not_followed_is_a_note(model, monkeypatch):
    monkeypatch.setattr(layer_kernels.F, "rms_norm", lambda hidden, *_: hidden)
    with traced_as("cuda", lambda tensor: tensor.detach()):
        policy, _, _ = policy_of(model)
    assert any(note.startswith("train.fuse_kernels is not followed: off by up to") for note in policy.notes)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"compile": True}, "train.compile is not followed: layers are compiled on a GPU only"),
        ({"offload": "optimizer"}, "train.offload has no effect on a CPU"),
        ({}, None),
    ],
)
def test_settings_for_a_gpu_are_notes_on_a_cpu(model, settings, note):
    policy, _, _ = policy_of(model, **settings)
    assert policy.notes == [note] * (note is not None)
