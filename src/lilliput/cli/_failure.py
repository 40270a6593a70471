"""Errors as the user meets them: one clear message, its kind, and an exit code.

What Lilliput raises on purpose, wrong usage, failing disks and Ctrl-C are told in a sentence.
Anything else is a bug, here or in the user's own module, and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback

from cyclopts import CycloptsError

from ..errors import InputError, LilliputError
from ._print import leads, print_json

_INTERRUPTED = (
    "interrupted. What was finished is kept: give the same command again, and a run goes on where "
    "it stopped."
)


def report_failure(error: BaseException, *, as_json: bool) -> int:
    """Tell the user what went wrong.

    Args:
        error: what was raised.
        as_json: put ``{"error": kind, "message": ...}`` on stdout instead of a line on stderr.

    Returns:
        The exit code.

    Raises:
        BaseException: the error itself, where it is no failure that a user can cause.
    """
    if isinstance(error, BrokenPipeError):
        return _reader_has_left()
    told = _explain(error)
    if told is None:
        raise error
    kind, message, code = told
    if os.environ.get("LILLIPUT_TRACEBACK") == "1":
        traceback.print_exception(error)
    if as_json and leads():
        print_json({"error": kind, "message": message})
    else:
        print(f"lilliput: {kind}: {message}", file=sys.stderr, flush=True)
    return code


def _explain(error: BaseException) -> tuple[str, str, int] | None:
    """Kind, message and exit code; None for a bug."""
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return kind, _INTERRUPTED, 130
    if isinstance(error, CycloptsError):
        return "UsageError", f"{error} See lilliput --help, or lilliput VERB --help.", 2
    if isinstance(error, LilliputError):
        return kind, str(error), 2 if isinstance(error, InputError) else 1
    if isinstance(error, OSError):
        return kind, f"{error}.{_advice(error)}", 1
    return None


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return " Free some space and give the same command again: a run goes on where it stopped."
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return " Choose a place that this user may write, for example with --directory."
    return ""


def _reader_has_left() -> int:
    """End quietly when stdout is a pipe to a program such as head that has read enough."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # else Python fails again when it flushes at exit
    return 1
