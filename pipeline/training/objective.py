"""What a run minimises: a weighted sum of losses, and what they read.

From the tokens to the step: token_sums.py makes columns of an answer's tokens, the statistics are taken over the whole global
batch, each loss gives a value per example, and their weighted sum is averaged over the step's examples.
Shapes: B examples.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import Train
from pipeline.errors import UsageError
from pipeline.schema import ANSWERS
from pipeline.training.losses import LOSSES, Loss, Statistic, get_loss, hyperparameters

Columns = Mapping[str, torch.Tensor]
# What running statistics carry from step to step, by term and statistic: plain numbers, for a checkpoint's JSON.
Memory = dict[str, dict[str, float]]
# A policy's log-probs of these answers say how far it has moved, and teach it nothing.
WITHOUT_GRADIENT = ("kl",)
WEIGHT = "weight"  # train.weighting's, from the policy
GIVEN_WEIGHT = "given_weight"  # train.weight's, from the data
PLAIN = "plain/"  # before the name of a column: without what train.tokens makes of it


@dataclass(frozen=True)
class Term:
    loss: Loss
    weight: float
    arguments: dict[str, Any]

    def statistic(self, statistic: Statistic, columns: Columns, memory: Memory, learning: bool) -> tuple[Any, Memory]:
        arguments = {name: self.arguments[name] for name in statistic.hyperparameters}
        given = [columns[name] for name in statistic.columns]
        if not statistic.running:
            return statistic.function(*given, **arguments), {}
        key = f"{self.loss.name}/{statistic.name}"
        value, after = statistic.function(*given, **arguments, running=memory.get(key), learning=learning)
        return value, {key: after}


class Objective:
    """The terms, checked against one another before anything is loaded."""

    def __init__(self, train: Train) -> None:
        weights = {train.loss: 1.0} if isinstance(train.loss, str) else train.loss
        losses = [get_loss(name) for name in weights]
        arguments = _arguments(losses, train)
        self.terms = [
            Term(loss, weight, hyperparameters(loss, arguments[loss.name]))
            for loss, weight in zip(losses, weights.values(), strict=True)
        ]
        self._train = train
        self.kind = _one_kind(losses)
        self.columns = tuple(dict.fromkeys(name for loss in losses for name in loss.columns))
        self.statistics = any(loss.statistics for loss in losses)
        self.over_batch = any(loss.over_batch for loss in losses)
        _refuse_what_does_not_combine(losses, train)

    @property
    def name(self) -> str:
        if len(self.terms) == 1:
            return self.terms[0].loss.name
        return " + ".join(f"{term.weight:g} {term.loss.name}" for term in self.terms)

    @property
    def _rewarding(self) -> Term:
        """The term whose rewards are the run's: the first that has a beta."""
        return next((term for term in self.terms if "beta" in term.arguments), self.terms[0])

    @property
    def beta(self) -> float:
        """The scale of rewards."""
        return float(self._rewarding.arguments.get("beta", self._train.beta or 1.0))

    @property
    def per_token(self) -> bool:
        """Whether rewards are per token."""
        return self._rewarding.loss.per_token

    @property
    def described(self) -> dict[str, dict[str, Any]]:
        """Each term's weight and hyperparameters, defaults and all."""
        return {term.loss.name: {"weight": term.weight, **term.arguments} for term in self.terms}

    @property
    def said(self) -> str:
        """What the config sets otherwise than a loss itself would, for a reader: a beta may have been meant for another loss."""
        return ", ".join(
            f"{term.loss.name}'s {name} {value} (its own: {own})"
            for term in self.terms
            for name, own in term.loss.hyperparameters.items()
            if (value := term.arguments[name]) != own
        )

    @property
    def answers(self) -> tuple[str, ...]:
        """Those whose log-probs the policy computes with gradients."""
        read = _answers(self.columns)
        return tuple(name for name in read if name not in WITHOUT_GRADIENT)

    @property
    def visited(self) -> tuple[str, ...]:
        """Those that an evaluation looks at: sft learns from chosen answers alone, and is judged by both."""
        both = ANSWERS[self.kind]
        return tuple(name for name in both if name not in WITHOUT_GRADIENT or name in self.without_gradient)

    @property
    def reference_answers(self) -> tuple[str, ...]:
        """Those whose log-probs the cache has to give."""
        if self._train.reference_free:
            return ()
        return tuple(
            name.removeprefix("ref_").removesuffix("_logp") for name in self.columns if name.startswith("ref_")
        )

    @property
    def reads_tokens(self) -> bool:
        """Whether the reference's sums do not suffice."""
        return bool(self.reference_answers) and self._train.tokens.of_reference

    @property
    def first_pass(self) -> tuple[str, ...]:
        """Answers whose log-probs are needed of the whole batch before the gradient of any example is known."""
        if self.over_batch:
            return _answers(self.columns)
        read = _answers(name for term in self.terms for statistic in term.loss.statistics for name in statistic.columns)
        # How tokens and examples are weighed may depend on both of a pair's answers.
        moving = self.answers if set(read) & set(self.answers) else ()
        return (*moving, *(name for name in read if name in WITHOUT_GRADIENT))

    @property
    def without_gradient(self) -> tuple[str, ...]:
        return tuple(name for name in _answers(self.columns) if name in WITHOUT_GRADIENT)

    def with_statistics(
        self, columns: Columns, memory: Memory, *, learning: bool
    ) -> tuple[dict[str, torch.Tensor], Memory, dict[str, float]]:
        """Of the whole batch's columns: the statistics by term and name, what to remember, and numbers to log."""
        some = next(iter(columns.values()))
        found: dict[str, torch.Tensor] = {}
        after: Memory = dict(memory)
        logged: dict[str, float] = {}
        with torch.no_grad():
            for term in self.terms:
                for statistic in term.loss.statistics:
                    value, remembered = term.statistic(statistic, columns, memory, learning)
                    tensor = torch.as_tensor(value, dtype=some.dtype, device=some.device)
                    found[_key(term, statistic.name)] = tensor
                    after |= remembered
                    if tensor.ndim == 0:
                        logged[statistic.name] = float(tensor)
        return found, after if learning else memory, logged

    def values(self, columns: Columns, statistics: Columns) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Each example's loss, and each term's share of it under its name, before its weight."""
        parts, total = {}, None
        for term in self.terms:
            given = [_given(term, name, columns, statistics) for name in term.loss.reads]
            part = term.loss.function(*given, **term.arguments)
            if part.shape != (n := (len(next(iter(columns.values()))),)):
                raise UsageError(
                    f"Loss {term.loss.name!r} gave values of shape {tuple(part.shape)} for {n[0]:,} examples. It has to return "
                    "one for each of them; their mean is taken later."
                )
            for weight in (WEIGHT, GIVEN_WEIGHT):
                part = part * columns[weight] if weight in columns else part
            parts[term.loss.name] = part
            total = term.weight * part if total is None else total + term.weight * part
        assert total is not None
        return total, parts


def _given(term: Term, name: str, columns: Columns, statistics: Columns) -> torch.Tensor:
    if (key := _key(term, name)) in statistics:
        return statistics[key]
    if term.loss.plain and f"{PLAIN}{name}" in columns:
        return columns[f"{PLAIN}{name}"]
    return columns[name]


def _key(term: Term, statistic: str) -> str:
    return f"{term.loss.name}/{statistic}"


def part_of(statistics: Columns, positions: torch.Tensor, n: int) -> dict[str, torch.Tensor]:
    """Statistics for some of the batch's `n` examples: those that have one value per example are cut."""
    return {name: value[positions] if value.ndim and len(value) == n else value for name, value in statistics.items()}


