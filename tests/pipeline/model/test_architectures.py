"""Models of other kinds than Llama: scored and trained where their log-probs mean something, refused with a sentence where not."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prefcache.pipeline.config import Score, Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import architectures, attention, trainable
from prefcache.pipeline.model.attention import choose_kernel
from prefcache.pipeline.model.forward import Forward
from prefcache.pipeline.model.logprobs import padded_logps, plain_logps
from prefcache.pipeline.scoring.baseline import score_plainly
from prefcache.pipeline.scoring.engines import transformers as engine_file
from tests.architectures import NOT_RUN, examine, save_tiny
from tests.helpers.models import SIZES, UNSHARABLE, build, sequence
from tests.helpers.project import write_config

torch.set_num_threads(1)

WITHOUT_SDPA = ("bloom", "gptj", "codegen", "mpt", "mamba2", "rwkv", "xglm")
# Ragged, and none with a prompt so short that a batch would begin at its first position.
SEQUENCES = [sequence(n, m, seed=n) for n, m in [(20, 9), (7, 5), (9, 1), (40, 12), (12, 30)]]


def assert_scores(folder, found, atol: float = 2e-5) -> None:
    """The log-probs of the first answers, by nothing of ours."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    # In eval mode RWKV halves its hidden states, which shows in the epsilon of its norms; it has no dropout.
    model.train(model.config.model_type == "rwkv")
    for each, actual in zip(SEQUENCES, found, strict=False):
        ids = torch.from_numpy(each.ids.astype(np.int64))
        with torch.no_grad():
            logps = model(ids[None]).logits[0].log_softmax(-1)
        expected = logps[:-1].gather(1, ids[1:, None])[len(each.prompt_ids) - 1 :, 0].numpy()
        np.testing.assert_allclose(actual, expected, atol=atol)


# -- models without SDPA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "setting"), [*((name, "sdpa") for name in WITHOUT_SDPA), ("gptj", "eager")])
def test_a_model_without_sdpa_is_scored_by_its_own_attention(tmp_path, name, setting):
    build(name).save_pretrained(tmp_path)
    reference, score = Reference(tmp_path), Score(attention=setting)
    engine = engine_file.TransformersEngine(reference, score)
    plain = score_plainly(reference, SEQUENCES)
    # In one batch, where all but one are padded, and alone.
    for found in (engine.score(SEQUENCES), [engine.score([each])[0] for each in SEQUENCES], plain):
        assert len(found) == len(SEQUENCES)
        assert_scores(tmp_path, found)
    assert engine_file.numerics(reference, score)["attention"] == "eager"
    assert engine.facts["rows"] == "padded"


def test_the_attention_of_other_models_is_what_it_was(tmp_path):
    for name, kernel in [("llama", "sdpa"), ("stablelm", "sdpa"), ("gemma2", "eager"), ("gpt-oss", "eager")]:
        build(name).save_pretrained(tmp_path / name)
        assert choose_kernel(tmp_path / name, "sdpa") == kernel
        assert choose_kernel(tmp_path / name, "eager") == "eager"
        assert choose_kernel(tmp_path / name, "flash_attention_2") == "flash_attention_2"


def test_every_command_takes_a_model_without_sdpa(prefcache, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 512, "eos_token_id": tokenizer.eos_token_id}
    build("gptj", **sizes).save_pretrained(tmp_path / "gptj")
    tokenizer.save_pretrained(tmp_path / "gptj")
    config = write_config(tmp_path, tmp_path / "gptj", epochs=1, samples=0)
    (tmp_path / "pairs.jsonl").write_text(
        "".join(f'{{"prompt": "why {i}?", "chosen": "the cat {i}", "rejected": "a dog"}}\n' for i in range(12))
    )
    prefcache("prepare", config)
    assert json.loads(prefcache("score", config, "--json").stdout)["failed"] == 0
    assert "rows padded" in prefcache("train", config, "--set", "train.run=whole").stderr
    compared = json.loads(prefcache("parity", config, "transformers", "plain", "--json").stdout)
    assert compared["token"]["max"] < 2e-5 and compared["numerics"][0]["attention"] == "eager"
    assert "attention eager" in prefcache("doctor", config).stdout
    losses = "select loss from metrics where run = 'whole' order by step limit 1"
    (first,) = json.loads(prefcache("sql", losses, "runs/tiny", "--json").stdout)
    assert math.isclose(first["loss"], math.log(2), abs_tol=1e-6)
    prefcache("train", config, "--set", "train.lora={}", "--set", "train.run=adapted")
    assert 0 <= json.loads(prefcache("merge", "runs/tiny/adapted", "--json").stdout)["mean"] <= 1e-5


