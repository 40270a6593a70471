"""Figures as text: how numbers are written, the rows of a comparison, a Markdown table, the notes.

``size_ratio`` is the dense network's bytes over the file's, larger is better; ``latency_ratio`` is the
time over the dense network's, smaller is better. A higher score is better, always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .read import RunData

_COPIED = (
    "score", "score_name", "baseline_score", "score_drop", "parameters", "nonzeros", "bytes",
    "dense_bytes", "size_ratio", "entropy_bytes", "latency_ratio",
)  # fmt: skip
MISSING = "n/a"
_DENSE_LATENCY = 0.9  # above it, and with zeros to skip, the zeros evidently run as multiplications
_FEW_ZEROS = 0.05


def count(value: float | None) -> str:
    """A whole number with thousands separated.

    Example:
        >>> count(184653)
        '184,653'
    """
    return MISSING if value is None else f"{value:,.0f}"


def decimals(value: float | None) -> str:
    """Two decimals: scores and latency ratios."""
    return MISSING if value is None else f"{value:,.2f}"


def ratio(value: float | None) -> str:
    """A size ratio: one decimal below 100, none above.

    Example:
        >>> ratio(33.89), ratio(231.4)
        ('33.9x', '231x')
    """
    if value is None:
        return MISSING
    return f"{value:,.1f}x" if value < 100 else f"{value:,.0f}x"


def comparison(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """One JSON-ready row a run: its name, the figures of the final file, the recipe's conditions.

    ``expected`` is the number of conditions in the recipe's ``expect``, ``held`` how many hold.
    """
    return [_row(run) for run in runs]


def markdown_table(runs: Sequence[RunData]) -> str:
    """The comparison as a Markdown table, for a README or an issue."""
    rows, score = comparison(runs), shared_score_name(runs)
    header = ["run", score, "baseline", "parameters", "non-zeros", "bytes on disk", "size ratio",
              "latency ratio"]  # fmt: skip
    align = ["---", *["---:"] * (len(header) - 1)]
    lines = [header, align, *(_markdown_cells(row, score) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shared_score_name(runs: Sequence[RunData]) -> str:
    """The name of all runs' score, or "score" where they measure different things."""
    names = {str(run.figures["score_name"]) for run in runs}
    return names.pop() if len(names) == 1 else "score"


def notes(run: RunData) -> list[str]:
    """What a reader of the figures should know and might not see."""
    candidates = (
        _on_blocks,
        _on_zeros,
        _on_latency,
        _on_simulation,
        _on_score,
        _on_coding,
        _on_files,
    )
    return [note for candidate in candidates if (note := candidate(run))]


def _row(run: RunData) -> dict[str, Any]:
    expect = run.figures.get("expect", [])
    held = sum(bool(condition["holds"]) for condition in expect)
    copied = {name: run.figures[name] for name in _COPIED}
    return {"name": run.name, **copied, "expected": len(expect), "held": held}


def _markdown_cells(row: dict[str, Any], heading: str) -> list[str]:
    unit = "" if row["score_name"] == heading else f" ({row['score_name']})"
    cells = [
        row["name"],
        decimals(row["score"]) + unit,
        decimals(row["baseline_score"]),
        count(row["parameters"]),
        count(row["nonzeros"]),
        count(row["bytes"]),
        ratio(row["size_ratio"]),
        decimals(row["latency_ratio"]),
    ]
    return [" ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|") for cell in cells]


def _on_blocks(run: RunData) -> str:
    if not run.removed:
        return ""
    blocks = ", ".join(f"{name} ({before})" for name, before in run.removed.items())
    return f"Whole blocks were removed: {blocks}."


def _on_zeros(run: RunData) -> str:
    figures = run.figures
    zeros = 1 - figures["nonzeros"] / max(1, figures["parameters"])
    latency = figures["latency_ratio"]
    if zeros < _FEW_ZEROS or latency is None or latency <= _DENSE_LATENCY:
        return ""
    return (
        f"Zeros still run densely: {zeros:.0%} of the parameters are zero, and the latency ratio is "
        f"{latency:.2f}. The file is smaller; the network is not faster."
    )


def _on_latency(run: RunData) -> str:
    if run.figures["latency_ratio"] is not None:
        return ""
    reason = run.figures.get("unmeasured", "the run does not say why")
    return f"The latency was not measured: {reason}"


def _on_simulation(run: RunData) -> str:
    if not run.figures.get("simulated"):
        return ""
    return (
        "Integers are simulated in floats, and the latency ratio is that of the simulation. "
        "`lilliput export` writes the network for a runtime that computes in integers, and `lilliput "
        "profile --deploy` times it there."
    )


def _on_score(run: RunData) -> str:
    if run.figures.get("score_on") != "validation":
        return ""
    return (
        "The task has no test set: scores are of the validation set, on which choices were made too, "
        "so they are likely a little too good."
    )


def _on_coding(run: RunData) -> str:
    real, entropy = run.figures["bytes"], run.figures["entropy_bytes"]
    if not entropy or real < 1.05 * entropy:
        return ""
    return (
        f"The file takes {real / entropy:.2f} times the order-0 entropy of its weights "
        f"({count(real)} against {count(entropy)} bytes): codebooks, the header and what coding loses "
        "come on top of it."
    )


def _on_files(run: RunData) -> str:
    gone = [s["name"] for n, s in enumerate(run.stages) if run.artifact(n) is None]
    if not gone:
        return ""
    return (
        f"The files of these stages are no longer in the run directory: {', '.join(gone)}. Their "
        "codebooks count as payload here, and their weights are not drawn."
    )
