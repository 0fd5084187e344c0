"""What was cut shorter is the beginning of what was scored longer: of exactly these tokens, under exactly these numerics."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefcache.pipeline.schema import CACHE, PREPARED, TokenSequence, sequence_key
from prefcache.pipeline.stored import cut_answers
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.cache_writer import CacheWriter
from prefcache.pipeline.stored.prepared import Prepared, Sequences, sequence_table
from prefcache.pipeline.stored.scoring_plan import plan_scoring
from tests.helpers import examples as examples_helper
from tests.helpers.examples import MINE, OTHER, REFERENCE, cache_of
from tests.helpers.project import WORDS, write_config


def pair(prompt: list[int], *answers: tuple[list[int], list[int]]) -> dict[str, Any]:
    """A row of a chosen and a rejected answer, each as what was kept and what was cut off."""
    row: dict[str, Any] = {"prompt_ids": prompt, "n_prompt": len(prompt)}
    for name, (kept, cut) in zip(("chosen", "rejected"), answers, strict=True):
        row |= {f"{name}_ids": kept, f"{name}_cut_ids": cut, f"n_{name}": len(kept), f"cut_{name}": len(cut)}
        row[f"{name}_key"] = sequence_key(prompt, kept)
    return row


def label(prompt: list[int], kept: list[int], cut: list[int], kl: tuple[list[int], list[int]] | None) -> dict[str, Any]:
    return {
        "prompt_ids": prompt,
        "n_prompt": len(prompt),
        "completion_ids": kept,
        "completion_cut_ids": cut,
        "completion_key": sequence_key(prompt, kept),
        "n_completion": len(kept),
        "kl_ids": kl and kl[0],
        "kl_cut_ids": kl and kl[1],
        "kl_key": kl and sequence_key(prompt, kl[0]),
        "n_kl": kl and len(kl[0]),
    }


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=PREPARED["labels" if "kl_ids" in rows[0] else "pairs"])


def scored(prompt: list[int], completion: list[int], logps: list[float] | None = None, **row: Any) -> dict[str, Any]:
    """A row of the cache. Unless given, token n has the log-prob -n."""
    logps = [-float(n) for n in range(len(completion))] if logps is None else logps
    return examples_helper.scored(prompt, completion, logps=logps, **{"logp_sum": sum(logps)} | row)


def missing(examples: pa.Table, cache: Cache, accepted: list[str]) -> np.ndarray:
    plan = plan_scoring(cache, sequence_table(examples), accepted, 100_000)
    return np.concatenate([np.empty(0, np.int64), *plan.chunks])


def served(examples: pa.Table, cache: Cache, *accepted: str) -> list[dict[str, Any]]:
    names = list(accepted or [MINE])
    tables = list(cut_answers.find_rows(examples, missing(examples, cache, names), cache, names))
    assert all(each.schema == CACHE and len(set(each["numerics_id"].to_pylist())) == 1 for each in tables)
    found = [row for each in tables for row in each.to_pylist()]
    assert len({row["key"] for row in found}) == len(found)
    return found


# -- by hand ---------------------------------------------------------------------------------------------------------

P, WHOLE = [1, 2], [5, 6, 7, 8, 9]
LOGPS = [-0.5, -1.0, -2.0, -4.0, -8.0]
# Of the five tokens of the chosen answer three were kept; of the rejected one nothing was cut.
CUT = table(pair(P, (WHOLE[:3], WHOLE[3:]), ([5], [])))


def test_an_answer_of_five_tokens_cut_to_three_is_its_first_three_and_then_no_longer_missing(tmp_path):
    cache = cache_of(tmp_path, [scored(P, WHOLE, LOGPS), scored(P, [5])])
    (rows,) = cut_answers.find_rows(CUT, missing(CUT, cache, [MINE]), cache, [MINE])
    assert rows.to_pylist() == [
        {
            "key": sequence_key([1, 2], [5, 6, 7]),
            "n_prompt": 2,
            "n_completion": 3,
            "logp_sum": -3.5,
            "logps": [-0.5, -1.0, -2.0],
            "numerics_id": MINE,
            "status": "ok",
        }
    ]
    CacheWriter(cache).commit(rows, cache.numerics()[MINE], MINE, None)
    cache = Cache(cache.folder, REFERENCE["model_id"])
    assert len(missing(CUT, cache, [MINE])) == 0
    assert [values.tolist() for values in cache.logps([CUT["chosen_key"]], [MINE])] == [[-3.5]]


@pytest.mark.parametrize(
    ("chunks", "status"),
    [
        ([[scored(P, WHOLE[:4], LOGPS[:4])]], "ok"),
        ([[scored(P, WHOLE, LOGPS, status="ok: computed in float32")]], "ok: computed in float32"),
        ([[scored(P, WHOLE) | {"logps": None}], [scored(P, WHOLE[:4], LOGPS[:4])]], "ok"),
    ],
    ids=["cut farther on", "computed in float32", "the longest has no list"],
)
def test_these_serve_as_well(tmp_path, chunks, status):
    (row,) = served(CUT, cache_of(tmp_path, *chunks))
    assert (row["logps"], row["status"]) == ([-0.5, -1.0, -2.0], status)


@pytest.mark.parametrize(
    "longer",
    [
        scored(P, WHOLE[:2]),
        scored(P, [*WHOLE, 9]),
        scored([1, 3], WHOLE),
        scored([2], WHOLE),
        scored([1], [2, *WHOLE]),
        scored(P, [5, 6, 8, 8, 9]),
        scored(P, WHOLE, numerics_id=OTHER),
        scored(P, WHOLE, logps=[], logp_sum=-15.5) | {"logps": None},
        scored(P, WHOLE) | {"logp_sum": None, "logps": None, "status": "failed: not finite"},
        scored(P, WHOLE) | {"status": "failed: not finite"},
        scored(P, WHOLE, LOGPS[:4]),
        scored(P, WHOLE, LOGPS, logp_sum=-15.0),
    ],
    ids=[
        "shorter",
        "longer than it ever was",
        "other prompt",
        "shorter prompt",
        "other boundary",
        "other token",
        "other numerics",
        "no list",
        "failed",
        "failed with a list",
        "list too short",
        "list of another sum",
    ],
)
def test_nothing_else_serves(tmp_path, longer):
    assert served(CUT, cache_of(tmp_path, [longer])) == []


def test_the_numerics_named_first_serve_though_others_have_more(tmp_path):
    cache = cache_of(tmp_path, [scored(P, WHOLE[:4])], [scored(P, WHOLE, LOGPS, numerics_id=OTHER)])
    for accepted, logps in (((MINE, OTHER), [-0.0, -1.0, -2.0]), ((OTHER, MINE), [-0.5, -1.0, -2.0])):
        (row,) = served(CUT, cache, *accepted)
        assert (row["numerics_id"], row["logps"]) == (accepted[0], logps)


def test_each_table_is_of_one_numerics(tmp_path):
    examples = table(pair(P, ([5], [6]), ([7], [8])))
    cache = cache_of(tmp_path, [scored(P, [5, 6])], [scored(P, [7, 8], numerics_id=OTHER)])
    assert [row["numerics_id"] for row in served(examples, cache, MINE, OTHER)] == [MINE, OTHER]


def test_what_occurs_twice_is_served_once_whichever_of_its_ends_the_cache_has(tmp_path):
    # Cut to two tokens these are one sequence; the cache has the third one's end, and the plan names the first.
    examples = table(*(pair(P, ([5, 6], end), ([4], [])) for end in ([1], [], [2], [2, 3])))
    (row,) = served(examples, cache_of(tmp_path, [scored(P, [5, 6, 2], [-1.0, -2.0, -4.0])]))
    assert row["logps"] == [-1.0, -2.0]


def test_labels_are_served_with_their_mismatched_answers(tmp_path):
    examples = table(label(P, [5], [6], ([7], [8, 9])), label(P, [3], [], None), label([4], [5], [6], ([9], [])))
    found = served(examples, cache_of(tmp_path, [scored(P, [5, 6]), scored(P, [7, 8]), scored([4], [5, 6])]))
    assert {row["key"] for row in found} == {
        sequence_key(P, [5]),
        sequence_key(P, [7]),
        sequence_key([4], [5]),
    }


def test_nothing_missing_nothing_cached_and_no_kept_ends_serve_nothing(tmp_path):
    cache = cache_of(tmp_path)
    assert served(CUT, cache) == []
    assert list(cut_answers.find_rows(CUT, np.empty(0), cache, [MINE])) == []
    assert list(cut_answers.find_rows(CUT.slice(0, 0), np.empty(0), cache, [MINE])) == []
    cache = cache_of(tmp_path, [scored(P, WHOLE, LOGPS)])
    assert list(cut_answers.find_rows(CUT, np.array([0]), cache, [])) == []
    # Earlier versions did not keep the ends that they cut off.
    assert served(CUT.drop_columns(["chosen_cut_ids", "rejected_cut_ids"]), cache) == []


def many(n: int) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Pairs cut to three tokens, and rows of the whole answers: token k of answer i has the log-prob -(i + k / 8)."""
    wholes = [([i % 7], [i, *range(3 + i % 5)]) for i in range(2 * n)]
    rows = [scored(p, a, [-(i + k / 8) for k, _ in enumerate(a)]) for i, (p, a) in enumerate(wholes)]
    # An answer's prompt is that of its pair, so both of a pair are given one.
    return table(*(pair(p, (a[:3], a[3:]), ([99], [])) for p, a in wholes)), rows


