"""train, as a user runs it: right losses, nothing lost, and one model in memory."""

import json
import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PREFCACHE, build_model, write_config, write_pairs

from pipeline.stored.prepared import Prepared


@pytest.fixture
def scored(prefcache, config):
    """A config whose data is prepared and scored."""
    prefcache("prepare", config)
    prefcache("score", config)
    return config


def table(run: Path, name: str) -> list[dict]:
    parts = sorted((run / name).glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def metrics(run: Path) -> list[dict]:
    return table(run, "metrics")


def weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


def test_the_cached_and_a_live_reference_give_the_same_losses_for_50_steps(prefcache, scored, model, tmp_path):
    settings = ["--set", "train.epochs=9", "--set", "train.learning_rate=1e-4"]
    prefcache("train", scored, *settings)
    run = tmp_path / "runs/tiny/trained"
    ours = {row["step"]: row["loss"] for row in metrics(run) if row["step"]}
    assert len(ours) >= 50
    theirs = live_losses(model, tmp_path, batches_of(run), learning_rate=1e-4)
    worst = max(abs(ours[step] - theirs[step]) for step in ours)
    assert worst < 1e-6, worst


def batches_of(run: Path) -> dict[int, list[str]]:
    """The pairs of every step, as the run recorded them."""
    batches: dict[int, list[str]] = {}
    for row in table(run, "steps"):
        if row["split"] == "train":
            batches.setdefault(row["step"], []).append(row["example_id"])
    return batches


def live_losses(model: Path, root: Path, batches: dict[int, list[str]], learning_rate: float) -> dict[int, float]:
    """DPO as the paper has it: both models in memory, both run on every pair, one sequence at a time."""
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    policy, reference = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    n_steps = len(batches)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * n_steps), n_steps)
    examples = {row["example_id"]: row for row in Prepared(root / "runs/tiny/prepared").table().to_pylist()}

    def logp(live: torch.nn.Module, row: dict, side: str) -> torch.Tensor:
        ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
        logps = live(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        return logps[row["n_prompt"] - 1 :].double().sum()

    losses = {}
    for step, example_ids in batches.items():
        margins = []
        for row in (examples[example_id] for example_id in example_ids):
            with torch.no_grad():
                reference_margin = logp(reference, row, "chosen") - logp(reference, row, "rejected")
            margins.append(logp(policy, row, "chosen") - logp(policy, row, "rejected") - reference_margin)
        loss = -torch.nn.functional.logsigmoid(0.1 * torch.stack(margins)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses[step] = loss.item()
    return losses


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
    from pipeline.schema import CACHE
    from pipeline.stored import artifact

    for record_file in (tmp_path / "cache").glob("*/[0-9a-f]*.json"):
        if record_file.name == "reference.json":
            continue
        record = artifact.unseal(record_file)
        del record["values_xxh3_128"]
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


def test_metrics_have_trls_names(prefcache, scored, tmp_path):
    prefcache("train", scored)
    names = set(metrics(tmp_path / "runs/tiny/trained")[-1])
    trl = "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected"
    assert set(trl.split()) | {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "eval_loss"} <= names


def test_metrics_are_the_means_of_what_is_recorded_per_pair(prefcache, scored, tmp_path):
    prefcache("train", scored)
    run = tmp_path / "runs/tiny/trained"
    for row in metrics(run)[1:]:
        visits = [v for v in table(run, "steps") if v["step"] == row["step"] and v["split"] == "train"]
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
        prefcache("train", scored, "--set", f"train.tokens_per_micro_batch={budget}", "--set", f"train.run={run}")
        losses.append([row["loss"] for row in metrics(tmp_path / "runs/tiny" / run)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_trained_model_loads_with_plain_transformers_and_is_what_was_measured(prefcache, scored, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prefcache("train", scored)
    run = tmp_path / "runs/tiny/trained"
    trained = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    assert AutoTokenizer.from_pretrained(run / "model").chat_template
    last = max(row["step"] for row in table(run, "steps"))
    held_out = {v["example_id"]: v for v in table(run, "steps") if v["step"] == last and v["split"] == "held_out"}
    examples = list(Prepared(tmp_path / "runs/tiny/prepared").table("held_out").to_pylist())
    assert set(held_out) == {row["example_id"] for row in examples}
    for row in examples:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        labels = ids.clone()
        labels[:, : row["n_prompt"]] = -100
        with torch.no_grad():
            logp = -trained(input_ids=ids, labels=labels).loss.item() * row["n_chosen"]
        assert held_out[row["example_id"]]["chosen_logp"] == pytest.approx(logp, rel=1e-5)


def test_a_second_run_does_nothing_and_says_so(prefcache, scored, tmp_path):
    first = prefcache("train", scored).stdout
    before = weights(tmp_path / "runs/tiny/trained")
    second = prefcache("train", scored)
    assert "nothing to do" in second.stderr and second.stdout == first
    assert weights(tmp_path / "runs/tiny/trained") == before


def test_a_finished_run_is_kept_when_another_takes_its_place(prefcache, scored, tmp_path):
    prefcache("train", scored)
    before = weights(tmp_path / "runs/tiny/trained")
    done = prefcache("train", scored, "--set", "train.beta=0.5")
    assert "loss.sigmoid.beta 0.1 (now 0.5)" in done.stderr and "trained-1" in done.stderr
    assert weights(tmp_path / "runs/tiny/trained-1") == before
    rows = json.loads(prefcache("sql", "select distinct run from rewards order by run", "runs/tiny", "--json").stdout)
    assert [row["run"] for row in rows] == ["trained", "trained-1"]


def test_an_unfinished_run_is_not_continued_with_other_settings(prefcache, scored, tmp_path):
    prefcache("train", scored)
    (tmp_path / "runs/tiny/trained/manifest.json").unlink()
    done = prefcache("train", scored, "--set", "train.seed=3", code=2)
    assert "unfinished run" in done.stderr and "train.seed 0 (now 3)" in done.stderr


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(prefcache, scored, tmp_path):
    settings = ["--set", "train.checkpoint_every=3"]
    prefcache("train", scored, *settings)
    run = tmp_path / "runs/tiny/trained"
    expected = weights(run)
    (run / "manifest.json").unlink()
    newest = sorted((run / "checkpoints").iterdir())[-1] / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    done = prefcache("train", scored, *settings)
    assert "Going back to the checkpoint before it" in done.stderr
    assert weights(run) == expected


def launch(root: Path, port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command under torchrun, as two processes."""
    (root / "launch.py").write_text("if __name__ == '__main__':\n    from stages.cli import main; main()\n")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={port}",
        "launch.py",
    ]
    done = subprocess.run([*command, *arguments], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_give_the_losses_of_one_and_resume(prefcache, scored, tmp_path):
    prefcache("train", scored, "--set", "train.run=one")
    arguments = ["train", str(scored), "--set", "train.run=two", "--set", "train.checkpoint_every=5"]
    arguments += ["--set", "train.eval_every=5", "--set", "train.best=eval_loss"]
    done = launch(tmp_path, 29531, *arguments)
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
    assert "going on from step 10" in launch(tmp_path, 29532, *arguments).stderr
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
    launch(tmp_path, 29533, "train", str(config))
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
    assert "going on from step" in prefcache("train", config).stderr
    assert weights(run) == expected


def test_less_memory_for_a_micro_batch_is_no_reason_to_start_over(prefcache, scored, tmp_path):
    prefcache("train", scored, "--set", "train.checkpoint_every=5")
    run = tmp_path / "runs/tiny/trained"
    (run / "manifest.json").unlink()
    assert "going on from step" in prefcache("train", scored, "--set", "train.tokens_per_micro_batch=100").stderr


def test_one_step_is_taken_at_the_full_learning_rate(prefcache, scored, tmp_path):
    prefcache("train", scored, "--set", "train.batch_size=100", "--set", "train.epochs=1")
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
    settings = ["--set", "model=reference", "--set", f"train.model={other_model}"]
    prefcache("prepare", config, *settings)
    prefcache("score", config, *settings)
    shutil.rmtree(reference)
    prefcache("train", config, *settings)


def test_training_before_scoring_names_what_is_missing(prefcache, config):
    prefcache("prepare", config)
    assert "Score first (make score)" in prefcache("train", config, code=2).stderr


def test_data_prepared_anew_must_be_scored_anew(prefcache, scored, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 5, start=60, mode="a")
    prefcache("prepare", scored)
    assert "make score" in prefcache("train", scored, code=5).stderr


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


def test_both_kinds_of_labels_or_pairs_need_no_warning(prefcache, scored, config):
    assert "to train on is" not in prefcache("train", scored).stderr
    for stage in ("prepare", "score", "train"):
        done = prefcache(
            stage, config, "--set", "prepare.examples=labels", "--set", "out=labels", "--set", "train.loss=bco"
        )
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


def test_a_full_disk_ends_with_exit_code_6_and_a_clean_resume(prefcache, process, scored, tmp_path):
    """A checkpoint's optimizer state is larger than any file may be here."""
    whole = tmp_path / "runs/tiny/whole"
    prefcache("train", scored, "--set", "train.run=whole")
    limit = 150_000
    assert (sorted((whole / "checkpoints").iterdir())[-1] / "optimizer.safetensors").stat().st_size > limit
    done = process(
        "train", scored, code=6, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert "the disk took no more" in done.stderr
    prefcache("train", scored)
    assert weights(tmp_path / "runs/tiny/trained") == weights(whole)


def test_bf16_trains_against_a_bf16_reference(prefcache, config, tmp_path):
    settings = ["--set", "score.dtype=bfloat16", "--set", "train.precision=bf16"]
    prefcache("prepare", config, *settings)
    prefcache("score", config, *settings)
    # A process of its own: accelerate keeps one precision for the life of a process.
    done = subprocess.run(
        [PREFCACHE, "train", config, *settings], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "start checked" in done.stderr


def test_a_model_that_was_deleted_is_made_again_from_the_last_checkpoint(prefcache, scored, tmp_path):
    prefcache("train", scored)
    run = tmp_path / "runs/tiny/trained"
    expected = weights(run)
    shutil.rmtree(run / "model")
    assert "is missing; it is made again" in prefcache("train", scored).stderr
    assert weights(run) == expected


def test_a_lost_part_of_a_finished_run_is_named(prefcache, scored, tmp_path):
    prefcache("train", scored)
    next((tmp_path / "runs/tiny/trained/steps").iterdir()).unlink()
    for command in (["train", scored], ["sql", "select 1 from rewards", "runs/tiny"]):
        assert "is missing. Delete runs/tiny/trained" in prefcache(*command, code=4).stderr


def test_kinds_of_answers_without_any_samples_are_left_out_of_the_table(prefcache, scored):
    settings = ["--set", "train.samples=0", "--set", "train.kinds={preferred: the .*, rejected: a .*}"]
    done = prefcache("train", scored, *settings)
    assert "reward accuracy" in done.stdout and "greedy" not in done.stdout
