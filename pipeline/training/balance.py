"""The load-balancing loss of a run: a mixture's routers, watched while the policy computes what it learns from.

It is one of the whole batch, whatever its micro-batches: the experts' shares are counted in a first pass without gradients where a step
has several. With train.scope micro it is each micro-batch's own, weighted by its examples, as TRL averages it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.config import Train
from pipeline.model.routing import Routed, Router, router_of

METRIC = "aux_loss"  # TRL's name


class Balance:
    def __init__(self, router: Router, coefficient: float, device: torch.device) -> None:
        self._router, self.coefficient = router, coefficient
        self._nothing = self._watched = router.nothing(device)

    def watch(self, router_logits: Sequence[torch.Tensor]) -> None:
        self._watched += self._router.routed(router_logits)

    def watched(self) -> Routed:
        """Since this was last asked."""
        found, self._watched = self._watched, self._nothing
        return found

    def value(self, whole: Routed) -> float:
        return float(self._router.loss(whole, whole))

    def loss(self, whole: Routed | None, share: float) -> torch.Tensor:
        """What was watched adds so much to the loss of the whole batch; where that is not known, it has a loss of its own, of
        which it adds its share."""
        found = self.watched()
        return self._router.loss(found, whole) if whole else share * self._router.loss(found, found)


def over_processes(routed: Routed, add_up: Callable[[torch.Tensor], torch.Tensor]) -> Routed:
    """Of what each process watched, the sum."""
    n, chosen_E, probability_E = routed.n, routed.chosen_E, routed.probability_E
    everything = add_up(torch.cat([chosen_E.new_tensor([n]), chosen_E, probability_E.detach()]))
    chosen_E, probability_E = everything[1:].chunk(2)
    return Routed(float(everything[0]), chosen_E, probability_E)


def balance_of(model: Any, train: Train, device: torch.device) -> Balance | None:
    """None where no such loss is wanted: unless said, a model's own config decides."""
    config, coefficient = model.config.get_text_config(), train.router_aux_loss
    if coefficient is None and getattr(config, "output_router_logits", False):
        coefficient = config.router_aux_loss_coef
    return Balance(router_of(model), coefficient, device) if coefficient else None
