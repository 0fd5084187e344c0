"""A reference that moves scores what comes, with the numbers of a second model that nobody had to hold."""

import gc
import itertools
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefcache.pipeline.config import Lora, Train
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import trainable
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import CheckpointManifest
from prefcache.pipeline.training.alerts import Watch
from prefcache.pipeline.training.losses import get_loss
from prefcache.pipeline.training.moving_reference import _mix, _mix_bf16
from prefcache.pipeline.training.policy import Policy
from prefcache.pipeline.training.policy_logps import PolicyLogps
from tests.helpers.models import save_mixture
from tests.helpers.processes import launch, start_process
from tests.helpers.project import invoke, options, write_config, write_pairs
from tests.helpers.runs import away_from_nothing, table, weights
from tests.helpers.trl_runs import BATCH, in_order, losses_of_trl

torch.set_num_threads(1)
SOFT, HARD = {"every": 4, "alpha": 0.6}, {"every": 4, "alpha": 1.0}


@pytest.fixture(scope="module")
def scored_folders(tmp_path_factory) -> Iterator[None]:
    """Prepare and score the same data once for all tests of this file."""
    _SCORED["root"] = tmp_path_factory.mktemp("moving")
    yield
    _SCORED.clear()


_SCORED: dict[Any, Path] = {}
pytestmark = pytest.mark.usefixtures("scored_folders")


def ready(prefcache, folder: Path, model: Path, n: int = 40, settings: tuple[str, ...] = (), **train) -> Path:
    """A config whose data is prepared and scored."""
    prepare = tuple(each for each in settings if each.startswith("prepare."))
    if (n, prepare) not in _SCORED:
        once = _SCORED[n, prepare] = _SCORED["root"] / str(len(_SCORED))
        once.mkdir()
        write_pairs(once / "pairs.jsonl", n)
        for stage in ("prepare", "score"):
            invoke(once, stage, write_config(once, model), *options(*prepare))
    shutil.copytree(_SCORED[n, prepare], folder, dirs_exist_ok=True)
    return write_config(folder, model, **{"samples": 0, "keep_checkpoints": 99} | train)


# -- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [pytest.param(1.0, marks=pytest.mark.slow), 0.6])
def test_losses_are_those_of_trl_with_a_second_model_that_it_synchronises(prefcache, model, tmp_path, alpha):
    # 20 steps of 8, 5 an epoch; the reference moves after 6, 12 and 18, so that windows hold examples twice.
    config = ready(
        prefcache,
        tmp_path,
        model,
        settings=("--set", "prepare.held_out=0"),
        batch_size=BATCH,
        epochs=4,
        moving_reference={"every": 6, "alpha": alpha},
    )
    prefcache("train", config)
    run = tmp_path / "runs/tiny/trained"
    ours = [row["loss"] for row in table(run, "metrics") if row["step"]]
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 6, "ref_model_mixup_alpha": alpha}
    theirs = losses_of_trl(model, in_order(run), tmp_path / "trl", learning_rate=1e-3, **sync)
    assert len(ours) == len(theirs) == 20
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < 1e-5
    # The moves are no small thing: with the reference that it began with, losses are others.
    prefcache("train", config, "--set", "train.moving_reference=null", "--set", "train.run=still")
    still = [row["loss"] for row in table(tmp_path / "runs/tiny/still", "metrics") if row["step"]]
    assert ours[:6] == still[:6] and abs(ours[6] - still[6]) > 0.05


