"""Over which range activations become integers, against what the raw samples say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lilliput.core.types import Batch
from lilliput.errors import EmptyData, InputError
from lilliput.mechanisms.activations import Quantizer
from lilliput.mechanisms.ranges import (
    BINS,
    Histogram,
    calibrate,
    grid_of,
    noise_ratio,
    on_integers,
    range_of,
    steps_of,
)

ANY = (-math.inf, math.inf)
WAYS: tuple[Any, ...] = ("minmax", "percentile", "mse", "entropy")
HOW: tuple[Any, ...] = ("max", "mse")
few = settings(max_examples=30, deadline=None)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(values: Tensor, batches: int = 1) -> Histogram:
    """The histogram of some values, by way of a network that hands them on."""
    parts = [Batch(part, None) for part in values.chunk(batches)]
    return calibrate(nn.Sequential(nn.Identity()), {"0:output": ANY}, lambda: parts)["0:output"]


def by_hand(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """Unsigned integers over a range, one of them being zero."""
    top = 2**bits - 1
    step = (high - low) / top
    zero = round(-low / step)
    found: Tensor = (torch.clip(torch.round(x.double() / step) + zero, 0, top) - zero) * step
    return found


LAPLACE = drawn(20_000).double() * drawn(20_000, seed=1)
SHAPES = {
    "normal": drawn(20_000),
    "rectified": drawn(20_000).clamp_min(0),
    "tails": LAPLACE.sign() * LAPLACE.square(),
    "shifted": 0.3 * drawn(20_000) - 2.0,
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_mse_is_the_best_part_of_what_was_seen(name: str, bits: int) -> None:
    """Searched for on the values themselves, in steps of a thousandth."""
    x = SHAPES[name].double()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)

    def error(ends: tuple[float, float]) -> float:
        return float((by_hand(x, *ends, bits) - x).square().mean())

    found = range_of(seen(x), "mse", bits)
    best = min(error((low * n / 1000, high * n / 1000)) for n in range(5, 1001))
    assert error(found) <= 1.1 * best
    if bits == 4 and name == "tails":
        assert error(found) < 0.7 * error((low, high))


def test_percentile_of_evenly_spread_values() -> None:
    """Five percent go at each end; where all are positive the low end is zero."""
    histogram = seen(torch.linspace(-1.0, 3.0, 100_001))
    assert range_of(histogram, "percentile", 8, 90.0) == pytest.approx((-0.8, 2.8), abs=5e-3)
    assert range_of(histogram, "percentile", 8, 100.0) == pytest.approx((-1.0, 3.0), abs=5e-3)
    positive = seen(torch.linspace(1.0, 3.0, 100_001))
    assert range_of(positive, "percentile", 8, 90.0) == pytest.approx((0.0, 2.9), abs=5e-3)
    negative = seen(torch.linspace(-3.0, -1.0, 100_001))
    assert range_of(negative, "percentile", 8, 90.0) == pytest.approx((-2.9, 0.0), abs=5e-3)


def test_minmax_is_all_that_was_seen_and_zero() -> None:
    assert range_of(seen(torch.tensor([[-1.5, 0.5, 2.25]])), "minmax", 8) == (-1.5, 2.25)
    assert range_of(seen(torch.tensor([[0.5, 2.25]])), "minmax", 8) == (0.0, 2.25)
    assert range_of(seen(torch.tensor([[-0.5, -2.25]])), "minmax", 8) == (-2.25, 0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rectified", [False, True])
def test_entropy_cuts_outliers_off(bits: int, rectified: bool) -> None:
    """One value in 50,000 at ten times the rest, which 8 bits by squared error would still keep."""
    x = torch.cat([drawn(50_000), torch.tensor([40.0, -40.0])])
    x = x.abs() if rectified else x
    low, high = range_of(seen(x), "entropy", bits)
    assert low == 0.0 if rectified else 1.5 < -low < 6.0
    assert 1.5 < high < 6.0


@settings(max_examples=10, deadline=None)  # each looks at four kinds of ranges, a second in all
@given(st.integers(0, 2**31), st.floats(-5, 5), st.floats(0.01, 100), st.sampled_from([2, 4, 8]))
def test_zero_lies_in_every_range_and_is_exact(
    seed: int, shift: float, size: float, bits: int
) -> None:
    x = size * (drawn(300, seed=seed) + shift)
    histogram = seen(x)
    for way in WAYS:
        low, high = range_of(histogram, way, bits)
        assert min(float(x.min()), 0.0) <= low <= 0.0 <= high <= max(float(x.max()), 0.0)
        step, zero = grid_of(low, high, bits)
        assert step == pytest.approx((high - low) / (2**bits - 1))
        assert 0 <= zero <= 2**bits - 1
        assert abs(-zero * step - low) <= 0.51 * step  # the range moved by half a step at most
        probe = torch.cat([torch.zeros(1), x])
        expected = by_hand(probe, low, high, bits).float()
        for made in (Quantizer(bits, step, zero)(probe), on_integers(probe, step, zero, bits)):
            assert made[0] == 0.0
            # A value in the middle of two integers may go to either.
            wrong = (made - expected).abs() > 1e-4 * step
            middle = ((probe / step) % 1.0 - 0.5).abs() < 1e-3
            assert not (wrong & ~middle).any()


@pytest.mark.parametrize(("shape", "batches"), [((64, 7), 1), ((64, 7), 5), ((4096, 33), 16)])
def test_all_values_are_counted_in_a_fixed_number_of_bins(
    shape: tuple[int, ...], batches: int
) -> None:
    x = drawn(*shape)
    histogram = seen(x, batches)
    assert histogram.counts.shape == (BINS,)
    assert histogram.counts.sum() == x.numel()
    assert (histogram.low, histogram.high) == (float(x.min()), float(x.max()))
    assert torch.equal(histogram.counts, seen(x).counts)  # however they were dealt out
    mean = float((histogram.counts * histogram.centers).sum()) / x.numel()
    assert mean == pytest.approx(float(x.mean()), abs=histogram.width / 2)


def test_values_are_clipped_as_their_readers_clip() -> None:
    x = torch.linspace(-4.0, 10.0, 1401)[:, None]
    places = {"0:output": (0.0, 6.0), "0:input": (0.0, math.inf)}
    found = calibrate(nn.Sequential(nn.Identity()), places, lambda: [Batch(x, None)])
    assert (found["0:output"].low, found["0:output"].high) == (0.0, 6.0)
    assert (found["0:input"].low, found["0:input"].high) == (0.0, 10.0)
    assert found["0:output"].counts[-1] > 400


def test_what_a_normalization_hands_on_before_a_rectifier_in_place() -> None:
    x = drawn(16, 3, 5, 5)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
    places = {"1:output": ANY, "2:output": ANY}
    found = calibrate(net, places, lambda: [Batch(x, None)])
    with torch.no_grad():
        expected = net[1](net[0](x))
    assert found["1:output"].low == float(expected.min()) < 0.0
    assert found["1:output"].high == float(expected.max())
    assert found["2:output"].low == 0.0


class Interrupted(RuntimeError):
    pass


def test_measuring_leaves_the_network_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def broken() -> Any:
        yield Batch(drawn(8, 3), None)
        raise Interrupted

    def whole() -> Any:
        return [Batch(drawn(8, 3), None)]

    calibrate(net, {"0:input": ANY, "2:output": ANY}, whole)
    with pytest.raises(Interrupted):
        calibrate(net, {"0:input": ANY, "2:output": ANY}, broken)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net] == [True, False, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# -- steps of weights -----------------------------------------------------------------------------


def integers_of(rows: Tensor, steps: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return torch.clip(torch.round(rows / steps[:, None]), -top, top)


@few
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 40), st.sampled_from([2, 3, 4, 8]))
@example(0, 1, 1, 2)
def test_the_best_step_is_never_worse_than_the_largest_magnitude(
    seed: int, filters: int, columns: int, bits: int
) -> None:
    rows = drawn(filters, columns, seed=seed) * drawn(filters, 1, seed=seed + 1).exp()
    rows = rows * drawn(filters, columns, seed=seed + 2).square()  # outliers
    rows[0] *= seed % 2  # sometimes all zero
    error = {}
    for how in HOW:
        steps = steps_of(rows, bits, how)
        assert steps.shape == (filters,)
        assert (steps > 0).all()
        error[how] = (integers_of(rows, steps, bits) * steps[:, None] - rows).square().sum(1)
    assert (error["mse"] <= error["max"] * (1 + 1e-5) + 1e-12).all()


def test_steps_by_hand() -> None:
    rows = torch.tensor([[1.27, -0.5], [0.0, 0.0], [-254.0, 1.0]])
    torch.testing.assert_close(steps_of(rows, 8, "max"), torch.tensor([0.01, 1.0, 2.0]))
    torch.testing.assert_close(steps_of(rows, 2, "max"), torch.tensor([1.27, 1.0, 254.0]))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_best_step_by_search(bits: int) -> None:
    """In steps of a thousandth; few weights, so that the error has many dips."""
    rows = drawn(40, 20)
    largest = rows.abs().amax(1) / (2 ** (bits - 1) - 1)

    def error(steps: Tensor) -> Tensor:
        return (integers_of(rows, steps, bits) * steps[:, None] - rows).square().sum(1)

    best = torch.stack([error(largest * n / 1000) for n in range(300, 1001)]).amin(0)
    assert float((error(steps_of(rows, bits, "mse")) / best).mean()) < 1.01
    assert float((error(largest) / best).mean()) > 1.1


def test_steps_of_weights_that_have_nearly_decayed() -> None:
    rows = torch.tensor([[1e-44, 0.0]])
    for how in HOW:
        assert (steps_of(rows, 8, how) > 0).all()


# -- noise ----------------------------------------------------------------------------------------


@few
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_noise_ratio(seed: int, part: float) -> None:
    """Noise of 1/k of the signal is 20 log10 k decibels below it, wherever it lies."""
    signal = drawn(50, seed=seed)
    noise = drawn(50, seed=seed + 1)
    noise *= signal.norm() / noise.norm() / part
    found = noise_ratio(signal.double(), signal.double() + noise.double())
    assert found == pytest.approx(20 * math.log10(part), abs=1e-3)
    assert noise_ratio(signal, signal) == math.inf


def test_noise_ratio_of_integers() -> None:
    """About 6 decibels a bit: 1.25 + 6.02 bits for an even spread over the whole range of a step."""
    x = torch.linspace(-1.0, 1.0, 100_001)
    ratios = [noise_ratio(x, on_integers(x, *grid_of(-1.0, 1.0, b), b)) for b in (4, 6, 8)]
    for bits, ratio in zip((4, 6, 8), ratios, strict=True):
        # The power of x is 1/3, that of the noise step^2 / 12 with step = 2 / (2^bits - 1).
        assert ratio == pytest.approx(20 * math.log10(2**bits - 1), abs=0.6)


# -- bad input ------------------------------------------------------------------------------------


def test_errors_name_the_place() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    nn.init.constant_(net[0].bias, -100.0)  # type: ignore[arg-type]

    def measured(x: Tensor, *places: str) -> Any:
        return calibrate(net, dict.fromkeys(places, ANY), lambda: [Batch(x, None)])

    with pytest.raises(InputError, match="1:output is always 0 "):
        measured(drawn(8, 3), "0:input", "1:output")
    for bad in (math.nan, math.inf):
        x = drawn(8, 3)
        x[3, 1] = bad
        with pytest.raises(InputError, match="0:input hands on is not finite"):
            measured(x, "0:input")
    with pytest.raises(EmptyData, match="no calibration samples"):
        calibrate(net, {"0:input": ANY}, lambda: [])
    with pytest.raises(InputError, match="is empty"):
        grid_of(0.0, 0.0, 8)
