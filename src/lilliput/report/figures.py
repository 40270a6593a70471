"""The page's figures, drawn by plotly.

Colors are mid-tones with a contrast of at least 3:1 on white and on the page's dark ground, so one
drawing serves both; text and rules take the page's colors by CSS. The palette is after Okabe and Ito's
for color-blind readers, and symbols or dashes say again what colors say.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from ..core.optional import optional
from .read import RunData
from .tables import count, decimals, ratio
from .weights import LayerWeights, largest_layers

_load = partial(optional, extra="report", purpose="the HTML report")

go = _load("plotly.graph_objects", "plotly")
subplots = _load("plotly.subplots", "plotly")

COLORS = ("#2f7fb8", "#d0652a", "#1f9477", "#a9679b", "#9a7d1c", "#5f7fd0")
GREY = "#818892"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MOST_LAYERS = 40
_ROW = 24  # pixels a bar


@dataclass(frozen=True)
class Figure:
    """A drawing with its words.

    Attributes:
        title: what it shows.
        summary: how to read it; also what a screen reader says of it.
        drawing: the plotly figure.
    """

    title: str
    summary: str
    drawing: Any


def run_figures(run: RunData, layers: Sequence[LayerWeights]) -> list[Figure]:
    """All figures that a run has data for."""
    figures = [
        score_against_bytes([run]),
        bytes_by_stage(run),
        kept_by_layer(run),
        bytes_by_layer(run),
    ]
    if run.widths:
        figures.insert(2, width_by_layer(run))
    if run.metrics:
        figures.append(training_curves(run))
    if layers:
        figures.append(weight_histograms(layers))
    if run.sensitivity is not None:
        figures.append(_sensitivity(run.sensitivity))
    return figures


def score_against_bytes(runs: Sequence[RunData]) -> Figure:
    """Score over bytes on disk, a point a stage; a run with its baseline, or several runs."""
    sizes = {"type": "log", "title": "bytes on disk", "tickformat": ",~s", "dtick": "D2"}
    drawing = _blank(380, xaxis=sizes)
    for number, run in enumerate(runs):
        drawing.add_trace(_path_of(run, number, named=len(runs) > 1))
    if len(runs) == 1:
        _draw_baseline(drawing, runs[0].figures["baseline_score"], "dense network")
        drawing.update_layout(margin_t=20)
    names = sorted({_text(run.figures["score_name"]) for run in runs})
    drawing.update_yaxes(title=" / ".join(names))
    return Figure(
        "Score against bytes",
        "Each point is a stage's file, its score measured after reading the file back. Further left "
        "is smaller, higher is better."
        + (" The dashed line is the dense network's score." if len(runs) == 1 else ""),
        drawing,
    )


def bytes_by_stage(run: RunData) -> Figure:
    """Stacked bars: payload of the weights, codebooks, header; the entropy as a mark."""
    names = ["dense, as in memory", *(_text(stage["name"]) for stage in run.stages)]
    rows = list(range(len(names)))
    dense = run.figures["dense_bytes"]
    parts = [(dense, 0, 0), *(_parts(run, n) for n in range(len(run.stages)))]
    drawing = _bars(len(names), "bytes on disk", names)
    for at, (label, color) in enumerate(_PARTS):
        drawing.add_trace(_bar([part[at] for part in parts], rows, label, color))
    entropy = [stage["entropy_bytes"] for stage in run.stages]
    drawing.add_trace(_marks(entropy, rows[1:], "order-0 entropy"))
    totals = [sum(part) for part in parts]
    words = [f"{count(total)} B, {ratio(dense / total)}" for total in totals]
    ends = [float(dense), *map(max, zip(totals[1:], entropy, strict=True))]
    _label_bars(drawing, ends, rows, words)
    return Figure(
        "Bytes by stage",
        "What the file of each stage is made of. The upright mark is the order-0 entropy of the "
        "weights: what an ideal coder of single weights would need, without codebooks and header.",
        drawing,
    )


def bytes_by_layer(run: RunData) -> Figure:
    """The last stage's file: a bar a layer, the rest of the file last."""
    layers, books = largest_layers(run, _MOST_LAYERS), run.codebook_bytes(-1)
    stage = run.stages[-1]
    small = [layer for layer in stage["layers"] if layer not in layers]
    names = [_text(_shortened(layer["name"])) for layer in layers]
    names += [f"{len(small)} other tensors", "header"]
    payload = [layer["bytes"] - books.get(layer["name"], 0) for layer in layers]
    codebooks = [books.get(layer["name"], 0) for layer in layers]
    rest = sum(layer["bytes"] for layer in small)
    header = stage["bytes"] - sum(layer["bytes"] for layer in stage["layers"])
    rows = list(range(len(names)))
    drawing = _bars(len(names), "bytes in the file", names)
    columns = ([*payload, rest, 0], [*codebooks, 0, 0], [0] * len(layers) + [0, header])
    for (label, color), values in zip(_PARTS, columns, strict=True):
        drawing.add_trace(_bar(values, rows, label, color))
    entropy = [layer["entropy_bytes"] for layer in layers]
    drawing.add_trace(_marks(entropy, rows[: len(layers)], "order-0 entropy"))
    totals = [sum(column) for column in zip(*columns, strict=True)]
    ends = list(map(max, zip(totals, [*entropy, 0, 0], strict=True)))
    _label_bars(drawing, ends, rows, [f"{count(total)} B" for total in totals])
    return Figure(
        f"Bytes by layer after “{stage['name']}”",
        "Where the last stage's bytes are. A bar that ends at its mark is coded as well as "
        "single weights can be." + _left_out(run, layers),
        drawing,
    )


