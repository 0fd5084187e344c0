"""README and guide in a fresh clone: the commands run, print what is shown, and train what is said; for three seeds where slow tests run."""

import json
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest

from prefcache.guide import CHAPTERS
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.training.losses import LOSSES
from tests.helpers.documents import README, SCRIPTS, blocks, commands, shown
from tests.helpers.pages import serve
from tests.helpers.project import ROOT, Clone, invoke, options, write_pairs

# The documents' commands that the test below does not run, and why.
NOT_RUN = {
    "swift rlhf --rlhf_type dpo --model Qwen/Qwen2.5-0.5B-Instruct --adapters runs/my/lora/model --ref_adapters runs/my/lora/model "
    "--dataset pairs.jsonl --output_dir runs/swift": "ms-swift needs another environment; tests/docs/test_other_trainers.py looks its "
    "options up",
    "make prepare score train": "the demo fixture has run it",
    "make test": "it runs this test; CI runs it",
    "pip install .": "the environment has it installed; the wheel test installs it in a fresh one",
    "pip install '.[ui]'": "the environment has it installed",
    "pip install 'prefcache[quantized]'": "bitsandbytes needs a GPU",
    "prefcache score my.yaml --set score.quantization=4bit": "bitsandbytes needs a GPU",
    "prefcache train my.yaml --set score.quantization=4bit --set train.lora.r=16": "bitsandbytes needs a GPU",
    "make bench-gpu": "it needs a GPU; tests/test_bench.py runs it with tiny models",
    "make gpu-ledger": "half an hour; tests/bench/test_ledger.py traces some of its rows",
    "make vllm": "3 GiB; the tests of the vLLM engine build it",
    "prefcache score data/demo/config.yaml --set score.engine=vllm": "it needs .venv-vllm; the tests of the vLLM engine do this",
    "prefcache score data/demo/config.yaml --set score.engine=server --set score.server.url=http://localhost:8000/v1": "it needs "
    "a server; the tests of the server engine start one",
    "prefcache publish data/demo/config.yaml me/log-probs --license cc-by-4.0": "it needs a hub account; "
    "tests/stages/commands/test_publish.py publishes to a hub of its own",
    "prefcache publish data/demo/config.yaml me/log-probs --sign ~/.ssh/id_ed25519": "it needs a hub account and a key; "
    "tests/stages/commands/test_fetch.py does both",
    "prefcache fetch data/demo/config.yaml me/log-probs": "it needs a hub; tests/stages/commands/test_fetch.py has one",
    "prefcache fetch data/demo/config.yaml me/log-probs --allowed-signers team.signers": "it needs a hub and a key; "
    "tests/stages/commands/test_fetch.py has both",
    "prefcache sign cache --key ~/.ssh/id_ed25519": "it needs a key; tests/stages/commands/test_sign.py makes some",
    **dict.fromkeys(
        (
            command
            for block in blocks("sh", CHAPTERS["many-machines"])
            if "team.yaml" in block
            for command in commands(block)
        ),
        "they need an object store and a second machine; tests/docs/test_many_machines.py has both",
    ),
    "prefcache push runs/demo/trained me/kind": "it needs a hub account; tests/stages/commands/test_push.py pushes to a hub of its own",
}
# The object store of the guide, for which a bucket of the test stands.
STORE = "s3://team/refs"
# What the README and the chapter on other trainers name on the hub, and what takes its place here.
HERE = {
    "Qwen/Qwen2.5-0.5B-Instruct": "data/demo/reference",
    "trl-lib/ultrafeedback_binarized": "runs/pairs.jsonl",
    "Intel/orca_dpo_pairs": "runs/orca.jsonl",
}


def result(demo: Clone, run: str = "trained") -> dict[str, Any]:
    return json.loads((demo.folder / f"runs/demo/{run}/manifest.json").read_text())


def share(kinds: dict[str, int], kind: str) -> float:
    return kinds[kind] / sum(kinds.values())


def test_the_committed_pairs_are_what_their_generator_writes(tmp_path):
    written = tmp_path / "pairs.jsonl"
    subprocess.run([sys.executable, ROOT / "data/demo/make_pairs.py", written], check=True)
    assert written.read_bytes() == (ROOT / "data/demo/pairs.jsonl").read_bytes()


