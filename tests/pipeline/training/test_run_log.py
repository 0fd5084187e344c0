"""Metrics and log-probs of every step are on disk up to the last flush, and going back forgets what came after."""

import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.schema import EVENTS, METRICS, STEPS
from prefcache.pipeline.training.run_log import RunLog
from tests.helpers.runs import table


def visit(n: int) -> dict[str, list[float]]:
    return {
        name: [float(i) for i in range(n)]
        for name in ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp", "loss")
    }


def log_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.add_metrics({"step": step, "epoch": step / 10, "loss": 1 / step, "num_tokens": 10 * step})
        log.add_visit(step, step / 10, "train", [f"e{step}", f"e{step + 1}"], visit(2))
    log.flush(last)


def test_rows_are_written_in_parts_named_by_their_last_step(tmp_path):
    log = RunLog(tmp_path)
    log_steps(log, 1, 3)
    log_steps(log, 4, 5)
    for name, schema in (("metrics", METRICS), ("steps", STEPS)):
        parts = sorted((tmp_path / name).iterdir())
        assert [part.name for part in parts] == ["to-00000003.parquet", "to-00000005.parquet"]
        assert all(pq.read_schema(part).equals(schema) for part in parts)
    first, *others = table(tmp_path, "metrics")
    assert [row["step"] for row in others] == [2, 3, 4, 5]
    # What a row does not say is null.
    assert (first["loss"], first["num_tokens"], first["eval_loss"], first["grad_norm"]) == (1.0, 10, None, None)
    assert [(row["step"], row["example_id"]) for row in table(tmp_path, "steps")][:4] == [
        (1, "e1"),
        (1, "e2"),
        (2, "e2"),
        (2, "e3"),
    ]


def test_every_visit_keeps_its_values(tmp_path):
    log = RunLog(tmp_path)
    log.add_visit(3, 0.5, "held_out", ["a", "b"], visit(2) | {"chosen_logp": [-1.25, -1e300]})
    log.flush(3)
    first, second = table(tmp_path, "steps")
    assert first == {
        "step": 3,
        "epoch": 0.5,
        "split": "held_out",
        "example_id": "a",
        "chosen_logp": -1.25,
        "rejected_logp": 0.0,
        "ref_chosen_logp": 0.0,
        "ref_rejected_logp": 0.0,
        "completion_logp": None,
        "ref_completion_logp": None,
        "n_chosen_counted": None,
        "n_rejected_counted": None,
        "n_completion_counted": None,
        "label": None,
        "loss": 0.0,
    }
    assert second["chosen_logp"] == -1e300


def test_nothing_pending_writes_no_part(tmp_path):
    log = RunLog(tmp_path)
    log.flush(1)
    log_steps(log, 1, 2)
    log.flush(3)
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["to-00000002.parquet"]


def test_going_back_forgets_what_came_after_and_a_resumed_run_has_every_step_once(tmp_path):
    RunLog(tmp_path).discard_after(0)
    assert list(tmp_path.iterdir()) == []
    log = RunLog(tmp_path)
    for first in (1, 4, 7):
        log_steps(log, first, first + 2)
    resumed = RunLog(tmp_path)
    resumed.discard_after(6)
    for name in ("metrics", "steps"):
        assert sorted({row["step"] for row in table(tmp_path, name)}) == [1, 2, 3, 4, 5, 6]
    log_steps(resumed, 7, 11)
    assert [row["step"] for row in table(tmp_path, "metrics")] == list(range(1, 12))


def test_alerts_and_throughput_are_tables_like_the_others(tmp_path):
    log = RunLog(tmp_path)
    log.add_event({"step": 1, "kind": "kl", "value": 7.5, "try": "less"})
    log.flush(1)
    log.add_event({"step": 2, "kind": "kl", "value": float("nan")})
    log.add_throughput({"step": 2, "seconds": 0.25})
    log.flush(2)
    assert [row["step"] for row in RunLog(tmp_path).rows("events")] == [1, 2]
    assert next(log.rows("events")) == dict.fromkeys(EVENTS.names) | {
        "step": 1,
        "kind": "kl",
        "value": 7.5,
        "try": "less",
    }
    assert [row["seconds"] for row in log.rows("throughput")] == [0.25] and list(log.rows("metrics")) == []
    RunLog(tmp_path).discard_after(1)
    assert [row["step"] for row in log.rows("events")] == [1] and list(log.rows("throughput")) == []


def test_a_visit_of_another_length_than_its_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError):
        RunLog(tmp_path).add_visit(1, 0.1, "train", ["a", "b"], visit(3))


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_part_that_cannot_be_read_is_named_with_what_to_do(tmp_path, damage):
    log = RunLog(tmp_path)
    log_steps(log, 1, 3)
    log.refuse_damaged([("metrics", 3), ("steps", 3)])
    for name, asks in (("steps", lambda: log.visits(3, "train")), ("metrics", lambda: list(log.rows("metrics")))):
        part = tmp_path / name / "to-00000003.parquet"
        data = part.read_bytes()
        part.write_bytes(data[:-5]) if damage == "cut" else part.unlink()
        says = rf"{name}/to-00000003.parquet .*Delete {tmp_path} and train again"
        with pytest.raises(IntegrityError, match=says):
            log.refuse_damaged([(name, 3)])
        if damage == "cut" or name == "steps":
            with pytest.raises(IntegrityError, match=says):
                asks()
        part.write_bytes(data)
    with pytest.raises(IntegrityError, match="has lost the held_out examples of step 3"):
        log.visits(3, "held_out")
