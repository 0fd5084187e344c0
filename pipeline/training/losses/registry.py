"""What a loss is: one pure function whose signature declares what it reads.

Positional parameters are columns and statistics, keyword-only ones hyperparameters. The function returns one value per example;
training minimizes the mean over the optimizer step's examples.

Columns, each of shape [B] (B examples). Log-probs are raw, and summed over the tokens of an answer that count (prepare.train_on):
    chosen_logp, rejected_logp                   the policy's log-probs of a pair's answers
    completion_logp                              the policy's, of a labelled answer
    kl_logp                                      the policy's, of a mismatched answer; it carries no gradient
    ref_...                                      the reference's, from the cache
    n_chosen_counted, n_rejected_counted,
    n_completion_counted                         how many tokens these are
    chosen_score, rejected_score                 the data's own grades
    label                                        1 for a desirable answer, 0 for an undesirable one
    density_ratio                                how much likelier a prompt is among the desirable ones

A statistic is a number, or one per example, computed over the whole global batch of an optimizer step before any gradient; none
flows through it. A loss whose gradients flow between examples declares `over_batch`: it is computed on the whole global batch,
with its exact gradient. Neither depends on the size of micro-batches.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefcache.pipeline.errors import UsageError, look_up
from prefcache.pipeline.schema import DATA_COLUMNS

if TYPE_CHECKING:
    import torch

Direction = Literal["rises", "falls", "may fall", "holds"]

COLUMNS = (
    *("chosen_logp", "rejected_logp", "completion_logp", "kl_logp"),
    *("ref_chosen_logp", "ref_rejected_logp", "ref_completion_logp", "ref_kl_logp"),
    *("n_chosen_counted", "n_rejected_counted", "n_completion_counted"),
    *(column.name for column in DATA_COLUMNS),
    *("label", "density_ratio"),
)


@dataclass(frozen=True)
class Healthy:
    """What a metric does in a healthy run."""

    metric: str
    direction: Direction
    note: str
    low: float | None = None  # outside of these bounds something is wrong
    high: float | None = None


MARGIN_RISES = Healthy("rewards/margins", "rises", "the policy tells the answers apart better than the reference does")
ACCURACY_RISES = Healthy(
    "rewards/accuracies", "rises", "from about 0.5; at 1.0 within a few steps the pairs are too easy"
)
CHOSEN_MAY_FALL = Healthy(
    "logps/chosen",
    "may fall",
    "normal: only the difference counts. Add a weight on sft if it falls as fast as rejected",
)
CHOSEN_RISES = Healthy(
    "logps/chosen", "rises", "the chosen answers become likelier; a fall means that the other term dominates"
)
REJECTED_FALLS = Healthy("logps/rejected", "falls", "the rejected answers become less likely")
HEALTHY_PAIRS = (MARGIN_RISES, ACCURACY_RISES, CHOSEN_MAY_FALL)


@dataclass(frozen=True)
class Statistic:
    """A function over the whole batch. A running one takes and returns the state that it carries from step to step."""

    name: str
    function: Callable[..., Any]
    columns: tuple[str, ...]
    hyperparameters: dict[str, Any]
    running: bool


@dataclass(frozen=True)
class Loss:
    name: str
    function: Callable[..., torch.Tensor]
    reads: tuple[str, ...]  # columns and statistics, in the order of the parameters
    hyperparameters: dict[str, Any]
    formula: str
    when: str
    healthy: tuple[Healthy, ...]
    ranges: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    over_batch: bool = False
    per_token: bool = False  # its rewards are per token
    plain: bool = False  # it reads plain sums of log-probs, even if train.tokens weighs tokens

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return tuple(STATISTICS[name] for name in self.reads if name in STATISTICS)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the loss and its statistics read."""
        own = [name for name in self.reads if name not in STATISTICS]
        return tuple(dict.fromkeys([*own, *(name for each in self.statistics for name in each.columns)]))

    @property
    def kind(self) -> str:
        """pairs or labels."""
        return "labels" if "completion_logp" in self.columns else "pairs"

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def reads_reference(self) -> bool:
        return any(name.startswith("ref_") for name in self.columns)

    @property
    def papers(self) -> list[str]:
        return re.findall(r"https://\S+?(?=[,.;:)]*(?:\s|$))", inspect.getdoc(self.function) or "")

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "reference": self.reads_reference,
            "columns": list(self.columns),
            "statistics": [each.name for each in self.statistics],
            "over_batch": self.over_batch,
            "hyperparameters": self.hyperparameters,
            "ranges": self.ranges,
            "formula": self.formula,
            "when": self.when,
            "papers": self.papers,
            "healthy": [vars(each) for each in self.healthy],
            "text": inspect.getdoc(self.function) or "",
        }


LOSSES: dict[str, Loss] = {}
STATISTICS: dict[str, Statistic] = {}

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Allowed values of a hyperparameter, unless its loss declares others: an interval, or names.
RANGES: dict[str, str | tuple[str, ...]] = {
    "beta": "(0, inf)",
    "label_smoothing": "[0, 1]",
    "f_divergence": DIVERGENCES,
    "f_alpha": "(-inf, inf)",
}

