"""prepare: preference data in, exact token ids out, nothing lost on the way.

sources -> chunks of records -> parts, by all workers and ranks -> shards and manifest, by whoever finishes last
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import identity, pool
from pipeline.config import Config, Prepare
from pipeline.errors import DataError
from pipeline.preparing import assembly, parts
from pipeline.preparing.recipe import Recipe, make_recipe
from pipeline.preparing.sources import Chunk, Opened, open_source
from pipeline.progress import Progress
from pipeline.schema import HELD_OUT, PREPARED_VERSION, TRAIN
from pipeline.stored import artifact, prepared

REFUSED_FILE = "quarantine-refused.parquet"
# What is decided in the assembly, so that parts stay good when it changes.
_NOT_IN_PARTS = {"data", "workers", "max_quarantine", "rows_per_shard", "duplicates", "kl_pairs", "seed"}


def run(config: Config, progress: Progress) -> dict[str, Any]:
    model = identity.find_reference(config).tokenizer
    opened = [open_source(entry, Path(config.out)) for entry in config.prepare.sources]
    inputs = _inputs(config.prepare, model, opened)
    if prepared.is_current(config.prepared, inputs):
        progress.say(f"prepare: nothing to do, {config.prepared} is what this data and config give")
        artifact.touch_manifest(config.prepared)
        return _summary(config, prepared.Prepared(config.prepared).manifest, changed=False)

    recipe = make_recipe(config.prepare, model, opened, progress)
    folder = config.prepared / f".parts-{_short(_of_parts(inputs))}"
    n_parts = _make_parts(folder, recipe, opened, progress)
    try:
        made = _all_finished(folder, n_parts)
        if made is not None:
            _assemble(made, recipe, config, inputs, progress)
            _tell_make(config, model, opened)
    except FileNotFoundError:
        made = None  # another rank has put the parts together meanwhile
    if made is None and not prepared.is_current(config.prepared, inputs):
        return _waiting(config, folder, n_parts)
    return _summary(config, prepared.Prepared(config.prepared).manifest, changed=True)


def _inputs(prepare: Prepare, model: Path, opened: list[Opened]) -> dict[str, Any]:
    """All that the output depends on."""
    template = Path(prepare.chat_template) if prepare.chat_template else None
    return {
        "version": PREPARED_VERSION,
        "data": [source.identity() for source in opened],
        "tokenizer_id": identity.tokenizer_id(model),
        "chat_template": artifact.checksum(template) if template and template.exists() else None,
        "config": prepare.model_dump(mode="json", exclude={"workers"})
        | {"data": [entry.model_dump(mode="json", exclude={"path"}) for entry in prepare.data]},
    }


def _of_parts(inputs: dict[str, Any]) -> dict[str, Any]:
    read = [{name: value for name, value in entry.items() if name != "weight"} for entry in inputs["config"]["data"]]
    config = {name: value for name, value in inputs["config"].items() if name not in _NOT_IN_PARTS}
    return inputs | {"config": config | {"data": read}}


def _short(inputs: dict[str, Any]) -> str:
    return artifact.checksum_bytes(artifact.canonical_json(inputs))[:8]


# -- parts -----------------------------------------------------------------------------------------------------------


def _make_parts(folder: Path, recipe: Recipe, opened: list[Opened], progress: Progress) -> int:
    """Every part of this process's share that is not there yet; returns how many parts there are in all."""
    rank, world = pool.share()
    artifact.remove_leftovers(folder.parent)
    counted = _Counted(opened, folder, rank, world)
    n_workers = recipe.prepare.workers or pool.cores()
    # Made here in any case: what is wrong with the template or the options is then not said by a worker.
    alone = parts.start(recipe, folder)
    with progress.count("prepare", None, "records") as counter:
        for record in pool.run(partial(parts.start, recipe, folder), counted.tasks(), n_workers, alone):
            counter.add(record["records"])
    if counted.found and counted.n_parts > counted.made:
        progress.say(f"prepare: {counted.found:,} of {counted.n_parts:,} parts were there already")
    return counted.n_parts


class _Counted:
    """The tasks that are left, and what was seen while they were handed out."""

    def __init__(self, opened: list[Opened], folder: Path, rank: int, world: int) -> None:
        self._opened, self._folder, self._rank, self._world = opened, folder, rank, world
        self.n_parts = self.found = self.made = 0

    def tasks(self) -> Iterator[tuple[int, int, Chunk]]:
        for source, opened in enumerate(self._opened):
            for chunk in opened.chunks():
                number, self.n_parts = self.n_parts, self.n_parts + 1
                if number % self._world != self._rank:
                    continue
                if parts.finished(self._folder, number):
                    self.found += 1
                    continue
                self.made += 1
                yield number, source, chunk


