"""Attention transfer: the student looks where its teacher looks.

Paper: Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via
Attention Transfer (Zagoruyko, Komodakis; ICLR 2017; arXiv 1612.03928)

By activations (equation 2, ``attention``). The attention map of a feature A ``(channels, height, width)``
is ``Q = vec(sum_c |A_c|**p)``, with p = 2 as the best. Over pairs j of places in student and teacher the
loss is

    CE + beta / 2 * sum_j || Q_S,j / ||Q_S,j||_2  -  Q_T,j / ||Q_T,j||_2 ||_2

By gradients (section 3.2, ``gradient_attention``). The attention is ``J = dL/dx``, the gradient of the
task's loss with respect to the input. The loss is ``CE + beta / 2 * ||J_S - J_T||_2``. Without a teacher,
attention can be asked to be symmetric: ``CE + beta / 2 * ||J(x) - flip(J(flip(x)))||_2``, where flip
mirrors an image. Both differentiate a gradient once more.

Faithful: the three losses as written, for one sample, then the mean over the batch. Where sizes differ the
teacher's map is interpolated to the student's. ``form: code`` is what the authors' code computes instead:
the mean of the *squared* differences over all positions and samples, summed over the pairs, times beta =
1000 and without the half. (It also takes the mean over channels where the paper has the sum, which the
normalization undoes.) The two differ in more than a factor: the norm pulls with the same force however near
the maps are, the square pulls less and less. The beta that is reported, 1000 over the number of positions
and samples, belongs to the squares; for the norm the default is ours. The code has no gradient attention.

Cost: one forward pass of the teacher a step; for gradients about two more backward passes of the student,
and one of the teacher or one forward pass of the mirrored images. When not to use it: features without
positions; gradient attention, where the loss is piecewise linear in the inputs or an operator cannot be
differentiated twice (it is refused); symmetry, where mirrored images mean something else, as digits do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.task import answer, evaluation
from ...core.types import Change, Term
from ...errors import InputError, LilliputError, ModelMismatch
from ...mechanisms.taps import Taps, unwatched
from ...mechanisms.teacher import Live, seen_by, shared_teacher
from ._features import FeatureMethod
from ._players import still_statistics, task_loss

# -- by activations -------------------------------------------------------------------------------


def attention_map(feature: Tensor, power: float = 2.0) -> Tensor:
    """``Q = sum_c |A_c|**p``.

    Args:
        feature: A, shape ``(batch, channels, height, width)``.
        power: p.

    Returns:
        Shape ``(batch, height, width)``.
    """
    amounts = feature.square() if power == 2 else feature.abs().pow(power)
    return amounts.sum(1)


def unit(maps: Tensor) -> Tensor:
    """``vec(Q) / ||Q||_2`` of each sample, shape ``(batch, positions)``; zero where the map is zero."""
    return F.normalize(maps.flatten(1), dim=1)


def attention_loss(own: Tensor, taught: Tensor, form: Literal["paper", "code"]) -> Tensor:
    """How far apart two attention maps are, without beta.

    Args:
        own: the student's maps, ``(batch, height, width)``.
        taught: the teacher's; interpolated where they have another size.
        form: ``"paper"``, the norm of the difference, the mean over the batch; ``"code"``, the mean of
            the squared difference over positions and batch.
    """
    if own.shape != taught.shape:
        taught = F.interpolate(
            taught.unsqueeze(1), own.shape[1:], mode="bilinear", align_corners=False
        ).squeeze(1)
    apart = unit(own) - unit(taught)
    return apart.square().mean() if form == "code" else mean_norm(apart)


def mean_norm(apart: Tensor) -> Tensor:
    """The mean over the batch of each sample's l2 norm; its gradient is 0 where the norm is."""
    norms: Tensor = torch.linalg.vector_norm(apart.flatten(1), dim=1)
    return norms.mean()


