"""train, as a user runs it: right losses, nothing lost, and one model in memory."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from prefcache.commands import train
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import Before, CheckpointManifest
from tests.helpers.live_dpo import live_losses
from tests.helpers.processes import launch
from tests.helpers.project import PREFCACHE, build_model, options, write_config, write_pairs
from tests.helpers.runs import batches_of, metrics, table, weights


def test_the_cached_and_a_live_reference_give_the_same_losses_for_50_steps(prefcache, scored, model, tmp_path):
    prefcache("train", scored, *options("train.epochs=9", "train.learning_rate=1e-4"))
    run = tmp_path / "runs/tiny/trained"
    ours = {row["step"]: row["loss"] for row in metrics(run) if row["step"]}
    assert len(ours) >= 50
    theirs = live_losses(model, tmp_path / "runs/tiny/prepared", batches_of(run), learning_rate=1e-4)
    worst = max(abs(ours[step] - theirs[step]) for step in ours)
    assert worst < 1e-6, worst


@pytest.mark.parametrize(
    ("loss", "at_margin_zero"),
    [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", (1 / (2 * 0.1)) ** 2)],
)
def test_step_0_shows_margin_0_and_the_loss_of_margin_0(prefcache, scored, tmp_path, loss, at_margin_zero):
    result = json.loads(prefcache("train", scored, "--set", f"train.loss={loss}", "--json").stdout)
    first = metrics(tmp_path / "runs/tiny/trained")[0]
    assert first["step"] == 0 and abs(first["rewards/margins"]) < 1e-6
    assert first["loss"] == pytest.approx(at_margin_zero, rel=1e-5)
    # It learns: the margin on the pairs it trains on rises.
    assert metrics(tmp_path / "runs/tiny/trained")[-1]["rewards/margins"] > 0.05
    assert result["steps"] == len(metrics(tmp_path / "runs/tiny/trained")) - 1


def test_labels_are_refused_before_any_model_is_loaded(prefcache, config, tmp_path):
    prefcache("prepare", config, "--set", "prepare.examples=labels")
    # Nothing is scored: the data is what is wrong, whatever else is missing.
    done = prefcache("train", config, code=2)
    assert "Loss 'sigmoid' reads chosen_logp, rejected_logp" in done.stderr
    assert "labelled answers, not pairs" in done.stderr and "prepare.examples: pairs" in done.stderr
    assert not (tmp_path / "runs/tiny/trained").exists()


def test_a_cache_that_does_not_hold_what_the_policy_computes_is_refused(prefcache, scored, tmp_path):
    """Values changed behind the record's back, with checksums to match: only recomputing them can tell."""
    from prefcache.pipeline.schema import CACHE
    from prefcache.pipeline.stored import artifact

    for record_file in (tmp_path / "cache").glob("*/[0-9a-f]*.json"):
        if record_file.name == "reference.json":
            continue
        record = artifact.unseal(record_file)
        del record["values_xxh3_128"], record["blocks"]
        shard = record_file.parent / record["file"]
        rows = [{**row, "logp_sum": row["logp_sum"] - 0.5} for row in pq.read_table(shard).to_pylist()]
        import pyarrow as pa

        data = artifact.parquet(pa.Table.from_pylist(rows, schema=CACHE), float_lists=["logps"])
        artifact.commit_bytes(record_file, artifact.seal({**record, **artifact.commit_file(shard, data)}))
    done = prefcache("train", scored, code=5)
    assert "log-probs differ by" in done.stderr and "score again" in done.stderr
    assert not (tmp_path / "runs/tiny/trained/manifest.json").exists()
    # The remedy that it names works.
    shutil.rmtree(tmp_path / done.stderr.partition("or delete ")[2].partition(" and score")[0])
    prefcache("score", scored)
    prefcache("train", scored)


