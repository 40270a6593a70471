"""What the figures draw, against the numbers that went in; and whether one can see it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("plotly")

from lilliput import artifact, report
from lilliput.engine.checkpoint import save_tree
from lilliput.report import figures, read_run, read_runs
from lilliput.report.weights import largest_layers, layer_weights

PAGE = (Path(report.__file__).parent / "page.html").read_text()


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def themes() -> list[dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\}", PAGE, re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in blocks]


def test_contrast_of_texts_and_traces() -> None:
    light, dark = themes()
    for theme in (light, dark):
        for text in ("ink", "soft", "accent", "good", "bad"):
            assert contrast(theme[text], theme["ground"]) >= 4.5, text
        for text in ("ink", "soft"):
            assert contrast(theme[text], theme["panel"]) >= 4.5, text
        assert contrast(theme["ink"], theme["note"]) >= 4.5
        for color in (*figures.COLORS, figures.GREY):
            assert contrast(color, theme["ground"]) >= 3, color


def test_contrast_of_black_on_white() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_bytes_by_stage_add_up(make_run: Any) -> None:
    run = read_run(make_run())
    drawing = figures.bytes_by_stage(run).drawing
    bars = np.array([trace.x for trace in drawing.data if trace.type == "bar"])
    assert bars.sum(axis=0).tolist() == [176, *(stage["bytes"] for stage in run.stages)]
    weights, codebooks, _ = bars[:, 2]
    assert codebooks > 0 and weights > 0
    (mark,) = [trace for trace in drawing.data if trace.name == "order-0 entropy"]
    assert list(mark.x) == [stage["entropy_bytes"] for stage in run.stages]


def test_bytes_by_layer_add_up(make_run: Any) -> None:
    run = read_run(make_run())
    drawing = figures.bytes_by_layer(run).drawing
    assert list(drawing.layout.yaxis.ticktext) == ["fc", "1 other tensors", "header"]
    assert sum(sum(t.x) for t in drawing.data if t.type == "bar") == run.stages[-1]["bytes"]


def test_kept_by_layer(make_run: Any) -> None:
    drawing = figures.kept_by_layer(read_run(make_run())).drawing
    (kept,) = [trace.x for trace in drawing.data if trace.name == "not zero"]
    assert list(kept) == [40.0]  # 16 of 40


def test_width_by_layer_spans_all_stages(make_run: Any) -> None:
    home = make_run()
    assert read_run(home).widths == {}

    def cut(before: int, after: int) -> list[dict[str, Any]]:
        return [{"where": "fc", "what": "channels", "before": before, "after": after,
                 "method": "filter_l1", "note": ""}]  # fmt: skip

    (home / "changes.json").write_text(json.dumps([cut(40, 20), cut(20, 16)]))
    run = read_run(home)
    assert run.widths == {"fc": (40, 16)}
    drawing = figures.width_by_layer(run).drawing
    assert [list(trace.x) for trace in drawing.data if trace.type == "bar"] == [[40], [16]]
    assert "Width by layer" in [figure.title for figure in figures.run_figures(run, [])]


def test_score_against_bytes(make_run: Any) -> None:
    runs = read_runs([make_run("a"), make_run("b", baseline_score=99.0)])
    drawing = figures.score_against_bytes(runs).drawing
    assert [trace.name for trace in drawing.data] == ["tiny (a)", "tiny (b)"]
    assert list(drawing.data[1].y) == [99.0, 98.0, 97.5]
    assert len(drawing.layout.shapes) == 0
    alone = figures.score_against_bytes(runs[:1]).drawing
    assert alone.layout.shapes[0].y0 == 98.0


def test_curves_run_over_all_stages_with_a_gap_between(make_run: Any) -> None:
    drawing = figures.training_curves(read_run(make_run())).drawing
    traces = {trace.name: trace for trace in drawing.data}
    assert set(traces) == {"loss", "loss/task", "validation"}
    assert list(traces["validation"].x) == [1, 2, 3, None, 4, 5, 6, None]
    assert list(traces["validation"].y) == [91, 92, 93, None, 91, 92, 93, None]
    assert drawing.layout.yaxis.type == "log"


def test_a_loss_below_zero_has_a_linear_axis(make_run: Any) -> None:
    home = make_run()
    line = {"stage": 0, "epoch": 1, "step": 1, "loss": -0.5}
    (home / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert figures.training_curves(read_run(home)).drawing.layout.yaxis.type == "linear"


def test_weights_of_a_codebook_are_counted_exactly(make_run: Any) -> None:
    (layer,) = layer_weights(read_run(make_run()))
    assert layer.is_codebook
    assert layer.values.tolist() == [-0.5, 0.25, 1.0]
    assert layer.after.tolist() == pytest.approx([100 * n / 16 for n in (7, 6, 3)])
    assert layer.kept == pytest.approx(16 / 40)
    assert layer.before is not None
    assert layer.before.sum() == pytest.approx(100)


def test_before_comes_from_the_checkpoint_where_no_stage_was_dense(make_run: Any) -> None:
    home = make_run()
    result = json.loads((home / "result.json").read_text())
    del result["stages"][0]
    (home / "result.json").write_text(json.dumps(result))
    (layer,) = layer_weights(read_run(home))
    assert layer.before is None
    (home / "checkpoints").mkdir()
    state = {"model": {"fc.weight": torch.full((4, 10), 0.5)}, "figures": {"score": 98.0}}
    save_tree(home / "checkpoints" / "original.safetensors", state)
    (layer,) = layer_weights(read_run(home))
    assert layer.before is not None
    assert layer.before.max() == pytest.approx(100)
    assert layer.centers[layer.before.argmax()] == pytest.approx(0.5, abs=2 / 60)


def test_bfloat16_weights_are_read_as_numbers(make_run: Any) -> None:
    home = make_run()
    bits = (np.full((4, 10), 0.5, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    tensors = {"fc.weight": artifact.BFloat16(bits)}
    artifact.write(home / "stages" / "1-cluster.safetensors", tensors)
    (layer,) = layer_weights(read_run(home))
    assert not layer.is_codebook
    assert layer.values[layer.after.argmax()] == pytest.approx(0.5, abs=2 / 60)


def test_no_weights_where_the_file_is_gone(make_run: Any) -> None:
    home = make_run()
    (home / "stages" / "1-cluster.safetensors").unlink()
    assert layer_weights(read_run(home)) == []


def test_the_largest_layers_in_the_files_order(make_run: Any) -> None:
    run = read_run(make_run())
    run.stages[-1]["layers"] = [
        {"name": name, "shape": shape, "weights": int(np.prod(shape))}
        for name, shape in [("a", [2, 3]), ("b", [9]), ("c", [5, 5]), ("d", [4, 4])]
    ]
    assert [layer["name"] for layer in largest_layers(run, 2)] == ["c", "d"]
    assert [layer["name"] for layer in largest_layers(run, 9)] == ["a", "c", "d"]


def test_sensitivity_has_a_panel_a_kind_and_a_line_a_layer() -> None:
    rows = [
        {"layer": layer, "kind": kind, "amount": amount, "score": 90.0 + amount}
        for layer in ("conv", "fc")
        for kind, amounts in (("sparsity", (0.9, 0.5)), ("bits", (4, 2, 1)))
        for amount in amounts
    ]
    data = {"baseline": 98.0, "score_name": "accuracy, %", "rows": rows}
    drawing = figures.sensitivity_figure(data)
    assert len(drawing.data) == 4
    assert list(drawing.data[0].x) == [0.5, 0.9]
    assert list(drawing.data[-1].x) == [1, 2, 4]
    assert {shape.y0 for shape in drawing.layout.shapes} == {98.0}
    assert [t.showlegend for t in drawing.data] == [True, True, False, False]


def test_styles_of_many_layers_differ() -> None:
    styles = [json.dumps(figures._style(number)) for number in range(24)]
    assert len(set(styles)) == 24


def test_the_picture_can_be_read_on_white_and_on_dark() -> None:
    source = (Path(report.__file__).parent / "picture.py").read_text()
    text = re.findall(r'font-size="14" fill="(#[0-9a-f]{6})"', source)
    bars = re.findall(r'color="(#[0-9a-f]{6})" if number else "(#[0-9a-f]{6})"', source)[0]
    assert len(text) == 1
    for ground in ("#ffffff", "#0d1117"):
        assert contrast(text[0], ground) >= 4
        assert min(contrast(bar, ground) for bar in bars) >= 3
