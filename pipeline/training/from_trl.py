"""TRL's DPO and KTO settings as a config of ours, and a word on every key: what it became, or why it has no meaning here.

Where a file leaves out what would change a result, TRL's default is written down, since ours may differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import validated
from pipeline.errors import UsageError
from pipeline.training.objective import Objective

# theirs -> ours, where the value is the same.
_SAME = {
    "model_name_or_path": "model",
    "model_revision": "revision",
    "output_dir": "out",
    "max_length": "prepare.max_length",
    "max_prompt_length": "prepare.max_prompt_length",
    "truncation_mode": "prepare.too_long",
    "dataset_num_proc": "prepare.workers",
    "attn_implementation": "score.attention",
    "beta": "train.beta",
    "label_smoothing": "train.loss_args.label_smoothing",
    "f_divergence_type": "train.loss_args.f_divergence",
    "f_alpha_divergence_coef": "train.loss_args.f_alpha",
    "discopop_tau": "train.loss_args.tau",
    "desirable_weight": "train.loss_args.desirable_weight",
    "undesirable_weight": "train.loss_args.undesirable_weight",
    "ld_alpha": "train.tokens.ld_alpha",
    "learning_rate": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "warmup_ratio": "train.warmup_ratio",
    "adam_epsilon": "train.eps",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "router_aux_loss_coef": "train.router_aux_loss",
    "seed": "train.seed",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "gradient_checkpointing": "train.gradient_checkpointing",
}
_LORA = {
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_target_modules": "target_modules",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
# What TRL does where its file says nothing, of what would change a result.
_DEFAULTS = {
    "beta": 0.1,
    "loss_type": "sigmoid",
    "learning_rate": 1e-6,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "warmup_ratio": 0.0,
    "lr_scheduler_type": "linear",
    "seed": 42,
    "ref_model_sync_steps": 512,
    "ref_model_mixup_alpha": 0.6,
}
_SWITCHES = {
    "use_peft",
    "use_weighting",
    "load_in_4bit",
    "load_in_8bit",
    "bf16",
    "load_best_model_at_end",
    "sync_ref_model",
}
_OF_BEST = {"metric_for_best_model", "greater_is_better"}
_MOVING = {"ref_model_sync_steps": "every", "ref_model_mixup_alpha": "alpha"}
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "adamw_torch_4bit": "adamw_4bit",
}
_LOSS_ARGUMENTS = {
    # Of these losses only; TRL reads them for no other.
    "label_smoothing": ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
    "desirable_weight": ("kto", "apo_zero_unpaired"),
    "undesirable_weight": ("kto", "apo_zero_unpaired"),
}
_IGNORED = {
    "precompute_ref_log_probs": "the reference is always run once, before training",
    "precompute_ref_batch_size": "scoring packs rows by tokens (score.tokens_per_batch)",
    "per_device_eval_batch_size": "rows are packed by tokens (train.tokens_per_micro_batch)",
    "padding_free": "rows are never padded",
    "pad_to_multiple_of": "rows are never padded",
    "pad_token": "rows are never padded",
    "disable_dropout": "the policy trains without dropout always",
    "remove_unused_columns": "prepare keeps what it needs",
    "gradient_checkpointing_kwargs": "layers are recomputed in the one way that keeps gradients the same",
    "activation_offloading": "not here; see train.gradient_checkpointing",
    "use_liger_kernel": "the head never builds the logits of all tokens",
    "logging_steps": "every step is logged",
    "logging_first_step": "every step is logged",
    "logging_strategy": "every step is logged",
    "eval_strategy": "train.eval_every says when",
    "save_strategy": "train.checkpoint_every says when",
    "report_to": "metrics go to Parquet (prefcache sql), and to what train.report_to names",
    "fsdp": "train.shard: fsdp shards the model where it has to be",
    "fsdp_config": "train.shard: fsdp shards the model where it has to be",
    "deepspeed": "train.shard: fsdp shards what ZeRO 3 does",
    "run_name": "train.run names a run",
    "do_train": "each stage is a command",
    "do_eval": "each stage is a command",
    "overwrite_output_dir": "a finished run of other settings is moved aside",
    "bf16_full_eval": "evaluation computes as training does",
    "tf32": "not set here",
    "torch_compile": "layers are not compiled; their values would be the same",
    "dtype": "score.dtype is the reference's; what is trained is float32",
    "torch_dtype": "score.dtype is the reference's; what is trained is float32",
    "lora_dropout": "adapters train without dropout, so that the margin starts at 0",
    "lora_task_type": "always CAUSAL_LM",
    "dataset_test_split": "prepare.held_out keeps a share of the prompts for evaluation",
    "bnb_4bit_quant_type": "nf4, always",
    "use_bnb_nested_quant": "not used",
}
_PREFIXES = {
    "dataloader_": "pairs are read from memory-mapped Arrow",
    "hub_": "`prefcache push` sends a finished run's model to the hub",
    "push_to_hub": "`prefcache push` sends a finished run's model to the hub",
}
_CANNOT = {
    "trust_remote_code": "no remote code is run",
    "fp16": "training is in float32 or bf16",
    "lora_modules_to_save": "adapters only: no further weights are trained",
    "dataset_streaming": "prepare reads all of the data once",
}


@dataclass
class Converted:
    config: dict[str, Any] = field(default_factory=dict)  # a tree, as its YAML
    became: dict[str, str] = field(default_factory=dict)  # theirs -> our key and value
    ignored: dict[str, str] = field(default_factory=dict)  # theirs -> why it has no meaning here
    cannot: dict[str, str] = field(default_factory=dict)  # theirs -> what will differ

    def put(self, theirs: str, ours: str, value: Any) -> None:
        tree = self.config
        *sections, last = ours.split(".")
        for section in sections:
            tree = tree.setdefault(section, {})
        tree[last] = value
        self.became[theirs] = f"{ours}: {value}"


def convert(theirs: Mapping[str, Any]) -> Converted:
    """A file of TRL's as ours. UsageError where it names a loss that there is not."""
    said = {key: value for key, value in theirs.items() if value is not None}
    given = _DEFAULTS | said
    found = Converted()
    _model_and_data(given, found)
    _losses(given, found)
    _batches(given, said, found)
    _best(said, found)
    _optimizer(given, found)
    _adapter(given, found)
    _moving_reference(given, found)
    for key, ours in _SAME.items():
        if key in given and key not in found.became and _applies(key, given, found):
            found.put(key, ours, given[key])
    for key in said:
        if key not in found.became:
            _left_over(key, said[key], found)
    return found


