"""What a run minimises: a weighted sum of losses, and what they read.

From the tokens to the step: token_sums.py makes columns of an answer's tokens, the statistics are taken over the whole global
batch, each loss gives a value per example, and their weighted sum is averaged over the step's examples.
Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.schema import ANSWERS
from prefcache.pipeline.training.losses import LOSSES, Loss, Statistic, get_loss, hyperparameters
from prefcache.pipeline.training.losses.lazy_torch import torch

Columns = Mapping[str, "torch.Tensor"]
# What running statistics carry from step to step, by term and statistic: plain numbers, for a checkpoint's JSON.
RunningStats = dict[str, dict[str, float]]
# The same within a step, where the device may not have computed them yet.
PendingStats = Mapping[str, Mapping[str, "float | torch.Tensor"]]
# The policy's log-probs of these answers measure how far it has moved, and are not trained on.
WITHOUT_GRADIENT = ("kl",)
WEIGHT = "weight"  # of train.weighting, from the policy
GIVEN_WEIGHT = "given_weight"  # of train.weight, from the data
PLAIN = "plain/"  # prefix of a column without the effect of train.tokens


class Statistics(NamedTuple):
    """The statistics of a batch."""

    values: dict[str, torch.Tensor]  # by term and name
    running: dict[str, Mapping[str, float | torch.Tensor]]  # to carry to the next step
    logged: dict[str, torch.Tensor]


class Losses(NamedTuple):
    """The losses of some examples. Shape of each tensor: [B]."""

    total: torch.Tensor
    terms: dict[str, torch.Tensor]  # by loss, before its weight

    def columns(self) -> dict[str, torch.Tensor]:
        """Columns of a run's table: `loss`, and `loss/TERM` if there are several."""
        terms = {f"loss/{name}": values_B for name, values_B in self.terms.items()} if len(self.terms) > 1 else {}
        return {"loss": self.total, **terms}


@dataclass(frozen=True)
class Term:
    loss: Loss
    weight: float
    arguments: dict[str, Any]

    def key(self, statistic: str) -> str:
        return f"{self.loss.name}/{statistic}"

    def compute(
        self, statistic: Statistic, columns: Columns, running: PendingStats, learning: bool
    ) -> tuple[Any, PendingStats]:
        arguments = {name: self.arguments[name] for name in statistic.hyperparameters}
        inputs = [columns[name] for name in statistic.columns]
        if not statistic.running:
            return statistic.function(*inputs, **arguments), {}
        key = self.key(statistic.name)
        value, after = statistic.function(*inputs, **arguments, running=running.get(key), learning=learning)
        return value, {key: after}

    def find_input(self, name: str, columns: Columns, statistics: Columns) -> torch.Tensor:
        if (key := self.key(name)) in statistics:
            return statistics[key]
        plain = f"{PLAIN}{name}"
        return columns[plain if self.loss.plain and plain in columns else name]


