"""What only a process of its own can show: start-up time, signals, pipes, tracebacks."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _typed import TINY, environment, process, typed


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def _seconds(*arguments: str) -> float:
    """Of the processor: other processes at the same time hardly change it."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, *arguments]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start


def test_help_and_list_take_less_than_a_tenth_of_importing_torch() -> None:
    torch = _seconds("-c", "import torch")
    for argument in ("--help", "list"):
        assert min(_seconds("-m", "lilliput", argument) for _ in range(3)) < 0.1 * torch


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["list", "--json"], ["show", "digits_deep_compression"], ["lst"], ["--version"]],
    ids=" ".join,
)
def test_torch_is_not_imported(arguments: list[str]) -> None:
    code = (
        "import sys; from lilliput.cli import main; main(sys.argv[1:]); "
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments]
    assert subprocess.run(command, env=environment(), capture_output=True).returncode == 0


def test_exit_codes_reach_the_shell(tmp_path: Path) -> None:
    assert process("list", "tasks").code == 0
    answer = process("run", "nothing.yaml", cwd=tmp_path)
    assert answer.code == 2
    assert answer.out == ""
    assert "nothing.yaml" in answer.err
    assert "Traceback" not in answer.err


def test_a_traceback_for_those_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_TRACEBACK", "1")
    answer = typed("run", tmp_path / "nothing.yaml")
    assert answer.code == 2
    assert "Traceback" in answer.err


def test_a_pipe_that_closes_early_is_no_error() -> None:
    readable, writable = os.pipe()
    os.close(readable)
    command = [sys.executable, "-m", "lilliput", "list"]
    done = subprocess.run(
        command, env=environment(), stdout=writable, stderr=subprocess.PIPE, text=True
    )
    os.close(writable)
    assert done.stderr == ""


def test_interrupted_and_continued(recipe: Path, tmp_path: Path) -> None:
    """Ctrl-C ends a run with 130 and a hint; meanwhile the directory is locked for others."""
    home = tmp_path / "run"
    arguments = ["run", recipe, "stages.0.train.epochs=50000", "--directory", home]
    running = subprocess.Popen(
        [sys.executable, "-m", "lilliput", *map(str, arguments)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = home / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = typed(*arguments, "--json")
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert (second.code, second.json["error"]) == (1, "RunConflict")
    assert running.returncode == 130
    assert "same command again" in said
    assert "Traceback" not in said
    assert not (home / "result.json").exists()
