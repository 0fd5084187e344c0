"""score, as a user runs it: exact values, nothing twice, nothing lost."""

import json
import random
import shutil
import signal
import subprocess
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.prepared import Prepared
from tests.helpers.processes import read_stdout, start_process
from tests.helpers.project import PREFCACHE, start, write_config, write_pairs
from tests.helpers.scored import cache_folder, fingerprint, rows_of


@pytest.fixture
def score(prefcache):
    """`score ARGUMENTS --json`, and what it printed."""
    return lambda *arguments: json.loads(prefcache("score", *arguments, "--json").stdout)


def load(model: Path):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def plain_sum(loaded, example: dict, answer: str) -> float:
    """The log-prob of an answer by Transformers alone, in float64."""
    ids = torch.tensor([example["prompt_ids"] + example[f"{answer}_ids"]])
    with torch.no_grad():
        logps = loaded(input_ids=ids).logits.double().log_softmax(-1)[0]
    return sum(logps[at - 1, ids[0, at]].item() for at in range(example["n_prompt"], ids.shape[1]))


def test_values_are_those_of_the_plain_transformers_forward(scored, model, tmp_path):
    loaded, cached = load(model), rows_of(tmp_path)
    for example in Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist():
        for side in ("chosen", "rejected"):
            row = cached[example[f"{side}_key"]]
            ids = torch.tensor([example["prompt_ids"] + example[f"{side}_ids"]])
            labels = ids.clone()
            labels[:, : len(example["prompt_ids"])] = -100
            with torch.no_grad():
                # Transformers' own loss shifts by itself: the mean negative log-prob of the completion's tokens.
                expected = -loaded(input_ids=ids, labels=labels).loss.item() * row["n_completion"]
            assert row["logp_sum"] == pytest.approx(expected, rel=1e-5)
            assert row["logp_sum"] == float(np.sum(np.asarray(row["logps"], dtype=np.float32), dtype=np.float64))
            assert (row["n_prompt"], row["n_completion"]) == (example["n_prompt"], example[f"n_{side}"])


def test_a_second_run_scores_nothing_and_loads_no_model(prefcache, scored, tmp_path, model):
    before = fingerprint(tmp_path)
    done = prefcache("score", scored, "--json")
    assert json.loads(done.stdout)["tokens"] == 0 and "nothing to do" in done.stderr
    # Another experiment over the same data: another folder, the same cache, still nothing to score.
    prefcache("prepare", scored, "--set", "out=runs/second")
    done = prefcache("score", scored, "--set", "out=runs/second", "--json")
    assert json.loads(done.stdout)["scored"] == 0 and "plain float32 forward" not in done.stderr
    assert fingerprint(tmp_path) == before


def test_no_training_argument_makes_a_row_stale(score, scored):
    for setting in ("loss=ipo", "beta=0.5", "learning_rate=0.1", "seed=7", "batch_size=3"):
        assert score(scored, "--set", f"train.{setting}")["tokens"] == 0


def test_after_an_append_only_what_is_new_is_scored(score, prefcache, prepared, tmp_path):
    first = score(prepared)
    before = fingerprint(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", 6, start=60, mode="a")
    prefcache("prepare", prepared)
    planned = score(prepared, "--dry-run")
    second = score(prepared)
    assert first["scored"] == 120 and second["scored"] == planned["to_score"] == 12
    assert second["tokens"] == planned["tokens"] and second["cached_before"] == 120
    after = fingerprint(tmp_path)
    assert before.items() <= after.items()
    assert len(rows_of(tmp_path)) == 132


def test_an_answer_that_occurs_twice_is_scored_once(score, prefcache, config, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 10, start=0, mode="a")
    prefcache("prepare", config)
    result = score(config)
    assert result["sequences"] == 120  # 70 pairs, 10 of them twice


def test_a_dry_run_writes_no_rows(score, prefcache, prepared, tmp_path):
    result = score(prepared, "--dry-run")
    assert (result["to_score"], result["cached_before"]) == (120, 0) and result["tokens"] > 0 and result["bytes"] > 0
    assert not (tmp_path / "cache").exists()
    prefcache("score", prepared)
    assert str(cache_folder(tmp_path).relative_to(tmp_path)) == result["cache"]
    (cache_folder(tmp_path) / "reference.json").write_text("rotten")
    before = _everything(tmp_path)
    assert score(prepared, "--dry-run")["cached_before"] == 120
    assert _everything(tmp_path) == before


def _everything(root: Path) -> dict[Path, tuple[int, int]]:
    paths = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".verified")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


