"""Prepared data in an object store: sent by the machine that prepared it, fetched by those that score and train.

A preparation lies in prepared/<id>/ under its usual file names. Its id is the checksum of its manifest, which has the checksums
of all other files: whoever knows the id gets these bytes or an error. The manifest goes last, in both directions, and what is
there already is not transferred again, so an interrupted transfer continues.

The list of the files from which pictures were read stays where it is: these paths mean nothing on another machine.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from prefcache.pipeline.cache_place import parse_url
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.progress import counting
from prefcache.pipeline.stored import artifact, claims
from prefcache.pipeline.stored.object_store import ObjectStore, refuse_escape
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import FileEntry, PreparedManifest

FOLDER = "prepared"
_ID = re.compile(r"[0-9a-f]{32}")


def split_url(url: str) -> tuple[str, str]:
    """Split the URL of prepared data into that of its store and its id."""
    store, _, prepared_id = parse_url(url).rpartition("/")
    root, _, folder = store.rpartition("/")
    if folder != FOLDER or not _ID.fullmatch(prepared_id) or root.endswith("/"):
        raise UsageError(
            f"{url} does not name prepared data. Expected a URL that `prefcache upload` printed, such as "
            f"s3://bucket/refs/{FOLDER}/0123456789abcdef0123456789abcdef."
        )
    return root, prepared_id


def list_files(manifest: PreparedManifest) -> list[FileEntry]:
    """The files that another machine needs, apart from the manifest."""
    return [*manifest.shards, *manifest.images, manifest.quarantine]


# -- sending ---------------------------------------------------------------------------------------------------------


def send_prepared(prepared: Prepared, store: ObjectStore) -> str:
    """Send what the store lacks of a preparation, verified; return the URL under which others find it."""
    sizes = _list_sizes(store, prepared.id)
    missing = [entry for entry in list_files(prepared.manifest) if sizes.get(entry.file) != entry.bytes]

    def send(entry: FileEntry) -> int:
        if reason := artifact.damage(prepared.folder, entry):
            raise IntegrityError(
                f"{prepared.folder / entry.file} {reason}. Nothing damaged is sent: delete {prepared.folder} and prepare again "
                "(prefcache prepare CONFIG)."
            )
        store.put_file(_name(prepared.id, entry.file), prepared.folder / entry.file)
        return entry.bytes

    _transfer(store, "send", missing, send)
    data = (prepared.folder / artifact.MANIFEST).read_bytes()
    if artifact.checksum_bytes(data) != prepared.id:
        raise IntegrityError(f"{prepared.folder} was prepared again meanwhile. Run the same command again.")
    url = f"{store.url}/{FOLDER}/{prepared.id}"
    if not store.create(_name(prepared.id, artifact.MANIFEST), data):
        raise IntegrityError(f"{url}/{artifact.MANIFEST} has other bytes than were sent. {_remedy(url)}")
    return url


# -- fetching --------------------------------------------------------------------------------------------------------


def fetch_prepared(store: ObjectStore, prepared_id: str, folder: Path) -> Path:
    """Fetch what `folder` lacks of a preparation, whole and verified; return the folder.

    Processes that fetch the same one wait for the first of them. UsageError if the folder holds another preparation.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with claims.claim(claims.claim_path(folder.parent, folder.name), wait=True):
        manifest_bytes, is_here = _read_manifest(store, prepared_id, folder)
        manifest = _parse_manifest(manifest_bytes, folder / artifact.MANIFEST, f"{store.url}/{FOLDER}/{prepared_id}")
        # Of a finished preparation, pictures are compared with their hashes when they are decoded.
        missing = [
            entry
            for entry in list_files(manifest)
            if artifact.damage(folder, entry, every_byte=not is_here or entry not in manifest.images)
        ]
        if missing:
            _fetch_files(store, prepared_id, folder, missing)
        if not is_here:
            artifact.commit_bytes(folder / artifact.MANIFEST, manifest_bytes)
    return folder


def _read_manifest(store: ObjectStore, prepared_id: str, folder: Path) -> tuple[bytes, bool]:
    """The bytes of the manifest, and whether they are in the folder already."""
    path = folder / artifact.MANIFEST
    if path.exists():
        if artifact.checksum(path) == prepared_id:
            return path.read_bytes(), True
        raise UsageError(f"{folder} holds another preparation. Name another place, or delete {folder}.")
    url = f"{store.url}/{FOLDER}/{prepared_id}"
    try:
        data = store.get(_name(prepared_id, artifact.MANIFEST))
    except FileNotFoundError:
        raise UsageError(
            f"There is no prepared data at {url}. Send it from where it was prepared (prefcache upload CONFIG), or correct the URL."
        ) from None
    if artifact.checksum_bytes(data) != prepared_id:
        raise IntegrityError(f"{url}/{artifact.MANIFEST} has other bytes than its name says (checksum). {_remedy(url)}")
    return data, False


def _parse_manifest(data: bytes, path: Path, url: str) -> PreparedManifest:
    """Parse a manifest that is about to be at `path`."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        content.pop(artifact.SEAL, None)  # its id vouches for every byte
    manifest = PreparedManifest.parse(content, path, _remedy(url))
    names = [refuse_escape(entry.file) for entry in list_files(manifest)]
    if len({*names, artifact.MANIFEST}) <= len(names) or any(name.startswith(".") for name in names):
        raise IntegrityError(f"{url}/{artifact.MANIFEST} names files that prefcache does not write. {_remedy(url)}")
    return manifest


def _fetch_files(store: ObjectStore, prepared_id: str, folder: Path, missing: list[FileEntry]) -> None:
    url, sizes = f"{store.url}/{FOLDER}/{prepared_id}", _list_sizes(store, prepared_id)
    for entry in missing:
        if (size := sizes.get(entry.file)) != entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes, {entry.bytes} were written"
            raise IntegrityError(
                f"{url}/{entry.file} {found}. Send it again from where it was prepared (prefcache upload CONFIG): only that is "
                "transferred."
            )

    def fetch(entry: FileEntry) -> int:
        name, path = _name(prepared_id, entry.file), artifact.member(folder, entry.file)
        with artifact.commit_stream(path) as stream:
            for data in store.read_pieces(name, entry.bytes):
                stream.write(data)
            if stream.entry(path)["xxh3_128"] != entry.xxh3_128:
                raise IntegrityError(f"{url}/{entry.file} has other bytes than were written (checksum). {_remedy(url)}")
        return entry.bytes

    artifact.remove_leftovers(folder)
    _transfer(store, "fetch", missing, fetch)


# -- both ------------------------------------------------------------------------------------------------------------


def _transfer(store: ObjectStore, verb: str, files: list[FileEntry], function: Callable[[FileEntry], int]) -> None:
    with counting(f"{verb} prepared data", sum(entry.bytes for entry in files), "bytes") as counter:
        for n_bytes in store.parallel(function, files):
            counter.add(n_bytes)


def _list_sizes(store: ObjectStore, prepared_id: str) -> dict[str, int]:
    prefix = _name(prepared_id, "")
    return {each.name.removeprefix(prefix): each.size for each in store.list_objects(prefix)}


def _name(prepared_id: str, file: str) -> str:
    return f"{FOLDER}/{prepared_id}/{file}"


def _remedy(url: str) -> str:
    return f"Remove {url} from the store, and send it again from where it was prepared (prefcache upload CONFIG)."
