"""What a run will compute, from the prepared data and the settings alone: its steps, their micro-batches, and their arithmetic.

Micro-batches are cut as a step cuts them (policy_logps.py), and passes without gradients are those of gradient_step.py,
moving_reference.py and evaluate.py. No scores are needed.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefcache.pipeline.config import Config, Train
from prefcache.pipeline.errors import DataError
from prefcache.pipeline.schema import TRAIN, TokenSequence
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.training import dataset, loss_columns
from prefcache.pipeline.training.cache_join import join_cache
from prefcache.pipeline.training.dataset import Examples
from prefcache.pipeline.training.flops import Work, count_work
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.selection import Selection
from prefcache.pipeline.training.step_trace import Lengths

# Beyond these numbers, the means of some that are spread over the data stand for all.
_MAX_STEPS, _MAX_EXAMPLES = 64, 2048


@dataclass(frozen=True)
class StepPlan:
    """The steps of a run: means over them, except where a comment says otherwise."""

    tokens: float  # of all processes
    micro_batches: float  # of one process
    largest_micro_batch: int  # in tokens, of any step
    largest_share: int  # of one process in a step, in tokens
    several: bool  # whether any step takes more than one forward


@dataclass(frozen=True)
class RunPlan:
    objective: Objective
    examples: Examples  # to train on
    layout: str
    steps: int
    longest: int  # tokens that the longest example takes in a forward
    longest_sequence: int  # tokens of a prompt and an answer
    mean: Lengths  # of an example, in tokens
    step: StepPlan
    trained: Work  # of the whole run, in forwards that have a backward
    passes: dict[str, Work]  # of the whole run, in forwards without gradients, by what they are for
    notes: Sequence[str]  # what could not be taken into account


def plan_run(config: Config, layout: str, processes: int, budget: int) -> RunPlan:
    """Plan a run whose forwards have at most `budget` tokens, unless a single example has more."""
    train, prepared = config.train, Prepared(config.prepared)
    objective = Objective(train)
    loss_columns.refuse_missing(objective, prepared)
    selection, notes = _select_without_scores(train, prepared.kind)
    splits = join_cache(objective, prepared, None, (), density_ratio=False, selection=selection)
    examples = splits[TRAIN]
    if not len(examples):
        raise DataError(f"{prepared.folder} has no example to train on: lower prepare.held_out, or add data.")
    n_steps = dataset.n_steps(len(examples), train.batch_size, train.epochs, train.max_steps)
    step = _plan_steps(train, examples, layout, processes, budget)
    # As one pass over the examples has that many visits, however many steps a run has.
    visits = n_steps * len(examples) / -(-len(examples) // train.batch_size)
    return RunPlan(
        objective=objective,
        examples=examples,
        layout=layout,
        steps=n_steps,
        longest=int(examples.sizes(np.arange(len(examples)), layout).max()),
        longest_sequence=examples.longest_sequence,
        mean=_mean_lengths(examples, objective.answers),
        step=step,
        trained=_mean_work(examples, objective.answers, layout).times(visits),
        passes=_count_passes(train, objective, splits, layout, n_steps, visits, is_one_forward=not step.several),
        notes=notes,
    )


def _select_without_scores(train: Train, kind: str) -> tuple[Selection, list[str]]:
    """Leave out the expressions that read the reference's log-probs."""
    selection = Selection(train, kind)
    readers = {key: column for key, column in selection.readers.items() if key != "train.order_by"}
    unread = {key.removeprefix("train."): None for key in selection.readers}
    notes = [
        f"{key} reads {column}, which scoring gives: here no example is left out by it, so the run may be shorter"
        for key, column in readers.items()
    ]
    return Selection(train.model_copy(update=unread), kind) if unread else selection, notes


