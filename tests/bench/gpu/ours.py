"""Training steps and scoring as prefcache computes them, with each technique to be taken away; and its program's own step.

`Trainer` is built on pipeline/model alone, which needs torch, transformers and pyarrow. `program` is Policy.update, as `train`
calls it; it needs what prefcache's config and selection need as well.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from prefcache.pipeline.model import chunked_lm_head, packing
from prefcache.pipeline.model.device import to_device
from prefcache.pipeline.model.forward import Forward, flatten
from prefcache.pipeline.model.lm_head import choose_head_dtype, set_head_dtype
from prefcache.pipeline.model.logprobs import sum_logps
from prefcache.pipeline.model.packed_row import lay_out, row_logps
from prefcache.pipeline.schema import TokenSequence
from tests.bench.corpus import TokenPair
from tests.bench.gpu import work
from tests.bench.gpu.machine import DEVICE, ON_GPU

BUDGET = 16_384 if ON_GPU else 2_048  # tokens of a micro-batch, which is the program's own
RATE = 1e-4  # losses fall visibly in a few steps
BETA = 0.1
# What of a trainer's techniques is taken away, by the words in its name.
WORDS = {
    "packed": "a prompt once for each of its answers",
    "padded": "no packing: padded on the right",
    "whole": "the head in one piece, nothing computed again",
    "everywhere": "the head on all positions",
    "live": "a frozen reference in memory, run in every step",
    "recomputed": "layers computed again in the backward pass",
    "lora": "an adapter on bf16 weights",
    "tf32": "every float32 product in TF32, such as the rotation's: for its speed, not for use",
    "sft": "the answers' mean log-prob, no reference at all",
}


class Trainer:
    """Takes steps on pairs; float32 weights under bf16 autocast on a GPU, float32 on a CPU."""

    def __init__(self, name: str, shape: dict[str, Any], pairs: list[TokenPair]) -> None:
        self.words = set(name.split("-")) - {"ours"}
        assert self.words <= WORDS.keys(), name
        frozen_dtype = torch.bfloat16 if ON_GPU and "lora" in self.words else torch.float32
        model = work.build(shape, frozen_dtype)
        if "lora" in self.words:
            _add_adapter(model)
        if "recomputed" in self.words:
            # Transformers asks for training mode; nothing is drawn at random in these models.
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        set_head_dtype(model, choose_head_dtype(None, "bfloat16", DEVICE), frozen="lora" in self.words)
        self.model, self.forward = model, self._forward_of(model, pairs)
        self._frozen = self._reference(shape, pairs) if "live" in self.words else None
        self._optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0, fused=ON_GPU
        )

    def _forward_of(self, model: Any, pairs: list[TokenPair]) -> Forward:
        way = next((word for word in ("packed", "padded") if word in self.words), "shared")
        longest = sorted(pairs, key=lambda pair: -sum(map(len, pair)))[:4]
        forward = Forward(model, "sdpa", way, "bfloat16" if ON_GPU else "float32", "rows")
        with autocast():
            forward.choose_layout(work.sequences(longest))
        return forward

    def _reference(self, shape: dict[str, Any], pairs: list[TokenPair]) -> Forward:
        frozen = work.build(shape, torch.float32).requires_grad_(False)
        set_head_dtype(frozen, choose_head_dtype(None, "bfloat16", DEVICE), frozen=True)
        return self._forward_of(frozen, pairs)

    def reference_of(self, pairs: list[TokenPair]) -> np.ndarray:
        """What a cache of this model, before its first step, gives of each pair's answers."""
        found, at = np.empty((len(pairs), 2)), {id(pair): i for i, pair in enumerate(pairs)}
        with torch.no_grad():
            for part in self.micro_batches(pairs):
                found[[at[id(pair)] for pair in part]] = self._sums(self.forward, part).cpu().numpy()
        return found

    def micro_batches(self, pairs: list[TokenPair], budget: int = BUDGET) -> list[list[TokenPair]]:
        if self.forward.layout == "padded":
            sizes = [2 * (len(p) + max(len(c), len(r))) for p, c, r in pairs]
            parts = packing.token_budget_batches(sizes, budget)
        else:
            once = self.forward.layout == "shared"
            sizes = [(1 if once else 2) * len(p) + len(c) + len(r) - 2 for p, c, r in pairs]
            parts = packing.balanced_batches(sizes, budget)
        return [[pairs[i] for i in part] for part in parts]

    def step(self, pairs: list[TokenPair], reference_B2: np.ndarray) -> float:
        """One update; `reference_B2` is what the cache gives of each pair's answers. Returns the loss before it."""
        losses = self.gradient(pairs, reference_B2)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(torch.stack(losses).sum())

    def gradient(self, pairs: list[TokenPair], reference_B2: np.ndarray, budget: int = BUDGET) -> list[torch.Tensor]:
        losses, at = [], {id(pair): i for i, pair in enumerate(pairs)}
        for part in self.micro_batches(pairs, budget):
            of_part = reference_B2[[at[id(pair)] for pair in part]]
            with self._products():
                loss = self._loss(part, to_device(torch.from_numpy(of_part), DEVICE)) / len(pairs)
                loss.backward()
            losses.append(loss.detach())
        return losses

    def _loss(self, pairs: list[TokenPair], reference_B2: torch.Tensor) -> torch.Tensor:
        if self._frozen is not None:
            with torch.no_grad():
                reference_B2 = self._sums(self._frozen, pairs)
        logps_B2 = self._sums(self.forward, pairs)
        if "sft" in self.words:
            return -logps_B2.sum()
        ratios_B2 = logps_B2 - reference_B2
        return -F.logsigmoid(BETA * (ratios_B2[:, 0] - ratios_B2[:, 1])).sum()

    def _sums(self, forward: Forward, pairs: list[TokenPair]) -> torch.Tensor:
        asked = work.sequences(pairs)
        groups = [[2 * i, 2 * i + 1] for i in range(len(pairs))] if forward.layout == "shared" else [[i] for i in range(len(asked))]  # fmt: skip
        with autocast(), self._head():
            logps = self._logps(forward, [[asked[i] for i in group] for group in groups])
        return sum_logps(logps).reshape(-1, 2)

    def _logps(self, forward: Forward, groups: list[list[TokenSequence]]) -> list[torch.Tensor]:
        if "everywhere" not in self.words:
            return forward.logps(groups).logps
        row = lay_out(groups)
        n, others = len(row.source_M), np.setdiff1d(np.arange(len(row.input_T)), row.source_M)
        places = np.arange(n) if row.place_N is None else row.place_N
        full = dataclasses.replace(
            row,
            source_M=np.concatenate([row.source_M, others]),
            target_M=np.concatenate([row.target_M, row.input_T[others]]),
            place_N=np.concatenate([places, np.arange(n, n + len(others))]),
            counts=[*row.counts, len(others)],
        )
        *logps, unused = row_logps(forward.model, full).logps
        # Nothing is learned from them, yet their gradient is computed, as it is where a loss is masked.
        logps[0] = logps[0] + 0 * unused.sum()
        return logps

    @contextlib.contextmanager
    def _products(self) -> Iterator[None]:
        torch.backends.cuda.matmul.allow_tf32 = "tf32" in self.words
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    @contextlib.contextmanager
    def _head(self) -> Iterator[None]:
        chosen = chunked_lm_head._chunk_positions
        if "whole" in self.words:
            chunked_lm_head._chunk_positions = lambda model: 1 << 30
        try:
            yield
        finally:
            chunked_lm_head._chunk_positions = chosen