@pytest.mark.parametrize(("keys", "tokens"), [(1, 1 << 20), (1 << 22, 10), (5, 7)])
def test_how_much_is_done_at_once_changes_no_row(tmp_path, monkeypatch, keys, tokens):
    examples, rows = many(20)
    cache = cache_of(tmp_path, rows[::2], rows[1::2])
    expected = served(examples, cache)
    assert sorted(row["logp_sum"] for row in expected) == sorted(-(3 * i + 3 / 8) for i in range(40))
    monkeypatch.setattr(cut_answers, "_KEYS_AT_ONCE", keys)
    monkeypatch.setattr(cut_answers, "_TOKENS_AT_ONCE", tokens)
    assert served(examples, cache) == expected
    sizes = [len(each) for each in cut_answers.find_rows(examples, missing(examples, cache, [MINE]), cache, [MINE])]
    assert sum(sizes) == 40 and (tokens > 100 or max(sizes) * 3 <= 2 * (tokens + 3))


def test_a_damaged_shard_serves_nothing_and_is_noted(tmp_path):
    examples, rows = many(20)
    cache = cache_of(tmp_path, rows[::2], rows[1::2])
    damaged, whole = cache.records
    shard = cache.folder / damaged.file
    at = pq.ParquetFile(shard).metadata.row_group(0).column(4).data_page_offset + 60
    data = bytearray(shard.read_bytes())
    data[at] ^= 1
    shard.write_bytes(data)
    (found,) = cut_answers.find_rows(examples, np.arange(0, 80, 2), cache, [MINE])
    assert len(found) == whole.rows == 20
    ((record, reason),) = cache.damaged.items()
    assert record == cache.record_path(damaged) and damaged.file in reason


