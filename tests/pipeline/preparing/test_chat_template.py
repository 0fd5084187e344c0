"""A chat template gives Transformers' text, and can do nothing else: no hang, no full memory, no look at Python."""

import contextlib
import datetime
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from jinja2 import UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing import chat_template
from prefcache.pipeline.preparing.chat_template import ChatTemplate, TemplateLimit, read_template
from prefcache.pipeline.preparing.example import IMAGE_MARK, Unusable
from tests.helpers.project import ROOT
from tests.helpers.real_tokenizers import trl_templates
from tests.helpers.tokenizers import (
    DATE,
    GEMMA_CHAT,
    LLAVA_ONEVISION_CHAT,
    QWEN3_CHAT,
    SMOLVLM_CHAT,
    TEMPLATES,
    build,
)

USER = {"role": "user", "content": "  why <b>red</b> & \"green\"?\n'日本' "}
SYSTEM = {"role": "system", "content": "be brief\n"}
REPLY = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nblue fish "}
LAST = {"role": "user", "content": "and why?"}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "déjà <vu>", "parameters": {}}}]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"q": "é"}}}],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def made(text: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(text, tokens, DATE)


def says(text: str, messages: Any = (), **options: Any) -> str:
    with ChatTemplate.limits():
        return made(text, **SPECIAL).render(messages, add_generation_prompt=False, **options)


# -- the same text as Transformers' ----------------------------------------------------------------------------------


@pytest.fixture
def pinned(monkeypatch):
    """Transformers' today is the day that is pinned."""
    from transformers.utils import chat_template_utils

    class Pinned(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(DATE.year, DATE.month, DATE.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Pinned)


@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize("messages", [[USER], [USER, REPLY], [SYSTEM, USER], [SYSTEM, USER, REPLY, LAST]])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_apply_chat_template(pinned, name, messages, ask):
    tokenizer = build("byte-level", bos=True, template=TEMPLATES[name])
    ours = made(TEMPLATES[name], **tokenizer.special_tokens_map)
    try:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:
        with pytest.raises(Unusable) as caught:
            ours.render(messages, add_generation_prompt=ask)
        assert caught.value.reason == "template refuses" and str(error) in caught.value.detail
        return
    assert ours.render(messages, add_generation_prompt=ask) == expected


# -- contents in parts -----------------------------------------------------------------------------------------------


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize("messages", [[USER], [USER, REPLY], [SYSTEM, USER], [SYSTEM, USER, REPLY, LAST]])
@pytest.mark.parametrize("template", [SMOLVLM_CHAT, LLAVA_ONEVISION_CHAT])
def test_a_template_that_takes_parts_alone_gets_texts_as_parts(template, messages, ask):
    tokenizer = build("byte-level", template=template)
    expected = tokenizer.apply_chat_template(in_parts(messages), tokenize=False, add_generation_prompt=ask)
    assert made(template).render(messages, add_generation_prompt=ask) == expected
    assert all(message["content"].strip() in expected for message in messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_takes_texts_gets_texts(name):
    template = made(TEMPLATES[name], **SPECIAL)
    for message in (USER, SYSTEM, REPLY):
        assert template.split_content(message) is message


SEEING = [name for name, text in trl_templates().items() if "'image'" in text or '"image"' in text]


@pytest.mark.parametrize("name", SEEING)
def test_published_templates_print_pictures_as_in_transformers(pinned, name):
    template = trl_templates()[name]
    theirs = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look "}, {"type": "image"}]},
        *in_parts([{"role": "assistant", "content": "so"}, LAST]),
    ]
    ours = [{"role": "user", "content": f"{IMAGE_MARK}Look {IMAGE_MARK}"}, {"role": "assistant", "content": "so"}, LAST]
    expected = build("byte-level", bos=True, template=template).apply_chat_template(
        theirs, tokenize=False, add_generation_prompt=True
    )
    assert made(template, **SPECIAL).render(ours, add_generation_prompt=True) == expected


def test_roles_may_differ_in_what_they_take():
    template = made(
        "{% for m in messages %}{% if m.role == 'user' %}{% for part in m.content %}{{ part.text }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}|{% endfor %}"
    )
    assert template.render([SYSTEM, LAST, REPLY], add_generation_prompt=False) == (
        f"{SYSTEM['content']}|{LAST['content']}|{REPLY['content']}|"
    )


def test_a_picture_is_a_part_of_its_own():
    template = "{% for m in messages %}{% for p in m.content %}<{{ p.type }}:{{ p.text }}>{% endfor %}{% endfor %}"
    content = f"{IMAGE_MARK}a{IMAGE_MARK}{IMAGE_MARK} b"
    assert says(template, [{"role": "user", "content": content}]) == "<image:><text:a><image:><image:><text: b>"
    # Where texts are taken as they are, only the message with a picture is in parts.
    both = "{% for m in messages %}{{ m.content if m.content is string else m.content | length }},{% endfor %}"
    messages = [{"role": "user", "content": f"{IMAGE_MARK}a"}, {"role": "user", "content": "b"}]
    assert says(both, messages) == "2,b,"


# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "llama-3"])
def test_tools_and_arguments_reach_the_template_as_in_transformers(pinned, name):
    tokenizer = build("byte-level", bos=True, template=TEMPLATES[name])
    ours = made(TEMPLATES[name], **tokenizer.special_tokens_map)
    for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True}, {"date_string": "never"}):
        for messages in ([USER], [SYSTEM, USER, CALL | {"content": "x"}, {"role": "tool", "content": "42"}]):
            expected = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, tools=TOOLS, **kwargs
            )
            assert ours.render(messages, add_generation_prompt=True, tools=TOOLS, kwargs=kwargs) == expected
            assert "déjà <vu>" in expected


