"""A reference that moves, in the memory of the policy alone: TR-DPO, Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656.

Every so many steps the reference becomes alpha * policy + (1 - alpha) * reference. Which examples come until it moves again is
known, so it scores those, each once, and its log-probs take the place of the cache's. For that its weights stand in the policy's
own parameters, whose values wait on disk; the pass has no gradients, and those of the step before are gone. So there is no moment
at which the device holds two models.

It moves before the first step that is trained against the new one, thus never after the last step. An evaluation sees the
reference of its step. All that the next step needs is in every checkpoint: the log-probs in force and, unless the reference is a
past policy as a whole, its weights.
"""

import itertools
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from pipeline.config import Train
from pipeline.errors import UsageError
from pipeline.model import trainable
from pipeline.schema import HELD_OUT, TRAIN
from pipeline.stored import artifact
from pipeline.training import batches
from pipeline.training.batches import Examples, Scores
from pipeline.training.objective import Objective
from pipeline.training.policy import WEIGHTS, Policy, save_weights

# In a checkpoint.
_WEIGHTS = "reference.safetensors"
_SCORES = "reference-scores.safetensors"


def refuse_another_start(train: Train, policy: str, reference: str | None) -> None:
    """The first mixture is of the weights that scored and the policy's, and training has what the policy starts from alone."""
    if train.moving_reference and train.moving_reference.alpha < 1 and policy != reference:
        raise UsageError(
            f"train.moving_reference.alpha={train.moving_reference.alpha:g} mixes the policy's weights with the reference's, and the "
            "policy starts from others, where training loads no reference. Set alpha to 1, or let the policy start from the "
            "reference (leave train.model out)."
        )


def refuse_never(train: Train, n_examples: int) -> None:
    n_steps = batches.n_steps(n_examples, train.batch_size, train.epochs)
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
        self._every, self._alpha = train.moving_reference.every, train.moving_reference.alpha
        self._n_steps = batches.n_steps(len(examples[TRAIN]), train.batch_size, train.epochs)
        self._scores: dict[str, Scores] = {}  # none before it has moved: the cache's are in force
        if self._mixes and policy.sharded:
            raise UsageError(
                f"train.moving_reference.alpha={self._alpha:g} mixes whole weights, and the model is sharded. Set alpha to 1, or "
                "train.shard to none."
            )
        if self._mixes:
            _refuse_what_does_not_mix(policy.parameters, adapter=train.lora is not None)

    @property
    def said(self) -> str:
        """For a person."""
        becomes = f"{self._alpha:g} policy + {1 - self._alpha:g} reference" if self._mixes else "the policy"
        return f"the reference moves every {self._every:,} steps: it becomes {becomes}"

    @property
    def _mixes(self) -> bool:
        """Else the reference is a past policy, whose weights nobody asks for again."""
        return self._alpha < 1

    @property
    def _folder(self) -> Path:
        """With the reference's weights."""
        return self._run / "reference"

    # -- along the run -----------------------------------------------------------------------------------------------

    def begin(self, checkpoint: Path | None) -> None:
        """As it is in a checkpoint of this run; without one, the policy as it starts."""
        if checkpoint and (checkpoint / _SCORES).exists():
            self._take(_read(checkpoint / _SCORES, self._objective))
        if self._mixes and self._policy.accelerator.is_main_process:
            with artifact.commit_folder(self._folder) as folder:
                if checkpoint:
                    _name_twice(checkpoint / _WEIGHTS, folder / WEIGHTS)
                else:
                    save_weights(folder, self._policy.parameters)
        self._policy.accelerator.wait_for_everyone()

    def before(self, step: int) -> None:
        """Move, if the reference does so between this step and the one before it."""
        done = step - 1
        if done == 0 or done % self._every:
            return
        if self._mixes:
            with artifact.scratch_folder(self._run / "policy") as aside:
                save_weights(aside, self._policy.parameters)
                self._become_the_mixture()
                self._score(done)
                self._policy.load_weights(aside)
        else:
            self._score(done)

    def save(self, checkpoint: Path) -> None:
        """What is needed of it to go on from there. Its weights are a second name of the file, not a copy."""
        if self._scores:
            _write(checkpoint / _SCORES, self._scores)
        if self._mixes:
            _name_twice(self._folder / WEIGHTS, checkpoint / _WEIGHTS)

    def _become_the_mixture(self) -> None:
        """The reference's new weights, in the policy's parameters and on disk."""
        _mix(self._policy.parameters, self._folder / WEIGHTS, self._alpha)
        devices = self._policy.accelerator
        devices.wait_for_everyone()  # all have read the old ones
        if devices.is_main_process:
            with artifact.commit_folder(self._folder) as folder:
                save_weights(folder, self._policy.parameters)
        devices.wait_for_everyone()

    # -- what it scores ----------------------------------------------------------------------------------------------

    def _score(self, done: int) -> None:
        """With the weights as they are, all that is read until it moves again."""
        self._take({})  # what is in force is of another reference
        found = {TRAIN: self._scored(TRAIN, self._coming(done))}
        if (n := len(self._examples[HELD_OUT])) and self._evaluation_comes(done):
            found[HELD_OUT] = self._scored(HELD_OUT, [np.arange(n)])
        self._take(found)

    def _evaluation_comes(self, done: int) -> bool:
        steps = range(done + 1, min(done + self._every, self._n_steps) + 1)
        return any(batches.evaluates(step, self._n_steps, self._train.eval_every) for step in steps)

    def _coming(self, done: int) -> list[np.ndarray]:
        """The examples of the steps until it moves again, step by step, each where it comes first."""
        train, examples = self._train, self._examples[TRAIN]
        steps = batches.steps(len(examples), train.batch_size, train.epochs, train.seed, done, examples.ranks)
        seen = np.zeros(len(examples), bool)
        coming = []
        for _, _, indices in itertools.islice(steps, self._every):
            coming.append(indices[~seen[indices]])
            seen[indices] = True
        return [indices for indices in coming if len(indices)]

    def _scored(self, split: str, parts: list[np.ndarray]) -> Scores:
        answers, tokens = self._objective.reference_answers, self._objective.reads_tokens
        return _joined([self._policy.score(self._examples[split], part, answers, tokens=tokens) for part in parts])

    def _take(self, scores: dict[str, Scores]) -> None:
        for examples in self._examples.values():
            examples.forget_reference()
        for split, of_split in scores.items():
            self._examples[split].take_reference(of_split)
        self._scores = scores


