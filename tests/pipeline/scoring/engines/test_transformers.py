"""The engine gives what the plain forward gives, however it packs, and says how it packed and why."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from prefcache.pipeline.config import Score
from prefcache.pipeline.errors import ResourceError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import forward
from prefcache.pipeline.model.logprobs import plain_logps
from prefcache.pipeline.model.packing import row_tokens
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.baseline import load_frozen
from prefcache.pipeline.scoring.engines.transformers import TransformersEngine, numerics
from tests.helpers.models import build, sequence

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """A tiny model of an architecture, saved once."""

    @functools.cache
    def save(name: str) -> Reference:
        folder = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(folder)
        return Reference(folder)

    return save


def pairs(n: int) -> list[TokenSequence]:
    """Two answers to each of n prompts, of 2 to 40 tokens."""
    found = []
    for i in range(n):
        prompt = sequence(2 + 7 * i % 39, 1, seed=i).prompt_ids
        found += [TokenSequence(prompt, sequence(1, 1 + (i * k) % 23, seed=i).completion_ids) for k in (3, 5)]
    return found


SEQUENCES = pairs(12)


@functools.cache
def plain(reference: Reference, attention: str) -> list[np.ndarray]:
    model = load_frozen(reference, "float32", attention, "cpu")
    with torch.no_grad():
        return [plain_logps(model, sequence).numpy() for sequence in SEQUENCES]


def deviation(engine: TransformersEngine, reference: Reference, attention: str = "sdpa") -> float:
    """The largest difference from the plain float32 forward of the same sequences."""
    scores, expected = engine.score(SEQUENCES), plain(reference, attention)
    assert [(logps.dtype, len(logps)) for logps in scores] == [(np.float32, len(logps)) for logps in expected]
    return float(np.abs(np.concatenate(scores) - np.concatenate(expected)).max())


@pytest.mark.parametrize("rows", ["shared", "packed", "padded"])
@pytest.mark.parametrize("budget", [16, 60, 4096])
def test_values_are_those_of_the_plain_forward_however_sequences_are_packed(reference, rows, budget):
    engine = TransformersEngine(reference("llama"), Score(rows=rows, tokens_per_batch=budget))
    assert deviation(engine, reference("llama")) < 2e-5
    assert engine.facts == {"rows": rows}


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "gpt2", "qwen3-moe"])
def test_prompts_are_shared_where_that_is_right(reference, name):
    engine = TransformersEngine(reference(name), Score())
    assert deviation(engine, reference(name)) < 2e-5
    assert engine.facts == {"rows": "shared"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stablelm", "take no segments"),
        ("mamba", "carries a state"),
        ("qwen3-next", "carries a state"),
        ("llama4", "chunked_attention"),
    ],
)
def test_where_sharing_is_wrong_rows_are_padded_and_the_reason_is_recorded(reference, name, reason):
    engine = TransformersEngine(reference(name), Score())
    assert deviation(engine, reference(name)) < 5e-5
    assert engine.facts["rows"] == "padded" and reason in engine.facts["why"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_capped_attention_is_always_computed_with_its_caps(reference, attention):
    # SDPA has no caps, and Transformers silently leaves them out; eager attention is the model's definition.
    gemma2, score = reference("gemma2"), Score(attention=attention)
    engine = TransformersEngine(gemma2, score)
    assert deviation(engine, gemma2, "eager") < 2e-5
    assert numerics(gemma2, score)["attention"] == "eager" and engine.facts == {"rows": "shared"}


def test_the_longest_rows_come_first(reference):
    engine = TransformersEngine(reference("llama"), Score(tokens_per_batch=64))
    engine.score(SEQUENCES)
    sizes = [row_tokens(SEQUENCES, row) for part in engine._forward.plan_batches(SEQUENCES, 64) for row in part]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_budget_until_a_single_sequence_does_not_fit(reference, monkeypatch, error):
    engine, compute = TransformersEngine(reference("llama"), Score(rows="shared")), forward.row_logps
    engine.score(SEQUENCES[:2])

    def fail_beyond(limit: int) -> None:
        """As on a device on which no forward of more than `limit` tokens fits."""

        def compute_or_fail(model, row, **options):
            if len(row.input_T) > limit:
                raise error
            return compute(model, row, **options)

        monkeypatch.setattr(forward, "row_logps", compute_or_fail)

    fail_beyond(100)
    assert deviation(engine, reference("llama")) < 2e-5
    assert engine.facts["tokens_per_batch"] == engine._budget <= 100
    fail_beyond(5)
    with pytest.raises(ResourceError, match=r"prepare\.max_length"):
        engine.score(SEQUENCES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(reference, dtype):
    engine = TransformersEngine(reference("llama"), Score(dtype=dtype))
    assert 1e-5 < deviation(engine, reference("llama")) < 0.75
    assert engine.facts["rows"] == "shared"


def test_the_record_names_what_the_head_multiplies(reference, tmp_path):
    """Half precision on a GPU only, here one of Ray's; and never with an adapter, which may be merged into the head."""
    llama = reference("llama")
    on_gpu = Score(dtype="bfloat16", device="cuda", ray={"actors": 1})
    assert numerics(llama, on_gpu)["head_dtype"] == "bfloat16"
    assert numerics(llama, on_gpu.model_copy(update={"head_dtype": "float32"}))["head_dtype"] == "float32"
    assert numerics(Reference(llama.folder, tmp_path), on_gpu)["head_dtype"] == "float32"
    assert numerics(llama, Score(dtype="bfloat16"))["head_dtype"] == "float32"
    assert numerics(llama, Score(head_dtype="float16"))["head_dtype"] == "float16"


@pytest.mark.parametrize("head_dtype", ["bfloat16", "float16"])
def test_a_half_precision_head_stays_near_float32(reference, head_dtype):
    engine = TransformersEngine(reference("llama"), Score(head_dtype=head_dtype))
    assert 1e-4 < deviation(engine, reference("llama")) < 0.1
