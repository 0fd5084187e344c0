"""Axolotl's settings, of its preference training: rl: dpo, ipo, kto, orpo or simpo. It hands them on to TRL's trainers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.foreign_programs import AXOLOTL
from prefcache.pipeline.training.foreign_configs import axolotl_keys as keys
from prefcache.pipeline.training.foreign_configs import hf_trainer
from prefcache.pipeline.training.foreign_configs.converted import (
    Converted,
    put_kto,
    put_losses,
    put_model,
    put_share,
    sources,
)

# What it calls the Trainer's settings.
_NAMES = {
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
}
# theirs -> ours, with the same value.
_SAME = {
    "output_dir": "out",
    "sequence_len": "prepare.max_length",
    "dataset_num_proc": "prepare.workers",
    "dataset_processes": "prepare.workers",
}
# Axolotl's defaults that change a result.
DEFAULTS = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "sequence_len": 512,
    "num_epochs": 1,
    "lr_scheduler": "cosine",
    "optimizer": "adamw_torch_fused",
    "warmup_ratio": 0.03,
    "seed": 42,
    "rl_beta": 0.1,
    "bf16": "auto",
    "excess_length_strategy": "drop",
}
_LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}
# Options of a data set that are options of its format here.
_FORMAT_ARGS = (
    "field_messages",
    "field_chosen",
    "field_rejected",
    "field_tools",
    "message_property_mappings",
    "roles",
)
_SOURCE_KEYS = ("path", "name", "split", "revision", "type", "data_files", *_FORMAT_ARGS)
_SOURCE_IGNORED = {
    "ds_type": "files are recognised by their names",
    "trust_remote_code": "remote code is never run",
    "train_on_eos": "preference training counts all tokens after the prompt",
    "train_on_eot": "preference training counts all tokens after the prompt",
    "roles_to_train": "preference training counts all tokens after the prompt",
}
_LORA = {
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_target_parameters": "target_parameters",
    "peft_use_dora": "dora",
    "peft_use_rslora": "rslora",
}
_ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
_IMPLEMENTATIONS = {"sdpa", "eager", "flash_attention_2"}
_TRACKERS = {"use_tensorboard": "tensorboard", "use_wandb": "wandb", "use_trackio": "trackio"}
_READ_HERE = (
    "base_model", "revision_of_model", "model_revision", "rl", "trl", "datasets", "test_datasets", "val_set_size", "rl_beta",
    "dpo_beta", "orpo_alpha", "cpo_alpha", "simpo_gamma", "dpo_loss_type", "dpo_loss_weights", "dpo_label_smoothing",
    "dpo_use_weighting", "kto_desirable_weight", "kto_undesirable_weight", "adapter", "lora_model_dir", "lora_target_linear",
    "lora_target_modules", "load_in_4bit", "load_in_8bit", "bfloat16", "float32", "attn_implementation", "activation_offloading",
    "evals_per_epoch", "saves_per_epoch", "batch_size", "chat_template", "chat_template_jinja", "use_mlflow", "use_comet",
    "use_otel_metrics", "wandb_project", "wandb_name", "reward_model", "process_reward_model", *_NAMES.values(), *_SAME, *_LORA,
    *_ATTENTION, *_TRACKERS, *DEFAULTS,
)  # fmt: skip


def convert(given: Mapping[str, Any], folder: Path) -> Converted:
    if (rl := str(given.get("rl") or "")) not in _LOSSES:
        kind = f"`rl: {rl}`" if rl else "no `rl:`, so this is not preference training"
        raise UsageError(f"found {kind}; expected rl to be one of {', '.join(_LOSSES)}, which prefcache trains.")
    converted = Converted(AXOLOTL, given, DEFAULTS)
    put_model(converted, "base_model", "revision_of_model")
    put_model(converted, "base_model", "model_revision")
    converted.became["rl"] = "train.loss"
    _convert_data(converted, rl)
    _convert_losses(converted, rl)
    _convert_batch_size(converted)
    hf_trainer.convert_trainer(converted, _NAMES)
    if not {"warmup_steps", "warmup_ratio"} & given.keys():
        converted.differs["warmup_ratio (default)"] = (
            "Axolotl's warm-up is at most 100 steps; here it is always 3% of them"
        )
    _convert_lora(converted)
    _convert_precision(converted)
    _convert_memory(converted)
    _convert_trackers(converted)
    _convert_steps_per_epoch(converted)
    converted.put_same(_SAME)
    _ignore_harmless(converted)
    hf_trainer.explain_trainer(converted, keys.IGNORED, keys.PREFIXES, keys.DIFFERS, _READ_HERE)
    return converted


# -- data ------------------------------------------------------------------------------------------------------------


def _convert_data(converted: Converted, rl: str) -> None:
    given = converted.given
    converted.config["prepare"] = {"train_on": "all"}  # TRL's trainers count every token after the prompt
    converted.put("datasets", "prepare.data", _sources(converted, "datasets", rl))
    if rl == "kto":
        put_kto(converted, "micro_batch_size")
    match converted.get("excess_length_strategy"):
        case "truncate":
            converted.put("excess_length_strategy", "prepare.too_long", "keep_start")
        case "raise":
            converted.put("excess_length_strategy", "prepare.max_quarantine", 0.0)
            converted.config["prepare"]["too_long"] = "drop"
        case _:
            converted.put("excess_length_strategy", "prepare.too_long", "drop")
    if given.get("test_datasets"):
        converted.put("test_datasets", "prepare.held_out_data", _sources(converted, "test_datasets", rl))
        converted.config["prepare"]["held_out"] = 0.0  # Axolotl trains on all of `datasets`
        converted.note(["val_set_size"], "prepare.held_out_data")
    else:
        put_share(converted, "val_set_size")
    _convert_chat_template(converted)


def _sources(converted: Converted, key: str, rl: str) -> list[dict[str, Any]]:
    found = []
    for number, entry in enumerate(converted.mappings(key)):
        if not entry.get("path"):
            raise UsageError(f"{key}[{number}]: found {entry!r}, expected a mapping with `path`.")
        converted.differs |= {
            f"{key}[{number}].{name}": _explain_source(name)
            for name, value in entry.items()
            if value not in (None, False) and name not in (*_SOURCE_KEYS, *_SOURCE_IGNORED, "chat_template")
        }
        converted.ignored |= {f"{key}[{number}].{name}": why for name, why in _SOURCE_IGNORED.items() if name in entry}
        format = _format_of(entry, rl)
        found += [each | format for each in _places(converted, f"{key}[{number}]", entry)]
    return found


def _explain_source(name: str) -> str:
    known = {
        "shards": "all of the data is read; prepare.data has weight and max_records",
        "shards_idx": "all of the data is read",
        "preprocess_shards": "all of the data is read",
        "message_field_role": "set format_args: message_property_mappings",
        "message_field_content": "set format_args: message_property_mappings",
        "drop_system_message": "system messages are kept",
    }
    return known.get(name, "not known here")


def _places(converted: Converted, key: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return where an entry's records are: one place, or one for each of its data files."""
    files = entry.get("data_files") or []
    files = [files] if isinstance(files, str) else files
    if files and Path(str(entry["path"])).is_dir():
        return [{"path": str(name)} for name in files]  # relative to the working folder, as in Axolotl
    if files and entry["path"] in ("json", "csv", "parquet", "arrow"):
        return [{"path": str(name)} for name in files]
    if files:
        return [{"path": f"hf://datasets/{entry['path']}/{name}"} for name in files]
    subset = entry.get("name")
    names = subset if isinstance(subset, list) else [subset]
    split, revision = entry.get("split"), entry.get("revision")
    return [each for name in names for each in sources(converted, key, entry["path"], name, split, revision)]


