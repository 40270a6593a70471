"""How long a forward pass takes, as a ratio to the first of several models.

Milliseconds depend on the machine, on its clock and on what else it does at that moment; two models
timed in turn share all of that. So the models are interleaved (A B C A B C …), and the figure to
print is each model's ratio to the first, which is the dense one by convention. The seconds are kept
for the record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, Literal

import torch
from torch import nn

from lilliput.errors import InputError, UnknownName
from lilliput.measure.macs import Inputs, bind, call, undisturbed

Clock = Literal["wall", "cpu"]
_CLOCKS: dict[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}
_FEWEST = 3


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a repeated measurement, in the unit of the field that holds it."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class ModelLatency:
    """One model's time for a forward pass over the given batch.

    Attributes:
        seconds: of one pass.
        ratio: to the first model's time *in the same round*; below 1 is faster. This is the
            figure that travels between machines.
    """

    seconds: Spread
    ratio: Spread


@dataclass(frozen=True)
class Latency:
    """Interleaved timings.

    Attributes:
        models: a figure for each model; the first is the reference, its ratio is 1.
        rounds: timed passes of each model.
        threads: torch threads that were used.
        clock: ``"wall"`` (elapsed time) or ``"cpu"`` (time of this process over all its threads).
    """

    models: Mapping[str, ModelLatency]
    rounds: int
    threads: int
    clock: Clock


def latency(
    models: Mapping[str, nn.Module] | nn.Module,
    example_inputs: Inputs,
    *,
    repeats: int = 200,
    warmup: int = 3,
    threads: int = 1,
    seconds: float = 1.0,
    clock: Clock = "wall",
) -> Latency:
    """Time models against each other, in eval mode and without gradients.

    Why ratios: on a shared machine the milliseconds of one model move by more than the difference
    between two models; timed alternately, both see the same machine, and their ratio holds still.
    Weights under a parametrization are computed once, outside the timing: a masked model is timed
    as its dense weights would run. Zeros therefore do not make it faster, as in any dense runtime.

    Args:
        models: the models by name, the reference first; a single module is named ``"model"``.
        example_inputs: the inputs of all of them: a tensor, a tuple (positional) or a dict
            (keywords).
        repeats: at most so many rounds, each of which runs every model once.
        warmup: untimed rounds before, at least 1.
        threads: torch threads while timing; tiny models run faster on one. Restored afterwards.
        seconds: time budget of all the rounds, warm-up excluded. After it no further round
            starts, but at least 3 (or ``repeats``, if fewer) are always run.
        clock: ``"wall"``, or ``"cpu"`` where other processes compete for the cores. A CPU clock
            does not see the work of an accelerator.

    Returns:
        Median and quartiles of seconds and of ratios for each model.

    Raises:
        InputError: no model, or a count or budget out of range.
        UnknownName: no such clock.
        ModelMismatch: a model cannot run on ``example_inputs``.

    Example:
        >>> two = {"dense": nn.Linear(64, 64), "small": nn.Linear(64, 8)}
        >>> result = latency(two, torch.zeros(1, 64), seconds=0.01)
        >>> result.models["dense"].ratio.median
        1.0
    """
    named = {"model": models} if isinstance(models, nn.Module) else dict(models)
    _check(named, repeats, warmup, threads, seconds, clock)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        for model in {id(model): model for model in named.values()}.values():
            stack.enter_context(undisturbed(model))
        for model in list(named.values()) * warmup:
            call(model, example_inputs)
        forwards = {name: bind(model, example_inputs) for name, model in named.items()}
        times = _rounds(forwards, repeats, seconds, _CLOCKS[clock])
    return Latency(_summaries(times), len(next(iter(times.values()))), threads, clock)


def _rounds(
    forwards: Mapping[str, Callable[[], Any]], repeats: int, seconds: float, now: Callable[[], int]
) -> dict[str, list[int]]:
    """Nanoseconds of each model in each round."""
    times: dict[str, list[int]] = {name: [] for name in forwards}
    deadline = time.perf_counter() + seconds
    for done in range(repeats):
        if done >= _FEWEST and time.perf_counter() > deadline:
            break
        for name, forward in forwards.items():
            start = now()
            forward()
            _synchronize()
            times[name].append(now() - start)
    return times


def _synchronize() -> None:
    """Wait for an accelerator, whose kernels run on after the call returns."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _summaries(times: Mapping[str, list[int]]) -> dict[str, ModelLatency]:
    reference = next(iter(times.values()))
    return {
        name: ModelLatency(
            seconds=_spread([t / 1e9 for t in own]),
            # A clock may be too coarse for a tiny model and read 0.
            ratio=_spread([t / max(r, 1) for t, r in zip(own, reference, strict=True)]),
        )
        for name, own in times.items()
    }


def _spread(values: list[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(
    models: Mapping[str, nn.Module],
    repeats: int,
    warmup: int,
    threads: int,
    seconds: float,
    clock: str,
) -> None:
    if not models:
        raise InputError("latency was given no model to time: give a module or a dict of modules.")
    for name, value in {"repeats": repeats, "warmup": warmup, "threads": threads}.items():
        if value < 1:
            raise InputError(f"latency: {name} is {value}, but must be at least 1.")
    if not seconds > 0:  # this form refuses NaN as well
        raise InputError(f"latency: seconds is {seconds}, but the time budget must be above 0.")
    if clock not in _CLOCKS:
        raise UnknownName("clock", clock, _CLOCKS)
