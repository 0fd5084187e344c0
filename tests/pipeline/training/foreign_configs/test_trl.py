"""A file of TRL's settings becomes a config that trains the same, and every key of it is accounted for."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.foreign_programs import TRL
from prefcache.pipeline.training.foreign_configs import convert as convert_file


def convert(settings):
    return convert_file(TRL, settings, Path("dpo.yaml"))


DPO = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "dataset_name": "trl-lib/ultrafeedback_binarized",
    "output_dir": "runs/dpo",
    "loss_type": ["sigmoid", "bco_pair", "sft"],
    "loss_weights": [0.8, 0.2, 1.0],
    "beta": 0.05,
    "learning_rate": 5e-7,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "max_length": 2048,
    "bf16": True,
    "use_peft": True,
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "logging_steps": 25,
    "dataloader_num_workers": 4,
    "precompute_ref_log_probs": True,
    "sync_ref_model": True,
    "ref_model_sync_steps": 100,
    "no_such_key": 1,
}


def test_a_config_of_ours_is_not_taken_for_one_of_theirs(prefcache, config):
    said = prefcache("from-trl", config, "--out", "new.yaml", code=2).stderr
    assert (
        said.startswith(f"error: {config} is already a prefcache config") and not config.with_name("new.yaml").exists()
    )


def test_every_key_of_a_file_is_accounted_for():
    found = convert(DPO)
    assert found.config == {
        "prepare": {
            "train_on": "all",  # TRL counts all tokens after the prompt
            "data": [{"path": "trl-lib/ultrafeedback_binarized"}],
            "held_out_data": [{"hub": "trl-lib/ultrafeedback_binarized", "split": "test"}],  # TRL's own split
            "held_out": 0.0,
            "max_length": 2048,
            "too_long": "keep_start",
        },
        "train": {
            "loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0},
            "batch_size": 16,  # 2 x 8
            "eval_every": 50,
            "precision": "bf16",
            "lora": {"r": 32, "alpha": 16},
            "beta": 0.05,
            "learning_rate": 5e-7,
            "epochs": 1,
            "warmup_ratio": 0.0,
            "scheduler": "linear",  # TRL's own, and the seed's
            "seed": 42,  # TRL's own
            "moving_reference": {"every": 100, "alpha": 0.6},  # the second is TRL's own
        },
        "model": "Qwen/Qwen2.5-0.5B-Instruct",
        "out": "runs/dpo",
    }
    assert set(found.ignored) == {
        *("eval_strategy", "logging_steps", "dataloader_num_workers", "precompute_ref_log_probs")
    }
    assert found.differs["no_such_key"] == "not known here"
    # The default of target modules is PEFT's, by architecture.
    assert set(found.differs) == {"no_such_key", "lora_dropout", "lora_target_modules (default)"}
    assert set(DPO) <= set(found.became) | set(found.ignored) | set(found.differs)
    found.check()


def test_what_trl_would_do_without_being_told_is_written_down():
    train = convert({"model_name_or_path": "m", "dataset_name": "d"}).config["train"]
    # DPOConfig's and TrainingArguments' defaults, where ours differ or may.
    assert (train["loss"], train["beta"], train["epochs"], train["batch_size"]) == ("sigmoid", 0.1, 3, 8)


def test_our_table_of_defaults_is_trls():
    from trl import DPOConfig

    from prefcache.pipeline.training.foreign_configs.trl import DEFAULTS

    theirs = {f.name: f for f in dataclasses.fields(DPOConfig)}
    for name, ours in DEFAULTS.items():
        # Newer versions of Transformers say a ratio as warmup_steps below 1.
        default = theirs["warmup_steps" if name == "warmup_ratio" and name not in theirs else name]
        value = default.default_factory() if default.default is dataclasses.MISSING else default.default
        assert value in (ours, [ours]), name


@pytest.mark.parametrize("steps", [0.05, 0])
def test_a_warm_up_below_one_is_a_share(steps):
    found = convert({"warmup_steps": steps})
    assert found.config["train"]["warmup_ratio"] == steps and "warmup_steps" not in found.config["train"]


def test_a_warm_up_in_steps_overrules_the_ratio_as_in_trl():
    found = convert({"warmup_steps": 100, "warmup_ratio": 0.3})
    assert found.config["train"]["warmup_steps"] == 100 and "warmup_ratio" not in found.config["train"]
    assert found.became["warmup_ratio"] == "train.warmup_steps, which overrules it" and not found.differs
    found.check()
    # A schedule that TRL calls constant has no warm-up.
    found = convert({"warmup_steps": 100, "lr_scheduler_type": "constant"})
    assert found.config["train"]["warmup_ratio"] == 0 and "warmup_steps" not in found.config["train"]


def test_the_test_split_becomes_evaluation_data_where_trl_evaluates():
    theirs = {"dataset_name": "org/pairs", "dataset_config": "easy", "dataset_test_split": "test"}
    theirs |= {"eval_steps": 10, "load_best_model_at_end": True}
    found = convert(theirs | {"eval_strategy": "steps"})
    assert found.config["prepare"]["held_out_data"] == [{"hub": "org/pairs", "name": "easy", "split": "test"}]
    assert found.config["prepare"]["held_out"] == 0 and found.config["train"]["best"] == {"metric": "data_loss"}
    found.check()
    found = convert(theirs)
    # TRL evaluates nothing, and trains on every example.
    assert found.config["prepare"]["held_out"] == 0 and "held_out_data" not in found.config["prepare"]
    assert {"dataset_test_split", "eval_steps"} <= set(found.ignored) and "best" not in found.config["train"]
    assert "no example is held out" in found.differs["load_best_model_at_end"]


def test_a_number_of_steps_comes_along_unless_it_is_off():
    assert convert({"max_steps": 100}).config["train"]["max_steps"] == 100
    found = convert({"max_steps": -1})  # Transformers' value for no such number
    assert "max_steps" not in found.config["train"] and "max_steps" in found.ignored


def test_a_reference_that_is_not_synchronised_does_not_move():
    found = convert({"sync_ref_model": False, "ref_model_mixup_alpha": 0.3})
    assert "moving_reference" not in found.config["train"] and "ref_model_mixup_alpha" in found.ignored


def test_the_schedule_and_the_optimizer_come_along():
    found = convert(
        {"lr_scheduler_type": "constant", "warmup_ratio": 0.3, "optim": "adamw_torch_4bit", "adam_beta2": 0.95}
    )
    train = found.config["train"]
    # A schedule that TRL calls constant has no warm-up.
    assert (train["scheduler"], train["warmup_ratio"], train["optimizer"]) == ("constant", 0.0, "adamw_4bit")
    assert train["betas"] == [0.9, 0.95]
    found.check()
    found = convert({"lr_scheduler_type": "polynomial", "optim": "lomo"})
    assert found.differs["lr_scheduler_type"] == "train.scheduler is one of linear, cosine, constant"
    assert found.differs["optim"] == "train.optimizer is one of adamw, adamw_8bit, adamw_4bit"
    assert not {"scheduler", "optimizer"} & set(found.config["train"])


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_weights_in_bf16_are_trained_in_bf16_and_an_adapter_on_them_is_not(key):
    found = convert({key: "bfloat16", "bf16": True})
    assert found.config["train"]["weights"] == "bfloat16" and found.became[key] == "train.weights: bfloat16"
    found.check()
    found = convert({key: "bfloat16", "use_peft": True})
    assert found.config["train"]["lora"] == {"r": 16, "alpha": 32, "base_dtype": "bfloat16"}
    assert "weights" not in found.config["train"]
    found.check()
    found = convert({key: "float32"})
    assert key in found.ignored and "weights" not in found.config["train"]


def test_a_norm_of_0_clips_nothing_and_experts_come_along():
    found = convert({"max_grad_norm": 0, "use_peft": True, "lora_target_parameters": ["mlp.experts.gate_up_proj"]})
    assert found.config["train"]["max_grad_norm"] is None
    assert found.config["train"]["lora"]["target_parameters"] == ["mlp.experts.gate_up_proj"]


def test_a_mixtures_balance_comes_along():
    assert convert({"router_aux_loss_coef": 0.01}).config["train"]["router_aux_loss"] == 0.01


def test_kto_is_trained_on_labels_with_its_weights():
    found = convert({"loss_type": "kto", "desirable_weight": 1.5, "label_smoothing": 0.1})
    assert found.config["prepare"]["examples"] == "labels"
    assert found.config["prepare"]["kl_batch_size"] == 8  # KTOTrainer's mismatched answers are of the same batch
    assert found.config["train"]["loss_args"] == {"desirable_weight": 1.5}
    assert "label_smoothing" in found.ignored  # kto does not read it, in TRL either
    found.check()


def test_options_of_a_loss_come_along_where_it_reads_them():
    found = convert(
        {
            "loss_type": "exo_pair",
            "label_smoothing": 1e-3,
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.3,
            "ld_alpha": 0.5,
            "use_weighting": True,
        }
    )
    train = found.config["train"]
    assert train["loss_args"] == {"label_smoothing": 1e-3, "f_divergence": "alpha_divergence", "f_alpha": 0.3}
    assert train["tokens"] == {"ld_alpha": 0.5} and train["weighting"] == "wpo"
    found.check()


def test_a_mixture_of_data_sets_is_several_sources():
    found = convert({"datasets": [{"path": "a", "name": "b", "split": "test"}, {"path": "c"}]})
    assert found.config["prepare"]["data"] == [{"hub": "a", "name": "b", "split": "test"}, {"path": "c"}]
    found.check()


def test_a_loss_that_there_is_not_is_refused():
    with pytest.raises(UsageError, match=r"no loss 'sigmoidal'\. The nearest is sigmoid"):
        convert({"loss_type": "sigmoidal"}).check()
    with pytest.raises(UsageError, match="loss_weights has 1 values for 2 losses"):
        convert({"loss_type": ["sigmoid", "sft"], "loss_weights": [1]})


def test_the_config_trains(prefcache, config, model, tmp_path):
    """As a user has it: TRL's file in, one command, and our three stages."""
    theirs = {"model_name_or_path": str(model), "dataset_name": "pairs.jsonl", "output_dir": "runs/theirs"}
    theirs |= {"loss_type": "ipo", "num_train_epochs": 1, "learning_rate": 1e-3, "report_to": "none"}
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(theirs))
    done = prefcache("from-trl", "dpo.yaml", "--output", "mine.yaml")
    assert "loss_type: train.loss: ipo" in done.stderr and "report_to: has no meaning here" in done.stderr
    assert yaml.safe_load(prefcache("from-trl", "dpo.yaml").stdout) == yaml.safe_load(
        (tmp_path / "mine.yaml").read_text()
    )
    for stage in ("prepare", "score", "train"):
        done = prefcache(stage, "mine.yaml", "--set", "prepare.held_out=0.2")
    assert "loss ipo" in done.stdout


