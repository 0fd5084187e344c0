"""Mutation testing: change one place of a module at a time, and run the tests that should notice.

    make mutants                                  every mutant of every module below; hours
    make mutants SAMPLE=200 SEED=1                as many of them, drawn at random
    make mutants ONLY=pipeline/stored/key_index.py     one module, or a folder of them

Results are kept in .mutants/, so that the same command goes on where it stopped. What was killed is not run again while its
module stays the same; what survived is, as soon as a test changes. Mutants that no test could notice are listed in
equivalent.toml, each with the reason.

Why not a tool: mutmut leaves out decorated functions, and here a loss is one; cosmic-ray starts Python anew for each mutant, and
importing PyTorch takes longer than most of these tests. Here that is done once, and each mutant runs in a fork, compiled from
memory: the files stay as they are. A test that starts a process of its own does not see a mutant there.
"""

import argparse
import contextlib
import hashlib
import importlib.machinery
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / ".mutants" / "results.jsonl"
EQUIVALENT = Path(__file__).parent / "equivalent.toml"
sys.path[:0] = [str(ROOT)]

from tests.mutants.mutate import Mutant, mutants  # noqa: E402

# The tests that should notice, the fastest first: the first failure ends a mutant's run.
_LOSSES = ("pairs", "labels", "noise", "margin_targets", "reference_free")
TESTS = {
    "pipeline/stored/key_index.py": "stored/key_index stored/cache",
    "pipeline/preparing/truncation.py": "preparing/truncation",
    "pipeline/preparing/encoder.py": "preparing/encoder",
    "pipeline/model/packing.py": "model/packing",
    "pipeline/model/logprobs.py": "model/logprobs model/forward",
    "pipeline/model/lm_head.py": "model/lm_head model/chunked_lm_head",
    "pipeline/model/chunked_lm_head.py": "model/chunked_lm_head model/forward",
    "pipeline/model/packed_row.py": "model/attention model/forward",
    "pipeline/model/attention.py": "model/attention model/forward",
    "pipeline/model/forward.py": "model/forward",
    "pipeline/model/architectures.py": "model/architectures",
    "pipeline/model/oom.py": "model/oom",
    "pipeline/model/trainable.py": "model/trainable training/policy",
    "pipeline/model/weights.py": "model/weights",
    "pipeline/training/objective.py": "training/objective training/policy",
    "pipeline/training/losses/registry.py": "training/losses/registry training/losses/own_loss training/objective",
    **{
        f"pipeline/training/losses/{name}.py": f"training/losses/{name} training/losses/registry training/losses/own_loss training/objective"
        for name in _LOSSES
    },
    "pipeline/identity.py": "identity",
    "pipeline/stored/artifact.py": "stored/artifact",
    "pipeline/stored/cache.py": "stored/cache stored/integrity stored/cache_maintenance",
    **{
        f"pipeline/stored/{name}.py": "stored/cache stored/integrity stored/cache_maintenance"
        for name in ("cache_writer", "shards", "verified_shards", "scoring_plan", "model_ids")
    },
    "pipeline/stored/claims.py": "stored/claims",
    "pipeline/stored/contradictions.py": "stored/contradictions",
    "pipeline/stored/freshness.py": "stored/freshness",
    "pipeline/stored/overwrite_guard.py": "stored/overwrite_guard",
    "pipeline/stored/duckdb_connection.py": "views/views stored/cut_answers",
    "pipeline/stored/prepared.py": "stored/prepared",
    "pipeline/stored/records.py": "stored/records",
    "pipeline/stored/row_writers.py": "../stages/export",
    "pipeline/stored/cut_answers.py": "stored/cut_answers",
    "pipeline/stored/cache_maintenance.py": "stored/cache_maintenance",
}
FOLDERS = ("pipeline/model", "pipeline/stored", "pipeline/training/losses")  # of which every module is meant
_SECONDS, _TIMES = 10, 5  # of processor time for a mutant, beyond so many times what its tests take without one
_GIB = 1 << 30


@dataclass
class Tally:
    """What became of a module's mutants."""

    n: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    survivors: list[str] = field(default_factory=list)