def test_before_training_both_kinds_of_answer_are_about_equally_common(demo):
    kinds = result(demo)["before"]["kinds"]
    assert sum(kinds.values()) >= 200
    assert 0.35 <= share(kinds, "preferred") <= 0.65 and 0.35 <= share(kinds, "rejected") <= 0.65


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_after_training_held_out_prompts_get_the_preferred_kind_of_answer(demo, seed):
    run = f"seed{seed}" if seed else "trained"
    if seed:
        demo.run(f"make train RUN={run} SET=train.seed={seed}")
    after = result(demo, run)["after"]
    assert share(after["kinds"], "preferred") >= 0.9
    assert after["evaluation"]["rewards/accuracies"] >= 0.95


# -- every loss, from one cache --------------------------------------------------------------------------------------

WALK_STEPS, WALK_BATCH, WALK_PAIRS = 30, 8, 300


@pytest.fixture(scope="module")
def walk(demo) -> Clone:
    """300 of the demo's pairs with grades, prepared as pairs and as labels, scored into the demo's cache."""
    lines = (demo.folder / "data/demo/pairs.jsonl").read_text(encoding="utf-8").splitlines()[:WALK_PAIRS]
    rows = [json.loads(line) | {"chosen_score": 4 + i % 3, "rejected_score": i % 4} for i, line in enumerate(lines)]
    (demo.folder / "runs/walk.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for kind in ("pairs", "labels"):
        for stage in ("prepare", "score"):
            scored = invoke(demo.folder, stage, *walk_settings(kind).split()).stdout
        # Mismatched answers are new sequences; all the others the demo has scored.
        n = 2 * WALK_PAIRS
        assert f"{n:,} already cached, {0 if kind == 'pairs' else n} scored now" in scored
    return demo


def walk_settings(kind: str) -> str:
    settings = {
        "model": "data/demo/reference",
        "prepare.data": "runs/walk.jsonl",
        "prepare.examples": kind,
        "prepare.held_out": 0.2,
        "out": f"runs/walk-{kind}",
    }
    return " ".join(f"--set {key}={value}" for key, value in settings.items())


# One of each kind: with a reference and without, of pairs and of labels, with grades, statistics of the batch and a running mean.
OFTEN = {"sigmoid", "ipo", "aot", "bco_pair", "simpo", "rpo", "kto", "bco"}
assert set(LOSSES) >= OFTEN


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES]
)
def test_every_loss_trains_from_the_same_cache_and_moves_as_it_declares(walk, prefcache, monkeypatch, name):
    monkeypatch.chdir(walk.folder)
    kind = LOSSES[name].kind
    epochs = WALK_STEPS / -(-len(Prepared(walk.folder / f"runs/walk-{kind}/prepared").table("train")) // WALK_BATCH)
    training = {
        "loss": name,
        "run": name,
        "epochs": epochs,
        "batch_size": WALK_BATCH,
        "learning_rate": 1e-4,
        "samples": 0,
    }
    said = [word for key, value in training.items() for word in ("--set", f"train.{key}={value}")]
    found = json.loads(prefcache("train", "--json", *walk_settings(kind).split(), *said).stdout)
    assert found["steps"] == WALK_STEPS
    before, after = (found[when]["evaluation"] for when in ("before", "after"))
    declared = [sign for sign in LOSSES[name].healthy if sign.direction in ("rises", "falls")]
    assert declared
    for sign in declared:
        moved = after[sign.metric] - before[sign.metric]
        assert moved > 0 if sign.direction == "rises" else moved < 0, (sign.metric, before, after)


# -- README and guide ------------------------------------------------------------------------------------------------------


def test_the_table_shows_what_was_measured(demo):
    kinds = result(demo)["after"]["kinds"]
    assert f"{share(kinds, 'preferred'):.1%}" in demo.demo_output
    assert "before" in demo.demo_output and "after" in demo.demo_output


def test_a_second_make_does_nothing_and_says_so(demo):
    done = demo.run("make prepare score train")
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == [
        "prepare: up to date",
        "score: up to date",
        "train: up to date",
    ]


def test_make_score_after_an_append_scores_only_what_is_new(demo):
    pairs = demo.folder / "data/demo/pairs.jsonl"
    before = pairs.read_bytes()
    line = {"prompt": "Is it new?", "chosen": "It is new.", "rejected": "No."}
    try:
        with open(pairs, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        n = 2 * len(before.splitlines())
        assert f"{n + 2:,} sequences, {n:,} already cached, 2 scored now" in demo.run("make score").stdout
    finally:
        pairs.write_bytes(before)
    assert f"{n:,} already cached, 0 scored now" in demo.run("make score").stdout


@pytest.mark.slow
def test_the_reference_is_the_same_bytes_wherever_it_is_built(demo, tmp_path):
    subprocess.run([sys.executable, ROOT / "data/demo/make_reference.py", tmp_path / "again"], check=True)
    built = demo.folder / "data/demo/reference/model.safetensors"
    assert (tmp_path / "again/model.safetensors").read_bytes() == built.read_bytes()


def test_every_command_of_readme_and_guide_runs(demo, s3):
    (demo.folder / "runs").mkdir(exist_ok=True)
    pairs = write_pairs(demo.folder / "runs/pairs.jsonl", 32).read_text()
    (demo.folder / "runs/orca.jsonl").write_text(pairs.replace('"prompt"', '"question"'))
    other_trainers = CHAPTERS["other-trainers"]
    (demo.folder / "runs/dataset_info.json").write_text(*blocks("json", other_trainers))
    for block in blocks("yaml", README, other_trainers):
        name, _, text = block.removeprefix("# ").partition("\n")
        for theirs, ours in HERE.items():
            text = text.replace(theirs, ours)
        (demo.folder / name).write_text(text)
    ran = dict.fromkeys(command for block in blocks("sh") for command in commands(block))
    assert len(ran) - len(NOT_RUN) >= 40
    for command in ran:
        if command not in NOT_RUN:
            run_as_written(demo, command.replace(STORE, s3.url))
    assert not NOT_RUN.keys() - ran.keys()


# The demo itself trains to the end, and answers its held-out prompts.
FEW_STEPS = ["train.max_steps=4", "train.samples=0"]
ENOUGH_TO_MOVE = ["train.max_steps=12", "train.samples=0"]  # a reference that moves every ten steps


def run_as_written(demo: Clone, line: str) -> None:
    """Run a line of the documents, a training for few steps; where it calls prefcache alone, in this process, which spares importing
    PyTorch each time."""
    for command in line.split(" && "):
        program, *arguments = shlex.split(command)
        if arguments[:1] == ["train"] and "--dry-run" not in arguments and "max_steps" not in command:
            arguments += options(*(ENOUGH_TO_MOVE if "moving_reference" in command else FEW_STEPS))
        if program == "make" and "train" in arguments:
            command = in_few_steps(command)
        if (program, *arguments[:1]) == ("prefcache", "ui"):
            with serve(demo.folder, *arguments[1:]) as site:  # it would go on until Ctrl-C
                assert site.get("/pairs").status == 200
        elif program == "prefcache" and ">" not in arguments:
            invoke(demo.folder, *arguments)
        else:
            demo.run(f'PATH="$PWD/.venv/bin:$PATH"; {command}')


def in_few_steps(command: str) -> str:
    """Return make's command with settings in SET that train for few steps."""
    few = " ".join(FEW_STEPS)
    return command.replace('SET="', f'SET="{few} ') if 'SET="' in command else f'{command} SET="{few}"'


@pytest.mark.slow
def test_the_demo_with_images_describes_held_out_pictures_rightly(demo):
    demo.run("make prepare score train CONFIG=data/images-demo/config.yaml RUN=whole")
    found = json.loads((demo.folder / "runs/images-demo/whole/manifest.json").read_text())
    before, after = (found[when]["evaluation"]["rewards/accuracies"] for when in ("before", "after"))
    assert after >= 0.95, (before, after)


@pytest.mark.slow  # tests/stages/test_notebook.py runs it in a kernel, with a smaller model
@pytest.mark.parametrize("chapter", SCRIPTS, ids=lambda file: file.stem)
def test_the_python_of_a_chapter_runs_from_its_first_block_to_its_last(demo, chapter):
    (demo.folder / "runs").mkdir(exist_ok=True)
    (demo.folder / f"runs/{chapter.stem}.py").write_text("\n\n".join(blocks("python", chapter)))
    demo.run(f".venv/bin/python runs/{chapter.stem}.py")


def test_what_the_guide_shows_is_what_the_commands_print(demo):
    assert blocks("console")
    for block in blocks("console"):
        command, expected = shown(block)
        assert words(demo.run(f".venv/bin/{command}").stdout) == words(expected)


def words(text: str) -> list[object]:
    """Words as they stand; fractions within 0.1, for they come from training, and processors round differently."""
    return [pytest.approx(float(word), abs=0.1) if re.fullmatch(r"\d\.\d+", word) else word for word in text.split()]


def test_settings_that_make_could_not_follow_are_refused(clone):
    done = clone.run("make train SET=train.run=other", code=2)
    assert "say it with MODEL=, OUT=, DATA= or RUN=" in done.stderr
