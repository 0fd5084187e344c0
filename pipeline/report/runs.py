"""What the report says of a training run, finished or not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from pipeline.report.intervals import Estimate, bootstrap, how_often_higher, mean, share
from pipeline.schema import HELD_OUT

PREFERRED = "chosen answer more likely than rejected"
_NOTHING = 1e-4  # a margin of less is rounding, and there is nothing to be accurate about
_SAMPLES = 8
Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Record:
    """What lies in the folder of a run beside its tables."""

    folder: Path
    provenance: Mapping[str, Any]
    config: str  # all of it, as YAML
    settings: Mapping[str, Any]  # its section `train`
    manifest: Mapping[str, Any] | None  # of a finished run
    parts: Mapping[str, Sequence[Mapping[str, Any]]]  # of its tables, which the manifest vouches for
    samples: Sequence[Mapping[str, Any]] = ()
    tokens: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Measured:
    """A figure of the held-out examples, before the first step and at the last evaluation."""

    name: str
    unit: str  # %: a share
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None


@dataclass(frozen=True)
class Token:
    text: str
    ratio: float | None  # policy less reference, in nats
    logp: float


@dataclass(frozen=True)
class Shown:
    """A held-out example that the run moved much."""

    example_id: str
    gain: float
    prompt: str
    answers: dict[str, list[Token]]


@dataclass(frozen=True)
class Run:
    record: Record
    step: int  # the last one that was taken
    series: dict[str, tuple[np.ndarray, np.ndarray]]  # steps and values, by metric
    alerts: list[dict[str, Any]]
    held_out: int
    evaluated: int | None  # the step of the last evaluation
    measured: list[Measured]
    samples: list[Mapping[str, Any]] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def finished(self) -> bool:
        return self.record.manifest is not None

    @property
    def watched(self) -> bool:
        return bool(self.record.settings["alerts"] != "off")

    def of(self, name: str) -> Measured | None:
        return next((each for each in self.measured if each.name == name), None)


def read(con: duckdb.DuckDBPyConnection, record: Record) -> Run:
    series = _series(con, record.name)
    before, after, evaluated = _visits(con, record.name)
    kind = "labels" if "label" in before else "pairs"
    measured = _kinds(record.samples) + (_MEASURED[kind](before, after) if before else [])
    alerts = con.execute(
        'select step, kind, severity, metric, seen, why, "try" as remedy from alerts where run = $run',
        {"run": record.name},
    )
    return Run(
        record,
        int(max((steps[-1] for steps, _ in series.values() if len(steps)), default=0)),
        series,
        [dict(zip(_names(alerts), row, strict=True)) for row in alerts.fetchall()],
        len(next(iter(before.values()), ())),
        evaluated,
        measured,
        _most_changed(record.samples),
        _shown(con, record.tokens),
    )


def _names(found: duckdb.DuckDBPyConnection) -> list[str]:
    return [column[0] for column in found.description or []]


# -- along the run ---------------------------------------------------------------------------------------------------


def _series(con: duckdb.DuckDBPyConnection, run: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every metric of the run, and how fast its steps were, without the steps that lack it."""
    tables = [
        con.execute(f"select * exclude (run) from {view} where run = $run order by step", {"run": run}).fetchnumpy()
        for view in ("metrics", "throughput")
    ]
    found = {}
    for table in tables:
        steps = table.pop("step")
        for name, values in table.items():
            known = np.ma.filled(values.astype(np.float64), np.nan)
            there = ~np.isnan(known) & (steps > 0) | (name.startswith("eval_") & ~np.isnan(known))
            if there.any():
                found[name] = (np.asarray(steps[there], np.float64), known[there])
    return found


# -- on held-out examples --------------------------------------------------------------------------------------------


def _visits(
    con: duckdb.DuckDBPyConnection, run: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int | None]:
    """The held-out examples before the first step and at the last evaluation, in the same order, and that step."""
    at = {"run": run, "split": HELD_OUT}
    row = con.execute("select max(step) from steps where run = $run and split = $split", at).fetchone()
    last = row[0] if row else None
    if last is None:
        return {}, {}, None
    before, after = (
        con.execute(
            "select * exclude (run, split, step, epoch) from steps where run = $run and split = $split and step = $step "
            "order by example_id",
            {**at, "step": step},
        ).fetchnumpy()
        for step in (0, last)
    )
    return _there(before), _there(after) if last else {}, last or None


def _there(table: Columns) -> dict[str, np.ndarray]:
    """The columns that a run has, as plain arrays."""
    return {name: np.ma.getdata(values) for name, values in table.items() if not np.ma.getmaskarray(values).all()}


