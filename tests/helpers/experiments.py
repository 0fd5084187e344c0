"""A small experiment whose every view has rows."""

from pathlib import Path

import pyarrow as pa

from prefcache.pipeline import identity, views
from prefcache.pipeline.schema import CACHE, PREPARED, STEPS
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import CacheWriter, create_cache

KEYS = [bytes([i]) * 16 for i in range(4)]


# Two pairs; their answers have the keys 0, 1 and 2, 3.
PAIRS = [
    {
        "example_id": f"e{i}",
        "split": ("train", "held_out")[i],
        "source": "a.jsonl",
        "line": i + 1,
        "prompt": f"why {i}?",
    }
    | {"chosen": "yes", "rejected": "no", "n_prompt": 3, "n_chosen": 2 + i, "n_rejected": 1, "boundary": "exact"}
    | {"n_chosen_counted": 2 + i, "n_rejected_counted": 1, "chosen_spans": [0, 2 + i], "rejected_spans": [0, 1]}
    | {"chosen_key": KEYS[2 * i], "rejected_key": KEYS[2 * i + 1]}
    for i in range(2)
]


SCORES = [
    {"key": KEYS[0], "n_prompt": 3, "n_completion": 2, "logp_sum": -5.0, "logps": [-2.0, -3.0], "status": "ok"},
    {"key": KEYS[1], "n_prompt": 3, "n_completion": 1, "logp_sum": -6.0, "logps": [-6.0], "status": "ok"},
    {"key": KEYS[2], "n_prompt": 3, "n_completion": 3, "logp_sum": -7.5, "logps": None, "status": "ok"},
    {"key": KEYS[3], "n_prompt": 3, "n_completion": 1, "logp_sum": None, "logps": None, "status": "failed: not finite"},
]


def visit(step, example_id, chosen, rejected, ref_chosen, ref_rejected, split="train", loss=0.5) -> dict:
    return {
        "step": step,
        "epoch": step / 2,
        "split": split,
        "example_id": example_id,
        "chosen_logp": chosen,
        "rejected_logp": rejected,
        "ref_chosen_logp": ref_chosen,
        "ref_rejected_logp": ref_rejected,
        "loss": loss,
    }


# Pair e0 is visited at steps 1 and 2, e1 (held out) at 0 and 2.
VISITS = [
    [visit(0, "e1", -7.5, -8.0, -7.5, -8.0, "held_out"), visit(1, "e0", -5.0, -6.0, -5.0, -6.0, loss=0.693)],
    [visit(2, "e0", -3.0, -10.0, -5.0, -6.0, loss=0.4), visit(2, "e1", -9.5, -7.0, -7.5, -8.0, "held_out")],
]


def parquet(path: Path, rows: list[dict], schema: pa.Schema) -> str:
    artifact.commit_bytes(path, artifact.parquet(pa.Table.from_pylist(rows, schema=schema)))
    return str(path)


NUMERICS = {
    identity.numerics_id(each): each
    for each in ({"engine": "transformers", "dtype": "float32", "version": version} for version in "123")
}


N0, N1, N2 = NUMERICS


def cache(folder: Path, name: str, scores: list[dict], model_id: str = "a" * 64, numerics_id: str = N1) -> Cache:
    """Make a real cache of these rows."""
    found = create_cache(folder / "cache", name, {"model_id": model_id, "weights": {}, "config": {}})
    rows = [score | {"numerics_id": numerics_id} for score in scores]
    CacheWriter(found).commit(pa.Table.from_pylist(rows, schema=CACHE), NUMERICS[numerics_id], numerics_id, None)
    return found.reopen()


def run_of(folder: Path, name: str, **facts) -> dict:
    return {"folder": str(folder / name), "run": name, "loss": "sigmoid", "beta": 0.1, "per_token": False} | facts


def sources(folder: Path, runs: dict[str, float]) -> views.Sources:
    """Make an experiment whose runs all made the same visits, each with its own beta."""
    parts = [
        parquet(folder / run / "steps" / f"to-{i + 1:08}.parquet", rows, STEPS)
        for run in runs
        for i, rows in enumerate(VISITS)
    ]
    rows = [run_of(folder, run, beta=beta) for run, beta in runs.items()]
    reference = cache(folder, "org/tiny", SCORES)
    return views.Sources(
        prepared=pa.Table.from_pylist(PAIRS, schema=PREPARED["pairs"]),
        references=[views.Reference(reference, [N1])],
        shards=reference.shards,
        steps=parts,
        runs=pa.Table.from_pylist(rows, schema=views.RUNS),
    )