def width_by_layer(run: RunData) -> Figure:
    """Channels of each layer that became thinner, before the first stage and after the last."""
    thinner = dict(itertools.islice(run.widths.items(), _MOST_LAYERS))
    left_out = len(run.widths) - len(thinner)
    rows = list(range(len(thinner)))
    before, after = zip(*thinner.values(), strict=True)
    drawing = _bars(len(rows), "channels", [_text(_shortened(name)) for name in thinner])
    drawing.add_trace(_bar(before, rows, "before", _FAINT))
    drawing.add_trace(_bar(after, rows, "after", COLORS[0]))
    drawing.update_layout(
        barmode="overlay", showlegend=False, margin_t=8, height=92 + _ROW * len(rows)
    )
    words = [f"{count(now)} of {count(then)}" for then, now in thinner.values()]
    _label_bars(drawing, before, rows, words)
    return Figure(
        "Width by layer",
        "Channels that are left after the last stage, of those before the first."
        + (f" {left_out} more layers are thinner too." if left_out else ""),
        drawing,
    )


def kept_by_layer(run: RunData) -> Figure:
    """Per cent of each layer's weights that are not zero after the last stage."""
    layers = largest_layers(run, _MOST_LAYERS)
    names = [_text(_shortened(layer["name"])) for layer in layers]
    kept = [100 * layer["nonzeros"] / max(1, layer["weights"]) for layer in layers]
    drawing = _bars(len(layers), "weights that are not zero, %", names)
    rows = list(range(len(layers)))
    drawing.add_trace(_bar([100] * len(layers), rows, "all weights", _FAINT))
    drawing.add_trace(_bar(kept, rows, "not zero", COLORS[0]))
    drawing.update_layout(
        barmode="overlay", showlegend=False, margin_t=8, height=92 + _ROW * len(rows)
    )
    words = [
        f"{share:.1f} % ({count(layer['nonzeros'])} of {count(layer['weights'])})"
        for share, layer in zip(kept, layers, strict=True)
    ]
    _label_bars(drawing, [100.0] * len(layers), rows, words)
    drawing.update_xaxes(tickvals=[0, 25, 50, 75, 100])
    return Figure(
        "Weights kept by layer",
        "Weights that are not zero after the last stage." + _left_out(run, layers),
        drawing,
    )


