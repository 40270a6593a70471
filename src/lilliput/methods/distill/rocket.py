"""Rocket launching: a light network and a booster train together, share layers, and the booster falls off.

Paper: Rocket Launching: A Universal and Efficient Framework for Training Well-performing Light Net (Zhou,
Fan, Cui, Bian, Zhu, Gai; AAAI 2018; arXiv 1708.04106)

The light network gives logits l and probabilities p, the booster logits z and probabilities q, both for the
same sample x with label y. They minimize one loss::

    L = H(y, p) + H(y, q) + lambda * ||l - z||**2

- *Gradient block*: the booster gets no gradient from the third term, the hint. Else it would be pulled down
  towards the light network.
- *Shared layers* get the gradients of all three terms. ``share: PLACE`` has the lower layers in common: they
  run once, and the booster's upper layers start from what the student hands over at that place.
- *The interval variant*: blocks of the student are spread over the booster, which has further blocks between
  them. ``share: [pattern, ...]`` or ``share: {module: module}`` has the weights of these modules in common;
  each network runs by itself and has its own batch normalization, statistics, scale and shift, because the
  activations that reach a shared block differ.

Faithful: loss, gradient block, both ways to share. As in the authors' code the hint is the sum over the
classes and the mean over the batch, with lambda 0.03; there the light network's i-th block of a group is
the booster's i-th, which ``every=1`` means, and the first convolution is shared, the last linear layer is
not. The paper also tries the squared error of the probabilities (``hint="probabilities"``); logits are
better. With a trained teacher beside the booster, as in the paper, add ``soft_targets`` to the stage.
Differs: the authors' code keeps batch normalization separate where the lower layers are shared, too; here
such layers run once, as the paper draws them. An encoded weight (a mask, a codebook) is shared as it is
used, so the booster sees the zeros too.

The surprising rule: the booster is an extra of the stage. It trains with the stage's optimizer, its loss is a
part of the stage's loss, and it never reaches the file.

Cost: the booster's forward and backward pass, and with ``share: PLACE`` of its upper layers only. When not to
use it: where a trained teacher exists, the booster's training is paid again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.select import matches
from ...core.task import answer, call, evaluation
from ...core.types import Change, Term
from ...errors import ModelMismatch, NothingMatched, UnknownName, did_you_mean
from ...mechanisms.encodings import bake
from ...mechanisms.taps import Taps, find_module
from ...mechanisms.teacher import logits_of
from ._players import precise, require_class_dim, require_same_classes, task_loss, trainable
from ._responses import require_classes


def hint_loss(
    light: Tensor, booster: Tensor, gradient_block: bool = True, class_dim: int = -1
) -> Tensor:
    """``||l - z||**2``, the sum over the classes and the mean over all predictions.

    Args:
        light: l, shape ``(batch, ...)``.
        booster: z, same shape; with ``gradient_block`` it gets no gradient.
        gradient_block: the paper's; without it the booster is drawn towards the light network as well.
        class_dim: the dim that holds the classes.
    """
    target = booster.detach() if gradient_block else booster
    return (light - target).square().sum(dim=class_dim).mean()


class Upper(nn.Module):
    """The layers of a network above a place, as a function of what the place hands over.

    Args:
        network: changed: the module at the place makes room, and what only leads to it goes where the
            network can do without.
        above: name of the module; everything that uses its output stays.
        inputs: of the network, for one forward pass.

    Raises:
        UnknownName: there is no such module.
        ModelMismatch: the network comes by it never or several times.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> upper = Upper(network, "1", torch.ones(5, 3))
        >>> upper(torch.zeros(5, 4), torch.ones(5, 3)).shape, upper.network
        (torch.Size([5, 2]), Sequential(
          (0): Identity()
          (1): Given()
          (2): Linear(in_features=4, out_features=2, bias=True)
        ))
    """

    def __init__(self, network: nn.Module, above: str, inputs: Any) -> None:
        super().__init__()
        below = _modules_below(network, above, inputs)
        taps = Taps(network, [above], open=True)
        with evaluation(network), torch.no_grad():
            expected = logits_of(call(network, inputs))
        given, feature = Given(), taps[above]
        self.feature_shape = feature.shape
        taps.remove()
        _replace(network, above, given)
        self.network, self._given = network, [given]  # in a list: it is no second child
        self._drop(below, feature, inputs, expected)

    def forward(self, feature: Tensor, inputs: Any) -> Any:
        """The network's output.

        Args:
            feature: what the place hands over.
            inputs: of the network; only what does not pass by the place is still computed from them.
        """
        (given,) = self._given
        given.value = feature
        try:
            return call(self.network, inputs)
        finally:
            given.value = None

    def _drop(self, below: list[str], feature: Tensor, inputs: Any, expected: Tensor) -> None:
        """Take away what leads to the place, if the output stays what it was; else only freeze it."""
        taken = {name: find_module(self.network, name) for name in below}
        for name in below:
            _replace(self.network, name, nn.Identity())
        if self._gives(expected, feature, inputs):
            return
        for name, module in taken.items():
            _replace(self.network, name, module.requires_grad_(False))

    def _gives(self, expected: Tensor, feature: Tensor, inputs: Any) -> bool:
        try:
            with evaluation(self.network), torch.no_grad():
                return torch.equal(logits_of(self(feature, inputs)), expected)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return False


class Given(nn.Module):
    """Hands over a tensor that it was given, whatever it is called with."""

    value: Tensor | None = None

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The tensor."""
        assert self.value is not None
        return self.value


