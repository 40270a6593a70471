"""A method is one paper: its settings are its fields, its hooks are what it does to a run.

A method overrides the hooks it needs and nothing else. The engine calls them in this order::

    attach                       encodings, taps, teachers, players appear; then the optimizer is built
    data                         replace or wrap the training batches
    every step:
        before_step
        forward                  at most one method a stage replaces the forward pass ...
        drive                    ... or the whole step
        loss                     extra terms, added to task_weight * task loss
        after_backward           gradients are there: freeze, quantize, add
        after_step               weights have moved: reapply a mask, prox, clip
    after_epoch
    finish                       in reverse order of the methods; returns what changed

The settings object never changes. What a method must remember during a run goes into ``run.memory``
for itself (see :meth:`Method.memory`), which checkpoints save and restore.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .select import Weight, select
from .types import Change, Layers, Settings, Term

if TYPE_CHECKING:
    from .run import Run


class Method(Settings):
    """Base of every method; see the module's docstring for the order of the hooks.

    Class attributes:
        family: ``"distill"``, ``"prune"``, ``"quantize"``, ``"factorize"``, ``"multitask"``, ``"grow"``.
        changes_model: False for methods that only add losses, whose work shows in the score and
            which therefore need not report a change of the model.
        initializes: True for methods that give the network the weights from which the stage starts. They
            stand before methods that encode or cut weights, and may refuse to stand behind them.
        example_task: what the contract suite's tiny networks do on which the example is tried,
            ``"classification"`` or ``"detection"``.
    """

    family: ClassVar[str] = ""
    changes_model: ClassVar[bool] = True
    initializes: ClassVar[bool] = False
    example_task: ClassVar[str] = "classification"

    @classmethod
    def method_name(cls) -> str:
        """The name in recipes: the class's name in snake_case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    @classmethod
    def example(cls) -> Method:
        """An instance with few settings, fit for a tiny network; the contract suite runs it."""
        return cls()

    @classmethod
    def example_network(cls, features: int, outputs: int) -> nn.Module | None:
        """The network that the example's stage must bring; None for a method that takes any.

        Args:
            features: numbers of a sample.
            outputs: of the network.
        """
        return None

    def memory(self, run: Run) -> dict[str, Any]:
        """This method's own memory in this run: tensors, numbers, strings and lists of them."""
        return run.memory_of(self)

    def check(self, model: nn.Module) -> None:
        """Raise early what ``attach`` would raise: called for all stages before the first one trains."""

    # -- hooks, in the order of their calls ---------------------------------------------------

    def attach(self, run: Run) -> None:
        """Prepare the run before its optimizer exists."""

    def data(self, run: Run, batches: Iterable[Any]) -> Iterable[Any]:
        """Replace or wrap the training batches."""
        return batches

    def task_weight(self, run: Run) -> float:
        """Factor on the task's loss; at 0 the task's loss is not computed."""
        return 1.0

    def before_step(self, run: Run) -> None:
        """Before the forward pass; ``run.batch`` is there."""

    def forward(self, run: Run) -> Any:
        """Replace the forward pass: return the output for ``run.batch``."""
        raise NotImplementedError

    def drive(self, run: Run) -> Tensor:
        """Replace forward, backward and optimizer step; return the loss for the log."""
        raise NotImplementedError

    def loss(self, run: Run) -> Mapping[str, Tensor | Term]:
        """Extra loss terms by name, as a tensor or with their weight apart; ``run.output`` is there."""
        return {}

    def after_backward(self, run: Run) -> None:
        """Gradients are there, the optimizer has not moved."""

    def after_step(self, run: Run) -> None:
        """The optimizer has moved."""

    def after_epoch(self, run: Run) -> None:
        """An epoch has ended, the validation score has not been taken."""

    def settled(self, run: Run) -> bool:
        """Whether the method has reached its target, so that this epoch's model may be kept as best."""
        return True

    def finish(self, run: Run) -> list[Change]:
        """Conclude: solve, shrink, freeze; return what changed since ``attach``."""
        return []


class LayerMethod(Method):
    """A method that works on the weights of some layers.

    Attributes:
        layers: pattern over module names.
    """

    layers: Layers = "*"

    def amounts(self) -> Any:
        """The per-layer setting, if there is one; a layer that none of its patterns covers is left out."""
        return None

    def weights(self, model: nn.Module) -> list[Weight]:
        """The weights of those layers.

        Raises:
            NothingMatched: there are none; the message names the nearest layers.
        """
        return select(model, self.layers, by=self.method_name(), setting=self.amounts())

    def check(self, model: nn.Module) -> None:
        """The patterns must cover a weight."""
        self.weights(model)


def overrides(method: Method, hook: str) -> bool:
    """Whether the method has its own version of the hook."""
    return getattr(type(method), hook) is not getattr(Method, hook)
