"""publish: send the reference's log-probs of a config's data to the hub as a data set, and only when asked."""

import copy
import hashlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import disable_progress_bars

from prefcache.command_results import PublishPlan, PublishResult
from prefcache.hub import download_file, hub_errors, list_files
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import IdentityError, IntegrityError, UsageError
from prefcache.pipeline.progress import Progress, counting, working
from prefcache.pipeline.schema import CACHE
from prefcache.pipeline.stored import artifact, cache_maintenance, shards, signatures
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import CacheWriter
from prefcache.pipeline.stored.key_index import KeyIndex, read_keys
from prefcache.pipeline.stored.prepared import Prepared, sequence_table
from prefcache.pipeline.stored.records import REFERENCE_FILE, Parity, ReferenceRecord, ShardRecord, is_cache_file
from prefcache.pipeline.stored.scored import require_scored
from prefcache.pipeline.visible_text import count, visible

CARD = "README.md"


def run(
    config: Config,
    name: str,
    progress: Progress,
    *,
    public: bool = False,
    key_file: Path | None = None,
    license_id: str | None = None,
    dry_run: bool = False,
) -> PublishResult | PublishPlan:
    """Collect the rows of the prepared data in a temporary folder of a cache's shape, and send that."""
    prepared = Prepared(config.prepared)
    manifest, cache = require_scored(config, prepared, every_byte=False)
    key = None if key_file is None else signatures.SigningKey(key_file)
    if key is not None:
        signatures.refuse_unusable_key(key, None)
    # A dry run changes nothing, not even for a moment.
    scratch = tempfile.TemporaryDirectory() if dry_run else artifact.scratch_folder(Path(config.out) / "published")
    with scratch as name_of_folder:
        folder = Path(name_of_folder)
        collected = _collect(folder, cache, prepared, manifest.accepted_numerics, _public_name(config))
        if key is not None:
            described = [signatures.describe(part.folder, record) for part, record in collected.shards]
            signatures.sign_records(folder, collected.reference, described, key)
        card = _render_card(config, name, prepared, collected, license_id, is_signed=key is not None)
        (folder / CARD).write_text(card, encoding="utf-8")
        files = collected.list_files()
        plan = _describe(name, collected, files, dry_run)
        progress.say(f"publish: {len(files)} files, {plan.bytes:,} bytes, {count(plan.rows, 'row')}, to {name}")
        _warn_about_paths(collected, progress)
        return plan if dry_run else _send(name, public, plan, files, collected.reference)


# -- what is published -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Collected:
    """The prepared sequences' rows: shards of the cache as they are, and in a temporary folder those written anew."""

    reference: ReferenceRecord
    kept: Cache
    rewritten: Cache

    @property
    def shards(self) -> list[tuple[Cache, ShardRecord]]:
        return [(part, record) for part in (self.kept, self.rewritten) for record in part.records]

    @property
    def numerics(self) -> dict[str, dict[str, str]]:
        return self.kept.numerics() | self.rewritten.numerics()

    @property
    def n_rows(self) -> int:
        return sum(record.rows for _, record in self.shards)

    def worst_parity(self, numerics_id: str) -> Parity | None:
        found = [part.worst_parity([numerics_id]) for part in (self.kept, self.rewritten)]
        return max((each for each in found if each), key=lambda parity: parity.max, default=None)

    def count_tokens(self) -> int:
        columns = (part.read(record, ["n_completion"])["n_completion"] for part, record in self.shards)
        return sum(int(column.to_numpy().sum(dtype=np.int64)) for column in columns)

    def list_files(self) -> dict[str, Path]:
        """What is sent: its names there, and where it is here."""
        written = {path.name: path for path in sorted(self.rewritten.folder.iterdir()) if path.is_file()}
        kept = [name for record in self.kept.records for name in (record.file, record.name)]
        return written | {name: self.kept.folder / name for name in kept}


