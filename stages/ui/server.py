"""Open an experiment and serve its pages until Ctrl-C."""

import socket
from pathlib import Path

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.visible_text import count

_PORT, _N_PORTS = 8790, 20  # the first that is free
_WILDCARDS = {"0.0.0.0", "::", ""}


def run(folder: Path, host: str, port: int | None, progress: Progress) -> None:
    try:
        import uvicorn

        from prefcache.ui.access import TOKEN, Access
        from prefcache.ui.app import make_app
        from prefcache.ui.reader import Reader
    except ModuleNotFoundError as error:
        raise UsageError(
            f"prefcache ui needs {error.name}, which is not installed: pip install 'prefcache[ui]' (starlette and uvicorn)."
        ) from None
    bound = _bind(host, port)
    if host in _WILDCARDS:
        progress.warn(f"{host or 'every address'} can be reached from other machines, without encryption")
    reader = Reader(folder)
    try:
        progress.say(f"ui: opening {count(reader.n_examples, 'example')} of {folder}")
        reader.open()
        access = Access.for_address(host, bound.getsockname()[1])
        named = host if host not in _WILDCARDS else socket.gethostname()
        named = f"[{named}]" if ":" in named else named
        print(f"http://{named}:{access.port}/?{TOKEN}={access.token}", flush=True)
        progress.say("ui: open this address in a browser on this machine; Ctrl-C ends it")
        config = uvicorn.Config(make_app(reader, access), log_level="warning", server_header=False, lifespan="off")
        uvicorn.Server(config).run(sockets=[bound])
    except KeyboardInterrupt:
        pass  # how it is meant to end
    finally:
        reader.close()


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
