"""Records as the data formats read them."""

from typing import Any

import pytest

from prefcache.pipeline.preparing.example import Message, Unusable
from prefcache.pipeline.preparing.formats import get_format


def read(name: str, record: dict[str, Any], **options: Any) -> Any:
    return get_format(name).bind(options)(record)


def refused(name: str, record: dict[str, Any], **options: Any) -> tuple[str, str]:
    """The reason and the detail with which a format refuses a record."""
    with pytest.raises(Unusable) as caught:
        read(name, record, **options)
    return caught.value.reason, caught.value.detail


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
