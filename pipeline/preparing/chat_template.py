"""A chat template: a program of unknown origin that turns messages into text, run with limits.

It renders in Jinja's sandbox with limits on time, memory and output; if it exceeds one, the error names the template.
It sees a fixed date and nothing random, so that it gives the same text on any day. Text and arguments are those of
Transformers' `apply_chat_template`.

Templates of models that see images take a content in parts: pictures and texts. Some take nothing else, and print nothing of a
content that is text. So a content with pictures is split into parts here, and for those templates every content is.
"""

import contextlib
import datetime
import functools
import json
import operator
import re
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

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing.example import IMAGE_MARK, Message, Unusable
from prefcache.pipeline.preparing.generation_marks import CLOSE, OPEN
from prefcache.pipeline.preparing.placeholder_text import OpaqueLength, OpaqueText, join, refuse_opaque

SECONDS = 5.0
MEMORY = 512 << 20
CHARACTERS = 32 << 20
_BITS = 1 << 16  # of a number
_PIECES = 1_000_000  # of slice and batch
_PRECISION = 300  # of round: it computes ten to that power
# Ends the process. It counts the time that the process works, not the time that it waits.
KILL_TIMER = signal.ITIMER_VIRTUAL
_KILL_AFTER = 10  # seconds over the limit
_OPERATORS = {"+": operator.add, "*": operator.mul, "**": operator.pow, "%": operator.mod}
# Filters and tests that are safe with an OpaqueText or an OpaqueLength: they call its own methods, which notice when the text
# is read. Any other would read the mark, or fail on a length that is not a number.
_FILTERS = {
    "capitalize", "count", "default", "d", "first", "items", "length", "reverse", "last", "list", "lower", "map", "reject", "rejectattr",
    "select", "selectattr", "string", "trim", "upper", "attr", "batch", "slice",
}  # fmt: skip
_TESTS = {
    "boolean", "callable", "defined", "undefined", "none", "false", "true", "float", "mapping", "string", "iterable",
    "sequence", "eq", "==", "equalto", "ne", "!=", "filter", "test", "odd", "even",
}  # fmt: skip
_DICT_METHODS = frozenset(dir(dict))
_PROBE = "Prefcacheprobe"  # a text that no template changes
# Arguments with the variables of a loop or block around a call, which Jinja passes to its own functions alone.
_JINJAS_OWN = {"_loop_vars", "_block_vars"}


class TemplateLimit(UsageError):
    """The template took more time, memory or output than it may."""


