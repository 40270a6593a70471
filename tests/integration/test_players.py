"""Networks that train beside the student train as the stage says."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lilliput import Stage, Task, Train, compress
from lilliput.core.run import Run
from lilliput.core.task import accuracy
from lilliput.engine.progress import Watcher
from lilliput.methods import Mutual

CLIP = 1e-3


class Moved(Watcher):
    """How far each network moved in the only step, and how its weights lie in memory."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.norms: dict[str, float] = {}
        self.channels_last: list[bool] = []

    def stage_begins(self, run: Run, stage: Stage) -> None:
        self.before = {name: flat(network) for name, network in networks(run).items()}

    def step_done(self, run: Run) -> None:
        for name, network in networks(run).items():
            self.norms[name] = float((flat(network) - self.before[name]).norm())
            weight: Any = network.get_parameter("0.weight")
            self.channels_last.append(weight.is_contiguous(memory_format=torch.channels_last))


def networks(run: Run) -> dict[str, nn.Module]:
    return {"student": run.model, **{name: p.network for name, p in run.players.items()}}


def flat(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def one_step(**train: Any) -> Moved:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    batch = (10 * torch.randn(8, 2, 4, 4), torch.arange(8) % 3)
    task = Task([batch], [batch], None, loss=nn.functional.cross_entropy, score=accuracy)
    moved = Moved()
    settings = Train(epochs=1, optimizer="sgd", lr=1.0, momentum=0.0, **train)
    compress(model, task, [Stage(methods=[Mutual(peers=2)], train=settings)], watchers=[moved])
    assert len(moved.norms) == 3
    return moved


def test_gradients_of_all_networks_are_clipped() -> None:
    assert min(one_step().norms.values()) > 2 * CLIP
    for norm in one_step(clip=CLIP).norms.values():
        assert abs(norm - CLIP) < 1e-2 * CLIP


def test_all_networks_lie_with_the_channels_last() -> None:
    assert not any(one_step().channels_last)
    assert all(one_step(channels_last=True).channels_last)
