"""What holds of every part, whatever the conversation, the tokenizer and the template."""

import copy
import functools
import json
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from prefcache.pipeline.preparing.encoder import Encoder
from prefcache.pipeline.preparing.part_worker import PartWorker, PreparedPart
from prefcache.pipeline.schema import sequence_key
from tests.helpers.tokenizers import (
    DATE,
    FAMILIES,
    LOSSLESS,
    SPECIALS,
    TEMPLATES,
    build,
    chunk_of,
    facts,
    resolved_config,
    saved,
)

LIMIT = 72
# Transformers knows today alone, so the one template that prints a date is told it.
WITHOUT_DATE = {"date_string": DATE.strftime("%d %b %Y")}
ODD = [
    "",
    " ",
    "\n",
    "\u00a0",
    "<think>\nx\n</think>\n\n",
    "</think>",
    "\ue000",
    "🙂",
    "é",
    "日本",
    "\x00",
    "\u2028",
    *SPECIALS,
]
texts = st.lists(
    st.one_of(
        st.sampled_from(["the cat", " sings", "why?", "\n\n", "a", "42 "]), st.sampled_from(ODD), st.text(max_size=5)
    ),
    max_size=4,
).map("".join)
roles = st.sampled_from(["user", "user", "assistant", "system", "tool"])
turns = st.builds(lambda role, content: {"role": role, "content": content}, roles, texts)
spoken = st.builds(str.__add__, st.sampled_from(["why?", " the dog ", "a\n", "42"]), texts)


def conversation(contents: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


asked = st.sampled_from([1, 3, 5]).flatmap(lambda n: st.lists(spoken, min_size=n, max_size=n)).map(conversation)
# Mostly what can be used; also what says nothing, or is said by anyone in any order.
prompts = st.one_of(
    spoken,
    asked,
    asked.map(lambda turns: [{"role": "system", "content": "the dog"}, *turns]),
    asked.map(lambda turns: [*turns, turns[0]]),
    texts,
    st.lists(turns, max_size=4),
)
answered = spoken.map(lambda text: [{"role": "assistant", "content": text}])
answers = st.one_of(
    spoken,
    answered,
    st.builds(lambda first, more, last: first + more + last, answered, asked.map(lambda turns: turns[:1]), answered),
    texts,
    st.lists(turns, max_size=3),
)
pairs = st.builds(lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r}, prompts, answers, answers)
labels = st.builds(lambda p, c, good: {"prompt": p, "completion": c, "label": good}, prompts, answers, st.booleans())
broken = st.sampled_from(
    [
        b"{", b"[]", b"\xff", b'"text"', b"null", b"{}", b'{"prompt": "a"}', b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
        b'{"prompt": 7, "chosen": [], "rejected": {}}', b'{"prompt": [{}], "chosen": "a", "rejected": "b"}', b'{"prompt": "a", "completion": "b", "label": 3}',
    ]
)  # fmt: skip
modest = settings(max_examples=25)


@functools.cache
def worker(family: str, name: str | None, kind: str, too_long: str) -> PartWorker:
    return PartWorker(
        resolved_config(
            facts(family, bos=True),
            TEMPLATES[name] if name else None,
            kind,
            too_long=too_long,
            max_length=LIMIT if too_long != "drop" else 4096,
        )
    )


def made(
    records: list[Any], family: str, name: str | None, kind: str = "pairs", too_long: str = "drop"
) -> PreparedPart:
    return worker(family, name, kind, too_long).prepare(0, chunk_of(records))


def check_whole(found: PreparedPart, records: list[Any]) -> None:
    """Every record is a row or a quarantine row, once."""
    lines = sorted([*found.table["line"].to_pylist(), *found.quarantine["line"].to_pylist()])
    assert lines == list(range(1, len(records) + 1))
    assert found.records == len(records) and found.further == 0
    assert sum(found.quarantined.values()) == len(found.quarantine)
    assert all(row["reason"] for row in found.quarantine.to_pylist())


def check_row(row: dict[str, Any], columns: tuple[str, ...], max_length: int) -> None:
    assert row["n_prompt"] == len(row["prompt_ids"]) > 0
    assert row["boundary"] in ("exact", "split")
    for name in columns:
        assert row[f"n_{name}"] == len(row[f"{name}_ids"]) > 0
        assert row["n_prompt"] + row[f"n_{name}"] <= max_length
        assert row[f"{name}_key"] == sequence_key(row["prompt_ids"], row[f"{name}_ids"])
        assert row[f"cut_{name}"] == len(row[f"{name}_cut_ids"]) >= 0
        # An answer loses its end for the length alone.
        assert not row[f"{name}_cut_ids"] or row["n_prompt"] + row[f"n_{name}"] == max_length
    assert row["cut_prompt"] >= 0


