"""Alerts: each fires on a series made by hand, none on a healthy one or on noise, and a resume changes nothing."""

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefcache.pipeline.schema import EVENTS
from prefcache.pipeline.stored.records import RunManifest
from prefcache.pipeline.training.alerts import ERROR, NOTE, WARNING, Alert, Watch, not_finite
from prefcache.pipeline.training.losses import LOSSES
from prefcache.pipeline.training.run_log import RunLog
from tests.helpers.project import invoke, options
from tests.helpers.runs import table

STEPS, WARMUP, BATCH = 200, 20, 32


def line(start: float, end: float):
    """A metric that goes from one value to another, after the warm-up."""
    return lambda step: start + (end - start) * max(0, step - WARMUP) / (STEPS - WARMUP)


# What a DPO run that goes well looks like; 50 tokens an answer, beta 0.1. Chosen answers get less likely, which is normal.
HEALTHY = {
    "loss": line(0.693, 0.3),
    "rewards/chosen": line(0, -1),
    "rewards/rejected": line(0, -4),
    "rewards/margins": line(0, 3),
    "rewards/accuracies": line(0.5, 0.9),
    "logps/chosen": line(-60, -70),
    "logps/rejected": line(-60, -100),
    "log_ratios/chosen": line(0, -0.2),
    "log_ratios/rejected": line(0, -0.8),
    "grad_norm": line(3, 1),
}
NOISE = {"loss": 0.03, "rewards/accuracies": 0.08, "logps/chosen": 3, "logps/rejected": 3, "grad_norm": 0.3}


def stretched(of, factor: float):
    return lambda step: of(step * factor)


def series(n: int = STEPS, noise: float = 1.0, seed: int = 0, **changed) -> list[dict]:
    """Rows of a run: the healthy one but for `changed`; None leaves a metric out."""
    dice = random.Random(seed)
    metrics = {name: value for name, value in (HEALTHY | changed).items() if value is not None}
    return [
        {"step": step, "epoch": step / n}
        | {name: of(step) + noise * dice.gauss(0, NOISE.get(name, 0.02)) for name, of in metrics.items()}
        for step in range(1, n + 1)
    ]


def watch(*losses: str, batch_size: int = BATCH, n_steps: int = STEPS, warmup: int = WARMUP) -> Watch:
    healthy = [sign for name in losses or ("sigmoid",) for sign in LOSSES[name].healthy]
    return Watch(healthy, n_steps=n_steps, batch_size=batch_size, warmup=warmup)


def raised(rows: list[dict], *losses: str, **shape) -> list[Alert]:
    watching = watch(*losses, **shape)
    return [alert for row in rows for alert in watching.feed(row)]


def kinds(*arguments, **shape) -> set[str]:
    return {alert.kind for alert in raised(*arguments, **shape)}


# -- each indicator --------------------------------------------------------------------------------------------------

TROUBLE = {
    "loss_rising": {"loss": lambda step: 0.693 - 0.003 * min(step, 100) + 0.004 * max(0, step - 100)},
    "loss_flat": {
        "loss": line(0.693, 0.693),
        "rewards/margins": line(0, 0),
        "rewards/accuracies": line(0.5, 0.5),
    },
    "rewards_identical": {name: lambda step: 0.0 for name in HEALTHY if name.startswith(("rewards", "log_ratios"))},
    "margins_negative": {"rewards/margins": line(0, -1)},
    "accuracy_low": {"rewards/accuracies": line(0.5, 0.2)},
    "rejected_rising": {"log_ratios/rejected": line(0, 0.5), "rewards/margins": line(0, 0)},
    "chosen_collapsing": {"log_ratios/chosen": line(0, -2)},
    "gradient_huge": {"grad_norm": line(150, 150)},
    "gradient_large": {"grad_norm": line(20, 20)},
    "gradient_small": {"grad_norm": lambda step: 0.001, "loss": line(0.693, 0.693)},
    "kl": {"log_ratios/rejected": line(0, -9)},
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_each_trouble_raises_its_alert_and_no_other(kind):
    rows = series(
        noise=0.1 if kind == "loss_flat" else 0.0 if kind in ("rewards_identical", "gradient_small") else 1.0,
        **TROUBLE[kind],
    )
    found = raised(rows)
    assert {alert.kind for alert in found} == {kind}
    first = found[0]
    assert first.severity == (NOTE if kind in ("gradient_large", "gradient_small") else WARNING)
    # What was seen, why it matters, what to try: sentences for a person, with the number in it.
    assert first.metric in rows[0] and f"{first.value:.4g}" in first.seen and "over 10 steps" in first.seen
    assert len(first.why) > 20 and len(first.remedy) > 20 and set(first.row) == set(EVENTS.names)


def test_a_loss_that_falls_by_next_to_nothing_is_flat():
    """A learning rate a thousand times too small: margins are right, and tiny."""
    tiny = {"loss": line(0.69315, 0.69310), "rewards/margins": line(0, 1e-4), "rewards/accuracies": lambda step: 1.0}
    assert kinds(series(noise=0.0, **tiny)) == {"loss_flat"}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("n", "noise"), [(10, 2.0), (30, 2.0), (STEPS, 1.0), (1000, 2.0)])
