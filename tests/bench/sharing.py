"""What is saved by computing once what answers begin with: the arithmetic of steps, exactly, and the time of one on a CPU.

    make bench-sharing
    python -m tests.bench.sharing --prepared data/hh/prepared

Three kinds of data, in steps of their own: chat pairs that part at their first or an early token; trajectories of an agent that
part after many common turns; all pairs of rankings of four. Each is computed by five ways:

    packed     every sequence by itself
    prompts    a prompt once for the answers of a step
    trees      what the answers to a prompt begin with, once a step: what prefcache does
    steps      one tree of all sequences of a step, across prompts
    data set   one tree of all sequences of all steps, which no step could be computed from: what remains at most

Chat pairs are random ids with the lengths of real ones, or those of a prepared folder. FLOPs are those of a forward and backward of
Qwen2.5-0.5B's shapes. The time is that of forward and backward of a small Llama, of the pairs of one prompt, alternating, as the median of the rounds'
ratios.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from prefcache.pipeline.model import packed_row, packing
from prefcache.pipeline.model.forward import Forward
from prefcache.pipeline.schema import TRAIN, TokenSequence
from prefcache.pipeline.training.flops import Work, count_work, model_cost
from tests.bench import corpus
from tests.bench.corpus import TokenPair

VOCABULARY, STEP, N_STEPS = 8_000, 6, 32
Steps = list[list[TokenPair]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, help="take chat pairs from this folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=N_STEPS)
    options = parser.parse_args()
    kinds = {
        "chat": in_steps(chat_pairs(options.prepared, options.steps * STEP)),
        "trajectories": in_steps([trajectory(seed) for seed in range(options.steps * STEP)]),
        "rankings of 4": [ranking(seed) for seed in range(options.steps)],
    }
    print(f"{'':15}{'':10}{'tokens/pair':>13}{'GFLOPs/pair':>13}{'of prompts':>12}")
    cost = model_cost(qwen())
    for kind, steps in kinds.items():
        n = sum(map(len, steps))
        works = {way: count(steps) for way, count in WAYS.items()}
        before = cost.flops(works["prompts"])
        for way, work in works.items():
            flops = cost.flops(work)
            print(f"{kind:15}{way:10}{work.positions / n:13,.0f}{flops / n / 1e9:13,.1f}{flops / before:12.3f}")
    for kind, ((first, *others), *_) in kinds.items():
        pairs = [first, *(pair for pair in others if pair.prompt is first.prompt)]
        print(f"{kind:15}seconds by trees, of those by prompts: {time_ratio(pairs, options.rounds):.2f}")


# -- data ------------------------------------------------------------------------------------------------------------


def chat_pairs(prepared: Path | None, n: int) -> list[TokenPair]:
    if prepared is None:
        return corpus.token_pairs(n, VOCABULARY)
    from prefcache.pipeline.stored.prepared import Prepared

    rows = Prepared(prepared).table(TRAIN).slice(0, n).to_pylist()
    return [TokenPair(*(np.array(row[f"{part}_ids"], np.int32) for part in TokenPair._fields)) for row in rows]


def trajectory(seed: int) -> TokenPair:
    """An instruction and a task of 400 tokens, then common turns of 1,200 on average; the last turns differ, by 150 on average."""
    dice = np.random.default_rng([seed, 1])
    system = np.random.default_rng(0).integers(VOCABULARY, size=200, dtype=np.int32)
    task, common, *ends = (
        dice.integers(VOCABULARY, size=n, dtype=np.int32)
        for n in (200, dice.integers(400, 2001), *dice.integers(50, 251, 2))
    )
    return TokenPair(np.concatenate([system, task]), *(np.concatenate([common, end]) for end in ends))


def ranking(seed: int) -> list[TokenPair]:
    """All six pairs of four answers of 75 to 225 tokens to a prompt of 124; they part at their first token."""
    dice = np.random.default_rng([seed, 2])
    prompt, *answers = (dice.integers(VOCABULARY, size=n, dtype=np.int32) for n in (124, *dice.integers(75, 226, 4)))
    return [TokenPair(prompt, *pair) for pair in itertools.combinations(answers, 2)]


def in_steps(pairs: list[TokenPair]) -> Steps:
    return [pairs[i : i + STEP] for i in range(0, len(pairs), STEP)]


# -- arithmetic ------------------------------------------------------------------------------------------------------


def sequences(pairs: Sequence[TokenPair]) -> list[TokenSequence]:
    return [TokenSequence(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]


def by_prompt(pairs: Sequence[TokenPair]) -> list[list[TokenSequence]]:
    found = sequences(pairs)
    return [[found[i] for i in group] for group in packing.group_by_prompt(found)]


@contextmanager
def prompts_only() -> Iterator[None]:
    """Lay out rows in which answers branch off at the end of their prompt."""

    def order(group: Sequence[TokenSequence]) -> list[tuple[int, int]]:
        return [(i, len(group[i].prompt_ids) if i else 0) for i in range(len(group))]

    with mock.patch.object(packed_row, "order_tree", order):
        yield


def across_prompts(pairs: Sequence[TokenPair]) -> list[list[TokenSequence]]:
    """As answers to a prompt of one token, of which those that were answers count."""
    found = [
        TokenSequence(each.ids[:1], each.ids[1:], np.arange(len(each.prompt_ids) - 1, each.n_tokens - 1))
        for each in sequences(pairs)
    ]
    return [[found[i] for i in group] for group in packing.group_by_prompt(found)]


def total(steps: Steps, groups: Callable[[Sequence[TokenPair]], list[list[TokenSequence]]]) -> Work:
    work = Work(0, 0, 0)
    for pairs in steps:
        work = work.plus(count_work(groups(pairs), "shared"))
    return work


def count_prompts(steps: Steps) -> Work:
    with prompts_only():
        return total(steps, by_prompt)


WAYS: dict[str, Callable[[Steps], Work]] = {
    "packed": lambda steps: total(steps, lambda pairs: [[each] for each in sequences(pairs)]),
    "prompts": count_prompts,
    "trees": lambda steps: total(steps, by_prompt),
    "steps": lambda steps: total(steps, across_prompts),
    "data set": lambda steps: total([[pair for pairs in steps for pair in pairs]], across_prompts),
}


def qwen() -> torch.nn.Module:
    sizes = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes, intermediate_size=4864, vocab_size=151_936, tie_word_embeddings=True)
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


# -- time ------------------------------------------------------------------------------------------------------------


def time_ratio(pairs: list[TokenPair], rounds: int) -> float:
    """The time by trees over that by prompts alone. Both give the same sum of log-probs, and so the same gradient."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=4096)
    model = AutoModelForCausalLM.from_config(config).eval()
    forward = Forward(model, "sdpa", "shared", "float32", "rows")
    forward.choose_layout(sequences(pairs)[:2])
    groups = by_prompt(pairs)

    def step() -> tuple[float, float]:
        model.zero_grad()
        began = time.perf_counter()
        logps = torch.cat(forward.logps(groups).logps).sum()
        logps.backward()
        return time.perf_counter() - began, logps.item()

    step()
    ratios = []
    for _ in range(rounds):
        with prompts_only():
            before, expected = step()
        after, found = step()
        assert abs(found - expected) < 1e-5 * abs(expected)
        ratios.append(after / before)
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