class Live:
    """The references of a run as its checkpoints tell, each a model of Transformers: what stood in memory at no time."""

    def __init__(self, model: Path, run: Path, moving: dict) -> None:
        self.run, self.alpha, self.every = run, moving["alpha"], moving["every"]
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.of_move = [{name: value.clone() for name, value in self.model.state_dict().items()}]
        for done in itertools.count(self.every, self.every):
            if not (folder := run / f"checkpoints/step-{done:08}").exists():
                break
            policy, before = self.policy(folder), self.of_move[-1]
            self.of_move.append({name: self.alpha * policy[name] + (1 - self.alpha) * before[name] for name in before})

    def policy(self, checkpoint: Path) -> dict[str, torch.Tensor]:
        """All weights; an adapter's product, times 32 / 16, is added to those of its layer."""
        saved = load_file(checkpoint / "weights.safetensors")
        whole = dict(self.of_move[0]) | {name: value for name, value in saved.items() if "lora" not in name}
        for name in [name for name in saved if ".lora_A." in name]:
            product = saved[name.replace("lora_A", "lora_B")] @ saved[name]
            at = name.partition(".lora_A.")[0] + ".weight"
            whole[at] = self.of_move[0][at] + 2 * product
        return whole

    def logps(self, of: dict[str, torch.Tensor], prompt: list[int], answer: list[int]) -> torch.Tensor:
        self.model.load_state_dict(of)
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            found = self.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return found[len(prompt) - 1 :].double()

    def at(self, step: int) -> dict[str, torch.Tensor]:
        """The reference that a step is trained against: it moves before the first step after each 4."""
        return self.of_move[max(0, step - 1) // self.every]


SELECTED = ("--set", "train.where=n_chosen % 3 > 0", "--set", "train.order_by=n_chosen, margin")
LABELS = ("--set", "prepare.examples=labels", "--set", "train.loss=kto")


@pytest.mark.parametrize(
    ("moving", "settings"),
    [
        pytest.param(SOFT, (), id="soft", marks=pytest.mark.slow),
        pytest.param(HARD, SELECTED, id="hard-selected"),
        pytest.param(SOFT, (*LABELS, "--set", "train.micro_batch_size=3"), id="soft-labels-in-micro-batches"),
        pytest.param(SOFT, ("--set", "train.lora={}"), id="soft-lora"),
        pytest.param(HARD, ("--set", "train.lora={}"), id="hard-lora", marks=pytest.mark.slow),
    ],
)
def test_every_visit_has_the_log_probs_of_the_reference_of_its_step(prefcache, model, tmp_path, moving, settings):
    more = {"checkpoint_every": 4, "eval_every": 3, "moving_reference": moving}
    config = ready(prefcache, tmp_path, model, settings=settings, **more)
    prefcache("train", config, *settings)
    run = tmp_path / "runs/tiny/trained"
    live, prepared = Live(model, run, moving), Prepared(tmp_path / "runs/tiny/prepared")
    rows = {row["example_id"]: row for split in ("train", "held_out") for row in prepared.table(split).to_pylist()}
    answers = ("completion",) if LABELS[0] in settings and LABELS[1] in settings else ("chosen", "rejected")
    visits = table(run, "steps")
    assert {visit["step"] for visit in visits if visit["split"] == "held_out"} >= {0, 3, 6}
    for visit, answer in itertools.product(visits, answers):
        row = rows[visit["example_id"]]
        expected = live.logps(live.at(visit["step"]), row["prompt_ids"], row[f"{answer}_ids"]).sum().item()
        assert visit[f"ref_{answer}_logp"] == pytest.approx(expected, abs=2e-4)
    # After it made room for the reference the policy is back, and goes on learning.
    policy, later = (live.policy(sorted((run / "checkpoints").iterdir())[i]) for i in (0, -1))
    for visit in (each for each in visits if (each["step"], each["split"]) == (5, "train")):
        row = rows[visit["example_id"]]
        expected = live.logps(policy, row["prompt_ids"], row[f"{answers[0]}_ids"]).sum().item()
        assert visit[f"{answers[0]}_logp"] == pytest.approx(expected, abs=2e-4)
    assert any(not torch.equal(policy[name], later[name]) for name in policy)
    if answers == ("completion",):
        _kl_is_of_the_reference_of_its_step(run, live, rows)


def _kl_is_of_the_reference_of_its_step(run: Path, live: Live, rows: dict) -> None:
    """kto's z at step 5, which is the first after a move: the policy is that of the checkpoint at step 4."""
    policy, reference = live.policy(run / "checkpoints/step-00000004"), live.at(5)
    seen = [
        rows[visit["example_id"]] for visit in table(run, "steps") if (visit["step"], visit["split"]) == (5, "train")
    ]
    ratios = [
        (live.logps(policy, *sequence[:2]) - live.logps(reference, *sequence[:2])).sum().item()
        for sequence in ((row["prompt_ids"], row["kl_ids"]) for row in seen if row["kl_ids"])
    ]
    (found,) = (row["kl"] for row in table(run, "metrics") if row["step"] == 5)
    assert found == pytest.approx(max(0.0, np.mean(ratios)), abs=2e-4) and abs(np.mean(ratios)) > 0.01


def test_losses_that_weigh_single_tokens_get_those_of_the_reference_of_the_step(prefcache, model, tmp_path):
    more = {"checkpoint_every": 4, "moving_reference": SOFT, "tokens": {"ld_alpha": 0.5}}
    config = ready(prefcache, tmp_path, model, **more)
    prefcache("train", config)
    run = tmp_path / "runs/tiny/trained"
    live = Live(model, run, SOFT)
    policy, reference = live.policy(run / "checkpoints/step-00000004"), live.at(5)
    rows = {row["example_id"]: row for row in Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist()}

    def log_ratio(row: dict, answer: str) -> float:
        """Tokens beyond the shorter answer's length count half."""
        sequence = row["prompt_ids"], row[f"{answer}_ids"]
        ratio = live.logps(policy, *sequence[:2]) - live.logps(reference, *sequence[:2])
        n = min(row["n_chosen"], row["n_rejected"])
        return (ratio[:n].sum() + 0.5 * ratio[n:].sum()).item()

    for visit in (visit for visit in table(run, "steps") if (visit["step"], visit["split"]) == (5, "train")):
        row = rows[visit["example_id"]]
        margin = 0.1 * (log_ratio(row, "chosen") - log_ratio(row, "rejected"))
        assert visit["loss"] == pytest.approx(math.log1p(math.exp(-margin)), abs=2e-5)


def test_rewards_in_sql_are_those_of_the_metrics(prefcache, model, tmp_path):
    config = ready(prefcache, tmp_path, model, moving_reference=HARD)
    prefcache("train", config)
    query = (
        "select step, avg(margin) as margin from steps where split = 'train' and step > 0 group by step order by step"
    )
    found = {row["step"]: row["margin"] for row in json.loads(prefcache("sql", query, "runs/tiny", "--json").stdout)}
    rows = {row["step"]: row for row in table(tmp_path / "runs/tiny/trained", "metrics") if row["step"]}
    assert found == {step: pytest.approx(row["rewards/margins"], abs=1e-9) for step, row in rows.items()}
    # The policy is its own reference at the first step after each move, and only there.
    assert [step for step in found if abs(found[step]) < 1e-6] == [1, 2, 5, 9]


@pytest.mark.parametrize("alpha", [0.4, 0.6])
def test_weights_in_bf16_that_differ_by_one_step_are_mixed_on_average(alpha):
    reference = torch.ones(300, 200).bfloat16()
    policy = torch.full_like(reference, 1 + 2**-7)  # the next number
    mixed = _mix_bf16(policy.clone(), reference, alpha, key=1)
    assert mixed.dtype == torch.bfloat16 and mixed.unique().tolist() == [1, 1 + 2**-7]
    assert (mixed.double().mean().item() - 1) * 2**7 == pytest.approx(alpha, abs=0.01)
    to_the_nearest = policy.mul(alpha).add(reference, alpha=1 - alpha)
    assert to_the_nearest.unique().tolist() == [1 + 2**-7 if alpha > 0.5 else 1]


# -- the cost --------------------------------------------------------------------------------------------------------


def test_an_example_is_scored_once_until_the_reference_moves_again(prefcache, model, tmp_path, monkeypatch):
    scored, score = [], Policy.score

    def counted(policy, examples, indices, answers, *, tokens):
        # With their tokens are those that the run's end shows.
        scored.extend([] if tokens else examples.example_ids(indices))
        return score(policy, examples, indices, answers, tokens=tokens)

    monkeypatch.setattr(Policy, "score", counted)
    # 3 steps an epoch: a window of 4 steps has pairs twice. Evaluated after step 12 alone, which is the last.
    config = ready(prefcache, tmp_path, model, 20, ("--set", "prepare.held_out=0.1"), epochs=4, moving_reference=SOFT)
    prefcache("train", config)
    visits = table(tmp_path / "runs/tiny/trained", "steps")

    def seen(split: str, first: int, last: int) -> list[str]:
        return [each["example_id"] for each in visits if each["split"] == split and first <= each["step"] <= last]

    windows = [seen("train", 5, 8), seen("train", 9, 12), seen("held_out", 12, 12)]
    assert len(windows[0]) > len(set(windows[0])) and windows[2]
    assert sorted(scored) == sorted(example for window in windows for example in set(window))


def device_bytes() -> int:
    """Of all tensors made since `gc.freeze`, each storage once."""
    storages = [each.untyped_storage() for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.device.type == "cpu"}.values())


