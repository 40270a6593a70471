"""What all papers share whose student looks at features inside its teacher."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr, field_validator
from torch import Tensor, nn

from ...core.method import Method
from ...core.run import Run
from ...core.task import answer, evaluation
from ...core.types import Batch, Change
from ...errors import EmptyData, InputError, ModelMismatch
from ...mechanisms.adapters import Kind, Shape, build_adapter
from ...mechanisms.taps import Taps
from ...mechanisms.teacher import Live, shared_teacher


class FeatureMethod(Method):
    """Watches places of the student and of its teacher in the same step.

    Class attributes:
        ensembles: whether a list of teachers will do; their features then stand side by side in dim 1.

    Attributes:
        teacher: one network; see :meth:`~lilliput.core.run.Run.find_network`.
        pairs: place in the student -> place in the teacher (see :mod:`lilliput.mechanisms.taps`);
            a list where both have the same names.
        view: which view of the samples the teacher looks at; None for the student's inputs.
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False
    ensembles: ClassVar[bool] = False

    teacher: Any = "original"
    pairs: dict[str, str]
    view: str | None = None

    _teacher: Live = PrivateAttr()
    _own: Taps = PrivateAttr()
    _taught: list[Taps] = PrivateAttr()
    _widths: list[int] = PrivateAttr(default_factory=list)

    @field_validator("pairs", mode="before")
    @classmethod
    def _same_names(cls, value: Any) -> Any:
        pairs = {name: name for name in value} if isinstance(value, list) else value
        if pairs == {}:
            raise ValueError("name at least one place of the student and its place in the teacher")
        return pairs

    def attach(self, run: Run) -> None:
        """Find the teacher and put taps on both networks."""
        self._teacher = shared_teacher(run, self.teacher, self.view)
        if len(self._teacher.networks) != 1 and not self.ensembles:
            raise InputError(
                f"{self.method_name()}: an ensemble has no common features: name one teacher."
            )
        self._own = Taps(run.model, list(self.pairs))
        self._taught = [Taps(n, list(self.pairs.values())) for n in self._teacher.networks]

    def before_step(self, run: Run) -> None:
        """Watch this step."""
        for taps in (self._own, *self._taught):
            taps.open()

    def features(self, run: Run) -> list[tuple[Tensor, Tensor]]:
        """Of each pair both networks' features in this step, as 32-bit floats; call it in ``loss``, once.

        Raises:
            ModelMismatch: the student has other channels than when :meth:`shapes` looked at them.
        """
        self._teacher.outputs(run.batch)
        found = self._read()
        self.require_same_width([own for own, _ in found])
        return found

    def require_same_width(self, own: list[Tensor]) -> None:
        """Raise ModelMismatch where the student's features have other channels than in ``attach``."""
        for place, feature, width in zip(self.pairs, own, self._widths, strict=False):
            if (now := width_of(tuple(feature.shape))) != width:
                raise ModelMismatch(
                    f"{self.method_name()}: {place!r} had {width} channels when this method was attached, "
                    f"and has {now} now. List {self.method_name()} behind the method that cuts them."
                )

    def shapes(self, run: Run) -> list[tuple[Shape, Shape]]:
        """Of each pair the shapes of both features, from one forward pass of each network."""
        return [(tuple(own.shape), tuple(taught.shape)) for own, taught in self.first_features(run)]

    def first_features(self, run: Run) -> list[tuple[Tensor, Tensor]]:
        """Of each pair both networks' features for the first training batch; call it in ``attach``."""
        batch = self._first_batch(run)
        FeatureMethod.before_step(self, run)
        with evaluation(run.model), torch.no_grad():
            answer(run.model, batch.inputs)
        self._teacher.outputs(batch)
        found = self._read()
        self._widths = [width_of(tuple(own.shape)) for own, _ in found]
        return found

    def _first_batch(self, run: Run) -> Batch:
        try:
            return next(run.calibration(1))
        except EmptyData as error:
            raise EmptyData(
                f"{self.method_name()} must see a batch before the first step, and there is none. In a "
                "training loop of your own give attach(..., example_inputs=...)."
            ) from error

    def _read(self) -> list[tuple[Tensor, Tensor]]:
        """What the taps have seen; they are closed."""
        found = [
            (self._own[own].float(), side_by_side([taps[taught] for taps in self._taught]))
            for own, taught in self.pairs.items()
        ]
        for taps in (self._own, *self._taught):
            taps.close()
        return found

    def adapters(self, run: Run, kind: Kind) -> list[nn.Module]:
        """An adapter for each pair, which trains with the student; call it in ``attach``."""
        return [
            run.extra(f"{run.key_of(self)}.{number}", build_adapter(kind, own, taught))
            for number, (own, taught) in enumerate(self.shapes(run))
        ]

    def finish(self, run: Run) -> list[Change]:
        """Take the taps off; the teacher must be what it was."""
        for taps in (self._own, *self._taught):
            taps.remove()
        self._teacher.check()
        return []


def width_of(shape: Shape) -> int:
    """Channels of maps ``(batch, channels, height, width)``, or of ``(batch, ..., width)``."""
    return shape[1] if len(shape) == 4 else shape[-1]


def side_by_side(features: list[Tensor]) -> Tensor:
    """The members' features in one, along dim 1; nearly always there is one member."""
    return features[0].float() if len(features) == 1 else torch.cat(features, dim=1).float()