@dataclass
class Running:
    mutant: Mutant | None
    file: str
    until: float
    said: Any  # a temporary file in which the first test that failed is named
    began: float = field(default_factory=time.monotonic)


# -- one mutant ------------------------------------------------------------------------------------------------------


def start(mutant: Mutant | None, file: str, limit: int) -> tuple[int, Running]:
    """Run the tests of a module in a fork, with the mutant in its place."""
    said = tempfile.TemporaryFile("w+")
    # On a machine that does other things as well, processor time says more than the clock.
    running = Running(mutant, file, time.monotonic() + 20 * limit, said)
    if child := os.fork():
        return child, running
    code = 99
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_AS, (32 * _GIB, 32 * _GIB))
        if mutant is not None:
            put_in_place(ROOT / file, mutant.compiled(str(ROOT / file)))
        code = run_tests(tests_of(file), said)
    finally:
        os._exit(code)


def put_in_place(path: Path, code: CodeType) -> None:
    """Whoever imports that file in this process gets this code."""
    own = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, name: str) -> Any:
        return code if Path(self.path) == path else own(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def run_tests(files: list[Path], said: Any) -> int:
    import pytest

    class First:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                said.write(f"{report.nodeid}\n")
                said.flush()

    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    plain = [
        "-x",
        "-q",
        "--assert=plain",
        "-o",
        "addopts=",
        "-m",
        "not slow",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
    ]
    return int(pytest.main([*plain, *map(str, files)], plugins=[First()]))


def outcome(status: int) -> str:
    """killed: a test failed, or the module could not be imported. timeout: nothing came to an end."""
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "killed"
    code = os.waitstatus_to_exitcode(status)
    if code in (4, 5, 99):
        raise SystemExit(f"pytest ended with {code}: it found no tests, or could not be started.")
    return "killed" if code else "survived"


# -- all of them -----------------------------------------------------------------------------------------------------


def tests_of(file: str) -> list[Path]:
    paths = (ROOT / "tests/pipeline" / name for name in TESTS[file].split())
    return [path.with_name(f"test_{path.name}.py").resolve() for path in paths]


def is_there(file: str) -> bool:
    return all(each.exists() for each in (ROOT / file, *tests_of(file)))


def digest(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def known_results() -> dict[str, dict[str, Any]]:
    """The latest result of each mutant."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {result["mutant"]: result for result in map(json.loads, lines)}


def is_known(result: dict[str, Any] | None, file: str) -> bool:
    if result is None or result["module"] != digest(ROOT / file):
        return False
    return result["outcome"] != "survived" or result["tests"] == digest(*tests_of(file))


def equivalent() -> dict[str, str]:
    return {each["mutant"]: each["reason"] for each in tomllib.loads(EQUIVALENT.read_text())["equivalent"]}


def wanted(only: str, sample: int | None, seed: int) -> list[tuple[str, Mutant]]:
    modules = [file for file in TESTS if file.startswith(only) and is_there(file)]
    if not modules:
        raise SystemExit(f"ONLY={only}: none of {', '.join(TESTS)} begins so.")
    every = [(file, mutant) for file in modules for mutant in mutants((ROOT / file).read_text(), file)]
    return every if sample is None else random.Random(seed).sample(every, min(sample, len(every)))


def import_once() -> None:
    """What takes long and is the same for every mutant; nothing that would import a module of ours."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # Not by pytest, which would rewrite its assertions each time anew.
    importlib.import_module("hypothesis.strategies")
    for name in ("pytest", "torch", "transformers", "peft", "accelerate", "pyarrow.parquet", "duckdb", "datasets"):
        importlib.import_module(name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    assert not any(name.split(".")[0] == "prefcache" for name in sys.modules)


def wait(running: dict[int, Running]) -> tuple[int, int]:
    """The first child to end, and its status. One that is out of time is ended."""
    while True:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what it has left behind
            return child, status
        for child, each in running.items():
            if time.monotonic() > each.until:
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)


def limits(files: set[str]) -> dict[str, int]:
    """Seconds of processor time for a mutant of each module; its tests have to pass as they are."""
    found = {}
    for file in sorted(files):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        child, running = start(None, file, 3600)
        if outcome(wait({child: running})[1]) != "survived":
            running.said.seek(0)
            raise SystemExit(f"{file}: its tests fail without a mutant, too: {running.said.readline().strip()}")
        found[file] = _SECONDS + int(_TIMES * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before))
    return found


def run(chosen: list[tuple[str, Mutant]], jobs: int) -> None:
    known = known_results()
    left = [(file, mutant) for file, mutant in chosen if not is_known(known.get(mutant.name), file)]
    left = [(file, mutant) for file, mutant in left if mutant.name not in equivalent()]
    print(f"{len(chosen):,} mutants, {len(chosen) - len(left):,} known or equivalent, {len(left):,} to run", flush=True)
    if not left:
        return
    import_once()
    most = limits({file for file, _ in left})
    RESULTS.parent.mkdir(exist_ok=True)
    running: dict[int, Running] = {}
    with open(RESULTS, "a") as results:
        while left or running:
            while left and len(running) < jobs:
                file, mutant = left.pop(0)
                child, each = start(mutant, file, most[file])
                running[child] = each
            child, status = wait(running)
            each = running.pop(child)
            assert each.mutant is not None
            each.said.seek(0)
            result = {
                "mutant": each.mutant.name,
                "outcome": outcome(status),
                "by": each.said.readline().strip(),
                "seconds": round(time.monotonic() - each.began, 1),
                "module": digest(ROOT / each.file),
                "tests": digest(*tests_of(each.file)),
            }
            results.write(json.dumps(result) + "\n")
            results.flush()
            if result["outcome"] != "killed":
                print(f"{result['outcome']}: line {each.mutant.line}, {each.mutant.name}", flush=True)


def report(chosen: list[tuple[str, Mutant]]) -> int:
    """Print what became of these mutants by module; how many survive."""
    known, same, tallies = known_results(), equivalent(), dict[str, Tally]()
    for file, mutant in chosen:
        tally = tallies.setdefault(file, Tally())
        tally.n += 1
        result = known.get(mutant.name)
        if mutant.name in same:
            tally.outcomes["equivalent"] += 1
        elif is_known(result, file):
            assert result is not None
            tally.outcomes[result["outcome"]] += 1
            if result["outcome"] == "survived":
                tally.survivors.append(f"{file}:{mutant.line}  {mutant.name.removeprefix(file).strip()}")
    kinds = ("killed", "timeout", "equivalent", "survived")
    print(f"\n{'module':<48}{'mutants':>8}{''.join(f'{kind:>12}' for kind in kinds)}{'noticed':>9}")
    total = Tally()
    for file, tally in sorted(tallies.items()):
        print(row(file, tally, kinds))
        total.n, total.outcomes = total.n + tally.n, total.outcomes + tally.outcomes
    print(row("all of them", total, kinds))
    for tally in tallies.values():
        print(*(f"survived: {each}" for each in tally.survivors), sep="\n", end="\n" if tally.survivors else "")
    every = {mutant.name for file in TESTS if is_there(file) for mutant in mutants((ROOT / file).read_text(), file)}
    for name in same.keys() - every:
        print(f"{EQUIVALENT.name} lists a mutant that is gone: {name}")
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            file = str(path.relative_to(ROOT))
            if path.name != "__init__.py" and not (file in TESTS and is_there(file)):
                print(f"no tests are named for {file} (TESTS in {Path(__file__).relative_to(ROOT)})")
    return total.outcomes["survived"]


def row(name: str, tally: Tally, kinds: tuple[str, ...]) -> str:
    noticed = tally.outcomes["killed"] + tally.outcomes["timeout"]
    of = noticed + tally.outcomes["survived"]
    share = f"{noticed / of:.1%}" if of else "-"
    return f"{name:<48}{tally.n:>8,}{''.join(f'{tally.outcomes[kind]:>12,}' for kind in kinds)}{share:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make mutants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="PATH", help="modules whose path begins so")
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once")
    asked = parser.parse_args()
    os.nice(15)
    os.chdir(ROOT)
    chosen = wanted(asked.only, asked.sample, asked.seed)
    run(chosen, asked.jobs)
    sys.exit(1 if report(chosen) else 0)


if __name__ == "__main__":
    main()
