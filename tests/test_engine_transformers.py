"""The engine gives what the plain forward gives, however it packs, and says how it packed and why."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models_for_tests import build, sequence

from pipeline.config import Score
from pipeline.errors import ResourceError
from pipeline.identity import Reference
from pipeline.model import forward
from pipeline.model.logprobs import plain_logps
from pipeline.model.packing import n_in_row
from pipeline.schema import Sequence
from pipeline.scoring.engines import transformers as engine_file
from pipeline.scoring.engines.loading import load_frozen

torch.set_num_threads(1)


def saved(folder: Path, name: str, **more) -> Reference:
    build(name, **more).save_pretrained(folder)
    return Reference(folder)


def pairs(n: int) -> list[Sequence]:
    """Two answers to each of n prompts, of 2 to 40 tokens."""
    found = []
    for i in range(n):
        prompt = sequence(2 + 7 * i % 39, 1, seed=i).prompt_ids
        found += [Sequence(prompt, sequence(1, 1 + (i * k) % 23, seed=i).completion_ids) for k in (3, 5)]
    return found


SEQUENCES = pairs(12)


def plain(reference: Reference, dtype: str = "float32", attention: str = "sdpa") -> list[np.ndarray]:
    model = load_frozen(reference, dtype, attention, "cpu")
    with torch.no_grad():
        return [plain_logps(model, each).numpy() for each in SEQUENCES]


def largest(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    assert [len(each) for each in found] == [len(each) for each in expected]
    assert all(each.dtype == np.float32 for each in found)
    return float(np.abs(np.concatenate(found) - np.concatenate(expected)).max())


@pytest.mark.parametrize("rows", ["shared", "packed", "padded"])
@pytest.mark.parametrize("budget", [16, 60, 4096])
def test_however_sequences_are_packed_the_values_are_those_of_the_plain_forward(tmp_path, rows, budget):
    reference = saved(tmp_path, "llama")
    engine = engine_file.load(reference, Score(rows=rows, tokens_per_batch=budget))
    assert largest(engine.score(SEQUENCES), plain(reference)) < 2e-5
    assert engine.facts == {"rows": rows}


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "gpt2", "qwen3-moe"])
def test_prompts_are_shared_where_that_is_right(tmp_path, name):
    reference = saved(tmp_path, name)
    engine = engine_file.load(reference, Score())
    assert largest(engine.score(SEQUENCES), plain(reference)) < 2e-5
    assert engine.facts == {"rows": "shared"}


@pytest.mark.parametrize(
    ("name", "reason"), [("stablelm", "take no segments"), ("mamba", "mamba"), ("qwen3-next", "linear_attention")]
)
def test_where_it_is_not_the_engine_pads_and_says_why(tmp_path, name, reason):
    reference = saved(tmp_path, name)
    attention = "eager" if name == "mamba" else "sdpa"
    engine = engine_file.load(reference, Score(attention=attention))
    assert largest(engine.score(SEQUENCES), plain(reference, attention=attention)) < 5e-5
    assert engine.facts["rows"] == "padded" and reason in engine.facts["why"]


def test_the_longest_comes_first(tmp_path):
    engine = engine_file.load(saved(tmp_path, "llama"), Score(tokens_per_batch=64))
    engine.score(SEQUENCES)
    parts = engine._parts(SEQUENCES, list(range(len(SEQUENCES))))
    sizes = [n_in_row(SEQUENCES, group) for part in parts for group in part]
    assert sizes == sorted(sizes, reverse=True)


def out_of_memory(engine, limit: int):
    """A device on which no forward of more than `limit` tokens fits."""
    real = forward.row_logps

    def compute(model, row, segments, **options):
        if len(row.input_T) > limit:
            raise torch.OutOfMemoryError("no room")
        return real(model, row, segments, **options)

    return compute


def test_out_of_memory_halves_the_budget_and_goes_on(tmp_path, monkeypatch):
    reference = saved(tmp_path, "llama")
    engine = engine_file.load(reference, Score(rows="shared"))
    engine.score(SEQUENCES[:2])
    monkeypatch.setattr(forward, "row_logps", out_of_memory(engine, 100))
    assert largest(engine.score(SEQUENCES), plain(reference)) < 2e-5
    assert engine._budget <= 100


def test_a_sequence_that_never_fits_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    engine = engine_file.load(saved(tmp_path, "llama"), Score(rows="shared"))
    engine.score(SEQUENCES[:2])
    monkeypatch.setattr(forward, "row_logps", out_of_memory(engine, 5))
    with pytest.raises(ResourceError, match=r"prepare\.max_length"):
        engine.score(SEQUENCES)


def test_half_precision_stays_near_float32(tmp_path):
    reference = saved(tmp_path, "llama")
    for dtype in ("bfloat16", "float16"):
        engine = engine_file.load(reference, Score(dtype=dtype))
        found = engine.score(SEQUENCES)
        assert engine.facts["rows"] == "shared"
        assert 1e-5 < largest(found, plain(reference)) < 0.75


def test_eager_attention_shares_prompts_too(tmp_path):
    reference = saved(tmp_path, "gemma2")
    engine = engine_file.load(reference, Score(attention="eager"))
    assert largest(engine.score(SEQUENCES), plain(reference, attention="eager")) < 2e-5
    assert engine.facts == {"rows": "shared"}


def test_capped_attention_is_never_computed_without_its_caps(tmp_path):
    # SDPA has no caps and Transformers leaves them out without a word; eager attention is the model's definition.
    reference = saved(tmp_path, "gemma2")
    numerics = engine_file.numerics(reference, Score())
    engine = engine_file.load(reference, Score())
    assert largest(engine.score(SEQUENCES), plain(reference, attention="eager")) < 2e-5
    assert numerics["attention"] == "eager" and engine.facts == {"rows": "shared"}