def _format_of(entry: Mapping[str, Any], rl: str) -> dict[str, Any]:
    """Return the format of an entry's `type`: KTO's and ORPO's have a prefix here."""
    kind, prefix = entry.get("type"), {"kto": "kto.", "orpo": "orpo."}.get(rl, "")
    if not kind:
        return {}
    if isinstance(kind, Mapping):
        options = {name: value for name, value in kind.items() if value is not None}
        return {"format": f"{prefix}user_defined", **({"format_args": options} if options else {})}
    options = {name: entry[name] for name in _FORMAT_ARGS if entry.get(name) is not None}
    mappings = {
        name: entry[f"message_field_{name}"] for name in ("role", "content") if entry.get(f"message_field_{name}")
    }
    if mappings:  # the older way to say it
        options["message_property_mappings"] = options.get("message_property_mappings", {}) | mappings
    return {"format": f"{prefix}{kind}", **({"format_args": options} if options else {})}


def _convert_chat_template(converted: Converted) -> None:
    """Use the tokenizer's own template unless the file names another one, which only chat_template formats read."""
    entries = converted.mappings("datasets")
    reads_template = any(not entry.get("type") or "chat_template" in str(entry["type"]) for entry in entries)
    named = [converted.given.get("chat_template"), *(entry.get("chat_template") for entry in entries)]
    name = next((each for each in named if each is not None), "tokenizer_default")
    jinja = converted.given.get("chat_template_jinja")
    keys = [key for key in ("chat_template", "chat_template_jinja") if key in converted.given] or ["(chat template)"]
    if not reads_template:
        converted.ignored |= {
            key: "the `type` of the data writes the turns itself" for key in keys if key in converted.given
        }
    elif jinja and Path(str(jinja)).is_file():
        converted.put(keys[-1], "prepare.chat_template", str(jinja))
        converted.note(keys, "prepare.chat_template")
    elif jinja:
        converted.differs |= dict.fromkeys(
            keys, "the tokenizer's own template is used; write this one to a file and set prepare.chat_template"
        )
    elif str(name).startswith("tokenizer_default"):
        converted.ignored |= {
            key: "the tokenizer's own template is the default" for key in keys if key in converted.given
        }
    else:
        converted.differs |= dict.fromkeys(
            keys,
            f"the tokenizer's own template is used; where Axolotl's {name} differs, set prepare.chat_template to a file with it",
        )