class Objective:
    """The terms, checked against one another before anything is loaded."""

    def __init__(self, train: Train) -> None:
        weights = {train.loss: 1.0} if isinstance(train.loss, str) else train.loss
        losses = [get_loss(name) for name in weights]
        arguments = _assign_arguments(losses, train)
        self.terms = [Term(loss, weights[loss.name], hyperparameters(loss, arguments[loss.name])) for loss in losses]
        self._train = train
        self.kind = _common_kind(losses)
        self.columns = tuple(dict.fromkeys(name for loss in losses for name in loss.columns))
        self.has_statistics = any(loss.statistics for loss in losses)
        self.over_batch = any(loss.over_batch for loss in losses)
        _refuse_useless_weights(train, losses)
        _refuse_useless_tokens(train, losses)
        _refuse_useless_reference(train, losses)
        if train.scope == "micro" and train.micro_batch_size is None and (self.has_statistics or self.over_batch):
            raise UsageError(
                "train.scope micro takes statistics over each micro-batch, so these need a fixed size: set "
                "train.micro_batch_size."
            )

    @property
    def name(self) -> str:
        if len(self.terms) == 1:
            return self.terms[0].loss.name
        return " + ".join(f"{term.weight:g} {term.loss.name}" for term in self.terms)

    @property
    def _reward_term(self) -> Term:
        """The term whose rewards are the run's: the first that has a beta."""
        return next((term for term in self.terms if "beta" in term.arguments), self.terms[0])

    @property
    def beta(self) -> float:
        """The scale of rewards."""
        return float(self._reward_term.arguments.get("beta", self._train.beta or 1.0))

    @property
    def per_token(self) -> bool:
        """Whether rewards are per token."""
        return self._reward_term.loss.per_token

    @property
    def loss_arguments(self) -> dict[str, dict[str, Any]]:
        """Each term's weight and hyperparameters, including defaults."""
        return {term.loss.name: {"weight": term.weight, **term.arguments} for term in self.terms}

    @property
    def overrides(self) -> str:
        """The hyperparameters that differ from a loss's own, to print: a beta may have been meant for another loss."""
        return ", ".join(
            f"{term.loss.name}'s {name} {value} (its own: {default})"
            for term in self.terms
            for name, default in term.loss.hyperparameters.items()
            if (value := term.arguments[name]) != default
        )

    # -- the answers that are read -----------------------------------------------------------------------------------

    @property
    def answers(self) -> tuple[str, ...]:
        """Answers whose log-probs the policy computes with gradients."""
        return tuple(name for name in _policy_answers(self.columns) if name not in WITHOUT_GRADIENT)

    @property
    def without_gradient(self) -> tuple[str, ...]:
        return tuple(name for name in _policy_answers(self.columns) if name in WITHOUT_GRADIENT)

    @property
    def visited(self) -> tuple[str, ...]:
        """Answers that an evaluation computes: sft learns from chosen answers alone, and is judged by both."""
        both = ANSWERS[self.kind]
        return tuple(name for name in both if name not in WITHOUT_GRADIENT or name in self.without_gradient)

    @property
    def reference_answers(self) -> tuple[str, ...]:
        """Answers whose log-probs the cache has to give."""
        if self._train.reference_free:
            return ()
        return tuple(
            name.removeprefix("ref_").removesuffix("_logp") for name in self.columns if name.startswith("ref_")
        )

    @property
    def reads_tokens(self) -> bool:
        """Whether the reference's log-probs are read per token."""
        return bool(self.reference_answers) and self._train.tokens.of_reference

    @property
    def first_pass(self) -> tuple[str, ...]:
        """Answers whose log-probs are needed of the whole batch before the gradient of any example is known."""
        if self.over_batch:
            return _policy_answers(self.columns)
        read = _policy_answers(
            name for term in self.terms for statistic in term.loss.statistics for name in statistic.columns
        )
        # How tokens and examples are weighed may depend on both of a pair's answers.
        trained = self.answers if set(read) & set(self.answers) else ()
        return (*trained, *(name for name in read if name in WITHOUT_GRADIENT))

    # -- values ------------------------------------------------------------------------------------------------------

    def compute_statistics(self, columns: Columns, running_stats: PendingStats, *, learning: bool) -> Statistics:
        """Compute the statistics of the whole batch; without `learning`, the running ones stay as they are."""
        some = next(iter(columns.values()))
        statistics = Statistics({}, dict(running_stats), {})
        with torch.no_grad():
            for term in self.terms:
                for statistic in term.loss.statistics:
                    value, after = term.compute(statistic, columns, running_stats, learning)
                    # A number is filled in, as its copy to the device would wait for all that is queued there.
                    tensor = value.to(some) if isinstance(value, torch.Tensor) else some.new_full((), value)
                    statistics.values[term.key(statistic.name)] = tensor
                    if learning:
                        statistics.running.update(after)
                    if tensor.ndim == 0:
                        statistics.logged[statistic.name] = tensor
        return statistics

    def compute_losses(self, columns: Columns, statistics: Columns) -> Losses:
        """Compute each example's loss and its terms."""
        n, terms, total = len(next(iter(columns.values()))), {}, None
        for term in self.terms:
            inputs = [term.find_input(name, columns, statistics) for name in term.loss.reads]
            values_B = term.loss.function(*inputs, **term.arguments)
            if values_B.shape != (n,):
                raise UsageError(
                    f"Loss {term.loss.name!r} gave values of shape {tuple(values_B.shape)} for {n:,} examples. It has to return "
                    "one for each of them; their mean is taken later."
                )
            for weight in (WEIGHT, GIVEN_WEIGHT):
                values_B = values_B * columns[weight] if weight in columns else values_B
            terms[term.loss.name] = values_B
            total = term.weight * values_B if total is None else total + term.weight * values_B
        assert total is not None
        return Losses(total, terms)


def select_examples(statistics: Columns, positions: torch.Tensor, n: int) -> dict[str, torch.Tensor]:
    """Statistics for some of the batch's `n` examples: those with a value per example are indexed."""
    return {name: value[positions] if value.ndim and len(value) == n else value for name, value in statistics.items()}


def _policy_answers(columns: Iterable[str]) -> tuple[str, ...]:
    """The answers whose log-probs by the policy are among the columns."""
    names = (name for name in columns if name.endswith("_logp") and not name.startswith("ref_"))
    return tuple(dict.fromkeys(name.removesuffix("_logp") for name in names))