class ChatTemplate:
    def __init__(
        self,
        text: str,
        tokens: Mapping[str, str],
        date: datetime.date,
        *,
        tool_text: str | None = None,
        mark_generation: bool = False,
    ) -> None:
        """`tokens`: the special tokens that a template may print, by name. `tool_text`: the template to use with tools.

        `mark_generation`: put marks around `{% generation %}` blocks, see generation_marks.py.
        """
        self.text, self._tokens = text, dict(tokens)
        self.knows_tools = "tools" in text + (tool_text or "")
        self.knows_tool_calls = "tool_calls" in text + (tool_text or "")
        self._takes_parts: dict[str, bool] = {}  # by role: whether a content has to be in parts
        self._may_take_parts = re.search(r"\btext\b", text) is not None
        sandbox = _create_sandbox(date, mark_generation=mark_generation)
        with self.limits():
            self._plain = _compile(sandbox, text)
            self._with_tools = _compile(sandbox, tool_text) if tool_text else self._plain
            self._marks, self._marks_with_tools = (_writes_marks(sandbox, each) for each in (text, tool_text or text))
            # The texts in the template's expressions, which are what it may look for in a conversation.
            constants = (node.value for node in sandbox.parse(text).find_all(nodes.Const))
            self.literals = tuple(dict.fromkeys(text for text in constants if isinstance(text, str) and text.strip()))

    def marks_generation(self, tools: list[dict[str, Any]] | None) -> bool:
        """Return whether the text has marks around what the assistant generates."""
        return self._marks_with_tools if tools else self._marks

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text, or raise Unusable if the template refuses these messages.

        An IMAGE_MARK in a content is a picture to the template.
        """
        return self._render([self.split_content(message) for message in messages], add_generation_prompt, tools, kwargs)

    def split_content(self, message: Message) -> Message:
        """Return a message with its content in parts, if it has pictures or the template takes no text."""
        content = message.get("content")
        if not isinstance(content, str):
            return message
        # An OpaqueText is never asked what it contains: that would become a guard.
        has_images = type(content) is str and IMAGE_MARK in content
        if not has_images and not self._needs_parts(message.get("role")):
            return message
        if not has_images:
            return message | {"content": [{"type": "text", "text": content}]}
        parts: list[dict[str, str]] = []
        for n, text in enumerate(content.split(IMAGE_MARK)):
            parts += [{"type": "image"}] if n else []
            parts += [{"type": "text", "text": text}] if text else []
        return message | {"content": parts}

    def _needs_parts(self, role: Any) -> bool:
        """Return whether messages of a role are printed only if their content is in parts: try it once."""
        if not self._may_take_parts or not isinstance(role, str):
            return False
        if role not in self._takes_parts:
            self._takes_parts[role] = self._try_parts(role)
        return self._takes_parts[role]

    def _try_parts(self, role: str) -> bool:
        def message(role: str, in_parts: bool, text: str) -> Message:
            return {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}

        def prints(in_parts: bool) -> bool:
            probe = message(role, in_parts, _PROBE)
            asks = [message("user", role != "user" and self._needs_parts("user"), "x")]
            if role == "tool":
                asks.append(message("assistant", self._needs_parts("assistant"), "x"))
            messages = {"user": [probe], "system": [probe, *asks], "developer": [probe, *asks]}.get(
                role, [*asks, probe]
            )
            try:
                text = self._render(messages, add_generation_prompt=False)
            except Unusable:
                return False
            return _PROBE in text and "'type'" not in text  # the list itself

        if prints(in_parts=False):
            return False
        # A role that is not printed at all, or only in other places, is written as the user's turns are.
        return prints(in_parts=True) or (role != "user" and self._needs_parts("user"))

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        template = self._with_tools if tools else self._plain
        names = {**self._tokens, **(kwargs or {})} | {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with _time_limit():
                return _concat(template.generate(names))
        except (TemplateLimit, MemoryError) as error:
            raise _explain_limit(error) from None
        except Exception as error:  # A template can raise anything.
            raise Unusable("template refuses", f"{type(error).__name__}: {error}") from None

    @staticmethod
    @contextlib.contextmanager
    def limits() -> Iterator[None]:
        """Limit memory and, in the main thread, time. Enter it around many renderings: it costs more than one of them."""
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _address_space() + MEMORY
        is_timed = threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGALRM, _raise_time_limit) if is_timed else None
        try:
            if limit > MEMORY and (soft == resource.RLIM_INFINITY or limit < soft):
                resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
            yield
        except MemoryError as error:
            raise _explain_limit(error) from None
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            if is_timed:
                for timer in (signal.ITIMER_REAL, KILL_TIMER):
                    signal.setitimer(timer, 0)
                signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


def prints_date(*texts: str | None) -> bool:
    """Return whether one of these templates prints today's date."""
    return any("strftime_now" in text for text in texts if text)


def read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prepare.chat_template: {path} cannot be read ({error}).") from None


# -- limits ----------------------------------------------------------------------------------------------------------


