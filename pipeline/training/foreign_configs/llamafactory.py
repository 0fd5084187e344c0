"""LLaMA-Factory's settings, of its stages dpo and kto, and the dataset_info.json that says where its data is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.foreign_programs import LLAMAFACTORY
from prefcache.pipeline.training.foreign_configs import hf_trainer
from prefcache.pipeline.training.foreign_configs import llamafactory_keys as keys
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
_READ_HERE = (
    "model_name_or_path", "model_revision", "adapter_name_or_path", "dataset", "eval_dataset", "val_size", "template", "pref_ftx",
    "pref_bco_weight", "dpo_label_smoothing", "kto_chosen_weight", "kto_rejected_weight", "ld_alpha", "ref_model", "lora_alpha",
    "use_rslora", "use_dora", "quantization_bit", "pure_bf16", "flash_attn", "quantization_method", "quantization_type", *_SAME,
    *DEFAULTS, *_LORA_DEFAULTS,
)  # fmt: skip


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
    hf_trainer.explain_trainer(converted, keys.IGNORED, keys.PREFIXES, keys.DIFFERS, _READ_HERE)
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
