"""Prepared folders of pairs and labels, caches that hold their answers, and objectives, all small enough to add up by hand."""

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prefcache.pipeline import identity
from prefcache.pipeline.config import Train
from prefcache.pipeline.schema import CACHE, PREPARED, QUARANTINE, sequence_key
from prefcache.pipeline.spans import count_tokens, whole_span
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import CacheWriter, create_cache
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import PreparedManifest
from prefcache.pipeline.training.objective import Objective

REFERENCE = {"model_id": "a" * 32, "weights": {}, "config": {}}
# By the id that their numerics have: what the record of a shard says of both has to agree.
NUMERICS = {identity.numerics_id(each): each for each in ({"engine": "mine", "dtype": "float32"}, {"engine": "other"})}
MINE, OTHER = NUMERICS


def objective(**train: Any) -> Objective:
    return Objective(Train(**train))


def pair(i: int, prompt: list[int], chosen: list[int], rejected: list[int], **more: Any) -> dict[str, Any]:
    row = _row(i, prompt, {"chosen": chosen, "rejected": rejected})
    n_common = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], zip(chosen, rejected, strict=False)))
    return row | {"n_common": n_common} | more


def masked(row: dict[str, Any], **spans: list[int]) -> dict[str, Any]:
    """The example with only the tokens in these spans counting, by answer: `chosen=[0, 1, 4, 6]`."""
    counts = {f"n_{name}_counted": count_tokens(each) for name, each in spans.items()}
    return row | {f"{name}_spans": each for name, each in spans.items()} | counts


def label(
    i: int, prompt: list[int], completion: list[int], is_good: bool, kl: list[int] | None = None, **more: Any
) -> dict[str, Any]:
    return _row(i, prompt, {"completion": completion, "kl": kl}) | {"label": is_good} | more


def _row(i: int, prompt: list[int], answers: dict[str, list[int] | None]) -> dict[str, Any]:
    row = {
        "example_id": f"e{i}",
        "split": "train",
        "prompt": f"why {i}?",
        "prompt_ids": prompt,
        "n_prompt": len(prompt),
    }
    for name, ids in answers.items():
        key = None if ids is None else sequence_key(prompt, ids)
        row |= {f"{name}_ids": ids, f"{name}_key": key, f"n_{name}": ids and len(ids)}
        row |= {f"{name}_spans": ids and whole_span(len(ids)), f"n_{name}_counted": ids and len(ids)}
    return row


def table(rows: list[dict[str, Any]], kind: str) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=PREPARED[kind])


def prepared(folder: Path, rows: list[dict[str, Any]]) -> Prepared:
    """A finished preparation with a shard for each split that has rows."""
    kind = "labels" if "label" in rows[0] else "pairs"
    shards = []
    for split in ("train", "held_out"):
        if part := [row for row in rows if row["split"] == split]:
            data = artifact.arrow_stream(table(part, kind))
            shards.append(artifact.commit_file(folder / f"{split}.arrow", data, split=split, rows=len(part)))
    quarantine = artifact.commit_file(folder / "quarantine.parquet", artifact.parquet(QUARANTINE.empty_table()), rows=0)
    manifest = PreparedManifest.make(inputs={}, kind=kind, shards=shards, quarantine=quarantine)
    manifest.commit(folder / artifact.MANIFEST)
    return Prepared(folder)


def make_older(folder: Path) -> None:
    """Rewrite a prepared folder as an earlier version left it, for which every token of an answer counted."""

    def drop(examples: pa.Table) -> pa.Table:
        return examples.drop_columns(
            [name for name in examples.column_names if name.endswith(("_spans", "_counted", "n_common"))]
        )

    _rewrite(folder, drop, version=3)


def mask(folder: Path, spans: Callable[[int], list[int]]) -> None:
    """Rewrite a prepared folder so that of each answer of n tokens those in `spans(n)` count."""

    def change(examples: pa.Table) -> pa.Table:
        kind = "labels" if "label" in examples.column_names else "pairs"
        names = ("completion", "kl") if kind == "labels" else ("chosen", "rejected")
        rows = [
            masked(row, **{name: spans(row[f"n_{name}"]) for name in names if row[f"n_{name}"] is not None})
            for row in examples.to_pylist()
        ]
        return table(rows, kind)

    _rewrite(folder, change)


def _rewrite(folder: Path, change: Callable[[pa.Table], pa.Table], **inputs: Any) -> None:
    manifest, shards = PreparedManifest.find(folder), []
    for shard in manifest.shards:
        data = artifact.arrow_stream(change(artifact.open_arrow_stream(folder / shard.file)))
        shards.append(artifact.commit_file(folder / f"new-{shard.file}", data, split=shard.split, rows=shard.rows))
    facts = manifest.facts() | {"shards": shards, "inputs": manifest.inputs.facts() | inputs}
    PreparedManifest.make(**facts).commit(folder / artifact.MANIFEST)


def logps_of(prompt: list[int], completion: list[int]) -> list[float]:
    """What these tests take for the reference: token n of an answer has minus its id times n, in eighths. Exact in float32."""
    return [-token * n / 8 for n, token in enumerate(completion, 1)]


def scored(prompt: list[int], completion: list[int], **row: Any) -> dict[str, Any]:
    logps = logps_of(prompt, completion)
    return {
        "key": sequence_key(prompt, completion),
        "n_prompt": len(prompt),
        "n_completion": len(completion),
        "logp_sum": sum(logps),
        "logps": logps,
        "numerics_id": MINE,
        "status": "ok",
    } | row


def failed(prompt: list[int], completion: list[int], **row: Any) -> dict[str, Any]:
    return scored(prompt, completion, logp_sum=None, logps=None, status="failed: a log-prob is not finite", **row)


def cache_of(folder: Path, *chunks: list[dict[str, Any]]) -> Cache:
    """A cache to which these chunks were committed, each of one numerics_id."""
    cache = create_cache(folder, "tiny", REFERENCE)
    for chunk in chunks:
        numerics_id = chunk[0]["numerics_id"]
        CacheWriter(cache).commit(pa.Table.from_pylist(chunk, schema=CACHE), NUMERICS[numerics_id], numerics_id, None)
    return Cache(cache.folder, REFERENCE["model_id"])


def answers(rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of every sequence of these examples."""
    names = ("completion", "kl") if "label" in rows[0] else ("chosen", "rejected")
    return [(row["prompt_ids"], row[f"{name}_ids"]) for row in rows for name in names if row[f"{name}_ids"] is not None]


def cache_for(folder: Path, rows: list[dict[str, Any]], without: tuple[bytes, ...] = ()) -> Cache:
    """All answers of these examples, scored; those whose keys are in `without` failed."""
    sequences = {sequence_key(*each): each for each in answers(rows)}
    chunk = [failed(*each) if key in without else scored(*each) for key, each in sequences.items()]
    return cache_of(folder, chunk)


def floats(values: Any) -> list[float]:
    return [float(value) for value in np.asarray(values)]
