"""What each command returns: one frozen record per command, printed for a person (terminal_output) or as JSON (`to_json`).

They stand apart from the stages so that printing a result loads no stage, and so no PyTorch.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from prefcache.pipeline.stored.cache_maintenance import CollectedCache, VerifiedCache
from prefcache.pipeline.stored.freshness import Difference
from prefcache.pipeline.stored.records import Entry, Parity, RunManifest, StoppedEntry
from prefcache.pipeline.training.removable import LeftAlone, Removable
from prefcache.pipeline.training.run_summary import RunSummary
from prefcache.pipeline.visible_text import visible_json

_OMIT_NONE, _FLATTEN = {"omit_none": True}, {"flatten": True}


def _optional() -> Any:
    """A field that JSON lacks where it is None."""
    return field(default=None, metadata=_OMIT_NONE)


def to_json(result: Any) -> str:
    """Write a result as `--json` prints it, with invisible characters escaped."""
    return visible_json(json.dumps(_to_plain(result), indent=1, ensure_ascii=False))


def _to_plain(value: Any) -> Any:
    if isinstance(value, Entry):
        return value.facts()
    if is_dataclass(value):
        plain: dict[str, Any] = {}
        for each in fields(value):
            part = getattr(value, each.name)
            if each.metadata == _FLATTEN:
                plain |= _to_plain(part)
            elif part is not None or each.metadata != _OMIT_NONE:
                plain[each.name] = _to_plain(part)
        return plain
    if isinstance(value, Mapping):
        return {key: _to_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(part) for part in value]
    if isinstance(value, datetime.datetime):
        return value.isoformat(timespec="seconds")
    return str(value) if isinstance(value, Path) else value


# -- from data to a model --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    prepared: Path
    changed: bool
    kind: str
    records: int
    train: int
    held_out: int
    evaluation: dict[str, int]  # by set of prepare.held_out_data
    further: int
    quarantined: dict[str, int]
    boundaries: dict[str, int]
    done: dict[str, int]
    date: str | None


@dataclass(frozen=True, kw_only=True)
class PrepareWaiting:
    """This process's share is finished; other processes still work on theirs."""

    prepared: Path
    waiting: Literal[True] = True
    parts: int
    finished: int


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    cache: str
    sequences: int
    cached_before: int
    scored: int  # by this command
    tokens: int  # of these
    scored_by_others: int  # meanwhile, by other scorers of the same cache
    failed: int
    parity: Parity | None
    cut_from_longer: int | None = _optional()
    changed: bool


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """What `score --dry-run` would do."""

    dry_run: Literal[True] = True
    cache: str
    sequences: int
    cached_before: int
    to_score: int
    cut_from_longer: int
    tokens: int
    bytes: int
    other_numerics: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    manifest: RunManifest = field(metadata=_FLATTEN)
    run: Path
    changed: bool

    @property
    def steps(self) -> int:
        return self.manifest.steps

    @property
    def stopped(self) -> StoppedEntry | None:
        """Where a callback stopped the run."""
        return self.manifest.stopped

    @property
    def evaluation(self) -> dict[str, float]:
        """The metrics of the held-out examples after training."""
        return self.manifest.after.evaluation

    @property
    def model(self) -> Path:
        return self.run / "model"

    def __repr__(self) -> str:
        # The manifest lists every file of the run.
        metrics = ", ".join(f"{name!r}: {value:.4g}" for name, value in self.evaluation.items())
        ended = f", stopped={self.stopped.describe()!r}" if self.stopped else ""
        return f"TrainResult(run={str(self.run)!r}, changed={self.changed}, steps={self.steps}{ended}, evaluation={{{metrics}}})"


@dataclass(frozen=True)
class GpuFit:
    """How many tokens a micro-batch may have on GPUs of this memory; 0 if none."""

    gpu: str | None  # the name of this machine's; None for any GPU of the size
    memory_bytes: int
    tokens: int


@dataclass(frozen=True)
class Saving:
    """Settings that make a step smaller, and its peak with them."""

    settings: Sequence[str]  # for --set
    added: Sequence[str]  # those of them that the suggestion before lacks
    processes: int
    tokens: int  # of a micro-batch
    peak_bytes: int
    fits_gb: int | None  # the smallest common GPU that suffices


