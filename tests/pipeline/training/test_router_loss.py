"""A mixture's load-balancing loss is Transformers' own over the padded batch, however its rows are laid out and cut."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model.trainable import recompute_layers
from prefcache.pipeline.training.dataset import Examples, SplitData
from prefcache.pipeline.training.distributed import make_accelerator
from prefcache.pipeline.training.gradient_step import accumulate_gradient
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.policy import Policy
from prefcache.pipeline.training.router_loss import RouterCounts, RouterLoss, make_router_loss
from tests.helpers.examples import pair, table
from tests.helpers.models import build, sequence, start_forward
from tests.helpers.processes import launch
from tests.helpers.project import write_config, write_pairs
from tests.helpers.runs import metrics

CPU = torch.device("cpu")
MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe"]
# No two of them have a prompt in common.
APART = [sequence(7, 5), sequence(4, 9), sequence(12, 3), sequence(5, 2)]


def theirs(model, sequences) -> torch.Tensor:
    """Transformers' own loss over the padded batch. The last token of an answer is no input here."""
    ids = [torch.from_numpy(each.ids[:-1].astype(np.int64)) for each in sequences]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(each) for each in ids])[:, None]
    found: torch.Tensor = model(padded, attention_mask=mask.long(), output_router_logits=True).aux_loss
    return found


def gradients(model, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def observe(model, layout: str, groups) -> tuple[RouterLoss, RouterCounts]:
    """The loss, and what it counts in one forward of these groups."""
    loss = make_router_loss(model, Train(router_aux_loss=1), CPU)
    forward = start_forward(model, layout, [sequence for group in groups for sequence in group])
    forward.logps(groups, router_hook=loss.hook)
    return loss, loss.take_counts()


def ours(model, layout: str, groups) -> torch.Tensor:
    loss, counts = observe(model, layout, groups)
    return loss.value(counts, counts)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("name", MIXTURES)
def test_value_and_gradients_are_those_of_transformers_padded_batch(name, layout):
    expected = theirs(model := build(name), APART)
    grads = gradients(model, expected)
    found = ours(model, layout, [[each] for each in APART])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    grads2 = gradients(model, found)
    assert grads2.keys() == grads.keys() and any("gate" in key for key in grads)
    for key in grads:
        torch.testing.assert_close(grads2[key], grads[key], rtol=1e-4, atol=1e-5 * grads[key].abs().max().item())


def test_a_prompt_that_is_shared_is_one_prompt_to_the_routers():
    model = build("mixtral")
    one, other = sequence(9, 6), sequence(9, 4)._replace(prompt_ids=sequence(9, 6).prompt_ids)
    _, counts = observe(model, "shared", [[one, other]])
    # 9 tokens of prompt, 5 and 3 of answers, 2 layers; and two experts of four for each.
    assert counts.n == 2 * (9 + 5 + 3) and counts.chosen_E.sum() == 2 * counts.n
    assert counts.probability_E.sum().item() == pytest.approx(counts.n)


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
    data = Examples(SplitData(table(ROWS, "pairs"), columns, ("chosen", "rejected")))
    return (
        Policy(Reference(folder), None, train, make_accelerator(train), data.longest(3), print),
        data,
        Objective(train),
    )


def stepped(folder: Path, **settings) -> tuple[float, dict[str, torch.Tensor], list]:
    """A step's aux_loss, the parameters after it, and all sequences."""
    policy, data, objective = policy_of(folder, **settings)
    everything = np.arange(len(ROWS))
    _, logged, _ = policy.update(data, everything, objective, {}, 1e-3)
    batch = data.batch(everything, ("chosen", "rejected"))
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
        accumulate_gradient(policy._logps, data, np.arange(len(ROWS)), objective, {}, 0)
        found.append({name: each.grad.clone() for name, each in policy._trained.parameters().items()})
    batch = data.batch(np.arange(len(ROWS)), ("chosen", "rejected"))
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


def test_two_processes_and_a_run_of_one_log_the_same_loss(prefcache, mixture, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 40)
    config = write_config(tmp_path, mixture, epochs=1, samples=0, router_aux_loss=0.1)
    for stage in ("prepare", "score"):
        prefcache(stage, config)
    scopes = {"batch": (), "micro": ("--set", "train.scope=micro", "--set", "train.micro_batch_size=1")}
    commands = {
        f"{n}-{name}": ("train", str(config), *settings, "--set", f"train.run={n}-{name}")
        for name, settings in scopes.items()
        for n in ("one", "two")
    }
    for name in scopes:
        prefcache(*commands[f"one-{name}"])
    launch(tmp_path, *(commands[f"two-{name}"] for name in scopes))
    for scope in scopes:
        one, two = (metrics(tmp_path / "runs/tiny" / f"{n}-{scope}") for n in ("one", "two"))
        for name in ("aux_loss", "eval_aux_loss", "grad_norm"):
            found = [[row[name] for row in run if row[name] is not None] for run in (one, two)]
            assert len(found[0]) > 1 and found[1] == pytest.approx(found[0], abs=1e-5)


# -- whether it is wanted --------------------------------------------------------------------------------------------


def test_unless_said_the_models_config_decides():
    quiet, loud = build("mixtral"), build("mixtral", output_router_logits=True, router_aux_loss_coef=0.25)
    assert make_router_loss(quiet, Train(), CPU) is None and make_router_loss(loud, Train(), CPU).coefficient == 0.25
    assert make_router_loss(loud, Train(router_aux_loss=0), CPU) is None
    assert make_router_loss(quiet, Train(router_aux_loss=0.1), CPU).coefficient == 0.1
    assert make_router_loss(build("llama"), Train(), CPU) is None


def test_a_model_without_such_a_loss_is_refused():
    with pytest.raises(UsageError, match="LlamaForCausalLM is not a mixture of experts with a load-balancing loss"):
        make_router_loss(build("llama"), Train(router_aux_loss=0.1), CPU)


def test_another_balancing_loss_than_this_one_is_refused(monkeypatch):
    from transformers.models.mixtral import modeling_mixtral

    balance = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *given: 2 * balance(*given))
    with pytest.raises(UsageError, match="differs from the supported one"):
        make_router_loss(build("mixtral"), Train(router_aux_loss=0.1), CPU)
