"""Methods in a training loop that belongs to the user."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..core.digests import mix
from ..core.method import Method, overrides
from ..core.run import Run
from ..core.select import example_device
from ..core.task import Task
from ..core.types import Batch, Change
from ..errors import InputError, ModelMismatch
from ..mechanisms.encodings import reapply, stored_masks
from .execute import finish_method
from .loop import Hooks, weighted_terms


class Attachment:
    """Methods on a model, moved forward by the user's own loop.

    Built by :func:`lilliput.attach`. Each step of the loop calls, in this order, :meth:`batch`,
    :meth:`loss`, :meth:`after_backward` and :meth:`after_step`; the end calls :meth:`finish`.

    Attributes:
        run: what the methods see.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Method],
        *,
        steps: int,
        task: Task | None,
        example_inputs: Any,
        seed: int,
    ) -> None:
        for method in methods:
            _refuse_own_step(method)
        # What a method sees of the data: the example, then the present batch.
        self._seen = [] if example_inputs is None else [Batch(example_inputs, None)]
        own_loop = Task(self._seen, self._seen, None, _no_loss, _no_loss, name="your own loop")
        self.run = Run(
            model=model,
            task=task or own_loop,
            device=example_device(model),
            seed=mix(seed),
            original=copy.deepcopy(model).eval().requires_grad_(False),
            network=model,
            total_steps=steps,
            methods=[method.model_copy() for method in methods],
        )
        for method in self.run.methods:
            method.attach(self.run)
        self._hooks = Hooks(self.run.methods)
        self._masks = stored_masks(model)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer should move: the model's and the helper modules' parameters."""
        for module in (self.run.model, *self.run.extras.values()):
            yield from (p for p in module.parameters() if p.requires_grad)

    def batch(self, inputs: Any, target: Any = None, index: Tensor | None = None) -> None:
        """Begin a step: before the forward pass."""
        self.run.batch = Batch(inputs, target, index)
        self._seen[:] = [self.run.batch]
        for hook in self._hooks.before_step:
            hook(self.run)

    def loss(self, task_loss: Tensor | None, output: Any) -> Tensor:
        """The loss to minimize: the loop's own loss as the methods weigh it, and their terms.

        Args:
            task_loss: the loop's loss; None where there are no labels.
            output: the model's output for the batch.
        """
        if self.run.batch.inputs is None:
            raise InputError(
                "call batch(inputs, target) before loss(): the methods need the inputs."
            )
        self.run.output = output
        weight = math.prod(hook(self.run) for hook in self._hooks.task_weight)
        terms = {} if task_loss is None or weight == 0 else {"loss/task": weight * task_loss}
        for hook in self._hooks.loss:
            weighted_terms(hook(self.run), terms, self.run.logged)
        if not terms:
            raise ModelMismatch("there is no loss: neither the loop nor a method gave one.")
        first, *others = terms.values()
        total: Tensor = sum(others, first)
        return total

    def after_backward(self) -> None:
        """The gradients are there, the optimizer has not moved."""
        for hook in self._hooks.after_backward:
            hook(self.run)

    def after_step(self) -> None:
        """The optimizer has moved."""
        self.run.step += 1
        reapply(self._masks)
        for hook in self._hooks.after_step:
            hook(self.run)

    def finish(self) -> list[Change]:
        """Conclude, in reverse order of the methods; returns what changed.

        Raises:
            NothingChanged: a method did nothing.
        """
        return [c for m in reversed(self.run.methods) for c in finish_method(m, self.run)]


def _refuse_own_step(method: Method) -> None:
    for hook in ("data", "forward", "drive"):
        if overrides(method, hook):
            raise InputError(
                f"{method.method_name()} replaces a part of the training loop ({hook}) and so cannot be "
                "attached to yours: use lilliput.compress."
            )


def _no_loss(output: Any, target: Any) -> Tensor:
    raise InputError("an attached method needs the task's loss: give attach(..., task=...).")
