"""How evenly a mixture's routers spread tokens over its experts: the load-balancing loss, and the sums that it is made of.

Fedus et al. 2021, https://arxiv.org/abs/2101.03961, Eqs. 4 to 6, over the tokens of all layers together, as Transformers has it:

    E * sum over experts of (share of tokens that chose it) * (its mean probability)

Only the probabilities have gradients, and the loss is linear in them: with the whole batch's shares known, the gradients of its
parts add up to its own. A prompt that several answers share is one prompt to the routers, and an answer's last token, which is
never an input, is none of their tokens. Shapes: T tokens, E experts.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.errors import UsageError


@dataclass(frozen=True)
class Routed:
    """Of some tokens, over all layers."""

    n: float
    chosen_E: torch.Tensor  # how often each expert was among those chosen
    probability_E: torch.Tensor  # what it was given, added up

    def __add__(self, other: "Routed") -> "Routed":
        return Routed(self.n + other.n, self.chosen_E + other.chosen_E, self.probability_E + other.probability_E)


@dataclass(frozen=True)
class Router:
    n_experts: int
    n_chosen: int  # for each token

    def routed(self, logits: Sequence[torch.Tensor]) -> Routed:
        """`logits` of each layer's router: [T, E]."""
        found = self.nothing(logits[0].device)
        for logits_TE in logits:
            probability_TE = logits_TE.float().softmax(-1)
            chosen = probability_TE.topk(self.n_chosen).indices.flatten()
            chosen_E = torch.bincount(chosen, minlength=self.n_experts)
            found += Routed(len(logits_TE), chosen_E, probability_TE.sum(0).double())
        return found

    def nothing(self, device: torch.device) -> Routed:
        zeros_E = torch.zeros(self.n_experts, dtype=torch.float64, device=device)
        return Routed(0, zeros_E, zeros_E)

    def loss(self, some: Routed, whole: Routed) -> torch.Tensor:
        """What some of the tokens add to the loss of all."""
        return self.n_experts * (whole.chosen_E / whole.n * some.probability_E / whole.n).sum()


def router_of(model: Any) -> Router:
    """Of a model whose own loss is this one, which is asked for some random logits; or UsageError."""
    balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if balance is None or not hasattr(model, "num_experts"):
        raise UsageError(
            f"train.router_aux_loss: {type(model).__name__} is no mixture of experts that has a load-balancing loss. Leave it out."
        )
    router = Router(model.num_experts, model.num_experts_per_tok)
    dice = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(7, router.n_experts, generator=dice) for _ in range(2))
    theirs, ours = float(balance(logits, router.n_experts, router.n_chosen)), router.routed(logits)
    if abs(theirs - float(router.loss(ours, ours))) > 1e-4:
        raise UsageError(
            f"train.router_aux_loss: the load-balancing loss of {type(model).__name__} is another than the one known here "
            "(https://arxiv.org/abs/2101.03961). Leave it out."
        )
    return router
