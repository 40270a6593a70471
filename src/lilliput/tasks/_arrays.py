"""Batches cut from tensors that lie in memory, and what is done to such tensors before.

The rule to know: the order is fixed until :meth:`ArrayBatches.reshuffle` is called. Whoever trains
calls it once an epoch with a new seed; without it every epoch sees the same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..core.types import Batch
from ..errors import InputError

Augment = Callable[[Tensor, torch.Generator], Tensor]
Prepare = Callable[[Tensor], Tensor]


def check_limit(limit: int | None) -> None:
    """Refuse to train on fewer samples than one.

    Raises:
        InputError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} leaves nothing to train on: give at least 1, or none.")


def standardized(values: Tensor, known: Tensor) -> Tensor:
    """Columns with the mean 0 and the deviation 1 of the known ones.

    A column that is constant among the known ones has no deviation: it is only shifted to 0.

    Args:
        values: ``(..., columns)``.
        known: ``(samples, columns)``, those that are trained on.

    Example:
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> standardized(x, x)
        tensor([[-0.7071,  0.0000],
                [ 0.7071,  0.0000]])
    """
    # Not by a deviation of 0: that of equal numbers may be a hair above, by rounding.
    constant = known.amin(0) == known.amax(0)
    return (values - known.mean(0)) / known.std(0).where(~constant, 1.0)


class ArrayBatches:
    """An iterable of batches over a data set in memory.

    A batch's ``index`` numbers the samples from 0 to ``samples - 1`` in the order in which the
    tensors hold them, on the device of the data.

    Args:
        inputs: ``(samples, ...)``.
        target: ``(samples, ...)``, on the same device.
        batch_size: samples a batch; the last batch may be smaller.
        shuffle: whether the order is random; it depends on the seed of :meth:`reshuffle` only.
        augment: random change of one batch's inputs, ``augment(inputs, generator)``; it draws from
            the given CPU generator, so that every device sees the same draws.
        prepare: fixed change of one batch's inputs, after ``augment``; for example the conversion
            of bytes, which take a quarter of the memory, to normalized floats.
        drop_last: leave out a last, smaller batch.
        views: further views of the samples by name, ``(samples, ...)``; see
            :class:`~lilliput.core.types.Batch`. They are handed over as they are.

    Raises:
        InputError: the tensors differ in length, the batch size is below 1, or views go with
            ``augment``, which would change one side of a pair only.

    Example:
        >>> batches = ArrayBatches(torch.eye(5), torch.arange(5), batch_size=2, shuffle=True)
        >>> batches.reshuffle(7)
        >>> len(batches), [len(batch.target) for batch in batches]
        (3, [2, 2, 1])
    """

    def __init__(
        self,
        inputs: Tensor,
        target: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: Augment | None = None,
        prepare: Prepare | None = None,
        drop_last: bool = False,
        views: Mapping[str, Tensor] | None = None,
    ) -> None:
        for what, values in {"inputs": inputs, **(views or {})}.items():
            if len(values) != len(target):
                raise InputError(
                    f"{len(values)} {what} and {len(target)} targets do not make pairs: give one "
                    "target for each input."
                )
        if views and augment:
            raise InputError(
                f"the views {', '.join(views)} cannot follow the random augmentation of the inputs: "
                "leave it out."
            )
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; a batch has at least 1 sample.")
        self.inputs, self.target, self.batch_size = inputs, target, batch_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.augment, self.prepare = augment, prepare
        self.views = dict(views or {})
        self._seed = 0

    @property
    def samples(self) -> int:
        """Number of samples in the data set, those that ``drop_last`` leaves out included."""
        return len(self.target)

    @property
    def augmented(self) -> bool:
        """Whether the inputs of a sample differ from epoch to epoch."""
        return self.augment is not None

    def reshuffle(self, seed: int) -> None:
        """Set order and augmentation of all iterations that follow; equal seeds, equal batches."""
        self._seed = seed

    def to(self, device: torch.device | str) -> ArrayBatches:
        """The same batches, in the same order, with the whole data set on the device."""
        moved = copy.copy(self)
        moved.inputs, moved.target = self.inputs.to(device), self.target.to(device)
        moved.views = {name: view.to(device) for name, view in self.views.items()}
        return moved

    def __len__(self) -> int:
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._seed)
        order = self._order(generator)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size]
            inputs = self.inputs.index_select(0, index)
            if self.augment is not None:
                inputs = self.augment(inputs, generator)
            if self.prepare is not None:
                inputs = self.prepare(inputs)
            views = {name: view.index_select(0, index) for name, view in self.views.items()}
            yield Batch(inputs, self.target.index_select(0, index), index, views or None)

    def _order(self, generator: torch.Generator) -> Tensor:
        if self.shuffle:
            return torch.randperm(self.samples, generator=generator).to(self.target.device)
        return torch.arange(self.samples, device=self.target.device)