def _answers(columns: Iterable[str]) -> tuple[str, ...]:
    """The answers whose log-probs of the policy are among the columns."""
    return tuple(
        dict.fromkeys(
            name.removesuffix("_logp") for name in columns if name.endswith("_logp") and not name.startswith("ref_")
        )
    )


def losses_for(available: set[str]) -> list[str]:
    """The losses that need no column beyond these."""
    return [name for name, loss in LOSSES.items() if available.issuperset(loss.columns)]


# -- what goes together ----------------------------------------------------------------------------------------------


def _arguments(losses: list[Loss], train: Train) -> dict[str, dict[str, Any]]:
    """Each loss's share of train.beta and train.loss_args: `key` goes to all that have it, `loss.key` to one."""
    given: dict[str, dict[str, Any]] = {loss.name: {} for loss in losses}
    if train.beta is not None:
        for loss in losses:
            if "beta" in loss.hyperparameters:
                given[loss.name]["beta"] = train.beta
    for key, value in sorted(train.loss_args.items(), key=lambda entry: "." in entry[0]):
        of, dot, name = key.rpartition(".")
        meant = [loss for loss in losses if (not dot or loss.name == of) and name in loss.hyperparameters]
        if not meant or key == "beta":
            raise UsageError(_no_such_argument(losses, key))
        for loss in meant:
            given[loss.name][name] = value
    return given


