"""A run that cuts channels while it trains: ``python thin_driver.py DIRECTORY``, also under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.method import Method
from lilliput.core.run import Run
from lilliput.core.types import Change
from lilliput.engine import distributed
from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.surgery import cut


class TwoCuts(Method):
    """Takes three channels away after the third and after the ninth step."""

    family: ClassVar[str] = "prune"

    def after_step(self, run: Run) -> None:
        """Cut, with the state of the optimizer."""
        if run.step in (3, 9):
            x = torch.zeros(4, 12)
            removal = {0: np.array([0, run.step]), 1: np.array([2])}
            cut(run.model, find_groups(run.model, x), removal, inputs=x, optimizer=run.optimizer)

    def finish(self, run: Run) -> list[Change]:
        """Something changed."""
        return [Change("everywhere", "channels", 40, 34)]


def run(directory: Path) -> None:
    """No dropout and no statistics over the batch, so that shares of batches come to the same."""
    distributed.start("cpu")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    inputs = torch.randn(128, 12, generator=generator)
    labels = (inputs @ torch.randn(12, 3, generator=generator)).argmax(1)
    batches = list(zip(inputs.split(32), labels.split(32), strict=True))
    task = lilliput.Task(batches, batches, batches, nn.functional.cross_entropy, lilliput.accuracy)
    train = Train(epochs=4, lr=0.1, optimizer="sgd", momentum=0.9)
    lilliput.compress(net, task, [Stage(methods=[TwoCuts()], train=train)], directory=directory)
    distributed.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
