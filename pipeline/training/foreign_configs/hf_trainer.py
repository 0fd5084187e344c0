"""What the programs have in common: the settings of Transformers' Trainer, under its names or a program's own."""

from collections.abc import Iterable, Mapping
from typing import get_args

from prefcache.pipeline.config import OWN_SET, Tracker
from prefcache.pipeline.config_file import validate
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.training.foreign_configs.converted import Converted

# theirs -> ours, with the same value.
SAME = {
    "learning_rate": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "adam_epsilon": "train.eps",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "seed": "train.seed",
    "gradient_checkpointing": "train.gradient_checkpointing",
}
# The Trainer's defaults that change a result.
DEFAULTS = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.0,
    "lr_scheduler_type": "linear",
    "seed": 42,
}
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "adamw_torch_4bit": "adamw_4bit",
}
IGNORED = {
    "per_device_eval_batch_size": "rows are packed by tokens (train.tokens_per_micro_batch)",
    "auto_find_batch_size": "a forward that does not fit is halved",
    "remove_unused_columns": "prepare keeps what it needs",
    "gradient_checkpointing_kwargs": "layers are recomputed without changing gradients",
    "use_liger_kernel": "the head never builds the logits of all tokens, and train.fuse_kernels is on by default",
    "liger_kernel_config": "train.fuse_kernels is on by default",
    "logging_steps": "every step is logged",
    "logging_first_step": "every step is logged",
    "logging_strategy": "every step is logged",
    "logging_dir": "metrics are in the run's folder",
    "eval_strategy": "train.eval_every says when",
    "evaluation_strategy": "train.eval_every says when",
    "save_strategy": "train.checkpoint_every says when",
    "fsdp": "train.shard: fsdp shards the model if it must be",
    "fsdp_config": "train.shard: fsdp shards the model if it must be",
    "fsdp_version": "train.shard: fsdp shards the model if it must be",
    "deepspeed": "train.shard: fsdp shards what ZeRO 3 does",
    "do_train": "each stage is a command",
    "do_eval": "each stage is a command",
    "do_predict": "each stage is a command",
    "overwrite_output_dir": "a finished run with other settings is renamed",
    "resume_from_checkpoint": "an interrupted run continues from its last checkpoint",
    "ignore_data_skip": "a run continues at the example where it was interrupted",
    "enable_jit_checkpoint": "train.checkpoint_every says when",
    "bf16_full_eval": "evaluation computes as training does",
    "fp16_full_eval": "evaluation computes as training does",
    "tf32": "not set here",
    "data_seed": "train.seed also shuffles the data",
    "prediction_loss_only": "all metrics are computed",
    "include_for_metrics": "all metrics are computed",
    "batch_eval_metrics": "all metrics are computed",
    "label_names": "the columns are known",
    "length_column_name": "lengths are counted in prepare",
    "torch_compile": "train.compile is off by default",
    "use_cache": "training needs no key-value cache",
    "local_rank": "accelerate sets it",
    "project": "train.report_to",
    "accelerator_config": "rows are packed by tokens, for all processes alike",
    "average_tokens_across_devices": "a step's mean is over all of its examples, on any number of processes",
    "full_determinism": "the same settings give the same run",
    "torch_empty_cache_steps": "a micro-batch that does not fit is halved",
    "skip_memory_metrics": "peak memory is logged",
    "debug": "not needed",
    "env": "set environment variables in the shell",
    "hf_use_auth_token": "`hf auth login` keeps the token",
}
PREFIXES = {
    "dataloader_": "pairs are read from memory-mapped Arrow",
    "hub_": "`prefcache push` sends a finished run's model to the hub",
    "push_to_hub": "`prefcache push` sends a finished run's model to the hub",
    "ddp_": "accelerate sets up the processes",
    "log_": "every step is logged",
    "logging_": "every step is logged",
    "eval_": "evaluation is over all held-out examples, at train.eval_every",
    "save_": "train.checkpoint_every says when, and a checkpoint holds all that a run needs to continue",
    "torch_compile_": "train.compile has no further options",
    "trackio_": "train.report_to: trackio uses its own defaults",
    "include_": "tokens per second and their number are logged",
    "restore_callback_": "a checkpoint holds all that a run needs to continue",
    "disable_tqdm": "-q prints no progress",
}
DIFFERS = {
    "trust_remote_code": "remote code is never run",
    "fp16": "training is in float32 or bf16",
    "fp8": "training is in float32 or bf16",
    "neftune_noise_alpha": "no noise is added to the embeddings",
    "label_smoothing_factor": "it smooths the cross-entropy, which is not trained here",
    "optim_args": "train.betas, eps and weight_decay are the optimizer's settings here",
    "optim_target_modules": "the optimizer updates all that is trained",
    "lr_scheduler_kwargs": "the schedule ends at 0",
    "parallelism_config": "train.shard: fsdp is the only way to share a model",
    "train_sampling_strategy": "examples are shuffled; train.order_by changes that",
    "group_by_length": "examples are shuffled; train.order_by changes that",
}
_READ_HERE = (
    "max_steps", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "eval_steps", "save_steps", "save_total_limit",
    "metric_for_best_model", "greater_is_better", "load_best_model_at_end", "report_to", "run_name", "bf16", "use_cpu", *SAME,
    *DEFAULTS,
)  # fmt: skip
NO_DROPOUT = "adapters train without dropout, so that the margin starts at 0"


