"""The hub: the files of a data set at one commit, and what it refuses, in words."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from prefcache.pipeline.daemon_threads import map_parallel
from prefcache.pipeline.errors import IntegrityError, UsageError, first_line
from prefcache.pipeline.progress import counting
from prefcache.pipeline.stored.shards import count_rows
from prefcache.pipeline.stored_paths import is_bare

THREADS = 8
_FOOTER_BYTES = 8 << 10  # of a Parquet file of ours, in most cases
_AGAIN = "Run the same command again"


@contextmanager
def hub_errors(failed: str, access: str) -> Iterator[None]:
    """Turn what the hub or its client refuses into a UsageError that begins with `failed`; `access`: what a token needs."""
    try:
        yield
    except (OfflineModeIsEnabled, LocalTokenNotFoundError, HTTPError, ValueError, FileNotFoundError) as error:
        raise UsageError(f"{failed}: {_explain(error, access)}") from error
    except RuntimeError as error:  # of an upload, whose cause is what the hub answered
        cause = error.__cause__ if isinstance(error.__cause__, HTTPError) else error
        raise UsageError(f"{failed}: {_explain(cause, access)}") from error


def _explain(error: Exception, access: str) -> str:
    """Say what went wrong and what to do."""
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set. Unset it, and {_AGAIN[0].lower()}{_AGAIN[1:]}."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision. Name a branch, a tag or a commit (--revision)."
    is_unseen = isinstance(error, RepositoryNotFoundError) and status == 404
    if is_unseen or (
        access == "read" and (isinstance(error, RepositoryNotFoundError | FileNotFoundError) or status == 401)
    ):
        return f"the hub has no such data set, or the token may not {access} it. Check the name, or log in (hf auth login)."
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        problem = "there is no token" if status is None else f"the hub refused the token ({status})"
        return f"{problem}. Log in (hf auth login), or set HF_TOKEN to one with {access} access."
    reason = " ".join(str(error).split()).rstrip(".")
    if status is not None:
        return f"the hub answered with {status} ({reason}). {_AGAIN}, or try later."
    if isinstance(error, ValueError):  # the hub's client refuses the name or the card
        return f"{reason}."
    return f"the hub did not answer ({reason}). Check the network and HF_ENDPOINT, and run the same command again."


class HubDataset:
    """The files at the top of a data set's repository, at the commit that it had when this was made."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self._failed = name, f"{name} was not fetched"
        disable_progress_bars()
        with hub_errors(self._failed, "read"):
            self.commit = str(HfApi().dataset_info(name, revision=revision).sha)
            self._files = HfFileSystem()
            listed = self._files.ls(self._path(), detail=True)
        files = {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed if entry["type"] == "file"}
        self.sizes: dict[str, int] = {name: size for name, size in files.items() if is_bare(name)}

    def read_column(self, name: str, column: str, n_rows: int) -> pa.Table:
        """Read a column of a Parquet file by ranges: its footer and what the footer says. IntegrityError if that fails."""
        with hub_errors(self._failed, "read"):
            try:
                return self._read_column(name, column, n_rows)
            except HTTPError:
                raise
            except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as error:
                raise IntegrityError(f"{name} of {self.name} cannot be read ({first_line(error)})") from error

    def _read_column(self, name: str, column: str, n_rows: int) -> pa.Table:
        with self._files.open(f"{self._path()}/{name}", "rb", cache_type="none") as opened:
            size = self.sizes[name]
            tail = _read_tail(opened, size, _FOOTER_BYTES)
            n_footer = int.from_bytes(tail[-8:-4], "little") + 8
            tail = tail if n_footer <= len(tail) else _read_tail(opened, size, n_footer)
            # Arrow alone would read 64 KiB for the footer, which is more than many a column has.
            metadata = pq.read_metadata(pa.BufferReader(tail))
            if count_rows(metadata) != n_rows:
                raise ValueError(f"it has {count_rows(metadata)} rows, {n_rows} were written")
            with pq.ParquetFile(opened, metadata=metadata, pre_buffer=False, page_checksum_verification=True) as file:
                return file.read([column])

    def download(self, names: Sequence[str], folder: Path) -> None:
        """Fetch whole files into a folder, several at once."""

        def fetch(name: str) -> str:
            return cast(
                str, hf_hub_download(self.name, name, repo_type="dataset", revision=self.commit, local_dir=folder)
            )

        total = sum(self.sizes[name] for name in names)
        with (
            hub_errors(self._failed, "read"),
            counting(f"fetch {self.name}", total, "bytes") as counter,
        ):
            for name, _ in zip(names, map_parallel(fetch, names, THREADS), strict=True):
                counter.add(self.sizes[name])

    def _path(self) -> str:
        return f"datasets/{self.name}@{self.commit}"


def _read_tail(file: Any, size: int, n: int) -> bytes:
    file.seek(max(0, size - n))
    return bytes(file.read(min(n, size)))


def list_files(name: str) -> list[str]:
    """The files of a data set's main branch; none if there is no such data set."""
    try:
        return list(HfApi().list_repo_files(name, repo_type="dataset"))
    except RepositoryNotFoundError:
        return []


def download_file(name: str, file: str, folder: Path) -> Path:
    """Fetch a file of a data set's main branch into a folder."""
    disable_progress_bars()
    return Path(hf_hub_download(name, file, repo_type="dataset", local_dir=folder))
