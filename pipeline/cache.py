"""The reference cache: one row per scored sequence, in immutable Parquet shards.

A row's key is a hash of the exact tokens scored, so a row is either right or missing. reference.json names the model;
opening the cache for another one fails. A shard counts only with a commit record that matches its bytes.

No lock is needed. A chunk of work is named from its keys and numerics, and the first record under a name wins; the
shard's own name holds a hash of its content, so two scorers never write different bytes to one name.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import artifact, duck, identity
from pipeline.errors import IdentityError, IntegrityError
from pipeline.schema import CACHE, CACHE_VERSION, OK

REFERENCE_FILE = "reference.json"
_SHARD_SUFFIX, _RECORD_SUFFIX = ".parquet", ".json"


@dataclass(frozen=True)
class Plan:
    """What a scorer has to do: the missing sequences, in chunks, and what is there already."""

    chunks: list[np.ndarray]  # slots of each chunk, longest sequence first; see prepared.Sequences
    probe: np.ndarray  # slots of a random sample of all sequences, the same whatever is missing
    n_sequences: int
    n_hits: int
    n_failed: int  # of the hits: tried before, no value
    n_tokens: int  # to score
    n_completion_tokens: int
    other_numerics: dict[str, int]  # numerics_id -> missing sequences that it has scored

    @property
    def n_missing(self) -> int:
        return self.n_sequences - self.n_hits


class Cache:
    """The folder of one reference."""

    def __init__(self, folder: Path, model_id: str) -> None:
        """Open a cache that exists, for this model and no other."""
        self.folder = folder
        if not (folder / REFERENCE_FILE).exists():
            raise IntegrityError(f"The cache {folder} is gone. Score again (make score).")
        reference = artifact.unseal(folder / REFERENCE_FILE, "Score again (make score): it is written anew.")
        if reference["model_id"] != model_id:
            raise IdentityError(
                f"{folder} holds log-probs of {reference['name']}@{reference['model_id'][:8]}; this run names a model "
                f"@{model_id[:8]}. Score with it (make score), or set the reference back."
            )
        self.reference = reference
        self.records: list[dict[str, Any]] = []
        self.damaged: dict[Path, str] = {}  # record -> what is wrong
        self._scan()

    @classmethod
    def create(cls, root: Path, name: str, reference: dict[str, Any]) -> "Cache":
        """Open the cache of these weights, whatever name they went by when it was made, or make one."""
        short = reference["model_id"][:12]
        folder = next(iter(sorted(root.glob(f"*-{short}"))), root / f"{_safe(name)}-{short}")
        if not _is_whole(folder / REFERENCE_FILE):
            (folder / REFERENCE_FILE).unlink(missing_ok=True)
            content = artifact.seal({"name": name, "schema_version": CACHE_VERSION, **reference})
            artifact.commit_bytes(folder / REFERENCE_FILE, content, once=True)
        artifact.remove_leftovers(folder)
        return cls(folder, reference["model_id"])

    @property
    def shards(self) -> list[str]:
        return [str(self.folder / record["file"]) for record in self.records]

    def numerics(self) -> dict[str, dict[str, str]]:
        """The readable record behind each numerics_id in the cache."""
        return {record["numerics_id"]: record["numerics"] for record in self.records}

    def discard_damaged(self) -> None:
        """Remove the records of damaged shards, so that their rows count as missing and are scored again."""
        for record in self.damaged:
            record.unlink(missing_ok=True)
        self.damaged = {}

    def refuse_damage(self) -> None:
        if self.damaged:
            reason = next(iter(self.damaged.values())).rstrip(".")
            raise IntegrityError(
                f"{len(self.damaged)} of {len(self.damaged) + len(self.records)} shards of {self.folder} are damaged; "
                f"{reason}. Score again (make score): only what they held is computed."
            )

    def _scan(self) -> None:
        for path in sorted(self.folder.glob(f"*{_RECORD_SUFFIX}")):
            if path.name == REFERENCE_FILE:
                continue
            try:
                record = artifact.unseal(path)
                reason = artifact.damage(self.folder, record)
            except IntegrityError as error:
                record, reason = {}, str(error)
            if reason:
                self.damaged[path] = f"{self.folder / record['file']} {reason}" if record else reason
            else:
                self.records.append(record)

    # -- writing -----------------------------------------------------------------------------------------------------

    def has_chunk(self, keys: Sequence[bytes], numerics_id: str) -> bool:
        """Whether this chunk was committed meanwhile, by another scorer."""
        return (self.folder / f"{_chunk_name(keys, numerics_id)}{_RECORD_SUFFIX}").exists()

    def commit(self, rows: pa.Table, numerics: dict[str, str], numerics_id: str, parity: dict[str, Any] | None) -> None:
        rows = rows.sort_by("key")
        name = _chunk_name(rows["key"].to_pylist(), numerics_id)
        data = artifact.parquet(rows, float_lists=["logps"])
        shard = self.folder / f"{name}-{artifact.checksum_bytes(data)[:8]}{_SHARD_SUFFIX}"
        entry = artifact.commit_file(shard, data, rows=len(rows))
        record = {
            **entry,
            "schema_version": CACHE_VERSION,
            "numerics_id": numerics_id,
            "numerics": numerics,
            "parity": parity,
        }
        artifact.commit_bytes(self.folder / f"{name}{_RECORD_SUFFIX}", artifact.seal(record), once=True)

    # -- reading -----------------------------------------------------------------------------------------------------

    def plan(self, sequences: pa.Table, accepted: Sequence[str], tokens_per_shard: int) -> Plan:
        """Which of `sequences` (key, slot, n, n_completion) have no row under the accepted numerics.

        Chunks are cut from all distinct sequences and only then thinned to the missing ones, so that a scorer that
        resumes, or works beside another, names the same chunks.
        """
        con = duck.connect()
        con.register("sequences", sequences)
        duck.define(con, "cached", self.shards, CACHE)
        con.execute(_DISTINCT, {"budget": tokens_per_shard})
        con.execute(_STATE, {"accepted": list(accepted), "ok": OK})
        totals = con.execute(_TOTALS, {"ok": OK}).fetchone()
        assert totals is not None
        missing = con.execute("select chunk, slot from state where not hit order by chunk, place").fetchnumpy()
        cuts = np.flatnonzero(np.diff(missing["chunk"])) + 1
        chunks = [chunk for chunk in np.split(missing["slot"], cuts) if len(chunk)]
        # Keys are hashes: the smallest are a random sample.
        probe = con.execute("select slot from state order by key limit 1024").fetchnumpy()["slot"]
        others = con.execute(_OTHERS).fetchall()
        n_sequences, n_hits, n_failed, n_tokens, n_completion_tokens = (int(total) for total in totals)
        return Plan(chunks, probe, n_sequences, n_hits, n_failed, n_tokens, n_completion_tokens, dict(others))

    def logps(self, keys: pa.ChunkedArray, accepted: Sequence[str]) -> np.ma.MaskedArray:
        """The summed log-prob behind each key, in the order of `keys`; masked where there is none."""
        con = duck.connect()
        con.register("wanted", pa.table({"key": keys, "place": np.arange(len(keys))}))
        duck.define(con, "cached", self.shards, CACHE)
        return np.ma.asarray(con.execute(_LOGPS, {"accepted": list(accepted), "ok": OK}).fetchnumpy()["logp"])


def _is_whole(sealed: Path) -> bool:
    try:
        artifact.unseal(sealed)
    except IntegrityError:
        return False
    return True


def open_scored(scored: Path) -> tuple[dict[str, Any], Cache] | None:
    """The manifest of a finished scoring and the cache it vouches for; None where nothing has been scored.

    Where the cache is not what the manifest says, the manifest is taken back: make then sees that there is work.
    """
    try:
        if (manifest := artifact.read_manifest(scored)) is None:
            return None
        cache = Cache(Path(manifest["cache"]), manifest["reference"]["model_id"])
        cache.refuse_damage()
    except IntegrityError:
        artifact.retract_manifest(scored)
        raise
    return manifest, cache


def identify(model: Path, root: Path) -> dict[str, Any]:
    """identity.model_identity, with the hashes of weight files remembered beside the caches."""
    memo_file = root / ".weights.json"
    try:
        memo = json.loads(memo_file.read_bytes())
    except (OSError, ValueError):
        memo = {}
    known = len(memo)
    found = identity.model_identity(model, memo)
    if len(memo) > known:
        artifact.commit_bytes(memo_file, artifact.canonical_json(memo))
    return found


_DISTINCT = """
create temp table needed as
with once as (
    select key, min(slot) as slot, any_value(n) as n, any_value(n_completion) as n_completion
    from sequences group by key
),
placed as (select *, row_number() over (order by n desc, key) as place from once)
select *, (sum(n) over (order by place) - n)::bigint // $budget as chunk from placed
"""

_STATE = """
create temp table state as
select needed.*, hits.key is not null as hit, hits.status
from needed left join (
    select key, arg_min(status, status <> $ok) as status
    from cached where list_contains($accepted, numerics_id) group by key
) as hits using (key)
"""

_TOTALS = """
select count(*), count(*) filter (hit), count(*) filter (hit and status <> $ok),
       coalesce(sum(n) filter (not hit), 0), coalesce(sum(n_completion) filter (not hit), 0)
from state
"""

_OTHERS = """
select numerics_id, count(distinct key) from cached join state using (key) where not hit group by numerics_id
"""

# The numerics named first win where a sequence was scored under several; and always the same one of two equal rows,
# which scorers that cut their chunks differently can leave.
_LOGPS = """
with usable as (
    select key, arg_min(logp_sum, printf('%06d', list_position($accepted, numerics_id)) || filename) as logp
    from cached where status = $ok and list_contains($accepted, numerics_id) group by key
)
select logp from wanted left join usable using (key) order by place
"""


def _chunk_name(keys: Sequence[bytes], numerics_id: str) -> str:
    digest = hashlib.blake2b(numerics_id.encode(), digest_size=16)
    for key in sorted(keys):
        digest.update(key)
    return digest.hexdigest()


def _safe(name: str) -> str:
    """The model's own name, fit for a folder."""
    return re.sub(r"[^\w.-]", "_", name.rstrip("/").rpartition("/")[2]) or "model"
