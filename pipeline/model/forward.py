"""How sequences share one forward pass of a model. Scorer and trainer compute log-probs here and nowhere else.

    shared   no padding; what sequences of one prompt begin with, the prompt at least, is computed once for all of them
    packed   no padding
    padded   batches of the model's plain forward, padded on the right

The first layout that is right for the model is used: each is tried at start on some of the sequences to come.
A model for which none is right computes one sequence at a time; a model that is not causal is refused.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from prefcache.pipeline.errors import ResourceError, UsageError
from prefcache.pipeline.model import attention, packing
from prefcache.pipeline.model.chunked_lm_head import trained_beyond_head
from prefcache.pipeline.model.device import to_host
from prefcache.pipeline.model.logprobs import Logps, RouterHook, concat_logps, padded_logps, plain_logps
from prefcache.pipeline.model.oom import is_out_of_memory
from prefcache.pipeline.model.packed_row import lay_out, row_logps
from prefcache.pipeline.model.vision import Vision
from prefcache.pipeline.schema import TokenSequence

# Largest and mean deviation per token from the same model's plain forward that still count as rounding.
ROUNDING = {"float32": (1e-3, 1e-5), "float16": (0.1, 0.01), "bfloat16": (0.75, 0.05)}
_TRIAL_SEQUENCES = 24
_TRIAL_TOKENS = 1024  # for the trials whether a model is causal and may be padded
Compute = Callable[[Sequence[TokenSequence]], list[np.ndarray]]


class Forward:
    """`kernel` is the model's own attention, used by padded batches and generation; `setting` names `wanted` in errors."""

    def __init__(
        self, model: Any, kernel: str, wanted: str, dtype: str, setting: str, vision: Vision | None = None
    ) -> None:
        self.model, self._kernel, self._wanted, self.vision = model, kernel, wanted, vision
        self._dtype, self._setting = dtype, setting
        self.layout: str | None = None  # chosen with the first sequences
        self.layout_reason: str | None = None  # why not a better one
        self._one_at_a_time = False  # padded batches of one, which have no padding

    # -- the layout --------------------------------------------------------------------------------------------------

    def choose_layout(self, sequences: Sequence[TokenSequence], compute: Compute | None = None) -> None:
        """Take the first layout that gives what the model's plain forward gives for some of these sequences.

        `compute`, by default a plain loop, computes log-probs by the layout on trial.
        """
        refuse_lookahead(self.model, sequences, self._dtype, self.vision)
        reasons = []
        candidates = {"auto": ("shared", "packed"), "padded": ()}.get(self._wanted, (self._wanted,))
        for layout in candidates:
            if (reason := self._try_layout(layout, _pick_trial(sequences), compute or self.compute_all)) is None:
                break
            reasons.append(f"not {layout}: {reason}")
        else:
            self.layout = "padded"
            if self._wanted in ("auto", "padded") and (reason := _padding_problem(self.model, sequences, self._dtype)):
                self._one_at_a_time = True
                reasons.append(f"one sequence at a time: padded rows are {reason}")
        self.layout_reason = "; ".join(reasons) or None
        if reasons and self._wanted != "auto":
            raise UsageError(f"{self._setting}={self._wanted} is not right for this model ({reason}). Set it to auto.")

    def _try_layout(self, layout: str, sequences: list[TokenSequence], compute: Compute) -> str | None:
        """Switch to this layout, or return why it is wrong for this model."""
        if self._kernel == "flash_attention_2":
            return "the attention is flash_attention_2"
        if reason := attention.unsupported_reason(self.model.config) or attention.missing_positions_reason(self.model):
            return reason
        with torch.no_grad():
            plain = np.concatenate(
                [plain_logps(self.model, sequence, self.vision).cpu().numpy() for sequence in sequences]
            )
        self.layout = layout
        try:
            if names := trained_beyond_head(self.model):
                reason = f"its head trains more than a matrix ({names[0]})"
            else:
                attention.use_segments(self.model)
                with torch.no_grad():
                    reason = _deviation(np.concatenate(compute(sequences)), plain, ROUNDING[self._dtype])
        except Exception as error:  # A model that takes no segments may fail in any way.
            if is_out_of_memory(error) or isinstance(error, ResourceError):
                raise
            reason = f"its forward does not take packed rows ({type(error).__name__})"
        if reason:
            self.layout = None
            attention.set_kernel(self.model, self._kernel)
        return reason

    def adopt(self, change: Callable[[], Callable[[], None]], sequences: Sequence[TokenSequence]) -> str | None:
        """Change the model, unless log-probs of some of these sequences then deviate; return why it was undone, or None.

        `change` returns how to undo it.
        """
        trial = _pick_trial(sequences)
        with torch.no_grad():
            before = np.concatenate(self.compute_all(trial))
            undo = change()
            try:
                reason = _deviation(np.concatenate(self.compute_all(trial)), before, ROUNDING[self._dtype])
            except Exception as error:  # A compiler or a kernel may fail in any way.
                if is_out_of_memory(error):
                    raise
                reason = f"it fails ({type(error).__name__})"
        if reason:
            undo()
        return reason

    def compute_all(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """Log-probs of every sequence, in forwards no larger than the longest one."""
        logps: dict[int, np.ndarray] = {}
        for batch in self.plan_batches(sequences, max(sequence.n_tokens for sequence in sequences)):
            batch_logps = split_on_host(self.logps([[sequences[i] for i in group] for group in batch]))
            logps |= dict(zip(flatten(batch), batch_logps, strict=True))
        return [logps[i] for i in range(len(sequences))]

    # -- the forward -------------------------------------------------------------------------------------------------

    def group(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Indices of sequences that are computed together: answers to one prompt if rows are shared, else each alone."""
        if self.layout == "shared":
            return packing.group_by_prompt(sequences)
        return [[i] for i in range(len(sequences))]

    def plan_batches(self, sequences: Sequence[TokenSequence], budget: int) -> list[list[list[int]]]:
        """Groups of indices for each forward of at most `budget` tokens."""
        if self.layout == "padded":
            batches = packing.token_budget_batches([sequence.n_tokens for sequence in sequences], budget)
            return [[[i] for i in batch] for batch in batches]
        return packing.pack_rows(sequences, self.group(sequences), budget)

    def logps(
        self,
        groups: Sequence[Sequence[TokenSequence]],
        *,
        squares: bool = False,
        router_hook: RouterHook | None = None,
    ) -> Logps:
        """Log-prob of each counted token of every sequence, in the order of the groups, in one forward."""
        options: dict[str, Any] = {"squares": squares, "router_hook": router_hook, "vision": self.vision}
        with self.vision.one_forward() if self.vision else contextlib.nullcontext():
            if self.layout != "padded":
                return row_logps(self.model, lay_out(groups, self.vision), eager=self._kernel == "eager", **options)
            sequences = [sequence for group in groups for sequence in group]
            one_at_a_time = self._one_at_a_time or any(sequence.images for sequence in sequences)
            batches = [[sequence] for sequence in sequences] if one_at_a_time else [sequences]
            return concat_logps([padded_logps(self.model, batch, **options) for batch in batches])

    @contextlib.contextmanager
    def native_attention(self) -> Iterator[None]:
        """Use the model's own attention, for saving and generation."""
        if self.layout in (None, "padded"):
            yield
            return
        attention.set_kernel(self.model, self._kernel)
        try:
            yield
        finally:
            attention.use_segments(self.model)


def split_on_host(logps: Logps) -> list[np.ndarray]:
    """The log-probs of each sequence, in one transfer from the device."""
    return np.split(to_host(logps.values_N).numpy(), np.cumsum(logps.counts)[:-1])


def flatten(groups: Iterable[Iterable[int]]) -> list[int]:
    return [i for group in groups for i in group]


# -- the trials ------------------------------------------------------------------------------------------------------


def refuse_lookahead(model: Any, sequences: Sequence[TokenSequence], dtype: str, vision: Vision | None = None) -> None:
    """Raise UsageError if a token sees later ones, as in BERT unless its config says `is_decoder`.

    A token's log-prob must not change when the second half of a sequence is reversed, nor when its last token is cut. Tokens of an
    image may see one another, but no answer may see what follows.
    """
    ids_T = _longest_ids(sequences)
    deviation = _find_lookahead(model, TokenSequence(ids_T[:1], ids_T[1:]), dtype, None)
    illustrated = [sequence for sequence in sequences if sequence.images and vision]
    if deviation is None and illustrated:
        longest = max(illustrated, key=lambda sequence: len(sequence.completion_ids))
        cut = longest._replace(completion_ids=longest.completion_ids[:_TRIAL_TOKENS], counted=None)
        deviation = _find_lookahead(model, cut, dtype, vision)
    if deviation is None:
        return
    hint = " Its config has is_decoder: false." if getattr(model.config, "is_decoder", None) is False else ""
    raise UsageError(
        f"{type(model).__name__} is not causal here: a token's log-prob is {deviation}, when later tokens are changed or "
        f"fewer.{hint} Scores of such a model would know the answer; use a causal language model."
    )


def _find_lookahead(model: Any, sequence: TokenSequence, dtype: str, vision: Vision | None) -> str | None:
    """How far the answer's log-probs deviate when later tokens are others; None if only by rounding, or if it is too short."""
    ids_N = sequence.completion_ids
    half = len(ids_N) // 2
    if half < 1:
        return None
    variants = (ids_N, np.concatenate([ids_N[:half], ids_N[half:][::-1]]), ids_N[:-1])
    original, other, cut = (_all_logps(model, sequence._replace(completion_ids=ids), vision) for ids in variants)
    return _deviation(other[:half], original[:half], ROUNDING[dtype]) or _deviation(
        cut, original[:-1], _mean_tolerance(dtype)
    )


def _padding_problem(model: Any, sequences: Sequence[TokenSequence], dtype: str) -> str | None:
    """How far a sequence deviates in a batch with another one twice as long; None if only by rounding."""
    ids_T = _longest_ids(sequences)
    short_T = ids_T[::-1][: len(ids_T) // 2]
    if len(short_T) < 2:
        return None
    with torch.no_grad():
        batch = padded_logps(model, [TokenSequence(each_T[:1], each_T[1:]) for each_T in (short_T, ids_T)]).logps
    alone = _all_logps(model, TokenSequence(short_T[:1], short_T[1:]))
    return _deviation(batch[0].float().cpu().numpy(), alone, _mean_tolerance(dtype))


def _mean_tolerance(dtype: str) -> tuple[float, float]:
    """Bound the mean only: with other shapes, half precision may send single tokens to other experts."""
    return float("inf"), 4 * ROUNDING[dtype][1]


def _longest_ids(sequences: Sequence[TokenSequence]) -> np.ndarray:
    longest = max(sequences, key=lambda sequence: sequence.n_tokens)
    return longest.ids[:_TRIAL_TOKENS]


def _all_logps(model: Any, sequence: TokenSequence, vision: Vision | None = None) -> np.ndarray:
    with torch.no_grad():
        logps: np.ndarray = plain_logps(model, sequence, vision).float().cpu().numpy()
        return logps


def _deviation(logps: np.ndarray, plain: np.ndarray, tolerance: tuple[float, float]) -> str | None:
    """Describe a deviation beyond rounding, or return None. A nan is beyond it."""
    deviation = np.abs(logps - plain)[np.isfinite(plain)]
    largest, mean = (float(f(deviation)) if len(deviation) else 0.0 for f in (np.max, np.mean))
    if largest <= tolerance[0] and mean <= tolerance[1]:
        return None
    return f"off by up to {largest:.2g} nats a token, {mean:.2g} on average"


def _pick_trial(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Pick the longest sequence with others of its prompt, which exceed the attention window if any do, the longest with
    images likewise, some more, and short ones.

    The short ones are cut from the longest and fit in one row: answers to one prompt, of which some share a beginning and some
    more of it, and another prompt. Sequences that are alone in their rows would not show that a model mixes up what shares a
    row.
    """
    longest_first = sorted(
        packing.group_by_prompt(sequences), key=lambda group: -max(sequences[i].n_tokens for i in group)
    )
    illustrated = [group for group in longest_first if sequences[group[0]].images][:1]
    spread = longest_first[:: max(1, len(longest_first) // 8)]
    indices = [*dict.fromkeys(flatten(group[:4] for group in (longest_first[0], *illustrated, *spread[1:])))]
    trial = [sequences[i] for i in indices[:_TRIAL_SEQUENCES]]
    ids_T = max(trial, key=lambda sequence: sequence.n_tokens).ids
    if len(ids_T) < 8:
        return trial
    n = max(1, len(ids_T) // 16)
    prompt_T, *pieces = (ids_T[i * n : (i + 1) * n + (i > 0)] for i in range(5))
    # Whichever comes first in the row, others branch off it, and one off another branch.
    answers = ([0], [0, 2], [0, 3], [0, 2, 1], [1, 2], [1, 3])
    return [
        *trial,
        *(TokenSequence(prompt_T, np.concatenate([pieces[i] for i in answer])) for answer in answers),
        TokenSequence(pieces[2], pieces[0]),
    ]
