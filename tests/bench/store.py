"""What a cache costs in an object store: seconds, requests, bytes and their price.

    make bench-store
    python -m tests.bench.store --rows 20000000 --folder /big/disk

The store is a folder behind HTTP on a line with a latency of 50 ms and 100 MB/s, which a process of its own serves. Each
part runs in a process of its own and, unless it says `warm`, on a machine without a mirror. `sums` are the log-probs of
whole answers, as DPO needs them; `lists` those of single tokens.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pyarrow as pa

from tests.bench.cache import MODEL, NUMERICS, build
from tests.helpers.project import ROOT

LATENCY, BYTES_PER_SECOND = 0.05, 100e6
# USD, as S3 lists them for its standard class in most regions of the US; bytes that stay in the region are free.
USD_PER_GET, USD_PER_PUT_OR_LIST = 0.0004 / 1000, 0.005 / 1000
BUCKET = "bench"
CHUNK_TOKENS, GPU_TOKENS_PER_SECOND = 250_000, 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--shard-rows", type=int, default=600_000)
    parser.add_argument("--folder", type=Path, help="keep the store here, and use it if it is there")
    parser.add_argument("--chunks", type=int, default=16, help="that are scored")
    parser.add_argument("--pass-tokens", type=int, default=1024, help="of the 0.5B pass that is measured")
    parser.add_argument("--only", choices=("reading", "scoring"))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--argument", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder, json.loads(options.argument or "null"))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if options.only != "scoring":
            report_reading(folder, options.rows, options.shard_rows)
        if options.only != "reading":
            report_scoring(folder, options.chunks, options.pass_tokens)


# -- reading ---------------------------------------------------------------------------------------------------------


def report_reading(folder: Path, n_rows: int, shard_rows: int) -> None:
    """Open a cache of so many rows, and read 1% of them: of few shards, and of all."""
    root = folder / "store" / BUCKET / "refs"
    if not (folder / "pairs.arrow").exists():
        shutil.rmtree(root.parent, ignore_errors=True)
        began = time.perf_counter()
        build(folder, n_rows, shard_rows)
        root.parent.mkdir(parents=True)
        (folder / "cache").rename(root)
        print(f"built in {time.perf_counter() - began:.0f} s")
    shards = list(root.glob("*/*.parquet"))
    n_bytes = sum(shard.stat().st_size for shard in shards)
    print(f"{n_rows:,} rows of 50 tokens, {len(shards):,} shards, {n_bytes / 1e9:.2f} GB, {os.cpu_count()} cores")
    write_keys(folder, n_rows)
    with serve(folder) as endpoint:
        for what, which in (("of few shards", "near"), ("spread evenly", "spread")):
            shutil.rmtree(folder / "mirror", ignore_errors=True)
            show("open, cold", run("open", folder, endpoint), endpoint)
            show("open, warm", run("open", folder, endpoint), endpoint)
            show(f"1% {what}: sums", run("read", folder, endpoint, [which, False]), endpoint)
            show(f"1% {what}: lists", run("read", folder, endpoint, [which, True]), endpoint)
            show(f"1% {what}: lists, warm", run("read", folder, endpoint, [which, True]), endpoint)
    shutil.rmtree(folder / "mirror", ignore_errors=True)


def write_keys(folder: Path, n_rows: int) -> None:
    """Choose 1% of the keys: those that were scored first, and some of all shards."""
    keys = np.random.default_rng(0).integers(0, 256, (n_rows, 16), np.uint8)  # as bench.cache.build draws them
    n = n_rows // 100
    np.save(folder / "near.npy", keys[:n])
    np.save(folder / "spread.npy", keys[np.random.default_rng(2).choice(n_rows, n, replace=False)])


def show(what: str, found: dict[str, Any], endpoint: str) -> None:
    with urlopen(f"{endpoint}/-/counts") as answer:
        counts = json.load(answer)
    requests = {kind: n for kind, n in counts["requests"].items() if n}
    requests["get"] = requests.get("get", 0) - 1  # that for the counts
    n_read = requests.get("get", 0) + requests.get("head", 0)
    usd = n_read * USD_PER_GET + (requests.get("list", 0) + requests.get("put", 0)) * USD_PER_PUT_OR_LIST
    by_kind = ", ".join(f"{n:,} {kind}" for kind, n in sorted(requests.items()) if n)
    received, sent = (counts["bytes"].get(way, 0) / 1e6 for way in ("received", "sent"))
    print(
        f"  {what:30} {found['seconds']:7.1f} s  {received:9.1f} MB received  {sent:5.1f} MB sent  {usd:.5f} USD  ({by_kind})",
        flush=True,
    )


def open_part(folder: Path, argument: None) -> dict[str, Any]:
    from prefcache.pipeline.stored.mirror import open_root

    began = time.perf_counter()
    open_cache(open_root(f"s3://{BUCKET}/refs"))
    return {"seconds": time.perf_counter() - began}


def read_part(folder: Path, argument: list[Any]) -> dict[str, Any]:
    from prefcache.pipeline.stored.mirror import open_root
    from prefcache.pipeline.stored.token_logps import token_logps

    which, has_lists = argument
    found = np.load(folder / f"{which}.npy")
    keys = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(found), [None, pa.py_buffer(found.tobytes())])
    began = time.perf_counter()
    cache = open_cache(open_root(f"s3://{BUCKET}/refs"))
    columns = [pa.chunked_array([keys])]
    sums = cache.logps(columns, [NUMERICS])
    assert not np.ma.getmaskarray(sums[0]).any()
    if has_lists:
        lists = token_logps(cache, columns, sums, [NUMERICS])[0].to_arrow(np.ma.getmaskarray(sums[0]))
        assert len(lists) == len(found) and lists.null_count == 0
    return {"seconds": time.perf_counter() - began}


def open_cache(root: Path) -> Any:
    from prefcache.pipeline.stored.cache import Cache

    (folder,) = (path.parent for path in root.glob("*/reference.json"))
    cache = Cache(folder, MODEL)
    cache.refuse_damage()
    return cache


# -- scoring ---------------------------------------------------------------------------------------------------------


def report_scoring(folder: Path, n_chunks: int, pass_tokens: int) -> None:
    """How much longer a chunk takes a scorer if its cache is in the store, compared with a pass of 0.5 billion weights."""
    seconds = run("pass", folder, "", pass_tokens)["seconds"]
    cpu = seconds * CHUNK_TOKENS / pass_tokens
    gpu = CHUNK_TOKENS / GPU_TOKENS_PER_SECOND
    print(
        f"0.5B pass: {pass_tokens:,} tokens in {seconds:.1f} s here, so {cpu:,.0f} s for a chunk of {CHUNK_TOKENS:,}; "
        f"{gpu:.1f} s at {GPU_TOKENS_PER_SECOND:,} tokens/s"
    )
    with serve(folder) as endpoint:
        measure_added(folder, endpoint, n_chunks, 0.0)
        few = measure_added(folder, endpoint, n_chunks // 4, gpu)
        many = measure_added(folder, endpoint, n_chunks, gpu)
    each = (many - few) / (n_chunks - n_chunks // 4)
    print(
        f"the store adds {many:.2f} s to {n_chunks} chunks of {gpu:.1f} s: {many / n_chunks / gpu:.2%}; {each:.3f} s for each further "
        f"one: {each / gpu:.2%} at {GPU_TOKENS_PER_SECOND:,} tokens/s, {each / cpu:.4%} of the pass here"
    )


def measure_added(folder: Path, endpoint: str, n_chunks: int, chunk_seconds: float) -> float:
    """Return the seconds that scoring takes longer if the cache is in the store; a run's own are from its first claim to its last record."""
    times = {}
    for place in ("folder", "store"):
        for used in ("store/scored", "scored", "mirror"):
            shutil.rmtree(folder / used, ignore_errors=True)
        url = str(folder / "scored") if place == "folder" else "s3://scored/refs"
        found = run("score", folder, endpoint, [url, n_chunks, chunk_seconds])
        times[place] = found["seconds"]
    show(f"{found['chunks']} chunks of {chunk_seconds:.1f} s", found, endpoint)
    print(f"  {'':30} {times['folder']:7.1f} s in a folder", flush=True)
    return times["store"] - times["folder"]


