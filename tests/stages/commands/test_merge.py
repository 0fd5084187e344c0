"""Training an adapter and merging it, as a user runs them: a margin of 0, nothing lost, one whole model at the end."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefcache.commands import merge
from prefcache.pipeline.stored.prepared import Prepared
from tests.helpers.models import save_mixture
from tests.helpers.processes import launch
from tests.helpers.project import write_config, write_pairs
from tests.helpers.runs import metrics, sft

LORA = ["--set", "train.lora.r=4", "--set", "train.samples=0", "--set", "train.epochs=1"]


@pytest.fixture
def scored(prefcache, model, tmp_path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl", 40)
    config = write_config(tmp_path, model, learning_rate=1e-2, checkpoint_every=2)
    prefcache("prepare", config)
    prefcache("score", config)
    return config


def weights(run: Path) -> bytes:
    return (run / "model/adapter_model.safetensors").read_bytes()


def held_out_logps(model, root: Path) -> list[float]:
    """By Transformers' own loss."""
    found = []
    for row in Prepared(root / "runs/tiny/prepared").table("held_out").to_pylist():
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        labels = ids.clone()
        labels[:, : row["n_prompt"]] = -100
        with torch.no_grad():
            found.append(-model(input_ids=ids, labels=labels).loss.item() * row["n_chosen"])
    return found


