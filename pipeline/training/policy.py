"""The model being trained, on accelerate: log-probs of examples, the update, greedy answers.

There is no reference model here and no way to load one. Shapes: B examples.
"""

import contextlib
import math
import resource
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoTokenizer
from transformers.utils import logging

from pipeline import identity
from pipeline.config import Train
from pipeline.errors import IntegrityError
from pipeline.identity import Reference
from pipeline.model import trainable
from pipeline.model.forward import Forward, flat
from pipeline.model.logprobs import Logps, sums, use_float32_head
from pipeline.model.packing import token_budget_batches
from pipeline.model.routing import Routed
from pipeline.schema import STEPS
from pipeline.schema import Sequence as TokenSequence
from pipeline.training import balance, budget, devices, flops, optimizers
from pipeline.training.balance import Balance, over_processes
from pipeline.training.batches import Batch, Examples, Scores
from pipeline.training.budget import Budget
from pipeline.training.objective import PLAIN, WEIGHT, WITHOUT_GRADIENT, Memory, Objective, part_of
from pipeline.training.token_sums import Seed, answer_sums, wpo_weights

logging.set_verbosity_error()
logging.disable_progress_bar()

T = TypeVar("T")
WEIGHTS = "weights.safetensors"
_GENERATED_AT_ONCE = 16_384  # tokens; a token's step through the model costs the same for many prompts as for one
# What a visit of examples leaves behind, in their order: plain log-probs under the names of schema.STEPS, `loss`, and
# `loss/TERM` where there are several.
Visit = dict[str, np.ndarray]
Logged = dict[str, float]


class NotFinite(IntegrityError):
    """A step that was not taken, for its loss or its gradient is not finite."""

    def __init__(self, metric: str, value: float, visit: Visit) -> None:
        super().__init__(f"{metric} is {value}; the step was not taken.")
        self.metric, self.value, self.visit = metric, value, visit


@dataclass(frozen=True)
class _Step:
    visit: Visit
    logged: Logged
    memory: Memory


@dataclass(frozen=True)
class _Whole:
    """What is known of the whole batch before the pass with gradients. Shape of slopes and values: [B]."""

    statistics: dict[str, torch.Tensor]
    logged: Logged
    memory: Memory
    slopes: dict[str, torch.Tensor]  # of the summed loss at each log-prob, where examples depend on one another
    values: dict[str, torch.Tensor]
    routed: Routed | None  # of a mixture whose experts are balanced


