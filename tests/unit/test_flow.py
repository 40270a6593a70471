"""Where the output of a layer goes, on networks made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.mechanisms.flow import Flow, flows

INF = math.inf
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Modules by name, and a function of them and the input."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(inputs: int = 3, outputs: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


def norm(width: int = 3) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width)


def found(net: nn.Module, x: Tensor = X) -> Any:
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return flows(net, layers, x)


def flow(net: nn.Module, layer: str = "a") -> Flow:
    result: Flow = found(net).layers[layer]
    return result


def test_convolution_normalization_rectifier_convolution() -> None:
    for relu in (nn.ReLU(), nn.ReLU(inplace=True)):
        net = Net(
            lambda n, x: n.b(n.relu(n.norm(n.a(x)))), a=conv(), norm=norm(), relu=relu, b=conv()
        )
        result = found(net)
        assert list(result.layers) == ["a", "b"]
        assert result.layers["a"] == Flow(
            norm="norm", readers=("b",), low=0.0, high=INF, place="relu"
        )
        assert result.layers["b"] == Flow(to_layers=False, low=-INF, high=INF, place="b")
        assert result.sums == {}


def test_pooling_by_maxima_leaves_integers_and_means_do_not() -> None:
    pool, head = nn.MaxPool2d(2), conv()
    largest = Net(lambda n, x: n.b(n.pool(n.a(x).relu())), a=conv(), pool=pool, b=head)
    assert flow(largest) == Flow(readers=("b",), low=0.0, high=INF, place="pool")
    mean = Net(lambda n, x: n.b(n.pool(n.relu(n.a(x)))), a=conv(), relu=nn.ReLU(), b=head)
    mean.pool = nn.AvgPool2d(2)
    assert flow(mean) == Flow(to_layers=False, low=0.0, high=INF, place="relu")


def test_a_mean_over_positions_reads_what_comes_from_the_rectifier() -> None:
    net = Net(
        lambda n, x: n.head(n.norm(n.a(x)).relu_().mean((2, 3))),
        a=conv(), norm=norm(), head=nn.Linear(3, 2),
    )  # fmt: skip
    expected = Flow("norm", (), False, 0.0, INF, "norm", (0.0, INF))
    assert flow(net) == expected


@pytest.mark.parametrize(
    ("clip", "limits"),
    [
        (nn.ReLU6(), (0.0, 6.0)),
        (nn.Hardtanh(-2.0, 3.0), (-2.0, 3.0)),
        (nn.Hardtanh(), (-1.0, 1.0)),
        (lambda x: x.clamp(min=0.5), (0.5, INF)),
        (lambda x: x.clamp(max=2.0), (-INF, 2.0)),
        (lambda x: x.clamp_max(2.0).relu(), (0.0, 2.0)),
        (lambda x: x.relu().clamp_min(-5.0), (0.0, INF)),
        (lambda x: x.clamp_(-1, 4).relu_(), (0.0, 4.0)),
        (lambda x: F.leaky_relu(x), None),
        (lambda x: x.clamp(x.mean(), x.mean() + 1), None),
        (lambda x: x.sigmoid(), None),
    ],
)
def test_limits(clip: Any, limits: tuple[float, float] | None) -> None:
    net = Net(lambda n, x: n.b(clip(n.a(x))), a=conv(), b=conv())
    result = flow(net)
    if limits is None:
        assert not result.to_layers
        assert (result.low, result.high, result.readers) == (-INF, INF, ())
    else:
        assert (result.low, result.high, result.limits) == (*limits, limits)
        assert result.to_layers
        assert result.readers == ("b",)


def shared_norm(n: Any, x: Tensor) -> Any:
    return n.norm(n.a(x)).relu(), n.norm(n.b(x)).sigmoid()


def two_ways(n: Any, x: Tensor) -> Any:
    y = n.norm(n.a(x))
    return n.b(y.relu()), y.clamp(-0.5, 0.5).mean()


LIMITED: tuple[Any, ...] = (
    lambda n, x: n.b(n.norm(n.a(x)).relu()).clamp(-1, 1) * 2,
    lambda n, x: F.relu6(n.a(x)).mean() + n.b(n.norm(x)),
    lambda n, x: n.b(n.norm(n.a(n.a(x).relu())).clamp_max(0.3)),
    two_ways,
    shared_norm,
)


@pytest.mark.parametrize("run", LIMITED)
def test_clipping_at_the_place_changes_nothing(run: Any) -> None:
    net = Net(run, a=conv(), b=conv(), norm=norm()).eval()
    expected = net(X)
    for each in found(net).layers.values():
        place = net.get_submodule(each.place)
        handle = place.register_forward_hook(lambda m, i, o, ends=each.limits: o.clamp(*ends))
        torch.testing.assert_close(net(X), expected, rtol=0, atol=0)
        handle.remove()


def test_a_module_behind_which_readers_look_needs_no_limits() -> None:
    net = Net(lambda n, x: n.relu6(n.a(x)).mean(), a=conv(), relu6=nn.ReLU6())
    result = flow(net)
    assert (result.place, result.limits) == ("relu6", (-INF, INF))
    assert (result.low, result.high) == (0.0, 6.0)


class Block(nn.Module):
    """A residual block, its sum made in one of several ways."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], inplace: bool) -> None:
        super().__init__()
        self.a, self.norm_a, self.b, self.norm_b = conv(), norm(), conv(), norm()
        self.relu, self.add = nn.ReLU(inplace), add

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm_b(self.b(self.relu(self.norm_a(self.a(x)))))
        result: Tensor = self.relu(self.add(out, x))
        return result


