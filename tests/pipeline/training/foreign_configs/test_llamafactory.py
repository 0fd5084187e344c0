"""A file of LLaMA-Factory's settings becomes a config that trains the same, and every key of it is accounted for."""

from pathlib import Path

import pytest
import yaml

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.foreign_programs import LLAMAFACTORY
from prefcache.pipeline.training.foreign_configs import convert as convert_file
from tests.helpers.foreign_files import LLAMAFACTORY as FILE
from tests.helpers.foreign_files import write_dataset_info

SMALLEST = {"model_name_or_path": "m", "stage": "dpo", "dataset": "dpo_en_demo"}


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """The conversion in a folder that has LLaMA-Factory's data folder."""
    monkeypatch.chdir(tmp_path)
    write_dataset_info(tmp_path / "data")
    return lambda settings: convert_file(LLAMAFACTORY, settings, Path("dpo.yaml"))


def test_every_key_of_a_file_is_accounted_for(convert):
    theirs = yaml.safe_load(FILE)
    found = convert(theirs)
    assert found.config == {
        "model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "out": "saves/llama3-8b/lora/dpo",
        "prepare": {
            "train_on": "all",  # all of the answer, and what the template puts after it
            "too_long": "keep_start",
            "data": [
                {"path": "data/dpo_en_demo.json", "format": "llamafactory_sharegpt"},
                {
                    "hub": "org/feedback",
                    "name": "easy",
                    "format": "llamafactory_alpaca",
                    "columns": {"instruction": "question", "chosen": "better", "rejected": "worse"},
                },
            ],
            "held_out": 0.0,  # LLaMA-Factory's val_size
            "max_length": 2048,
            "max_records": 1000,
            "workers": 16,
        },
        "train": {
            "loss": "sigmoid",
            "batch_size": 8,  # 1 x 8
            "scheduler": "cosine",
            "warmup_ratio": 0.1,
            "learning_rate": 5e-6,
            "epochs": 3.0,
            "seed": 42,  # the Trainer's own
            "checkpoint_every": 500,
            # alpha is twice the rank
            "lora": {"r": 8, "alpha": 16, "target_modules": ["all-linear"], "base_dtype": "bfloat16"},
            "precision": "bf16",
            "beta": 0.1,
        },
    }
    assert set(found.differs) == {"template", "trust_remote_code", "cutoff_len (long examples)"}
    given = {key for key, value in theirs.items() if value is not None}
    assert given <= set(found.became) | set(found.ignored) | set(found.differs)
    found.check()


def test_what_llamafactory_does_without_being_told_is_written_down(convert):
    found = convert(SMALLEST)
    train = found.config["train"]
    # LoRA of rank 8 on all linear layers; the Trainer's 5e-5, 8 a step, 3 epochs, a linear schedule without warm-up.
    assert train["lora"] == {"r": 8, "alpha": 16, "target_modules": ["all-linear"]}
    assert (train["learning_rate"], train["batch_size"], train["epochs"]) == (5e-5, 8, 3)
    assert (train["scheduler"], train["warmup_ratio"], train["beta"]) == ("linear", 0.0, 0.1)
    assert found.config["prepare"]["max_length"] == 2048 and found.config["prepare"]["held_out"] == 0
    found.check()


def test_its_defaults_of_the_trainer_are_transformers():
    from transformers import TrainingArguments

    from prefcache.pipeline.training.foreign_configs.hf_trainer import DEFAULTS

    for name, ours in DEFAULTS.items():
        # Transformers now says a ratio as warmup_steps below 1.
        assert getattr(TrainingArguments, "warmup_steps" if name == "warmup_ratio" else name) == ours, name


@pytest.mark.parametrize(
    ("more", "loss", "arguments"),
    [
        ({"dpo_label_smoothing": 0.1}, "sigmoid", {"label_smoothing": 0.1}),
        ({"pref_loss": "hinge"}, "hinge", None),
        ({"pref_loss": "orpo"}, "orpo", None),
        ({"pref_loss": "simpo"}, "simpo", {"gamma": 0.5}),
        ({"pref_ftx": 0.2}, {"sigmoid": 1.0, "sft": 0.2}, None),
        # (dpo + w bco) / (1 + w), and the likelihood on top
        ({"pref_bco_weight": 1.0, "pref_ftx": 0.2}, {"sigmoid": 0.5, "bco_pair": 0.5, "sft": 0.2}, None),
    ],
)
def test_every_preference_loss_becomes_ours(convert, more, loss, arguments):
    found = convert(SMALLEST | more)
    assert found.config["train"]["loss"] == loss and found.config["train"].get("loss_args") == arguments
    assert set(more) <= set(found.became)
    found.check()


def test_kto_is_trained_on_labels_with_its_weights(convert):
    found = convert(SMALLEST | {"stage": "kto", "dataset": "kto_en_demo", "kto_rejected_weight": 0.5})
    assert found.config["prepare"]["examples"] == "labels"
    assert found.config["prepare"]["data"] == [
        {
            "path": "data/kto_en_demo.json",
            "format": "llamafactory_sharegpt_kto",
            "columns": {"conversations": "messages", "kto_tag": "label"},
        }
    ]
    assert found.config["train"]["loss"] == "kto"
    assert found.config["train"]["loss_args"] == {"undesirable_weight": 0.5}
    found.check()


