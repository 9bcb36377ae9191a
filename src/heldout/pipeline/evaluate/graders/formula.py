"""The formula of a `multi` grader: arithmetic on scores, read as a tree and never run as code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping

from heldout.errors import InvalidValue

Formula = Callable[[Mapping[str, float]], float]

#: Longer ones are no formula, and deep ones could exhaust the stack.
LONGEST = 2_000

_OPERATORS: dict[type[ast.AST], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
_SIGNS: dict[type[ast.AST], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
_ONE_ARGUMENT = tuple(set(_FUNCTIONS) - {"min", "max"})


def read_formula(text: object, names: Collection[str]) -> Formula:
    """A function from the scores by name to a number. `^` and `**` are powers.

    Raises InvalidValue for what is no arithmetic on these names. The function raises ArithmeticError or ValueError
    where the formula has no value.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise _wrong(f"expected a formula of at most {LONGEST} characters", names)
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval")
        return _read(tree.body, names)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, InvalidValue):
            raise
        raise _wrong(f"{text!r} is no formula", names) from error


def _read(node: ast.expr, names: Collection[str]) -> Formula:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # Floats alone: the power of two whole numbers could fill the memory.
        constant = float(node.value)  # type: ignore[arg-type]
        return lambda scores: constant
    if isinstance(node, ast.Name) and node.id in names:
        name = node.id
        return lambda scores: scores[name]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        combine, left, right = _OPERATORS[type(node.op)], _read(node.left, names), _read(node.right, names)
        return lambda scores: combine(left(scores), right(scores))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        sign, operand = _SIGNS[type(node.op)], _read(node.operand, names)
        return lambda scores: sign(operand(scores))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        called = node.func.id
        parts = [_read(argument, names) for argument in node.args]
        count_fits = len(parts) == 1 if called in _ONE_ARGUMENT else len(parts) >= 2
        if count_fits and not node.keywords:
            return lambda scores: float(_FUNCTIONS[called](*(part(scores) for part in parts)))
    raise _wrong(f"{ast.unparse(node)!r} cannot be computed", names)


def _wrong(what: str, names: Collection[str]) -> InvalidValue:
    return InvalidValue(
        f"calculate_output: {what}. It may hold numbers, the graders ({', '.join(sorted(names))}), + - * / ^, "
        f"parentheses and {', '.join(_FUNCTIONS)}.",
        param="grader",
    )
