"""The benchmarks run and compare the same work. Their figures are nobody's promise here: they depend on the machine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import corpus, startup, ui
from tests.helpers.project import ROOT, build_model
from tests.helpers.real_tokenizers import fetch_or_skip


def bench(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.slow
def test_weights_in_bf16_learn_the_demo_as_float32_ones_do(tmp_path: Path):
    command = [sys.executable, "-m", "tests.bench.bf16", "--seeds", "3", "--json", str(tmp_path / "found.json")]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=3600)
    found = json.loads((tmp_path / "found.json").read_text())
    margins = {way: [row["eval_rewards/margins"] for row in rows] for way, rows in found.items()}
    spread = max(margins["float32"]) - min(margins["float32"])
    means = {way: sum(values) / len(values) for way, values in margins.items()}
    assert means["float32"] > 0.15 and abs(means["bfloat16"] - means["float32"]) < spread
    assert means["bfloat16, to the nearest"] < means["float32"] - 5 * spread


@pytest.mark.slow
def test_tool_text_takes_the_margin_unless_only_the_assistant_counts(tmp_path: Path):
    options = "--seeds 1 --rates 3e-4 --pretraining-steps 60 --pairs 96 --held-out 8 --epochs 2 --json"
    printed = bench("tests.bench.trajectories", *options.split(), str(tmp_path / "found.json"))
    # Both ways train from one cache.
    assert re.search(r"all, learning rate 0.0003: [\d,]{5,} tokens scored", printed)
    assert "assistant, learning rate 0.0003: 0 tokens scored" in printed
    (found,) = json.loads((tmp_path / "found.json").read_text())
    everything, assistant = found["all, 0.0003"], found["assistant, 0.0003"]
    assert everything["of the assistant"] < 0.5 < assistant["of the assistant"]
    assert abs(everything["warnings"]) > 3 * abs(assistant["warnings"])


def bench_code(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.slow
def test_bench_prepare_compares_the_same_tokens():
    options = "--tokenizer trained --pairs 300 --rounds 1 --vocabulary 1000 --without-trl"
    printed = bench("tests.bench.prepare", *options.split())
    assert re.search(r"^trained: 300 pairs, [\d,]+ tokens", printed)
    assert re.search(r"ours +[\d.]+ s +[\d.]+ CPU s +[\d,]+ CPU us/pair", printed)
    assert re.search(r"tokens/s of the bare tokenizer that prepare reaches +\d+\.\d\d", printed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gptoss"])
def test_bench_prepare_gives_trls_ids_with_real_tokenizers(name):
    fetch_or_skip(name)
    printed = bench("tests.bench.prepare", *f"--tokenizer {name} --pairs 200 --rounds 1".split())
    assert re.search(r"pairs with other ids in trl +0$", printed, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained", "qwen3"])
def test_bench_prepare_measures_memory(name):
    if name != "trained":
        fetch_or_skip(name)
    options = f"--tokenizer {name} --memory 300 --vocabulary 1000"
    assert re.search(
        rf"^{name}, ours, 300 pairs: [\d,]+ MiB in the parent", bench("tests.bench.prepare", *options.split())
    )


@pytest.mark.slow
def test_bench_store_counts_and_prices_what_it_reads(tmp_path: Path):
    options = "--only reading --rows 20000 --shard-rows 4000 --folder"
    printed = bench("tests.bench.store", *options.split(), str(tmp_path))
    # A listing of the folders and one of the only folder's objects; reference.json and the records of 5 shards.
    assert re.search(r"open, cold .* \(6 get, 2 list\)", printed) and re.search(
        r"open, warm .* \(1 get, 2 list\)", printed
    )
    # 2 lists at 0.005 USD and 6 gets at 0.0004 USD for a thousand.
    assert "0.00001 USD  (6 get, 2 list)" in printed
    megabytes = dict(re.findall(r"1% (.*?) +[\d.]+ s +([\d.]+) MB received", printed))
    assert float(megabytes["of few shards: lists"]) < float(megabytes["spread evenly: lists"]) / 2
    assert megabytes["spread evenly: lists, warm"] == "0.0"


@pytest.mark.slow
def test_bench_store_times_what_scoring_takes_longer(tmp_path: Path):
    options = "--only scoring --chunks 4 --pass-tokens 512 --folder"
    printed = bench("tests.bench.store", *options.split(), str(tmp_path))
    assert re.search(r"the store adds [\d.]+ s to 4 chunks of 2.5 s: [\d.]+%; -?[\d.]+ s for each further one", printed)


def test_bench_ui_clicks_everything(tmp_path: Path):
    printed = bench("tests.bench.ui", "--examples", "3000", "--folder", str(tmp_path))
    rows = dict(re.findall(r"^  (.+?) +[\d.]+ s +[\d,]+ MiB +([\d,]+) rows$", printed, re.MULTILINE))
    assert list(rows) == list(ui.CLICKS)
    assert rows["everything"] == "3,000" and int(rows["drag a range of margins"].replace(",", "")) < 3000


@pytest.mark.slow
def test_bench_startup_runs_every_command():
    options = "--pairs 20 --rounds 1 --vocabulary 1000"
    printed = bench("tests.bench.startup", *options.split())
    rows = re.findall(r"^  (\S.*?) +(\d+\.\d\d) +(\d+\.\d\d)$", printed, re.M)
    assert [name for name, _, _ in rows] == list(startup.COMMANDS)
    assert all(float(cpu) > 0 for _, _, cpu in rows)


def count_scores(pair: corpus.TokenPair) -> int:
    """Queries times keys of a pair: the answer of greater ids comes first in its tree, in one call with the prompt."""
    first, second = map(len, sorted((pair.chosen.tolist(), pair.rejected.tolist()), reverse=True))
    p = len(pair.prompt)
    return (p + first - 1) ** 2 + (second - 1) * (p + second - 1)


@pytest.mark.slow
def test_bench_score_counts_what_is_computed(tmp_path: Path):
    options = "--small --pairs 8 --rounds 1 --threads 1 --only ours sorted-512 --json"
    printed = bench("tests.bench.score", *options.split(), str(tmp_path / "found.json"))
    assert re.search(r"times the best peer, sorted-512 +\d+\.\d\d", printed)
    found = json.loads((tmp_path / "found.json").read_text())["contenders"]

    # Prompts once, no padding, and no answer's last token. The head sees answers only.
    flops = positions = head_positions = 0
    hidden, intermediate, layers, vocabulary = 32, 64, 2, 500
    for pair in corpus.token_pairs(8, vocabulary):
        p, c, r = map(len, pair)
        n, n_head = p + (c - 1) + (r - 1), c + r
        scores = count_scores(pair)
        flops += 2 * n * layers * (4 * hidden**2 + 3 * hidden * intermediate)
        flops += 4 * layers * hidden * scores + 2 * n_head * hidden * vocabulary
        positions, head_positions = positions + n, head_positions + n_head
    ours, padded = found["ours"], found["sorted-512"]
    assert ours["positions_per_pair"] == positions / 8
    assert ours["head_positions_per_pair"] == padded["head_positions_per_pair"] == head_positions / 8
    assert ours["flops_per_pair"] == flops / 8
    assert padded["flops_per_pair"] > 1.4 * ours["flops_per_pair"]
    assert max(ours["deviation"], padded["deviation"]) < 1e-3
    assert 0 < ours["loaded_mib"] <= ours["peak_mib"]


@pytest.mark.slow
def test_bench_score_times_a_second_run_that_computes_nothing():
    printed = bench("tests.bench.score", "--small", "--second-run", "--rounds", "1")
    assert re.search(r"Second run of `prefcache score`, \d+ sequences: 0 tokens scored, \d+\.\d\d s", printed)
    assert "Imported: neither torch nor transformers" in printed


@pytest.mark.slow
def test_bench_train_counts_what_a_step_computes(tmp_path: Path):
    options = "--small --pairs 8 --rounds 1 --threads 1 --regime chat --only ours ours-1 trl-2x4-precomputed --json"
    printed = bench("tests.bench.train", *options.split(), str(tmp_path / "found.json"))
    assert re.search(r"ours is times TRL's best precomputed, trl-2x4-precomputed: \d+\.\d\d, wanted 1.5", printed)
    found = json.loads((tmp_path / "found.json").read_text())["chat"]["contenders"]

    # The forward as scoring has it, and twice that again for the gradients of its inputs and its weights; of attention's two
    # products, two gradients each, and the scores once more. Two chunks of the head are not needed: 500 words are few.
    flops = 0
    hidden, intermediate, layers, vocabulary = 32, 64, 2, 500
    for pair in corpus.token_pairs(8, vocabulary):
        p, c, r = map(len, pair)
        n, n_head = p + (c - 1) + (r - 1), c + r
        scores = count_scores(pair)
        flops += 3 * 2 * n * layers * (4 * hidden**2 + 3 * hidden * intermediate) + 3 * 2 * n_head * hidden * vocabulary
        flops += (4 + 10) * layers * hidden * scores
    assert found["ours"]["flops_per_pair"] == found["ours-1"]["flops_per_pair"] == flops / 8
    assert found["trl-2x4-precomputed"]["flops_per_pair"] > 2 * flops / 8
    assert max(each["deviation"] for each in found.values()) < 1e-6
    assert 0 < found["ours"]["loaded_mib"] <= found["ours"]["peak_mib"]


@pytest.mark.slow
@pytest.mark.slow
def test_bench_trl_counts_what_the_reference_reads(tmp_path: Path):
    model = build_model(tmp_path / "tiny")
    options = [
        "--model",
        str(model),
        "--runs",
        "2",
        "--steps",
        "2",
        "--threads",
        "1",
        "--folder",
        str(tmp_path / "sweep"),
    ]
    printed = bench("tests.bench.trl_sweep", *options)
    # 8 pairs: 16 sequences in each run of TRL's, and once where they are cached.
    read = {name: int(n) for name, n in re.findall(r"^([a-z-]+)(?: +\d+){3} +(\d+) +[\d,]+$", printed, re.M)}
    assert read == {"trl": 32, "trl-precompute": 32, "cached": 16, "prefcache": 16}


def test_bench_train_compares_the_loader():
    printed = bench("tests.bench.train", "--small", "--loader")
    assert re.search(r"Examples\.batch [\d,]+, datasets\[i\] [\d,]+, datasets\[list\] [\d,]+", printed)


@pytest.mark.slow
def test_bench_gpu_runs_every_part_on_any_machine(tmp_path: Path):
    printed = bench("tests.bench.gpu", "--tiny", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["versions"]["torch"] and found["device"] == "cpu"
    # Three models, in three precisions and three ways, against their plain float32 forward.
    assert len(found["check"]["cases"]) == 27 and all(case["right"] for case in found["check"]["cases"])
    train = found["train"]["tiny"]["contenders"]
    assert {name for name, each in train.items() if each.get("pairs_per_second", 0) > 0} == set(train)
    assert "NOT the others' loss" not in printed
    falls = {name: each["losses"][1] - each["losses"][0] for name, each in train.items() if "lora" not in name}
    assert falls["ours"] > 0 and all(fall == pytest.approx(falls["ours"], rel=0.1) for fall in falls.values())
    scored = {name for name, each in found["score"]["contenders"].items() if "sequences_per_second" in each}
    assert scored == {"ours", "packed", "sorted-16384", "sorted-65536", "trl-8", "trl-32", "bare"}
    assert max(each["answer"] for each in found["score"]["parity"] if each["dtype"] == "float32") < 1e-5
    assert found["memory"]["sft"]["peak_bytes"]["ours-sft"] > 0
    assert len(found["train"]["tiny"]["targets"]) == len(found["score"]["targets"]) == 2


WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(["pydantic", "duckdb", "datasets", "trl", "vllm"]))
sys.argv = ["gpu", "--tiny", "memory", "--json", sys.argv[1]]
runpy.run_module("tests.bench.gpu", run_name="__main__")
"""


