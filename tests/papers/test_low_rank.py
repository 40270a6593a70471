"""Low-rank factorization: Denton 2014, Jaderberg 2014, Tai, Zhang, Kim 2016, Lebedev 2015, Nakajima 2013."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.types import Batch
from lilliput.errors import InputError, NothingChanged, NothingMatched
from lilliput.measure import macs, size
from lilliput.mechanisms.activations import replaced_activations
from lilliput.mechanisms.curvature import as_rows, input_hessians
from lilliput.mechanisms.encodings import LowRank as Product
from lilliput.mechanisms.encodings import encoding_of, original_of
from lilliput.mechanisms.factors import (
    Factors,
    Shape,
    chain,
    compose,
    factorize,
    full_ranks,
    multiplied,
    numbers,
    thin,
)
from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.initializing import draw_fresh_weights
from lilliput.mechanisms.surgery import Plan, apply_plan, cut, plan_of
from lilliput.methods import Codebook, FilterL1, LowRank, Magnitude, Packnet, PostTraining
from lilliput.methods.factorize import _spending
from lilliput.methods.factorize._calibration import (
    output_errors,
    output_moments,
    refitted,
    visiting,
)
from lilliput.methods.factorize._decompositions import (
    cp,
    cp_vectors,
    decompose,
    projected,
    relative_error,
    tucker,
    unfolded,
)
from lilliput.methods.factorize._ranks import (
    Option,
    Place,
    allocate,
    by_energy,
    measure_work,
    options,
)
from lilliput.methods.factorize._variational import evbmf, free_energy, threshold
from lilliput.testing import NETWORKS

MLP, CNN, TRANSFORMER = NETWORKS
G = torch.Generator()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=G.manual_seed(seed), dtype=torch.float64)


def blocks_of(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach().double()
    return weight.unflatten(0, (getattr(layer, "groups", 1), -1))


def conv(*args: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(*args, **options).double()


ALL = "channel spatial separable tucker cp"

# A layer, an input for it, and the kinds of chain that it can be.
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "linear": (nn.Linear(7, 5).double(), (4, 7), "svd"),
    "linear over tokens": (nn.Linear(7, 5, bias=False).double(), (2, 3, 7), "svd"),
    "plain": (conv(4, 6, 3), (2, 4, 8, 8), ALL),
    "strided": (conv(4, 6, (3, 5), (2, 3), (1, 2), bias=False), (2, 4, 9, 9), ALL),
    "dilated": (conv(4, 6, 3, padding=2, dilation=(1, 2)), (2, 4, 9, 9), ALL),
    "same": (conv(3, 4, (3, 4), padding="same"), (2, 3, 7, 7), ALL),
    "reflected": (conv(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 7, 7), ALL.replace("tucker ", "")),
    "grouped": (conv(4, 6, 3, padding=1, groups=2), (2, 4, 6, 6), ALL),
    "depthwise": (conv(4, 4, 3, padding=1, groups=4), (2, 4, 6, 6), ALL),
    "multiplied": (conv(2, 6, 3, groups=2), (2, 2, 6, 6), ALL),
    "pointwise": (conv(4, 6, 1, 2), (2, 4, 7, 7), "channel separable tucker cp"),
    "sequence": (nn.Conv1d(4, 6, 3, 2, 1).double(), (2, 4, 9), "channel separable tucker cp"),
    "volume": (nn.Conv3d(2, 3, 2, padding=1).double(), (2, 2, 4, 4, 4), "channel separable tucker cp"),
}  # fmt: skip
CASES = [(name, kind) for name, (_, _, kinds) in LAYERS.items() for kind in kinds.split()]
cases = pytest.mark.parametrize(("name", "kind"), CASES)


def put(layer: nn.Module, kind: str, ranks: tuple[int, ...]) -> Any:
    """A chain with the weights that come nearest to the layer's."""
    factors = thin(layer, kind, ranks)
    for part, weight in zip(factors, decompose(blocks_of(layer), kind, ranks), strict=True):
        assert part.weight.shape == weight.shape
        part.weight.data.copy_(weight)  # type: ignore[union-attr,operator]
    return factors


# -- chains -----------------------------------------------------------------------------------------


@cases
def test_at_full_rank_nothing_is_lost(name: str, kind: str) -> None:
    """Weights and outputs, with stride, padding, dilation, groups, bias and padding modes."""
    layer, shape, _ = LAYERS[name]
    factors = put(layer, kind, full_ranks(Shape.of(layer), kind))
    torch.testing.assert_close(factors.weight, layer.weight, rtol=0, atol=1e-9)
    x = drawn(*shape)
    torch.testing.assert_close(factors(x), layer(x), rtol=0, atol=1e-9)
    assert factors.bias is layer.bias
    again = multiplied(nn.Sequential(factors))[0]  # type: ignore[index]
    assert type(again) is type(layer)
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=1e-9)


