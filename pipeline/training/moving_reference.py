"""A reference that moves (TR-DPO, Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656) with one model in memory.

Every so many steps the reference becomes alpha * policy + (1 - alpha) * reference. Which examples come until the next move is known,
so the new reference scores each of them once, and its log-probs replace the cache's. For this its weights are put into the policy's
own parameters, whose values wait on disk; the pass has no gradients, and those of the step before have been freed. The device never
holds two models.

A move happens before the first step trained against the new reference, so never after the last step. An evaluation reads the
reference of its step. Every checkpoint holds what the next step needs: the current log-probs and, unless the reference is a past
policy as a whole, its weights.
"""

import itertools
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.model import trainable
from prefcache.pipeline.model.stochastic_rounding import make_key, random_bits, round_stochastically
from prefcache.pipeline.schema import TRAIN
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.training import dataset
from prefcache.pipeline.training.checkpoints import MOVING_REFERENCE, REFERENCE_SCORES, REFERENCE_WEIGHTS, WEIGHTS
from prefcache.pipeline.training.dataset import Examples, Scores
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.policy import Policy, save_weights


def refuse_never(train: Train, n_examples: int) -> None:
    """Refuse a reference that would not move before the last step."""
    n_steps = dataset.n_steps(n_examples, train.batch_size, train.epochs, train.max_steps)
    if train.moving_reference and train.moving_reference.every >= n_steps:
        raise UsageError(
            f"train.moving_reference.every is {train.moving_reference.every:,} and the run has {n_steps:,} steps, so the reference "
            "would never move. Lower it, or leave train.moving_reference out."
        )


class MovingReference:
    def __init__(
        self, train: Train, objective: Objective, examples: Mapping[str, Examples], policy: Policy, run: Path
    ) -> None:
        assert train.moving_reference is not None
        self._train, self._objective = train, objective
        self._examples, self._policy, self._run = examples, policy, run
        self._folder = run / MOVING_REFERENCE
        self._every, self._alpha = train.moving_reference.every, train.moving_reference.alpha
        self._n_steps = dataset.n_steps(len(examples[TRAIN]), train.batch_size, train.epochs, train.max_steps)
        self._scores: dict[str, Scores] = {}  # empty until the first move: the cache's log-probs are current
        self._mixes = self._alpha < 1  # else the reference is a past policy, whose weights are not needed again
        if self._mixes and policy.sharded:
            raise UsageError(
                f"train.moving_reference.alpha={self._alpha:g} mixes whole weights, and the model is sharded. Set alpha to 1, or "
                "train.shard to none."
            )
        if self._mixes and train.lora is not None:
            for name in policy.parameters:
                if not (".lora_A." in name or ".lora_B." in name):
                    raise UsageError(
                        f"train.moving_reference.alpha: the adapter has {name}, and only LoRA's factors can be mixed so that the "
                        "reference is the mean of the weights (DoRA's magnitudes cannot). Set alpha to 1, or train.lora.dora to false."
                    )

    @property
    def description(self) -> str:
        becomes = f"{self._alpha:g} policy + {1 - self._alpha:g} reference" if self._mixes else "the policy"
        return f"the reference moves every {self._every:,} steps: it becomes {becomes}"

    # -- along the run -----------------------------------------------------------------------------------------------

    def restore(self, checkpoint: Path | None) -> None:
        """Restore the reference from a checkpoint of this run; without one, start with the policy's initial weights."""
        if checkpoint and (checkpoint / REFERENCE_SCORES).exists():
            self._replace_scores(_read_scores(checkpoint / REFERENCE_SCORES, self._objective))
        if self._mixes and self._policy.accelerator.is_main_process:
            with artifact.commit_folder(self._folder) as folder:
                if checkpoint:
                    _link_or_copy(checkpoint / REFERENCE_WEIGHTS, folder / WEIGHTS)
                else:
                    save_weights(folder, self._policy.parameters)
        self._policy.accelerator.wait_for_everyone()

    def move_before(self, step: int) -> None:
        """Move the reference, if a move is due between this step and the one before it."""
        done = step - 1
        if done == 0 or done % self._every:
            return
        if not self._mixes:
            self._score(done)
            return
        with artifact.scratch_folder(self._run / "policy") as aside:
            save_weights(aside, self._policy.parameters)
            self._mix_weights(done)
            self._score(done)
            self._policy.load_weights(aside, reshaped=True)  # a mixture of adapters has another rank

    def save(self, checkpoint: Path) -> None:
        """Write what a run resumed from this checkpoint needs. The weights are a second name of the file, not a copy."""
        if self._scores:
            _write_scores(checkpoint / REFERENCE_SCORES, self._scores)
        if self._mixes:
            _link_or_copy(self._folder / WEIGHTS, checkpoint / REFERENCE_WEIGHTS)

    def checkpoint_files(self, step: int) -> set[str]:
        """The files that `save` adds to the checkpoint of a step."""
        return ({REFERENCE_WEIGHTS} if self._mixes else set()) | ({REFERENCE_SCORES} if step > self._every else set())

    def _mix_weights(self, done: int) -> None:
        """Put the reference's new weights into the policy's parameters, in place and one after another, and on disk."""
        parameters, accelerator = self._policy.parameters, self._policy.accelerator
        stacked = trainable.count_stacked(self._policy.forward.model)
        for name, other in trainable.read_tensors(self._folder / WEIGHTS):
            own, other = parameters[name], other.to(parameters[name].device)
            if own.dtype == torch.bfloat16:
                mixed = _mix_bf16(own.data, other, self._alpha, make_key(self._train.seed, done, name))
            else:
                mixed = _mix(name, own.data, other, self._alpha, stacked.get(name, 1))
            trainable.assign(own, mixed)
        accelerator.wait_for_everyone()  # all have read the old weights
        if accelerator.is_main_process:
            with artifact.commit_folder(self._folder) as folder:
                save_weights(folder, self._policy.parameters)
        accelerator.wait_for_everyone()

    # -- what it scores ----------------------------------------------------------------------------------------------

    def _score(self, done: int) -> None:
        """With the current weights, score all that is read until the next move."""
        self._replace_scores({})  # the current ones are another reference's
        scores = {TRAIN: self._score_parts(TRAIN, self._upcoming(done))}
        steps = range(done + 1, min(done + self._every, self._n_steps) + 1)
        is_evaluated = any(dataset.evaluates(step, self._n_steps, self._train.eval_every) for step in steps)
        for split, examples in self._examples.items():
            if split != TRAIN and len(examples) and is_evaluated:
                scores[split] = self._score_parts(split, [np.arange(len(examples))])
        self._replace_scores(scores)

    def _upcoming(self, done: int) -> list[np.ndarray]:
        """The examples of the steps until the next move, step by step, each at its first occurrence."""
        train, examples = self._train, self._examples[TRAIN]
        steps = dataset.steps(
            len(examples), train.batch_size, train.epochs, train.seed, done, examples.ranks, train.max_steps
        )
        seen = np.zeros(len(examples), bool)
        upcoming = []
        for _, _, indices in itertools.islice(steps, self._every):
            upcoming.append(indices[~seen[indices]])
            seen[indices] = True
        return [indices for indices in upcoming if len(indices)]

    def _score_parts(self, split: str, parts: list[np.ndarray]) -> Scores:
        answers, tokens = self._objective.reference_answers, self._objective.reads_tokens
        scores = [self._policy.score(self._examples[split], part, answers, tokens=tokens) for part in parts]
        return Scores(
            np.concatenate([part.indices for part in scores]),
            {name: np.concatenate([part.sums[name] for part in scores]) for name in scores[0].sums},
            {name: [logps for part in scores for logps in part.tokens[name]] for name in scores[0].tokens},
        )

    def _replace_scores(self, scores: dict[str, Scores]) -> None:
        for examples in self._examples.values():
            examples.forget_reference()
        for split, split_scores in scores.items():
            self._examples[split].take_reference(split_scores)
        self._scores = scores