def score_part(folder: Path, argument: list[Any]) -> dict[str, Any]:
    """Fill a cache by a scorer's own loop around an engine that waits."""
    from prefcache.pipeline.config import Score
    from prefcache.pipeline.progress import Progress
    from prefcache.pipeline.scoring.scorer import Scorer
    from prefcache.pipeline.stored.prepared import Sequences
    from tests.helpers.caches import MINE, NUMERICS, prepared, scored
    from tests.helpers.machines import open_cache

    url, n_chunks, chunk_seconds = argument
    # 250 tokens for each pair: a prompt of 50, and two answers of 75 after it.
    lists = [([i, *range(49)], [i % 997, *range(74)], [i % 991, *range(1, 75)]) for i in range(n_chunks * 1000)]
    table = prepared(lists)
    sequences = Sequences(table)
    cache = open_cache(url)
    plan = cache.plan(table, [MINE], CHUNK_TOKENS)
    # Before, for computing them is not what is measured.
    rows = [randomize(scored(table, slots), seed) for seed, slots in enumerate(plan.chunks)]

    class Scripted(Scorer):
        def _compute_rows(self, keys: list[bytes], chunk: list[Any]) -> pa.Table:
            time.sleep(chunk_seconds)
            return rows.pop(0)

        def _refuse_changed_weights(self) -> None:
            pass

    scorer = Scripted(Score(), None, NUMERICS[MINE], cache, sequences, Progress(silent=True))  # type: ignore[arg-type]
    began = time.perf_counter()
    for _ in scorer.run(plan, 0, 1):
        pass
    return {"seconds": time.perf_counter() - began, "chunks": len(plan.chunks)}


