"""What all long benchmarks rest on: rows that are kept one by one, and runs that are read again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import rows  # noqa: E402

from lilliput import Stage, Train  # noqa: E402
from lilliput.engine.precision import fast_precision  # noqa: E402
from lilliput.errors import InputError  # noqa: E402
from lilliput.testing import NETWORKS  # noqa: E402

MLP, *_ = NETWORKS
PRECISION = fast_precision(torch.device("cpu"))


def square(job: rows.Row) -> rows.Row:
    if job["n"] == 13:
        raise InputError("no luck")
    if job["n"] == 14:
        raise ZeroDivisionError("a bug of the benchmark")
    return {"squared": job["n"] ** 2}


def told(capsys: Any) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_rows_are_done_once(tmp_path: Path, capsys: Any) -> None:
    table = rows.Rows(tmp_path / "table.json", images=7)
    table.run([{"n": 2}, {"n": 3}], square)
    assert len(told(capsys)) == 2
    table.run([{"n": 2}, {"n": 3}, {"n": 4}], square)
    assert told(capsys) == [f"n 4, squared 16, auto_precision {PRECISION}"]
    assert sorted(row["squared"] for row in table.read()) == [4, 9, 16]
    assert json.loads((tmp_path / "table.json").read_text())["images"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_row_that_fails_is_told_and_the_others_are_done(tmp_path: Path, capsys: Any) -> None:
    table = rows.Rows(tmp_path / "table.json")
    table.run([{"n": 13}, {"n": 14}, {"n": 5}], square)
    lines = told(capsys)
    assert "n 13, failed InputError: no luck" in lines
    assert "n 14, failed ZeroDivisionError: a bug of the benchmark" in lines
    assert table.read() == [{"n": 5, "squared": 25, "auto_precision": PRECISION}]


def begin(seed: int, work: Path) -> None:
    (work / f"begun {seed}").touch()


def begun(job: rows.Row, work: Path) -> rows.Row:
    return {"begun": (work / f"begun {job['seed']}").exists()}


def test_every_seed_begins_and_then_does_what_is_asked_for(tmp_path: Path) -> None:
    arguments = ["--seeds", "3", "4", "--only", "ab", "--work", str(tmp_path)]
    table = rows.Rows(tmp_path / "table.json")
    jobs = [{"row": "cab"}, {"row": "other"}, {"row": "ab, too"}]
    table.run_seeds(rows.parser("").parse_args(arguments), jobs, begun, first=begin)
    found = [(row["seed"], row["row"], row["begun"]) for row in table.read()]
    assert sorted(found) == [(seed, row, True) for seed in (3, 4) for row in ("ab, too", "cab")]


def test_a_finished_run_is_read_and_not_done_again(tmp_path: Path) -> None:
    def train() -> rows.Trained:
        stage = Stage(train=Train(epochs=1, lr=0.01))
        return rows.trained(
            rows.seeded(MLP.build, 3), MLP.task(), [stage], directory=tmp_path / "run", seed=3
        )

    first = train()
    written = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    second = train()
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == written
    assert second.figures["score"] == first.figures["score"]
    states = (first.model.state_dict(), second.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_networks_of_a_seed_are_alike_and_leave_the_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, other = (next(rows.seeded(MLP.build, 5).parameters()) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.rand(3), expected)


def test_spread_of_one_value_says_so() -> None:
    assert rows.spread([1.0]) == "1.00 (one seed)"
    assert rows.spread([1.0, 3.0], 1) == "2.0 ± 1.4"


@pytest.mark.parametrize(
    ("program", "settings"),
    [
        ("channels", ["resnet20"]),
        ("transparent", []),
        ("distillation", ["fashion_mnist"]),
    ],
)
def test_committed_results_print_as_a_table(
    program: str, settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    module = __import__(program)
    monkeypatch.setattr(sys, "argv", [program, *settings, "--table"])
    module.main()
    lines = told(capsys)
    assert lines[0].startswith("| row |")
    assert len(lines) > 5
    assert len({line.count("|") for line in lines}) == 1
