"""What is measured on the held-out examples: metrics, answers to the same prompts, and what a run moved most, token by token.

With a sharded model every process has to take part in each of these.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import IntegrityError, PrefcacheError
from prefcache.pipeline.schema import EVALUATION, HELD_OUT, metric_prefix
from prefcache.pipeline.stored.records import Before, SampleEntry
from prefcache.pipeline.training import metrics, sample_answers, token_gains
from prefcache.pipeline.training.objective import RunningStats
from prefcache.pipeline.training.run_context import Session, Trained


def evaluate(s: Session, step: int, epoch: float, running_stats: RunningStats, *, log: bool = True) -> dict[str, float]:
    """Return the metrics of the held-out examples, and under NAME_ those of each set of prepare.held_out_data."""
    evaluation: dict[str, float] = {}
    for split, examples in s.evaluated.items():
        indices = np.arange(len(examples))
        what = "evaluate" if split == HELD_OUT else f"evaluate {split}"
        visit, logged = s.policy.evaluate(examples, indices, s.objective, running_stats, what)
        if log:
            s.log.add_visit(step, epoch, split, examples.example_ids(indices), visit)
        prefix = metric_prefix(split)
        found = {**metrics.evaluation_metrics(visit, s.objective), **logged}
        evaluation |= {f"{prefix}{name}": value for name, value in found.items()}
    return evaluation


def eval_row(evaluation: dict[str, float]) -> dict[str, float]:
    return {f"{EVALUATION}{name}": value for name, value in evaluation.items()}


def generate_samples(s: Session) -> list[str]:
    """Generate answers to the prompts to be answered."""
    prompts = _sample_prompts(s)
    if not prompts or not (s.main or s.policy.sharded):
        return []
    return s.policy.generate([prompt.sequence for prompt in prompts])


def make_samples(s: Session, before: list[str], after: list[str]) -> list[SampleEntry]:
    return sample_answers.make_samples(_sample_prompts(s), before, after, s.config.train.kinds)


def _sample_prompts(s: Session) -> list[sample_answers.Prompt]:
    """The first evaluated prompts, then the user's own."""
    examples = s.examples[s.shown]
    indices = np.arange(min(s.config.train.samples, len(examples)))
    if not len(indices):
        return list(s.own_prompts)
    texts, ids = examples.prompts(indices)
    found = zip(examples.example_ids(indices), texts, ids, examples.images(indices), strict=True)
    return [*(sample_answers.Prompt(*each) for each in found), *s.own_prompts]


def refuse_other_examples(s: Session, before: Before, path: Path, remedy: str) -> None:
    """Refuse measurements from before the first step that were made on other held-out examples."""
    n, expected, n_evaluated = len(before.answers), len(_sample_prompts(s)), sum(map(len, s.evaluated.values()))
    if n != expected:
        raise IntegrityError(f"{path} has {n} answers, expected {expected}. {remedy}")
    if bool(before.evaluation) != bool(n_evaluated):
        found = "an evaluation" if before.evaluation else "no evaluation"
        raise IntegrityError(f"{path} has {found}, and {n_evaluated} examples are held out. {remedy}")


def token_table(s: Session, trained: Trained) -> pa.Table | None:
    """Return the log-probs of the examples that the run moved most; None if nothing held out has moved."""
    examples, last = s.examples[s.shown], trained.best.step if trained.best else trained.steps
    gains = s.policy.broadcast(token_gains.measure_gains(s.log, last, s.shown) if s.main and len(examples) else {})
    if not gains:
        return None
    index_of = {example_id: i for i, example_id in enumerate(examples.example_ids(np.arange(len(examples))))}
    indices = np.array([index_of[example_id] for example_id in token_gains.extremes(gains)], dtype=np.int64)
    names = [name for name in s.objective.visited if name not in s.objective.without_gradient]
    answers = examples.batch(indices, names).answers
    sequences = {name: [sequence for sequence in answers[name] if sequence is not None] for name in answers}
    logps = s.policy.score(examples, indices, names, tokens=True).tokens
    reference = {}
    if s.cache is not None and s.inputs.numerics and s.objective.reference_answers:
        try:
            reference = token_gains.read_reference(s.cache, sequences, s.inputs.numerics)
        except PrefcacheError:  # the cache holds sums only, or is no longer there, and the run does not need it
            s.progress.say(
                f"train: {s.cache.folder} has no log-probs of single tokens: {token_gains.FILE} has the policy's alone"
            )
    return token_gains.token_table(gains, sequences, s.policy.tokenizer, logps, reference)
