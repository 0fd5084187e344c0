"""How many tokens one forward and backward may have: tried out before the first step, halved where memory is short.

The result of a step does not depend on it, and a run's identity neither. What is computed again is a step's gradient, which
is dropped first; an optimizer's update never is. With several processes only the trial decides: one that began its step anew
would leave the others waiting.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from pipeline.config import Train
from pipeline.errors import ResourceError
from pipeline.model.forward import Forward
from pipeline.model.memory import is_out_of_memory
from pipeline.model.packing import n_in_row
from pipeline.schema import Sequence as TokenSequence

T = TypeVar("T")
# On a CPU this is taken for auto as well: it has no limit that could be tried out without the whole machine swapping.
DEFAULT = {"cpu": 1_024, "cuda": 16_384}
# Of a GPU's memory, what the trial may take: rows of other lengths leave gaps between them.
_SAFE = 0.85
_REMEDIES = "Try train.gradient_checkpointing=true, train.lora={}, a shorter prepare.max_length, or a smaller model."


class Budget:
    def __init__(self, train: Train, device: torch.device, n_processes: int, say: Callable[[str], None]) -> None:
        said = train.tokens_per_micro_batch
        self.tokens = said if isinstance(said, int) else DEFAULT[device.type]
        self.wants_trial = said == "auto" and train.scope == "batch" and device.type == "cuda"
        # Where a micro-batch is what a loss is taken over, the room that its tokens take must not cut it.
        self._may_shrink = n_processes == 1 and train.scope == "batch"
        self._say = say

    def within(self, compute: Callable[[], T], sizes: Callable[[], list[list[int]]], drop: Callable[[], None]) -> T:
        """What `compute` gives; where memory does not suffice, with half the tokens. `sizes` are those of the examples of
        each of its forwards. `drop` takes back what it had done."""
        while True:
            try:
                return compute()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler, which would keep alive what the failed pass had made.
            drop()
            _free()
            self._halve(sizes())

    def _halve(self, sizes: list[list[int]]) -> None:
        largest = max(map(sum, sizes))
        if not self._may_shrink:
            raise ResourceError(
                f"Memory does not suffice for {largest:,} tokens in one forward and backward. Lower "
                f"train.micro_batch_size or train.tokens_per_micro_batch, or set the latter to auto. {_REMEDIES}"
            )
        divisible = [sum(part) for part in sizes if len(part) > 1]
        if not divisible:
            raise ResourceError(f"Memory does not suffice for a single example of {largest:,} tokens. {_REMEDIES}")
        self.tokens = min(self.tokens, max(divisible)) // 2
        self._say(
            f"train: out of memory at {largest:,} tokens in one forward and backward; again with at most {self.tokens:,}"
        )


@contextmanager
def once(what: str) -> Iterator[None]:
    """For what must not be tried again, since it may be half done."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"Memory does not suffice for {what}. {_REMEDIES}") from None


def largest_that_fits(
    forward: Forward,
    like: Sequence[TokenSequence],
    parameters: Sequence[torch.nn.Parameter],
    n_bytes_later: int,
    most: int,
) -> int:
    """Tokens of the longest row of these sequences that a forward and backward has memory for, in doublings, up to `most`
    examples. Gradients lie there meanwhile, and so do as many bytes as the optimizer will take."""
    group = max(([like[i] for i in each] for each in forward.groups(like)), key=lambda each: _size(forward, each))
    size, n, fitting = _size(forward, group), 1, 0
    try:
        with once("gradients and the state of the optimizer"):
            later = torch.empty(n_bytes_later, dtype=torch.uint8, device=parameters[0].device)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        _peak_share()  # of what was loaded and tried before
        while fitting < most and _fits(forward, [group] * n):
            fitting = n
            n = min(2 * n, most)
        del later
    finally:
        for parameter in parameters:
            parameter.grad = None
        _free()
    if not fitting:
        raise ResourceError(f"Memory does not suffice for the longest example, {size:,} tokens. {_REMEDIES}")
    return fitting * size


def _size(forward: Forward, group: list[TokenSequence]) -> int:
    if forward.way == "padded":
        return len(group) * max(each.n_tokens for each in group)
    return n_in_row(group, range(len(group)))


def _fits(forward: Forward, groups: list[list[TokenSequence]]) -> bool:
    try:
        torch.autograd.backward(torch.cat(forward.logps(groups).logps).sum())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        taken = _peak_share()
    return taken <= _SAFE


def _peak_share() -> float:
    """Of the memory that this process could have, the most that it has taken since this was last asked."""
    if not torch.cuda.is_available():
        return 0.0
    free, _ = torch.cuda.mem_get_info()
    taken = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return taken / (free + torch.cuda.memory_reserved())


def _free() -> None:
    gc.collect()  # what failed may lie in a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
