"""A run that distils features: ``python feature_driver.py METHOD DIRECTORY``, also under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.method import Method
from lilliput.engine import distributed
from lilliput.methods import GradientAttention, Hint, NeuronSelection

METHODS: dict[str, Method] = {
    "hint": Hint(pairs={"1": "3"}),
    "gradient_attention": GradientAttention(beta=4.0),
    "neuron_selection": NeuronSelection(pairs={"3": "3"}, count=7, hard_weight=1.0),
}


def network(width: int) -> nn.Module:
    """No dropout and no statistics over the batch, so that shares of batches come to the same."""
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )


def run(method: str, directory: Path) -> None:
    """A student of eight learns from a teacher of sixteen."""
    distributed.start("cpu")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 12, generator=generator)
    labels = (inputs @ torch.randn(12, 3, generator=generator)).argmax(1)
    batches = list(zip(inputs.split(32), labels.split(32), strict=True))
    task = lilliput.Task(batches, batches, batches, nn.functional.cross_entropy, lilliput.accuracy)
    train = Train(epochs=4, lr=0.05, optimizer="sgd", momentum=0.9)
    stage = Stage(model=network(8), methods=[METHODS[method]], train=train)
    lilliput.compress(network(16), task, [stage], directory=directory)
    distributed.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Path(sys.argv[2]))