# Losses that people ask for and that a cache of log-probs cannot serve.
UNAVAILABLE = {
    "tdpo": "TDPO compares the whole distributions of policy and reference at every token; the cache holds only the log-probs "
    "of the answers' own tokens. It needs a trainer with a live reference. The nearest loss here is sigmoid, "
    "with train.tokens.clamp for a limit on each token's ratio.",
}

# Names from papers and other trainers, and what does the same here.
LOSS_ALIASES = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid, with train.loss_args.label_smoothing",
    "dpo_norm": "sigmoid_norm",
    "ln_dpo": "sigmoid_norm",
    "ld_dpo": "sigmoid, with train.tokens.ld_alpha",
    "sampo": "sigmoid, with train.tokens.sampo",
    "tr_dpo": "sigmoid, with train.moving_reference",
    "wpo": "sigmoid, with train.weighting: wpo",
    "humanline": "any loss, with train.tokens.clamp",
    "rso": "hinge",
    "nll": "sft",
    "ntp": "sft",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "rdpo": "robust (noisy labels) or r_dpo (length)",
}


def loss(
    formula: str,
    *,
    when: str,
    healthy: tuple[Healthy, ...] = HEALTHY_PAIRS,
    ranges: Mapping[str, str | tuple[str, ...]] | None = None,
    over_batch: bool = False,
    per_token: bool = False,
    plain: bool = False,
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register the decorated function under its name."""

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        reads, hyperparameters = _read_signature(function)
        assert function.__name__ not in LOSSES
        LOSSES[function.__name__] = Loss(
            name=function.__name__,
            function=function,
            reads=reads,
            hyperparameters=hyperparameters,
            formula=formula,
            when=when,
            healthy=healthy,
            ranges={name: kind for name, kind in (RANGES | dict(ranges or {})).items() if name in hyperparameters},
            over_batch=over_batch,
            per_token=per_token,
            plain=plain,
        )
        return function

    return register


def statistic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function over the whole batch, which losses read as a column of its name.

    With keyword-only `running` and `learning` it is a running statistic and returns (value, state). `running` is the state of the
    step before (None at first, then numbers by name); `learning` is False in an evaluation, which must not change the state.
    """
    columns, hyperparameters = _read_signature(function)
    running = "running" in hyperparameters
    for name in ("running", "learning"):
        hyperparameters.pop(name, None)
    STATISTICS[function.__name__] = Statistic(function.__name__, function, columns, hyperparameters, running)
    return function


def _read_signature(function: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return (
        tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),
        {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY},
    )


def get_loss(name: str) -> Loss:
    if name.lower() in UNAVAILABLE:
        raise UsageError(f"train.loss: {UNAVAILABLE[name.lower()]}")
    if name not in LOSSES and (same := LOSS_ALIASES.get(name.lower().replace("-", "_"))):
        raise UsageError(f"train.loss: there is no loss {name!r}; here it is {same}. `prefcache losses` lists them.")
    found = look_up(LOSSES, name, "train.loss", "`prefcache losses` lists them.")
    for column in found.columns:
        if column not in COLUMNS:
            near = difflib.get_close_matches(column, [*COLUMNS, *STATISTICS], n=1)
            hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(COLUMNS)}"
            raise UsageError(
                f"Loss {name!r} has the parameter {column}, which is neither a column nor a statistic; {hint}. "
                "Hyperparameters are keyword-only: write them after a `*`."
            )
    return found


def hyperparameters(chosen: Loss, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a loss: its defaults, overridden by `given` after a check of type and range."""
    values = dict(chosen.hyperparameters)
    for name, value in given.items():
        values[name] = _validate(chosen, name, value)
    is_set = values.get("f_alpha") != chosen.hyperparameters.get("f_alpha")
    if is_set and values["f_divergence"] != "alpha_divergence":
        raise UsageError(
            f"train.loss_args.f_alpha belongs to alpha_divergence, and loss {chosen.name!r} uses {values['f_divergence']}. Set "
            "train.loss_args.f_divergence to alpha_divergence, or leave f_alpha out."
        )
    return values


def _validate(chosen: Loss, name: str, value: Any) -> Any:
    where = "train.beta" if name == "beta" else f"train.loss_args.{name}"
    kind = type(chosen.hyperparameters[name])
    try:
        if isinstance(value, bool) is not (kind is bool):
            raise ValueError
        value = float(value) if kind is int else kind(value)  # YAML 1.1 reads 1e-2 as text
        if kind is int and value.is_integer():  # a default of 1 does not rule out fractions
            value = int(value)
    except (TypeError, ValueError):
        raise UsageError(f"{where}: found {value!r}, expected a {kind.__name__} for loss {chosen.name!r}.") from None
    allowed = chosen.ranges.get(name)
    if isinstance(allowed, tuple) and value not in allowed:
        raise UsageError(f"{where}: found {value!r}; loss {chosen.name!r} takes one of {', '.join(allowed)}.")
    if isinstance(allowed, str) and not _is_within(float(value), allowed):
        raise UsageError(f"{where}: found {value}; loss {chosen.name!r} takes values in {allowed}.")
    return value


def _is_within(value: float, interval: str) -> bool:
    """Whether a value lies in an interval in mathematical notation, such as [0, 0.5)."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and math.isfinite(value)
