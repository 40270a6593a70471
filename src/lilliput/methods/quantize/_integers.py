"""What integer methods share: which layers, where their inputs and outputs become integers, and what is told.

A layer computes in integers where its weights and its inputs are integers; a convolution also hands on
integers, so its output has a quantizer wherever anything but another such layer reads it (an addition, a
mean). Batch normalization stays as it is: it multiplies whole filters, so it changes their steps, not their
integers, and is multiplied in when the network is exported.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.method import LayerMethod
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Batch, Change, PerLayer, Positive, resolve
from ...errors import InputError, NothingMatched
from ...mechanisms.activations import (
    Quantizer,
    quantizer_at,
    remove_quantizer,
    replace_activation,
    replaced_activations,
)
from ...mechanisms.encodings import (
    Binary,
    Codebook,
    IntegerGrid,
    StepGrid,
    encoding_of,
)
from ...mechanisms.flow import Flows, flows
from ...mechanisms.ranges import Calibration, calibrate, grid_of, range_of, steps_of
from ...mechanisms.solvers import is_linear
from ._bits_by_loss import losses, spread_bits

FewBits = Annotated[int, Field(ge=2, le=8)]
_CONVOLUTIONS = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


class IntegerMethod(LayerMethod):
    """Base of the methods after which a network runs in integers.

    Attributes:
        bits: of a weight, sign included, for every layer or by layer pattern.
        mean_bits: instead: over all weights at most so many; each layer gets one of ``choices``.
        choices: numbers of bits for that.
        activation_bits: of an activation, unsigned; None leaves activations real, for the file's sake.
        calibration: how the range of activations is chosen; see :func:`.ranges.range_of`.
        percentile: of values inside the range, for that way.
        steps: a filter's step from its largest magnitude, or with the least squared error.
        samples: of the training data on which ranges are measured.
    """

    family = "quantize"

    bits: PerLayer[FewBits] = 8
    mean_bits: Positive | None = None
    choices: list[FewBits] = Field(default=[4, 8])
    activation_bits: FewBits | None = 8
    calibration: Calibration = "mse"
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.99
    steps: Literal["max", "mse"] = "mse"
    samples: Annotated[int, Field(ge=1)] = 512

    @model_validator(mode="after")
    def _possible_mean(self) -> Any:
        if self.mean_bits is not None:
            if "bits" in self.model_fields_set:
                raise ValueError("give one of bits and mean_bits")
            if sorted(set(self.choices)) != self.choices or self.mean_bits < self.choices[0]:
                raise ValueError(
                    f"choices should ascend and begin at mean_bits ({self.mean_bits}) or below"
                )
        return self

    def amounts(self) -> Any:
        """The setting that decides which layers take part."""
        return self.bits

    def layers_of(self, model: nn.Module) -> list[Weight]:
        """The weights that can become integers.

        Raises:
            NothingMatched: none of those that the pattern covers can.
            InputError: a weight is of few values already.
        """
        covered = self.weights(model)
        found = [w for w in covered if _possible(w)]
        if not found:
            raise NothingMatched(
                f"{self.method_name()}: {self.layers!r} covers only layers that cannot become integers: "
                + ", ".join(w.name for w in covered[:5])
                + ". Linear layers and convolutions can, transposed ones and recurrent layers cannot."
            )
        for weight in found:
            if any(isinstance(e, Codebook | Binary | IntegerGrid) for e in weight.encodings()):
                raise InputError(
                    f"{self.method_name()}: {weight.name} is quantized already "
                    f"({', '.join(e.kind for e in weight.encodings())}). Leave it out with "
                    f"'!{weight.layer}', or begin with the network before."
                )
        return found

    def check(self, model: nn.Module) -> None:
        """The pattern must cover a layer that can become integers."""
        self.layers_of(model)

    # -- activations ----------------------------------------------------------------------------------

    def calibrated(self, run: Run, learned: bool = False) -> tuple[Flows, list[Batch]]:
        """Measure ranges, and put quantizers before and behind layers; those of other layers stay.

        Returns:
            Where the output of each layer goes, and the calibration batches.
        """
        chosen, batches = self.layers_of(run.model), list(run.calibration(self.samples))
        others = _taken_off(run.model)
        found = flows(run.model, [w.layer for w in chosen], few(batches[0].inputs))
        for place in others.keys() - _places(run.model, found).keys():
            replace_activation(run.model, place, others[place])
        if self.activation_bits is not None:
            self._put_quantizers(run, found, batches, self.activation_bits, learned)
        return found, batches

    def _put_quantizers(
        self, run: Run, found: Flows, batches: list[Batch], bits: int, learned: bool
    ) -> None:
        histograms = calibrate(run.model, _places(run.model, found), lambda: batches)
        for place, histogram in histograms.items():
            ends = range_of(histogram, self.calibration, bits, self.percentile)
            quantizer = Quantizer(bits, *grid_of(*ends, bits), learned).to(run.device)
            replace_activation(run.model, place, quantizer)
        _align(run.model, found)

    # -- weights ----------------------------------------------------------------------------------------

    def bits_of(self, run: Run, chosen: list[Weight], batches: list[Batch]) -> dict[str, int]:
        """How many bits each weight gets; decided once."""
        memory = self.memory(run)
        if "bits" not in memory:
            memory["bits"] = {w.name: resolve(self.bits, w.layer) for w in chosen}
            if self.mean_bits is not None:
                costs = losses(run, chosen, self.choices, batches)
                sizes = [w.value.numel() for w in chosen]
                given = spread_bits(sizes, self.choices, costs, self.mean_bits)
                memory["bits"] = dict(zip((w.name for w in chosen), given, strict=True))
        known: dict[str, int] = memory["bits"]
        return known

    def step_of(self, weight: Weight, bits: int) -> Tensor:
        """The step of each filter, ``(filters,)``."""
        return steps_of(weight.value.detach().flatten(1), bits, self.steps)

    def told(self, run: Run, covered: list[Weight]) -> list[Change]:
        """A line for each layer: its bits; or that it stays real, and why."""
        found = []
        for weight in covered:
            grid = encoding_of(weight, StepGrid)
            before = quantizer_at(run.model, f"{weight.layer}:input")
            if grid is None:
                note = f"left in float: {_why(weight)}"
            elif before is not None:
                note = f"inputs {before.extra_repr()}"
            elif self.activation_bits is None:
                note = "weights only"
            else:
                note = "weights only: its forward is bypassed, so its inputs stay real"
            after = 32 if grid is None else grid.bits
            found.append(Change(weight.name, "bits", 32, after, self.method_name(), note))
        return found


def _possible(weight: Weight) -> bool:
    kinds = is_linear(weight.module) or isinstance(weight.module, _CONVOLUTIONS)
    return kinds and not isinstance(weight.module, _TRANSPOSED) and weight.tensor == "weight"


def _why(weight: Weight) -> str:
    return f"no integer form of {type(weight.module).__name__}.{weight.tensor} is known"


def few(inputs: Any) -> Any:
    """Two samples are enough to see where tensors go."""
    return pytree.tree_map_only(Tensor, lambda t: t[:2], inputs)


def _taken_off(model: nn.Module) -> dict[str, Quantizer]:
    """Take all quantizers off, for they hide where tensors go; place -> quantizer."""
    known = {place: quantizer_at(model, place) for place in replaced_activations(model)}
    quantizers = {place: found for place, found in known.items() if found is not None}
    for place in quantizers:
        remove_quantizer(model, place)
    return quantizers


def _places(model: nn.Module, found: Flows) -> dict[str, tuple[float, float]]:
    """Where quantizers go, with the limits to which whoever reads there clips."""
    places = {f"{layer}:input": (-math.inf, math.inf) for layer in found.layers}
    places |= {f"{module}:output": (-math.inf, math.inf) for module in found.sums}
    for layer, flow in found.layers.items():
        if isinstance(model.get_submodule(layer), _CONVOLUTIONS) and not flow.to_layers:
            places[f"{flow.place}:output"] = flow.limits
    return places


@torch.no_grad()
def _align(model: nn.Module, found: Flows) -> None:
    """Whoever reads one place's integers as they are counts in its steps: nothing is rounded twice."""
    read: dict[str, set[str]] = defaultdict(set)
    for flow in found.layers.values():
        for layer in flow.readers:
            read[layer].add(flow.place)
    for module, layers in found.sums.items():
        for layer in layers:
            read[layer].add(module)
    for layer, places in read.items():
        before = quantizer_at(model, f"{layer}:input")
        behind = quantizer_at(model, f"{next(iter(places))}:output")
        once = len(places) == 1 and found.layers[layer].calls == 1  # another call may read anything
        if once and before is not None and behind is not None:
            before.step.copy_(behind.step)
            before.zero.copy_(behind.zero)
