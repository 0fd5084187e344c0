"""The model being trained, on accelerate: log-probs of pairs, the update, greedy answers.

There is no reference model here and no way to load one. Shapes: B pairs.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pipeline import identity
from pipeline.batches import Batch, Pairs
from pipeline.config import Train
from pipeline.errors import IntegrityError, UsageError
from pipeline.logprobs import completion_logps, sums, use_float32_head
from pipeline.packing import token_budget_batches

logging.set_verbosity_error()
logging.disable_progress_bar()

_WEIGHTS = "weights.safetensors"
LossFunction = Callable[[dict[str, torch.Tensor]], torch.Tensor]
# What a visit of a pair leaves behind, in the order of the pairs visited.
Visit = dict[str, np.ndarray]
_VISIT = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp", "loss")


def accelerator(train: Train) -> Accelerator:
    cpu = train.device == "cpu" or not torch.cuda.is_available()
    if train.device == "cuda" and cpu:
        raise UsageError("train.device is cuda, but PyTorch sees no GPU. Set it to auto or cpu.")
    bf16 = train.precision == "bf16" or (train.precision == "auto" and not cpu)
    return Accelerator(cpu=cpu, mixed_precision="bf16" if bf16 else "no")


class Policy:
    def __init__(self, start: Path, template: str | None, train: Train, accelerator: Accelerator) -> None:
        torch.manual_seed(train.seed)
        self.train, self.accelerator = train, accelerator
        self.tokenizer = AutoTokenizer.from_pretrained(start)
        if template is not None:
            self.tokenizer.chat_template = template
        self._limit = identity.longest_sequence(start)
        model = _load(start)
        use_float32_head(model)
        optimizer = torch.optim.AdamW(_parameter_groups(model, train.weight_decay), lr=train.learning_rate)
        self._model, self._optimizer = accelerator.prepare(model, optimizer)

    @property
    def precision(self) -> str:
        return "bfloat16" if self.accelerator.mixed_precision == "bf16" else "float32"

    # -- log-probs ---------------------------------------------------------------------------------------------------

    def evaluate(self, pairs: Pairs, indices: np.ndarray, loss: LossFunction) -> Visit:
        """Visit pairs without learning from them."""
        mine = self._share(indices)
        parts = []
        with torch.no_grad():
            for part in pairs.micro_batches(mine, self.train.tokens_per_micro_batch):
                parts.append((part, self._visit(pairs.batch(part, self.accelerator.device), loss)))
        return self._gather(indices, parts)

    def update(
        self, pairs: Pairs, indices: np.ndarray, loss: LossFunction, learning_rate: float
    ) -> tuple[Visit, float]:
        """One optimizer step on these pairs; returns what was seen before it, and the gradient's norm."""
        mine = self._share(indices)
        # A process without pairs of its own still has to take part in the reduction of gradients.
        parts = pairs.micro_batches(mine if len(mine) else indices[:1], self.train.tokens_per_micro_batch)
        seen = []
        for i, part in enumerate(parts):
            with self.accelerator.no_sync(self._model) if i < len(parts) - 1 else contextlib.nullcontext():
                visit = self._visit(pairs.batch(part, self.accelerator.device), loss)
                # Averaged over the step's pairs, never over micro-batches: memory must not change the result. The
                # reduction averages over processes, hence their number.
                scale = self.accelerator.num_processes / len(indices) if len(mine) else 0.0
                self.accelerator.backward(visit["loss"].sum() * scale)
            if len(mine):
                seen.append((part, {name: values.detach() for name, values in visit.items()}))
        grad_norm = float(self.accelerator.clip_grad_norm_(self._model.parameters(), self.train.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise IntegrityError(
                f"The gradient's norm is {grad_norm}; the step was not taken. Lower train.learning_rate, or look at the "
                f"pairs {', '.join(pairs.example_ids(indices)[:5])}, ... of this step."
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return self._gather(indices, seen), grad_norm

    def _visit(self, batch: Batch, loss: LossFunction) -> dict[str, torch.Tensor]:
        # Without gradients not through the wrapper, whose forward may wait for processes that have no pair to visit.
        model = self._model if torch.is_grad_enabled() else self.accelerator.unwrap_model(self._model)
        with self.accelerator.autocast():
            logp = sums(completion_logps(model, [*batch.chosen, *batch.rejected]))
        chosen_B, rejected_B = torch.split(logp, len(batch.chosen))
        columns = {**batch.columns, "chosen_logp": chosen_B, "rejected_logp": rejected_B}
        columns["loss"] = loss(columns)
        return {name: columns[name] for name in _VISIT}

    def _share(self, indices: np.ndarray) -> np.ndarray:
        return indices[self.accelerator.process_index :: self.accelerator.num_processes]

    def _gather(self, indices: np.ndarray, parts: list[tuple[np.ndarray, dict[str, torch.Tensor]]]) -> Visit:
        """What all processes saw, in the order of `indices`."""
        rows = [(int(i), *row) for part, visit in parts for i, *row in zip(part, *_columns(visit), strict=True)]
        if self.accelerator.num_processes > 1:
            rows = gather_object(rows)
        by_index = {i: row for i, *row in rows}
        table = np.array([by_index[int(i)] for i in indices], dtype=np.float64).reshape(len(indices), len(_VISIT))
        return {name: table[:, column] for column, name in enumerate(_VISIT)}

    # -- answers -----------------------------------------------------------------------------------------------------

    def answers(self, prompts: list[np.ndarray]) -> list[str]:
        """Greedy answers to tokenized prompts."""
        answers: dict[int, str] = {}
        room = self.train.sample_tokens
        for part in token_budget_batches([len(ids) + room for ids in prompts], self.train.tokens_per_micro_batch):
            answers.update(zip(part, self._answer([prompts[i] for i in part]), strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _answer(self, prompts: list[np.ndarray]) -> list[str]:
        room = min(self.train.sample_tokens, self._limit - max(len(ids) for ids in prompts))
        if room <= 0:
            return [""] * len(prompts)
        model = self.accelerator.unwrap_model(self._model)
        longest = max(len(ids) for ids in prompts)
        pad = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id or 0
        )
        ids = torch.tensor([[pad] * (longest - len(p)) + p.tolist() for p in prompts], device=self.accelerator.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.accelerator.device)
        ends = {self.tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)} - {None}
        with torch.no_grad(), self.accelerator.autocast():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=room,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
            )
        return [text.strip() for text in self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]

    # -- state -------------------------------------------------------------------------------------------------------

    def save_model(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self._model)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        state = self._optimizer.state_dict()["state"]
        return {f"{i}.{name}": value for i, values in state.items() for name, value in values.items()}

    def save_weights(self, folder: Path) -> None:
        """The weights as they lie in memory: save_pretrained rearranges those of some models."""
        safetensors.torch.save_model(self.accelerator.unwrap_model(self._model), str(folder / _WEIGHTS))

    def restore(self, folder: Path, optimizer: dict[str, torch.Tensor]) -> None:
        safetensors.torch.load_model(self.accelerator.unwrap_model(self._model), folder / _WEIGHTS)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in optimizer.items():
            i, name = key.split(".", 1)
            state.setdefault(int(i), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})


def learning_rate(step: int, n_steps: int, train: Train) -> float:
    """Linear warm-up, then a cosine to zero. `step` counts from 1; the first has the rate after no warm-up step."""
    done, warmup = step - 1, min(math.ceil(train.warmup_ratio * n_steps), n_steps - 1)
    if done < warmup:
        return train.learning_rate * done / warmup
    progress = (done - warmup) / max(1, n_steps - warmup)
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _load(folder: Path) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=identity.attention_kernel(folder, "sdpa"),
            use_safetensors=True,
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # Transformers raises many kinds for a folder that is not right.
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{folder} does not load as a causal language model ({type(error).__name__}: {reason})."
        ) from None
    _mend_generation_config(model.generation_config)
    # In eval mode there is no dropout, which would make policy and reference differ at the start; gradients still flow.
    return model.eval()


def _mend_generation_config(config: Any) -> None:
    """Some models are published with a temperature but without do_sample, and then refuse to be saved."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases do not decay."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _columns(visit: dict[str, torch.Tensor]) -> list[list[float]]:
    return [visit[name].tolist() for name in _VISIT]


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]
