"""From the weight of a layer to those of a chain of thin layers: SVD, Tucker-2, CP.

Weights come as *blocks*, ``(groups, out, in, *kernel)`` in double precision, one for each group of channels;
what is returned are the weights of the thin layers, from input to output, as modules hold them.

The surprising rule: only ``svd``, ``channel`` and ``spatial`` are solved, by Eckart and Young (1936). Tucker
is brought to a local optimum, and so is CP, from the same start every time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...mechanisms.factors import Ranks, compose
from ...mechanisms.solvers import least_squares

#: Updates at most, and below which fall of the relative squared error they end (of CP: as a part of it).
_TUCKER_SWEEPS, _TUCKER_SETTLED = 50, 1e-7
_CP_SWEEPS, _CP_SETTLED = 200, 1e-6
#: Of the random columns with which CP starts, where a dim is smaller than the rank.
_SEED = 0

#: Chains that are the product of two matrices; those whose rows are outputs, so that outputs can be fitted
#: in closed form.
MATRICES, CLOSED = ("svd", "channel", "spatial", "separable"), ("svd", "channel")


def decompose(blocks: Tensor, kind: str, ranks: Ranks) -> list[Tensor]:
    """The weights of a chain that comes near a layer.

    Args:
        blocks: of the layer.
        kind: of the chain.
        ranks: of each group.

    Example:
        >>> blocks = torch.randn(1, 6, 4, 3, 3).double()
        >>> [tuple(w.shape) for w in decompose(blocks, "spatial", (5,))]
        [(5, 4, 3, 1), (6, 5, 1, 3)]
    """
    if kind == "tucker":
        return tucker(blocks, *ranks)
    if kind == "cp":
        return cp(blocks, *ranks)
    return chain_of(blocks, kind, *nearest(matrix_of(blocks, kind), *ranks))


def relative_error(blocks: Tensor, weights: list[Tensor]) -> float:
    """Squared distance of the chain's weight from the layer's, over the squared norm of that."""
    whole = compose([w.double() for w in weights], len(blocks), blocks.shape[2]).view_as(blocks)
    total = float(blocks.square().sum())
    return float((whole - blocks).square().sum()) / total if total else 0.0


# -- matrices ---------------------------------------------------------------------------------------


def matrix_of(blocks: Tensor, kind: str) -> Tensor:
    """The matrix of which a chain of two is a product, ``(groups, rows, columns)``.

    Of ``spatial`` a row is an output channel and a place along the second dim of the kernel, a column an
    input channel and a place along the first one (Tai 2016). Of ``separable`` every input channel has its own
    matrix, from places of the kernel to output channels (Guo 2018). Else a row is an output channel.
    """
    if kind == "separable":
        return blocks.transpose(1, 2).flatten(3).flatten(0, 1)
    if kind == "spatial":
        return blocks.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
    return blocks.flatten(2)


def nearest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the nearest matrix of a rank: its singular value decomposition, cut off.

    Of the shorter side's singular vectors, which are eigenvectors of a small matrix, the others follow.

    Returns:
        Shape ``(..., rows, rank)`` and ``(..., rank, columns)``; each component shared equally by both.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        left, right = nearest(matrix.mT, rank)
        return right.mT, left.mT
    return onto(leading(matrix @ matrix.mT, rank), matrix)


def onto(basis: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix projected on an orthonormal basis ``(..., rows, rank)``, as two factors of one size."""
    right = basis.mT @ matrix
    root = right.norm(dim=-1, keepdim=True).sqrt()
    root = torch.where(root > 0, root, 1.0)
    return basis * root.mT, right / root


def squares_of(matrix: Tensor) -> Tensor:
    """The squared singular values, largest first, ``(..., min(rows, columns))``."""
    short = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    values: Tensor = torch.linalg.eigvalsh(short @ short.mT)
    return values.flip(-1).clamp_min(0.0)


def chain_of(blocks: Tensor, kind: str, left: Tensor, right: Tensor) -> list[Tensor]:
    """The weights of a chain of two, from the factors of :func:`matrix_of`."""
    groups, out, enters, *kernel = blocks.shape
    rank = right.shape[1]
    if kind == "separable":
        last = left.unflatten(0, (groups, enters)).transpose(1, 2).flatten(2)
        first = right.reshape(groups * enters * rank, 1, *kernel)
        return [first, last.reshape(groups * out, enters * rank, *[1] * len(kernel))]
    if kind == "spatial":
        first = right.reshape(groups * rank, enters, kernel[0], 1)
        last = left.reshape(groups, out, kernel[1], rank).transpose(2, 3)
        return [first, last.reshape(groups * out, rank, 1, kernel[1])]
    first = right.reshape(groups * rank, enters, *kernel)
    return [first, left.reshape(groups * out, rank, *[1] * len(kernel))]


