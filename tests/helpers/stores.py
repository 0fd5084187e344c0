"""Real S3 servers on this machine, and a bucket of its own for a test."""

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

from tests.helpers.project import ROOT
from tests.helpers.store_proxy import Rule, StoreProxy

# What must be in no message, no file and no log.
KEY_ID, SECRET = "AKIATESTTESTTESTTEST", "5ecretThatNobodyMayEverSee/0123456789abcd"


class S3Server:
    """An S3 server, in a process group of its own that ends with this process, however that ends."""

    def __init__(self, kind: str = "moto", python: str | Path = sys.executable) -> None:
        """`kind`: moto or localstack, which that Python has."""
        self.kind, self.python = kind, python
        self.process: subprocess.Popen[str] | None = None
        self.port = 0

    def __enter__(self) -> "S3Server":
        self.process = subprocess.Popen(
            [self.python, "-m", "tests.helpers.s3_process", self.kind],
            cwd=ROOT,
            stdin=subprocess.PIPE,  # it ends when this is closed
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count_requests(self, bucket: str) -> Counter[str]:
        """How many requests of each kind the server has answered for a bucket."""
        with urlopen(f"{self.url}/-/requests") as answer:
            return Counter(json.load(answer).get(bucket, {}))


class Bucket:
    """A new bucket, and what a process needs to know to use it."""

    def __init__(self, server: S3Server, mirror: Path) -> None:
        self.server = server
        self.mirror = mirror
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self.url = f"s3://{self.name}/refs"
        self.client.create_bucket(Bucket=self.name)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of a user's process, which speaks to the server itself."""
        return self.environment_of(self.server.url, self.mirror)

    def environment_of(self, endpoint: str, mirror: Path) -> dict[str, str]:
        """The environment variables of a process on another machine, so to speak, or behind a proxy."""
        return {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "PREFCACHE_MIRROR": str(mirror),
        }

    @contextlib.contextmanager
    def through_proxy(self, rules: Sequence[Rule] = (), **how: Any) -> Iterator[StoreProxy]:
        """A proxy before the server. Its `url` is the endpoint for `environment_of`."""
        with StoreProxy(self.server.port, rules, **how) as proxy:
            yield proxy

    @functools.cached_property
    def client(self) -> Any:
        """boto3's client, which shares no code with what is tested."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.server.url,
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )

    def objects(self) -> dict[str, int]:
        """The size of each object below the URL, by its name relative to it."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix="refs/")
        found = itertools.chain.from_iterable(page.get("Contents", []) for page in pages)
        return {each["Key"].removeprefix("refs/"): each["Size"] for each in found}

    def read(self, name: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=f"refs/{name}")["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"refs/{name}", Body=data)

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=f"refs/{name}")

    @property
    def server_requests(self) -> Counter[str]:
        """How many requests of each kind the server has answered; those of this object are among them."""
        return self.server.count_requests(self.name)


def use_environment(variables: Mapping[str, str], monkeypatch: Any) -> None:
    """Set environment variables for this process, and forget the stores that were opened under others."""
    from prefcache.pipeline.stored.object_store import open_store

    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    open_store.cache_clear()