def test_text_gets_no_template_as_in_trl_and_messages_get_theirs(prefcache, model, tmp_path):
    """The first record tells, as in TRL; where it is not here, the file says what to look at."""
    messages = {
        name: [{"role": role, "content": "why"}]
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    }
    for record, template in (
        (dict.fromkeys(("prompt", "chosen", "rejected"), "why"), "none"),
        ({"prompt": "why", "completion": "so", "label": True}, "none"),
        (messages, None),
    ):
        (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
        (tmp_path / "dpo.yaml").write_text("dataset_name: records.jsonl\n")
        done = prefcache("from-trl", "dpo.yaml")
        assert yaml.safe_load(done.stdout)["prepare"].get("template") == template
        assert ("prepare.template: none" in done.stderr) == (template == "none")
    (tmp_path / "dpo.yaml").write_text("dataset_name: trl-lib/not-here\n")
    done = prefcache("from-trl", "dpo.yaml")
    assert "template" not in yaml.safe_load(done.stdout)["prepare"] and "DIFFERS: where it is text" in done.stderr


@pytest.mark.parametrize(
    ("named", "ours"),
    [("wandb", ["wandb"]), (["tensorboard", "mlflow"], ["tensorboard"]), ("none", None), ("all", None)],
)
def test_trackers_come_along(named, ours):
    found = convert({"report_to": named})
    assert found.config["train"].get("report_to") == ours
    assert found.differs.get("report_to", "").partition(":")[0] == {"all": "all"}.get(
        str(named), "mlflow" if "mlflow" in named else ""
    )
    assert ("report_to" in found.ignored) == (named == "none")
    found.check()


def test_the_best_model_at_the_end_is_ours():
    steps = {"eval_strategy": "steps"}
    found = convert(
        {"load_best_model_at_end": True, "metric_for_best_model": "rewards/margins", "eval_steps": 20} | steps
    )
    assert found.config["train"]["best"] == {"metric": "rewards/margins"} and not found.differs
    found.check()
    # Unless said, Transformers takes the loss.
    found = convert({"load_best_model_at_end": True, "greater_is_better": False, "eval_steps": 20} | steps)
    assert found.config["train"]["best"] == {"metric": "loss", "greater_is_better": False}
    assert "set train.eval_every" in convert({"load_best_model_at_end": True} | steps).differs["load_best_model_at_end"]
    assert "best" not in convert({"metric_for_best_model": "loss", "eval_steps": 20} | steps).config["train"]


def test_every_setting_of_trls_commands_is_known():
    from trl import DatasetMixtureConfig, DPOConfig, KTOConfig, ModelConfig, ScriptArguments

    parts = (DPOConfig, KTOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)
    names = {each.name for part in parts for each in dataclasses.fields(part)}
    values = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "loss_type": ["kto"],
        "loss_weights": [1],
    }
    values |= {"datasets": [{"path": "d"}], "report_to": "none", "max_grad_norm": 1.0}
    found = convert(dict.fromkeys(names, "1") | values)
    assert not found.unknown_keys and len(names) > 150