class Sharing(nn.Module):
    """A network that runs with some tensors of another one.

    Args:
        network: its own versions of the shared tensors are frozen, and not used.
        shared: names of these.
    """

    def __init__(self, network: nn.Module, shared: list[str]) -> None:
        super().__init__()
        self.network = network
        for name in shared:
            network.get_parameter(name).requires_grad_(False)

    def forward(self, shared: dict[str, Tensor], inputs: Any) -> Any:
        """The network's output with the shared tensors in place of its own."""
        if isinstance(inputs, dict):
            return functional_call(self.network, shared, (), inputs)
        positional = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        return functional_call(self.network, shared, positional)


def shared_tensors(
    student: nn.Module, booster: nn.Module, share: list[str] | Mapping[str, str], every: int = 1
) -> dict[str, tuple[str, str]]:
    """The booster's tensors that are the student's: name in the booster -> module and tensor in the student.

    Batch normalization is never shared.

    Args:
        student: without encodings.
        booster: any network.
        share: patterns over the student's modules, or modules of the student -> modules of the booster.
        every: with patterns, which block of the booster the student's i-th is: the ``i * every``-th of the
            list of the same name. Everything else has the same name in both.

    Raises:
        NothingMatched: a pattern, or all of them, cover no module with weights.
        ModelMismatch: a module that is covered has no counterpart of its shapes.
    """
    _require_hits(student, share)
    found: dict[str, tuple[str, str]] = {}
    for name, there in _counterparts(student, share, every).items():
        for leaf, tensor in find_module(student, name)._parameters.items():
            if tensor is None:
                continue
            target = f"{there}.{leaf}" if there else leaf
            _require_shape(booster, target, f"{name}.{leaf}", tensor)
            found[target] = (name, leaf)
    if not found:
        raise NothingMatched(
            f"rocket: share={share!r} covers no module of the student with weights besides batch "
            "normalization, which is never shared."
        )
    return found


