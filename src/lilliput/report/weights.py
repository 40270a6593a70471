"""How the weights of the largest layers are spread, before compression and after, from the artifacts.

The surprising rule: zeros are left out of the "after" shares. Nine weights in ten may be zero, and
that one bar would flatten all others; the share of zeros is told in words instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import artifact
from .read import RunData

_BINS = 60
_SAMPLE = 1_000_000  # of a larger layer, every n-th weight is looked at
_MOST_LEVELS = 256  # a longer codebook is drawn as a histogram
Values = NDArray[np.float64]


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer before and after.

    Attributes:
        name: the layer's weight tensor.
        weights: how many there are after.
        kept: the share of them that is not zero, 0 to 1.
        centers: ``(bins,)``, the middle of each bin of ``before``.
        before: ``(bins,)``, per cent of the weights in each bin; None where the run keeps no file of
            the dense network.
        values: where ``after`` stands: the codebook's values, or the bins' middles.
        after: per cent of the non-zero weights at each of ``values``.
        is_codebook: whether ``values`` are those of a codebook.
    """

    name: str
    weights: int
    kept: float
    centers: Values
    before: Values | None
    values: Values
    after: Values
    is_codebook: bool


def layer_weights(run: RunData, limit: int = 12) -> list[LayerWeights]:
    """The largest layers of the last stage's file, in the file's order.

    Args:
        run: the run.
        limit: the most layers that are read.

    Returns:
        A layer each; none where the last stage's file is gone.

    Raises:
        ArtifactError: an artifact is damaged.
    """
    path = run.artifact(-1)
    if path is None:
        return []
    names = [layer["name"] for layer in largest_layers(run, limit)]
    before = _dense_weights(run, names)
    with artifact.open(path) as file:
        return [_layer(file, name, before.get(name)) for name in names]


def largest_layers(run: RunData, limit: int) -> list[dict[str, Any]]:
    """The largest weight tensors of the last stage, in the file's order; vectors are no layers."""
    layers = run.stages[-1]["layers"]
    matrices = [layer for layer in layers if len(layer["shape"]) > 1] or layers
    chosen = sorted(matrices, key=lambda layer: -int(layer["weights"]))[:limit]
    return [layer for layer in matrices if layer in chosen]


def _dense_weights(run: RunData, names: list[str]) -> dict[str, Values]:
    """The weights before any method acted: the last stage without one, or the original's checkpoint."""
    methods = [bool(stage["methods"]) for stage in run.stages]
    dense = methods.index(True) - 1 if any(methods) else -1
    path = run.artifact(dense) if dense >= 0 else None
    if path is not None:
        with artifact.open(path) as file:
            return {name: _values(file, name) for name in names if name in file.names()}
    return _original_weights(run, names) if any(methods) else {}


def _original_weights(run: RunData, names: list[str]) -> dict[str, Values]:
    path = run.directory / "checkpoints" / "original.safetensors"
    if not path.is_file():
        return {}
    from ..engine.checkpoint import load_tree  # here, because it imports torch

    state: Mapping[str, Any] = load_tree(path)["model"]
    return {n: _sample(state[n].double().numpy()) for n in names if n in state}


def _layer(file: artifact.Artifact, name: str, before: Values | None) -> LayerWeights:
    info = file.info(name)
    after = _values(file, name)
    edges = _edges(after if before is None else np.concatenate([after, before]))
    centers = (edges[:-1] + edges[1:]) / 2
    is_codebook = 0 < info.levels <= _MOST_LEVELS
    values, counts = _counted(file, name) if is_codebook else (centers, _histogram(after, edges))
    return LayerWeights(
        name=name,
        weights=info.weights,
        kept=info.nonzeros / max(1, info.weights),
        centers=centers,
        before=None if before is None else _per_cent(np.histogram(before, edges)[0]),
        values=values,
        after=_per_cent(counts),
        is_codebook=is_codebook,
    )


def _counted(file: artifact.Artifact, name: str) -> tuple[Values, Values]:
    """The codebook's values but zero, in order, and how many weights have each."""
    codes, book = file.codes(name)
    counts = np.bincount(codes.reshape(-1), minlength=len(book)).astype(np.float64)
    order = np.argsort(book, kind="stable")
    used = order[(book[order] != 0) & (counts[order] > 0)]
    return book[used].astype(np.float64), counts[used]


def _histogram(values: Values, edges: Values) -> Values:
    return np.histogram(values[values != 0], edges)[0].astype(np.float64)


def _per_cent(counts: NDArray[Any]) -> Values:
    return np.asarray(100.0 * counts / max(1, counts.sum()), np.float64)


def _edges(values: Values) -> Values:
    """Bins over the values; the far tails, a weight in a thousand, are cut off for the drawing."""
    bound = float(np.quantile(np.abs(values), 0.999)) if values.size else 0.0
    bound = max(bound, float(np.abs(values).max(initial=0.0)) / 4, 1e-6)
    return np.linspace(-bound, bound, _BINS + 1)


def _values(file: artifact.Artifact, name: str) -> Values:
    values = file.dense(name)
    if file.info(name).dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return _sample(values)


def _sample(values: NDArray[Any]) -> Values:
    flat = values.reshape(-1)
    return flat[:: max(1, flat.size // _SAMPLE)].astype(np.float64)