@dataclass(frozen=True)
class Duration:
    """How long a run takes by its arithmetic and traffic."""

    gpu: str
    at_least_seconds: float  # by the makers' rates
    mfu: float  # assumed
    seconds: float  # at this share of the peak


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What `train --dry-run` expects of a run. Nothing of it is measured."""

    dry_run: Literal[True] = True
    run: Path
    model: str
    parameters: int
    trained_parameters: int
    loss: str
    kind: str
    examples: int
    steps: int
    batch_size: int
    layout: str
    processes: int
    longest: int  # tokens of an example in a forward
    tokens_per_step: int
    micro_batches_per_step: float
    micro_batch_tokens: int  # of the largest
    memory: dict[str, int]  # of one process at its peak, by part
    peak_bytes: int
    fits: Sequence[GpuFit]
    most_tokens: int  # up to which `fits` counts
    savings: Sequence[Saving]
    flops: float
    flops_without_gradients: dict[str, float]  # by what the forwards are for
    duration: Duration | None
    notes: Sequence[str]


@dataclass(frozen=True)
class SweepResult:
    runs: Sequence[TrainResult]


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """Deviations of the merged model from its adapter, and the adapter's own effect, in nats per token."""

    adapter: Path
    base: Path
    output: Path
    dtype: str
    compared: int
    largest: float
    mean: float
    effect: float


@dataclass(frozen=True, kw_only=True)
class PushResult:
    run: Path
    hub: str
    url: str
    commit: str
    files: int


@dataclass(frozen=True, kw_only=True)
class UploadResult:
    prepared: Path
    url: str
    files: int
    bytes: int  # of all files but the manifest
    sent: int  # bytes that the store lacked


@dataclass(frozen=True, kw_only=True)
class DownloadResult:
    prepared: Path
    url: str
    kind: str
    examples: int
    received: int  # bytes that were not here


@dataclass(frozen=True)
class RunsResult:
    folder: Path
    runs: Sequence[RunSummary]


@dataclass(frozen=True, kw_only=True)
class CleanResult:
    folder: Path
    removed: bool  # False: `items` would be removed with --yes
    bytes: int  # of items
    items: Sequence[Removable]
    optional: Sequence[Removable]  # removed only if their kind is named
    left_alone: Sequence[LeftAlone]
    failed: Mapping[str, str]  # paths that could not be removed, and why


# -- what is in it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreviewToken:
    id: int
    text: str
    special: bool
    cut: bool
    counts: bool  # in losses and statistics (prepare.train_on); none of a prompt does


@dataclass(frozen=True, kw_only=True)
class PreviewPart:
    name: str
    n_tokens: int
    n_counted: int
    n_cut: int
    tokens: Sequence[PreviewToken]
    cut_turns: str | None = _optional()  # of a prompt: the text of the turns that truncation removed


@dataclass(frozen=True, kw_only=True)
class PreviewExample:
    source: str
    line: int
    label: bool | None = _optional()
    boundary: Literal["exact", "split"]
    plain_text: bool  # put into the chat template as one turn
    cut_prompt: int
    parts: Sequence[PreviewPart]


@dataclass(frozen=True, kw_only=True)
class PreviewUnusable:
    """A record that would go to quarantine."""

    source: str
    line: int
    reason: str
    detail: str | None


@dataclass(frozen=True, kw_only=True)
class PreviewResult:
    kind: str
    formats: dict[str, str]
    date: str | None
    examples: Sequence[PreviewExample | PreviewUnusable]


@dataclass(frozen=True)
class ShowToken:
    """A token and its log-probs; None for a model that is missing."""

    id: int
    text: str
    policy: float | None
    reference: float | None
    log_ratio: float | None
    counts: bool  # in losses and statistics (prepare.train_on)


@dataclass(frozen=True, kw_only=True)
class ShowAnswer:
    name: str
    n_tokens: int
    n_counted: int
    policy_sum: float | None  # this and the next two: of the tokens that count
    reference_sum: float | None
    log_ratio_sum: float | None
    tokens: Sequence[ShowToken]


@dataclass(frozen=True, kw_only=True)
class ShowResult:
    example_id: str
    split: str
    source: str
    line: int
    prompt: str
    label: bool | None
    run: Path | None  # None: the run has no model yet
    scored: bool
    answers: Sequence[ShowAnswer]


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    report: Path
    runs: Sequence[str]
    bytes: int