@method
class Rocket(Method):
    """Train with a booster that shares layers and falls off when the stage ends.

    Attributes:
        booster: the upper layers of the booster, or with ``above``, or where modules are shared, all of it:
            what a recipe's ``model`` may be, ``"original"``, the name of an earlier stage, or a module.
        share: a place in the student up to which both have the same layers (see
            :mod:`lilliput.mechanisms.taps`); or a list of patterns over modules whose weights they share, or
            a mapping from modules of the student to modules of the booster.
        above: the place in the booster above which its layers are used; None where the booster is
            no more than these layers.
        every: of a list of blocks, the student's i-th is the booster's ``i * every``-th; for patterns.
        weight: lambda, a number or ``{start: 0, end: 0.03}``.
        hint: what is compared, ``"logits"`` or ``"probabilities"``.
        gradient_block: keep the hint's gradient from the booster.
        class_dim: the dim of the outputs that holds the classes; 1 for maps ``(batch, classes, ...)``.

    Example:
        >>> Rocket(booster={"architecture": "resnet20"}, share=["conv1", "layer*"]).weight
        0.03
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False

    booster: Any
    share: str | Annotated[list[str], Field(min_length=1)] | dict[str, str]
    above: str | None = None
    every: Annotated[int, Field(ge=1)] = 1
    weight: LossWeight = 0.03
    hint: Literal["logits", "probabilities"] = "logits"
    gradient_block: bool = True
    class_dim: int = -1

    _booster: nn.Module = PrivateAttr()
    _tap: Taps | None = PrivateAttr(default=None)
    _shared: dict[str, tuple[str, str]] = PrivateAttr()
    _shapes: dict[str, torch.Size] = PrivateAttr()

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.above is not None and not isinstance(self.share, str):
            raise ValueError("above belongs to share: PLACE; whole networks share modules by name")
        if self.every != 1 and not isinstance(self.share, list):
            raise ValueError("every belongs to share: [pattern, ...]")
        return self

    @classmethod
    def example(cls) -> Method:
        """A transformer's embedding under the original's encoder and head."""
        return cls(booster="original", share="embed", above="embed")

    def check(self, model: nn.Module) -> None:
        """The place must be in the student."""
        if isinstance(self.share, str):
            Taps(model, [self.share]).remove()

    def attach(self, run: Run) -> None:
        """Find the booster and let it train with the student.

        Raises:
            UnknownName: a place is in neither network.
            NothingMatched: no weight is shared.
            ModelMismatch: what is shared does not fit.
        """
        booster = trainable(bake(run.find_network(self.booster)).to(run.device))
        if isinstance(self.share, str):
            self._tap = Taps(run.model, [self.share])
            made = self._upper(run, booster, self._tap)
        else:
            student = bake(copy.deepcopy(run.model))
            self._shared = shared_tensors(student, booster, self.share, self.every)
            self._shapes = {name: booster.get_parameter(name).shape for name in self._shared}
            made = Sharing(booster, list(self._shared))
        self._booster = run.extra(f"{run.key_of(self)}.booster", made)

    def before_step(self, run: Run) -> None:
        """Watch what the shared layers hand over."""
        if self._tap is not None:
            self._tap.open()

    def loss(self, run: Run) -> dict[str, Term | Tensor]:
        """The booster's loss, and the hint.

        Raises:
            ModelMismatch: student and booster have other classes.
        """
        output = self._boosted(run)
        light = precise(logits_of(run.output, "the student"))
        booster = precise(logits_of(output, "the booster"))
        require_same_classes(light, booster, "rocket", "the booster")
        require_class_dim(light, self.class_dim, "rocket")
        if self.hint == "probabilities":
            require_classes(light, self.class_dim, "rocket")
            light, booster = (x.softmax(dim=self.class_dim) for x in (light, booster))
        hint = hint_loss(light, booster, self.gradient_block, self.class_dim)
        weight = weight_at(self.weight, run.progress)
        return {"booster": task_loss(run, output), "hint": Term(hint, weight)}

    def finish(self, run: Run) -> list[Change]:
        """The booster falls off."""
        if self._tap is not None:
            self._tap.remove()
        return []

    def _upper(self, run: Run, booster: nn.Module, tap: Taps) -> nn.Module:
        """The booster's upper layers, which must take what the student hands over."""
        batch = next(run.calibration(1))
        tap.open()
        with evaluation(run.model), torch.no_grad():
            answer(run.model, batch.inputs)
        self._shapes = {place: tap[place].shape[1:] for place in tap.places}
        tap.close()
        if self.above is None:
            return booster
        upper = Upper(booster, self.above, batch.inputs)
        ((place, own),) = self._shapes.items()
        if own != upper.feature_shape[1:]:
            raise ModelMismatch(
                f"rocket: the student hands over {tuple(own)} a sample at {place!r}, the booster's layers "
                f"above {self.above!r} take {tuple(upper.feature_shape[1:])}: name places of one shape."
            )
        return upper

    def _boosted(self, run: Run) -> Any:
        """The booster's output for the present batch."""
        if self._tap is None:
            return answer(self._booster, (self._weights(run), run.batch.inputs))
        (place,) = self._tap.places
        feature = self._tap[place]
        self._tap.close()
        self._refuse_cut(place, feature.shape[1:])
        inputs = feature if self.above is None else (feature, run.batch.inputs)
        return answer(self._booster, inputs)

    def _weights(self, run: Run) -> dict[str, Tensor]:
        """The student's tensors under the booster's names."""
        found = {}
        for name, (module, leaf) in self._shared.items():
            found[name] = getattr(find_module(run.model, module), leaf)
            self._refuse_cut(name, found[name].shape)
        return found

    def _refuse_cut(self, name: str, shape: torch.Size) -> None:
        """Raise ModelMismatch where channels have gone since the booster was fitted to the student."""
        if shape != self._shapes[name]:
            raise ModelMismatch(
                f"rocket: {name!r} was {tuple(self._shapes[name])} when the booster was fitted to it, and is "
                f"{tuple(shape)} now. Channels that the booster shares cannot be cut in the same stage: cut "
                "them in an earlier or a later one."
            )


