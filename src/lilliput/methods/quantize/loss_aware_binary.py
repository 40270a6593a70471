"""Loss-aware binarization: weights of one bit, whose scale minds what each of them costs the loss.

Paper: Loss-aware Binarization of Deep Networks (Hou, Yao, Kwok; ICLR 2017; arXiv 1611.01600)

A layer computes with ``alpha b``, b of minus and plus ones. A proximal Newton step with a diagonal
curvature d has a closed form (proposition 3.1)::

    b = sign(w),        alpha = sum(d |w|) / sum(d)

where w is a real number a weight that trains: the gradient at ``alpha b`` moves it, and afterwards it is
clipped to -1 ... 1. d is the root of Adam's second moment of that gradient, ``sqrt(v) + 1e-8`` without bias
correction.

``scale`` has what the paper compares with: ``mean`` is alpha of equal curvatures (binary weight networks,
Rastegari et al. 2016), ``one`` is alpha 1 (BinaryConnect, Courbariaux et al. 2015). With ``activations`` the
modules of a pattern become the sign of their input, whose gradient passes within -1 and 1: LAB2.

Faithful: closed form, curvature, gradient at the binary weights, clipping, binary activations. Differs: in
the authors' code a sign comes from a rounded hard sigmoid; both count zero as plus.

The surprising rule: batch normalization is needed behind the layers; without it the scale is all that a
layer can adapt. Biases stay real.

Cost: a sum over the weights a step, twice. When not to use it: for speed in an ordinary runtime, which
multiplies real numbers still.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ...core.method import LayerMethod
from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Change, Layers
from ...errors import InputError
from ...mechanisms.activations import BinaryActivation, replace_activation
from ...mechanisms.encodings import Binary, Codebook, encode, encoding_of, original_of
from ._rectifiers import rectifiers

#: Added to the root of the second moment, as the authors' code does.
_SMALL = 1e-8


@method
class LossAwareBinary(LayerMethod):
    """Train weights that are minus or plus a scale.

    Attributes:
        scale: ``loss`` as the paper says, ``mean``, or ``one``.
        decay: of the second moment.
        activations: pattern over the activation modules (``nn.ReLU`` and the like) that become the sign; None
            for none.
        clip: keep the numbers that train within -1 and 1.
        layers: pattern over module names.

    Raises:
        NothingMatched: the pattern of activations covers no activation module.
        InputError: a weight already is of shared values.

    Example:
        >>> LossAwareBinary(layers="!head").scale
        'loss'
    """

    family: ClassVar[str] = "quantize"

    scale: Literal["loss", "mean", "one"] = "loss"
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    activations: Layers | None = None
    clip: bool = True

    def check(self, model: nn.Module) -> None:
        """Both patterns must cover something."""
        super().check(model)
        self._activations(model)

    def attach(self, run: Run) -> None:
        """Binarize; from now on the signs of what trains count."""
        chosen, memory = self.weights(run.model), self.memory(run)
        memory["before"] = {w.name: len(w.value.detach().unique()) for w in chosen}
        for weight in chosen:
            if encoding_of(weight, Codebook) is not None:
                raise InputError(
                    f"loss_aware_binary: {weight.name} is of shared values already. Binarize before, or "
                    f"leave it out with '!{weight.layer}'."
                )
            fixed = 1.0 if self.scale == "one" else None
            encode(weight, Binary(torch.full_like(weight.value, _SMALL), fixed))
        for name in self._activations(run.model):
            replace_activation(run.model, name, BinaryActivation())

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        """Take in the gradient at the binary weights; the next scale minds it."""
        if self.scale != "loss":
            return
        for weight in self.weights(run.model):
            gradient, curvature = original_of(weight).grad, _binary(weight).curvature
            if gradient is not None:
                # The moment is kept as its root only, in the encoding, which surgery cuts along.
                moment = (curvature - _SMALL).square().lerp(gradient.square(), 1.0 - self.decay)
                curvature.copy_(moment.sqrt() + _SMALL)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Clip what trains."""
        if self.clip:
            for weight in self.weights(run.model):
                original_of(weight).clamp_(-1.0, 1.0)

    def finish(self, run: Run) -> list[Change]:
        """Report how many values each layer has now."""
        return [
            Change(
                w.name, "distinct values", self.memory(run)["before"][w.name],
                len(w.value.detach().unique()), self.method_name(),
            )
            for w in self.weights(run.model)
        ]  # fmt: skip

    def _activations(self, model: nn.Module) -> list[str]:
        if self.activations is None:
            return []
        return rectifiers(model, self.activations, self.method_name())


def _binary(weight: Weight) -> Binary:
    encoding = encoding_of(weight, Binary)
    assert encoding is not None
    return encoding