def test_weights_that_a_model_halves_to_infer_are_trained_and_saved_whole(tmp_path):
    build("rwkv").save_pretrained(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    model = trainable.load(Reference(tmp_path), Train(), "eager", torch.device("cpu")).model
    assert_scores(tmp_path, [plain_logps(model, SEQUENCES[0]).detach().numpy()])
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


# -- what is tried at the start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["auto", "padded"])
def test_a_model_that_sees_what_comes_after_is_refused(tmp_path, rows):
    torch.manual_seed(0)
    BertLMHeadModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    for compute in (
        lambda: score_plainly(Reference(tmp_path), SEQUENCES),
        lambda: engine_file.TransformersEngine(Reference(tmp_path), Score(rows=rows)).score(SEQUENCES),
    ):
        with pytest.raises(UsageError, match=r"BertLMHeadModel is not causal here: .* has is_decoder: false"):
            compute()
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"is_decoder": True}))
    found = engine_file.TransformersEngine(Reference(tmp_path), Score(rows=rows)).score(SEQUENCES)
    assert_scores(tmp_path, found)


def test_a_model_whose_rows_mix_in_a_batch_computes_one_at_a_time():
    class Mixed(LlamaForCausalLM):
        """As where experts take so many tokens of a batch and no more."""

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + out.logits.mean(0) - out.logits
            return out

    torch.manual_seed(0)
    model = Mixed(LlamaConfig(**SIZES, alibi=True)).eval()  # which no row may be shared with
    forward = Forward(model, "sdpa", "auto", "float32", "train.rows")
    with torch.no_grad():
        forward.choose_layout(SEQUENCES)
        found = forward.logps([[each] for each in SEQUENCES]).logps
        expected = [plain_logps(model, each) for each in SEQUENCES]
        wrong = padded_logps(model, SEQUENCES).logps
    assert (
        forward.layout == "padded" and "one sequence at a time: padded rows are off by up to" in forward.layout_reason
    )
    for one, other, padded in zip(found, expected, wrong, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
        assert (padded - other).abs().max() > 0.1
    with pytest.raises(UsageError, match=r"train\.rows=padded is not right for this model"):
        Forward(model, "sdpa", "padded", "float32", "train.rows").choose_layout(SEQUENCES)


def test_one_sequence_is_tried_in_company(monkeypatch):
    # A model that attends to all of its row is right for a row of one: so it is tried with others.
    def attend(module, query, key, value, mask, *, segments, scaling=None, **_):
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return found.transpose(1, 2), None

    monkeypatch.setattr(attention, "attend", attend)
    forward = Forward(build("llama"), "sdpa", "auto", "float32", "train.rows")
    forward.choose_layout(SEQUENCES[:1])
    assert forward.layout == "padded" and "not packed: off by up to" in forward.layout_reason


def test_logits_of_all_positions_are_read_where_they_belong(tmp_path):
    # TrOCR passes over `logits_to_keep`: what comes is longer than what was asked for.
    save_tiny("trocr", tmp_path)
    found = engine_file.TransformersEngine(Reference(tmp_path), Score()).score(SEQUENCES)
    assert_scores(tmp_path, found)


def test_text_of_a_model_that_also_sees_images_shares_its_prompts(tmp_path):
    assert save_tiny("gemma3", tmp_path) == "Gemma3ForConditionalGeneration"
    engine = engine_file.TransformersEngine(Reference(tmp_path), Score())
    found = engine.score(SEQUENCES)
    assert engine.facts == {"rows": "shared"}
    assert_scores(tmp_path, found)


# -- the table -------------------------------------------------------------------------------------------------------


def test_every_class_has_a_row_and_none_is_off():
    table = architectures.load()
    known = {row.model_type for row in table.rows}
    if table.measured["transformers"] == transformers.__version__:
        assert known == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for row in table.rows:
        if row.layout in ("shared", "packed", "padded"):
            assert row.deviation < 1e-3 and (row.training or row.gradient < 1e-3), row
        else:
            assert row.layout == "refused" or row.model_type in NOT_RUN, row
            assert row.reason and row.reason.rstrip(".") == row.reason.strip().rstrip("."), row


@pytest.mark.parametrize("model_type", ["qwen2", "gptj", "lfm2"])
def test_a_row_is_what_its_class_does_now(model_type):
    stored = next(row for row in architectures.load().rows if row.model_type == model_type)
    found = examine(model_type)
    assert (found.layout, found.attention, found.model_class) == (stored.layout, stored.attention, stored.model_class)
    assert (found.deviation or 0) < 1e-4 and (found.gradient or 0) < 1e-4


def test_architectures_lists_and_filters_them(prefcache):
    listed = prefcache("architectures").stdout
    assert "\nllama: LlamaForCausalLM\n    prompts are shared, attention sdpa, within " in listed
    assert f"Measured {architectures.load().measured['date']} with torch " in listed
    found = json.loads(prefcache("architectures", "GPTJ", "--json").stdout)
    assert [(row["model_class"], row["layout"]) for row in found["rows"]] == [("GPTJForCausalLM", "padded")]
    assert "The nearest is llama. " in prefcache("architectures", "lama2", code=2).stderr


def test_the_families_that_cannot_share_are_padded_in_the_table():
    stored = {row.model_class: row.layout for row in architectures.load().rows}
    classes = {type(build(name)).__name__ for name in UNSHARABLE}
    assert {stored[each] for each in classes} == {"padded"}
