"""Activations of few values, in place of a network's own.

A method that quantizes activations replaces modules (``relu1``) by one of the kinds below, or puts a
:class:`Quantizer` before or behind a module (``conv1:input``, ``conv1:output``). Which ones, and how,
belongs to the network as its plan does: it goes into copies, checkpoints and the compressed file, and a
fresh instance of the user's class gets the same modules when the file is loaded.

The surprising rule: those that take a module's place have no parameters, so a ``state_dict`` does not tell
that they are there.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import CorruptArtifact, InputError
from .encodings import on_grid, rounded, settle_step, slowed

#: A plain attribute of the root module: name of a module -> kind and settings.
_ATTRIBUTE = "lilliput_activations"


class Activation(nn.Module):
    """Base of the kinds.

    Class attributes:
        kind: its name in files.
    """

    kind: ClassVar[str]

    def settings(self) -> dict[str, Any]:
        """What a file needs to build it again, as plain JSON values."""
        return {}


class BinaryActivation(Activation):
    """The sign, zero counting as plus; its gradient passes where the input lies within -1 and 1."""

    kind = "binary"

    def forward(self, inputs: Tensor) -> Tensor:
        """Minus or plus one."""
        gated = inputs.clamp(-1.0, 1.0)
        signs = torch.where(inputs >= 0, 1.0, -1.0).to(inputs)
        return signs + (gated - gated.detach())  # in this order what is added is exactly zero


class HalfWave(Activation):
    """Zero for what is not positive, else the level in whose interval the input lies.

    Intervals end in the middle between two levels; the first begins at zero.

    Args:
        levels: positive, ascending.
        gate: what passes as the gradient of the input x: ``clipped``, 1 for 0 < x <= the highest level;
            ``relu``, 1 for all positive x; ``log``, like clipped and ``1 / (x - highest + 1)`` beyond.

    Raises:
        InputError: the levels are not positive and ascending, or there is no such gate.
    """

    kind = "half_wave"

    def __init__(self, levels: list[float], gate: str = "clipped") -> None:
        super().__init__()
        if not levels or any(b <= a for a, b in pairwise([0.0, *levels])) or math.isinf(levels[-1]):
            raise InputError(f"the levels {levels} of a half-wave are not positive and ascending.")
        if gate not in ("clipped", "relu", "log"):
            raise InputError(f"a half-wave's gate is clipped, relu or log, not {gate!r}.")
        self.levels, self.gate = [float(level) for level in levels], gate

    def settings(self) -> dict[str, Any]:
        """Levels and gate."""
        return {"levels": self.levels, "gate": self.gate}

    def extra_repr(self) -> str:
        """The same."""
        return f"{[round(level, 4) for level in self.levels]}, {self.gate}"

    def forward(self, inputs: Tensor) -> Tensor:
        """One of the levels, or zero."""
        found = torch.zeros_like(inputs)
        for before, level in pairwise([0.0, *self.levels]):
            border = (before + level) / 2.0 if before else 0.0
            found = torch.where(inputs > border, level, found)
        passing = inputs * self._slope(inputs.detach())
        return found + (passing - passing.detach())

    def _slope(self, inputs: Tensor) -> Tensor:
        highest = self.levels[-1]
        positive = (inputs > 0).to(inputs)
        if self.gate == "relu":
            return positive
        beyond = 1.0 / (inputs - highest + 1.0) if self.gate == "log" else torch.zeros_like(inputs)
        return torch.where(inputs > highest, beyond, positive)


class IntegerActivation(Activation):
    """The positive part on a grid of ``2^(1 - bits)`` below one; what comes back is an error of few bits.

    Forward: the ReLU, clipped at ``1 - 2^(1 - bits)`` and rounded. Backward: the error is divided by the
    power of two nearest its largest magnitude, clipped and rounded to ``error_bits``, and passes where
    the input was positive and not clipped.

    Args:
        bits: of an activation.
        error_bits: of an error.

    Raises:
        InputError: bits are no whole number, or fewer than 2 or more than 16.
    """

    kind = "integer"

    def __init__(self, bits: int = 8, error_bits: int = 8) -> None:
        super().__init__()
        if not _is_count(bits, 16) or not _is_count(error_bits, 16):
            raise InputError(f"an activation and its error have 2 to 16 bits, not {bits!r:.40}.")
        self.bits, self.error_bits = bits, error_bits

    def settings(self) -> dict[str, Any]:
        """Bits of activations and of errors."""
        return {"bits": self.bits, "error_bits": self.error_bits}

    def extra_repr(self) -> str:
        """The same."""
        return f"{self.bits} bits, errors {self.error_bits} bits"

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiples of the step."""
        kept = inputs.clamp(0.0, 1.0 - 2.0 ** (1 - self.bits))
        found = on_grid(inputs.detach().clamp_min(0.0), self.bits)
        passing = with_integer_error(kept, self.error_bits)
        return found + (passing - passing.detach())


