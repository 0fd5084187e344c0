"""Read what the report shows of a training run, finished or not."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import numpy as np

from prefcache.pipeline.intervals import Estimate
from prefcache.pipeline.report.confidence_intervals import bootstrap, how_often_higher, mean, share
from prefcache.pipeline.schema import HELD_OUT, OWN_PROMPT, TRAIN
from prefcache.pipeline.stored.records import FileEntry, Provenance, RunManifest

PREFERRED = "chosen answer more likely than rejected"
_ROUNDING = 1e-4  # a mean margin below this is rounding, and its sign means nothing
_MOST_SAMPLES = 8
Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Sample:
    """The greedy answers to a prompt before and after the run. Kinds are those of train.kinds."""

    example_id: str
    prompt: str
    before: str
    after: str
    before_kind: str | None
    after_kind: str | None

    @property
    def is_own(self) -> bool:
        """Whether the prompt is of the user's own (train.samples_from)."""
        return self.example_id.startswith(OWN_PROMPT)


@dataclass(frozen=True)
class MovedAnswer:
    """An answer of a held-out example that the run moved most, token by token."""

    example_id: str
    gain: float
    answer: str
    tokens: Sequence[str]
    logps: Sequence[float | None]  # None: the token does not count
    ref_logps: Sequence[float | None] | None


@dataclass(frozen=True)
class Record:
    """The contents of a run's folder, except for its tables."""

    folder: Path
    provenance: Provenance
    config: str  # the whole of it, as YAML
    watched: bool  # train.alerts is not off
    manifest: RunManifest | None  # of a finished run
    parts: Mapping[str, Sequence[FileEntry]]  # of its tables, as listed in the manifest
    samples: Sequence[Sample] = ()
    tokens: Sequence[MovedAnswer] = ()

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Measured:
    """A measure on the evaluated examples of a split, before the first step and at the last evaluation."""

    name: str
    unit: str  # %: a share
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one split."""

    split: str  # held_out, or a set of prepare.held_out_data
    n: int  # examples
    step: int | None  # the last at which they were evaluated
    measured: list[Measured]


@dataclass(frozen=True)
class Token:
    text: str
    ratio: float | None  # policy minus reference, in nats; None also where the token does not count
    logp: float


@dataclass(frozen=True)
class MovedExample:
    """A held-out example that the run moved much."""

    example_id: str
    gain: float
    prompt: str
    answers: dict[str, list[Token]]


@dataclass(frozen=True)
class Alert:
    run: str
    step: int
    kind: str
    severity: str
    metric: str
    seen: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Run:
    record: Record
    step: int  # the last one
    series: dict[str, tuple[np.ndarray, np.ndarray]]  # steps and values, by metric
    alerts: list[Alert]
    evaluations: list[Evaluation]
    samples: list[Sample] = field(default_factory=list)
    moved: list[MovedExample] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def finished(self) -> bool:
        return self.record.manifest is not None

    @property
    def peak_memory(self) -> float | None:
        return float(self.series["peak_memory_bytes"][1].max()) if "peak_memory_bytes" in self.series else None

    @property
    def prompts(self) -> list[str]:
        """Those that the page shows."""
        return [*(each.prompt for each in self.samples), *(each.prompt for each in self.moved)]

    @property
    def shown(self) -> Evaluation:
        """The evaluation that the summary is about: of the held-out examples if there are any."""
        return self.evaluations[0]

    def find_evaluation(self, split: str) -> Evaluation | None:
        return next((each for each in self.evaluations if each.split == split), None)

    def find_measure(self, name: str, split: str | None = None) -> Measured | None:
        evaluation = self.find_evaluation(split) if split else self.shown
        return next((each for each in (evaluation.measured if evaluation else ()) if each.name == name), None)


def read(con: duckdb.DuckDBPyConnection, record: Record) -> Run:
    series = _read_series(con, record.name)
    evaluations = [_read_evaluation(con, record.name, split) for split in _evaluated_splits(con, record.name)]
    evaluations[0].measured[:0] = _measure_kinds(record.samples)
    alerts = con.execute(
        'select run, step, kind, severity, metric, seen, why, "try" from alerts where run = $run', {"run": record.name}
    )
    # All answers to prompts of the user's own; of the others, those whose kind changed come first, then other changed ones.
    samples = sorted(record.samples, key=lambda each: (each.before_kind == each.after_kind, each.before == each.after))
    own = [each for each in record.samples if each.is_own]
    samples = [*own, *(each for each in samples if not each.is_own)][: max(len(own), _MOST_SAMPLES)]
    return Run(
        record,
        int(max((steps[-1] for steps, _ in series.values() if len(steps)), default=0)),
        series,
        [Alert(*row) for row in alerts.fetchall()],
        evaluations,
        samples,
        _group_by_example(con, record.tokens),
    )


def _read_series(con: duckdb.DuckDBPyConnection, run: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read every metric and speed of the run, without the steps that lack it. Only evaluations include step 0."""
    series = {}
    for view in ("metrics", "throughput"):
        query = f"select * exclude (run) from {view} where run = $run order by step"
        table = con.execute(query, {"run": run}).fetchnumpy()
        steps = table.pop("step")
        for name, column in table.items():
            values = np.ma.filled(column.astype(np.float64), np.nan)
            present = ~np.isnan(values) & ((steps > 0) | name.startswith("eval_"))
            if present.any():
                series[name] = (np.asarray(steps[present], np.float64), values[present])
    return series


