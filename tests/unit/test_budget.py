"""How many channels stay: rounding, ranking, budgets, and prices that equal what is measured."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lilliput.errors import InputError
from lilliput.measure import Macs, macs, size
from lilliput.mechanisms.budget import (
    Budget,
    by_importance,
    by_loss,
    by_rank,
    choose,
    count,
    evenly,
    keep_of,
    lowest,
    normalized,
    rounded,
    takes_part,
    widths_allowed,
)
from lilliput.mechanisms.groups import Group, Groups, Member, find_groups
from lilliput.mechanisms.surgery import cut
from lilliput.methods.prune._costs import Costs, Offer


def group(channels: int, *layers: str, repeats: int = 1) -> Group:
    index = np.arange(channels * repeats).reshape(channels, repeats)
    return Group(
        channels, tuple(Member(f"{n}.weight", 0, "makes", index) for n in layers or ("a",))
    )


# -- which groups take part -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("*", True),
        ("stem", True),
        ("block1.*", True),
        ("block9.*", False),
        ("!block1.conv2", False),
        (["stem", "!block2.conv2"], False),
        (["*", "!head"], True),
    ],
)
def test_a_residual_group_takes_part_as_a_whole(layers: Any, expected: bool) -> None:
    stream = group(8, "stem", "block1.conv2", "block2.conv2")
    assert takes_part(stream, layers) is expected


def test_the_largest_keep_of_a_group_counts() -> None:
    stream = group(8, "stem", "block1.conv2")
    assert keep_of(stream, {"block1*": 0.5, "stem": 0.75}) == 0.75
    assert keep_of(stream, {"block1*": 0.5, "*": 0.25}) == 0.5
    assert keep_of(stream, {"head": 0.5}) is None
    assert keep_of(stream, 0.3) == 0.3


# -- rounding ---------------------------------------------------------------------------------


@given(
    st.integers(1, 200),
    st.sampled_from([1, 2, 8, 16]),
    st.integers(1, 9),
    st.sampled_from([1, 3, 4]),
)
def test_allowed_widths(channels: int, round_to: int, at_least: int, repeats: int) -> None:
    allowed = widths_allowed(group(channels, repeats=repeats), round_to, at_least)
    assert allowed[-1] == channels
    assert (np.diff(allowed) > 0).all()
    assert allowed[0] >= min(at_least, channels)
    reachable = any(c * repeats % round_to == 0 for c in range(1, channels + 1))
    stored = allowed[:-1] * repeats
    if reachable:
        assert (stored % round_to == 0).all()
    else:
        assert len(allowed) == channels - min(at_least, channels) + 1


def test_rows_that_must_stay_count_for_the_width() -> None:
    # 24 of 30 rows can go: 6 stay anyway, so 2, 10, 18 of the 24 make 8, 16, 24 rows.
    shapes = {"a.weight": (30, 3)}
    assert widths_allowed(group(24), 8, 1, shapes).tolist() == [2, 10, 18, 24]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.data())
def test_rounded_takes_the_nearest(channels: list[int], data: Any) -> None:
    allowed = [widths_allowed(group(n), 8) for n in channels]
    wishes = np.array([data.draw(st.floats(0, n)) for n in channels])
    for wish, steps, found in zip(wishes, allowed, rounded(wishes, allowed), strict=True):
        assert abs(found - wish) == min(abs(s - wish) for s in steps.tolist())
        assert all(abs(s - wish) > abs(found - wish) for s in steps.tolist() if s > found)


# -- ranking ----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.floats(0, 1), st.randoms())
def test_by_rank_is_a_sort_of_all_channels(channels: list[int], part: float, random: Any) -> None:
    values = random.sample(range(1000), sum(channels))
    ends = list(itertools.accumulate(channels))
    scores = [np.array(values[e - n : e], float) for n, e in zip(channels, ends, strict=True)]
    wish = by_rank([*scores, None], np.array([*channels, 5]))(part)
    best = sorted(values, reverse=True)[: round(part * len(values))]
    assert wish.tolist() == [*(sum(v in best for v in s) for s in scores), 5]


def test_normalized_scales_are_comparable() -> None:
    scores = np.array([1.0, 2.0, 2.0])
    assert np.linalg.norm(normalized(scores, "l2")) == pytest.approx(1)
    assert normalized(scores, "mean").mean() == pytest.approx(1)
    assert normalized(scores, "max").max() == pytest.approx(1)
    assert (normalized(scores, "none") == scores).all()
    assert (normalized(np.zeros(3), "l2") == 0).all()


def test_of_equal_channels_exactly_so_many_go() -> None:
    assert [g.tolist() for g in lowest([np.ones(10)], np.array([4])).values()] == [
        [4, 5, 6, 7, 8, 9]
    ]


def test_choose_global_keeps_a_channel_of_every_group() -> None:
    scores = [np.full(10, 1e-9), np.arange(1.0, 11)]
    groups = [group(10, "a"), group(10, "b")]
    gone = choose(groups, scores, keep=0.01, scope="global", round_to=1, at_least=2)
    assert [len(g) for g in gone.values()] == [8, 8]


def test_choose_normalizes_before_it_compares() -> None:
    scores = [np.array([1.0, 2.0, 3.0, 4.0]), np.array([100.0, 200.0, 300.0, 400.0])]
    groups = [group(4, "a"), group(4, "b")]
    plain = choose(groups, scores, keep=0.5, scope="global", round_to=1)
    fair = choose(groups, scores, keep=0.5, scope="global", normalize="max", round_to=1)
    assert {n: len(g) for n, g in plain.items()} == {0: 3}  # one stays, at least
    assert {n: len(g) for n, g in fair.items()} == {0: 2, 1: 2}


# -- budgets ----------------------------------------------------------------------------------


def test_budget_is_one_quantity() -> None:
    assert (Budget(parameters=0.25).quantity, Budget(parameters=0.25).fraction) == (
        "parameters",
        0.25,
    )
    for wrong in ({}, {"macs": 0.5, "bytes": 0.5}, {"macs": 0.0}, {"macs": 1.5}, {"flops": 0.5}):
        with pytest.raises(InputError):
            Budget(**wrong)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=5),
    st.sampled_from([1, 4, 8]),
    st.floats(0.05, 1),
)
def test_count_uses_up_the_budget(layers: Any, round_to: int, fraction: float) -> None:
    channels, prices = (np.array(x) for x in zip(*layers, strict=True))
    allowed = [widths_allowed(group(n), round_to) for n in channels]

    def cost(kept: np.ndarray) -> float:
        return float((kept * prices).sum())

    target = fraction * cost(channels)
    smallest = cost(np.array([steps[0] for steps in allowed]))
    arguments = {"cost": cost, "target": target, "rank": by_loss(channels)}
    if smallest > target:
        with pytest.raises(InputError, match="cannot be reached"):
            count(evenly(channels), allowed, **arguments)
        return
    kept = count(evenly(channels), allowed, **arguments)
    assert cost(kept) <= target
    assert all(k in steps for k, steps in zip(kept, allowed, strict=True))
    # No even fraction that fits leaves more.
    tried = [rounded(part * channels, allowed) for part in np.linspace(0, 1, 101)]
    assert all(cost(t) <= cost(kept) for t in tried if cost(t) <= target)


def test_unreachable_budget_names_the_smallest() -> None:
    allowed = [widths_allowed(group(16), 8)]
    with pytest.raises(InputError, match=r"budget of 30 .* still are 80"):
        count(evenly(np.array([16])), allowed, cost=lambda k: 10.0 * k.sum(), target=30)


def test_rounding_does_not_waste_the_budget() -> None:
    """Layers of the same width jump together; after that, one may go back up alone."""
    channels = np.array([16, 16, 16])
    allowed = [widths_allowed(group(16), 8)] * 3
    kept = count(
        evenly(channels), allowed, cost=lambda k: float(k.sum()), target=40, rank=by_loss(channels)
    )
    assert sorted(kept) == [8, 16, 16]


def test_the_most_important_channels_come_back_first() -> None:
    scores = [np.array([1.0, 1, 1, 1]), np.array([9.0, 9, 9, 9])]
    order = by_importance([*scores, None])(np.array([2, 2, 4]), np.array([4, 4, 4]))
    assert order.tolist()[:2] == [1, 0]


# -- prices -----------------------------------------------------------------------------------


class Residual(nn.Module):
    """Residual, grouped, depthwise and concatenated channels, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.wide = nn.Conv2d(12, 18, 1)
        self.depthwise = nn.Conv2d(18, 18, 3, padding=1, groups=18)
        self.narrow = nn.Conv2d(18, 12, 1)
        self.grouped = nn.Conv2d(12, 16, 3, groups=4)
        self.other = nn.Conv2d(12, 10, 3, stride=1)
        self.head = nn.Linear(26 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.narrow(self.depthwise(self.wide(x)).relu())
        x = torch.cat([self.grouped(x), self.other(x)], 1).relu()
        x = nn.functional.adaptive_avg_pool2d(x, 2)
        out: torch.Tensor = self.head(x.flatten(1))
        return out


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_prices_equal_what_the_cut_network_measures(data: Any) -> None:
    net, x = Residual(), torch.randn(2, 3, 6, 6)
    groups = find_groups(net, x)
    costs = Costs(groups.groups, size(net), macs(net, x))
    kept = np.array([data.draw(st.integers(1, g.channels)) for g in groups.groups])
    thin = _offer(net, groups, x).thinned(kept)
    assert costs.parameters(kept) == size(thin).parameters
    assert costs.bytes(kept) == size(thin).dense_bytes
    assert round(costs.macs(kept)) == macs(thin, x).total


def test_bytes_are_each_tensors_own() -> None:
    net = nn.Sequential(nn.Linear(4, 8).bfloat16(), nn.Linear(8, 2).double())
    groups = [
        Group(
            8,
            tuple(
                Member(name, dim, role, np.arange(8)[:, None])
                for name, dim, role in (
                    ("0.weight", 0, "makes"),
                    ("0.bias", 0, "along"),
                    ("1.weight", 1, "uses"),
                )
            ),
        )
    ]
    nothing = Macs(0, 0, {}, {})
    costs = Costs(groups, size(net), nothing)
    assert costs.bytes(np.array([3])) == 3 * (4 + 1) * 2 + (2 * 3 + 2) * 8


def test_attention_is_priced_by_a_real_cut() -> None:
    """Activations multiply activations there, which no weight prices."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net, x = nn.Sequential(nn.Linear(4, 16), layer, nn.Linear(16, 2)), torch.randn(1, 20, 4)
    groups = find_groups(net, x)
    costs = Costs(groups.groups, size(net), macs(net, x))
    kept = np.array([max(1, g.channels // 2) for g in groups.groups])
    real = macs(_offer(net, groups, x).thinned(kept), x)
    assert abs(costs.macs(kept) / real.total - 1) > 0.01
    costs.correct(kept, real)
    assert costs.macs(kept) == pytest.approx(real.total)


@pytest.mark.parametrize("quantity", ["macs", "parameters", "bytes"])
def test_offer_meets_the_budget_on_the_real_network(quantity: Any) -> None:
    net, x = Residual(), torch.randn(1, 3, 6, 6)
    offer = _offer(net, find_groups(net, x), x)
    thin = offer.thinned(offer.within(quantity, 0.5))

    def real(model: nn.Module) -> int:
        counted = size(model)
        known = {"parameters": counted.parameters, "bytes": counted.dense_bytes}
        return known[quantity] if quantity != "macs" else macs(model, x).total

    assert 0.4 * real(net) < real(thin) <= 0.5 * real(net)


def test_offer_meets_a_latency() -> None:
    net = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.Linear(2048, 8))
    x = torch.randn(16, 64)
    offer = _offer(net, find_groups(net, x), x, round_to=256)
    kept = offer.within("latency", 0.6)
    assert (kept < 2048).any()
    assert (kept % 256 == 0).all()


def _offer(net: nn.Module, groups: Groups, inputs: Any, round_to: int = 1) -> Offer:
    channels = np.array([g.channels for g in groups.groups])
    allowed = [widths_allowed(g, round_to) for g in groups.groups]
    return Offer(net, net, groups, inputs, evenly(channels), allowed, by_loss(channels))


def test_thinning_for_a_price_leaves_the_network_alone() -> None:
    net, x = Residual(), torch.randn(1, 3, 6, 6)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    groups = find_groups(net, x)
    _offer(net, groups, x).thinned(np.ones(len(groups.groups), dtype=np.int64))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    cut(net, groups, {0: np.array([0])}, inputs=x)  # and it still is what the groups describe
