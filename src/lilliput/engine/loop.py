"""The loop: everything that Lilliput does to a model happens somewhere in these lines.

::


    for stage in recipe:
        attach each method            # encodings, taps, teachers, players appear; then the optimizer is built
        for epoch, batch:
            before_step               # e.g. resample a mask
            output = model(batch);  loss = task loss * its weight + the sum of the methods' losses
            backward;  after_backward # e.g. freeze, quantize a gradient
            optimizer.step();  after_step   # e.g. reapply a mask, prox, clip
            after_epoch
        finish each method, in reverse      # shrink, bake, encode; returns Changes; fails if nothing changed
        evaluate, measure, save the artifact of this stage

This module has the part between ``attach`` and ``finish``; ``execute`` has the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.method import Method, overrides
from ..core.recipe import Train
from ..core.run import Run, clip_gradient
from ..core.task import answer, explain_mismatch
from ..core.types import Batch, Term
from ..errors import Diverged, InputError, ModelMismatch
from ..mechanisms.encodings import reapply, stored_masks
from ..mechanisms.surgery import last_plan
from . import distributed
from .optim import follow, rate, set_rate
from .precision import autocast


class Hooks:
    """The hooks that the methods of a stage really have, looked up once."""

    def __init__(self, methods: list[Method]) -> None:
        def having(hook: str) -> list[Any]:
            return [getattr(m, hook) for m in methods if overrides(m, hook)]

        self.before_step, self.after_step = having("before_step"), having("after_step")
        self.loss, self.after_backward = having("loss"), having("after_backward")
        self.after_epoch, self.task_weight = having("after_epoch"), having("task_weight")
        self.data = having("data")
        self.forward = _at_most_one(methods, "forward")
        self.drive = _at_most_one(methods, "drive")


@dataclass
class Tally:
    """Sums of the logged figures over an epoch, in double precision."""

    sums: dict[str, Tensor | float] = field(default_factory=dict)
    steps: int = 0

    def add(self, figures: dict[str, Tensor | float]) -> None:
        """Take in the figures of one step."""
        for name, value in figures.items():
            if isinstance(value, Tensor):
                # A figure on a GPU stays there: reading it would make the GPU wait.
                value = value.item() if value.device.type == "cpu" else value.detach().double()
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def close(self) -> dict[str, float]:
        """The mean of each figure over the steps; the tally starts anew."""
        means = {name: float(total) / self.steps for name, total in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means


@dataclass
class Loop:
    """What one stage needs beside the run: its settings, hooks and counters.

    Attributes:
        run: the run.
        train: how the stage trains.
        hooks: of the stage's methods.
        tally: figures of the epoch so far.
        scaler: of the gradients, for 16-bit floats on a GPU.
        inside_step: whether a step has begun and not ended.
    """

    run: Run
    train: Train
    hooks: Hooks
    tally: Tally = field(default_factory=Tally)
    scaler: torch.amp.GradScaler | None = None
    inside_step: bool = False

    def __post_init__(self) -> None:
        # Masks of earlier stages too: their zeros must survive whatever trains now.
        self.masks = stored_masks(self.run.model)
        self._channels = last_plan(self.run.model)
        self.run.network = distributed.wrap(self.run.model)

    def step(self, batch: Batch) -> None:
        """One batch, from ``before_step`` to ``after_step``."""
        run = self.run
        self.inside_step = True
        run.batch = batch
        if run.optimizer is not None:
            now = rate(self.train, run.progress)
            set_rate(run.optimizer, now)
            if run.players:
                follow(run.players, now / self.train.lr)
        for hook in self.hooks.before_step:
            hook(run)
        self._follow_surgery()
        loss = self.hooks.drive(run) if self.hooks.drive else self._forward_and_backward()
        self._check_finite(loss)
        run.step += 1
        if self.masks:
            reapply(self.masks)
        for hook in self.hooks.after_step:
            hook(run)
        self.tally.add({"loss": loss, **run.logged})
        run.logged.clear()
        self.inside_step = False

    def _follow_surgery(self) -> None:
        """Wrap the network anew when channels were cut: a wrapper shares gradients of fixed shapes."""
        channels = last_plan(self.run.model)
        if channels is not self._channels:
            self.run.network, self._channels = distributed.wrap(self.run.model), channels

    def _forward_and_backward(self) -> Tensor:
        run, optimizer = self.run, self.run.optimizer
        assert optimizer is not None and run.network is not None
        optimizer.zero_grad(set_to_none=True)
        with autocast(self.train.precision, self.run.device):
            forward = self.hooks.forward
            run.output = forward(run) if forward else answer(run.network, run.batch.inputs)
            loss = self.total_loss()
        self._backward(loss)
        for hook in self.hooks.after_backward:
            hook(run)
        self._move(optimizer)
        return loss

    def total_loss(self) -> Tensor:
        """The task's loss times its weight, plus the methods' terms; each is logged."""
        run = self.run
        weight = self.train.task_weight * math.prod(hook(run) for hook in self.hooks.task_weight)
        terms: dict[str, Tensor] = {}
        if weight:
            terms["loss/task"] = task_loss(run) * weight if weight != 1.0 else task_loss(run)
        for hook in self.hooks.loss:
            weighted_terms(hook(run), terms, run.logged)
        if not terms:
            raise InputError(
                "the stage has no loss: the task's weight is 0 and no method of it adds a term."
            )
        if self.hooks.loss:  # else the task's loss is all there is
            run.logged.update(terms)
        first, *others = terms.values()  # adding to 0 would be one more operation to differentiate
        return sum(others, first)

    def _backward(self, loss: Tensor) -> None:
        if self.scaler is None:
            loss.backward()
            return
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.run.optimizer)  # type: ignore[arg-type]

    def _move(self, optimizer: torch.optim.Optimizer) -> None:
        if self.train.clip is not None:
            clip_gradient(optimizer, self.train.clip)
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()

    def _check_finite(self, loss: Tensor) -> None:
        # Looking at the loss makes a GPU wait: there, look now and then.
        if self.run.device.type == "cuda" and self.run.step % 50:
            return
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"the loss is {value} at step {self.run.step} (epoch {self.run.epoch + 1}) of "
                f"stage {self.run.stage + 1}. The last checkpoint is kept. Lower the learning rate "
                "(train.lr), clip the gradient (train.clip), or look for empty or constant inputs."
            )


def weighted_terms(
    found: Mapping[str, Tensor | Term], terms: dict[str, Tensor], logged: dict[str, Any]
) -> None:
    """Add the terms of one method to ``terms``, times their weights, and note the weights.

    A second method of the same kind gets a number behind its name: no term takes another's place.
    """
    for name, term in found.items():
        place, count = f"loss/{name}", 2
        while place in terms:
            place, count = f"loss/{name} {count}", count + 1
        if isinstance(term, Term):
            logged[place.replace("loss/", "weight/", 1)] = term.weight
            term = term.value * term.weight
        terms[place] = term


def task_loss(run: Run) -> Tensor:
    """The task's loss of the present batch.

    Raises:
        ModelMismatch: the output does not fit the loss.
    """
    try:
        loss = run.task.loss(run.output, run.batch.target)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise explain_mismatch("loss", run.output, run.batch.target, error) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ModelMismatch(
            f"the task's loss returned {pytree.tree_map(lambda t: getattr(t, 'shape', t), loss)} "
            "instead of one number: reduce it to the mean over the batch."
        )
    return loss


def _at_most_one(methods: list[Method], hook: str) -> Any:
    having = [m for m in methods if overrides(m, hook)]
    if len(having) > 1:
        names = " and ".join(m.method_name() for m in having)
        raise InputError(
            f"{names} both want to replace the {'step' if hook == 'drive' else 'forward pass'}: only "
            "one method of a stage can. Put them into two stages."
        )
    return getattr(having[0], hook) if having else None