def _is_count(bits: Any, most: int) -> bool:
    return type(bits) is int and 2 <= bits <= most


class _IntegerError(torch.autograd.Function):
    """The identity, whose gradient is scaled and rounded."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return integer_error(gradients[0], ctx.bits), None


def with_integer_error(inputs: Tensor, bits: int) -> Tensor:
    """The same, but what comes back in the backward pass is :func:`integer_error` of what came."""
    apply: Any = _IntegerError.apply
    found: Tensor = apply(inputs, bits) if inputs.requires_grad else inputs
    return found


def power_of_two(value: Tensor) -> Tensor:
    """``2^round(log2 x)``.

    Example:
        >>> power_of_two(torch.tensor([0.7, 1.5, 3.0]))
        tensor([0.5000, 2.0000, 4.0000])
    """
    return torch.exp2(value.log2().round())


def integer_error(error: Tensor, bits: int) -> Tensor:
    """An error scaled by the power of two nearest its largest magnitude, and rounded."""
    largest = error.abs().max()
    if not bool(largest > 0):
        return error
    return on_grid(error / power_of_two(largest), bits)


class Quantizer(Activation):
    """Unsigned integers of a few bits times a step, one of them being zero.

    ``(clip(round(x / s) + z, 0, h) - z) s`` with ``h = 2^bits - 1``. The gradient passes where x was not
    clipped; to a step that trains goes what :class:`~.encodings.StepGrid` says.

    Args:
        bits: of an activation.
        step: s.
        zero: z, the integer that stands for zero.
        learned: whether the step trains.

    Raises:
        InputError: bits are no whole number of 2 to 8.
    """

    kind = "quantizer"
    step: Tensor
    zero: Tensor

    def __init__(
        self, bits: int = 8, step: float = 1.0, zero: int = 0, learned: bool = False
    ) -> None:
        super().__init__()
        if not _is_count(bits, 8):
            raise InputError(f"a quantizer has 2 to 8 bits, not {bits!r:.40}.")
        self.bits, self.learned = bits, bool(learned)
        if learned:
            self.step = nn.Parameter(torch.tensor(float(step)))
        else:
            self.register_buffer("step", torch.tensor(float(step)))
        self.register_buffer("zero", torch.tensor(zero))

    @property
    def highest(self) -> int:
        """h, the largest integer."""
        return int(2**self.bits - 1)

    def settle(self) -> None:
        """Let the step stay as it is from now on."""
        settle_step(self)

    def settings(self) -> dict[str, Any]:
        """Bits, and whether the step trains; step and zero are tensors of the network."""
        return {"bits": self.bits, "learned": self.learned}

    def extra_repr(self) -> str:
        """All of it."""
        return f"{self.bits} bits, step {float(self.step.detach()):.4g}, zero {int(self.zero)}"

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiples of the step."""
        step = self.step
        if self.learned:
            step = slowed(step, self.highest * inputs[0].numel())
        low, high = -self.zero, self.highest - self.zero
        return rounded((inputs / step).clamp(low, high)) * step


KINDS: dict[str, type[Activation]] = {
    cls.kind: cls for cls in (BinaryActivation, HalfWave, IntegerActivation, Quantizer)
}

#: The submodules of a module with a quantizer before or behind it.
QUANTIZERS = _BEFORE, _BEHIND = "input_quantizer", "output_quantizer"


def replace_activation(model: nn.Module, place: str, activation: Activation) -> None:
    """Put an activation in the place of a module, or before or behind one, and remember it.

    Args:
        model: changed in place.
        place: ``MODULE``, ``MODULE:input`` or ``MODULE:output``; of a module's inputs the first is meant.
        activation: what goes there; a quantizer that is there is replaced.

    Raises:
        InputError: the module whose place it takes has parameters or buffers, which would be lost; there is
            no such side.
    """
    name, _, side = place.partition(":")
    module = model.get_submodule(name)
    if side == "input":
        module.register_module(_BEFORE, activation)
        if _quantize_input not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    elif side == "output":
        module.register_module(_BEHIND, activation)
        if _quantize_output not in module._forward_hooks.values():
            module.register_forward_hook(_quantize_output)
    elif side:
        raise InputError(
            f"{place!r:.80}: a module has an input and an output, and no {side!r:.40}."
        )
    else:
        _take_place(model, name, activation)
    replaced = dict(replaced_activations(model))
    replaced[place] = {"kind": activation.kind, **activation.settings()}
    setattr(model, _ATTRIBUTE, replaced)


