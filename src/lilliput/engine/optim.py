"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.recipe import Train
from ..core.run import Player, Run
from ..core.select import matches
from ..errors import InputError, NothingMatched, UnknownName

_OPTIMIZERS = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls)
    and issubclass(cls, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")
}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of ``torch.optim`` with that name in lower case."""
    if name not in _OPTIMIZERS:
        raise UnknownName("optimizer", name, _OPTIMIZERS)
    return _OPTIMIZERS[name]


def build_optimizer(train: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a stage over the given parameters.

    Raises:
        InputError: the optimizer does not know one of the options.
    """
    cls = optimizer_class(train.optimizer)
    known = inspect.signature(cls).parameters
    options: dict[str, Any] = {"lr": train.lr, **train.options}
    if train.momentum is not None:
        options["momentum"] = train.momentum
    if "weight_decay" in known:
        options["weight_decay"] = train.weight_decay
    if unknown := [o for o in options if o not in known]:
        raise InputError(
            f"the optimizer {train.optimizer} does not know {', '.join(unknown)}. It knows: "
            f"{', '.join(k for k in known if k != 'params')}."
        )
    parameters = list(parameters)
    # One fused pass over all parameters; the arithmetic is the same.
    if (
        "fused" in known
        and not options.get("foreach")
        and all(p.is_floating_point() for p in parameters)
    ):
        options.setdefault("fused", True)
    optimizer: torch.optim.Optimizer = cls(parameters, **options)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put an optimizer into a state, each tensor laid out in memory as its parameter is.

    A state that comes from a file is contiguous, and torch leaves it so; but a fused optimizer walks
    through the memory of parameter, gradient and state side by side, and would pair the wrong entries of a
    parameter that lies otherwise (channels last).
    """
    optimizer.load_state_dict(state)
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def freeze_others(run: Run, train: Train) -> list[nn.Parameter]:
    """Freeze the parameters that the stage's pattern leaves out; returns those frozen here."""
    frozen = []
    for name, module in run.model.named_modules():
        # The parts of an encoding answer to the name of the layer that they encode.
        owner = ".".join(part for part in name.partition("parametrizations")[0].split(".") if part)
        if not matches(train.trainable, owner):
            frozen += [p for p in module.parameters(recurse=False) if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def trained_parameters(run: Run, train: Train) -> list[nn.Parameter]:
    """What the stage's optimizer moves: the model's and the helper modules' parameters.

    Raises:
        NothingMatched: there is nothing to train.
    """
    modules = (run.model, *run.extras.values())
    found = [p for module in modules for p in module.parameters() if p.requires_grad]
    if not found:
        raise NothingMatched(
            f"nothing to train: trainable is {train.trainable!r}, and no parameter that it covers "
            "requires a gradient."
        )
    return found


def rate(train: Train, progress: float) -> float:
    """The learning rate at a point of the stage (0 to 1)."""
    if progress < train.warmup:
        return train.lr * progress / train.warmup
    along = (progress - train.warmup) / (1.0 - train.warmup) if train.warmup < 1.0 else 1.0
    if train.lr_schedule == "linear":
        return train.lr * (1.0 - along)
    if train.lr_schedule == "cosine":
        return train.lr * 0.5 * (1.0 + math.cos(math.pi * along))
    if train.lr_schedule == "step":
        return train.lr * train.lr_factor ** sum(progress >= m for m in train.milestones)
    return train.lr


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = value


def follow(players: Mapping[str, Player], share: float) -> None:
    """Let the players' learning rates be the same share of their peaks as the stage's is of its own."""
    for player in players.values():
        set_rate(player.optimizer, player.lr * share)
