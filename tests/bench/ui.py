"""How long the pages' lists, counts and histograms take over many pairs.

    make bench-ui
    python -m tests.bench.ui --examples 1000000 --folder /tmp/bench-sql

Reads the experiment that tests/bench/sql.py writes into --folder, unless it is there. Each click is what a page asks for: its list and,
at the same time, its count with its histograms; the seconds are those of the slower one. Opening hashes every byte, joins the cache
with the pairs and makes the table of numbers. `MiB` is the memory of the processes that answer, without pages of mapped files.
"""

import argparse
import os
import re
import tempfile
import threading
import time
from pathlib import Path

import psutil

from prefcache.pipeline.browsing.filters import Filter, Outcome, Range
from prefcache.pipeline.browsing.queries import Order
from prefcache.ui.reader import Reader
from tests.bench import sql

COLUMNS = ["n_chosen_counted", "n_rejected_counted", "margin", "margin_per_token", "trained.margin"]
NEGATIVE = Range("margin", None, 0.0)
# What a visitor may do, one after the other.
CLICKS = {
    "everything": (Filter(), Order(), 1),
    "sort by margin": (Filter(), Order("margin"), 1),
    "drag a range of margins": (Filter(ranges=(NEGATIVE,)), Order("margin"), 1),
    "one source as well": (Filter(sources=("source-1.jsonl",), ranges=(NEGATIVE,)), Order("margin"), 1),
    "that a run got wrong": (Filter(ranges=(NEGATIVE,), outcomes=(Outcome("trained", "wrong"),)), Order(), 1),
    "an SQL condition": (Filter(where="n_prompt > 130 and trained.margin < margin"), Order(), 1),
    "page 1,000 by reward": (Filter(ranges=(NEGATIVE,)), Order("trained.margin", is_descending=True), 1000),
    "a text": (Filter(text="w0a3 w1"), Order(), 1),
    "another text": (Filter(text="w0a3 w2"), Order(), 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=5_000_000)
    parser.add_argument("--folder", type=Path, help="keep the experiment here, and use it if it is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        if not (folder / "out/scored/manifest.json").exists():
            sql.build(folder, options.examples)
        print(f"{options.examples:,} pairs, {os.cpu_count()} cores", flush=True)
        measure(folder / "out")


def measure(folder: Path) -> None:
    began = time.perf_counter()
    reader = Reader(folder)
    reader.open()
    reader.count(Filter())
    _say("(opening)", time.perf_counter() - began)
    for name, (chosen, order, page) in CLICKS.items():
        _say(name, _time_click(reader, chosen, order, page), f"{reader.count(chosen):>11,} rows")
    reader.close()


def _time_click(reader: Reader, chosen: Filter, order: Order, page: int) -> float:
    def counts() -> None:
        reader.histograms(chosen)

    other = threading.Thread(target=counts)
    began = time.perf_counter()
    other.start()
    reader.page(chosen, order, COLUMNS, page)
    other.join()
    return time.perf_counter() - began


def _say(name: str, seconds: float, more: str = "") -> None:
    print(f"  {name:26} {seconds:7.2f} s  {_own_bytes() / 2**20:7,.0f} MiB  {more}", flush=True)


def _own_bytes() -> int:
    """Memory of this process and its children that is their own."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    statuses = (Path(f"/proc/{process.pid}/status").read_text() for process in processes)
    return sum(int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024 for status in statuses)  # type: ignore[index]


if __name__ == "__main__":
    main()