def _address_space() -> int:
    """Return the bytes of this process's address space; 0 if the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 0


def _raise_time_limit(signum: int, frame: Any) -> None:
    raise TemplateLimit(f"over {SECONDS:.0f} s for one conversation")


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    # Outside limits(), an alarm would end the process.
    if signal.getsignal(signal.SIGALRM) is not _raise_time_limit:
        yield
        return
    # Repeated, because the first alarm may come where Python or Jinja swallows the error.
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)
    # No alarm gets through one long operation of Python's own. Then the system ends the process.
    signal.setitimer(KILL_TIMER, SECONDS + _KILL_AFTER)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(KILL_TIMER, 0)


def _explain_limit(error: BaseException) -> TemplateLimit:
    if isinstance(error, TemplateLimit) and str(error).startswith("The chat template"):
        return error
    excess = str(error) if isinstance(error, TemplateLimit) else f"over {MEMORY >> 20} MiB of memory"
    return TemplateLimit(
        f"The chat template takes too much: {excess}. Name another one: prepare.chat_template: FILE.jinja."
    )


def _concat(texts: Iterable[str]) -> str:
    pieces, size, is_opaque = [], 0, False
    for piece in texts:
        pieces.append(piece)
        size += str.__len__(piece)
        is_opaque = is_opaque or isinstance(piece, OpaqueText)
        if size > CHARACTERS:
            raise TemplateLimit(f"over {CHARACTERS >> 20} million characters")
    return join(pieces) if is_opaque else "".join(pieces)


# -- the sandbox -----------------------------------------------------------------------------------------------------


def _compile(sandbox: "_Sandbox", text: str) -> jinja2.Template:
    remedy = "Name another: prepare.chat_template: FILE.jinja."
    try:
        with _time_limit():
            return sandbox.from_string(text)
    except (TemplateLimit, MemoryError) as error:
        raise _explain_limit(error) from None
    except jinja2.TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UsageError(f"The chat template is not Jinja ({error}{line}). {remedy}") from None
    except (RecursionError, ValueError, OverflowError, SyntaxError) as error:
        raise UsageError(f"The chat template cannot be compiled ({error}). {remedy}") from None


def _writes_marks(sandbox: "_Sandbox", text: str) -> bool:
    return any(node.data == OPEN for node in sandbox.parse(text).find_all(nodes.TemplateData))


class _Compiler(CodeGenerator):
    """Jinja's compiler, except that `a ~ b` and `a in b` go through the sandbox."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
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
    """A plain text that is asked whether another is in it. Python asks this one, so it refuses an OpaqueText."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __contains__(self, other: Any) -> bool:
        refuse_opaque("in", other)
        return other in self._text


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox keeps a template from Python's internals; this one also from huge numbers and strings."""

    intercepted_binops = frozenset(_OPERATORS)
    concat = staticmethod(_concat)
    code_generator_class = _Compiler

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._safe_attributes: dict[tuple[type, str], bool] = {}

    @staticmethod
    def searched(value: Any) -> Any:
        return _Searched(value) if type(value) is str else value

    def getattr(self, obj: Any, attribute: str) -> Any:
        # Return what Jinja returns, but find a message's keys at once: Jinja looks for an attribute of that name first.
        if type(obj) is dict and attribute in obj and attribute not in _DICT_METHODS:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Jinja decides by the type and the name alone.
        key = type(obj), attr
        if key not in self._safe_attributes:
            self._safe_attributes[key] = super().is_safe_attribute(obj, attr, value)
        return self._safe_attributes[key]

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # A method of a plain text, such as `join`, would see an OpaqueText's mark.
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and not isinstance(owner, OpaqueText):
            args = _lists(args)
            refuse_opaque("call", *args, {name: value for name, value in kwargs.items() if name not in _JINJAS_OWN})
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
    """Refuse an endless operation before it is computed: one operation cannot be interrupted."""
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
    """`{% generation %}`, with which templates mark what the assistant generates; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # In a scope of its own, as in Transformers: variables set inside are not seen outside.
        return nodes.Scope(body)


class _MarkedGeneration(_Generation):
    def parse(self, parser: Any) -> list[nodes.Node]:
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE))
        scope = super().parse(parser)
        assert isinstance(scope, nodes.Node)
        return [begin, scope, end]


def _create_sandbox(date: datetime.date, *, mark_generation: bool = False) -> _Sandbox:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    generation = _MarkedGeneration if mark_generation else _Generation
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[generation, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = date.strftime
    # What differs from one run to the next has no place in a cache.
    del sandbox.filters["random"], sandbox.globals["lipsum"]
    for name, check in (("sum", _check_sum), ("round", _check_round), ("slice", _check_n), ("batch", _check_n)):
        sandbox.filters[name] = _add_check(sandbox.filters[name], check)
    for functions, safe in ((sandbox.filters, _FILTERS), (sandbox.tests, _TESTS)):
        for name in set(functions) - safe:
            functions[name] = _add_opaque_check(name, functions[name])
    for name in ("length", "count"):
        sandbox.filters[name] = _measure
    # The same answers as Jinja's, without looking into an OpaqueText.
    for name in ("iterable", "sequence"):
        sandbox.tests[name] = lambda value, test=sandbox.tests[name]: isinstance(value, str) or test(value)
    return sandbox


def _measure(value: Any) -> Any:
    return OpaqueLength(value) if isinstance(value, OpaqueText) else len(value)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _add_opaque_check(name: str, function: Any) -> Any:
    """Wrap a filter or test so that it never gets an OpaqueText."""

    @functools.wraps(function)  # with Jinja's marks for functions that are passed the context
    def checked(*arguments: Any, **named: Any) -> Any:
        arguments = _lists(arguments)
        refuse_opaque(name, *arguments, named)
        return function(*arguments, **named)

    return checked


def _lists(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return arguments with lists instead of iterators, which could be looked through only once."""
    return tuple(list(each) if isinstance(each, Iterator) else each for each in arguments)


def _add_check(function: Any, check: Any) -> Any:
    """Wrap a filter so that its arguments are checked first."""

    @functools.wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        check(*arguments, **named)
        return function(*arguments, **named)

    return checked


def _check_sum(environment: Any, values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise TemplateLimit("a sum of other things than numbers")  # of lists, its time is quadratic


def _check_round(value: Any, precision: int = 0, method: Any = "common") -> None:
    if abs(precision) > _PRECISION:
        raise TemplateLimit(f"a number of over {_PRECISION} digits")


def _check_n(*arguments: Any, **named: Any) -> None:
    if any(isinstance(each, int) and each > _PIECES for each in (*arguments, *named.values())):
        raise TemplateLimit(f"over {_PIECES:,} pieces")
