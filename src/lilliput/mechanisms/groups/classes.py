"""Groups of channels, as criteria and surgery see them.

A channel may occupy several indices of one dim (``repeats``): after a flatten each of its pixels, in a
grouped convolution the same offset of every group, in a fused query-key-value matrix one row each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from .attributes import Attributes

#: What a dim of a parameter does with the channels: ``makes`` them (rows of a weight), ``uses`` them
#: (its columns: contracted), or has one number ``along`` each (bias, batch normalization, layer scale).
Role: TypeAlias = Literal["makes", "uses", "along"]

#: What surgery removes: group number -> numbers of the channels to remove, ascending.
Removal: TypeAlias = Mapping[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class Member:
    """Where the channels of a group lie in one dim of one parameter or buffer.

    Attributes:
        tensor: dotted name in the model; of tied tensors the first name.
        dim: which dim.
        role: what the tensor does with the channels there.
        index: int64 ``(channels, repeats)``; row c holds the indices that go when channel c goes.
    """

    tensor: str
    dim: int
    role: Role
    index: np.ndarray

    @property
    def layer(self) -> str:
        """The module that owns the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Site:
    """An activation that carries the channels: one side of a call of a module without children.

    Attributes:
        module: dotted name.
        side: of the call.
        call: how many-th call of the module in one forward pass, from 0.
        position: which tensor among the call's tensor inputs (or outputs), from 0.
        dim: which dim of it, the batch being dim 0.
        index: int64 ``(channels, repeats)`` as in :class:`Member`; sites often share it.
    """

    module: str
    side: Literal["input", "output"]
    call: int
    position: int
    dim: int
    index: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can be removed one by one, each with all that belongs to it.

    Attributes:
        channels: how many.
        members: every place in parameters and buffers, in the order of the model.
        sites: every activation that carries the channels, in the order of the forward pass.
        mixed_by: operators that compute a statistic over the channels (layer normalization, softmax, a
            mean over the dim): what is left then depends on how many there are, so cutting cannot be
            compared with zeroing.
        pairwise: whether two activations are contracted over the channels (queries with keys).
    """

    channels: int
    members: tuple[Member, ...]
    sites: tuple[Site, ...] = ()
    mixed_by: tuple[str, ...] = ()
    pairwise: bool = False

    @property
    def name(self) -> str:
        """The first layer that makes the channels."""
        return (self.with_role("makes") or self.members)[0].layer

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers that make the channels; patterns are matched against these."""
        return tuple(dict.fromkeys(m.layer for m in self.with_role("makes")))

    def with_role(self, role: Role) -> tuple[Member, ...]:
        """The members that play one role."""
        return tuple(m for m in self.members if m.role == role)


@dataclass(eq=False)
class Groups:
    """All groups of a network.

    Attributes:
        groups: in the order of the first layer that makes them.
        unprunable: ``"layer.weight dim 0"`` -> why its channels must stay, for dims that a weight makes.
        numbers: the integers of the code that follow from widths.
        constants: where a number in the code holds channels in place; :func:`.exported` would let
            them go, at the price that the network becomes a graph.
    """

    groups: tuple[Group, ...]
    unprunable: dict[str, str] = field(default_factory=dict)
    numbers: Attributes | None = None
    constants: tuple[str, ...] = ()

    def attributes(self, removal: Removal) -> dict[str, int]:
        """Integers that modules hold and that a removal changes, with their new values.

        Args:
            removal: group number -> numbers of the channels to remove.

        Returns:
            Dotted path -> value; a last part that is a number counts in a list or tuple.
        """
        return {} if self.numbers is None else self.numbers.after(removal)
