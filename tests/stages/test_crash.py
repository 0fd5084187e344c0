"""Killed at any step, by any means, a cache has lost and doubled no row; and going on ends with the same bytes."""

import hashlib
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from prefcache.pipeline.stored.cache_maintenance import gc, verify
from prefcache.pipeline.stored.prepared import Sequences
from tests.helpers.caches import BUDGET, MINE, NUMERICS, PAIRS, create, expected, reopen, scored
from tests.helpers.kills import killed_at
from tests.helpers.processes import read_stderr, start_process
from tests.helpers.scored import cache_folder, rows_of

FEW = PAIRS.slice(0, 5)


def fingerprint(folder: Path) -> dict[str, str]:
    """All of a folder, byte for byte, hidden files as well."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def score(root: Path) -> None:
    """A scorer's loop: claim a chunk, compute it, commit it."""
    cache = create(root)
    for slots in cache.plan(FEW, [MINE], BUDGET).chunks:
        keys = [Sequences(FEW)[slot].key() for slot in slots]
        with cache.claim(keys, MINE) as claim:
            if claim == "mine":
                cache.commit(scored(FEW, slots), NUMERICS[MINE], MINE, None)


def merge(root: Path) -> None:
    gc(create(root).folder, 400)


def check(root: Path) -> int:
    """No reader is told anything wrong; how many sequences have a value."""
    cache = create_reader(root)
    if cache is None:
        return 0
    assert not cache.damaged
    found = 0
    for side in ("chosen", "rejected"):
        values = cache.join(FEW, [MINE])[f"ref_{side}_logp"]
        for value, right in zip(values.tolist(), expected(FEW, side), strict=True):
            assert value is None or value == right
        found += int((~np.ma.getmaskarray(values)).sum())
    return found


def create_reader(root: Path):
    folders = [path for path in root.glob("cache/*") if (path / "reference.json").exists()]
    return type(create(root / "..." / "unused"))(folders[0], None) if folders else None


def test_a_scorer_killed_at_any_step_has_lost_nothing_that_was_finished(tmp_path):
    score(tmp_path / "whole")
    (whole,) = (path for path in (tmp_path / "whole/cache").iterdir() if path.is_dir())
    expected_bytes, best, step = fingerprint(whole), 0, 0
    while killed_at(step, lambda: score(tmp_path / "killed")):
        found = check(tmp_path / "killed")
        score(tmp_path / "killed")
        assert fingerprint(create(tmp_path / "killed").folder) == expected_bytes
        shutil.rmtree(tmp_path / "killed")
        assert found >= best  # a later kill never leaves less
        best, step = found, step + 1
    assert best == 10 and step > 60


def test_a_scorer_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    score(tmp_path / "whole")
    step, n_killed, best = 0, 0, 0
    # Each time a few steps further into what is left.
    while killed_at(step, lambda: score(tmp_path / "killed")):
        n_killed, found = n_killed + 1, check(tmp_path / "killed")
        assert found >= best
        best, step = found, (step + 5) % 23
        assert n_killed < 300
    assert n_killed > 3
    assert fingerprint(create(tmp_path / "killed").folder) == fingerprint(create(tmp_path / "whole").folder)


def made_to_merge(root: Path) -> None:
    """Small shards, among them one whose rows are all there a second time and one of which some are."""
    score(root)
    cache = create(root)
    for table, budget in ((FEW.slice(1, 2), 10_000), (FEW.slice(3, 2), 20)):
        for slots in create(root / "plan").plan(table, [MINE], budget).chunks:
            cache.commit(scored(table, slots), NUMERICS[MINE], MINE, None)
    shutil.rmtree(root / "plan")


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_gc_killed_at_any_step_loses_and_doubles_no_row(tmp_path, stride):
    made_to_merge(tmp_path / "made")
    assert verify(create(tmp_path / "made").folder).doubled == 8
    shutil.copytree(tmp_path / "made", tmp_path / "whole")
    merge(tmp_path / "whole")
    folder = create(tmp_path / "whole").folder
    expected_bytes, step = fingerprint(folder), 0
    assert verify(folder).doubled == 0 and 1 < len(reopen(create(tmp_path / "whole")).records) < 5
    while True:
        shutil.copytree(tmp_path / "made", tmp_path / "killed")
        if not killed_at(step, lambda: merge(tmp_path / "killed")):
            break
        assert check(tmp_path / "killed") == 10
        # At once: what was merged is known by its name.
        merge(tmp_path / "killed")
        assert fingerprint(create(tmp_path / "killed").folder) == expected_bytes
        shutil.rmtree(tmp_path / "killed")
        step += stride
    assert step > 40 and fingerprint(create(tmp_path / "killed").folder) == expected_bytes


def test_four_scorers_of_one_cache_one_of_them_killed(prefcache, prepared, scored_once, tmp_path):
    right = fingerprint(cache_folder(scored_once))
    scorers = [start_process(tmp_path, "score", prepared) for _ in range(4)]
    while len(list(tmp_path.glob("cache/*/*.parquet"))) < 2 and scorers[0].is_alive():
        time.sleep(0.001)
    scorers[0].kill()
    for scorer in scorers:
        scorer.join(timeout=120)
    assert scorers[0].exitcode in (-9, 0)
    assert [scorer.exitcode for scorer in scorers[1:]] == [0, 0, 0], [read_stderr(tmp_path, each) for each in scorers]
    assert len(rows_of(tmp_path)) == 120  # rows_of fails where a sequence was stored twice
    prefcache("score", prepared)
    assert fingerprint(cache_folder(tmp_path)) == right
    prefcache("verify")


@pytest.fixture(autouse=True)
def _no_warning_about_forks():
    # Its threads are Arrow's, which are idle then; the child ends without any of them.
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
