"""A small static SVG of one run, for a README: bytes a stage as bars, the score beside each.

It has no ground of its own, and its colors have a contrast of at least 4:1 on white and on GitHub's dark
ground alike: a picture cannot know on which of the two it will be shown.
"""

from __future__ import annotations

from pathlib import Path
from string import Template
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
<g font-size="12"><text x="$bars" y="24">bytes on disk</text>
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
    drawing = _draw(read_run(run))
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(drawing, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"the picture cannot be written to {out}: {error.strerror or error}. Name a file in a "
            "folder that you may write to."
        ) from error
    return out


def _draw(run: RunData) -> str:
    figures = run.figures
    dense = ("dense", figures["dense_bytes"], figures["baseline_score"])
    bars = [dense, *((s["name"], s["bytes"], s["score"]) for s in run.stages)]
    rows = [_row(n, name, size, score, dense[1]) for n, (name, size, score) in enumerate(bars)]
    said = "; ".join(
        f"{name}: {count(size)} bytes, {decimals(score)}" for name, size, score in bars
    )
    return _PICTURE.substitute(
        width=_WIDTH, height=_TOP + _STEP * len(bars), bars=_NAMES, score=_SCORE,
        label=quoteattr(f"{run.name}. {figures['score_name']}. {said}."),
        title=escape(run.name), score_name=escape(figures["score_name"]), rows="\n".join(rows),
    )  # fmt: skip


def _row(number: int, name: str, size: int, score: float, dense: int) -> str:
    top, length = _TOP + _STEP * number - 8, max(2.0, _BARS * size / dense)
    smaller = f", {ratio(dense / size)} smaller" if number else ""
    return _ROW.substitute(
        names=_NAMES - 12, bars=_NAMES, top=top, line=top + 15, length=f"{length:.1f}",
        after=f"{_NAMES + length + 10:.1f}", score=_SCORE, color="#2f7fb8" if number else "#818892",
        name=escape(_shortened(name)), words=f"{count(size)}{smaller}", value=decimals(score),
    )  # fmt: skip


def _shortened(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"
