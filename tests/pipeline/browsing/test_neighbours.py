"""Neighbours where prompts have pictures: two prompts that differ only by their picture are different prompts."""

import pytest

from prefcache.pipeline.browsing.neighbours import find_neighbours
from prefcache.pipeline.images import decode
from prefcache.pipeline.schema import sequence_key
from tests.helpers.examples import label, pair, table
from tests.helpers.illustrated import encode, id_of
from tests.helpers.vision_models import picture

CAT, DOG = (decode(encode(picture(8, 8, seed))) for seed in (1, 2))


def shown(row: dict, image) -> dict:
    """The example with this picture in its prompt. The tokens are the same whatever the picture shows."""
    keys = {
        f"{name}_key": sequence_key(row["prompt_ids"], row[f"{name}_ids"], [id_of(image)])
        for name in ("chosen", "rejected", "completion")
        if row.get(f"{name}_ids")
    }
    return row | keys | {"images": [id_of(image)], "prompt": f"{image.tag}What is it?", "cut_prompt": 0}


def positions(rows: list[dict], kind: str) -> list[list[int]]:
    found = find_neighbours(table(rows, kind), 0, kind)
    return [each.tolist() for each in (found.duplicates, found.contradictions, found.same_prompt)]


@pytest.mark.parametrize(
    ("other", "expected"), [(CAT, [[1], [2], [3]]), (DOG, [[], [], []])], ids=["same picture", "other picture"]
)
def test_only_pairs_with_the_same_picture_are_neighbours(other, expected):
    rows = [
        shown(pair(0, [5, 9, 9], [1, 2], [3]), CAT),
        shown(pair(1, [5, 9, 9], [1, 2], [3]), other),
        shown(pair(2, [5, 9, 9], [3], [1, 2]), other),
        shown(pair(3, [5, 9, 9], [7], [8]), other),
    ]
    assert positions(rows, "pairs") == expected


def test_only_labels_with_the_same_picture_are_neighbours():
    first = shown(label(0, [5, 9, 9], [1, 2], True), CAT)
    others = [shown(label(i, [5, 9, 9], [1, 2], good), image) for i, good, image in ((1, True, CAT), (2, False, CAT))]
    assert positions([first, *others], "labels") == [[1], [2], []]
    others = [row | shown(row, DOG) for row in others]
    assert positions([first, *others], "labels") == [[], [], []]
