"""How long the ready questions take over many examples, with their verdicts, and how much memory.

    make bench-sql
    python -m tests.bench.sql --examples 1000000 --folder /tmp/bench-sql

An experiment of so many pairs (124 prompt, 41 chosen and 51 rejected tokens on average, with texts), the log-probs of all their
answers with every token's, and a run that visits each pair once, is written into --folder, unless it is there. One process of two
threads opens it and asks every question, some of which are over numbers and some over texts. Opening hashes every byte and joins
the cache with the pairs. `MiB` is the most memory that was the process's own while a question was answered; pages of mapped files,
which the system takes back when it needs them, are not in it.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

SHARD = 100_000
MODEL, NUMERICS = "a" * 64, "nf20656a5048dd3e"  # of {"engine": "bench"}
OVER_TEXT = {"near-identical", "duplicates", "contradictions", "cost"}
MOST_SECONDS = {True: 60, False: 3}
WORDS = 4096
_MEAN = {"prompt": 124, "chosen": 41, "rejected": 51}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=5_000_000)
    parser.add_argument("--folder", type=Path, help="keep the experiment here, and use it if it is there")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        measure(options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        if not (folder / "out/scored/manifest.json").exists():
            build(folder, options.examples)
        n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{options.examples:,} pairs, {n_bytes / 2**30:.1f} GiB, {os.cpu_count()} cores", flush=True)
        command = [sys.executable, "-m", "tests.bench.sql", "--part", "--folder", str(folder)]
        subprocess.run(command, check=True)


# -- what is measured ------------------------------------------------------------------------------------------------


def measure(folder: Path) -> None:
    from prefcache.commands.query import Experiment
    from prefcache.pipeline import views
    from prefcache.pipeline.questions import QUESTIONS

    experiment = Experiment(str(folder / "out"))
    # Every view has to be opened for it, and none is read.
    with _Used() as used, experiment.ask(f"select 1 from {', '.join(views.VIEWS)} limit 0", None, 600) as result:
        list(result.rows())
    _say("(opening)", used, "")
    for name, question in QUESTIONS.items():
        with _Used() as used, experiment.ask_question(question, timeout=600) as answered:
            n_rows = sum(1 for _ in answered.answer.rows())
            answered.verdict()
        over = "texts" if name in OVER_TEXT else "numbers"
        late = "" if used.seconds <= MOST_SECONDS[name in OVER_TEXT] else "  too slow"
        _say(name, used, f"{n_rows:>9,} rows, over {over}{late}")


def _say(name: str, used: "_Used", more: str) -> None:
    print(
        f"  {name:24} {used.seconds:7.1f} s  {used.cpu:7.1f} s of CPU  {used.peak / 2**20:7,.0f} MiB  {more}",
        flush=True,
    )


class _Used:
    """Seconds, those of CPU, which a busy machine does not stretch as much, and the most that the own pages of the process take
    that answers queries, which is a child of this one."""

    def __enter__(self) -> "_Used":
        self.peak, self._done = 0, threading.Event()
        self._began, self._cpu = time.perf_counter(), _cpu_seconds()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self._began, _cpu_seconds() - self._cpu
        self._look()
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._look()

    def _look(self) -> None:
        for child in multiprocessing.active_children():
            status = Path(f"/proc/{child.pid}/status").read_text()
            if match := re.search(r"RssAnon:\s+(\d+) kB", status):
                self.peak = max(self.peak, int(match[1]) * 1024)


def _cpu_seconds() -> float:
    children = [psutil.Process(child.pid).cpu_times() for child in multiprocessing.active_children()]
    return time.process_time() + sum(times.user + times.system for times in children)


# -- what is measured with -------------------------------------------------------------------------------------------


def build(folder: Path, n: int) -> None:
    from prefcache.pipeline.stored import artifact, records
    from prefcache.pipeline.stored.cache_writer import CacheWriter, create_cache

    rng = np.random.default_rng(0)
    cache = CacheWriter(create_cache(folder / "cache", "bench", {"model_id": MODEL, "weights": {}, "config": {}}))
    shards, began = [], time.perf_counter()
    log = _Log(folder / "out" / "trained")
    for first in range(0, n, SHARD):
        pairs = _pairs(rng, first, min(SHARD, n - first))
        name = f"train-{first:09}.arrow"
        shards.append(
            artifact.commit_file(
                folder / "out/prepared" / name, artifact.arrow_stream(pairs), split="train", rows=len(pairs)
            )
        )
        sums = {side: _score(rng, cache, pairs, side) for side in ("chosen", "rejected")}
        log.visits(rng, first, pairs, sums)
    quarantine = artifact.commit_file(
        folder / "out/prepared/quarantine.parquet", artifact.parquet(_no_quarantine()), rows=0
    )
    manifest = records.PreparedManifest.make(inputs={}, kind="pairs", shards=shards, quarantine=quarantine)
    manifest.commit(folder / "out/prepared" / artifact.MANIFEST)
    log.commit()
    scored = records.ScoredManifest.make(
        inputs={"prepared": ""},
        cache=str(cache.cache.folder),
        reference={"name": "bench", "model_id": MODEL},
        accepted_numerics=[NUMERICS],
    )
    scored.commit(folder / "out/scored" / artifact.MANIFEST)
    print(f"written in {time.perf_counter() - began:.0f} s")


def _no_quarantine() -> pa.Table:
    from prefcache.pipeline.schema import QUARANTINE

    return QUARANTINE.empty_table()


def _pairs(rng: np.random.Generator, first: int, n: int) -> pa.Table:
    from prefcache.pipeline.schema import PAIRS

    lengths = {side: rng.poisson(mean, n).astype(np.int32) + 1 for side, mean in _MEAN.items()}
    columns: dict[str, Any] = {
        "example_id": _hex(rng, n),
        "split": pa.array(["train"]).take(pa.array(np.zeros(n, np.int32))),
        "source": pa.array([f"source-{i}.jsonl" for i in range(20)]).take(pa.array(rng.integers(0, 20, n))),
        "line": np.arange(first + 1, first + n + 1),
        "boundary": pa.array(["exact"]).take(pa.array(np.zeros(n, np.int32))),
        "chosen_score": rng.normal(1, 1, n),
        "rejected_score": rng.normal(0, 1, n),
        "cut_prompt": np.zeros(n, np.int32),
        "images": pa.nulls(n),
    }
    for side, length in lengths.items():
        columns |= {side: _texts(rng, length), f"{side}_ids": _lists(rng.integers(0, 32_000, length.sum()), length)}
        columns[f"n_{side}"] = length
    for side in ("chosen", "rejected"):
        columns |= {f"{side}_key": _keys(rng, n), f"cut_{side}": (rng.random(n) < 0.05).astype(np.int32) * 10}
        columns[f"{side}_cut_ids"] = _lists(np.empty(0, np.int64), np.zeros(n, np.int32))
        whole = np.stack([np.zeros(n, np.int32), lengths[side]], 1)
        columns |= {f"n_{side}_counted": lengths[side], f"{side}_spans": _lists(whole.ravel(), np.full(n, 2, np.int32))}
    columns["n_common"] = np.zeros(n, np.int32)
    return pa.table({field.name: pa.array(columns[field.name]).cast(field.type) for field in PAIRS}, schema=PAIRS)


_POOL = pa.array(
    [" ".join(words) for words in np.random.default_rng(1).choice([f"w{i:03x}" for i in range(WORDS)], (20_000, 20))]
)


def _texts(rng: np.random.Generator, length: np.ndarray) -> pa.Array:
    """About as many characters as so many tokens have: phrases of 20 words, cut to length."""
    n_phrases = -(-int(length.max()) // 20)
    phrases = [_POOL.take(pa.array(rng.integers(0, len(_POOL), len(length)))) for _ in range(n_phrases)]
    whole = pc.binary_join_element_wise(*phrases, " ")
    # 4 characters and a blank to a token; those that are longer than most keep what most have.
    return pc.utf8_slice_codeunits(whole, 0, 5 * int(np.median(length)))


def _lists(values: np.ndarray, length: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32)))


def _keys(rng: np.random.Generator, n: int) -> pa.Array:
    buffer = pa.py_buffer(rng.integers(0, 256, (n, 16), np.uint8).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n, [None, buffer])


def _hex(rng: np.random.Generator, n: int) -> pa.Array:
    return pa.array([f"{value:016x}" for value in rng.integers(0, 1 << 63, n).tolist()])


def _score(rng: np.random.Generator, cache: Any, pairs: pa.Table, side: str) -> np.ndarray:
    """Commits what a reference might say of these answers; returns the sums."""
    from prefcache.pipeline.schema import CACHE

    length, n = pairs[f"n_{side}"].to_numpy(), len(pairs)
    logps = -rng.exponential(1.5, length.sum()).astype(np.float32)
    ends = np.cumsum(length)
    sums = np.add.reduceat(logps, ends - length, dtype=np.float64)
    lists = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]).astype(np.int32)), pa.array(logps))
    columns = [pairs[f"{side}_key"], pairs["n_prompt"], length, sums, lists, [NUMERICS] * n, ["ok"] * n]
    rows = pa.table(columns, schema=CACHE)
    cache.commit(rows, {"engine": "bench"}, NUMERICS, None)
    return sums


class _Log:
    """A run that visits every pair once, in steps of 32."""

    def __init__(self, run: Path) -> None:
        from prefcache.pipeline.stored.records import Provenance
        from prefcache.pipeline.training.run_log import PROVENANCE, RunLog

        self._run, self._log = run, RunLog(run)
        inputs = {"train": {"batch_size": 32}, "reference": MODEL}
        Provenance.make(inputs=inputs, loss="sigmoid", beta=0.1).commit(run / PROVENANCE)
        self._parts: list[dict[str, Any]] = []

    def visits(self, rng: np.random.Generator, first: int, pairs: pa.Table, sums: dict[str, np.ndarray]) -> None:
        from prefcache.pipeline.schema import STEPS
        from prefcache.pipeline.stored import artifact

        n = len(pairs)
        columns: dict[str, Any] = {
            name: pairs[name] for name in ("split", "example_id", "n_chosen_counted", "n_rejected_counted")
        }
        columns |= {"step": 1 + np.arange(first, first + n) // 32, "epoch": np.ones(n), "loss": rng.random(n)}
        for side, sign in (("chosen", 1), ("rejected", -1)):
            columns |= {f"ref_{side}_logp": sums[side], f"{side}_logp": sums[side] + rng.normal(sign, 3, n)}
        table = pa.table(
            {f.name: columns[f.name] if f.name in columns else pa.nulls(n, f.type) for f in STEPS}, schema=STEPS
        )
        part = self._run / "steps" / f"to-{first + n:08}.parquet"
        self._parts.append(artifact.commit_file(part, artifact.parquet(table)))

    def commit(self) -> None:
        from prefcache.pipeline.stored import artifact
        from prefcache.pipeline.stored.records import RunManifest

        facts = {"steps": 0, "examples": 0, "held_out": 0, "loss": "sigmoid", "seconds": 0, "model": []}
        RunManifest.make(**facts, parts=self._parts).commit(self._run / artifact.MANIFEST)


if __name__ == "__main__":
    main()
