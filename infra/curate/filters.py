"""Filters: expressions such as `motion > 2 and text_area < 0.05`, parsed and computed without running any code.

It owns the little language: names, numbers, texts, comparisons, `and`, `or`, `not`, `in`, and arithmetic. It does not
know which names there are until it is given a segment's facts.
"""

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator

Facts = Mapping[str, float | int | str]

MAX_LENGTH = 500
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left / right,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda value, many: value in many,
    ast.NotIn: lambda value, many: value not in many,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.Not: operator.not_, ast.USub: operator.neg}


def names_of(expression: str) -> set[str]:
    """The scores and facts an expression asks for."""
    return {node.id for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Name)}


def holds(expression: str, facts: Facts) -> bool:
    """Whether `facts` fulfil the expression; ValueError for a name they lack or types that do not compare."""
    try:
        return bool(_value(_parsed(expression), facts))
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"filter '{expression}' cannot be computed: {error}") from None


def margins(expression: str, facts: Facts) -> Iterator[float]:
    """How far each comparison of numbers is from turning over, by the size of its bound: near 0 is borderline."""
    for node in ast.walk(_parsed(expression)):
        if isinstance(node, ast.Compare):
            left = _value(node.left, facts)
            for part in node.comparators:
                right = _value(part, facts)
                if isinstance(left, int | float) and isinstance(right, int | float):
                    yield abs(left - right) / max(abs(right), 1e-6)
                left = right


def _checked(expression: str) -> str:
    _parsed(expression)
    return expression


Filter = Annotated[str, AfterValidator(_checked)]
"""An expression that was parsed once."""


def _parsed(expression: str) -> ast.expr:
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"a filter of {len(expression)} characters is longer than {MAX_LENGTH}; write several")
    try:
        body = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"filter '{expression}' is no expression: {error}") from None
    for node in ast.walk(body):
        if not _is_known(node):
            what = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
            raise ValueError(
                f"filter '{expression}': '{what}' is not allowed; use names, numbers, texts, < <= > >= == != in,"
                " and or not, + - * /"
            )
    return body


def _is_known(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float | str)
    kinds = (*_BINARY, *_COMPARE, *_UNARY, ast.BoolOp, ast.And, ast.Or, ast.BinOp, ast.UnaryOp, ast.Compare)
    return isinstance(node, (*kinds, ast.Name, ast.Load, ast.Tuple, ast.List))


def _value(node: ast.expr, facts: Facts) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            if node.id not in facts:
                raise ValueError(f"filter asks for '{node.id}', which is none of {', '.join(sorted(facts))}")
            return facts[node.id]
        case ast.Tuple() | ast.List():
            return [_value(part, facts) for part in node.elts]
        case ast.UnaryOp():
            return _UNARY[type(node.op)](_value(node.operand, facts))
        case ast.BinOp():
            return _BINARY[type(node.op)](_value(node.left, facts), _value(node.right, facts))
        case ast.BoolOp():
            join = all if isinstance(node.op, ast.And) else any
            return join(_value(part, facts) for part in node.values)
        case ast.Compare():
            return _compared(node, facts)
        case _:
            raise AssertionError(f"{type(node).__name__} passed the parser")


def _compared(node: ast.Compare, facts: Facts) -> bool:
    """A chain such as `1 < motion <= 5`."""
    left = _value(node.left, facts)
    for step, part in zip(node.ops, node.comparators, strict=True):
        right = _value(part, facts)
        if not _COMPARE[type(step)](left, right):
            return False
        left = right
    return True
