"""Numbers in a model's Python code that are the width of something.

``x.shape[1]``, ``self.num_heads``: while a forward pass is traced, such numbers are integers that
remember where they came from. When one of them then stands in a call such as ``view``, it is known
which dim follows from it: another tensor's (the two are then equally wide for ever) or an attribute
(which surgery has to correct). Sums, products and quotients remember as well.

The surprising rule: a number that forgot its origin counts as a constant. A dim whose size is a
constant in the code must stay, so nothing is cut wrongly for a number that could not be followed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

from .labels import Dim

#: How many of some labels remain after a removal.
Kept = Callable[[Dim], int]


class Ledger(Protocol):
    """What hears of the use of widths."""

    def attribute(self, path: str, value: int, kept: Kept) -> int:
        """What an attribute will be when only some labels are kept."""

    def same(self, left: Width, right: int) -> None:
        """The code has found the two equal."""

    def number(self, width: Width) -> None:
        """The code computes a number other than a width from it."""


class Width(int):
    """An integer that knows what it is the width of.

    Attributes:
        ledger: of the trace that it belongs to.
        source: int64 ``(k, width)``, the labels of the dim that it was read from; k > 1 where the dim
            was divided into k parts. None where it is not one dim's.
        path: dotted name of the attribute that it was read from.
        leaves: the widths that it was computed from.
    """

    ledger: Ledger
    source: Dim | None
    path: str
    leaves: tuple[Width, ...]
    _after: Callable[[Kept], int] | None

    @classmethod
    def of_dim(cls, ledger: Ledger, labels: Dim) -> Width:
        """The width of one dim of a tensor."""
        return cls._make(ledger, len(labels), source=labels[None])

    @classmethod
    def of_attribute(cls, ledger: Ledger, value: int, path: str) -> Width:
        """An integer attribute of a module."""
        return cls._make(ledger, value, path=path)

    @classmethod
    def _make(
        cls,
        ledger: Ledger,
        value: int,
        source: Dim | None = None,
        path: str = "",
        leaves: tuple[Width, ...] = (),
        after: Callable[[Kept], int] | None = None,
    ) -> Width:
        width = cls(value)
        width.ledger, width.source, width.path = ledger, source, path
        width.leaves = leaves or (width,)
        width._after = after
        return width

    def after(self, kept: Kept) -> int:
        """What the code will compute when only some labels are kept."""
        if self._after is not None:
            return self._after(kept)
        if self.path:
            return self.ledger.attribute(self.path, int(self), kept)
        return kept(self.source[0]) if self.source is not None else int(self)

    def __deepcopy__(self, memo: Any) -> Width:
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is True and isinstance(other, int):
            self.ledger.same(self, other)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __float__(self) -> float:
        self.ledger.number(self)
        return float(int(self))

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        self.ledger.number(self)
        return pow(int(self), other, modulo)

    def __truediv__(self, other: Any) -> Any:
        self.ledger.number(self)
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self.ledger.number(self)
        return other / int(self)

    def __floordiv__(self, other: Any) -> Any:
        result = _combine(operator.floordiv, self, other)
        divides = isinstance(result, Width) and self % other == 0
        if divides and self.source is not None:
            result.source = self.source.reshape(-1, int(result))
        return result

    def __rfloordiv__(self, other: Any) -> Any:
        return _combine(operator.floordiv, other, self)

    def __mul__(self, other: Any) -> Any:
        return _combine(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return _combine(operator.mul, other, self)

    def __add__(self, other: Any) -> Any:
        return _combine(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return _combine(operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return _combine(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _combine(operator.sub, other, self)

    def __mod__(self, other: Any) -> Any:
        return _combine(operator.mod, self, other)

    def __rmod__(self, other: Any) -> Any:
        return _combine(operator.mod, other, self)

    def __neg__(self) -> Any:
        return _combine(operator.sub, 0, self)


def after(value: int, kept: Kept) -> int:
    """What a number in the code becomes when only some labels are kept."""
    return value.after(kept) if isinstance(value, Width) else int(value)


def leaves(*values: int) -> tuple[Width, ...]:
    """The widths from which numbers were computed."""
    return tuple(leaf for v in values if isinstance(v, Width) for leaf in v.leaves)


def plain(value: Any) -> Any:
    """The number without its origin."""
    return int(value) if isinstance(value, Width) else value


def _combine(function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """The result of an operation, an integer that remembers unless a fraction takes part."""
    result = function(plain(left), plain(right))
    if type(result) is not int:
        for leaf in leaves(left, right):
            leaf.ledger.number(leaf)
        return result
    parts = leaves(left, right)
    return Width._make(
        parts[0].ledger,
        result,
        leaves=parts,
        after=lambda kept: int(function(after(left, kept), after(right, kept))),
    )
