"""Log-probs that somebody else computed, compared with the plain float32 forward before any is believed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.scorer import TOLERANCE

# Largest deviation of an answer's mean per token from the plain float32 forward that still counts as rounding, as when
# training starts. A single token may deviate as much as in the check of an engine.
MEAN_TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}


@dataclass(frozen=True)
class Sample:
    """Some sequences and their log-probs under one dtype."""

    dtype: str  # one that no tolerance is known for counts as the coarsest
    sequences: Sequence[TokenSequence]
    sums: Sequence[float]
    token_logps: Sequence[np.ndarray | None]  # None: only the sum is known


def compare_with_plain_forward(
    samples: Sequence[Sample],
    reference: Reference,
    images: PromptImages | None,
    *,
    origin: str,
    model: str,
    remedy: str,
) -> list[np.ndarray]:
    """Return each sample's deviations per token, as means of its answers; IntegrityError if one is more than rounding.

    `origin` says in the error where the values come from, as `The data has`; `model` whose they should be.
    """
    from prefcache.pipeline.scoring.baseline import score_plainly

    # All at once, so that the model is loaded once.
    plain = iter(score_plainly(reference, [each for sample in samples for each in sample.sequences], images))
    means = []
    for sample in samples:
        theirs = [next(plain) for _ in sample.sequences]
        means.append(_refuse_deviations(sample, theirs, origin, model, remedy))
    return means


def _refuse_deviations(sample: Sample, plain: list[np.ndarray], origin: str, model: str, remedy: str) -> np.ndarray:
    dtype = sample.dtype if sample.dtype in TOLERANCE else "bfloat16"

    def refuse(deviations: np.ndarray, allowed: float, where: str) -> None:
        i = int(deviations.argmax())
        if not deviations[i] <= allowed:  # nor where the forward gives NaN
            raise IntegrityError(
                f"{origin} {sample.sums[i]:.4f} for an answer of {len(plain[i])} tokens; {model} computes "
                f"{plain[i].sum(dtype=np.float64):.4f} in float32: {deviations[i]:.3g} nats off {where}; {allowed} is rounding "
                f"in {dtype}. {remedy}"
            )

    sums = zip(sample.sums, plain, strict=True)
    means = np.array([abs(total - logps.sum(dtype=np.float64)) / len(logps) for total, logps in sums])
    refuse(means, MEAN_TOLERANCE[dtype], "a token on average")
    lists = [
        (logps if logps is not None else plain_T, plain_T)
        for logps, plain_T in zip(sample.token_logps, plain, strict=True)
    ]
    worst = np.array([np.abs(logps - plain_T).max() for logps, plain_T in lists])
    refuse(worst, TOLERANCE[dtype], "on a token")
    return means