def _mix(name: str, own: torch.Tensor, other: torch.Tensor, alpha: float, n_experts: int) -> torch.Tensor:
    """Mix two tensors: whole weights directly, an adapter's factors side by side, in a stack those of each expert.

    An adapter adds B A, and a mean of products is not the product of means. But
    a B A + (1 - a) B' A' = [a B, (1 - a) B'] [A; A'],
    so the rank grows with each move, up to where the oldest part weighs less than float32 resolves.
    """
    n_most = math.ceil(math.log(torch.finfo(torch.float32).eps) / math.log1p(-alpha)) + 1
    if ".lora_A." in name:
        own_ERI, other_ERI = (factor.view(n_experts, -1, factor.shape[1]) for factor in (own, other))
        return torch.cat([own_ERI, other_ERI], 1)[:, : n_most * own_ERI.shape[1]].flatten(0, 1)
    if ".lora_B." in name:
        return torch.cat([alpha * own, (1 - alpha) * other], 1)[:, : n_most * own.shape[1]]
    return own.mul_(alpha).add_(other, alpha=1 - alpha)


def _mix_bf16(own: torch.Tensor, other: torch.Tensor, alpha: float, key: int) -> torch.Tensor:
    """Mix whole weights in bf16, rounded stochastically.

    Most differ by one step of bf16, if at all: rounded to the nearest, an alpha of 0.6 would act as 1, and one of 0.4 as 0.
    """
    mixed_N = other.flatten().float().lerp_(own.flatten().float(), alpha)
    bits_N = random_bits(len(mixed_N), torch.tensor(key, dtype=torch.int32), own.device)
    return round_stochastically(mixed_N, bits_N & 0xFFFF).view(own.shape)


# -- in a checkpoint -------------------------------------------------------------------------------------------------


def _link_or_copy(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # the file system has no hard links
        shutil.copyfile(file, name)


def _write_scores(file: Path, scores: Mapping[str, Scores]) -> None:
    arrays: dict[str, np.ndarray] = {}
    for split, split_scores in scores.items():
        arrays[f"{split}/indices"] = split_scores.indices
        arrays |= {f"{split}/sums/{name}": sums for name, sums in split_scores.sums.items()}
        for name, lists in split_scores.tokens.items():
            arrays[f"{split}/counts/{name}"] = np.array([len(values) for values in lists])
            arrays[f"{split}/tokens/{name}"] = np.concatenate(lists)
    safetensors.numpy.save_file(arrays, file)


def _read_scores(file: Path, objective: Objective) -> dict[str, Scores]:
    arrays = safetensors.numpy.load_file(file)

    def tokens(split: str, name: str) -> list[np.ndarray]:
        ends = np.cumsum(arrays[f"{split}/counts/{name}"])
        return np.split(arrays[f"{split}/tokens/{name}"], ends[:-1])

    answers = objective.reference_answers
    return {
        split: Scores(
            arrays[f"{split}/indices"],
            {name: arrays[f"{split}/sums/{name}"] for name in answers},
            {name: tokens(split, name) for name in answers} if objective.reads_tokens else {},
        )
        for split in (name.removesuffix("/indices") for name in arrays if name.endswith("/indices"))
    }
