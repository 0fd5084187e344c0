"""The model being trained, on accelerate: log-probs of examples, the update, greedy answers, its weights in files.

There is no reference model here and no way to load one. The pieces: policy_logps.py computes columns of examples,
gradient_step.py the gradient, micro_batch_size.py the tokens that fit, generation.py answers.
"""

import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from prefcache.pipeline import image_processor, model_files
from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import layer_kernels, trainable
from prefcache.pipeline.model.attention import choose_kernel
from prefcache.pipeline.model.device import kind_of
from prefcache.pipeline.model.forward import Forward
from prefcache.pipeline.model.lm_head import choose_head_dtype, set_head_dtype
from prefcache.pipeline.model.stochastic_rounding import make_key
from prefcache.pipeline.progress import working
from prefcache.pipeline.safetensors_files import shorten_list
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.tokenizer import load_tokenizer
from prefcache.pipeline.training import distributed, flops, micro_batch_size, optimizers, router_loss
from prefcache.pipeline.training.checkpoints import WEIGHTS
from prefcache.pipeline.training.dataset import Examples, Scores
from prefcache.pipeline.training.generation import generate_answers
from prefcache.pipeline.training.gradient_step import Pending, Step, accumulate_gradient, refuse_not_finite
from prefcache.pipeline.training.objective import Objective, RunningStats
from prefcache.pipeline.training.offloaded_state import OffloadedState
from prefcache.pipeline.training.policy_logps import PolicyLogps, Visit, stored_columns
from prefcache.pipeline.training.released_gradients import ReleasedGradients, refuse_copies
from prefcache.pipeline.training.run_images import RunImages

logging.set_verbosity_error()

T = TypeVar("T")