def convert_trainer(converted: Converted, names: Mapping[str, str] | None = None) -> None:
    """Convert the Trainer's settings. `names`: what the program calls those that have another name there."""
    names = names or {}
    _convert_batches(converted, names)
    _convert_schedule(converted, names)
    _convert_optimizer(converted, names)
    _convert_evaluation(converted)
    _convert_trackers(converted)
    put_run_name(converted, "run_name")
    if converted.get("torch_compile") is True:
        converted.put("torch_compile", "train.compile", True)
    if converted.get("use_cpu"):
        converted.put("use_cpu", "train.device", "cpu")
        converted.put("use_cpu", "score.device", "cpu")
    converted.put_same({names.get(key, key): ours for key, ours in SAME.items()})


def explain_trainer(
    converted: Converted,
    ignored: Mapping[str, str],
    prefixes: Mapping[str, str],
    differs: Mapping[str, str],
    others: Iterable[str] = (),
) -> None:
    """Account for the keys that are left, the program's own and the Trainer's."""
    if converted.get("train_sampling_strategy") == "random":
        converted.ignored["train_sampling_strategy"] = "examples are always shuffled"
    converted.explain_rest(
        IGNORED | dict(ignored), dict(prefixes) | PREFIXES, DIFFERS | dict(differs), (*_READ_HERE, *others)
    )


def evaluates(converted: Converted) -> bool:
    """Whether the program evaluates during training."""
    strategy = converted.get("eval_strategy", converted.get("evaluation_strategy", "no"))
    return str(strategy) not in ("no", "False")  # YAML 1.1 reads no as false


def put_bf16(converted: Converted) -> None:
    if converted.given.get("bf16") is True:
        converted.put("bf16", "train.precision", "bf16")


def _convert_batches(converted: Converted, names: Mapping[str, str]) -> None:
    per_device = names.get("per_device_train_batch_size", "per_device_train_batch_size")
    n_examples = int(converted.number(per_device) * converted.number("gradient_accumulation_steps"))
    converted.put(per_device, "train.batch_size", n_examples)
    converted.note(
        ["gradient_accumulation_steps"], "train.batch_size, which is over all processes: multiply it by their number"
    )
    for key, ours in (("save_steps", "train.checkpoint_every"), ("save_total_limit", "train.keep_checkpoints")):
        value = converted.given.get(key)
        if isinstance(value, int) and value > 0:
            converted.put(key, ours, value)
        elif value is not None:
            converted.ignored[key] = "expected a number of steps or of checkpoints; our default is used"