# -- whatever is cut and cached --------------------------------------------------------------------------------------

ids = st.integers(0, 1)
prompts = st.lists(ids, min_size=1, max_size=2)
cuts = st.builds(
    lambda prompt, whole, n: (prompt, whole[: min(n, len(whole))], whole[n:]),
    prompts,
    st.lists(ids, min_size=1, max_size=6),
    st.integers(1, 6),
)
cached = st.tuples(
    prompts,
    st.lists(ids, min_size=1, max_size=6),
    st.sampled_from([MINE, MINE, OTHER]),
    st.sampled_from(["ok", "ok", "ok", "list", "failed"]),
)


@given(answers=st.lists(cuts, min_size=1, max_size=6), held=st.lists(cached, max_size=12, unique_by=str))
@settings(max_examples=80)
def test_a_row_is_the_beginning_of_the_longest_longer_one_or_there_is_none(answers, held):
    # Token k of row i has the log-prob -(i + k / 8): a value says where it comes from.
    usable: dict[tuple[str, tuple, tuple], list[float]] = {}
    seen: dict[tuple, list[str]] = {}
    chunks: dict[str, list[dict[str, Any]]] = {}
    for i, (prompt, completion, numerics_id, state) in enumerate(held):
        name = (tuple(prompt), tuple(completion))
        if numerics_id in seen.setdefault(name, []):
            continue
        seen[name].append(numerics_id)
        logps = [-(i + k / 8) for k, _ in enumerate(completion)]
        row = scored(prompt, completion, logps, numerics_id=numerics_id)
        if state == "ok":
            usable[(numerics_id, *name)] = logps
        else:
            row |= {"logps": None} | ({"logp_sum": None, "status": "failed: x"} if state == "failed" else {})
        chunks.setdefault(numerics_id, []).append(row)
    examples = table(*(pair(prompt, (kept, cut), ([9], [])) for prompt, kept, cut in answers))

    expected = {}
    for prompt, kept, _ in answers:
        if seen.get((tuple(prompt), tuple(kept))):
            continue  # the sequence itself was tried
        ends = {(*kept, *end[:n]) for p, k, end in answers if (p, k) == (prompt, kept) for n in range(1, len(end) + 1)}
        for numerics_id in (MINE, OTHER):
            longer = [usable[name] for end in ends if (name := (numerics_id, tuple(prompt), end)) in usable]
            if longer:
                # Several can be the longest: other ends of one length.
                n = max(map(len, longer))
                values = [logps[: len(kept)] for logps in longer if len(logps) == n]
                expected[sequence_key(prompt, kept)] = (numerics_id, values)
                break
    with tempfile.TemporaryDirectory() as folder:
        found = served(examples, cache_of(Path(folder), *chunks.values()), MINE, OTHER)
    assert {row["key"] for row in found} == set(expected)
    for row in found:
        numerics_id, values = expected[row["key"]]
        assert row["numerics_id"] == numerics_id and row["logps"] in values
        assert row["logp_sum"] == sum(row["logps"]) and row["n_completion"] == len(row["logps"])