def test_a_cache_that_may_only_be_read_serves_what_it_holds(score, prefcache, scored, tmp_path, monkeypatch):
    (tmp_path / "cache" / ".weights.json").unlink()
    real = artifact.commit_bytes

    def commit_bytes(path, *data, **how):
        if Path(path).parts[0] == "cache":
            raise UsageError(f"{path}: cannot be written")
        return real(path, *data, **how)

    monkeypatch.setattr(artifact, "commit_bytes", commit_bytes)
    monkeypatch.setattr(
        "prefcache.pipeline.stored.cache_writer.os.access", lambda path, _: Path(path).parts[0] != "cache"
    )
    assert "nothing to do" in prefcache("score", scored).stderr
    shutil.rmtree(tmp_path / "runs/tiny/scored")
    assert score(scored)["cached_before"] == 120
    write_pairs(tmp_path / "pairs.jsonl", 6, start=60, mode="a")
    prefcache("prepare", scored)
    said = prefcache("score", scored, code=2).stderr
    assert "is read-only" in said and "plain float32 forward" not in said


@pytest.mark.parametrize("n_kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_points_it_ends_with_the_same_bytes(prefcache, prepared, tmp_path, n_kills):
    began = time.monotonic()
    process = start_process(tmp_path, "score", prepared)
    process.join()
    whole = time.monotonic() - began
    expected = fingerprint(tmp_path)
    assert sum(name.endswith(".parquet") for name in expected) >= 8  # there are shards to be killed between

    shutil.rmtree(tmp_path / "cache")
    dice, killed, within = random.Random(0), 0, 0
    for _ in range(n_kills):
        before = _n_files(tmp_path)
        process = start_process(tmp_path, "score", prepared)
        _kill_after(process, tmp_path, dice, whole)
        process.join()
        was_killed = process.exitcode == -signal.SIGKILL
        killed, within = killed + was_killed, within + (was_killed and _n_files(tmp_path) > before)
        shutil.rmtree(tmp_path / "runs/tiny/scored", ignore_errors=True)
        if (dice.random() < 0.3 or not was_killed) and (tmp_path / "cache").exists():
            _forget_some(tmp_path, dice)
    print(f"{killed} of {n_kills} killed, {within} of them with files written since their start")
    assert killed >= 0.6 * n_kills and within >= 0.4 * n_kills
    prefcache("score", prepared)
    assert fingerprint(tmp_path) == expected


def _n_files(root: Path) -> int:
    return len(list(root.glob("cache/*/*")))


def _kill_after(process: ForkServerProcess, root: Path, dice: random.Random, whole: float) -> None:
    """Kill once a random number of files more is in the cache; one in five at a random time. Nearly all of the time goes
    into loading and the check before the first file, so that kills by time alone would hit nothing else."""
    seconds = dice.uniform(0.3, 0.9) * whole if dice.random() < 0.2 else 60.0
    deadline, goal = time.monotonic() + seconds, _n_files(root) + dice.randint(1, 6)
    while process.is_alive() and time.monotonic() < deadline and _n_files(root) < goal:
        time.sleep(0.001)
    process.kill()


def _forget_some(root: Path, dice: random.Random) -> None:
    """Throw finished records away, so that there is work left to be killed in."""
    for record in sorted(cache_folder(root).glob("*.json")):
        if record.name != "reference.json" and dice.random() < 0.7:
            record.unlink()


def test_interrupted_scoring_keeps_finished_shards_and_exits_130(score, prepared, tmp_path):
    process = start(PREFCACHE, "score", prepared, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(tmp_path.glob("cache/*/*.parquet"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    kept = fingerprint(tmp_path)
    result = score(prepared)
    assert 0 < result["cached_before"] < 120 and kept.items() <= fingerprint(tmp_path).items()


def test_several_processes_share_the_work_and_leave_what_one_leaves(prefcache, prepared, tmp_path):
    prefcache("score", prepared)
    expected = fingerprint(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "runs/tiny/scored")
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "3"} for rank in range(3)]
    scorers = [start_process(tmp_path, "score", prepared, "--json", environment=rank) for rank in ranks]
    # One of them dies; the others do its share.
    while scorers[1].is_alive() and not list(tmp_path.glob("cache/*/*.parquet")):
        time.sleep(0.001)
    scorers[1].kill()
    for scorer in scorers:
        scorer.join()
    assert [scorer.exitcode for scorer in scorers[::2]] == [0, 0]
    results = [json.loads(read_stdout(tmp_path, scorer)) for scorer in scorers[::2]]
    assert all(result["sequences"] == 120 and result["failed"] == 0 for result in results)
    # Each says what it has scored itself; the rest is the killed one's.
    assert all(sum(result[key] for key in ("cached_before", "scored", "scored_by_others")) == 120 for result in results)
    assert 0 < sum(result["scored"] for result in results) <= 120
    assert fingerprint(tmp_path) == expected


@pytest.mark.parametrize("kl_pairs", [True, False])
def test_labels_are_scored_with_their_mismatched_answers(prefcache, config, model, tmp_path, kl_pairs):
    prefcache("prepare", config, "--set", "prepare.examples=labels", "--set", f"prepare.kl_pairs={kl_pairs}")
    examples = Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist()
    answers = ("completion", "kl") if kl_pairs else ("completion",)
    prefcache("score", config)
    loaded, cached = load(model), rows_of(tmp_path)
    assert set(cached) == {example[f"{answer}_key"] for example in examples for answer in answers}
    for example in examples[::15]:
        for answer in answers:
            row = cached[example[f"{answer}_key"]]
            assert row["logp_sum"] == pytest.approx(plain_sum(loaded, example, answer), rel=1e-5)
            assert (row["n_prompt"], row["n_completion"]) == (example["n_prompt"], example[f"n_{answer}"])


def test_a_truncated_shard_is_detected_and_only_it_is_scored_again(score, prefcache, scored, tmp_path):
    before = fingerprint(tmp_path)
    shard = sorted(cache_folder(tmp_path).glob("*.parquet"))[1]
    n_rows = pq.read_metadata(shard).num_rows
    shard.write_bytes(shard.read_bytes()[:-10])
    done = prefcache("train", scored, code=4)
    assert shard.name in done.stderr and "prefcache score" in done.stderr
    result = score(scored)
    assert result["scored"] == n_rows
    assert fingerprint(tmp_path) == before


def test_a_flipped_bit_is_detected(score, prefcache, scored, tmp_path):
    before = fingerprint(tmp_path)
    for path in (
        sorted(cache_folder(tmp_path).glob("*.parquet"))[0],
        sorted(cache_folder(tmp_path).glob("[0-9]*.json"))[0],
    ):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert path.stem.partition("-")[0] in prefcache("sql", "select 1 from pairs", "runs/tiny", code=4).stderr
        assert score(scored)["scored"] > 0
        assert fingerprint(tmp_path) == before


def test_other_weights_get_a_cache_of_their_own(score, prefcache, config, other_model, tmp_path):
    for model in ([], ["--set", f"model={other_model}"]):
        prefcache("prepare", config, *model)
        assert score(config, *model)["scored"] == 120
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_weights_that_change_while_they_score_leave_no_row(prefcache, config, model, tmp_path, monkeypatch):
    from prefcache.pipeline.scoring.engines.transformers import TransformersEngine

    edited, real, n = shutil.copytree(model, tmp_path / "edited"), TransformersEngine.score, 0

    def score(engine, sequences):
        nonlocal n
        n += 1
        if n == 3:  # the sample and one chunk are done
            _overwrite(edited / "model.safetensors")
        return real(engine, sequences)

    arguments = [config, "--set", f"model={edited}"]
    prefcache("prepare", "-q", *arguments)
    monkeypatch.setattr(TransformersEngine, "score", score)
    said = prefcache("score", *arguments, code=5).stderr
    assert "has changed since scoring began" in said and "run the same command again" in said
    kept = rows_of(tmp_path)
    assert 0 < len(kept) < 120
    monkeypatch.setattr(TransformersEngine, "score", real)
    # What was kept is what the old weights give.
    shutil.rmtree(tmp_path / "cache")
    prefcache("score", config)
    right = rows_of(tmp_path)
    assert all(right[key]["logp_sum"] == row["logp_sum"] for key, row in kept.items())


def _overwrite(file: Path) -> None:
    """In place, as `rsync --inplace` does: who has mapped the file sees the new bytes."""
    with open(file, "r+b") as opened:
        opened.seek(file.stat().st_size - 20_000)
        opened.write(bytes(20_000))


def test_a_cache_scored_by_another_model_is_refused_in_training(prefcache, scored, other_model):
    done = prefcache("train", scored, "--set", f"model={other_model}", code=5)
    assert "was scored by" in done.stderr and "prefcache score" in done.stderr


def test_another_dtype_is_never_mixed_in_silently(score, prefcache, scored, tmp_path):
    bf16 = ["--set", "score.dtype=bfloat16"]
    done = prefcache("score", scored, *bf16, code=5)
    assert "dtype float32 -> bfloat16" in done.stderr and "score.rescore=true" in done.stderr
    other = done.stderr.partition("accept_numerics=[")[2].partition("]")[0]
    accepted = prefcache("score", scored, *bf16, "--set", f"score.accept_numerics=[{other}]", "--json")
    assert json.loads(accepted.stdout)["scored"] == 0
    rescored = prefcache("score", scored, *bf16, "--set", "score.rescore=true", "--json")
    assert json.loads(rescored.stdout)["scored"] == 120
    # float32 rows are still there and still what float32 asks for.
    assert score(scored)["scored"] == 0


def test_a_sequence_longer_than_the_model_takes_is_refused_before_it_is_loaded(prefcache, model, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "red " * 600, "chosen": "a", "rejected": "b"}) + "\n")
    config = write_config(tmp_path, model)
    prefcache("prepare", config)
    assert "Set prepare.max_length=512" in prefcache("score", config, code=2).stderr