def projected(blocks: Tensor, kind: str, covariance: Tensor, rank: int) -> list[Tensor]:
    """The chain of two whose outputs come nearest to the layer's: Zhang 2016, equation 4, without the mean.

    With y = W x and ``E[y y^T] = U L U^T``, no matrix M of that rank has a smaller ``E|y - M x|**2`` than
    ``U_r U_r^T W``. It is what whitening x by the Cholesky factor of ``E[x x^T]`` and cutting off singular
    values gives, but needs no inverse.

    Args:
        blocks: of the layer.
        kind: ``svd`` or ``channel``.
        covariance: ``E[y y^T]``, ``(groups, out, out)``.
        rank: r.
    """
    return chain_of(blocks, kind, *onto(leading(covariance, rank), matrix_of(blocks, kind)))


def leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, largest first, ``(..., size, rank)``."""
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors.flip(-1)[..., :rank]


# -- Tucker -----------------------------------------------------------------------------------------


def unfolded(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices whose rows are the output channels, and the input channels."""
    return blocks.flatten(2), blocks.transpose(1, 2).flatten(2)


def tucker(blocks: Tensor, enters: int, leaves: int, sweeps: int = _TUCKER_SWEEPS) -> list[Tensor]:
    """Tucker-2: orthogonal bases of both kinds of channels, and a core between them (Kim 2016).

    The bases begin as the singular vectors of both unfoldings (HOSVD); then each is computed anew while the
    other is held (HOOI), which never raises the error.

    Args:
        blocks: of the layer.
        enters: rank of the input channels.
        leaves: rank of the output channels.
        sweeps: how often both are computed anew, at most; 0 for HOSVD.
    """
    by_out, by_in = unfolded(blocks)
    left, right = leading(by_out @ by_out.mT, leaves), leading(by_in @ by_in.mT, enters)
    total, before = blocks.square().sum(), math.inf
    for _ in range(sweeps):
        half = unfolded(_along(blocks, right, 2))[0]
        left = leading(half @ half.mT, leaves)
        half = unfolded(_along(blocks, left, 1))[1]
        right = leading(half @ half.mT, enters)
        error = float(1.0 - (right.mT @ half).square().sum() / total) if total else 0.0
        if before - error < _TUCKER_SETTLED:
            break
        before = error
    core = _along(_along(blocks, right, 2), left, 1)
    ones = [1] * (blocks.ndim - 3)
    return [
        right.mT.flatten(0, 1).unflatten(1, (-1, *ones)),
        core.flatten(0, 1),
        left.flatten(0, 1).unflatten(1, (-1, *ones)),
    ]


def _along(blocks: Tensor, basis: Tensor, dim: int) -> Tensor:
    """The coordinates of one kind of channels in a basis ``(groups, channels, rank)``."""
    moved = blocks.movedim(dim, -1)
    wide = basis.view(len(basis), *[1] * (moved.ndim - 3), *basis.shape[1:])
    return (moved @ wide).movedim(-1, dim)


# -- CP ---------------------------------------------------------------------------------------------


def cp(blocks: Tensor, rank: int, sweeps: int = _CP_SWEEPS) -> list[Tensor]:
    """A sum of outer products of vectors, one a dim, by alternating least squares (Lebedev 2015).

    It begins with the singular vectors of each unfolding, and with normal numbers of the fixed seed 0 where
    there are fewer of them than the rank. Each update solves for the vectors along one dim while those along
    the others are held, which never raises the error. At the full rank nothing has to be found: all but
    the largest dim have unit vectors.

    Args:
        blocks: of the layer.
        rank: terms of the sum.
        sweeps: updates of all dims, at most.
    """
    chains = [_as_chain(_balanced(cp_vectors(block, rank, sweeps))) for block in blocks]
    return [torch.cat(parts) for parts in zip(*chains, strict=True)]


def _as_chain(vectors: list[Tensor]) -> list[Tensor]:
    """The weights of the thin layers of one group."""
    out, enters, *along = vectors
    dims = range(len(along))
    ones = [1 for _ in dims]
    middle = [
        v.T.reshape(-1, 1, *(len(v) if d == dim else 1 for d in dims))
        for dim, v in enumerate(along)
    ]
    return [enters.T.reshape(*enters.T.shape, *ones), *middle, out.reshape(*out.shape, *ones)]