@cases
def test_a_chain_computes_what_its_weight_says(name: str, kind: str) -> None:
    """At a low rank the chain's output is that of a layer with the composed weight."""
    layer, shape, _ = LAYERS[name]
    factors = put(layer, kind, tuple(max(1, r // 2) for r in full_ranks(Shape.of(layer), kind)))
    whole = copy.deepcopy(layer)
    whole.weight.data.copy_(factors.weight)  # type: ignore[union-attr,operator]
    x = drawn(*shape)
    torch.testing.assert_close(factors(x), whole(x), rtol=0, atol=1e-9)


@cases
def test_weights_are_counted(name: str, kind: str) -> None:
    layer, _, _ = LAYERS[name]
    shape = Shape.of(layer)
    assert shape.numbers == layer.weight.numel()  # type: ignore[operator,union-attr]
    for part in (1, 2):
        ranks = tuple(max(1, r // part) for r in full_ranks(shape, kind))
        weights = decompose(blocks_of(layer), kind, ranks)
        assert numbers(shape, kind, ranks) == sum(w.numel() for w in weights)


def test_counts_by_hand() -> None:
    """r(m + n), r(n k k + m), r k (n + m), n r + r s k k + s m, r(n + m + 2 k)."""
    image = Shape(16, 32, (3, 3))
    assert numbers(Shape(300, 100), "svd", (10,)) == 10 * 400
    assert numbers(image, "channel", (5,)) == 5 * (16 * 9 + 32)
    assert numbers(image, "spatial", (5,)) == 5 * 3 * (16 + 32)
    assert numbers(image, "separable", (2,)) == 2 * 16 * (9 + 32)
    assert numbers(image, "tucker", (4, 8)) == 16 * 4 + 4 * 8 * 9 + 8 * 32
    assert numbers(image, "cp", (5,)) == 5 * (16 + 32 + 2 * 3)
    assert numbers(Shape(16, 32, (3, 3), 2), "channel", (5,)) == 2 * 5 * (16 * 9 + 32)


@pytest.mark.parametrize("name", ["linear", "plain", "grouped", "strided"])
def test_eckart_and_young(name: str) -> None:
    """The squared error is the sum of the squared singular values that are left out, for every rank."""
    layer, _, kinds = LAYERS[name]
    w = blocks_of(layer)
    for kind in set(kinds.split()) & {"svd", "channel", "spatial", "separable"}:
        (full,) = full_ranks(Shape.of(layer), kind)
        squares = torch.zeros(full)
        for block in w:
            if kind == "separable":  # each input channel by itself
                for channel in block.transpose(0, 1).flatten(2):
                    squares = squares + torch.linalg.svdvals(channel)[:full].square()
                continue
            if kind == "spatial":
                _, i, y, x = block.shape  # rows (o, x), columns (i, y)
                rows = [
                    [block[o, c, v, u] for c in range(i) for v in range(y)]
                    for o in range(len(block))
                    for u in range(x)
                ]
                matrix = torch.stack([torch.stack(row) for row in rows])
            else:
                matrix = block.flatten(1)
            squares = squares + torch.linalg.svdvals(matrix).square()
        for rank in range(1, full + 1):
            weights = decompose(w, kind, (rank,))
            whole = compose(weights, len(w), w.shape[2]).view_as(w)
            error = float((whole - w).square().sum())
            assert error == pytest.approx(float(squares[rank:].sum()), abs=1e-10)
            assert options(place(layer, kind))[rank - 1].error == pytest.approx(
                error / float(w.square().sum()), abs=1e-10
            )


def test_both_factors_are_of_one_size() -> None:
    """Else one of them would train at another rate than the other."""
    right, left = decompose(drawn(1, 8, 6), "svd", (4,))
    torch.testing.assert_close(right.norm(dim=1), left.norm(dim=0))


def place(layer: Any, kind: str, name: str = "0") -> Place:
    from lilliput.core.select import Weight

    return Place(Weight(name, layer, "weight"), name, kind, Shape.of(layer))


# -- Tucker -----------------------------------------------------------------------------------------


def hosvd_error(w: Tensor, enters: int, leaves: int) -> float:
    """By the textbook: project both unfoldings on their leading singular vectors."""
    left = torch.linalg.svd(w.flatten(1), full_matrices=False)[0][:, :leaves]
    right = torch.linalg.svd(w.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :enters]
    near = torch.einsum("oiyx,op,qp,ij,kj->qkyx", w, left, left, right, right)
    return float((near - w).square().sum())


@pytest.mark.parametrize("groups", [1, 2])
def test_tucker_is_hosvd_and_better(groups: int) -> None:
    w = drawn(groups, 8, 6, 3, 3)
    total = float(w.square().sum())
    found: dict[tuple[int, int], float] = {}
    for enters, leaves in itertools.product(range(1, 7), range(1, 9)):
        error = relative_error(w, tucker(w, enters, leaves)) * total
        first = relative_error(w, tucker(w, enters, leaves, sweeps=0)) * total
        assert first == pytest.approx(sum(hosvd_error(b, enters, leaves) for b in w), abs=1e-9)
        assert error <= first + 1e-9
        found[enters, leaves] = error
    for enters, leaves in found:  # monotone in both ranks
        for more in ((enters + 1, leaves), (enters, leaves + 1)):
            assert found.get(more, -1.0) <= found[enters, leaves] + 1e-9
    assert found[6, 8] < 1e-9
    better = [found[key] < sum(hosvd_error(b, *key) for b in w) - 1e-6 for key in found]
    assert sum(better) > len(better) // 4


def test_sweeps_never_raise_the_error() -> None:
    w = drawn(1, 12, 10, 3, 3)
    errors = [relative_error(w, tucker(w, 3, 4, sweeps)) for sweeps in range(6)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))


def test_tucker_options_are_those_of_hosvd() -> None:
    layer = conv(6, 8, 3)
    w = blocks_of(layer)
    known = options(place(layer, "tucker"))
    assert known[-1].ranks == (6, 8)
    for option in known:
        assert option.error == pytest.approx(
            relative_error(w, tucker(w, *option.ranks, sweeps=0)), abs=1e-9
        )
    errors = [o.error for o in known]
    assert errors == sorted(errors, reverse=True)


# -- CP ---------------------------------------------------------------------------------------------


def low_rank_tensor(rank: int, *sizes: int) -> Tensor:
    vectors = [drawn(n, rank, seed=s) for s, n in enumerate(sizes)]
    return torch.einsum("or,ir,yr,xr->oiyx", *vectors)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_cp_finds_a_tensor_of_low_rank(rank: int) -> None:
    w = low_rank_tensor(rank, 8, 6, 3, 3)
    weights = cp(w[None], rank, sweeps=3000)
    assert relative_error(w[None], weights) < 1e-8
    assert relative_error(w[None], cp(w[None], rank + 1, sweeps=3000)) < 1e-6


def test_cp_errors_fall() -> None:
    """With every update, and with the rank; the same from the same seed; equal to a brute-force sum."""
    w = drawn(8, 6, 3, 3)
    errors = [relative_error(w[None], cp(w[None], 5, sweeps)) for sweeps in range(1, 12)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    by_rank = [relative_error(w[None], cp(w[None], r)) for r in (1, 2, 4, 8, 16, 54)]
    assert all(b < a for a, b in itertools.pairwise(by_rank))
    assert by_rank[-1] < 1e-20
    one, other = (cp_vectors(w, 7, 20) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    summed = sum(torch.einsum("o,i,y,x->oiyx", *(v[:, r] for v in one)) for r in range(7))
    torch.testing.assert_close(compose(cp(w[None], 7, 20)), summed, rtol=0, atol=1e-9)


def test_cp_of_one_term_is_the_best_one() -> None:
    """The power method from many starts finds no nearer outer product."""
    w = drawn(5, 4, 3, 3)
    best = math.inf
    for seed in range(20):
        vectors = [drawn(n, seed=seed + 10 * d) for d, n in enumerate(w.shape)]
        for _ in range(200):
            for d in range(4):
                letters = "oiyx"
                others = [v for e, v in enumerate(vectors) if e != d]
                terms = ",".join(letters[e] for e in range(4) if e != d)
                v = torch.einsum(f"oiyx,{terms}->{letters[d]}", w, *others)
                vectors[d] = v / v.norm()
        scale = torch.einsum("oiyx,o,i,y,x->", w, *vectors)
        best = min(best, float(w.square().sum() - scale**2))
    error = relative_error(w[None], cp(w[None], 1)) * float(w.square().sum())
    assert error <= best * 1.1


# -- variational Bayes --------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(60, 100), (100, 60), (80, 80)])
@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_evbmf_finds_the_rank_beneath_the_noise(
    rows: int, columns: int, noise: float, rank: int
) -> None:
    random = np.random.default_rng(rank)
    signal = random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns))
    noisy = signal + noise * random.normal(size=(rows, columns))
    found, variance = evbmf(np.linalg.svd(noisy, compute_uv=False), rows, columns)
    assert found == rank
    assert variance == pytest.approx(noise**2, rel=0.08)


def test_evbmf_of_noise_and_of_a_signal_that_drowns() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(size=(60, 90))
    assert evbmf(np.linalg.svd(noise, compute_uv=False), 60, 90)[0] == 0
    assert evbmf(np.zeros(5), 5, 9) == (0, 0.0)
    exact = random.normal(size=(60, 4)) @ random.normal(size=(4, 90))
    assert evbmf(np.linalg.svd(exact, compute_uv=False), 60, 90)[0] == 4


def test_the_threshold_is_where_the_free_energies_meet() -> None:
    """At x keeping a component and dropping it cost the same; 2.5129 sqrt(a) is near the zero."""
    for ratio in (0.05, 0.3, 0.7, 1.0):
        border = threshold(ratio)
        near = 2.5129 * math.sqrt(ratio)
        assert border == pytest.approx((1 + near) * (1 + ratio / near), rel=0.02)
        squares = np.array([border])
        below = free_energy(1.0 + 1e-9, squares, ratio, border)
        above = free_energy(1.0 - 1e-9, squares, ratio, border)
        assert above == pytest.approx(below, abs=1e-6)
        strong = np.array([2.0 * border])  # beyond it keeping is cheaper
        kept = free_energy(1.0, strong, ratio, border)
        assert kept < float(strong[0] - math.log(strong[0]))


def test_the_free_energy_is_that_of_the_posterior() -> None:
    """The closed form against the variational free energy of one component, minimized numerically.

    With posteriors of variance A and B, means a and b, priors of variance p and q and noise 1, where
    the observed singular value is g: all scalars, minimized over all of them by hand-written descent.
    """
    from scipy.optimize import minimize

    rows, columns = 6, 10  # L, M

    def energy(x: np.ndarray, g: float) -> float:
        a, b = x[:2]
        va, vb, p, q = np.exp(x[2:])
        fit = g * g - 2 * g * a * b + (a * a + columns * va) * (b * b + rows * vb)
        prior = columns * math.log(p / va) + (a * a + columns * va) / p - columns
        prior += rows * math.log(q / vb) + (b * b + rows * vb) / q - rows
        return float((fit + prior) / columns)

    ratio, border = rows / columns, threshold(rows / columns)
    for times in (1.2, 2.0, 4.0):
        g = math.sqrt(times * border * columns)
        start = [math.sqrt(g)] * 2 + [-2.0] * 2 + [math.log(g / columns)] * 2
        precise = {"maxiter": 40_000, "maxfev": 40_000, "xatol": 1e-9, "fatol": 1e-11}
        best = minimize(energy, start, args=(g,), method="Nelder-Mead", options=precise).fun
        y = g * g / columns
        expected = free_energy(1.0, np.array([y]), ratio, border) + math.log(y)
        assert best == pytest.approx(expected, rel=1e-4)


# -- ranks --------------------------------------------------------------------------------------------


def test_rank_by_energy() -> None:
    layer = nn.Linear(6, 5, bias=False).double()
    left, right = torch.linalg.qr(drawn(5, 5))[0], torch.linalg.qr(drawn(6, 5, seed=1))[0]
    layer.weight.data = (
        left @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0]).double()) @ right.T
    )
    known = options(place(layer, "svd"))  # squares 16, 4, 1, 1, 0 of 22
    for energy, rank in ((0.5, 1), (0.72, 1), (0.8, 2), (20 / 22, 2), (0.92, 3), (1.0, 4)):
        assert by_energy(known, energy) == (rank,), energy
    assert by_energy([Option((1,), 0.5), Option((9,), 0.0)], 1.0) == (9,)


def brute_force(costs: list[np.ndarray], errors: list[np.ndarray], target: float) -> float:
    return min(
        sum(e[n] for e, n in zip(errors, numbers, strict=True))
        for numbers in itertools.product(*(range(len(c)) for c in costs))
        if sum(c[n] for c, n in zip(costs, numbers, strict=True)) <= target
    )


def test_the_budget_is_spent_where_it_hurts_least() -> None:
    """Within the target, and near the best of all choices."""
    random = np.random.default_rng(0)
    for _ in range(40):
        costs, errors = [], []
        for _ in range(4):
            squares = np.sort(random.exponential(size=6) ** 2)[::-1]
            left = 1 - np.cumsum(squares) / squares.sum()
            price = random.uniform(1, 5)
            costs.append(np.array([price * 5, *(price * np.arange(1, 6))]))
            errors.append(np.array([0.0, *left[:5]]))
        whole, least = (sum(f(c) for c in costs) for f in (np.max, np.min))
        for target in np.linspace(least, whole, 7):
            taken = allocate(costs, errors, target)
            spent = sum(c[n] for c, n in zip(costs, taken, strict=True))
            error = sum(e[n] for e, n in zip(errors, taken, strict=True))
            assert spent <= target + 1e-9
            best = brute_force(costs, errors, target + 1e-9)
            assert best - 1e-9 <= error <= best + 0.35
        with pytest.raises(InputError, match="cannot be reached"):
            allocate(costs, errors, least - 0.1)


def test_operations_are_measured() -> None:
    """What a place says of its ranks is what the counter says of the real chain."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, (2, 1), 1), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(1))
    x = torch.randn(1, 3, 9, 9)
    for name, kind in itertools.product(("0", "1"), ("channel", "spatial", "tucker", "cp")):
        layer: Any = net.get_submodule(name)
        mine = place(layer, kind, name)
        measure_work(net, [mine], x)
        assert mine.macs == macs(net, x).by_module[name]
        for ranks in ((2,) * len(mine.full), tuple(max(1, r - 1) for r in mine.full)):
            tried = copy.deepcopy(net)
            factorize(tried, name, kind, ranks)
            made = macs(tried, x)
            real = sum(n for m, n in made.by_module.items() if m.startswith(f"{name}."))
            assert mine.work(ranks) == pytest.approx(real)


# -- calibration --------------------------------------------------------------------------------------

CALIBRATED = [
    ("linear", "svd"), ("linear over tokens", "svd"), ("plain", "channel"), ("grouped", "channel"),
    ("strided", "channel"), ("sequence", "channel"), ("plain", "spatial"), ("grouped", "spatial"),
    ("dilated", "tucker"), ("plain", "cp"), ("sequence", "cp"), ("volume", "tucker"),
    ("plain", "separable"), ("grouped", "separable"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CALIBRATED)
def test_calibrated_chains_fit_the_outputs(name: str, kind: str) -> None:
    """Never worse than the plain ones on the rows they saw; the closed form is that of whitening."""
    layer, shape, _ = LAYERS[name]
    model = nn.Sequential(copy.deepcopy(layer))
    mixed = drawn(64, *shape[1:]) @ drawn(shape[-1], shape[-1], seed=3)
    data = [Batch(mixed + 0.5, None)]
    seed = lambda: G.manual_seed(0)  # noqa: E731
    visit = visiting(model, lambda: data, 10_000, seed)
    mine = place(model[0], kind)
    moments = output_moments([mine], visit)["0"]
    w = mine.blocks
    ranks = tuple(max(1, r // 2) for r in mine.full)
    plain = decompose(w, kind, ranks)
    if kind in ("svd", "channel"):
        fitted = projected(w, kind, moments, ranks[0])
    else:
        fitted = refitted({"0": mine}, {"0": plain}, visit)["0"]
    errors = {
        which: output_errors({"0": mine}, {"0": weights}, visit)["0"]
        for which, weights in (("plain", plain), ("fitted", fitted))
    }
    assert errors["fitted"] <= errors["plain"] * (1 + 1e-9)
    assert errors["fitted"] < errors["plain"] - 1e-6
    real = copy.deepcopy(layer)
    chosen = thin(layer, kind, ranks)
    with torch.no_grad():
        for part, weight in zip(chosen, fitted, strict=True):
            part.weight.copy_(weight)  # type: ignore[operator]
        if layer.bias is not None:
            real.bias.zero_()  # type: ignore[operator,union-attr]
            chosen[-1].bias = nn.Parameter(torch.zeros_like(real.bias))  # type: ignore[arg-type]
        y, near = real(data[0].inputs), chosen(data[0].inputs)
    assert float((near - y).square().sum() / y.square().sum()) == pytest.approx(errors["fitted"])
    if kind in ("svd", "channel"):
        assert options(mine, moments)[ranks[0] - 1].error == pytest.approx(errors["fitted"])
        _compare_with_whitening(model, mine, data, fitted, ranks[0])


def _compare_with_whitening(
    model: nn.Module, mine: Place, data: list[Batch], fitted: list[Tensor], rank: int
) -> None:
    """W L = U S V^T with the Cholesky factor L of the inputs' Hessian, cut off, times its inverse."""
    hessians, _ = input_hessians(model, ["0"], data, 10_000, G.manual_seed(0))
    rows = as_rows(mine.weight.module)
    whole = compose(fitted, mine.shape.groups)
    near = copy.deepcopy(mine.weight.module)
    near.weight.data.copy_(whole)  # type: ignore[union-attr,operator]
    for hessian, w, found in zip(hessians["0"], rows, as_rows(near), strict=True):
        factor = torch.linalg.cholesky(hessian)
        left, values, right = torch.linalg.svd(w @ factor, full_matrices=False)
        best = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank] @ torch.linalg.inv(factor)
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-6)


