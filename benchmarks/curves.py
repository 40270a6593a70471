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
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "lilliput", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in lines.items():
        left, scores = zip(*sorted(points, reverse=True), strict=True)
        apart = [stdev(s) if len(s) > 1 else 0.0 for s in scores]
        axes.errorbar(left, [mean(s) for s in scores], apart, label=name, marker="o", capsize=2)
    if level is not None:
        axes.axhline(level, color="gray", linestyle=":", label="dense")
    axes.set(xscale="log", xlabel=x, ylabel=y)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / file, metadata={"Date": None})
    pyplot.close(figure)
    return FIGURES / file
