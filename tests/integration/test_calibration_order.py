"""What a stage calibrates on depends on the run's seed, not on what was read before in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lilliput
from lilliput import Stage, Task, Train, compress
from lilliput.core import registry

TEACHER = Stage(name="teacher", train=Train(epochs=2))


class Killed:
    """A watcher that ends the process, so to say, behind a stage."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def stage_ends(self, record: dict[str, Any]) -> None:
        if record["name"] == self.stage:
            raise KeyboardInterrupt

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: None


def network(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return lilliput.build("mlp", hidden=[16], **settings)


def state(result: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in result.model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_run_killed_between_stages_calibrates_on_the_same_batches(tmp_path: Path) -> None:
    student = Stage(
        model={"architecture": "tree_ensemble", "outputs": 1, "features": 10, "trees": 5},
        methods=[{"method": "transparent", "teacher": "teacher", "samples": 100}],
    )

    def go(home: Path, *watchers: Any) -> Any:
        table = registry.load("task", "diabetes")()
        return compress(
            network(inputs=10, classes=1),
            table,
            [TEACHER, student],
            directory=home,
            watchers=watchers,
        )

    undisturbed = state(go(tmp_path / "undisturbed"))
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "killed", Killed("teacher"))
    assert equal(state(go(tmp_path / "killed")), undisturbed)


@pytest.mark.parametrize("method", ["thinet", "apoz"])
def test_a_task_that_was_read_before_is_calibrated_alike(method: str, tmp_path: Path) -> None:
    def go(home: Path, task: Task) -> Any:
        pruned = Stage(methods=[{"method": method, "keep": 0.5, "round_to": 1, "samples": 64}])
        return compress(network(inputs=64), task, [pruned], directory=home)

    fresh, used = (registry.load("task", "digits")() for _ in range(2))
    used.train.reshuffle(12345)  # as another run's last epoch leaves it
    assert equal(state(go(tmp_path / "fresh", fresh)), state(go(tmp_path / "used", used)))