SNIPPETS = [
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}|{{ messages | tojson(ensure_ascii=true, sort_keys=true) }}",
    "{{ messages[0] | tojson(separators=(',', ':')) }}",
    "{% for m in messages %}\n  {% if loop.first %}\n    {% continue %}\n  {% endif %}\n{{ m.role }}\n{% break %}\n{% endfor %}\n",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ m.content %}{% endfor %}{{ ns.t }}",
    "{{ 1 ~ none ~ true ~ 'x' ~ missing ~ 2.5 ~ [1, 'a'] }}",
    "{% autoescape true %}{{ '<' ~ messages[0].content }}{% endautoescape %}",
    "{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m('x') | trim }}{% macro c() %}{{ caller() }}{% endmacro %}{% call c() %}y{% endcall %}",
    "{% set block %} a {{ 1 }} {% endset %}[{{ block | trim }}]{% filter upper %}abc{% endfilter %}",
    "{{ missing }}{{ messages[0].missing }}{{ documents is none }}{{ tools is none }}{{ tools is defined }}",
    "{{ messages[0].content is iterable }}{{ 'x' is sequence }}{{ 3 is iterable }}{{ [] is sequence }}{{ {} is iterable }}",
    "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ 7 ** 2 }}{{ 7 % 4 }}{{ '%s-%s' % (1, 'b') }}{{ 'ab' * 3 }}",
    "{{ messages[0].content.split('b') | join('|') }}{{ messages | map(attribute='role') | list }}{{ dict(a=1).items() | list }}",
    "{{ 'a' in 'cat' }}{{ 'x'.format() }}{{ '{0}'.format('y') }}{{ range(3) | sum }}{{ [3, 1] | sort | first }}",
]


@pytest.mark.parametrize("text", SNIPPETS)
def test_every_construct_says_what_it_says_in_transformers(text):
    tokenizer = build("byte-level", bos=True, template=text)
    messages = [USER, SYSTEM, REPLY]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert made(text, **tokenizer.special_tokens_map).render(messages, add_generation_prompt=False) == expected


def test_the_date_is_the_pinned_one_whatever_the_day():
    text = "{{ strftime_now('%d %b %Y, %H:%M') }}"
    assert chat_template.prints_date(None, text)
    assert not chat_template.prints_date("x", None)
    found = ChatTemplate(text, {}, datetime.date(1999, 12, 31)).render([], add_generation_prompt=False)
    assert found == "31 Dec 1999, 00:00"


def test_where_there_are_tools_the_templates_own_for_tools_is_used():
    template = ChatTemplate("plain", {}, DATE, tool_text="with {{ tools | length }} tools")
    assert template.render([USER], add_generation_prompt=False) == "plain"
    assert template.render([USER], add_generation_prompt=False, tools=TOOLS) == "with 1 tools"


@pytest.mark.parametrize(
    "expression",
    [
        "m.role", "m['role']", "m.absent is defined", "m.items is string", "m['items']", "m.items() | length", "m.get('get')",
        "m.pop is defined", "m.pop", "m.__class__", "m['__class__']", "m.role.upper()", "m.role.upper() ~ m.role.upper()",
        "m.list[0]", "m.list.append is defined", "m.list.append(1)", "m.list.index(1)", "m.role.absent", "m.role.absent.x",
    ],
)  # fmt: skip
def test_attributes_are_looked_up_as_jinja_does(expression):
    message = {"role": "user", "items": "a", "get": "b", "__class__": "c", "list": [1]}
    found = []
    for render in (
        lambda text: ImmutableSandboxedEnvironment().from_string(text).render(messages=[message]),
        lambda text: says(text, [message]),
    ):
        try:
            found.append(render(f"{{% for m in messages * 2 %}}{{{{ {expression} }}}}{{% endfor %}}"))
        except (SecurityError, UndefinedError, Unusable) as error:
            found.append(str(getattr(error, "detail", f"{type(error).__name__}: {error}")))
    assert found[0] == found[1]


