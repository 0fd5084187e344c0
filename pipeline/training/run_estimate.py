"""Whether a run fits, how long it takes at least, and what would make it fit; from a model's config and the prepared data alone.

run_plan.py says what the run computes, step_estimate.py what a step costs. Nothing here is measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import AutoConfig

from prefcache.pipeline import model_config, model_files
from prefcache.pipeline.config import Config, Lora, Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import attention, trainable, weights
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.tokenizer import refuse_own_code
from prefcache.pipeline.training import flops, gpus, micro_batch_size, run_inputs
from prefcache.pipeline.training.gpus import Gpu
from prefcache.pipeline.training.run_plan import RunPlan, plan_run
from prefcache.pipeline.training.step_estimate import LEFT_FREE, StepEstimator

# Model FLOPs as a share of the GPU's bf16 peak: what well-tuned training reaches. Assumed, not measured.
ASSUMED_MFU = 0.4
# Memory of common GPUs, in GB.
SIZES = (24, 40, 80, 141, 192)
_SHARDABLE = ("train.gradient_checkpointing=true", "train.weights=bfloat16")
_SHARDS = 8  # processes of the suggestion to shard, if no number of processes is given


@dataclass(frozen=True)
class Saving:
    """Settings that make a step smaller, and its peak with them."""

    settings: list[str]  # as --set takes them
    added: list[str]  # those of them that the saving before lacks
    processes: int
    tokens: int = 0  # of a micro-batch
    peak_bytes: int = 0
    fits_gb: int | None = None  # the smallest common size of a GPU that suffices


@dataclass(frozen=True)
class Times:
    gpu: Gpu
    at_least_seconds: float  # by the roofline: nothing but the makers' rates
    mfu: float
    seconds: float  # at this share of the peak


class RunEstimate:
    def __init__(self, config: Config, gpu: Gpu | None, processes: int) -> None:
        self.config, self.gpu, self.processes = config, gpu, processes
        self.start = run_inputs.find_start(config, weights=False)
        self.train = _with_adapter_shape(config.train, self.start)
        self._model_config = read_config(self.start)
        self.model = make_meta_model(self._model_config, self.train.lora)
        self.plan = self._plan(micro_batch_size.DEFAULT["cuda"])
        self._steps = StepEstimator(self._model_config, self.model, self.plan.mean, self.plan.longest)
        if self.train.tokens_per_micro_batch == "auto" and gpu is not None:
            self.plan = self._plan(self.tokens_that_fit(gpu.memory_bytes))
        self.step = self._steps.estimate(self.train, processes, self.plan.step.largest_micro_batch)
        self.notes = [*self.plan.notes, *self._uncovered()]

    @property
    def parameters(self) -> tuple[int, int]:
        """All parameters, and those that are trained."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)

    @property
    def most_tokens(self) -> int:
        """The number of tokens beyond which nothing is said."""
        return self._steps.traced_tokens[-1]

    def tokens_that_fit(self, memory_bytes: float) -> int:
        return self._steps.tokens_that_fit(self.train, self.processes, memory_bytes)

    @cached_property
    def flops(self) -> tuple[float, dict[str, float]]:
        """Operations of the whole run: in forwards that have a backward, and in those without gradients by what they are for."""
        forward = flops.model_cost(self.model, backward=False)
        both = flops.model_cost(self.model)
        return both.flops(self.plan.trained), {name: forward.flops(work) for name, work in self.plan.passes.items()}

    def times(self) -> Times | None:
        if self.gpu is None:
            return None
        trained, passes = self.flops
        without_gradients = sum(passes.values())
        rate = self.gpu.bf16_flops * self.processes
        step = self._steps.seconds(self.train, self.processes, self.plan.step.tokens / self.processes, self.gpu)
        at_least = self.plan.steps * step + without_gradients / rate
        mfu = min(ASSUMED_MFU, (trained + without_gradients) / rate / at_least)
        return Times(self.gpu, at_least, mfu, (trained + without_gradients) / rate / mfu)

    # -- what makes it fit -------------------------------------------------------------------------------------------

    def savings(self) -> Iterator[Saving]:
        """Yield what makes a step smaller, cheapest first. Settings that the run has are left out."""
        step = self.plan.step
        for rung in self._ladder():
            train = _with_settings(self.train, rung.settings)
            tokens = step.largest_share if train.release_gradients else step.largest_micro_batch
            peak = self._steps.estimate(train, rung.processes, tokens).peak_bytes
            fits = next((size for size in SIZES if peak <= size * 1e9 * (1 - LEFT_FREE)), None)
            yield replace(rung, tokens=tokens, peak_bytes=peak, fits_gb=fits)

    def _ladder(self) -> Iterator[Saving]:
        """Yield an adapter, then settings on top of one another, then shards."""
        train, taken = self.train, list[str]()
        if train.lora is None:
            adapter = ["train.lora.base_dtype=bfloat16", "train.gradient_checkpointing=true"]
            adapter += ["train.weights=float32"] if train.weights != "float32" else []
            adapter += ["train.release_gradients=false"] if train.release_gradients else []
            adapter += ["train.vision=frozen"] if train.vision == "trained" else []
            yield Saving(adapter, adapter, self.processes)
            steps = [["train.gradient_checkpointing=true"], ["train.weights=bfloat16"]]
            if train.shard != "fsdp":  # quantized moments are not sharded
                steps += [["train.optimizer=adamw_8bit"]]
            if self.processes == 1:  # whole copies of a model cannot release their gradients
                steps += [["train.release_gradients=true", "train.max_grad_norm=null", *self._whole_steps()]]
        else:
            steps = [["train.gradient_checkpointing=true"], ["train.lora.base_dtype=bfloat16"]]
        for added in steps:
            if _with_settings(train, [*taken, *added]) != _with_settings(train, taken):
                taken = [*taken, *added]
                yield Saving(taken, added, self.processes)
        if train.lora is None and train.shard != "fsdp":
            sharded = [setting for setting in taken if setting in _SHARDABLE] + ["train.shard=fsdp"]
            sharded += ["train.optimizer=adamw"] if train.optimizer != "adamw" else []
            yield Saving(sharded, sharded, max(self.processes, _SHARDS))

    def _whole_steps(self) -> list[str]:
        """Settings by which a step is one forward."""
        names = ("tokens_per_micro_batch", "micro_batch_size")
        return [f"train.{name}=null" for name in names if getattr(self.train, name) is not None]

    # -- what it is made from ----------------------------------------------------------------------------------------

    def _plan(self, default: int) -> RunPlan:
        """Plan the run; `default` is for settings that leave the tokens of a micro-batch to the machine."""
        setting, layout = self.train.tokens_per_micro_batch, self.train.rows
        if self.train.release_gradients:
            setting = 1 << 40  # a step is one forward
        if layout == "auto":
            layout = "padded" if attention.unsupported_reason(self._model_config) else "shared"
        return plan_run(self.config, layout, self.processes, setting if isinstance(setting, int) else default)

    def _uncovered(self) -> Iterator[str]:
        """Say what the estimate leaves out of account."""
        if self.plan.layout == "padded":
            reason = attention.unsupported_reason(self._model_config) or "train.rows is padded"
            yield f"rows are padded ({reason}); memory is that of a packed row of as many tokens"
        if attention.choose_kernel(self.start.folder, "sdpa") == "eager":
            yield "this model's attention is eager, whose scores grow with the square of a row: they are not counted"
        if self.start.quantization:
            yield (
                f"the frozen weights are counted in {self.train.lora.base_dtype if self.train.lora else 'float32'}; "
                f"in {self.start.quantization} (score.quantization) they take less"
            )
        if Prepared(self.config.prepared).manifest.images:
            yield (
                "the vision tower is trained (train.vision): its memory and arithmetic are not counted"
                if self.train.vision == "trained"
                else "the vision tower computes each picture once, before the first run; then it is not loaded (train.vision=frozen)"
            )
        if self.train.offload:
            yield "what waits in the host's memory (train.offload) is counted as if it stayed on the GPU"
        if self.processes > 1:
            yield "the traffic between processes takes time that is not counted"
        if (limit := model_files.longest_sequence(self.start.folder)) < self.plan.longest_sequence:
            yield f"the model takes {limit:,} tokens, the longest sequence has {self.plan.longest_sequence:,}: score will refuse it"


