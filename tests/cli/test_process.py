"""What only a process of its own can show: start-up time, signals, pipes, tracebacks."""

from __future__ import annotations

import os
import signal
import statistics
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
    start = time.perf_counter()
    command = [sys.executable, *arguments]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    return time.perf_counter() - start


def test_help_and_list_take_less_than_a_tenth_of_importing_torch() -> None:
    ratios: dict[str, list[float]] = {"--help": [], "list": []}
    for _ in range(3):
        torch = _seconds("-c", "import torch")
        for argument, found in ratios.items():
            found.append(_seconds("-m", "lilliput", argument) / torch)
    assert {a: r for a, r in ratios.items() if statistics.median(r) >= 0.1} == {}


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
    traced = process("run", "nothing.yaml", cwd=tmp_path, LILLIPUT_TRACEBACK="1")
    assert traced.code == 2
    assert "Traceback" in traced.err


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
    arguments = ["run", recipe, "stages.0.train.epochs=500", "--directory", home]
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


def test_two_processes_under_torchrun_print_one_result(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    verb = ["-m", "lilliput", "run", str(recipe), "--directory", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, *verb, "--no-report"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compressed file") == 1