class Policy:
    def __init__(
        self,
        start: Reference,
        template: str | None,
        train: Train,
        accelerator: Accelerator,
        like: Sequence[TokenSequence],
        say: Callable[[str], None],
    ) -> None:
        """`like` are some of the sequences to come, the longest among them: how a forward is shared is tried on them, and how
        much one takes."""
        torch.manual_seed(train.seed)
        self.train, self.accelerator = train, accelerator
        self.tokenizer = AutoTokenizer.from_pretrained(start.tokenizer)
        if template is not None:
            self.tokenizer.chat_template = template
        self._limit = identity.longest_sequence(start.folder)
        kernel = identity.attention_kernel(start.folder, "sdpa")
        self.sharded = devices.is_sharded(train, accelerator, start.quantization)
        with devices.on_our_own():
            # What no device has room for as a whole is sharded from the host's memory.
            at = torch.device("cpu") if self.sharded else accelerator.device
            self._trained = trainable.load(start, train, kernel, at)
        self.notes, model = self._trained.notes, self._trained.model
        # A copy of a frozen head would be whole in every process.
        use_float32_head(model, frozen=train.lora is not None and not self.sharded)
        self.forward = Forward(model, kernel, train.rows, self.precision, "train.rows")
        self._calls = devices.Calls(self.forward)
        if self.sharded:
            devices.shard(self._calls, trainable.layers(model), accelerator)
            self.notes.append(f"the model is sharded over {accelerator.num_processes} processes (FSDP2)")
        # Held from here on: while they are gathered, a sharded model's parameters are others.
        self._parameters = self._trained.parameters()
        with accelerator.autocast():
            self._calls.choose(like)
        self._shapes = flops.shapes_of(model)
        self.flops = 0.0  # of the last step, by this process
        self.peak_flops = flops.peak(accelerator.device, self.precision)
        self._balance = balance.balance_of(model, train, accelerator.device)
        self._budget = Budget(train, accelerator.device, accelerator.num_processes, say)
        if self._budget.wants_trial and self.sharded:
            # Each process would stop where its own memory ends, and the others wait for it.
            self.notes.append(
                f"{self._budget.tokens:,} tokens in one forward and backward: not tried on a sharded model"
            )
        elif self._budget.wants_trial:
            self._budget.tokens = self._tried(like)
            self.notes.append(
                f"{self._budget.tokens:,} tokens in one forward and backward fit (train.tokens_per_micro_batch)"
            )
        optimizer = optimizers.make(list(self._parameters.values()), train, accelerator.device)
        self._optimizer = accelerator.prepare(optimizer)
        self._module = self._calls if self.sharded else accelerator.prepare(self._calls)
        self._shortest = min(like, key=lambda sequence: sequence.n_tokens)

    @property
    def precision(self) -> str:
        bf16 = self.accelerator.mixed_precision == "bf16" or (
            self.train.lora and self.train.lora.base_dtype == "bfloat16"
        )
        return "bfloat16" if bf16 else "float32"

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained; of a sharded model, this process's part."""
        return dict(self._parameters)

    @property
    def _model(self) -> Any:
        return self.forward.model

    @property
    def peak_memory(self) -> int:
        """Bytes: of the GPU's where there is one, else of this process's."""
        if self.accelerator.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.accelerator.device))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def agreed(self, value: T) -> T:
        """What the main process says, on every process."""
        return cast(T, broadcast_object_list([value])[0]) if self.accelerator.num_processes > 1 else value

    # -- memory ------------------------------------------------------------------------------------------------------

    def _tried(self, like: Sequence[TokenSequence]) -> int:
        """The budget that the process with the least memory has room for."""
        parameters, n_processes = list(self._parameters.values()), self.accelerator.num_processes
        # The optimizer's state; with several processes, the gradients once more, in what they send one another.
        of_each = optimizers.N_BYTES[self.train.optimizer] + (4 if n_processes > 1 else 0)
        later = math.ceil(of_each * sum(each.numel() for each in parameters))
        most = min(-(-self.train.batch_size // n_processes), self.train.micro_batch_size or sys.maxsize)
        with self.accelerator.autocast():
            found = budget.largest_that_fits(self.forward, like, parameters, later, most)
        return min(gather_object([found])) if n_processes > 1 else found

    def _within_memory(self, compute: Callable[[], T], examples: Examples, indices: np.ndarray) -> T:
        """What `compute` makes of these examples, in smaller forwards where memory does not suffice."""

        def sizes() -> list[list[int]]:
            return [examples.sizes(part, self._way).tolist() for part, _ in self._turns(examples, indices)]

        def drop() -> None:
            self._optimizer.zero_grad()
            if self._balance:
                self._balance.watched()

        return self._budget.within(compute, sizes, drop)

    @property
    def _way(self) -> str:
        return self.forward.way or "padded"

    # -- log-probs ---------------------------------------------------------------------------------------------------

    def evaluate(
        self, examples: Examples, indices: np.ndarray, objective: Objective, memory: Memory
    ) -> tuple[Visit, Logged]:
        """Visit examples without learning from them. They count as one batch."""
        columns = self._within_memory(
            lambda: self._seen(examples, indices, objective, objective.visited), examples, indices
        )
        statistics, _, logged = objective.with_statistics(columns, memory, learning=False)
        loss, parts = objective.values(columns, statistics)
        if self._balance:
            logged[balance.METRIC] = self._balance.value(self._routed_everywhere(self._balance))
        return _visit(columns, loss, parts), logged

    def update(
        self,
        examples: Examples,
        indices: np.ndarray,
        objective: Objective,
        memory: Memory,
        learning_rate: float,
        epoch: int = 0,
    ) -> tuple[Visit, Logged, Memory]:
        """One optimizer step on these examples; returns what was seen before it, numbers to log and what to remember."""
        step = self._within_memory(lambda: self._step(examples, indices, objective, memory, epoch), examples, indices)
        grad_norm = devices.number(
            self.accelerator.clip_grad_norm_(self._parameters.values(), self.train.max_grad_norm)
        )
        for metric, value in (("loss", float(step.visit["loss"].mean())), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                raise NotFinite(metric, value, step.visit)
        with budget.once("the optimizer's update"):
            optimizers.take_step(self._optimizer, learning_rate)
        self._optimizer.zero_grad()
        return step.visit, {**step.logged, "grad_norm": grad_norm}, step.memory

    def score(self, examples: Examples, indices: np.ndarray, answers: Sequence[str], *, tokens: bool) -> Scores:
        """What the weights as they are give these answers, the same on every process. No router is watched: it is no part of
        a step."""
        apart = [name for name in answers if name in WITHOUT_GRADIENT]
        together = [name for name in answers if name not in apart]
        mine: dict[tuple[str, int], np.ndarray] = {}
        with torch.no_grad(), self._unwatched():
            for part, counts in self._turns(examples, indices):
                batch = examples.batch(part, self.accelerator.device, answers)
                for names in filter(None, (together, apart)):
                    if has := _present(batch, names):
                        found_of = self._token_logps(batch, names, has, also_squares=False)[0]
                        for name, lists in found_of.items() if counts else ():
                            mine |= {
                                (name, int(part[i])): each.cpu().numpy() for i, each in zip(has, lists, strict=True)
                            }
                    else:
                        self._compute_nothing()
        everyone = gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]
        known, none = ChainMap(*everyone), np.empty(0, np.float32)
        found = {name: [known.get((name, int(i)), none) for i in indices] for name in answers}
        return Scores(indices, {name: _sums_or_nan(lists) for name, lists in found.items()}, found if tokens else {})

    def _step(
        self, examples: Examples, indices: np.ndarray, objective: Objective, memory: Memory, epoch: int
    ) -> "_Step":
        """The gradient of the mean loss of these examples, in as many forwards as memory wants.

        What is taken over the whole batch comes from a first pass without gradients. Where gradients flow between examples,
        that pass also gives each example's share: the slope of the batch's loss at its log-probs, which the second pass
        carries on into the model. So the result is that of one forward over everything.
        """
        turns, self.flops = self._turns(examples, indices), 0.0
        whole = self._whole_batch(examples, indices, objective, memory, epoch, n_parts=len(turns))
        at, n = {int(i): k for k, i in enumerate(indices)}, len(indices)
        seen: list[tuple[np.ndarray, dict[str, torch.Tensor]]] = []
        logged, after = (whole.logged, whole.memory) if whole else ({}, memory)
        aux_loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for i, (part, counts) in enumerate(turns):
            # Where the model is sharded every part's gradients are reduced, for they would be whole until then.
            with self.accelerator.no_sync(self._module) if i < len(turns) - 1 else contextlib.nullcontext():
                answers = objective.answers if whole else (*objective.answers, *objective.without_gradient)
                columns = self._columns(examples, part, objective, answers, epoch)
                positions = torch.tensor([at[int(index)] for index in part])
                if whole is None:
                    detached = {name: values.detach() for name, values in columns.items()}
                    statistics, after, logged = objective.with_statistics(detached, after, learning=counts)
                else:
                    statistics = part_of(whole.statistics, positions, n)
                if whole and whole.slopes:
                    total = sum((columns[name] * slope_B[positions]).sum() for name, slope_B in whole.slopes.items())
                    values = {name: values_B[positions] for name, values_B in whole.values.items()}
                else:
                    loss, terms = objective.values(columns, statistics)
                    total, values = loss.sum(), {"loss": loss, **_named(terms)}
                # Averaged over the step's examples, never over micro-batches: memory must not change the result. The
                # reduction averages over processes, hence their number.
                n_processes = self.accelerator.num_processes if counts else 0
                share = total * (n_processes / n)
                if self._balance:
                    aux = self._balance.loss(whole.routed if whole else None, len(part) / n)
                    share = share + n_processes * self._balance.coefficient * aux
                    aux_loss += aux.detach() if counts else 0
                self.accelerator.backward(share)
            if counts:
                seen.append((part, {name: each.detach() for name, each in (columns | values).items()}))
        if self._balance and whole is None:
            # Micro-batches of their own, of which each process has added up its share.
            logged = {**logged, balance.METRIC: float(self.accelerator.reduce(aux_loss, "sum"))}
        return _Step(_arrays(self._gather(indices, seen)), logged, after)

    def _whole_batch(
        self,
        examples: Examples,
        indices: np.ndarray,
        objective: Objective,
        memory: Memory,
        epoch: int,
        n_parts: int,
    ) -> "_Whole | None":
        """What a first pass over the batch finds; None where none is wanted, or a single forward sees all of it anyway."""
        if self.train.scope == "micro" or not (objective.statistics or objective.over_batch or self._balance):
            return None
        if n_parts == 1 and self.accelerator.num_processes == 1:
            return None
        answers = (*objective.first_pass, *(objective.answers if self._balance else ()))
        columns = self._seen(examples, indices, objective, tuple(dict.fromkeys(answers)), epoch)
        statistics, after, logged = objective.with_statistics(columns, memory, learning=True)
        routed = self._routed_everywhere(self._balance) if self._balance else None
        if self._balance and routed:
            logged[balance.METRIC] = self._balance.value(routed)
        if not objective.over_batch:
            return _Whole(statistics, logged, after, {}, {}, routed)
        names = [f"{kind}{name}_logp" for name in objective.answers for kind in ("", PLAIN)]
        at = {name: columns[name].clone().requires_grad_() for name in names}
        loss, terms = objective.values(columns | at, statistics)
        slopes = torch.autograd.grad(loss.sum(), list(at.values()), allow_unused=True, materialize_grads=True)
        values = {name: each.detach() for name, each in {"loss": loss, **_named(terms)}.items()}
        return _Whole(statistics, logged, after, dict(zip(at, slopes, strict=True)), values, routed)

    def _routed_everywhere(self, balance: Balance) -> Routed:
        """What all processes have watched their routers do."""
        return over_processes(balance.watched(), lambda each: self.accelerator.reduce(each, "sum"))

    def _seen(
        self, examples: Examples, indices: np.ndarray, objective: Objective, answers: Sequence[str], epoch: int = 0
    ) -> dict[str, torch.Tensor]:
        """The columns of examples with the log-probs of some answers, without gradients, the same on every process."""
        parts = []
        with torch.no_grad():
            for part, counts in self._turns(examples, indices) if answers else []:
                with contextlib.nullcontext() if counts else self._unwatched():
                    columns = self._columns(examples, part, objective, answers, epoch)
                parts += [(part, columns)] if counts else []
        device = self.accelerator.device
        return examples.batch(indices, device).columns | (self._gather(indices, parts) if answers else {})

    def _columns(
        self, examples: Examples, part: np.ndarray, objective: Objective, answers: Sequence[str], epoch: int
    ) -> dict[str, torch.Tensor]:
        """All that a loss reads of some examples. Under PLAIN are plain sums, whatever weighs tokens."""
        batch = examples.batch(part, self.accelerator.device, answers)
        columns = batch.columns | {
            f"{PLAIN}{name}": values for name, values in batch.columns.items() if name in STEPS.names
        }
        seed = Seed(self.train.seed, epoch, batch.rows)
        still = [name for name in answers if name in WITHOUT_GRADIENT]
        if moving := [name for name in answers if name not in still]:
            columns |= self._sums(batch, moving, seed, weighed=objective.answers if self.train.weighting else ())
        if still:
            with torch.no_grad():
                columns |= self._sums(batch, still, seed)
        return columns

    def _sums(self, batch: Batch, names: list[str], seed: Seed, weighed: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """`weighed` are the answers that WPO weighs an example by: those it learns from."""
        has = _present(batch, names)
        n, found = len(batch.rows), {}
        if has:
            logps, squares = self._token_logps(batch, names, has, also_squares=bool(weighed))
            reference = {
                name: [batch.reference_tokens[name][i] for i in has] for name in names if name in batch.reference_tokens
            }
            at = Seed(seed.seed, seed.epoch, [batch.rows[i] for i in has])
            found = answer_sums(logps, reference, self.train.tokens, at)
            # Where nothing weighs tokens, what a loss reads are the plain sums: they are not added up twice.
            plain = (
                {f"{name}_logp": sums(lists) for name, lists in logps.items()} if self.train.tokens.weighs else found
            )
            found |= {f"{PLAIN}{name}_logp": plain[f"{name}_logp"] for name in logps}
            if weighed:
                found[WEIGHT] = wpo_weights({name: logps[name] for name in weighed}, squares)
        else:
            self._compute_nothing()
        if len(has) == n:
            return found
        missing = torch.full((n,), float("nan"), dtype=torch.float64, device=self.accelerator.device)
        names_of = list(found) or [f"{name}_logp" for name in names]
        return {name: missing.index_put((torch.tensor(has),), found[name]) if has else missing for name in names_of}

    def _token_logps(
        self, batch: Batch, names: list[str], has: list[int], *, also_squares: bool
    ) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
        """By answer, the log-probs of each example's tokens; and what else the head is asked for, see logprobs.py."""
        sequences = [sequence for name in names for i in has if (sequence := batch.answers[name][i]) is not None]
        groups = self.forward.groups(sequences)
        watch = self._balance.watch if self._balance and names[0] not in WITHOUT_GRADIENT else None
        given = [[sequences[i] for i in group] for group in groups]
        found = self._compute(given, squares=also_squares, watch=watch)
        if torch.is_grad_enabled():
            self.flops += self._shapes.flops(flops.computed(given, self._way))
        back = np.argsort(flat(groups))
        by_answer = [{} if not lists else self._by_answer([lists[i] for i in back], names, len(has)) for lists in found]
        return by_answer[0], by_answer[1]

    def _compute(self, groups: list[list[TokenSequence]], **asked: Any) -> Logps:
        # Without gradients not through DDP, whose forward may wait for processes that have no example to visit.
        module = self._module if self.sharded or torch.is_grad_enabled() else self._calls
        with self.accelerator.autocast():
            found: Logps = module(groups, **asked)
        return found

    def _compute_nothing(self) -> None:
        """Take part in what others compute: of a sharded model every layer waits for all processes."""
        if self.sharded:
            self._compute([[self._shortest]])

    @contextlib.contextmanager
    def _unwatched(self) -> Iterator[None]:
        """For what is computed and does not count in a batch: no router is watched."""
        kept, self._balance = self._balance, None
        try:
            yield
        finally:
            self._balance = kept

    def _by_answer(self, lists: list[torch.Tensor], names: list[str], n: int) -> dict[str, list[torch.Tensor]]:
        return {name: lists[k * n : (k + 1) * n] for k, name in enumerate(names)}

    def _parts(self, examples: Examples, indices: np.ndarray) -> list[np.ndarray]:
        # Where a micro-batch is what a loss is taken over, the room that its tokens take must not cut it.
        most = sys.maxsize if self.train.scope == "micro" else self._budget.tokens
        return examples.micro_batches(indices, most, self.train.micro_batch_size, way=self._way)

    def _turns(self, examples: Examples, indices: np.ndarray) -> list[tuple[np.ndarray, bool]]:
        """This process's share of examples in parts, and whether a part counts. One that does not is computed because others
        compute: a sharded model on every forward's layers, and DDP on the last gradients, wait for all processes."""
        shares = examples.shares(indices, self.accelerator.num_processes, self._way)
        mine = self._parts(examples, shares[self.accelerator.process_index])
        n = max(len(self._parts(examples, share)) for share in shares) if self.sharded else max(1, len(mine))
        return [(part, True) for part in mine] + [(indices[:1], False)] * (n - len(mine))

    def _gather(
        self, indices: np.ndarray, parts: list[tuple[np.ndarray, dict[str, torch.Tensor]]]
    ) -> dict[str, torch.Tensor]:
        """What all processes saw, in the order of `indices`."""
        mine = [(part.tolist(), {name: values.tolist() for name, values in seen.items()}) for part, seen in parts]
        everyone = gather_object(mine) if self.accelerator.num_processes > 1 else mine
        at = {int(index): k for k, index in enumerate(indices)}
        found: dict[str, torch.Tensor] = {}
        for part, seen in everyone:
            positions = torch.tensor([at[index] for index in part], dtype=torch.long)
            for name, values in seen.items():
                whole = found.setdefault(name, torch.full((len(indices),), float("nan"), dtype=torch.float64))
                whole[positions] = torch.tensor(values, dtype=torch.float64)
        return {name: values.to(self.accelerator.device) for name, values in found.items()}

    # -- answers -----------------------------------------------------------------------------------------------------

    def answers(self, prompts: list[np.ndarray]) -> list[str]:
        """Greedy answers to tokenized prompts. Of a sharded model every process has to ask for them."""
        answers: dict[int, str] = {}
        room = self.train.sample_tokens
        with self.forward.plainly():
            for part in token_budget_batches(
                [len(ids) + room for ids in prompts], max(self._budget.tokens, _GENERATED_AT_ONCE)
            ):
                answers.update(zip(part, self._answer([prompts[i] for i in part]), strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _answer(self, prompts: list[np.ndarray]) -> list[str]:
        room = min(self.train.sample_tokens, self._limit - max(len(ids) for ids in prompts))
        if room <= 0:
            return [""] * len(prompts)
        model = self._model
        longest = max(len(ids) for ids in prompts)
        pad = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id or 0
        )
        ids = torch.tensor([[pad] * (longest - len(p)) + p.tolist() for p in prompts], device=self.accelerator.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.accelerator.device)
        ends = {self.tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)} - {None}
        with torch.no_grad(), self.accelerator.autocast():
            out = self._calls.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=room,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
                synced_gpus=self.sharded,
            )
        return [text.strip() for text in self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]

    # -- state -------------------------------------------------------------------------------------------------------

    # Of a sharded model every process has to ask for what is gathered; it is whole in the main process, and nothing elsewhere.

    def _gathered(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return devices.gathered(tensors, keep=self.accelerator.is_main_process)

    def model_state(self) -> dict[str, torch.Tensor]:
        return self._gathered(self._trained.state())

    def save_model(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        with self.forward.plainly():
            self._trained.save(folder, state)
        self.tokenizer.save_pretrained(folder)

    def weights(self) -> dict[str, torch.Tensor]:
        """What is trained, as it lies in memory: save_pretrained rearranges the weights of some models."""
        return self._gathered(dict(self._parameters))

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return self._gathered(optimizers.state(self._optimizer))

    def load_weights(self, folder: Path) -> None:
        """In place: what was there is gone."""
        devices.let_go(self._calls)
        parameters = self.parameters
        for name, value in trainable.each_tensor(folder / WEIGHTS):
            own = parameters.pop(name)
            trainable.put(own, devices.part_of(value, own))
        assert not parameters

    def restore(self, folder: Path, optimizer: Iterable[tuple[str, torch.Tensor]]) -> None:
        optimizers.restore(self._optimizer, optimizer)
        self.load_weights(folder)


def save_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    values = {name: each.detach().contiguous() for name, each in weights.items()}
    safetensors.torch.save_file(values, folder / WEIGHTS)


def _present(batch: Batch, names: Sequence[str]) -> list[int]:
    """The examples that have these answers: all of them, or none."""
    return [i for i, sequence in enumerate(batch.answers[names[0]]) if sequence is not None]


def _sums_or_nan(lists: list[np.ndarray]) -> np.ndarray:
    """Of nothing there is no sum."""
    found = sums([torch.from_numpy(each) for each in lists]).numpy()
    return np.where([len(each) > 0 for each in lists], found, np.nan)


def _named(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"loss/{name}": values for name, values in terms.items()} if len(terms) > 1 else {}


def _visit(columns: dict[str, torch.Tensor], loss: torch.Tensor, terms: dict[str, torch.Tensor]) -> Visit:
    return _arrays({**columns, "loss": loss, **_named(terms)})


def _arrays(seen: dict[str, torch.Tensor]) -> Visit:
    """The policy's plain sums, the reference's as they are cached, and the losses."""
    return {
        name.removeprefix(PLAIN): values.cpu().numpy()
        for name, values in seen.items()
        if name.startswith((PLAIN, "loss"))
    }


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]
