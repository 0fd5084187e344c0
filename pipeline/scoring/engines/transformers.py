"""The reference by Transformers, with the forward that the trainer also uses; see pipeline/model/forward.py.

When memory runs out, the token budget of a forward is halved and scoring continues.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from prefcache.pipeline import identity
from prefcache.pipeline.config import Score
from prefcache.pipeline.errors import ResourceError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.image_processor import PromptImages
from prefcache.pipeline.model.oom import is_out_of_memory
from prefcache.pipeline.progress import counting, working
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.engines import EngineSpec, resolve_dtype

_PACKAGES = ("torch", "transformers")


def numerics(reference: Reference, score: Score) -> dict[str, str]:
    from prefcache.pipeline.model.attention import choose_kernel

    device = _choose_device(score)
    optional = [*(["peft"] if reference.adapter else []), *(["bitsandbytes"] if reference.quantization else [])]
    return identity.numerics(
        "transformers",
        [*_PACKAGES, *optional],
        device=device,
        dtype=resolve_dtype(reference.folder, score, device),
        head_dtype=_choose_head_dtype(reference, score, device),
        attention=choose_kernel(reference.folder, score.attention),
        layout="1",
    )


def _choose_device(score: Score) -> str:
    import torch

    if score.ray is not None and (score.device == "cuda" or (score.device == "auto" and score.ray.gpus)):
        return "cuda"  # that of Ray's actors; the machine that starts them may have no GPU
    available = "cuda" if torch.cuda.is_available() else "cpu"
    if score.device == "cuda" and available == "cpu":
        raise UsageError("score.device is cuda, but PyTorch sees no GPU. Set it to auto or cpu.")
    return available if score.device == "auto" else score.device


def _choose_head_dtype(reference: Reference, score: Score, device: str) -> str:
    from prefcache.pipeline.model.lm_head import choose_head_dtype

    # An adapter may be merged into the head, in float32, and would be lost in fewer bits.
    arithmetic = "float32" if reference.adapter else resolve_dtype(reference.folder, score, device)
    return choose_head_dtype(score.head_dtype, arithmetic, device)


class TransformersEngine:
    def __init__(self, reference: Reference, score: Score, images: PromptImages | None = None) -> None:
        from prefcache.pipeline.model.attention import choose_kernel
        from prefcache.pipeline.model.forward import Forward
        from prefcache.pipeline.model.lm_head import set_head_dtype
        from prefcache.pipeline.model.vision import Vision
        from prefcache.pipeline.scoring.baseline import load_frozen
        from prefcache.pipeline.scoring.cached_features import CachedFeatures

        device = _choose_device(score)
        dtype, kernel = resolve_dtype(reference.folder, score, device), choose_kernel(reference.folder, score.attention)
        model = load_frozen(reference, dtype, score.attention, device)
        set_head_dtype(model, _choose_head_dtype(reference, score, device), frozen=True)
        self._features = CachedFeatures(model, images, reference, device, dtype, kernel) if images else None
        vision = Vision(model, self._features) if self._features else None
        self._forward = Forward(model, kernel, score.rows, dtype, "score.rows", vision)
        self._budget = score.tokens_per_batch or (2_048 if device == "cpu" else 16_384)
        self.facts: dict[str, Any] = {}

    def score(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        if self._features:
            self._features.compute({image for sequence in sequences for image in sequence.images})
        if self._forward.layout is None:
            with working("try the layouts of rows"):
                self._forward.choose_layout(sequences, self._score)
            reason = {"why": self._forward.layout_reason} if self._forward.layout_reason else {}
            self.facts = {"rows": self._forward.layout, **reason, **self.facts}
        return self._score(sequences)

    def close(self) -> None:
        import torch

        self._forward.model = self._forward.vision = self._features = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _score(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """Score all of them in forwards that fit the budget, which is halved whenever memory runs out."""
        scores: dict[int, np.ndarray] = {}
        missing = list(range(len(sequences)))
        with counting("forward passes", len(sequences), "sequences") as counter:
            while missing:
                for part in self._forward.plan_batches([sequences[i] for i in missing], self._budget):
                    rows = [[missing[i] for i in row] for row in part]
                    logps = self._run_forward(sequences, rows)
                    if logps is None:
                        self._halve_budget([sequences[i] for row in rows for i in row])
                        break
                    scores.update(zip([i for row in rows for i in row], logps, strict=True))
                    counter.add(len(logps))
                missing = [i for i in missing if i not in scores]
        return [scores[i] for i in range(len(sequences))]

    def _run_forward(self, sequences: Sequence[TokenSequence], rows: list[list[int]]) -> list[np.ndarray] | None:
        """Return the log-probs of these rows in one forward, or None if they do not fit in memory."""
        import torch

        from prefcache.pipeline.model.forward import split_on_host

        try:
            with torch.inference_mode():
                return split_on_host(self._forward.logps([[sequences[i] for i in row] for row in rows]))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _halve_budget(self, sequences: list[TokenSequence]) -> None:
        # Not in the exception handler, which would keep the failed forward's tensors alive.
        import torch

        torch.cuda.empty_cache()
        n_tokens = sum(sequence.n_tokens for sequence in sequences)
        if len(sequences) == 1:
            raise ResourceError(
                f"A sequence of {n_tokens} tokens does not fit in memory. "
                "Lower prepare.max_length, or score.dtype to bfloat16."
            )
        self._budget = max(min(self._budget, n_tokens) // 2, 1)
        self.facts["tokens_per_batch"] = self._budget


SPEC = EngineSpec(
    numerics=numerics,
    load=TransformersEngine,
    remedy="Try {}score.rows=padded or score.attention=eager, and report it.",
    settings=frozenset({"dtype", "head_dtype", "attention", "rows"}),
    packages=_PACKAGES,
)
