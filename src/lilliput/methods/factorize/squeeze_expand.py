"""Fire modules in the place of convolutions: architecture as compression, from the trained weights.

Paper: SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size (Iandola, Han,
  Moskewicz, Ashraf, Dally, Keutzer; arXiv 2016; arXiv 1602.07360)
Paper: Accelerating Very Deep Convolutional Networks for Classification and Detection (Zhang, Zou, He, Sun;
  TPAMI 2016; arXiv 1505.06798)

A convolution of n inputs, m outputs and K x K positions becomes a fire module: s filters of 1 x 1 squeeze,
a rectifier follows, e_1 filters of 1 x 1 and e_3 of K x K expand side by side, ``e_1 + e_3 = m``; all have
biases. The metaparameters are the paper's (section 5.1): ``e_3 = pct_3x3 m``, ``s = squeeze_ratio m``::

    weights before  n m K K          after  s n + s e_1 + s e_3 K K

The paper trains such networks from nothing. Here the module begins as near to the trained layer as it can
be, on the inputs x that the layer gets from training samples, with ``E[x x^T] = L L^T`` over channels::

    squeeze  z = D^T x + b,  D = L^-T U,  U the s leading eigenvectors of L^T A A^T L

where A, ``n x m K K``, is the kernel: no s combinations of the channels lose less of what the layer computes
of x at one position (Zhang 2016, section 3.1, on the side of the inputs). They have both signs, and a
rectifier would cut half of each off. But their second moment is 1, so the bias b that lifts each to
``OPEN`` deviations above zero is known: the rectifier begins open, and training may close it. The filters
that expand are then solved by least squares, rectifier, bias and border included: y from z at the K x K
positions, or from z in their center.

Then teach it block by block, ``hidden_states`` with ``adapter: none`` from the network before, as in the
recipe ``fire_digits``.

Faithful: the module, its rectifier and metaparameters. Ours: the start, for the paper has none. Its second
rectifier, behind both kinds of filters, is the one that follows the layer in the network; where there is
normalization or a sum between, it stays between.

The surprising rule: the first m - e_3 outputs are made by 1 x 1 filters, whatever they did. To choose those
that need no neighbors, the channels would have to be put in order again at each call. And a layer ``conv2``
is ``conv2.squeeze``, ``conv2.expand1x1`` and ``conv2.expand3x3`` afterwards; its masks and shared values are
gone.

Cost: two passes over the samples, an eigenvalue problem of n and a system of s K K equations a layer. When
not to use it: on the first layer, whose few channels leave nothing to squeeze. A layer is left whole, with
a note, where it would have no fewer weights, and where it has groups, an even kernel or no border.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.method import LayerMethod
from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Change
from ...errors import NothingChanged
from ...mechanisms.factors import Fire, fire_for, put_fire, why_no_fire
from ...mechanisms.solvers import draw, least_squares, output_sizes, rows, visit_inputs
from ...mechanisms.surgery import transaction
from ._calibration import visiting
from ._decompositions import leading
from ._others import refuse_others

Share = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]

#: How many deviations of a squeezed channel lie between its mean and the rectifier.
OPEN = 3.0
#: Part of the mean squared input that is added to all, so that a dead channel is no division by zero.
_RIDGE = 1e-6


def squeezing(kernel: Tensor, second: Tensor, mean: Tensor, filters: int) -> tuple[Tensor, Tensor]:
    """The 1 x 1 filters that squeeze: D^T and b of the module's docstring.

    Args:
        kernel: ``(m, n, positions)``.
        second: ``E[x x^T]`` of the inputs, ``(n, n)``.
        mean: ``E[x]``, ``(n,)``.
        filters: s.

    Returns:
        Shape ``(s, n)`` and ``(s,)``.

    Example:
        >>> weight, bias = squeezing(torch.ones(4, 2, 9), torch.eye(2), torch.zeros(2), 1)
        >>> weight.abs().round(decimals=3), bias.round(decimals=3)
        (tensor([[0.7070, 0.7070]], dtype=torch.float64), tensor([3.], dtype=torch.float64))
    """
    kernel, second, mean = kernel.double(), second.double(), mean.double()
    ridge = _RIDGE * float(second.diagonal().mean()) or 1.0
    root = torch.linalg.cholesky(second + ridge * torch.eye(len(second)).to(second))
    seen = root.mT @ kernel.transpose(0, 1).flatten(1)
    directions = torch.linalg.solve_triangular(
        root.mT, leading(seen @ seen.mT, filters), upper=True
    )
    center = directions.mT @ mean
    deviation = (1.0 - center.square()).clamp_min(0.0).sqrt()
    return directions.mT, OPEN * deviation - center


@dataclass
class Fit:
    """Sums over positions that say which filters expand best, and how well.

    Attributes:
        gram: of the squeezed channels at the positions of the kernel and a one, ``(s K K + 1, s K K + 1)``.
        cross: of those with the layer's outputs, ``(s K K + 1, m)``.
        square: of the outputs, ``(m,)``.
    """

    gram: Any = 0.0
    cross: Any = 0.0
    square: Any = 0.0

    def add(self, squeezed: Tensor, outputs: Tensor) -> None:
        """Take in some positions.

        Args:
            squeezed: ``(positions, s, K K)``.
            outputs: of the layer, ``(positions, m)``.
        """
        x, y = nn.functional.pad(squeezed.double().flatten(1), (0, 1), value=1.0), outputs.double()
        self.gram, self.cross = self.gram + x.mT @ x, self.cross + x.mT @ y
        self.square = self.square + y.square().sum(0)

    def solve(self, columns: Tensor, outputs: slice) -> tuple[Tensor, Tensor, float]:
        """Some outputs from some columns: weight ``(outputs, columns - 1)``, bias, summed squared error."""
        gram, cross = self.gram[columns][:, columns], self.cross[columns][:, outputs]
        found = least_squares(gram, cross)
        left = self.square[outputs] - (2.0 * cross - gram @ found).mul(found).sum(0)
        return found[:-1].mT, found[-1], float(left.clamp_min(0.0).sum())


@dataclass
class Site:
    """A convolution and the fire module that is to take its place.

    Attributes:
        weight: of the convolution.
        fire: the module.
        second: sum of ``x x^T`` over inputs.
        first: sum of ``x``.
        count: of inputs.
        fit: of the filters that expand.
    """

    weight: Weight
    fire: Fire
    second: Any = 0.0
    first: Any = 0.0
    count: int = 0
    fit: Fit = field(default_factory=Fit)

    @property
    def kernel(self) -> Tensor:
        """Shape ``(m, n, positions)``, effective."""
        return self.weight.value.detach().flatten(2)

    def see(self, name: str, found: Tensor) -> None:
        """Take in inputs ``(rows, n, positions)`` of the convolution."""
        x = found.double().transpose(1, 2).flatten(0, 1)
        self.second, self.first = self.second + x.mT @ x, self.first + x.sum(0)
        self.count += len(x)

    def squeeze(self) -> None:
        """Set the filters that squeeze."""
        layer: Any = self.fire.squeeze
        weight, bias = squeezing(
            self.kernel, self.second / self.count, self.first / self.count, layer.out_channels
        )
        _set(layer, weight, bias)

    def compare(self, generator: torch.Generator, positions: int, inputs: Tensor) -> None:
        """Take in what the filters that expand see and what the convolution makes of the same inputs."""
        layer, wide = self.weight.module, self.fire.expand3x3
        sample, place = draw(output_sizes(layer, inputs), len(inputs), positions, generator)
        sample, place = sample.to(inputs.device), place.to(inputs.device)
        outputs = rows(layer, inputs, sample, place).flatten(1) @ self.kernel.flatten(1).mT
        squeezed = self.fire.squeeze_relu(self.fire.squeeze(inputs))
        self.fit.add(rows(wide, squeezed, sample, place), outputs)

    def expand(self) -> float:
        """Set the filters that expand; the relative squared error of the outputs, biases left out."""
        ones, wide = self.fire.expand1x1, self.fire.expand3x3
        taps, split = self.kernel.shape[2], len(ones.weight)  # type: ignore[arg-type]
        everything = torch.arange(len(self.fit.gram), device=self.fit.gram.device)
        center = torch.cat([everything[taps // 2 : -1 : taps], everything[-1:]])
        error = self._fill(ones, center, slice(None, split))
        error += self._fill(wide, everything, slice(split, None))
        total = float(self.fit.square.sum())
        return error / total if total else 0.0

    def _fill(self, part: nn.Module, columns: Tensor, outputs: slice) -> float:
        weight, bias, error = self.fit.solve(columns, outputs)
        own: Any = self.weight.module.bias
        _set(part, weight, bias if own is None else bias + own.detach()[outputs])
        return error


@torch.no_grad()
def _set(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    layer.bias.copy_(bias)


@method
class SqueezeExpand(LayerMethod):
    """Put fire modules in the place of convolutions, solved on what these compute of training samples.

    Attributes:
        layers: pattern over module names; what is no convolution stays as it is.
        squeeze_ratio: filters that squeeze, as a part of the outputs.
        pct_3x3: the part of the outputs whose filters keep the kernel.
        samples: on which both steps are solved.
        positions: of a layer's output that are looked at in each sample. Samples times positions should
            be several times as many as the squeezed channels times the positions of the kernel.

    Raises:
        NothingMatched: the pattern covers no weight.
        InputError: another method of the stage that changes the model stands before this one; a layer lost
            more than whole channels before.
        NothingChanged: no layer would gain.

    Example:
        >>> SqueezeExpand(layers=["conv2", "conv3"], squeeze_ratio=0.25).pct_3x3
        0.5
    """

    family: ClassVar[str] = "factorize"
    initializes: ClassVar[bool] = True

    squeeze_ratio: Share = 0.125
    pct_3x3: Share = 0.5
    samples: Annotated[int, Field(ge=1)] = 256
    positions: Annotated[int, Field(ge=1)] = 16

    def attach(self, run: Run) -> None:
        """Make the modules, solve them, and put them in place."""
        memory = self.memory(run)
        memory.update(done={}, whole={})
        sites = self._sites(run.model, memory["whole"])
        if not sites:
            raise self._nothing(memory["whole"])
        refuse_others(self, run, any(site.weight.encodings() for site in sites.values()))
        self._solve(run, sites)
        with transaction(run.model):  # all of them, or none
            for name, site in sites.items():
                before, after = site.weight.value.numel(), _weights(site.fire)
                memory["done"][name] = [before, after, self._told(site)]
                put_fire(run.model, name, site.fire)

    def finish(self, run: Run) -> list[Change]:
        """For each layer its weights before and after, or why it stayed whole."""
        memory = self.memory(run)
        return [
            Change(name, "fire module", before, after, self.method_name(), note)
            for name, (before, after, note) in memory["done"].items()
        ] + [
            Change(name, "fire module", count, count, self.method_name(), f"left whole: {why}")
            for name, (count, why) in memory["whole"].items()
        ]

    def _sites(self, model: nn.Module, whole: dict[str, Any]) -> dict[str, Site]:
        """The layers that become fire modules; of the others it is noted why not."""
        found = {}
        for weight in self.weights(model):
            count, why = weight.value.numel(), why_no_fire(weight.module)
            if not why and weight.layer:
                fire = fire_for(weight.module, self._ranks(weight.module))
                found[weight.layer] = Site(weight, fire)
                if _weights(fire) >= count:
                    del found[weight.layer]
                    why = f"it would have {_weights(fire):,} weights instead of {count:,}"
            if weight.layer not in found:
                whole[weight.layer] = [count, why or "it is the whole network"]
        return found

    def _ranks(self, layer: Any) -> tuple[int, int]:
        leaves = layer.out_channels
        squeeze = min(layer.in_channels, max(1, round(self.squeeze_ratio * leaves)))
        return squeeze, min(leaves - 1, max(1, round(self.pct_3x3 * leaves)))

    def _solve(self, run: Run, sites: dict[str, Site]) -> None:
        """First what squeezes, then what expands, each on the inputs of the network as it is."""

        def generator() -> torch.Generator:
            return run.generator("squeeze_expand calibration")

        visiting(run.model, lambda: run.calibration(self.samples), self.positions, generator)(
            sites, lambda name, found: sites[name].see(name, found)
        )
        for site in sites.values():
            site.squeeze()
        compare = functools.partial(_compare, sites, generator(), self.positions)
        visit_inputs(run.model, sites, run.calibration(self.samples), compare)

    def _told(self, site: Site) -> str:
        squeeze, wide = site.fire.ranks
        return (
            f"{squeeze} filters squeeze, {wide} of {site.weight.value.shape[0]} that expand have the kernel; "
            f"relative squared error of outputs {site.expand():.3g}"
        )

    def _nothing(self, whole: dict[str, Any]) -> NothingChanged:
        reasons = "; ".join(f"{name}: {why}" for name, (_, why) in list(whole.items())[:5])
        return NothingChanged(
            f"squeeze_expand leaves every layer whole ({reasons}). Choose convolutions with a kernel of odd "
            "size and padding around it, or a smaller squeeze_ratio."
        )


def _compare(
    sites: dict[str, Site], generator: torch.Generator, positions: int, name: str, layer: nn.Module,
    inputs: Tensor,
) -> None:  # fmt: skip
    sites[name].compare(generator, positions, inputs)


def _weights(fire: Fire) -> int:
    """Without biases, as a layer's are counted."""
    return sum(p.numel() for p in fire.parameters() if p.ndim > 1)