def test_metrics_have_trls_names_and_are_the_means_of_what_is_recorded_per_pair(trained):
    rows = metrics(trained)
    trl = "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected"
    names = set(trl.split()) | {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "eval_loss"}
    assert names <= set(rows[-1])
    for row in rows[1:]:
        visits = [v for v in table(trained, "steps") if v["step"] == row["step"] and v["split"] == "train"]
        margins = [
            0.1 * ((v["chosen_logp"] - v["ref_chosen_logp"]) - (v["rejected_logp"] - v["ref_rejected_logp"]))
            for v in visits
        ]
        assert row["rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-9)
        assert row["rewards/accuracies"] == pytest.approx(np.mean([m > 0 for m in margins]))
        assert row["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in margins]), abs=1e-9)


def test_memory_for_a_micro_batch_does_not_change_the_result(prefcache, scored, tmp_path):
    losses = []
    for budget in (100_000, 1):  # all pairs of a step at once; one pair at a time
        run = f"budget{budget}"
        prefcache("train", scored, *options(f"train.tokens_per_micro_batch={budget}", f"train.run={run}"))
        losses.append([row["loss"] for row in metrics(tmp_path / "runs/tiny" / run)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_trained_model_loads_with_plain_transformers_and_is_what_was_measured(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained / "model").eval()
    assert AutoTokenizer.from_pretrained(trained / "model").chat_template
    steps = table(trained, "steps")
    last = max(row["step"] for row in steps)
    held_out = {v["example_id"]: v for v in steps if v["step"] == last and v["split"] == "held_out"}
    examples = list(Prepared(trained.parent / "prepared").table("held_out").to_pylist())
    assert set(held_out) == {row["example_id"] for row in examples}
    for row in examples:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        labels = ids.clone()
        labels[:, : row["n_prompt"]] = -100
        with torch.no_grad():
            logp = -model(input_ids=ids, labels=labels).loss.item() * row["n_chosen"]
        assert held_out[row["example_id"]]["chosen_logp"] == pytest.approx(logp, rel=1e-5)


def test_a_second_run_does_nothing_and_imports_no_torch(trained, tmp_path):
    before = weights(trained)
    code = (
        "import sys; from prefcache.cli import main; main(['train', 'config.yaml'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "nothing to do" in done.stderr and "held-out pairs" in done.stdout, done.stderr
    assert weights(trained) == before


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(prefcache, scored, tmp_path, monkeypatch):
    claim_stage = train.claims.claim_stage

    @contextlib.contextmanager
    def claim_after_another(*arguments):
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        prefcache("train", scored)
        with claim_stage(*arguments):
            yield

    monkeypatch.setattr(train.claims, "claim_stage", claim_after_another)
    assert "nothing to do" in prefcache("train", scored).stderr


def test_a_finished_run_is_kept_when_another_takes_its_place(prefcache, trained):
    before = weights(trained)
    done = prefcache("train", "config.yaml", "--set", "train.beta=0.5")
    assert "loss.sigmoid.beta 0.1 (now 0.5)" in done.stderr and "trained-1" in done.stderr
    assert weights(trained.with_name("trained-1")) == before
    rows = json.loads(prefcache("sql", "select distinct run from rewards order by run", "runs/tiny", "--json").stdout)
    assert [row["run"] for row in rows] == ["trained", "trained-1"]


def test_an_unfinished_run_is_not_continued_with_other_settings_but_with_less_memory(prefcache, trained):
    (trained / "manifest.json").unlink()
    done = prefcache("train", "config.yaml", "--set", "train.seed=3", code=2)
    assert "unfinished run" in done.stderr and "train.seed 0 (now 3)" in done.stderr
    done = prefcache("train", "config.yaml", "--set", "train.tokens_per_micro_batch=100")
    assert "resuming from step" in done.stderr


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(prefcache, scored, tmp_path):
    settings = options("train.checkpoint_every=3")
    prefcache("train", scored, *settings)
    run = tmp_path / "runs/tiny/trained"
    expected = weights(run)
    (run / "manifest.json").unlink()
    newest = sorted((run / "checkpoints").iterdir())[-1] / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    done = prefcache("train", scored, *settings)
    assert "Going back to the checkpoint before it" in done.stderr
    assert weights(run) == expected


def test_two_processes_give_the_losses_of_one_and_resume(prefcache, scored, tmp_path):
    prefcache("train", scored, "--set", "train.run=one")
    settings = options("train.run=two", "train.checkpoint_every=5", "train.eval_every=5", "train.best=eval_loss")
    arguments = ["train", str(scored), *settings]
    done = launch(tmp_path, arguments)
    assert done.stdout.count("held-out pairs") == 1  # one process prints
    one, two = (metrics(tmp_path / "runs/tiny" / run) for run in ("one", "two"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-5)
    for row in (0, -1):
        assert one[row]["eval_loss"] == pytest.approx(two[row]["eval_loss"], abs=1e-5)
    # As after a kill: the last checkpoint is gone, and so is what the end of the run wrote.
    run = tmp_path / "runs/tiny/two"
    expected = weights(run)
    (run / "manifest.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    assert "resuming from step 10" in launch(tmp_path, arguments).stderr
    assert weights(run) == expected


def test_a_process_without_a_pair_of_its_own_waits_for_no_one(prefcache, model, tmp_path):
    """3 training pairs in steps of 2 leave the second process nothing in the last step, and 1 held-out pair nothing ever."""
    config = write_config(tmp_path, model, batch_size=2, epochs=1, eval_every=1)
    write_pairs(tmp_path / "pairs.jsonl", 60)
    prefcache("prepare", config)
    held_out = Prepared(tmp_path / "runs/tiny/prepared").table("held_out").to_pylist()
    train = Prepared(tmp_path / "runs/tiny/prepared").table("train").to_pylist()
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in [*train[:3], held_out[0]]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prefcache("prepare", config)
    prefcache("score", config)
    launch(tmp_path, ["train", config])
    assert [row["step"] for row in metrics(tmp_path / "runs/tiny/trained")] == [0, 1, 2]


def test_a_mixture_of_experts_resumes_with_the_same_weights(prefcache, model, tmp_path):
    """Transformers saves its experts one by one and holds them fused; a checkpoint must hold what is in memory."""
    from transformers import MixtralConfig, MixtralForCausalLM

    moe = shutil.copytree(model, tmp_path / "moe")
    (moe / "model.safetensors").unlink()
    torch.manual_seed(0)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    MixtralForCausalLM(MixtralConfig(vocab_size=vocabulary, **shape, **heads)).save_pretrained(moe)
    write_pairs(tmp_path / "pairs.jsonl", 30)
    config = write_config(tmp_path, moe, checkpoint_every=2)
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config)
    run = tmp_path / "runs/tiny/trained"
    expected = weights(run)
    (run / "manifest.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    assert "resuming from step" in prefcache("train", config).stderr
    assert weights(run) == expected


def test_one_step_is_taken_at_the_full_learning_rate(prefcache, scored, tmp_path):
    prefcache("train", scored, *options("train.batch_size=100", "train.epochs=1"))
    assert metrics(tmp_path / "runs/tiny/trained")[-1]["learning_rate"] == 1e-3


def test_a_model_published_with_a_temperature_but_without_sampling_can_be_saved(prefcache, config, model, tmp_path):
    odd = shutil.copytree(model, tmp_path / "odd")
    (odd / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config, "--set", "model=odd")


def test_a_policy_that_is_not_the_reference_may_start_anywhere(prefcache, scored, other_model):
    done = prefcache("train", scored, "--set", f"train.model={other_model}")
    assert "different weights" in done.stderr


def test_training_needs_the_cache_but_not_the_reference(prefcache, config, other_model, tmp_path):
    reference = build_model(tmp_path / "reference", seed=2)
    settings = options("model=reference", f"train.model={other_model}")
    prefcache("prepare", config, *settings)
    prefcache("score", config, *settings)
    shutil.rmtree(reference)
    prefcache("train", config, *settings)


def test_training_before_scoring_names_what_is_missing(prefcache, config):
    prefcache("prepare", config)
    assert "Score first (prefcache score CONFIG)" in prefcache("train", config, code=2).stderr


def test_data_prepared_anew_must_be_scored_anew(prefcache, scored, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 5, start=60, mode="a")
    prefcache("prepare", scored)
    assert "prefcache score" in prefcache("train", scored, code=5).stderr


def test_without_held_out_pairs_it_trains_and_says_nothing_about_them(prefcache, model, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 12)
    config = write_config(tmp_path, model)
    for stage in ("prepare", "score", "train"):
        done = prefcache(stage, config, "--set", "prepare.held_out=0")
    assert "held-out pairs" not in done.stdout and "model:" in done.stdout


@pytest.mark.parametrize(("label", "missing"), [(True, "undesirable"), (False, "desirable")])
def test_labels_of_one_kind_are_trained_on_with_a_warning(prefcache, model, tmp_path, label, missing):
    rows = [{"prompt": f"{i}: why?", "completion": f"the cat {i}", "label": label} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(tmp_path, model, loss="kto")
    for stage in ("prepare", "score", "train"):
        done = prefcache(stage, config, "--set", "prepare.held_out=0")
    assert f"none of the 4 labels to train on is {missing}" in done.stderr


def test_both_kinds_of_labels_or_pairs_need_no_warning(prefcache, config):
    for kind in ("pairs", "labels"):
        settings = options(f"prepare.examples={kind}", f"out={kind}", *(["train.loss=bco"] if kind == "labels" else []))
        for stage in ("prepare", "score", "train"):
            done = prefcache(stage, config, *settings)
        assert "to train on is" not in done.stderr


def test_single_tokens_that_were_not_kept_are_scored_into_another_cache_as_the_message_says(prefcache, config):
    weighed = ["--set", "train.tokens.ld_alpha=0.5"]
    prefcache("prepare", config)
    prefcache("score", config, "--set", "score.logps=false")
    refused = prefcache("train", config, *weighed, code=2).stderr
    remedy = refused.partition("another cache (")[2].partition(")")[0].replace("FOLDER", "other").split()
    assert remedy[0] == "--set"
    prefcache("score", config, *remedy)
    prefcache("train", config, *remedy, *weighed)


def test_the_chat_template_it_was_trained_with_is_saved_with_the_model(prefcache, config, tmp_path):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    (tmp_path / "mine.jinja").write_text(template)
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config, "--set", "prepare.chat_template=mine.jinja")
    assert (tmp_path / "runs/tiny/trained/model/chat_template.jinja").read_text() == template


def test_bf16_trains_against_a_bf16_reference(prefcache, config, tmp_path):
    heads = ("score.head_dtype=bfloat16", "train.head_dtype=bfloat16")
    settings = options("score.dtype=bfloat16", "train.precision=bf16", *heads)
    prefcache("prepare", config, *settings)
    prefcache("score", config, *settings)
    # A process of its own: accelerate keeps one precision for the life of a process.
    done = subprocess.run(
        [PREFCACHE, "train", config, *settings], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "start checked" in done.stderr
    provenance = json.loads((tmp_path / "runs/tiny/trained/provenance.json").read_text())
    assert (provenance["precision"], provenance["head_dtype"]) == ("bfloat16", "bfloat16")


def test_weights_in_bf16_are_saved_in_it_and_make_another_run(prefcache, scored, tmp_path):
    from transformers import AutoModelForCausalLM

    done = prefcache("train", scored, *options("train.weights=bfloat16"))
    assert "weights that were saved in float32 are rounded to bfloat16" in done.stderr
    assert "computes in bfloat16, and the cache was scored in float32: they differ by up to" in done.stderr
    assert "nats per token (0.1 is allowed)" in done.stderr
    run = tmp_path / "runs/tiny/trained"
    saved = load_file(run / "model/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.lm_head.weight, saved["lm_head.weight"])
    assert json.loads((run / "provenance.json").read_text())["precision"] == "bfloat16"
    # The margin grows as it does in float32.
    margins = [row["rewards/margins"] for row in metrics(run)]
    assert abs(margins[0]) < 0.01 and margins[-1] > 0.2
    (run / "manifest.json").unlink()
    assert "train.weights bfloat16 (now none)" in prefcache("train", scored, code=2).stderr


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["train.weights=bfloat16", "train.lora={}"], "set lora.base_dtype: bfloat16 instead"),
        (["train.weights=bfloat16", "train.precision=float32"], "computes in bf16, and precision is float32"),
        (["train.weights=float16"], "float32"),
    ],
)
def test_weights_in_bf16_are_refused_where_they_mean_nothing(prefcache, scored, settings, says):
    assert says in prefcache("train", scored, *options(*settings), code=2).stderr


def test_a_model_that_was_deleted_is_made_again_from_the_last_checkpoint_and_a_lost_part_is_named(prefcache, trained):
    expected = weights(trained)
    shutil.rmtree(trained / "model")
    assert "is missing; it is made again" in prefcache("train", "config.yaml").stderr
    assert weights(trained) == expected
    next((trained / "steps").iterdir()).unlink()
    for command in (["train", "config.yaml"], ["sql", "select 1 from rewards", "runs/tiny"]):
        assert "is missing. Delete runs/tiny/trained" in prefcache(*command, code=4).stderr


def test_kinds_of_answers_without_any_samples_are_left_out_of_the_table(prefcache, scored):
    settings = options("train.samples=0", "train.kinds={preferred: the .*, rejected: a .*}")
    done = prefcache("train", scored, *settings)
    assert "reward accuracy" in done.stdout and "greedy" not in done.stdout


def test_a_checkpoint_or_log_that_was_changed_and_sealed_again_is_an_error_with_what_to_do(prefcache, scored, tmp_path):
    """A run that was stopped after its last step. Each change is resealed, so that only its content is wrong."""
    few = ["--set", "train.epochs=0.5"]
    prefcache("train", scored, *few)
    run, kept = tmp_path / "runs/tiny/trained", tmp_path / "kept"
    (run / "manifest.json").unlink()
    shutil.copytree(run, kept)
    (newest,) = (run / "checkpoints").iterdir()

    def seal_again(folder: Path, **facts: Any) -> None:
        files = [artifact.describe(file) for file in sorted(folder.glob("*.safetensors"))]
        manifest = CheckpointManifest.find(folder)
        CheckpointManifest.make(**(manifest.facts() | {"files": files} | facts)).commit(folder / "manifest.json")

    def change_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        tensors = load_file(newest / name)
        change(tensors)
        save_file(tensors, newest / name)
        seal_again(newest)

    def go_beyond() -> None:
        newest.rename(newest.with_name("step-00000099"))
        seal_again(newest.with_name("step-00000099"), step=99)

    def forget_answers() -> None:
        before = Before.read(run / "before.json").facts()
        Before.make(**(before | {"answers": []})).commit(run / "before.json")

    def write_junk() -> None:
        (newest / "weights.safetensors").write_bytes(b"junk")
        seal_again(newest)

    lacks = "lm_head.weight"
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: change_tensors("weights.safetensors", lambda t: t.pop(lacks)), f"{lacks} is missing"),
        (lambda: change_tensors("weights.safetensors", lambda t: t.update({lacks: torch.zeros(3)})), f"'{lacks}' (3,)"),
        (
            lambda: change_tensors("weights.safetensors", lambda t: t.update(x=torch.zeros(3))),
            "'x' (3,) is not a tensor of this policy",
        ),
        (lambda: change_tensors("optimizer.safetensors", lambda t: t.update(x=torch.zeros(2))), "another optimizer"),
        (write_junk, "cannot be read as safetensors"),
        (go_beyond, "belongs to a step after the last"),
        (forget_answers, "before.json has 0 answers, expected 4"),
        (lambda: (run / "metrics/to-00000000.parquet").write_bytes(b"junk"), "to-00000000.parquet cannot be read"),
        (lambda: shutil.rmtree(run / "steps"), "steps/to-00000000.parquet is missing"),
    ]
    for change, said in cases:
        change()
        error = prefcache("train", scored, *few, code=4).stderr
        assert said in error and "Delete " in error
        shutil.rmtree(run)
        shutil.copytree(kept, run)

    # And one whose model is on another disk.
    shutil.move(run / "model", tmp_path / "disk")
    (run / "model").symlink_to(tmp_path / "disk")
    prefcache("train", scored, *few)
    assert not (run / "model").is_symlink()
    assert weights(run) == (tmp_path / "disk/model.safetensors").read_bytes()
