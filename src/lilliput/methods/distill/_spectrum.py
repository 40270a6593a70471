"""Activations of several layers as a signal on a graph, and its Fourier transform.

The surprising rule: the transform belongs to a class, because the graph's weights are that class's mean
activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ...errors import InputError

Which: TypeAlias = Literal["energy", "lowest"]

#: A graph of more neurons has more eigenvectors than fit comfortably into memory.
LARGEST_GRAPH = 2500


def activation_graph(means: Sequence[Tensor]) -> Tensor:
    """Weights of the graph whose nodes are neurons, with an edge between any two of adjacent layers.

    An edge weighs as much as the product of both neurons' mean activations, without its sign: neurons that
    are active together are near each other.

    Args:
        means: of each layer, in order, ``(neurons,)``.

    Returns:
        Symmetric, not negative, ``(nodes, nodes)``; nodes are the neurons layer by layer.

    Example:
        >>> activation_graph([torch.tensor([2.0]), torch.tensor([-1.0, 3.0])])
        tensor([[0., 2., 6.],
                [2., 0., 0.],
                [6., 0., 0.]])
    """
    sizes = [len(mean) for mean in means]
    weights = means[0].new_zeros(sum(sizes), sum(sizes))
    start = 0
    for below, above in pairwise(means):
        first, second = start + len(below), start + len(below) + len(above)
        weights[start:first, first:second] = torch.outer(below, above).abs()
        start = first
    return weights + weights.t()


def fourier_basis(weights: Tensor) -> Tensor:
    """The graph's Fourier basis: eigenvectors of its Laplacian ``D - W``, those of low frequency first.

    The eigenvalue of an eigenvector u is ``sum over edges of w_ij (u_i - u_j)**2``, so the first ones vary
    least between neighbors.

    Args:
        weights: symmetric, ``(nodes, nodes)``.

    Returns:
        Orthonormal columns, ``(nodes, nodes)``.
    """
    laplacian = weights.sum(1).diag() - weights
    vectors: Tensor = torch.linalg.eigh(laplacian.double())[1]
    return vectors


def kept_columns(
    basis: Tensor, mean: Tensor, covariance: Tensor, spectrum: float, which: Which
) -> Tensor:
    """Part of a basis: the columns along which the signal has most energy, or those of lowest frequency.

    The energy of a coefficient ``s = u' a`` is the mean of its square, ``(u' mu)**2 + u' Sigma u``. Of all
    choices of as many columns those of most energy lose least of the signal in the mean square.

    Args:
        basis: orthonormal columns in order of frequency, ``(nodes, nodes)``.
        mean: mu, of the signal, ``(nodes,)``.
        covariance: Sigma, ``(nodes, nodes)``.
        spectrum: fraction that is kept, rounded up.
        which: ``"energy"`` or ``"lowest"``.

    Returns:
        Columns in order of frequency, ``(nodes, kept)``.
    """
    count = math.ceil(spectrum * basis.shape[1])
    if which == "lowest":
        return basis[:, :count]
    energy = (mean @ basis).square() + (basis * (covariance @ basis)).sum(0)
    return basis[:, energy.topk(count).indices.sort().values]


def check_graph(neurons: int) -> None:
    """Raise InputError where the eigenvectors of a graph of so many neurons are too many to keep."""
    if neurons > LARGEST_GRAPH:
        raise InputError(
            f"the spectral objectives take the eigenvectors of a graph with a node a neuron, and these "
            f"layers have {neurons:,} neurons; {LARGEST_GRAPH:,} are the limit. Name smaller places (places: "
            "[...]), or take spectral_layer_pairs or all_layers."
        )
