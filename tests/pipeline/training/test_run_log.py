"""Metrics and log-probs of every step are on disk up to the last flush, and going back forgets what came after."""

import pyarrow.parquet as pq
import pytest

from pipeline.schema import EVENTS, METRICS, STEPS
from pipeline.training.runlog import RunLog


def visit(n: int) -> dict[str, list[float]]:
    return {
        name: [float(i) for i in range(n)]
        for name in ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp", "loss")
    }


def log_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.metrics({"step": step, "epoch": step / 10, "loss": 1 / step, "num_tokens": 10 * step})
        log.visit(step, step / 10, "train", [f"e{step}", f"e{step + 1}"], visit(2))
    log.flush(last)


def read(folder, table: str):
    return [row for part in sorted((folder / table).glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def test_rows_are_written_in_parts_named_by_their_last_step(tmp_path):
    log = RunLog(tmp_path)
    log_steps(log, 1, 3)
    log_steps(log, 4, 5)
    for table, schema in (("metrics", METRICS), ("steps", STEPS)):
        parts = sorted((tmp_path / table).iterdir())
        assert [part.name for part in parts] == ["to-00000003.parquet", "to-00000005.parquet"]
        assert all(pq.read_schema(part).equals(schema) for part in parts)
    assert [row["step"] for row in read(tmp_path, "metrics")] == [1, 2, 3, 4, 5]
    assert [(row["step"], row["example_id"]) for row in read(tmp_path, "steps")][:4] == [
        (1, "e1"),
        (1, "e2"),
        (2, "e2"),
        (2, "e3"),
    ]


def test_what_a_row_does_not_say_is_null(tmp_path):
    log_steps(RunLog(tmp_path), 1, 1)
    (row,) = read(tmp_path, "metrics")
    assert (row["loss"], row["num_tokens"], row["eval_loss"], row["grad_norm"]) == (1.0, 10, None, None)


def test_every_visit_keeps_its_values(tmp_path):
    log = RunLog(tmp_path)
    log.visit(3, 0.5, "held_out", ["a", "b"], visit(2) | {"chosen_logp": [-1.25, -1e300]})
    log.flush(3)
    first, second = read(tmp_path, "steps")
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
        "n_chosen": None,
        "n_rejected": None,
        "n_completion": None,
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


def test_going_back_forgets_what_came_after(tmp_path):
    log = RunLog(tmp_path)
    for first in (1, 4, 7):
        log_steps(log, first, first + 2)
    RunLog(tmp_path).go_back(6)
    for table in ("metrics", "steps"):
        assert sorted({row["step"] for row in read(tmp_path, table)}) == [1, 2, 3, 4, 5, 6]


def test_alerts_and_throughput_are_tables_like_the_others(tmp_path):
    log = RunLog(tmp_path)
    log.event({"step": 1, "kind": "kl", "value": 7.5, "try": "less"})
    log.flush(1)
    log.event({"step": 2, "kind": "kl", "value": float("nan")})
    log.throughput({"step": 2, "seconds": 0.25})
    log.flush(2)
    assert [row["step"] for row in RunLog(tmp_path).rows("events")] == [1, 2]
    assert next(log.rows("events")) == dict.fromkeys(EVENTS.names) | {
        "step": 1,
        "kind": "kl",
        "value": 7.5,
        "try": "less",
    }
    assert [row["seconds"] for row in log.rows("throughput")] == [0.25] and list(log.rows("metrics")) == []
    RunLog(tmp_path).go_back(1)
    assert [row["step"] for row in log.rows("events")] == [1] and list(log.rows("throughput")) == []


def test_a_resumed_run_has_every_step_once(tmp_path):
    log = RunLog(tmp_path)
    log_steps(log, 1, 3)
    log_steps(log, 4, 6)
    resumed = RunLog(tmp_path)
    resumed.go_back(3)
    log_steps(resumed, 4, 8)
    assert [row["step"] for row in read(tmp_path, "metrics")] == list(range(1, 9))


def test_going_back_where_nothing_was_written_is_nothing(tmp_path):
    RunLog(tmp_path).go_back(0)
    assert list(tmp_path.iterdir()) == []


def test_a_visit_of_another_length_than_its_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError):
        RunLog(tmp_path).visit(1, 0.1, "train", ["a", "b"], visit(3))
