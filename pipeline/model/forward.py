"""A model, and how sequences share one forward pass of it. Scorer and trainer compute log-probs here and nowhere else.

    shared   no padding; a prompt is computed once for all of its answers, each answer sees it and itself only
    packed   no padding
    padded   batches of the model's plain forward, padded on the right

The first of these that is right for the model is taken: it is tried, at start, on some of the sequences that are to come.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch

from pipeline.errors import ResourceError, UsageError
from pipeline.model import attention, packing
from pipeline.model.logprobs import (
    Logps,
    Watch,
    completion_logps,
    lay_out,
    plain_logps,
    row_logps,
    trained_after_the_decoder,
)
from pipeline.model.memory import is_out_of_memory
from pipeline.schema import Sequence

# Largest and mean deviation of a token from the same model's plain forward that is still rounding.
ROUNDING = {"float32": (1e-3, 1e-5), "float16": (0.1, 0.01), "bfloat16": (0.75, 0.05)}
_TRIED = 24  # sequences: the longest, and some that share a prompt
Compute = Callable[[SequenceOf[Sequence]], list[np.ndarray]]


class Forward:
    """`kernel` is the model's own attention, which padded batches and generation use."""

    def __init__(self, model: Any, kernel: str, wanted: str, dtype: str, setting: str) -> None:
        self.model, self._kernel, self._wanted = model, kernel, wanted
        self._dtype, self._setting = dtype, setting
        self._compute: Compute = self._all
        self.way: str | None = None  # decided with the first sequences
        self.why: str | None = None

    # -- how sequences share a forward -------------------------------------------------------------------------------

    def choose(self, sequences: SequenceOf[Sequence], compute: Compute | None = None) -> None:
        """The first way that gives, for some of these sequences, what the model's plain forward gives. `compute`, unless it is
        a plain loop, makes log-probs by the way that is tried."""
        reasons = []
        self._compute = compute or self._all
        tried = {"auto": ("shared", "packed"), "padded": ()}.get(self._wanted, (self._wanted,))
        for way in tried:
            if (reason := self._wrong(way, _to_try(sequences))) is None:
                break
            reasons.append(f"not {way}: {reason}")
        else:
            self.way = "padded"
        self.why = "; ".join(reasons) or None
        if reasons and self._wanted != "auto":
            raise UsageError(f"{self._setting}={self._wanted} is not right for this model ({reason}). Set it to auto.")

    def _wrong(self, way: str, sequences: list[Sequence]) -> str | None:
        """Why this way of computing does not do for this model."""
        if self._kernel == "flash_attention_2":
            return "the attention is flash_attention_2"
        if reason := attention.why_not(self.model.config):
            return reason
        with torch.no_grad():
            plain = np.concatenate([plain_logps(self.model, each).cpu().numpy() for each in sequences])
        self.way = way
        try:
            if others := trained_after_the_decoder(self.model):
                return self._take_back(f"its head trains more than a matrix ({others[0]})")
            attention.use_segments(self.model)
            with torch.no_grad():
                found = np.concatenate(self._compute(sequences))
        except Exception as error:  # A model that takes no segments may fail in any way.
            if is_out_of_memory(error) or isinstance(error, ResourceError):
                raise
            return self._take_back(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        deviation = np.abs(found - plain)[np.isfinite(plain)]
        largest, mean = (float(f(deviation)) if len(deviation) else 0.0 for f in (np.max, np.mean))
        if not (largest <= ROUNDING[self._dtype][0] and mean <= ROUNDING[self._dtype][1]):
            return self._take_back(f"off by up to {largest:.2g} nats a token, {mean:.2g} on average")
        return None

    def _take_back(self, reason: str) -> str:
        self.way = None
        self.model.set_attn_implementation(self._kernel)
        return reason

    def _all(self, sequences: SequenceOf[Sequence]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for part in self.parts(sequences, max(each.n_tokens for each in sequences)):
            of_part = self.logps([[sequences[i] for i in group] for group in part]).logps
            found |= {i: logps.cpu().numpy() for i, logps in zip(flat(part), of_part, strict=True)}
        return [found[i] for i in range(len(sequences))]

    # -- the forward -------------------------------------------------------------------------------------------------

    def groups(self, sequences: SequenceOf[Sequence]) -> list[list[int]]:
        """Indices of what is computed together: answers with the same prompt, where that is shared."""
        return packing.by_prompt(sequences) if self.way == "shared" else [[i] for i in range(len(sequences))]

    def parts(self, sequences: SequenceOf[Sequence], budget: int) -> list[list[list[int]]]:
        """What shares a forward of at most `budget` tokens: groups of indices. In a padded batch every sequence is one."""
        if self.way == "padded":
            return [
                [[i] for i in batch] for batch in packing.token_budget_batches([s.n_tokens for s in sequences], budget)
            ]
        return packing.packed_rows(sequences, self.groups(sequences), budget)

    def logps(
        self, groups: SequenceOf[SequenceOf[Sequence]], *, squares: bool = False, watch: Watch | None = None
    ) -> Logps:
        """Of every sequence of the groups, in their order, the log-prob of each completion token, in one forward."""
        if self.way == "padded":
            every = [sequence for group in groups for sequence in group]
            return completion_logps(self.model, every, squares=squares, watch=watch)
        row = lay_out(groups)
        branches = [attention.Branch(*branch) for branch in row.branches]
        device = next(self.model.parameters()).device
        segments = attention.Segments(row.trunks, branches, device, self._kernel == "eager")
        return row_logps(self.model, row, segments, squares=squares, watch=watch)

    @contextlib.contextmanager
    def plainly(self) -> Iterator[None]:
        """The model as it came, for what is not log-probs."""
        if self.way in (None, "padded"):
            yield
            return
        self.model.set_attn_implementation(self._kernel)
        try:
            yield
        finally:
            attention.use_segments(self.model)


def _to_try(sequences: SequenceOf[Sequence]) -> list[Sequence]:
    """The longest with all that share its prompt, so that its window is exceeded if any is; and some others."""
    longest_first = sorted(packing.by_prompt(sequences), key=lambda group: -max(sequences[i].n_tokens for i in group))
    apart = longest_first[:: max(1, len(longest_first) // 8)]
    chosen = flat([longest_first[0][:4], *(group[:4] for group in apart[1:])])
    return [sequences[i] for i in chosen[:_TRIED]]


def flat(groups: Iterable[Iterable[int]]) -> list[int]:
    return [i for group in groups for i in group]
