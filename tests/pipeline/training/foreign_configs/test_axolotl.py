"""A file of Axolotl's settings becomes a config that trains the same, and every key of it is accounted for."""

from pathlib import Path

import pytest
import yaml

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.foreign_programs import AXOLOTL
from prefcache.pipeline.preparing.formats import FORMATS
from prefcache.pipeline.training.foreign_configs import convert as convert_file
from tests.helpers.foreign_files import AXOLOTL as FILE
from tests.helpers.project import write_pairs

SMALLEST = {"base_model": "m", "rl": "dpo", "learning_rate": 1e-5, "datasets": [{"path": "d", "type": "chatml.intel"}]}


def convert(settings):
    return convert_file(AXOLOTL, settings, Path("dpo.yaml"))


def test_every_key_of_a_file_is_accounted_for():
    theirs = yaml.safe_load(FILE)
    found = convert(theirs)
    assert found.config == {
        "model": "NousResearch/Meta-Llama-3-8B-Instruct",
        "out": "./outputs/lora-out",
        "prepare": {
            "train_on": "all",  # TRL's DPOTrainer counts all tokens after the prompt
            "data": [
                {
                    "path": "fozziethebeat/alpaca_messages_2k_dpo_test",
                    "format": "chat_template.default",
                    "format_args": {
                        "field_messages": "conversation",
                        "field_chosen": "chosen",
                        "field_rejected": "rejected",
                        "message_property_mappings": {"role": "role", "content": "content"},
                        "roles": {"system": ["system"], "user": ["user"], "assistant": ["assistant"]},
                    },
                },
                {"hub": "Intel/orca_dpo_pairs", "split": "train[:500]", "format": "chatml.intel"},
            ],
            "too_long": "drop",  # Axolotl's excess_length_strategy
            "held_out": 0.05,
            "max_length": 4096,
        },
        "score": {"quantization": "4bit", "attention": "flash_attention_2"},
        "train": {
            "loss": "sigmoid",
            "beta": 0.05,
            "batch_size": 8,  # 2 x 4
            "scheduler": "cosine",
            "warmup_steps": 10,
            "optimizer": "adamw_8bit",
            "run": "first",
            "learning_rate": 0.0002,
            "epochs": 4,
            "weight_decay": 0.0,
            "seed": 42,  # the Trainer's own
            "gradient_checkpointing": True,
            "lora": {"r": 32, "alpha": 16, "target_modules": ["all-linear"], "base_dtype": "bfloat16"},
            "report_to": ["wandb"],
        },
    }
    assert set(found.differs) == {
        "chat_template",  # Axolotl's llama3, not the tokenizer's
        "evals_per_epoch",
        "lora_dropout",
        "saves_per_epoch",
    }
    given = {key for key, value in theirs.items() if value is not None}
    assert given <= set(found.became) | set(found.ignored) | set(found.differs)
    found.check()


def test_what_axolotl_does_without_being_told_is_written_down():
    found = convert(SMALLEST)
    prepare, train = found.config["prepare"], found.config["train"]
    # sequence_len 512, no validation, longer examples dropped; one example a step, one epoch, 3% of warm-up, bf16 weights.
    assert (prepare["max_length"], prepare["held_out"], prepare["too_long"]) == (512, 0.0, "drop")
    assert (train["batch_size"], train["epochs"], train["beta"], train["warmup_ratio"]) == (1, 1, 0.1, 0.03)
    assert (train["scheduler"], train["optimizer"], train["weights"]) == ("cosine", "adamw", "bfloat16")
    assert found.became["micro_batch_size (default)"] == "train.batch_size: 1"
    assert set(found.differs) == {"warmup_ratio (default)"}  # at most 100 steps there
    found.check()