def _joined(parts: list[Scores]) -> Scores:
    return Scores(
        np.concatenate([part.indices for part in parts]),
        {name: np.concatenate([part.sums[name] for part in parts]) for name in parts[0].sums},
        {name: [each for part in parts for each in part.tokens[name]] for name in parts[0].tokens},
    )


# -- weights ---------------------------------------------------------------------------------------------------------


def _mix(parameters: Mapping[str, torch.nn.Parameter], file: Path, alpha: float) -> None:
    """Make of the policy's parameters, in place and one after another, the mixture with the reference's in the file."""
    for name, other in trainable.each_tensor(file):
        own = parameters[name]
        trainable.put(own, _mixed(name, own.data, other.to(own.device), alpha))


def _mixed(name: str, own: torch.Tensor, other: torch.Tensor, alpha: float) -> torch.Tensor:
    """Whole weights by themselves. What an adapter adds is B A, and a mean of products is no product of means; but it is the
    product of the factors laid side by side: a B A + (1 - a) B' A' = [a B, (1 - a) B'] [A; A'].

    So the rank grows with each move, up to where the oldest part weighs less than float32 resolves.
    """
    most = math.ceil(math.log(torch.finfo(torch.float32).eps) / math.log1p(-alpha)) + 1
    if ".lora_A." in name:
        return torch.cat([own, other], 0)[: most * own.shape[0]]
    if ".lora_B." in name:
        return torch.cat([alpha * own, (1 - alpha) * other], 1)[:, : most * own.shape[1]]
    return own.mul_(alpha).add_(other, alpha=1 - alpha)


def _refuse_what_does_not_mix(names: Iterable[str], *, adapter: bool) -> None:
    other = next((name for name in names if not (".lora_A." in name or ".lora_B." in name)), None)
    if adapter and other:
        raise UsageError(
            f"train.moving_reference.alpha: the adapter has {other}, and only LoRA's factors can be mixed so that the reference is "
            "the mean of the weights (DoRA's lengths cannot). Set alpha to 1, or train.lora.dora to false."
        )


# -- in a checkpoint -------------------------------------------------------------------------------------------------


def _name_twice(file: Path, name: Path) -> None:
    """A copy where the file system has no second names."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def _write(file: Path, scores: Mapping[str, Scores]) -> None:
    found: dict[str, np.ndarray] = {}
    for split, each in scores.items():
        found[f"{split}/indices"] = each.indices
        found |= {f"{split}/sums/{name}": sums for name, sums in each.sums.items()}
        for name, lists in each.tokens.items():
            found[f"{split}/counts/{name}"] = np.array([len(values) for values in lists])
            found[f"{split}/tokens/{name}"] = np.concatenate(lists)
    safetensors.numpy.save_file(found, file)


def _read(file: Path, objective: Objective) -> dict[str, Scores]:
    found = safetensors.numpy.load_file(file)
    splits = [name.removesuffix("/indices") for name in found if name.endswith("/indices")]
    answers = objective.reference_answers

    def tokens(split: str, name: str) -> list[np.ndarray]:
        ends = np.cumsum(found[f"{split}/counts/{name}"])
        return np.split(found[f"{split}/tokens/{name}"], ends[:-1])

    return {
        split: Scores(
            found[f"{split}/indices"],
            {name: found[f"{split}/sums/{name}"] for name in answers},
            {name: tokens(split, name) for name in answers} if objective.reads_tokens else {},
        )
        for split in splits
    }
