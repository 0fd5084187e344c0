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
from prefcache.pipeline.model.forward import Forward, flatten
from prefcache.pipeline.model.logprobs import Logps, sum_logps
from prefcache.pipeline.schema import STEPS, TokenSequence
from prefcache.pipeline.training import flops
from prefcache.pipeline.training.dataset import Batch, Examples, Scores
from prefcache.pipeline.training.distributed import Calls
from prefcache.pipeline.training.micro_batch_size import Budget
from prefcache.pipeline.training.objective import PLAIN, WEIGHT, WITHOUT_GRADIENT, Objective
from prefcache.pipeline.training.router_loss import RouterCounts, RouterLoss, sum_over_processes
from prefcache.pipeline.training.token_sums import Seed, answer_sums, wpo_weights

T = TypeVar("T")
# What a visit of examples stores, in their order: plain log-probs under the names of schema.STEPS, `loss`, and
# `loss/TERM` if there are several.
Visit = dict[str, np.ndarray]
TokenLists = dict[str, list[torch.Tensor]]  # answer -> per example, a value for each token


class Turn(NamedTuple):
    """Examples of one forward.

    A turn that does not count is computed only because other processes compute: a sharded model's layers in every forward, and
    DDP in the last backward, wait for all of them.
    """

    part: np.ndarray
    counts: bool


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
    step_flops: float = 0.0  # of the forwards with gradients, by this process

    @property
    def layout(self) -> str:
        return self.forward.layout or "padded"

    def retry_smaller(self, compute: Callable[[], T], examples: Examples, indices: np.ndarray) -> T:
        """Return the result of `compute` for these examples, with smaller forwards after running out of memory."""

        def sizes() -> list[list[int]]:
            return [examples.sizes(turn.part, self.layout).tolist() for turn in self.turns(examples, indices)]

        def drop() -> None:
            self.module.zero_grad()
            if self.routers:
                self.routers.take_counts()

        return self.budget.retry_smaller(compute, sizes, drop)

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
        self, examples: Examples, indices: np.ndarray, objective: Objective, answers: Sequence[str], epoch: int = 0
    ) -> dict[str, torch.Tensor]:
        """The columns of examples with the log-probs of some answers, without gradients."""
        columns = examples.batch(indices, self.accelerator.device).columns
        if not answers:
            return columns
        parts = []
        with torch.no_grad():
            for part, counts in self.turns(examples, indices):
                with contextlib.nullcontext() if counts or not self.routers else self.routers.paused():
                    part_columns = self.columns(examples, part, objective, answers, epoch)
                parts += [(part, part_columns)] if counts else []
        return columns | self.gather(indices, parts)

    def gather(
        self, indices: np.ndarray, parts: list[tuple[np.ndarray, dict[str, torch.Tensor]]]
    ) -> dict[str, torch.Tensor]:
        """The columns of all processes' parts, in the order of `indices`."""
        own = [(part.tolist(), {name: values.tolist() for name, values in columns.items()}) for part, columns in parts]
        position_of = {int(index): i for i, index in enumerate(indices)}
        gathered: dict[str, torch.Tensor] = {}
        for part, columns in gather_object(own) if self.accelerator.num_processes > 1 else own:
            positions = torch.tensor([position_of[index] for index in part], dtype=torch.long)
            for name, values in columns.items():
                column = gathered.setdefault(name, torch.full((len(indices),), float("nan"), dtype=torch.float64))
                column[positions] = torch.tensor(values, dtype=torch.float64)
        return {name: column.to(self.accelerator.device) for name, column in gathered.items()}

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
        with torch.no_grad(), self.routers.paused() if self.routers else contextlib.nullcontext():
            for part, counts in self.turns(examples, indices):
                batch = examples.batch(part, self.accelerator.device, answers)
                for names in filter(None, (together, apart)):
                    has = _present(batch, names)
                    logps = self._token_logps(batch, names, has, squares=False)[0]
                    for name, lists in logps.items() if counts else ():
                        own |= {(name, int(part[i])): x.cpu().numpy() for i, x in zip(has, lists, strict=True)}
        everyone = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        known, nothing = ChainMap(*everyone), np.empty(0, np.float32)
        by_answer = {name: [known.get((name, int(i)), nothing) for i in indices] for name in answers}
        sums = {
            name: np.where(list(map(len, values)), sum_logps(list(map(torch.from_numpy, values))).numpy(), np.nan)
            for name, values in by_answer.items()
        }
        return Scores(indices, sums, by_answer if tokens else {})

    # -- one forward -------------------------------------------------------------------------------------------------

    def columns(
        self, examples: Examples, part: np.ndarray, objective: Objective, answers: Sequence[str], epoch: int
    ) -> dict[str, torch.Tensor]:
        """Everything that a loss reads of some examples. Under PLAIN are plain sums, whatever weighs tokens."""
        batch = examples.batch(part, self.accelerator.device, answers)
        columns = batch.columns | {
            f"{PLAIN}{name}": values for name, values in batch.columns.items() if name in STEPS.names
        }
        without_gradient = [name for name in answers if name in WITHOUT_GRADIENT]
        if trained := [name for name in answers if name not in without_gradient]:
            weighed = objective.answers if self.train.weighting else ()
            columns |= self._answer_columns(batch, trained, epoch, weighed)
        if without_gradient:
            with torch.no_grad():
                columns |= self._answer_columns(batch, without_gradient, epoch)
        return columns

    def _answer_columns(
        self, batch: Batch, names: list[str], epoch: int, weighed: Sequence[str] = ()
    ) -> dict[str, torch.Tensor]:
        """Sums of these answers, nan for examples without them. WPO weighs an example by the answers in `weighed`."""
        has, tokens = _present(batch, names), self.train.tokens
        logps, squares = self._token_logps(batch, names, has, squares=bool(weighed))
        if not has:
            columns = {f"{name}_logp": torch.empty(0, dtype=torch.float64) for name in names}
        else:
            reference = {
                name: [batch.reference_tokens[name][i] for i in has] for name in names if name in batch.reference_tokens
            }
            seed = Seed(self.train.seed, epoch, [batch.rows[i] for i in has])
            columns = answer_sums(logps, reference, tokens, seed)
            # If nothing weighs tokens, a loss reads the plain sums: they are not added up twice.
            plain = {f"{name}_logp": sum_logps(lists) for name, lists in logps.items()} if tokens.weighs else columns
            columns |= {f"{PLAIN}{name}_logp": plain[f"{name}_logp"] for name in logps}
            if weighed:
                columns[WEIGHT] = wpo_weights({name: logps[name] for name in weighed}, squares)
        if len(has) == len(batch.rows):
            return columns
        missing = torch.full((len(batch.rows),), float("nan"), dtype=torch.float64, device=self.accelerator.device)
        index = (torch.tensor(has, dtype=torch.long),)
        return {name: missing.index_put(index, values) if has else missing for name, values in columns.items()}

    def _token_logps(
        self, batch: Batch, names: list[str], has: list[int], *, squares: bool
    ) -> tuple[TokenLists, TokenLists]:
        """By answer, each example's log-probs, and log_sum_squares if asked for (logprobs.py), of its tokens."""
        if not has:
            if self.sharded:  # every layer waits for all processes
                self._run([[self.shortest]])
            return {}, {}
        sequences = [sequence for name in names for i in has if (sequence := batch.answers[name][i]) is not None]
        indices = self.forward.group(sequences)
        groups = [[sequences[i] for i in group] for group in indices]
        hook = self.routers.hook if self.routers and names[0] not in WITHOUT_GRADIENT else None
        scores = self._run(groups, squares=squares, router_hook=hook)
        if torch.is_grad_enabled():
            self.step_flops += self.cost.flops(flops.count_work(groups, self.layout))
        back, n = np.argsort(flatten(indices)), len(has)
        ordered = [[lists[i] for i in back] for lists in scores if lists]
        logps, *others = ({name: lists[k * n : (k + 1) * n] for k, name in enumerate(names)} for lists in ordered)
        return logps, others[0] if others else {}

    def _run(self, groups: list[list[TokenSequence]], **options: Any) -> Logps:
        # Without gradients not through DDP, whose forward may wait for processes that have no example to visit.
        module = self.module if self.sharded or torch.is_grad_enabled() else self.calls
        with self.accelerator.autocast():
            scores: Logps = module(groups, **options)
        return scores


def stored_columns(columns: dict[str, torch.Tensor]) -> Visit:
    """The policy's plain sums, the reference's as they are cached, and the losses."""
    return {
        name.removeprefix(PLAIN): values.cpu().numpy()
        for name, values in columns.items()
        if name.startswith((PLAIN, "loss"))
    }


def _present(batch: Batch, names: Sequence[str]) -> list[int]:
    """The examples that have these answers; an example has all of them, or none."""
    return [i for i, sequence in enumerate(batch.answers[names[0]]) if sequence is not None]