def training_curves(run: RunData) -> Figure:
    """Loss terms and validation score over the epochs of all stages."""
    lengths = [_epochs(run, number) for number in range(len(run.stages))]
    starts = [0, *itertools.accumulate(lengths)]
    terms = _columns(run.metrics)
    losses = [name for name in terms if name.startswith("loss")]
    others = [name for name in terms if name not in losses and name != "validation"]
    panels = [p for p in (losses, ["validation"] if "validation" in terms else [], others) if p]
    drawing = subplots.make_subplots(rows=len(panels), shared_xaxes=True, vertical_spacing=0.07)
    drawing.update_layout(**_layout(90 + 230 * len(panels)), hovermode="x unified", margin_t=64)
    for row, names in enumerate(panels, start=1):
        title = run.figures["score_name"] if names == ["validation"] else names[0].partition("/")[0]
        _draw_panel(drawing, run, names, starts, row)
        drawing.update_yaxes(title=_text(title), row=row, **_scale(run, names))
    drawing.update_xaxes(title="epoch", row=len(panels))
    _draw_stages(drawing, run, starts)
    return Figure(
        "Training",
        "Means over each epoch, and the score on the validation set. Vertical lines part the stages. "
        "A loss that is above zero throughout has a logarithmic axis.",
        drawing,
    )


def weight_histograms(layers: Sequence[LayerWeights]) -> Figure:
    """A panel a layer: the weights before as an area, those after as bars or a line."""
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    titles = [f"{_text(_shortened(w.name))}: {100 * w.kept:.1f} % not zero" for w in layers]
    drawing = subplots.make_subplots(
        rows=rows, cols=columns, subplot_titles=titles, vertical_spacing=0.3 / rows
    )
    drawing.update_layout(**_layout(90 + 200 * rows), bargap=0, margin_t=64)
    drawing.update_annotations(font_size=12)
    for number, layer in enumerate(layers):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        for trace in _weight_traces(layer, first=number == 0):
            drawing.add_trace(trace, **place)
    drawing.update_yaxes(title="%", col=1)
    return Figure(
        "Weights before and after",
        "Area: the dense network's weights, per cent in each of 60 bins. Bars: the values in the "
        "codebook and the per cent of the non-zero weights that share each (a line where there is no "
        "codebook). At most the 12 largest layers; of a layer of millions, a sample.",
        drawing,
    )


def sensitivity_figure(data: Mapping[str, Any]) -> Any:
    """Draw a sensitivity scan: how the score falls when one layer alone is compressed.

    Args:
        data: ``baseline`` (the score of the untouched network), ``score_name``, and ``rows``, each
            with ``layer``, ``kind`` ("sparsity" or "bits"), ``amount`` and ``score``.

    Returns:
        A ``plotly.graph_objects.Figure``: a panel a kind, a line a layer.
    """
    kinds = [k for k in ("sparsity", "bits") if any(row["kind"] == k for row in data["rows"])]
    drawing = subplots.make_subplots(
        rows=1, cols=max(1, len(kinds)), shared_yaxes=True, horizontal_spacing=0.05
    )
    layers = list(dict.fromkeys(row["layer"] for row in data["rows"]))
    drawing.update_layout(**_layout(420 + 16 * len(layers)))
    for column, kind in enumerate(kinds, start=1):
        for number, layer in enumerate(layers):
            rows = [r for r in data["rows"] if r["kind"] == kind and r["layer"] == layer]
            trace = _sensitivity_trace(rows, layer, number, first=column == 1)
            drawing.add_trace(trace, row=1, col=column)
        drawing.update_xaxes(title=_KINDS[kind], row=1, col=column)
    _draw_baseline(drawing, data["baseline"], "untouched")
    drawing.update_yaxes(title=_text(data["score_name"]), col=1)
    return drawing


_FAINT = "rgba(129, 136, 146, 0.22)"
_PARTS = (("weights", COLORS[0]), ("codebooks", COLORS[1]), ("header", GREY))
_KINDS = {"sparsity": "sparsity of the layer", "bits": "bits of the layer's weights"}


def _sensitivity(data: Mapping[str, Any]) -> Figure:
    return Figure(
        "Sensitivity by layer",
        "Each line compresses one layer alone, without retraining. A line that falls early is a layer "
        "to be careful with. The dashed line is the untouched network's score.",
        sensitivity_figure(data),
    )


def _sensitivity_trace(
    rows: Iterable[Mapping[str, Any]], layer: str, number: int, *, first: bool
) -> Any:
    ordered = sorted(rows, key=lambda row: float(row["amount"]))
    return go.Scatter(
        x=[row["amount"] for row in ordered],
        y=[row["score"] for row in ordered],
        name=_text(_shortened(layer)),
        legendgroup=layer,
        showlegend=first,
        mode="lines+markers",
        **_style(number),
    )