# -- with a model, as a user runs it ---------------------------------------------------------------------------------


def words(i: int, n: int) -> str:
    return " ".join(WORDS[(i * 7 + k * (k + 3)) % len(WORDS)] for k in range(n))


def lengthy(folder: Path, model: Path, n_turns: int = 1, n: int = 30) -> Path:
    """A config for pairs whose answers have 4 to 60 words, after so many turns of two."""
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for i in range(n):
            turns = [
                {"role": ("user", "assistant")[k % 2], "content": f"{i}: {words(i + k, 2)}"} for k in range(n_turns)
            ]
            # No two begin alike, so that each has the same mismatched answer at any length.
            chosen, rejected = f"{i} {words(i, 5 + i * 13 % 56)}", f"no {i} {words(i + 9, 4 + i * 29 % 56)}"
            file.write(json.dumps({"prompt": turns, "chosen": chosen, "rejected": rejected}) + "\n")
    return write_config(folder, model)


def at_length(n: int, too_long: str, *more: str) -> list[str]:
    said = [
        f"prepare.max_length={n}",
        f"prepare.too_long={too_long}",
        "prepare.max_quarantine=1",
        f"out=runs/{n}",
        *more,
    ]
    return [argument for setting in said for argument in ("--set", setting)]


def opened(folder: Path) -> Cache:
    (of_model,) = (path for path in (folder / "cache").iterdir() if path.is_dir())
    return Cache(of_model, None)


def forward(model: Path, sequence: TokenSequence) -> np.ndarray:
    """What Transformers makes of a sequence by itself."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.tensor([[*sequence.prompt_ids, *sequence.completion_ids]])
    with torch.no_grad():
        logps = plain(input_ids=ids).logits.double().log_softmax(-1)[0]
    n = len(sequence.prompt_ids)
    return np.array([logps[at - 1, ids[0, at]].item() for at in range(n, ids.shape[1])])


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_a_shorter_length_is_served_without_scoring_and_right(prefcache, model, tmp_path, kind):
    config = lengthy(tmp_path, model)
    of_kind = f"prepare.examples={kind}"
    prefcache("prepare", config, *at_length(64, "keep_start", of_kind))
    prefcache("score", config, *at_length(64, "keep_start", of_kind))
    for length in (48, 40):
        prefcache("prepare", config, *at_length(length, "keep_start", of_kind))
        examples, cache = Prepared(tmp_path / f"runs/{length}/prepared").table(), opened(tmp_path)
        (numerics_id,) = cache.numerics()
        slots = missing(examples, cache, [numerics_id])
        found = {row["key"]: row for row in served(examples, cache, numerics_id)}
        assert len(found) == len(slots) > 15
        for slot in slots[::6]:
            sequence = Sequences(examples)[slot]
            row = found[sequence.key()]
            assert np.abs(np.array(row["logps"]) - forward(model, sequence)).max() < 1e-5
        for rows in cut_answers.find_rows(examples, slots, cache, [numerics_id]):
            CacheWriter(cache).commit(rows, cache.numerics()[numerics_id], numerics_id, None)
        done = prefcache("score", config, *at_length(length, "keep_start", of_kind), "--json")
        assert json.loads(done.stdout)["scored"] == 0


def test_a_prompt_that_lost_its_oldest_turns_is_another_prompt(prefcache, model, tmp_path):
    config = lengthy(tmp_path, model, n_turns=3)
    prefcache("prepare", config, *at_length(120, "keep_end"))
    prefcache("score", config, *at_length(120, "keep_end"))
    prefcache("prepare", config, *at_length(72, "keep_end"))
    examples, cache = Prepared(tmp_path / "runs/72/prepared").table(), opened(tmp_path)
    accepted = list(cache.numerics())
    assert len(missing(examples, cache, accepted)) > 3 and max(examples["cut_prompt"].to_pylist()) > 0
    assert served(examples, cache, *accepted) == []
