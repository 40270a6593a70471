"""Operators that work on positions: pooling, interpolation, sampling, padding by mirroring."""

from __future__ import annotations

from torch import Tensor

from ..labels import Dims
from .base import Call, Outputs, rule


def _positions_stay(call: Call, count: int) -> Outputs:
    """The last ``count`` dims are positions, the others pass through."""
    x, labels = call.dims(0), call.trace.labels
    for dim in x[len(x) - count :]:
        labels.fix(dim, "neighboring entries are combined")
    outs = [call.out] if isinstance(call.out, Tensor) else list(call.out)
    result: list[Dims | None] = [
        [*x[: len(x) - count], *(labels.still(n) for n in t.shape[len(x) - count :])] for t in outs
    ]
    return result if not isinstance(call.out, Tensor) else result[0] or []


@rule(
    "avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "upsample_nearest1d",
    "upsample_linear1d", "reflection_pad1d", "replication_pad1d", "_upsample_nearest_exact1d",
    "max_pool1d_with_indices",
)  # fmt: skip
def one_dimensional(call: Call) -> Outputs:
    """The last dim is a position."""
    return _positions_stay(call, 1)


@rule(
    "avg_pool2d", "max_pool2d", "max_pool2d_with_indices", "adaptive_avg_pool2d",
    "_adaptive_avg_pool2d", "adaptive_max_pool2d", "fractional_max_pool2d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa",
    "reflection_pad2d", "replication_pad2d", "max_unpool2d", "mkldnn_max_pool2d",
)  # fmt: skip
def two_dimensional(call: Call) -> Outputs:
    """The last two dims are positions."""
    return _positions_stay(call, 2)


@rule(
    "avg_pool3d", "max_pool3d", "max_pool3d_with_indices", "adaptive_avg_pool3d",
    "_adaptive_avg_pool3d", "adaptive_max_pool3d", "upsample_nearest3d", "upsample_trilinear3d",
    "_upsample_nearest_exact3d", "reflection_pad3d", "replication_pad3d", "max_unpool3d",
)  # fmt: skip
def three_dimensional(call: Call) -> Outputs:
    """The last three dims are positions."""
    return _positions_stay(call, 3)


@rule("grid_sampler_2d", "grid_sampler_3d", "grid_sampler", "cudnn_grid_sampler")
def grid_sample(call: Call) -> Outputs:
    """Positions are looked up; the grid stays."""
    x, labels = call.dims(0), call.trace.labels
    for dim in (*x[2:], *call.dims(1)):
        labels.fix(dim, "it is sampled at positions")
    return [*x[:2], *(labels.still(n) for n in call.shape[2:])]


@rule("affine_grid_generator")
def affine_grid(call: Call) -> Outputs:
    """A grid of positions."""
    return call.still(call.out)
