"""What may stand before a method that puts other modules in the places of layers, in one stage."""

from __future__ import annotations

from ...core.method import Method
from ...core.run import Run
from ...errors import InputError


def refuse_others(method: Method, run: Run, encoded: bool) -> None:
    """Raise where a method of the stage, listed before, holds layers by name that are about to go.

    Args:
        method: that replaces layers.
        run: of the stage.
        encoded: whether some of its layers are encoded; encodings of an earlier stage are taken off.

    Raises:
        InputError: there is such a method.
    """
    before = run.methods[: next(n for n, m in enumerate(run.methods) if m is method)]
    own = method.method_name()
    for other in (m for m in before if m.changes_model and (encoded or not m.initializes)):
        raise InputError(
            f"{own}: {other.method_name()} has chosen its layers already, and some would make room "
            f"for others. List {own} before it, or give each a stage of its own."
        )
