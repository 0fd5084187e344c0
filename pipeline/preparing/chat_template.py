"""A chat template: a stranger's program that turns messages into text, run with limits.

It renders in Jinja's sandbox, with at most so many seconds, bytes and characters; over these it ends in an error that
names the template. It sees a fixed date and nothing random, so it gives the same text today and tomorrow. Text and
arguments are those of Transformers' `apply_chat_template`.
"""

import contextlib
import datetime
import functools
import json
import operator
import resource
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import UsageError
from pipeline.preparing.example import Message, Unusable
from pipeline.preparing.frames import Opaque, join, refuse_opaque

SECONDS = 5.0
MEMORY = 512 << 20
CHARACTERS = 32 << 20
_BITS = 1 << 16
# Counts this process's own work, not the time that it waits.
KILLS = signal.ITIMER_VIRTUAL
_PATIENCE = 10  # seconds
_PIECES = 1_000_000
_PRECISION = 300  # of round: it computes ten to that power
_OPERATORS = {"+": operator.add, "*": operator.mul, "**": operator.pow, "%": operator.mod}
# What handles an Opaque by Python's own means, so that a look into it is noticed. All others would see its mark.
_FILTERS = {
    "capitalize", "count", "default", "d", "first", "items", "length", "reverse", "last", "list", "lower", "map", "reject", "rejectattr",
    "select", "selectattr", "string", "trim", "upper", "title", "attr", "batch", "slice",
}  # fmt: skip
_TESTS = {
    "boolean", "callable", "defined", "undefined", "none", "false", "true", "integer", "float", "mapping", "number",
    "string", "iterable", "sequence", "eq", "==", "equalto", "ne", "!=", "sameas", "filter", "test", "odd", "even",
}  # fmt: skip


class TemplateLimit(UsageError):
    """The template took more than it may."""


class ChatTemplate:
    def __init__(
        self, text: str, tokens: Mapping[str, str], date: datetime.date, *, tool_text: str | None = None
    ) -> None:
        """`tokens`: the special tokens that a template may print, by name. `tool_text`: in its place where there are tools."""
        self.text, self._tokens = text, dict(tokens)
        self.knows_tools = "tools" in text + (tool_text or "")
        self.knows_tool_calls = "tool_calls" in text + (tool_text or "")
        self.prints_date = prints_date(text, tool_text)
        sandbox = _sandbox(date)
        with self.limits():
            self._plain = _compile(sandbox, text)
            self._with_tools = _compile(sandbox, tool_text) if tool_text else self._plain
            self.literals = _literals(sandbox, text)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text, or Unusable where the template refuses these messages."""
        template = self._with_tools if tools else self._plain
        names = {**self._tokens, **(kwargs or {})} | {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _timed(template, names)
        except (TemplateLimit, MemoryError) as error:
            raise _over(error) from None
        except Exception as error:  # A template is a stranger's program, and can raise anything.
            raise Unusable("template refuses", f"{type(error).__name__}: {error}") from None

    @staticmethod
    @contextlib.contextmanager
    def limits() -> Iterator[None]:
        """The limits on memory and, in the main thread, on time. Enter it around many renderings: it costs more than one."""
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _address_space() + MEMORY
        timed = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGALRM, _alarm) if timed else None
        try:
            if limit > MEMORY and (soft == resource.RLIM_INFINITY or limit < soft):
                resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
            yield
        except MemoryError as error:
            raise _over(error) from None
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            if timed:
                for timer in (signal.ITIMER_REAL, KILLS):
                    signal.setitimer(timer, 0)
                signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def prints_date(*texts: str | None) -> bool:
    """Whether one of these templates asks what day it is."""
    return any("strftime_now" in text for text in texts if text)


def read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prepare.chat_template: {path} cannot be read ({error}).") from None


# -- the sandbox -----------------------------------------------------------------------------------------------------


class _Compiler(CodeGenerator):
    """Jinja's, but for `a ~ b`, which is joined like everything else."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat((")
        for each in node.nodes:
            self.write("str(")
            self.visit(each, frame)
            self.write("), ")
        self.write("))")

    def visit_Operand(self, node: nodes.Operand, frame: Any) -> None:
        if node.op not in ("in", "notin"):
            super().visit_Operand(node, frame)
            return
        self.write(" in " if node.op == "in" else " not in ")
        self.write("environment.searched(")
        self.visit(node.expr, frame)
        self.write(")")


