"""JSON, written compactly and read with distrust: no NaN, no duplicate key, no unexpected type."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lilliput.errors import CorruptArtifact, InputError

#: Bytes of a header, and of the JSON inside it: parsed JSON takes up to 45 times its text.
LARGEST_HEADER = 16_000_000


def dump(value: Any) -> str:
    """Compact JSON; refuses what is not JSON, NaN included, and what no reader would accept."""
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
        _check_keys(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"a section of the artifact is not plain JSON: {error}. Structure, recipe and figures "
            "hold dicts with strings as keys, lists, strings, finite numbers, booleans and None."
        ) from error
    if len(text) > LARGEST_HEADER // 2:  # half of it, for quotes are escaped once more
        raise InputError(
            f"the header has {len(text)} bytes of JSON; 8 MB is the limit. "
            "Keep long records (structure, recipe, figures) in a file of their own."
        )
    return text


def _check_keys(value: Any) -> None:
    """Refuse keys that `json` would quietly turn into strings: 1 and "1" would be the same key."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r:.40} is no string")
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for inner in value:
        _check_keys(inner)


def load(text: str | bytes) -> Any:
    """Read JSON from an untrusted text: duplicate keys, NaN and broken text are refused."""
    try:
        with _without_collecting():
            return json.loads(
                text, object_pairs_hook=_without_duplicates, parse_constant=_no_number
            )
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptArtifact(f"its JSON is broken: {error!s:.100}.") from error


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Pause the garbage collector: it would search millions of new objects again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _no_number(text: str) -> None:
    raise CorruptArtifact(f"its JSON says {text}, which is no number in JSON.")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise CorruptArtifact("a key stands twice in one JSON object.")
    return out


def mapping(value: Any, what: str) -> dict[str, Any]:
    """The value, if it is a JSON object."""
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{what} is not a JSON object.")
    return value


def string(value: Any) -> str:
    """The value, if it is a string."""
    if not isinstance(value, str):
        raise CorruptArtifact(f"an entry says {value!r:.40} where a string should stand.")
    return value


def integers(value: Any) -> tuple[int, ...]:
    """The values of a list of integers in 0..2^63-1."""
    if not isinstance(value, (list, tuple)):
        raise CorruptArtifact(f"an entry says {value!r:.40} where a list of integers should stand.")
    for number in value:
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise CorruptArtifact(
                f"an entry says {number!r:.40} where an integer >= 0 should stand."
            )
    return tuple(value)
