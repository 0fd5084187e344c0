"""Data formats: from a user's record to our one shape.

One function per format, in the file of where it comes from. It returns an example or raises Unusable with the reason,
which sends the record to quarantine. To add one, write a function under @data_format; `columns`, `when` and the
docstring are what `prefcache formats` and `format: auto` know of it.
"""

from collections.abc import Sequence

# The first that fits is recognised: data sets with columns of their own, then frameworks, then ours, whose few columns
# many of them have too.
# isort: off
from pipeline.preparing.formats import public as public
from pipeline.preparing.formats import frameworks as frameworks
from pipeline.preparing.formats import ours as ours
from pipeline.preparing.formats import axolotl as axolotl

# isort: on
from pipeline.preparing.formats.registry import FORMATS, Format, Record, data_format, get_format

__all__ = ["FORMATS", "Format", "data_format", "get_format", "recognise"]

_AT_LEAST = 0.5  # of the records: bad ones are for the quarantine, not a reason to know nothing
_NEARLY_AS_MANY = 0.9


def recognise(records: Sequence[Record]) -> Format | None:
    """The first format that fits nearly as many of these records as any, and at least half of them."""
    fitting = {
        each: sum(bool(each.recognises(record)) for record in records) for each in FORMATS.values() if each.recognises
    }
    most = max(fitting.values())
    if not most or most < _AT_LEAST * len(records):
        return None
    return next(each for each, n in fitting.items() if n >= _NEARLY_AS_MANY * most)
