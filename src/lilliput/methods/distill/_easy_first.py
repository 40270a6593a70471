"""Batches in which only the first samples of an order appear: the machinery of ``curriculum``."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...core.digests import mix
from ...core.task import read
from ...core.types import Batch
from ...errors import InputError


class EasyFirst:
    """As many batches as before, of the same sizes, with only the first samples of an order.

    Args:
        batches: with sample numbers; read again where an epoch needs more.
        sizes: samples of each batch of an epoch.
        ranks: gives the place of each sample number in the order, int64; -1 for numbers not in it, which come
            last.
        part: gives the part of the samples that is shown at a batch of this epoch.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        sizes: Sequence[int],
        ranks: Callable[[], Tensor],
        part: Callable[[int], float],
    ) -> None:
        self.batches, self.sizes, self.ranks, self.part = batches, sizes, ranks, part
        self._seed = 0

    def reshuffle(self, seed: int) -> None:
        """Set the order of the iterations that follow; equal seeds, equal batches."""
        self._seed = seed

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        ranks = self.ranks()
        samples = int((ranks >= 0).sum())
        fewest = min(samples, max(self.sizes))  # fewer would only be repeated
        source = _endless(self.batches, self._seed)
        waiting: list[Any] = []
        for number, size in enumerate(self.sizes):
            shown = max(fewest, math.ceil(self.part(number) * samples - 1e-9))
            vain = 0
            while sum(map(_size, waiting)) < size:
                waiting.append(_chosen(next(source), ranks, shown, samples))
                vain = 0 if _size(waiting[-1]) else vain + 1
                if vain > 2 * len(self.sizes):
                    raise InputError(
                        "curriculum: none of the batches holds one of the first samples of the order: they "
                        "are not the training batches whose difficulty was measured."
                    )
            joined = _joined(waiting)
            yield Batch(*_rows(joined, slice(0, size)))
            left = _rows(joined, slice(size, None))
            waiting = [left] if _size(left) else []


def numbers_of(batch: Batch) -> Tensor:
    """The numbers of a batch's samples, int64 on the processor.

    Raises:
        InputError: it has none.
    """
    if batch.index is None:
        raise InputError(
            "curriculum: the batches must say which samples they hold: let the training batches be "
            "(inputs, target, index) with the samples' numbers as the third part."
        )
    return torch.as_tensor(batch.index).cpu().reshape(-1)


def ranks_of(order: Tensor) -> Tensor:
    """The place of each sample number in the order, -1 for numbers that are not in it."""
    ranks = torch.full((int(order.max()) + 1,), -1)
    ranks[order] = torch.arange(len(order))
    return ranks


def _chosen(batch: Batch, ranks: Tensor, shown: int, samples: int) -> Any:
    """The parts of a batch, only with the samples whose turn has come; what was not measured comes last."""
    numbers = numbers_of(batch)
    # A list of numbers, too, must be cut to the rows.
    parts = (batch.inputs, batch.target, torch.as_tensor(batch.index), batch.views)
    if shown >= samples:
        return parts
    known = numbers < len(ranks)
    places = torch.where(known, ranks[numbers.clamp(max=len(ranks) - 1)], -1)
    return _rows(parts, ((places >= 0) & (places < shown)).nonzero().flatten())


def _rows(parts: Any, rows: Any) -> Any:
    def take(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows]

    return pytree.tree_map_only(Tensor, take, parts)


def _joined(waiting: Sequence[Any]) -> Any:
    if len(waiting) == 1:
        return waiting[0]
    flat = [pytree.tree_flatten(parts) for parts in waiting]
    leaves = [
        torch.cat(each) if isinstance(each[0], Tensor) else each[0]
        for each in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return pytree.tree_unflatten(leaves, flat[0][1])


def _size(parts: Any) -> int:
    return len(parts[2])


def one_pass(batches: Iterable[Any], seed: int) -> Iterator[Batch]:
    """Read all batches once; whatever is drawn meanwhile follows from the seed.

    Batches with ``reshuffle`` are told the seed and draw from nothing else; any others draw from the global
    generators, which therefore are exchanged while they are read.
    """
    source = read(batches, "the training batches")
    if hasattr(batches, "reshuffle"):
        batches.reshuffle(seed)
        yield from source
        return
    generators = _Generators(seed)
    while True:
        with generators.at_work():
            batch = next(source, None)
        if batch is None:
            return
        yield batch


def _endless(batches: Iterable[Any], seed: int) -> Iterator[Batch]:
    """The batches of one pass after the other, each in an order of its own."""
    again = 0
    while True:
        yield from one_pass(batches, mix(seed, again) if again else seed)
        again += 1


class _Generators:
    """States of Python's, numpy's and torch's generators, apart from those that training draws from.

    A loop that is resumed draws its batches again, but not the dropout between them; so batches must not
    depend on what was drawn in between.
    """

    def __init__(self, seed: int) -> None:
        outer = _states()
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - users' data code may draw from it
        torch.default_generator.manual_seed(seed)
        self._own = _states()
        _restore(outer)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let these be the generators inside the block."""
        outer = _states()
        _restore(self._own)
        try:
            yield
        finally:
            self._own = _states()
            _restore(outer)


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _restore(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
