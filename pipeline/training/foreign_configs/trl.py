"""TRL's settings, as `trl dpo --config` and `trl kto --config` take them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefcache.pipeline.foreign_programs import TRL
from prefcache.pipeline.training.foreign_configs import hf_trainer
from prefcache.pipeline.training.foreign_configs.converted import (
    Converted,
    put_kto,
    put_losses,
    put_model,
    put_share,
    sources,
)

# theirs -> ours, with the same value.
_SAME = {
    "output_dir": "out",
    "max_length": "prepare.max_length",
    "max_prompt_length": "prepare.max_prompt_length",
    "truncation_mode": "prepare.too_long",
    "dataset_num_proc": "prepare.workers",
    "attn_implementation": "score.attention",
    "beta": "train.beta",
    "ld_alpha": "train.tokens.ld_alpha",
    "router_aux_loss_coef": "train.router_aux_loss",
}
_LOSS_ARGUMENTS = {
    "label_smoothing": "label_smoothing",
    "f_divergence_type": "f_divergence",
    "f_alpha_divergence_coef": "f_alpha",
    "discopop_tau": "tau",
    "desirable_weight": "desirable_weight",
    "undesirable_weight": "undesirable_weight",
}
_READ_BY = {
    # TRL reads these for the given losses only.
    "label_smoothing": ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
    "desirable_weight": ("kto", "apo_zero_unpaired"),
    "undesirable_weight": ("kto", "apo_zero_unpaired"),
}
_LORA = {
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
_MOVING = {"ref_model_sync_steps": "every", "ref_model_mixup_alpha": "alpha"}
# TRL's defaults that change a result.
DEFAULTS = hf_trainer.DEFAULTS | {
    "beta": 0.1,
    "loss_type": "sigmoid",
    "learning_rate": 1e-6,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "ref_model_sync_steps": 512,
    "ref_model_mixup_alpha": 0.6,
}
_LORA_DEFAULTS = {"lora_r": 16, "lora_alpha": 32}
# What TRL does with an adapter unless the file says otherwise.
_LORA_DIFFERS = {
    "lora_dropout": hf_trainer.NO_DROPOUT,
    "lora_target_modules": "every linear layer is adapted; PEFT takes some by architecture (q_proj and v_proj of a Llama)",
}
_IGNORED = {
    "precompute_ref_log_probs": "the reference is always run once, before training",
    "precompute_ref_batch_size": "scoring packs rows by tokens (score.tokens_per_batch)",
    "padding_free": "rows are never padded",
    "pad_to_multiple_of": "rows are never padded",
    "pad_token": "rows are never padded",
    "disable_dropout": "the policy always trains without dropout",
    "activation_offloading": "train.offload: activations moves the inputs of recomputed layers (train.gradient_checkpointing)",
    "lora_task_type": "always CAUSAL_LM",
    "dataset_test_split": "nothing is evaluated (eval_strategy: no)",
    "bnb_4bit_quant_type": "nf4, always",
    "bnb_4bit_quant_storage": "not used",
    "use_bnb_nested_quant": "not used",
    "ignore_bias_buffers": "accelerate sets up the processes",
    "accelerate_config": "`accelerate launch` starts several processes of `prefcache train`",
    "num_processes": "`accelerate launch` starts several processes of `prefcache train`",
}
_DIFFERS = {
    "lora_modules_to_save": "adapters only: no further weights are trained",
    "lora_dropout": hf_trainer.NO_DROPOUT,
    "dataset_streaming": "prepare reads all of the data once",
    "streaming": "prepare reads all of the data once",
    "model_init_kwargs": "the model is loaded as it was saved; see score.dtype and score.attention",
    "eval_dataset": "TRL's command has no such key; prepare.held_out_data takes evaluation data",
    "assistant_only_loss": "it is SFT's; DPO and KTO in TRL train on all tokens after the prompt, and so does train_on: all",
    "completion_only_loss": "it is SFT's; only tokens after the prompt are trained on",
}
_READ_HERE = (
    "model_name_or_path", "model_revision", "datasets", "dataset_name", "dataset_config", "dataset_train_split", "test_split_size",
    "loss_weights", "use_peft", "use_weighting", "load_in_4bit", "load_in_8bit", "sync_ref_model", "dtype", "torch_dtype", *_SAME,
    *_LOSS_ARGUMENTS, *_LORA, *_MOVING, *DEFAULTS,
)  # fmt: skip


def convert(given: Mapping[str, Any], folder: Path) -> Converted:
    is_kto = "loss_type" not in given and {"desirable_weight", "undesirable_weight"} & given.keys()
    defaults = DEFAULTS | ({"loss_type": "kto"} if is_kto else {}) | (_LORA_DEFAULTS if given.get("use_peft") else {})
    converted = Converted(TRL, given, defaults)
    put_model(converted, "model_name_or_path", "model_revision")
    _convert_data(converted)
    losses = _convert_losses(converted)
    hf_trainer.convert_trainer(converted)
    hf_trainer.put_bf16(converted)
    if given.get("use_peft"):
        converted.config.setdefault("train", {})["lora"] = {}
        converted.became["use_peft"] = "train.lora"
        converted.put_same({key: f"train.lora.{ours}" for key, ours in _LORA.items()})
        converted.differs |= {f"{key} (default)": why for key, why in _LORA_DIFFERS.items() if key not in given}
    _convert_dtype(converted)
    if given.get("sync_ref_model"):
        converted.became["sync_ref_model"] = "train.moving_reference"
        converted.put_same({key: f"train.moving_reference.{ours}" for key, ours in _MOVING.items()})
    converted.put_same(_SAME)
    converted.put_same(
        {key: f"train.loss_args.{ours}" for key, ours in _LOSS_ARGUMENTS.items() if _applies(key, converted, losses)}
    )
    hf_trainer.explain_trainer(converted, _IGNORED, {}, _DIFFERS, _READ_HERE)
    return converted


def _convert_data(converted: Converted) -> None:
    given = converted.given
    converted.config["prepare"] = {"train_on": "all"}  # TRL counts every token after the prompt
    if entries := converted.mappings("datasets"):
        converted.put("datasets", "prepare.data", [each for entry in entries for each in _sources_of(converted, entry)])
        more = sorted({key for entry in entries for key in entry} - {"path", "name", "split"})
        converted.differs |= {f"datasets[].{key}": "prepare.data has weight and max_records" for key in more}
    elif "dataset_name" in given:
        converted.put("dataset_name", "prepare.data", _sources_of_split(converted, "dataset_train_split", "train"))
        converted.note(["dataset_config", "dataset_train_split"], "prepare.data")
    _convert_evaluation_data(converted)
    for key, bits in (("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")):
        if given.get(key):
            converted.put(key, "score.quantization", bits)


def _sources_of(converted: Converted, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    return sources(converted, "datasets", entry.get("path"), entry.get("name"), entry.get("split"))


def _sources_of_split(converted: Converted, key: str, default: str) -> list[dict[str, Any]]:
    given = converted.given
    return sources(converted, key, given["dataset_name"], given.get("dataset_config"), given.get(key, default))


def _convert_evaluation_data(converted: Converted) -> None:
    given = converted.given
    if "test_split_size" in given or not hf_trainer.evaluates(converted):
        put_share(converted, "test_split_size")
    elif "dataset_name" in given and not Path(str(given["dataset_name"])).is_file():
        test = _sources_of_split(converted, "dataset_test_split", "test")
        converted.put("dataset_test_split", "prepare.held_out_data", test)
        converted.config["prepare"]["held_out"] = 0.0  # TRL trains on all of the other split


def _convert_losses(converted: Converted) -> list[str]:
    given = converted.given
    names = converted.names("loss_type")
    put_losses(converted, names, "loss_type", "loss_weights")
    if "loss_type" not in given and names == ["sigmoid"]:
        converted.became["loss_type (default)"] += " (of DPO; for `trl kto`, add loss_type: kto to the file)"
    if given.get("use_weighting"):
        converted.put("use_weighting", "train.weighting", "wpo")
    if "kto" in names:
        put_kto(converted, "per_device_train_batch_size")
    elif "apo_zero_unpaired" in names:
        converted.config["prepare"]["examples"] = "labels"
    return names


def _convert_dtype(converted: Converted) -> None:
    for key in ("dtype", "torch_dtype"):
        dtype = converted.given.get(key)
        if dtype == "bfloat16":
            ours = "train.lora.base_dtype" if converted.get("use_peft") else "train.weights"
            converted.put(key, ours, "bfloat16")
        elif dtype == "auto":
            converted.differs[key] = (
                "trained weights are float32; for a model saved in bfloat16, set train.weights: bfloat16 to train as TRL does"
            )
        elif dtype == "float16":
            converted.differs[key] = "trained weights are float32, or bfloat16 (train.weights)"


def _applies(key: str, converted: Converted, losses: list[str]) -> bool:
    """Whether TRL reads an argument of a loss, given its other settings."""
    if key in _READ_BY and not set(losses) & set(_READ_BY[key]):
        return False
    if key == "label_smoothing":
        return bool(converted.get(key))
    if key == "f_divergence_type":
        return bool(converted.get(key) != "reverse_kl")
    return key != "f_alpha_divergence_coef" or converted.get("f_divergence_type") == "alpha_divergence"
