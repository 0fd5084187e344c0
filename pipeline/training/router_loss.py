"""The load-balancing loss of a mixture of experts: how evenly its routers spread tokens over experts.

Fedus et al. 2021, https://arxiv.org/abs/2101.03961, Eqs. 4 to 6, over the tokens of all layers together, as in Transformers:

    E * sum over experts of (share of tokens that chose it) * (its mean probability)

Only the probabilities have gradients, and the loss is linear in them: given the whole batch's shares, the gradients of its parts
add up to its own. So a step with several micro-batches counts the shares in a first pass without gradients. With train.scope micro
each micro-batch has a loss of its own, weighted by its examples, as TRL averages it.

What sequences of a row share is routed once, and an answer's last token, which is never an input, is not routed. Shapes: T tokens, E experts.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.model.logprobs import RouterHook

METRIC = "aux_loss"  # TRL's name


@dataclass(frozen=True)
class RouterCounts:
    """What the routers of all layers did with some tokens."""

    n: float | torch.Tensor
    chosen_E: torch.Tensor  # how often each expert was among those chosen
    probability_E: torch.Tensor  # the sum of its probabilities

    def __add__(self, other: "RouterCounts") -> "RouterCounts":
        return RouterCounts(self.n + other.n, self.chosen_E + other.chosen_E, self.probability_E + other.probability_E)


class RouterLoss:
    """Counts what the routers do while the policy computes, and makes the loss of it."""

    def __init__(self, n_experts: int, n_chosen: int, coefficient: float, device: torch.device) -> None:
        self.coefficient = coefficient
        self.hook: RouterHook | None = self._observe  # for the forwards whose tokens count
        self._n_experts, self._n_chosen = n_experts, n_chosen
        zeros_E = torch.zeros(n_experts, dtype=torch.float64, device=device)
        self._zero = self._observed = RouterCounts(0, zeros_E, zeros_E)

    def count(self, router_logits: Sequence[torch.Tensor]) -> RouterCounts:
        """Count one forward: the logits [T, E] of each layer."""
        counts = self._zero
        for logits_TE in router_logits:
            probability_TE = logits_TE.float().softmax(-1)
            chosen = probability_TE.topk(self._n_chosen).indices.flatten()
            # Not bincount, which waits for a GPU to learn the largest index. Whole numbers add up to the same in any order.
            chosen_E = torch.zeros_like(self._zero.chosen_E).index_add_(0, chosen, torch.ones_like(chosen).double())
            counts += RouterCounts(len(logits_TE), chosen_E, probability_TE.sum(0).double())
        return counts

    def _observe(self, router_logits: Sequence[torch.Tensor]) -> None:
        self._observed += self.count(router_logits)

    def take_counts(self) -> RouterCounts:
        """Return what was observed since the last call."""
        counts, self._observed = self._observed, self._zero
        return counts

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Observe nothing, in forwards that are not part of a batch."""
        self.hook = None
        try:
            yield
        finally:
            self.hook = self._observe

    def value(self, part: RouterCounts, whole: RouterCounts) -> torch.Tensor:
        """What some tokens add to the loss of all."""
        return self._n_experts * (whole.chosen_E / whole.n * part.probability_E / whole.n).sum()

    def take_loss(self, whole: RouterCounts | None, share: float) -> torch.Tensor:
        """What the observed tokens add to the whole batch's loss, or without counts of it, their share of their own loss."""
        counts = self.take_counts()
        return self.value(counts, whole) if whole else share * self.value(counts, counts)


def sum_over_processes(counts: RouterCounts, reduce: Callable[[torch.Tensor], torch.Tensor]) -> RouterCounts:
    n, chosen_E, probability_E = counts.n, counts.chosen_E, counts.probability_E
    sums = reduce(torch.cat([chosen_E.new_zeros(1) + n, chosen_E, probability_E.detach()]))
    return RouterCounts(sums[0], *sums[1:].chunk(2))


def make_router_loss(model: Any, train: Train, device: torch.device) -> RouterLoss | None:
    """The model's loss if train.router_aux_loss or, without it, the model's config asks for one; refuse any other kind."""
    config, coefficient = model.config.get_text_config(), train.router_aux_loss
    if coefficient is None and getattr(config, "output_router_logits", False):
        coefficient = config.router_aux_loss_coef
    if not coefficient:
        return None
    name = type(model).__name__
    transformers_loss = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if transformers_loss is None or not hasattr(model, "num_experts"):
        raise UsageError(
            f"train.router_aux_loss: {name} is not a mixture of experts with a load-balancing loss. Leave it out."
        )
    loss = RouterLoss(model.num_experts, model.num_experts_per_tok, coefficient, device)
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(7, model.num_experts, generator=generator).to(device) for _ in range(2))
    counts = loss.count(logits)
    expected = float(transformers_loss(logits, model.num_experts, model.num_experts_per_tok))
    if abs(expected - float(loss.value(counts, counts))) > 1e-4:
        raise UsageError(
            f"train.router_aux_loss: the load-balancing loss of {name} differs from the supported one "
            "(https://arxiv.org/abs/2101.03961). Leave it out."
        )
    return loss
