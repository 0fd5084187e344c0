"""publish: send the reference's log-probs of a config's data to the hub as a data set, and only when asked."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from huggingface_hub import HfApi
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
from prefcache.pipeline.stored.mirror import find_mirror
from prefcache.pipeline.stored.prepared import Prepared, sequence_table
from prefcache.pipeline.stored.records import REFERENCE_FILE, ReferenceRecord, ScoredManifest, ShardRecord
from prefcache.pipeline.stored.scored import require_scored
from prefcache.pipeline.visible_text import count, visible

CARD = "README.md"
_HEX = "[0-9a-f]"
# What an earlier publication may have left in the repository, as fnmatch has it: other shards, with rows that do not belong now.
_OURS = [f"{merged}{_HEX * 32}{end}" for merged in ("", "merged-") for end in (".json", f"-{_HEX * 8}.parquet")] + [
    f"signed-{_HEX * 32}.json{end}" for end in ("", ".sig")
]


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
    with artifact.scratch_folder(Path(config.out) / "published") as folder:
        collected = _collect(folder, cache, prepared, manifest.accepted_numerics, _public_name(config))
        if key is not None:
            described = [signatures.describe(folder, record) for record in collected.records]
            signatures.sign_records(folder, collected.reference, described, key)
        card = _render_card(config, name, prepared, manifest, collected, license_id, is_signed=key is not None)
        (folder / CARD).write_text(card, encoding="utf-8")
        plan = _describe(folder, name, cache, collected, dry_run)
        progress.say(f"publish: {len(plan.files)} files, {plan.bytes:,} bytes, {count(plan.rows, 'row')}, to {name}")
        _warn_about_paths(collected, progress)
        return plan if dry_run else _send(folder, name, public, plan, collected.reference)


# -- what is published -----------------------------------------------------------------------------------------------


def _collect(folder: Path, cache: Cache, prepared: Prepared, accepted: list[str], name: str) -> Cache:
    """Fill the folder with a cache of the prepared sequences' rows alone, and return it, verified."""
    reference = ReferenceRecord.make(**{**cache.reference.facts(), "name": name})
    reference.commit(folder / REFERENCE_FILE, durable=False)
    index = KeyIndex(read_keys([sequence_table(prepared.table())["key"]]))
    writer = CacheWriter(Cache(folder, reference.model_id, remember="nothing"))
    records = [record for record in cache.records if record.numerics_id in accepted]
    with counting(f"read {cache.place}", sum(record.rows for record in records), "rows") as counter:
        for record in records:
            _add_rows(writer, cache, record, index)
            counter.add(record.rows)
    collected = Cache(folder, reference.model_id, every_byte=True, remember="nothing")
    collected.refuse_damage()
    cache_maintenance.refuse_impossible(collected)
    missing = len(index) - _count_keys(collected, index)
    if missing:
        raise IntegrityError(
            f"{cache.place} has lost {count(missing, 'row')} since it was scored. Score again (prefcache score CONFIG)."
        )
    return collected


def _add_rows(writer: CacheWriter, cache: Cache, record: ShardRecord, index: KeyIndex) -> None:
    """Copy a shard all of whose rows belong to the data, bytes and name alike; of another, commit those rows."""
    keys, _ = shards.read_values(cache.folder, record)
    places, _ = index.find(keys)
    if len(places) == record.rows:
        if (mirror := find_mirror(cache.folder)) is not None:
            mirror.fetch(cache.folder, [record])
        for file in (record.file, record.name):
            _link_or_copy(cache.folder / file, artifact.member(writer.cache.folder, file))
    elif len(places):
        rows = cache.read(record).cast(CACHE).take(pa.array(np.sort(places)))
        writer.commit(rows, record.numerics, record.numerics_id, record.parity.facts() if record.parity else None)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _count_keys(cache: Cache, index: KeyIndex) -> int:
    has_row, _, _ = cache.find_rows(index, list(cache.numerics()))
    return int(has_row.sum())


def _public_name(config: Config) -> str:
    """The reference's name without the folders in which it lies here."""
    names = [_without_folders(each) for each in (config.model, config.adapter) if each is not None]
    return " + ".join(names)


