"""How long a large cache takes to open: for training, for planning, and what many small shards or a merging cost.

    make bench-cache
    python -m tests.bench.cache --rows 20000000 --shard-rows 600000
    python -m tests.bench.cache --rows 2000000 --shard-rows 1500 --gc

A cache of ROWS rows with 50 tokens each is written once into --folder, and half as many pairs that name its keys in
another order. Each part runs in a process of its own, which reports its seconds, from the import of the cache's module
on, its seconds of CPU, which a busy machine does not stretch as much, and its peak resident memory, all memory maps
included. `lookup` is that of the Python API. `first` is the opening that hashes every byte; `cold` has
the files' pages dropped from memory before; `again` has them in memory.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

TOKENS = 50
MODEL, NUMERICS = "a" * 32, "nf20656a5048dd3e"  # of {"engine": "bench"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--shard-rows", type=int, default=600_000)
    parser.add_argument("--folder", type=Path, help="keep the cache here, and use it if it is there")
    parser.add_argument("--gc", action="store_true", help="merge its shards, and open it once more")
    parser.add_argument("--verify", action="store_true", help="check all of it as well")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(_measured(options.part, options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        if not (folder / "pairs.arrow").exists():
            shutil.rmtree(folder / "cache", ignore_errors=True)
            build(folder, options.rows, options.shard_rows)
        _report(folder)
        if options.verify:
            _say("verify", _run("verify", folder))
        if options.gc:
            _say("gc", _run("gc", folder))
            _report(folder)


def _report(folder: Path) -> None:
    shards = list(folder.glob("cache/*/*.parquet"))
    n_bytes = sum(shard.stat().st_size for shard in shards)
    print(f"{len(shards):,} shards, {n_bytes / 2**30:.2f} GiB, {os.cpu_count()} cores")
    for memo in folder.glob("cache/.verified-*"):
        memo.unlink()
    _say("train, first", _run("train", folder))
    for shard in shards:
        with open(shard, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    _say("train, cold", _run("train", folder))
    _say("train, again", _run("train", folder))
    _say("lookup, again", _run("lookup", folder))
    _say("plan, again", _run("plan", folder))
    _say("hash 1 million", _run("hash", folder))


def _say(what: str, found: dict[str, Any]) -> None:
    steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["steps"].items())
    print(
        f"  {what:13} {found['seconds']:7.1f} s  {found['cpu']:7.1f} s of CPU  {found['mib']:7,.0f} MiB peak  ({steps})",
        flush=True,
    )


def _run(part: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.cache", "--part", part, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- what is measured with -------------------------------------------------------------------------------------------


def build(folder: Path, n_rows: int, shard_rows: int) -> None:
    from prefcache.pipeline.stored.cache_writer import CacheWriter, create_cache

    reference = {"model_id": MODEL, "weights": {}, "config": {}}
    cache = CacheWriter(create_cache(folder / "cache", "bench", reference))
    keys = np.random.default_rng(0).integers(0, 256, (n_rows, 16), np.uint8)
    for begin in range(0, n_rows, shard_rows):
        cache.commit(_rows(keys[begin : begin + shard_rows], begin), {"engine": "bench"}, NUMERICS, None)
    order = np.random.default_rng(1).permutation(n_rows)
    half, columns = n_rows // 2, {}
    for name, chosen in (("chosen_key", order[:half]), ("rejected_key", order[half : 2 * half])):
        columns[name] = _fixed(keys[chosen])
    with pa.OSFile(str(folder / "pairs.arrow"), "wb") as file:
        table = pa.table(columns)
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=50_000)


def _rows(keys: np.ndarray, seed: int) -> pa.Table:
    from prefcache.pipeline.schema import CACHE

    n = len(keys)
    logps = -np.random.default_rng(seed + 2).exponential(1.5, (n, TOKENS)).astype(np.float32)
    offsets = np.arange(0, (n + 1) * TOKENS, TOKENS, dtype=np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(logps.ravel()))
    columns = [
        _fixed(keys),
        np.full(n, 120, np.int32),
        np.full(n, TOKENS, np.int32),
        logps.sum(1, dtype=np.float64),
        lists,
        [NUMERICS] * n,
        ["ok"] * n,
    ]
    return pa.table([pa.array(c) if isinstance(c, np.ndarray | list) else c for c in columns], schema=CACHE)


def _fixed(keys: np.ndarray) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())])


# -- the parts -------------------------------------------------------------------------------------------------------


def _measured(part: str, folder: Path) -> dict[str, Any]:
    steps: dict[str, float] = {}
    began = time.perf_counter()
    PARTS[part](folder, steps)
    seconds, cpu = time.perf_counter() - began, time.process_time()
    return {"seconds": seconds, "cpu": cpu, "mib": _peak_mib(), "steps": steps}


def _peak_mib() -> float:
    # Not getrusage: its peak includes the parent's, which the child had before it became another program.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def _open(folder: Path, steps: dict[str, float]) -> tuple[Any, pa.Table]:
    from prefcache.pipeline.stored import artifact

    began = time.perf_counter()
    from prefcache.pipeline.stored.cache import Cache

    steps["import"] = time.perf_counter() - began
    (found,) = (path for path in (folder / "cache").iterdir() if path.is_dir())
    began = time.perf_counter()
    cache = Cache(found, MODEL)
    cache.refuse_damage()
    steps["open"] = time.perf_counter() - began
    return cache, artifact.open_arrow_stream(folder / "pairs.arrow")


def train(folder: Path, steps: dict[str, float]) -> None:
    cache, pairs = _open(folder, steps)
    began = time.perf_counter()
    chosen, rejected = cache.logps([pairs["chosen_key"], pairs["rejected_key"]], [NUMERICS])
    steps["join"] = time.perf_counter() - began
    assert not chosen.mask.any() and not rejected.mask.any()


def lookup(folder: Path, steps: dict[str, float]) -> None:
    """As the Python API looks all keys up, and says of each whether it is missing."""
    from prefcache.pipeline.stored.lookups import look_up

    cache, pairs = _open(folder, steps)
    began = time.perf_counter()
    keys = pa.chunked_array([*pairs["chosen_key"].chunks, *pairs["rejected_key"].chunks])
    found = look_up(cache, keys, [NUMERICS], per_token=False)
    steps["lookup"] = time.perf_counter() - began
    assert not found.missing.any()


def hash_ids(folder: Path, steps: dict[str, float]) -> None:
    """The keys of a million sequences of 120 prompt and 50 completion tokens."""
    from prefcache.pipeline.stored.id_lists import read_sequences, sequence_keys

    n = 1_000_000
    ids = pa.array(np.random.default_rng(0).integers(0, 100_000, 170 * n, np.int32))
    prompts, completions = (
        pa.ListArray.from_arrays(pa.array(np.arange(0, (n + 1) * length, length, np.int32)), ids)
        for length in (120, TOKENS)
    )
    began = time.perf_counter()
    assert len(sequence_keys(read_sequences(prompts, completions))) == n
    steps["hash"] = time.perf_counter() - began


def plan(folder: Path, steps: dict[str, float]) -> None:
    from prefcache.pipeline.stored.scoring_plan import plan_scoring

    cache, pairs = _open(folder, steps)
    n = np.full(len(pairs), 170, np.int32)
    slot = 2 * np.arange(len(pairs))
    tables = [
        pa.table(
            {"key": pairs[f"{name}_key"], "slot": slot + i, "prompt": slot.view(np.uint64), "n": n, "n_completion": n}
        )
        for i, name in enumerate(("chosen", "rejected"))
    ]
    began = time.perf_counter()
    found = plan_scoring(cache, pa.concat_tables(tables), [NUMERICS], 250_000)
    steps["plan"] = time.perf_counter() - began
    assert not found.n_missing


def verify(folder: Path, steps: dict[str, float]) -> None:
    from prefcache.commands import verify
    from prefcache.pipeline.progress import Progress

    result = verify.run([str(folder / "cache")], Progress(quiet=True))
    assert not result.damaged


def gc(folder: Path, steps: dict[str, float]) -> None:
    from prefcache.commands import gc
    from prefcache.pipeline.progress import Progress
    from prefcache.pipeline.stored.cache_maintenance import TARGET_MIB

    gc.run([str(folder / "cache")], Progress(quiet=True), TARGET_MIB)


PARTS = {"train": train, "lookup": lookup, "hash": hash_ids, "plan": plan, "verify": verify, "gc": gc}

if __name__ == "__main__":
    main()
