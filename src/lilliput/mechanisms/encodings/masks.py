"""Which entries of a weight live, which train, and which are left out for a step.

The surprising rule: a hard mask does not multiply in the forward pass while the weight itself is what
trains. The zeros are *stored*, and :func:`reapply` restores them after each optimizer step, which is
what makes them survive momentum and weight decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.select import weights
from ...errors import UnknownName
from .base import Encoding
from .codebooks import Codebook
from .stack import original_of


class Mask(Encoding):
    """Which weights live.

    Policies: ``"hard"`` stores zeros, see the module's docstring; ``"straight_through"`` keeps the
    value of a pruned weight and gives it the dense gradient at the masked weight, so that it can
    return (``w + (w*m - w).detach()``).

    Args:
        mask: bool, in the weight's shape; True lives.
        policy: see above.
    """

    kind = "mask"
    depth = 10
    mask: Tensor

    def __init__(self, mask: Tensor, policy: str = "hard") -> None:
        super().__init__()
        if policy not in ("hard", "straight_through"):
            raise UnknownName("mask policy", policy, ("hard", "straight_through"))
        self.register_buffer("mask", mask.bool())
        self.policy = policy
        # In a tuple, lest torch takes what lies further inside the stack for parts of the mask.
        self.inside: tuple[Codebook, ...] = ()
        self._factor: Tensor | None = None
        self._rests: bool | None = None

    @classmethod
    def empty(cls, like: Tensor, settings: dict[str, Any]) -> Mask:
        """One for a weight of this shape, to be filled."""
        return cls(torch.ones_like(like, dtype=torch.bool), **settings)

    def settings(self) -> dict[str, Any]:
        """The policy."""
        return {"policy": self.policy}

    def right_inverse(self, value: Tensor) -> Tensor:
        """The weight with its zeros stored, or untouched where pruned weights may return."""
        return value * self.mask if self.policy == "hard" else value

    def update(self, mask: Tensor) -> None:
        """Replace the mask; a hard mask is stored at the next :func:`reapply`."""
        self.mask.copy_(mask)
        self.forget()

    def factor(self, like: Tensor) -> Tensor:
        """The mask as numbers of the weight's type, which multiply faster than booleans."""
        known = self._factor
        if known is None or known.device != like.device or known.dtype != like.dtype:
            known = self._factor = self.mask.to(like)
        return known

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        if self.policy == "straight_through":
            return value + (value * self.factor(value) - value).detach()
        return value if self.innermost or self.rests() else value * self.factor(value)

    def rests(self) -> bool:
        """Whether its zeros are structural further inside, as after clustering a pruned weight."""
        if self._rests is None:
            self._rests = any(bool((self.mask | (e.codes == 0)).all()) for e in self.inside)
        return self._rests

    def lie_on(self, inside: list[Encoding]) -> None:
        """Learn what lies inside; a codebook's zeros only count where nothing else covers them."""
        only = all(isinstance(e, Codebook | Mask) for e in inside)
        self.inside = tuple(e for e in inside if only and isinstance(e, Codebook))
        self.forget()

    def forget(self) -> None:
        """Drop the mask as numbers, and whether it rests."""
        self._factor = self._rests = None


class Held(Encoding):
    """Some entries are held at given values, and only the others train.

    What is held lies in a buffer, so that no optimizer, momentum or weight decay can move it.

    Args:
        free: bool, in the weight's shape; True trains.
        value: in the weight's shape; read where nothing is free.
    """

    kind = "held"
    depth = 5
    free: Tensor
    held: Tensor

    def __init__(self, free: Tensor, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("free", free.bool())
        self.register_buffer("held", value.detach().clone())

    @classmethod
    def empty(cls, like: Tensor, settings: dict[str, Any]) -> Held:
        """One for a weight of this shape, to be filled."""
        return cls(torch.ones_like(like, dtype=torch.bool), like)

    def update(self, free: Tensor, value: Tensor) -> None:
        """Hold other entries."""
        self.free.copy_(free)
        self.held.copy_(value)

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        return torch.where(self.free, value, self.held)


class Threshold(Encoding):
    """A fixed weight under a mask that trains: to every entry belongs a number that does.

    An entry lives where its number is above the threshold. The numbers get the gradient of the mask as if
    they were the mask, ``dL/d(effective) * weight``; the weight gets none.

    Args:
        like: the weight.
        threshold: of the numbers.
        start: all numbers at the beginning.
    """

    kind = "threshold"
    depth = 5

    def __init__(self, like: Tensor, threshold: float, start: float) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.full_like(like, start, requires_grad=True))
        self.threshold, self.start = threshold, start

    @classmethod
    def empty(cls, like: Tensor, settings: dict[str, Any]) -> Threshold:
        """One for a weight of this shape, to be filled."""
        return cls(like, **settings)

    def settings(self) -> dict[str, Any]:
        """The threshold and the start."""
        return {"threshold": self.threshold, "start": self.start}

    def mask(self) -> Tensor:
        """Which entries live, bool."""
        return self.numbers.detach() > self.threshold

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        numbers = self.numbers
        # In this order what is added to the mask is exactly zero.
        return value.detach() * (self.mask().to(numbers) + (numbers - numbers.detach()))


class LeftOut(Encoding):
    """Weights that count as zero in training, at one step, and as they are otherwise.

    They get no gradient at that step. In eval mode, and in every file, nothing is left out.

    Args:
        left_out: bool, in the weight's shape.
    """

    kind = "left_out"
    depth = 20
    left_out: Tensor

    def __init__(self, left_out: Tensor) -> None:
        super().__init__()
        self.register_buffer("left_out", left_out.bool())

    @classmethod
    def empty(cls, like: Tensor, settings: dict[str, Any]) -> LeftOut:
        """One for a weight of this shape, to be filled."""
        return cls(torch.zeros_like(like, dtype=torch.bool))

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        return value.masked_fill(self.left_out, 0.0) if self.training else value


def stored_masks(model: nn.Module) -> list[tuple[Tensor, Mask]]:
    """The weights whose zeros are stored, with their masks: what :func:`reapply` keeps at zero."""
    return [
        (original_of(weight), encoding)
        for weight in weights(model)
        for encoding in weight.encodings()
        if isinstance(encoding, Mask) and encoding.policy == "hard" and encoding.innermost
    ]


@torch.no_grad()
def reapply(stored: list[tuple[Tensor, Mask]]) -> None:
    """Store the zeros again, after an optimizer has moved the weights."""
    if stored:
        torch._foreach_mul_([w for w, _ in stored], [m.factor(w) for w, m in stored])