class _Searched:
    """A text that is asked whether another is in it: one that cannot be looked into neither."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __contains__(self, other: Any) -> bool:
        refuse_opaque("in", other)
        return other in self._text


def _joined(texts: Iterable[str]) -> str:
    pieces, size, opaque = [], 0, False
    for piece in texts:
        pieces.append(piece)
        size += str.__len__(piece)
        opaque = opaque or isinstance(piece, Opaque)
        if size > CHARACTERS:
            raise TemplateLimit(f"over {CHARACTERS >> 20} million characters")
    return join(pieces) if opaque else "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which keeps a template from Python's insides but not from huge numbers and strings."""

    intercepted_binops = frozenset(_OPERATORS)
    concat = staticmethod(_joined)
    code_generator_class = _Compiler

    @staticmethod
    def searched(value: Any) -> Any:
        return _Searched(value) if type(value) is str else value

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # A method of a plain text, such as `join`, would take an Opaque for one too.
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and not isinstance(owner, Opaque):
            refuse_opaque("call", *args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            refuse_opaque("%", right)
        if operator in ("*", "**"):
            _check_product(operator, left, right)
        result = _OPERATORS[operator](left, right)
        if isinstance(result, str | list | tuple) and type(result) in (str, list, tuple) and len(result) > CHARACTERS:
            raise TemplateLimit(f"a value of over {CHARACTERS >> 20} million items")
        return result


def _check_product(operator: str, left: Any, right: Any) -> None:
    """Refuse before it is computed what would take forever: one such operation cannot be interrupted."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (max(right, 0) if operator == "**" else 1) + right.bit_length()
        if bits > _BITS:
            raise TemplateLimit(f"a number of over {_BITS} bits")
    for many, times in ((left, right), (right, left)):
        if isinstance(many, list | tuple | str) and isinstance(times, int):
            n = str.__len__(many) if isinstance(many, str) else len(many)
            if n * times > CHARACTERS:
                raise TemplateLimit(f"a value of over {CHARACTERS >> 20} million items")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark what the model says. Here it is just its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # In a scope of its own, as in Transformers: what is set inside is not seen outside.
        return nodes.Scope(body)


def _sandbox(date: datetime.date) -> _Sandbox:
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise
    sandbox.globals["strftime_now"] = date.strftime
    # What differs from one day to the next has no place in a cache.
    del sandbox.filters["random"], sandbox.globals["lipsum"]
    for name, check in (
        ("sum", _sum_of_numbers),
        ("round", _some_digits),
        ("slice", _some_pieces),
        ("batch", _some_pieces),
    ):
        sandbox.filters[name] = _checked(sandbox.filters[name], check)
    for known, safe in ((sandbox.filters, _FILTERS), (sandbox.tests, _TESTS)):
        for name in set(known) - safe:
            known[name] = _careful(name, known[name])
    # The same answers as Jinja's, without looking into a text (see frames.Opaque).
    for name in ("iterable", "sequence"):
        sandbox.tests[name] = _true_of_text(sandbox.tests[name])
    return sandbox


def _careful(name: str, function: Any) -> Any:
    """The filter or test, which is not given an Opaque."""

    @functools.wraps(function)  # with Jinja's marks, which say what it is passed beside its arguments
    def careful(*arguments: Any, **named: Any) -> Any:
        seen = [list(each) if isinstance(each, Iterator) else each for each in arguments]
        refuse_opaque(name, *seen, named)
        return function(*seen, **named)

    return careful


def _sum_of_numbers(environment: Any, values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise TemplateLimit("a sum of other things than numbers")  # of lists it takes the square of their number


def _some_digits(value: Any, precision: int = 0, method: Any = "common") -> None:
    if abs(precision) > _PRECISION:
        raise TemplateLimit(f"a number of over {_PRECISION} digits")


def _some_pieces(*given: Any, **named: Any) -> None:
    if any(isinstance(each, int) and each > _PIECES for each in (*given, *named.values())):
        raise TemplateLimit(f"over {_PIECES:,} pieces")


def _checked(function: Any, check: Any) -> Any:
    """The filter, for arguments that pass the check."""

    @functools.wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        check(*arguments, **named)
        return function(*arguments, **named)

    return checked


def _literals(sandbox: _Sandbox, text: str) -> tuple[str, ...]:
    """The texts that stand in the template's expressions, which are what it may look for in a conversation."""
    found = (node.value for node in sandbox.parse(text).find_all(nodes.Const) if isinstance(node.value, str))
    return tuple(dict.fromkeys(literal for literal in found if literal.strip()))


def _true_of_text(test: Any) -> Any:
    return lambda value: isinstance(value, str) or test(value)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _compile(sandbox: _Sandbox, text: str) -> jinja2.Template:
    try:
        _set_timer(SECONDS)
        return sandbox.from_string(text)
    except (TemplateLimit, MemoryError) as error:
        raise _over(error) from None
    except jinja2.TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UsageError(
            f"The chat template is not Jinja ({error}{line}). Name another: prepare.chat_template: FILE.jinja."
        ) from None
    except (RecursionError, ValueError, OverflowError, SyntaxError) as error:
        raise UsageError(
            f"The chat template cannot be compiled ({error}). Name another: prepare.chat_template: FILE.jinja."
        ) from None
    finally:
        _set_timer(0)


# -- limits ----------------------------------------------------------------------------------------------------------


def _timed(template: jinja2.Template, names: dict[str, Any]) -> str:
    _set_timer(SECONDS)
    try:
        return _joined(template.generate(names))
    finally:
        _set_timer(0)


def _set_timer(seconds: float) -> None:
    # Elsewhere than under limits(), an alarm would end the process.
    if signal.getsignal(signal.SIGALRM) is _alarm:
        # Again and again: the first alarm may fall where Python or Jinja lets no error through.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0 if seconds else 0.0)
        # One long operation of Python's own lets no alarm through. Then the system ends the process.
        signal.setitimer(KILLS, seconds + _PATIENCE if seconds else 0)


def _alarm(signum: int, frame: Any) -> None:
    raise TemplateLimit(f"over {SECONDS:.0f} s for one conversation")


def _over(error: BaseException) -> TemplateLimit:
    if str(error).startswith("The chat template"):
        assert isinstance(error, TemplateLimit)
        return error
    found = str(error) if isinstance(error, TemplateLimit) else f"over {MEMORY >> 20} MiB of memory"
    return TemplateLimit(
        f"The chat template takes too much: {found}. Name another one: prepare.chat_template: FILE.jinja."
    )


def _address_space() -> int:
    """Bytes of this process's address space; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 0