@method
class Attention(FeatureMethod):
    """Learn where the teacher's feature maps are active.

    Attributes:
        teacher: one network; see :meth:`~lilliput.core.run.Run.find_network`.
        pairs: place in the student -> place in the teacher (see :mod:`lilliput.mechanisms.taps`), whose
            features are maps ``(batch, channels, height, width)``; channels and sizes may differ.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        beta: a number or ``{start: 1, end: 0}``; by default 1, and 1000 in the form of the code.
        power: p.
        form: the loss of the ``"paper"`` or that of its ``"code"``; see above.
        hard_weight: of the task's own loss.

    Example:
        >>> Attention(pairs={"relu2": "relu2_3"}, teacher="previous", form="code").weight
        1000.0
    """

    beta: LossWeight | None = None
    power: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 2.0
    form: Literal["paper", "code"] = "paper"
    hard_weight: LossWeight = 1.0

    @classmethod
    def example(cls) -> Attention:
        """The maps behind both convolutions."""
        return cls(pairs=["2", "5"])

    @property
    def weight(self) -> LossWeight:
        """Beta, or its default for the form."""
        if self.beta is None:
            return 1000.0 if self.form == "code" else 1.0
        return self.beta

    def task_weight(self, run: Run) -> float:
        """The weight of the task's own loss."""
        return weight_at(self.hard_weight, run.progress)

    def loss(self, run: Run) -> dict[str, Term]:
        """The sum over the pairs."""
        maps = [tuple(map(self._map, pair)) for pair in self.features(run)]
        losses = [attention_loss(own, taught, self.form) for own, taught in maps]
        half = 1.0 if self.form == "code" else 0.5
        weight = half * weight_at(self.weight, run.progress)
        return {"attention": Term(torch.stack(losses).sum(), weight)}

    def _map(self, feature: Tensor) -> Tensor:
        if feature.ndim != 4:
            raise ModelMismatch(
                f"attention: a feature of shape {tuple(feature.shape)} has no positions to look at: name "
                f"places that hand over (batch, channels, height, width); they are {self.pairs}."
            )
        return attention_map(feature, self.power)


# -- by gradients -----------------------------------------------------------------------------------


def input_gradient(loss: Tensor, inputs: Tensor, *, graph: bool = False) -> Tensor:
    """``J = dL/dx`` of each sample's own loss, shape of the inputs.

    Args:
        loss: the mean over the batch, as tasks have it.
        inputs: x, from which the loss was computed.
        graph: whether J will be differentiated.
    """
    (found,) = torch.autograd.grad(loss, inputs, create_graph=graph)
    return found * len(inputs)


def mirrored(images: Tensor) -> Tensor:
    """Left and right exchanged; images are ``(batch, channels, height, width)``."""
    return images.flip(-1)


