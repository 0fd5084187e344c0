"""The cache inside TRL's trainers, against the same trainers with a live and with a precomputed reference."""

import gc
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTTrainer

import prefcache
from prefcache.trl import CachedReference
from tests.helpers.documents import blocks
from tests.helpers.project import ROOT, build_model, pair

N_STEPS, BATCH = 50, 4


class CachedDPO(CachedReference, DPOTrainer):
    pass


class CachedKTO(CachedReference, KTOTrainer):
    pass


def message(role, text):
    return [{"role": role, "content": text}]


PAIRS = [
    {
        "prompt": message("user", each["prompt"]),
        "chosen": message("assistant", each["chosen"]),
        "rejected": message("assistant", each["rejected"]),
    }
    for each in map(pair, range(60))
]
LABELS = [
    {"prompt": each["prompt"], "completion": each[answer], "label": answer == "chosen"}
    for each in PAIRS
    for answer in ("chosen", "rejected")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that the tests of this file fill together."""
    return tmp_path_factory.mktemp("caches") / "cache"


def make(trainer, model, out, rows=PAIRS, peft_config=None, eval_dataset=None, reference=None, **settings):
    """A trainer of either kind; `reference` has the arguments of CachedReference."""
    config = KTOConfig if issubclass(trainer, KTOTrainer) else DPOConfig
    settings = {
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "max_length": 64,
        "max_steps": N_STEPS,
    } | settings
    return trainer(
        model=model if isinstance(model, torch.nn.Module) else str(model),
        args=config(
            output_dir=str(out),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=rows if isinstance(rows, Dataset | IterableDataset) else Dataset.from_list(rows),
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        **(reference or {}),
    )


def train(trainer, *arguments, **named):
    made = make(trainer, *arguments, **named)
    made.train()
    return made


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture
def counts(monkeypatch):
    """Count the forwards of all models by whether they have gradients, and the models that are loaded."""
    counts, forward, load = Counter(), LlamaModel.forward, LlamaForCausalLM.from_pretrained.__func__

    def count_forward(self, *arguments, **named):
        counts["with gradients" if torch.is_grad_enabled() else "without"] += 1
        return forward(self, *arguments, **named)

    def count_load(cls, *arguments, **named):
        counts["loaded"] += 1
        return load(cls, *arguments, **named)

    monkeypatch.setattr(LlamaModel, "forward", count_forward)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(count_load))
    return counts


LOSSES = {
    "sigmoid": {},
    "ipo": {"loss_type": "ipo"},
    "sigmoid and sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "ld_alpha": {"ld_alpha": 0.4},
}


def assert_same(ours, theirs):
    """To 1e-6, or of losses above 1 to 1e-6 of their size: IPO starts at 25, where float32 has steps of 2e-6."""
    assert len(ours) == len(theirs) == N_STEPS and ours[0] != ours[-1]
    assert ours == pytest.approx(theirs, abs=1e-6 * max(1, theirs[0]), rel=0)


@pytest.mark.parametrize("name", LOSSES)
def test_dpo_losses_are_those_of_a_live_and_of_a_precomputed_reference(name, tmp_path, model, cache):
    cached = losses(train(CachedDPO, model, tmp_path / "o", reference={"reference_cache": cache}, **LOSSES[name]))
    live = losses(train(DPOTrainer, model, tmp_path / "o", **LOSSES[name]))
    precomputed = losses(train(DPOTrainer, model, tmp_path / "o", precompute_ref_log_probs=True, **LOSSES[name]))
    assert_same(cached, live)
    assert_same(cached, precomputed)


def test_kto_losses_are_those_of_a_live_and_of_a_precomputed_reference(tmp_path, model, cache):
    cached = losses(train(CachedKTO, model, tmp_path / "o", LABELS, reference={"reference_cache": cache}))
    live = losses(train(KTOTrainer, model, tmp_path / "o", LABELS))
    precomputed = losses(train(KTOTrainer, model, tmp_path / "o", LABELS, precompute_ref_log_probs=True))
    assert_same(cached, live)
    assert_same(cached, precomputed)


# -- no reference ----------------------------------------------------------------------------------------------------------


def test_no_reference_is_loaded_or_run(tmp_path, model, cache, counts):
    train(CachedDPO, model, tmp_path / "o", max_steps=1, reference={"reference_cache": cache})
    counts.clear()
    settings = {"max_steps": 5, "learning_rate": 1e-4, "beta": 0.3, "seed": 7, "loss_type": "hinge", "ld_alpha": 0.3}
    trainer = train(
        CachedDPO, model, tmp_path / "o", reference={"reference_cache": cache, "score_missing": False}, **settings
    )
    assert counts == {"with gradients": 5, "loaded": 1}
    with pytest.raises(AssertionError, match="must not be run"):
        trainer.ref_model(torch.tensor([[1]]))

    counts.clear()
    train(DPOTrainer, model, tmp_path / "o", **settings)
    assert counts == {"with gradients": 5, "without": 5, "loaded": 2}


def test_none_is_loaded_under_fsdp_either(tmp_path, model, cache, counts):
    """FSDP needs GPUs here, so the trainer is told, once it is made, that it is sharded."""

    class Sharded(CachedDPO):
        is_fsdp_enabled = property(
            lambda self: "maybe_activation_offload_context" in vars(self), lambda self, value: None
        )

    make(CachedDPO, model, tmp_path / "o", reference={"reference_cache": cache})
    counts.clear()
    trainer = make(Sharded, model, tmp_path / "o", reference={"reference_cache": cache, "score_missing": False})
    assert trainer.is_fsdp_enabled and counts == {"loaded": 1}


def test_the_memory_is_that_of_the_policy_alone(tmp_path, model, cache):
    train(CachedDPO, model, tmp_path / "o", max_steps=1, reference={"reference_cache": cache})
    gc.collect()
    before = count_weights()
    trainer = make(CachedDPO, model, tmp_path / "o", reference={"reference_cache": cache, "score_missing": False})
    gc.collect()
    assert count_weights() - before == sum(weight.numel() for weight in trainer.model.parameters())


def count_weights():
    return sum(each.numel() for each in gc.get_objects() if isinstance(each, torch.nn.Parameter))


def test_two_processes_share_the_scoring_and_train_as_with_a_live_reference(tmp_path, model):
    def run(trainer):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        command = [*torchrun, "-m", __name__, trainer, str(model), str(tmp_path)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    (cached, n_rows), said = run("CachedDPO")
    (live, _), _ = run("DPOTrainer")
    assert cached == pytest.approx(live, abs=1e-6) and len(live) == 8
    # Each sequence was scored by one of them, and one says so.
    assert n_rows == len({str(row[answer]) + str(row["prompt"]) for row in PAIRS for answer in ("chosen", "rejected")})
    assert said.count("score: loading") == said.count("trl: the policy starts") == 1


def test_the_examples_of_the_guide_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_model(tmp_path / "models/policy")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:8]))
    names = {}
    for block in blocks("python", ROOT / "stages/guide/trl.md"):
        # TRL trains in bf16 unless told otherwise, and refuses to without a GPU.
        exec(block.replace("max_length=1024", "max_length=1024, use_cpu=True, bf16=False, report_to='none'"), names)
    first, last = names["Trainer"].__mro__[1], names["trainer"]
    assert first is CachedReference and len(names["reference"]) == 16 and last.train_dataset["ref_chosen_logps"]


# -- what is looked up -----------------------------------------------------------------------------------------------------


def test_only_missing_sequences_are_scored_and_they_stay(tmp_path, model):
    cache = tmp_path / "cache"
    make(CachedDPO, model, tmp_path / "o", PAIRS[:54], reference={"reference_cache": cache})
    n_before = len(prefcache.open_cache(cache, model=str(model)))
    trainer = make(CachedDPO, model, tmp_path / "o", reference={"reference_cache": cache})
    assert 0 < len(prefcache.open_cache(cache, model=str(model))) - n_before <= 12
    expected = make(DPOTrainer, model, tmp_path / "o", precompute_ref_log_probs=True)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        assert trainer.train_dataset[column] == pytest.approx(expected.train_dataset[column], abs=1e-4)
    make(CachedDPO, model, tmp_path / "o", reference={"reference_cache": cache, "score_missing": False})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 20},
        {"max_length": 20, "truncation_mode": "keep_end"},
        {"max_length": None, "pad_to_multiple_of": 8},
    ],
    ids=str,
)
def test_values_are_those_of_the_ids_after_truncation_in_any_order(settings, tmp_path, model, cache):
    shuffled = Dataset.from_list([{**row, "note": "x", "ref_chosen_logps": 1.0} for row in PAIRS[::-1]])
    trainer = make(CachedDPO, model, tmp_path / "o", shuffled, reference={"reference_cache": cache}, **settings)
    expected = make(DPOTrainer, model, tmp_path / "o", precompute_ref_log_probs=True, **settings)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        values = list(trainer.train_dataset[column])[::-1]
        assert values == pytest.approx(list(expected.train_dataset[column]), abs=1e-4) and min(values) < -5


def test_an_answer_that_was_cut_off_as_a_whole_has_the_sum_0(tmp_path, model, cache):
    rows = [
        {"prompt_ids": [5] * 10, "chosen_ids": [6, 7], "rejected_ids": [8]},
        {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [8]},
    ]

    class OfIds(CachedDPO):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset

    data = make(OfIds, model, tmp_path / "o", rows, max_length=10, reference={"reference_cache": cache}).train_dataset
    assert data[0]["ref_chosen_logps"] == data[0]["ref_rejected_logps"] == 0 > data[1]["ref_chosen_logps"]


def test_further_data_can_be_evaluated_after_training(tmp_path, model, cache):
    sets = {"near": Dataset.from_list(PAIRS[:8]), "far": Dataset.from_list(PAIRS[8:16])}
    trainer = train(
        CachedDPO,
        model,
        tmp_path / "o",
        PAIRS[16:],
        max_steps=2,
        eval_dataset=sets,
        reference={"reference_cache": cache},
    )
    expected = train(DPOTrainer, model, tmp_path / "o", PAIRS[16:], max_steps=2, eval_dataset=sets)
    for data, key in ((None, "eval_far_loss"), (Dataset.from_list(PAIRS[:4]), "eval_loss")):
        assert trainer.evaluate(data)[key] == pytest.approx(expected.evaluate(data)[key], abs=1e-6)


# -- adapters --------------------------------------------------------------------------------------------------------------

LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


def test_lora_trains_as_with_the_adapter_disabled_for_the_reference(tmp_path, model, cache, counts):
    cached = train(
        CachedDPO, model, tmp_path / "o", peft_config=LoraConfig(**LORA), reference={"reference_cache": cache}
    )
    assert counts["without"] <= 40  # where this test is the first that scores
    assert_same(losses(cached), losses(train(DPOTrainer, model, tmp_path / "o", peft_config=LoraConfig(**LORA))))


def test_a_trained_adapter_is_a_reference_by_name(tmp_path, model, cache):
    torch.manual_seed(0)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**LORA, init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")

    def policy():
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter", is_trainable=True
        )

    with pytest.raises(prefcache.UsageError, match="Say which"):
        make(CachedDPO, policy(), tmp_path / "o", reference={"reference_cache": cache})
    named = prefcache.open_cache(cache, model=str(model), adapter=str(tmp_path / "adapter"))
    cached = train(CachedDPO, policy(), tmp_path / "o", reference={"reference_cache": named})
    assert "ref" not in cached.model.peft_config
    assert_same(losses(cached), losses(train(DPOTrainer, policy(), tmp_path / "o")))


# -- refusals --------------------------------------------------------------------------------------------------------------


def test_a_policy_that_is_not_the_cached_model_is_refused_at_the_first_step(tmp_path, model, cache):
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.lm_head.weight[:50] *= 1.1
    trainer = make(CachedDPO, changed, tmp_path / "o", reference={"reference_cache": cache})
    for _ in range(2):  # as a notebook's cell that is run again
        with pytest.raises(prefcache.IdentityError, match="Its weights are not those of that model"):
            trainer.train()
    assert losses(trainer) == []


def test_a_policy_from_elsewhere_is_trained_against_a_named_reference(tmp_path, model, cache, capfd):
    other = build_model(tmp_path / "other", seed=1)
    named = prefcache.open_cache(cache, model=str(model))
    cached = train(CachedDPO, other, tmp_path / "o", reference={"reference_cache": named})
    (gap,) = re.findall(r"starts within (\S+) nats per token", capfd.readouterr().err)
    assert float(gap) > 0.1
    ref = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    class Live(DPOTrainer):
        def __init__(self, **named):
            super().__init__(ref_model=ref, **named)

    assert_same(losses(cached), losses(train(Live, other, tmp_path / "o")))


class OfUser(DPOTrainer):
    """A trainer that passes its arguments on, and has a loss without TRL's forward."""

    def __init__(self, scale, **others):
        super().__init__(**others)
        self.scale = scale

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return self.scale * logits.square().mean() + 0 * inputs["ref_chosen_logps"].sum()


def test_a_trainer_of_the_users_own_is_taken_and_told_that_its_start_is_not_checked(tmp_path, model, cache, capfd):
    class Cached(CachedReference, OfUser):
        pass

    reference = {"reference_cache": cache, "scale": 2.0}
    assert len(losses(train(Cached, model, tmp_path / "o", max_steps=2, reference=reference))) == 2
    assert "the loss asks the model for no log-probs" in capfd.readouterr().err
    with pytest.raises(prefcache.UsageError, match="No policy was given"):
        Cached(scale=2.0)


def test_missing_sequences_are_refused_where_none_are_to_be_scored(tmp_path, model):
    with pytest.raises(prefcache.UsageError, match=r"lacks 1\d\d of 1\d\d sequences of the train data"):
        make(
            CachedDPO, model, tmp_path / "o", reference={"reference_cache": tmp_path / "cache", "score_missing": False}
        )
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_ref_model": True}, "sync_ref_model moves the reference"),
        ({"rows": IterableDataset.from_generator(lambda: iter(PAIRS))}, "is a stream"),
        ({"rows": [{**row, "images": []} for row in PAIRS]}, "The data has images"),
    ],
    ids=["moving", "stream", "images"],
)
def test_what_no_cache_can_serve_is_refused(options, message, tmp_path, model, cache):
    with pytest.raises(prefcache.UsageError, match=message):
        make(CachedDPO, model, tmp_path / "o", reference={"reference_cache": cache}, **options)


