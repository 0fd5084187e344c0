"""vLLM on prompts with images, on the CPU, against Transformers' plain forward."""

from pathlib import Path

import numpy as np
import pytest

from prefcache.pipeline import image_processor
from prefcache.pipeline.config import Score
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.baseline import score_plainly
from prefcache.pipeline.scoring.engines import vllm
from tests.helpers import vision_models

# 1.2e-4 was measured.
ROUNDING = 1e-3


class Prompts:
    """Two answers each to prompts with one picture, with another one, with both, and with none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = vision_models.Pictures(image_processor.load(folder))
        self.images = PromptImages(self.pictures.processor, self.pictures)
        a, b = vision_models.picture(40, 24, seed=1), vision_models.picture(30, 44, seed=2)
        drawn = np.random.default_rng(0).integers(20, 300, (8, 9), dtype=np.int32)
        self.sequences = [
            TokenSequence(ids, drawn[2 * n + i], images=images)
            for n, pictures in enumerate(([a], [b], [b, a], []))
            for ids, images in [vision_models.ask(folder, self.pictures, pictures, "why the cat?")]
            for i in range(2)
        ]

    def engine(self, python: Path) -> vllm.VllmEngine:
        score = Score(engine="vllm", vllm={"python": str(python), "prefix_caching": False})
        return vllm.VllmEngine(Reference(self.folder), score, self.images)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "mistral3"])
def test_log_probs_are_those_of_the_plain_forward(vllm_python_for_images, monkeypatch, name):
    data = Prompts(vision_models.save(name, wide=True))
    # Two requests: both pictures together have 3 * (40 * 24 + 30 * 44) = 6,840 bytes.
    monkeypatch.setattr(vllm, "_MOST_PIXEL_BYTES", 5000)
    engine = data.engine(vllm_python_for_images)
    try:
        found = engine.score(data.sequences)
    finally:
        engine.close()
    expected = score_plainly(Reference(data.folder), data.sequences, data.images)
    deviations = [float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)]
    assert max(deviations) < ROUNDING, deviations
    # The pictures matter: with each other's picture the same answers are otherwise likely.
    first, second = data.sequences[0], data.sequences[2]
    swapped = TokenSequence(second.prompt_ids, first.completion_ids, images=second.images)
    (other,) = score_plainly(Reference(data.folder), [swapped], data.images)
    assert np.abs(other - found[0]).max() > 1e-2