def test_dead_and_equal_inputs_are_no_trouble() -> None:
    """Where whitening has no inverse, the closed form needs none."""
    layer = nn.Linear(6, 5).double()
    x = drawn(40, 6)
    x[:, 2], x[:, 3] = 0.0, x[:, 4]
    model = nn.Sequential(layer)
    visit = visiting(model, lambda: [Batch(x, None)], 100, lambda: G.manual_seed(0))
    mine = place(layer, "svd")
    fitted = projected(mine.blocks, "svd", output_moments([mine], visit)["0"], 4)
    error = output_errors({"0": mine}, {"0": fitted}, visit)["0"]
    assert (
        error <= output_errors({"0": mine}, {"0": decompose(mine.blocks, "svd", (4,))}, visit)["0"]
    )


# -- the method -----------------------------------------------------------------------------------------


def run(model: nn.Module, task: Task, folder: Path | None = None, **settings: Any) -> Any:
    epochs = settings.pop("epochs", 0)
    stage = Stage(methods=[LowRank(**settings)], train=Train(epochs=epochs, lr=0.01))
    return lilliput.compress(model, task, [stage], directory=folder)


def changes(folder: Path) -> dict[str, dict[str, Any]]:
    (told,) = json.loads((folder / "changes.json").read_text())
    return {change["where"]: change for change in told}