def test_a_loaded_reference_is_refused(model, tmp_path):
    with pytest.raises(prefcache.UsageError, match="ref_model is a loaded model"):
        CachedDPO(str(model), torch.nn.Linear(1, 1), DPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_other_trainers_are_refused(model, tmp_path):
    class Wrong(CachedReference, SFTTrainer):
        pass

    with pytest.raises(prefcache.UsageError, match="neither a DPOTrainer nor a KTOTrainer"):
        Wrong(str(model))


def test_a_trainer_named_before_the_mixin_is_refused():
    with pytest.raises(prefcache.UsageError, match=r"Write `class Wrong\(CachedReference, DPOTrainer\)`"):

        class Wrong(DPOTrainer, CachedReference):
            pass


@pytest.mark.parametrize("folder", [None, 5], ids=str)
def test_a_cache_that_is_no_folder_is_refused(folder, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(prefcache.UsageError, match=f"cache is {folder}; expected a folder"):
        make(CachedDPO, model, tmp_path / "o", reference={"reference_cache": folder})
    assert not (tmp_path / str(folder)).exists()


@pytest.mark.slow
def test_the_newest_version_that_pip_finds_trains_the_same_or_is_refused(tmp_path, model):
    """An untested version must end with a sentence; a tested one must give the losses of the version installed here."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "newest"), "trl"]
    if (done := subprocess.run(pip, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"pip finds no trl: {done.stderr.strip().splitlines()[-1]}")
    newest = next((tmp_path / "newest").glob("trl-*.dist-info")).name.removeprefix("trl-").removesuffix(".dist-info")
    command = [sys.executable, "-m", __name__, "CachedDPO", str(model), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "newest")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    if not newest.startswith("1.16."):
        assert f"TRL {newest} is installed, and prefcache.trl was tested with" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    here = losses(train(DPOTrainer, model, tmp_path / "o", max_steps=8, per_device_train_batch_size=2))
    assert json.loads(done.stdout.splitlines()[-1])[0] == pytest.approx(here, abs=1e-6)


def test_an_untested_version_is_refused(model, monkeypatch):
    monkeypatch.setattr("prefcache.trl.version", lambda name: "1.160.1")
    with pytest.raises(
        prefcache.UsageError, match=re.escape("TRL 1.160.1 is installed, and prefcache.trl was tested with 1.16")
    ):
        CachedDPO(str(model))


def main(name, model, folder):
    """Train in this process, which may be one of several, and print the losses and the rows of the cache."""
    trainer, cache = globals()[name], Path(folder) / "cache"
    reference = {"reference_cache": cache} if issubclass(trainer, CachedReference) else None
    trained = train(trainer, model, Path(folder) / "o", max_steps=8, per_device_train_batch_size=2, reference=reference)
    if trained.accelerator.is_main_process:
        n_rows = len(prefcache.open_cache(cache, model=model, quiet=True)) if reference else None
        print(json.dumps([losses(trained), n_rows]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