def in_place(out: Tensor, x: Tensor) -> Tensor:
    out += x
    return out


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("add", [torch.add, in_place, lambda out, x: x + out])
def test_residual_blocks(add: Any, inplace: bool) -> None:
    """The rectifier is called twice a block: the sum is what comes from the block, the rest from norms."""
    net = nn.Sequential(
        conv(), nn.Sequential(Block(add, inplace), Block(add, inplace)), conv(), nn.ReLU()
    )
    result = found(net)
    assert result.sums == {"1.0": ("1.1.a",), "1.1": ("2",)}
    for block in ("1.0", "1.1"):
        first, second = result.layers[f"{block}.a"], result.layers[f"{block}.b"]
        assert first == Flow(
            f"{block}.norm_a", (f"{block}.b",), True, 0.0, INF, f"{block}.norm_a", (0.0, INF)
        )
        assert second == Flow(
            f"{block}.norm_b", (), False, -INF, INF, f"{block}.norm_b", (-INF, INF)
        )
    stem = result.layers["0"]
    assert (stem.readers, stem.to_layers, stem.place) == (("1.0.a",), False, "0")


def test_a_sum_that_nobody_but_a_function_makes_has_no_place() -> None:
    net = Net(lambda n, x: n.b((n.a(x) + x).relu()), a=conv(), b=conv())
    assert found(net).sums == {}
    linear = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plain = Net(lambda n, x: n.body(x) + 1.0, body=linear)
    assert found(nn.Sequential(plain, nn.Linear(8, 2))).sums == {}  # no convolution made it


def test_who_read_a_tensor_before_a_sum_in_place_does_not_read_the_sum() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        y: Tensor = n.a(x)
        y += n.b(y)
        return y

    net = nn.Sequential(Net(run, a=conv(), b=conv()), conv())
    assert found(net).sums == {"0": ("1",)}


def test_a_constant_makes_no_sum() -> None:
    """The gate of a hard swish."""
    net = Net(lambda n, x: n.gate(n.a(x) + 3.0) / 6.0, a=conv(), gate=nn.ReLU6())
    assert found(net).sums == {}


def test_one_rectifier_for_several_layers_is_no_place() -> None:
    net = Net(lambda n, x: n.relu(n.b(n.relu(n.a(x)))).mean(), a=conv(), b=conv(), relu=nn.ReLU())
    assert flow(net, "a") == Flow(None, ("b",), True, 0.0, INF, "a", (0.0, INF))
    assert flow(net, "b") == Flow(None, (), False, 0.0, INF, "b", (0.0, INF))