@pytest.mark.slow
def test_bench_gpu_needs_little_and_says_what_is_absent(tmp_path: Path):
    from tests.bench.gpu import machine

    assert bench_code(WITHOUT, str(tmp_path / "found.json")).endswith(f"All figures: {tmp_path / 'found.json'}\n")
    assert machine.absent("torch") is None
    assert machine.absent("torch", "nowhere") == "absent: nowhere is not installed"


def test_bench_gpu_times_nothing_where_results_are_wrong():
    from tests.bench.gpu import kernels

    shape = kernels.MODELS["grouped heads"]
    pairs = kernels._pairs(True, seed=1)
    plain = kernels._plainly(kernels._build(shape, 1), pairs)
    assert kernels._compared(kernels._build(shape, 1), pairs, plain, "float32", "shared")["right"]
    other = kernels._compared(kernels._build(shape, 2), pairs, plain, "float32", "shared")
    assert not other["right"] and "log-probs and gradient off" in other["why"]


def test_bench_gpu_knows_the_arithmetic_that_pairs_need():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tests.bench.gpu import ours, work

    by_hand = work.Needed.of([corpus.TokenPair(*([0] * n for n in (2, 3, 2)))])
    # p p c c r: r sees the prompt and itself; the first answer has three tokens to predict, the second two.
    assert (by_hand.positions, by_hand.head_positions, by_hand.scores) == (5, 5, (1 + 2) + (3 + 4) + 3)
    model = work.build(work.SHAPES["tiny"], torch.float32)
    pairs = corpus.token_pairs(4, 500)
    score, needed = ours.scorer(model, "shared", "float32", pairs), work.Needed.of(pairs)
    with FlopCounterMode(display=False) as counted:  # which does not see the CPU's attention
        score(pairs)
    attention = 4 * 2 * 32 * needed.scores
    assert counted.get_total_flops() == pytest.approx(needed.flops(model) - attention, rel=0.01)


