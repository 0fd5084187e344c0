"""Convert TRL's DPO and KTO settings into a config of ours, and account for every key: what it became, or why it has no meaning here.

Where a file leaves out what would change a result, TRL's default is written down, since ours may differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from prefcache.pipeline.config import OWN_SET, Tracker
from prefcache.pipeline.config_file import validate
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.training.objective import Objective

# Sections of our configs; TRL's files are flat.
_SECTIONS = ("prepare", "score", "train")
# theirs -> ours, with the same value.
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
    "max_steps": "train.max_steps",
    "warmup_ratio": "train.warmup_ratio",
    "adam_epsilon": "train.eps",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "router_aux_loss_coef": "train.router_aux_loss",
    "seed": "train.seed",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "torch_compile": "train.compile",
}
_LORA = {
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
# TRL's defaults that change a result.
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
_BEST = {"metric_for_best_model", "greater_is_better"}
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
    # TRL reads these for the given losses only.
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
    "disable_dropout": "the policy always trains without dropout",
    "remove_unused_columns": "prepare keeps what it needs",
    "gradient_checkpointing_kwargs": "layers are recomputed without changing gradients",
    "activation_offloading": "train.offload: activations moves the inputs of recomputed layers (train.gradient_checkpointing)",
    "use_liger_kernel": "the head never builds the logits of all tokens, and train.fuse_kernels is on by default",
    "logging_steps": "every step is logged",
    "logging_first_step": "every step is logged",
    "logging_strategy": "every step is logged",
    "eval_strategy": "train.eval_every says when",
    "save_strategy": "train.checkpoint_every says when",
    "fsdp": "train.shard: fsdp shards the model if it must be",
    "fsdp_config": "train.shard: fsdp shards the model if it must be",
    "deepspeed": "train.shard: fsdp shards what ZeRO 3 does",
    "run_name": "train.run names a run",
    "do_train": "each stage is a command",
    "do_eval": "each stage is a command",
    "overwrite_output_dir": "a finished run with other settings is renamed",
    "bf16_full_eval": "evaluation computes as training does",
    "tf32": "not set here",
    "dtype": "score.dtype is the reference's; what is trained is float32, or bfloat16 (train.weights)",
    "torch_dtype": "score.dtype is the reference's; what is trained is float32, or bfloat16 (train.weights)",
    "lora_dropout": "adapters train without dropout, so that the margin starts at 0",
    "lora_task_type": "always CAUSAL_LM",
    "dataset_test_split": "nothing is evaluated (eval_strategy: no); here prepare.held_out keeps a share of the prompts for it",
    "bnb_4bit_quant_type": "nf4, always",
    "use_bnb_nested_quant": "not used",
}
_PREFIXES = {
    "dataloader_": "pairs are read from memory-mapped Arrow",
    "hub_": "`prefcache push` sends a finished run's model to the hub",
    "push_to_hub": "`prefcache push` sends a finished run's model to the hub",
}
_CANNOT = {
    "trust_remote_code": "remote code is never run",
    "fp16": "training is in float32 or bf16",
    "lora_modules_to_save": "adapters only: no further weights are trained",
    "dataset_streaming": "prepare reads all of the data once",
}


@dataclass
class Converted:
    config: dict[str, Any] = field(default_factory=dict)  # a tree, as in its YAML
    became: dict[str, str] = field(default_factory=dict)  # theirs -> our key and value
    ignored: dict[str, str] = field(default_factory=dict)  # theirs -> why it has no meaning here
    cannot: dict[str, str] = field(default_factory=dict)  # theirs -> what will differ

    @property
    def data_paths(self) -> tuple[str, ...]:
        """The files or folders of data that the file names."""
        sources = self.config.get("prepare", {}).get("data", [])
        return tuple(str(source["path"]) for source in sources if "path" in source)

    def put(self, theirs: str, ours: str, value: Any) -> None:
        tree = self.config
        *sections, last = ours.split(".")
        for section in sections:
            tree = tree.setdefault(section, {})
        tree[last] = value
        self.became[theirs] = f"{ours}: {value}"

    def put_template(self, is_text: bool | None) -> None:
        """Say whether the data gets the chat template: TRL takes text as it is. None: the data is not here to be looked at."""
        if is_text:
            self.put("(the data is text)", "prepare.template", "none")
        elif is_text is None and "data" in self.config["prepare"]:
            self.cannot["(the data)"] = (
                "where it is text and not messages, TRL applies no template; set prepare.template: none"
            )

    def check(self) -> None:
        """Check that this is a config that trains, apart from what the file cannot say."""
        tree = {"model": "model", "out": "out", **self.config}
        tree["prepare"] = {"data": ["data"], **tree.get("prepare", {})}
        Objective(validate(tree, "As a config of ours: ").train)


def convert(theirs: Mapping[str, Any], name: str = "The file") -> Converted:
    """Convert a TRL file; refuse one that is already a prefcache config."""
    if sections := [key for key in _SECTIONS if isinstance(theirs.get(key), Mapping)]:
        raise UsageError(
            f"{name} is already a prefcache config: it has {', '.join(f'`{key}:`' for key in sections)}. Use it as it is, as in "
            "`prefcache prepare CONFIG`."
        )
    explicit = {key: value for key, value in theirs.items() if value is not None}
    given = _DEFAULTS | explicit
    converted = Converted()
    _convert_data(given, converted)
    losses = _convert_losses(given, converted)
    _convert_batches(given, explicit, converted)
    _convert_best(explicit, converted)
    _convert_trackers(explicit, converted)
    _convert_optimizer(given, converted)
    if given.get("use_peft"):
        converted.config.setdefault("train", {})["lora"] = {}
        converted.became["use_peft"] = "train.lora"
        for key, ours in _LORA.items():
            if key in given:
                converted.put(key, f"train.lora.{ours}", given[key])
    for key in ("dtype", "torch_dtype"):
        if given.get(key) == "bfloat16":
            ours = "train.lora.base_dtype" if given.get("use_peft") else "train.weights"
            converted.put(key, ours, "bfloat16")
    if given.get("sync_ref_model"):
        converted.became["sync_ref_model"] = "train.moving_reference"
        for key, ours in _MOVING.items():
            converted.put(key, f"train.moving_reference.{ours}", given[key])
    for key, ours in _SAME.items():
        if key in given and key not in converted.became and _applies(key, given, losses):
            converted.put(key, ours, given[key])
    for key, value in explicit.items():
        if key not in {*converted.became, *converted.ignored, *converted.cannot}:
            _explain(key, value, converted)
    return converted


def _applies(key: str, given: Mapping[str, Any], losses: list[str]) -> bool:
    """Whether TRL reads a key, given its other keys."""
    if key == "max_steps":
        return bool(given[key] > 0)
    if key in _LOSS_ARGUMENTS and not set(losses) & set(_LOSS_ARGUMENTS[key]):
        return False
    if key == "label_smoothing":
        return bool(given[key])
    if key == "f_divergence_type":
        return bool(given[key] != "reverse_kl")
    return key != "f_alpha_divergence_coef" or given.get("f_divergence_type") == "alpha_divergence"


def _explain(key: str, value: Any, converted: Converted) -> None:
    """Explain why a key has no counterpart."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
    if key in _CANNOT:
        if value not in (False, 0, None, []):
            converted.cannot[key] = _CANNOT[key]
    elif key in _IGNORED or prefix:
        converted.ignored[key] = _IGNORED.get(key) or _PREFIXES[str(prefix)]
    elif key in {*_SAME, *_LORA, *_BEST, *_MOVING, *_SWITCHES}:
        converted.ignored[key] = "it is the default, or not read by this loss"
    else:
        converted.cannot[key] = "not known here"


