"""The gradient of the mean loss over a step's examples, in as many forwards as memory needs.

A batch's loss is computed in one of three ways, so that the result is that of one forward over everything:

    ForwardLoss  each forward is a batch of its own: train.scope micro, losses without statistics, or a single forward
    BatchLoss    a first pass without gradients gives the statistics of the whole batch
    SlopeLoss    gradients flow between examples, so the first pass also gives the slope of the batch's loss at each log-prob,
                 which the second pass carries on into the model

Nothing here waits for the device, unless gradients are released. What the step reports stays there until `Pending.read`, after the
gradient is complete.
Shapes: B examples.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.model.device import copy_together, read_together
from prefcache.pipeline.training import router_loss
from prefcache.pipeline.training.dataset import Examples
from prefcache.pipeline.training.objective import (
    PLAIN,
    Objective,
    PendingStats,
    RunningStats,
    Statistics,
    select_examples,
)
from prefcache.pipeline.training.policy_logps import Columns, PolicyLogps, Turn, Visit, stored_columns
from prefcache.pipeline.training.router_loss import RouterCounts


class Step(NamedTuple):
    visit: Visit  # before the update
    logged: dict[str, float]
    running_stats: RunningStats


class NotFinite(IntegrityError):
    """A step whose loss or gradient is not finite. It `is_taken` if that was known only after the update of some weights."""

    def __init__(self, metric: str, value: float, visit: Visit, *, is_taken: bool) -> None:
        outcome = (
            "weights were updated before that was known (train.release_gradients)"
            if is_taken
            else "the step was not taken"
        )
        super().__init__(f"{metric} is {value}; {outcome}.")
        self.metric, self.value, self.visit, self.is_taken = metric, value, visit, is_taken


@dataclass(frozen=True)
class Pending:
    """What a step reports, while the device may still compute it."""

    columns: Columns  # to store
    logged: dict[str, torch.Tensor]
    running_stats: PendingStats

    def read(self, **more: torch.Tensor) -> Step:
        """Wait for the device, once. `more` is logged as well."""
        logged = {**self.logged, **more}
        running = {(key, name): value for key, stats in self.running_stats.items() for name, value in stats.items()}
        read = read_together(
            {f"column/{name}": values_B for name, values_B in self.columns.items()}
            | {f"logged/{name}": value for name, value in logged.items()}
            | {f"running/{at}": value for at, value in running.items() if isinstance(value, torch.Tensor)}
        )
        running_stats: RunningStats = {key: {} for key in self.running_stats}
        for (key, name), value in running.items():
            running_stats[key][name] = float(read.get(f"running/{(key, name)}", value))
        return Step(
            {name: read[f"column/{name}"] for name in self.columns},
            {name: float(read[f"logged/{name}"]) for name in logged},
            running_stats,
        )


class Part(NamedTuple):
    """The loss of one forward's examples."""

    total: torch.Tensor
    columns: Columns  # to store


@dataclass
class ForwardLoss:
    objective: Objective
    answers: tuple[str, ...]  # that each forward computes
    statistics: Statistics  # of the last forward
    router_counts: RouterCounts | None = None

    def compute(self, columns: Columns, positions: np.ndarray, *, counts: bool) -> Part:
        detached = {name: values.detach() for name, values in columns.items()}
        self.statistics = self.objective.compute_statistics(detached, self.statistics.running, learning=counts)
        losses = self.objective.compute_losses(columns, self.statistics.values)
        return Part(losses.total.sum(), losses.columns())


@dataclass
class BatchLoss:
    objective: Objective
    answers: tuple[str, ...]
    statistics: Statistics
    router_counts: RouterCounts | None
    n: int  # examples

    def compute(self, columns: Columns, positions: np.ndarray, *, counts: bool) -> Part:
        losses = self.objective.compute_losses(columns, self._select(self.statistics.values, positions))
        return Part(losses.total.sum(), losses.columns())

    def _select(self, of_batch: Columns, positions: np.ndarray) -> Columns:
        if not of_batch:
            return of_batch
        device = next(iter(of_batch.values())).device
        return select_examples(of_batch, copy_together({"positions": positions}, device)["positions"], self.n)


@dataclass
class SlopeLoss(BatchLoss):
    slopes: Columns  # of the summed loss at each log-prob
    columns: Columns  # to store

    def compute(self, columns: Columns, positions: np.ndarray, *, counts: bool) -> Part:
        slopes = self._select(self.slopes, positions)
        total = torch.stack([(columns[name] * slope_B).sum() for name, slope_B in slopes.items()]).sum()
        return Part(total, self._select(self.columns, positions))


