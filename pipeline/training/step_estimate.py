"""What a run's step costs by the tokens of its micro-batch, for a model of any depth, within seconds.

Layers of the same shapes cost the same, so a model is traced (step_trace.py) with three of them and with four, and each further one adds
the difference. The phases of a step hold most at different moments, so each is extrapolated, and interpolated between traced numbers of
tokens, by itself. What a phase holds is the largest of several moments, each linear in tokens; a line between two traces is never below it.
"""

import bisect
import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.model import trainable
from prefcache.pipeline.training.gpus import Gpu
from prefcache.pipeline.training.optimizers import state_bytes
from prefcache.pipeline.training.step_trace import Lengths, Parts, StepCost, trace_step

# What shapes a step's memory. A loss does not: it computes with one number for each answer.
_SHAPING = (
    *("lora", "weights", "precision", "head_dtype", "fuse_kernels", "gradient_checkpointing"),
    *("release_gradients", "max_grad_norm", "shard"),
)
# Layers that are traced. With two, nothing lies between the first one, whose input may need no gradient, and the last one.
_DEPTHS = (3, 4)
_TRACED_TOKENS = (512, 4_096, 32_768)
# The share of a GPU's memory that the CUDA context and gaps between the allocator's blocks take.
LEFT_FREE = 0.06


@dataclass(frozen=True)
class StepEstimate:
    tokens: int  # of its one micro-batch
    peaks: dict[str, Parts]  # bytes, when each phase holds most

    @property
    def parts(self) -> Parts:
        """Bytes at the peak of the step."""
        return max(self.peaks.values(), key=total)

    @property
    def peak_bytes(self) -> int:
        return total(self.parts)


def total(parts: Parts) -> int:
    return sum(vars(parts).values())


class UntraceableError(UsageError):
    def __init__(self, model_type: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200]
        super().__init__(
            f"A step of a {model_type} model cannot be traced ({type(error).__name__}: {reason}), so nothing is known of its "
            "memory. Train without --dry-run; train.tokens_per_micro_batch=auto tries at the start what fits on a GPU."
        )


