"""prefcache on a machine where everything takes seconds: `python -m tests.helpers.slow_machine train config.yaml`.

Real models, tokenizers and files, made slow: a forward, the weights to load, a text to encode, a file to hash, a shard to read.
"""

import functools
import hashlib
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

HASHED, FORWARD, WHOLE = 0.3, 2.2, 6.0  # seconds: of a block that is hashed, of a forward, of what cannot report


def slow(owner: Any, name: str, seconds: float) -> None:
    """Make a function or method wait before each call."""
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def wait(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments, **options)

    setattr(owner, name, wait)


class SlowDigest:
    """sha256, block by block on a slow disk."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, data: Any) -> None:
        time.sleep(HASHED)
        self._digest.update(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def main() -> None:
    import transformers

    from prefcache.pipeline import safetensors_files
    from prefcache.pipeline.preparing.encoder import Encoder
    from prefcache.pipeline.stored import shards

    safetensors_files.hashlib = SimpleNamespace(sha256=SlowDigest)  # type: ignore[attr-defined]
    slow(Encoder, "encode", WHOLE)
    slow(shards, "read_rows", WHOLE / 3)
    slow(transformers.LlamaModel, "forward", FORWARD)
    slow(transformers.AutoModelForCausalLM, "from_pretrained", WHOLE)

    from prefcache.cli import main as prefcache

    print("ready", file=sys.stderr, flush=True)  # what was imported before is not what is measured
    prefcache(sys.argv[1:])


if __name__ == "__main__":
    main()