def _collect(folder: Path, cache: Cache, prepared: Prepared, accepted: list[str], name: str) -> _Collected:
    """Find the shards with rows of the prepared sequences, write those anew that have others too, and verify all."""
    reference = ReferenceRecord.make(**{**cache.reference.facts(), "name": name})
    reference.commit(folder / REFERENCE_FILE, durable=False)
    index = KeyIndex(read_keys([sequence_table(prepared.table())["key"]]))
    writer = CacheWriter(Cache(folder, reference.model_id, remember="nothing"))
    records, whole = [record for record in cache.records if record.numerics_id in accepted], []
    with counting(f"read {cache.place}", sum(record.rows for record in records), "rows") as counter:
        for record in records:
            places, _ = index.find(shards.read_values(cache.folder, record)[0])
            if len(places) == record.rows:
                whole.append(record)
            elif len(places):
                rows = cache.read(record).cast(CACHE).take(pa.array(np.sort(places)))
                writer.commit(rows, record.numerics, record.numerics_id, record.parity)
            counter.add(record.rows)
    kept = copy.copy(cache)
    kept.records = whole
    kept.fetch_shards()
    collected = _Collected(reference, kept, Cache(folder, reference.model_id, every_byte=True, remember="nothing"))
    _refuse_bad_rows(collected, index)
    return collected


def _refuse_bad_rows(collected: _Collected, index: KeyIndex) -> None:
    """IntegrityError unless every sequence has a row, and every row is one that a scorer can have written."""
    has_row = np.zeros(len(index), bool)
    for part in (collected.kept, collected.rewritten):
        for record in part.records:
            if reason := artifact.damage(part.folder, record):
                raise IntegrityError(f"{part.place}/{record.file} {reason}. Score again (prefcache score CONFIG).")
        part.refuse_damage()
        cache_maintenance.refuse_impossible(part)
        has_row |= part.find_rows(index, list(part.numerics()))[0]
    if missing := int((~has_row).sum()):
        raise IntegrityError(
            f"{collected.kept.place} has lost {count(missing, 'row')} since it was scored. Score again (prefcache score CONFIG)."
        )


def _public_name(config: Config) -> str:
    """The reference's name without the folders in which it lies here."""
    names = [_without_folders(each) for each in (config.model, config.adapter) if each is not None]
    return " + ".join(names)


def _without_folders(name: str) -> str:
    path = Path(name)
    if path.exists() or path.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return path.resolve().name
    return name


def _warn_about_paths(collected: _Collected, progress: Progress) -> None:
    """Name paths in what identifies the numerics, which cannot be left out: a server's model is often named by its folder."""
    for numerics in collected.numerics.values():
        for key, value in numerics.items():
            if value.startswith(("/", "~")) or "\\" in value:
                progress.warn(f"the numerics of these rows name {key} {value}, and this is published with them")


# -- the card --------------------------------------------------------------------------------------------------------


def _render_card(
    config: Config,
    name: str,
    prepared: Prepared,
    collected: _Collected,
    license_id: str | None,
    *,
    is_signed: bool,
) -> str:
    """Write the card: what `datasets` needs to load it, what the rows are, and how to use them. It names no path and no host."""
    reference = collected.reference
    is_local = Path(config.model).exists()
    head = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.parquet"}]}],
        **({"license": license_id} if license_id else {}),
        **({} if is_local else {"base_model": config.model}),
        "tags": ["prefcache", "log-probs", "preference-tuning"],
    }
    facts = [
        ("reference", reference.name),
        *([] if is_local or config.revision is None else [("revision", config.revision)]),
        ("identity (model_id)", reference.model_id),
        ("sequences", f"{collected.n_rows:,}"),
        ("tokens of their answers", f"{collected.count_tokens():,}"),
        ("prepared data", prepared.id),
        ("tokenizer", prepared.manifest.inputs.tokenizer_id),
        ("chat template", _hash_template(prepared.manifest.template)),
        *_numerics_facts(collected),
        ("signed", "yes, with an SSH key" if is_signed else "no"),
        ("license", license_id or "not stated: ask the owner before you use it"),
    ]
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=False)}---",
        f"# Log-probs of {_cell(reference.name)}",
        "Reference log-probs for preference tuning (DPO and its kin), computed by prefcache: one row per sequence of token ids, found by "
        "a hash of exactly these ids. There is no text in it.",
        "\n".join(["| | |", "|---|---|", *(f"| {_cell(what)} | {_cell(str(which))} |" for what, which in facts)]),
        "## Use it",
        "With the same model, and data that give the same token ids, this takes the rows that you need, compares a sample with your own "
        "model, and refuses the rows of any other model:",
        f"```sh\nprefcache prepare my.yaml\nprefcache fetch my.yaml {name}\n```",
        "The columns, for `datasets.load_dataset`: `key` (blake2b-128 of the ids), `n_prompt` and `n_completion` (tokens), `logp_sum` and "
        "`logps` (nats; of the answer and of each of its tokens), `numerics_id` (how it was computed) and `status`.",
    ]
    return "\n\n".join(lines) + "\n"


