"""train.best: the run ends with the best evaluation's weights, whatever interrupted it."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from prefcache.pipeline.config import Best
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.training import best_checkpoint, checkpoints
from prefcache.pipeline.training.metrics import example_evaluation
from tests.helpers.examples import objective
from tests.helpers.project import invoke, options, write_config, write_pairs
from tests.helpers.runs import metrics, table, weights, write_turned_pairs

TOO_LONG = {"learning_rate": 3e-3, "epochs": 3, "eval_every": 2, "samples": 3}
LOSS = options("train.best=eval_loss", "train.checkpoint_every=3")


@pytest.fixture(scope="module")
def turned(model, tmp_path_factory) -> Path:
    """An experiment with two runs: the last step's model and the best evaluation's."""
    folder = tmp_path_factory.mktemp("turned")
    write_turned_pairs(folder / "pairs.jsonl")
    config = write_config(folder, model, **TOO_LONG)
    for stage in ("prepare", "score"):
        invoke(folder, stage, config)
    invoke(folder, "train", config, "--set", "train.run=last")
    done = invoke(folder, "train", config, *LOSS)
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


@pytest.fixture
def scored(turned, tmp_path) -> Path:
    shutil.copytree(turned, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("trained", "last"))
    return tmp_path / "config.yaml"


@pytest.fixture
def run(turned, tmp_path) -> Path:
    """The run that ends with the best evaluation."""
    shutil.copytree(turned, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs/tiny/trained"


def evaluations(run: Path, metric: str) -> dict[int, float]:
    """Of the steps, without the one before the first."""
    return {row["step"]: row[metric] for row in metrics(run) if row["step"] and row.get(metric) is not None}


def steps_kept(run: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").iterdir())


def test_the_model_is_the_best_evaluations_and_everything_says_which(run, turned, tmp_path):
    from transformers import AutoModelForCausalLM

    losses = evaluations(run, "eval_loss")
    step = min(losses, key=losses.__getitem__)
    assert 2 < step < max(losses)
    # Choosing changes no step.
    assert evaluations(tmp_path / "runs/tiny/last", "eval_loss") == losses
    assert weights(run) != weights(tmp_path / "runs/tiny/last")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["best"] == {"step": step, "metric": "eval_loss", "value": losses[step]}
    assert manifest["after"]["evaluation"]["loss"] == losses[step]
    for said in (turned / "stdout", turned / "stderr", run / "model/README.md"):
        assert f"of step {step}, the best" in said.read_text()
    # Its log-probs, by plain Transformers, are those recorded at that step.
    trained = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    visits = {v["example_id"]: v for v in table(run, "steps") if v["step"] == step and v["split"] == "held_out"}
    rows = Prepared(tmp_path / "runs/tiny/prepared").table("held_out").to_pylist()
    assert len(visits) == len(rows) > 0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            logps = trained(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        assert visits[row["example_id"]]["chosen_logp"] == pytest.approx(
            logps[row["n_prompt"] - 1 :].sum().item(), rel=1e-5
        )


def test_more_is_better_for_what_is_no_loss_and_it_can_be_said_otherwise(prefcache, scored, tmp_path):
    for run, best_is, choose in (
        ("most", "eval_rewards/margins", max),
        ("least", "{metric: eval_rewards/margins, greater_is_better: false}", min),
    ):
        prefcache("train", scored, "--set", f"train.best={best_is}", "--set", f"train.run={run}")
        found = evaluations(tmp_path / "runs/tiny" / run, "eval_rewards/margins")
        manifest = json.loads((tmp_path / "runs/tiny" / run / "manifest.json").read_text())
        assert manifest["best"]["step"] == choose(found, key=found.__getitem__)


def test_of_equal_evaluations_the_earlier_is_the_best():
    wanted, found = Best(metric="eval_rewards/accuracies"), None
    for step, value in ((2, 0.5), (4, 0.75), (6, 0.75), (8, 0.625)):
        found = best_checkpoint.update(wanted, found, step, {"rewards/accuracies": value})
    assert (found.step, found.waited) == (4, 2)
    # One that was not finite is no better than any; the first of all is, for there is nothing else yet.
    assert best_checkpoint.update(wanted, None, 2, {}).step == 2
    assert best_checkpoint.update(wanted, found, 10, {}).step == 4
    first = best_checkpoint.update(wanted, None, 2, {})
    assert best_checkpoint.update(wanted, first, 4, {"rewards/accuracies": 0.0}).step == 4


def test_the_best_is_kept_beside_the_newest_until_a_better_one_comes(prefcache, scored, tmp_path):
    """Between two checkpoints it gets one of its own."""
    prefcache("train", scored, *LOSS, *options("train.checkpoint_every=5", "train.keep_checkpoints=1"))
    run = tmp_path / "runs/tiny/trained"
    losses = evaluations(run, "eval_loss")
    step = min(losses, key=losses.__getitem__)
    assert step % 5 and steps_kept(run) == [step, max(losses)]
    folder, state = checkpoints.find_newest(run, pytest.fail)
    assert folder == checkpoints.path(run, max(losses)) and state.best.step == step
    kept, model = (
        load_file(path)
        for path in (checkpoints.path(run, step) / "weights.safetensors", run / "model/model.safetensors")
    )
    assert all(torch.equal(kept[name], values) for name, values in model.items())


@pytest.mark.parametrize("lost", ["last", "all", "best", "model"])
def test_whatever_is_lost_a_resumed_run_ends_with_the_same_bytes(prefcache, run, lost):
    expected, step = weights(run), json.loads((run / "manifest.json").read_text())["best"]["step"]
    rows, samples = metrics(run), pq.read_table(run / "samples.parquet")
    if lost == "model":
        shutil.rmtree(run / "model")
    else:
        (run / "manifest.json").unlink()
        folders = {"last": [max(steps_kept(run))], "best": [step], "all": steps_kept(run)}[lost]
        for each in folders:
            (checkpoints.path(run, each) / "weights.safetensors").write_bytes(b"")
    done = prefcache("train", "config.yaml", *LOSS)
    # Without the best, no later checkpoint leads to the same end.
    assert ("resuming from step" in done.stderr) == (lost in ("last", "model"))
    assert weights(run) == expected and metrics(run) == rows
    assert pq.read_table(run / "samples.parquet").equals(samples)
    assert json.loads((run / "manifest.json").read_text())["best"]["step"] == step
    assert steps_kept(run)[0] == step  # nothing damaged is left


def test_patience_ends_training_and_a_resumed_run_at_the_same_step(prefcache, run):
    settings = options("train.best={metric: eval_loss, patience: 2}", "train.checkpoint_every=3", "train.run=patient")
    prefcache("train", "config.yaml", *settings)
    all_losses = evaluations(run, "eval_loss")
    run = run.with_name("patient")
    losses = evaluations(run, "eval_loss")
    step = min(losses, key=losses.__getitem__)
    # Evaluated at every second step: it ends two evaluations after the best one.
    assert max(losses) == step + 4 < max(all_losses)
    assert losses == {at: value for at, value in all_losses.items() if at <= step + 4}
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["steps"], manifest["best"]["step"]) == (step + 4, step)
    expected = weights(run)
    for lost in (0, 1):  # ended, but not written to the end; and a checkpoint before
        (run / "manifest.json").unlink()
        for each in steps_kept(run)[::-1][:lost]:
            shutil.rmtree(checkpoints.path(run, each))
        prefcache("train", "config.yaml", *settings)
        assert weights(run) == expected and evaluations(run, "eval_loss") == losses


def test_when_it_is_evaluated_is_part_of_a_run_that_looks_for_the_best(prefcache, run):
    often = options("train.eval_every=3")
    assert "nothing to do" in prefcache("train", "config.yaml", "--set", "train.run=last", *often).stderr
    assert "train.eval_every 2 (now 3)" in prefcache("train", "config.yaml", *LOSS, *often).stderr


def test_a_run_whose_reference_moves_is_told_what_its_best_is_beside(prefcache, scored, tmp_path):
    moves = [*LOSS, *options("train.moving_reference={every: 4, alpha: 1}", "train.epochs=2")]
    said = "eval_loss is measured against the reference of its step"
    assert said in prefcache("train", scored, *moves).stderr
    for run, metric in (("logps", "eval_logps/chosen"), ("preference", "eval_preference_accuracy")):
        alone = prefcache("train", scored, *moves, *options(f"train.best={metric}", f"train.run={run}"))
        assert "measured against" not in alone.stderr
    by_step = evaluations(tmp_path / "runs/tiny/preference", "eval_preference_accuracy")
    assert f"the model is that of step {max(by_step, key=by_step.__getitem__)}, the best" in alone.stderr


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.best=eval_los"], "there is no metric 'eval_los'. The nearest is eval_loss. This run's evaluations log eval_loss,"),
        (["train.best=eval_kl"], "eval_rewards/accuracies, eval_rewards/margins, eval_logps/chosen, eval_logps/rejected"),
        (["train.best=grad_norm"], "there is no metric 'eval_grad_norm'"),
        (["train.best=eval_loss", "train.eval_every=null"], "only the last step has one. Set train.eval_every"),
        (["train.best=eval_loss", "prepare.held_out=0"], "no example is held out"),
    ],
)  # fmt: skip
def test_what_cannot_be_the_best_is_refused_before_anything_is_loaded(prefcache, model, tmp_path, settings, message):
    write_pairs(tmp_path / "pairs.jsonl", 12)
    config = write_config(tmp_path, model, **TOO_LONG)
    prefcache("prepare", config, *options(*(each for each in settings if "prepare" in each)))
    done = prefcache("train", config, *options(*settings), code=2)
    assert message in done.stderr and not (tmp_path / "runs/tiny/trained").exists()


def test_a_metric_that_the_held_out_examples_cannot_have_is_refused(prefcache, model, tmp_path):
    """Of answers that are all desirable, accuracy has no meaning."""
    rows = [{"prompt": f"{i}: why?", "completion": f"the cat {i}", "label": True} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(tmp_path, model, **TOO_LONG, loss="kto")
    for stage in ("prepare", "score"):
        prefcache(stage, config)
    done = prefcache("train", config, "--set", "train.best=eval_rewards/accuracies", code=2)
    assert "has no value on these held-out examples. Those that have: eval_loss, eval_rewards/chosen" in done.stderr
    prefcache("train", config, *LOSS, "--set", "train.run=other")


@pytest.mark.parametrize(
    "loss", ["sigmoid", "simpo", "sft", "kto_pair", "beta_dpo", "{sigmoid: 0.8, sft: 0.2}", "kto", "bco"]
)
def test_the_metrics_that_are_named_are_those_that_evaluations_log(prefcache, scored, tmp_path, loss):
    import yaml

    labels = options("prepare.examples=labels", "out=runs/labels") if loss in ("kto", "bco") else []
    for stage in ("prepare", "score") if labels else ():
        prefcache(stage, scored, *labels)
    prefcache("train", scored, *labels, *options(f"train.loss={loss}", "train.epochs=0.1"))
    row = metrics(tmp_path / ("runs/labels" if labels else "runs/tiny") / "trained")[0]
    logged = {
        name.removeprefix("eval_") for name, value in row.items() if name.startswith("eval_") and value is not None
    }
    assert set(example_evaluation(objective(loss=yaml.safe_load(loss)))) == logged