# -- measures on evaluated examples ----------------------------------------------------------------------------------


def _evaluated_splits(con: duckdb.DuckDBPyConnection, run: str) -> list[str]:
    """List the splits that the run evaluated, held_out first; held_out if it evaluated none."""
    query = "select distinct split from steps where run = $run and split <> $train order by split <> $held_out, split"
    rows = con.execute(query, {"run": run, "train": TRAIN, "held_out": HELD_OUT}).fetchall()
    return [split for (split,) in rows] or [HELD_OUT]


def _read_evaluation(con: duckdb.DuckDBPyConnection, run: str, split: str) -> Evaluation:
    before, after, step = _read_visits(con, run, split)
    measured = []
    if before:
        measured = _measure_labels(before, after) if "label" in before else _measure_pairs(before, after)
    return Evaluation(split, len(next(iter(before.values()), ())), step, measured)


def _read_visits(con: duckdb.DuckDBPyConnection, run: str, split: str) -> tuple[Columns, Columns, int | None]:
    """Read a split's examples before the first step and at the last evaluation, in the same order, and that step."""
    bound = {"run": run, "split": split}
    row = con.execute("select max(step) from steps where run = $run and split = $split", bound).fetchone()
    last = row[0] if row else None

    def read_at(step: int) -> Columns:
        table = con.execute(
            "select * exclude (run, split, step, epoch) from steps where run = $run and split = $split and step = $step "
            "order by example_id",
            {**bound, "step": step},
        ).fetchnumpy()
        return {name: np.ma.getdata(column) for name, column in table.items() if not np.ma.getmaskarray(column).all()}

    if last is None:
        return {}, {}, None
    return read_at(0), read_at(last) if last else {}, last or None


def _measure_pairs(before: Columns, after: Columns) -> list[Measured]:
    preferred = [visit["chosen_logp"] > visit["rejected_logp"] if visit else None for visit in (before, after)]
    correct = [
        visit["margin"] > 0 if visit and not _is_rounding(visit["margin"]) else None for visit in (before, after)
    ]
    return [
        _measure(PREFERRED, "%", share, *preferred),
        _measure("reward accuracy", "%", share, *correct),
        _measure_mean("reward margin", "", "margin", before, after),
        _measure_mean("loss", "", "loss", before, after),
        _measure_mean("log-prob of chosen answers", "nats", "chosen_logp", before, after),
        _measure_mean("log-prob of rejected answers", "nats", "rejected_logp", before, after),
    ]