def logits(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(x)
    return found


X = next(iter(CNN.task().validation)).inputs


def test_layers_become_chains_or_say_why_not(tmp_path: Path) -> None:
    result = run(CNN.build(), CNN.task(), tmp_path, rank={"3": (3, 4), "9": 3, "0": (1, 6)})
    told = changes(tmp_path)
    assert isinstance(result.model[3], Factors)
    assert told["3"]["after"] == [3, 4]
    assert told["3"]["before"] == [6, 8]
    assert "432 -> 158 weights" in told["3"]["note"]
    assert told["9"]["note"].startswith("left whole: rank 3 would have 105 weights instead of 96")
    assert told["0"]["note"].startswith("left whole")
    assert result.model[3][2].bias is not None
    assert result.figures["parameters"] == size(CNN.build()).parameters - 432 + 158


@pytest.mark.parametrize("quantity", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("kind", ["channel", "spatial", "separable", "tucker", "cp"])
def test_a_budget_holds(quantity: str, kind: Any) -> None:
    model, task = CNN.build(), CNN.task()
    result = run(
        model, task, budget={quantity: 0.6}, convolutions=kind, calibrate=kind == "channel"
    )
    now, before = size(result.model), size(model)
    spent = {
        "macs": macs(result.model, X[:1]).total / macs(model, X[:1]).total,
        "parameters": now.parameters / before.parameters,
        "bytes": now.dense_bytes / before.dense_bytes,
    }[quantity]
    assert 0.4 < spent <= 0.6


def test_a_latency_budget_takes_the_largest_that_is_fast_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With operations in the place of a clock; what was measured once is kept for a resumed run."""
    looks = []

    def clock(models: Any, inputs: Any, **options: Any) -> Any:
        from types import SimpleNamespace as N

        ratio = macs(models["thin"], inputs).total / macs(models["dense"], inputs).total
        looks.append(ratio)
        return N(models={"thin": N(ratio=N(median=ratio))})

    monkeypatch.setattr(_spending, "latency", clock)
    result = run(CNN.build(), CNN.task(), tmp_path, budget={"latency": 0.6})
    spent = macs(result.model, X[:1]).total / macs(CNN.build(), X[:1]).total
    assert spent == max(r for r in looks if r <= 0.6) <= 0.6
    assert json.loads((tmp_path / "ranks-0-0.json").read_text())["3"]
    with pytest.raises(InputError, match="cannot be reached"):
        run(CNN.build(), CNN.task(), budget={"latency": 0.01})


def test_evbmf_ranks_of_a_trained_layer_under_noise() -> None:
    model, task = MLP.build(), MLP.task()
    layer: Any = model[0]  # type: ignore[index]
    with torch.no_grad():
        layer.weight.copy_(drawn(24, 3) @ drawn(3, 12, seed=1) + 0.1 * drawn(24, 12, seed=2))
    result = run(model, task, rank="evbmf")
    assert result.model[0].ranks == (3,)
    assert isinstance(result.model[5], nn.Linear)  # random weights are noise


def test_calibrated_outputs_of_the_network_are_nearer() -> None:
    """Inputs that vary in few directions, and other samples of the same kind to judge by."""
    few = drawn(4, 12, seed=5).float()
    x = drawn(400, 4, seed=6).float() @ few + 0.1 * drawn(400, 12, seed=7).float()
    batches = [(x[:200], torch.zeros(200).long())]
    task = Task(batches, batches, batches, nn.functional.cross_entropy, lilliput.accuracy)
    model = MLP.build()
    error = {
        calibrate: float(
            (logits(run(model, task, rank={"0": 4, "3": 5}, calibrate=calibrate).model, x[200:])
             - logits(model, x[200:])).square().mean()
        )
        for calibrate in (False, True)
    }  # fmt: skip
    assert error[True] < 0.3 * error[False]


def test_bad_ranks_and_kinds() -> None:
    task = CNN.task()
    with pytest.raises(InputError, match="greater than or equal to 1"):
        LowRank(rank=0)
    with pytest.raises(InputError, match="exactly one"):
        LowRank()
    with pytest.raises(InputError, match="exactly one"):
        LowRank(rank=2, energy=0.5)
    with pytest.raises(InputError, match=r"low_rank: 9: the rank 4 .* 1 to 3"):
        run(CNN.build(), task, rank={"9": 4})
    with pytest.raises(InputError, match=r"1 to \[6, 8\] \(of the input, of the output\)"):
        run(CNN.build(), task, rank={"3": 7})
    with pytest.raises(InputError, match="CP has none"):
        run(CNN.build(), task, rank="evbmf", convolutions="cp")
    with pytest.raises(NothingMatched, match="nowhere"):
        run(CNN.build(), task, energy=0.5, layers="nowhere")
    with pytest.raises(NothingChanged, match="leaves every layer whole"):
        run(CNN.build(), task, energy=1.0)
    grouped = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten())
    with pytest.raises(InputError, match="in each of its 4 groups: a chain of kind channel"):
        LowRank(rank={"1": 2}, convolutions="channel").check(grouped)
    with pytest.raises(InputError, match="transposed"):
        LowRank(energy=0.5).check(nn.Sequential(nn.ConvTranspose2d(2, 3, 3)))
    with pytest.raises(InputError, match="spatial needs a kernel of two dims"):
        LowRank(energy=0.5, convolutions="spatial").check(nn.Sequential(nn.Conv1d(2, 3, 3)))
    with pytest.raises(InputError, match="no layer ''"):
        factorize(nn.Linear(3, 3), "", "svd", (1,))


def test_a_layer_that_computes_something_else_stays_whole(tmp_path: Path) -> None:
    """Attention's own matrices are read, and not called; the layers around them become chains."""
    model, task = TRANSFORMER.build(), TRANSFORMER.task()
    result = run(model, task, tmp_path, energy=0.6, epochs=1)
    told = changes(tmp_path)
    assert "left whole: " in told["encoder.self_attn.in_proj_weight"]["note"]
    assert "not used" in told["encoder.self_attn.out_proj.weight"]["note"]
    assert isinstance(result.model.encoder.linear1, Factors)
    x = next(iter(task.validation)).inputs
    fast, slow = logits(result.model, x), result.model.train(False)(x)
    torch.testing.assert_close(fast, slow)
    counted = macs(result.model, x[:1]).by_module
    assert counted["encoder.linear1.0"] > 0


def test_what_reads_the_layer_finds_it() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(4, 6, 3, groups=2))
    factorize(net, "0", "svd", (2,))
    factorize(net, "1", "tucker", (1, 2))
    chains: Any = net
    assert (chains[0].in_features, chains[0].out_features) == (8, 6)
    assert (chains[1].in_channels, chains[1].out_channels, chains[1].groups) == (4, 6, 2)
    assert chains[0].weight.shape == (6, 8)
    assert len(chain(Shape(2, 3, (3, 3), 2), "tucker", (1, 2))) == len(chains[1])


def test_a_shared_layer_stays_shared_and_hooks_stay() -> None:
    shared = nn.Linear(6, 6)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    seen = []
    handle = shared.register_forward_hook(lambda *_: seen.append(1))
    factors = factorize(net, "0", "svd", (2,))
    assert net[0] is net[2] is factors
    net(torch.randn(2, 6))
    assert seen == [1, 1]
    handle.remove()
    net(torch.randn(2, 6))
    assert seen == [1, 1]


# -- with other methods -----------------------------------------------------------------------------------


def two(first: Any, second: Any, network: Any = CNN, folder: Path | None = None) -> Any:
    stages = [Stage(methods=[m], train=Train(epochs=1, lr=0.01)) for m in (first, second)]
    return lilliput.compress(network.build(), network.task(), stages, directory=folder)


@pytest.mark.parametrize("kind", ["channel", "spatial", "tucker", "cp"])
def test_channels_are_cut_before_and_after(kind: Any) -> None:
    """Either order, and both; the file fills a fresh network."""
    cut = FilterL1(keep=0.6, round_to=1)
    low = LowRank(rank={"3": 2, "9": 2}, convolutions=kind)
    for stages in ([cut, low], [low, cut], [cut, low, cut]):
        made = [Stage(methods=[m]) for m in stages]
        result = lilliput.compress(CNN.build(), CNN.task(), made)
        loaded = lilliput.load(result.artifact, model=CNN.build(seed=3))
        assert torch.equal(logits(loaded, X), logits(result.model, X))
        assert isinstance(loaded[3], Factors)  # type: ignore[index]
        again = lilliput.load(result.artifact, model=loaded)  # it is so already
        assert torch.equal(logits(again, X), logits(result.model, X))


@pytest.mark.parametrize("kind", ["channel", "spatial", "tucker", "cp"])
def test_a_kernel_that_lost_its_border_becomes_a_chain(kind: str, tmp_path: Path) -> None:
    """The plan's sizes and paddings of the kernel move to the thin layer that has that dim."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, (5, 3), padding=(1, 1)), nn.ReLU(), nn.Flatten())

    net, x = build(), torch.randn(2, 3, 8, 8)
    attributes = {"0.kernel_size.0": 3, "0.padding.0": 0}
    apply_plan(net, Plan({"0.weight": {2: np.array([1, 2, 3])}}, attributes))
    full = full_ranks(Shape.of(net[0]), kind)  # type: ignore[index]
    before = logits(net, x)
    factorize(net, "0", kind, full, decompose(blocks_of(net[0]), kind, full))  # type: ignore[index]
    torch.testing.assert_close(logits(net, x), before, rtol=1e-4, atol=1e-5)
    lilliput.save(net, tmp_path / "net")
    loaded = lilliput.load(tmp_path / "net", model=build())
    assert torch.equal(logits(loaded, x), logits(net, x))


def test_a_depthwise_convolution_that_lost_channels_is_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 3), nn.Flatten()
    )
    x = torch.randn(2, 1, 10, 10)
    groups = find_groups(net, x)
    cut(net, groups, {0: np.array([1, 4])}, inputs=x)
    plan, before = plan_of(net), logits(net, x)
    with pytest.raises(InputError, match="before it is cut"):
        factorize(net, "1", "spatial", (1,))
    assert plan_of(net) is plan
    assert torch.equal(logits(net, x), before)
    factorize(net, "2", "spatial", (2,))


def test_all_layers_or_none() -> None:
    """A layer that refuses leaves those before it as they were: the user's own network, here."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 5), nn.Conv2d(8, 8, 5, groups=8), nn.Conv2d(8, 2, 3), nn.Flatten()
    )
    x = torch.randn(2, 1, 12, 12)
    cut(net, find_groups(net, x), {0: np.array([1])}, inputs=x)
    modules = list(net)
    with pytest.raises(InputError, match="before it is cut"):
        lilliput.attach(net, LowRank(rank={"0": 1, "1": 1}, convolutions="spatial"))
    assert list(net) == modules


