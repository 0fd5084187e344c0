"""The reference through Transformers: packed rows, a prompt once for all of its answers, the head where it counts.

    shared   no padding; a prompt is computed once, each answer sees it and itself only
    packed   no padding
    padded   batches of the model's plain forward, padded on the right

The first of these that is right for the model is taken: it is tried, at start, on some of the sequences to be scored.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch

from pipeline import attention, packing
from pipeline.config import Score
from pipeline.engines import PACKAGES, dtype_of
from pipeline.engines.loading import load_frozen
from pipeline.errors import ResourceError, UsageError
from pipeline.identity import Reference, attention_kernel
from pipeline.identity import numerics as numerics_record
from pipeline.logprobs import completion_logps, lay_out, plain_logps, row_logps, use_float32_head
from pipeline.schema import Sequence

# Largest and mean deviation of a token from the same model's plain forward that is still rounding.
ROUNDING = {"float32": (1e-3, 1e-5), "float16": (0.1, 0.01), "bfloat16": (0.75, 0.05)}
_TRIED = 24  # sequences: the longest, and some that share a prompt


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
        self._dtype = dtype_of(reference.folder, score, device)
        self._model = load_frozen(reference, self._dtype, score.attention, device)
        use_float32_head(self._model, frozen=True)
        self._attention, self._wanted = attention_kernel(reference.folder, score.attention), score.rows
        self._budget = score.tokens_per_batch or (2_048 if device == "cpu" else 16_384)
        self.rows: str | None = None  # shared, packed or padded; decided with the first sequences
        self.facts: dict[str, Any] = {}

    def score(self, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
        if self.rows is None:
            self._choose(sequences)
        return self._score(sequences)

    def close(self) -> None:
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- how sequences share a forward -------------------------------------------------------------------------------

    def _choose(self, sequences: SequenceOf[Sequence]) -> None:
        """The first way that gives, for some of these sequences, what the model's plain forward gives."""
        reasons = []
        self.rows = "padded"
        ways = {"auto": ("shared", "packed"), "padded": ()}.get(self._wanted, (self._wanted,))
        for way in ways:
            if (reason := self._wrong(way, _to_try(sequences))) is None:
                self.rows = way
                break
            reasons.append(f"not {way}: {reason}")
        self.facts = {"rows": self.rows, **({"why": "; ".join(reasons)} if reasons else {})}
        if reasons and self._wanted != "auto":
            raise UsageError(f"score.rows={self._wanted} is not right for this model ({reason}). Set it to auto.")

    def _wrong(self, way: str, sequences: list[Sequence]) -> str | None:
        """Why this way of computing does not do for this model."""
        if self._attention == "flash_attention_2":
            return "score.attention is flash_attention_2"
        if reason := attention.why_not(self._model.config):
            return reason
        with torch.inference_mode():
            plain = np.concatenate([plain_logps(self._model, each).cpu().numpy() for each in sequences])
        self.rows = way
        try:
            attention.use_segments(self._model)
            found = np.concatenate(self._score(sequences))
        except (torch.OutOfMemoryError, MemoryError, ResourceError):
            raise
        except Exception as error:  # A model that takes no segments may fail in any way.
            return self._take_back(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        deviation = np.abs(found - plain)[np.isfinite(plain)]
        largest, mean = (float(f(deviation)) if len(deviation) else 0.0 for f in (np.max, np.mean))
        if not (largest <= ROUNDING[self._dtype][0] and mean <= ROUNDING[self._dtype][1]):
            return self._take_back(f"off by up to {largest:.2g} nats a token, {mean:.2g} on average")
        return None

    def _take_back(self, reason: str) -> str:
        self.rows = "padded"
        self._model.set_attn_implementation(self._attention)
        return reason

    # -- the forward -------------------------------------------------------------------------------------------------

    def _score(self, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
        """All of them, in forwards that fit the budget; it is halved where memory does not suffice."""
        scores: dict[int, np.ndarray] = {}
        left = list(range(len(sequences)))
        while left:
            for part in self._parts(sequences, left):
                if not self._fits(sequences, part, scores):
                    self._halve([sequences[i] for i in _flat(part)])
                    break
            left = [i for i in left if i not in scores]
        return [scores[i] for i in range(len(sequences))]

    def _parts(self, sequences: SequenceOf[Sequence], left: list[int]) -> list[list[list[int]]]:
        """What shares a forward: rows of groups of indices. In a padded batch every sequence is a group."""
        chosen = [sequences[i] for i in left]
        if self.rows == "padded":
            batches = packing.token_budget_batches([each.n_tokens for each in chosen], self._budget)
            parts = [[[i] for i in batch] for batch in batches]
        else:
            groups = packing.by_prompt(chosen) if self.rows == "shared" else [[i] for i in range(len(chosen))]
            parts = packing.packed_rows(chosen, groups, self._budget)
        return [[[left[i] for i in group] for group in part] for part in parts]

    def _fits(self, sequences: SequenceOf[Sequence], part: list[list[int]], scores: dict[int, np.ndarray]) -> bool:
        try:
            with torch.inference_mode():
                if self.rows == "padded":
                    found = completion_logps(self._model, [sequences[i] for i in _flat(part)])
                else:
                    row = lay_out([[sequences[i] for i in group] for group in part])
                    branches = [attention.Branch(*branch) for branch in row.branches]
                    device = next(self._model.parameters()).device
                    found = row_logps(
                        self._model, row, attention.Segments(row.trunks, branches, device, self._attention == "eager")
                    )
                # One transfer for all of them.
                values = np.split(torch.cat(found).cpu().numpy(), np.cumsum([len(each) for each in found])[:-1])
        except torch.OutOfMemoryError:
            return False
        scores.update(zip(_flat(part), values, strict=True))
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


def _to_try(sequences: SequenceOf[Sequence]) -> list[Sequence]:
    """The longest with all that share its prompt, so that its window is exceeded if any is; and some others."""
    longest_first = sorted(packing.by_prompt(sequences), key=lambda group: -max(sequences[i].n_tokens for i in group))
    apart = longest_first[:: max(1, len(longest_first) // 8)]
    chosen = _flat([longest_first[0][:4], *(group[:4] for group in apart[1:])])
    return [sequences[i] for i in chosen[:_TRIED]]


def _flat(groups: Iterable[Iterable[int]]) -> list[int]:
    return [i for group in groups for i in group]


def _device(score: Score) -> str:
    if score.ray is not None and (score.device == "cuda" or (score.device == "auto" and score.ray.gpus)):
        return "cuda"  # of Ray's actors; the machine that asks them may have none
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if score.device == "cuda" and found == "cpu":
        raise UsageError("score.device is cuda, but PyTorch sees no GPU. Set it to auto or cpu.")
    return found if score.device == "auto" else score.device