def test_a_healthy_run_of_any_length_raises_none(n, noise, seed):
    rows = series(n, noise, seed=seed, **{name: stretched(of, STEPS / n) for name, of in HEALTHY.items()})
    assert raised(rows, n_steps=n, warmup=n // 10) == []


@pytest.mark.parametrize("seed", range(10))
def test_noise_of_single_examples_is_no_alert(seed):
    """Steps of one pair: margins of either sign, an accuracy of 0 or 1. A window has 128 of them."""
    dice = random.Random(seed)
    rows = []
    for step in range(1, 601):
        margin = dice.gauss(step / 600, 3)
        chosen, rejected = dice.gauss(-80, 40), dice.gauss(-80, 40)
        rows.append(
            {
                "step": step,
                "loss": max(0.0, 0.7 - 0.2 * margin),
                "rewards/margins": margin,
                "grad_norm": dice.expovariate(0.3),
            }
            | {"rewards/accuracies": float(margin > 0), "logps/chosen": chosen, "logps/rejected": rejected}
            | {"rewards/chosen": margin / 2, "rewards/rejected": -margin / 2}
        )
    assert raised(rows, batch_size=1, n_steps=600, warmup=60) == []
    few = [row | {"rewards/margins": -5.0} for row in rows[:100]]
    assert raised(few, batch_size=1, n_steps=100, warmup=10) == []  # less than a window


def test_nothing_is_said_of_the_warm_up():
    rows = series(
        **{"rewards/margins": lambda step: -1.0 if step > 10 else 0.0, "rewards/accuracies": lambda step: 0.4}
    )
    assert min(alert.step for alert in raised(rows)) == WARMUP + 10  # the first window after it


def test_a_trouble_that_stays_is_said_once_in_a_fifth_of_the_run():
    rows = series(1000, **{"grad_norm": lambda step: 500.0})
    steps = [alert.step for alert in raised(rows, n_steps=1000) if alert.kind == "gradient_huge"]
    assert steps == [30, 230, 430, 630, 830]


def test_a_step_0_and_what_is_missing_or_null_say_nothing():
    rows = [{"step": 0, "loss": 50.0}, *({"step": step, "loss": None} for step in range(1, 50))]
    assert raised(rows) == []


# -- what is normal for a loss ---------------------------------------------------------------------------------------


def test_chosen_answers_that_get_less_likely_are_normal_where_the_loss_says_so():
    falling = series(**{"log_ratios/chosen": line(0, -0.4), "logps/chosen": line(-60, -80)})
    assert kinds(falling, "sigmoid") == kinds(falling, "ipo") == kinds(falling, "apo_down") == set()
    # dpop holds them, apo_zero and sft are to raise them; of several losses, the one that says more counts.
    for losses in (("dpop",), ("apo_zero",), ("sigmoid", "sft")):
        assert kinds(falling, *losses) == {"chosen_collapsing"}, losses


def test_rejected_answers_may_get_likelier_with_the_chosen_ones_unless_they_are_to_fall():
    both = series(**{"log_ratios/rejected": line(0, 0.3), "log_ratios/chosen": line(0, 0.6)})
    assert kinds(both, "sigmoid") == kinds(both, "orpo") == set()
    assert kinds(both, "apo_zero") == {"rejected_rising"}


def test_without_a_reference_there_is_no_divergence_and_margins_may_start_below_0():
    alone = {"log_ratios/chosen": None, "log_ratios/rejected": None}
    rows = series(**alone, **{"rewards/margins": line(-1, -0.2), "rewards/accuracies": line(0.2, 0.45)})
    assert kinds(rows, "simpo") == set()
    stuck = series(**alone, **{"rewards/margins": line(-1, -1), "rewards/accuracies": line(0.2, 0.2)})
    assert kinds(stuck, "simpo") == {"margins_negative", "accuracy_low"}
    # Without log-ratios it is the log-prob that tells of a collapse: twice as far from 0.
    assert kinds(series(**alone, **{"logps/chosen": line(-60, -200)}), "simpo") == {"chosen_collapsing"}


def test_a_loss_whose_margins_may_fall_says_nothing_of_them():
    rows = series(**{"rewards/margins": line(0, -0.1), "rewards/accuracies": line(0.5, 0.1)})
    assert kinds(rows, "discopop") == set()
    assert kinds(rows, "sigmoid") == {"margins_negative", "accuracy_low"}


def test_losses_on_larger_scales_have_larger_gradients():
    rows = series(**{"loss": line(25, 20), "grad_norm": line(100, 100)})  # ipo at beta 0.1 starts at 25: 36 times 0.693
    assert kinds(rows, "ipo") == set()
    assert kinds(series(**{"loss": line(25, 20), "grad_norm": lambda step: 5000.0}), "ipo") == {"gradient_huge"}


def test_a_loss_that_has_been_learned_has_no_gradient_left():
    rows = series(**{"loss": line(1, 0), "grad_norm": lambda step: max(0.0, 1 - step / 100)}, noise=0.1)
    assert kinds(rows, "hinge") == set()


def test_labels_have_alerts_of_their_own():
    rows = series(**{"kl": line(0, 300)})
    (alert, *_) = raised(rows, "kto")
    assert (alert.kind, alert.metric) == ("kl", "kl") and alert.value > 100 and "[-inf, 100]" in alert.seen
    assert kinds(rows, "apo_zero_unpaired") == set()  # which declares none
    # Batches without one of the kinds leave out what is about it: windows are of the rows that have it.
    gaps = [{name: value for name, value in row.items() if row["step"] % 3 or name == "step"} for row in rows]
    assert {alert.kind for alert in raised(gaps, "kto")} == {"kl"}


# -- resumed runs ----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, STEPS), st.sampled_from([*TROUBLE]), st.sampled_from([1, 8, 32]), st.integers(0, 5))
def test_fed_in_two_halves_equals_fed_at_once(tmp_path_factory, cut, kind, batch_size, seed):
    """As a resumed run does it: the rows before are read from Parquet, and what they raise was said already."""
    rows = series(seed=seed, **TROUBLE[kind])
    whole = raised(rows, batch_size=batch_size)
    folder = tmp_path_factory.mktemp("run")
    log = RunLog(folder)
    for row in rows[:cut]:
        log.add_metrics(row)
    log.flush(cut)
    resumed = watch(batch_size=batch_size)
    before = [alert for row in RunLog(folder).rows("metrics") for alert in resumed.feed(row)]
    after = [alert for row in rows[cut:] for alert in resumed.feed(row)]
    assert before + after == whole
    shutil.rmtree(folder)


# -- as a user runs it -----------------------------------------------------------------------------------------------

LONG = options("train.epochs=12", "train.samples=0", "train.checkpoint_every=25", "train.keep_checkpoints=9")
HOT = (*LONG, "--set", "train.learning_rate=0.3")


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "runs/tiny/trained"


@pytest.fixture(scope="module")
def hot_experiment(scored_once, tmp_path_factory) -> tuple[Path, str]:
    """An experiment whose run has far too high a learning rate, and what it printed."""
    folder = shutil.copytree(scored_once, tmp_path_factory.mktemp("hot") / "it")
    return folder, invoke(folder, "train", "config.yaml", *HOT).stderr


@pytest.fixture
def hot(hot_experiment, tmp_path) -> str:
    shutil.copytree(hot_experiment[0], tmp_path, dirs_exist_ok=True)
    return hot_experiment[1]


def sql(prefcache, query: str) -> list[dict]:
    return json.loads(prefcache("sql", query, "runs/tiny", "--json").stdout)


def test_a_healthy_run_says_that_there_were_none(prefcache, scored, run):
    done = prefcache("train", scored, *LONG)
    assert "no alerts" in done.stderr and "warning" not in done.stderr
    assert not (run / "events").exists()
    assert sql(prefcache, "select * from alerts") == []
    (row, *_) = sql(prefcache, "select * from throughput order by step")
    assert (row["run"], row["step"]) == ("trained", 1) and row["peak_memory_bytes"] > 1 << 20
    # 8 pairs a step, each with two answers of a few tokens after a prompt
    assert row["examples_per_second"] == pytest.approx(8 / row["seconds"])
    assert row["tokens_per_second"] > 16 * 5 / row["seconds"]


def test_a_learning_rate_that_is_far_too_high_raises_alerts_and_off_silences_them(prefcache, hot, run):
    found = sql(prefcache, "select * from alerts")
    assert found and found[0]["run"] == "trained"
    for alert in found:
        first, said = re.split("[,;] ", alert["try"])[0], f"warning: step {alert['step']}: {alert['seen']}. Try "
        assert f"{said}{first}\n" in hot
    assert f"{len(found)} alerts: " in hot and "select * from alerts" in hot
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["alerts"] == Counter(alert["kind"] for alert in found)
    # Watching changes nothing of what is computed.
    done = prefcache("train", "config.yaml", *HOT, *options("train.alerts=off", "train.run=unwatched"))
    assert "warning" not in done.stderr and "alerts" not in done.stderr
    unwatched = run.with_name("unwatched")
    assert table(run, "metrics") == table(unwatched, "metrics") and not (unwatched / "events").exists()


def test_strict_ends_with_exit_code_7_keeps_what_was_computed_and_goes_on_when_told_to(prefcache, hot, run):
    whole, strict = run.rename(run.with_name("whole")), [*HOT, "--set", "train.alerts=strict"]
    expected = table(whole, "events")
    first = next(event for event in expected if event["severity"] != NOTE)
    done = prefcache("train", "config.yaml", *strict, code=7)
    assert f"at step {first['step']}, {first['kind']}: {first['seen']}" in done.stderr
    assert "train.alerts=warn" in done.stderr
    assert (run / f"checkpoints/step-{first['step']:08}/manifest.json").exists()
    assert not (run / "manifest.json").exists()
    assert table(run, "events") == [event for event in expected if event["step"] <= first["step"]]
    # Again: nothing is trained. As a warning: it resumes, and ends as the run that nobody stopped.
    assert f"at step {first['step']}" in prefcache("train", "config.yaml", *strict, code=7).stderr
    assert f"resuming from step {first['step']}" in prefcache("train", "config.yaml", *HOT).stderr
    assert table(run, "events") == expected
    assert table(run, "metrics") == table(whole, "metrics")
    # A run that is finished has its alerts still.
    prefcache("train", "config.yaml", *strict, code=7)


def test_an_interrupted_run_writes_the_events_of_an_uninterrupted_one_and_a_lost_part_is_named(prefcache, hot, run):
    expected = table(run, "events")
    # As after a kill between the first two checkpoints.
    (run / "manifest.json").unlink()
    for folder in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    assert max(event["step"] for event in expected) > 25
    assert "resuming from step 25" in prefcache("train", "config.yaml", *HOT).stderr
    assert table(run, "events") == expected
    next((run / "events").iterdir()).unlink()
    for command in (["train", "config.yaml", *HOT], ["sql", "select 1 from alerts", "runs/tiny"]):
        assert "is missing. Delete runs/tiny/trained" in prefcache(*command, code=4).stderr


def test_a_step_that_is_not_finite_is_not_taken_and_its_batch_is_kept(prefcache, scored, run, tmp_path):
    settings = options("train.learning_rate=1e30", "train.warmup_ratio=0")
    done = prefcache("train", scored, *settings, code=4)
    (file,) = (run / "not-finite").iterdir()
    batch = pq.read_table(file).to_pylist()
    assert str(file.relative_to(tmp_path)) in done.stderr and batch[0]["example_id"] in done.stderr
    assert len(batch) == 8 and all(row["n_prompt"] > 0 and row["n_chosen_counted"] > 0 for row in batch)
    assert {"chosen_logp", "ref_chosen_logp", "rejected_logp", "loss"} <= set(batch[0])
    (event,) = [row for row in table(run, "events") if row["kind"] == "not_finite"]
    assert event["severity"] == ERROR and f"not-finite/{file.name}" in event["seen"]
    assert file.stem == f"step-{event['step']:08}" and f"Step {event['step']}" in done.stderr
    # The metrics of the steps before it are there, and trying again ends in the same way.
    assert [row["step"] for row in table(run, "metrics")] == list(range(event["step"]))
    prefcache("train", scored, *settings, code=4)
    assert [repr(row) for row in table(run, "events") if row["kind"] == "not_finite"] == [repr(event)]


def test_the_alert_of_a_value_that_is_not_finite_names_it():
    alert = not_finite(7, "grad_norm", float("inf"), "not-finite/step-00000007.parquet")
    assert "grad_norm is inf" in alert.seen and alert.severity == ERROR and "step 7: " in alert.line


def test_runs_of_an_earlier_version_have_no_alerts(prefcache, trained):
    manifest = RunManifest.find(trained).facts()
    del manifest["events"], manifest["throughput"]
    RunManifest.make(**manifest).commit(trained / "manifest.json")
    shutil.rmtree(trained / "throughput")
    for view in ("alerts", "throughput"):
        assert sql(prefcache, f"select * from {view}") == []


def test_labels_are_watched(prefcache, config):
    settings = options("prepare.examples=labels", "train.loss=kto")
    for stage in ("prepare", "score"):
        prefcache(stage, config, *settings)
    assert "alerts: " in prefcache("train", config, *settings, *HOT).stderr
