"""A resumed optimizer goes on as if nothing had been, however its parameters lie in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lilliput
from lilliput import Stage, Train
from lilliput.engine.optim import load_optimizer
from lilliput.testing import NETWORKS
from lilliput.testing.contract import Interruption

_, CNN, _ = NETWORKS


def laid_out(kind: str) -> nn.Parameter:
    weight = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    if kind == "transposed":
        return nn.Parameter(weight.transpose(0, 1).contiguous().transpose(0, 1))
    return nn.Parameter(weight.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("kind", ["transposed", "channels last"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_fused_optimizer_meets_its_own_entries_again(optimizer: Any, kind: str) -> None:
    settings = {"lr": 0.01, "fused": True}
    settings |= {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steps = torch.randn(4, 8, 6, 3, 3, generator=torch.Generator().manual_seed(1))

    def train(parameter: nn.Parameter, by: Any, gradients: torch.Tensor) -> None:
        for gradient in gradients:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            by.step()

    whole, parted = laid_out(kind), laid_out(kind)
    train(whole, optimizer([whole], **settings), steps)
    first = optimizer([parted], **settings)
    train(parted, first, steps[:2])
    saved = first.state_dict()  # as a checkpoint has it
    saved["state"] = {0: {k: v.contiguous().clone() for k, v in saved["state"][0].items()}}
    second = optimizer([parted], **settings)
    load_optimizer(second, saved)
    train(parted, second, steps[2:])
    assert torch.equal(parted, whole)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_with_channels_last_resumes_to_the_same_end(optimizer: str, tmp_path: Path) -> None:
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    train = Train(
        epochs=3,
        lr=0.01,
        optimizer=optimizer,
        channels_last=True,
        checkpoint_minutes=1e-9,
        **momentum,
    )

    def go(name: str, *watchers: Any) -> Any:
        return lilliput.compress(
            CNN.build(),
            CNN.task(),
            [Stage(train=train)],
            directory=tmp_path / name,
            watchers=watchers,
        )

    whole = go("whole").model.state_dict()
    with pytest.raises(KeyboardInterrupt):
        go("parted", Interruption(5))
    parted = go("parted").model.state_dict()
    assert all(torch.equal(parted[name], tensor) for name, tensor in whole.items())