def _convert_data(given: Mapping[str, Any], converted: Converted) -> None:
    converted.config["prepare"] = {"train_on": "all"}  # TRL counts every token after the prompt
    if given.get("datasets"):
        sources = [_source(entry.get("path"), entry.get("name"), entry.get("split")) for entry in given["datasets"]]
        converted.put("datasets", "prepare.data", sources)
    elif "dataset_name" in given:
        source = _source(given["dataset_name"], given.get("dataset_config"), given.get("dataset_train_split"))
        converted.put("dataset_name", "prepare.data", [source])
        for key in ("dataset_config", "dataset_train_split"):
            if key in given:
                converted.became[key] = "prepare.data"
        if "dataset_test_split" in given and given.get("eval_strategy", "no") != "no":
            test = _source(given["dataset_name"], given.get("dataset_config"), given["dataset_test_split"])
            converted.put("dataset_test_split", "prepare.held_out_data", test)
            converted.config["prepare"]["held_out"] = 0.0  # TRL trains on all of the other split
    for key, bits in (("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")):
        if given.get(key):
            converted.put(key, "score.quantization", bits)


def _source(name: Any, subset: Any, split: Any) -> dict[str, Any]:
    """A name alone is a folder or else on the hub, for TRL as for us; with a subset or split it is on the hub."""
    if subset is None and split in (None, "train"):
        return {"path": name}
    return {"hub": name, **({"name": subset} if subset else {}), **({"split": split} if split else {})}


