"""What is stored as JSON, as typed records: one class per kind of file, parsed here and nowhere else.

A checksum shows that a file was not damaged; it does not show who wrote it. So a record is also checked for its
version, its types and bounds, and every file that it names is a bare name inside the record's own folder.

Fields with a default are those that older versions did not write. A new field needs one, or a higher version.
"""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from prefcache.pipeline import identity, stored_paths
from prefcache.pipeline.errors import IntegrityError, first_complaint
from prefcache.pipeline.schema import CACHE_VERSION, HELD_OUT, TRAIN
from prefcache.pipeline.stored import artifact

_MOST = 1 << 60
_KEY_BYTES = 16  # of a row, which do not compress: keys are hashes


class MalformedError(IntegrityError):
    """A file with a valid seal that this prefcache would not have written: planted, or of a newer version.

    Unlike a damaged file, it is never deleted by the program.
    """


class NewerError(MalformedError):
    """A file that a newer prefcache wrote."""


def _refuse_path(name: str) -> str:
    if not stored_paths.is_bare(name):
        raise ValueError("expected the name of a file in the same folder, without a path")
    return name


def _require_path(path: str) -> str:
    parts = path.encode(errors="replace").split(b"/")
    if not path or re.search(r"[\x00-\x1f]", path) or len(path) > 4000 or max(map(len, parts)) > 255:
        raise ValueError("expected a path")
    return path


