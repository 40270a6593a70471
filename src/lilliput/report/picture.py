"""A small static SVG, for a README: bars with words, and a figure beside each. Of a run: bytes and scores.

It has no ground of its own, and its colors have a contrast of at least 4:1 on white and on GitHub's dark
ground alike: a picture cannot know on which of the two it will be shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from ..errors import InputError
from .read import RunData, read_run
from .tables import count, decimals, ratio

_WIDTH, _NAMES, _BARS, _SCORE = 720, 150, 300, 700
_TOP, _STEP = 46, 34

_PICTURE = Template(
    """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $width $height" width="$width" \
height="$height" role="img" aria-label=$label font-family="system-ui, -apple-system, 'Segoe UI', \
Helvetica, Arial, sans-serif" font-size="14" fill="#757c85">
<title>$title</title>
<g font-size="12"><text x="$bars" y="24">$measured</text>
<text x="$score" y="24" text-anchor="end">$score_name</text></g>
$rows
</svg>
"""
)
_ROW = Template(
    """<text x="$names" y="$line" text-anchor="end" font-weight="600">$name</text>
<rect x="$bars" y="$top" width="$length" height="20" rx="3" fill="$color"/>
<text x="$after" y="$line">$words</text>
<text x="$score" y="$line" text-anchor="end" font-weight="600">$value</text>"""
)


class Bar(NamedTuple):
    """One row of a picture.

    Attributes:
        name: of what is measured.
        size: of the bar, in whatever unit all bars share.
        words: what stands behind the bar.
        value: what stands at the right.
    """

    name: str
    size: float
    words: str
    value: str


def picture(run: Path, out: Path) -> Path:
    """Draw a finished run.

    Args:
        run: a run directory.
        out: the SVG file; replaced if it exists, its folder is made.

    Returns:
        ``out``.

    Raises:
        InputError: the directory holds no finished run, or ``out`` cannot be written.
    """
    found = read_run(run)
    score_name = found.figures["score_name"]
    return draw_bars(out, found.name, "bytes on disk", score_name, _stages(found))


def draw_bars(out: Path, title: str, measured: str, beside: str, bars: Sequence[Bar]) -> Path:
    """Draw some bars, the first of which is what the others are compared with.

    Args:
        out: the SVG file; replaced if it exists, its folder is made.
        title: what it shows.
        measured: what the bars are.
        beside: what the figures at the right are.
        bars: at least one.

    Returns:
        ``out``.

    Raises:
        InputError: ``out`` cannot be written.
    """
    out, longest = Path(out), max(bar.size for bar in bars)
    said = "; ".join(f"{bar.name}: {bar.words}, {bar.value}" for bar in bars)
    drawing = _PICTURE.substitute(
        width=_WIDTH, height=_TOP + _STEP * len(bars), bars=_NAMES, score=_SCORE,
        label=quoteattr(f"{title}. {beside}. {said}."), title=escape(title), measured=escape(measured),
        score_name=escape(beside), rows="\n".join(_row(n, b, longest) for n, b in enumerate(bars)),
    )  # fmt: skip
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(drawing, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"the picture cannot be written to {out}: {error.strerror or error}. Name a file in a "
            "folder that you may write to."
        ) from error
    return out


def _stages(run: RunData) -> list[Bar]:
    figures = run.figures
    dense = figures["dense_bytes"]
    bars = [Bar("dense", dense, count(dense), decimals(figures["baseline_score"]))]
    for stage in run.stages:
        size = stage["bytes"]
        words = f"{count(size)}, {ratio(dense / size)} smaller"
        bars.append(Bar(stage["name"], size, words, decimals(stage["score"])))
    return bars


def _row(number: int, bar: Bar, longest: float) -> str:
    top, length = _TOP + _STEP * number - 8, max(2.0, _BARS * bar.size / longest)
    return _ROW.substitute(
        names=_NAMES - 12, bars=_NAMES, top=top, line=top + 15, length=f"{length:.1f}",
        after=f"{_NAMES + length + 10:.1f}", score=_SCORE, color="#2f7fb8" if number else "#818892",
        name=escape(_shortened(bar.name)), words=escape(bar.words), value=escape(bar.value),
    )  # fmt: skip


def _shortened(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"
