"""A step of TRL's own DPOTrainer on the traced GPU: `_compute_loss` with its metrics, backward, clipping, fused AdamW.

The trainer is made without its constructor, which loads files and hashes weights; what `_compute_loss` reads of it is set here, to the
defaults of DPOConfig. Its Triton kernels are counted by what they read and write. What Transformers' Trainer adds (a check of the
loss per micro-batch, the collator's padding on the host) is not counted.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from prefcache.pipeline.config import Lora
from prefcache.pipeline.model.traced_gpu import GPU, Op, Trace, replaced, trace_gpu
from prefcache.pipeline.model.trainable import create_adapter
from prefcache.pipeline.training.step_trace import Lengths, StepCost, measure_cost


@dataclass(frozen=True)
class TrlSettings:
    reference: str  # live or precomputed
    weights: str
    per_batch: int  # pairs
    checkpointing: bool
    lora: int | None = None
    sorted_by_length: bool = False


def batches(pairs: Sequence[Lengths], settings: TrlSettings) -> list[list[Lengths]]:
    ordered = sorted(pairs, key=lambda pair: -pair.prompt - max(pair.chosen, pair.rejected))
    ordered = ordered if settings.sorted_by_length else list(pairs)
    return [ordered[i : i + settings.per_batch] for i in range(0, len(ordered), settings.per_batch)]


def trace_trl(
    config: Any, settings: TrlSettings, micro_batches: Sequence[Sequence[Lengths]], *, accumulated: bool = False
) -> StepCost:
    """Trace the second step of a run with these micro-batches. `accumulated`: after others, whose gradients are there."""
    with trace_gpu() as trace, _kernels_as_on_cuda(trace):
        trainer, optimizer = _make_trainer(config, settings, trace)
        if accumulated:
            for parameter in trainer.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            trace.assign("gradients", [p.grad for p in trainer.model.parameters() if p.grad is not None])
        for micro_batch in micro_batches:
            n_valid = sum(pair.chosen + pair.rejected for pair in micro_batch)
            inputs = _make_inputs(micro_batch, settings)
            with _MaskedIndex(inputs["completion_mask"].numel(), n_valid), torch.autocast("cpu", torch.bfloat16):
                loss = trainer._compute_loss(trainer.model, inputs, False)
            (loss / len(micro_batches)).backward()
            del loss, inputs
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return measure_cost(trace)


def _make_trainer(config: Any, settings: TrlSettings, trace: Trace) -> tuple[Any, torch.optim.Optimizer]:
    from trl import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    dtype = getattr(torch, settings.weights)
    with GPU:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        is_live = settings.reference == "live" and settings.lora is None  # an adapter is switched off instead
        frozen = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa") if is_live else None
        adapted = create_adapter(model, Lora(r=settings.lora), 0) if settings.lora else model
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    if frozen is not None:
        add_fused_lm_head(frozen.eval())
    adapted.train()
    if settings.checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.lora:
            adapted.enable_input_require_grads()
    for made in (adapted, frozen):
        if made is not None:
            trace.assign("weights", [*made.parameters(), *made.buffers()])
    trace.head_shape = tuple(model.get_output_embeddings().weight.shape)
    trainer: Any = DPOTrainer.__new__(DPOTrainer)
    trainer.model, trainer.ref_model = adapted, frozen
    trainer.accelerator = SimpleNamespace(
        device=GPU, gather=_identity, gather_for_metrics=_identity, unwrap_model=_identity
    )
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs={"use_reentrant": False}, n_gpu=1)
    trainer.precompute_ref_logps = settings.reference == "precomputed"
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.ld_alpha, trainer.f_divergence_type, trainer.label_smoothing = None, "reverse_kl", 0.0
    trainer.beta, trainer.loss_types, trainer.loss_weights = 0.1, ["sigmoid"], [1.0]
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": defaultdict(list)}, 0, 1
    return trainer, make_optimizer(adapted, trace)


def make_optimizer(model: Any, trace: Trace) -> torch.optim.Optimizer:
    """Transformers' default, with its state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
        parameter.register_post_accumulate_grad_hook(lambda p: trace.assign("gradients", [p.grad]))
    optimizer.step()
    optimizer.zero_grad()
    state = [value for by_name in optimizer.state.values() for value in by_name.values()]
    trace.assign("optimizer", state)
    trace.restart()
    return optimizer


def _make_inputs(micro_batch: Sequence[Lengths], settings: TrlSettings) -> dict[str, torch.Tensor]:
    """What DPOTrainer's collator gives: chosen, then rejected, padded on the right to the longest."""
    longest = max(pair.prompt + max(pair.chosen, pair.rejected) for pair in micro_batch)
    shape = (2 * len(micro_batch), longest)
    names = ("input_ids", "attention_mask", "completion_mask")
    inputs = {name: torch.ones(shape, dtype=torch.long).to(GPU, non_blocking=True) for name in names}
    if settings.reference == "precomputed":
        sums = ("ref_chosen_logps", "ref_rejected_logps")
        inputs |= {name: torch.ones(len(micro_batch)).to(GPU, non_blocking=True) for name in sums}
    return inputs


class _MaskedIndex(TorchFunctionMode):
    """Index by masks, whose counts are values, with the counts that the lengths give. It waits for the count."""

    def __init__(self, n_positions: int, n_valid: int) -> None:
        super().__init__()
        self._share = n_valid / n_positions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            tensor, mask = args
            positions = torch.nonzero_static(mask.flatten(), size=round(self._share * mask.numel())).flatten()
            positions[0].item()
            return tensor.reshape(-1, *tensor.shape[mask.ndim :])[positions]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _kernels_as_on_cuda(trace: Trace) -> Iterator[None]:
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (utils, "_use_triton", lambda device: True),
            (chunked_logprob, "_use_triton", lambda device: True),
            (chunked_logprob, "_forward_kernel", _Kernel(trace, passes=1)),
            (chunked_logprob, "_backward_kernel", _Kernel(trace, passes=2)),
            (chunked_logprob, "_addmm_fp32", _add_product),
        ):
            stack.enter_context(replaced(owner, name, value))
        if not hasattr(chunked_logprob, "triton"):
            chunked_logprob.triton = SimpleNamespace(cdiv=lambda n, by: -(-n // by))
            stack.callback(delattr, chunked_logprob, "triton")
        yield


class _Kernel:
    """A Triton kernel that passes over a tile of logits, reading it, or reading and writing it."""

    def __init__(self, trace: Trace, passes: int) -> None:
        self._trace, self._passes = trace, passes

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, tile: torch.Tensor, *_: Any, **__: Any) -> None:
        traffic = self._passes * tile.numel() * tile.itemsize
        self._trace.ops[Op("triton", str(tile.dtype).removeprefix("torch."), 0, traffic, 1)] += 1


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """The branch for CUDA of TRL's function."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _identity(value: Any, *_: Any) -> Any:
    return value


def ways(reference: str, weights: str, lora: int | None) -> list[TrlSettings]:
    """The ways in which TRL may take a step of 16 pairs: larger batches are padded more, smaller ones launch more kernels.

    Layers are not recomputed, which would only take time.
    """
    return [TrlSettings(reference, weights, n, False, lora, sorted_by_length=True) for n in (1, 2, 4, 8)]