BareName = Annotated[str, AfterValidator(_refuse_path), Field(max_length=255)]
StoredPath = Annotated[str, AfterValidator(_require_path)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Signed = Annotated[int, Field(ge=-_MOST, le=_MOST)]
Step = Annotated[int, Field(ge=0, lt=10**8)]  # a checkpoint's name has eight digits
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ModelId = Annotated[str, Field(pattern=r"^[0-9a-f]{32,64}$")]
Numerics = dict[str, str]
# A shard of the cache and its record. Files of other names in a cache's folder are not prefcache's.
_SHARD_NAME = r"(merged-)?[0-9a-f]{32}"
SHARD_FILE = re.compile(rf"{_SHARD_NAME}-[0-9a-f]{{8}}\.parquet")
SHARD_RECORD_FILE = re.compile(rf"{_SHARD_NAME}\.json")
STATEMENT_FILE = re.compile(r"signed-[0-9a-f]{32}\.json")


def is_cache_file(name: str) -> bool:
    """Whether this is the name of a shard, of its record, or of a signed statement."""
    names = (SHARD_FILE, SHARD_RECORD_FILE, STATEMENT_FILE)
    return any(pattern.fullmatch(name.removesuffix(".sig")) for pattern in names)


Tree = dict[str, Any]  # settings and the like: compared key by key and shown


class Entry(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=True)

    def facts(self) -> Tree:
        """Return plain data, to be printed or compared."""
        return self.model_dump(mode="json", exclude_unset=True)


class StoredRecord(Entry):
    """A JSON file that prefcache wrote. Files from before there was a version count as version 1."""

    newest_version: ClassVar[int] = 1

    schema_version: Annotated[int, Field(ge=1)] = 1

    @classmethod
    def make(cls, **content: Any) -> Self:
        """Build a record to be written, validated as it will be when it is read. Its parts are entries or plain data."""
        return cls.model_validate_json(_json({"schema_version": cls.newest_version, **content}))

    @classmethod
    def read(cls, path: Path, remedy: str = "") -> Self:
        """Parse a sealed file; IntegrityError, with the remedy, if it is damaged, malformed or too new."""
        record = cls.parse(artifact.unseal(path, remedy), path, remedy)
        if (reason := record.why_misplaced(path)) is not None:
            raise IntegrityError(f"{path} {reason}. {remedy}".strip())
        return record

    @classmethod
    def read_bytes(cls, data: bytes, path: Path, remedy: str = "") -> Self:
        """Parse the content of a sealed file, whose path only says in errors where it came from."""
        return cls.parse(artifact.unseal_bytes(data, path, remedy), path, remedy)

    @classmethod
    def parse(cls, content: Any, path: Path, remedy: str = "") -> Self:
        """Turn parsed JSON into the record; `path` names its origin in errors."""
        cls.refuse_newer(content, path)
        try:
            return cls.model_validate_json(_json(content))
        except (ValueError, RecursionError) as error:
            if isinstance(error, ValidationError):
                reason = f": {first_complaint(error)}"
            else:
                reason = f" ({' '.join(str(error).split())[:200]})"
            raise MalformedError(f"{path} is not a valid record{reason}. {remedy}".strip()) from None

    @classmethod
    def refuse_newer(cls, content: Any, path: Path) -> None:
        """NewerError if a newer prefcache wrote this parsed JSON."""
        version = content.get("schema_version", 1) if isinstance(content, dict) else 1
        if type(version) is int and version > cls.newest_version:
            raise NewerError(
                f"{path} has schema version {version}; this prefcache reads up to {cls.newest_version}. "
                "Upgrade prefcache, or use another folder."
            )

    def why_misplaced(self, path: Path) -> str | None:
        """Why the record cannot belong at this path; None if it can."""
        return None

    def seal(self) -> bytes:
        return artifact.seal(self.model_dump(mode="json", exclude_unset=True))

    def commit(self, path: Path, *, once: bool = False, durable: bool = True) -> bool:
        return artifact.commit_bytes(path, self.seal(), once=once, durable=durable)

    def facts(self) -> Tree:
        return self.model_dump(mode="json", exclude_unset=True, exclude={"schema_version"})


def _json(content: Any) -> bytes:
    # Keep the order of keys: that of a mixture's losses, for example, is shown to people.
    return json.dumps(content, ensure_ascii=False, default=_to_facts).encode()


def _to_facts(entry: Any) -> Tree:
    assert isinstance(entry, Entry), f"a record has no place for {type(entry).__name__}"
    return entry.facts()


class Manifest(StoredRecord):
    """The last file of a finished stage or checkpoint."""

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """Read the manifest of a folder; None if its stage has not finished."""
        path = folder / artifact.MANIFEST
        return cls.read(path, f"Delete {path} and run the stage again.") if path.exists() else None


# -- files -----------------------------------------------------------------------------------------------------------


class FileEntry(Entry):
    """A file that a record vouches for: its name in the record's folder, its size and checksum."""

    file: BareName
    bytes: Count
    xxh3_128: Checksum


class TableEntry(FileEntry):
    rows: Count


# -- the cache -------------------------------------------------------------------------------------------------------


class Parity(Entry):
    """How far a sample deviates from the plain float32 forward, in nats per token."""

    sequences: Count = 0
    of: str | None = None  # what was compared; tokens by default
    p50: float = math.nan
    p99: float = math.nan
    max: float


class BlockEntry(Entry):
    """A part of a shard's file that can be read and verified alone."""

    bytes: Annotated[int, Field(ge=1, le=_MOST)]
    xxh3_128: Checksum


class ShardRecord(StoredRecord):
    """The commit record of a shard of the cache, without which the shard does not exist."""

    newest_version: ClassVar[int] = CACHE_VERSION

    file: Annotated[str, Field(pattern=rf"^{SHARD_FILE.pattern}$")]
    bytes: Count
    xxh3_128: Checksum
    rows: Annotated[int, Field(ge=1, le=_MOST)]
    numerics_id: str
    numerics: Numerics
    parity: Parity | None = None
    generation: Annotated[int, Field(ge=0, le=1 << 31)] = 0  # 0: by a scorer; one more at each merging
    values_xxh3_128: Annotated[str, Field(pattern=r"^[0-9a-f]{32}-[0-9a-f]{32}$")] | None = None
    blocks: list[BlockEntry] | None = None  # of the file, in order; those with an odd number hold log-probs of tokens

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if identity.numerics_id(self.numerics) != self.numerics_id:
            raise ValueError(f"numerics_id {self.numerics_id[:40]!r} is not the hash of its numerics")
        if self.rows * _KEY_BYTES > self.bytes:
            raise ValueError(f"{self.rows} rows do not fit into {self.bytes} bytes")
        if self.blocks is not None and sum(block.bytes for block in self.blocks) != self.bytes:
            raise ValueError("its blocks are not as long as its file")
        return self

    @property
    def checks_values(self) -> bool:
        """Whether reading the shard shows what has rotted since it was hashed."""
        return self.values_xxh3_128 is not None

    @property
    def name(self) -> str:
        """The name of the record's own file."""
        return f"{self.file.rpartition('-')[0]}.json"

    def why_misplaced(self, path: Path) -> str | None:
        return None if path.name == self.name else f"names {self.file}, whose record is {self.name}"


REFERENCE_FILE = "reference.json"


class ReferenceRecord(StoredRecord):
    """Whose log-probs a cache holds. Further fields tell a person what the id was made from."""

    model_config = ConfigDict(extra="allow")
    newest_version: ClassVar[int] = CACHE_VERSION

    name: Annotated[str, Field(min_length=1)]
    model_id: ModelId


class SignedRecord(Entry):
    """A record of a shard, and what it and its shard were when somebody signed them."""

    record: Annotated[str, Field(pattern=rf"^{SHARD_RECORD_FILE.pattern}$")]
    sha256: Sha256
    shard_sha256: Sha256


class Statement(StoredRecord):
    """What the owner of a key vouches for: shards of one reference. Its signature is a file next to it (signatures.py)."""

    name: Annotated[str, Field(min_length=1)]
    model_id: ModelId
    key: Annotated[str, Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")]
    records: Annotated[list[SignedRecord], Field(min_length=1)]

    def why_misplaced(self, path: Path) -> str | None:
        return None if STATEMENT_FILE.fullmatch(path.name) else "is not the name of a statement"


class RemovalRecord(StoredRecord):
    """The shards that gc is about to remove."""

    files: list[BareName]


class StoreRecord(StoredRecord):
    """Which object store a folder mirrors."""

    url: Annotated[str, Field(min_length=1, max_length=2000)]


# -- features of pictures --------------------------------------------------------------------------------------------

FEATURES_FILE = re.compile(r"[0-9a-f]{32}-[0-9a-f]{8}\.arrow")


class TowerRecord(StoredRecord):
    """Whose features a store holds, and how they were computed."""

    name: Annotated[str, Field(min_length=1)]
    tower_id: ModelId
    numerics: Numerics

    @property
    def dtype(self) -> str:
        return self.numerics.get("dtype", "")


class FeaturesRecord(StoredRecord):
    """The commit record of a shard of features, without which the shard does not exist."""

    file: Annotated[str, Field(pattern=rf"^{FEATURES_FILE.pattern}$")]
    bytes: Count
    xxh3_128: Checksum
    rows: Annotated[int, Field(ge=1, le=_MOST)]

    checks_values: ClassVar[bool] = True  # a checksum in each row

    @property
    def name(self) -> str:
        """The name of the record's own file."""
        return f"{self.file.rpartition('-')[0]}.json"

    def why_misplaced(self, path: Path) -> str | None:
        return None if path.name == self.name else f"names {self.file}, whose record is {self.name}"


# -- a preparation ---------------------------------------------------------------------------------------------------


class ShardEntry(TableEntry):
    """A shard of the prepared examples."""

    split: Annotated[
        str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    ]  # train, held_out, or a name of prepare.held_out_data


class ReadingEntry(Entry):
    """How the records of one source were read."""

    format: str
    arguments: Tree = {}
    columns: dict[str, str] = {}


class Fingerprint(Entry):
    """Hashes of a tokenizer: of the ids that it gives for the probe texts, and of what it was loaded as."""

    ids: Checksum
    loads: Checksum | None  # None: a tokenizer in Python, whose data do not tell all that it does


class PreparedInputs(Entry):
    """What a preparation was made from."""

    model_config = ConfigDict(extra="allow")

    data: list[list[Tree]] = []  # of each source, its files and their checksums
    tokenizer_id: str = ""
    fingerprint: Fingerprint | None = None
    processor_id: Checksum | None = None  # of the model's image processor; None if no example has images
    config: Tree = {}


class PreparedManifest(Manifest):
    inputs: PreparedInputs
    kind: Literal["pairs", "labels"]
    formats: list[ReadingEntry] = []
    records: Count = 0
    further: Signed = 0
    quarantined: dict[str, Count] = {}
    boundaries: dict[str, Count] = {}
    done: dict[str, Count] = {}
    fast_tokenizer_mismatch: str = ""  # where the fast tokenizer differed; then nothing of it was kept
    template: str | None = None
    date: str | None = None
    shards: list[ShardEntry]
    images: list[TableEntry] = []
    image_files: list[TableEntry] = []  # from which they were read
    quarantine: TableEntry

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of its examples: train and held_out, which may be empty, then the sets of prepare.held_out_data."""
        return tuple(dict.fromkeys((TRAIN, HELD_OUT, *(shard.split for shard in self.shards))))


class PartRecord(StoredRecord):
    """One chunk of records, prepared: a part of an unfinished preparation."""

    source: Annotated[int, Field(ge=0, le=1 << 31)]
    records: Count
    further: Signed
    quarantined: dict[str, Count]
    first: dict[str, str]
    done: dict[str, Count]
    fast_tokenizer: bool = False  # whether it encoded the texts
    fast_tokenizer_unavailable: str = ""  # why it cannot be used with this tokenizer
    table: TableEntry
    quarantine: TableEntry
    images: TableEntry | None = None  # None: it has none
    image_files: TableEntry | None = None

    @property
    def files(self) -> dict[str, TableEntry]:
        """Its files by the suffix of their names."""
        every = {
            ".arrow": self.table,
            ".quarantine": self.quarantine,
            ".images": self.images,
            ".image-files": self.image_files,
        }
        return {suffix: entry for suffix, entry in every.items() if entry is not None}

    def why_misplaced(self, path: Path) -> str | None:
        wrong = [entry.file for suffix, entry in self.files.items() if entry.file != path.with_suffix(suffix).name]
        return f"names {wrong[0]}, which is another part's" if wrong else None


# -- a scoring -------------------------------------------------------------------------------------------------------


class ReferenceName(Entry):
    name: str
    model_id: ModelId


class ScoredInputs(Entry):
    """What a scoring was made from."""

    model_config = ConfigDict(extra="allow")

    prepared: str
    cache: str | None = None  # as the config named it
    config: Tree = {}
    versions: dict[str, str] = {}


class ScoredManifest(Manifest):
    inputs: ScoredInputs
    reference: ReferenceName
    cache: StoredPath  # as the command named it
    cache_relative: StoredPath | None = None  # to the manifest's own folder
    cache_absolute: StoredPath | None = None
    allowed_signers: StoredPath | None = None  # the file of those whose rows alone are used, as an absolute path
    accepted_numerics: list[str]
    numerics: dict[str, Numerics] = {}
    parity: Parity | None = None
    shards: list[BareName] = []
    sequences: Count = 0
    failed: Count = 0


# -- a run -----------------------------------------------------------------------------------------------------------


class TrainSettings(Entry):
    """The settings that a run depends on; those that are read one by one have a type."""

    model_config = ConfigDict(extra="allow")

    learning_rate: float | None = None
    batch_size: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    epochs: float | None = None
    seed: Annotated[int, Field(ge=-(1 << 62), le=1 << 62)] | None = None


class RunInputs(Entry):
    """What makes a run the same run."""

    model_config = ConfigDict(extra="allow")

    prepared: str = ""
    reference: ModelId | None = None
    numerics: list[str] | None = None
    policy: str = ""
    train: TrainSettings


class Provenance(StoredRecord):
    """What a run was made from, written before its first step."""

    inputs: RunInputs
    model: str | None = None
    loss: str
    loss_arguments: dict[str, Tree] = {}
    beta: float
    per_token: bool = False
    moving_reference: str | None = None
    versions: dict[str, str] = {}
    precision: str | None = None
    head_dtype: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    device: str | None = None
    processes: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    steps: Step | None = None  # planned: a callback or train.best.patience may end the run before
    sharded: bool | None = None


class Before(StoredRecord):
    """What the policy did before its first step."""

    start: dict[str, float]
    evaluation: dict[str, float]
    answers: list[str]


class BestEntry(Entry):
    """The best evaluation of a run so far, and how many evaluations since were not better."""

    metric: str
    step: Step
    evaluation: dict[str, float]
    waited: Count


class StoppedEntry(Entry):
    """Where a callback stopped a run, of how many steps, and why."""

    step: Step
    of: Step
    callback: str
    reason: str = ""

    def describe(self) -> str:
        """Return `stopped at step 5 of 60 by EarlyStop: its reason`."""
        because = f": {self.reason}" if self.reason else ""
        return f"stopped at step {self.step:,} of {self.of:,} by {self.callback}{because}"

    def __str__(self) -> str:
        return self.describe()


class CheckpointManifest(Manifest):
    step: Step
    num_tokens: Count
    memory: dict[str, dict[str, float]] = {}
    best: BestEntry | None = None
    stopped: StoppedEntry | None = None
    files: list[FileEntry] = []


class ChosenStep(Entry):
    """The step whose weights a run kept."""

    step: Step
    metric: str
    value: float | None


class SampleEntry(Entry):
    """The answer to a prompt before and after a run."""

    example_id: str
    prompt: str
    before: str
    after: str
    before_kind: str | None = None
    after_kind: str | None = None


class Evaluated(Entry):
    evaluation: dict[str, float] = {}
    kinds: dict[str, Count] | None = None


class RunManifest(Manifest):
    steps: Step
    checkpoints: Literal["remove", "keep"] | None = None  # train.checkpoints_at_end; None: they were always kept
    stopped: StoppedEntry | None = None
    best: ChosenStep | None = None
    kind: Literal["pairs", "labels"] | None = None
    examples: Count
    held_out: Count
    evaluated: dict[str, Count] = {}  # examples of each set of prepare.held_out_data
    loss: str
    seconds: float
    start: dict[str, float] = {}
    changed_answers: Count = 0
    before: Evaluated = Evaluated()
    after: Evaluated = Evaluated()
    samples: list[SampleEntry] = []
    model: list[FileEntry]
    tokens: FileEntry | None = None
    alerts: dict[str, Count] = {}
    parts: list[FileEntry] = []
    events: list[FileEntry] = []
    metrics: list[FileEntry] = []
    throughput: list[FileEntry] = []

    def table_files(self, table: str) -> list[FileEntry]:
        """The parts of one of the run's tables."""
        return {
            "steps": self.parts,
            "events": self.events,
            "metrics": self.metrics,
            "throughput": self.throughput,
        }[table]


class TrackerRecord(StoredRecord):
    """The id by which trackers know a run."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
