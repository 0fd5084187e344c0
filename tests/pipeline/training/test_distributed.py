"""However many processes train, and whether each holds the model or a shard of it, the result is that of one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from prefcache.cli import main
from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.training import distributed, optimizers, policy
from prefcache.pipeline.training.policy import Policy
from tests.helpers.models import save_mixture
from tests.helpers.project import ROOT, write_config, write_pairs
from tests.helpers.runs import metrics

# Micro-batches of one of 5 examples: of two processes one has three, the other two. Every step is clipped.
TRAIN = {"batch_size": 5, "micro_batch_size": 1, "epochs": 1, "learning_rate": 1e-3, "max_grad_norm": 0.5}
TRAIN |= {"eval_every": 3, "checkpoint_every": 3, "samples": 2, "sample_tokens": 6}
LABELS = ["out=runs/labels", "prepare.examples=labels", "prepare.max_length=23", "prepare.too_long=keep_start"]
# What is trained, by the name of its run.
SETTINGS = {
    "llama": [],
    "tied": ["train.model=tied"],
    "lora": ["train.lora={r: 4}"],
    "bf16": ["train.weights=bfloat16"],
    "released": ["train.release_gradients=true", "train.max_grad_norm=null", "train.micro_batch_size=null"],
    "kto": [*LABELS, "train.loss=kto", "train.epochs=0.4"],
}
# In slow runs.
MORE_SETTINGS = {
    "recomputed": ["train.gradient_checkpointing=true"],
    "padded": ["train.rows=padded", "train.micro_batch_size=null"],
    "dora": ["train.lora={r: 4, dora: true, base_dtype: bfloat16}"],
    "experts": [
        "train.model=mixture",
        "train.lora={r: 4, target_modules: [], target_parameters: [gate_up_proj, down_proj]}",
    ],
    "aot": ["train.loss=aot"],
}


@dataclass
class Job:
    """A command for two processes."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    goes_on_from: str | None = None  # a run that has ended by then, but for its last checkpoint


def launched_by_accelerate(*flags: str) -> dict[str, str]:
    """What `accelerate launch` with these flags says to its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    parsed = launch_command_parser().parse_args([*flags, "--num_processes", "2", "prefcache"])
    said = prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
    return {key: value for key, value in said.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def command(name: str, run: str, *more: str) -> list[str]:
    said = [*(SETTINGS | MORE_SETTINGS)[name], f"train.run={run}-{name}", "train.device=cpu", *more]
    return ["train", "config.yaml", *(word for each in said for word in ("--set", each))]


def run_folder(folder: Path, name: str, run: str) -> Path:
    return folder / "runs" / ("labels" if name == "kto" else "tiny") / f"{run}-{name}"


def go_back(folder: Path, run: str, name: str, to: str) -> None:
    """A copy of a run that was killed after the checkpoint before its last."""
    source = run_folder(folder, name, run)
    copy = shutil.copytree(source, source.with_name(to))
    (copy / "manifest.json").unlink()
    shutil.rmtree(sorted((copy / "checkpoints").iterdir())[-1])


def in_this_process(folder: Path, *arguments: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.stderr
    return done.stderr


def in_two_processes(folder: Path, jobs: list[Job], **environment: str) -> str:
    """One after another, so that PyTorch is imported and started once."""
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", __name__],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:4000]
    return done.stderr


def in_each_process() -> None:
    """Train, and write down what this process holds of the model and of its optimizer."""
    rank, policies = int(os.environ["RANK"]), []

    class Seen(Policy):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            policies.append(self)

    policy.Policy = Seen
    for job in (Job(**each) for each in json.loads(Path("jobs.json").read_text())):
        os.environ.update(job.environment)
        if job.goes_on_from and rank == 0:
            go_back(Path(), *job.goes_on_from.split("-"), job.name)
        if policies:
            torch.distributed.barrier()
        main(job.command, standalone_mode=False)
        model, optimizer = policies[-1].forward.model, policies[-1]._optimizer.state_dict()["state"].values()
        if job.name == "shards-bf16":
            Path(f"rounded-{rank}.json").write_text(json.dumps(shards_are_rounded_as_the_whole()))
        held = [n_bytes(model.state_dict().values()), n_bytes(v for state in optimizer for v in state.values())]
        Path(f"{job.name}-{rank}.json").write_text(json.dumps(held))


def shards_are_rounded_as_the_whole() -> bool:
    """Whether weights in bf16 are the same bit by bit after steps in shards and in one piece, with the same gradients."""
    mesh, dice = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=dice).bfloat16() for shape in ((5, 300), (64, 7, 3), (1, 9), (6,))]
    ways = [start, [distribute_tensor(each, mesh, [Shard(0)]) for each in start]]
    parameters = [[torch.nn.Parameter(each.clone()) for each in way] for way in ways]
    settings = Train(weights="bfloat16")
    updates = [optimizers.make_optimizer(way, settings, torch.device("cpu")) for way in parameters]
    for seed in range(3):
        for whole, shard in zip(*parameters, strict=True):
            whole.grad = torch.randn(whole.shape, generator=dice).bfloat16()
            shard.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
        for update in updates:
            optimizers.take_step(update, 1e-3, seed)
    return all(torch.equal(whole, shard.full_tensor()) for whole, shard in zip(*parameters, strict=True))


def n_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of this process's parts. Counts of steps are left out."""
    parts = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    return sum(part.numel() * part.element_size() for part in parts if part.ndim)