def test_a_template_cannot_change_the_messages():
    messages = [dict(USER)]
    for text in ("{{ messages.append(1) }}", "{{ messages[0].update({'role': 'x'}) }}", "{{ messages.clear() }}"):
        with pytest.raises(Unusable, match="template refuses"):
            says(text, messages)
    assert messages == [USER]


# -- what a template refuses -----------------------------------------------------------------------------------------


def test_what_a_template_raises_is_said():
    with pytest.raises(Unusable) as caught:
        made(GEMMA_CHAT, **SPECIAL).render([SYSTEM, USER], add_generation_prompt=True)
    assert (caught.value.reason, caught.value.detail) == (
        "template refuses",
        "TemplateError: System role not supported",
    )


@pytest.mark.parametrize("text", ["{{ 1 + 'a' }}", "{{ messages[7].content.x }}", "{{ 1 / 0 }}", "{{ nothing() }}"])
def test_an_error_in_a_template_is_the_records_fate(text):
    with pytest.raises(Unusable, match="template refuses"):
        says(text, [USER])


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}",
        "{{ ",
        "{% unknown %}",
        "{{ x | no_such_filter }}",
        "{{ 5 | random }}",
        "{% generation %}",
        "{{ x is no_such_test }}",
        "{{ (" + "(" * 300 + "1" + ")" * 301 + " }}",
        "{{ " + "-" * 5000 + "1 }}",
    ],
)
def test_broken_jinja_names_what_to_do(text):
    with pytest.raises(UsageError, match=r"prepare\.chat_template: FILE\.jinja"):
        made(text)


def test_nothing_random_is_there():
    with pytest.raises(Unusable, match="template refuses"):
        says("{{ lipsum() }}")
    with pytest.raises(UsageError, match="random"):
        says("{{ [1, 2] | random }}")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff")])
def test_a_template_file_that_cannot_be_read_is_refused(tmp_path, make):
    make(tmp_path / "t.jinja")
    with pytest.raises(UsageError, match=r"prepare\.chat_template: .*t\.jinja cannot be read"):
        read_template(str(tmp_path / "t.jinja"))


def test_a_template_file_is_read_as_it_is(tmp_path):
    (tmp_path / "t.jinja").write_bytes("a\n{{ 'é' }}\n".encode())
    assert read_template(str(tmp_path / "t.jinja")) == "a\n{{ 'é' }}\n"


# -- limits ----------------------------------------------------------------------------------------------------------

HOSTILE = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless output": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}{% endfor %}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "times, turned": "{{ 10 ** 10 * 'a' }}",
    "a list times": "{{ [0] * 10 ** 9 }}",
    "a list of lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling with ~": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling with +": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling with set": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubling with join": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling with replace": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "doubling with format": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "a width in %": "{{ '%10000000000d' % 1 }}",
    "a width in format": "{{ '{:10000000000}'.format(1) }}",
    "a width in the filter": "{{ '%2000000000d' | format(1) }}",
    "indent": "{{ ('a\n' * 100000) | indent(1000000) }}",
    "tojson": "{{ {'a': {'a': {'a': 1}}} | tojson(indent=1000000000) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(100000000) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "list": "{{ (range(99999) | list) * 99999 }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Less time and memory than by default, so that these tests take seconds."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "MEMORY", 256 << 20)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_takes_too_much_is_stopped(quick, text):
    began = time.monotonic()
    with pytest.raises((TemplateLimit, Unusable)) as caught:
        says(text)
    assert time.monotonic() - began < 10
    if isinstance(caught.value, TemplateLimit):
        assert str(caught.value).startswith("The chat template takes too much: ")
        assert str(caught.value).endswith("Name another one: prepare.chat_template: FILE.jinja.")
    else:  # Jinja's own sandbox, or Python, was there first.
        assert caught.value.detail.startswith(("OverflowError", "ValueError", "SecurityError"))


@pytest.mark.parametrize(
    "text",
    [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for m in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    ],
)
def test_recursion_ends_in_an_error(quick, text):
    with pytest.raises((TemplateLimit, Unusable)):
        says(text)


def test_a_template_that_is_slow_to_compile_is_stopped(quick):
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"prepare\.chat_template"):
        made("{{ 'a' * 10 ** (10 ** 10) }}" + "{% if a %}" * 3000 + "{% endif %}" * 3000)
    assert time.monotonic() - began < 10


