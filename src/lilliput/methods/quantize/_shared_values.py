"""Shared values chosen with the loss in sight: what Choi's two codebooks have in common.

The surprising rule: by default all layers share *one* codebook. Weighting by the curvature makes their
weights comparable, and one table is stored instead of many.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ...core.method import LayerMethod
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Change
from ...errors import InputError
from ...mechanisms.clustering import MAX_CLUSTERS
from ...mechanisms.curvature import diagonal, one_by_one, second_moments
from ...mechanisms.encodings import Codebook, encode, share_codebook


class Found(NamedTuple):
    """Centers, and which of them stands for each value."""

    centroids: NDArray[np.floating]
    codes: NDArray[np.integer]


class SharedValues(LayerMethod):
    """Base of the codebooks that weigh each weight by its curvature.

    Attributes:
        curvature: of the loss by each weight: ``gauss_newton`` by back-propagation of each sample, ``adam``
            for the root of the mean squared gradient of batches, ``none`` for equal weights.
        samples: of the training data on which it is measured.
        joint: one codebook for all layers, or one for each.
        layers: pattern over module names.
    """

    family: ClassVar[str] = "quantize"

    curvature: Literal["gauss_newton", "adam", "none"] = "gauss_newton"
    samples: Annotated[int, Field(ge=1)] = 512
    joint: bool = True

    def cluster(self, values: NDArray[np.float64], curvature: NDArray[np.float64]) -> Found:
        """Choose shared values for some weights that are not zero."""
        raise NotImplementedError

    def attach(self, run: Run) -> None:
        """Cluster; from now on the shared values are what trains."""
        chosen = self.weights(run.model)
        self.memory(run)["before"] = {w.name: len(w.value.detach().unique()) for w in chosen}
        curvatures = self._curvatures(run, chosen)
        together = [list(range(len(chosen)))] if self.joint else [[n] for n in range(len(chosen))]
        for numbers in together:
            self._share(run, [chosen[n] for n in numbers], [curvatures[n] for n in numbers])

    def finish(self, run: Run) -> list[Change]:
        """Report how many values each layer has now."""
        before = self.memory(run)["before"]
        return [
            Change(
                w.name, "distinct values", before[w.name], len(w.value.detach().unique()),
                self.method_name(),
            )
            for w in self.weights(run.model)
        ]  # fmt: skip

    def _curvatures(self, run: Run, chosen: list[Weight]) -> list[Tensor]:
        if self.curvature == "none":
            return [torch.ones_like(w.value, dtype=torch.float64) for w in chosen]
        batches = run.calibration(self.samples)
        if self.curvature == "adam":
            return second_moments(run.model, chosen, batches, run.task.loss)
        return diagonal(run.model, chosen, one_by_one(batches, self.samples), run.task.loss)

    def _share(self, run: Run, chosen: list[Weight], curvatures: list[Tensor]) -> None:
        values = [w.value.detach().cpu().flatten() for w in chosen]
        places = [v.nonzero().flatten() for v in values]
        if not sum(map(len, places)):
            raise InputError(
                f"{self.method_name()}: all weights of {', '.join(w.name for w in chosen)} are zero: "
                "nothing to share."
            )
        known = torch.cat([v[at] for v, at in zip(values, places, strict=True)]).double().numpy()
        bent = torch.cat([c.cpu().flatten()[at] for c, at in zip(curvatures, places, strict=True)])
        found = self.cluster(known, bent.double().numpy())
        if len(found.centroids) >= MAX_CLUSTERS:
            raise InputError(
                f"{self.method_name()}: {len(found.centroids):,} shared values are more than a code can "
                f"name, {MAX_CLUSTERS - 1:,}. Ask for fewer (a larger step, fewer bits)."
            )
        self._encode(run, chosen, places, found)

    def _encode(self, run: Run, chosen: list[Weight], places: list[Tensor], found: Found) -> None:
        centroids = torch.from_numpy(np.asarray(found.centroids, np.float32))
        codes = torch.from_numpy(found.codes.astype(np.int32)) + 1
        book = run.key_of(self) if self.joint else ""
        for weight, at, own in zip(
            chosen, places, codes.split([len(p) for p in places]), strict=True
        ):
            whole = torch.zeros(weight.value.numel(), dtype=torch.int32).index_copy_(0, at, own)
            like = torch.zeros_like(weight.value, dtype=torch.int32)
            laid_out = like.copy_(whole.view(weight.value.shape))
            encode(weight, Codebook(laid_out, centroids.to(weight.value), book))
        if self.joint:
            share_codebook(chosen)
