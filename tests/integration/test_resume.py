"""``kill -9`` at any moment, then the same again: as if nothing had been.

The processes are real; ``resume_driver.py`` is the program that they run. They are forked from one that has
imported torch, which takes longer than all that they do.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import resume_driver
import torch

PROCESSES = multiprocessing.get_context("forkserver")
# An optimizer's first step imports the second, which takes as long as all the rest.
PROCESSES.set_forkserver_preload(["lilliput.testing", "torch._dynamo"])
MOMENTS = (
    "inside 0 3",
    "inside 1 7",
    "between",
    "before forgetting",
    "writing 1-codebook.safetensors",
    "writing model.safetensors",
    "writing inside.safetensors",
)


def start(directory: Path, moment: str = "") -> int:
    process = PROCESSES.Process(target=resume_driver.main, args=(directory, moment))
    process.start()
    process.join(timeout=120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start(directory) == 0
    return directory


@pytest.fixture(scope="module", params=MOMENTS)
def resumed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The directory of a run that was killed, and then gone on with in this process."""
    directory = tmp_path_factory.mktemp("killed") / "run"
    assert start(directory, request.param) == -signal.SIGKILL
    assert not (directory / "result.json").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    resume_driver.run(directory)
    yield directory
    torch.set_num_threads(threads)


def figures(directory: Path) -> Any:
    """What ``result.json`` says, without the places and the times."""

    def timeless(node: Any) -> Any:
        if isinstance(node, dict):
            kept = {k: v for k, v in node.items() if k not in ("latency_ratio", "artifact", "run")}
            return {k: timeless(v) for k, v in kept.items()}
        return [timeless(v) for v in node] if isinstance(node, list) else node

    return timeless(json.loads((directory / "result.json").read_text()))


def test_killed_and_started_again(resumed: Path, undisturbed: Path) -> None:
    for pattern in ("metrics.jsonl", "changes.json", "model.safetensors", "stages/*.safetensors"):
        expected = sorted(undisturbed.glob(pattern))
        assert expected
        for file in expected:
            found = resumed / file.relative_to(undisturbed)
            assert found.read_bytes() == file.read_bytes(), found.name
    assert figures(resumed) == figures(undisturbed)


def test_a_kill_leaves_no_litter_behind(resumed: Path, undisturbed: Path) -> None:
    """What the killed process half wrote is gone once the run has ended."""

    def files(root: Path) -> set[str]:
        return {str(p.relative_to(root)) for p in root.rglob("*")}

    assert files(resumed) == files(undisturbed)


def test_finished_run_is_not_done_again(undisturbed: Path) -> None:
    """The same command on a finished run, in a process of its own, leaves the same files."""
    before = {p: p.read_bytes() for p in undisturbed.rglob("*.safetensors")}
    metrics = (undisturbed / "metrics.jsonl").read_bytes()
    assert start(undisturbed) == 0
    assert {p: p.read_bytes() for p in undisturbed.rglob("*.safetensors")} == before
    assert (undisturbed / "metrics.jsonl").read_bytes() == metrics
