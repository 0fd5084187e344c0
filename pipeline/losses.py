"""The preference losses: one pure function each.

The signature is the declaration. Positional parameters are the columns that the loss reads, keyword-only ones its
hyperparameters. It returns one value per pair. To add a loss, write such a function here and its test.

Columns, each of shape [B] (B pairs): chosen_logp, rejected_logp (the policy's, summed over the answer),
ref_chosen_logp, ref_rejected_logp (the reference's), n_chosen, n_rejected (answer tokens).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.errors import UsageError, named


@dataclass(frozen=True)
class Loss:
    name: str
    function: Callable[..., torch.Tensor]
    columns: tuple[str, ...]
    hyperparameters: dict[str, Any]


LOSSES: dict[str, Loss] = {}


def loss(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    parameters = inspect.signature(function).parameters.values()
    LOSSES[function.__name__] = Loss(
        name=function.__name__,
        function=function,
        columns=tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),
        hyperparameters={p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY},
    )
    return function


def get_loss(name: str) -> Loss:
    return named(LOSSES, name, "train.loss")


def hyperparameters(chosen: Loss, beta: float, extra: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a loss from the config, or UsageError naming the one it does not have."""
    for name in extra:
        if name not in chosen.hyperparameters or name == "beta":
            known = ", ".join(key for key in chosen.hyperparameters if key != "beta") or "none"
            raise UsageError(f"train.loss_args: loss {chosen.name!r} has no {name!r}; it has: {known}.")
    values = dict(chosen.hyperparameters)
    for name, value in extra.items():
        kind = type(values[name])
        try:
            if (kind is bool and not isinstance(value, bool)) or (kind is float and isinstance(value, bool)):
                raise ValueError
            values[name] = kind(value)  # YAML 1.1 reads 1e-2 as text
        except ValueError:
            raise UsageError(f"train.loss_args.{name}: found {value!r}, expected a {kind.__name__}.") from None
    return {**values, "beta": beta} if "beta" in values else values


# -- the losses ------------------------------------------------------------------------------------------------------


@loss
def sigmoid(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1, label_smoothing=0.0):
    """The original DPO loss: logistic loss on the reward margin.

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Eq. 7. With label smoothing, cDPO: Mitchell 2023, Eq. 3.
    """
    reward_margin_B = beta * ((chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp))
    right_B, wrong_B = -F.logsigmoid(reward_margin_B), -F.logsigmoid(-reward_margin_B)
    return (1 - label_smoothing) * right_B + label_smoothing * wrong_B


@loss
def hinge(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, *, beta=0.1):
    """Zero once the reward margin reaches 1.

    Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657, Eq. 11, after SLiC, https://arxiv.org/abs/2305.10425.
    """
    reward_margin_B = beta * ((chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp))
    return torch.relu(1 - reward_margin_B)


@loss
def ipo(
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    n_chosen,
    n_rejected,
    *,
    beta=0.1,
    per_token=True,
):
    """Squared distance of the log-ratio margin from 1/(2*beta), so that the margin does not grow without end.

    Azar et al. 2023, https://arxiv.org/abs/2310.12036, Eq. 17. The log-ratios are averaged over the answer's tokens,
    as in the paper's experiments and in TRL; per_token=False sums them, as Eq. 17 is printed.
    """
    chosen_B, rejected_B = chosen_logp - ref_chosen_logp, rejected_logp - ref_rejected_logp
    if per_token:
        chosen_B, rejected_B = chosen_B / n_chosen, rejected_B / n_rejected
    return (chosen_B - rejected_B - 1 / (2 * beta)) ** 2
