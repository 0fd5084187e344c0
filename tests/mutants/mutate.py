"""Small changes to a module, each of which some test should notice.

A mutant changes one place of the syntax tree: a comparison, an operator, a constant, a condition; a keyword argument or a
statement that goes. What only people read stays as it is: messages, docstrings, annotations, decorators, assertions.
"""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.MatMult: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_CALLED = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "argmin": "argmax"}
_CALLED |= {"argmax": "argmin", "fmin": "fmax", "minimum": "maximum", "maximum": "minimum", "zeros": "ones"}
# Fields that only people, or type checkers, read.
_PASSED_OVER = {"annotation", "returns", "decorator_list", "type_params", "type_comment"}


@dataclass
class _Place:
    """Where in the tree a mutant puts another node."""

    holder: Any  # a list, or a node
    at: Any  # an index, or the name of a field
    new: ast.AST

    def swap(self) -> None:
        old = self.holder[self.at] if isinstance(self.holder, list) else getattr(self.holder, self.at)
        if isinstance(self.holder, list):
            self.holder[self.at] = self.new
        else:
            setattr(self.holder, self.at, self.new)
        self.new = old


@dataclass
class Mutant:
    name: str  # FILE FUNCTION: BEFORE -> AFTER, with a number where that occurs again
    line: int
    _tree: ast.Module
    _place: _Place

    def compiled(self, path: str) -> CodeType:
        self._place.swap()
        try:
            return compile(ast.fix_missing_locations(self._tree), path, "exec")
        finally:
            self._place.swap()


def mutants(source: str, file: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    tree, seen, found = ast.parse(source), Counter[str](), []
    for node, where, place in _places(tree, ""):
        name = f"{file} {where or 'module'}: {_text(node)} -> {_text(place.new)}"
        seen[name] += 1
        again = f" #{seen[name]}" if seen[name] > 1 else ""
        found.append(Mutant(name + again, getattr(node, "lineno", 0), tree, place))
    return found


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.comprehension):
        return " ".join(["for ... in", ast.unparse(node.iter), *(f"if {ast.unparse(each)}" for each in node.ifs)])
    if isinstance(node, ast.If | ast.While):
        return f"{type(node).__name__.lower()} {ast.unparse(node.test)}"
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return f"raise {ast.unparse(node.exc.func)}"
    return " ".join(ast.unparse(node).split())[:160]


def _places(node: ast.AST, where: str) -> Iterator[tuple[ast.AST, str, _Place]]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        where = f"{where}.{node.name}".lstrip(".")
    for field, value in ast.iter_fields(node):
        if field in _PASSED_OVER:
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_for_people(child):
                continue
            holder, at = (node, field) if i is None else (value, i)
            for new in _instead_of(child):
                yield child, where, _Place(holder, at, new)
            if not isinstance(child, ast.Raise):
                yield from _places(child, where)


def _is_for_people(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
        return True
    return isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom)


def _instead_of(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                yield _with(node, ops=[*node.ops[:i], _OPERATORS[type(operator)](), *node.ops[i + 1 :]])
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp():
            yield _with(node, op=_OPERATORS[type(node.op)]())
            if isinstance(node, ast.AugAssign):
                yield ast.Pass()
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant():
            yield from (ast.Constant(value) for value in _other_values(node.value))
        case ast.IfExp():
            yield _with(node, body=node.orelse, orelse=node.body)
        case ast.If() | ast.While() if not _is_negated_anyway(node.test):
            yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.comprehension() if node.ifs:
            yield _with(node, ifs=[])
        case ast.Return() if node.value is not None and not _is_none(node.value):
            yield ast.Return(ast.Constant(None))
        case ast.Raise():
            yield ast.Pass()
        case ast.Expr() if isinstance(node.value, ast.Call):
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
        case ast.Call():
            yield from _other_calls(node)


def _other_values(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif isinstance(value, float):
        yield 2 * value if value else 1.0
    elif isinstance(value, str) and value and " " not in value:  # a sentence is for people
        yield f"{value}X"


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield _with(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])
    if isinstance(node.func, ast.Name) and node.func.id in _CALLED:
        yield _with(node, func=ast.Name(_CALLED[node.func.id], ast.Load()))
    if isinstance(node.func, ast.Attribute) and node.func.attr in _CALLED:
        yield _with(node, func=_with(node.func, attr=_CALLED[node.func.attr]))


def _is_negated_anyway(test: ast.AST) -> bool:
    """Whether one of the mutants of a condition is its opposite."""
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        return isinstance(test.ops[0], ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In | ast.NotIn)
    return isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _with(node: Any, **fields: Any) -> Any:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