def measured(run: Path) -> list[float]:
    """What the run recorded of the held-out pairs at its end."""
    rows = [row for part in sorted((run / "steps").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    last = {row["example_id"]: row["chosen_logp"] for row in rows if row["split"] == "held_out"}
    order = Prepared(run.parent / "prepared").table("held_out")["example_id"].to_pylist()
    return [last[example_id] for example_id in order]


def test_an_adapter_is_trained_from_a_margin_of_0_saved_and_merged(prefcache, scored, model, tmp_path):
    said = prefcache("train", scored, *LORA).stderr
    # r (I + O) of seven layers in each of two.
    n = 4 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert f"an adapter of {n:,} parameters is trained" in said and "start checked on 32 pairs: margin 0.000000" in said
    run = tmp_path / "runs/tiny/trained"
    # A run of an earlier version, which knew no such setting, is the same run.
    assert "target_parameters" not in json.loads((run / "provenance.json").read_text())["inputs"]["train"]["lora"]
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert sum(each.numel() for each in load_file(newest / "weights.safetensors").values()) == n

    expected = measured(run)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(run / "model").eval()
    assert held_out_logps(adapted, tmp_path) == pytest.approx(expected, rel=1e-4)
    assert held_out_logps(AutoModelForCausalLM.from_pretrained(run / "model").eval(), tmp_path) == pytest.approx(
        expected, rel=1e-4
    )
    assert held_out_logps(AutoModelForCausalLM.from_pretrained(model).eval(), tmp_path) != pytest.approx(
        expected, rel=1e-2
    )

    result = json.loads(prefcache("merge", run, "--json").stdout)
    assert result["dtype"] == "float32" and 0 <= result["mean"] <= 1e-5 < result["effect"]
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    assert not (run / "merged/adapter_config.json").exists()
    assert held_out_logps(merged, tmp_path) == pytest.approx(expected, rel=1e-4)
    assert AutoTokenizer.from_pretrained(run / "merged").chat_template
    assert "exists already" in prefcache("merge", run, code=2).stderr


def test_an_interrupted_adapter_goes_on_to_the_same_weights(prefcache, scored, tmp_path):
    run = tmp_path / "runs/tiny/trained"
    more = ["--set", "train.lora.dora=true", "--set", "train.gradient_checkpointing=true"]
    prefcache("train", scored, *LORA, *more)
    expected = weights(run)
    # As after a kill: the last checkpoint is gone, and so is what the end of the run wrote.
    (run / "manifest.json").unlink()
    assert "is not finished" in prefcache("merge", run, code=2).stderr
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    # Recomputing layers or not is no other run.
    assert "resuming from step" in prefcache("train", scored, *LORA, *more[:2]).stderr
    assert weights(run) == expected


def test_two_processes_train_the_adapter_that_one_trains(prefcache, scored, tmp_path):
    more = [*LORA, "--set", "train.learning_rate=1e-3", "--set", "train.gradient_checkpointing=true"]
    prefcache("train", scored, *more, "--set", "train.run=one")
    launch(tmp_path, ["train", scored, *more, "--set", "train.run=two"])
    one, two = (measured(tmp_path / "runs/tiny" / run) for run in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-3)


def test_an_adapter_of_fused_experts_is_trained_resumed_merged_and_scored(prefcache, model, tmp_path):
    mixture = save_mixture(model, tmp_path / "mixture")
    write_pairs(tmp_path / "pairs.jsonl", 40)
    experts = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    more = {"epochs": 1, "samples": 0, "router_aux_loss": 0.1, "tokens_per_micro_batch": 200}
    config = write_config(tmp_path, mixture, learning_rate=1e-2, checkpoint_every=2, lora=experts, **more)
    for stage in ("prepare", "score"):
        prefcache(stage, config)
    said, run = prefcache("train", config).stderr, tmp_path / "runs/tiny/trained"
    # r (I + O) of q_proj, and of both weights of each of four experts, in each of two layers.
    n = 4 * 2 * ((32 + 32) + 4 * (32 + 48) + 4 * (24 + 32))
    assert f"an adapter of {n:,} parameters is trained" in said and "margin 0.000000" in said
    recorded = json.loads((run / "provenance.json").read_text())["inputs"]["train"]["lora"]
    assert recorded["target_parameters"] == experts["target_parameters"]
    adapter, first = weights(run), load_file(run / "model/adapter_model.safetensors")
    assert len(first) == 2 * 2 * 3 and all(each.abs().max() > 0 for each in first.values())
    assert all(row["aux_loss"] > 0 for row in metrics(run) if row["step"])

    (run / "manifest.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    assert "resuming from step" in prefcache("train", config).stderr
    assert weights(run) == adapter

    expected = measured(run)
    result = json.loads(prefcache("merge", run, "--json").stdout)
    assert 0 <= result["mean"] <= 1e-5 < result["effect"]
    for folder in ("merged", "model"):
        loaded = AutoModelForCausalLM.from_pretrained(run / folder) if folder == "merged" else None
        loaded = loaded or peft.AutoPeftModelForCausalLM.from_pretrained(run / folder)
        assert held_out_logps(loaded.eval(), tmp_path) == pytest.approx(expected, rel=1e-4)
    # As a reference of its own, from which training goes on.
    reference = ["--set", f"model={run / 'model'}", "--set", "train.lora={}"]
    prefcache("score", config, *reference)
    assert "margin 0.000000" in prefcache("train", config, *reference, "--set", "train.run=further").stderr


def test_training_goes_on_from_the_adapter_that_the_reference_has(prefcache, scored, model, tmp_path):
    config, adapter = scored, sft(model, tmp_path / "sft")
    settings = ["--set", f"model={adapter}", "--set", "train.lora={}", *LORA[2:]]
    prefcache("score", config, *settings)
    said = prefcache("train", config, *settings).stderr
    assert "start checked on 32 pairs: margin 0.000000" in said
    run = tmp_path / "runs/tiny/trained"
    assert held_out_logps(
        peft.AutoPeftModelForCausalLM.from_pretrained(run / "model").eval(), tmp_path
    ) == pytest.approx(measured(run), rel=1e-4)
    before, after = load_file(adapter / "adapter_model.safetensors"), load_file(run / "model/adapter_model.safetensors")
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)
    # Without a word about an adapter, all weights would have to be trained.
    done = prefcache("train", config, *settings[:2], "--set", "train.run=full", code=2)
    assert "training all weights starts from a whole model. Train an adapter (train.lora={}" in done.stderr


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.filterwarnings("ignore")  # PEFT's, of tied embeddings
def test_an_adapter_of_the_head_is_merged_into_the_head_alone(prefcache, model, tmp_path, ties):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(model, tie_word_embeddings=ties).save_pretrained(base)
    AutoTokenizer.from_pretrained(model).save_pretrained(base)
    adapter = sft(base, tmp_path / "sft", target_modules=["q_proj", "lm_head"])
    prefcache("merge", adapter, "--output", "whole")
    ids = torch.arange(5, 45).unsqueeze(0)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()(ids).logits
        torch.testing.assert_close(found, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_small_adapter_that_bfloat16_would_swallow_is_named(prefcache, model, tmp_path):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(model).save_pretrained(base)
    adapter = sft(base, tmp_path / "sft")
    small = {name: 1e-2 * each for name, each in load_file(adapter / "adapter_model.safetensors").items()}
    from safetensors.torch import save_file

    save_file(small, adapter / "adapter_model.safetensors")
    done = prefcache("merge", adapter)
    assert "--dtype float32 keeps more of it" in done.stderr and "as bfloat16" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(adapter / "merged").dtype == torch.bfloat16
    assert "--dtype" not in prefcache("merge", adapter, "--output", "exact", "--dtype", "float32").stderr


def test_what_differs_by_more_than_rounding_is_not_written(prefcache, model, tmp_path, monkeypatch):
    adapter, original = sft(model, tmp_path / "sft"), merge._logps
    calls = iter([0.0, 0.0, 0.1])  # the third is of the merged model
    monkeypatch.setattr(merge, "_logps", lambda *given: original(*given) + np.float32(next(calls)))
    done = prefcache("merge", adapter, code=4)
    assert "differ by up to 0.1 nats a token" in done.stderr and not (adapter / "merged").exists()


def test_what_is_no_adapter_is_refused(prefcache, model, tmp_path):
    assert "is a whole model already; there is nothing to merge" in prefcache("merge", model, code=2).stderr
    assert "neither a run nor an adapter" in prefcache("merge", tmp_path, code=2).stderr


def test_an_adapter_on_a_quantized_reference_wants_a_gpu(prefcache, scored):
    settings = ["--set", "score.quantization=4bit", "--set", "train.loss=simpo", "--set", "train.device=cpu"]
    assert "Train an adapter (train.lora={}" in prefcache("train", scored, *settings, code=2).stderr
    done = prefcache("train", scored, *settings, "--set", "train.lora={}", code=2)
    assert "is trained on quantized weights on a GPU only" in done.stderr