@pytest.mark.parametrize(
    ("more", "loss", "arguments"),
    [
        ({"rl": "dpo", "dpo_label_smoothing": 0.1}, "sigmoid", {"label_smoothing": 0.1}),
        ({"rl": "dpo", "dpo_loss_type": ["apo_zero"]}, "apo_zero", None),
        (
            {"rl": "dpo", "dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1, 0.5]},
            {"sigmoid": 1.0, "sft": 0.5},
            None,
        ),
        ({"rl": "ipo"}, "ipo", None),
        ({"rl": "kto", "kto_undesirable_weight": 0.2}, "kto", {"undesirable_weight": 0.2}),
        ({"rl": "orpo", "orpo_alpha": 0.3}, "orpo", None),
        # TRL's CPO trainer adds the likelihood unless cpo_alpha is 0; its gamma is 0.5.
        ({"rl": "simpo"}, {"simpo": 1.0, "sft": 1.0}, {"gamma": 0.5}),
        ({"rl": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.2}, "simpo", {"gamma": 1.2}),
    ],
)
def test_every_kind_of_preference_training_becomes_its_loss(more, loss, arguments):
    found = convert(SMALLEST | more)
    assert found.config["train"]["loss"] == loss and found.config["train"].get("loss_args") == arguments
    assert set(more) <= set(found.became) | set(found.ignored) | set(found.differs)
    assert found.config["train"]["beta"] == more.get("orpo_alpha", 0.1)
    assert (found.config["prepare"].get("examples") == "labels") == (loss == "kto")
    found.check()


def test_the_section_of_trl_overrules_beta_and_the_rest_of_it_is_not_for_pairs():
    found = convert(SMALLEST | {"rl_beta": 0.2, "trl": {"beta": 0.3, "num_generations": 8}})
    assert found.config["train"]["beta"] == 0.3 and "trl.num_generations" in found.ignored


@pytest.mark.parametrize(
    ("entry", "rl", "expected"),
    [
        ({"type": "chat_template.argilla_chat"}, "dpo", {"format": "chat_template.argilla_chat"}),
        ({"type": "chatml.argilla"}, "kto", {"format": "kto.chatml.argilla"}),
        ({"type": "chat_template.argilla"}, "orpo", {"format": "orpo.chat_template.argilla"}),
        (
            {"type": {"field_prompt": "question", "prompt_format": "Q: {prompt}"}},
            "dpo",
            {"format": "user_defined", "format_args": {"field_prompt": "question", "prompt_format": "Q: {prompt}"}},
        ),
        (
            {"type": {"field_label": "good"}},
            "kto",
            {"format": "kto.user_defined", "format_args": {"field_label": "good"}},
        ),
        (
            {"type": "chat_template", "message_field_role": "from", "message_field_content": "value"},
            "dpo",
            {
                "format": "chat_template",
                "format_args": {"message_property_mappings": {"role": "from", "content": "value"}},
            },
        ),
        ({"type": None}, "dpo", {}),
    ],
)
def test_the_type_of_data_becomes_a_format_that_there_is(entry, rl, expected):
    found = convert(SMALLEST | {"rl": rl, "datasets": [{"path": "d"} | entry]})
    assert found.config["prepare"]["data"] == [{"path": "d"} | expected]
    found.drop_unknown_formats(FORMATS)
    assert found.config["prepare"]["data"] == [{"path": "d"} | expected]


def test_a_type_without_a_format_leaves_the_columns_to_tell():
    found = convert(SMALLEST | {"datasets": [{"path": "d", "type": "chatml.mine"}]})
    found.drop_unknown_formats(FORMATS)
    assert found.config["prepare"]["data"] == [{"path": "d"}] and "type: chatml.mine" in found.differs


def test_files_and_evaluation_data_come_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs(Path("train.jsonl"), 2)
    found = convert(
        SMALLEST
        | {
            "datasets": [{"path": "json", "data_files": ["train.jsonl"], "ds_type": "json", "type": "passthrough"}],
            "test_datasets": [{"path": "train.jsonl", "split": "train", "type": "passthrough"}],
        }
    )
    source = {"path": "train.jsonl", "format": "passthrough"}
    assert found.config["prepare"]["data"] == found.config["prepare"]["held_out_data"] == [source]
    assert found.config["prepare"]["held_out"] == 0 and "datasets[0].ds_type" in found.ignored
    found.check()


def test_a_template_file_is_used_and_one_of_axolotl_is_named():
    template = Path(__file__)
    data = {"datasets": [{"path": "d", "type": "chat_template"}]}
    found = convert(SMALLEST | data | {"chat_template": "jinja", "chat_template_jinja": str(template)})
    assert found.config["prepare"]["chat_template"] == str(template) and "chat_template" not in found.differs
    found = convert(SMALLEST | data | {"chat_template": "chatml"})
    assert "Axolotl's chatml differs" in found.differs["chat_template"]
    found = convert(SMALLEST | {"chat_template": "chatml"})  # chatml.intel writes the turns itself
    assert "chat_template" in found.ignored


def test_longer_examples_are_cut_or_refused_as_the_file_says():
    assert convert(SMALLEST | {"excess_length_strategy": "truncate"}).config["prepare"]["too_long"] == "keep_start"
    prepare = convert(SMALLEST | {"excess_length_strategy": "raise"}).config["prepare"]
    assert prepare["too_long"] == "drop" and prepare["max_quarantine"] == 0


def test_an_adapter_to_begin_with_belongs_to_the_reference():
    """TRL copies it as the reference, so the margin starts at 0."""
    found = convert(SMALLEST | {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_model_dir": "sft/adapter"})
    assert (found.config["model"], found.config["adapter"]) == ("m", "sft/adapter")
    found.check()
    found = convert(SMALLEST | {"adapter": "llama-adapter"})
    assert "lora" not in found.config["train"] and "adapter" in found.differs


def test_weights_are_float32_where_the_file_says_so():
    found = convert(SMALLEST | {"bf16": False})
    assert "weights" not in found.config["train"]
    found = convert(SMALLEST | {"bf16": False, "fp16": True})
    assert "weights" not in found.config["train"] and "fp16" in found.differs


def test_what_changes_no_result_here_is_ignored():
    kernels = {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "special_tokens": {"pad_token": "<pad>"}}
    assert set(kernels) <= set(convert(SMALLEST | kernels).ignored)
    others = {"plugins": ["my.Plugin"], "special_tokens": {"eos_token": "<end>"}}
    assert set(others) <= set(convert(SMALLEST | others).differs)


@pytest.mark.parametrize("rl", [None, "grpo", "ebft"])
def test_what_is_no_preference_training_is_refused(rl):
    with pytest.raises(UsageError, match="expected rl to be one of dpo, ipo, kto, orpo, simpo"):
        convert(SMALLEST | {"rl": rl})


@pytest.mark.parametrize(
    "more", [{}, {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}, {"rl": "simpo"}]
)
def test_the_config_trains(prefcache, model, tmp_path, more):
    """As a user has it: Axolotl's file in, one command, and our three stages."""
    write_pairs(tmp_path / "pairs.jsonl", 40)
    theirs = yaml.safe_load(FILE) | {"base_model": str(model), "sequence_len": 128, "num_epochs": 1}
    theirs |= {"datasets": [{"path": "pairs.jsonl", "ds_type": "json", "type": "chatml.prompt_pairs"}]}
    # No GPU, no account.
    theirs |= {"load_in_4bit": False, "flash_attention": None, "optimizer": "adamw_torch", "adapter": None}
    theirs |= {"wandb_project": None, "wandb_name": None, "val_set_size": 0.2} | more
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(theirs))
    done = prefcache("from-axolotl", "dpo.yaml", "--output", "mine.yaml")
    assert "lora_dropout: DIFFERS: " in done.stderr and "rl_beta: train.beta: 0.05" in done.stderr
    for stage in ("prepare", "score", "train"):
        done = prefcache(stage, "mine.yaml", "--set", "train.max_steps=2", "--set", "train.warmup_steps=1")
    assert "2 steps with loss" in done.stdout and (tmp_path / "outputs/lora-out/trained/model").is_dir()
