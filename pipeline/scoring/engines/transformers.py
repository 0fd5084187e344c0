"""The reference by Transformers: every sequence's log-probs by the forward that the trainer uses too; see forward.py.

On out-of-memory the forward's budget halves, and the run goes on.
"""

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch

from pipeline.config import Score
from pipeline.errors import ResourceError, UsageError
from pipeline.identity import Reference, attention_kernel
from pipeline.identity import numerics as numerics_record
from pipeline.model.forward import Forward, flat
from pipeline.model.logprobs import use_float32_head
from pipeline.schema import Sequence
from pipeline.scoring.engines import PACKAGES, dtype_of
from pipeline.scoring.engines.loading import load_frozen


def numerics(reference: Reference, score: Score) -> dict[str, str]:
    device = _device(score)
    further = [*(["peft"] if reference.adapter else []), *(["bitsandbytes"] if reference.quantization else [])]
    return numerics_record(
        "transformers",
        [*PACKAGES["transformers"], *further],
        device=device,
        dtype=dtype_of(reference.folder, score, device),
        head_dtype="float32",
        attention=attention_kernel(reference.folder, score.attention),
        layout="1",
    )


class TransformersEngine:
    def __init__(self, reference: Reference, score: Score) -> None:
        device = _device(score)
        dtype, kernel = dtype_of(reference.folder, score, device), attention_kernel(reference.folder, score.attention)
        model = load_frozen(reference, dtype, score.attention, device)
        use_float32_head(model, frozen=True)
        self._forward = Forward(model, kernel, score.rows, dtype, "score.rows")
        self._budget = score.tokens_per_batch or (2_048 if device == "cpu" else 16_384)
        self.facts: dict[str, Any] = {}

    def score(self, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
        if self._forward.way is None:
            self._forward.choose(sequences, self._score)
            why = {"why": self._forward.why} if self._forward.why else {}
            self.facts = {"rows": self._forward.way, **why, **self.facts}
        return self._score(sequences)

    def close(self) -> None:
        self._forward.model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _score(self, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
        """All of them, in forwards that fit the budget; it is halved where memory does not suffice."""
        scores: dict[int, np.ndarray] = {}
        left = list(range(len(sequences)))
        while left:
            for part in self._parts(sequences, left):
                if not self._fits(sequences, part, scores):
                    self._halve([sequences[i] for i in flat(part)])
                    break
            left = [i for i in left if i not in scores]
        return [scores[i] for i in range(len(sequences))]

    def _parts(self, sequences: SequenceOf[Sequence], left: list[int]) -> list[list[list[int]]]:
        parts = self._forward.parts([sequences[i] for i in left], self._budget)
        return [[[left[i] for i in group] for group in part] for part in parts]

    def _fits(self, sequences: SequenceOf[Sequence], part: list[list[int]], scores: dict[int, np.ndarray]) -> bool:
        try:
            with torch.inference_mode():
                found = self._forward.logps([[sequences[i] for i in group] for group in part]).logps
                # One transfer for all of them.
                values = np.split(torch.cat(found).cpu().numpy(), np.cumsum([len(each) for each in found])[:-1])
        except torch.OutOfMemoryError:
            return False
        scores.update(zip(flat(part), values, strict=True))
        return True

    def _halve(self, sequences: list[Sequence]) -> None:
        # Outside the handler, which would keep the failed pass's tensors alive.
        torch.cuda.empty_cache()
        n_tokens = sum(each.n_tokens for each in sequences)
        if len(sequences) == 1:
            raise ResourceError(
                f"A sequence of {n_tokens} tokens does not fit in the memory of the GPU. "
                "Lower prepare.max_length, or score.dtype to bfloat16."
            )
        self._budget = max(min(self._budget, n_tokens) // 2, 1)
        self.facts["tokens_per_batch"] = self._budget


def load(reference: Reference, score: Score) -> TransformersEngine:
    return TransformersEngine(reference, score)


def _device(score: Score) -> str:
    if score.ray is not None and (score.device == "cuda" or (score.device == "auto" and score.ray.gpus)):
        return "cuda"  # of Ray's actors; the machine that asks them may have none
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if score.device == "cuda" and found == "cpu":
        raise UsageError("score.device is cuda, but PyTorch sees no GPU. Set it to auto or cpu.")
    return found if score.device == "auto" else score.device