def build_tied(model: Path, folder: Path) -> None:
    """Another architecture with one matrix for embeddings and head, and the same tokenizer."""
    from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

    shutil.copytree(model, folder)
    shape = AutoConfig.from_pretrained(model).to_dict()
    wanted = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    torch.manual_seed(1)
    config = Qwen2Config(**{key: shape[key] for key in wanted}, num_hidden_layers=3, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, model) -> Path:
    """All of them as one process trains them."""
    folder = tmp_path_factory.mktemp("devices")
    build_tied(model, folder / "tied")
    save_mixture(model, folder / "mixture")
    write_pairs(folder / "pairs.jsonl", 34)
    write_config(folder, model, **TRAIN)
    for kind in ([], LABELS):
        for stage in ("prepare", "score"):
            in_this_process(folder, stage, "config.yaml", *(word for each in kind for word in ("--set", each)))
    for name in SETTINGS:
        in_this_process(folder, *command(name, "one"))
    return folder


def jobs_with_shards(names: Iterable[str]) -> list[Job]:
    return [Job(f"shards-{name}", command(name, "shards", "train.shard=fsdp")) for name in names]


@pytest.fixture(scope="module")
def trained(one_process) -> Path:
    """And as two do, with a shard each or with the whole model; and runs that go on from where others were killed."""
    shards = jobs_with_shards(SETTINGS)
    copies = [Job(f"copies-{name}", command(name, "copies", "train.shard=none")) for name in ("llama", "tied", "bf16")]
    again = [
        Job(f"{run}-{name}", command(name, run, "train.shard=fsdp"), goes_on_from=f"{before}-{name}")
        for run, before in (("again", "shards"), ("joined", "one"))
        for name in ("llama", "bf16")
    ]
    # By accelerate's flags alone.
    kept = {"FSDP_RESHARD_AFTER_FORWARD": "false"}
    asked = [Job("asked-llama", command("llama", "asked")), Job("kept-llama", command("llama", "kept"), kept)]
    flags = launched_by_accelerate("--use_fsdp", "--fsdp_version", "2")
    said = in_two_processes(one_process, [*shards, *copies, *again, *asked], **flags)
    assert said.count("the model is sharded over 2 processes (FSDP2)") == len(shards) + len(asked)
    assert said.count("resuming from step") == len(again)
    return one_process


@pytest.fixture(scope="module")
def trained_with_more_settings(one_process) -> Path:
    for name in MORE_SETTINGS:
        in_this_process(one_process, *command(name, "one"))
    in_two_processes(one_process, jobs_with_shards(MORE_SETTINGS))
    return one_process


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "model").glob("*.safetensors")))


