"""The quantities that methods share, each named and validated once, and what a step reports.

``sparsity`` is the fraction of weights set to zero, ``keep`` the fraction of channels kept. A setting
of type ``PerLayer[X]`` is one value for every layer, or a mapping from patterns to values, in which
the first pattern that matches a layer wins.
"""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..errors import InputError, did_you_mean

Sparsity = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Keep = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Bits = Annotated[int, Field(ge=1, le=16)]
Layers: TypeAlias = str | list[str]

T = TypeVar("T")
PerLayer: TypeAlias = T | dict[str, T]


if TYPE_CHECKING:  # the metaclass has no public name
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _Loud(ModelMetaclass):
    """Let a constructor fail with Lilliput's error; inside a recipe pydantic's own keeps the place."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        try:
            return super().__call__(*args, **settings)
        except ValidationError as error:
            raise InputError(_explain(cls, error)) from error


def _explain(cls: Any, error: ValidationError) -> str:
    lines = []
    for detail in error.errors():
        place = ".".join(map(str, detail["loc"])) or "settings"
        text = str(detail.get("ctx", {}).get("error", detail["msg"]))
        if detail["type"] == "extra_forbidden":
            text = f"unknown.{did_you_mean(place, cls.model_fields)}"
        lines.append(f"{cls.__name__}.{place}: {text}")
    return "\n".join(lines)


class Settings(BaseModel, metaclass=_Loud):
    """A pydantic model that refuses unknown keys and checks assignments."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, arbitrary_types_allowed=True
    )


def resolve(setting: T | dict[str, T] | None, name: str) -> T | None:
    """The value of a per-layer setting for the layer ``name``; None where no pattern covers it.

    Example:
        >>> resolve({"conv*": 8, "*": 5}, "fc1")
        5
    """
    if not isinstance(setting, dict):
        return setting
    return next((v for pattern, v in setting.items() if fnmatch.fnmatchcase(name, pattern)), None)


@dataclass(frozen=True)
class Change:
    """What a method did to one place of the model.

    Attributes:
        where: name of the tensor or layer.
        what: what was changed, for example ``"nonzeros"``.
        before: the value before.
        after: the value after.
        method: name of the method that did it.
        note: anything that a reader should know.
    """

    where: str
    what: str
    before: Any
    after: Any
    method: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """One batch: what goes in, what should come out, and which samples they are.

    Attributes:
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        target: whatever the task's loss and score take as their second argument.
        index: int64 ``(batch,)``, the samples' numbers in the data set, where they are known.
        views: further views of the same samples by name, which the model never sees and a teacher may:
            the clean recording, the full-size image, the source domain.
    """

    inputs: Any
    target: Any
    index: Any = None
    views: Any = None


class Term(NamedTuple):
    """A part of the loss and its weight; the log shows the product and the weight.

    Attributes:
        value: the part by itself, a scalar.
        weight: what it is multiplied by at this step.
    """

    value: Tensor
    weight: float = 1.0
