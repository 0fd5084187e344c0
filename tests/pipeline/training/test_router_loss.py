"""A mixture's load-balancing loss is Transformers' own over the padded batch, however its rows are laid out and cut."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_config, write_pairs
from examples_for_tests import pair, table
from models_for_tests import build, sequence
from test_train import launch, metrics
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from pipeline.config import Train
from pipeline.errors import UsageError
from pipeline.identity import Reference
from pipeline.model.forward import Forward
from pipeline.model.routing import router_of
from pipeline.model.trainable import recompute_layers
from pipeline.training.balance import balance_of
from pipeline.training.batches import Examples
from pipeline.training.devices import accelerator
from pipeline.training.objective import Objective
from pipeline.training.policy import Policy

CPU = torch.device("cpu")
MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe"]
# No two of them have a prompt in common.
APART = [sequence(7, 5), sequence(4, 9), sequence(12, 3), sequence(5, 2)]


def theirs(model, sequences) -> torch.Tensor:
    """Transformers' own loss over the padded batch. The last token of an answer is no input here."""
    ids = [torch.from_numpy(np.concatenate(each)[:-1].astype(np.int64)) for each in sequences]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(each) for each in ids])[:, None]
    found: torch.Tensor = model(padded, attention_mask=mask.long(), output_router_logits=True).aux_loss
    return found


