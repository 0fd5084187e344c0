"""The pages and their addresses."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from prefcache.pipeline.errors import PrefcacheError
from prefcache.ui import images_page, pages, pair_page, pairs_page, questions_page, runs_page, selections_page
from prefcache.ui.access import Access, Guard
from prefcache.ui.reader import Reader

_MOST_BYTES = 1 << 20  # of a form that a page sends
# The style is the report's, with what only these pages need.
_FILES = {
    "report.css": (files("prefcache.pipeline.report") / "style.css", "text/css"),
    "ui.css": (pages.FOLDER / "static" / "ui.css", "text/css"),
    "ui.js": (pages.FOLDER / "static" / "ui.js", "text/javascript"),
}

Page = Callable[[Reader, Request], Response]


def make_app(reader: Reader, access: Access) -> ASGIApp:
    """Return the guarded application."""

    def route(path: str, page: Page, method: str = "GET") -> Route:
        async def answer(request: Request) -> Response:
            try:
                if method == "POST":
                    request.state.form = await _read_form(request)
                # Pages wait for DuckDB, so each has a thread of its own.
                return await run_in_threadpool(page, reader, request)
            except PrefcacheError as error:
                return pages.render("error", status=400, reader=reader, message=str(error))

        return Route(path, answer, methods=[method])

    routes = [
        Route("/", lambda request: RedirectResponse("/pairs")),
        Route("/favicon.ico", lambda request: Response(status_code=204)),  # browsers ask for it
        Route("/static/{name}", _send_file),
        route("/pairs", pairs_page.show),
        route("/pairs/rows", pairs_page.show_rows),
        route("/pairs/count", pairs_page.show_count),
        route("/pairs/histograms", pairs_page.show_histograms),
        route("/pairs/{example_id}", pair_page.show),
        route("/pairs/{example_id}/visits", pair_page.show_visits),
        route("/pairs/{example_id}/neighbours", pair_page.show_neighbours),
        route("/images/{image}", images_page.show),
        route("/images/{image}/thumbnail", images_page.send_thumbnail),
        route("/images/{image}/whole", images_page.send_whole),
        route("/questions", questions_page.show),
        route("/questions/{name}", questions_page.show_question),
        route("/questions/{name}/answer", questions_page.show_answer),
        route("/questions/{name}/verdict", questions_page.show_verdict),
        route("/runs", runs_page.show),
        route("/runs/curves", runs_page.show_curves),
        route("/selections", selections_page.show),
        route("/selections", selections_page.save, "POST"),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={404: _not_found(reader)}), access)


async def _read_form(request: Request) -> list[tuple[str, str]]:
    """Read a form as a browser sends it, up to a size that no page's form has."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise PrefcacheError(
                "The form is too large: it has more than 1 MiB. Tick fewer examples, or save all that a filter leaves."
            )
    return parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True)


async def _send_file(request: Request) -> Response:
    if (entry := _FILES.get(request.path_params["name"])) is None:
        return Response("There is no such file.\n", 404, media_type="text/plain")
    path, media_type = entry
    return FileResponse(str(path), media_type=media_type)


def _not_found(reader: Reader) -> Callable[[Request, Exception], Any]:
    def answer(request: Request, error: Exception) -> Response:
        return pages.render("error", status=404, reader=reader, message=f"There is no page {request.url.path}.")

    return answer
