"""What all papers share whose student looks at features inside its teacher."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr, field_validator
from torch import Tensor, nn

from ...core.method import Method
from ...core.run import Run
from ...core.task import answer, evaluation
from ...core.types import Change
from ...errors import InputError
from ...mechanisms.adapters import Kind, Shape, build_adapter
from ...mechanisms.taps import Taps
from ...mechanisms.teacher import Live, shared_teacher


class FeatureMethod(Method):
    """Watches places of the student and of its teacher in the same step.

    Attributes:
        teacher: one network; see :meth:`~lilliput.core.run.Run.find_network`.
        pairs: place in the student -> place in the teacher (see :mod:`lilliput.mechanisms.taps`);
            a list where both have the same names.
        view: which view of the samples the teacher looks at; None for the student's inputs.
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False

    teacher: Any = "original"
    pairs: dict[str, str]
    view: str | None = None

    _teacher: Live = PrivateAttr()
    _own: Taps = PrivateAttr()
    _taught: Taps = PrivateAttr()

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
        if len(self._teacher.networks) != 1:
            raise InputError(
                f"{self.method_name()}: an ensemble has no common features: name one teacher."
            )
        self._own = Taps(run.model, list(self.pairs))
        self._taught = Taps(self._teacher.networks[0], list(self.pairs.values()))

    def before_step(self, run: Run) -> None:
        """Watch this step."""
        self._own.open()
        self._taught.open()

    def features(self, run: Run) -> list[tuple[Tensor, Tensor]]:
        """Of each pair both networks' features in this step, as 32-bit floats; call it in ``loss``, once."""
        self._teacher.outputs(run.batch)
        return self._read()

    def shapes(self, run: Run) -> list[tuple[Shape, Shape]]:
        """Of each pair the shapes of both features, from one forward pass of each network."""
        batch = next(run.calibration(1))
        self.before_step(run)
        with evaluation(run.model), torch.no_grad():
            answer(run.model, batch.inputs)
        self._teacher.outputs(batch)
        return [(tuple(own.shape), tuple(taught.shape)) for own, taught in self._read()]

    def _read(self) -> list[tuple[Tensor, Tensor]]:
        """What the taps have seen; they are closed."""
        found = [
            (self._own[own].float(), self._taught[taught].float())
            for own, taught in self.pairs.items()
        ]
        self._own.close()
        self._taught.close()
        return found

    def adapters(self, run: Run, kind: Kind) -> list[nn.Module]:
        """An adapter for each pair, which trains with the student; call it in ``attach``."""
        return [
            run.extra(f"{run.key_of(self)}.{number}", build_adapter(kind, own, taught))
            for number, (own, taught) in enumerate(self.shapes(run))
        ]

    def finish(self, run: Run) -> list[Change]:
        """Take the taps off; the teacher must be what it was."""
        self._own.remove()
        self._taught.remove()
        self._teacher.check()
        return []