def gradients(model, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def ours(model, way: str, groups) -> torch.Tensor:
    forward, router = Forward(model, "sdpa", way, "float32", "train.rows"), router_of(model)
    forward.choose([each for group in groups for each in group])
    assert forward.way == way
    seen: list[torch.Tensor] = []
    forward.logps(groups, watch=seen.extend)
    routed = router.routed(seen)
    return router.loss(routed, routed)


@pytest.mark.parametrize("way", ["padded", "packed", "shared"])
@pytest.mark.parametrize("name", MIXTURES)
def test_value_and_gradients_are_those_of_transformers_padded_batch(name, way):
    expected = theirs(model := build(name), APART)
    grads = gradients(model, expected)
    found = ours(model, way, [[each] for each in APART])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    grads2 = gradients(model, found)
    assert grads2.keys() == grads.keys() and any("gate" in key for key in grads)
    for key in grads:
        torch.testing.assert_close(grads2[key], grads[key], rtol=1e-4, atol=1e-5 * grads[key].abs().max().item())


def test_a_prompt_that_is_shared_is_one_prompt_to_the_routers():
    model = build("mixtral")
    one, other = sequence(9, 6), sequence(9, 4)._replace(prompt_ids=sequence(9, 6).prompt_ids)
    forward = Forward(model, "sdpa", "shared", "float32", "train.rows")
    forward.choose([one, other])
    seen: list[torch.Tensor] = []
    forward.logps([[one, other]], watch=seen.extend)
    routed = router_of(model).routed(seen)
    # 9 tokens of prompt, 5 and 3 of answers, 2 layers; and two experts of four for each.
    assert routed.n == 2 * (9 + 5 + 3) and routed.chosen_E.sum() == 2 * routed.n
    assert routed.probability_E.sum().item() == pytest.approx(routed.n)


def test_recomputed_layers_give_its_gradients_too():
    plain, recomputed = (build("qwen3-moe") for _ in range(2))
    assert recompute_layers(recomputed) is None
    found, again = (gradients(each, ours(each, "shared", [[s] for s in APART])) for each in (plain, recomputed))
    assert found.keys() == again.keys() and all(torch.equal(found[key], again[key]) for key in found)


# -- a run -----------------------------------------------------------------------------------------------------------

ROWS = [
    pair(i, *(np.random.default_rng([i, k]).integers(3, 280, n).tolist() for k, n in enumerate((4 + i, 5, 3 + i))))
    for i in range(6)
]


@pytest.fixture(scope="module")
def mixture(model, tmp_path_factory) -> Path:
    folder = shutil.copytree(model, tmp_path_factory.mktemp("mixture") / "moe")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    config = MixtralConfig(vocab_size=vocabulary, initializer_range=0.3, **shape, **heads)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def policy_of(folder: Path, weight: float = 0.5, **settings) -> tuple[Policy, Examples, Objective]:
    train = Train(learning_rate=1e-3, router_aux_loss=weight, **settings)
    columns = {name: np.full(len(ROWS), -30.0) for name in ("ref_chosen_logp", "ref_rejected_logp")}
    data = Examples(table(ROWS, "pairs"), ("chosen", "rejected"), (), columns)
    return Policy(Reference(folder), None, train, accelerator(train), data.longest(3), print), data, Objective(train)


def stepped(folder: Path, **settings) -> tuple[float, dict[str, torch.Tensor], list]:
    """A step's aux_loss, the parameters after it, and all sequences."""
    policy, data, objective = policy_of(folder, **settings)
    everything = np.arange(len(ROWS))
    _, logged, _ = policy.update(data, everything, objective, {}, 1e-3)
    batch = data.batch(everything, CPU, ("chosen", "rejected"))
    weights = {name: each.detach().clone() for name, each in policy._trained.parameters().items()}
    return logged["aux_loss"], weights, batch.answers["chosen"] + batch.answers["rejected"]


@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_the_loss_is_one_of_the_whole_batch_whatever_its_micro_batches(mixture, loss):
    value, weights, sequences = stepped(mixture, loss=loss, rows="padded")
    expected = theirs(AutoModelForCausalLM.from_pretrained(mixture), sequences)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    value2, weights2, _ = stepped(mixture, loss=loss, rows="padded", tokens_per_micro_batch=30)
    assert value2 == pytest.approx(value, rel=1e-6)
    # A step of AdamW is of the learning rate's size, wherever a gradient is not all but nothing.
    for name in weights:
        torch.testing.assert_close(weights2[name], weights[name], rtol=0, atol=2e-5)


def test_of_micro_scope_it_is_the_mean_of_the_micro_batches_own(mixture):
    value, _, sequences = stepped(mixture, scope="micro", micro_batch_size=2, rows="padded")
    model, n = AutoModelForCausalLM.from_pretrained(mixture), len(ROWS)
    parts = [[sequences[k] for k in (i, i + 1, n + i, n + i + 1)] for i in (0, 2, 4)]
    assert value == pytest.approx(np.mean([theirs(model, part).item() for part in parts]), rel=1e-5)


def test_its_gradient_is_added_to_the_losss_with_its_weight(mixture):
    found = []
    for weight in (0, 0.5):
        policy, data, objective = policy_of(mixture, weight=weight, rows="padded", tokens_per_micro_batch=30)
        policy._step(data, np.arange(len(ROWS)), objective, {}, 0)
        found.append({name: each.grad.clone() for name, each in policy._trained.parameters().items()})
    batch = data.batch(np.arange(len(ROWS)), CPU, ("chosen", "rejected"))
    model = AutoModelForCausalLM.from_pretrained(mixture)
    own = gradients(model, theirs(model, batch.answers["chosen"] + batch.answers["rejected"]))
    for name in own:
        largest = found[1][name].abs().max().item()
        torch.testing.assert_close(found[1][name] - found[0][name], 0.5 * own[name], rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("budget", [None, 30], ids=["one-forward", "micro-batches"])
def test_what_is_scored_between_two_steps_is_no_part_of_the_next_ones_loss(mixture, budget):
    # A moving reference scores what is to come, with its weights in the policy's place.
    found = []
    for scores in (False, True):
        policy, data, objective = policy_of(mixture, rows="padded", tokens_per_micro_batch=budget)
        if scores:
            policy.score(data, np.arange(3), ("chosen", "rejected"), tokens=False)
        _, logged, _ = policy.update(data, np.arange(len(ROWS)), objective, {}, 1e-3)
        found.append((logged["aux_loss"], logged["grad_norm"]))
    assert found[1] == found[0]


@pytest.mark.parametrize("scope", [{}, {"scope": "micro", "micro_batch_size": 1}], ids=["batch", "micro"])
def test_two_processes_and_a_run_of_one_log_the_same_loss(prefcache, mixture, tmp_path, scope):
    write_pairs(tmp_path / "pairs.jsonl", 40)
    config = write_config(tmp_path, mixture, epochs=1, samples=0, router_aux_loss=0.1, **scope)
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch(tmp_path, port, "train", str(config), "--set", "train.run=two")
    one, two = (metrics(tmp_path / "runs/tiny" / run) for run in ("trained", "two"))
    for name in ("aux_loss", "eval_aux_loss", "grad_norm"):
        found = [[row[name] for row in run if row[name] is not None] for run in (one, two)]
        assert len(found[0]) > 1 and found[1] == pytest.approx(found[0], abs=1e-5)


# -- whether it is wanted --------------------------------------------------------------------------------------------


def test_unless_said_the_models_config_decides():
    quiet, loud = build("mixtral"), build("mixtral", output_router_logits=True, router_aux_loss_coef=0.25)
    assert balance_of(quiet, Train(), CPU) is None and balance_of(loud, Train(), CPU).coefficient == 0.25
    assert balance_of(loud, Train(router_aux_loss=0), CPU) is None
    assert balance_of(quiet, Train(router_aux_loss=0.1), CPU).coefficient == 0.1
    assert balance_of(build("llama"), Train(), CPU) is None


def test_a_model_without_such_a_loss_is_refused():
    with pytest.raises(UsageError, match="LlamaForCausalLM is no mixture of experts that has a load-balancing loss"):
        balance_of(build("llama"), Train(router_aux_loss=0.1), CPU)


def test_another_balancing_loss_than_this_one_is_refused(monkeypatch):
    from transformers.models.mixtral import modeling_mixtral

    balance = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *given: 2 * balance(*given))
    with pytest.raises(UsageError, match="is another than the one known here"):
        router_of(build("mixtral"))
