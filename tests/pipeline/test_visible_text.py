"""What would not be seen, or would act on a terminal or on the text around it, is shown by name; what people write is kept."""

import json
import sys
import unicodedata

import pytest

from prefcache.pipeline.visible_text import count, visible, visible_json, visible_pieces

FAMILY = "\U0001f469\U0001f3fd\u200d\U0001f52c"  # a woman, her colour of skin, a joiner, a microscope
HEART = "\u2764\ufe0f\u200d\U0001f525"
PERSIAN = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # two parts of one word, not joined
HINDI = "\u0928\u094d\u200d \u0915\u094d\u200c\u0937"
SINHALA = "\u0dc1\u0dca\u200d\u0dbb\u0dd3"
KANNADA = "\u0cb0\u200d\u0ccd\u0caf"  # the joiner before the virama


def test_a_number_comes_with_its_noun():
    assert [count(n, "row") for n in (0, 1, 2, 1234)] == ["0 rows", "1 row", "2 rows", "1,234 rows"]
    assert count(2, "match", "matches") == "2 matches"


NAMED = [
    ("a\x1b[31mred\x1b[0m\x00\x7f\x85", "a\u241b[31mred\u241b[0m\u2400<U+007F><U+0085>"),
    ("\x1b]0;title\x07", "\u241b]0;title\u2407"),
    ("a\rb\x08c", "a\u240db\u2408c"),
    ("\x9b31m", "<U+009B>31m"),  # the one-byte form of ESC [
    ("\u202egnp.exe\u2066\u200f", "<U+202E>gnp.exe<U+2066><U+200F>"),
    ("a\u200bb\ufeff\u2028c\u00add", "a<U+200B>b<U+FEFF><U+2028>c<U+00AD>d"),
    ("\ud800", "<U+D800>"),
    ("\U000e0041\ue000", "<U+E0041><U+E000>"),  # a tag, which hides text, and one of private use
    ("a\u200db a\u200cb", "a<U+200D>b a<U+200C>b"),  # Latin letters do not join
    ("\u200d\u200c", "<U+200D><U+200C>"),
    ("\u06cc\u200c\u200c\u062e", "\u06cc<U+200C><U+200C>\u062e"),  # one more does nothing
    ("\u06cc\u200c ", "\u06cc<U+200C> "),
    ("\U0001f469\u200da", "\U0001f469<U+200D>a"),
    ("Z" + "\u0301" * 20 + "a\u0301", "Z" + "\u0301" * 4 + "<16 more marks>a\u0301"),
]
KEPT = [
    *(
        "plain",
        "two\nlines\tand a tab",
        "",
        "na\u00efve \u65e5\u672c\u3000\u8a9e\u00a0\U0001f389",
        "\u05e9\u05dc\u05d5\u05dd",
    ),
    *(FAMILY, HEART, PERSIAN, HINDI, SINHALA, KANNADA, "\u0647\u200d"),
]


@pytest.mark.parametrize(("text", "shown"), NAMED)
def test_what_would_not_be_seen_is_shown_by_name(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown  # to look twice changes nothing


@pytest.mark.parametrize("text", KEPT)
def test_what_people_write_is_kept(text):
    assert visible(text) == text and visible_json(json.dumps(text, ensure_ascii=False)) == json.dumps(
        text, ensure_ascii=False
    )


def test_nothing_that_acts_is_left_of_all_of_unicode():
    every = "".join(map(chr, [*range(0x20000), *range(0xE0000, 0xE0200), sys.maxunicode]))
    seen = set(visible(every))
    assert set(map(unicodedata.category, seen)) - {"Cc"} == {
        *("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"),
        *("Sm", "Sc", "Sk", "So", "Zs"),
    }
    assert {c for c in seen if unicodedata.category(c) == "Cc"} == {"\n", "\t"}


def test_a_long_text_is_cut_and_says_so():
    assert visible("x" * 1600, 1500) == "x" * 1500 + "\u2026"


@pytest.mark.parametrize("text", [text for text, _ in NAMED] + KEPT)
def test_json_means_the_same_and_hides_nothing(text):
    shown = visible_json(json.dumps({text: [text]}, ensure_ascii=False))
    assert json.loads(shown) == {text: [text]}
    assert visible(shown.replace("\u0301", "")) == shown.replace("\u0301", "")


@pytest.mark.parametrize("text", [FAMILY, HEART, PERSIAN, "a\u200db", "x\x1by"])
def test_pieces_are_shown_as_the_text_that_they_make(text):
    pieces = list(text)  # as of a tokenizer that has a token for every character
    assert "".join(visible_pieces(pieces)) == visible(text) and len(visible_pieces(pieces)) == len(pieces)
    assert visible_pieces([text, "", "a"])[1:] == ["", "a"]