def losses_for(available: set[str]) -> list[str]:
    """The losses that need no column beyond these."""
    return [name for name, loss in LOSSES.items() if available.issuperset(loss.columns)]


# -- the losses of a run ---------------------------------------------------------------------------------------------


def _assign_arguments(losses: list[Loss], train: Train) -> dict[str, dict[str, Any]]:
    """Assign train.beta and train.loss_args to losses: `key` to all that have it, `loss.key` to one."""
    arguments: dict[str, dict[str, Any]] = {loss.name: {} for loss in losses}
    if train.beta is not None:
        for loss in losses:
            if "beta" in loss.hyperparameters:
                arguments[loss.name]["beta"] = train.beta
    for key, value in sorted(train.loss_args.items(), key=lambda entry: "." in entry[0]):
        loss_name, dot, name = key.rpartition(".")
        meant = [loss for loss in losses if (not dot or loss.name == loss_name) and name in loss.hyperparameters]
        if not meant or key == "beta":
            raise UsageError(_unknown_argument(losses, key))
        for loss in meant:
            arguments[loss.name][name] = value
    return arguments


def _unknown_argument(losses: list[Loss], key: str) -> str:
    if key == "beta":
        return "train.loss_args.beta: set train.beta instead, or LOSS.beta for one of several losses."
    loss_name, dot, name = key.rpartition(".")
    asked = [loss for loss in losses if not dot or loss.name == loss_name]
    if not asked:
        names = ", ".join(loss.name for loss in losses)
        return f"train.loss_args.{key}: {loss_name} is not among the losses of this run ({names})."
    known = [
        f"{loss.name} has {', '.join(name for name in loss.hyperparameters if name != 'beta') or 'none'}"
        for loss in asked
    ]
    others = [loss.name for loss in LOSSES.values() if name in loss.hyperparameters]
    elsewhere = f" Losses with {name}: {', '.join(others)}." if others else ""
    called = " + ".join(loss.name for loss in asked)
    return f"train.loss_args.{key}: loss {called!r} has no {name!r}; {'; '.join(known)}.{elsewhere}"


def _common_kind(losses: list[Loss]) -> str:
    by_kind: dict[str, list[str]] = {}
    for loss in losses:
        by_kind.setdefault(loss.kind, []).append(loss.name)
    if len(by_kind) > 1:
        raise UsageError(
            f"train.loss: {', '.join(by_kind['pairs'])} read pairs, {', '.join(by_kind['labels'])} read labelled answers. "
            "One run has data of one kind; take losses of one of them."
        )
    return next(iter(by_kind))


# -- settings that no loss of the run could follow -------------------------------------------------------------------


def _refuse_useless_weights(train: Train, losses: list[Loss]) -> None:
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
    if train.density_ratio and not any("density_ratio" in loss.columns for loss in losses):
        readers = ", ".join(loss.name for loss in LOSSES.values() if "density_ratio" in loss.columns)
        raise UsageError(
            f"train.density_ratio weighs prompts for losses that read density_ratio ({readers}), and "
            f"{', '.join(loss.name for loss in losses)} does not. Leave it out, or take one of them."
        )


def _refuse_useless_tokens(train: Train, losses: list[Loss]) -> None:
    tokens = train.tokens
    reads_both = {"chosen_logp", "rejected_logp"} <= {name for loss in losses for name in loss.columns}
    if not reads_both and (tokens.ld_alpha is not None or tokens.sampo):
        which = "ld_alpha" if tokens.ld_alpha is not None else "sampo"
        raise UsageError(
            f"train.tokens.{which} compares the lengths of a pair's answers, and {losses[0].name} reads single "
            "answers. Leave it out, or take a loss that compares two."
        )
    if tokens.weighs and all(loss.plain for loss in losses):
        raise UsageError(
            f"train.tokens weighs an answer's tokens, and {losses[0].name} reads plain sums. Leave it out, or add a loss that "
            "compares answers."
        )


def _refuse_useless_reference(train: Train, losses: list[Loss]) -> None:
    reads_reference = any(loss.reads_reference for loss in losses)
    if train.reference_free and not reads_reference:
        raise UsageError(
            f"train.reference_free takes the reference's log-probs to be 0, and {', '.join(loss.name for loss in losses)} "
            "reads none anyway. Leave it out."
        )
    if reads_reference and not train.reference_free:
        return
    if train.moving_reference:
        raise UsageError(
            "train.moving_reference moves the reference, and this run reads none. Leave it out, or take a loss that has a reference."
        )
    if train.tokens.clamp is not None:
        raise UsageError(
            "train.tokens.clamp limits each token's ratio to the reference, and this run reads none. Leave it out, or take a "
            "loss that has a reference."
        )
