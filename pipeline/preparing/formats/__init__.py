"""Data formats: from a user's record to an example.

One function per format, in the file of its origin. It returns an example, or raises Unusable, which sends the
record to quarantine with the reason. To add one, write a function under @data_format; `columns`, `when` and the
docstring are what `prefcache formats` and `format: auto` use. fields.py reads single columns.
"""

from collections.abc import Sequence

# The first that fits is recognised: data sets with columns of their own, then frameworks, then TRL's shape, whose few
# columns many of them have too.
# isort: off
from prefcache.pipeline.preparing.formats import public_images as public_images
from prefcache.pipeline.preparing.formats import public as public
from prefcache.pipeline.preparing.formats import frameworks as frameworks
from prefcache.pipeline.preparing.formats import trl as trl
from prefcache.pipeline.preparing.formats import axolotl as axolotl

# isort: on
from prefcache.pipeline.preparing.formats.prompt_images import COLUMNS as IMAGE_COLUMNS
from prefcache.pipeline.preparing.formats.prompt_images import place_images
from prefcache.pipeline.preparing.formats.registry import FORMATS, Format, Record, data_format, get_format

__all__ = ["FORMATS", "IMAGE_COLUMNS", "Format", "data_format", "get_format", "place_images", "recognise"]

_AT_LEAST = 0.5  # of the records: a few bad ones are quarantined and must not hide the format
_NEARLY_AS_MANY = 0.9


def recognise(records: Sequence[Record]) -> Format | None:
    """Return the first format that fits nearly as many of these records as any, and at least half of them."""
    n_fitting = {
        each: sum(bool(each.recognises(record)) for record in records) for each in FORMATS.values() if each.recognises
    }
    most = max(n_fitting.values())
    if not most or most < _AT_LEAST * len(records):
        return None
    return next(each for each, n in n_fitting.items() if n >= _NEARLY_AS_MANY * most)