@pytest.mark.parametrize("settings", [(), ("--set", "train.lora={r: 1}")], ids=["whole", "lora"])
def test_the_reference_is_scored_with_no_second_copy_of_the_weights(prefcache, model, tmp_path, monkeypatch, settings):
    """At every forward: the weights, the optimizer's two moments of what is trained, and little else; no gradients."""
    config = ready(prefcache, tmp_path, model, 20, moving_reference={"every": 2})
    alive: dict[bool, list[int]] = {True: [], False: []}
    logps = PolicyLogps._token_logps

    def watched(policy, *arguments, **options):
        alive[torch.is_grad_enabled()].append(device_bytes())
        return logps(policy, *arguments, **options)

    monkeypatch.setattr(PolicyLogps, "_token_logps", watched)
    gc.collect()
    gc.freeze()
    try:
        prefcache("train", config, *settings, "--set", "train.eval_every=100")
    finally:
        gc.unfreeze()
    learning, scoring = max(alive[True]), max(alive[False])
    a_model = (model / "model.safetensors").stat().st_size
    # Scoring holds no more than a step does, and neither has room for one more model.
    assert a_model < scoring < learning + 0.1 * a_model
    assert scoring < (1.5 if settings else 3.3) * a_model


# -- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"moving_reference": SOFT}, id="soft", marks=pytest.mark.slow),
        pytest.param({"moving_reference": HARD, "tokens": {"decay": 0.9}, "eval_every": 5}, id="hard-with-tokens"),
        pytest.param({"moving_reference": SOFT, "lora": {}}, id="soft-lora", marks=pytest.mark.slow),
        pytest.param({"moving_reference": SOFT, "weights": "bfloat16"}, id="soft-bf16"),
    ],
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(prefcache, model, tmp_path, settings):
    config = ready(prefcache, tmp_path, model, checkpoint_every=2, epochs=3, **settings)
    prefcache("train", config)
    run = tmp_path / "runs/tiny/trained"
    file = run / "model" / ("adapter_model.safetensors" if "lora" in settings else "model.safetensors")
    expected = [file.read_bytes(), table(run, "metrics"), table(run, "steps")]
    # Cut off before the first move, right before a move, and between two.
    for goes_on in (2, 8, 10):
        (run / "manifest.json").unlink()
        for folder in (run / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step-")) > goes_on:
                shutil.rmtree(folder)
        assert f"resuming from step {goes_on}" in prefcache("train", config).stderr
        assert [file.read_bytes(), table(run, "metrics"), table(run, "steps")] == expected
        if goes_on == 2:
            kept = shutil.copytree(run, tmp_path / "kept")
        else:
            shutil.rmtree(run)
            shutil.copytree(kept, run)


def test_killed_while_it_moves_it_ends_with_the_same_weights_and_leaves_nothing(prefcache, model, tmp_path):
    config = ready(prefcache, tmp_path, model, checkpoint_every=3, epochs=4, moving_reference={"every": 1})
    prefcache("train", config, "--set", "train.run=whole")
    run = tmp_path / "runs/tiny/trained"
    child = start_process(tmp_path, "train", config)
    while child.is_alive() and not ((run / "checkpoints").exists() and list(run.glob(".policy.*.tmp"))):
        time.sleep(0.0005)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL and not (run / "manifest.json").exists()
    assert "resuming from step" in prefcache("train", config).stderr
    assert weights(run) == weights(tmp_path / "runs/tiny/whole")
    assert table(run, "metrics") == table(tmp_path / "runs/tiny/whole", "metrics")
    assert not list(run.glob(".*.tmp"))


@pytest.mark.parametrize("file", ["reference.safetensors", "reference-scores.safetensors"])
def test_a_checkpoint_whose_reference_is_damaged_is_passed_over(prefcache, model, tmp_path, file):
    config = ready(prefcache, tmp_path, model, checkpoint_every=3, moving_reference=SOFT)
    prefcache("train", config)
    run = tmp_path / "runs/tiny/trained"
    expected = weights(run)
    (run / "manifest.json").unlink()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    kept = shutil.copytree(run, tmp_path / "kept")
    (newest / file).unlink()
    done = prefcache("train", config)
    assert f"{file} is missing. Going back to the checkpoint before it" in done.stderr and weights(run) == expected
    # Sealed again without it, its manifest says so.
    shutil.rmtree(run)
    shutil.copytree(kept, run)
    (newest / file).unlink()
    facts = CheckpointManifest.find(newest).facts()
    facts["files"] = [entry for entry in facts["files"] if entry["file"] != file]
    CheckpointManifest.make(**facts).commit(newest / "manifest.json")
    done = prefcache("train", config)
    assert f"does not list {file}. Going back to the checkpoint before it" in done.stderr and weights(run) == expected


def test_two_processes_share_what_the_reference_scores(prefcache, model, tmp_path):
    config = ready(prefcache, tmp_path, model, n=30, moving_reference=SOFT, checkpoint_every=5)
    prefcache("train", config, "--set", "train.run=one")
    launch(tmp_path, ["train", config, "--set", "train.run=two"])
    one, two = (table(tmp_path / "runs/tiny" / run, "metrics") for run in ("one", "two"))
    for name in ("loss", "rewards/margins", "eval_loss"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in two], abs=1e-5)


