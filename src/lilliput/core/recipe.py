"""A recipe: which model, which task, and the stages that lead from one to a small model.

Everything is validated before anything is built; unknown keys are errors. Methods appear in YAML as
``{method: magnitude, sparsity: 0.9}`` and in Python as ``Magnitude(sparsity=0.9)``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator
from torch import nn

from ..errors import InputError
from . import registry
from .digests import weights_digest
from .method import Method
from .types import Fraction, Layers, NonNegative, Positive, Settings


def _as_method(value: Any) -> Method:
    """Build a method from its recipe form; the errors name the place inside the recipe."""
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, dict) or "method" not in value:
        raise InputError("a method is written {method: NAME, setting: value, ...}.")
    settings = {k: v for k, v in value.items() if k != "method"}
    cls: type[Method] = registry.load("method", value["method"])
    return cls.model_validate(settings)


def _from_method(method: Method) -> dict[str, Any]:
    settings = method.model_dump(exclude_defaults=True)
    return {"method": method.method_name(), **json.loads(json.dumps(settings, default=_describe))}


def _describe(value: Any) -> str:
    """A network in a method's settings, such as a teacher, as something that can be compared."""
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {weights_digest(value)[:16]}"
    return repr(value)


AnyMethod = Annotated[
    Method, BeforeValidator(_as_method), PlainSerializer(_from_method, return_type=dict)
]


class Train(Settings):
    """How a stage trains.

    Attributes:
        epochs: passes over the training batches; 0 makes the stage one-shot.
        optimizer: a class of ``torch.optim`` in lower case, for example ``"adam"`` or ``"sgd"``.
        lr: the optimizer's learning rate, the peak of the schedule.
        lr_schedule: shape of the learning rate over the stage.
        warmup: fraction of the stage in which the rate rises linearly from 0.
        milestones: progress (0 to 1) at which ``"step"`` multiplies the rate by ``lr_factor``.
        lr_factor: see ``milestones``.
        momentum: for the optimizers that have one.
        weight_decay: as the optimizer defines it.
        options: further arguments of the optimizer's class.
        trainable: pattern over module names; everything else stays bit-equal.
        task_weight: factor on the task's loss.
        clip: largest gradient norm; None for no clipping.
        precision: arithmetic of the forward pass, through torch's autocast. ``"auto"`` is bfloat16 on devices
            that have instructions for it and float32 on others, where bfloat16 would take three times as
            long; ``environment.json`` says which it is where the run began.
        channels_last: lay convolutions out with the channels last, which is about twice as fast on a
            processor; not for networks that take their activations apart with ``view``.
        keep: the model of the last epoch, or of the best validation score.
        evaluate_every: epochs between two validation scores.
        checkpoint_minutes: time between two checkpoints inside an epoch.
    """

    epochs: int = Field(default=1, ge=0)
    optimizer: str = "adam"
    lr: Positive = 1e-3
    lr_schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    warmup: Fraction = 0.0
    milestones: list[Fraction] = Field(default_factory=lambda: [0.5, 0.75])
    lr_factor: Positive = 0.1
    momentum: Fraction | None = None
    weight_decay: NonNegative = 0.0
    options: dict[str, Any] = Field(default_factory=dict)
    trainable: Layers = "*"
    task_weight: NonNegative = 1.0
    clip: Positive | None = None
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    channels_last: bool = False
    keep: Literal["last", "best"] = "last"
    evaluate_every: int = Field(default=1, ge=1)
    checkpoint_minutes: Positive = 1.0


class ModelSettings(Settings):
    """Which network.

    Attributes:
        architecture: a registered architecture's name; or where that package is installed ``timm:NAME``,
            ``torchvision:NAME`` or ``hf:NAME``, with random weights unless the argument ``pretrained``
            is true.
        build: ``package.module:function`` that returns a module.
        arguments: keyword arguments for either.
        weights: a ``.safetensors``, or a ``torch.save`` file that ``weights_only`` can read, from
            which the network starts; ``$NAME`` stands for an environment variable.
    """

    architecture: str | None = None
    build: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> ModelSettings:
        if (self.architecture is None) == (self.build is None):
            raise ValueError("give either architecture or build, and not both")
        return self