def test_the_reference_and_the_start_of_the_policy_may_be_two_models(convert):
    found = convert(SMALLEST | {"ref_model": "r"})
    assert (found.config["model"], found.config["train"]["model"]) == ("r", "m")
    # An adapter is trained further; the reference is the model without it.
    found = convert(SMALLEST | {"adapter_name_or_path": "sft/adapter"})
    assert (found.config["model"], found.config["train"]["model"]) == ("m", "sft/adapter")
    found.check()
    found = convert(SMALLEST | {"adapter_name_or_path": "sft/adapter", "create_new_adapter": True})
    assert "prefcache merge" in found.differs["adapter_name_or_path"] and "model" not in found.config["train"]


def test_full_training_keeps_float32_weights_unless_they_are_pure_bf16(convert):
    train = convert(SMALLEST | {"finetuning_type": "full", "bf16": True}).config["train"]
    assert "lora" not in train and train["precision"] == "bf16" and "weights" not in train
    train = convert(SMALLEST | {"finetuning_type": "full", "pure_bf16": True}).config["train"]
    assert train["weights"] == "bfloat16"
    assert "finetuning_type" in convert(SMALLEST | {"finetuning_type": "freeze"}).differs


def test_ld_alpha_weighs_the_policys_tokens_alone(convert):
    tokens = convert(SMALLEST | {"ld_alpha": 0.5}).config["train"]["tokens"]
    assert tokens == {"ld_alpha": 0.5, "ld_alpha_of": "policy"}


def test_plain_text_stays_plain_with_the_empty_template(convert):
    assert convert(SMALLEST | {"template": "empty"}).config["prepare"]["template"] == "none"
    found = convert(SMALLEST | {"template": "qwen"})
    assert "template" not in found.config["prepare"] and "LLaMA-Factory's qwen" in found.differs["template"]


def test_evaluation_data_and_shares_come_along(convert):
    found = convert(SMALLEST | {"eval_dataset": "feedback", "eval_strategy": "steps", "eval_steps": 50})
    assert found.config["prepare"]["held_out"] == 0 and found.config["train"]["eval_every"] == 50
    assert found.config["prepare"]["held_out_data"][0]["hub"] == "org/feedback"
    assert convert(SMALLEST | {"val_size": 0.1}).config["prepare"]["held_out"] == 0.1
    assert "val_size" in convert(SMALLEST | {"val_size": 100}).differs


def test_data_that_is_not_here_is_named(convert, tmp_path):
    found = convert(SMALLEST | {"dataset_dir": "elsewhere"})
    assert "data" not in found.config["prepare"] and "elsewhere/dataset_info.json" in found.differs["dataset"]
    with pytest.raises(
        UsageError, match=r"there is no 'mine' in data/dataset_info\.json\. It has: dpo_en_demo, feedback"
    ):
        convert(SMALLEST | {"dataset": "mine"})
    found = convert(SMALLEST | {"dataset": "kto_en_demo"})
    assert "ranking: true" in found.differs["dataset kto_en_demo"]


def test_data_of_the_hub_needs_no_dataset_info(convert):
    found = convert(SMALLEST | {"dataset_dir": "ONLINE", "dataset": "org/a, org/b"})
    assert found.config["prepare"]["data"] == [{"hub": "org/a"}, {"hub": "org/b"}]


@pytest.mark.parametrize("stage", [None, "sft", "ppo"])
def test_what_is_no_preference_training_is_refused(convert, stage):
    with pytest.raises(UsageError, match="expected stage to be dpo or kto"):
        convert(SMALLEST | {"stage": stage})


@pytest.mark.parametrize(
    "more", [{}, {"finetuning_type": "full", "pref_ftx": 0.1}, {"stage": "kto", "dataset": "kto_en_demo"}]
)
def test_the_config_trains(prefcache, model, tmp_path, more):
    """As a user has it: LLaMA-Factory's file and data folder in, one command, and our three stages."""
    write_dataset_info(tmp_path / "data")
    theirs = yaml.safe_load(FILE) | {"model_name_or_path": str(model), "dataset": "dpo_en_demo", "cutoff_len": 128}
    theirs |= {"preprocessing_num_workers": 1, "val_size": 0.2, "num_train_epochs": 1} | more
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(theirs))
    done = prefcache("from-llamafactory", "dpo.yaml", "--output", "mine.yaml")
    assert "template: DIFFERS: " in done.stderr and "pref_beta: train.beta: 0.1" in done.stderr
    for stage in ("prepare", "score", "train"):
        done = prefcache(stage, "mine.yaml", "--set", "train.max_steps=2")
    assert "2 steps with loss" in done.stdout and (tmp_path / "saves/llama3-8b/lora/dpo/trained/model").is_dir()


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"freeze_vision_tower": True}, None),
        ({"freeze_vision_tower": False, "freeze_multi_modal_projector": False}, "trained"),
        ({"freeze_vision_tower": False}, "differs"),
        ({"freeze_vision_tower": False, "freeze_multi_modal_projector": False, "finetuning_type": "lora"}, "differs"),
    ],
    ids=["frozen", "trained", "tower alone", "with an adapter"],
)
def test_a_vision_tower_is_frozen_or_trained_as_there(convert, theirs, expected):
    found = convert(SMALLEST | {"finetuning_type": "full"} | theirs)
    assert found.config["train"].get("vision") == (expected if expected == "trained" else None)
    assert ("freeze_vision_tower" in found.differs) is (expected == "differs")
    assert "freeze_vision_tower" not in found.ignored
