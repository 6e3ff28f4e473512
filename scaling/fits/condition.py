"""Conditions on the columns of a table, such as ``loss < 3 and optimizer == "adam"``: read by Python's parser, never run.

A condition compares columns with numbers, strings, True and False, or with other columns of numbers, joined by and, or and
not. A column whose name is no word stands in backticks. Blank cells are equal to nothing.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from madkernels.scaling.fits.runs_table import Table

Mask = NDArray[np.bool_]

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
TRUTH = {"true": 1.0, "yes": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "no": 0.0, "0": 0.0, "0.0": 0.0}


def rows_where(table: Table, text: str) -> Table:
    """The rows that meet a condition. ValueError where it cannot be read, names no column, or is met by no row."""
    found = table.where(_Condition(table, text).mask())
    if not len(found):
        raise ValueError(f"--where {text}: none of {len(table)} rows meets it")
    return found


class _Condition:
    def __init__(self, table: Table, text: str) -> None:
        self.table, self.text = table, text
        self.quoted: dict[str, str] = {}  # stand-ins of names in backticks

    def mask(self) -> Mask:
        try:
            return self.of(ast.parse(re.sub("`([^`]+)`", self.stand_in, self.text).strip(), mode="eval").body)
        except (SyntaxError, RecursionError, MemoryError, OverflowError):
            raise self.unreadable() from None

    def stand_in(self, name: re.Match[str]) -> str:
        word = f"column_in_backticks_{len(self.quoted)}"
        self.quoted[word] = name[1]
        return f" {word} "

    def unreadable(self) -> ValueError:
        expected = "columns compared (==, !=, <, <=, >, >=) with numbers or quoted strings, joined by and, or, not"
        return ValueError(f"--where {self.text}: cannot be read; expected {expected}")

    def of(self, node: ast.expr) -> Mask:
        if isinstance(node, ast.BoolOp):
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return np.asarray(join.reduce([self.of(value) for value in node.values]))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.of(node.operand)
        if not isinstance(node, ast.Compare):
            raise self.unreadable()
        sides = [node.left, *node.comparators]
        pairs = zip(node.ops, sides, sides[1:], strict=False)
        return np.asarray(np.logical_and.reduce([self.compared(op, left, right) for op, left, right in pairs]))

    def compared(self, op: ast.cmpop, left: ast.expr, right: ast.expr) -> Mask:
        if type(op) not in COMPARISONS or not (isinstance(left, ast.Name) or isinstance(right, ast.Name)):
            raise self.unreadable()
        kinds = {type(self.constant(side)) for side in (left, right) if not isinstance(side, ast.Name)} or {float}
        cells = [self.cells(side, *kinds) for side in (left, right)]
        return np.broadcast_to(np.asarray(COMPARISONS[type(op)](*cells), dtype=np.bool_), (len(self.table),))

    def cells(self, side: ast.expr, kind: type) -> Any:
        """A constant; or a column's cells (rows,) as those are compared with constants of a kind."""
        if not isinstance(side, ast.Name):
            return self.constant(side)
        name = self.quoted.get(side.id, side.id)
        if kind is str:
            return np.array(self.table.column(name), dtype=np.str_)
        if kind is bool:
            return np.array([TRUTH.get(cell.lower(), np.nan) for cell in self.table.column(name)])
        return self.table.numbers(name)

    def constant(self, node: ast.expr) -> float | str | bool:
        minus = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        inner = node.operand if isinstance(node, ast.UnaryOp) and minus else node
        value = inner.value if isinstance(inner, ast.Constant) else None
        if isinstance(value, bool | str) and not minus:
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -float(value) if minus else float(value)
        raise self.unreadable()