# -- training --------------------------------------------------------------------------------------------------------


def _convert_losses(converted: Converted, rl: str) -> None:
    given = converted.given
    (settings,) = converted.mappings("trl") or [{}]
    if rl == "dpo" and (names := converted.names("dpo_loss_type")):
        put_losses(converted, names, "dpo_loss_type", "dpo_loss_weights")
    else:
        converted.config.setdefault("train", {})["loss"] = _LOSSES[rl]
        converted.became["rl"] = f"train.loss: {_LOSSES[rl]}"
    _convert_beta(converted, settings)
    if rl == "dpo" and given.get("dpo_label_smoothing"):
        converted.put("dpo_label_smoothing", "train.loss_args.label_smoothing", given["dpo_label_smoothing"])
    if rl == "dpo" and given.get("dpo_use_weighting"):
        converted.put("dpo_use_weighting", "train.weighting", "wpo")
    if rl == "kto":
        for key in ("desirable_weight", "undesirable_weight"):
            if given.get(f"kto_{key}"):
                converted.put(f"kto_{key}", f"train.loss_args.{key}", given[f"kto_{key}"])
    if rl == "simpo":
        _convert_simpo(converted)
    if rl in ("orpo", "simpo"):
        converted.differs["(likelihood)"] = (
            "TRL adds the log-likelihood of the prompt's tokens as well; here it is that of the chosen answer's tokens"
        )
    converted.ignored |= {
        f"trl.{key}": f"rl: {rl} does not read it"
        for key, value in settings.items()
        if key != "beta" and value is not None
    }
    converted.note(["trl"], "see trl.*")


def _convert_beta(converted: Converted, settings: Mapping[str, Any]) -> None:
    if settings.get("beta") is not None:
        converted.put("trl.beta", "train.beta", settings["beta"])
        converted.note(["rl_beta", "dpo_beta"], "train.beta; trl.beta overrules it")
        return
    key = next((key for key in ("rl_beta", "dpo_beta", "orpo_alpha") if key in converted.given), "rl_beta")
    converted.put(key, "train.beta", converted.get(key))


def _convert_simpo(converted: Converted) -> None:
    """SimPO of TRL's CPO trainer: gamma 0.5, and alpha times the chosen answers' likelihood."""
    gamma, alpha = converted.number("simpo_gamma", 0.5), converted.number("cpo_alpha", 1.0)
    default = "" if "cpo_alpha" in converted.given else " (default)"
    if alpha:
        converted.put("(simpo)", "train.loss", {"simpo": 1.0, "sft": float(alpha)})
        converted.became[f"cpo_alpha{default}"] = f"train.loss: the weight of sft, {alpha}"
    else:
        converted.note(["cpo_alpha"], "train.loss: simpo alone")
    converted.put("simpo_gamma", "train.loss_args.gamma", gamma)


