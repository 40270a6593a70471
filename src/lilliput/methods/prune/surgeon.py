"""Optimal Brain Surgeon: remove the weights whose loss costs least, and let all others make up for it.

Paper: Optimal Brain Damage (LeCun, Denker, Solla; NIPS 1989)
Paper: Optimal Brain Surgeon and general network pruning (Hassibi, Stork, Wolff; IEEE ICNN 1993)
Paper: Second Order Derivatives for Network Pruning: Optimal Brain Surgeon (Hassibi, Stork; NIPS 1992)
Paper: Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning (Frantar,
Alistarh; NeurIPS 2022; arXiv 2208.11580)
Paper: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Frantar, Alistarh; ICML 2023;
arXiv 2301.00774)

At a minimum of the loss a small step dw costs ``dw^T H dw / 2``. The cheapest step that makes weight q zero,
and its price, are (1993, equation 5)::

    dw = -w_q / [H^-1]_qq * H^-1 e_q,      L_q = w_q^2 / (2 [H^-1]_qq)

The weight with the smallest price goes, *all* others move by dw, and q leaves the inverse::

    H^-1 <- H^-1 - (H^-1 e_q)(H^-1 e_q)^T / [H^-1]_qq

``curvature`` says what H is:

- ``network``: that of the loss, over all weights and biases at once (1993), for small networks.
- ``diagonal``: its diagonal only (1989): the price is ``h_q w_q^2 / 2`` and no other weight moves.
- ``blocks``: the empirical Fisher matrix, weights in blocks that know nothing of each other.
- ``layer``: that of the squared error of a layer's outputs on calibration inputs (2022, 2023); each
  filter is a problem by itself and all share one Hessian. ``sweep`` goes through the columns once, choosing
  in every ``block`` of them and moving what lies to the right (SparseGPT); ``greedy`` removes the cheapest
  weight of all, filter by filter exactly (Optimal Brain Compression).

Faithful: prices, updates, recursion of the inverse, order of removal. Differs: ``damping`` is a part of the
mean curvature, where the paper's alpha is an absolute 1e-8 to 1e-4; H is measured anew ``rounds`` times
and updated in between, where the paper measures it after each weight; a loss that is not a squared error
enters by its own curvature at the outputs. Stopping is by a count (``sparsity``) or by the summed price
(``allowed``).

The surprising rule: a stage of zero epochs is what the papers do. Where a stage trains, removed weights stay
zero and the others go on from their new values.

Cost: ``network`` keeps a square matrix of all weights and passes over it once a removal; ``layer`` with
``sweep`` is a Cholesky factor a layer, seconds for a million weights. When not to use it: with many epochs
to retrain, where ``magnitude`` and ``gradual`` get as far.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Positive
from ...errors import InputError
from ...mechanisms.columns import inverted
from ...mechanisms.curvature import (
    as_rows,
    from_rows,
    input_hessians,
    inverse_by_recursion,
    loss_vectors,
    one_by_one,
    output_vectors,
)
from ...mechanisms.ranking import count
from ...mechanisms.solvers import solvable
from ._in_rounds import SparseInRounds
from ._layerwise import write
from ._masking import mask_of
from ._removals import greedy, removals, remove, sweep

#: A square matrix of more entries a side does not fit: 4,000 are 128 MB in double precision.
LARGEST = 4_000


@method
class Surgeon(SparseInRounds):
    """Remove the weights that second derivatives call cheapest, and correct the others.

    Attributes:
        sparsity: fraction of zeros, exactly. By layer pattern only where layers or blocks are solved by
            themselves (``layer``, ``blocks``).
        allocation: how one sparsity is spread over the layers, where these are solved by themselves: uniform,
            by one ranking of all weights (magnitude), by shape (erk), by sensitivity, or by energy.
        allowed: instead: remove while the summed price stays below this increase of the task's loss
            (``network`` and ``diagonal``).
        pattern: ``"2:4"`` and the like: 2 of 4 neighboring inputs of every filter stay (``layer`` with
            ``sweep``), in place of sparsity.
        curvature: what H is; see the module.
        solver: of ``layer``: ``sweep`` for any size, ``greedy`` for up to some hundred inputs a filter.
        samples: of the training data on which H is measured.
        positions: of a convolution's output that are looked at in each sample.
        damping: added to the diagonal of H, as a part of its mean.
        block: entries of a block of ``blocks``, columns chosen together by ``sweep``.
        rounds: how often H is measured, each time removing a part.
        until: part of the stage over which the rounds are spread.
        layers: pattern over module names.
        remove_dead: cut the other connections of neurons that have lost all inputs or all outputs.

    Raises:
        InputError: too few samples for a layer's inputs; a network too large for one matrix; a layer that
            cannot be solved by itself; a pattern that does not divide a layer; a singular Hessian.

    Example:
        >>> Surgeon(sparsity=0.5).curvature
        'layer'
    """

    family: ClassVar[str] = "prune"

    allowed: Positive | None = None
    pattern: str | None = None
    curvature: Literal["network", "diagonal", "blocks", "layer"] = "layer"
    solver: Literal["sweep", "greedy"] = "sweep"
    samples: Annotated[int, Field(ge=1)] = 1024
    positions: Annotated[int, Field(ge=1)] = 16
    damping: Positive = 1e-4
    block: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _one_amount(self) -> Surgeon:
        if sum(amount is not None for amount in (self.sparsity, self.allowed, self.pattern)) != 1:
            raise ValueError("give one of sparsity, allowed and pattern")
        if self.allowed is not None and self.curvature not in ("network", "diagonal"):
            raise ValueError(f"allowed is in units of the loss, which curvature: {self.curvature} "
                             "does not know; give sparsity")  # fmt: skip
        if self.pattern is not None and (self.curvature, self.solver) != ("layer", "sweep"):
            raise ValueError("a pattern wants curvature: layer and solver: sweep")
        together = self.curvature in ("network", "diagonal")
        if together and (isinstance(self.sparsity, dict) or self.allocation != "uniform"):
            raise ValueError(
                f"curvature: {self.curvature} ranks all layers together: give one sparsity"
            )
        if self.pattern is not None:
            self.kept_of()
        return self

    @classmethod
    def example(cls) -> Surgeon:
        """Half of the weights go."""
        return cls(sparsity=0.5, samples=32)

    def kept_of(self) -> tuple[int, int] | None:
        """The pattern as numbers: how many of how many stay."""
        if self.pattern is None:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        kept, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < kept < of:
            raise ValueError(f"the pattern {self.pattern!r} is not of the form '2:4'")
        return kept, of

    def check(self, model: nn.Module) -> None:
        """Sizes and kinds of layers must fit the curvature."""
        chosen = self.weights(model)
        if self.curvature == "layer":
            for weight in chosen:
                self._check_layer(weight)
        total = sum(w.value.numel() for w in chosen) + sum(
            p.numel() for p in _others(model, chosen)
        )
        if self.curvature == "network" and total > LARGEST:
            raise InputError(
                f"surgeon: {total:,} weights and biases are too many for one matrix, {LARGEST:,} at most. "
                "Set curvature: layer or blocks, or choose fewer layers."
            )

    def _remember(self, run: Run, chosen: list[Weight]) -> None:
        self.memory(run)["spent"] = 0.0

    def _note(self, run: Run) -> str:
        spent = self.memory(run)["spent"]
        return f"summed price {spent:.3g}" if spent else ""

    def _prune(self, run: Run, chosen: list[Weight], part: float) -> None:
        if self.curvature == "layer":
            self._by_layer(run, chosen, part)
        elif self.curvature == "blocks":
            self._by_blocks(run, chosen, part)
        else:
            self._together(run, chosen, part)

    # -- all weights together -----------------------------------------------------------------------

    def _together(self, run: Run, chosen: list[Weight], part: float) -> None:
        """Hassibi & Stork, and LeCun with the diagonal."""
        others = _others(run.model, chosen) if self.curvature == "network" else []
        samples = one_by_one(run.calibration(self.samples), self.samples)
        vectors = list(output_vectors(run.model, chosen, others, samples, run.task.loss))
        moving = torch.cat([w.value.detach().flatten() for w in chosen]).double()
        alive = moving != 0
        if self.curvature == "network":
            moving = torch.cat([moving, *(p.detach().flatten().double() for p in others)])
            moved, spent = self._surgery(run, moving, vectors, alive, part)
        else:
            moved, spent = self._damage(run, moving, vectors, alive, part)
        self.memory(run)["spent"] += spent
        self._write(run, chosen, moved)
        place = sum(w.value.numel() for w in chosen)
        for parameter in others:
            parameter.copy_(moved[place : place + parameter.numel()].view_as(parameter))
            place += parameter.numel()

    def _surgery(
        self, run: Run, moving: Tensor, vectors: list[Tensor], alive: Tensor, part: float
    ) -> tuple[Tensor, float]:
        """The new weights and biases, and what they cost."""
        inverse = inverse_by_recursion(vectors, len(vectors), self._alpha(vectors))
        free = torch.nn.functional.pad(alive, (0, len(moving) - len(alive)))
        weights, inverse = moving[None].clone(), inverse[None]
        for dead in (~alive).nonzero().flatten():  # weights that earlier stages removed stay zero
            remove(weights, inverse, dead[None])
        limit, spent = self._limits(run, alive, part), 0.0
        before, most = weights.clone(), torch.tensor([limit[0]], device=weights.device)
        for _, price in removals(weights, inverse, free[None], most):
            if spent + float(price) > limit[1]:
                return before[0], spent
            spent += float(price)
            before.copy_(weights)
        return weights[0], spent

    def _damage(
        self, run: Run, moving: Tensor, vectors: list[Tensor], alive: Tensor, part: float
    ) -> tuple[Tensor, float]:
        """The weights without the cheapest, and what that costs."""
        second = sum((v.double().square().sum(0) for v in vectors), torch.zeros_like(moving))
        price = second / len(vectors) * moving.square() / 2.0
        ascending, order = price.masked_fill(~alive, torch.inf).sort(stable=True)
        limit = self._limits(run, alive, part)
        goes = order[: limit[0]]
        goes = goes[ascending[: limit[0]].cumsum(0) <= limit[1]]
        return moving.index_fill(0, goes, 0.0), float(price[goes].sum())

    def _limits(self, run: Run, alive: Tensor, part: float) -> tuple[int, float]:
        """How many more weights may go, and for what price."""
        living = int(alive.sum())
        if self.allowed is not None:
            return living - 1, part * self.allowed - self.memory(run)["spent"]
        assert isinstance(self.sparsity, float)
        due = count(len(alive), part * self.sparsity) - (len(alive) - living)
        return max(due, 0), torch.inf

    def _alpha(self, vectors: Iterable[Tensor]) -> float:
        """The damping in units of the curvature."""
        found = list(vectors)
        mean = sum(float(v.double().square().sum()) for v in found) / len(found)
        return self.damping * max(mean / found[0].shape[-1], torch.finfo(torch.float64).tiny)

    # -- in blocks ----------------------------------------------------------------------------------

    def _by_blocks(self, run: Run, chosen: list[Weight], part: float) -> None:
        """The empirical Fisher matrix of each layer, cut into blocks along its diagonal."""
        samples = one_by_one(run.calibration(self.samples), self.samples)
        vectors = torch.cat(list(loss_vectors(run.model, chosen, [], samples, run.task.loss)))
        ends = [0, *torch.tensor([w.value.numel() for w in chosen]).cumsum(0).tolist()]
        moved = [
            self._in_blocks(w, vectors[:, first:last], part * self.final(run, w))
            for w, (first, last) in zip(chosen, pairwise(ends), strict=True)
        ]
        self._write(run, chosen, torch.cat(moved))

    def _in_blocks(self, weight: Weight, vectors: Tensor, sparsity: float) -> Tensor:
        values = weight.value.detach().double().flatten()
        surplus = -len(values) % self.block
        padded = torch.nn.functional.pad(values, (0, surplus)).view(-1, self.block)
        met = torch.nn.functional.pad(vectors.double(), (0, surplus))
        alpha = self._alpha(vectors[:, None])  # one sample after the other
        inverse = inverse_by_recursion(
            [met.unflatten(1, padded.shape).movedim(1, 0)], len(met), alpha
        )
        total = count(len(values), sparsity)
        # What pads the last block is zero already, and goes first.
        return greedy(padded, inverse, total + surplus).flatten()[: len(values)]

    # -- layer by layer -------------------------------------------------------------------------------

    def _by_layer(self, run: Run, chosen: list[Weight], part: float) -> None:
        """Each layer meets the inputs that the layers before it, already sparse, hand on."""
        for weight in chosen:
            generator = run.generator(f"surgeon {weight.name}")
            hessians, seen = input_hessians(
                run.model, [weight.layer], run.calibration(self.samples), self.positions, generator
            )
            self._check_rows(weight, hessians.get(weight.layer), seen[weight.layer])
            rows = as_rows(weight.module).double()
            amount = part * self.final(run, weight)
            pairs = zip(rows, hessians[weight.layer], strict=True)
            moved = torch.stack([self._solve(weight, *pair, amount) for pair in pairs])
            self._write(run, [weight], from_rows(weight.module, moved).flatten())

    def _solve(self, weight: Weight, rows: Tensor, hessian: Tensor, sparsity: float) -> Tensor:
        """One group of filters."""
        size = hessian.diagonal().mean()
        if size == 0:
            raise InputError(
                f"surgeon: the Hessian of {weight.layer} is singular: all of its inputs are zero on the "
                f"calibration samples. Remove what is dead first, or leave it out with '!{weight.layer}'."
            )
        damped = hessian + self.damping * size * torch.eye(len(hessian)).to(hessian)
        if self.solver == "sweep":
            return sweep(rows, damped, sparsity, self.block, self.kept_of())
        inverse = inverted(damped).expand(len(rows), -1, -1)
        return greedy(rows, inverse, count(rows.numel(), sparsity))

    def _check_layer(self, weight: Weight) -> None:
        if not solvable(weight.module) or weight.tensor != "weight":
            raise InputError(
                f"surgeon: {weight.name} cannot be solved by itself: only linear layers and convolutions "
                f"see their inputs. Leave it out with '!{weight.layer}', or set curvature: blocks."
            )
        kept, channels = self.kept_of(), as_rows(weight.module).shape[2]
        if kept and channels % kept[1]:
            raise InputError(
                f"surgeon: the pattern {self.pattern} does not divide {weight.layer}, whose filters have "
                f"{channels} inputs. Leave it out with '!{weight.layer}'."
            )

    def _check_rows(self, weight: Weight, hessian: Tensor | None, seen: int) -> None:
        columns = as_rows(weight.module).shape[2]
        if hessian is None:
            raise InputError(
                f"surgeon: {weight.layer} was not called on the calibration samples, or its forward is "
                f"bypassed. Leave it out with '!{weight.layer}'."
            )
        if seen < columns:
            raise InputError(
                f"surgeon: {seen} calibration inputs are too few for {weight.layer}, whose filters have "
                f"{columns} weights. Raise samples, or positions in a convolution; or leave it out."
            )

    def _write(self, run: Run, chosen: list[Weight], moved: Tensor) -> None:
        """Store new values; their zeros are masked from now on."""
        place = 0
        for weight in chosen:
            value, size = weight.value, weight.value.numel()
            new = moved[place : place + size].view(value.shape).to(value)
            mask_of(weight).update(new != 0)
            write(run.model, weight.name, new)
            place += size


def _others(model: nn.Module, chosen: list[Weight]) -> list[nn.Parameter]:
    """Biases and the like, which move but are not removed."""
    taken = {id(w.value) for w in chosen}
    return [p for p in model.parameters() if p.ndim == 1 and p.requires_grad and id(p) not in taken]
