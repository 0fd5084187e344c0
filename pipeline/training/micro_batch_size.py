"""How many tokens one forward and backward may have: tried before the first step, halved when memory runs out.

The result of a step does not depend on it, and neither does a run's identity. Only a step's gradient is computed again, and what
it had accumulated is dropped first; an optimizer's update is never repeated. With several processes only the trial decides: a
process that started its step again would leave the others waiting.
"""

import gc
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import ResourceError
from prefcache.pipeline.model.device import kind_of
from prefcache.pipeline.model.forward import Forward
from prefcache.pipeline.model.oom import is_out_of_memory
from prefcache.pipeline.model.packing import row_tokens
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.training.optimizers import state_bytes

T = TypeVar("T")
# On a CPU also for auto, because its limit could not be tried without the whole machine swapping.
DEFAULT = {"cpu": 1_024, "cuda": 16_384}
# The share of a GPU's memory that the trial may take: rows of other lengths leave gaps between them.
_SAFE_SHARE = 0.85
_REMEDIES = "Try train.gradient_checkpointing=true, train.lora={}, a shorter prepare.max_length, or a smaller model."


class Budget:
    def __init__(self, train: Train, device: torch.device, n_processes: int, say: Callable[[str], None]) -> None:
        setting = train.tokens_per_micro_batch
        kind = kind_of(device)
        self.tokens = setting if isinstance(setting, int) else DEFAULT[kind]
        self.wants_trial = setting == "auto" and train.scope == "batch" and kind == "cuda"
        # If a loss is taken over a micro-batch, its tokens' memory must not change its examples.
        self._may_shrink = n_processes == 1 and train.scope == "batch"
        self._say = say

    def retry_smaller(
        self, compute: Callable[[], T], forwards: Callable[[], list[tuple[int, int]]], drop: Callable[[], None]
    ) -> T:
        """Return the result of `compute`; when memory runs out, `drop` what it left and try half the tokens.

        `forwards` gives the examples and the tokens of each forward.
        """
        while True:
            try:
                return compute()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler, which would keep alive what the failed pass had made.
            drop()
            _free_memory()
            tried = forwards()
            largest = max(n_tokens for _, n_tokens in tried)
            divisible = [n_tokens for n_examples, n_tokens in tried if n_examples > 1]
            if not self._may_shrink:
                raise ResourceError(
                    f"Memory does not suffice for {largest:,} tokens in one forward and backward. Lower "
                    f"train.micro_batch_size or train.tokens_per_micro_batch, or set the latter to auto. {_REMEDIES}"
                )
            if not divisible:
                raise ResourceError(f"Memory does not suffice for a single example of {largest:,} tokens. {_REMEDIES}")
            self.tokens = min(self.tokens, max(divisible)) // 2
            self._say(
                f"train: out of memory at {largest:,} tokens in one forward and backward; again with at most {self.tokens:,}"
            )


@contextmanager
def never_retried(work: str) -> Iterator[None]:
    """Turn running out of memory into an error without a retry, because the work may be half done."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"Memory does not suffice for {work}. {_REMEDIES}") from None


# -- the trial -------------------------------------------------------------------------------------------------------


def find_budget(
    forward: Forward,
    like: Sequence[TokenSequence],
    parameters: Mapping[str, torch.nn.Parameter],
    train: Train,
    accelerator: Accelerator,
) -> int:
    """Return the tokens of a forward and backward that the process with the least memory has room for.

    The longest of these examples is doubled, up to the examples of a step, while it fits next to gradients and the optimizer's
    state.
    """
    n_processes = accelerator.num_processes
    max_examples = min(-(-train.batch_size // n_processes), train.micro_batch_size or sys.maxsize)
    moments = sorted(p.numel() * state_bytes(train.optimizer, p.dtype) for p in parameters.values())
    # On the device are those of the parameter that is updated and of the next one.
    reserved = math.ceil(sum(moments[-2:] if "optimizer" in train.offload else moments))
    if n_processes > 1:  # the gradients once more, in the buffers that they exchange
        reserved += sum(p.nbytes for p in parameters.values())
    groups = [[like[i] for i in group] for group in forward.group(like)]
    is_padded = forward.layout == "padded"
    sizes = [
        len(group) * max(s.n_tokens for s in group) if is_padded else row_tokens(group, range(len(group)))
        for group in groups
    ]
    size = max(sizes)
    longest = groups[sizes.index(size)]
    n, fitting = 1, 0
    try:
        with never_retried("gradients and the state of the optimizer"):
            state = torch.empty(reserved, dtype=torch.uint8, device=accelerator.device)
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
        _take_peak_share()  # of what was loaded and tried before
        with accelerator.autocast():
            while fitting < max_examples and _fits(forward, [longest] * n):
                fitting = n
                n = min(2 * n, max_examples)
        del state
    finally:
        for parameter in parameters.values():
            parameter.grad = None
        _free_memory()
    if not fitting:
        raise ResourceError(f"Memory does not suffice for the longest example, {size:,} tokens. {_REMEDIES}")
    tokens = fitting * size
    return min(gather_object([tokens])) if n_processes > 1 else tokens


def _fits(forward: Forward, groups: list[list[TokenSequence]]) -> bool:
    try:
        torch.autograd.backward(torch.cat(forward.logps(groups).logps).sum())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        share = _take_peak_share()
    return share <= _SAFE_SHARE


def _take_peak_share() -> float:
    """Return the peak since the last call, as a share of the GPU memory that this process could have."""
    if not torch.cuda.is_available():
        return 0.0
    free, _ = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak / (free + torch.cuda.memory_reserved())


def _free_memory() -> None:
    gc.collect()  # what failed may lie in a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
