"""Auxiliary classifiers: layers inside a network learn to classify, with the network's own end as teacher.

Paper: Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation
(Zhang, Song, Gao, Chen, Bao, Ma; ICCV 2019; arXiv 1905.08094)

Paper: Deeply-Supervised Nets (Lee, Xie, Gallagher, Zhang, Tu; AISTATS 2015; arXiv 1409.5185)

Behind each of some layers stands a classifier of its own, k = 1 ... K, with probabilities p_k and the feature
F_k that it classifies. Beside the task's loss of the network's end, C, training minimizes

    sum_k (1 - alpha) * CE(p_k, y)  +  alpha * KL(p_C || p_k at temperature T)  +  lambda * ||F_k - F_C||**2

where the end is only a target: the last two terms send no gradient into its output and its feature. The first
term alone (``alpha: 0`` without ``feature``) is deep supervision.

Faithful: the three terms and the detached teacher. Differs: the paper puts bottleneck blocks in front of each
classifier, to bring F_k to the shape of F_C; here that is one convolution or linear layer, and what is
classified is its mean over the positions. The divergence is multiplied by T**2, so that alpha keeps its
meaning when T changes. Deeply-Supervised Nets takes squared hinge losses and lets their weight fall; a weight
that moves (``weight: {start: 1, end: 0}``) does the latter. Squared distances are summed over a feature and
averaged over the batch.

The classifiers train with the network and never reach its file.

Cost: the classifiers' own forward and backward pass, small beside the network's. When not to use it: shallow
networks, whose first layers have to see edges before they can see classes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.task import answer, evaluation
from ...core.types import Change, Fraction, Positive, Term
from ...errors import ModelMismatch
from ...mechanisms.adapters import Shape, build_adapter
from ...mechanisms.taps import Taps
from .soft_targets import soft_target_loss, soften


class AuxiliaryClassifier(nn.Module):
    """A linear classifier on the mean of a feature over its positions.

    Args:
        own: shape of the feature, ``(batch, channels, height, width)`` or ``(batch, ..., width)``.
        classes: number of outputs.
        final: shape of the feature that its own should resemble; None for no such.

    Example:
        >>> AuxiliaryClassifier((1, 8, 4, 4), 10, None)(torch.zeros(5, 8, 4, 4))[0].shape
        torch.Size([5, 10])
    """

    def __init__(self, own: Shape, classes: int, final: Shape | None) -> None:
        super().__init__()
        self.pooled = final is not None and len(final) == 2 < len(own)
        seen = (own[0], _width(own)) if self.pooled else own
        self.adapter: nn.Module = nn.Identity()
        if final is not None:
            self.adapter = build_adapter("conv1x1" if len(seen) == 4 else "linear", seen, final)
        self.classify = nn.Linear(_width(own if final is None else final), classes)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, classes)``, and the feature F_k that they were made from."""
        adapted = self.adapter(pooled(feature) if self.pooled else feature)
        return self.classify(pooled(adapted)), adapted


def pooled(feature: Tensor) -> Tensor:
    """The mean over all positions, ``(batch, channels)``.

    Args:
        feature: ``(batch, channels, height, width)``, or ``(batch, ..., width)``.
    """
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature.flatten(1, -2).mean(1) if feature.ndim > 2 else feature


def feature_distance(own: Tensor, final: Tensor) -> Tensor:
    """``||F_k - F_C||**2``, the mean over the batch."""
    return (own - final).square().flatten(1).sum(1).mean()