def test_new_weights_for_a_factorized_architecture() -> None:
    net = lilliput.build("digits_cnn")
    factorize(net, "conv3", "tucker", (8, 16))
    draw_fresh_weights(net, 0)
    first = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert all(tensor.std() > 0 for name, tensor in first.items() if name.endswith("weight"))
    draw_fresh_weights(net, 0)
    assert all(torch.equal(first[name], tensor) for name, tensor in net.state_dict().items())


def test_in_a_loop_of_one_s_own() -> None:
    """Without an example no operations are known, and weights decide; a budget of them is refused."""
    net = CNN.build()
    attached = lilliput.attach(net, LowRank(rank={"3": (3, 4)}))
    assert isinstance(net[3], Factors)  # type: ignore[index]
    assert len(list(attached.parameters())) == len(list(net.parameters()))
    assert attached.finish()[0].after == [3, 4]
    with pytest.raises(InputError, match="needs an example"):
        lilliput.attach(CNN.build(), LowRank(budget={"macs": 0.5}))  # type: ignore[arg-type]
    lilliput.attach(CNN.build(), LowRank(budget={"bytes": 0.7}))  # type: ignore[arg-type]


def test_masks_and_shared_values_go_where_a_chain_comes(tmp_path: Path) -> None:
    result = two(Codebook(bits=3), LowRank(rank={"3": 3}), folder=tmp_path)
    assert len(result.model[3].weight.unique()) > 8
    assert len(result.model[0].weight.unique()) == 8
    told = json.loads((tmp_path / "changes.json").read_text())[1]
    assert any("no longer codebook" in change["note"] for change in told)
    both = Stage(methods=[Magnitude(sparsity=0.5), LowRank(energy=0.6)])
    with pytest.raises(InputError, match=r"magnitude has chosen .* List low_rank before"):
        lilliput.compress(CNN.build(), CNN.task(), [both])
    ordered = Stage(methods=[LowRank(rank={"3": 3}), Magnitude(sparsity=0.5)])
    sparse = lilliput.compress(CNN.build(), CNN.task(), [ordered]).model
    assert float((sparse[3][1].weight == 0).float().mean()) > 0.3  # type: ignore[index]