def _plan_steps(train: Train, examples: Examples, layout: str, processes: int, budget: int) -> StepPlan:
    n_run = dataset.n_steps(len(examples), train.batch_size, train.epochs, train.max_steps)
    n_steps = min(n_run, dataset.n_steps(len(examples), train.batch_size, 1))
    every = -(-n_steps // _MAX_STEPS)
    batches = dataset.steps(len(examples), train.batch_size, 1, train.seed, 0, examples.ranks, n_steps)
    tokens, counts, largest, largest_share = [], [], 0, 0
    for _, _, indices in itertools.islice(batches, 0, None, every):
        in_step = 0
        for share in examples.shares(indices, processes, layout):
            parts = examples.micro_batches(share, budget, train.micro_batch_size, layout)
            sizes = [examples.count_tokens(part, layout) for part in parts]
            counts.append(len(parts))
            largest_share = max(largest_share, examples.count_tokens(share, layout))
            largest, in_step = max([largest, *sizes]), in_step + sum(sizes)
        tokens.append(in_step)
    several = processes > 1 or max(counts) > 1
    return StepPlan(float(np.mean(tokens)), float(np.mean(counts)), largest, largest_share, several)


# -- arithmetic ------------------------------------------------------------------------------------------------------


def _mean_work(examples: Examples, answers: Sequence[str], layout: str) -> Work:
    """Count the forward of an example's answers, on average over the examples.

    What examples of one prompt share when they meet in a step is not taken off.
    """
    work, sampled = Work(0, 0, 0), _sample_answers(examples, answers)
    for sequences in filter(None, sampled):
        groups = [sequences] if layout == "shared" else [[sequence] for sequence in sequences]
        work = work.plus(count_work(groups, layout))
    return work.times(1 / len(sampled))


def _mean_lengths(examples: Examples, answers: Sequence[str]) -> Lengths:
    """Average an example's lengths. A single answer is paired with one of one token, which is never an input."""
    sampled = list(filter(None, _sample_answers(examples, answers)))
    prompt = np.mean([len(sequences[0].prompt_ids) for sequences in sampled])
    first, *others = (np.mean([len(sequences[i].completion_ids) for sequences in sampled]) for i in range(len(answers)))
    return Lengths(*(max(1, round(float(n))) for n in (prompt, first, others[0] if others else 1)))


def _sample_answers(examples: Examples, answers: Sequence[str]) -> list[list[TokenSequence]]:
    """Return these answers of some examples from all over the data, without those that an example lacks."""
    indices = np.linspace(0, len(examples) - 1, min(len(examples), _MAX_EXAMPLES)).astype(np.int64)
    batch = examples.batch(indices, answers).answers
    return [
        [each for each in found if each is not None] for found in zip(*(batch[name] for name in answers), strict=True)
    ]


def _count_passes(
    train: Train,
    objective: Objective,
    splits: dict[str, Examples],
    layout: str,
    n_steps: int,
    visits: float,
    *,
    is_one_forward: bool,
) -> dict[str, Work]:
    """Count the forwards without gradients of the whole run; those that a run does not make are left out."""
    examples, passes = splits[TRAIN], dict[str, Work]()
    has_first_pass = (
        train.scope == "batch" and (objective.has_statistics or objective.over_batch) and not is_one_forward
    )
    answers = objective.first_pass if has_first_pass else objective.without_gradient
    if answers:
        what = "the statistics of each batch" if has_first_pass else "answers that are not learned from"
        passes[what] = _mean_work(examples, answers, layout).times(visits)
    if train.moving_reference:
        # Each example once, however often it comes until the next move.
        every, moves = train.moving_reference.every, (n_steps - 1) // train.moving_reference.every
        scored = moves * min(len(examples), every * train.batch_size)
        passes["the moving reference"] = _mean_work(examples, objective.reference_answers, layout).times(scored)
    n_evaluations = 1 + sum(dataset.evaluates(step, n_steps, train.eval_every) for step in range(1, n_steps + 1))
    for split, evaluated in splits.items():
        if split != TRAIN and len(evaluated):
            work = _mean_work(evaluated, objective.visited, layout).times(n_evaluations * len(evaluated))
            passes["evaluations"] = work.plus(passes.get("evaluations", Work(0, 0, 0)))
    return passes