# -- what is said and refused ----------------------------------------------------------------------------------------


def test_a_run_says_that_its_reference_moves(prefcache, model, tmp_path):
    config = ready(prefcache, tmp_path, model, moving_reference=SOFT)
    said = "the reference moves every 4 steps: it becomes 0.6 policy + 0.4 reference"
    done = prefcache("train", config)
    assert f"train: {said}" in done.stderr and "start checked" in done.stderr
    run = tmp_path / "runs/tiny/trained"
    assert f"| along the run | {said} |" in (run / "model/README.md").read_text()
    assert json.loads((run / "provenance.json").read_text())["moving_reference"] == said


def test_of_an_adapter_of_experts_each_experts_product_is_mixed(model, tmp_path):
    lora = Lora(r=2, target_modules=[], target_parameters=("gate_up_proj", "down_proj"))
    mixture = Reference(save_mixture(model, tmp_path / "mixture"))
    own, other = (trainable.load(mixture, Train(lora=lora), "sdpa", torch.device("cpu")) for _ in range(2))
    away_from_nothing(own.parameters().values())
    for parameter in other.parameters().values():
        parameter.data.normal_()
    deltas = [
        {
            name: wrapper.get_delta_weight("default")
            for name, wrapper in trainable.adapted_parameters(each.model).items()
        }
        for each in (own, other)
    ]
    stacked = trainable.count_stacked(own.model)
    for name, parameter in own.parameters().items():
        mixed = _mix(name, parameter.data, other.parameters()[name].data, 0.6, stacked[name])
        trainable.assign(parameter, mixed)
    wrappers = trainable.adapted_parameters(own.model)
    assert len(wrappers) == 4
    for name, wrapper in wrappers.items():
        expected = 0.6 * deltas[0][name] + 0.4 * deltas[1][name]
        torch.testing.assert_close(wrapper.get_delta_weight("default"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["train.loss=simpo"], "this run reads none"),
        (["train.reference_free=true"], "this run reads none"),
        (["train.moving_reference={}"], "the reference would never move"),
        (["train.lora={dora: true}"], "DoRA's magnitudes cannot"),
        (["train.moving_reference.alpha=0"], "greater than 0"),
    ],
)
def test_what_has_no_meaning_is_refused(prefcache, model, tmp_path, settings, says):
    config = ready(prefcache, tmp_path, model, 20, moving_reference={"every": 2, "alpha": 0.5})
    done = prefcache("train", config, *options(*settings), code=2)
    assert says in done.stderr


