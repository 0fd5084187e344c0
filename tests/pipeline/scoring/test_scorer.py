"""The comparison of an engine with the plain forward, and what is done about a deviation."""

import numpy as np
import pyarrow as pa
import pytest

from prefcache.pipeline.config import Score
from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import IDS, IMAGE_IDS
from prefcache.pipeline.scoring.scorer import measure_parity, sample_slots
from prefcache.pipeline.stored.prepared import Sequences
from prefcache.pipeline.stored.scoring_plan import Plan

PLAIN = [-1.0, -3.0]
REMEDIES = {
    "server": "serves exactly these weights",
    "vllm": "score.vllm.prefix_caching=false",
    "transformers": "score.rows=padded",
}


def test_a_sample_has_a_prompt_with_images_if_any_prompt_has_some():
    """With few of them, a sample of text alone would approve an engine that computes images wrongly."""
    images = [None] * 50 + [[b"i" * 16]] + [None] * 9
    examples = pa.table(
        {
            "prompt_ids": pa.array([[i] for i in range(60)], IDS),
            "images": pa.array(images, IMAGE_IDS),
            "chosen_ids": pa.array([[1]] * 60, IDS),
            "rejected_ids": pa.array([[2]] * 60, IDS),
        }
    )
    plan = Plan([], np.arange(0, 40), 120, 0, 0, 0, 0, {})
    assert sample_slots(plan, Sequences(examples), 4) == [100, 101, 0, 1]
    text = examples.set_column(1, "images", pa.array([None] * 60, IMAGE_IDS))
    assert sample_slots(plan, Sequences(text), 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("engine", REMEDIES)
@pytest.mark.parametrize(
    ("logps", "plain", "error"),
    [
        ([-1.0, -2.0], PLAIN, "deviates .* by up to 1 nats"),
        ([-1.0, np.nan], PLAIN, "returns no finite log-prob for 1 of 1 sequences"),
        ([-1.0, -2.0], [-1.0, np.nan], "deviates .* by up to inf nats"),  # a value where the reference has none
    ],
)
def test_a_deviation_is_refused_with_the_remedy_of_its_engine(engine, logps, plain, error):
    score, numerics = Score(engine=engine), {"engine": engine, "dtype": "float32"}
    with pytest.raises(IntegrityError, match=error) as raised:
        measure_parity(score, numerics, {}, [np.array(logps)], [np.array(plain)], Progress(quiet=True))
    assert {name for name, remedy in REMEDIES.items() if remedy in str(raised.value)} == {engine}


@pytest.mark.parametrize(
    ("numerics", "name", "remedy"),
    [
        ({"dtype": "float32", "head_dtype": "bfloat16"}, "float32, head bfloat16", "Try score.head_dtype=float32, "),
        (
            {"dtype": "bfloat16", "head_dtype": "bfloat16"},
            "bfloat16",
            "Try score.dtype=float32, score.head_dtype=float32, ",
        ),
        ({"dtype": "bfloat16", "head_dtype": "half"}, "bfloat16, head half", "Try score.dtype=float32, "),
    ],
)
def test_a_head_in_half_precision_may_deviate_as_far_and_has_its_own_remedy(numerics, name, remedy):
    score = Score(head_dtype="bfloat16")
    measure_parity(score, numerics, {}, [np.array([-1.0])], [np.array([-1.7])], Progress(quiet=True))
    with pytest.raises(IntegrityError) as raised:
        measure_parity(score, numerics, {}, [np.array([-1.0])], [np.array([-1.8])], Progress(quiet=True))
    assert f"({name}) deviates" in str(raised.value) and remedy in str(raised.value)