def autocast() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cuda", dtype=torch.bfloat16) if ON_GPU else contextlib.nullcontext()


def _add_adapter(model: Any) -> None:
    from peft import get_peft_model

    get_peft_model(model, adapter())


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


# -- scoring ---------------------------------------------------------------------------------------------------------


def scorer(model: Any, way: str, dtype: str, like: list[TokenPair]) -> Callable[[list[TokenPair]], list[np.ndarray]]:
    """As the engine `transformers` scores, see its `_score`."""
    set_head_dtype(model, choose_head_dtype(None, dtype, DEVICE), frozen=True)
    forward = Forward(model, "sdpa", way, dtype, "rows")
    forward.choose_layout(work.sequences(sorted(like, key=lambda pair: -sum(map(len, pair)))[:4]))

    def score(pairs: list[TokenPair]) -> list[np.ndarray]:
        asked, found = work.sequences(pairs), {}
        with torch.inference_mode():
            for part in forward.plan_batches(asked, BUDGET):
                logps = forward.logps([[asked[i] for i in group] for group in part]).logps
                values = torch.cat(logps).cpu().numpy()
                found |= dict(zip(flatten(part), np.split(values, np.cumsum([len(each) for each in logps])[:-1]), strict=True))  # fmt: skip
        return [found[i] for i in range(len(asked))]

    return score


# -- the program's own step ------------------------------------------------------------------------------------------

PROGRAM_NEEDS = ("pydantic", "duckdb", "xxhash", "yaml")


def program(
    folder: Path, pairs: list[TokenPair], reference_B2: np.ndarray, per_step: int, words: set[str]
) -> Callable[[Sequence[int]], float]:
    """Policy.update on some of the pairs, by number; the model is in `folder`. Returns the loss before it."""
    from prefcache.pipeline.config import Train
    from prefcache.pipeline.identity import Reference
    from prefcache.pipeline.training.distributed import make_accelerator
    from prefcache.pipeline.training.objective import Objective
    from prefcache.pipeline.training.policy import Policy
    from tests.bench.train import examples_of

    examples = examples_of(pairs, *reference_B2.T)
    train = Train(batch_size=per_step, learning_rate=RATE, gradient_checkpointing="recomputed" in words)
    policy = Policy(Reference(folder), None, train, make_accelerator(train), examples.longest(12), print)
    objective = Objective(train)

    def step(indices: Sequence[int]) -> float:
        visit, _, _ = policy.update(examples, np.array(indices), objective, {}, RATE)
        return float(visit["loss"].mean())

    return step