def test_bench_gpu_says_how_large_a_model_fits():
    from tests.bench.gpu import memory, work

    shape = work.SHAPES["tiny-8B"]
    two, four = (memory._parameters(shape | {"num_hidden_layers": n}) for n in (2, 4))
    # 10 GB and 4 GB a layer, of 80 GB 75.2: 16.3 layers.
    found = memory._fit(shape, (2, 4), [18_000_000_000, 26_000_000_000])
    assert found["bytes_per_layer"] == 4e9 and found["rest_bytes"] == 10e9
    assert found["bytes_per_parameter"] == 8e9 / (four - two)
    assert found["largest_at_80_gb"]["layers"] == pytest.approx(16.3)
    assert found["largest_at_80_gb"]["parameters"] == pytest.approx(two + 14.3 * (four - two) / 2)
    tried = memory._try_largest(shape, {"ours": found}, True)
    assert tried["layers"] == 5 and tried["said_bytes"] == 30e9 and tried["peak_bytes"] > 0


@pytest.mark.parametrize("regime", corpus.REGIMES)
def test_token_pairs_have_the_means_of_their_regime(regime):
    pairs = corpus.token_pairs(32, 500, regime=regime)
    means = [sum(map(len, part)) / 32 for part in zip(*pairs, strict=True)]
    assert means == pytest.approx(corpus.REGIMES[regime], abs=0.5)


