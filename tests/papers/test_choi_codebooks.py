"""Choi, El-Khamy, Lee 2017: Hessian-weighted and entropy-constrained codebooks."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.core.types import Batch
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError
from lilliput.mechanisms import scalar_quantizers
from lilliput.mechanisms.clustering import kmeans
from lilliput.mechanisms.curvature import diagonal, one_by_one, second_moments
from lilliput.mechanisms.encodings import Codebook, encode, encoding_of, original_of, share_codebook
from lilliput.mechanisms.scalar_quantizers import entropy, entropy_constrained, uniform
from lilliput.methods import EntropyCodebook, HessianCodebook, Magnitude
from lilliput.testing import NETWORKS

MLP, CNN, _ = NETWORKS


def drawn(count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_t(4, count), random.exponential(size=count)


@given(st.integers(0, 1000), st.integers(2, 12), st.floats(0.0, 0.5))
def test_the_objective_never_rises(seed: int, clusters: int, penalty: float) -> None:
    w, h = drawn(200, seed)
    history = entropy_constrained(w, h, clusters, penalty, tolerance=0.0).history
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(history))


def test_without_a_penalty_it_is_weighted_k_means() -> None:
    """Each value belongs to the nearest center, and each center is the weighted mean of its values."""
    w, h = drawn()
    found = entropy_constrained(w, h, 8, 0.0, tolerance=0.0)
    nearest = np.abs(w[:, None] - found.centroids).argmin(1)
    assert np.array_equal(found.codes, nearest)
    for j, center in enumerate(found.centroids):
        mine = found.codes == j
        assert center == pytest.approx((h[mine] * w[mine]).sum() / h[mine].sum())


def test_a_higher_penalty_means_less_entropy() -> None:
    w, h = drawn(2000)
    bits = [entropy(entropy_constrained(w, h, 32, p).codes) for p in (0.0, 0.001, 0.01, 0.1, 1.0)]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > 3 > 1 > bits[-1]


def test_it_beats_k_means_at_the_same_entropy() -> None:
    """What the paper is about: fewer bits for the same distortion, once codes are of variable length."""
    w, h = drawn(4000)
    ecsq = entropy_constrained(w, h, 64, 0.005)
    distortion = float((h * (w - ecsq.centroids[ecsq.codes]) ** 2).sum())
    for clusters in range(2, 64):
        plain = kmeans(w, clusters, init="exact", weights=h)
        if plain.distortion <= distortion:
            assert entropy(plain.codes.astype(np.int64)) > entropy(ecsq.codes)
            return
    raise AssertionError("no k-means was as good")


@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_cells_of_many_values_lead_to_the_same_codebook(penalty: float, monkeypatch: Any) -> None:
    w, h = drawn(20_000)
    h[:100] = 0.0
    whole = entropy_constrained(w, h, 32, penalty)
    monkeypatch.setattr(scalar_quantizers, "LIMIT", 100)
    found = entropy_constrained(w, h, 32, penalty)
    assert len(found.codes) == len(w)
    assert found.history[-1] == pytest.approx(whole.history[-1], rel=0.01)


def test_unit_curvature_is_plain_k_means_and_none_at_all_moves_nothing() -> None:
    w, _ = drawn(300)
    ones = kmeans(w, 6, init="exact", weights=np.ones(300))
    plain = kmeans(w, 6, init="exact")
    assert np.array_equal(ones.centroids, plain.centroids)
    h = np.ones(301)
    h[-1] = 0.0
    with_outlier = entropy_constrained(np.append(w, 50.0), h, 6, 0.01)
    without = entropy_constrained(w, h[:-1], 6, 0.01)
    assert with_outlier.centroids.max() == pytest.approx(without.centroids.max(), rel=0.05)


def test_uniform_bins_by_hand() -> None:
    w = np.array([-1.2, -0.9, 0.2, 0.6, 1.4, 0.9])
    h = np.array([1.0, 3.0, 1.0, 0.0, 1.0, 1.0])
    found = uniform(w, h, 1.0)
    assert found.codes.tolist() == [0, 0, 1, 2, 2, 2]
    assert found.centroids == pytest.approx([(-1.2 - 2.7) / 4, 0.2, (1.4 + 0.9) / 2])


def test_the_diagonal_is_that_of_the_hessian() -> None:
    """Of a linear network, by autograd; and Adam's second moment by hand."""
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    model = nn.Linear(4, 3, bias=False).double()
    chosen, loss = select(model), nn.functional.cross_entropy
    (found,) = diagonal(model, chosen, one_by_one([Batch(x, y)], 6), loss)
    second = torch.autograd.functional.hessian(
        lambda w: loss(x @ w.view(3, 4).T, y), model.weight.detach().flatten()
    )
    torch.testing.assert_close(found.flatten(), second.diagonal())
    batches = [Batch(x[:3], y[:3]), Batch(x[3:], y[3:])]
    (moment,) = second_moments(model, chosen, batches, loss)
    gradients = []
    for batch in batches:
        model.weight.grad = None
        loss(model(batch.inputs), batch.target).backward()
        gradients.append(model.weight.grad)
    torch.testing.assert_close(moment, torch.stack(gradients).square().mean(0).sqrt())


