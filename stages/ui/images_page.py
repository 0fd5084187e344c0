"""A picture of a prompt: a page with the whole of it, and the files that pages show.

What is sent was decoded and encoded again, whatever the data's own file contains.
"""

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from prefcache.pipeline.thumbnails import Thumbnail, fit
from prefcache.ui import pages
from prefcache.ui.image_reader import LONGEST_WHOLE
from prefcache.ui.reader import Reader


def show(reader: Reader, request: Request) -> Response:
    if (image := _find(reader, request)) is None:
        message = f"There is no picture {request.path_params['image']!r} in {reader.folder}."
        return pages.render("error", section="/pairs", status=404, reader=reader, message=message)
    facts = reader.images.stored.facts(image)
    width, height = fit(facts.width, facts.height, LONGEST_WHOLE)
    context: dict[str, Any] = {
        "id": image.hex(),
        "facts": facts,
        "n_bytes": len(reader.images.stored.encoded(image)),
        "is_readable": reader.images.whole(image) is not None,
        "width": width,
        "height": height,
    }
    return pages.render("image", section="/pairs", reader=reader, **context)


def send_thumbnail(reader: Reader, request: Request) -> Response:
    return _send(reader, request, reader.images.thumbnail)


def send_whole(reader: Reader, request: Request) -> Response:
    return _send(reader, request, reader.images.whole)


def _send(reader: Reader, request: Request, make: Callable[[bytes], Thumbnail | None]) -> Response:
    image = _find(reader, request)
    if image is None or (thumbnail := make(image)) is None:
        # The browser shows the tag in its place.
        return Response("There is no such picture, or it cannot be decoded.\n", 404, media_type="text/plain")
    return Response(thumbnail.jpeg, media_type="image/jpeg")


def _find(reader: Reader, request: Request) -> bytes | None:
    text = request.path_params["image"]
    try:
        image = bytes.fromhex(text)
    except ValueError:
        return None
    return image if image in reader.images.stored else None