@method
class Auxiliary(Method):
    """Let classifiers behind inner layers learn the labels and what the network's end says.

    Attributes:
        places: where the classifiers stand (see :mod:`lilliput.mechanisms.taps`).
        alpha: share of the end's probabilities in what a classifier learns; the rest are the labels.
        temperature: T of these probabilities.
        feature: place of the deepest feature, F_C, for example ``"fc2:input"``; None leaves its term out.
        feature_weight: lambda, a number or ``{start: 0.1, end: 0}``.
        weight: of all classifiers together, likewise.

    Example:
        >>> Auxiliary(places=["relu2", "relu3"], feature="fc2:input").alpha
        0.3
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False

    places: list[str] = Field(min_length=1)
    alpha: Fraction = 0.3
    temperature: Positive = 3.0
    feature: str | None = None
    feature_weight: LossWeight = 0.03
    weight: LossWeight = 1.0

    _taps: Taps = PrivateAttr()
    _classifiers: list[nn.Module] = PrivateAttr()
    _widths: dict[str, int] = PrivateAttr()

    @field_validator("places")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a place is named twice: each needs one classifier")
        return value

    @classmethod
    def example(cls) -> Auxiliary:
        """Behind a transformer's embedding, with what its head reads as the deepest feature."""
        return cls(places=["embed"], feature="head:input")

    def attach(self, run: Run) -> None:
        """Build a classifier for each place, from the shapes that one forward pass shows."""
        self._taps = Taps(run.model, self._watched())
        shapes, output = self._shapes(run)
        self._widths = {place: _width(shape) for place, shape in shapes.items()}
        final = None if self.feature is None else shapes[self.feature]
        self._classifiers = [
            run.extra(
                f"{run.key_of(self)}.{number}",
                AuxiliaryClassifier(shapes[place], output[-1], final),
            )
            for number, place in enumerate(self.places)
        ]

    def before_step(self, run: Run) -> None:
        """Watch this step."""
        self._taps.open()

    def loss(self, run: Run) -> dict[str, Term]:
        """The three terms, each summed over the classifiers."""
        answers = [
            classify(self._seen(place))
            for classify, place in zip(self._classifiers, self.places, strict=True)
        ]
        final = None if self.feature is None else self._seen(self.feature).detach()
        self._taps.close()
        weight = weight_at(self.weight, run.progress)
        target = soften(run.output.detach().float().unsqueeze(0), self.temperature, "arithmetic")
        terms = {}
        if self.alpha < 1:
            labels = sum((run.task.loss(own, run.batch.target) for own, _ in answers), _zero(run))
            terms["auxiliary"] = Term(labels, weight * (1 - self.alpha))
        if self.alpha > 0:
            soft = (soft_target_loss(own, target, self.temperature) for own, _ in answers)
            terms["auxiliary_soft"] = Term(sum(soft, _zero(run)), weight * self.alpha)
        if final is not None:
            apart = sum((feature_distance(f, final) for _, f in answers), _zero(run))
            share = weight_at(self.feature_weight, run.progress)
            terms["auxiliary_features"] = Term(apart, weight * share)
        return terms

    def finish(self, run: Run) -> list[Change]:
        """Take the taps off; the classifiers go with the stage."""
        self._taps.remove()
        return []

    def _watched(self) -> list[str]:
        return [*self.places, *([] if self.feature is None else [self.feature])]

    def _seen(self, place: str) -> Tensor:
        feature = self._taps[place].float()
        if _width(tuple(feature.shape)) != self._widths[place]:
            raise ModelMismatch(
                f"auxiliary: {place!r} had {self._widths[place]} channels when its classifier was built, and "
                f"has {_width(tuple(feature.shape))} now. List auxiliary behind the method that cuts them."
            )
        return feature

    def _shapes(self, run: Run) -> tuple[dict[str, Shape], Shape]:
        """Of each place and of the output."""
        batch = next(run.calibration(1))
        self._taps.open()
        with evaluation(run.model), torch.no_grad():
            output = answer(run.model, batch.inputs)
        shapes = {place: tuple(self._taps[place].shape) for place in self._watched()}
        self._taps.close()
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise ModelMismatch(
                "auxiliary: classifiers are built for outputs (batch, classes), and the network's is "
                f"{tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__}."
            )
        return shapes, tuple(output.shape)


def _width(shape: Shape) -> int:
    return shape[1] if len(shape) == 4 else shape[-1]


def _zero(run: Run) -> Tensor:
    return torch.zeros((), device=run.device)