class StepEstimator:
    """Estimates steps on examples of `mean` lengths, of which the longest takes `longest` tokens.

    `config` is Transformers' config of the model, `model` the same on the meta device.
    """

    def __init__(self, config: Any, model: Any, mean: Lengths, longest: int) -> None:
        self._config, self._mean = config, mean
        self._n_layers: int = config.get_text_config().num_hidden_layers
        is_short = self._n_layers <= max(_DEPTHS) or not _are_alike(trainable.model_layers(model))
        self._depths = (self._n_layers,) if is_short else _DEPTHS
        self.traced_tokens = (*_TRACED_TOKENS[:-1], max(_TRACED_TOKENS[-1], longest))
        self._costs: dict[tuple[str, int, int], list[StepCost]] = {}

    def estimate(self, train: Train, processes: int, tokens: int) -> StepEstimate:
        """Estimate the memory of one process's step with a micro-batch of so many tokens."""
        costs = self._trace(train, tokens, processes)
        # The trace needs no torchao, whose update has no temporaries: compiled, it is one kernel for each parameter.
        dtype = getattr(torch, train.weights)
        moments = state_bytes(train.optimizer, dtype) / state_bytes("adamw", dtype)
        peaks = {}
        for phase in costs[0].peaks:
            values = ([getattr(cost.peaks[phase], part.name) for cost in costs] for part in fields(Parts))
            parts = Parts(*(round(self._prolong(each)) for each in values))
            parts = replace(parts, optimizer=round(moments * parts.optimizer))
            peaks[phase] = parts
        if processes > 1 and train.shard != "fsdp":
            # DDP exchanges gradients in buckets of their own, which it keeps.
            buckets = peaks["update"].gradients
            peaks = {phase: replace(parts, rest=parts.rest + buckets) for phase, parts in peaks.items()}
        return StepEstimate(tokens, peaks)

    def peak_bytes(self, train: Train, processes: int, tokens: int) -> float:
        """Interpolate the peak between traced numbers of tokens."""
        low, high, share = self._neighbours(tokens)
        traced = {n: self.estimate(train, processes, n) for n in self.traced_tokens}
        peaks = []
        for phase in traced[low].peaks:
            before, after = (total(traced[n].peaks[phase]) - traced[n].peaks[phase].logits for n in (low, high))
            # In proportion to tokens up to whole chunks of the head. Later ones are more or less full: as if all were.
            fewest = self.traced_tokens[0]
            most = max(each.peaks[phase].logits for each in traced.values())
            logits = min(traced[fewest].peaks[phase].logits * tokens / fewest, most)
            peaks.append(before + share * (after - before) + logits)
        return max(peaks)

    def tokens_that_fit(self, train: Train, processes: int, memory_bytes: float) -> int:
        """Return the most tokens of a micro-batch on a GPU of this size, up to the most that were traced; 0 if not even a few fit."""
        room = memory_bytes * (1 - LEFT_FREE)
        fewest, *_, most = self.traced_tokens
        n = bisect.bisect_right(
            range(fewest, most + 1), room, key=lambda tokens: self.peak_bytes(train, processes, tokens)
        )
        return fewest + n - 1 if n else 0

    def seconds(self, train: Train, processes: int, tokens: float, gpu: Gpu) -> float:
        """Return the least time that a step of so many tokens takes, by the roofline of the GPU."""
        low, high, share = self._neighbours(tokens)
        before, after = (
            self._prolong([_seconds(cost, gpu) for cost in self._trace(train, n, processes)]) for n in (low, high)
        )
        return before + share * (after - before)

    def _neighbours(self, tokens: float) -> tuple[int, int, float]:
        """Return two traced numbers of tokens, and how far these are on the way from one to the other, perhaps beyond."""
        i = min(max(1, bisect.bisect_left(self.traced_tokens, tokens)), len(self.traced_tokens) - 1)
        low, high = self.traced_tokens[i - 1 : i + 1]
        return low, high, (tokens - low) / (high - low)

    def _trace(self, train: Train, tokens: int, processes: int) -> list[StepCost]:
        """Trace a step with each of the depths, once."""
        # With released gradients a step is one forward anyway.
        budget = None if train.release_gradients else 1 << 40
        kept = {name: getattr(train, name) for name in _SHAPING}
        shaping = Train(**kept, batch_size=1 << 30, tokens_per_micro_batch=budget)
        n_shards = processes if train.shard == "fsdp" else 1
        key = (shaping.model_dump_json(), tokens, n_shards)
        if key not in self._costs:
            pairs = cut_pairs(self._mean, tokens)
            try:
                self._costs[key] = [
                    trace_step(_shorten(self._config, depth), shaping, pairs, processes=n_shards)
                    for depth in self._depths
                ]
            except (
                Exception
            ) as error:  # A model whose forward takes no packed rows or no fake tensors may fail in any way.
                raise UntraceableError(self._config.model_type, error) from None
        return self._costs[key]

    def _prolong(self, values: Sequence[float]) -> float:
        """Continue what was traced at the depths to the depth of the model."""
        if len(values) == 1:
            return values[0]
        fewer, more = _DEPTHS
        low, high = values
        return low + (self._n_layers - fewer) * (high - low) / (more - fewer)


def cut_pairs(mean: Lengths, tokens: int) -> list[Lengths]:
    """Pairs of about these lengths, which take so many tokens in a row that computes prompts once."""
    size = mean.prompt + mean.chosen + mean.rejected - 2
    n = max(2, round(tokens / size))
    pairs = []
    for i in range(n):
        own = tokens // n + (i < tokens % n)
        chosen, rejected = (max(1, own * answer // size) for answer in (mean.chosen, mean.rejected))
        pairs.append(Lengths(own - (chosen - 1) - (rejected - 1), chosen, rejected))
    return pairs


def _shorten(config: Any, n_layers: int) -> Any:
    """Copy the config for a model of fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:n_layers])
    text.num_hidden_layers = n_layers
    return config


def _are_alike(layers: Sequence[torch.nn.Module]) -> bool:
    """Whether all layers have the same shapes."""
    shapes = {(type(layer), tuple(tuple(p.shape) for p in layer.parameters())) for layer in layers}
    return len(shapes) == 1


def _seconds(cost: StepCost, gpu: Gpu) -> float:
    return cost.seconds({"bfloat16": gpu.bf16_flops, "float32": gpu.float32_flops}, gpu.bytes_per_second)
