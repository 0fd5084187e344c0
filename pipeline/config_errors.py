"""Say what is wrong in a configuration, and lead names from other trainers to the key that does the same here."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from prefcache.pipeline.config import Config, Prepare, Score, Section, Train

# What TRL, Axolotl, LLaMA-Factory, ms-swift and torchtune call it -> a key, or a sentence where no single key does the same.
ALIASES = {
    "base_model": "model",
    "model_id": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_revision": "revision",
    "ref_model": "model",
    "reference": "model",
    "output_dir": "out",
    "dataset": "prepare.data",
    "dataset_name": "prepare.data",
    "datasets": "prepare.data",
    "train_dataset": "prepare.data",
    "train_file": "prepare.data",
    "eval_dataset": "prepare.held_out_data (your own data) or prepare.held_out (a share of the prompts)",
    "val_dataset": "prepare.held_out_data (your own data) or prepare.held_out (a share of the prompts)",
    "eval_datasets": "prepare.held_out_data",
    "test_datasets": "prepare.held_out_data",
    "val_dataset_path": "prepare.held_out_data",
    "max_samples": "prepare.max_records",
    "max_train_samples": "prepare.max_records",
    "val_size": "prepare.held_out",
    "val_set_size": "prepare.held_out",
    "test_size": "prepare.held_out",
    "split_dataset_ratio": "prepare.held_out",
    "cutoff_len": "prepare.max_length",
    "max_seq_len": "prepare.max_length",
    "max_seq_length": "prepare.max_length",
    "sequence_len": "prepare.max_length",
    "truncation_mode": "prepare.too_long",
    "dataset_num_proc": "prepare.workers",
    "num_workers": "prepare.workers",
    "preprocessing_num_workers": "prepare.workers",
    "load_in_4bit": "score.quantization: 4bit",
    "load_in_8bit": "score.quantization: 8bit",
    "attn_implementation": "score.attention",
    "flash_attention": "score.attention: flash_attention_2",
    "lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "train_batch_size": "train.batch_size",
    "global_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size (of a whole step; train.micro_batch_size limits one forward and backward)",
    "gradient_accumulation_steps": "train.batch_size (of a whole step; it is accumulated within train.tokens_per_micro_batch)",
    "lr_scheduler": "train.scheduler",
    "lr_scheduler_type": "train.scheduler",
    "optim": "train.optimizer",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "adam_epsilon": "train.eps",
    "gradient_clipping": "train.max_grad_norm",
    "clip_grad_norm": "train.max_grad_norm",
    "optimizer_in_bwd": "train.release_gradients",
    "fused_backward": "train.release_gradients",
    "enable_activation_checkpointing": "train.gradient_checkpointing",
    "activation_offloading": "train.offload: activations",
    "enable_activation_offloading": "train.offload: activations",
    "offload_optimizer": "train.offload: optimizer",
    "optimizer_offload": "train.offload: optimizer",
    "torch_compile": "train.compile",
    "use_liger_kernel": "train.fuse_kernels (on by default; the LM head never holds the logits of all tokens)",
    "liger_kernel": "train.fuse_kernels (on by default; the LM head never holds the logits of all tokens)",
    "bf16": "train.precision: bf16",
    "pure_bf16": "train.weights: bfloat16",
    "weights_dtype": "train.weights",
    "dtype": "score.dtype for the reference, train.weights for what is trained",
    "fp16": "train.precision (float32 or bf16)",
    "torch_dtype": "score.dtype for the reference, train.weights for what is trained",
    "deepspeed": "train.shard: fsdp",
    "fsdp": "train.shard: fsdp",
    "peft": "train.lora",
    "use_peft": "train.lora",
    "lora_r": "train.lora.r",
    "lora_rank": "train.lora.r",
    "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout",
    "lora_target": "train.lora.target_modules",
    "lora_target_modules": "train.lora.target_modules",
    "lora_target_parameters": "train.lora.target_parameters",
    "target_parameters": "train.lora.target_parameters",
    "rank": "train.lora.r",
    "use_dora": "train.lora.dora",
    "use_rslora": "train.lora.rslora",
    "rl": "train.loss",
    "rlhf_type": "train.loss",
    "loss_type": "train.loss",
    "pref_loss": "train.loss",
    "dpo": "train.loss: sigmoid",
    "rl_beta": "train.beta",
    "pref_beta": "train.beta",
    "label_smoothing": "train.loss_args.label_smoothing",
    "loss_weights": "train.loss: {sigmoid: 0.8, sft: 0.2}",
    "rpo_alpha": "train.loss: {sigmoid: 1, sft: ALPHA}",
    "use_weighting": "train.weighting: wpo",
    "sync_ref_model": "train.moving_reference",
    "ref_model_sync_steps": "train.moving_reference.every",
    "ref_model_mixup_alpha": "train.moving_reference.alpha",
    "precompute_ref_log_probs": "`prefcache score`, which always does it",
    "packing": "train.rows (auto packs where it is exact)",
    "sample_packing": "train.rows (auto packs where it is exact)",
    "logging_steps": "no setting: every step is recorded",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "eval_steps": "train.eval_every",
    "evals_per_epoch": "train.eval_every",
    "load_best_model_at_end": "train.best",
    "metric_for_best_model": "train.best",
    "early_stopping_patience": "train.best.patience",
    "wandb_project": "train.report_to: wandb",
    "run_name": "train.run",
}


def describe_problem(problem: Any, on_command_line: bool = False) -> str:
    """Put one of pydantic's errors into words. `on_command_line`: the key was given there, in full."""
    keys = [str(part) for part in problem["loc"]]
    name = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        return f"{name}{':' if on_command_line else ' is'} not a key of the configuration{_suggestion(keys)}"
    if problem["type"] == "missing":
        name = "prepare.data" if name == "prepare" else name
        option = f" (or --set {name}=...)" if name else ""
        return f"{name} is missing; set it in the config{option}"
    if problem["type"] == "model_type":
        is_data = keys[0] == "prepare" and keys[1:2] in (["data"], ["held_out_data"])
        section, path = section_at(keys), "a path or " if is_data else ""
        known = f" of {', '.join(section.model_fields)}" if section else ""
        return f"{name}: found {problem['input']!r}, expected {path}a mapping{known}"
    if problem["type"] == "too_short":
        return f"{name}: names nothing; expected a path or a list of them"
    value = "" if isinstance(problem["input"], dict) else f", found {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message}{value}" if name else message


