"""inspect: questions about data, references and rewards, in SQL.

What a query does not read is not opened.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import config, views
from pipeline.errors import UsageError
from pipeline.stored import duck
from stages import sources

describe = views.describe


class Experiment:
    """An experiment's folder, and a database over as much of it as was asked about."""

    def __init__(self, where: str | None) -> None:
        self.folder = _experiment(where)
        self._opened: set[str] = set()
        self._sources = views.Sources()
        self._con: Any = None

    @contextlib.contextmanager
    def asked(
        self, query: str, parameters: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> Iterator[views.Result]:
        """The answer to one SELECT, to be read within so many seconds."""
        self.open(views.behind(query))
        with views.limited(self._con, timeout):
            yield views.ask(self._con, query, self._sources.files, parameters)

    def cancel(self) -> None:
        if self._con is not None:
            self._con.interrupt()

    def describe(self) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
        """Every view with its columns, those of what its runs measure among them."""
        self.open({"metrics"})
        return views.describe(self._sources)

    def open(self, needed: set[str]) -> None:
        """Verify and open these tables of the schema `stored`, unless they are."""
        # A locked database takes nothing in any more: where a query reads more than the ones before, a new one is made.
        if self._con is None or not needed <= self._opened or duck.missing(self._sources.files):
            found = sources.gather(self.folder, needed | self._opened)
            self._con, self._sources, self._opened = views.connect(found), found, needed | self._opened


def _experiment(where: str | None) -> Path:
    """The folder that is named, or that a config names as its `out`; or the only one there is."""
    if where is not None:
        folder = Path(config.load(where).out) if Path(where).is_file() else Path(where)
        if not (folder / "prepared").is_dir():
            raise UsageError(
                f"{folder} is no experiment: it has no prepared/ in it. Name a config, or the folder that is its `out`."
            )
        return folder
    found = sorted(path.parent.parent for path in Path("runs").glob("*/prepared/manifest.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError("No experiment in runs/. Prepare one (make prepare), or name its folder after the query.")
    raise UsageError(f"runs/ has {', '.join(path.name for path in found)}. Name one after the query: {found[0]}.")