class Values(Watcher):
    """How many values all layers together have, and what trains, at every step."""

    def __init__(self) -> None:
        self.values: list[set[float]] = []
        self.originals: list[int] = []

    def step_done(self, run: Run) -> None:
        chosen = select(run.model)
        self.values.append({v for w in chosen for v in w.value.detach().flatten().tolist()})
        self.originals.append(len({id(original_of(w)) for w in chosen}))


def compressed(method: Any, epochs: int = 2, before: Any = None, **more: Any) -> Any:
    stages = [Stage(methods=[before], train=Train(epochs=1))] if before else []
    stages.append(Stage(methods=[method], train=Train(epochs=epochs, lr=1e-2)))
    return lilliput.compress(CNN.build(), CNN.task(), stages, **more)


METHODS = [
    HessianCodebook(bits=3, samples=16),
    HessianCodebook(bits=3, samples=16, curvature="adam"),
    HessianCodebook(bits=3, curvature="none"),
    EntropyCodebook(clusters=16, samples=16),
    EntropyCodebook(quantizer="uniform", step=1.0, samples=16),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_all_layers_share_one_codebook_and_train_it(method: Any) -> None:
    watcher = Values()
    compressed(method, watchers=[watcher])
    assert set(watcher.originals) == {1}
    assert len(watcher.values[0]) <= (7 if "Hessian" in repr(method) else 40)
    assert all(len(values) == len(watcher.values[0]) for values in watcher.values)
    assert watcher.values[0] != watcher.values[-1]


def test_the_gradient_of_a_shared_value_is_the_sum_over_all_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    plain = copy.deepcopy(model)
    x = torch.randn(5, 3)
    for weight in select(model):
        codes = (weight.value.detach() > 0).int() + 1
        encode(weight, Codebook(codes, torch.tensor([-0.3, 0.4]), "both"))
    share_codebook(select(model))
    with torch.no_grad():
        for mine, weight in zip(plain, select(model), strict=True):
            mine.weight.copy_(weight.value)
    (model(x).square().sum()).backward()
    (plain(x).square().sum()).backward()
    gradient = original_of(select(model)[0]).grad
    assert gradient is not None
    expected = [
        sum(float(layer.weight.grad[layer.weight == v].sum()) for layer in plain)
        for v in (-0.3, 0.4)
    ]
    torch.testing.assert_close(gradient, torch.tensor(expected))
    assert len({id(p) for p in model.parameters()}) == 3


def test_layers_of_their_own() -> None:
    watcher = Values()
    compressed(HessianCodebook(bits=2, samples=16, joint=False), watchers=[watcher])
    assert set(watcher.originals) == {3}


def test_zeros_stay_zeros_and_are_not_clustered() -> None:
    pruned = Magnitude(sparsity=0.6, remove_dead=False)
    model = compressed(EntropyCodebook(clusters=8, samples=16), before=pruned).model
    for weight in select(model):
        assert int((weight.value == 0).sum()) == round(0.6 * weight.value.numel())


def test_the_file_holds_the_codebook_once(tmp_path: Path) -> None:
    result = compressed(HessianCodebook(bits=3, samples=16), directory=tmp_path)
    with lilliput.artifact.open(result.artifact) as file:
        books = {t.name: t for t in file.report().tensors if t.codec not in ("raw", "f16")}
        values = {v for name in books for v in np.unique(file.dense(name)).tolist()}
    assert len(values - {0.0}) <= 7


def test_a_later_mask_does_not_part_what_is_shared() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for weight in select(model):
        codes = (weight.value.detach() > 0).int() + 1
        encode(weight, Codebook(codes, torch.tensor([-0.3, 0.4]), "both"))
    share_codebook(select(model))
    from lilliput.mechanisms.encodings import Mask, bake

    encode(select(model)[0], Mask(torch.rand(4, 3) > 0.5))
    first, second = (original_of(w) for w in select(model))
    assert first is second
    copied = copy.deepcopy(model)
    first, second = (original_of(w) for w in select(copied))
    assert first is second
    book = encoding_of(select(copied)[1], Codebook)
    assert book is not None
    assert book.shared[0] is first
    before = [w.value.detach().clone() for w in select(model)]
    baked = bake(model)
    assert all(torch.equal(w.value, b) for w, b in zip(select(baked), before, strict=True))


def test_curvature_that_is_zero_is_told() -> None:
    with pytest.raises(InputError, match="zero for every weight"):
        entropy_constrained(np.ones(3), np.zeros(3), 2, 0.1)
    model = CNN.build()
    with torch.no_grad():
        for weight in select(model):
            weight.value.zero_()
    with pytest.raises(InputError, match="nothing to share"):
        stage = Stage(methods=[HessianCodebook(bits=3, curvature="none")], train=Train(epochs=0))
        lilliput.compress(model, CNN.task(), [stage])
