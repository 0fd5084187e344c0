"""train.where, train.weight and train.order_by, as a user says them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from prefcache.pipeline.stored.prepared import Prepared
from tests.helpers.processes import launch
from tests.helpers.project import options, pair, write_config, write_pairs
from tests.helpers.runs import batches_of, metrics, table, weights

SOON = options("train.epochs=1", "train.samples=0")
WHERE = "train.where=margin > -45 and n_prompt < 21"


def examples(root: Path, split: str = "train") -> dict[str, dict]:
    return {row["example_id"]: row for row in Prepared(root / "runs/tiny/prepared").table(split).to_pylist()}


def margins(prefcache) -> dict[str, float]:
    """Of the reference, by SQL over the cache and not by what is tested."""
    query = (
        "select example_id, c.logp_sum - r.logp_sum as margin from examples join reference c on c.key = chosen_key "
        "join reference r on r.key = rejected_key"
    )
    rows = json.loads(prefcache("sql", query, "runs/tiny", "--json").stdout)
    return {row["example_id"]: row["margin"] for row in rows}


def visited(run: Path, split: str = "train") -> list[str]:
    return [row["example_id"] for row in table(run, "steps") if row["split"] == split]


def test_exactly_the_chosen_examples_are_visited_and_the_held_out_ones_all(prefcache, scored, tmp_path):
    done = prefcache("train", scored, *SOON, *options(WHERE))
    margin, run, train = margins(prefcache), tmp_path / "runs/tiny/trained", examples(tmp_path)
    expected = {name for name, row in train.items() if margin[name] > -45 and row["n_prompt"] < 21}
    assert 0 < len(expected) < len(train)
    assert sorted(visited(run)) == sorted(expected)
    assert f"train: {len(expected)} of {len(train)} train examples chosen by train.where" in done.stderr
    assert set(visited(run, "held_out")) == set(examples(tmp_path, "held_out"))


def test_a_weight_counts_as_so_many_of_the_example(prefcache, model, tmp_path):
    """Lines 1 to 10 weigh 3, the next 10 nothing; beside them a file in which they stand three times and not at all."""
    config = write_config(tmp_path, model, batch_size=100, epochs=6, samples=0, warmup_ratio=0.0, learning_rate=1e-4)
    rows = [json.dumps(pair(i)) for i in range(30)]
    repeated = [*rows[:10] * 3, *rows[20:]]
    (tmp_path / "repeated.jsonl").write_text("\n".join(repeated) + "\n")
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    weigh = options("train.weight=case when line <= 10 then 3 when line > 20 then 1 else 0 end")
    for out, data, more in (("weighed", "pairs.jsonl", weigh), ("repeated", "repeated.jsonl", [])):
        settings = options(f"out=runs/{out}", f"prepare.data={data}", "prepare.held_out=0")
        for stage in ("prepare", "score"):
            prefcache(stage, config, *settings)
        done = prefcache("train", config, *settings, *more)
        assert ("10 of them weigh 0 by train.weight and are not visited" in done.stderr) == (out == "weighed")
    weighed, other = (tmp_path / "runs" / out / "trained" for out in ("weighed", "repeated"))
    assert (len(visited(weighed)), len(visited(other))) == (6 * 20, 6 * 40)
    losses = [[row["loss"] for row in metrics(run)[1:]] for run in (weighed, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and losses[0][-1] < losses[0][0] - 0.01
    ends = [load_file(run / "model/model.safetensors") for run in (weighed, other)]
    start = load_file(model / "model.safetensors")
    way = sum(float((ends[1][key] - start[key]).square().sum()) for key in start)
    apart = sum(float((ends[0][key] - ends[1][key]).square().sum()) for key in start)
    assert way > 1e-4 and (apart / way) ** 0.5 < 1e-3


def test_weights_do_not_depend_on_micro_batches_and_count_where_a_step_has_one_example(prefcache, scored, tmp_path):
    weigh = options("train.weight=n_chosen")
    losses = {}
    for run, more in (("whole", []), ("single", ["train.micro_batch_size=1"])):
        prefcache("train", scored, *SOON, *weigh, *options(f"train.run={run}", *more))
        losses[run] = [row["loss"] for row in metrics(tmp_path / "runs/tiny" / run)]
    assert losses["whole"] == pytest.approx(losses["single"], abs=1e-6)
    prefcache(
        "train", scored, *SOON, *weigh, *options("train.run=ones", "train.batch_size=1", "train.learning_rate=1e-9")
    )
    # Nothing is learned, so each loss is ln 2 times its weight: its length over the mean length.
    train = examples(tmp_path)
    mean = np.mean([row["n_chosen"] for row in train.values()])
    found = [row for row in table(tmp_path / "runs/tiny/ones", "steps") if row["split"] == "train"]
    for row in found:
        expected = np.log(2) * train[row["example_id"]]["n_chosen"] / mean
        assert row["loss"] == pytest.approx(expected, rel=1e-3)
    # Evaluation weighs nothing.
    assert metrics(tmp_path / "runs/tiny/ones")[0]["eval_loss"] == pytest.approx(np.log(2), rel=1e-4)


def test_each_epoch_has_the_order_that_is_asked_for(prefcache, scored, tmp_path):
    orders = {
        "lengths": "if(epoch = 1, n_chosen, -n_chosen), example_id",
        "curriculum": "source, line",  # nothing is shuffled: Axolotl's curriculum_sampling
        "first": "if(epoch = 1, n_chosen, null)",  # the second epoch is shuffled as without an order
        "shuffled": "1",
    }
    for run, order in orders.items():
        prefcache("train", scored, *options(f"train.run={run}", f"train.order_by={order}", "train.samples=0"))
    train, runs = examples(tmp_path), tmp_path / "runs/tiny"
    short, long = (sorted(train, key=lambda name: (sign * train[name]["n_chosen"], name)) for sign in (1, -1))
    assert visited(runs / "lengths") == short + long
    assert all(len(ids) <= 8 for ids in batches_of(runs / "lengths").values())
    assert visited(runs / "curriculum") == sorted(train, key=lambda name: train[name]["line"]) * 2
    found = visited(runs / "first")
    lengths = [train[name]["n_chosen"] for name in found[: len(train)]]
    assert lengths == sorted(lengths) and len(set(lengths)) > 3
    assert found[len(train) :] == visited(runs / "shuffled")[len(train) :]


def test_another_choice_is_another_run_and_nothing_is_scored_again(prefcache, scored, tmp_path):
    def cached():
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.parquet")}

    before, run = cached(), tmp_path / "runs/tiny/trained"
    first = prefcache("train", scored, *SOON, *options(WHERE))
    expected = weights(run)
    assert "nothing to do" in prefcache("train", scored, *SOON, *options(WHERE)).stderr
    done = prefcache("train", scored, *SOON, *options("train.where=margin > -40"))
    assert "train.where margin > -45 and n_prompt < 21 (now margin > -40)" in done.stderr and weights(run) != expected
    again = prefcache("train", scored, *SOON, *options(WHERE))
    assert weights(run) == expected and again.stdout == first.stdout
    assert "0 scored now" in prefcache("score", scored).stdout and cached() == before
    for key in ("weight=n_chosen", "order_by=n_chosen"):
        assert "it is now" in prefcache("train", scored, *SOON, *options(f"train.{key}")).stderr


def test_a_resumed_run_and_two_processes_see_the_same_batches(prefcache, scored, tmp_path):
    settings = [
        *options(WHERE, "train.weight=1 + n_chosen % 3", "train.order_by=if(epoch = 2, n_chosen, null)"),
        *options("train.batch_size=4", "train.checkpoint_every=3", "train.epochs=3", "train.samples=0"),
    ]
    prefcache("train", scored, *settings)
    run = tmp_path / "runs/tiny/trained"
    expected, batches, losses = weights(run), batches_of(run), [row["loss"] for row in metrics(run)]
    (run / "manifest.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    assert "resuming from step" in prefcache("train", scored, *settings).stderr
    assert weights(run) == expected and batches_of(run) == batches
    launch(tmp_path, ["train", scored, *settings, "--set", "train.run=two"])
    two = tmp_path / "runs/tiny/two"
    assert batches_of(two) == batches
    assert [row["loss"] for row in metrics(two)] == pytest.approx(losses, abs=1e-5)


def test_the_shuffle_is_the_same_without_a_reference(prefcache, scored, tmp_path):
    for loss in ("sigmoid", "simpo"):
        done = prefcache("train", scored, *SOON, *options(WHERE, f"train.loss={loss}", f"train.run={loss}"))
    assert "there is nothing to check" in done.stderr
    sigmoid, simpo = (batches_of(tmp_path / "runs/tiny" / loss) for loss in ("sigmoid", "simpo"))
    assert sigmoid == simpo


def test_what_only_the_reference_knows_needs_scores(prefcache, config, tmp_path):
    prefcache("prepare", config)
    loss = options("train.loss=simpo")
    done = prefcache(
        "train", config, *SOON, *loss, *options("train.where=n_chosen > 3", "train.weight=abs(margin)"), code=2
    )
    assert "train.weight reads margin, which scoring gives: runs/tiny/prepared has not been scored" in done.stderr
    assert "Score first (prefcache score CONFIG)" in done.stderr and not (tmp_path / "runs/tiny/trained").exists()
    # What the data has itself, it needs no scores for.
    prefcache("train", config, *SOON, *loss, *options("train.where=n_chosen > 3"))


def test_a_mistake_leaves_a_finished_run_where_it_is(prefcache, scored, tmp_path):
    prefcache("train", scored, *SOON)
    expected = weights(tmp_path / "runs/tiny/trained")
    for setting, message in (
        ("train.where=mragin > 0", "train.where (mragin > 0): there is no column 'mragin'; the nearest: margin"),
        ("train.where=exists(from '/etc/passwd')", "has a query of its own"),
        ("train.where=  ''", "train.where: expected a SQL expression"),
        ("train.weight=source", "is of type VARCHAR; expected a number"),
        ("train.order_by=random()", "random is not a function that expressions may call"),
    ):
        assert message in prefcache("train", scored, *SOON, "--set", setting, code=2).stderr
    assert weights(tmp_path / "runs/tiny/trained") == expected and not (tmp_path / "runs/tiny/trained-1").exists()
    assert "nothing to do" in prefcache("train", scored, *SOON).stderr


def test_choosing_nothing_ends_with_exit_code_3(prefcache, scored):
    done = prefcache("train", scored, *SOON, *options("train.where=n_chosen > 1000"), code=3)
    assert "chooses none of" in done.stderr and "Loosen it: n_chosen goes from" in done.stderr


def test_several_sources_are_mixed_by_weight(prefcache, model, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 20)
    write_pairs(tmp_path / "more.jsonl", 10, start=20)
    config = write_config(tmp_path, model, batch_size=100, epochs=1, samples=0)
    settings = options("prepare.data=[pairs.jsonl, more.jsonl]", "prepare.held_out=0")
    for stage in ("prepare", "score"):
        prefcache(stage, config, *settings)
    # Each source counts half, whatever its size.
    weigh = options("train.weight=1 / count(*) over (partition by source)")
    prefcache("train", config, *settings, *weigh)
    sources = {name: row["source"] for name, row in examples(tmp_path).items()}
    losses = dict.fromkeys(sources.values(), 0.0)
    for row in table(tmp_path / "runs/tiny/trained", "steps"):
        losses[sources[row["example_id"]]] += row["loss"]
    # All losses are ln 2 at the start: what is left is weights.
    assert len(losses) == 2 and list(losses.values()) == pytest.approx([15 * np.log(2)] * 2, rel=1e-4)
