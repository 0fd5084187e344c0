"""A skeleton gives what its template writes, for every text that it serves; if it could not, there is none."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefcache.pipeline.preparing import chat_template, placeholder_text, template_cache
from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.encoder import ExampleText
from prefcache.pipeline.preparing.example import IMAGE_MARK, Pair, Unusable
from prefcache.pipeline.preparing.generation_marks import CLOSE, OPEN
from prefcache.pipeline.preparing.part_worker import PartWorker
from prefcache.pipeline.preparing.placeholder_text import Guard, Inspected, OpaqueText, Slot
from prefcache.pipeline.preparing.render_chat import ChatRenderer
from prefcache.pipeline.preparing.template_cache import Skeleton, TemplateCacheMismatch
from tests.helpers.tokenizers import CHATML, DATE, SPECIALS, TEMPLATES, chunk_of, facts, resolved_config

STRIP = (None,), (None,)  # spaces of any kind, on both sides
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SHAPES = [
    ("user",),
    ("user", "assistant"),
    ("system", "user"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant", "user"),
]
# What a template may look for, what a skeleton works with itself, and what text is made of.
ODD = [
    "<think>", "</think>", "<think>\n\n</think>\n\n", "\ue000", "\ue001", placeholder_text.MARK, " ", "\n", "\t", "\u00a0", "\u2028",
    "'", '"', "<b>", "&amp;", "{{ x }}", "{% if %}", "\\n", "<tool_response>", "</tool_response>", "[INST]", "<<SYS>>",
    "user", "%s", "{}", "ß", "日本", "e\u0301", *SPECIALS,
]  # fmt: skip
# A text with the mark of pictures is refused before it is rendered.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters=IMAGE_MARK), max_size=6)
texts = st.lists(st.one_of(st.sampled_from(ODD), TEXT), max_size=5).map("".join)
modest = settings(max_examples=12)


def rendering(text: str, ask: bool = False, **special: str) -> Any:
    template = ChatTemplate(text, special or SPECIAL, DATE)
    return lambda turns: template.render(turns, add_generation_prompt=ask)


def turns(shape: Any, texts: Any) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(shape, texts, strict=True)]


def traced(text: str, shape: tuple[str, ...] = ("user",), ask: bool = False) -> Skeleton | None:
    return template_cache.trace_skeleton(rendering(text, ask), [(role, "role", "content") for role in shape])


SKELETONS = [
    (name, shape, ask, skeleton)
    for name, text in TEMPLATES.items()
    for shape in SHAPES
    for ask in (True, False)
    if (skeleton := traced(text, shape, ask)) is not None
]


# -- where there is a skeleton, it is right -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape", "ask", "skeleton"), SKELETONS, ids=lambda value: str(value)[:30])
@given(data=st.data())
@modest
def test_a_skeleton_says_what_its_template_says(name, shape, ask, skeleton, data):
    said = data.draw(st.lists(texts, min_size=len(shape), max_size=len(shape)))
    if skeleton.fits(said):
        assert skeleton.fill(said) == rendering(TEMPLATES[name], ask)(turns(shape, said))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_style_of_template_has_skeletons_for_one_question(name):
    """Conversations of all common templates are rendered without running the template."""
    shapes = {shape for found, shape, _, _ in SKELETONS if found == name}
    assert {("user",), ("user", "assistant")} <= shapes


@pytest.mark.parametrize(
    ("template", "pieces", "guards"),
    [
        ("[{{ c }}]", ("[", Slot(0), "]"), ()),
        ("[{{ c | trim }}]", ("[", Slot(0, *STRIP), "]"), ()),
        ("[{{ c.lstrip() }}{{ c.rstrip() }}]", ("[", Slot(0, (None,)), Slot(0, (), (None,)), "]"), ()),
        ("[{{ c.lstrip().rstrip() }}]", ("[", Slot(0, *STRIP), "]"), ()),
        ("{% if 'x' in c %}!{% endif %}{{ c }}", (Slot(0),), (Guard(Slot(0), "contains", "x"),)),
        ("{{ c if c else 'none' }}", (Slot(0),), (Guard(Slot(0), "empty", None),)),
        ("{{ 'x' if c == 'a' else c }}", (Slot(0),), (Guard(Slot(0), "equals", "a"),)),
        ("{{ 'x' if c in ['a'] else c }}", (Slot(0),), (Guard(Slot(0), "equals", "a"),)),
        (
            "{{ 'x' if (c | trim).startswith(('a', 'b')) else c }}",
            (Slot(0),),
            (Guard(Slot(0, *STRIP), "startswith", ("a", "b")),),
        ),
        # What stands before the text stops the stripping; of a blank text it would not.
        ("{{ (' a ' + c) | trim }}", ("a ", Slot(0, (), (None,))), (Guard(Slot(0, (), (None,)), "empty", None),)),
        ("{{ (c ~ ' a ') | trim }}", (Slot(0, (None,)), " a"), (Guard(Slot(0, (None,)), "empty", None),)),
        ("{{ ('\n' + c + ' \n') | trim }}", (Slot(0, *STRIP),), None),
        ("{% set x %} {{ c }}!{% endset %}{{ x | trim }}", (Slot(0, (None,)), "!"), None),
        ("{% macro m(t) %}{{ t }}{% endmacro %}{{ m(c) | trim }}", (Slot(0, *STRIP),), ()),
        ("{{ c.strip('\n') }}", (Slot(0, ("\n",), ("\n",)),), ()),
        ("{{ c | trim('x') }}", (Slot(0, ("x",), ("x",)),), ()),
        ("{{ c.lstrip('') }}", (Slot(0),), ()),
        # After spaces of any kind, a line end is stripped already; before them, they strip it too.
        ("{{ (c | trim).strip('\n') }}", (Slot(0, *STRIP),), ()),
        ("{{ c.strip('\n') | trim }}", (Slot(0, *STRIP),), ()),
        ("{{ c.lstrip('\n').lstrip('x').lstrip('\n') }}", (Slot(0, ("\n", "x", "\n")),), ()),
        ("{{ ('\n' + c + 'x').strip('\n') }}", (Slot(0, ("\n",)), "x"), (Guard(Slot(0, ("\n",)), "empty", None),)),
        ("{% for m in messages %}{{ '\n'.strip('\n') }}{{ c }}{% endfor %}", (Slot(0),), ()),
        ("{{ c.split('</x>')[-1].lstrip('\n') }}", (Slot(0, ("\n",)),), (Guard(Slot(0), "contains", "</x>"),)),
        ("{{ 'x' if (c | trim) | length > 0 }}", ("x",), (Guard(Slot(0, *STRIP), "empty", None),)),
        ("{{ 'x' if c | length == 0 else c }}", (Slot(0),), (Guard(Slot(0), "empty", None),)),
        ("{{ 'x' if c | count else c }}", ("x",), (Guard(Slot(0), "empty", None),)),
        ("{{ 'yes' if c is string and c is iterable and c is not none }}{{ c }}", ("yes", Slot(0)), ()),
        ("no text at all", ("no text at all",), ()),
    ],
)
def test_what_is_placed_and_stripped_is_known(template, pieces, guards):
    found = traced("{% set c = messages[0].content %}" + template)
    assert found is not None and found.pieces == pieces
    assert guards is None or found.guards == guards


# Expressions that strip a text, write around it, or join both, and how to ask for what comes of them.
STRIPS = [
    "strip()",
    "lstrip()",
    "rstrip()",
    "strip('\n')",
    "lstrip('\n')",
    "rstrip('x\n')",
    "lstrip('xy')",
    "strip(' ')",
]
steps = st.one_of(
    st.sampled_from([f"({{}}).{strip}" for strip in STRIPS]),
    st.sampled_from(
        ["(({}) | trim)", "(({}) | trim('y'))", "({} + '\n')", "('\n' ~ {})", "('x ' + {})", "({} ~ ' y\n')"]
    ),
    st.sampled_from(["({} + messages[1].content)", "(messages[1].content ~ {})", "({}).split('y')[0]"]),
)
ASKS = [
    "{{ e }}",
    "{{ 'no' if not e else e }}",
    "{{ 'x' if e.endswith('x') else e }}",
    "{{ 'no' if e | length == 0 else e }}",
]


@given(
    steps=st.lists(steps, min_size=1, max_size=5),
    ask=st.sampled_from(ASKS),
    said=st.lists(st.text("xy \n\t\u3000", max_size=5), min_size=2, max_size=2),
)
@settings(modest, max_examples=250)
def test_any_order_of_strips_and_joins_is_exact(steps, ask, said):
    expression = "messages[0].content"
    for step in steps:
        expression = step.format(expression)
    text = f"{{% set e = {expression} %}}[{ask}]"
    skeleton = traced(text, ("user", "assistant"))
    if skeleton is not None and skeleton.fits(said):
        assert skeleton.fill(said) == rendering(text)(turns(("user", "assistant"), said))


@pytest.mark.parametrize("strip", STRIPS)
def test_every_strip_has_a_skeleton(strip):
    assert traced(f"{{% set c = messages[0].content.{strip} %}}[{{{{ c }}}}]") is not None


def test_an_answer_that_loses_more_than_spaces_is_left_to_the_template():
    """It is then counted as restored."""
    for strip, is_served in (("'\n'", True), ("'\"'", False)):
        text = f"{{% for m in messages %}}[{{{{ m.content.strip({strip}) }}}}]{{% endfor %}}"
        renderer = ChatRenderer(ChatTemplate(text, SPECIAL, DATE))
        renderer.render(Pair(prompt="why?", chosen='"yes"', rejected="no"))
        assert any(renderer.cache._skeletons.values()) == is_served
        assert renderer.counts["restored"] == (not is_served)


def test_a_guard_is_about_the_text_as_the_template_asked():
    skeleton = traced("{% set c = messages[0].content | trim %}{{ '!' if c.endswith('x') else c }}")
    assert skeleton is not None
    assert skeleton.fits(["x y"]) and skeleton.fits(["xa"])
    assert not skeleton.fits(["a x \n"])


# -- where the template looks inside, there is none ------------------------------------------------------------------

LOOKS = {
    "length": "{{ c | length }}{{ c }}",
    "upper": "{{ c | upper }}",
    "capitalize": "{{ c | capitalize }}",
    "title method": "{{ c.title() }}",
    "length of the title filter": "{{ 'x' if c | title | length == 77 }}{{ c }}",
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
    "split at spaces": "{{ c.split()[-1] }}",
    "split once": "{{ c.split('</x>', 1)[-1] }}",
    "split of a joined text": "{{ ('x' + c).split('</x>')[-1] }}",
    "strip of another text": "{{ c.strip(messages[0].content) }}",
    "strip of no characters": "{{ c.strip(1) }}",
    "length over 1": "{{ 'x' if c | length > 1 else c }}",
    "length of 1": "{{ 'x' if c | length == 1 else c }}",
    "length as a number": "{{ c | length | int }}",
    "a number or not": "{{ 'x' if c | length is number }}{{ c }}",
    "lengths of two": "{{ c if c | length > messages[0].content | length }}",
    "length as an index": "{{ messages[c | length] }}{{ c }}",
    "length as a bound": "{{ messages[: c | length] | length }}{{ c }}",
    "length as a key": "{{ {'a': 1}[c | length] }}{{ c }}",
    "attribute of a length": "{{ (c | length).real is defined }}{{ c }}",
    "a length or another": "{{ (c | length) or 'x' }}",
    "length of at least 1": "{{ 'x' if c | length >= 1 else c }}",
    "length times": "{{ 'x' * (c | length) }}{{ c }}",
    "length in a list": "{{ [c | length] }}{{ c }}",
    "sum of lengths": "{{ [c] | map('length') | sum }}{{ c }}",
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
    "joined values": "{{ 'x' if messages[0].values() | join | length == 77 }}{{ c }}",
    "joined values by the method": "{{ 'x' if ''.join(messages[0].values()) | length == 77 }}{{ c }}",
    "joined items of an iterator": "{{ 'x' if ''.join(messages | map(attribute='content')) | length == 77 }}{{ c }}",
    "escaped and concatenated": "{% autoescape true %}{{ 'x' if (c ~ '') | length == 77 }}{% endautoescape %}{{ c }}",
    "escaped": "{{ c | e }}",
    "marked safe": "{{ c | safe }}",
    "indented": "{{ c | indent }}",
    "wrapped": "{{ c | wordwrap(3) }}",
    "list": "{{ c | list | length }}",
    "encoded": "{{ c | urlencode }}",
    "number": "{{ c | int(7) }}",
}


@pytest.mark.parametrize("looks", LOOKS.values(), ids=LOOKS.keys())
def test_a_template_that_looks_inside_has_no_skeleton(looks):
    assert traced("{% set c = messages[0].content %}" + looks) is None


def test_a_template_that_refuses_has_no_skeleton():
    assert traced(TEMPLATES["gemma"], ("system", "user")) is None
    assert traced("{{ raise_exception('no') }}") is None


def test_private_characters_of_the_templates_own_are_not_taken_for_a_text():
    assert traced("\ue000{{ messages[0].content }}") is None
    assert traced("{{ messages[0].content }}" + placeholder_text.MARK) is None


def test_everything_that_a_string_can_do_is_placed_stripped_asked_or_refused():
    opaque = OpaqueText((Slot(0),), [])
    for name in set(dir(str)) - placeholder_text._HARMLESS - {
        "__str__", "__add__", "split", "strip", "lstrip", "rstrip", "startswith", "endswith", "__contains__", "__eq__", "__ne__",
        "__bool__",
    }:  # fmt: skip
        with pytest.raises(Inspected):
            getattr(opaque, name)()


# -- finding the place of a text -------------------------------------------------------------------------------------


def test_the_one_place_of_a_text_is_found_whatever_else_is_said():
    opaque = OpaqueText((Slot(0),), [])
    for other in ODD:
        if placeholder_text.MARK in other:
            continue
        written = rendering(CHATML)([{"role": "user", "content": other}, {"role": "assistant", "content": opaque}])
        assert placeholder_text.split_at_slot(written) == (
            f"<|im_start|>user\n{other}<|im_end|>\n<|im_start|>assistant\n",
            Slot(0),
            "<|im_end|>\n",
        )


def test_no_place_and_two_places_are_none():
    opaque = OpaqueText((Slot(0),), [])
    assert placeholder_text.split_at_slot("plain") is None
    assert (
        placeholder_text.split_at_slot(
            rendering("{{ messages[0].content }}{{ messages[0].content }}")([{"content": opaque}])
        )
        is None
    )


@pytest.mark.parametrize(
    ("whole", "asked", "rest"),
    [
        (("a", Slot(0), "bc"), ("a", Slot(0), "b"), ("c",)),
        (("a", Slot(0), "b", Slot(1, *STRIP)), ("a", Slot(0), "b"), (Slot(1, *STRIP),)),
        (("a",), ("a",), ()),
        (("ab",), ("a", Slot(0)), None),
        (("a", Slot(0, *STRIP)), ("a", Slot(0)), None),
        (("a",), ("ab",), None),
        (("a",), ("a", "b"), None),
        # What is marked from before the end of the prefix on is marked from the beginning of the rest.
        (("a", Slot(0), f"b{OPEN}c", Slot(1), f"d{CLOSE}"), ("a", Slot(0), "bc"), (OPEN, Slot(1), f"d{CLOSE}")),
        ((f"{OPEN}a{CLOSE}b{OPEN}", Slot(0), CLOSE), (f"{OPEN}a{CLOSE}b",), (OPEN, Slot(0), CLOSE)),
        ((f"{OPEN}a{CLOSE}b", Slot(0)), ("a",), (f"{OPEN}{CLOSE}b", Slot(0))),
    ],
)
def test_the_rest_of_a_skeleton_after_another(whole, asked, rest):
    assert template_cache.remove_prefix(whole, asked) == rest


# -- a look that cannot be seen --------------------------------------------------------------------------------------

# Whether a text is part of a fixed one: Python asks the fixed one, so no OpaqueText is told.
UNSEEN = (
    "{% for m in messages %}{% if m.content in 'abc' %}(letters){% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def unseen_pair(prompt: str) -> Pair:
    return Pair(prompt=prompt, chosen="yes", rejected="no")


@pytest.fixture
def careless(monkeypatch):
    """As if a way of looking into a text had been forgotten: it takes an OpaqueText for a text, and no trial shows it."""
    monkeypatch.setattr(
        chat_template._Searched, "__contains__", lambda self, other: str.__contains__(self._text, other)
    )
    monkeypatch.setattr(template_cache, "_MOST_LITERALS", 0)
    monkeypatch.setattr(template_cache, "_TRIALS", [trial for trial in template_cache._TRIALS if trial])


def test_a_look_that_was_not_seen_is_caught_by_comparing(careless):
    renderer = ChatRenderer(ChatTemplate(UNSEEN, SPECIAL, DATE))
    assert renderer.render(unseen_pair("why?")).prompt.startswith("<|im_start|>user")
    with pytest.raises(TemplateCacheMismatch):
        renderer.render(unseen_pair("ab"))


def test_a_part_is_then_made_without_skeletons(careless):
    prompts = ["why?", "ab", "who?"]
    records = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in prompts]
    worker = PartWorker(resolved_config(facts("byte-level"), UNSEEN))
    made = worker.prepare(0, chunk_of(records))
    said = [worker.encoder.decode(ids) for ids in made.table["prompt_ids"].to_pylist()]
    assert said == [
        f"{'(letters)' if prompt == 'ab' else ''}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        for prompt in prompts
    ]
    assert made.records == 3 and made.quarantined == {}


# Each asks, in a way of its own, what is in the messages. Some are served by a skeleton and some are not; none is fooled.
WAYS_OF_LOOKING = {
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


@pytest.mark.parametrize("look", WAYS_OF_LOOKING)
def test_no_way_of_looking_in_is_overlooked(look):
    text = WAYS_OF_LOOKING[look] + CHATML
    cached, plain = (ChatRenderer(ChatTemplate(text, SPECIAL, DATE)) for _ in range(2))
    plain.reset(use_cache=False)
    # More than are compared anyway, so that only the skeleton's own care can tell them apart.
    for prompt in ["why is it so?", "one two three", "what?", "four words are here", "a b", "c d", "/no_think", "e f"]:
        assert cached.render(unseen_pair(prompt)) == plain.render(unseen_pair(prompt))
    turned = Pair(prompt=[{"content": "why is it so?", "role": "user"}], chosen="yes", rejected="no")
    assert cached.render(turned) == plain.render(turned)


def test_messages_whose_content_comes_first_have_skeletons_too():
    # As in Parquet files, whose columns stand in the order of their names.
    template = "{% for m in messages %}{{ m | list | join('+') }}: {{ m.content }};{% endfor %}"
    cached, plain = (ChatRenderer(ChatTemplate(template, SPECIAL, DATE)) for _ in range(2))
    plain.reset(use_cache=False)
    asked, yes = {"content": "why?", "role": "user"}, [{"content": "yes", "role": "assistant"}]
    swapped = Pair(prompt=[asked], chosen=yes, rejected=[{"content": "no", "role": "assistant"}])
    usual = Pair(prompt="why?", chosen="yes", rejected="no")
    assert (
        cached.render(swapped)
        == plain.render(swapped)
        == ExampleText("content+role: why?;", ("content+role: yes;", "content+role: no;"))
    )
    assert (
        cached.render(usual)
        == plain.render(usual)
        == ExampleText("role+content: why?;", ("role+content: yes;", "role+content: no;"))
    )
    assert len(cached.cache._skeletons) == 2 and all(cached.cache._skeletons.values())
    mixed = Pair(prompt=[asked], chosen=yes, rejected="no")
    assert cached.render(mixed) == plain.render(mixed)
    assert len(cached.cache._skeletons) == 2


def test_skeletons_give_what_templates_give_one_by_one():
    for name, text in TEMPLATES.items():
        cached, plain = (ChatRenderer(ChatTemplate(text, SPECIAL, DATE)) for _ in range(2))
        plain.reset(use_cache=False)
        for prompt in ODD:
            pair = Pair(prompt=f"{prompt} why?{prompt}", chosen=f"{prompt}yes{prompt}", rejected="no ")
            assert outcome(cached, pair) == outcome(plain, pair), (name, prompt)
        assert any(cached.cache._skeletons.values()) or name == "r1", name


def outcome(renderer: ChatRenderer, pair: Pair) -> Any:
    try:
        return renderer.render(pair)
    except Unusable as error:
        return error.reason, error.detail