styles = st.sampled_from([*TEMPLATES, None])
families = st.sampled_from(list(FAMILIES))


@given(
    records=st.lists(st.one_of(pairs, pairs, pairs, broken), min_size=1, max_size=6),
    family=families,
    name=styles,
    too_long=st.sampled_from(["drop", "keep_start", "keep_end"]),
)
@settings(modest, max_examples=250)
def test_every_record_is_a_sound_row_or_in_quarantine(records, family, name, too_long):
    found = made(records, family, name, too_long=too_long)
    check_whole(found, records)
    for row in found.table.to_pylist():
        event("row")
        check_row(row, ("chosen", "rejected"), LIMIT if too_long != "drop" else 4096)
        assert row["chosen_ids"] != row["rejected_ids"]
        if too_long == "drop":
            assert (row["cut_prompt"], row["cut_chosen"], row["cut_rejected"]) == (0, 0, 0)


@given(records=st.lists(st.one_of(labels, labels, broken), min_size=1, max_size=6), family=families, name=styles)
@settings(modest, max_examples=100)
def test_so_it_is_with_labels(records, family, name):
    found = made(records, family, name, "labels")
    check_whole(found, records)
    for row in found.table.to_pylist():
        check_row(row, ("completion",), 4096)


@functools.cache
def reference(family: str, name: str) -> Any:
    tokenizer = copy.deepcopy(saved(family, bos=True)[1])
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def as_turns(turns: Any, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns


@given(records=st.lists(pairs, min_size=1, max_size=4), family=families, name=st.sampled_from(list(TEMPLATES)))
@settings(modest, max_examples=200)
def test_ids_are_transformers_own(records, family, name):
    found, tokenizer = made(records, family, name), reference(family, name)
    options = {"return_dict": False} | WITHOUT_DATE
    for row in found.table.to_pylist():
        record = records[row["line"] - 1]
        prompt = as_turns(record["prompt"], "user")
        if prompt[0]["role"] == "system" and worker(family, name, "pairs", "drop").renderer._merges_system:
            continue  # Transformers refuses it, or leaves it out
        event("compared")
        assert row["prompt_ids"] == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
        if row["boundary"] == "split" or "think" in json.dumps(record):
            continue  # cut by hand, or an answer put back: test_render_chat.py has these
        for column in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template([*prompt, *as_turns(record[column], "assistant")], **options)
            ids = row["prompt_ids"] + row[f"{column}_ids"]
            assert ids in (whole, [*whole, tokenizer.eos_token_id]) or name == "r1"


@pytest.mark.parametrize("family", LOSSLESS)
@given(records=st.lists(pairs, min_size=1, max_size=4))
@modest
def test_ids_say_the_text(family, records):
    found, decode = made(records, family, "chatml"), Encoder(facts(family, bos=True)).decode
    for row in found.table.to_pylist():
        record = records[row["line"] - 1]
        shown = "".join(
            f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in as_turns(record["prompt"], "user")
        )
        # gemma reads ▁ as a space
        assert decode(row["prompt_ids"]) == f"{shown}<|im_start|>assistant\n".replace(
            "\u2581", " " if family == "gemma" else "\u2581"
        )
        for column in ("chosen", "rejected"):
            first, *more = as_turns(record[column], "assistant")
            said = f"{first['content']}<|im_end|>\n" + "".join(
                f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in more
            )
            assert decode(row[f"{column}_ids"]) == said.replace("\u2581", " " if family == "gemma" else "\u2581")


@given(records=st.lists(pairs, min_size=2, max_size=8), family=families, name=styles)
@modest
def test_a_row_does_not_depend_on_those_beside_it(records, family, name):
    together = made(records, family, name)
    alone = [row for record in records for row in made([record], family, name).table.to_pylist()]
    hidden = {"line", "source"}
    assert [{k: v for k, v in row.items() if k not in hidden} for row in together.table.to_pylist()] == [
        {k: v for k, v in row.items() if k not in hidden} for row in alone
    ]


def test_the_templates_of_these_tests_compile_in_transformers():
    for text in TEMPLATES.values():
        build("byte-level", bos=True, template=text).apply_chat_template(
            [{"role": "user", "content": "why?"}], tokenize=False, add_generation_prompt=True
        )