class Policy:
    def __init__(
        self,
        start: Reference,
        template: str | None,
        train: Train,
        accelerator: Accelerator,
        like: Sequence[TokenSequence],
        say: Callable[[str], None],
        images: RunImages | None = None,
    ) -> None:
        """`like` are some of the sequences to come, the longest among them: the layout and the budget are tried on them."""
        torch.manual_seed(train.seed)
        self.train, self.accelerator = train, accelerator
        self.tokenizer = load_tokenizer(start.tokenizer)
        if template is not None:
            self.tokenizer.chat_template = template
        self._max_length = model_files.longest_sequence(start.folder)
        kernel = choose_kernel(start.folder, "sdpa")
        self.sharded = distributed.is_sharded(train, accelerator, start.quantization)
        if train.release_gradients and not self.sharded:
            refuse_copies(accelerator.num_processes)
        if "optimizer" in train.offload and self.sharded:
            raise UsageError(
                "train.offload: the optimizer's state of a sharded model stays on the GPUs, which share it. Leave optimizer out of "
                "train.offload, or set train.shard=none."
            )
        with distributed.hidden_fsdp_launch():
            # A model that no device could hold whole is sharded from the host's memory.
            device = torch.device("cpu") if self.sharded else accelerator.device
            trained = trainable.load(start, train, kernel, device, trains_tower=bool(images and images.trains_tower))
        self._processor = start.processor
        self._set_up(trained, kernel, like, say, images)

    def _set_up(
        self,
        trained: trainable.Trainable,
        kernel: str,
        like: Sequence[TokenSequence],
        say: Callable[[str], None],
        images: RunImages | None = None,
    ) -> None:
        """Make what computes with this model and updates it."""
        train, accelerator = self.train, self.accelerator
        self._trained, self.notes, model = trained, trained.notes, trained.model
        self.head_dtype = choose_head_dtype(train.head_dtype, self.precision, accelerator.device)
        # A copy of a frozen head would be whole in every process.
        set_head_dtype(model, self.head_dtype, frozen=train.lora is not None and not self.sharded)
        vision = images.attach(model, accelerator.device) if images else None
        if images:
            self.notes += images.describe(model)
        self.forward = Forward(model, kernel, train.rows, self.precision, "train.rows", vision)
        self._calls = distributed.Calls(self.forward)
        if self.sharded:
            distributed.shard(self._calls, trainable.model_layers(model), accelerator)
            self.notes.append(f"the model is sharded over {accelerator.num_processes} processes (FSDP2)")
        # Kept from here on, because a sharded model has other parameter objects while they are gathered.
        self._parameters = self._trained.parameters()
        self._choose_layout(like)
        self._change_kernels(like)
        self.peak_flops = flops.peak_flops(accelerator.device, self.precision)
        routers = router_loss.make_router_loss(model, train, accelerator.device)
        self._budget = self._make_budget(like, say)
        parameters = list(self._parameters.values())
        optimizer = optimizers.make_optimizer(parameters, train, accelerator.device)
        if "optimizer" in train.offload:
            OffloadedState(optimizer, accelerator.device)
        if train.offload and kind_of(accelerator.device) == "cpu":
            self.notes.append("train.offload has no effect on a CPU")
        self._optimizer, self._n_updates = accelerator.prepare(optimizer), 0
        self._released = ReleasedGradients(self._optimizer, parameters) if train.release_gradients else None
        module = self._calls if self.sharded else accelerator.prepare(self._calls)
        self._logps = PolicyLogps(
            train=train,
            accelerator=accelerator,
            forward=self.forward,
            calls=self._calls,
            module=module,
            sharded=self.sharded,
            budget=self._budget,
            routers=routers,
            cost=flops.model_cost(model),
            shortest=min(like, key=lambda sequence: sequence.n_tokens),
            trains_tower=bool(images and images.trains_tower),
        )

    def _choose_layout(self, like: Sequence[TokenSequence]) -> None:
        with working("try the layouts of rows"), self.accelerator.autocast():
            self._calls.choose_layout(like)
        if self.sharded and self.forward.vision and self.forward.layout == "padded":
            # Each layer waits for all processes, and they would compute it a different number of times.
            raise UsageError(
                f"Rows are padded ({self.forward.layout_reason or 'train.rows'}), and each sequence with images then takes a forward of "
                "its own, whose number differs among processes that share a sharded model. Set train.shard=none, or train.rows=auto."
            )

    def _change_kernels(self, like: Sequence[TokenSequence]) -> None:
        """On a GPU, take the kernels that the settings ask for."""
        if kind_of(self.accelerator.device) != "cuda":
            if self.train.compile:
                self.notes.append("train.compile is not followed: layers are compiled on a GPU only")
            return
        # A compiler fuses by itself, and refuses code that was given other functions.
        changes = {"compile": layer_kernels.compile_layers, "fuse_kernels": layer_kernels.fuse_kernels}
        for setting, change in changes.items():
            if getattr(self.train, setting):
                reason = self._adopt(partial(change, self.forward.model), like)
                if reason is None:
                    break
                self.notes.append(f"train.{setting} is not followed: {reason}")

    def _adopt(self, change: Callable[[], Callable[[], None]], like: Sequence[TokenSequence]) -> str | None:
        with working("try faster kernels"), self.accelerator.autocast():
            return self._calls.adopt(change, like)

    def _make_budget(self, like: Sequence[TokenSequence], say: Callable[[str], None]) -> micro_batch_size.Budget:
        budget = micro_batch_size.Budget(self.train, self.accelerator.device, self.accelerator.num_processes, say)
        if budget.wants_trial and self.sharded:
            # Each process would stop where its own memory ends, and the others wait for it.
            self.notes.append(f"{budget.tokens:,} tokens in one forward and backward: not tried on a sharded model")
        elif budget.wants_trial:
            with working("try how many tokens fit in memory"):
                budget.tokens = micro_batch_size.find_budget(
                    self.forward, like, self._parameters, self.train, self.accelerator
                )
            self.notes.append(
                f"{budget.tokens:,} tokens in one forward and backward fit (train.tokens_per_micro_batch)"
            )
        return budget

    @property
    def precision(self) -> str:
        return distributed.arithmetic(self.train, self.accelerator)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained; of a sharded model, this process's part."""
        return dict(self._parameters)

    @property
    def flops(self) -> float:
        """Operations of the last step, by this process."""
        return self._logps.step_flops

    @property
    def peak_memory(self) -> int:
        """Peak bytes of the GPU's memory, or of this process's if there is no GPU."""
        if self.accelerator.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.accelerator.device))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def broadcast(self, value: T) -> T:
        """Return the main process's value on every process."""
        return cast(T, broadcast_object_list([value])[0]) if self.accelerator.num_processes > 1 else value

    # -- examples ----------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        examples: Examples,
        indices: np.ndarray,
        objective: Objective,
        running_stats: RunningStats,
        what: str = "evaluate",
    ) -> tuple[Visit, dict[str, float]]:
        """Visit examples as one batch, without learning from them. `what` names the work as its progress is shown."""
        columns = self._logps.retry_smaller(
            lambda: self._logps.visit(examples, indices, objective, objective.visited, what=what), examples, indices
        )
        statistics = objective.compute_statistics(columns, running_stats, learning=False)
        losses = objective.compute_losses(columns, statistics.values)
        if (routers := self._logps.routers) and (counts := self._logps.take_router_counts()):
            statistics.logged[router_loss.METRIC] = routers.value(counts, counts)
        evaluated = Pending(stored_columns({**columns, **losses.columns()}), statistics.logged, {}).read()
        return evaluated.visit, evaluated.logged

    def update(
        self,
        examples: Examples,
        indices: np.ndarray,
        objective: Objective,
        running_stats: RunningStats,
        learning_rate: float,
        epoch: int = 0,
    ) -> Step:
        """Take one optimizer step on these examples."""
        seed = make_key(self.train.seed, self._n_updates)

        def accumulate() -> Pending:
            return accumulate_gradient(self._logps, examples, indices, objective, running_stats, epoch)

        if self._released:
            work = "a step's one forward and backward (train.release_gradients); a lower train.batch_size needs less"
            with micro_batch_size.never_retried(work), self._released.updates(learning_rate, seed):
                pending = accumulate()
            norm = self._released.take_norm()
        else:
            pending = self._logps.retry_smaller(accumulate, examples, indices)
            norm = optimizers.clip_gradients(self._parameters.values(), self.train.max_grad_norm)
        step = pending.read(grad_norm=distributed.reduce_scalar(norm))
        refuse_not_finite(step, is_taken=self._released is not None)
        if not self._released:
            with micro_batch_size.never_retried("the optimizer's update"):
                optimizers.take_step(self._optimizer, learning_rate, seed)
            self._optimizer.zero_grad()
        self._n_updates += 1
        return step

    def score(self, examples: Examples, indices: np.ndarray, answers: Sequence[str], *, tokens: bool) -> Scores:
        """The log-probs that the current weights give these answers, the same on every process."""
        return self._logps.score(examples, indices, answers, tokens=tokens)

    def generate(self, prompts: Sequence[TokenSequence]) -> list[str]:
        """Greedy answers to prompts, sequences without an answer. With a sharded model every process has to call this."""
        with self.forward.native_attention():
            return generate_answers(
                self._calls,
                self.tokenizer,
                self.accelerator,
                prompts,
                max_new_tokens=self.train.sample_tokens,
                max_length=self._max_length,
                budget=self._budget.tokens,
                sharded=self.sharded,
            )

    # -- state -------------------------------------------------------------------------------------------------------

    # With a sharded model every process has to call what gathers; the main process gets whole tensors, the others nothing.

    def model_state(self) -> dict[str, torch.Tensor]:
        return self._gather(self._trained.state())

    def weights(self) -> dict[str, torch.Tensor]:
        """What is trained, as it lies in memory: save_pretrained rearranges the weights of some models."""
        return self._gather(self._parameters)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return self._gather(optimizers.get_state(self._optimizer))

    def _gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return distributed.gather_tensors(tensors, keep=self.accelerator.is_main_process)

    def save_model(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        with working("save the model"), self.forward.native_attention():
            self._trained.save(folder, state)
        self.tokenizer.save_pretrained(folder)
        if self._trained.adapter is None:
            image_processor.copy_settings(self._processor, folder)

    def load_weights(self, folder: Path, *, reshaped: bool = False) -> None:
        """Replace the weights in place. `reshaped`: parameters of other shapes take those of the file."""
        distributed.reshard(self._calls)
        parameters = self.parameters
        for name, value in trainable.read_tensors(folder / WEIGHTS):
            parameter = parameters.pop(name, None)
            if parameter is None or (parameter.shape != value.shape and not reshaped):
                raise _other_weights(folder, f"{name[:80]!r} {tuple(value.shape)} is not a tensor of this policy")
            trainable.assign(parameter, distributed.take_shard(value, parameter))
        if parameters:
            raise _other_weights(folder, f"{shorten_list(list(parameters))} is missing")

    def restore(self, folder: Path, optimizer: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
        with working(f"restore {folder.name}"):
            optimizers.restore(self._optimizer, optimizer, folder)
            self.load_weights(folder)
        self._n_updates = step


def save_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    values = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(values, folder / WEIGHTS)


def _other_weights(folder: Path, reason: str) -> IntegrityError:
    return IntegrityError(
        f"{folder / WEIGHTS} holds the weights of another model: {reason}. Delete {folder}, and the run resumes from "
        "the previous checkpoint."
    )
