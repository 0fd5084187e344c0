"""Open an experiment and serve its pages until Ctrl-C."""

import socket
from pathlib import Path
from typing import TYPE_CHECKING

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.progress import Progress, working
from prefcache.pipeline.visible_text import count

if TYPE_CHECKING:
    from prefcache.ui.access import Access

_PORT, _N_PORTS = 8790, 20  # the first that is free
_WILDCARDS = {"0.0.0.0", "::"}


def run(folder: Path, host: str, port: int | None, progress: Progress) -> None:
    try:
        import uvicorn

        from prefcache.ui.access import Access
        from prefcache.ui.app import make_app
        from prefcache.ui.reader import Reader
    except ModuleNotFoundError as error:
        raise UsageError(
            f"prefcache ui needs {error.name}, which is not installed: pip install 'prefcache[ui]' (starlette and uvicorn)."
        ) from None
    bound = _bind(host, port)
    if host in _WILDCARDS:
        progress.warn(f"{host}: other machines can reach the pages, and what is sent is not encrypted")
    with progress, working(f"open {folder}"):
        reader = Reader(folder)
        reader.open()
    access = Access.for_address(host, bound.getsockname()[1])
    progress.say(
        f"ui: {count(reader.n_examples, 'example')} and {count(len(reader.runs), 'run')} of {folder}; Ctrl-C ends it"
    )
    print(_address(host, access), flush=True)
    config = uvicorn.Config(make_app(reader, access), log_level="warning", server_header=False, lifespan="off")
    try:
        uvicorn.Server(config).run(sockets=[bound])
    except KeyboardInterrupt:
        pass  # how it is meant to end
    finally:
        reader.close()


def _address(host: str, access: "Access") -> str:
    """Return the address to open, with the token."""
    name = socket.gethostname() if host in _WILDCARDS else host
    return f"http://{f'[{name}]' if ':' in name else name}:{access.port}/?token={access.token}"


def _bind(host: str, port: int | None) -> socket.socket:
    """Listen at the port, or at the first free one of a few."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = range(_PORT, _PORT + _N_PORTS) if port is None else [port]
    for each in ports:
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, each))
            bound.listen()  # whoever opens the address at once has to wait, and is not refused
            return bound
        except OSError as error:
            bound.close()
            reason = error.strerror
    where = f"port {port}" if port is not None else f"ports {ports[0]} to {ports[-1]}"
    raise UsageError(f"{host}, {where}: {reason}. Name another --port (0 is any free one).")
