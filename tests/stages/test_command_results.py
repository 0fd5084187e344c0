"""What commands return, as JSON and as tables."""

import dataclasses
import json
from pathlib import Path

import pytest

from prefcache import command_results, terminal_output
from prefcache.pipeline.stored.records import Parity

SCORED = {
    "cache": "cache/a",
    "sequences": 5,
    "cached_before": 1,
    "scored": 2,
    "tokens": 9,
    "scored_by_others": 2,
    "failed": 0,
}


def test_json_has_the_fields_in_their_order_without_those_that_do_not_apply():
    result = command_results.ScoreResult(**SCORED, parity=Parity(max=0.5), changed=True)
    assert list(json.loads(command_results.to_json(result)).items()) == [
        *SCORED.items(),
        ("parity", {"max": 0.5}),
        ("changed", True),
    ]
    result = dataclasses.replace(result, parity=None, cut_from_longer=0)
    assert json.loads(command_results.to_json(result)) == SCORED | {
        "parity": None,
        "cut_from_longer": 0,
        "changed": True,
    }


def test_json_puts_a_part_that_has_no_key_of_its_own_among_the_fields():
    quantiles = command_results.Quantiles(1.0, 2.0, None)
    deviations = command_results.Deviations(
        sequences=2, tokens=3, not_finite=0, token=quantiles, sequence=quantiles, bias=None
    )
    result = command_results.ParityResult(
        a="plain", b="vllm", numerics=[], deviations=deviations, margins=command_results.Margins(1, 0), worst=[]
    )
    content = json.loads(command_results.to_json(result))
    assert content["token"] == {"p50": 1.0, "p99": 2.0, "max": None} and content["pairs"] == 1
    assert [*content] == [
        "a",
        "b",
        "numerics",
        "sequences",
        "tokens",
        "not_finite",
        "token",
        "sequence",
        "bias",
        "pairs",
        "flipped",
        "worst",
    ]


def test_json_escapes_what_nobody_would_see():
    result = command_results.ReportResult(report=Path("r\u202e.html"), runs=["\x1b[31m"], bytes=1)
    text = command_results.to_json(result)
    assert text.isascii() and json.loads(text) == {"report": "r\u202e.html", "runs": ["\x1b[31m"], "bytes": 1}


@pytest.mark.parametrize(
    "result", [cls for name, cls in vars(command_results).items() if name.endswith(("Result", "Plan", "Waiting"))]
)
def test_every_result_has_a_table(result):
    # A preview's table needs to know whether ids are wanted, so the command prints it.
    prints = terminal_output.print_result.dispatch(result)
    assert (prints is terminal_output.print_result.dispatch(object)) == (result is command_results.PreviewResult)
