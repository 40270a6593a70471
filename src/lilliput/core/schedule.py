"""How an amount grows while a stage trains.

A schedule maps the progress of the stage, 0 at its first step and 1 after its last, to the fraction
of the way from the initial to the final amount. ``cubic`` is equation 1 of Zhu and Gupta, "To prune,
or not to prune" (2017): fast while the network has much to spare, slow at the end.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from .types import Fraction, NonNegative, Settings


class Schedule(Settings):
    """From which amount to which, in which shape and over which part of the stage.

    Attributes:
        shape: ``"cubic"``, ``"linear"``, or ``"constant"`` (the final amount at once).
        begin: progress of the stage at which the amount starts to grow.
        end: progress at which the final amount is reached.
        initial: the amount before ``begin``, as a fraction of the final amount's own scale.
        every: steps between two updates; by default a hundredth of the stage.

    Example:
        >>> Schedule(shape="cubic").amount(0.5, final=0.9)
        0.7875
    """

    shape: Literal["constant", "linear", "cubic"] = "constant"
    begin: Fraction = 0.0
    end: Fraction = 1.0
    initial: Fraction = 0.0
    every: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        if self.end < self.begin:
            raise ValueError(f"the schedule ends at {self.end}, before its begin at {self.begin}")
        return self

    def amount(self, progress: float, final: float) -> float:
        """The amount that is due at ``progress`` (0 to 1) on the way to ``final``."""
        if self.shape == "constant" or progress >= self.end:
            return final
        if progress <= self.begin:
            return min(self.initial, final)
        left = 1.0 - (progress - self.begin) / (self.end - self.begin)
        power = 3 if self.shape == "cubic" else 1
        start = min(self.initial, final)
        return final + (start - final) * left**power

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the amount is updated at this step of the stage."""
        return step % (self.every or max(1, total_steps // 100)) == 0


class Ramp(Settings):
    """A weight that moves on a straight line while a stage trains, and then stays.

    Attributes:
        start: at the first step.
        end: from ``over`` on.
        over: the part of the stage in which it moves.

    Example:
        >>> Ramp(start=4.0, end=1.0, over=0.5).at(0.25)
        2.5
    """

    start: NonNegative
    end: NonNegative
    over: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    def at(self, progress: float) -> float:
        """The weight at a point of the stage (0 to 1)."""
        along = min(1.0, progress / self.over)
        return self.start + (self.end - self.start) * along


#: A weight of a loss: a number, or one that moves.
LossWeight: TypeAlias = NonNegative | Ramp


def weight_at(weight: float | Ramp, progress: float) -> float:
    """The weight at a point of the stage (0 to 1)."""
    return weight.at(progress) if isinstance(weight, Ramp) else weight