def test_log_probs_that_are_not_finite_are_never_stored_as_good(score, prefcache, config, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    arguments = [config, "--set", f"model={broken}", "--set", "score.parity_sample=0"]
    prefcache("prepare", *arguments)
    said = prefcache("score", *arguments[:3], code=4).stderr
    assert "neither does the plain" in said and "score.parity_sample=0" in said
    result = score(*arguments)
    assert result["failed"] == 120
    said = {row["status"] for row in rows_of(tmp_path).values()}
    # Once nothing came out finite in float32 either, that is not tried any more.
    assert said == {f"failed: the log-prob of answer token 0 is nan{tried}" for tried in ("", ", also in float32")}
    assert all(row["logp_sum"] is None for row in rows_of(tmp_path).values())
    assert "no example to train on: none has ref_chosen_logp" in prefcache("train", *arguments, code=3).stderr


def test_what_overflows_in_float16_is_computed_in_float32(score, prefcache, config, model, tmp_path):
    loud = shutil.copytree(model, tmp_path / "loud")
    weights = load_file(loud / "model.safetensors")
    # One token whose embedding is beyond float16 (65,504): only sequences with it overflow.
    token = Prepared(_prepared(prefcache, config, loud)).table()["chosen_ids"][0].as_py()[1]
    weights["model.embed_tokens.weight"][token] *= 1e6
    save_file(weights, loud / "model.safetensors", metadata={"format": "pt"})
    arguments = [config, "--set", f"model={loud}", "--set", "score.dtype=float16", "--set", "score.parity_sample=0"]
    prefcache("prepare", *arguments)
    done = prefcache("score", *arguments, "--json")
    assert json.loads(done.stdout)["failed"] == 0 and "of them have finite ones in float32" in done.stderr
    rows = rows_of(tmp_path)
    statuses = {row["status"] for row in rows.values()}
    assert statuses == {"ok", "ok: computed in float32"}
    # As well where some of the sample overflow; what has a value is compared all the same.
    shutil.rmtree(tmp_path / "cache")
    done = prefcache("score", *arguments, "--set", "score.parity_sample=120", "--json")
    assert "of 120 sequences in the sample" in done.stderr
    assert 0 < json.loads(done.stdout)["parity"]["max"] < 0.1
    assert {row["status"] for row in rows_of(tmp_path).values()} == statuses
    assert all(np.isfinite(row["logps"]).all() for row in rows.values())
    assert score(*arguments)["scored"] == 0


def _prepared(prefcache, config, model) -> Path:
    prefcache("prepare", config, "--set", f"model={model}")
    return Path(config).parent / "runs/tiny/prepared"


def test_a_shorter_keep_start_length_is_cut_from_what_is_cached(score, prefcache, config, model, tmp_path):
    long, short = (["--set", "prepare.too_long=keep_start", "--set", f"prepare.max_length={n}"] for n in (34, 28))
    prefcache("prepare", config, *long)
    prefcache("score", config, *long)
    prefcache("prepare", config, *short)
    planned = score(config, *short, "--dry-run")
    done = prefcache("score", config, *short, "--json")
    result = json.loads(done.stdout)
    examples = Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist()
    cut = {e[f"{side}_key"] for e in examples for side in ("chosen", "rejected") if e[f"cut_{side}"]}
    assert len(cut) > 20 and result["cut_from_longer"] == planned["cut_from_longer"] == len(cut)
    # No model is loaded, and what is served is what it would have computed.
    assert (result["scored"], result["tokens"], planned["to_score"]) == (0, 0, 0)
    assert "plain float32 forward" not in done.stderr
    loaded, rows = load(model), rows_of(tmp_path)
    for example in examples[::5]:
        assert rows[example["chosen_key"]]["logp_sum"] == pytest.approx(plain_sum(loaded, example, "chosen"), abs=1e-4)


def test_the_same_weights_under_another_name_share_one_cache(score, prefcache, scored, model, tmp_path):
    shutil.copytree(model, tmp_path / "renamed")
    renamed = ["--set", "model=renamed", "--set", "out=runs/renamed"]
    prefcache("prepare", scored, *renamed)
    assert score(scored, *renamed)["scored"] == 0


def test_a_cache_that_is_gone_is_said_to_be_and_scored_again(score, prefcache, prepared, tmp_path):
    prefcache("score", prepared)
    shutil.rmtree(tmp_path / "cache")
    assert "is gone: " in prefcache("train", prepared, code=4).stderr
    # It may only be away, so the manifest stays; make sees by the missing reference.json that there is work.
    manifest = tmp_path / "runs/tiny/scored/manifest.json"
    assert manifest.exists() and "reference.json:\n" in manifest.with_name("inputs.mk").read_text()
    makefile = tmp_path / "makefile"
    makefile.write_text("runs/tiny/scored/manifest.json:\n\ttouch scored-again\n-include runs/tiny/scored/inputs.mk\n")
    subprocess.run(["make", "-f", makefile, "runs/tiny/scored/manifest.json"], cwd=tmp_path, check=True)
    assert (tmp_path / "scored-again").exists()
    assert score(prepared)["scored"] == 120


def test_rescoring_is_done_when_asked_and_other_versions_are_noticed(score, prefcache, scored, tmp_path, monkeypatch):
    from prefcache.pipeline import identity

    real = identity.version
    monkeypatch.setattr(identity, "version", lambda name: "2.99.0" if name == "torch" else real(name))
    done = prefcache("score", scored, code=5)
    assert f"torch {real('torch').partition('+')[0]} -> 2.99.0" in done.stderr
    assert score(scored, "--set", "score.rescore=true")["scored"] == 120
    assert score(scored)["scored"] == 0


def test_a_damaged_reference_record_is_written_anew(score, prefcache, scored, tmp_path):
    before = fingerprint(tmp_path)
    record = cache_folder(tmp_path) / "reference.json"
    record.write_bytes(record.read_bytes()[:-9])
    assert "prefcache score" in prefcache("train", scored, code=4).stderr
    assert score(scored)["scored"] == 0
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic rope"),
        (
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 16, "rope_theta": 1e4}},
            "Set prepare.max_length=16",
        ),
        ({"max_position_embeddings": None, "n_positions": 20}, "Set prepare.max_length=20"),
    ],
)
def test_a_model_whose_values_would_depend_on_the_batch_is_refused(prefcache, config, model, tmp_path, change, said):
    other = shutil.copytree(model, tmp_path / "other")
    prefcache("prepare", config, "--set", "model=other")
    settings = json.loads((other / "config.json").read_text()) | change
    (other / "config.json").write_text(json.dumps(settings))
    assert said in prefcache("score", config, "--set", "model=other", code=2).stderr


@pytest.mark.parametrize(
    "command", [("publish", "me/rows", "--dry-run"), ("export", "--output", "x.parquet"), ("train",)]
)
def test_another_cache_than_that_of_the_last_score_is_refused_until_it_is_scored_into(prefcache, scored, command):
    name, *rest = command
    said = prefcache(name, scored, *rest, "--set", "cache=team", code=5).stderr
    assert (
        "scored was scored into cache; this run names team as its cache. Score into that (prefcache score CONFIG)"
        in said
    )
    # The same one under another name is the same one.
    assert "was scored into" not in prefcache(name, scored, *rest, "--set", f"cache={scored.parent}/cache").stderr


def test_that_the_cache_is_another_one_is_the_whole_reason_to_score_again(prefcache, scored):
    explanation = prefcache("score", scored, "--set", "cache=team", "--dry-run").stderr
    assert "is out of date: cache cache (now team)\n" in explanation
