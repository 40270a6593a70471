"""lilliput.thin: any network and its example, nothing else; what was given stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput.core import registry
from lilliput.errors import InputError, LilliputError, NothingChanged, NothingMatched, UnknownName
from lilliput.measure import macs, size
from lilliput.mechanisms.groups import exported


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip


X = torch.randn(1, 3, 8, 8)
SHIPPED = ("filter_l1", "filter_l2", "fpgm", "random")


def test_the_result_is_thin_and_runs() -> None:
    net = cnn()
    thinned = lilliput.thin(net, X)
    assert [m.weight.shape[0] for m in thinned.model if hasattr(m, "weight")] == [
        8,
        8,
        16,
        16,
        16,
        5,
    ]
    assert thinned.model(torch.randn(4, 3, 8, 8)).shape == (4, 5)
    assert thinned.error is not None
    assert thinned.error < 1e-5
    assert list(thinned.unprunable) == ["10.weight dim 0"]
    assert "output" in thinned.unprunable["10.weight dim 0"]


def test_the_plan_says_what_is_left() -> None:
    net = cnn()
    thinned = lilliput.thin(net, X)
    for name, value in net.state_dict().items():
        for dim, kept in thinned.plan.get(name, {}).items():
            assert (np.diff(kept) > 0).all()
            value = value.index_select(dim, torch.from_numpy(kept))
        assert torch.equal(thinned.model.state_dict()[name], value), name
    assert len(thinned.plan["8.weight"][1]) == 16 * 4  # a channel is four pixels there


def test_the_given_network_stays_as_it_is() -> None:
    net = cnn().train()
    net[3].eval()
    before = copy.deepcopy(net.state_dict())
    thinned = lilliput.thin(net, X)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in thinned.model] == [m.training for m in net]
    assert [m.training for m in net] == [n != 3 for n in range(len(net))]
    assert not vars(net).keys() - vars(cnn()).keys()


@pytest.mark.parametrize("by", SHIPPED)
def test_every_criterion_that_needs_no_data(by: str) -> None:
    thinned = lilliput.thin(cnn(), X, keep=0.5, by=by, round_to=1)
    assert thinned.model[0].out_channels == 8


def test_criteria_differ() -> None:
    net = cnn()
    plans = [lilliput.thin(net, X, by=by).plan["3.weight"][0].tolist() for by in SHIPPED]
    assert len({tuple(plan) for plan in plans}) > 1


def test_random_channels_are_the_same_ones_each_time() -> None:
    net = cnn()
    first, second = (lilliput.thin(net, X, by="random").plan for _ in range(2))
    assert (first["3.weight"][0] == second["3.weight"][0]).all()


def test_fpgm_removes_the_filters_in_the_middle() -> None:
    net = nn.Sequential(nn.Linear(2, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    corners = [[9.0, 9], [9, -9], [-9, 9], [-9, -9]]
    net[0].weight.data = torch.tensor([corners[0], [0.1, 0.2], *corners[1:], [3.0, 0.0]])
    kept = lilliput.thin(net, torch.randn(1, 2), keep=4 / 6, by="fpgm", round_to=1).plan
    assert kept["0.weight"][0].tolist() == [0, 2, 3, 4]


def test_filter_l2_prefers_one_large_weight() -> None:
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2))
    net[0].weight.data = torch.tensor([[1.0, 1, 1, 1], [3.0, 0, 0, 0]])
    kept = {
        by: lilliput.thin(net, torch.randn(1, 4), by=by, round_to=1).plan["0.weight"][0].tolist()
        for by in ("filter_l1", "filter_l2")
    }
    assert kept == {"filter_l1": [0], "filter_l2": [1]}


def test_keep_by_pattern() -> None:
    thinned = lilliput.thin(cnn(), X, keep={"0": 0.25, "3": 0.75}, round_to=1)
    layers = thinned.model[0], thinned.model[3], thinned.model[8]
    assert [layer.weight.shape[0] for layer in layers] == [4, 24, 24]


def test_rounding() -> None:
    exact, rounded = (lilliput.thin(cnn(), X, keep=0.6, round_to=r).model for r in (1, 8))
    assert (exact[0].out_channels, exact[3].out_channels, exact[8].out_features) == (10, 19, 14)
    assert (rounded[0].out_channels, rounded[3].out_channels, rounded[8].out_features) == (
        8,
        16,
        16,
    )


def test_summary_tells_widths_and_totals() -> None:
    net = cnn()
    thinned = lilliput.thin(net, X)
    lines = thinned.summary().splitlines()
    assert lines[0].split() == ["0", "16", "->", "8", "50.0%"]
    small = size(thinned.model).parameters
    assert lines[-2].split()[:4] == ["parameters", f"{size(net).parameters:,}", "->", f"{small:,}"]
    assert lines[-1].split()[:4] == [
        "macs",
        f"{macs(net, X).total:,}",
        "->",
        f"{macs(thinned.model, X).total:,}",
    ]
    assert repr(thinned).startswith("Thinned(3 layers thinner, parameters")


# -- unusual networks and examples ------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
        out: Tensor = self.head((self.a(a) + self.b(b)).relu())
        return out


def test_keyword_inputs() -> None:
    thinned = lilliput.thin(TwoInputs(), {"a": torch.randn(1, 6), "b": torch.randn(1, 4)})
    assert thinned.model.a.out_features == thinned.model.b.out_features == 8
    assert (thinned.plan["a.weight"][0] == thinned.plan["b.weight"][0]).all()


class Positional(TwoInputs):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(a, b=b)


def test_positional_inputs() -> None:
    thinned = lilliput.thin(Positional(), (torch.randn(2, 6), torch.randn(2, 4)))
    assert thinned.model.head.in_features == 8


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(self.first(x).relu()).relu())
        out: Tensor = self.head(x.relu())
        return out


def test_a_module_that_is_called_twice() -> None:
    thinned = lilliput.thin(Shared(), torch.randn(1, 4))
    kept = [
        thinned.plan[name][dim].tolist()
        for name, dim in (("shared.weight", 0), ("shared.weight", 1))
    ]
    assert kept[0] == kept[1] == thinned.plan["head.weight"][1].tolist()
    assert thinned.model.shared.weight.shape == (8, 8)


def test_frozen_parameters_stay_frozen() -> None:
    net = cnn()
    net[0].weight.requires_grad_(False)
    thin = lilliput.thin(net, X).model
    assert not thin[0].weight.requires_grad
    assert thin[3].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precision(dtype: torch.dtype) -> None:
    thinned = lilliput.thin(cnn().to(dtype), X.to(dtype))
    assert thinned.model[3].weight.dtype == dtype
    assert thinned.model(X.to(dtype)).shape == (1, 5)


def test_already_thin_networks_can_be_thinned_again() -> None:
    once = lilliput.thin(cnn(), X).model
    twice = lilliput.thin(once, X, round_to=1)
    assert twice.model[0].out_channels == 4
    assert len(twice.plan["0.weight"][0]) == 4
    assert twice.plan["0.weight"][0].max() < 16


# -- refusals ---------------------------------------------------------------------------------


def test_an_unknown_method() -> None:
    with pytest.raises(UnknownName, match="filter_l1"):
        lilliput.thin(cnn(), X, by="filter_ll")


def test_a_method_that_needs_data_names_those_that_do_not() -> None:
    with pytest.raises(InputError, match="needs data") as caught:
        lilliput.thin(cnn(), X, by="magnitude")
    free = {
        n for n in registry.entries("method") if getattr(registry.load("method", n), "data_free", 0)
    }
    assert set(SHIPPED) <= free
    assert all(name in str(caught.value) for name in free)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"keep": 0.0}, InputError),
        ({"keep": 1.5}, InputError),
        ({"round_to": 0}, InputError),
        ({"keep": 1.0}, NothingChanged),
        ({"keep": {"10": 0.5}}, NothingMatched),
        ({"keep": {"conv": 0.5}}, NothingMatched),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        lilliput.thin(cnn(), X, **settings)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        out: Tensor = self.b(x if float(x.sum()) > 0 else -x)
        return out


@pytest.mark.parametrize(
    ("net", "inputs"),
    [(DataDependent(), torch.randn(1, 4)), (cnn(), torch.randn(1, 4)), (cnn(), None)],
    ids=["data-dependent control flow", "an example that does not fit", "no example"],
)
def test_networks_that_cannot_be_analyzed(net: nn.Module, inputs: Any) -> None:
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(LilliputError):
        lilliput.thin(net, inputs)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class NumberInTheCode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).view(-1, 2, 8).flatten(1).relu())


def test_numbers_in_the_code_are_rewritten_on_demand(tmp_path: Path) -> None:
    net, x = NumberInTheCode().eval(), torch.randn(3, 4)
    with pytest.raises(NothingMatched, match="a number in the code"):
        lilliput.thin(net, x, round_to=1)
    thinned = lilliput.thin(net, x, round_to=1, rewrite=True)
    assert thinned.model.a.weight.shape == (8, 4)
    assert thinned.error is not None and thinned.error < 1e-5
    assert thinned.model(torch.randn(5, 4)).shape == (5, 2)  # another batch
    lilliput.save(thinned.model, tmp_path / "thin.safetensors")
    fresh = lilliput.load(tmp_path / "thin.safetensors", model=exported(NumberInTheCode(), x))
    assert torch.equal(fresh(x), thinned.model(x))