def assert_same(run: Path, one: Path) -> None:
    rows, expected = metrics(run), metrics(one)
    assert [row["step"] for row in rows] == [row["step"] for row in expected] and len(rows) > 5
    for name in ("loss", "grad_norm", "rewards/margins", "eval_loss"):
        found, wanted = ([row[name] for row in table if row[name] is not None] for table in (rows, expected))
        assert found == pytest.approx(wanted, abs=1e-5) and len(wanted) > 2
    found, wanted = weights(run), weights(one)
    assert found.keys() == wanted.keys()
    assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 1e-5


@pytest.mark.parametrize("run", ["shards", "copies", "joined"])
def test_weights_in_bf16_become_those_of_one_process_but_for_rounding(trained, model, run):
    """Micro-batches and processes add up gradients in another order, and each sum is rounded to bf16."""
    rows, expected = (metrics(run_folder(trained, "bf16", each)) for each in (run, "one"))
    for name in ("loss", "grad_norm", "rewards/margins", "eval_loss"):
        found, wanted = ([row[name] for row in table if row[name] is not None] for table in (rows, expected))
        assert found == pytest.approx(wanted, rel=0.05, abs=0.02) and len(wanted) > 2
    found, wanted = (weights(run_folder(trained, "bf16", each)) for each in (run, "one"))
    start = load_file(model / "model.safetensors")
    gap, move = (
        torch.cat([(found[key].double() - other[key].double()).flatten() for key in wanted]).abs().mean()
        for other in (wanted, start)
    )
    assert {each.dtype for each in found.values()} == {torch.bfloat16} and gap < move / 50


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "bf16"])
def test_two_processes_with_a_shard_each_do_what_one_does(trained, name):
    assert_same(run_folder(trained, name, "shards"), run_folder(trained, name, "one"))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_SETTINGS)
def test_two_processes_with_a_shard_each_do_what_one_does_with_more_settings(trained_with_more_settings, name):
    folder = trained_with_more_settings
    assert_same(run_folder(folder, name, "shards"), run_folder(folder, name, "one"))


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_two_processes_with_a_copy_each_do_what_one_does(trained, name):
    assert_same(run_folder(trained, name, "copies"), run_folder(trained, name, "one"))


def test_the_flags_of_accelerate_launch_shard_as_the_config_does(trained):
    for run in ("asked", "kept"):
        assert_same_bits(trained, "shards", run)


