"""What is measured on the held-out examples: metrics, answers to the same prompts, and what a run moved most, token by token.

Of a sharded model every process has to take part in each of these.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import PrefcacheError
from pipeline.schema import HELD_OUT
from pipeline.training import best, gains, metrics, samples
from pipeline.training.objective import Memory
from pipeline.training.session import Session, Trained


def evaluate(s: Session, step: int, epoch: float, memory: Memory, *, log: bool = True) -> dict[str, float]:
    """Metrics on the held-out examples, and how often the policy prefers the chosen answer by its own log-prob."""
    examples = s.examples[HELD_OUT]
    if not len(examples):
        return {}
    everything = np.arange(len(examples))
    visit, logged = s.policy.evaluate(examples, everything, s.objective, memory)
    if log:
        s.log.visit(step, epoch, HELD_OUT, examples.example_ids(everything), visit)
    return {**metrics.of_evaluation(visit, s.objective), **logged}


def eval_row(evaluation: dict[str, float]) -> dict[str, float]:
    return {f"{best.PREFIX}{name}": value for name, value in evaluation.items()}


def answers(s: Session) -> list[str]:
    indices = _sample_indices(s)
    if not len(indices) or not (s.main or s.policy.sharded):
        return []
    return s.policy.answers(s.examples[HELD_OUT].prompts(indices)[1])


def _sample_indices(s: Session) -> np.ndarray:
    return np.arange(min(s.config.train.samples, len(s.examples[HELD_OUT])))


def samples_of(s: Session, before: list[str], after: list[str]) -> list[dict[str, Any]]:
    examples, indices = s.examples[HELD_OUT], _sample_indices(s)
    if not len(indices):
        return []
    prompts, _ = examples.prompts(indices)
    return samples.rows(examples.example_ids(indices), prompts, before, after, s.config.train.kinds)


def tokens(s: Session, trained: Trained) -> pa.Table | None:
    """What the run moved most, token by token; None where nothing held out has moved. Every process takes part."""
    examples, last = s.examples[HELD_OUT], trained.best["step"] if trained.best else trained.steps
    by_gain = s.policy.agreed(gains.gains(s.log, last) if s.main and len(examples) else {})
    if not by_gain:
        return None
    at = {example_id: i for i, example_id in enumerate(examples.example_ids(np.arange(len(examples))))}
    indices = np.array([at[example_id] for example_id in gains.ends(by_gain)], dtype=np.int64)
    answers = [name for name in s.objective.visited if name not in s.objective.without_gradient]
    found = examples.batch(indices, "cpu", answers).answers
    sequences = {name: [each for each in of_answer if each is not None] for name, of_answer in found.items()}
    logps = s.policy.score(examples, indices, answers, tokens=True).tokens
    return gains.rows(by_gain, sequences, s.policy.tokenizer, logps, _reference_tokens(s, sequences))


def _reference_tokens(s: Session, sequences: gains.Sequences) -> dict[str, list[np.ndarray]]:
    if s.cache is None or not s.objective.reference_answers:
        return {}
    try:
        return gains.reference_tokens(s.cache, sequences, s.inputs["numerics"])
    except PrefcacheError:  # It keeps sums only, or is gone since the run began, which needs it no more.
        s.progress.say(
            f"train: {s.cache.folder} has no log-probs of single tokens: {gains.FILE} has the policy's alone"
        )
        return {}