def _convert_batch_size(converted: Converted) -> None:
    """Let batch_size, which is over all processes, overrule what the others multiply to."""
    if "batch_size" not in converted.given or "gradient_accumulation_steps" in converted.given:
        return
    size = int(converted.number("batch_size"))
    converted.defaults = {
        **converted.defaults,
        "gradient_accumulation_steps": max(size // int(converted.number("micro_batch_size")), 1),
    }
    converted.became["batch_size"] = "train.batch_size"


def _convert_lora(converted: Converted) -> None:
    given = converted.given
    for key, bits in (("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")):
        if given.get(key):
            converted.put(key, "score.quantization", bits)
    if converted.text("adapter") not in ("lora", "qlora"):
        return  # another adapter is named among the differences
    converted.config.setdefault("train", {})["lora"] = {}
    converted.became["adapter"] = "train.lora"
    converted.put_same({key: f"train.lora.{ours}" for key, ours in _LORA.items() if given.get(key)})
    targets = converted.names("lora_target_modules")
    if given.get("lora_target_linear") or targets == ["all-linear"]:
        converted.put("lora_target_linear", "train.lora.target_modules", ["all-linear"])
        converted.note(["lora_target_modules"], "train.lora.target_modules")
    elif targets:
        converted.put("lora_target_modules", "train.lora.target_modules", targets)
    if given.get("lora_model_dir"):  # trained further; its reference is the adapter as it was
        converted.put("lora_model_dir", "adapter", given["lora_model_dir"])


def _convert_precision(converted: Converted) -> None:
    """Load the weights in bf16 where Axolotl does: wherever a GPU can, unless the file says something else."""
    says_other = any(converted.given.get(key) for key in ("fp16", "float16", "float32"))
    bf16 = converted.get("bf16") or converted.given.get("bfloat16")
    key = "bfloat16" if converted.given.get("bfloat16") and "bf16" not in converted.given else "bf16"
    if bf16 and not says_other:
        is_lora = "lora" in converted.config["train"]
        converted.put(key, "train.lora.base_dtype" if is_lora else "train.weights", "bfloat16")
        converted.note(["bfloat16"], "as bf16")
    if converted.given.get("float32"):
        converted.put("float32", "train.precision", "float32")


def _convert_memory(converted: Converted) -> None:
    given = converted.given
    if (name := converted.text("attn_implementation")) in _IMPLEMENTATIONS:
        converted.put("attn_implementation", "score.attention", name)
    elif name:
        converted.ignored["attn_implementation"] = f"score.attention is one of {', '.join(sorted(_IMPLEMENTATIONS))}"
    for key, attention in _ATTENTION.items():
        if given.get(key) and "attn_implementation" not in given:
            converted.put(key, "score.attention", attention)
    for key in ("xformers_attention", "flex_attention", "sage_attention", "flash_optimum"):
        if key in given:
            converted.ignored[key] = "score.attention is sdpa, eager or flash_attention_2"
    if isinstance(given.get("gradient_checkpointing"), str):  # offload, offload_disk
        converted.put("gradient_checkpointing", "train.gradient_checkpointing", True)
        converted.config["train"]["offload"] = ["activations"]
    if given.get("activation_offloading"):
        converted.put("activation_offloading", "train.offload", ["activations"])
        converted.config["train"]["gradient_checkpointing"] = True


def _convert_trackers(converted: Converted) -> None:
    given = converted.given
    named = [key for key in _TRACKERS if given.get(key)]
    if (given.get("wandb_project") or given.get("wandb_name")) and given.get("use_wandb") is None:
        named.append("use_wandb")  # Axolotl turns it on where a project is named
    if named:
        converted.put(
            "use_wandb" if "use_wandb" in named else named[0], "train.report_to", [_TRACKERS[key] for key in named]
        )
        converted.note([*_TRACKERS], "train.report_to")
    hf_trainer.put_run_name(converted, "wandb_name")
    converted.note(["wandb_project"], "train.report_to; set WANDB_PROJECT in the shell")
    for key in ("use_mlflow", "use_comet", "use_otel_metrics"):
        if given.get(key):
            converted.differs[key] = f"train.report_to takes {', '.join(_TRACKERS.values())}"


def _convert_steps_per_epoch(converted: Converted) -> None:
    """A number per epoch needs the number of steps, which only prepared data tells."""
    for key, ours in (("evals_per_epoch", "train.eval_every"), ("saves_per_epoch", "train.checkpoint_every")):
        if converted.given.get(key):
            converted.differs[key] = (
                f"{ours} is a number of steps; the first and last step are always evaluated and saved"
            )


def _ignore_harmless(converted: Converted) -> None:
    """Ignore a padding token, and plugins of kernels alone: neither changes a result here."""
    given = converted.given
    if isinstance(tokens := given.get("special_tokens"), Mapping) and tokens.keys() <= {"pad_token"}:
        converted.ignored["special_tokens"] = "rows are never padded"
    plugins = converted.names("plugins")
    if plugins and all(name.endswith(("LigerPlugin", "CutCrossEntropyPlugin")) for name in plugins):
        converted.ignored["plugins"] = (
            "train.fuse_kernels is on by default, and the head never builds the logits of all tokens"
        )
