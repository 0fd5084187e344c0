"""A frame says what its template says, for every text that it serves; where it could not, there is none."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, DATE, SPECIALS, TEMPLATES, chunk_of, facts, recipe

from pipeline.preparing import chat_template, frames
from pipeline.preparing.chat_template import ChatTemplate
from pipeline.preparing.example import Pair, Unusable
from pipeline.preparing.frames import Frame, Guard, Inspected, Opaque, Slot
from pipeline.preparing.parts import Maker
from pipeline.preparing.templating import FrameMismatch, Templater

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SHAPES = [
    ("user",),
    ("user", "assistant"),
    ("system", "user"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant", "user"),
]
# What a template may look for, what a frame works with itself, and what text is made of.
ODD = [
    "<think>", "</think>", "<think>\n\n</think>\n\n", "\ue000", "\ue001", frames.MARK, " ", "\n", "\t", "\u00a0", "\u2028",
    "'", '"', "<b>", "&amp;", "{{ x }}", "{% if %}", "\\n", "<tool_response>", "</tool_response>", "[INST]", "<<SYS>>",
    "user", "%s", "{}", "ß", "日本", "e\u0301", *SPECIALS,
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=6)), max_size=5).map("".join)
modest = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def rendering(text: str, ask: bool = False, **special: str) -> Any:
    template = ChatTemplate(text, special or SPECIAL, DATE)
    return lambda turns: template.render(turns, add_generation_prompt=ask)


def turns(shape: Any, texts: Any) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(shape, texts, strict=True)]


def traced(text: str, shape: tuple[str, ...] = ("user",), ask: bool = False) -> Frame | None:
    return frames.trace(rendering(text, ask), shape)


FRAMED = [
    (name, shape, ask, frame)
    for name, text in TEMPLATES.items()
    for shape in SHAPES
    for ask in (True, False)
    if (frame := traced(text, shape, ask)) is not None
]


# -- where there is a frame, it is right -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape", "ask", "frame"), FRAMED, ids=lambda value: str(value)[:30])
@given(data=st.data())
@modest
def test_a_frame_says_what_its_template_says(name, shape, ask, frame, data):
    said = data.draw(st.lists(texts, min_size=len(shape), max_size=len(shape)))
    if frame.holds(said):
        assert frame.fill(said) == rendering(TEMPLATES[name], ask)(turns(shape, said))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_style_of_template_has_frames_for_one_question(name):
    """The point of frames: conversations of all common templates are spared the template."""
    shapes = {shape for found, shape, _, _ in FRAMED if found == name}
    assert {("user",), ("user", "assistant")} <= shapes


@pytest.mark.parametrize(
    ("template", "pieces", "guards"),
    [
        ("[{{ c }}]", ("[", Slot(0, "whole"), "]"), ()),
        ("[{{ c | trim }}]", ("[", Slot(0, "strip"), "]"), ()),
        ("[{{ c.lstrip() }}{{ c.rstrip() }}]", ("[", Slot(0, "lstrip"), Slot(0, "rstrip"), "]"), ()),
        ("[{{ c.lstrip().rstrip() }}]", ("[", Slot(0, "strip"), "]"), ()),
        ("{% if 'x' in c %}!{% endif %}{{ c }}", (Slot(0, "whole"),), (Guard(Slot(0, "whole"), "contains", "x"),)),
        ("{{ c if c else 'none' }}", (Slot(0, "whole"),), (Guard(Slot(0, "whole"), "empty", None),)),
        ("{{ 'x' if c == 'a' else c }}", (Slot(0, "whole"),), (Guard(Slot(0, "whole"), "equals", "a"),)),
        ("{{ 'x' if c in ['a'] else c }}", (Slot(0, "whole"),), (Guard(Slot(0, "whole"), "equals", "a"),)),
        (
            "{{ 'x' if (c | trim).startswith(('a', 'b')) else c }}",
            (Slot(0, "whole"),),
            (Guard(Slot(0, "strip"), "startswith", ("a", "b")),),
        ),
        # What stands before the text stops the stripping; of a blank text it would not.
        ("{{ (' a ' + c) | trim }}", ("a ", Slot(0, "rstrip")), (Guard(Slot(0, "rstrip"), "empty", None),)),
        ("{{ (c ~ ' a ') | trim }}", (Slot(0, "lstrip"), " a"), (Guard(Slot(0, "lstrip"), "empty", None),)),
        ("{{ ('\n' + c + ' \n') | trim }}", (Slot(0, "strip"),), None),
        ("{% set x %} {{ c }}!{% endset %}{{ x | trim }}", (Slot(0, "lstrip"), "!"), None),
        ("{% macro m(t) %}{{ t }}{% endmacro %}{{ m(c) | trim }}", (Slot(0, "strip"),), ()),
        ("{{ 'yes' if c is string and c is iterable and c is not none }}{{ c }}", ("yes", Slot(0, "whole")), ()),
        ("no text at all", ("no text at all",), ()),
    ],
)
def test_what_is_placed_and_stripped_is_known(template, pieces, guards):
    found = traced("{% set c = messages[0].content %}" + template)
    assert found is not None and found.pieces == pieces
    assert guards is None or found.guards == guards


def test_a_guard_is_about_the_text_as_the_template_asked():
    frame = traced("{% set c = messages[0].content | trim %}{{ '!' if c.endswith('x') else c }}")
    assert frame is not None
    assert frame.holds(["x y"]) and frame.holds(["xa"])
    assert not frame.holds(["a x \n"])


# -- where the template looks inside, there is none ------------------------------------------------------------------

LOOKS = {
    "length": "{{ c | length }}{{ c }}",
    "upper": "{{ c | upper }}",
    "capitalize": "{{ c | capitalize }}",
    "title method": "{{ c.title() }}",
    "tojson": "{{ c | tojson }}",
    "tojson to ASCII": "{{ c | tojson(ensure_ascii=true) }}",
    "tojson of the message": "{{ messages[0] | tojson }}",
    "printed message": "{{ messages[0] }}",
    "slice": "{{ c[:3] }}",
    "index": "{{ c[0] }}",
    "iteration": "{% for x in c %}{{ x }}{% endfor %}",
    "replace method": "{{ c.replace('a', 'b') }}",
    "replace filter": "{{ c | replace('nowhere in any trial', 'b') }}",
    "replace in a joined text": "{{ ('x' + c) | replace('nowhere in any trial', 'b') }}",
    "split": "{{ c.split('</x>')[-1] }}",
    "strip of characters": "{{ c.strip('\n') }}",
    "trim of characters": "{{ c | trim('x') }}",
    "comparison of two texts": "{{ 'same' if c == messages[0].content else c }}",
    "containment of two texts": "{{ 'same' if messages[0].content in c else c }}",
    "order": "{{ c if c > 'a' else '' }}",
    "sorting": "{{ [c, 'a'] | sort | join }}",
    "as a key": "{{ {'a': 1}[c] }}{{ c }}",
    "counting": "{{ c.count('a') }}",
    "a question to joined texts": "{{ 'x' if 'nowhere in any trial' in 'a' + c else c }}",
    "times": "{{ c * 2 }}",
    "a format of its own": "{{ c % 1 }}",
    "within a format": "{{ '%s' % c }}",
    "within the method format": "{{ '{}'.format(c) }}",
    "within a list": "{{ [c] }}",
    "joined": "{{ [c, 'x'] | join(' ') }}",
    "escaped": "{{ c | e }}",
    "marked safe": "{{ c | safe }}",
    "indented": "{{ c | indent }}",
    "wrapped": "{{ c | wordwrap(3) }}",
    "list": "{{ c | list | length }}",
    "encoded": "{{ c | urlencode }}",
    "number": "{{ c | int(7) }}",
}


@pytest.mark.parametrize("looks", LOOKS.values(), ids=LOOKS.keys())
def test_a_template_that_looks_inside_has_no_frame(looks):
    assert traced("{% set c = messages[0].content %}" + looks) is None


def test_a_template_that_refuses_has_no_frame():
    assert traced(TEMPLATES["gemma"], ("system", "user")) is None
    assert traced("{{ raise_exception('no') }}") is None


def test_private_characters_of_the_templates_own_are_not_taken_for_a_text():
    assert traced("\ue000{{ messages[0].content }}") is None
    assert traced("{{ messages[0].content }}" + frames.MARK) is None


def test_everything_that_a_string_can_do_is_placed_stripped_asked_or_refused():
    opaque = Opaque((Slot(0, "whole"),), [])
    for name in set(dir(str)) - frames._HARMLESS - {
        "__str__", "__add__", "strip", "lstrip", "rstrip", "startswith", "endswith", "__contains__", "__eq__", "__ne__",
        "__bool__",
    }:  # fmt: skip
        with pytest.raises(Inspected):
            getattr(opaque, name)()


# -- finding the place of a text -------------------------------------------------------------------------------------


def test_the_one_place_of_a_text_is_found_whatever_else_is_said():
    opaque = Opaque((Slot(0, "whole"),), [])
    for other in ODD:
        if frames.MARK in other:
            continue
        written = rendering(CHATML)([{"role": "user", "content": other}, {"role": "assistant", "content": opaque}])
        assert frames.find(written) == (
            f"<|im_start|>user\n{other}<|im_end|>\n<|im_start|>assistant\n",
            Slot(0, "whole"),
            "<|im_end|>\n",
        )


def test_no_place_and_two_places_are_none():
    opaque = Opaque((Slot(0, "whole"),), [])
    assert frames.find("plain") is None
    assert frames.find(rendering("{{ messages[0] }}{{ messages[0] }}")([opaque])) is None


@pytest.mark.parametrize(
    ("whole", "asked", "rest"),
    [
        (("a", Slot(0, "whole"), "bc"), ("a", Slot(0, "whole"), "b"), ("c",)),
        (("a", Slot(0, "whole"), "b", Slot(1, "strip")), ("a", Slot(0, "whole"), "b"), (Slot(1, "strip"),)),
        (("a",), ("a",), ()),
        (("ab",), ("a", Slot(0, "whole")), None),
        (("a", Slot(0, "strip")), ("a", Slot(0, "whole")), None),
        (("a",), ("ab",), None),
        (("a",), ("a", "b"), None),
    ],
)
def test_the_rest_of_a_frame_after_another(whole, asked, rest):
    assert frames.after(Frame(whole, ()), Frame(asked, ())) == rest


# -- a look that cannot be seen --------------------------------------------------------------------------------------

# Whether a text is part of a fixed one: Python asks the fixed one, so no Opaque is told.
UNSEEN = (
    "{% for m in messages %}{% if m.content in 'abc' %}(letters){% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def unseen_pair(prompt: str) -> Pair:
    return Pair(prompt=prompt, chosen="yes", rejected="no")


@pytest.fixture
def careless(monkeypatch):
    """As if a way of looking into a text had been forgotten: it takes an Opaque for a text, and no trial shows it."""
    monkeypatch.setattr(
        chat_template._Searched, "__contains__", lambda self, other: str.__contains__(self._text, other)
    )
    monkeypatch.setattr(chat_template, "_literals", lambda *_: ())


def test_a_look_that_was_not_seen_is_caught_by_comparing(careless):
    templater = Templater(ChatTemplate(UNSEEN, SPECIAL, DATE))
    assert templater.render(unseen_pair("why?")).prompt.startswith("<|im_start|>user")
    with pytest.raises(FrameMismatch):
        templater.render(unseen_pair("ab"))


def test_a_part_is_then_made_without_frames(careless):
    prompts = ["why?", "ab", "who?"]
    records = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in prompts]
    maker = Maker(recipe(facts("byte-level"), UNSEEN))
    made = maker.make(0, chunk_of(records))
    said = [maker.encoder.decode(ids) for ids in made.table["prompt_ids"].to_pylist()]
    assert said == [
        f"{'(letters)' if prompt == 'ab' else ''}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        for prompt in prompts
    ]
    assert made.facts["records"] == 3 and made.facts["quarantined"] == {}


# Each asks, in a way of its own, what is in the messages. Some are served by a frame and some are not; none is fooled.
LOOKS = {
    "join": "{% set all = messages|map(attribute='content')|join(' ') %}{% if '/no_think' in all %}LOOK{% endif %}",
    "str.join": "{% if '/no_think' in ' '.join(messages|map(attribute='content')|list) %}LOOK{% endif %}",
    "tojson": "{% if '/no_think' in (messages|tojson) %}LOOK{% endif %}",
    "safe": "{% if '/no_think' in (messages[0].content|safe) %}LOOK{% endif %}",
    "escape": "{% if '/no_think' in (messages[0].content|e) %}LOOK{% endif %}",
    "format": "{% if '/no_think' in ('%s'|format(messages[0].content)) %}LOOK{% endif %}",
    "percent": "{% if '/no_think' in ('%s x' % (messages[0].content,)) %}LOOK{% endif %}",
    "striptags": "{% if '/no_think' in (messages[0].content|striptags) %}LOOK{% endif %}",
    "urlize": "{% if '/no_think' in (messages[0].content|urlize) %}LOOK{% endif %}",
    "xmlattr": "{% if '/no_think' in ({'a': messages[0].content}|xmlattr) %}LOOK{% endif %}",
    "in a literal": "{% if messages[0].content in 'x /no_think x' %}LOOK{% endif %}",
    "not in a literal": "{% if messages[0].content not in 'x /no_think x' %}LOOK{% endif %}",
    "selected": "{% if messages|selectattr('content', 'in', 'x /no_think x')|list %}LOOK{% endif %}",
    "find": "{% if 'x /no_think x'.find(messages[0].content) >= 0 %}LOOK{% endif %}",
    "startswith": "{% if '/no_think x'.startswith(messages[0].content) %}LOOK{% endif %}",
    "replace": "{% if 'x /no_think x'|replace(messages[0].content, '') != 'x /no_think x' %}LOOK{% endif %}",
    "words": "{% if messages[0].content|wordcount == 1 %}LOOK{% endif %}",
    "equal": "{% if messages[:1]|rejectattr('content', 'equalto', '/no_think')|list|length < 1 %}LOOK{% endif %}",
    "lower": "{% if '/no_think' in (messages[0].content|lower) %}LOOK{% endif %}",
    "set block": "{% set x %}{{ messages[0].content }}{% endset %}{% if '/no_think' in x %}LOOK{% endif %}",
    "items": "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
}


@pytest.mark.parametrize("look", LOOKS)
def test_no_way_of_looking_in_is_overlooked(look):
    text = LOOKS[look] + CHATML
    framed, plain = (Templater(ChatTemplate(text, SPECIAL, DATE)) for _ in range(2))
    plain.use_frames = False
    # More than are compared anyway, so that only the frame's own care can tell them apart.
    for prompt in ["why is it so?", "one two three", "what?", "four words are here", "a b", "c d", "/no_think", "e f"]:
        assert framed.render(unseen_pair(prompt)) == plain.render(unseen_pair(prompt))
    turned = Pair(prompt=[{"content": "why is it so?", "role": "user"}], chosen="yes", rejected="no")
    assert framed.render(turned) == plain.render(turned)


def test_frames_give_what_templates_give_one_by_one():
    for name, text in TEMPLATES.items():
        framed, plain = (Templater(ChatTemplate(text, SPECIAL, DATE)) for _ in range(2))
        plain.use_frames = False
        for prompt in ODD:
            pair = Pair(prompt=f"{prompt} why?{prompt}", chosen=f"{prompt}yes{prompt}", rejected="no ")
            assert outcome(framed, pair) == outcome(plain, pair), (name, prompt)
        assert any(framed._frames.values()) or name == "r1", name


def outcome(templater: Templater, pair: Pair) -> Any:
    try:
        return templater.render(pair)
    except Unusable as error:
        return error.reason, error.detail