def _modules_below(network: nn.Module, above: str, inputs: Any) -> list[str]:
    """The outermost modules through which a forward pass comes before the place, and not after it."""
    find_module(network, above)
    seen: list[str] = []
    path = above.split(".")
    parents = [".".join(path[:n]) for n in range(len(path))]
    watched = {above: find_module(network, above)}
    for parent in parents:
        children = find_module(network, parent).named_children()
        watched |= {f"{parent}.{name}" if parent else name: child for name, child in children}
    # The parents of the place itself stay, whatever they pass through.
    watched = {name: m for name, m in watched.items() if name not in parents}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        for name, module in watched.items()
    ]
    with evaluation(network), torch.no_grad():
        answer(network, inputs)
    for handle in handles:
        handle.remove()
    if seen.count(above) != 1:
        raise ModelMismatch(
            f"rocket: a forward pass of the booster comes by {above!r} {seen.count(above)} times; name a "
            "module that it comes by once."
        )
    place = seen.index(above)
    return [name for name in dict.fromkeys(seen[:place]) if name not in seen[place:]]


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(find_module(network, parent), child, module)


def _counterparts(
    student: nn.Module, share: list[str] | Mapping[str, str], every: int
) -> dict[str, str]:
    """Each module of the student that is covered, and where the booster has it; no batch normalization.

    Raises:
        UnknownName: the student has no module of a name in a mapping.
    """
    names = [
        name
        for name, module in student.named_modules()
        if not isinstance(module, nn.modules.batchnorm._NormBase)
    ]
    if isinstance(share, list):
        covered = [n for n in names if _covers(share, n)]
        return {name: _moved(student, name.split("."), every) for name in covered}
    for name in share:
        find_module(student, name)
    inside = {n: next((x for x in _around(n) if x in share), None) for n in names}
    return {n: share[x] + n[len(x) :] for n, x in inside.items() if x is not None}


def _require_hits(student: nn.Module, share: list[str] | Mapping[str, str]) -> None:
    """Raise NothingMatched for a pattern that covers nothing: most likely it is misspelt."""
    names = [name for name, _ in student.named_modules() if name]
    for pattern in share if isinstance(share, list) else []:
        if not any(matches([pattern.removeprefix("!")], name) for name in names):
            raise NothingMatched(
                f"rocket: the pattern {pattern!r} of share covers no module of the student."
                f"{did_you_mean(pattern.strip('*!.'), names)}"
            )


def _around(name: str) -> list[str]:
    """The module's name, and those of the modules that it is inside of."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _covers(patterns: list[str], name: str) -> bool:
    """Whether the patterns cover the module, or one that it is inside of, and leave out neither."""
    wanted = [p for p in patterns if not p.startswith("!")] or ["*"]
    unwanted = [p[1:] for p in patterns if p.startswith("!")]
    names = _around(name)
    return any(matches(wanted, x) for x in names) and not any(
        matches([p], x) for p in unwanted for x in names
    )


def _moved(student: nn.Module, parts: list[str], every: int) -> str:
    """The name in the booster: numbers in lists of equal blocks count ``every`` times."""
    moved = []
    for n, part in enumerate(parts):
        children = list(find_module(student, ".".join(parts[:n])).children())
        in_a_list = part.isdigit() and len({type(child) for child in children}) == 1
        moved.append(str(int(part) * every) if in_a_list else part)
    return ".".join(moved)


def _require_shape(booster: nn.Module, name: str, own: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    there = dict(booster.named_modules()).get(module)
    if there is None:
        names = (n for n, _ in booster.named_modules() if n)
        raise UnknownName("module of the booster", module, names, f"rocket shares {own}")
    other = there._parameters.get(leaf)
    if other is None or other.shape != tensor.shape:
        raise ModelMismatch(
            f"rocket: {own} of the student is {tuple(tensor.shape)}, and {name} of the booster "
            f"{'is not there' if other is None else tuple(other.shape)}: shared modules need the same "
            "shapes. Leave this one out of share."
        )