def randomize(rows: pa.Table, seed: int) -> pa.Table:
    """Replace the log-probs by random ones, which take as much space as real ones."""
    offsets = np.cumsum([0, *rows["n_completion"].to_pylist()], dtype=np.int32)
    values = -np.random.default_rng(seed).exponential(1.5, offsets[-1]).astype(np.float32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    sums = np.add.reduceat(values.astype(np.float64), offsets[:-1])
    columns = {**dict(zip(rows.column_names, rows.columns, strict=True)), "logps": lists, "logp_sum": pa.array(sums)}
    return pa.table(list(columns.values()), schema=rows.schema)


def pass_part(folder: Path, n_tokens: int) -> dict[str, Any]:
    """Time the forward of a Qwen2 of the shape of 0.5B, with random weights, over one sequence."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).eval()
    ids = torch.randint(0, 151_936, (n_tokens // 256, 256))
    with torch.inference_mode():
        model(ids[:1])
        began = time.perf_counter()
        model(ids[: len(ids) // 2])
        model(ids[len(ids) // 2 :])
    return {"seconds": time.perf_counter() - began}


# -- processes -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve the store in a process of its own; yield its endpoint."""
    (folder / "store").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.helpers.folder_store", folder / "store", LATENCY, BYTES_PER_SECOND]
    with subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.kill()


def run(part: str, folder: Path, endpoint: str, argument: Any = None) -> dict[str, Any]:
    """Run a part in a process of its own."""
    environment = os.environ | {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PREFCACHE_MIRROR": str(folder / "mirror"),
    }
    command = [sys.executable, "-m", "tests.bench.store", "--part", part, "--folder", str(folder)]
    command += ["--argument", json.dumps(argument)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


PARTS = {"open": open_part, "read": read_part, "score": score_part, "pass": pass_part}

if __name__ == "__main__":
    main()