def _all_finished(folder: Path, n_parts: int) -> assembly.Parts | None:
    records = [parts.finished(folder, number) for number in range(n_parts)]
    known = [record for record in records if record is not None]
    return assembly.Parts(folder, known) if len(known) == n_parts else None


# -- the whole -------------------------------------------------------------------------------------------------------


def _assemble(made: assembly.Parts, recipe: Recipe, config: Config, inputs: dict[str, Any], progress: Progress) -> None:
    folder, prepare = config.prepared, config.prepare
    _refuse_bad_data(made, config)
    quarantine = assembly.commit_quarantine(folder / prepared.QUARANTINE_FILE, made)
    if len(made.records) > 1:
        progress.say(f"prepare: {made.n_rows:,} examples in {len(made.records):,} parts, now put together")
    weights = [prepare.data[record["source"]].weight for record in made.records]
    shards, done = assembly.commit_shards(folder, made, recipe.kind, _short(inputs), prepare, weights)
    facts = made.summed("done")
    if recipe.template is None:
        facts.pop("ended", None)  # plain text has none; that is no news
    manifest = {
        "inputs": inputs,
        "kind": recipe.kind,
        "formats": [asdict(reading) for reading in recipe.readings],
        "records": sum(record["records"] for record in made.records),
        "further": sum(record["further"] for record in made.records),
        "quarantined": made.summed("quarantined"),
        "boundaries": {name: facts.pop(name) for name in ("exact", "split") if name in facts},
        "done": facts | {name: n for name, n in sorted(done.items()) if n},
        "template": recipe.template,
        "date": recipe.date,
        "shards": shards,
        "quarantine": quarantine,
    }
    artifact.commit_manifest(folder, manifest)
    _tidy(folder, {shard["file"] for shard in shards})


def _tidy(folder: Path, current: set[str]) -> None:
    for old in folder.glob("*.arrow"):
        if old.name not in current:
            old.unlink(missing_ok=True)
    (folder / REFUSED_FILE).unlink(missing_ok=True)
    for old in folder.glob(".parts-*"):
        shutil.rmtree(old, ignore_errors=True)


def _refuse_bad_data(made: assembly.Parts, config: Config) -> None:
    quarantined = made.summed("quarantined")
    n_bad, n_good = sum(quarantined.values()), made.n_rows
    if n_good and n_bad <= config.prepare.max_quarantine * (n_bad + n_good):
        return
    if not n_bad:
        names = ", ".join(entry.path or str(entry.hub) for entry in config.prepare.data)
        raise DataError(f"{names}: no records, only blank lines.")
    # The quarantine of a finished preparation is vouched for by its manifest, and stays.
    path = config.prepared / (
        REFUSED_FILE if (config.prepared / artifact.MANIFEST).exists() else prepared.QUARANTINE_FILE
    )
    assembly.commit_quarantine(path, made)
    remedy = "Mend the data, or raise the threshold." if n_good else "None is left to use."
    raise DataError(
        f"{n_bad} of {n_bad + n_good} records cannot be used ({_reasons(made, quarantined)}); prepare.max_quarantine allows "
        f"{config.prepare.max_quarantine:.0%}. Each is in {path} with its line and reason. {remedy}"
    )


def _reasons(made: assembly.Parts, quarantined: dict[str, int]) -> str:
    first: dict[str, str] = {}
    for record in made.records:
        first = record["first"] | first
    return "; ".join(
        f"{n} {reason} (the first: {first[reason]})" for reason, n in sorted(quarantined.items(), key=lambda i: -i[1])
    )


def _waiting(config: Config, folder: Path, n_parts: int) -> dict[str, Any]:
    there = sum(parts.record_file(folder, number).exists() for number in range(n_parts))
    return {"prepared": str(config.prepared), "waiting": True, "parts": n_parts, "finished": there}


def _summary(config: Config, manifest: dict[str, Any], *, changed: bool) -> dict[str, Any]:
    counts = {
        split: sum(shard["rows"] for shard in manifest["shards"] if shard["split"] == split)
        for split in (TRAIN, HELD_OUT)
    }
    done, kept = manifest["done"], sum(counts.values())
    gone = sum(manifest["quarantined"].values()) + done.get("left_out", 0) + done.get("dropped", 0)
    assert kept + gone - done.get("repeated", 0) == manifest["records"] + manifest["further"]
    return {
        "prepared": str(config.prepared),
        "changed": changed,
        "kind": manifest["kind"],
        "records": manifest["records"],
        **counts,
        "further": manifest["further"],
        "quarantined": manifest["quarantined"],
        "boundaries": manifest["boundaries"],
        "done": done,
        "date": manifest["date"],
    }


def _tell_make(config: Config, model: Path, opened: list[Opened]) -> None:
    tokenizer = [path for path in (model / "tokenizer.json", model / "tokenizer_config.json") if path.exists()]
    files = [file for source in opened for file in source.files]
    artifact.commit_make_inputs(config.prepared, [*files, *tokenizer])