def assert_same_bits(folder: Path, one: str, other: str, name: str = "llama") -> None:
    runs = [run_folder(folder, name, run) for run in (one, other)]
    files = [run / "model/model.safetensors" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert metrics(runs[0]) == metrics(runs[1])


def test_every_step_was_clipped_and_some_labels_had_no_mismatched_answer(trained):
    # What the comparisons above are to cover.
    assert all(row["grad_norm"] > 0.5 for row in metrics(run_folder(trained, "llama", "one"))[1:])
    n_kl = Prepared(trained / "runs/labels/prepared").table("train")["n_kl"]
    assert 0 < n_kl.null_count < len(n_kl) / 2


def held(folder: Path, run: str) -> list[list[int]]:
    """By process, the bytes of its weights and of its optimizer state."""
    return [json.loads((folder / f"{run}-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_shards_are_the_whole_model_and_each_is_half_of_it(trained):
    # float32 weights, and Adam's two means of each that is trained.
    n = sum(each.numel() for each in weights(run_folder(trained, "llama", "one")).values())
    whole = [4 * n, 8 * n]
    assert held(trained, "copies-llama") == [whole, whole]
    shards = held(trained, "shards-llama")
    assert [sum(of_both) for of_both in zip(*shards, strict=True)] == whole
    # Rows of a matrix are not cut, so that one of an odd number of them lies here or there.
    assert all(abs(2 * shards[0][i] - whole[i]) <= 0.02 * whole[i] for i in (0, 1))


def test_of_a_model_with_an_adapter_both_are_sharded(trained):
    n, n_adapter = (
        sum(each.numel() for each in weights(run_folder(trained, name, "one")).values()) for name in ("llama", "lora")
    )
    of_both = [sum(each) for each in zip(*held(trained, "shards-lora"), strict=True)]
    assert of_both == [4 * (n + n_adapter), 8 * n_adapter]


def test_the_model_of_sharded_training_loads_with_plain_transformers(trained):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 20).unsqueeze(0)
    for name in ("llama", "tied"):
        one, shards = (
            AutoModelForCausalLM.from_pretrained(run_folder(trained, name, run) / "model")(ids).logits.detach()
            for run in ("one", "shards")
        )
        assert float((one - shards).abs().max()) < 1e-4


def test_samples_of_a_sharded_model_are_those_of_a_whole_one(trained):
    rows = [
        pq.read_table(run_folder(trained, "llama", run) / "samples.parquet").to_pylist() for run in ("one", "shards")
    ]
    assert rows[0] == rows[1] and any(row["before"] != row["after"] for row in rows[0])


@pytest.mark.parametrize("name", ["llama", "bf16"])
def test_a_sharded_run_resumes_bit_by_bit(trained, name):
    assert_same_bits(trained, "shards", "again", name)


def test_weights_in_bf16_are_rounded_alike_in_any_number_of_shards(trained):
    assert all(json.loads((trained / f"rounded-{rank}.json").read_text()) for rank in (0, 1))


def test_in_bf16_a_shard_takes_half_the_bytes(trained):
    n = sum(each.numel() for each in weights(run_folder(trained, "bf16", "one")).values())
    assert [sum(each) for each in zip(*held(trained, "shards-bf16"), strict=True)] == [2 * n, 4 * n]


def test_a_run_goes_on_in_another_number_of_processes(trained):
    assert_same(run_folder(trained, "llama", "joined"), run_folder(trained, "llama", "one"))
    go_back(trained, "shards", "lora", "parted-lora")
    assert "resuming from step" in in_this_process(trained, *command("lora", "parted"))
    assert_same(run_folder(trained, "lora", "parted"), run_folder(trained, "lora", "one"))


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--use_fsdp"], "Add --fsdp_version 2"),
        (["--use_fsdp", "--fsdp_version", "2", "--fsdp_offload_params", "true"], "Leave it out"),
        (
            ["--use_fsdp", "--fsdp_version", "2", "--fsdp_activation_checkpointing", "true"],
            "say train.gradient_checkpointing=true",
        ),
    ],
)
def test_what_accelerate_launch_asks_for_and_would_not_happen_is_refused(monkeypatch, flags, remedy):
    for key, value in launched_by_accelerate(*flags).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match=remedy):
        distributed.make_accelerator(Train(device="cpu"))


def test_deepspeed_is_refused_and_the_message_names_what_does_the_same(prefcache, one_process, monkeypatch):
    monkeypatch.chdir(one_process)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as accelerate launch --use_deepspeed says it
    refused = prefcache(*command("llama", "deepspeed"), code=2)
    assert "DeepSpeed" in refused.stderr and "train.shard=fsdp" in refused.stderr
    assert not run_folder(one_process, "llama", "deepspeed").exists()


def test_quantized_weights_are_not_sharded():
    train = Train(device="cpu", shard="fsdp")
    with pytest.raises(UsageError, match="Weights in 4bit"):
        distributed.is_sharded(train, distributed.make_accelerator(train), "4bit")


def test_layers_of_a_sharded_model_are_not_compiled():
    train = Train(device="cpu", shard="fsdp", compile=True)
    with pytest.raises(UsageError, match=r"train\.compile: layers of a sharded model"):
        distributed.is_sharded(train, distributed.make_accelerator(train), None)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_4bit"])
def test_a_quantized_optimizer_is_not_sharded(optimizer):
    train = Train(device="cpu", shard="fsdp", optimizer=optimizer)
    with pytest.raises(UsageError, match=f"train.optimizer={optimizer} quantizes its state in blocks"):
        distributed.is_sharded(train, distributed.make_accelerator(train), None)


def test_runs_of_one_process_may_have_different_precisions():
    settings = [{"precision": "bf16"}, {"precision": "float32"}, {"precision": "bf16", "weights": "bfloat16"}]
    found = [distributed.make_accelerator(Train(device="cpu", **each)).mixed_precision for each in settings]
    # Weights in bf16 need no autocast.
    assert found == ["bf16", "no", "no"]


def test_one_process_has_nothing_to_shard():
    train = Train(device="cpu", shard="fsdp")
    assert not distributed.is_sharded(train, distributed.make_accelerator(train), None)


if __name__ == "__main__":
    in_each_process()