class InputLeaf:
    """Hands a network a leaf in place of its input, so that gradients can be taken with respect to it.

    Whatever else reads the batch sees it without a gradient, and a copy of the network has no leaf.

    Args:
        network: whose first positional input; not changed.
    """

    def __init__(self, network: nn.Module) -> None:
        self._leaf: Tensor | None = None
        self._open = False
        self._handle = network.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What the network calls before its forward pass."""
        if not self._open or Taps.blind or not args or not torch.is_grad_enabled():
            return None
        given = args[0]  # another method's leaf will do
        self._leaf = given if given.requires_grad else given.detach().requires_grad_()
        return (self._leaf, *args[1:])

    def open(self) -> None:
        """Wait for a forward pass."""
        self._leaf, self._open = None, True

    def take(self) -> Tensor:
        """The leaf of the last forward pass; closed until it is opened again.

        Raises:
            ModelMismatch: the network was not called.
        """
        leaf, self._leaf, self._open = self._leaf, None, False
        if leaf is None:
            raise ModelMismatch(
                "gradient_attention: the network was not called with its input in this step, so there is "
                "no gradient with respect to it. Does another method replace the forward pass?"
            )
        return leaf

    def remove(self) -> None:
        """Take the hook off the network."""
        self._handle.remove()

    def __deepcopy__(self, memo: Any) -> Any:
        return _leave

    def __reduce__(self) -> Any:
        return _leaver, ()


def _leave(module: nn.Module, args: tuple[Any, ...]) -> None:
    """The hook of a copied network."""


def _leaver() -> Any:
    """What a pickled hook becomes."""
    return _leave


@method
class GradientAttention(Method):
    """Learn which parts of the input the teacher's loss is sensitive to, or that mirrored ones are alike.

    Attributes:
        teacher: one network; see :meth:`~lilliput.core.run.Run.find_network`.
        view: which view of the samples the teacher looks at; it must have the student's shape.
        symmetric: compare the student with itself on mirrored images, without a teacher.
        beta: a number or ``{start: 1, end: 0}``.
        hard_weight: of the task's own loss, the mean over a batch; J is made of it.

    Example:
        >>> GradientAttention(symmetric=True).beta
        1.0
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False

    teacher: Any = "original"
    view: str | None = None
    symmetric: bool = False
    beta: LossWeight = 1.0
    hard_weight: LossWeight = 1.0

    _teacher: Live | None = PrivateAttr(None)
    _leaf: InputLeaf = PrivateAttr()

    @model_validator(mode="after")
    def _one_of(self) -> GradientAttention:
        if self.symmetric and (self.teacher != "original" or self.view is not None):
            raise ValueError("symmetric attention has no teacher: leave teacher and view out")
        return self

    def attach(self, run: Run) -> None:
        """Find the teacher, and try whether the network can be differentiated twice."""
        if not self.symmetric:
            self._teacher = shared_teacher(run, self.teacher, self.view)
            if len(self._teacher.networks) != 1:
                raise InputError(
                    "gradient_attention: name one teacher, an ensemble has no gradient."
                )
        self._leaf = InputLeaf(run.model)
        try:
            self._try(replace(run, batch=next(run.calibration(1))))
        except LilliputError:
            self._leaf.remove()
            raise

    def task_weight(self, run: Run) -> float:
        """The weight of the task's own loss."""
        return weight_at(self.hard_weight, run.progress)

    def before_step(self, run: Run) -> None:
        """Let the student's input be a leaf."""
        x = run.batch.inputs
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ModelMismatch(
                f"gradient_attention: a gradient needs inputs that are one tensor of floats, not {kind}."
            )
        if self.symmetric and x.ndim != 4:
            raise ModelMismatch(
                f"gradient_attention: inputs of shape {tuple(x.shape)} cannot be mirrored: symmetric is for "
                "images (batch, channels, height, width)."
            )
        self._leaf.open()

    def loss(self, run: Run) -> dict[str, Term]:
        """The norm of the difference, the mean over the batch."""
        own = self._gradient(run, run.output, self._leaf.take(), graph=True)
        other = self._mirrored(run) if self._teacher is None else self._taught(run, self._teacher)
        if own.shape != other.shape:
            raise ModelMismatch(
                f"gradient_attention: the teacher looks at inputs of shape {tuple(other.shape)}, the student "
                f"at {tuple(own.shape)}; their gradients cannot be compared."
            )
        weight = 0.5 * weight_at(self.beta, run.progress)
        return {"gradient_attention": Term(mean_norm(own - other), weight)}

    def finish(self, run: Run) -> list[Change]:
        """Take the hook off; the teacher must be what it was."""
        self._leaf.remove()
        if self._teacher is not None:
            self._teacher.check()
        return []

    def _taught(self, run: Run, teacher: Live) -> Tensor:
        """J_T."""
        x = seen_by(run.batch, self.view).detach().requires_grad_()
        with unwatched():
            output = answer(teacher.networks[0], x)
        return self._gradient(run, output, x)

    def _mirrored(self, run: Run) -> Tensor:
        """``flip(J(flip(x)))`` of the student; batch normalization notes the batch only once."""
        x = mirrored(run.batch.inputs).detach().requires_grad_()
        with unwatched(), still_statistics(run.model):
            output = answer(run.model, x)
        return mirrored(self._gradient(run, output, x, graph=True))

    def _gradient(self, run: Run, output: Any, x: Tensor, *, graph: bool = False) -> Tensor:
        try:
            return input_gradient(task_loss(run, output), x, graph=graph).float()
        except LilliputError:
            raise
        except RuntimeError as error:
            raise ModelMismatch(
                f"gradient_attention: the loss has no gradient with respect to the input: {error}"
            ) from error

    def _try(self, run: Run) -> None:
        """One step that moves nothing."""
        self.before_step(run)
        with evaluation(run.model):
            run.output = answer(run.model, run.batch.inputs)
            value = self.loss(run)["gradient_attention"].value
        free = [p for p in run.model.parameters() if p.requires_grad]
        try:
            torch.autograd.grad(value, free, allow_unused=True)
        except RuntimeError as error:
            raise ModelMismatch(
                f"gradient_attention differentiates a gradient, and this network cannot be: {error}. Fused "
                "attention is a usual reason: torch.backends.cuda.enable_flash_sdp(False) switches it off."
            ) from error
