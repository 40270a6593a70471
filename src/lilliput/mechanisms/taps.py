"""Taps: named places in a network whose activations are watched.

A place is ``MODULE``, the module's output, or ``MODULE:input``; where that is a tuple or a dict, its
first tensor is meant, and ``MODULE:output:1`` (from 0) is another one, such as the hidden state of a
recurrent layer. ``""`` is the network itself.

The surprising rule: what is watched is the tensor that the module handed over, and an in-place
operator behind it (``ReLU(inplace=True)``) writes into that very tensor. Reading such a place is an
error, for it would silently be the value behind the operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core.task import call
from ..errors import InputError, ModelMismatch, UnknownName


class Taps:
    """Watches places of one network, whichever forward pass runs, while it is open.

    The hooks belong to this object: a copy of the network, deep or pickled, is not watched.

    Args:
        network: whose places; not changed.
        places: see the module's docstring.
        open: whether to watch at once.

    Raises:
        UnknownName: there is no such module; the nearest are named.
        InputError: a place is written in another way.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> taps = Taps(net, ["1", "2:input"], open=True)
        >>> _ = net(torch.ones(5, 4))
        >>> taps["1"].shape, taps["1"] is taps["2:input"]
        (torch.Size([5, 3]), True)
    """

    #: How many :func:`unwatched` blocks the program is inside; other hooks that watch look here too.
    blind: ClassVar[int] = 0

    def __init__(self, network: nn.Module, places: Sequence[str], *, open: bool = False) -> None:
        self.network, self.places = network, list(dict.fromkeys(places))
        self._seen: dict[str, list[tuple[Tensor, int]]] = {place: [] for place in self.places}
        self._open, self._stop = open, False
        self._handles = [self._watch(place) for place in self.places]

    def __getitem__(self, place: str) -> Tensor:
        """What was handed over at a place, in the last call of its module.

        Raises:
            ModelMismatch: nothing was, or it was overwritten since.
        """
        return self.calls(place)[-1]

    def calls(self, place: str) -> list[Tensor]:
        """What was handed over at a place since the taps were opened, a tensor a call of its module."""
        seen = self._seen[place]
        if not seen:
            raise ModelMismatch(
                f"the forward pass did not come by {place!r}: its module was not called."
            )
        if any(tensor._version != version for tensor, version in seen):
            raise ModelMismatch(
                f"what {place!r} handed over was overwritten in place by the operator behind it: tap that "
                "one instead, or build the network with inplace=False."
            )
        return [tensor for tensor, _ in seen]

    def open(self) -> None:
        """Forget what was seen, and watch."""
        for seen in self._seen.values():
            seen.clear()
        self._open = True

    def close(self) -> None:
        """Watch no longer, and let go of what was seen."""
        self.open()
        self._open = False

    def remove(self) -> None:
        """Take the hooks off the network."""
        self.close()
        for handle in self._handles:
            handle.remove()

    def run_until_seen(self, inputs: Any) -> None:
        """Run the network no further than to the last of the places that it comes by."""
        self.open()
        self._stop = True
        try:
            call(self.network, inputs)
        except _Seen:
            pass
        finally:
            self._stop = False

    def _watch(self, place: str) -> Any:
        name, end, number = _parse(place)
        module = find_module(self.network, name)
        if end == "input":
            before = _Before(self, place, number)
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(_After(self, place, number))

    def _see(self, place: str, number: int, values: Any) -> None:
        if not self._open or Taps.blind:
            return
        tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
        if number >= len(tensors):
            raise ModelMismatch(f"{place!r} handed over {len(tensors)} tensors, counted from 0.")
        tensor = tensors[number]
        self._seen[place].append((tensor, tensor._version))
        if self._stop and all(self._seen.values()):
            raise _Seen


@contextmanager
def unwatched() -> Iterator[None]:
    """Let forward passes go by unseen, such as a second one of a network within a step.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> taps = Taps(net, ["0"], open=True)
        >>> first = net(torch.ones(1, 4))
        >>> with unwatched():
        ...     _ = net(torch.zeros(1, 4))
        >>> taps["0"] is first
        True
    """
    Taps.blind += 1
    try:
        yield
    finally:
        Taps.blind -= 1


class _Seen(Exception):
    """All places were passed: the rest of the forward pass is not needed."""


class _Hook:
    """What a module calls; a copy of the module gets one that does nothing."""

    def __init__(self, taps: Taps, place: str, number: int) -> None:
        self.taps, self.place, self.number = taps, place, number

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _idle, ()


class _Before(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.taps._see(self.place, self.number, (args, kwargs))


class _After(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.taps._see(self.place, self.number, output)


def _nothing(*anything: Any) -> None:
    """The hook of a copied module."""


def _idle() -> Any:
    """What a pickled hook becomes."""
    return _nothing


def find_module(network: nn.Module, name: str) -> nn.Module:
    """The submodule of that name; ``""`` is the network.

    Raises:
        UnknownName: there is none; the nearest are named.
    """
    modules: dict[str, nn.Module] = dict(network.named_modules())
    if name not in modules:
        raise UnknownName("module", name, (n for n in modules if n))
    return modules[name]


def _parse(place: str) -> tuple[str, str, int]:
    name, *rest = place.split(":")
    end, number, *more = [*rest, *("output", "0")[len(rest) :]]
    if more or end not in ("input", "output") or not number.isdigit():
        raise InputError(
            f"the place {place!r} should be MODULE, MODULE:input, or MODULE:output:1 for the second "
            "tensor."
        )
    return name, end, int(number)
