"""How a sparsity is spread over layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.select import select
from lilliput.errors import InputError
from lilliput.measure import layer_energies
from lilliput.measure.sensitivity import sensitivity
from lilliput.methods import EnergyAware, Gradual, Magnitude, Surgeon, TargetedDropout
from lilliput.methods.prune._allocation import equal_loss, erdos_renyi
from lilliput.testing import NETWORKS

SHAPES = st.lists(
    st.lists(st.integers(1, 200), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8
)


@given(SHAPES, st.floats(0.0, 0.99))
def test_erdos_renyi_reaches_the_total(shapes: list[tuple[int, ...]], sparsity: float) -> None:
    """The total is right, and of two layers that are not whole the densities are as the formula says."""
    found = erdos_renyi(shapes, sparsity)
    sizes = [torch.tensor(shape).prod().item() for shape in shapes]
    zeros = sum(s * n for s, n in zip(found, sizes, strict=True))
    assert zeros == pytest.approx(sparsity * sum(sizes), rel=1e-6, abs=1e-6)
    assert all(-1e-9 <= s < 1 for s in found)
    scales = [
        (1 - s) / (sum(shape) / n)
        for s, shape, n in zip(found, shapes, sizes, strict=True)
        if s > 1e-9
    ]
    assert all(scale == pytest.approx(scales[0]) for scale in scales)


def test_erdos_renyi_by_hand() -> None:
    """LeNet-5's shapes at 90 %: raw densities 0.0620, 0.0032, 0.001625, 0.102, all times one factor."""
    shapes = [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)]
    raw = torch.tensor([31 / 500, 80 / 25000, 1300 / 400000, 510 / 5000])
    sizes = torch.tensor([500.0, 25000.0, 400000.0, 5000.0])
    # The first and the last layer would be denser than 1, and stay whole.
    left = 0.1 * sizes.sum() - 5500
    scale = left / (raw[1:3] * sizes[1:3]).sum()
    expected = [0.0, 1 - float(raw[1] * scale), 1 - float(raw[2] * scale), 0.0]
    assert erdos_renyi(shapes, 0.9) == pytest.approx(expected, abs=1e-6)


LOSSES = st.lists(st.lists(st.floats(0, 50), min_size=3, max_size=3), min_size=2, max_size=5)


@given(LOSSES, st.floats(0.01, 0.97))
def test_equal_loss_reaches_the_total(losses: list[list[float]], sparsity: float) -> None:
    sizes = [10 * (n + 1) for n in range(len(losses))]
    found = equal_loss(sizes, [0.5, 0.9, 0.98], losses, sparsity)
    total = sum(n * s for n, s in zip(sizes, found, strict=True)) / sum(sizes)
    # A curve that rises at once from a flat part lets the total jump; it never falls short.
    assert total == pytest.approx(sparsity, abs=0.02) or total > sparsity
    assert all(0 <= s < 1 for s in found)


class Net(nn.Module):
    """A convolution on large maps, of large weights, and two linear layers of which one hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.main = nn.Linear(4 * 64, 8)
        self.side = nn.Linear(4 * 64, 8)
        with torch.no_grad():
            self.conv.weight.mul_(10.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(images)).flatten(1)
        return self.main(x) + 1e-3 * self.side(x)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def task(net: nn.Module) -> Task:
    """What the network itself says is right."""
    x = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        batches = list(zip(x.split(64), net(x).argmax(1).split(64), strict=True))
    return Task(batches, batches, batches, nn.functional.cross_entropy, lilliput.accuracy)


def sparsities(net: nn.Module, method: Any) -> dict[str, float]:
    stage = Stage(methods=[method], train=Train(epochs=0))
    model = lilliput.compress(net, task(net), [stage]).model
    return {w.layer: 1 - int(w.value.count_nonzero()) / w.value.numel() for w in select(model)}


METHODS = [
    lambda **s: Magnitude(sparsity=0.7, remove_dead=False, **s),
    lambda **s: Gradual(sparsity=0.7, remove_dead=False, **s),
    lambda **s: TargetedDropout(sparsity=0.7, remove_dead=False, **s),
    lambda **s: Surgeon(sparsity=0.7, remove_dead=False, samples=256, **s),
    lambda **s: EnergyAware(sparsity=0.7, remove_dead=False, **s),
]


@pytest.mark.parametrize("allocation", ["uniform", "magnitude", "erk", "sensitivity", "energy"])
@pytest.mark.parametrize("make", METHODS)
def test_any_method_takes_any_allocation(net: nn.Module, make: Any, allocation: str) -> None:
    found = sparsities(net, make(allocation=allocation))
    sizes = {w.layer: w.value.numel() for w in select(net)}
    total = sum(found[n] * sizes[n] for n in sizes) / sum(sizes.values())
    rounding = 0.02 if make in METHODS[2:] else 1e-3  # a filter's share is rounded by itself
    assert total == pytest.approx(0.7, abs=rounding)


def test_what_each_allocation_spares(net: nn.Module) -> None:
    found = {
        name: sparsities(net, Magnitude(sparsity=0.7, remove_dead=False, allocation=name))
        for name in ("uniform", "magnitude", "erk", "sensitivity", "energy")
    }
    assert found["uniform"]["conv"] == pytest.approx(0.7, abs=0.02)
    assert found["magnitude"]["conv"] < 0.1  # its weights are ten times as large
    assert found["erk"]["conv"] < 0.5 < found["erk"]["main"]  # it is small
    assert found["sensitivity"]["side"] > found["sensitivity"]["main"]
    energy = layer_energies(net, torch.randn(1, 1, 8, 8))
    assert energy["conv"] / 36 > energy["main"] / 2048
    assert found["energy"]["conv"] > found["energy"]["main"]


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="give one number"):
        Magnitude(sparsity={"*": 0.5}, allocation="erk")
    with pytest.raises(InputError, match="leave allocation out"):
        Magnitude(sparsity=0.5, scope="global", allocation="erk")
    with pytest.raises(InputError, match="ranks all layers together"):
        Surgeon(sparsity=0.5, curvature="network", allocation="erk")


@pytest.mark.parametrize(
    "wrong", [{"sparsities": [1.0]}, {"bits": [0]}, {"limit": 0}], ids=lambda w: next(iter(w))
)
def test_a_scan_refuses_what_it_cannot_do(wrong: dict[str, Any]) -> None:
    network = NETWORKS[0]
    with pytest.raises(InputError, match="sensitivity"):
        sensitivity(network.build(), network.task(), **wrong)