def cp_vectors(tensor: Tensor, rank: int, sweeps: int) -> list[Tensor]:
    """For each dim of a tensor the vectors of all terms, ``(size, rank)``.

    Example:
        >>> a = torch.arange(1.0, 4.0).double()
        >>> found = cp_vectors(torch.einsum("i,j,k->ijk", a, a, a), 1, 50)
        >>> torch.einsum("ir,jr,kr->ijk", *found)[2, 2, 2].round(decimals=6)
        tensor(27., dtype=torch.float64)
    """
    if rank >= tensor.numel() // max(tensor.shape):
        return _exact(tensor)
    vectors, rows = _start(tensor, rank), tensor.flatten(1)
    total, before = float(tensor.square().sum()), math.inf
    for _ in range(sweeps):
        half = (vectors[0].T @ rows).view(rank, *tensor.shape[1:])
        for dim in range(1, tensor.ndim):
            _update(vectors, dim, _contracted(half, vectors, dim))
        cross = (rows @ _products(vectors[1:])).T
        gram = _update(vectors, 0, cross)
        fits = float((cross.T * vectors[0]).sum()), float(((vectors[0] @ gram) * vectors[0]).sum())
        error = total - 2.0 * fits[0] + fits[1]
        if before - error < _CP_SETTLED * error + 1e-15 * total:
            break
        before = error
    return vectors


def _update(vectors: list[Tensor], dim: int, cross: Tensor) -> Tensor:
    """Solve for the vectors along one dim; the matrix of the system is returned.

    Args:
        vectors: of all dims; changed.
        dim: which.
        cross: the tensor contracted with the vectors along all other dims, ``(rank, size)``.
    """
    others = torch.stack([v.T @ v for d, v in enumerate(vectors) if d != dim])
    gram = others.prod(0)
    vectors[dim] = least_squares(gram, cross, toward=vectors[dim].T).T
    return gram


def _contracted(half: Tensor, vectors: list[Tensor], dim: int) -> Tensor:
    """A tensor ``(rank, ...)`` contracted with the vectors along all dims but the first and one other."""
    for other in range(1, half.ndim):
        if other != dim:
            shape = [1] * half.ndim
            shape[0], shape[other] = half.shape[0], len(vectors[other])
            half = (half * vectors[other].T.reshape(shape)).sum(other, keepdim=True)
    return half.flatten(1)


def _start(tensor: Tensor, rank: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(_SEED)
    vectors = []
    for dim, size in enumerate(tensor.shape):
        matrix = tensor.movedim(dim, 0).flatten(1)
        known = leading(matrix @ matrix.T, min(rank, size))
        more = torch.randn(size, rank - known.shape[1], generator=random, dtype=torch.float64)
        vectors.append(torch.cat([known, more.to(known)], dim=1))
    return vectors


def _exact(tensor: Tensor) -> list[Tensor]:
    """One term for each fiber along the largest dim."""
    largest = max(range(tensor.ndim), key=lambda dim: tensor.shape[dim])
    others = [dim for dim in range(tensor.ndim) if dim != largest]
    places = torch.cartesian_prod(*(torch.arange(tensor.shape[dim]) for dim in others))
    places = places.view(-1, len(others)).to(tensor.device)
    units = {dim: torch.eye(tensor.shape[dim]).to(tensor) for dim in others}
    found = {dim: units[dim][:, places[:, place]] for place, dim in enumerate(others)}
    return [
        found[dim] if dim != largest else tensor.movedim(dim, 0).flatten(1)
        for dim in range(tensor.ndim)
    ]


def _products(vectors: list[Tensor]) -> Tensor:
    """The outer products of the terms, each as a column: the Khatri-Rao product."""
    product, *rest = vectors
    for more in rest:
        product = (product[:, None] * more).flatten(0, 1)
    return product


def _balanced(vectors: list[Tensor]) -> list[Tensor]:
    """The same sum, each term's size shared equally by its vectors."""
    sizes = torch.stack([v.norm(dim=0) for v in vectors])
    share = sizes.prod(0) ** (1 / len(vectors))
    alive = (sizes > 0).all(0)
    return [
        v * torch.where(alive, share / size, 0.0) for v, size in zip(vectors, sizes, strict=True)
    ]


# -- calibration ------------------------------------------------------------------------------------


def leading_map(weights: list[Tensor], blocks: Tensor) -> Tensor:
    """What the last layer of a chain multiplies, as a linear map of what the whole layer would multiply.

    Args:
        weights: of the chain.
        blocks: of the layer.

    Returns:
        Shape ``(groups, features, columns)``; a feature is a channel and a place of the last kernel.
    """
    groups, last = len(blocks), weights[-1]
    features = last[0].numel()
    unit = (
        torch.eye(features)
        .to(last)
        .view(features, *last.shape[1:])
        .repeat(groups, *[1] * (last.ndim - 1))
    )
    whole = compose([*weights[:-1], unit], groups, blocks.shape[2])
    return whole.view(groups, features, -1)
