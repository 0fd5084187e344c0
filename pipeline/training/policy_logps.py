"""The policy's log-probs of examples, as the columns that losses read.

Each process computes its share of the examples in forwards that fit its budget, and all of them get the result.
Shapes: B examples.
"""

import contextlib
import sys
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from prefcache.pipeline.config import Train
from prefcache.pipeline.model.device import copy_together
from prefcache.pipeline.model.forward import Forward, flatten, split_on_host
from prefcache.pipeline.model.logprobs import Logps
from prefcache.pipeline.progress import Counter, counting
from prefcache.pipeline.schema import STEPS, TokenSequence
from prefcache.pipeline.training import flops
from prefcache.pipeline.training.dataset import Batch, Examples, Scores
from prefcache.pipeline.training.distributed import Calls
from prefcache.pipeline.training.micro_batch_size import Budget
from prefcache.pipeline.training.objective import PLAIN, WEIGHT, WITHOUT_GRADIENT, Objective
from prefcache.pipeline.training.router_loss import RouterCounts, RouterLoss, sum_over_processes
from prefcache.pipeline.training.token_sums import Answers, Seed, answer_sums, split_answers, wpo_weights

T = TypeVar("T")
# What a visit of examples stores, in their order: plain log-probs under the names of schema.STEPS, `loss`, and
# `loss/TERM` if there are several.
Visit = dict[str, np.ndarray]
Columns = dict[str, torch.Tensor]  # of shape [B], on the device


class Turn(NamedTuple):
    """Examples of one forward.

    A turn that does not count is computed only because other processes compute: a sharded model's layers in every forward, and
    DDP in the last backward, wait for all of them.
    """

    part: np.ndarray
    counts: bool

    @property
    def n_counted(self) -> int:
        return len(self.part) if self.counts else 0


@dataclass(frozen=True)
class Plan:
    """The sequences of one forward: the answers of the first name, of the second, ..."""

    names: list[str]
    has: list[int]  # the examples of the batch that have these answers
    sequences: list[TokenSequence]
    groups: list[list[int]]  # sequences that are computed together, in the order of the forward

    def lay_out(self, batch: Batch, train: Train, epoch: int) -> dict[str, np.ndarray]:
        """What the sums of this forward read, see token_sums.py."""
        if not self.has:
            return {}
        n, lengths = len(self.has), [sequence.n_counted for sequence in self.sequences]
        counts = {name: lengths[k * n : (k + 1) * n] for k, name in enumerate(self.names)}
        reference = {name: lists for name, lists in batch.reference_tokens.items() if name in self.names}
        reference = {name: [lists[i] for i in self.has] for name, lists in reference.items()}
        seed = Seed(train.seed, epoch, [batch.rows[i] for i in self.has])
        arrays = Answers(counts, flatten(self.groups)).lay_out(train.tokens, seed, reference)
        return {**arrays, "has": np.array(self.has)}