def _numerics_facts(collected: _Collected) -> Iterator[tuple[str, str]]:
    for numerics_id, numerics in sorted(collected.numerics.items()):
        rows = sum(record.rows for _, record in collected.shards if record.numerics_id == numerics_id)
        described = ", ".join(f"{key} {value}" for key, value in numerics.items())
        yield f"computed by ({numerics_id})", f"{described}; {rows:,} rows"
        if parity := collected.worst_parity(numerics_id):
            of = f" of {parity.of}" if parity.of else " of a token"
            measured = f"at most {parity.max:.2g} nats{of}, on {parity.sequences:,} sequences"
            yield "deviation from the plain float32 forward", measured


def _hash_template(template: str | None) -> str:
    return "none: plain text" if template is None else f"sha256 {hashlib.sha256(template.encode()).hexdigest()[:16]}"


def _cell(text: str) -> str:
    return visible(text).replace("|", "\\|").replace("\n", " ")


# -- sending ---------------------------------------------------------------------------------------------------------


def _describe(name: str, collected: _Collected, files: dict[str, Path], dry_run: bool) -> PublishPlan:
    sizes = {each: path.stat().st_size for each, path in sorted(files.items())}
    return PublishPlan(
        dry_run=dry_run,
        hub=name,
        rows=collected.n_rows,
        shards=len(collected.shards),
        rewritten=len(collected.rewritten.records),
        bytes=sum(sizes.values()),
        files=sizes,
    )


def _send(
    name: str, public: bool, plan: PublishPlan, files: dict[str, Path], reference: ReferenceRecord
) -> PublishResult:
    disable_progress_bars()  # one for each file
    with hub_errors(f"{name} was not published", "write"):
        there = _refuse_other_reference(name, reference)
        # Of an earlier publication: other shards, with rows that do not belong now.
        stale = [each for each in there if each not in files and is_cache_file(each)]
        api = HfApi()
        repository = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True)
        added = [CommitOperationAdd(each, path) for each, path in files.items()]
        with working("upload"):
            commit = api.create_commit(
                repo_id=repository.repo_id,
                repo_type="dataset",
                operations=[*added, *(CommitOperationDelete(each) for each in stale)],
                commit_message=f"{count(plan.rows, 'row')} of {reference.name}@{reference.model_id[:8]}, by prefcache",
            )
    return PublishResult(plan=plan, url=str(repository), commit=commit.oid)


def _refuse_other_reference(name: str, reference: ReferenceRecord) -> list[str]:
    """Return the files that are there; refuse to replace another reference's, or a data set that is something else."""
    with tempfile.TemporaryDirectory() as folder:
        files = list_files(name)
        if not set(files) - {CARD, ".gitattributes"}:
            return files
        if REFERENCE_FILE not in files:
            raise UsageError(f"{name} exists and is not a published cache. Name another data set.")
        published = ReferenceRecord.read(download_file(name, REFERENCE_FILE, Path(folder)), "Name another data set.")
    if published.model_id != reference.model_id:
        raise IdentityError(
            f"{name} holds log-probs of {published.name}@{published.model_id[:8]}, and these are of "
            f"{reference.name}@{reference.model_id[:8]}. Name another data set for them."
        )
    return files