def _without_folders(name: str) -> str:
    path = Path(name)
    if path.exists() or path.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return path.resolve().name
    return name


def _warn_about_paths(collected: Cache, progress: Progress) -> None:
    """Name paths in what identifies the numerics, which cannot be left out: a server's model is often named by its folder."""
    for numerics in collected.numerics().values():
        for key, value in numerics.items():
            if value.startswith(("/", "~")) or "\\" in value:
                progress.warn(f"the numerics of these rows name {key} {value}, and this is published with them")


# -- the card --------------------------------------------------------------------------------------------------------


def _render_card(
    config: Config,
    name: str,
    prepared: Prepared,
    manifest: ScoredManifest,
    collected: Cache,
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
    n_rows = sum(record.rows for record in collected.records)
    facts = [
        ("reference", reference.name),
        *([] if is_local or config.revision is None else [("revision", config.revision)]),
        ("identity (model_id)", reference.model_id),
        ("sequences", f"{n_rows:,}"),
        ("tokens of their answers", f"{_count_tokens(collected):,}"),
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


def _numerics_facts(collected: Cache) -> Iterator[tuple[str, str]]:
    for numerics_id, numerics in sorted(collected.numerics().items()):
        rows = sum(record.rows for record in collected.records if record.numerics_id == numerics_id)
        described = ", ".join(f"{key} {value}" for key, value in numerics.items())
        yield f"computed by ({numerics_id})", f"{described}; {rows:,} rows"
        if parity := collected.worst_parity([numerics_id]):
            of = f" of {parity.of}" if parity.of else ""
            yield (
                "deviation from the plain float32 forward",
                (f"at most {parity.max:.2g} nats{of or ' of a token'}, on {parity.sequences:,} sequences"),
            )


def _hash_template(template: str | None) -> str:
    return "none: plain text" if template is None else f"sha256 {hashlib.sha256(template.encode()).hexdigest()[:16]}"


def _count_tokens(collected: Cache) -> int:
    return sum(
        int(collected.read(record, ["n_completion"])["n_completion"].to_numpy().sum(dtype=np.int64))
        for record in collected.records
    )


def _cell(text: str) -> str:
    return visible(text).replace("|", "\\|").replace("\n", " ")


# -- sending ---------------------------------------------------------------------------------------------------------


def _describe(folder: Path, name: str, cache: Cache, collected: Cache, dry_run: bool) -> PublishPlan:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    kept = {record.file for record in cache.records}
    return PublishPlan(
        dry_run=dry_run,
        hub=name,
        rows=sum(record.rows for record in collected.records),
        shards=len(collected.records),
        rewritten=sum(record.file not in kept for record in collected.records),
        bytes=sum(files.values()),
        files=files,
    )


def _send(folder: Path, name: str, public: bool, plan: PublishPlan, reference: ReferenceRecord) -> PublishResult:
    disable_progress_bars()  # one for each file
    with hub_errors(f"{name} was not published", "write"):
        _refuse_other_reference(name, reference)
        api = HfApi()
        repository = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True)
        with working("upload"):
            commit = api.upload_folder(
                repo_id=repository.repo_id,
                repo_type="dataset",
                folder_path=folder,
                allow_patterns=list(plan.files),
                delete_patterns=_OURS,
                commit_message=f"{count(plan.rows, 'row')} of {reference.name}@{reference.model_id[:8]}, by prefcache",
            )
    return PublishResult(plan=plan, url=str(repository), commit=commit.oid)


def _refuse_other_reference(name: str, reference: ReferenceRecord) -> None:
    """Refuse to replace what was published of another reference, or a data set that is something else."""
    with tempfile.TemporaryDirectory() as folder:
        files = list_files(name)
        if not set(files) - {CARD, ".gitattributes"}:
            return
        if REFERENCE_FILE not in files:
            raise UsageError(f"{name} exists and is not a published cache. Name another data set.")
        published = ReferenceRecord.read(download_file(name, REFERENCE_FILE, Path(folder)), "Name another data set.")
    if published.model_id != reference.model_id:
        raise IdentityError(
            f"{name} holds log-probs of {published.name}@{published.model_id[:8]}, and these are of "
            f"{reference.name}@{reference.model_id[:8]}. Name another data set for them."
        )