def test_limits_leave_no_trace(quick):
    def handler(signum, frame):
        raise AssertionError

    before = signal.signal(signal.SIGALRM, handler)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    try:
        for text in ("fine", HOSTILE["endless"], HOSTILE["doubling with join"]):
            with contextlib.suppress(TemplateLimit):
                says(text)
            assert signal.getsignal(signal.SIGALRM) is handler
            assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
            assert resource.getrlimit(resource.RLIMIT_AS) == memory
    finally:
        signal.signal(signal.SIGALRM, before)


def test_each_conversation_has_its_own_time(quick, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    template = made("{{ messages[0].content.nap() }}")

    class Sleepy(str):
        def nap(self):
            time.sleep(0.12)
            return "z"

    with ChatTemplate.limits():
        # 3 x 0.12 s is over 0.2 s, each is within it
        for _ in range(3):
            turns = [{"role": "user", "content": Sleepy()}]
            assert template.render(turns, add_generation_prompt=False) == "z"
        time.sleep(0.3)  # between renderings no time runs


def test_limits_hold_within_limits(quick):
    with ChatTemplate.limits():
        memory = resource.getrlimit(resource.RLIMIT_AS)
        with pytest.raises(TemplateLimit):
            says(HOSTILE["endless"])
        assert resource.getrlimit(resource.RLIMIT_AS) == memory
        with pytest.raises(TemplateLimit):
            made(HOSTILE["endless"]).render([], add_generation_prompt=False)


def test_another_thread_renders_too():
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(says("{{ bos_token }}x")))
    thread.start()
    thread.join()
    assert found == ["<s>x"]


def test_memory_taken_by_others_is_not_the_templates():
    big = bytearray(300 << 20)
    assert says("{{ 'a' * 1000 }}") == "a" * 1000
    assert len(big)


# -- Python's insides ------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__self__ }}",
    "{{ strftime_now.__func__ }}",
    "{{ range.__init__ }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].__class__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': 1}) }}",
    "{{ ('{0.__class__}' ~ '').format(1) }}",
    "{{ (1 ~ '{0.__class__}').format(1) }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ [''] | map('attr', '__class__') | list }}",
    "{{ messages | groupby('__class__') }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__.__func__.__globals__ }}",
    "{{ loop.__class__ }}{% for m in [1] %}{{ loop.__class__ }}{% endfor %}",
]


@pytest.mark.parametrize("text", ESCAPES)
def test_pythons_insides_are_out_of_reach(text):
    try:
        found = says(text, [USER])
    except Unusable as error:
        assert error.reason == "template refuses"
        return
    assert not any(word in found for word in ("<class", "function", "module", "built-in", "object at")), found


@pytest.mark.parametrize(
    "text", ["{% include 'setup.cfg' %}", "{% import '/etc/passwd' as x %}", "{% extends 'x' %}", "{{ open('x') }}"]
)
def test_no_file_is_read(text):
    with pytest.raises(Unusable, match="template refuses"):
        says(text)


def test_the_templates_globals_hold_no_module():
    sandbox = chat_template._create_sandbox(DATE)
    assert set(sandbox.globals) == {
        "range", "dict", "cycler", "joiner", "namespace", "raise_exception", "strftime_now",
    }  # fmt: skip


def test_a_message_cannot_pass_for_what_the_template_is_told():
    kwargs = {"messages": "mine", "tools": "mine", "add_generation_prompt": "mine"}
    assert says("{{ messages }}{{ tools }}{{ add_generation_prompt }}", [], kwargs=kwargs) == "[]NoneFalse"


def test_a_real_template_is_far_from_the_limits(quick):
    turns = [USER, REPLY] * 200
    with ChatTemplate.limits():
        found = made(QWEN3_CHAT).render([SYSTEM, *turns, USER], add_generation_prompt=True)
    assert found.count("<|im_start|>") == 403  # system, 400 turns, the last one, and the one asked for


def test_json_is_read_back_as_it_was():
    assert json.loads(says("{{ messages | tojson }}", [USER])) == [USER]


UNINTERRUPTIBLE = (
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
)


def test_an_operation_that_cannot_be_interrupted_ends_with_the_process():
    code = (
        "import datetime, sys\n"
        "from prefcache.pipeline.preparing import chat_template\n"
        "chat_template.SECONDS = 0.3\n"
        "template = chat_template.ChatTemplate(sys.argv[1], {}, datetime.date(2025, 1, 1))\n"
        "with template.limits(): template.render([], add_generation_prompt=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, UNINTERRUPTIBLE], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGVTALRM


@pytest.mark.parametrize("text", ["{{ 2|round(20000000, 'ceil') }}", "{{ ([[1]] * 1000)|sum(start=[]) }}"])
def test_what_would_take_its_time_is_refused_before(text):
    with pytest.raises(TemplateLimit):
        says(text)