def test_a_file_of_kto_that_names_no_loss_is_one_of_kto():
    found = convert({"dataset_name": "d", "undesirable_weight": 0.5})
    assert found.config["train"]["loss"] == "kto" and found.config["prepare"]["examples"] == "labels"
    # One without its weights looks like DPO's.
    assert "add loss_type: kto" in convert({"dataset_name": "d"}).became["loss_type (default)"]


def test_a_local_model_has_no_revision(model):
    found = convert({"model_name_or_path": str(model), "model_revision": "main"})
    assert "revision" not in found.config and "model_revision" in found.ignored
    assert convert({"model_name_or_path": "org/m", "model_revision": "v1"}).config["revision"] == "v1"


def test_a_run_gets_its_name_unless_no_folder_can_have_it():
    assert convert({"run_name": "dpo-1"}).config["train"]["run"] == "dpo-1"
    for name in ("my run", "a/b", "scored"):
        found = convert({"run_name": name})
        assert "run" not in found.config["train"] and "run_name" in found.ignored


def test_what_belongs_to_other_commands_of_trl_differs():
    found = convert({"dataset_name": "d", "assistant_only_loss": True, "eval_dataset": "e"})
    assert "it is SFT's" in found.differs["assistant_only_loss"] and "held_out_data" in found.differs["eval_dataset"]


def test_the_files_of_a_local_folder_belong_to_the_splits_that_their_names_say(tmp_path, monkeypatch):
    """As in `datasets`: otherwise the test examples would be trained on."""
    monkeypatch.chdir(tmp_path)
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "latest.jsonl"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("")
    prepare = convert({"dataset_name": "data", "eval_strategy": "steps"}).config["prepare"]
    assert prepare["data"] == [{"path": "data/train-0.jsonl"}, {"path": "data/train-1.jsonl"}]
    assert prepare["held_out_data"] == [{"path": "data/test.jsonl"}]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/pairs.jsonl").write_text("")
    assert convert({"dataset_name": "other"}).config["prepare"]["data"] == [{"path": "other"}]


def test_the_first_records_of_a_split_come_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("")
    found = convert(
        {"datasets": [{"path": "pairs.jsonl", "split": "train[:500]"}, {"path": "org/d", "split": "train[:1%]"}]}
    )
    assert found.config["prepare"]["data"] == [
        {"path": "pairs.jsonl", "max_records": 500},
        {"hub": "org/d", "split": "train[:1%]"},
    ]
    found = convert({"datasets": [{"path": "pairs.jsonl", "split": "train[5%:]"}]})
    assert "datasets: train[5%:]" in found.differs
