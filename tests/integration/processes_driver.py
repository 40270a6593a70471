"""Runs that one process and several must bring to the same end: ``python processes_driver.py DIRECTORY``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

import lilliput
from lilliput import Stage, Train
from lilliput.cli import main
from lilliput.core.method import Method
from lilliput.core.run import Run
from lilliput.core.types import Change
from lilliput.engine import distributed
from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.surgery import cut
from lilliput.methods import GradientAttention, Hint, NeuronSelection


class TwoCuts(Method):
    """Takes two channels of one layer and one of the next away, after the third and the ninth step."""

    family: ClassVar[str] = "prune"

    def after_step(self, run: Run) -> None:
        """Cut, with the state of the optimizer."""
        if run.step in (3, 9):
            x = torch.zeros(4, 12)
            removal = {0: np.array([0, run.step]), 1: np.array([2])}
            cut(run.model, find_groups(run.model, x), removal, inputs=x, optimizer=run.optimizer)

    def finish(self, run: Run) -> list[Change]:
        """Something changed."""
        return [Change("everywhere", "channels", 32, 26)]


# Features are learnt by a narrow student from the network that the run begins with.
METHODS: dict[str, tuple[Method, int | None]] = {
    "two_cuts": (TwoCuts(), None),
    "hint": (Hint(pairs={"1": "3"}), 8),
    "gradient_attention": (GradientAttention(beta=4.0), 8),
    "neuron_selection": (NeuronSelection(pairs={"3": "3"}, count=7, hard_weight=1.0), 8),
}


def network(width: int) -> nn.Module:
    """No dropout and no statistics over the batch, so that shares of batches come to the same."""
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )


def run(method: Method, width: int | None, directory: Path) -> None:
    """One stage of sixteen steps."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 12, generator=generator)
    labels = (inputs @ torch.randn(12, 3, generator=generator)).argmax(1)
    batches = list(zip(inputs.split(32), labels.split(32), strict=True))
    task = lilliput.Task(batches, batches, batches, nn.functional.cross_entropy, lilliput.accuracy)
    train = Train(epochs=4, lr=0.05, optimizer="sgd", momentum=0.9)
    student = None if width is None else network(width)
    stage = Stage(model=student, methods=[method], train=train)
    lilliput.compress(network(16), task, [stage], directory=directory)


def run_all(directory: Path) -> None:
    """Each method in a directory of its name."""
    for name, (method, width) in METHODS.items():
        run(method, width, directory / name)


RECIPE = """\
task: {name: digits, limit: 256}
model: digits_cnn
threads: 1
stages:
  - methods: [{method: magnitude, sparsity: 0.5}]
    train: {epochs: 1}
"""


def command_line(home: Path) -> int:
    """``lilliput run`` on a recipe, in a directory ``typed``."""
    recipe = home / f"tiny-{distributed.rank()}.yaml"
    recipe.write_text(RECIPE)
    return main(["run", str(recipe), "--directory", str(home / "typed"), "--no-report"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu")
    run_all(Path(sys.argv[1]))
    sys.exit(command_line(Path(sys.argv[1])))