def _applies(key: str, given: Mapping[str, Any], found: Converted) -> bool:
    losses = _names(given)
    if key in _LOSS_ARGUMENTS and not set(losses) & set(_LOSS_ARGUMENTS[key]):
        return False
    if key == "label_smoothing" and not given[key]:
        return False
    if key == "f_divergence_type":
        return bool(given[key] != "reverse_kl")
    if key == "f_alpha_divergence_coef":
        return given.get("f_divergence_type") == "alpha_divergence"
    return key != "max_prompt_length" or given[key] is not None


def _names(given: Mapping[str, Any]) -> list[str]:
    kinds = given["loss_type"]
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _model_and_data(given: Mapping[str, Any], found: Converted) -> None:
    if given.get("datasets"):
        sources = [_source(each.get("path"), each.get("name"), each.get("split")) for each in given["datasets"]]
        found.put("datasets", "prepare.data", sources)
    elif "dataset_name" in given:
        split = given.get("dataset_train_split")
        found.put("dataset_name", "prepare.data", [_source(given["dataset_name"], given.get("dataset_config"), split)])
        for key in ("dataset_config", "dataset_train_split"):
            if key in given:
                found.became[key] = "prepare.data"
    for key, bits in (("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")):
        if given.get(key):
            found.put(key, "score.quantization", bits)


def _source(name: Any, subset: Any, split: Any) -> dict[str, Any]:
    """TRL looks for a folder first and on the hub then, as our plain strings do; with a subset or split it is the hub's."""
    if subset is None and split in (None, "train"):
        return {"path": name}
    return {"hub": name, **({"name": subset} if subset else {}), **({"split": split} if split else {})}


def _losses(given: Mapping[str, Any], found: Converted) -> None:
    names = _names(given)
    weights = given.get("loss_weights") or [1.0] * len(names)
    if len(weights) != len(names):
        raise UsageError(f"loss_weights has {len(weights)} values for {len(names)} losses. Give one for each.")
    loss = names[0] if len(names) == 1 else dict(zip(names, map(float, weights), strict=True))
    found.put("loss_type", "train.loss", loss)
    if "loss_weights" in given:
        found.became["loss_weights"] = "train.loss"
    if given.get("use_weighting"):
        found.put("use_weighting", "train.weighting", "wpo")
    if "kto" in names or "apo_zero_unpaired" in names:
        found.config.setdefault("prepare", {})["examples"] = "labels"