class TaskSettings(Settings):
    """Which task: a registered name or ``package.module:function``, and its arguments."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


def widened(settings: type[Settings], key: str, value: Any) -> Any:
    """``digits`` as ``{name: digits}``, and arguments beside the name as arguments below it."""
    if isinstance(value, str):
        return {key: value}
    if not isinstance(value, dict) or "arguments" in value:
        return value
    own = {k: v for k, v in value.items() if k in settings.model_fields}
    return {**own, "arguments": {k: v for k, v in value.items() if k not in own}}


def flat(settings: type[Settings], key: str) -> BeforeValidator:
    """Accept the short form of :func:`widened`."""
    return BeforeValidator(lambda value: widened(settings, key, value))


def _as_model(value: Any) -> nn.Module | ModelSettings | None:
    if value is None or isinstance(value, nn.Module | ModelSettings):
        return value
    return ModelSettings.model_validate(widened(ModelSettings, "architecture", value))


def _from_model(value: Any) -> Any:
    """A stage's network in its recipe form; of a module only what it is."""
    if isinstance(value, ModelSettings):
        return value.model_dump(exclude_defaults=True)
    return None if value is None else _describe(value)


AnyModel = Annotated[Any, BeforeValidator(_as_model), PlainSerializer(_from_model)]


class Stage(Settings):
    """Methods that act together, and how to train meanwhile.

    Attributes:
        name: how reports call the stage; by default the names of its methods.
        methods: in the order in which their hooks are called.
        train: without it the stage does not train.
        task: another task than the recipe's, in Python or by name.
        model: another network that this stage and those after it work on, a module or as a recipe's
            ``model``. The one before it is then ``"previous"``, from which it can learn or inherit.
    """

    name: str = ""
    methods: list[AnyMethod] = Field(default_factory=list)
    train: Train = Field(default_factory=lambda: Train(epochs=0))
    task: Any = None
    model: AnyModel = None

    @model_validator(mode="after")
    def _named(self) -> Stage:
        if not self.name:
            named = " + ".join(m.method_name() for m in self.methods) or "train"
            object.__setattr__(self, "name", named)
        if self.name in ("original", "previous"):
            raise ValueError(
                f"{self.name!r} already names a network: call the stage something else"
            )
        if not self.methods and not self.train.epochs:
            raise ValueError("the stage has neither methods nor epochs: it would do nothing")
        return self


class ArtifactSettings(Settings):
    """How the compressed file is written.

    Attributes:
        codec: one codec for all encoded tensors, or ``"auto"`` for the smallest a tensor.
        floats: type of what stays a number (biases, centroids, unencoded weights). ``"float16"``
            rounds; the score that is reported is the rounded model's.
        profile: ``"safetensors"``, ``"compact"`` (small header, for tiny networks: of the recipe only its
            fingerprint), or ``"auto"``.
    """

    codec: str = "auto"
    floats: Literal["float32", "float16"] = "float32"
    profile: Literal["auto", "safetensors", "compact"] = "safetensors"


class Recipe(Settings):
    """An ordered list of stages, and what they start from.

    Attributes:
        version: of the recipe's form; 1.
        name: how the run directory is called.
        task: see :class:`TaskSettings`; ``task: digits`` is enough.
        model: see :class:`ModelSettings`.
        seed: of everything random.
        device: ``"auto"`` takes a GPU where torch sees one.
        threads: torch threads; tiny networks run faster on one.
        deterministic: use torch's deterministic algorithms.
        stages: at least one.
        artifact: see :class:`ArtifactSettings`.
        expect: conditions on the result, for example ``{size_ratio: ">= 40"}``.
    """

    version: Literal[1] = 1
    name: str = "recipe"
    description: str = ""
    task: Annotated[TaskSettings, flat(TaskSettings, "name")]
    model: Annotated[ModelSettings, flat(ModelSettings, "architecture")]
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    deterministic: bool = True
    stages: list[Stage] = Field(min_length=1)
    artifact: ArtifactSettings = Field(default_factory=ArtifactSettings)
    expect: dict[str, str] = Field(default_factory=dict)
