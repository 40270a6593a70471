"""Watching the activations that carry the channels of groups.

:func:`watching` calls a function whenever an activation passes a site; :func:`by_channel` lays it out as
``(examples, channels, positions)``, the same for a map, a token and a unit. What the function returns
takes the activation's place, if it returns something.

The surprising rule: where gradients are asked for, each use of an activation is watched as a tensor of its
own (:func:`own_use`). The gradient at a residual stream would count what flows past the layer as well, and
a channel with two users would be counted twice.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ...core.run import Run
from ...core.task import evaluation
from ...errors import InputError
from ...measure.macs import unfused
from ...mechanisms.groups import Group, Site

#: Called with the number of the site and the activation; may return what takes its place.
See: TypeAlias = Callable[[int, Tensor], Tensor | None]


def uses(group: Group) -> list[Site]:
    """The inputs of the layers that use the channels, in the order of the forward pass.

    Removing a channel is the same as making it zero at all of them. There are none if one of the users
    cannot be watched, because it is no module without children (fused attention, a raw parameter).
    """
    users = {member.layer for member in group.with_role("uses")}
    found = [s for s in group.sites if s.side == "input" and s.module in users]
    return found if {s.module for s in found} == users else []


def named(group: Group, *settings: Any) -> bool:
    """Whether a setting asks for one of the group's layers by its full name, not only by a pattern."""
    lists = [[setting] if isinstance(setting, str) else setting for setting in settings]
    return any(name in names for names in lists if names is not None for name in group.layers)


def by_channel(activation: Tensor, site: Site) -> Tensor:
    """An activation as ``(batch, channels, positions)``; positions include a channel's repeats.

    Example:
        >>> site = Site("conv", "output", 0, 0, 1, np.arange(6).reshape(6, 1))
        >>> by_channel(torch.zeros(2, 6, 4, 4), site).shape
        torch.Size([2, 6, 16])
    """
    front = activation.movedim(site.dim, 1) if activation.ndim > 1 else activation[None]
    return _rows(front, site.index)


def by_example(activation: Tensor, site: Site, examples: int) -> Tensor:
    """As :func:`by_channel`, with one row for each example of the batch.

    Args:
        activation: with the batch in any dim; windows or patches of an example may lie beside each
            other in it.
        site: where it was seen.
        examples: how many the batch has.

    Raises:
        InputError: no dim of the activation holds the batch.
    """
    dims = [d for d in range(activation.ndim) if d != site.dim % activation.ndim]
    exact = [d for d in dims if activation.shape[d] == examples]
    several = [d for d in dims[:1] if activation.shape[d] % examples == 0]
    if not exact + several:
        raise InputError(
            f"the {site.side} of {site.module!r} has the shape {tuple(activation.shape)}, in which no "
            f"dim holds the {examples} examples of the batch, so that nothing can be said of each "
            f"example. Leave the layer out with layers: '!{site.module}'."
        )
    batch = (exact + several)[0]
    order = [batch, site.dim % activation.ndim, *(d for d in dims if d != batch)]
    rows = _rows(activation.permute(order), site.index)
    split = rows.reshape(examples, -1, *rows.shape[1:])
    return split.movedim(1, 2).reshape(examples, rows.shape[1], -1)


def own_use(activation: Tensor) -> Tensor:
    """The activation as a tensor of its own, whose gradient is that of this use alone."""
    if activation.requires_grad:
        return activation.view_as(activation)
    return activation.detach().requires_grad_()


class Watch:
    """Hooks at sites, on until :meth:`close`, or until nobody holds the watch any more.

    Args:
        model: whose forward passes are watched.
        sites: where.
        see: called at each, in every forward pass.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], see: See) -> None:
        self._see = see
        self._sites: defaultdict[tuple[str, str, int], list[tuple[int, Site]]] = defaultdict(list)
        for number, site in enumerate(sites):
            self._sites[site.module, site.side, site.call].append((number, site))
        self._calls: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._handles)  # a step may fail before it closes its watch
        try:
            self._register(model, list(dict.fromkeys(site.module for site in sites)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the hooks off; a second time it does nothing."""
        _remove(self._handles)

    def _register(self, model: nn.Module, names: Sequence[str]) -> None:
        keep = self._handles.append
        keep(model.register_forward_pre_hook(_weakly(self._begin)))
        for name in names:
            module = model.get_submodule(name)
            keep(module.register_forward_pre_hook(_weakly(self._enter, name), with_kwargs=True))
            keep(module.register_forward_hook(_weakly(self._leave, name)))

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        self._calls.clear()

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._pass((name, "input", self._calls[name]), (args, kwargs))

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        self._calls[name] += 1
        return self._pass((name, "output", self._calls[name] - 1), output)

    def _pass(self, place: tuple[str, str, int], tree: Any) -> Any:
        """Show the watched tensors of one side of a call; None, for torch, if nothing was replaced."""
        watched = self._sites.get(place)
        if not watched:
            return None
        leaves, form = pytree.tree_flatten(tree)
        tensors = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        replaced = False
        for number, site in watched:
            place_in_call = tensors[site.position]
            answer = self._see(number, leaves[place_in_call])
            if answer is not None:
                leaves[place_in_call], replaced = answer, True
        return pytree.tree_unflatten(leaves, form) if replaced else None


@contextmanager
def watching(model: nn.Module, sites: Sequence[Site], see: See) -> Iterator[None]:
    """Call ``see(number, activation)`` at the sites, in every forward pass inside the block.

    Args:
        model: left without hooks, whatever happens.
        sites: where; ``number`` counts them from 0.
        see: may return a tensor that takes the activation's place.
    """
    watch = Watch(model, sites, see)
    try:
        yield
    finally:
        watch.close()


@contextmanager
def calibrating(run: Run, sites: Sequence[Site], see: See) -> Iterator[None]:
    """Watch the sites of a run's model while it is in eval mode; afterwards it is as it was.

    Args:
        run: whose model.
        sites: where.
        see: called at each, in every forward pass inside the block.
    """
    with evaluation(run.model), unfused(), watching(run.model, sites, see):
        yield


def _weakly(method: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """A hook that does not keep its object alive."""
    reference = weakref.WeakMethod(method)

    def hook(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else alive(*first, *args)

    return hook


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _rows(front: Tensor, index: np.ndarray) -> Tensor:
    """Lay out a tensor that has the batch in dim 0 and the channels in dim 1."""
    wanted = index.reshape(-1)
    if front.shape[1] != len(wanted) or not np.array_equal(wanted, np.arange(len(wanted))):
        front = front.index_select(1, torch.from_numpy(wanted).to(front.device))
    return front.reshape(front.shape[0], len(index), -1)