def _batches(given: Mapping[str, Any], said: Mapping[str, Any], found: Converted) -> None:
    of_device, times = int(given["per_device_train_batch_size"]), int(given["gradient_accumulation_steps"])
    found.put("per_device_train_batch_size", "train.batch_size", of_device * times)
    found.became["gradient_accumulation_steps"] = (
        "train.batch_size, which is over all processes: multiply it by their number"
    )
    if isinstance(warmup := said.get("warmup_steps"), int | float):
        # Below 1 it is a share of all steps.
        if warmup < 1:
            found.put("warmup_steps", "train.warmup_ratio", float(warmup))
            found.became["warmup_ratio"] = "train.warmup_ratio"
        else:
            found.cannot["warmup_steps"] = "the warm-up is a share of all steps; set train.warmup_ratio"
    if isinstance(steps := said.get("eval_steps"), int):
        found.put("eval_steps", "train.eval_every", steps)
    for key in ("save_steps", "save_total_limit"):
        if key in said and not (isinstance(said[key], int) and said[key] > 0):
            found.ignored[key] = "a number of steps or of checkpoints is expected; ours is the default"
    if said.get("bf16"):
        found.put("bf16", "train.precision", "bf16")


def _best(said: Mapping[str, Any], found: Converted) -> None:
    if not said.get("load_best_model_at_end"):
        return
    if "eval_steps" not in found.became:
        found.cannot["load_best_model_at_end"] = (
            "evaluations are some steps apart; set train.eval_every, and train.best"
        )
        return
    best = {"metric": said.get("metric_for_best_model", "loss")}
    if "greater_is_better" in said:
        best["greater_is_better"] = said["greater_is_better"]
    found.put("load_best_model_at_end", "train.best", best)
    found.became |= dict.fromkeys(_OF_BEST & said.keys(), "train.best")


def _optimizer(given: Mapping[str, Any], found: Converted) -> None:
    for key, ours, known in (
        ("lr_scheduler_type", "train.scheduler", _SCHEDULERS),
        ("optim", "train.optimizer", _OPTIMIZERS),
    ):
        if given.get(key) in known:
            found.put(key, ours, known[given[key]])
        elif key in given:
            found.cannot[key] = f"there is {', '.join(dict.fromkeys(known.values()))} ({ours})"
    if given["lr_scheduler_type"] == "constant":
        found.put("warmup_ratio", "train.warmup_ratio", 0.0)  # which TRL does not read then
    betas = {"adam_beta1": 0.9, "adam_beta2": 0.999}
    if said := [key for key in betas if key in given]:
        for key in said:
            found.put(key, "train.betas", [given.get(name, own) for name, own in betas.items()])


def _adapter(given: Mapping[str, Any], found: Converted) -> None:
    if not given.get("use_peft"):
        return
    found.config.setdefault("train", {})["lora"] = {}
    found.became["use_peft"] = "train.lora"
    for key, ours in _LORA.items():
        if key in given:
            value = given[key]
            found.put(key, f"train.lora.{ours}", value)


def _moving_reference(given: Mapping[str, Any], found: Converted) -> None:
    if given.get("sync_ref_model"):
        found.became["sync_ref_model"] = "train.moving_reference"
        for key, ours in _MOVING.items():
            found.put(key, f"train.moving_reference.{ours}", given[key])


def _left_over(key: str, value: Any, found: Converted) -> None:
    if key in found.ignored or key in found.cannot:
        return
    prefix = next((each for each in _PREFIXES if key.startswith(each)), None)
    if key in _CANNOT:
        if value not in (False, 0, None, []):
            found.cannot[key] = _CANNOT[key]
    elif key in _IGNORED or prefix:
        found.ignored[key] = _IGNORED.get(key) or _PREFIXES[str(prefix)]
    elif key in {*_SAME, *_LORA, *_OF_BEST, *_MOVING, *_SWITCHES}:
        found.ignored[key] = "it is the default, or not read by this loss"
    else:
        found.cannot[key] = "not known here"


def check(found: Converted) -> None:
    """That what was made is a config that trains, but for what the file could not say."""
    tree = {"model": "model", "out": "out", **found.config}
    tree["prepare"] = {"data": ["data"], **tree.get("prepare", {})}
    Objective(validated(tree, "As a config of ours: ").train)