def problem_origin(problem: Any, overridden: list[str]) -> str:
    """Return where a wrong value comes from: "override", "file", or "either" for a section that both contribute to."""
    # An error about a whole section begins with the key that it concerns.
    first_word = problem["msg"].removeprefix("Value error, ").partition(":")[0]
    keys = [str(part) for part in problem["loc"]] or first_word.split(".")
    if problem["type"] == "missing":
        return "file"
    if any(".".join(keys[:n]) in overridden for n in range(1, len(keys) + 1)):
        return "override"
    return "either" if any(key.startswith(f"{'.'.join(keys)}.") for key in overridden) else "file"


def section_at(keys: list[str]) -> type[Section] | None:
    """Return the section at a path of keys; the index of a list entry, and the name of a mapping's, are skipped."""
    section: type[Section] | None = Config
    is_named = False  # whether a mapping of names to sections was entered
    for key in keys:
        if section is not None and not key.isdigit():
            field = section.model_fields.get(key)
            if field is None and is_named:
                is_named = False  # a name that the user gives to an entry
                continue
            section = next(_sections_in(field.annotation), None) if field else None
            is_named = field is not None and get_origin(field.annotation) is dict
    return section


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Yield the section in `Section`, `Section | None`, `tuple[Section, ...]` or a mapping to one of these."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for kind in get_args(annotation):
        yield from _sections_in(kind)


def suggest_alias(name: str) -> str | None:
    """Say what does here what another trainer's setting does; None for a name that none of them has."""
    if (target := ALIASES.get(name.lower().replace("-", "_"))) is None:
        return None
    return f"it needs {target}" if target.startswith("no setting") else f"use {target}"


def _suggestion(keys: list[str]) -> str:
    section = section_at(keys[:-1])
    if section is None:
        return ""
    name, names = keys[-1], list(section.model_fields)
    if same := suggest_alias(name):
        return f"; {same}"
    for place, kind in (("prepare", Prepare), ("score", Score), ("train", Train)):
        if name in kind.model_fields:
            return f"; did you mean {place}.{name}?"
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"; did you mean {'.'.join([*keys[:-1], near[0]])}?"
    return f"; known here: {', '.join(names)} (see `prefcache config`)"
