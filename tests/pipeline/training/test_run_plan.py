"""What a run will compute is known from the prepared data: as the run itself counts it, and by hand."""

import json

import numpy as np
import pytest

from prefcache.pipeline import config_file
from prefcache.pipeline.training.flops import Work
from prefcache.pipeline.training.run_plan import plan_run
from tests.helpers.project import options


def plan(config, *settings: str, processes: int = 1, budget: int = 1024):
    return plan_run(config_file.load(config, settings), "shared", processes, budget)


def test_steps_and_micro_batches_are_those_of_the_run(prefcache, prepared):
    found = plan(prepared, budget=200)
    n = len(found.examples)
    # Two epochs in steps of 8.
    assert found.steps == round(2 * -(-n // 8))
    everything = np.arange(n)
    sizes = found.examples.sizes(everything, "shared")
    assert found.longest == sizes.max() and found.longest <= found.step.largest_micro_batch <= 200
    assert found.step.tokens == pytest.approx(sizes.sum() / -(-n // 8))
    assert found.step.several and found.step.micro_batches > 1
    assert not plan(prepared, budget=1 << 20).step.several
    assert plan(prepared, budget=1 << 20, processes=2).step.several  # each process has a part of the batch


def test_a_number_of_steps_is_planned_instead_of_epochs(prefcache, prepared):
    epoch = plan(prepared, "train.epochs=1")
    for n in (1, 2 * epoch.steps):
        found = plan(prepared, f"train.max_steps={n}")
        assert found.steps == n
        assert found.trained.positions == pytest.approx(epoch.trained.positions * n / epoch.steps)


def test_the_work_is_that_of_all_examples(prefcache, prepared):
    found = plan(prepared, "train.epochs=1")
    work = Work(0, 0, 0)
    for row in found.examples.batch(np.arange(len(found.examples)), ("chosen", "rejected")).answers["chosen"]:
        p, c = len(row.prompt_ids), len(row.completion_ids)
        work = work.plus(Work(p + c - 1, c, (p + c - 1) ** 2))
    for row in found.examples.batch(np.arange(len(found.examples)), ("chosen", "rejected")).answers["rejected"]:
        p, r = len(row.prompt_ids), len(row.completion_ids)
        work = work.plus(Work(r - 1, r, (r - 1) * (p + r - 1)))
    assert found.trained == pytest.approx(work, rel=1e-9)


def test_forwards_without_gradients_are_those_that_the_run_makes(prefcache, prepared):
    plain = plan(prepared, "train.eval_every=1000", budget=200)
    assert set(plain.passes) == {"evaluations"}  # before the first step and after the last
    often = plan(prepared, "train.eval_every=1", budget=200)
    n = plain.steps
    assert often.passes["evaluations"].positions == pytest.approx(plain.passes["evaluations"].positions * (n + 1) / 2)
    # Statistics over the batch take a first pass, if there is more than one forward.
    first = plan(prepared, "train.loss=kto_pair", budget=200)
    assert first.passes["the statistics of each batch"] == pytest.approx(first.trained)
    assert "the statistics of each batch" not in plan(prepared, "train.loss=kto_pair", budget=1 << 20).passes
    # Each example once until the next move: of n steps, all but the first four.
    moving = plan(prepared, "train.moving_reference.every=4", "train.epochs=1", "train.batch_size=4")
    scored = 4 * 4 * ((moving.steps - 1) // 4)
    expected = moving.trained.positions / moving.steps / len(moving.examples) * -(-len(moving.examples) // 4) * scored
    assert moving.passes["the moving reference"].positions == pytest.approx(expected)


def test_labels_have_mismatched_answers_that_are_not_learned_from(prefcache, config):
    prefcache("prepare", config, *options("prepare.examples=labels"))
    found = plan(config, "prepare.examples=labels", "train.loss=kto", budget=1 << 20)
    assert found.objective.answers == ("completion",) and found.mean.rejected == 1
    assert found.passes["answers that are not learned from"].positions > 0


def test_a_selection_that_reads_scores_is_left_out_and_said(prefcache, prepared):
    everything = plan(prepared)
    some = plan(prepared, "train.where=n_chosen % 2 = 0")
    assert len(some.examples) < len(everything.examples) and not some.notes
    unknown = plan(prepared, "train.where=margin > 0", "train.order_by=margin")
    assert len(unknown.examples) == len(everything.examples)
    assert len(unknown.notes) == 1 and unknown.notes[0].startswith("train.where reads margin, which scoring gives")


def test_the_arithmetic_is_what_a_run_counts(prefcache, trained):
    rows = json.loads(
        prefcache("sql", "select sum(flops) as flops, count(*) as n from throughput", "runs/tiny", "--json").stdout
    )
    planned = json.loads(prefcache("train", "config.yaml", "--dry-run", "--json").stdout)
    assert planned["steps"] == rows[0]["n"]
    # A run computes once what prompts of different examples have in common.
    assert planned["flops"] == pytest.approx(rows[0]["flops"], rel=0.02)
