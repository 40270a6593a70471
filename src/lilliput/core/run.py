"""One execution of a recipe as methods see it: model, task, batch, optimizer, counters, log.

A run is handed to every hook. The engine moves it forward; ``lilliput.attach`` moves it from a user's
own loop. It holds no file and no command line.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Diverged, InputError, did_you_mean
from .digests import mix
from .method import Method
from .task import Task, batch_size, move, read
from .types import Batch


@dataclass
class Player:
    """A further network that trains, with its own optimizer (a peer, a discriminator, a teacher).

    Attributes:
        network: in train mode.
        optimizer: over its parameters.
        lr: its learning rate at the peak of the stage's schedule, which it follows.
        name: for error messages.
        clip: largest norm of its gradient, that of the stage; None for any.
        scaler: of its gradients, where the stage scales the student's.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    lr: float
    name: str
    clip: float | None = None
    scaler: torch.amp.GradScaler | None = None

    def descend(self, loss: Tensor) -> None:
        """One step of the player's optimizer.

        Raises:
            Diverged: the loss is not finite.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(
                f"the loss of {self.name} is {value}: this player has collapsed. Lower its learning "
                "rate or its weight; the last checkpoint is kept."
            )
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
        self._move()

    def _move(self) -> None:
        if self.clip is not None:
            clip_gradient(self.optimizer, self.clip)
        if self.scaler is None:
            self.optimizer.step()
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()


def clip_gradient(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Shorten the gradient of all that an optimizer moves to a norm, where it is longer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, norm)


@dataclass
class Run:
    """The world of a method.

    Attributes:
        model: the network that is being compressed, encodings included.
        task: what it must do.
        device: where it trains.
        seed: of this run; draw randomness from :meth:`generator`.
        original: the network before the first method touched it, frozen and in eval mode.
        network: what a forward pass calls: the model, wrapped where several processes train together.
        stage: number of the stage, from 0.
        step: optimizer steps done in this stage.
        total_steps: optimizer steps of the whole stage; 0 for a stage that does not train.
        epoch: epochs done in this stage.
        batch: the batch of this step.
        output: the model's output for it.
        optimizer: the model's optimizer, there from the first step on.
        extras: modules that train with the model and never reach the artifact (adapters).
        players: further networks with their own optimizers.
        memories: what each method of the stage remembers; checkpoints save it.
        methods: of the stage.
        directory: where large helper files may go; None where the run keeps no files.
        wrap: applied to helper modules, where several processes train together.
        build: makes a network from a reference in a recipe; see :meth:`find_network`.
        new_optimizer: makes an optimizer as the stage's own is made, for players.
        earlier: by name, functions that return the network at the end of an earlier stage.
        shared: what methods of the stage share, such as a teacher that runs once for all of them.
        logged: figures of this step.
    """

    model: nn.Module
    task: Task
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    original: nn.Module | None = None
    network: Callable[..., Any] | None = None
    stage: int = 0
    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    batch: Batch = field(default_factory=lambda: Batch(None, None))
    output: Any = None
    optimizer: torch.optim.Optimizer | None = None
    extras: dict[str, nn.Module] = field(default_factory=dict)
    players: dict[str, Player] = field(default_factory=dict)
    memories: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: list[Method] = field(default_factory=list)
    directory: Path | None = None
    wrap: Callable[[nn.Module], nn.Module] = field(default=lambda module: module)
    build: Callable[[Any], nn.Module] | None = None
    new_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None
    earlier: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    logged: dict[str, Tensor | float] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """How far the stage is: 0 at its first step, 1 after its last, 1 when it does not train."""
        return self.step / self.total_steps if self.total_steps else 1.0

    def log(self, name: str, value: Tensor | float) -> None:
        """Note a figure of this step; the log shows the mean over the epoch."""
        self.logged[name] = value.detach() if isinstance(value, Tensor) else value

    def key_of(self, method: Method) -> str:
        """A name for one method of this stage that no other has: its place and its name."""
        for place, other in enumerate(self.methods):
            if other is method:
                return f"{place}.{method.method_name()}"
        raise InputError(f"{method.method_name()} is not part of this stage.")

    def memory_of(self, method: Method) -> dict[str, Any]:
        """The memory of one method of this stage."""
        return self.memories.setdefault(self.key_of(method), {})

    def extra(self, name: str, module: nn.Module) -> nn.Module:
        """Let a helper module train with the model; call this in ``attach``.

        Args:
            name: of the helper; begin it with :meth:`key_of` the method.
            module: an adapter, for example.

        Returns:
            The module to call: on the device, and wrapped where several processes train together.
        """
        self.extras[name] = self.wrap(module.to(self.device))
        return self.extras[name]

    def learning_rate(self, told: str) -> float:
        """The optimizer's, for methods that move weights themselves.

        Args:
            told: the beginning of the error message: who must know it, and why.

        Raises:
            InputError: an own loop has not given its optimizer.
        """
        if self.optimizer is None:
            raise InputError(
                f"{told} give the optimizer to attached.run.optimizer before the first step."
            )
        return float(self.optimizer.param_groups[0]["lr"])

    def player(
        self,
        name: str,
        network: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> Player:
        """Add a network with its own optimizer; call this in ``attach``.

        Args:
            name: of the player.
            network: handed over; it trains from now on.
            optimizer: makes its optimizer; by default one like the stage's.
        """
        make = optimizer or self.new_optimizer
        if make is None:
            raise InputError(f"the player {name} needs an optimizer: this run has none to copy.")
        network = self.wrap(network.to(self.device).train())
        made = make(network.parameters())
        self.players[name] = Player(network, made, made.param_groups[0]["lr"], name)
        return self.players[name]

    def generator(self, purpose: str) -> torch.Generator:
        """A random generator for one purpose: the same for the same seed, stage, step and purpose."""
        return torch.Generator().manual_seed(mix(self.seed, self.stage, self.step, purpose))

    def calibration(self, samples: int) -> Iterator[Batch]:
        """Training batches on the device, until at least ``samples`` samples have been seen."""
        seen = 0
        for batch in read(self.task.train, "the training batches"):
            moved = move(batch, self.device)
            yield moved
            seen += batch_size(moved)
            if seen >= samples:
                return

    def find_network(self, reference: Any) -> nn.Module:
        """The network that a recipe refers to, for example as a teacher.

        Args:
            reference: ``"original"``; ``"previous"`` or the name of an earlier stage, for the network at
                its end; a module; or what a recipe's ``model`` may be: a file, or
                ``{architecture: ..., weights: ...}``.

        Returns:
            A network of its own: training or freezing it touches nobody else's.
        """
        if isinstance(reference, str) and reference == "original":
            if self.original is None:
                raise InputError("there is no original: the run started without one.")
            return copy.deepcopy(self.original)
        if isinstance(reference, str) and reference in self.earlier:
            return self.earlier[reference]()
        if isinstance(reference, str) and reference == "previous":
            raise InputError("there is no previous network: this is the first stage.")
        if isinstance(reference, nn.Module):
            return copy.deepcopy(reference)
        if self.build is None:
            raise InputError(
                f"{reference!r} can be built only from a recipe: give a module instead."
            )
        try:
            return self.build(reference)
        except InputError as error:
            if not isinstance(reference, str) or not self.earlier:
                raise
            hint = did_you_mean(reference, self.earlier)
            raise InputError(f"{error} No earlier stage has that name either.{hint}") from error