def _with_settings(train: Train, settings: list[str]) -> Train:
    """Return the settings of a run with others, as --set gives them."""
    tree = train.model_dump(mode="json", exclude_unset=True)
    for key, value in (setting.removeprefix("train.").split("=") for setting in settings):
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = None if value == "null" else value
    return Train.model_validate(tree)


def _with_adapter_shape(train: Train, start: Reference) -> Train:
    """Return the settings with the shape of the adapter that the policy starts from, if it has one."""
    if start.adapter is None or train.lora is None:
        return train
    saved = model_config.read_object(start.adapter / model_config.ADAPTER_FILE)
    shape = {"r": saved.get("r"), "target_modules": saved.get("target_modules")}
    # A string is a pattern of names, which a config of ours cannot have.
    shape = {name: value for name, value in shape.items() if isinstance(value, int | list)}
    return train.model_copy(update={"lora": Lora.model_validate(train.lora.model_dump() | shape)})


def find_gpus_here() -> list[torch.cuda._CudaDeviceProperties]:
    """Return the kinds of GPUs of this machine, each once."""
    here = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return list({(gpu.name, gpu.total_memory): gpu for gpu in here}.values())


def choose_gpu(name: str | None) -> Gpu | None:
    """Return the GPU of this name, or the first that is here; None if there is none or its rates are unknown."""
    if name is None:
        here = find_gpus_here()
        found = gpus.find_gpu(here[0].name) if here else None
        return replace(found, memory_bytes=here[0].total_memory) if found else None
    if (found := gpus.find_gpu(name)) is None:
        known = ", ".join(gpu.name for gpu in gpus.GPUS)
        raise UsageError(f"--gpu {name}: its rates are not known. Known are {known}.")
    return found


def read_config(start: Reference) -> Any:
    """Read the config of a model as Transformers has it."""
    try:
        return AutoConfig.from_pretrained(start.folder, trust_remote_code=False)
    except Exception as error:  # Transformers raises many kinds for a config that does not fit its model.
        refuse_own_code(error, start.folder)
        text = " ".join(str(error).split())[:300]
        raise UsageError(f"{start.folder}: Transformers accepts no model with this config ({text}).") from None


def make_meta_model(config: Any, lora: Lora | None) -> Any:
    """Make the model without memory for its weights; with an adapter in its layers, if one is trained."""
    with torch.device("meta"):
        model = weights.make_language_model(config)
        if lora is not None:
            trainable.create_adapter(model, lora, seed=0)
    return model
