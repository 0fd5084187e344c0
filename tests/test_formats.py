"""A record becomes an example, or says in one countable reason why it cannot."""

import pytest

from pipeline.example import Example, Unusable, plain_text
from pipeline.formats import FORMATS

USER, SYSTEM = {"role": "user", "content": "why?"}, {"role": "system", "content": "be kind"}
GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no"}


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def read(record: dict) -> Example:
    return FORMATS["pairs"].read(record)


def test_strings_are_an_example():
    assert read(GOOD) == Example("why?", "because", "no")


def test_messages_are_an_example():
    record = {"prompt": [SYSTEM, USER], "chosen": answer("because"), "rejected": answer("no")}
    assert read(record) == Example([SYSTEM, USER], answer("because"), answer("no"))


def test_strings_and_messages_may_be_mixed():
    assert read(GOOD | {"chosen": answer("because")}).chosen == answer("because")


def test_other_columns_and_other_keys_of_messages_are_let_be():
    named = [{"role": "user", "content": "why?", "name": "Ann"}]
    assert read(GOOD | {"prompt": named, "score": 3}).prompt == named


def test_whitespace_of_a_text_is_kept():
    assert read(GOOD | {"chosen": " because\n"}).chosen == " because\n"


def message(role="assistant", content="because", **more):
    return [{"role": role, "content": content, **more}]


BAD = [
    ("missing column", {"prompt": "why?", "chosen": "because"}, "'rejected'; found prompt, chosen"),
    ("missing column", {}, "'prompt'; found none"),
    ("wrong type", GOOD | {"chosen": None}, "chosen is null"),
    ("wrong type", GOOD | {"chosen": 7}, "chosen is int"),
    ("wrong type", GOOD | {"prompt": {"role": "user"}}, "prompt is dict"),
    ("wrong type", GOOD | {"prompt": ["why?"]}, "prompt holds str"),
    ("wrong type", GOOD | {"prompt": [None]}, "prompt holds null"),
    ("wrong type", GOOD | {"chosen": [{"role": "assistant"}]}, "content is null"),
    ("wrong type", GOOD | {"chosen": message(content=["a", "b"])}, "content is list"),
    ("wrong type", GOOD | {"chosen": message(role=1)}, "role is int"),
    ("empty prompt", GOOD | {"prompt": ""}, ""),
    ("empty prompt", GOOD | {"prompt": " \n\t"}, ""),
    ("empty prompt", GOOD | {"prompt": []}, "prompt"),
    ("empty prompt", GOOD | {"prompt": message(role="user", content="")}, ""),
    ("empty answer", GOOD | {"chosen": ""}, "chosen"),
    ("empty answer", GOOD | {"rejected": " \n"}, "rejected"),
    ("empty answer", GOOD | {"rejected": []}, "rejected"),
    ("empty answer", GOOD | {"rejected": message(content="")}, "rejected"),
    ("chosen equals rejected", GOOD | {"rejected": "because"}, ""),
    ("chosen equals rejected", GOOD | {"chosen": message(), "rejected": message()}, ""),
    ("chosen equals rejected", GOOD | {"chosen": message()} | {"rejected": "because"}, ""),
    ("lone surrogate", GOOD | {"prompt": "\ud83d"}, "in prompt"),
    ("lone surrogate", GOOD | {"chosen": message(content="a\udc00")}, "in chosen"),
    ("lone surrogate", GOOD | {"rejected": message(role="\ud800")}, "in rejected"),
]


@pytest.mark.parametrize(
    ("reason", "record", "detail"), BAD, ids=[f"{reason}-{i}" for i, (reason, *_) in enumerate(BAD)]
)
def test_a_bad_record_says_why(reason, record, detail):
    with pytest.raises(Unusable) as caught:
        read(record)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_a_lone_surrogate_anywhere_in_a_message_is_refused():
    # A template may render any key of a message, and no tokenizer takes such text.
    for more in ({"name": "\ud800"}, {"tool_calls": [{"function": {"name": "\ud800"}}]}):
        with pytest.raises(Unusable) as caught:
            read(GOOD | {"chosen": message(**more)})
        assert caught.value.reason == "lone surrogate"


def test_plain_text_is_one_turns_text_or_named_turns():
    assert plain_text("why?") == "why?"
    assert plain_text([USER]) == "why?"
    assert plain_text([SYSTEM, USER]) == "system: be kind\nuser: why?"
