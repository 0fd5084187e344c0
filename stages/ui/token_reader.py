"""The tokens of an example's answers, and what the reference and the runs give them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefcache import example_tokens
from prefcache.pipeline import model_files
from prefcache.pipeline.errors import PrefcacheError
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import RunManifest
from prefcache.pipeline.training import token_gains
from prefcache.pipeline.visible_text import format_bytes
from prefcache.ui.token_process import TokenProcess

_SECONDS_TO_DECODE = 60.0  # most of it to load the tokenizer
_SECONDS_TO_COMPUTE = 300.0
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Logps = Mapping[str, Sequence[float | None]]  # of each answer's tokens; None where a token does not count


@dataclass(frozen=True)
class RunLogps:
    """A run's log-probs of an example, or why there are none."""

    run: str
    logps: Logps
    origin: str = ""  # in words
    cost: str = ""  # what it takes to compute them, where they can be
    problem: str = ""


class TokenReader:
    """Reads an experiment's tokens; what takes a tokenizer or a model is done in two processes of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._texts, self._models = TokenProcess(), TokenProcess()

    def open(self) -> None:
        """Start to load the tokenizer, so that the first page does not wait for it."""
        self._texts.open(self._folder)

    def close(self) -> None:
        self._texts.close()
        self._models.close()

    def read_texts(self, row: Mapping[str, Any], answers: Sequence[str]) -> tuple[Mapping[str, Sequence[str]], str]:
        """Return the text of each token by answer, or why they are unknown."""
        try:
            texts = self._texts.decode(self._folder, _take_ids(row, answers), _SECONDS_TO_DECODE)
        except PrefcacheError as error:
            return {}, f"The tokenizer cannot be used: {error}"
        if texts is None:
            return {}, "No tokenizer of these examples is on this machine: neither a run's model nor the reference."
        return texts, ""

    def read_reference(self, table: pa.Table, answers: Sequence[str]) -> tuple[Logps, str]:
        """Return the cached log-probs of a table of one example, or why there are none."""
        try:
            logps = example_tokens.read_reference(self._folder / "scored", table, answers)
        except PrefcacheError as error:
            return {}, str(error)
        if not logps:
            return {}, "The reference has not scored it (prefcache score CONFIG)."
        return {name: each.tolist() for name, each in logps.items()}, ""

    def read_run(self, run: str, row: Mapping[str, Any], answers: Sequence[str], *, compute: bool) -> RunLogps:
        """Return what a run gives the tokens: stored at its end, or computed now if that is wanted or its model is loaded."""
        folder = self._folder / run
        if stored := _read_stored(folder, row["example_id"]):
            return RunLogps(run, stored, "stored at the end of the run")
        try:
            cost = _estimate_cost(folder)
        except (PrefcacheError, OSError) as error:
            return RunLogps(run, {}, problem=str(error))
        if not cost:
            return RunLogps(run, {}, problem=f"{run} has no model: it is not finished, or its model was removed.")
        if not compute and folder not in self._models.models:
            return RunLogps(run, {}, cost=cost)
        try:
            ids = _take_ids(row, answers)
            logps = self._models.compute_logps(folder, row["prompt_ids"], row["images"] or (), ids, _SECONDS_TO_COMPUTE)
        except PrefcacheError as error:
            return RunLogps(run, {}, cost=cost, problem=str(error))
        return RunLogps(run, logps, "computed now by the plain forward in float32")


def _take_ids(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Sequence[int]]:
    return {name: row[f"{name}_ids"] for name in answers}


def _read_stored(run: Path, example_id: str) -> Logps:
    """Read the log-probs that the run stored of the examples that it moved most; {} for any other."""
    manifest = RunManifest.find(run)
    if manifest is None or manifest.tokens is None or artifact.damage(run, manifest.tokens):
        return {}
    table = _read_moved(run / token_gains.FILE, manifest.tokens.xxh3_128)
    return {row["answer"]: row["logps"] for row in table if row["example_id"] == example_id}


@lru_cache(64)
def _read_moved(file: Path, checksum: str) -> list[dict[str, Any]]:
    columns = ["example_id", "answer", "logps"]
    rows: list[dict[str, Any]] = pq.read_table(
        file.absolute(), columns=columns, page_checksum_verification=True
    ).to_pylist()
    return rows


def _estimate_cost(run: Path) -> str:
    """Say what loading the run's model takes; "" if it has none."""
    if not (run / example_tokens.MODEL).is_dir():
        return ""
    policy = example_tokens.find_policy(run)
    on_disk = sum(file.stat().st_size for file in policy.weight_files)
    in_memory = on_disk * 4 / _BYTES[model_files.saved_dtype(policy.folder)]
    return f"loads {format_bytes(on_disk)} of weights, takes about {format_bytes(round(in_memory))} of memory"