@dataclass
class PolicyLogps:
    """What computes with the policy's weights on this process."""

    train: Train
    accelerator: Accelerator
    forward: Forward
    calls: Calls
    module: torch.nn.Module  # the calls, through DDP
    sharded: bool
    budget: Budget
    routers: RouterLoss | None  # of a mixture of experts that has a balancing loss
    cost: flops.Cost
    shortest: TokenSequence  # for turns in which this process has nothing to compute
    trains_tower: bool = False
    step_flops: float = 0.0  # of the forwards with gradients, by this process

    @property
    def layout(self) -> str:
        return self.forward.layout or "padded"

    def retry_smaller(self, compute: Callable[[], T], examples: Examples, indices: np.ndarray) -> T:
        """Return the result of `compute` for these examples, with smaller forwards after running out of memory."""

        def forwards() -> list[tuple[int, int]]:
            parts = [turn.part for turn in self.turns(examples, indices)]
            return [(len(part), examples.count_tokens(part, self.layout)) for part in parts]

        def drop() -> None:
            self.module.zero_grad()
            if self.routers:
                self.routers.take_counts()

        return self.budget.retry_smaller(compute, forwards, drop)

    def turns(self, examples: Examples, indices: np.ndarray, *, at_once: bool = False) -> list[Turn]:
        """This process's share of examples, in parts that fit its budget or all in one."""

        def split(share: np.ndarray) -> list[np.ndarray]:
            # If a loss is taken over a micro-batch, its tokens' memory must not change its examples.
            budget = sys.maxsize if at_once or self.train.scope == "micro" else self.budget.tokens
            return examples.micro_batches(share, budget, self.train.micro_batch_size, self.layout)

        shares = examples.shares(indices, self.accelerator.num_processes, self.layout)
        own = split(shares[self.accelerator.process_index])
        n = max(len(split(share)) for share in shares) if self.sharded else max(1, len(own))
        return [Turn(part, True) for part in own] + [Turn(indices[:1], False)] * (n - len(own))

    # -- many examples, on every process the same --------------------------------------------------------------------

    def visit(
        self,
        examples: Examples,
        indices: np.ndarray,
        objective: Objective,
        answers: Sequence[str],
        epoch: int = 0,
        what: str = "visit",
    ) -> Columns:
        """The columns of examples with the log-probs of some answers, without gradients. `what` names the work."""
        columns = copy_together(examples.batch(indices).columns, self.accelerator.device)
        if not answers:
            return columns
        parts = []
        with torch.no_grad(), self._counting(what, turns := self.turns(examples, indices)) as counter:
            for turn in turns:
                with contextlib.nullcontext() if turn.counts or not self.routers else self.routers.paused():
                    parts.append((turn, self.columns(examples, turn.part, objective, answers, epoch)))
                counter.add(turn.n_counted)
        return columns | self.gather(indices, parts)

    def _counting(self, what: str, turns: Sequence[Turn]) -> contextlib.AbstractContextManager[Counter]:
        own = " of this process's" if self.accelerator.num_processes > 1 else ""
        return counting(f"{what}{own}", sum(turn.n_counted for turn in turns), "examples")

    def gather(self, indices: np.ndarray, parts: Sequence[tuple[Turn, Columns]]) -> Columns:
        """The columns of all processes' parts, in the order of `indices`. Every process has a turn, so it knows their names."""
        names, position_of = list(parts[0][1]), {int(index): i for i, index in enumerate(indices)}
        own = [(turn.part, columns) for turn, columns in parts if turn.counts]
        matrix_CB = torch.zeros(len(names), len(indices), dtype=torch.float64, device=self.accelerator.device)
        if own:
            positions = np.array([position_of[int(index)] for part, _ in own for index in part])
            on_device = copy_together({"positions": positions}, self.accelerator.device)
            values = [torch.stack([columns[name] for name in names]) for _, columns in own]
            matrix_CB.index_copy_(1, on_device["positions"], torch.cat(values, 1))
        if self.accelerator.num_processes > 1:
            # Each example is one process's, and 0 in the matrices of the others.
            matrix_CB = self.accelerator.reduce(matrix_CB, "sum")
        return dict(zip(names, matrix_CB.unbind(), strict=True))

    def take_router_counts(self) -> RouterCounts | None:
        """What all processes observed of their routers since the last call."""
        if not self.routers:
            return None
        return sum_over_processes(self.routers.take_counts(), lambda sums: self.accelerator.reduce(sums, "sum"))

    def score(self, examples: Examples, indices: np.ndarray, answers: Sequence[str], *, tokens: bool) -> Scores:
        """The log-probs that the current weights give these answers. Routers are not observed: it is not part of a step."""
        apart = [name for name in answers if name in WITHOUT_GRADIENT]
        together = [name for name in answers if name not in apart]
        own: dict[tuple[str, int], np.ndarray] = {}
        unobserved = self.routers.paused() if self.routers else contextlib.nullcontext()
        turns = self.turns(examples, indices)
        with torch.no_grad(), unobserved, self._counting("log-probs", turns) as counter:
            for turn in turns:
                part, counts = turn
                batch = examples.batch(part, answers)
                for names in filter(None, (together, apart)):
                    plan = self._plan(batch, names)
                    logps = self._token_logps(plan)
                    if logps is not None and counts:
                        asked = [(name, int(part[i])) for name in names for i in plan.has]
                        lists = zip(flatten(plan.groups), split_on_host(logps), strict=True)
                        own |= {asked[k]: logps_N for k, logps_N in lists}
                counter.add(turn.n_counted)
        everyone = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        known, missing = ChainMap(*everyone), np.empty(0, np.float32)
        by_answer = {name: [known.get((name, int(i)), missing) for i in indices] for name in answers}
        sums = {
            name: np.array([np.nan if logps_N is missing else logps_N.sum(dtype=np.float64) for logps_N in lists])
            for name, lists in by_answer.items()
        }
        return Scores(indices, sums, by_answer if tokens else {})

    # -- one forward -------------------------------------------------------------------------------------------------

    def columns(
        self, examples: Examples, part: np.ndarray, objective: Objective, answers: Sequence[str], epoch: int
    ) -> Columns:
        """Everything that a loss reads of some examples. Under PLAIN are plain sums, whatever weighs tokens."""
        batch = examples.batch(part, answers)
        without_gradient = [name for name in answers if name in WITHOUT_GRADIENT]
        trained = [name for name in answers if name not in without_gradient]
        plans = [self._plan(batch, names) for names in (trained, without_gradient) if names]
        laid_out = [plan.lay_out(batch, self.train, epoch) for plan in plans]
        # All that the forwards' sums and the losses read, in one transfer.
        named = {f"{i}/{name}": values for i, arrays in enumerate(laid_out) for name, values in arrays.items()}
        on_device = copy_together(batch.columns | named, self.accelerator.device)
        columns = {name: on_device[name] for name in batch.columns}
        columns |= {f"{PLAIN}{name}": values for name, values in columns.items() if name in STEPS.names}
        for i, (plan, arrays) in enumerate(zip(plans, laid_out, strict=True)):
            inputs = {name: on_device[f"{i}/{name}"] for name in arrays}
            weighed = objective.answers if self.train.weighting and plan.names is trained else ()
            with torch.no_grad() if plan.names is without_gradient else contextlib.nullcontext():
                columns |= self._answer_columns(plan, inputs, len(part), weighed)
        return columns

    def _answer_columns(self, plan: Plan, inputs: Columns, n: int, weighed: Sequence[str]) -> Columns:
        """Sums of these answers, nan for examples without them. WPO weighs an example by the answers in `weighed`."""
        logps, tokens, names = self._token_logps(plan, squares=bool(weighed)), self.train.tokens, plan.names
        if logps is None:
            missing_B = torch.full((n,), float("nan"), dtype=torch.float64, device=self.accelerator.device)
            return {f"{kind}{name}_logp": missing_B for kind in ("", PLAIN) for name in names}
        columns = answer_sums(logps, names, inputs, tokens)
        # If nothing weighs tokens, a loss reads the plain sums: they are not added up twice.
        plain = split_answers(logps.sums(), names, inputs) if tokens.weighs else columns
        columns = columns | {f"{PLAIN}{name}_logp": plain[f"{name}_logp"] for name in names}
        if weighed:
            columns[WEIGHT] = wpo_weights(logps, names, inputs, weighed)
        if len(plan.has) == n:
            return columns
        missing_B = torch.full((n,), float("nan"), dtype=torch.float64, device=self.accelerator.device)
        return {name: missing_B.index_copy(0, inputs["has"], values) for name, values in columns.items()}

    def _plan(self, batch: Batch, names: list[str]) -> Plan:
        # An example has all of these answers, or none.
        has = [i for i, sequence in enumerate(batch.answers[names[0]]) if sequence is not None]
        sequences = [sequence for name in names for i in has if (sequence := batch.answers[name][i]) is not None]
        return Plan(names, has, sequences, self.forward.group(sequences) if has else [])

    def _token_logps(self, plan: Plan, *, squares: bool = False) -> Logps | None:
        """The log-probs of all answers' tokens, in the order of the plan's groups; None if no example has these answers."""
        if not plan.has:
            if self.sharded:  # every layer waits for all processes
                self._run([[self.shortest]])
            return None
        groups = [[plan.sequences[i] for i in group] for group in plan.groups]
        hook = self.routers.hook if self.routers and plan.names[0] not in WITHOUT_GRADIENT else None
        logps = self._run(groups, squares=squares, router_hook=hook)
        if torch.is_grad_enabled():
            vision = self.forward.vision
            image_token = vision.token if vision and self.trains_tower else None
            self.step_flops += self.cost.flops(flops.count_work(groups, self.layout, image_token))
        return logps

    def _run(self, groups: list[list[TokenSequence]], **options: Any) -> Logps:
        # Without gradients not through DDP, whose forward may wait for processes that have no example to visit.
        module = self.module if self.sharded or torch.is_grad_enabled() else self.calls
        with self.accelerator.autocast():
            logps: Logps = module(groups, **options)
        return logps


def stored_columns(columns: Columns) -> Columns:
    """The policy's plain sums, the reference's as they are cached, and the losses."""
    return {name.removeprefix(PLAIN): values for name, values in columns.items() if name.startswith((PLAIN, "loss"))}
