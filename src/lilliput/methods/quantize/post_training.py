"""Post-training quantization: integer weights and activations without training.

Paper: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (Jacob,
  Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko; CVPR 2018; arXiv 1712.05877)
Paper: Data-Free Quantization Through Weight Equalization and Bias Correction (Nagel, van Baalen, Blankevoort,
  Welling; ICCV 2019; arXiv 1906.04721)
Paper: Up or Down? Adaptive Rounding for Post-Training Quantization (Nagel, Amjad, van Baalen, Louizos,
  Blankevoort; ICML 2020; arXiv 2004.10568)
Paper: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar, Ashkboos,
  Hoefler, Alistarh; ICLR 2023; arXiv 2210.17323)

A weight becomes ``s q`` with a step s for each filter and a signed integer q, an activation ``s (q - z)``
with one step and an unsigned q. Ranges of activations are measured on training samples. Then, layer by
layer, on the inputs that the layers before it, quantized by now, hand on::

    nearest         q = round(w / s)
    adaptive        Nagel 2020: up or down is trained, for the least squared error of the layer's output
    second_order    Frantar 2023: column after column, those that follow make up for the error

With ``activation_bits: null`` only weights become integers: a smaller file at next to no loss, for
linear-heavy networks that memory holds up; ``second_order`` is made for it. ``equalize`` (Nagel 2019) moves
scales from filters to the next layer's inputs first; ``correct_bias`` takes the mean error ``(W' - W)
E[x]`` off the bias, or off the running mean of the normalization behind.

Faithful: the formulas. Different: steps are per filter (Jacob: per layer), and batch normalization is not
multiplied in before, since it only changes steps. Bias correction is on measured inputs, not on those that
batch normalization promises. AdaRound sees the mean of ``x x^T`` instead of samples, and no rectifier
behind the layer (its equation 25 does). GPTQ has a step for a filter, not for groups of 128 columns, and
the columns keep their order.

The surprising rule: nothing is faster yet. The network computes what integers would, in real numbers;
:func:`lilliput.deploy.export` makes a file that a runtime executes in integers.

Cost: two passes over the samples, and one for each layer with ``correct_bias`` or a rounding other than
nearest. When not to use it: below 8 bits where some epochs can be had: ``learned_step`` loses less.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Batch, Change, Positive
from ...mechanisms.curvature import as_rows, from_rows, input_hessians
from ...mechanisms.encodings import original_of, put_grid
from ...mechanisms.flow import Flow, flows
from ...mechanisms.solvers import visit_rows
from ._equalizing import equalize
from ._integers import IntegerMethod, few
from ._rounding import Rounding, adaptive, nearest, second_order


@method
class PostTraining(IntegerMethod):
    """Make weights and activations integers, from some hundred samples.

    Attributes:
        rounding: to which of the two neighboring integers a weight goes.
        equalize: make neighboring layers alike first.
        correct_bias: take the mean error of each output off its bias.
        positions: of a convolution's output that are looked at in each sample.
        damping: of ``second_order``: added to the diagonal of the Hessian, as a part of its mean.
        iterations: of ``adaptive``.

    Raises:
        NothingMatched: no layer of that pattern can become integers.
        InputError: a weight is quantized already; activations are not finite, or always the same.

    Example:
        >>> PostTraining(rounding="adaptive").bits
        8
    """

    rounding: Rounding = "nearest"
    equalize: bool = False
    correct_bias: bool = True
    positions: Annotated[int, Field(ge=1)] = 16
    damping: Positive = 0.01
    iterations: Annotated[int, Field(ge=1)] = 1000

    @classmethod
    def example(cls) -> PostTraining:
        """A few samples."""
        return cls(samples=32)

    def attach(self, run: Run) -> None:
        """Calibrate, then quantize layer by layer."""
        chosen, memory = self.layers_of(run.model), self.memory(run)
        if self.equalize:
            first = next(iter(run.calibration(2)))
            found = flows(run.model, [w.layer for w in chosen], few(first.inputs))
            memory["pairs"] = equalize(run.model, chosen, found.layers)
        found, batches = self.calibrated(run)
        bits, order = self.bits_of(run, chosen, batches), list(found.layers)
        errors = {}
        for weight in sorted(chosen, key=lambda w: [*order, w.layer].index(w.layer)):
            before = as_rows(weight.module).double()
            hessian = None
            if self.rounding != "nearest" and weight.layer in found.layers:
                hessian = self._hessian(run, weight, batches)
            self._quantize(weight, bits[weight.name], hessian)
            errors[weight.layer] = as_rows(weight.module).double() - before
        if self.correct_bias:
            self._correct(run, errors, found.layers, batches)

    def finish(self, run: Run) -> list[Change]:
        """A line for each layer."""
        pairs = self.memory(run).get("pairs", {})
        return self.told(run, self.weights(run.model)) + [
            Change(first, "equalized with", None, second, self.method_name())
            for first, second in pairs.items()
        ]

    @torch.no_grad()
    def _quantize(self, weight: Weight, bits: int, hessians: Tensor | None) -> None:
        """One layer; without Hessians to the nearest integers."""
        layer: Any = weight.module
        steps, highest = self.step_of(weight, bits), 2 ** (bits - 1) - 1
        rows, by_group = as_rows(layer).double(), steps.view(as_rows(layer).shape[:2]).double()
        settled = torch.stack([
            self._rounded(rows[g], by_group[g], highest, None if hessians is None else hessians[g])
            for g in range(len(rows))
        ])  # fmt: skip
        alive = weight.value.detach() != 0  # what was pruned stays so
        original = original_of(weight)
        original.copy_(torch.where(alive, from_rows(layer, settled.to(original)), original))
        put_grid(weight, bits, steps)

    def _rounded(self, rows: Tensor, steps: Tensor, highest: int, hessian: Tensor | None) -> Tensor:
        """One group of filters."""
        if hessian is None or self.rounding == "nearest":
            return nearest(rows, steps, highest)
        size = hessian.diagonal().mean().clamp_min(1e-30)
        damped = hessian + self.damping * size * torch.eye(len(hessian)).to(hessian)
        if self.rounding == "adaptive":
            return adaptive(rows, damped, steps, highest, self.iterations)
        return second_order(rows, damped, steps, highest)

    def _hessian(self, run: Run, weight: Weight, batches: list[Batch]) -> Tensor:
        """Of the squared error of the output, on what the layers before hand on by now."""
        generator = run.generator(f"post_training {weight.name}")
        found, _ = input_hessians(run.model, [weight.layer], batches, self.positions, generator)
        return found[weight.layer]

    @torch.no_grad()
    def _correct(
        self, run: Run, errors: dict[str, Tensor], flow: dict[str, Flow], batches: list[Batch]
    ) -> None:
        """Take the mean error of each output off, wherever there is something to take it off."""
        sums: dict[str, Any] = dict.fromkeys(flow, 0.0)
        counts = dict.fromkeys(flow, 0)

        def use(name: str, met: Tensor) -> None:
            sums[name] = sums[name] + met.double().sum(0)
            counts[name] += len(met)

        norms = Counter(found.norm for found in flow.values())
        generator = run.generator("post_training means")
        visit_rows(run.model, list(flow), batches, self.positions, generator, use, once=True)
        for name, total in sums.items():
            groups = len(errors[name])
            means = (total / counts[name]).unflatten(0, (groups, -1)).mT.flatten(1)
            shift = torch.einsum("gfc,gc->gf", errors[name], means).flatten()
            layer: Any = run.model.get_submodule(name)
            norm: Any = run.model.get_submodule(flow[name].norm or "")
            if layer.bias is not None:
                layer.bias.sub_(shift.to(layer.bias))
            elif flow[name].norm is not None and norms[flow[name].norm] == 1:
                norm.running_mean.add_(shift.to(norm.running_mean))