def test_quantizers_move_to_the_ends_of_the_chain() -> None:
    result = two(PostTraining(samples=32), LowRank(energy=0.6), MLP)
    places = replaced_activations(result.model)
    assert any(p.startswith("0.0:") or p.startswith("3.0:") for p in places)
    assert not any(p.split(":")[0] in ("0", "3") for p in places if ":" in p)
    loaded = lilliput.load(result.artifact, model=MLP.build(seed=2))
    x = next(iter(MLP.task().validation)).inputs
    assert torch.equal(logits(loaded, x), logits(result.model, x))


def test_a_network_with_one_task_keeps_it_and_with_two_refuses() -> None:
    result = two(Packnet(task="first"), LowRank(energy=0.6), MLP)
    assert lilliput.tasks_of(result.model) == ["first"]
    loaded = lilliput.load(result.artifact, model=MLP.build(seed=2))
    x = next(iter(MLP.task().validation)).inputs
    assert torch.equal(logits(loaded, x), logits(result.model, x))
    stages: list[Any] = [Packnet(task="first"), Packnet(task="second"), LowRank(energy=0.6)]
    with pytest.raises(InputError, match="first, second"):
        lilliput.compress(
            MLP.build(), MLP.task(), [Stage(methods=[m], train=Train(epochs=1)) for m in stages]
        )