def _convert_schedule(converted: Converted, names: Mapping[str, str]) -> None:
    key = names.get("lr_scheduler_type", "lr_scheduler_type")
    scheduler = converted.text(key)
    if scheduler in SCHEDULERS:
        converted.put(key, "train.scheduler", SCHEDULERS[scheduler])
    else:
        converted.differs[key] = f"train.scheduler is one of {', '.join(dict.fromkeys(SCHEDULERS.values()))}"
    steps = converted.given.get("warmup_steps")
    if scheduler == "constant":  # the Trainer ignores a warm-up then
        converted.put("warmup_ratio", "train.warmup_ratio", 0.0)
        converted.note(["warmup_steps"], "train.warmup_ratio: 0.0")
    elif isinstance(steps, int | float) and steps >= 1:
        converted.put("warmup_steps", "train.warmup_steps", int(converted.number("warmup_steps")))
        converted.note(["warmup_ratio"], "train.warmup_steps, which overrules it")
    elif isinstance(steps, int | float):  # a share of all steps
        # Older versions take a warmup_steps of 0 for none given, and the ratio counts.
        ratio = float(steps or converted.number("warmup_ratio"))
        converted.put("warmup_steps", "train.warmup_ratio", ratio)
        converted.note(["warmup_ratio"], "train.warmup_ratio")
    else:
        converted.put("warmup_ratio", "train.warmup_ratio", converted.number("warmup_ratio"))
    if isinstance(n_steps := converted.given.get("max_steps"), int) and n_steps > 0:  # -1 means that it is unset
        converted.put("max_steps", "train.max_steps", n_steps)


def _convert_optimizer(converted: Converted, names: Mapping[str, str]) -> None:
    key = names.get("optim", "optim")
    if (optimizer := converted.text(key)) in OPTIMIZERS:
        converted.put(key, "train.optimizer", OPTIMIZERS[optimizer])
    elif optimizer is not None:
        converted.differs[key] = f"train.optimizer is one of {', '.join(dict.fromkeys(OPTIMIZERS.values()))}"
    if converted.get("max_grad_norm") == 0:
        converted.put("max_grad_norm", "train.max_grad_norm", None)
    betas = {"adam_beta1": 0.9, "adam_beta2": 0.999}
    for beta in betas.keys() & converted.given.keys():
        converted.put(beta, "train.betas", [converted.given.get(name, default) for name, default in betas.items()])


def _convert_evaluation(converted: Converted) -> None:
    given, prepare = converted.given, converted.config["prepare"]
    holds_out = prepare.get("held_out") != 0 or "held_out_data" in prepare
    wants_best = bool(given.get("load_best_model_at_end"))
    if isinstance(steps := given.get("eval_steps"), int) and steps > 0 and holds_out:
        converted.put("eval_steps", "train.eval_every", steps)
    elif "eval_steps" in given:
        why = "the first and last step are always evaluated; train.eval_every is a number of steps"
        converted.ignored["eval_steps"] = why if holds_out else "no example is held out, so nothing is evaluated"
    if wants_best and not holds_out:
        converted.differs["load_best_model_at_end"] = "no example is held out; set prepare.held_out, and train.best"
    elif wants_best and "eval_steps" not in converted.became:
        converted.differs["load_best_model_at_end"] = (
            "evaluations are some steps apart; set train.eval_every, and train.best"
        )
    elif wants_best:
        metric = str(given.get("metric_for_best_model", "loss")).removeprefix("eval_")
        # With evaluation data of its own, the converted run evaluates nothing else.
        own = f"{OWN_SET}_" if "held_out_data" in prepare else ""
        best = {"metric": f"{own}{metric}"}
        if "greater_is_better" in given:
            best["greater_is_better"] = given["greater_is_better"]
        converted.put("load_best_model_at_end", "train.best", best)
        converted.note(["metric_for_best_model", "greater_is_better"], "train.best")


def _convert_trackers(converted: Converted) -> None:
    if "report_to" not in converted.given:
        return
    names = converted.names("report_to")
    if trackers := [name for name in names if name in get_args(Tracker)]:
        converted.put("report_to", "train.report_to", trackers)
    elif names in ([], ["none"]):
        converted.ignored["report_to"] = "metrics go to Parquet (prefcache sql)"
    if others := [name for name in names if name not in (*trackers, "none")]:
        converted.differs["report_to"] = f"{', '.join(others)}: train.report_to takes {', '.join(get_args(Tracker))}"


def put_run_name(converted: Converted, theirs: str) -> None:
    """Name the run as the file does, if a run can have that name."""
    if (name := converted.given.get(theirs)) is None:
        return
    try:
        validate({"model": "model", "out": "out", "prepare": {"data": ["data"]}, "train": {"run": name}})
    except UsageError as error:
        converted.ignored[theirs] = f"it cannot name a run ({error})"
    else:
        converted.put(theirs, "train.run", str(name))
