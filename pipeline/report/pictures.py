"""Thumbnails of the pictures in the prompts that the report shows, by their tags."""

from collections.abc import Iterable

import duckdb

from prefcache.pipeline.stored.images import StoredImages
from prefcache.pipeline.thumbnails import Thumbnail, make_thumbnail, split_at_tags

_MOST = 100  # of one page; a prompt shows the tags of the others


def read(con: duckdb.DuckDBPyConnection, images: StoredImages, prompts: Iterable[str]) -> dict[str, Thumbnail]:
    """Make the thumbnails of these prompts' pictures. One that no longer decodes has none."""
    if not len(images):
        return {}
    tags = list(dict.fromkeys(tag for prompt in prompts for _, tag in split_at_tags(prompt) if tag))[:_MOST]
    query = "select tag, any_value(image) from images where list_contains($tags, tag) group by tag order by tag"
    found = con.execute(query, {"tags": tags}).fetchall()
    thumbnails = {tag: make_thumbnail(images.encoded(bytes.fromhex(image))) for tag, image in found}
    return {tag: thumbnail for tag, thumbnail in thumbnails.items() if thumbnail}