def test_a_chain_within_a_chain(tmp_path: Path) -> None:
    stages = [LowRank(rank={"3": (5, 6)}), LowRank(rank={"3.1": 8}, convolutions="channel")]
    made = [Stage(methods=[m]) for m in stages]
    with pytest.raises(NothingMatched):  # the pattern is looked for before the first stage
        lilliput.compress(CNN.build(), CNN.task(), made)
    net: Any = CNN.build()
    factorize(net, "3", "tucker", (5, 6))
    factorize(net, "3.1", "spatial", (2,))
    lilliput.save(net, tmp_path / "net")
    loaded: Any = lilliput.load(tmp_path / "net", model=CNN.build(seed=1))
    assert loaded[3][1].kind == "spatial"
    assert loaded[3].weight.shape == (8, 6, 3, 3)
    assert torch.equal(logits(loaded, X), logits(net, X))


# -- recurrent layers -------------------------------------------------------------------------------------


class Reader(nn.Module):
    def __init__(self, kind: Any = nn.LSTM) -> None:
        super().__init__()
        self.cells = kind(12, 16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(
            self.cells(x.view(len(x), 3, 4, 1).expand(-1, -1, -1, 3).flatten(2))[0][:, -1]
        )
        return answer


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_matrices_are_products(kind: Any, tmp_path: Path) -> None:
    """Two factors train, the file has them, and a fresh network gets them."""
    torch.manual_seed(0)
    net = Reader(kind)
    result = run(net, MLP.task(), tmp_path, rank={"cells": 4}, epochs=2)
    x = next(iter(MLP.task().validation)).inputs
    told = changes(tmp_path)["cells.weight_hh_l1"]
    assert told["after"] == 4
    loaded: Any = lilliput.load(result.artifact, model=Reader(kind))
    assert torch.equal(logits(loaded, x), logits(result.model, x))
    for weight in (w for w in lilliput.core.select.weights(loaded) if w.layer == "cells"):
        assert int(torch.linalg.matrix_rank(weight.value.double(), rtol=1e-5)) == 4
        assert encoding_of(weight, Product) is not None
    with lilliput.artifact.open(result.artifact) as file:
        rows = {"LSTM": 64, "GRU": 48, "RNN": 16}[kind.__name__]
        assert file.dense("left/cells.weight_hh_l0").shape == (rows, 4)
        assert file.dense("right/cells.weight_hh_l0").shape == (4, 16)
        assert "cells.weight_hh_l0" not in file.names()
    lilliput.save(loaded, tmp_path / "again")
    again = lilliput.load(tmp_path / "again", model=Reader(kind))
    assert torch.equal(logits(again, x), logits(result.model, x))


def test_the_product_begins_as_the_nearest_matrix_and_at_full_rank_as_the_same() -> None:
    net = Reader()
    weight = next(w for w in lilliput.core.select.weights(net) if w.tensor == "weight_ih_l0")
    before = weight.value.detach().double()
    left, values, right = torch.linalg.svd(before, full_matrices=False)
    from lilliput.mechanisms.encodings import encode

    encode(weight, Product(5, 64, 12))
    best = left[:, :5] @ torch.diag(values[:5]) @ right[:5]
    torch.testing.assert_close(weight.value.double(), best, rtol=0, atol=1e-6)
    assert original_of(weight).shape == (5, 76)
    whole = Reader().double()
    weight = next(w for w in lilliput.core.select.weights(whole) if w.tensor == "weight_hh_l1")
    before = weight.value.detach().clone()
    encode(weight, Product(16, 64, 16))
    torch.testing.assert_close(weight.value, before, rtol=0, atol=1e-9)


def test_what_lies_on_a_product() -> None:
    """A mask does, and the file then has the whole matrix; shared values do not."""
    torch.manual_seed(0)
    task = MLP.task()
    stages = [Stage(methods=[m]) for m in (LowRank(rank={"cells": 4}), Magnitude(sparsity=0.5))]
    result = lilliput.compress(Reader(), task, stages)
    x = next(iter(task.validation)).inputs
    loaded = lilliput.load(result.artifact, model=Reader())
    assert torch.equal(logits(loaded, x), logits(result.model, x))
    assert float((loaded.cells.weight_hh_l0 == 0).float().mean()) == pytest.approx(0.5, abs=0.01)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="product of two factors"):
        lilliput.compress(Reader(), task, [stages[0], Stage(methods=[Codebook(bits=3)])])


