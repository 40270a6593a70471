"""Constants of removed channels: where folding is exact, where approximate, where it must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lilliput.mechanisms.folding import Folding, fold_constants, shift_of
from lilliput.mechanisms.groups import Groups, find_groups
from lilliput.mechanisms.surgery import cut


def fold_and_cut(
    net: nn.Module, x: Tensor, removal: dict[int, Any], batches: list[Tensor] | None = None
) -> Folding:
    groups = find_groups(net, x)
    gone = {number: np.array(channels) for number, channels in removal.items()}
    folding = fold_constants(net, groups, gone, batches or [x])
    cut(net, groups, gone, inputs=x, edit=folding.apply)
    return folding


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def outputs(net: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = net.eval()(x)
    return out


@torch.no_grad()
def make_constant(layer: Any, channels: list[int], value: float) -> None:
    layer.weight[channels] = 0
    layer.bias[channels] = value


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (1, 6)),
        (nn.Conv1d(6, 4, 3, bias=False), (1, 6, 3)),
        (nn.Conv2d(6, 4, (3, 2), stride=2), (1, 6, 3, 2)),
        (nn.Conv2d(6, 4, 3, groups=2, dilation=2), (1, 6, 5, 5)),
        (nn.Conv3d(6, 4, 2), (1, 6, 2, 2, 2)),
    ],
    ids=str,
)
def test_shift_is_what_the_layer_makes_of_constants(layer: Any, shape: tuple[int, ...]) -> None:
    constants = torch.randn(6)
    image = constants.view(-1, *[1] * (len(shape) - 2)).expand(shape)
    bias = 0 if layer.bias is None else layer(torch.zeros(shape))
    torch.testing.assert_close(shift_of(layer, constants), (layer(image) - bias).flatten())


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
    ).double()


def valid_cnn(bias: bool) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 4, 3),
    ).double()  # fmt: skip
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
    return net


def test_linear_layers_are_exact() -> None:
    net, x = mlp(), torch.randn(16, 5).double()
    make_constant(net[0], [1, 4], 0.7)
    make_constant(net[2], [0], 2.0)
    before = outputs(net, x)
    folding = fold_and_cut(net, x, {0: [1, 4], 1: [0]})
    assert relative(outputs(net, x), before) < 1e-12
    assert folding.folded == {"2.bias": 2, "4.bias": 1}
    assert not folding.notes


def test_without_folding_the_constants_are_missing() -> None:
    net, x = mlp(), torch.randn(16, 5).double()
    make_constant(net[0], [1, 4], 0.7)
    before = outputs(net, x)
    cut(net, find_groups(net, x), {0: np.array([1, 4])}, inputs=x)
    assert relative(outputs(net, x), before) > 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_dead_scales_go_without_a_trace(bias: bool) -> None:
    """As after slimming: a scale of zero leaves the shift, through ReLU, and through both layers."""
    net, x = valid_cnn(bias), torch.randn(8, 3, 6, 6).double()
    with torch.no_grad():
        net[1].weight[[0, 3]] = 0
        net[1].bias[[0, 3]] = torch.tensor([0.5, -0.5]).double()  # the second is cut off by ReLU
        net[4].weight[[2]] = 0
        net[4].bias[[2]] = 1.0
    before = outputs(net, x)
    folding = fold_and_cut(net, x, {0: [0, 3], 1: [2]})
    assert relative(outputs(net, x), before) < 1e-12
    behind = "3.bias" if bias else "4.running_mean"
    assert folding.folded == {behind: 1, "7.bias": 4}  # each pixel is an input of its own


def test_zero_padding_is_said_and_right_inside() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).double()
    x = torch.randn(4, 3, 7, 7).double()
    make_constant(net[0], [2], 1.0)
    before = outputs(net, x)
    folding = fold_and_cut(net, x, {0: [2]})
    after = outputs(net, x)
    assert relative(after[..., 1:-1, 1:-1], before[..., 1:-1, 1:-1]) < 1e-12
    assert relative(after, before) > 1e-4
    assert "approximate" in folding.notes["2"]


@pytest.mark.parametrize("mode", ["replicate", "circular", "reflect"])
def test_other_padding_is_exact(mode: Any) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode)
    ).double()
    x = torch.randn(4, 3, 7, 7).double()
    make_constant(net[0], [2], 1.0)
    before = outputs(net, x)
    assert not fold_and_cut(net, x, {0: [2]}).notes
    assert relative(outputs(net, x), before) < 1e-12


def test_a_layer_without_a_bias_says_so() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    make_constant(net[0], [1], 1.0)
    folding = fold_and_cut(net, torch.randn(4, 5), {0: [1]})
    assert not folding.shifts
    assert "no bias" in folding.notes["2"]


def _varying(net: Any) -> list[Tensor]:
    return [torch.randn(8, 5)]


def _zero(net: Any) -> list[Tensor]:
    make_constant(net[0], [1], -1.0)  # ReLU makes it zero
    return [torch.randn(8, 5)]


def _a_single_value(net: Any) -> list[Tensor]:
    return [torch.randn(1, 5)]  # constant, as everything that is seen once


@pytest.mark.parametrize("case", [_varying, _zero, _a_single_value])
def test_nothing_else_is_folded(case: Callable[[Any], list[Tensor]]) -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].bias += 5  # so that ReLU lets everything through
    batches = case(net)
    folding = fold_and_cut(net, torch.randn(4, 5), {0: [1]}, batches)
    assert not folding.shifts
    assert not folding.notes


def test_several_batches_are_looked_at_together() -> None:
    """A channel can be the same within each batch and differ between them."""
    net = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    batches = [torch.full((4, 5), 1.0), torch.full((4, 5), 2.0)]
    assert not fold_and_cut(net, torch.randn(4, 5), {0: [1]}, batches).shifts


class Twice(nn.Module):
    """One layer that is called on two activations: its bias cannot make up for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        out: Tensor = self.second(self.second(x).relu()).sum(1, keepdim=True)
        return out


def test_a_layer_that_is_called_twice_is_left_alone() -> None:
    net, x = Twice(), torch.randn(8, 5)
    groups = find_groups(net, x)
    number = next(n for n, g in enumerate(groups.groups) if "first" in g.layers)
    make_constant(net.first, [1], 1.0)
    make_constant(net.second, [1], 1.0)
    folding = fold_constants(net, groups, {number: np.array([1])}, [x])
    assert not folding.shifts


def test_looking_leaves_the_model_alone() -> None:
    net, x = valid_cnn(True).train(), torch.randn(8, 3, 6, 6).double()
    groups: Groups = find_groups(net, x)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fold_constants(net, groups, {0: np.array([0])}, [x])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(
        m.training and not m._forward_hooks and not m._forward_pre_hooks for m in net.modules()
    )
