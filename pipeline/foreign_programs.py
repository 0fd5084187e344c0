"""Whose settings a file holds: TRL's, Axolotl's or LLaMA-Factory's. training/foreign_configs/ converts them."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefcache.pipeline.errors import UsageError

# Sections of our configs; the files of other programs are flat.
_OUR_SECTIONS = ("prepare", "score", "train")


@dataclass(frozen=True)
class Program:
    name: str
    command: str  # the command that converts its files
    own_keys: frozenset[str]  # keys that neither the other programs nor our configs have


TRL = Program(
    "TRL",
    "from-trl",
    frozenset(
        [
            "beta",
            "dataset_config",
            "dataset_name",
            "dataset_streaming",
            "dataset_test_split",
            "dataset_train_split",
            "desirable_weight",
            "discopop_tau",
            "f_divergence_type",
            "label_smoothing",
            "loss_type",
            "loss_weights",
            "max_length",
            "max_prompt_length",
            "model_init_kwargs",
            "padding_free",
            "ref_model_mixup_alpha",
            "ref_model_sync_steps",
            "sync_ref_model",
            "truncation_mode",
            "undesirable_weight",
            "use_peft",
            "use_weighting",
        ]
    ),
)
AXOLOTL = Program(
    "Axolotl",
    "from-axolotl",
    frozenset(
        [
            "base_model",
            "base_model_config",
            "dataset_prepared_path",
            "dpo_loss_type",
            "dpo_loss_weights",
            "dpo_use_weighting",
            "eval_sample_packing",
            "evals_per_epoch",
            "flash_attention",
            "kto_desirable_weight",
            "kto_undesirable_weight",
            "lora_model_dir",
            "lora_target_linear",
            "micro_batch_size",
            "num_epochs",
            "orpo_alpha",
            "pad_to_sequence_len",
            "peft_use_dora",
            "rl",
            "rl_beta",
            "sample_packing",
            "saves_per_epoch",
            "sequence_len",
            "special_tokens",
            "test_datasets",
            "tokenizer_type",
            "trl",
            "val_set_size",
            "wandb_name",
            "wandb_project",
        ]
    ),
)
LLAMAFACTORY = Program(
    "LLaMA-Factory",
    "from-llamafactory",
    frozenset(
        [
            "adapter_name_or_path",
            "cutoff_len",
            "dataset",
            "dataset_dir",
            "eval_dataset",
            "finetuning_type",
            "flash_attn",
            "kto_chosen_weight",
            "kto_rejected_weight",
            "lora_rank",
            "lora_target",
            "plot_loss",
            "pref_bco_weight",
            "pref_beta",
            "pref_ftx",
            "pref_loss",
            "preprocessing_num_workers",
            "pure_bf16",
            "quantization_bit",
            "ref_model_adapters",
            "stage",
            "template",
            "val_size",
        ]
    ),
)
PROGRAMS = (TRL, AXOLOTL, LLAMAFACTORY)


def recognise(tree: Mapping[str, Any]) -> Program | None:
    """Return the program whose file this is: the one of whose own keys it has most; None for a config of ours or no one's."""
    if has_our_sections(tree):
        return None
    n_own = {program: len(program.own_keys & tree.keys()) for program in PROGRAMS}
    likeliest = max(PROGRAMS, key=n_own.__getitem__)
    if n_own[likeliest] == 0:
        # TRL and LLaMA-Factory share this key, and a preference file of the latter always has a `stage`.
        return TRL if "model_name_or_path" in tree else None
    return likeliest if list(n_own.values()).count(n_own[likeliest]) == 1 else None


def has_our_sections(tree: Mapping[str, Any]) -> bool:
    return any(isinstance(tree.get(section), Mapping) for section in _OUR_SECTIONS)


def refuse_foreign(tree: Mapping[str, Any], path: object) -> None:
    """Refuse another program's file where a config of ours is expected, and name the command that converts it."""
    if (program := recognise(tree)) is not None:
        raise UsageError(
            f"{path}: these are {program.name}'s settings. Convert them with `{conversion(program, path)}`, and use my.yaml."
        )


def refuse_other(tree: Mapping[str, Any], path: object, expected: Program) -> None:
    """Refuse a file that is recognised as ours or another program's."""
    if has_our_sections(tree):
        shown = ", ".join(f"`{key}:`" for key in _OUR_SECTIONS if isinstance(tree.get(key), Mapping))
        raise UsageError(
            f"{path} is already a prefcache config: it has {shown}. Use it as it is, as in `prefcache prepare CONFIG`."
        )
    if (program := recognise(tree)) not in (None, expected):
        assert program is not None
        raise UsageError(
            f"{path}: these are {program.name}'s settings, and {expected.command} converts {expected.name}'s. Use "
            f"`{conversion(program, path)}`."
        )


def conversion(program: Program, path: object) -> str:
    return f"prefcache {program.command} {shlex.quote(str(path))} --output my.yaml"