def settle_activations(model: nn.Module) -> None:
    """Let the steps of all quantizers stay as they are from now on."""
    for place in replaced_activations(model):
        quantizer = quantizer_at(model, place)
        if quantizer is not None:
            quantizer.settle()
            replace_activation(model, place, quantizer)


def quantizer_at(model: nn.Module, place: str) -> Quantizer | None:
    """The quantizer before or behind a module, if there is one; see :func:`replace_activation`."""
    name, _, side = place.partition(":")
    module = model.get_submodule(name)
    if not side:
        return None
    found = module._modules.get(_BEFORE if side == "input" else _BEHIND)
    return found if isinstance(found, Quantizer) else None


def remove_quantizer(model: nn.Module, place: str) -> None:
    """Take a quantizer away again."""
    name, _, side = place.partition(":")
    module = model.get_submodule(name)
    hooks: Any = module._forward_pre_hooks if side == "input" else module._forward_hooks
    mine = _quantize_input if side == "input" else _quantize_output
    for key in [key for key, hook in hooks.items() if hook is mine]:
        del hooks[key]
    delattr(module, _BEFORE if side == "input" else _BEHIND)
    left = {k: v for k, v in replaced_activations(model).items() if k != place}
    setattr(model, _ATTRIBUTE, left)


# Hooks are functions of this module, so that copies and pickles of a network keep them.


def _quantize_input(
    module: Any, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs:
        return (module.input_quantizer(inputs[0]), *inputs[1:]), named
    first = next(iter(named))
    return inputs, named | {first: module.input_quantizer(named[first])}


def check_quantizers(described: Any, state: dict[str, Tensor]) -> None:
    """Refuse tensors of quantizers that cannot be, before any network takes them in.

    Raises:
        CorruptArtifact: a step is not positive and finite, or a zero is none of the integers.
    """
    for place, settings in described.items() if isinstance(described, dict) else ():
        name, _, side = place.partition(":")
        part = {"input": _BEFORE, "output": _BEHIND}.get(side)
        step, zero = (state.get(f"{name}.{part}.{leaf}".lstrip(".")) for leaf in ("step", "zero"))
        if part is None or step is None or zero is None:
            continue  # not a quantizer, or what is missing is told with all that is
        if not _can_be(settings, step, zero):
            raise CorruptArtifact(
                f"what the file says of the quantizer {place!r:.80} cannot be. Get it again from its source."
            )


def _can_be(settings: Any, step: Tensor, zero: Tensor) -> bool:
    """Whether there are such quantizers; nothing is computed with bits that are any number."""
    bits: Any = settings.get("bits", 8) if isinstance(settings, dict) else None
    if not _is_count(bits, 8) or not step.numel() == zero.numel() == 1:
        return False
    size, shift = float(step.to(torch.float32)), float(zero)  # the network's step has 32 bits
    return 0.0 < size < math.inf and shift.is_integer() and 0 <= shift < 2**bits


def _quantize_output(module: Any, inputs: Any, output: Any) -> Any:
    return module.output_quantizer(output)


def _take_place(model: nn.Module, name: str, activation: Activation) -> None:
    old = model.get_submodule(name)
    if isinstance(old, Quantizer):
        raise InputError(
            f"{name}: the network's activations are integers of {old.bits} bits already. Leave it out with "
            f"'!{name}', or begin with the network before."
        )
    if any(True for _ in old.parameters()) or any(True for _ in old.buffers()):
        raise InputError(
            f"{name} is a {type(old).__name__} with tensors of its own: only a module without any "
            "(nn.ReLU) can be replaced by a quantized activation."
        )
    model.set_submodule(name, activation.train(old.training))


def replaced_activations(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Which modules have been replaced, and by what."""
    found: dict[str, dict[str, Any]] = vars(model).get(_ATTRIBUTE, {})
    return found


def replace_activations(model: nn.Module, described: Any) -> None:
    """Do to a fresh network what :func:`replaced_activations` says of another.

    Raises:
        CorruptArtifact: the description names no kind that there is, or no module.
    """
    if not isinstance(described, dict):
        raise CorruptArtifact(f"what the file says of activations cannot be: {described!r:.80}.")
    for name, settings in described.items():
        known = replaced_activations(model)
        if name in known and known[name] == settings:
            continue
        try:
            kind = KINDS[settings["kind"]]
            made = kind(**{k: v for k, v in settings.items() if k != "kind"})
            replace_activation(model, name, made)
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
        ) as error:
            raise CorruptArtifact(
                f"what the file says of the activation {name!r:.80} cannot be: {settings!r:.80} "
                f"({error!s:.200}). Get it again from its source, or give the network that it was made from."
            ) from error