def _of_pairs(before: Columns, after: Columns) -> list[Measured]:
    def preferred(visit: Columns) -> np.ndarray:
        found: np.ndarray = visit["chosen_logp"] > visit["rejected_logp"]
        return found

    def right(visit: Columns) -> np.ndarray | None:
        return visit["margin"] > 0 if _says_something(visit["margin"]) else None

    return [
        _share(PREFERRED, preferred, before, after),
        _share("reward accuracy", right, before, after),
        _mean("reward margin", "", "margin", before, after),
        _mean("loss", "", "loss", before, after),
        _mean("log-prob of chosen answers", "nats", "chosen_logp", before, after),
        _mean("log-prob of rejected answers", "nats", "rejected_logp", before, after),
    ]


def _says_something(margins: np.ndarray) -> bool:
    return bool(np.abs(margins).mean() >= _NOTHING)


def _of_labels(before: Columns, after: Columns) -> list[Measured]:
    return [
        Measured("reward accuracy", "%", _between(how_often_higher, before), _between(how_often_higher, after), None),
        Measured("reward margin", "", _between(_apart, before), _between(_apart, after), None),
        _mean("loss", "", "loss", before, after),
        *(
            _mean(f"log-prob of {name} answers", "nats", "completion_logp", *_only(before, after, label))
            for name, label in (("desirable", True), ("undesirable", False))
        ),
    ]


def _between(estimate: Callable[[np.ndarray, np.ndarray], Estimate], visit: Columns) -> Estimate | None:
    """An estimate from the rewards of desirable and undesirable answers, where there are both and they are not all 0."""
    if not visit or not _says_something(visit["completion_reward"]):
        return None
    is_good = visit["label"].astype(bool)
    good, bad = visit["completion_reward"][is_good], visit["completion_reward"][~is_good]
    return estimate(good, bad) if len(good) and len(bad) else None


def _apart(good: np.ndarray, bad: np.ndarray) -> Estimate:
    return bootstrap(lambda *drawn: float(drawn[0].mean() - drawn[1].mean()), good, bad)


def _only(before: Columns, after: Columns, label: bool) -> tuple[Columns, Columns]:
    def of(visit: Columns) -> Columns:
        return {name: values[visit["label"].astype(bool) == label] for name, values in visit.items()}

    return of(before), of(after)


_MEASURED = {"pairs": _of_pairs, "labels": _of_labels}


def _share(name: str, of: Callable[[Columns], np.ndarray | None], before: Columns, after: Columns) -> Measured:
    return _paired(name, "%", share, of(before) if before else None, of(after) if after else None)


def _mean(name: str, unit: str, column: str, before: Columns, after: Columns) -> Measured:
    old, new = (visit[column] if column in visit and len(visit[column]) else None for visit in (before, after))
    return _paired(name, unit, mean, old, new)


def _paired(
    name: str,
    unit: str,
    estimate: Callable[[np.ndarray], Estimate],
    old: np.ndarray | None,
    new: np.ndarray | None,
) -> Measured:
    """Before and after, of the same examples in the same order, so that each changes by itself."""
    change = mean(new.astype(float) - old) if old is not None and new is not None else None
    return Measured(name, unit, None if old is None else estimate(old), None if new is None else estimate(new), change)


# -- answers ---------------------------------------------------------------------------------------------------------


def _kinds(samples: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """How many greedy answers are of which kind, where the config tells kinds apart."""
    if not samples or samples[0]["before_kind"] is None:
        return []
    found = []
    for kind in ("preferred", "rejected"):
        old, new = (np.array([each[f"{when}_kind"] == kind for each in samples]) for when in ("before", "after"))
        found.append(_paired(f"greedy answers of the {kind} kind", "%", share, old, new))
    return found


def _most_changed(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    def unchanged(sample: Mapping[str, Any]) -> tuple[bool, bool]:
        return sample["before_kind"] == sample["after_kind"], sample["before"] == sample["after"]

    return sorted(samples, key=unchanged)[:_SAMPLES]


def _shown(con: duckdb.DuckDBPyConnection, rows: Sequence[Mapping[str, Any]]) -> list[Shown]:
    ids = list(dict.fromkeys(row["example_id"] for row in rows))
    prompts = dict(
        con.execute(
            "select example_id, any_value(prompt) from examples where list_contains($ids, example_id) group by example_id",
            {"ids": ids},
        ).fetchall()
    )
    found: dict[str, Shown] = {}
    for row in rows:
        one = found.setdefault(
            row["example_id"], Shown(row["example_id"], row["gain"], prompts.get(row["example_id"], ""), {})
        )
        one.answers[row["answer"]] = _tokens(row)
    return list(found.values())


def _tokens(row: Mapping[str, Any]) -> list[Token]:
    """One for each piece of text: tokens that hold parts of one character are one."""
    found, logp, ratio = [], 0.0, 0.0
    reference = row["ref_logps"] or [None] * len(row["logps"])
    for text, own, of_reference in zip(row["tokens"], row["logps"], reference, strict=True):
        logp, ratio = logp + own, ratio + own - (of_reference or 0.0)
        if text:
            found.append(Token(text, ratio if row["ref_logps"] else None, logp))
            logp = ratio = 0.0
    return found
