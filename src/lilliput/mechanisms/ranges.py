"""Over which range activations are made integers: what was seen, or less, so that most values lie finer.

A range is chosen from a histogram. Calibration reads its batches twice, once for the ends of the histograms
and once to fill them, so memory does not grow with the number of samples: 2,048 counts a place.

The surprising rule: a range always contains zero, since padding and rectifiers make zeros, and these must
stay exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..core.task import answer, evaluation
from ..core.types import Batch
from ..errors import EmptyData, InputError

#: How the ends of a range are found.
Calibration: TypeAlias = Literal["minmax", "percentile", "mse", "entropy"]

BINS = 2048
_CANDIDATES = 100


@dataclass(frozen=True)
class Histogram:
    """How often values were seen.

    Attributes:
        low: where the first bin begins.
        high: where the last one ends.
        counts: float64 ``(bins,)``.
    """

    low: float
    high: float
    counts: Tensor

    @property
    def width(self) -> float:
        """Of a bin."""
        return (self.high - self.low) / len(self.counts)

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, float64."""
        return self.low + self.width * (torch.arange(len(self.counts), dtype=torch.float64) + 0.5)


def calibrate(
    model: nn.Module,
    places: Mapping[str, tuple[float, float]],
    batches: Callable[[], Iterable[Batch]],
) -> dict[str, Histogram]:
    """Histograms of the activations at some places, in eval mode.

    Args:
        model: left as it is.
        places: ``MODULE:input`` (the first) or ``MODULE:output``; with each the limits to which
            its readers clip.
        batches: called twice, must give the same batches.

    Returns:
        A histogram for each place that the forward pass comes by.

    Raises:
        EmptyData: there are no batches.
        InputError: values are not finite, or all the same; the message names the place.
    """
    ends: dict[str, tuple[float, float]] = {}

    def widen(place: str, values: Tensor) -> None:
        low, high = values.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise InputError(
                f"what {place} hands on is not finite on the calibration samples: look for NaN or "
                "infinity in the data, or in the weights before it."
            )
        known = ends.get(place, (math.inf, -math.inf))
        ends[place] = min(known[0], float(low)), max(known[1], float(high))

    _visit(model, places, batches(), widen)
    for place, (low, high) in ends.items():
        if low == high:
            raise InputError(
                f"{place} is always {low:.4g} on the calibration samples, so no range can be measured. "
                "Give other samples; or, where it is dead, remove it or leave the layer out."
            )
    counts = {p: torch.zeros(BINS, dtype=torch.float64) for p in ends}

    def fill(place: str, values: Tensor) -> None:
        counts[place] += torch.histc(values.float(), BINS, *ends[place]).double().cpu()

    _visit(model, places, batches(), fill)
    return {place: Histogram(*ends[place], counts[place]) for place in ends}


