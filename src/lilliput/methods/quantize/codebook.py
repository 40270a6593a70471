"""Trained quantization: each layer's weights share a few values, and the values train.

Paper: Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman
Coding (Han, Mao, Dally; ICLR 2016; arXiv 1510.00149)

Per layer, one-dimensional k-means over the non-zero weights, ``min sum_k sum_{w in c_k} (w - c_k)**2``
(equation 2), started from points spread evenly between the smallest and the largest weight (``linear``, the
paper's best), from the quantiles (``density``) or from random weights (``random``, Forgy). Then the
assignments are frozen and the centroids train with the summed gradients of their members (equation 3).

Faithful: clustering, initializations, gradients, one code kept for the zero. Better, as the default:
``exact`` is the global optimum of the same objective, which one-dimensional k-means allows.

Cost: a sort of the layer's weights once; a lookup and a sum over the non-zeros a step. When not to use
it: for speed; shared values make a file smaller, and the decoded layer is an ordinary dense layer.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...core.method import LayerMethod
from ...core.registry import method
from ...core.run import Run
from ...core.types import Bits, Change, PerLayer, resolve
from ...errors import InputError
from ...mechanisms.clustering import Init
from ...mechanisms.encodings import Codebook as Shared
from ...mechanisms.encodings import encode


@method
class Codebook(LayerMethod):
    """Let the weights of each layer share ``2**bits`` values, and train the values.

    Attributes:
        bits: of one code; for every layer or by layer pattern. A layer that no pattern covers keeps
            its weights.
        init: how the clustering starts.
        layers: pattern over module names.

    Example:
        >>> Codebook(bits={"conv*": 8, "fc*": 5}).init
        'exact'
    """

    family: ClassVar[str] = "quantize"

    bits: PerLayer[Bits] = 5
    init: Init = "exact"

    def amounts(self) -> Any:
        """The setting that decides which layers take part."""
        return self.bits

    def attach(self, run: Run) -> None:
        """Cluster every layer; from now on its centroids are what trains."""
        chosen = self.weights(run.model)
        self.memory(run)["before"] = {w.name: _distinct(w.value) for w in chosen}
        for number, weight in enumerate(chosen):
            if not weight.value.count_nonzero():
                raise InputError(
                    f"codebook: all weights of {weight.name} are zero: nothing to share."
                )
            bits = resolve(self.bits, weight.layer) or 0
            fitted = Shared.fitted(weight.value, bits, self.init, seed=run.seed + number)
            encode(weight, fitted)  # the zeros of a mask around it have become code 0

    def finish(self, run: Run) -> list[Change]:
        """Report how many values each layer has now."""
        before = self.memory(run)["before"]
        return [
            Change(
                w.name, "distinct values", before[w.name], _distinct(w.value), self.method_name()
            )
            for w in self.weights(run.model)
        ]


def _distinct(value: Tensor) -> int:
    return len(value.detach().unique())
