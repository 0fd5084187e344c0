"""A cache in an object store, as several machines open it."""

from collections.abc import Callable

import numpy as np

from prefcache.pipeline.stored.cache_writer import create_cache
from prefcache.pipeline.stored.mirror import open_root
from prefcache.pipeline.stored.token_logps import token_logps
from tests.helpers.caches import MINE, MODEL, PAIRS, REFERENCE, Cache, expected
from tests.helpers.stores import Bucket

Machine = Callable[[str], Cache]  # opens the store's cache on the machine of this name
SIDES = ("chosen", "rejected")


def open_cache(url: str) -> Cache:
    return Cache(create_cache(open_root(url), "org/tiny model", REFERENCE).folder, MODEL)


def values(cache: Cache) -> dict[str, list[float]]:
    joined = cache.join(PAIRS, [MINE])
    return {side: joined[f"ref_{side}_logp"].tolist() for side in SIDES}


EXPECTED = {side: expected(PAIRS, side) for side in SIDES}


def token_lists(cache: Cache, table=PAIRS) -> list[list[float]]:
    columns = [table["chosen_key"]]
    sums = cache.logps(columns, [MINE])
    return token_logps(cache, columns, sums, [MINE])[0].to_arrow(np.ma.getmaskarray(sums[0])).to_pylist()


LISTS = [[-i / 8 for i in ids] for ids in PAIRS["chosen_ids"].to_pylist()]


def names(s3: Bucket, suffix: str) -> list[str]:
    return sorted(name for name in s3.objects() if name.endswith(suffix))
