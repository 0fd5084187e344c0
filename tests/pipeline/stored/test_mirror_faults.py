"""A network that changes what it carries: a mirror serves no value that was not written, whatever comes."""

import contextlib

import pytest

from prefcache.pipeline.errors import PrefcacheError
from tests.helpers.caches import MINE, PAIRS, fill, scored
from tests.helpers.machines import EXPECTED, LISTS, open_cache, token_lists, values
from tests.helpers.store_proxy import Fault, Rule
from tests.helpers.stores import Bucket, use_environment


@pytest.fixture
def on_bad_network(s3: Bucket, tmp_path, monkeypatch):
    """Open the store's cache on a machine behind a network with faults of a kind."""

    @contextlib.contextmanager
    def open_there(name: str, fault: Fault, share: float, seed: int = 0):
        with s3.through_proxy(
            [Rule(fault, share, lambda request: request.kind in ("get", "list"))], seed=seed
        ) as proxy:
            use_environment(s3.environment_of(proxy.url, tmp_path / name), monkeypatch)
            yield lambda: open_cache(s3.url)
        use_environment(s3.environment_of(s3.server.url, tmp_path / name), monkeypatch)

    return open_there


def served(cache) -> set[float]:
    joined = cache.join(PAIRS, [MINE])
    return {value for side in ("chosen", "rejected") for value in joined[f"ref_{side}_logp"].compressed().tolist()}


WRITTEN = {value for side in EXPECTED.values() for value in side}


@pytest.mark.parametrize("fault", [Fault.FLIPPED_BIT, Fault.SHORT_BODY, Fault.WRONG_LENGTH, Fault.CUT_BODY])
def test_bodies_that_are_not_the_stores_are_never_served(s3, on_bad_network, machine, fault):
    fill(machine("here"), PAIRS)
    stored = {name: s3.read(name) for name in s3.objects()}
    n_served = 0
    for seed in range(6):
        with on_bad_network(f"there-{seed}", fault, 0.2, seed) as open_there, contextlib.suppress(PrefcacheError):
            cache = open_there()
            found = served(cache)
            assert found <= WRITTEN
            n_served += len(found)
        # Without faults the same mirror serves everything: it has kept nothing wrong.
        again = open_cache(s3.url)
        assert values(again) == EXPECTED and token_lists(again) == LISTS
    assert n_served
    assert {name: s3.read(name) for name in s3.objects()} == stored  # readers change nothing


def test_what_a_short_listing_lacks_counts_as_missing_and_is_found_when_it_is_claimed(s3, on_bad_network, machine):
    fill(machine("here"), PAIRS)
    stored = {name: s3.read(name) for name in s3.objects()}
    with on_bad_network("there", Fault.SHORT_LISTING, 1.0) as open_there:
        cache = open_there()
        assert len(cache.records) < 6 and not cache.damaged
        assert served(cache) < WRITTEN
        missing = cache.plan(PAIRS, [MINE], 30).chunks
        for slots in missing:
            with cache.claim(scored(PAIRS, slots)["key"].to_pylist(), MINE) as claim:
                assert claim == "done"
    assert missing and values(open_cache(s3.url)) == EXPECTED
    assert {name: s3.read(name) for name in s3.objects()} == stored
