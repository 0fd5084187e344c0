"""Render pages from templates. Everything printed is escaped, and characters that cannot be seen are shown by name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse

from prefcache.pipeline.html_templates import make_environment
from prefcache.pipeline.visible_text import format_bytes, visible
from prefcache.row_layout import format_value
from prefcache.ui.image_reader import drop_tags

FOLDER = Path(__file__).parent
_EXCERPT = 160  # characters of a text in a list

# What stands in the navigation: address and name.
SECTIONS = (("/pairs", "Pairs"), ("/questions", "Questions"), ("/runs", "Runs"), ("/selections", "Selections"))


def render(template: str, *, section: str = "", status: int = 200, **context: Any) -> HTMLResponse:
    """Render a whole page, or a part of one that a script asked for."""
    shown = _ENVIRONMENT.get_template(f"{template}.html.j2").render(section=section, sections=SECTIONS, **context)
    return HTMLResponse(shown, status)


def render_part(request: Request, template: str, **context: Any) -> HTMLResponse:
    """Render a part of a page for the script that asked for it, or as a page of its own for a reader without scripts."""
    is_page = request.headers.get("sec-fetch-dest") == "document"
    return render(template, layout="base.html.j2" if is_page else "part.html.j2", **context)


def address(path: str, query: Iterable[tuple[str, Any]] = (), **more: Any) -> str:
    """Return an address with these parameters; those of `more` replace the ones of the same name, and None removes them."""
    kept = [(name, value) for name, value in query if name not in more]
    added = [(name, value) for name, value in more.items() if value is not None]
    encoded = urlencode([*kept, *added])
    return f"{path}?{encoded}" if encoded else path


def excerpt(text: str, most: int = _EXCERPT) -> str:
    """Return the beginning of a text in one line."""
    line = " ".join(text[: most + 1].split())
    return visible(line if len(text) <= most else f"{line[:most].rstrip()}…")


def _format_signed(value: float, digits: int = 2) -> str:
    """Adding 0.0 spares the reader a "-0.00"."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def _make_environment() -> jinja2.Environment:
    environment = make_environment(FOLDER / "templates", trim_blocks=True, lstrip_blocks=True)
    filters: Mapping[str, Any] = {
        "excerpt": excerpt,
        "drop_tags": drop_tags,
        "file_name": lambda path: path.rstrip("/").rpartition("/")[2],
        "visible": visible,
        "value": format_value,
        "signed": _format_signed,
        "number": "{:,}".format,
        "bytes": format_bytes,
    }
    environment.filters |= filters
    environment.globals |= {"address": address}
    return environment


_ENVIRONMENT = _make_environment()
