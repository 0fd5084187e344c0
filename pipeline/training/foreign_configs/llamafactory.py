"""LLaMA-Factory's settings, of its stages dpo and kto, and the dataset_info.json that says where its data is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.foreign_programs import LLAMAFACTORY
from prefcache.pipeline.training.foreign_configs import hf_trainer
from prefcache.pipeline.training.foreign_configs.converted import Converted, put_model, put_share

_DATASET_INFO = "dataset_info.json"
# theirs -> ours, with the same value.
_SAME = {
    "output_dir": "out",
    "cutoff_len": "prepare.max_length",
    "max_samples": "prepare.max_records",
    "preprocessing_num_workers": "prepare.workers",
    "moe_aux_loss_coef": "train.router_aux_loss",
    "pref_beta": "train.beta",
}
# LLaMA-Factory's defaults that change a result.
DEFAULTS = hf_trainer.DEFAULTS | {
    "stage": "sft",
    "cutoff_len": 2048,
    "pref_beta": 0.1,
    "pref_loss": "sigmoid",
    "finetuning_type": "lora",
    "simpo_gamma": 0.5,
}
_LORA_DEFAULTS = {"lora_rank": 8, "lora_target": "all"}
_LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")
# Our formats by its `formatting`: of pairs, and of labels.
_FORMATS = {
    "alpaca": ("llamafactory_alpaca", "llamafactory_alpaca_kto"),
    "sharegpt": ("llamafactory_sharegpt", "llamafactory_sharegpt_kto"),
    "openai": ("llamafactory_openai", "messages_label"),
}
# Its names of columns -> those of our formats.
_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
    "kto_tag": "kto_tag",
    **{name: name for name in ("history", "system", "tools", "chosen", "rejected")},
}
_OPENAI_COLUMNS = _COLUMNS | {"messages": "messages", "kto_tag": "label"}
# The tags that our formats read: LLaMA-Factory's own, and OpenAI's.
_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "assistant"),
    "system_tag": ("system",),
}
_ATTENTION = {"sdpa": "sdpa", "disabled": "eager", "fa2": "flash_attention_2"}
_IGNORED = {
    "dataset_dir": "where dataset_info.json is",
    "media_dir": "messages are text",
    "cache_dir": "HF_HOME says where models of the hub are kept",
    "use_fast_tokenizer": "the tokenizer is loaded as it was saved",
    "overwrite_cache": "prepare renews what is out of date",
    "preprocessing_batch_size": "prepare works in parts of its own size",
    "tokenized_path": "prepared data is in OUT/prepared",
    "data_shared_file_system": "prepared data is in OUT/prepared",
    "eval_num_beams": "for generation",
    "predict_with_generate": "train.samples answers held-out prompts before and after training",
    "ignore_pad_token_for_loss": "rows are never padded",
    "eval_on_each_dataset": "prepare.held_out_data may name several sets",
    "packing": "rows are packed where that is exact (train.rows)",
    "neat_packing": "rows are packed where that is exact (train.rows)",
    "train_on_prompt": "preference training never counts the prompt",
    "mask_history": "a preference pair has one answer, the last turn",
    "plot_loss": "`prefcache report` draws the curves",
    "compute_accuracy": "reward accuracy is always logged",
    "low_cpu_mem_usage": "weights are read from safetensors as they are needed",
    "enable_liger_kernel": "the head never builds the logits of all tokens, and train.fuse_kernels is on by default",
    "use_unsloth": "train.fuse_kernels is on by default",
    "use_unsloth_gc": "train.gradient_checkpointing recomputes layers",
    "disable_gradient_checkpointing": "train.gradient_checkpointing is off by default",
    "use_reentrant_gc": "layers are recomputed without changing gradients",
    "upcast_layernorm": "train.precision",
    "upcast_lmhead_output": "sums and logits are always float32",
    "use_kv_cache": "training needs no key-value cache",
    "use_v1_kernels": "train.fuse_kernels is on by default",
    "print_param_status": "train says what it trains",
    "double_quantization": "not used",
    "quantization_device_map": "accelerate sets up the processes",
    "offload_folder": "accelerate sets up the processes",
    "device_map": "accelerate sets up the processes",
    "compute_dtype": "train.precision",
    "model_max_length": "prepare.max_length",
    "include_effective_tokens_per_second": "tokens per second are logged",
    "create_new_adapter": "adapter_name_or_path is not set",
    "additional_target": "off",
    "ref_model_adapters": "ref_model is not set",
    "ref_model_quantization_bit": "ref_model is not set",
    "master_addr": "accelerate sets up the processes",
    "master_port": "accelerate sets up the processes",
    "block_diag_attn": "rows are packed where that is exact (train.rows)",
}
_PREFIXES = {
    "freeze_": "for finetuning_type: freeze",
    "oft_": "for finetuning_type: oft",
    "module_dropout": "for finetuning_type: oft",
    "ppo_": "for stage: ppo",
    "reward_model": "for stage: ppo",
    "galore_": "for use_galore",
    "apollo_": "for use_apollo",
    "badam_": "for use_badam",
    "swanlab_": "for use_swanlab",
    "pissa_": "for pissa_init",
    "image_": "messages are text",
    "video_": "messages are text",
    "audio_": "messages are text",
    "crop_to_patches": "messages are text",
    "use_audio_in_video": "messages are text",
    "export_": "for `llamafactory-cli export`",
    "infer_": "for inference",
    "vllm_": "for inference; score.vllm has the settings of score.engine: vllm",
    "sglang_": "for inference",
    "kt_": "for use_kt",
    "ray_": "score.ray scores with Ray",
    "fp8_": "for fp8",
    "profile": "`prefcache train --dry-run` estimates a step",
    "enable_torch_profiler": "`prefcache train --dry-run` estimates a step",
    "top_": "for generation",
    "temperature": "for generation",
    "num_beams": "for generation",
    "max_new_tokens": "train.sample_tokens",
    "max_length": "for generation",
    "sortish_sampler": "examples are shuffled",
    "generation_": "for generation",
    "do_sample": "for generation",
    "repetition_penalty": "for generation",
    "length_penalty": "for generation",
    "skip_special_tokens": "for generation",
    "hyper_parallel_": "for use_hyper_parallel",
    "eaft_": "for SFT",
    "asft_": "for SFT",
    "early_stopping_steps": "train.best.patience counts evaluations",
    "hf_hub_token": "`hf auth login` keeps the token",
    "ms_hub_token": "data and models come from the Hugging Face hub",
    "om_hub_token": "data and models come from the Hugging Face hub",
    "new_special_tokens_config": "for add_special_tokens",
    "init_special_tokens": "for add_special_tokens",
    "loraplus_lr_embedding": "for loraplus_lr_ratio",
    "buffer_size": "for streaming",
    "adapter_folder": "for several adapters",
    "quantization_": "score.quantization is 4bit or 8bit, by bitsandbytes",
}
_DIFFERS = {
    "streaming": "prepare reads all of the data once",
    "mix_strategy": "data sets are read one after another and shuffled; prepare.data has weight",
    "interleave_probs": "data sets are read one after another and shuffled; prepare.data has weight",
    "tool_format": "the chat template writes the tools",
    "default_system": "records without a system message get what the chat template gives them",
    "enable_thinking": "the tokenizer's own template is used as it is",
    "preserve_thinking": "the tokenizer's own template is used as it is",
    "resize_vocab": "the vocabulary stays as it is",
    "split_special_tokens": "special tokens are never split",
    "add_tokens": "no tokens are added; save the model with a tokenizer and embeddings that have them",
    "add_special_tokens": "no tokens are added; save the model with a tokenizer and embeddings that have them",
    "rope_scaling": "the model is loaded as it was saved",
    "shift_attn": "attention is the model's own",
    "mixture_of_depths": "the model is loaded as it was saved",
    "train_from_scratch": "the model is loaded as it was saved",
    "additional_target": "adapters only: no further weights are trained",
    "lora_dropout": hf_trainer.NO_DROPOUT,
    "loraplus_lr_ratio": "all of an adapter has one learning rate",
    "pissa_init": "the adapter starts at 0, in LoRA's own way",
    "use_galore": "train.optimizer is AdamW",
    "use_apollo": "train.optimizer is AdamW",
    "use_badam": "train.optimizer is AdamW",
    "use_adam_mini": "train.optimizer is AdamW",
    "use_muon": "train.optimizer is AdamW",
    "use_llama_pro": "all weights are trained, or an adapter",
    "use_mca": "train.shard: fsdp is the only way to share a model",
    "use_hyper_parallel": "train.shard: fsdp is the only way to share a model",
    "use_kt": "the model runs on one device, or sharded (train.shard)",
    "use_dft_loss": "it is a loss of SFT",
    "use_asft_loss": "it is a loss of SFT",
    "use_eaft_loss": "it is a loss of SFT",
    "use_swanlab": "train.report_to takes tensorboard, wandb, trackio",
    "disable_shuffling": "examples are shuffled; train.order_by changes that",
}
_READ_HERE = (
    *(
        "model_name_or_path",
        "model_revision",
        "adapter_name_or_path",
        "dataset",
        "eval_dataset",
        "val_size",
        "template",
    ),
    *("pref_ftx", "pref_bco_weight", "dpo_label_smoothing", "kto_chosen_weight", "kto_rejected_weight", "ld_alpha"),
    *(
        "ref_model",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "quantization_bit",
        "pure_bf16",
        "flash_attn",
        "quantization_method",
    ),
    *("quantization_type", *_SAME, *DEFAULTS, *_LORA_DEFAULTS),
)


def convert(given: Mapping[str, Any], folder: Path) -> Converted:
    if (stage := given.get("stage")) not in ("dpo", "kto"):
        kind = f"`stage: {stage}`" if stage else "no `stage:`, which is then sft"
        raise UsageError(f"found {kind}; expected stage to be dpo or kto, which prefcache trains.")
    is_lora = given.get("finetuning_type", "lora") == "lora"
    converted = Converted(LLAMAFACTORY, given, DEFAULTS | (_LORA_DEFAULTS if is_lora else {}))
    put_model(converted, "model_name_or_path", "model_revision")
    converted.became["stage"] = "train.loss"
    _convert_data(converted, folder)
    _convert_losses(converted)
    hf_trainer.convert_trainer(converted)
    if is_lora:
        _convert_lora(converted)
    elif given["finetuning_type"] == "full":
        converted.became["finetuning_type"] = "all weights are trained, without train.lora"
    else:
        converted.differs["finetuning_type"] = "all weights are trained; train.lora trains LoRA adapters"
    _convert_models(converted)
    _convert_tower(converted, is_lora)
    _convert_precision(converted, is_lora)
    converted.put_same(_SAME)
    hf_trainer.explain_trainer(converted, _IGNORED, _PREFIXES, _DIFFERS, _READ_HERE)
    return converted


# -- data ------------------------------------------------------------------------------------------------------------


def _convert_data(converted: Converted, folder: Path) -> None:
    given = converted.given
    is_kto = given["stage"] == "kto"
    # All of the answer counts, with what the template puts after it.
    converted.config["prepare"] = {"train_on": "all"}
    if is_kto:
        converted.config["prepare"]["examples"] = "labels"
    converted.put("(truncation)", "prepare.too_long", "keep_start")
    converted.differs["cutoff_len (long examples)"] = (
        "LLaMA-Factory cuts the ends of long prompts as well as those of answers; here the answers' ends alone are cut"
    )
    info = _read_info(converted, folder)
    if "dataset" in given and (found := _sources(converted, "dataset", info, is_kto)):
        converted.put("dataset", "prepare.data", found)
    if "eval_dataset" in given:
        if found := _sources(converted, "eval_dataset", info, is_kto):
            converted.put("eval_dataset", "prepare.held_out_data", found)
            converted.config["prepare"]["held_out"] = 0.0  # it trains on all of `dataset`
    else:
        put_share(converted, "val_size")
    _convert_template(converted)


def _read_info(converted: Converted, folder: Path) -> dict[str, Any] | None:
    """Read dataset_info.json: in the working folder, as LLaMA-Factory does, or next to the file. None if it is not here.

    Paths of data in it are relative to it, and so are those that are returned.
    """
    place = converted.text("dataset_dir") or "data"
    if place == "ONLINE":
        return {}
    file = next(
        (each / _DATASET_INFO for each in (Path(place), folder / place) if (each / _DATASET_INFO).is_file()), None
    )
    if file is None:
        return None
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}.") from None
    if not isinstance(info, dict) or not all(isinstance(entry, dict) for entry in info.values()):
        raise UsageError(f"{file}: expected names of data sets, each with a mapping such as {{file_name: pairs.json}}.")
    return {
        name: entry | ({"file_name": str(file.parent / entry["file_name"])} if "file_name" in entry else {})
        for name, entry in info.items()
    }


def _sources(converted: Converted, key: str, info: dict[str, Any] | None, is_kto: bool) -> list[dict[str, Any]]:
    names = converted.names(key)
    place = converted.given.get("dataset_dir", "data")
    if info is None:
        converted.differs[key] = (
            f"there is no {place}/{_DATASET_INFO} here, which says where {', '.join(names)} is; run this where you run "
            "llamafactory-cli, or set prepare.data"
        )
        return []
    found: list[dict[str, Any]] = []
    for name in names:
        if place == "ONLINE":
            found.append({"hub": name})
        elif name not in info:
            raise UsageError(
                f"{key}: there is no {name!r} in {place}/{_DATASET_INFO}. It has: {', '.join(sorted(info)) or 'nothing'}."
            )
        elif (entry := _source_of(converted, name, info[name], is_kto)) is not None:
            found.append(entry)
    return found


def _source_of(converted: Converted, name: str, entry: Mapping[str, Any], is_kto: bool) -> dict[str, Any] | None:
    """Turn an entry of dataset_info.json into a source: where it is, its format and its columns."""
    if "hf_hub_url" in entry:
        more = {"name": entry.get("subset"), "split": entry.get("split")}
        found = {"hub": entry["hf_hub_url"]} | {key: value for key, value in more.items() if value}
    elif "file_name" in entry:
        found = {"path": entry["file_name"]}
    else:
        place = next((key for key in entry if key.endswith(("_url", "cloud_file_name"))), "nothing")
        converted.differs[f"dataset {name}"] = (
            f"it is at {place}; data comes from files and the Hugging Face hub. Set prepare.data"
        )
        return None
    if not (entry.get("columns", {}).get("kto_tag") if is_kto else entry.get("ranking")):
        wanted = "a column kto_tag" if is_kto else "ranking: true"
        converted.differs[f"dataset {name}"] = f"it has no preferences: dataset_info.json gives it no {wanted}"
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _FORMATS:
        raise UsageError(f"dataset {name}: formatting is {formatting!r}, expected one of {', '.join(_FORMATS)}.")
    found["format"] = _FORMATS[formatting][is_kto]
    known = _OPENAI_COLUMNS if formatting == "openai" else _COLUMNS
    renamed = {known[theirs]: data for theirs, data in entry.get("columns", {}).items() if theirs in known and data}
    if columns := {ours: data for ours, data in renamed.items() if ours != data}:
        found["columns"] = columns
    if media := [theirs for theirs in entry.get("columns", {}) if theirs not in known]:
        converted.differs[f"dataset {name}: {', '.join(media)}"] = "messages are text"
    if strange := {tag: value for tag, value in entry.get("tags", {}).items() if value not in _TAGS.get(tag, ())}:
        converted.differs[f"dataset {name}: tags"] = (
            f"{', '.join(f'{tag} {value}' for tag, value in strange.items())}: the format reads {{from, value}} and {{role, content}} "
            "with the usual roles"
        )
    if entry.get("num_samples"):
        found["max_records"] = entry["num_samples"]
        converted.differs[f"dataset {name}: num_samples"] = "the first ones are read, not random ones"
    if entry.get("folder"):
        converted.differs[f"dataset {name}: folder"] = "the data set is read without it"
    return found


def _convert_template(converted: Converted) -> None:
    template = converted.given.get("template")
    if template == "empty":
        converted.put("template", "prepare.template", "none")
    elif template is not None:
        converted.differs["template"] = (
            f"the tokenizer's own chat template is used; where LLaMA-Factory's {template} differs from it, so do the tokens. Compare "
            "them with `prefcache preview`, or set prepare.chat_template"
        )


# -- training --------------------------------------------------------------------------------------------------------


def _convert_losses(converted: Converted) -> None:
    given = converted.given
    if given["stage"] == "kto":
        converted.put("stage", "train.loss", "kto")
        for key, ours in (("kto_chosen_weight", "desirable_weight"), ("kto_rejected_weight", "undesirable_weight")):
            if key in given:
                converted.put(key, f"train.loss_args.{ours}", given[key])
        if given.get("pref_ftx"):
            converted.differs["pref_ftx"] = "the likelihood of desirable answers is not trained next to kto"
        return
    name = str(converted.text("pref_loss"))
    if name not in _LOSSES:
        raise UsageError(f"pref_loss: found {name!r}, expected one of {', '.join(_LOSSES)}.")
    weights = {name: 1.0}
    if (bco := converted.number("pref_bco_weight", 0.0)) > 1e-6:
        weights = {name: 1 / (1 + bco), "bco_pair": bco / (1 + bco)}
        converted.note(["pref_bco_weight"], "train.loss: the weight of bco_pair")
        converted.differs["pref_bco_weight (shift)"] = (
            "bco_pair has no reward shift; LLaMA-Factory's is the running mean of rewards"
        )
    if (ftx := converted.number("pref_ftx", 0.0)) > 1e-6:
        weights["sft"] = float(ftx)
        converted.note(["pref_ftx"], "train.loss: the weight of sft")
    converted.put("pref_loss", "train.loss", name if len(weights) == 1 else weights)
    if name == "sigmoid" and given.get("dpo_label_smoothing"):
        key = "sigmoid.label_smoothing" if len(weights) > 1 else "label_smoothing"
        converted.config["train"].setdefault("loss_args", {})[key] = given["dpo_label_smoothing"]
        converted.became["dpo_label_smoothing"] = f"train.loss_args.{key}: {given['dpo_label_smoothing']}"
    if name == "simpo":
        converted.put("simpo_gamma", "train.loss_args.gamma", converted.get("simpo_gamma"))
    if name == "orpo":
        converted.differs["(likelihood)"] = (
            "LLaMA-Factory averages it per pair, orpo here over the batch's answer tokens"
        )
    if given.get("ld_alpha") is not None:
        converted.put("ld_alpha", "train.tokens.ld_alpha", given["ld_alpha"])
        converted.config["train"]["tokens"]["ld_alpha_of"] = "policy"  # the reference's tokens keep weight 1 there


def _convert_lora(converted: Converted) -> None:
    given = converted.given
    converted.config.setdefault("train", {})["lora"] = {}
    converted.put("finetuning_type", "train.lora", {})
    rank = int(converted.number("lora_rank"))
    converted.put("lora_rank", "train.lora.r", rank)
    converted.put(
        "lora_alpha" if given.get("lora_alpha") else "lora_alpha (default: 2 * rank)",
        "train.lora.alpha",
        given.get("lora_alpha") or 2 * rank,
    )
    names = converted.names("lora_target")
    converted.put("lora_target", "train.lora.target_modules", ["all-linear"] if names == ["all"] else names)
    for key, ours in (("use_dora", "dora"), ("use_rslora", "rslora")):
        if given.get(key):
            converted.put(key, f"train.lora.{ours}", True)


def _convert_models(converted: Converted) -> None:
    """Say where the policy starts and what the reference is, which may be two models."""
    given = converted.given
    bits, method = converted.number("quantization_bit", 0), converted.text("quantization_method") or "bnb"
    if bits in (4, 8) and method in ("bnb", "bitsandbytes"):
        converted.put("quantization_bit", "score.quantization", f"{bits:g}bit")
        converted.note(["quantization_method"], "score.quantization")
    elif bits:
        converted.differs["quantization_bit"] = "score.quantization is 4bit or 8bit, by bitsandbytes"
    adapters = converted.names("adapter_name_or_path")
    if given.get("ref_model"):
        converted.put("model_name_or_path", "train.model", given["model_name_or_path"])
        converted.put("ref_model", "model", given["ref_model"])
        if given.get("ref_model_adapters"):
            converted.put("ref_model_adapters", "adapter", given["ref_model_adapters"])
    if len(adapters) > 1:
        converted.differs["adapter_name_or_path"] = (
            "several adapters: merge all but the last with `prefcache merge`, and name it as model"
        )
    elif adapters and (given.get("create_new_adapter") or "lora" not in converted.config["train"]):
        converted.differs["adapter_name_or_path"] = (
            "LLaMA-Factory merges it into policy and reference first; do so with `prefcache merge`, and name the result as model"
        )
    elif adapters:  # trained further, against the model without it
        converted.put("adapter_name_or_path", "train.model", adapters[0])


def _convert_tower(converted: Converted, is_lora: bool) -> None:
    """Say what becomes of a vision tower and its projector, which are frozen by default in both programs."""
    given, keys = converted.given, ("freeze_vision_tower", "freeze_multi_modal_projector")
    frozen = {key: given.get(key) is not False for key in keys}
    for key in keys:
        if key not in given:
            continue
        if frozen[key]:
            converted.became[key] = "train.vision: frozen"
        elif is_lora:
            converted.differs[key] = "an adapter leaves the vision tower as it is (train.vision is frozen)"
        elif not any(frozen.values()):
            converted.put(key, "train.vision", "trained")
        else:
            converted.differs[key] = (
                "the vision tower is trained with its projector or not at all: train.vision is frozen or trained"
            )
    if given.get("freeze_language_model"):
        converted.differs["freeze_language_model"] = "the language model is always trained"


def _convert_precision(converted: Converted, is_lora: bool) -> None:
    given = converted.given
    if given.get("pure_bf16") and not is_lora:
        converted.put("pure_bf16", "train.weights", "bfloat16")
        converted.note(["bf16"], "train.weights: bfloat16")
    elif given.get("bf16") or given.get("pure_bf16"):
        hf_trainer.put_bf16(converted)
        if is_lora:  # the frozen weights are loaded in it
            converted.put("pure_bf16" if given.get("pure_bf16") else "bf16", "train.lora.base_dtype", "bfloat16")
    if (attention := converted.text("flash_attn")) in _ATTENTION:
        converted.put("flash_attn", "score.attention", _ATTENTION[attention])
    elif attention is not None:
        converted.ignored["flash_attn"] = "score.attention is sdpa, eager or flash_attention_2"