# -- files ------------------------------------------------------------------------------------------------


def said(name: str, kind: Any, ranks: Any, **more: Any) -> dict[str, Any]:
    return {name: {"kind": kind, "ranks": ranks, **more}}


HOSTILE: dict[str, Any] = {
    "a list": [],
    "a text": "3",
    "no kind": {"3": {"ranks": [2]}},
    "another kind": said("3", "qr", [2]),
    "no ranks": said("3", "channel", "2"),
    "rank 0": said("3", "channel", [0]),
    "a fraction": said("3", "channel", [2.5]),
    "true": said("3", "channel", [True]),
    "more": said("3", "channel", [2], x=1),
    "the root": said("", "svd", [2]),
    "deep": {k: v for n in range(5) for k, v in said(f"9{'.0' * n}", "svd", [2]).items()},
}
OTHERS: dict[str, Any] = {
    "no such layer": said("33", "svd", [2]),
    "too high": said("3", "channel", [9]),
    "one rank": said("3", "tucker", [2]),
    "no layer": said("2", "svd", [2]),
    "linear": said("9", "tucker", [2, 2]),
    "inside": said("9.weight", "svd", [1]),
}


@pytest.mark.parametrize("name", [*HOSTILE, *OTHERS])
def test_a_hostile_description_changes_nothing(name: str, tmp_path: Path) -> None:
    from lilliput import artifact, io
    from lilliput.errors import CorruptArtifact, ModelMismatch

    net = CNN.build()
    described = HOSTILE.get(name, OTHERS.get(name))
    artifact.write(tmp_path / "net", io.parts(net), structure={"factors": described})
    fresh = CNN.build(seed=1)
    before, modules = copy.deepcopy(fresh.state_dict()), list(fresh.modules())
    kind = CorruptArtifact if name in HOSTILE else ModelMismatch
    with pytest.raises(kind):
        lilliput.load(tmp_path / "net", model=fresh)
    assert list(fresh.modules()) == modules
    assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())


def test_hostile_factors_of_a_matrix(tmp_path: Path) -> None:
    from lilliput import artifact, io
    from lilliput.errors import CorruptArtifact, ModelMismatch

    net = Reader()
    good = io.parts(net)
    matrix = good.pop("cells.weight_hh_l0")
    left, right = np.ones((64, 2), np.float32), np.ones((2, 16), np.float32)
    name = "cells.weight_hh_l0"
    broken: list[tuple[dict[str, Any], Any]] = [
        ({f"left/{name}": left}, CorruptArtifact),
        ({f"left/{name}": left, f"right/{name}": right[:1]}, CorruptArtifact),
        ({f"left/{name}": left[0], f"right/{name}": right}, CorruptArtifact),
        ({f"left/{name}": left, f"right/{name}": right, name: matrix}, CorruptArtifact),
        ({f"left/{name}": np.ones((99_999, 2), np.float32),
          f"right/{name}": np.ones((2, 99_999), np.float32)}, ModelMismatch),
    ]  # fmt: skip
    for parts, kind in broken:
        artifact.write(tmp_path / "net", good | parts)
        with pytest.raises(kind):
            lilliput.load(tmp_path / "net", model=Reader())


def test_a_recipe_s_weights_may_be_a_factorized_artifact(tmp_path: Path) -> None:
    from lilliput import io

    net = lilliput.build("digits_cnn")
    factorize(net, "conv3", "tucker", (8, 16))
    lilliput.save(net, tmp_path / "net.safetensors")
    filled = io.load_weights(lilliput.build("digits_cnn"), tmp_path / "net.safetensors")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(logits(filled, x), logits(net, x))
    assert torch.equal(logits(lilliput.load(tmp_path / "net.safetensors"), x), logits(net, x))


def test_unfoldings() -> None:
    w = drawn(1, 3, 2, 2, 2)
    by_out, by_in = unfolded(w)
    assert torch.equal(by_out[0, 2], w[0, 2].flatten())
    assert torch.equal(by_in[0, 1], w[0, :, 1].flatten())