def _no_such_argument(losses: list[Loss], key: str) -> str:
    if key == "beta":
        return "train.loss_args.beta: say it as train.beta, or LOSS.beta for one loss of several."
    of, dot, name = key.rpartition(".")
    if dot and of not in {loss.name for loss in losses}:
        return f"train.loss_args.{key}: {of} is not among the losses of this run ({', '.join(each.name for each in losses)})."
    have = "; ".join(
        f"{loss.name} has {', '.join(each for each in loss.hyperparameters if each != 'beta') or 'none'}"
        for loss in losses
        if not dot or loss.name == of
    )
    with_it = [loss.name for loss in LOSSES.values() if name in loss.hyperparameters]
    elsewhere = f" Losses with {name}: {', '.join(with_it)}." if with_it else ""
    called = " + ".join(loss.name for loss in losses if not dot or loss.name == of)
    return f"train.loss_args.{key}: loss {called!r} has no {name!r}; {have}.{elsewhere}"


def _one_kind(losses: list[Loss]) -> str:
    by_kind: dict[str, list[str]] = {}
    for loss in losses:
        by_kind.setdefault(loss.kind, []).append(loss.name)
    if len(by_kind) > 1:
        raise UsageError(
            f"train.loss: {', '.join(by_kind['pairs'])} read pairs, {', '.join(by_kind['labels'])} read labelled answers. "
            "One run has data of one kind; take losses of one of them."
        )
    return next(iter(by_kind))


def _refuse_what_does_not_combine(losses: list[Loss], train: Train) -> None:
    tokens = train.tokens
    if isinstance(train.loss, dict) and not any(train.loss.values()):
        raise UsageError(
            f"train.loss: every weight is 0 ({', '.join(train.loss)}), so there is nothing to learn. Leave it out, or give one a "
            "weight."
        )
    weighed = f"train.weighting {train.weighting}" if train.weighting else train.weight and "train.weight"
    if weighed and (coupled := [loss.name for loss in losses if loss.over_batch]):
        raise UsageError(
            f"{weighed} has no meaning for {', '.join(coupled)}: there, examples are not weighed one by "
            "one. Leave it out, or take another loss."
        )
    reads_both = {"chosen_logp", "rejected_logp"} <= {name for loss in losses for name in loss.columns}
    if not reads_both and (tokens.ld_alpha is not None or tokens.sampo):
        which = "ld_alpha" if tokens.ld_alpha is not None else "sampo"
        raise UsageError(
            f"train.tokens.{which} compares the lengths of a pair's answers, and {losses[0].name} reads answers that come "
            "alone. Leave it out, or take a loss that compares two."
        )
    if tokens.weighs and all(loss.plain for loss in losses):
        raise UsageError(
            f"train.tokens weighs an answer's tokens, and {losses[0].name} reads plain sums. Leave it out, or add a loss that "
            "compares answers."
        )
    reads_reference = any(name.startswith("ref_") for loss in losses for name in loss.columns)
    if train.reference_free and not reads_reference:
        raise UsageError(
            f"train.reference_free takes the reference's log-probs to be 0, and {', '.join(loss.name for loss in losses)} "
            "reads none anyway. Leave it out."
        )
    if train.moving_reference and (train.reference_free or not reads_reference):
        raise UsageError(
            "train.moving_reference moves the reference, and this run reads none. Leave it out, or take a loss that has a reference."
        )
    if tokens.clamp is not None and (train.reference_free or not reads_reference):
        raise UsageError(
            "train.tokens.clamp limits each token's ratio to the reference, and this run reads none. Leave it out, or take a "
            "loss that has a reference."
        )
    if train.density_ratio and not any("density_ratio" in loss.columns for loss in losses):
        readers = ", ".join(loss.name for loss in LOSSES.values() if "density_ratio" in loss.columns)
        raise UsageError(
            f"train.density_ratio weighs prompts for losses that read density_ratio ({readers}), and "
            f"{', '.join(loss.name for loss in losses)} does not. Leave it out, or take one of them."
        )
    if train.scope == "micro" and train.micro_batch_size is None and any(x.statistics or x.over_batch for x in losses):
        raise UsageError(
            "train.scope micro takes a batch's statistics over each micro-batch, so it has to be said how large those are: "
            "set train.micro_batch_size."
        )