def _style(number: int) -> dict[str, Any]:
    """Color, dash and symbol of a line; no two of the first 24 are the same."""
    color = COLORS[number % len(COLORS)]
    dash = _DASHES[number // len(COLORS) % len(_DASHES)]
    symbol = _SYMBOLS[number % len(_SYMBOLS)]
    return {
        "line": {"color": color, "dash": dash, "width": 2},
        "marker": {"symbol": symbol, "size": 8},
    }


def _path_of(run: RunData, number: int, *, named: bool) -> Any:
    """The stages of a run, from the dense network on."""
    stages = run.stages
    names = ["dense", *(_text(stage["name"]) for stage in stages)]
    sizes = [run.figures["dense_bytes"], *(stage["bytes"] for stage in stages)]
    scores = [run.figures["baseline_score"], *(stage["score"] for stage in stages)]
    return go.Scatter(
        x=sizes,
        y=scores,
        text=[*[""] * len(stages), names[-1]] if named else ["", *names[1:]],
        customdata=names,
        name=_text(run.name),
        showlegend=named,
        mode="lines+markers+text",
        textposition="bottom center",
        cliponaxis=False,
        hovertemplate="%{customdata}: %{y:.2f}, %{x:,} bytes<extra></extra>",
        **_style(number),
    )


def _draw_baseline(drawing: Any, score: float, words: str) -> None:
    drawing.add_hline(y=score, line={"color": GREY, "dash": "dash", "width": 1.5})
    drawing.add_annotation(
        text=f"{words}: {decimals(score)}", x=0, xref="x domain", xanchor="left", y=score, yref="y",
        yanchor="bottom", yshift=4, showarrow=False, font={"size": 11},
    )  # fmt: skip


def _parts(run: RunData, stage: int) -> tuple[int, int, int]:
    """Bytes of the weights' payload, of the codebooks, and of everything else in a stage's file."""
    figures = run.stages[stage]
    codebooks = sum(run.codebook_bytes(stage).values())
    tensors = sum(layer["bytes"] for layer in figures["layers"])
    return tensors - codebooks, codebooks, figures["bytes"] - tensors


def _bars(rows: int, title: str, names: Sequence[str]) -> Any:
    axis = {
        "tickvals": list(range(rows)), "ticktext": list(names), "range": [rows - 0.4, -0.6],
        "showgrid": False, "title": None, "ticklabelstandoff": 6,
    }  # fmt: skip
    height = 120 + _ROW * rows
    return _blank(height, xaxis={"title": title, "tickformat": ",~s"}, yaxis=axis, barmode="stack")


def _bar(values: Sequence[float], rows: Sequence[int], name: str, color: str) -> Any:
    return go.Bar(
        x=list(values), y=list(rows), name=name, orientation="h", width=0.62,
        marker={"color": color, "line": {"width": 0}},
        hovertemplate="%{x:,}<extra>" + name + "</extra>",
    )  # fmt: skip


def _marks(values: Sequence[float], rows: Sequence[int], name: str) -> Any:
    marker = {"symbol": "line-ns-open", "size": 20, "color": COLORS[4], "line": {"width": 3}}
    return go.Scatter(
        x=list(values), y=list(rows), name=name, mode="markers", marker=marker,
        hovertemplate="%{x:,.0f} bytes<extra>" + name + "</extra>",
    )  # fmt: skip


def _label_bars(
    drawing: Any, ends: Sequence[float], rows: Sequence[int], words: Sequence[str]
) -> None:
    """Write beside each bar, and leave room for the words."""
    drawing.add_trace(
        go.Scatter(
            x=list(ends), y=list(rows), text=[f"  {w}" for w in words], mode="text",
            textposition="middle right", showlegend=False, hoverinfo="skip", cliponaxis=False,
        )
    )  # fmt: skip
    drawing.update_xaxes(range=[0, 1.45 * max(ends)], rangemode="tozero")


def _columns(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for line in metrics for name in line)
    return [name for name in names if name not in ("stage", "epoch", "step")]


def _epochs(run: RunData, stage: int) -> int:
    return max((line["epoch"] for line in run.metrics if line["stage"] == stage), default=0)


def _draw_panel(
    drawing: Any, run: RunData, names: Sequence[str], starts: Sequence[int], row: int
) -> None:
    for number, name in enumerate(names):
        x, y = _curve(run, name, starts)
        style = _style(3 if name == "validation" else number)["line"]
        trace = go.Scatter(x=x, y=y, name=_text(name), mode="lines", line=style)
        drawing.add_trace(trace, row=row, col=1)


def _curve(
    run: RunData, name: str, starts: Sequence[int]
) -> tuple[list[float | None], list[float | None]]:
    """The figure over the epochs of all stages, with a gap between stages."""
    x: list[float | None] = []
    y: list[float | None] = []
    for stage in range(len(run.stages)):
        lines = [m for m in run.metrics if m["stage"] == stage and name in m]
        x += [starts[stage] + m["epoch"] for m in lines]
        y += [m[name] for m in lines]
        x.append(None)
        y.append(None)
    return x, y


def _scale(run: RunData, names: Sequence[str]) -> dict[str, Any]:
    """Logarithmic for losses above zero, with a label a decade, or three where there are few."""
    values = [line[name] for line in run.metrics for name in names if name in line]
    if not names[0].startswith("loss") or min(values) <= 0:
        return {"type": "linear"}
    return {"type": "log", "dtick": 1 if max(values) > 100 * min(values) else "D2"}


def _draw_stages(drawing: Any, run: RunData, starts: Sequence[int]) -> None:
    for stage, start, end in zip(run.stages, starts, starts[1:], strict=False):
        if end == start:
            continue
        drawing.add_annotation(
            text=_text(stage["name"]), x=(start + end) / 2, y=1.0, yref="paper", yanchor="bottom",
            showarrow=False, font={"size": 12},
        )  # fmt: skip
        if start:
            drawing.add_vline(x=start + 0.5, line={"color": GREY, "width": 1, "dash": "dot"})


def _weight_traces(layer: LayerWeights, *, first: bool) -> list[Any]:
    traces = []
    if layer.before is not None:
        traces.append(
            go.Scatter(
                x=layer.centers.tolist(), y=layer.before.round(4).tolist(), name="before",
                legendgroup="before", showlegend=first, fill="tozeroy", mode="lines",
                line={"color": GREY, "width": 1, "shape": "hvh"}, fillcolor=_FAINT,
            )
        )  # fmt: skip
    named = {"name": "after", "legendgroup": "after", "showlegend": first}
    x, y = layer.values.tolist(), layer.after.round(4).tolist()
    if layer.is_codebook:
        width = (layer.centers[-1] - layer.centers[0]) / 120
        marker = {"color": COLORS[1], "line": {"width": 0}}
        traces.append(go.Bar(x=x, y=y, width=width, marker=marker, **named))
    else:
        line = {"color": COLORS[1], "width": 2, "shape": "hvh"}
        traces.append(go.Scatter(x=x, y=y, mode="lines", line=line, **named))
    return traces


def _left_out(run: RunData, shown: Sequence[Mapping[str, Any]]) -> str:
    matrices = [layer for layer in run.stages[-1]["layers"] if len(layer["shape"]) > 1]
    if len(matrices) <= len(shown):
        return ""
    return f" The {len(shown)} largest of {len(matrices)} layers."


def _shortened(name: str) -> str:
    name = name.removesuffix(".weight")
    return name if len(name) <= 28 else f"{name[:9]}…{name[-18:]}"


def _text(value: object) -> str:
    """Plotly reads a little HTML in its labels; a name is not meant as such."""
    return escape(str(value), quote=False)


def _blank(height: int, **layout: Any) -> Any:
    drawing = go.Figure()
    drawing.update_layout(**_layout(height))
    drawing.update_layout(**layout)
    return drawing


def _layout(height: int) -> dict[str, Any]:
    """What all figures share; the empty template saves 7 kB a figure."""
    clear = "rgba(0,0,0,0)"
    axis = {"automargin": True, "zeroline": False, "gridcolor": _FAINT, "linecolor": GREY}
    template = {"layout": {"xaxis": axis, "yaxis": axis}}
    return {
        "template": template,
        "height": height,
        "autosize": True,
        "margin": {"l": 8, "r": 16, "t": 36, "b": 8},
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "x": 0,
            "traceorder": "normal",
        },
    }
