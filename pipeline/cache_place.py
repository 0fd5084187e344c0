"""Where a cache is: a folder, or an object store with a mirror of it on this machine.

Everything reads and writes a folder. For a URL this folder is the mirror: stored/mirror.py fills it and sends what is new.
"""

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from prefcache.pipeline.errors import UsageError

SCHEMES = ("s3", "gs", "az")
# What says, besides the URL, which store it is.
_WHERE = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": (),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
MIRROR_VARIABLE = "PREFCACHE_MIRROR"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MIRROR = re.compile(r"-[0-9a-f]{12}$")  # the end of its name
_MISTYPED_URL = re.compile(rf"({'|'.join(SCHEMES)}):", re.IGNORECASE)


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether the place is in an object store."""
    return _URL.match(os.fspath(place)) is not None and not os.fspath(place).startswith("file://")


def parse_url(place: str) -> str:
    """Return the URL of a place in an object store without a slash at its end; UsageError if it is not one."""
    # A secret key may have a slash in it, after which urlsplit sees the path begin.
    authority = place.partition("://")[2].partition("/")[0]
    if "@" in authority or (":" in authority and ("@" in place or not re.search(r":\d+$", authority))):
        raise UsageError(
            "The URL of a cache contains credentials. Leave them out: they are taken from the environment, as other "
            "programs take them (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, ...)."
        )
    try:
        parts = urlsplit(place)
    except ValueError as error:
        raise UsageError(f"{place} is not a URL ({error}). Expected {_expected()}.") from None
    if parts.scheme not in SCHEMES or not parts.netloc or ":" in parts.netloc:
        raise UsageError(f"{_without_query(place)} does not name a place in an object store. Expected {_expected()}.")
    if parts.query or parts.fragment:
        raise UsageError(
            f"The URL {_without_query(place)} of a cache has something after its path (? or #). Leave it out: region, endpoint "
            "and credentials are taken from the environment (AWS_DEFAULT_REGION, AWS_ENDPOINT_URL, ...)."
        )
    steps = [step for step in parts.path.split("/") if step]
    if any(step in (".", "..") for step in steps):
        raise UsageError(f"{place} has {'.' if '.' in steps else '..'} in its path. Write the path without it.")
    return "/".join([f"{parts.scheme}://{parts.netloc}", *steps])


def spell_uniformly(place: str) -> str:
    """Return the spelling in which a place is recorded, so that `cache/` and `cache` are the same."""
    return parse_url(place) if is_url(place) else str(local_folder(place))


def local_folder(place: str) -> Path:
    """The folder in which a cache is read and written: the place itself, or the mirror of a URL."""
    if place.startswith("file://"):
        return Path(urlsplit(place).path)
    if is_url(place):
        return mirror_folder(parse_url(place))
    if _MISTYPED_URL.match(place):
        raise UsageError(
            f"{_without_query(place)} looks like a URL that lacks a slash. Expected {_expected()}. A folder of that name is written as "
            "./ and the name."
        )
    return Path(place)


def mirror_folder(url: str) -> Path:
    """The mirror of an object store: PREFCACHE_MIRROR, or prefcache/ in the user's folder for caches, and a name."""
    readable = re.sub(r"[^\w.-]+", "-", url.partition("://")[2])[-60:].strip("-.")
    # The same bucket name may be another bucket at another endpoint, and every Azure account has containers of its own.
    where = [url, *(os.environ.get(name, "") for name in _WHERE[url.partition("://")[0]])]
    digest = hashlib.blake2b(" ".join(where).encode(), digest_size=6).hexdigest()
    return _mirror_base() / f"{readable}-{digest}"


def explain_mirror(path: Path) -> str:
    """A sentence for errors about a file in a mirror, which the user has not named; nothing for other files."""
    base, path = _mirror_base(), path.absolute()
    if path == base or (path.is_relative_to(base) and _MIRROR.search(path.relative_to(base).parts[0])):
        return (
            f" It belongs to the mirror of an object store in {base}; {MIRROR_VARIABLE} can name another place for it."
        )
    return ""


def _mirror_base() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(MIRROR_VARIABLE) or Path(home) / "prefcache").expanduser().absolute()


def _without_query(place: str) -> str:
    return re.split("[?#]", place, maxsplit=1)[0]


def _expected() -> str:
    return "s3://bucket/path, gs://bucket/path or az://container/path"