def _convert_losses(given: Mapping[str, Any], converted: Converted) -> list[str]:
    names = [given["loss_type"]] if isinstance(given["loss_type"], str) else list(given["loss_type"])
    weights = given.get("loss_weights") or [1.0] * len(names)
    if len(weights) != len(names):
        raise UsageError(f"loss_weights has {len(weights)} values for {len(names)} losses. Give one for each.")
    loss = names[0] if len(names) == 1 else dict(zip(names, map(float, weights), strict=True))
    converted.put("loss_type", "train.loss", loss)
    if "loss_weights" in given:
        converted.became["loss_weights"] = "train.loss"
    if given.get("use_weighting"):
        converted.put("use_weighting", "train.weighting", "wpo")
    if "kto" in names or "apo_zero_unpaired" in names:
        converted.config["prepare"]["examples"] = "labels"
    return names


def _convert_batches(given: Mapping[str, Any], explicit: Mapping[str, Any], converted: Converted) -> None:
    n_per_device, n_accumulated = int(given["per_device_train_batch_size"]), int(given["gradient_accumulation_steps"])
    converted.put("per_device_train_batch_size", "train.batch_size", n_per_device * n_accumulated)
    converted.became["gradient_accumulation_steps"] = (
        "train.batch_size, which is over all processes: multiply it by their number"
    )
    has_warmup = given["lr_scheduler_type"] != "constant"
    if has_warmup and isinstance(warmup := explicit.get("warmup_steps"), int | float):
        if warmup < 1:  # a share of all steps
            converted.put("warmup_steps", "train.warmup_ratio", float(warmup))
            converted.became["warmup_ratio"] = "train.warmup_ratio"
        else:
            converted.put("warmup_steps", "train.warmup_steps", int(warmup))
            converted.became["warmup_ratio"] = "train.warmup_steps, which overrules it"
    if isinstance(steps := explicit.get("eval_steps"), int):
        converted.put("eval_steps", "train.eval_every", steps)
    for key in ("save_steps", "save_total_limit"):
        if key in explicit and not (isinstance(explicit[key], int) and explicit[key] > 0):
            converted.ignored[key] = "expected a number of steps or of checkpoints; our default is used"
    if explicit.get("bf16"):
        converted.put("bf16", "train.precision", "bf16")


def _convert_trackers(explicit: Mapping[str, Any], converted: Converted) -> None:
    if "report_to" not in explicit:
        return
    named = explicit["report_to"]
    names = [named] if isinstance(named, str) else list(named)
    trackers = [name for name in names if name in get_args(Tracker)]
    if trackers:
        converted.put("report_to", "train.report_to", trackers)
    elif names in ([], ["none"]):
        converted.ignored["report_to"] = "metrics go to Parquet (prefcache sql)"
    if others := [name for name in names if name not in (*trackers, "none")]:
        converted.cannot["report_to"] = f"{', '.join(others)}: train.report_to takes {', '.join(get_args(Tracker))}"


def _convert_best(explicit: Mapping[str, Any], converted: Converted) -> None:
    if not explicit.get("load_best_model_at_end"):
        return
    if "eval_steps" not in converted.became:
        converted.cannot["load_best_model_at_end"] = (
            "evaluations are some steps apart; set train.eval_every, and train.best"
        )
        return
    metric = str(explicit.get("metric_for_best_model", "loss")).removeprefix("eval_")
    # With a test split of its own, the converted run evaluates nothing else.
    own = f"{OWN_SET}_" if "dataset_test_split" in converted.became else ""
    best = {"metric": f"{own}{metric}"}
    if "greater_is_better" in explicit:
        best["greater_is_better"] = explicit["greater_is_better"]
    converted.put("load_best_model_at_end", "train.best", best)
    converted.became |= dict.fromkeys(_BEST & explicit.keys(), "train.best")


def _convert_optimizer(given: Mapping[str, Any], converted: Converted) -> None:
    for key, ours, known in (
        ("lr_scheduler_type", "train.scheduler", _SCHEDULERS),
        ("optim", "train.optimizer", _OPTIMIZERS),
    ):
        if given.get(key) in known:
            converted.put(key, ours, known[given[key]])
        elif key in given:
            converted.cannot[key] = f"{ours} is one of {', '.join(dict.fromkeys(known.values()))}"
    if given["lr_scheduler_type"] == "constant":  # TRL ignores a warm-up then
        converted.put("warmup_ratio", "train.warmup_ratio", 0.0)
        converted.became |= {"warmup_steps": "train.warmup_ratio: 0.0"} if "warmup_steps" in given else {}
    if given.get("max_grad_norm") == 0:
        converted.put("max_grad_norm", "train.max_grad_norm", None)
    betas = {"adam_beta1": 0.9, "adam_beta2": 0.999}
    for key in betas:
        if key in given:
            converted.put(key, "train.betas", [given.get(name, default) for name, default in betas.items()])
