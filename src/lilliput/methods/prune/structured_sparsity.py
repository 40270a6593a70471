"""Structured sparsity learning: a group lasso makes whole filters, channels, kernel shapes and layers zero.

Paper: Learning Structured Sparsity in Deep Neural Networks (Wen, Wu, Wang, Chen, Li; NIPS 2016; arXiv
1608.03665)

The loss gets ``sum over groups of lambda * ||w_g||``. Groups of a layer's weight W (filters, channels,
height, width) are: a filter ``W[n]``; a channel ``W[:, c]``; a shape ``W[:, c, h, w]``, one column of the
matrix that the convolution multiplies with; for ``depth``, all of W, where the network has a path around
the layer. They overlap, and their penalties add up. Then the zeros are removed or frozen, and the network
is fine-tuned.

``update: subgradient`` adds ``lambda * w / ||w_g||`` to the gradient, 0 at a zero group, as the authors'
code does. It never reaches zero exactly, so after each step a group in which every weight is below
``threshold`` becomes zero as a whole. ``zero_out: weight`` is the authors' code, which looks at each
weight by itself. ``update: proximal`` shrinks each group by ``learning rate * lambda`` after the
optimizer's step and stops at zero: exact zeros without a threshold, and the better choice. The kinds are
shrunk one after the other, shapes, channels, filters, depth. For groups that lie in each other that is
the exact proximal step; for filters, which cross the others, it is an approximation.

What is removed at the end: blocks that only pass their input on once a ``depth`` group is zero (see below);
channels whose filters are zero in every layer that makes them (the constant that they still send is
folded, where it is one), or that no layer uses; border rows and columns of a kernel that are zero for all
channels, on both sides alike, if the padding can shrink with them. All other zero groups (shapes inside
a kernel, inputs of the first layer, what rounding left) are frozen by masks and stay in dense layers:
smaller files, not faster ones; the report says so.

``depth: remove`` looks around each layer that is zero for the smallest module whose output then equals its
input on training images, and takes it away whole. A residual block ``relu(x + f(x))`` is such a module if
f sends zeros, for x is not negative behind a ReLU. A batch normalization behind the dead layer sends a
constant instead, and ``relu(x + c)`` is no identity. The constant is added to the bias in front where
that is exact, as in blocks without the last ReLU; elsewhere it is silenced, and the report says how far the
output moved. Where no module does (a projection shortcut, layers directly in the network), and always with
``depth: shrink``, ``at_least`` channels of a dead layer stay and its kernel shrinks to one pixel where the
padding allows it: it costs next to nothing, and its shortcut goes on.

Faithful: groups, penalties, subgradient, threshold, frozen zeros. Differs: rows of layers whose outputs
must stay get no filter penalty; a linear layer or a 1x1 kernel has no shapes beside its channels; depth
groups are found by silencing each layer, so a projection shortcut counts as bypassed by its block: leave
it out of ``layers``. The authors delete dead layers by hand.

Cost: some norms a layer and step. When not to use it: with adaptive optimizers (they rescale the
subgradient; proximal steps keep their size, but the learning rate is small); for a given size, since the
lambdas must be searched for it. With momentum m the loss moves weights by up to 1 / (1 - m) learning
rates a step and a proximal step by one, so it wants larger lambdas.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight, matches, select
from ...core.task import call, evaluation
from ...core.types import Change, NonNegative, Positive
from ...errors import ModelMismatch, NothingChanged, NothingMatched, SurgeryFailed
from ...measure import size
from ...mechanisms.budget import lowest, takes_part
from ...mechanisms.encodings import Mask, encode, encoding_of, original_of
from ...mechanisms.groups import Group, Groups, Member
from ...mechanisms.groups.classes import Removal
from ...mechanisms.surgery import Bypass, bypass, cut, within
from ._blocks import Block, find_blocks
from ._channels import ChannelMethod
from ._norms import effective, rows

Kind: TypeAlias = Literal["filters", "channels", "shapes", "depth"]

#: Over which dims of ``(filters, channels, positions)`` a group of each kind extends, small kinds first.
_EXTENT: dict[Kind, tuple[int, ...]] = {
    "shapes": (0,),
    "channels": (0, 2),
    "filters": (1, 2),
    "depth": (0, 1, 2),
}


# An output that varies by less, relative to its largest number, does not depend on the input.
_VARIES = 1e-6

# Examples on which a block must pass its input on.
_SAMPLES = 256

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matrix(value: Tensor, transposed: bool = False) -> Tensor:
    """A weight as ``(filters, channels, positions of the kernel)``, a view.

    Args:
        value: of a convolution, linear or recurrent layer.
        transposed: whether its channels come first, as in a transposed convolution.
    """
    value = value.transpose(0, 1) if transposed else value
    return value.flatten(2) if value.ndim > 2 else value[:, :, None]


def unfolded(weight: Tensor, like: Tensor, transposed: bool = False) -> Tensor:
    """The way back from :func:`matrix`, to the shape of ``like``."""
    if not transposed:
        return weight.reshape(like.shape)
    return weight.reshape(like.transpose(0, 1).shape).transpose(0, 1)


def norms(weight: Tensor, kind: Kind) -> Tensor:
    """The l2 norm of each group of one kind; dims that a group extends over have size 1.

    Args:
        weight: see :func:`matrix`.
        kind: which groups.

    Example:
        >>> norms(torch.ones(4, 9, 1), "filters").flatten()
        tensor([3., 3., 3., 3.])
    """
    length: Tensor = torch.linalg.vector_norm(weight, 2, dim=_EXTENT[kind], keepdim=True)
    return length


def penalty(weight: Tensor, strengths: Mapping[Kind, float]) -> Tensor:
    """``sum of lambda * ||w_g||`` over the groups of all kinds; its gradient is 0 at a zero group."""
    terms = [strength * norms(weight, kind).sum() for kind, strength in strengths.items()]
    return torch.stack(terms).sum()


def shrunk(weight: Tensor, strengths: Mapping[Kind, float], step: float) -> Tensor:
    """The proximal step: each group shorter by ``step * lambda``, or zero; kind after kind.

    Example:
        >>> shrunk(torch.tensor([[[3.0], [4.0]], [[0.3], [0.4]]]), {"filters": 1.0}, 1.0).flatten()
        tensor([2.4000, 3.2000, 0.0000, 0.0000])
    """
    for kind in (k for k in _EXTENT if k in strengths):
        length = norms(weight, kind).clamp_min(torch.finfo(weight.dtype).tiny)
        weight = weight * (1 - step * strengths[kind] / length).clamp_min(0.0)
    return weight


def alive(weight: Tensor, kinds: Mapping[Kind, Any], threshold: float = 0.0) -> Tensor:
    """Which weights lie in no dead group: one that is zero, or below the threshold in every weight.

    Returns:
        Bool, in the weight's shape.
    """
    lives = torch.ones_like(weight, dtype=torch.bool)
    for kind in kinds:
        largest = weight.abs().amax(_EXTENT[kind], keepdim=True)
        lives = lives & (largest >= threshold) & (largest > 0)
    return lives


def bypassed(model: nn.Module, layer: str, inputs: Any) -> bool:
    """Whether the network's output still depends on its input when one layer sends zeros.

    Args:
        model: runs once, in eval mode.
        layer: name of a module.
        inputs: at least two different examples.
    """

    def silence(module: nn.Module, args: Any, output: Any) -> Any:
        return pytree.tree_map_only(Tensor, torch.zeros_like, output)

    handle = model.get_submodule(layer).register_forward_hook(silence)
    try:
        with evaluation(model), torch.no_grad():
            outputs = [t for t in pytree.tree_leaves(call(model, inputs)) if isinstance(t, Tensor)]
    finally:
        handle.remove()
    return any(bool((t - t[:1]).abs().max() > _VARIES * t.abs().max()) for t in outputs)


def removable(model: nn.Module, group: Group) -> np.ndarray:
    """Channels that can go without loss: bool, ``(channels,)``.

    Nobody uses them, or nothing but zero filters makes them, so that they are constant. Where
    an operator takes a statistic over the channels, or compares them in pairs, none can.
    """
    if group.mixed_by or group.pairwise:
        return np.zeros(group.channels, bool)
    dead = _zero(model, group.with_role("uses"))
    if _constant_without_filters(model, group):
        dead = dead | _zero(model, group.with_role("makes"))
    return dead


def _zero(model: nn.Module, members: tuple[Member, ...]) -> np.ndarray:
    found = [(rows(effective(model, m.tensor), m) == 0).all(1).cpu().numpy() for m in members]
    together: np.ndarray = np.logical_and.reduce(found) if found else np.zeros(1, bool)
    return together


def _constant_without_filters(model: nn.Module, group: Group) -> bool:
    """Whether only linear layers and convolutions, and one number a channel, make the channels."""
    plain = (nn.Linear, nn.modules.conv._ConvNd)
    along = [(m, effective(model, m.tensor)) for m in group.with_role("along")]
    return all(isinstance(model.get_submodule(name), plain) for name in group.layers) and all(
        value.numel() == value.shape[m.dim] for m, value in along
    )


def spare_border(convolution: Any) -> list[int]:
    """How many taps are zero on both sides of the kernel and can go, for each of its dims.

    The padding shrinks by as much, so that the rest of the kernel meets what it met before. Without
    enough padding, the kernel would have to skip pixels instead, and stays as it is.
    """
    padding = convolution.padding
    if convolution.padding_mode != "zeros" or padding == "valid":
        return [0] * len(convolution.kernel_size)
    found = []
    for dim, dilation in enumerate(convolution.dilation):
        taps = (convolution.weight != 0).movedim(dim + 2, 0).flatten(1).any(1).tolist()
        free = (len(taps) - 1) // 2
        if any(taps):
            free = min(free, taps.index(True), taps[::-1].index(True))
        if padding != "same":
            free = min(free, padding[dim] // dilation)
        found.append(free)
    return found


class _Borders(Groups):
    """Taps of kernels as if they were channels, so that surgery cuts them, checks, and remembers."""

    def __init__(self, model: nn.Module, spare: Mapping[str, list[int]]) -> None:
        self.removal: dict[int, np.ndarray] = {}
        self._values: dict[str, int] = {}
        found: list[Group] = []
        for name, dims in spare.items():
            weight = effective(model, f"{name}.weight".lstrip("."))
            for dim, free in ((d, f) for d, f in enumerate(dims) if f):
                size = weight.shape[dim + 2]
                taps = np.arange(size)
                tensor = f"{name}.weight".lstrip(".")
                self.removal[len(found)] = np.delete(taps, taps[free : size - free])
                found.append(Group(size, (Member(tensor, dim + 2, "uses", taps[:, None]),)))
                self._note(model, name, dim, free)
        super().__init__(tuple(found))

    def _note(self, model: nn.Module, name: str, dim: int, free: int) -> None:
        convolution: Any = model.get_submodule(name)
        place = f"{name}.kernel_size.{dim}".lstrip(".")
        self._values[place] = convolution.kernel_size[dim] - 2 * free
        if convolution.padding != "same":
            padding = convolution.padding[dim] - free * convolution.dilation[dim]
            self._values[f"{name}.padding.{dim}".lstrip(".")] = padding

    def attributes(self, removal: Removal) -> dict[str, int]:
        """Kernel sizes and paddings as they will be."""
        return self._values


@method
class StructuredSparsity(ChannelMethod):
    """Penalize groups of weights until whole filters, channels, shapes or layers are zero; remove those.

    Attributes:
        layers: pattern over the layers under penalty; channels that they make or use can go.
        penalty: lambda of each kind of group: ``filters``, ``channels``, ``shapes``, ``depth``. The
            authors' LeNet: 0.005 for filters and shapes at a learning rate of 0.01.
        update: how the penalty moves the weights; see the module's docstring.
        threshold: for the subgradient: below it, a group is zero. The authors' value.
        zero_out: whether a whole group must be below the threshold, or each weight goes by itself.
        depth: of a layer that is zero as a whole, remove the block that only passes its input on, or
            shrink the layer to ``at_least`` channels.
        fold: add what removed channels always send to the bias or running mean behind them, and what
            a removed block adds to the bias in front of it.

    Example:
        >>> StructuredSparsity(penalty={"filters": 0.005, "shapes": 0.005}).threshold
        0.0001
    """

    when: ClassVar[Literal["start", "end"]] = "end"

    penalty: dict[Kind, NonNegative]
    update: Literal["subgradient", "proximal"] = "subgradient"
    threshold: Positive = 1e-4
    zero_out: Literal["group", "weight"] = "group"
    depth: Literal["remove", "shrink"] = "remove"
    fold: Literal["none", "constant"] = "constant"

    _chosen: list[tuple[Weight, list[Kind]]] = PrivateAttr(default_factory=list)
    _staying: dict[str, str] = PrivateAttr(default_factory=dict)

    def _check_amount(self) -> None:
        if (self.keep, self.budget, self.scope, self.normalize) != (None, None, "layer", "none"):
            raise ValueError(
                "penalty says what goes: keep, budget, scope, normalize do nothing here"
            )
        if not any(self.penalty.values()):
            raise ValueError("penalty: give a lambda above 0 for at least one kind of group")

    @classmethod
    def example(cls) -> StructuredSparsity:
        """A threshold that finds small groups at once."""
        return cls(penalty={"filters": 0.01, "channels": 0.01}, threshold=0.135, round_to=1)

    def takes_part(self, groups: Groups) -> list[bool]:
        """Whether a layer under penalty makes or uses the channels, and none that makes them is left out."""
        left_out = [pattern for pattern in self._patterns() if pattern.startswith("!")]
        return [
            takes_part(group, ["*", *left_out])
            and any(matches(self.layers, m.layer) for m in group.members if m.role != "along")
            for group in groups.groups
        ]

    def removal(self, run: Run, groups: Groups) -> Removal:
        """Channels that can go without loss, as many as the rounding of widths allows."""
        live, kept = [], []
        for group, allowed in zip(groups.groups, self.allowed(run, groups), strict=True):
            dead = removable(run.model, group) & (len(allowed) > 1)
            stay = group.channels - int(dead.sum())
            if not stay:  # a dead layer: whatever the rounding
                self.note(run, group.name, "all zero; a layer keeps at_least channels")
            few = min(self.at_least, group.channels)
            kept.append(allowed[np.searchsorted(allowed, stay)] if stay else few)
            live.append((~dead).astype(float))
        return lowest(live, np.array(kept))

    def check(self, model: nn.Module) -> None:
        """The pattern must cover a weight."""
        super().check(model)
        self._weights(model)

    def attach(self, run: Run) -> None:
        """Find out which kinds of groups each weight has."""
        super().attach(run)
        chosen = self._weights(run.model)
        makes = {m.tensor for g in self.groups(run).groups for m in g.with_role("makes")}
        inputs = next(run.calibration(2)).inputs if self.penalty.get("depth") else None
        kinds = [self._kinds(run.model, w, w.name in makes, inputs) for w in chosen]
        if inputs is not None and not any("depth" in mine for mine in kinds):
            raise NothingMatched(
                f"structured_sparsity: depth is under penalty, and no layer of {self.layers!r} has a path "
                "around it (or a batch has only one example, so that it could not be tried)."
            )
        self._chosen = list(zip(chosen, kinds, strict=True))
        self._staying = {}

    def loss(self, run: Run) -> Mapping[str, Tensor]:
        """The penalty, where its gradient is what moves the weights."""
        if self.update == "proximal":
            return {}
        terms = [
            penalty(_matrix(weight, weight.value), strengths)
            for weight, strengths in self._penalized()
        ]
        return {"structured_sparsity": torch.stack(terms).sum()} if terms else {}

    def after_step(self, run: Run) -> None:
        """Shrink each group, or set to zero what is below the threshold."""
        for weight, strengths in self._penalized():
            stored = original_of(weight)
            if stored.shape == weight.value.shape:
                stored.data.copy_(self._moved(run, weight, stored.detach(), strengths))

    def settled(self, run: Run) -> bool:
        """Whether the penalty has had its time; before, a better score only means fewer zeros."""
        return run.progress >= 1.0

    def finish(self, run: Run) -> list[Change]:
        """Remove zeros that can go; freeze the others; report both."""
        if self.update == "subgradient":
            self.after_step(run)  # a stage without steps has not looked for small groups yet
        frozen = self._freeze(shared=True)
        blocks = self._remove_blocks(run)
        self._remove_channels(run)
        kernels = self._trim(run)
        frozen |= self._freeze(shared=False)
        found = [*blocks, *self._changes(run), *kernels, *self._zeros(frozen)]
        if not found:
            raise NothingChanged(
                f"structured_sparsity: no group has become zero in {run.step} steps. Raise penalty, use "
                "update: proximal, raise the learning rate, or train longer."
            )
        return found

    # -- how --------------------------------------------------------------------------------------

    def _patterns(self) -> list[str]:
        return [self.layers] if isinstance(self.layers, str) else self.layers

    def _weights(self, model: nn.Module) -> list[Weight]:
        return select(model, self.layers, by=self.method_name())

    def _penalized(self) -> Iterator[tuple[Weight, dict[Kind, float]]]:
        """The weights that train and have groups, and the lambdas of those."""
        for weight, kinds in self._chosen:
            if kinds and original_of(weight).requires_grad:
                yield weight, {kind: self.penalty[kind] for kind in kinds}

    def _kinds(self, model: nn.Module, weight: Weight, makes: bool, inputs: Any) -> list[Kind]:
        """The kinds under penalty that a weight has."""
        has = {
            "filters": makes,
            "channels": True,
            "shapes": _matrix(weight, weight.value).shape[2] > 1,
            "depth": inputs is not None and bypassed(model, weight.layer, inputs),
        }
        return [kind for kind in _EXTENT if has[kind] and self.penalty.get(kind)]

    @torch.no_grad()
    def _moved(
        self, run: Run, weight: Weight, stored: Tensor, strengths: Mapping[Kind, float]
    ) -> Tensor:
        """What the method makes of a weight after the optimizer's step."""
        if self.update == "subgradient" and self.zero_out == "weight":
            return stored * (stored.abs() >= self.threshold)
        folded = _matrix(weight, stored)
        if self.update == "proximal":
            folded = shrunk(folded, strengths, self._rate(run))
        else:
            folded = folded * alive(folded, strengths, self.threshold)
        return unfolded(folded, stored, _transposed(weight))

    def _rate(self, run: Run) -> float:
        return run.learning_rate(
            "structured_sparsity must know the learning rate for its proximal steps:"
        )

    def _freeze(self, *, shared: bool) -> set[str]:
        """Put masks on weights with dead groups: on those of shared values, or on all others."""
        threshold = 0.0 if self.update == "proximal" else self.threshold
        frozen = set()
        for weight, strengths in self._penalized():
            value, old = weight.value.detach(), encoding_of(weight, Mask)
            lives = alive(_matrix(weight, value), strengths, threshold)
            mask = unfolded(lives, value, _transposed(weight))
            mask = mask if old is None else mask & old.mask
            done = mask.all() if old is None else torch.equal(mask, old.mask)
            if not done and shared == (original_of(weight).shape != value.shape):
                encode(weight, Mask(mask))
                frozen.add(weight.name)
        return frozen

    def _remove_blocks(self, run: Run) -> list[Change]:
        """Take the blocks away that layers without a weight have made identities."""
        dead = [
            weight.layer
            for weight, strengths in self._penalized()
            if "depth" in strengths and not weight.value.any()
        ]
        if self.depth == "shrink" or not dead:
            return []
        batches = [batch.inputs for batch in run.calibration(_SAMPLES)]
        found = find_blocks(run.model, dead, batches)
        before, totals = self._figures(run) if found else {}, self.memory(run)["totals"]
        changes = [c for block in found if (c := self._remove_block(run, block, batches[0]))]
        for what, now in self._figures(run).items() if changes else ():
            totals.setdefault(what, [before[what], 0])[1] = now
        gone = within([change.where for change in changes])
        self._chosen = [(weight, kinds) for weight, kinds in self._chosen if not gone(weight.layer)]
        return changes

    def _remove_block(self, run: Run, block: Block, inputs: Any) -> Change | None:
        """Take one block away; None where surgery refuses, and its layers are shrunk instead."""
        parameters = size(run.model.get_submodule(block.name)).parameters
        try:
            done, note = self._bypass(run, block, inputs)
        except (ModelMismatch, SurgeryFailed) as error:
            self._staying |= dict.fromkeys(block.zero, f"; {block.name} stays: {error}")
            return None
        memory = self.memory(run)
        memory["error"] = max(e for e in (memory["error"], done.error) if e is not None)
        text, zero = f"{parameters:,} parameters", ", ".join(block.zero)
        note = f"it only passes its input on, with zero weights in {zero}{note}"
        return Change(block.name, "block", text, "removed", self.method_name(), note)

    def _bypass(self, run: Run, block: Block, inputs: Any) -> tuple[Bypass, str]:
        """Fold the constant that a block adds, where that is exact; else silence it."""
        model, optimizer = run.model, run.optimizer
        if block.shift and self.fold == "constant":
            with contextlib.suppress(SurgeryFailed):
                done = bypass(model, block.name, inputs, optimizer=optimizer, edit=block.fold)
                return done, f"; the constant that it added is in {', '.join(block.shift)} now"
        silenced = block.silenced
        done = bypass(model, block.name, inputs, silenced=silenced, optimizer=optimizer)
        if not done.moved:
            return done, ""
        return done, (
            f"; the constant that it still sent is gone, which moved the output by {done.moved:.1e} of "
            "its largest number"
        )

    def _remove_channels(self, run: Run) -> None:
        """Cut channels until none is left that can go: a removed user may leave its inputs without one."""
        self.memory(run)["round"] = self.rounds
        try:
            self.groups(run)
        except NothingMatched:  # the blocks that are gone had all that the settings mean
            return
        while any(map(len, self.removal(run, self.groups(run)).values())):
            self._prune(run, self.rounds)

    def _trim(self, run: Run) -> list[Change]:
        """Cut zero borders off the kernels of the layers under penalty."""
        modules = {w.layer: w.module for w, _ in self._penalized()}
        convolutions = {n: m for n, m in modules.items() if isinstance(m, _CONVOLUTIONS)}
        spare = {n: s for n, m in convolutions.items() if any(s := spare_border(m))}
        before = {n: _size(convolutions[n]) for n in spare}
        if spare:
            borders, inputs = _Borders(run.model, spare), self.inputs(run)
            cut(run.model, borders, borders.removal, inputs=inputs, optimizer=run.optimizer)
        return [
            Change(name, "kernel", size, _size(convolutions[name]), self.method_name())
            for name, size in before.items()
        ]

    def _zeros(self, frozen: set[str]) -> list[Change]:
        """What the new masks hold."""
        found, method = [], self.method_name()
        for weight, strengths in self._penalized():
            mask = encoding_of(weight, Mask)
            if weight.name not in frozen or mask is None or mask.mask.all():
                continue
            zeros = int((~mask.mask).sum())
            note = f"{zeros / mask.mask.numel():.0%} of a weight that is still computed whole"
            if "depth" in strengths and not weight.value.any():
                note = "all that is left: only the path around the layer counts"
                note += self._staying.get(weight.layer, "")
            found.append(Change(weight.name, "frozen zeros", 0, zeros, method, note))
        return found


def _transposed(weight: Weight) -> bool:
    return isinstance(weight.module, nn.modules.conv._ConvTransposeNd)


def _matrix(weight: Weight, value: Tensor) -> Tensor:
    return matrix(value, _transposed(weight))


def _size(convolution: Any) -> str:
    return "x".join(str(size) for size in convolution.weight.shape[2:])