def test_token_pairs_have_the_lengths_of_real_ones():
    pairs = corpus.token_pairs(64, 500)
    means = [sum(map(len, part)) / 64 for part in zip(*pairs, strict=True)]
    assert means == pytest.approx([124, 41, 51], abs=0.5)
    # Of real pairs, padded batches of eight make 3.9 times the tokens that matter.
    longest = [max(len(prompt) + max(len(c), len(r)) for prompt, c, r in pairs[i : i + 8]) for i in range(0, 64, 8)]
    assert 16 * sum(longest) / (64 * sum(means)) == pytest.approx(3.9, abs=0.5)


@pytest.mark.slow
def test_a_real_model_trains_from_the_cache_as_with_a_live_reference(tmp_path: Path):
    """SmolLM2-135M-Instruct, which pip fetches by name, on pairs of the demo."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.real",
        "--folder",
        str(tmp_path),
        "--records",
        "40",
        "--sequences",
        "16",
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=3000)
    found = json.loads((tmp_path / "figures.json").read_text())
    cached = list(found["live"]["cached"].values())
    assert len(cached) == 20 and found["live"]["largest"] < 1e-5
    assert cached[0] == pytest.approx(0.6931472, abs=1e-5) and cached[-1] < 0.5  # ln 2, then something was learnt
    float32, *bf16 = (each["token"]["max"] for each in found["dtypes"].values())
    assert float32 < 1e-3 and all(1e-3 < each < 0.75 for each in bf16)
    before, after = found["change"]["rewards/margins"]
    assert abs(before) < 1e-3 < after


@pytest.mark.slow
def test_bench_sharing_counts_less_where_answers_begin_alike():
    from tests.bench.sharing import ranking

    printed = bench("tests.bench.sharing", "--steps", "1", "--rounds", "1")
    tokens = {
        (kind, way): float(n.replace(",", ""))
        for kind, way, n in re.findall(
            r"^(chat|trajectories|rankings of 4) +(packed|prompts|trees) +([\d,]+)", printed, re.M
        )
    }
    for kind in ("chat", "trajectories", "rankings of 4"):
        assert tokens[kind, "packed"] > tokens[kind, "prompts"] >= tokens[kind, "trees"] > 0
    # Six pairs of a prompt of 124 and four answers, once.
    answers = [len(each) - 1 for each in {pair.tobytes(): pair for one in ranking(0) for pair in one[1:]}.values()]
    assert len(answers) == 4 and tokens["rankings of 4", "trees"] == round((124 + sum(answers)) / 6)
    assert len(re.findall(r"seconds by trees", printed)) == 3
