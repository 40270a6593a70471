"""Comparison, Markdown and the notes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lilliput.report import RunData, comparison, markdown_table, read_run
from lilliput.report.tables import count, decimals, notes, ratio

FIGURES = {
    "score": 97.5, "score_name": "accuracy, %", "baseline_score": 98.0, "score_drop": 0.5,
    "parameters": 1000, "nonzeros": 80, "bytes": 500, "dense_bytes": 4000, "size_ratio": 8.0,
    "entropy_bytes": 400.0, "latency_ratio": 1.0, "stages": [],
}  # fmt: skip


def run_of(name: str = "tiny", **figures: Any) -> RunData:
    return RunData(Path("run"), name, {**FIGURES, **figures}, {}, {}, [], [], None)


def test_numbers() -> None:
    assert [count(1234567), count(None)] == ["1,234,567", "n/a"]
    assert [decimals(0.996), decimals(None)] == ["1.00", "n/a"]
    assert [ratio(9.96), ratio(99.94), ratio(100), ratio(None)] == ["10.0x", "99.9x", "100x", "n/a"]


def test_comparison_counts_conditions() -> None:
    expect = [{"holds": True}, {"holds": False}, {"holds": True}]
    (row,) = comparison([run_of(expect=expect)])
    assert (row["name"], row["expected"], row["held"]) == ("tiny", 3, 2)
    assert {name: row[name] for name in FIGURES if name != "stages"} == {
        name: value for name, value in FIGURES.items() if name != "stages"
    }


def test_markdown_table() -> None:
    header, align, row = markdown_table([run_of()]).splitlines()
    assert header.startswith("| run | accuracy, % | baseline |")
    assert align.count("---:") == 7
    assert row == "| tiny | 97.50 | 98.00 | 1,000 | 80 | 500 | 8.0x | 1.00 |"


def test_markdown_names_each_score_where_they_differ() -> None:
    table = markdown_table([run_of(), run_of("b", score_name="BLEU")])
    assert "| score |" in table
    assert "97.50 (accuracy, %)" in table and "97.50 (BLEU)" in table


@example(["a\\|b"])
@example(["a\r\n|b"])
@given(st.lists(st.text(), min_size=1, max_size=4))
def test_names_cannot_break_the_markdown_table(names: list[str]) -> None:
    table = markdown_table([run_of(name) for name in names])
    lines = table.splitlines()
    assert len(lines) == 2 + len(names)
    for line in lines:
        bare = line.replace("\\\\", "")  # an escaped backslash escapes no bar
        assert len(re.findall(r"(?<!\\)\|", bare)) == 9


@pytest.mark.parametrize(
    ("nonzeros", "latency", "told"),
    [(80, 1.0, True), (80, 0.91, True), (80, 0.9, False), (80, 0.5, False), (960, 1.0, False),
     (940, 1.0, True), (80, None, False)],
)  # fmt: skip
def test_zeros_that_run_densely_are_told(nonzeros: int, latency: float | None, told: bool) -> None:
    found = notes(run_of(nonzeros=nonzeros, latency_ratio=latency))
    assert any("still run densely" in note for note in found) is told


def test_other_notes() -> None:
    quiet = run_of(nonzeros=1000, bytes=410)
    assert notes(quiet) == []
    figures = {**quiet.figures, "latency_ratio": None, "unmeasured": "needs two inputs"}
    assert notes(replace(quiet, figures=figures)) == [
        "The latency was not measured: needs two inputs"
    ]
    (note,) = notes(run_of(nonzeros=1000, bytes=410, score_on="validation"))
    assert "no test set" in note
    (note,) = notes(run_of(nonzeros=1000, bytes=410, simulated=True, latency_ratio=2.5))
    assert "lilliput export" in note
    (note,) = notes(run_of(nonzeros=1000, bytes=500))
    assert "1.25 times the order-0 entropy" in note


def test_missing_artifacts_are_told(make_run: Any) -> None:
    home = make_run()
    (home / "stages" / "0-train.safetensors").unlink()
    assert any("no longer in the run directory: train" in note for note in notes(read_run(home)))


def test_removed_blocks_are_told_and_their_layers_are_not_thinner(make_run: Any) -> None:
    home = make_run()

    def change(where: str, what: str, before: Any, after: Any) -> dict[str, Any]:
        return {"where": where, "what": what, "before": before, "after": after,
                "method": "structured_sparsity", "note": ""}  # fmt: skip

    thinner = [change(name, "channels", 16, 8) for name in ("a.1.conv", "a.10.conv", "head")]
    removed = change("a.1", "block", "4,672 parameters", "removed")
    (home / "changes.json").write_text(json.dumps([thinner, [removed]]))
    run = read_run(home)
    assert run.widths == {"a.10.conv": (16, 8), "head": (16, 8)}
    assert run.removed == {"a.1": "4,672 parameters"}
    assert "Whole blocks were removed: a.1 (4,672 parameters)." in notes(run)
