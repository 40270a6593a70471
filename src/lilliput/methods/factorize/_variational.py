"""How many components of a matrix are more than noise: empirical variational Bayes, solved in closed form.

Nakajima, Sugiyama, Babacan, Tomioka (2013): a matrix of L rows and M >= L columns is a product of factors
with normal priors, plus normal noise of variance s. The global minimum of the free energy keeps the
component of singular value g if ``g > sqrt(M s x)``, where ``a = L / M`` and ::

    x = (1 + t) (1 + a / t),     t the zero of  f(t) + f(t / a),     f(z) = log(z + 1) / z - 1 / 2

The paper gives ``t = 2.5129 sqrt(a)`` as a good approximation; here the zero is computed. The variance,
where it is not known, minimizes the free energy over all components::

    sum_h  y - log y + [y > x] (log(u + 1) + a log(u / a + 1) - u),     y = g_h^2 / (M s)
    u = (y - (1 + a) + sqrt((y - (1 + a))^2 - 4 a)) / 2

in an interval that the paper states. It may have several minima, so it is first looked at on a grid.

The surprising rule: the rank may be zero. A matrix without structure, such as one of fresh random weights,
is noise to the last component.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq, minimize_scalar

#: Variances at which the free energy is looked at before the best is refined.
_GRID = 400


def evbmf(singular_values: np.ndarray, rows: int, columns: int) -> tuple[int, float]:
    """The rank of a matrix beneath its noise, and the variance of the noise.

    Args:
        singular_values: all of them, ``(min(rows, columns),)``.
        rows: of the matrix.
        columns: of the matrix.

    Example:
        >>> random = np.random.default_rng(0)
        >>> signal = random.normal(size=(40, 3)) @ random.normal(size=(3, 60))
        >>> noisy = signal + 0.5 * random.normal(size=(40, 60))
        >>> rank, variance = evbmf(np.linalg.svd(noisy, compute_uv=False), 40, 60)
        >>> rank, round(variance, 2)
        (3, 0.25)
    """
    shorter, longer = sorted((rows, columns))
    squares = np.sort(np.asarray(singular_values, float))[::-1] ** 2 / longer
    if not squares.any():
        return 0, 0.0
    ratio = shorter / longer
    border = threshold(ratio)
    variance = _variance(squares, ratio, border)
    return int((squares > border * variance).sum()), variance


def threshold(ratio: float) -> float:
    """x: a component is kept if its ``g^2 / (M s)`` is above it.

    Args:
        ratio: a, rows over columns, at most 1.

    Example:
        >>> round(threshold(1.0), 4)  # 2.5129 for t
        4.9108
    """
    zero = brentq(lambda t: _half(t) + _half(t / ratio), 1e-9 * ratio, 1e6)
    return float((1.0 + zero) * (1.0 + ratio / zero))


def free_energy(variance: float, squares: np.ndarray, ratio: float, border: float) -> float:
    """The free energy as a function of the noise variance, but for a constant.

    Args:
        variance: s.
        squares: ``g^2 / M`` of all components.
        ratio: a.
        border: x, see :func:`threshold`.
    """
    y = squares / variance
    total = y.sum() - np.log(np.maximum(squares, 1e-300)).sum() + len(y) * math.log(variance)
    kept = y[y > border]
    middle = kept - (1.0 + ratio)
    u = (middle + np.sqrt(middle**2 - 4.0 * ratio)) / 2.0
    return float(total + (np.log1p(u) + ratio * np.log1p(u / ratio) - u).sum())


def _half(z: float) -> float:
    return math.log1p(z) / z - 0.5


def _variance(squares: np.ndarray, ratio: float, border: float) -> float:
    """Where the free energy is smallest, within the paper's bounds."""
    count = len(squares)
    most = min(math.ceil(count / (1.0 + ratio)) - 1, count - 1)
    upper = squares.mean()
    lower = max(squares[most] / border, squares[most:].mean(), 1e-12 * upper)
    grid = np.geomspace(lower, max(upper, lower), _GRID)
    energies = [free_energy(v, squares, ratio, border) for v in grid]
    best = int(np.argmin(energies))
    around = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    if around[0] == around[1]:
        return float(grid[best])
    found = minimize_scalar(
        lambda log: free_energy(math.exp(log), squares, ratio, border),
        bounds=(math.log(around[0]), math.log(around[1])), method="bounded",
    )  # fmt: skip
    return math.exp(found.x) if found.fun < energies[best] else float(grid[best])
