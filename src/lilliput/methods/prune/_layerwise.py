"""Channels removed layer by layer, where each layer meets the network that the layers before it have left.

The surprising rule: ``rounds`` spreads the *layers*. A layer is brought to its final width at once, and as
many rounds as there are layers retrain after each of them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ...core.run import Run
from ...core.select import Weight
from ...mechanisms.encodings import Codebook, Mask, original_of
from ...mechanisms.groups import Groups
from ...mechanisms.groups.classes import Group, Removal
from ...mechanisms.surgery import replace
from ._channels import ChannelMethod


class LayerwiseMethod(ChannelMethod):
    """Base of the methods that go from layer to layer; a paper overrides :meth:`chosen`.

    Attributes:
        rounds: over how many rounds the layers are spread, in the order of the network, retraining after
            each; in one round they all go, one after the other.
    """

    def chosen(self, run: Run, groups: Groups, number: int) -> np.ndarray:
        """The channels of one group that go, ascending, the groups before it being thin already."""
        raise NotImplementedError

    def width(self, run: Run, groups: Groups, number: int) -> int:
        """How many channels one group keeps."""
        return int(self.memory(run)["counts"][number])

    def part(self, run: Run) -> float:
        """Every round brings its layers to their final width."""
        return 1.0

    def removal(self, run: Run, groups: Groups) -> Removal:
        """Nothing beyond what has been cut layer by layer."""
        return {}

    def _prune(self, run: Run, number: int) -> None:
        """Cut the layers of all rounds up to this one that have not been cut yet."""
        memory, groups = self.memory(run), self.groups(run)
        if not memory["round"]:
            memory["counts"], memory["done"] = self.counts(run, groups).tolist(), 0
        order = [n for n, mine in enumerate(self.takes_part(groups)) if mine]
        due = math.ceil(len(order) * number / self.rounds)
        for turn in order[memory["done"] : due]:
            groups = self.groups(run)
            gone = self.chosen(run, groups, turn)
            if len(gone):
                self._cut(run, groups, {turn: gone})
        memory["done"] = due
        super()._prune(run, number)


def thinned(value: Tensor, group: Group, gone: np.ndarray, tensor: str) -> Tensor:
    """What is left of a tensor, or of one of its shape, when channels of a group go."""
    for member in group.members:
        if member.tensor == tensor:
            others = np.setdiff1d(np.arange(value.shape[member.dim]), member.index[gone])
            value = value.index_select(member.dim, torch.from_numpy(others).to(value.device))
    return value


@torch.no_grad()
def write(model: nn.Module, tensor: str, value: Tensor) -> None:
    """Give a weight new values inside a transaction of surgery, as its encodings allow.

    A mask lets through what has become non-zero. A codebook keeps its shared values: each weight takes
    the nearest.
    """
    layer, _, leaf = tensor.rpartition(".")
    weight = Weight(layer, model.get_submodule(layer), leaf)
    known, original = weight.encodings(), original_of(weight)
    if not all(isinstance(e, Mask | Codebook) for e in known):
        # What trains takes over the memory that it is given, which must lie as the optimizer's state does.
        if original.shape == value.shape:
            value = torch.empty_like(original).copy_(value)
        setattr(weight.module, leaf, value)  # torch asks the parametrization what gives this value
        return
    for encoding in known:
        if isinstance(encoding, Codebook):
            replace(encoding.codes, _nearest_codes(encoding, original_of(weight), value))
        elif isinstance(encoding, Mask):
            replace(encoding.mask, encoding.mask | (value != 0))
        encoding.forget()
    if not any(isinstance(e, Codebook) for e in known):
        dormant = any(e.policy == "straight_through" for e in known if isinstance(e, Mask))
        replace(original, torch.where(value == 0, original, value) if dormant else value)


def _nearest_codes(codebook: Codebook, centroids: Tensor, value: Tensor) -> Tensor:
    has_zeros = codebook.members()[1] is not None
    values = torch.cat([centroids.new_zeros(int(has_zeros)), centroids])
    first = int(not has_zeros)  # the code of the first value: 0 stands for zero
    ascending, order = values.sort()
    above = torch.searchsorted(ascending, value.contiguous()).clamp(1, len(values) - 1)
    lower = (value - ascending[above - 1]).abs() <= (ascending[above] - value).abs()
    return (order[torch.where(lower, above - 1, above)] + first).to(codebook.codes)