def _is_rounding(margins: np.ndarray) -> bool:
    return bool(np.abs(margins).mean() < _ROUNDING)


def _measure_labels(before: Columns, after: Columns) -> list[Measured]:
    def difference(good: np.ndarray, bad: np.ndarray) -> Estimate:
        return bootstrap(lambda *drawn: float(drawn[0].mean() - drawn[1].mean()), good, bad)

    def compare(estimate: Callable[[np.ndarray, np.ndarray], Estimate], visit: Columns) -> Estimate | None:
        """Compare the rewards of desirable and undesirable answers, if there are both and any is not 0."""
        if not visit or _is_rounding(visit["completion_reward"]):
            return None
        is_good = visit["label"].astype(bool)
        good, bad = visit["completion_reward"][is_good], visit["completion_reward"][~is_good]
        return estimate(good, bad) if len(good) and len(bad) else None

    def select(visit: Columns, label: bool) -> Columns:
        return {name: values[visit["label"].astype(bool) == label] for name, values in visit.items()}

    return [
        Measured("reward accuracy", "%", compare(how_often_higher, before), compare(how_often_higher, after), None),
        Measured("reward margin", "", compare(difference, before), compare(difference, after), None),
        _measure_mean("loss", "", "loss", before, after),
        *(
            _measure_mean(
                f"log-prob of {name} answers", "nats", "completion_logp", select(before, label), select(after, label)
            )
            for name, label in (("desirable", True), ("undesirable", False))
        ),
    ]


def _measure_kinds(samples: Sequence[Sample]) -> list[Measured]:
    """Measure how many greedy answers are of each kind, if the config distinguishes kinds."""
    if not samples or samples[0].before_kind is None:
        return []
    measured = []
    for kind in ("preferred", "rejected"):
        old = np.array([sample.before_kind == kind for sample in samples])
        new = np.array([sample.after_kind == kind for sample in samples])
        measured.append(_measure(f"greedy answers of the {kind} kind", "%", share, old, new))
    return measured


def _measure_mean(name: str, unit: str, column: str, before: Columns, after: Columns) -> Measured:
    old, new = (visit[column] if column in visit and len(visit[column]) else None for visit in (before, after))
    return _measure(name, unit, mean, old, new)


def _measure(
    name: str, unit: str, estimate: Callable[[np.ndarray], Estimate], old: np.ndarray | None, new: np.ndarray | None
) -> Measured:
    """Measure before and after on the same examples in the same order, so that changes are paired."""
    change = mean(new.astype(float) - old) if old is not None and new is not None else None
    return Measured(name, unit, None if old is None else estimate(old), None if new is None else estimate(new), change)


# -- examples that moved most ----------------------------------------------------------------------------------------


def _group_by_example(con: duckdb.DuckDBPyConnection, answers: Iterable[MovedAnswer]) -> list[MovedExample]:
    ids = list(dict.fromkeys(answer.example_id for answer in answers))
    prompts = dict(
        con.execute(
            "select example_id, any_value(prompt) from examples where list_contains($ids, example_id) group by example_id",
            {"ids": ids},
        ).fetchall()
    )
    examples: dict[str, MovedExample] = {}
    for answer in answers:
        key = answer.example_id
        example = examples.setdefault(key, MovedExample(key, answer.gain, prompts.get(key, ""), {}))
        tokens, counts, logp, ratio = [], False, 0.0, 0.0
        references = answer.ref_logps or [None] * len(answer.logps)
        for text, policy, reference in zip(answer.tokens, answer.logps, references, strict=True):
            if policy is not None:
                counts, logp, ratio = True, logp + policy, ratio + policy - (reference or 0.0)
            # Tokens that hold parts of one character become one: only the last has its text.
            if text:
                tokens.append(Token(text, ratio if counts and answer.ref_logps else None, logp))
                counts, logp, ratio = False, 0.0, 0.0
        example.answers[answer.answer] = tokens
    return list(examples.values())
