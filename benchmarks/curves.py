"""One figure of several methods: a score over how much is left, mean and spread of the seeds.

Needs matplotlib (``pip install -e '.[benchmarks]'``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

#: Where the documentation's figures lie.
FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
Point = tuple[float, Sequence[float]]


def curves(
    file: str, lines: Mapping[str, Sequence[Point]], *, x: str, y: str, level: float | None = None
) -> Path:
    """Draw lines over a logarithmic axis, and write them as SVG without a date in it.

    Args:
        file: its name under ``docs/figures``.
        lines: name -> points, each what is left and the scores of its seeds.
        x: what is left, with its unit.
        y: the score, with its unit.
        level: a score that is drawn all across: that of the dense network.
    """
    return panels(file, {x: lines}, y=y, level=level)


def panels(
    file: str,
    parts: Mapping[str, Mapping[str, Sequence[Point]]],
    *,
    y: str,
    level: float | None = None,
) -> Path:
    """Draw the same scores over several quantities, side by side, each as :func:`curves` does.

    Args:
        file: its name under ``docs/figures``.
        parts: what lies along an axis -> its lines.
        y: the score, with its unit.
        level: a score that is drawn all across.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "lilliput", "svg.fonttype": "none"})
    from matplotlib import pyplot

    size = (8, 5) if len(parts) == 1 else (4 * len(parts), 4.5)
    figure, drawn = pyplot.subplots(
        1, len(parts), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (x, lines) in zip(drawn[0], parts.items(), strict=True):
        for name, points in lines.items():
            left, scores = zip(*sorted(points, reverse=True), strict=True)
            apart = [stdev(s) if len(s) > 1 else 0.0 for s in scores]
            axes.errorbar(left, [mean(s) for s in scores], apart, label=name, marker="o", capsize=2)
        if level is not None:
            axes.axhline(level, color="gray", linestyle=":", label="dense")
        axes.set(xscale="log", xlabel=x)
        axes.grid(alpha=0.3)
    drawn[0][0].set_ylabel(y)
    drawn[0][-1].legend(frameon=False)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / file, metadata={"Date": None})
    pyplot.close(figure)
    return FIGURES / file