def test_an_output_that_is_read_twice() -> None:
    """One reader comes behind a rectifier and one does not: whoever quantizes must keep both."""

    def run(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        result: Tensor = n.b(n.relu(y)) + y.sigmoid()
        return result

    net = Net(run, a=conv(), b=conv(), relu=nn.ReLU())
    assert flow(net) == Flow(None, ("b",), False, -INF, INF, "a", (-INF, INF))


def test_in_place_changes_what_later_readers_see() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        y.relu_()
        result: Tensor = n.b(y) + y
        return result

    net = Net(run, a=conv(), b=conv())
    assert flow(net) == Flow(None, ("b",), False, 0.0, INF, "a", (0.0, INF))

    def other(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        y.mul_(2.0)
        result: Tensor = n.b(y)
        return result

    assert flow(Net(other, a=conv(), b=conv())) == Flow(None, (), False, -INF, INF, "a")


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_normalization_is_not_the_layers_where_others_read_it_too(norm_first: bool) -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        kept = None if norm_first else n.b(y)
        normalized = n.norm(y)
        result: Tensor = n.c(normalized) + (n.b(y) if kept is None else kept)
        return result

    net = Net(run, a=conv(), b=conv(), c=conv(), norm=norm())
    result = flow(net)
    assert result.norm is None
    assert "b" in result.readers
    assert result.place == "a"


def test_two_normalizations_are_neither_of_them_the_layers() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        result: Tensor = n.b(n.norm_b(y).relu()) + n.c(n.norm_c(y).relu())
        return result

    net = Net(run, a=conv(), b=conv(), c=conv(), norm_b=norm(), norm_c=norm())
    assert flow(net).norm is None


def test_a_layer_that_is_called_by_keyword() -> None:
    net = Net(lambda n, x: n.b(input=n.a(x).relu()), a=conv(), b=conv())
    assert flow(net) == Flow(None, ("b",), True, 0.0, INF, "a", (0.0, INF))


def test_views_between_linear_layers() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        y = n.a(x).flatten(1).view(2, 3, 64).unsqueeze(1).squeeze(1).reshape(2, -1).relu()
        result: Tensor = n.b(y)
        return result

    net = Net(run, a=nn.Linear(8, 8), b=nn.Linear(192, 2))
    assert flow(net) == Flow(None, ("b",), True, 0.0, INF, "a", (0.0, INF))
    flat = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(192, 2))
    assert found(flat).layers["0"] == Flow(None, ("3",), True, 0.0, INF, "2", (-INF, INF))


def test_several_readers_and_outputs_in_any_form() -> None:
    net = Net(
        lambda n, x: (lambda y: {"maps": [n.b(y), n.c(y)], "kept": (y,)})(n.relu(n.a(x))),
        a=conv(), b=conv(), c=conv(), relu=nn.ReLU(),
    )  # fmt: skip
    result = found(net).layers
    assert result["a"] == Flow(None, ("b", "c"), False, 0.0, INF, "relu", (-INF, INF))
    assert not result["b"].to_layers
    assert not result["c"].to_layers


def test_layers_that_are_not_called_or_not_asked_for() -> None:
    net = Net(lambda n, x: n.b(n.relu(n.a(x))), a=conv(), b=conv(), c=conv(), relu=nn.ReLU())
    assert list(found(net).layers) == ["a", "b"]
    only = flows(net, ["a"], X).layers
    assert list(only) == ["a"]
    assert only["a"] == Flow(None, (), False, 0.0, INF, "relu", (-INF, INF))


class Interrupted(Exception):
    pass


def test_looking_leaves_the_network_alone() -> None:
    net = nn.Sequential(conv(), norm(), nn.ReLU(inplace=True), nn.Dropout(0.5), conv()).train()
    net[1].eval()
    modes = [m.training for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    expected = net.eval()(X)
    for module, mode in zip(net.modules(), modes, strict=True):
        module.training = mode
    kept = X.clone()
    found(net)

    def broken(n: Any, x: Tensor) -> Tensor:
        n.net(x)
        raise Interrupted

    with pytest.raises(Interrupted):
        flows(Net(broken, net=net), ["net.0"], X)
    assert torch.equal(X, kept)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.equal(net.eval()(X), expected)


def test_a_norm_behind_maxima_is_the_layers_own_where_it_multiplies_by_nothing_negative() -> None:
    net = Net(
        lambda n, x: n.b(n.norm(n.pool(n.a(x)))),
        a=conv(), pool=nn.MaxPool2d(2), norm=norm(), b=conv(),
    )  # fmt: skip
    assert flow(net).norm == "norm"
    with torch.no_grad():
        net.norm.weight[1] = -1.0  # type: ignore[union-attr, operator, index]
    assert flow(net).norm is None
    assert not flow(net).to_layers


def test_a_norm_that_is_called_twice_belongs_to_nobody() -> None:
    net = Net(lambda n, x: n.norm(n.a(x)) + n.norm(n.b(x)), a=conv(), b=conv(), norm=norm())
    assert flow(net).norm is None
    assert flow(net, "b").norm is None


@pytest.mark.parametrize(
    ("change", "width", "own"),
    [
        (lambda y: y.flatten(1), 3 * 8 * 8, False),
        (lambda y: y.transpose(0, 1).reshape(2, 3, 8, 8), 3, False),
        (lambda y: y.flatten(2), 3, True),
        (lambda y: F.channel_shuffle(torch.cat([y, y], 1), 2), 6, False),
        (lambda y: y.roll(1, 1), 3, False),
    ],
    ids=["neurons", "mixed", "flattened", "shuffled copies", "rolled"],
)
def test_a_norm_of_channels_that_went_elsewhere_is_not_the_layers_own(
    change: Callable[[Tensor], Tensor], width: int, own: bool
) -> None:
    kind = nn.BatchNorm1d if change(X).ndim < 4 else nn.BatchNorm2d
    net = Net(lambda n, x: n.norm(change(n.a(x))), a=conv(), norm=kind(width))
    assert flow(net).norm == ("norm" if own else None)


def test_a_norm_of_positions_is_not_a_linear_layers_own() -> None:
    net = Net(lambda n, x: n.norm(n.a(x)), a=nn.Linear(4, 5), norm=nn.BatchNorm1d(5))
    assert found(net, torch.randn(3, 4)).layers["a"].norm == "norm"
    assert found(net, torch.randn(3, 5, 4)).layers["a"].norm is None