def accumulate_gradient(
    logps: PolicyLogps,
    examples: Examples,
    indices: np.ndarray,
    objective: Objective,
    running_stats: RunningStats,
    epoch: int,
) -> Pending:
    """Add the gradient of these examples' mean loss to the parameters.

    Gradients that are released change the weights in the backward pass: the step is then one forward, whose loss is looked at first.
    """
    accelerator, routers, n = logps.accelerator, logps.routers, len(indices)
    releases = logps.train.release_gradients
    turns, logps.step_flops = logps.turns(examples, indices, at_once=releases), 0.0
    assert len(turns) == 1 or not releases
    batch_loss = _choose_loss(logps, examples, indices, objective, running_stats, epoch, n_turns=len(turns))
    position_of = {int(index): i for i, index in enumerate(indices)}
    parts: list[tuple[Turn, Columns]] = []
    aux_loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for i, turn in enumerate(turns):
        # The gradients of a sharded model are reduced in every part, because until then they are whole.
        with accelerator.no_sync(logps.module) if i < len(turns) - 1 else contextlib.nullcontext():
            columns = logps.columns(examples, turn.part, objective, batch_loss.answers, epoch)
            positions = np.array([position_of[int(index)] for index in turn.part])
            loss = batch_loss.compute(columns, positions, counts=turn.counts)
            # Averaged over the step's examples, never over micro-batches: memory must not change the result. The
            # reduction averages over processes, hence their number.
            n_processes = accelerator.num_processes if turn.counts else 0
            share = loss.total * (n_processes / n)
            if routers:
                aux = routers.take_loss(batch_loss.router_counts, len(turn.part) / n)
                share = share + n_processes * routers.coefficient * aux
                aux_loss += aux.detach() if turn.counts else 0
            if not releases:
                accelerator.backward(share)
        stored = stored_columns(columns | loss.columns)
        parts.append((turn, {name: values_B.detach() for name, values_B in stored.items()}))
    logged = batch_loss.statistics.logged
    if routers and batch_loss.router_counts is None:
        # If micro-batches have losses of their own, each process has added up its share.
        logged = {**logged, router_loss.METRIC: accelerator.reduce(aux_loss, "sum")}
    pending = Pending(logps.gather(indices, parts), logged, batch_loss.statistics.running)
    if releases:
        refuse_not_finite(pending.read())
        accelerator.backward(share)
    return pending


def refuse_not_finite(step: Step, *, is_taken: bool = False) -> None:
    for metric, value in (("loss", float(step.visit["loss"].mean())), ("grad_norm", step.logged.get("grad_norm", 0.0))):
        if not math.isfinite(value):
            raise NotFinite(metric, value, step.visit, is_taken=is_taken)


def _choose_loss(
    logps: PolicyLogps,
    examples: Examples,
    indices: np.ndarray,
    objective: Objective,
    running_stats: RunningStats,
    epoch: int,
    n_turns: int,
) -> ForwardLoss | BatchLoss:
    """Make a first pass over the batch, if the step needs one."""
    needs_batch = objective.has_statistics or objective.over_batch or logps.routers
    is_one_forward = n_turns == 1 and logps.accelerator.num_processes == 1
    if logps.train.scope == "micro" or not needs_batch or is_one_forward:
        every = (*objective.answers, *objective.without_gradient)
        return ForwardLoss(objective, every, Statistics({}, dict(running_stats), {}))
    answers = (*objective.first_pass, *(objective.answers if logps.routers else ()))
    columns = logps.visit(examples, indices, objective, tuple(dict.fromkeys(answers)), epoch)
    statistics = objective.compute_statistics(columns, running_stats, learning=True)
    router_counts = logps.take_router_counts()
    if logps.routers and router_counts:
        statistics.logged[router_loss.METRIC] = logps.routers.value(router_counts, router_counts)
    batch_loss = BatchLoss(objective, objective.answers, statistics, router_counts, len(indices))
    if not objective.over_batch:
        return batch_loss
    names = [f"{kind}{name}_logp" for name in objective.answers for kind in ("", PLAIN)]
    leaves = {name: columns[name].clone().requires_grad_() for name in names}
    losses = objective.compute_losses(columns | leaves, statistics.values)
    slopes = torch.autograd.grad(losses.total.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    stored = {name: values_B.detach() for name, values_B in losses.columns().items()}
    by_name = dict(zip(leaves, slopes, strict=True))
    return SlopeLoss(**vars(batch_loss), slopes=by_name, columns=stored)