# -- the cache -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    output: Path
    cache: str
    rows: int
    scored: int
    without: dict[str, int]  # status -> rows that lack a log-prob
    columns: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class TrlExportResult:
    output: Path
    cache: str
    rows: int
    left_out: dict[str, int]  # reason -> examples of which TRL would make other ids
    first: dict[str, str]  # reason -> the first of them
    quarantined: dict[str, int]
    columns: Sequence[str]
    settings: dict[str, Any]  # of TRL's config, under which it makes the ids that were scored
    chat_template: str | None  # the file that TRL's tokenizer needs as its template; None: it has its own
    kl_scored: int | None  # rows whose mismatched answer, as KTOTrainer makes it, is scored; None: none was prepared


@dataclass(frozen=True)
class ScoreFilesResult:
    """The three steps of `score --input`."""

    prepared: PrepareResult | PrepareWaiting
    scored: ScoreResult | ScorePlan
    exported: ExportResult


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    cache: str
    imported: int
    with_tokens: int
    left: int
    numerics_id: str
    numerics: dict[str, str]
    parity: Parity | None
    use: str
    refused: dict[str, int]


@dataclass(frozen=True)
class Quantiles:
    p50: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, kw_only=True)
class Deviations:
    """How far two sides are apart, in nats. Tokens without a finite value on both sides are counted apart."""

    sequences: int
    tokens: int
    not_finite: int
    token: Quantiles
    sequence: Quantiles
    bias: float | None


@dataclass(frozen=True)
class Margins:
    """Examples with both answers in the sample, and how many of their margins change sign."""

    pairs: int
    flipped: int


@dataclass(frozen=True, kw_only=True)
class WorstToken:
    example_id: str
    answer: str
    position: int
    token: str
    a: float
    b: float


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    a: str
    b: str
    numerics: Sequence[dict[str, Any]]
    deviations: Deviations = field(metadata=_FLATTEN)
    margins: Margins = field(metadata=_FLATTEN)
    worst: Sequence[WorstToken]


@dataclass(frozen=True)
class VerifyResult:
    caches: Sequence[VerifiedCache]
    damaged: int


@dataclass(frozen=True)
class GcResult:
    caches: Sequence[CollectedCache]
    damaged: int
    dry_run: bool


@dataclass(frozen=True, kw_only=True)
class SignedCache:
    """How many shards of a reference's cache were signed, and how many this key had signed before."""

    folder: Path
    place: str  # as people know it: the folder, or its URL
    signed: int
    already: int


@dataclass(frozen=True, kw_only=True)
class SignResult:
    key: str
    caches: Sequence[SignedCache]


@dataclass(frozen=True, kw_only=True)
class PublishPlan:
    """What `publish` sends."""

    dry_run: bool
    hub: str
    rows: int
    shards: int
    rewritten: int  # shards that had rows of other data, too
    bytes: int
    files: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class PublishResult:
    plan: PublishPlan = field(metadata=_FLATTEN)
    url: str
    commit: str


@dataclass(frozen=True, kw_only=True)
class FetchPlan:
    """What `fetch` takes from a source."""

    dry_run: bool
    source: str
    cache: str
    needed: int  # sequences that the cache lacked
    rows: int  # of those, what the source has
    shards: int
    bytes: int  # of these shards
    numerics: dict[str, int]  # rows of each
    signers: Sequence[str] | None = _optional()


@dataclass(frozen=True, kw_only=True)
class FetchResult:
    plan: FetchPlan = field(metadata=_FLATTEN)
    compared: int  # sequences, with the plain float32 forward of the user's own model
    deviation: float | None  # the largest, in nats per token
    use: str | None  # the setting with which `score` uses rows of these numerics; None: it does anyway


@dataclass(frozen=True)
class ConvertResult:
    """A config made from another program's settings; each key of these is in one of the other three."""

    config: Mapping[str, Any]
    became: Mapping[str, str]
    ignored: Mapping[str, str]
    differs: Mapping[str, str]
    output: Path | None = None  # the file that the config was written to

    def config_text(self) -> str:
        import yaml

        return str(yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))


# -- the machine -----------------------------------------------------------------------------------------------------


State = Literal["ok", "absent", "problem"]


@dataclass(frozen=True)
class Finding:
    """What doctor found; `absent` marks what is missing and optional."""

    area: str
    state: State
    what: str
    remedy: str | None = None


@dataclass(frozen=True)
class Why:
    """Whether a preparation, a scoring, the rows of a cache or a run is up to date, and what differs if it is not."""

    what: str
    fresh: bool
    sentence: str
    differences: Sequence[Difference] = ()


@dataclass(frozen=True)
class DoctorResult:
    findings: Sequence[Finding]
    problems: int
    why: Sequence[Why] | None = _optional()  # asked for by --why
