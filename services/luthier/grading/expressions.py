"""`calculate_output`: arithmetic over scores, read by Python's parser and calculated by us from a short list of nodes.

    expression := number | name | - e | + e | e + e | e - e | e * e | e / e | e ^ e | function(e, ...) | (e)
    function   := min | max | abs | floor | ceil | exp | sqrt | log

`^` is the power and binds tightest, to the right, as in `2 ^ 3 ^ 2`. Nothing is run as code: no attribute, no index, no
comparison, no other function has a node here.
"""

from __future__ import annotations

import ast
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from luthier.errors import Reason
from luthier.grading.outcomes import GradingError, shown

MAX_CHARACTERS = 1000
MAX_NODES = 200
MAX_DEPTH = 32
NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
"""What a grader may be called."""
_TOKENS = re.compile(
    r"(?:[ \t\n]++"
    r"|(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)(?:[eE][-+]?+[0-9]++)?+(?![\w.])"
    r"|[A-Za-z_]\w*+|[-+*/^(),])*+",
    re.ASCII,
)
_BINARY: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[float], float]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_OF_ONE: Mapping[str, Callable[[float], float]] = {
    "abs": abs,
    "floor": lambda value: float(math.floor(value)),
    "ceil": lambda value: float(math.ceil(value)),
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
_OF_MANY: Mapping[str, Callable[[list[float]], float]] = {"min": min, "max": max}
FUNCTIONS = (*_OF_MANY, *_OF_ONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """A calculation that was read. `names` are the graders that it needs."""

    text: str
    names: frozenset[str]
    root: ast.expr

    def value(self, scores: Mapping[str, float]) -> float:
        """Return what comes out for scores by name.

        Raises:
            GradingError: SCORE_NOT_FINITE, it cannot be calculated (a division by 0, the root of a negative number),
                or is not finite.
        """
        try:
            value = _value(self.root, scores)
        except (ArithmeticError, ValueError) as error:
            raise self._wrong(f"cannot be calculated ({error})", scores) from error
        if not math.isfinite(value):
            raise self._wrong(f"is {value}", scores)
        return value

    def _wrong(self, what: str, scores: Mapping[str, float]) -> GradingError:
        given = ", ".join(f"{name} = {scores[name]:g}" for name in sorted(self.names))
        return GradingError(Reason.SCORE_NOT_FINITE, f"{shown(self.text)} {what} for {given or 'no score'}")


def may_be_called(name: str) -> bool:
    """Tell whether a grader may have this name: one that an expression can say and that is no function."""
    return NAME.fullmatch(name) is not None and name not in FUNCTIONS and not keyword.iskeyword(name)


def parsed(text: str) -> Expression:
    """Read a calculation.

    Raises:
        ValueError: it is none; the message says what is wrong.
    """
    if not 0 < len(text) <= MAX_CHARACTERS:
        raise ValueError(f"must have 1 to {MAX_CHARACTERS} characters, got {len(text)}")
    readable = _TOKENS.match(text)
    assert readable is not None, "no token at all is a match too"
    if readable.end() != len(text):
        raise ValueError(
            f"must be numbers, names, + - * / ^ ( ) and commas, got {text[readable.end() :][:20]!r} at character "
            f"{readable.end()}"
        )
    try:
        # Line breaks separate nothing here, and would statements.
        words = " ".join(text.split()).replace("^", "**")
        root = ast.parse(words, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        detail = error.msg if isinstance(error, SyntaxError) else "it is nested too deep"
        raise ValueError(f"must be a calculation such as 0.8 * right + 0.2 * short: {detail}") from error
    names = frozenset(_names(root))
    return Expression(text=text, names=names, root=root)


def _names(root: ast.expr) -> Iterator[str]:
    """Yield the names that an expression needs, refusing what it may not hold. Without recursion: it may be deep."""
    level: list[ast.expr] = [root]
    num_nodes = depth = 0
    while level:
        num_nodes += len(level)
        depth += 1
        if num_nodes > MAX_NODES or depth > MAX_DEPTH:
            raise ValueError(f"must have at most {MAX_NODES} parts, at most {MAX_DEPTH} deep")
        below: list[ast.expr] = []
        for node in level:
            below += _operands(node)
            if isinstance(node, ast.Name):
                yield node.id
        level = below


def _operands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return [node.left, node.right]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return [node.operand]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _arguments(node, node.func.id)
    if isinstance(node, ast.Name):
        if node.id in FUNCTIONS:
            raise ValueError(f"{node.id} is a function: write {node.id}(...)")
        return []
    if isinstance(node, ast.Constant) and _is_number(node.value):
        _require_finite(node.value)
        return []
    raise ValueError(f"must hold + - * / ^ and {', '.join(FUNCTIONS)} alone, got {ast.unparse(node)[:40]!r}")


def _arguments(node: ast.Call, name: str) -> list[ast.expr]:
    if name not in FUNCTIONS:
        raise ValueError(f"functions are {', '.join(FUNCTIONS)}, got {name}")
    wanted = "one argument" if name in _OF_ONE else "two arguments or more"
    if node.keywords or (len(node.args) != 1 if name in _OF_ONE else len(node.args) < 2):
        raise ValueError(f"{name} takes {wanted}, got {len(node.args)}")
    return node.args


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float)  # a bool is an int by inheritance


def _require_finite(number: float) -> None:
    try:
        is_finite = math.isfinite(float(number))
    except OverflowError:
        is_finite = False
    if not is_finite:
        raise ValueError("numbers must be finite")


def _value(node: ast.expr, scores: Mapping[str, float]) -> float:
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_value(node.left, scores), _value(node.right, scores))
    if isinstance(node, ast.UnaryOp):
        return _UNARY[type(node.op)](_value(node.operand, scores))
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name), "read by `parsed`"
        values = [_value(argument, scores) for argument in node.args]
        name = node.func.id
        return _OF_ONE[name](values[0]) if name in _OF_ONE else _OF_MANY[name](values)
    if isinstance(node, ast.Name):
        return scores[node.id]
    assert isinstance(node, ast.Constant), "read by `parsed`"
    assert _is_number(node.value), "read by `parsed`"
    return float(node.value)
