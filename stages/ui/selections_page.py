"""Selections: examples saved as a file that `train.only` reads, and the command that uses it."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

import pyarrow as pa
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from prefcache.pipeline.browsing.filters import parse_filter
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored import row_writers
from prefcache.ui import pages
from prefcache.ui.reader import Reader

FOLDER = "selections"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SCHEMA = pa.schema([("example_id", pa.string())])


@dataclass(frozen=True)
class Selection:
    path: Path
    n_rows: int

    @property
    def command(self) -> str:
        return f"prefcache train CONFIG --set {shlex.quote(f'train.only={self.path}')} --set train.run={self.path.stem}"


def show(reader: Reader, request: Request) -> Response:
    selections = [selection for _, selection in sorted(_find(reader.folder / FOLDER), key=lambda found: -found[0])]
    saved = request.query_params.get("saved", "")
    return pages.render("selections", section="/selections", reader=reader, selections=selections, saved=saved)


def _find(folder: Path) -> Iterator[tuple[int, Selection]]:
    """Yield the selections and when each was saved. Skip files that are not Parquet."""
    for file in folder.glob("*.parquet"):
        with contextlib.suppress(OSError, pa.ArrowException):
            yield file.stat().st_mtime_ns, Selection(file, pa.parquet.read_metadata(file.absolute()).num_rows)


def save(reader: Reader, request: Request) -> Response:
    """Save the ticked examples, or all that the page's filter leaves; or all other training examples."""
    form = dict(request.state.form)
    name = form.get("name", "").strip()
    if not _NAME.fullmatch(name):
        raise UsageError(f"Found the name {name!r}, expected up to 64 letters, digits, dots, hyphens and underscores.")
    if (reader.folder / name).exists():
        raise UsageError(f"{reader.folder} has a run {name}, whose name the command would take. Choose another name.")
    path = reader.folder / FOLDER / f"{name}.parquet"
    if path.exists():
        raise UsageError(f"{path} exists. Choose another name.")
    ids = _find_ids(reader, form.get("which", ""), [value for key, value in request.state.form if key == "id"], form)
    if form.get("use") == "exclude":
        ids = reader.list_other_ids(ids)
    if not len(ids):
        raise UsageError("No example would be in it. Tick some, or choose another filter.")
    try:
        path.parent.mkdir(exist_ok=True)
        with row_writers.open_columns(path, _SCHEMA) as file:
            file.write_table(pa.table({"example_id": ids}, schema=_SCHEMA))
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}).") from None
    return RedirectResponse(pages.address("/selections", saved=path.name), 303)


def _find_ids(reader: Reader, which: str, ticked: list[str], form: dict[str, str]) -> pa.ChunkedArray:
    if which == "filter":
        return reader.list_ids(parse_filter(parse_qsl(form.get("filter", "")), reader.catalog))
    if not ticked:
        raise UsageError("No example is ticked. Tick some, or save all that the filter leaves.")
    return reader.list_known(ticked)