@torch.no_grad()
def _visit(
    model: nn.Module,
    places: Mapping[str, tuple[float, float]],
    batches: Iterable[Batch],
    use: Callable[[str, Tensor], None],
) -> None:
    """Run the model and hand on what is met at each place, clipped as its readers clip it.

    At once, not after the pass: a rectifier behind the place may work in place.
    """

    def before(place: str, module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        first = next(iter((*inputs, *named.values())))
        use(place, first.clamp(*places[place]))

    def behind(place: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        use(place, output.clamp(*places[place]))

    handles, empty = [], True
    try:
        for place in places:
            name, _, side = place.partition(":")
            module = model.get_submodule(name)
            if side == "input":
                hook = partial(before, place)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(partial(behind, place)))
        with evaluation(model):
            for batch in batches:
                empty = False
                answer(model, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    if empty:
        raise EmptyData("there are no calibration samples: give the task training batches.")


def range_of(
    histogram: Histogram, how: Calibration, bits: int, percentile: float = 99.99
) -> tuple[float, float]:
    """The ends of the range that is made integers.

    - ``minmax``: all that was seen.
    - ``percentile``: without the outermost of both sides, together ``100 - percentile`` percent.
    - ``mse``: the part of it with the least squared error, of clipping and of rounding.
    - ``entropy``: the part of it whose distribution loses the least in Kullback and Leibler's divergence when
      it is given by ``2^bits`` levels (Migacz 2017, from memory). Zeros do not count, for they stay exact.

    Args:
        histogram: of the values.
        how: see above.
        bits: of an integer.
        percentile: of that way.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if how == "percentile":
        total = histogram.counts.cumsum(0) / histogram.counts.sum()
        tail = (1.0 - percentile / 100.0) / 2.0
        edges = histogram.centers
        first = int(torch.searchsorted(total, tail))
        last = int(torch.searchsorted(total, 1.0 - tail).clamp_max(len(edges) - 1))
        low = max(low, min(float(edges[first]), 0.0))
        high = min(high, max(float(edges[last]), 0.0))
        return low, high
    if how == "minmax":
        return low, high
    loss = _squared_error if how == "mse" else _divergence
    parts = [(n + 1) / _CANDIDATES for n in range(_CANDIDATES)]
    best = min(
        ((low * part, high * part) for part in parts), key=lambda ends: loss(histogram, ends, bits)
    )
    for _ in range(2 if low < 0.0 < high else 0):  # one end after the other
        best = min(((best[0], high * p) for p in parts), key=lambda e: loss(histogram, e, bits))
        best = min(((low * p, best[1]) for p in parts), key=lambda e: loss(histogram, e, bits))
    return best


def grid_of(low: float, high: float, bits: int) -> tuple[float, int]:
    """Step and zero of unsigned integers over a range that contains zero.

    Example:
        >>> grid_of(-1.0, 3.0, 2)
        (1.3333333333333333, 1)
    """
    highest = 2**bits - 1
    step = (high - low) / highest
    if not step > 0.0:
        raise InputError(f"the range from {low} to {high} is empty: nothing can be made integers.")
    return step, min(max(round(-low / step), 0), highest)


def on_integers(values: Tensor, step: float, zero: int, bits: int) -> Tensor:
    """Values as the nearest of the integers, times the step."""
    return ((values / step).round().clamp(-zero, 2**bits - 1 - zero)) * step


def _squared_error(histogram: Histogram, ends: tuple[float, float], bits: int) -> float:
    centers = histogram.centers
    apart = centers - on_integers(centers, *grid_of(*ends, bits), bits)
    return float((histogram.counts * apart.square()).sum())


def _divergence(histogram: Histogram, ends: tuple[float, float], bits: int) -> float:
    """Of the clipped distribution (outliers at its ends) from itself in the levels' resolution."""
    step, zero = grid_of(*ends, bits)
    levels = 2**bits
    inside = (histogram.centers >= ends[0]) & (histogram.centers <= ends[1])
    if not bool(inside.any()):
        return math.inf
    level = ((histogram.centers / step).round() + zero).clamp(0, levels - 1).long()
    counts = histogram.counts.masked_fill(histogram.centers.abs() <= histogram.width / 2.0, 0.0)
    seen = counts * inside
    clipped = seen.clone()
    first, last = (int(inside.nonzero().flatten()[end]) for end in (0, -1))
    clipped[first] += counts[:first].sum()
    clipped[last] += counts[last + 1 :].sum()
    occupied = ((seen > 0) & inside).double()
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, seen)
    spread = torch.zeros_like(mass).index_add_(0, level, occupied)
    known = (mass / spread.clamp_min(1.0))[level] * occupied
    p, q = clipped / clipped.sum(), known / known.sum().clamp_min(1e-300)
    both = (p > 0) & (q > 0)
    lost = p[(p > 0) & ~both].sum()  # bins that only outliers fill
    divergence = (p[both] * (p[both] / q[both]).log()).sum()
    return float(divergence + lost * math.log(1e6))


def steps_of(rows: Tensor, bits: int, how: Literal["max", "mse"]) -> Tensor:
    """The step of each row of a weight: over its largest magnitude, or with the least squared error.

    Args:
        rows: ``(filters, weights)``.
        bits: of a signed integer; the range is symmetric.
        how: see above.

    Returns:
        ``(filters,)``; 1 where a row is all zero.

    Example:
        >>> steps_of(torch.tensor([[1.27, -0.5], [0.0, 0.0]]), 8, "max")
        tensor([0.0100, 1.0000])
    """
    highest = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1)
    tiny = torch.finfo(rows.dtype).tiny  # what is smaller counts as zero
    whole = torch.where(largest > tiny * highest, largest / highest, torch.ones_like(largest))
    if how == "max":
        return whole
    best, least = whole, torch.full_like(whole, math.inf)
    for part in torch.linspace(0.3, 1.0, 71).tolist():
        step = whole * part
        found = (rows / step[:, None]).round().clamp(-highest, highest) * step[:, None]
        error = (found - rows).square().sum(1)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


def noise_ratio(signal: Tensor, noisy: Tensor) -> float:
    """Signal over noise, in decibels; infinite where there is none.

    Example:
        >>> round(noise_ratio(torch.tensor([1.0, 1.0]), torch.tensor([1.1, 0.9])), 3)
        20.0
    """
    noise = (signal - noisy).double().square().sum()
    if not bool(noise > 0):
        return math.inf
    return float(10.0 * torch.log10(signal.double().square().sum() / noise))