def test_a_mixture_needs_a_policy_that_starts_from_the_reference_and_a_past_policy_none(
    prefcache, model, other_model, tmp_path
):
    config = ready(prefcache, tmp_path, model, 20, moving_reference={"every": 2})
    settings = ("--set", f"train.model={other_model}")
    refused = prefcache("train", config, *settings, code=2).stderr
    assert "Set alpha to 1" in refused
    prefcache("train", config, *settings, "--set", "train.moving_reference.alpha=1")


def test_when_it_is_evaluated_belongs_to_a_run_whose_reference_moves(prefcache, model, tmp_path):
    config = ready(prefcache, tmp_path, model, 20, moving_reference={"every": 2})
    prefcache("train", config)
    (tmp_path / "runs/tiny/trained/manifest.json").unlink()
    assert "train.eval_every none (now 1)" in prefcache("train", config, "--set", "train.eval_every=1", code=2).stderr


def test_a_loss_that_rises_because_the_reference_moved_is_no_alert():
    """The loss falls from 0.69 to 0.3 and is back at 0.69 after each move, every 60 steps."""
    rows = [{"step": step, "loss": 0.69 - 0.39 * ((step - 1) % 60) / 60} for step in range(1, 301)]
    healthy = get_loss("sigmoid").healthy

    def kinds(moves: int | None) -> set[str]:
        watch = Watch(healthy, n_steps=300, batch_size=32, warmup=0, reference_moves_every=moves)
        return {alert.kind for row in rows for alert in watch.feed(row)}

    assert "loss_rising" in kinds(None) and "loss_rising" not in kinds(60)
    # One that does rise under one reference is.
    rows = [{"step": step, "loss": 0.3 + 0.39 * ((step - 1) % 60) / 60} for step in range(1, 301)]
    assert "loss_rising" in kinds(60)


def test_the_default_is_the_papers():
    assert Train(moving_reference={}).moving_reference.model_dump() == {"every": 512, "alpha": 0.6}
