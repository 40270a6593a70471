"""Reading run directories: finished ones, moved ones, and all that are neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lilliput.errors import InputError
from lilliput.report import read_run, read_runs


def test_reads_all_files(make_run: Any) -> None:
    run = read_run(make_run())
    assert run.name == "tiny"
    assert [stage["name"] for stage in run.stages] == ["train", "cluster"]
    assert len(run.metrics) == 6
    assert run.changes[1][0]["after"] == 4
    assert run.sensitivity is None
    assert run.codebook_bytes(0) == {}
    assert list(run.codebook_bytes(1)) == ["fc.weight"]


def test_a_moved_run_finds_its_artifacts(make_run: Any, tmp_path: Path) -> None:
    home = make_run()
    result = json.loads((home / "result.json").read_text())
    result["stages"][1]["artifact"] = "/elsewhere/stages/1-cluster.safetensors"
    (home / "result.json").write_text(json.dumps(result))
    moved = home.rename(tmp_path / "moved")
    assert read_run(moved).artifact(1) == moved / "stages" / "1-cluster.safetensors"


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no directory"):
        read_run(tmp_path / "absent")
    with pytest.raises(InputError, match=r"is no run directory: resolved\.json"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="no run directory is given"):
        read_runs([])


def test_an_unfinished_run_says_how_to_go_on(make_run: Any) -> None:
    home = make_run()
    (home / "result.json").unlink()
    with pytest.raises(InputError, match=r"not finished: result\.json missing.*same"):
        read_run(home)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("result.json", "{", r"result\.json is not JSON"),
        ("result.json", "[]", r"result\.json holds a list"),
        ("result.json", '{"score": 1}', r"result\.json lacks baseline_score, bytes"),
        ("environment.json", "3", r"environment\.json holds a int"),
        ("metrics.jsonl", '{"stage": 0, "epoch": 1}\n{"sta', r"metrics\.jsonl:2 is not JSON"),
        ("metrics.jsonl", '{"stage": 0}\n', r"metrics\.jsonl lacks 1\.epoch"),
        ("sensitivity.json", '{"rows": []}', r"sensitivity\.json lacks baseline, score_name"),
        (
            "sensitivity.json",
            '{"baseline": 1, "score_name": "s", "rows": [{"layer": "a"}]}',
            r"lacks rows\.0\.amount",
        ),
    ],
)
def test_damaged_files_are_named(make_run: Any, file: str, text: str, message: str) -> None:
    home = make_run()
    (home / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read_run(home)


def test_a_stage_without_figures_is_named(make_run: Any) -> None:
    with pytest.raises(InputError, match=r"lacks stages\.0\.artifact"):
        read_run(make_run(stages=[{"name": "train"}]))
    with pytest.raises(InputError, match="at least one stage"):
        read_run(make_run("other", stages=[]))


def test_bytes_that_are_not_text(make_run: Any) -> None:
    home = make_run()
    (home / "changes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"changes\.json cannot be read"):
        read_run(home)


def test_names_of_several_runs_differ(make_run: Any) -> None:
    runs = read_runs([make_run("a"), make_run("b"), make_run("c", name="big")])
    assert [run.name for run in runs] == ["tiny (a)", "tiny (b)", "big"]
