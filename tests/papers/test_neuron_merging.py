"""Srinivas, Babu 2015: data-free parameter pruning."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lilliput
import lilliput.testing
from lilliput import Task, accuracy
from lilliput.errors import InputError, NothingMatched
from lilliput.methods.prune.neuron_merging import NeuronMerging, merges, mode_of, saliencies

Array = np.ndarray


def draws(seed: int, neurons: int = 6, inputs: int = 4, outputs: int = 3) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(neurons, inputs + 1)), rng.normal(size=(neurons, outputs))


def layer(x: Array, incoming: Array, outgoing: Array) -> Array:
    """The next layer's input without its bias, for rows x."""
    return np.asarray(np.maximum(np.c_[x, np.ones(len(x))] @ incoming.T, 0) @ outgoing)


# -- the saliency -----------------------------------------------------------------------------


def test_saliency_is_the_papers() -> None:
    incoming, outgoing = draws(0)
    found = saliencies(incoming, outgoing)
    for i, j in itertools.permutations(range(6), 2):
        wanted = np.mean(outgoing[j] ** 2) * np.sum((incoming[i] - incoming[j]) ** 2)
        assert found[i, j] == pytest.approx(wanted)
    assert np.isinf(found.diagonal()).all()


def test_saliency_is_not_symmetric() -> None:
    incoming, outgoing = draws(1)
    outgoing[2] = 10 * outgoing[0]
    found = saliencies(incoming, outgoing)
    assert found[0, 2] == pytest.approx(100 * found[2, 0])


def test_scaling_what_leaves_a_neuron_scales_its_saliency() -> None:
    incoming, outgoing = draws(2)
    before = saliencies(incoming, outgoing)
    outgoing[3] *= 5
    after = saliencies(incoming, outgoing)
    others = [n for n in range(6) if n != 3]
    assert after[others, 3] == pytest.approx(25 * before[others, 3])
    assert after[3, others] == pytest.approx(before[3, others])


def test_the_bias_counts() -> None:
    incoming = np.array([[1.0, 2.0, 0.0], [1.0, 2.0, 3.0]])
    assert saliencies(incoming, np.ones((2, 1)))[0, 1] == pytest.approx(9.0)


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_saliency_bounds_the_change_of_the_output(seed: int) -> None:
    """ReLU rises by at most 1: mean over outputs of the squared change <= s_ij * |x, 1|**2."""
    incoming, outgoing = draws(seed)
    first = next(merges(incoming, outgoing))
    x = np.random.default_rng(seed + 1).normal(size=(50, 4))
    thin, others = merged(outgoing, first.removed, first.into)
    change = layer(x, incoming, outgoing) - layer(x, incoming[others], thin)
    bound = first.saliency * ((x**2).sum(1) + 1)
    assert ((change**2).mean(1) <= bound + 1e-12).all()


# -- the removals -----------------------------------------------------------------------------


def merged(outgoing: Array, removed: int, into: int) -> tuple[Array, list[int]]:
    after = outgoing.copy()
    after[into] += after[removed]
    others = [n for n in range(len(outgoing)) if n != removed]
    return after[others], others


def brute_force(incoming: Array, outgoing: Array, surgery: bool) -> list[tuple[int, int, float]]:
    """All saliencies anew for each removal."""
    alive, outgoing, found = list(range(len(incoming))), outgoing.copy(), []
    while len(alive) > 1:
        pairs = [
            (np.mean(outgoing[j] ** 2) * np.sum((incoming[i] - incoming[j]) ** 2), j, i)
            for i, j in itertools.permutations(alive, 2)
        ]
        saliency, j, i = min(pairs)
        if surgery:
            outgoing[i] += outgoing[j]
        alive.remove(j)
        found.append((j, i, saliency))
    return found


@given(st.integers(2, 12), st.integers(0, 1000), st.booleans())
@settings(max_examples=80, deadline=None)
def test_updating_gives_what_computing_anew_gives(neurons: int, seed: int, surgery: bool) -> None:
    incoming, outgoing = draws(seed, neurons)
    found = list(merges(incoming, outgoing, surgery=surgery))
    wanted = brute_force(incoming, outgoing, surgery)
    assert [(m.removed, m.into) for m in found] == [w[:2] for w in wanted]
    assert [m.saliency for m in found] == pytest.approx([w[2] for w in wanted])


def test_a_copied_neuron_goes_first_and_nothing_changes() -> None:
    incoming, outgoing = draws(5)
    incoming[4] = incoming[1]
    first = next(merges(incoming, outgoing))
    assert {first.removed, first.into} == {1, 4}
    assert first.saliency == pytest.approx(0, abs=1e-13)
    x = np.random.default_rng(0).normal(size=(40, 4))
    thin, others = merged(outgoing, first.removed, first.into)
    assert layer(x, incoming[others], thin) == pytest.approx(
        layer(x, incoming, outgoing), abs=1e-13
    )


def test_a_neuron_without_a_follower_goes_first() -> None:
    incoming, outgoing = draws(6)
    outgoing[3] = 0
    first = next(merges(incoming, outgoing))
    assert (first.removed, first.saliency) == (3, 0)


def test_without_surgery_the_error_is_larger() -> None:
    """Half of 40 neurons, each of which has a near twin."""
    rng = np.random.default_rng(7)
    base, outgoing = rng.normal(size=(20, 9)), rng.normal(size=(40, 5))
    incoming = np.concatenate([base, base + 0.1 * rng.normal(size=base.shape)])
    x = rng.normal(size=(200, 8))
    error = {}
    for surgery in (True, False):
        thin, alive = outgoing.copy(), np.ones(40, bool)
        for merge in itertools.islice(merges(incoming, outgoing, surgery=surgery), 20):
            thin[merge.into] += surgery * thin[merge.removed]
            alive[merge.removed] = False
        change = layer(x, incoming[alive], thin[alive]) - layer(x, incoming, outgoing)
        error[surgery] = float((change**2).mean())
    assert error[True] < 0.05 * error[False]


def test_mode_is_the_highest_bar() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(5.0, 0.5, 4000), [0.0, 20.0, np.inf]])
    assert mode_of(values) == pytest.approx(5.0, abs=0.3)


# -- the method -------------------------------------------------------------------------------


class Forbidden:
    """Batches that must not be read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the method is data-free")


def mlp(width: int = 24) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 3)
        ).double()


def cnn() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(32, 3),
        )  # fmt: skip
        for _ in range(5):  # statistics that are not the initial ones
            net(torch.randn(16, 1, 8, 8) * 3 + 1)
        return net.double().eval()


def merge(model: nn.Module, inputs: torch.Tensor, **settings: Any) -> tuple[nn.Module, list[Any]]:
    """Only validation inputs may be read, as the example whose shape tells the channels."""
    thin = copy.deepcopy(model)
    task = Task(Forbidden(), [(inputs, None)], None, nn.functional.cross_entropy, accuracy)
    method = NeuronMerging(**{"round_to": 1, **settings})
    changes = lilliput.attach(thin, method, task=task).finish()
    return thin, [(c.where, c.before, c.after) for c in changes if c.what == "channels"]


X = torch.from_numpy(np.random.default_rng(0).normal(size=(32, 6)))
IMAGES = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 1, 8, 8)))


def test_twins_are_merged_without_loss() -> None:
    model = mlp()
    with torch.no_grad():
        for layer, pairs in ((model[0], ((3, 9), (4, 9), (5, 6))), (model[2], ((0, 15),))):
            for one, other in pairs:
                layer.weight[one], layer.bias[one] = layer.weight[other], layer.bias[other]
    thin, changes = merge(model, X, count={"0": 3, "2": 1})
    assert changes == [("0", 24, 21), ("2", 16, 15)]
    assert torch.allclose(thin(X), model(X), rtol=0, atol=1e-14)
    without, _ = merge(model, X, count={"0": 3, "2": 1}, surgery=False)
    assert not torch.allclose(without(X), model(X), atol=1e-3)


def test_channels_of_convolutions_and_through_batch_normalization() -> None:
    """Equal after the normalization, although neither filters nor statistics are equal."""
    model = cnn()
    norm = model[1]
    with torch.no_grad():
        model[0].weight[2] = 2 * model[0].weight[4]
        norm.running_mean[2] = 2 * norm.running_mean[4] + 1
        norm.running_var[2] = 4 * norm.running_var[4] + 3 * norm.eps
        norm.bias[4] = norm.bias[2] - 0.5 / (norm.running_var[4] + norm.eps).sqrt()
        model[3].weight[1], model[3].bias[1] = model[3].weight[7], model[3].bias[7]
    thin, changes = merge(model, IMAGES, count=1, convolutions=True)
    assert changes == [("0", 6, 5), ("3", 8, 7)]
    assert torch.allclose(thin(IMAGES), model(IMAGES), rtol=0, atol=1e-13)


class Between(nn.Module):
    """Something that is no module stands before the first normalization."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.between = between
        self.first, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.second, self.other = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        self.end = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.between(self.first(x)))
        out: torch.Tensor = self.end(self.other(input=self.second(x)).relu().mean((2, 3)))
        return out


@pytest.mark.parametrize("between", [torch.relu, torch.relu_, lambda x: 2 * x])
def test_only_a_normalization_of_the_output_itself_is_folded(between: Any) -> None:
    _, changes = merge(Between(between).double().eval(), IMAGES, keep=0.5, convolutions=True)
    assert changes == [("second", 6, 3), ("first", 6, 6)]
    _, changes = merge(Between(lambda x: x).double().eval(), IMAGES, keep=0.5, convolutions=True)
    assert changes == [("first", 6, 3), ("second", 6, 3)]


def test_only_linear_layers_unless_asked() -> None:
    with pytest.raises(NothingMatched, match="convolutions: true"):
        merge(cnn(), IMAGES, keep=0.5)


def test_what_cannot_be_merged_stays_whole() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.inner = nn.Linear(6, 12), nn.Linear(12, 12)
            self.back, self.end = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.start(x)
            out: torch.Tensor = self.end(h + self.back(self.inner(h).relu()))
            return out

    _, changes = merge(Residual().double(), X, keep=0.5)
    assert changes == [("inner", 12, 6), ("start", 12, 12)]


def test_a_later_layer_is_merged_as_the_earlier_one_has_left_it() -> None:
    together, _ = merge(mlp(), X, keep=0.5)
    first, _ = merge(mlp(), X, keep=0.5, layers="0")
    both, _ = merge(first, X, keep=0.5, layers="2")
    expected = both.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in together.state_dict().items())


def test_the_result_does_not_depend_on_data() -> None:
    one, _ = merge(mlp(), X, keep=0.4)
    other, _ = merge(mlp(), torch.zeros(1, 6).double(), keep=0.4)
    expected = other.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in one.state_dict().items())


def test_merged_weights_are_sums_of_the_dense_ones() -> None:
    model = mlp()
    thin, _ = merge(model, X, keep=0.5, layers="0")
    kept = [
        next(n for n in range(24) if torch.equal(row, model[0].weight[n]))
        for row in thin[0].weight  # type: ignore[index]
    ]
    columns = np.asarray(model[2].weight.detach()).T.copy()
    for m in itertools.islice(
        merges(np.c_[model[0].weight.detach(), model[0].bias.detach()], columns), 12
    ):
        columns[m.into] += columns[m.removed]
    assert np.asarray(thin[2].weight.detach()) == pytest.approx(columns[kept].T)  # type: ignore[index]


def test_heuristic_stops_at_the_mode() -> None:
    """24 neurons in 8 tight clusters: what lies below the mode of all distances is the clusters."""
    model = mlp()
    with torch.no_grad():
        for layer in (0, 2):  # the second layer is merged with its dense rows untouched
            rows = model[layer].weight
            rows.copy_(rows[:8].repeat(-(-len(rows) // 8), 1)[: len(rows)] + 1e-3 * rows)
        model[0].bias.copy_(model[0].bias[:8].repeat(3))
    _, changes = merge(model, X, layers="0", heuristic=1.0)
    assert changes[0][2] <= 8
    _, half = merge(model, X, layers="0", heuristic=0.5)
    assert half[0][2] == 24 - round((24 - changes[0][2]) / 2)


def test_a_count_is_rounded_to_the_widths_asked_for() -> None:
    _, changes = merge(mlp(), X, layers="0", count=10, round_to=8)
    assert changes == [("0", 24, 16)]


def test_masked_and_clustered_weights_are_merged() -> None:
    """A mask opens for what is merged in; shared values stay shared."""
    methods, net = lilliput.methods, lilliput.testing.NETWORKS[0]
    dense = net.build()
    for encode in (methods.Magnitude(sparsity=0.5, remove_dead=False), methods.Codebook(bits=3)):
        only = NeuronMerging(keep=0.5, round_to=1, layers="0")
        model = lilliput.compress(dense, net.task(), [encode, only]).model
        base = lilliput.compress(dense, net.task(), [encode]).model
        merged, plain = model[3].weight, base[3].weight  # type: ignore[index]
        assert merged.shape == (16, 12)
        if isinstance(encode, methods.Codebook):
            assert set(merged.unique().tolist()) <= set(plain.unique().tolist())
        else:
            assert float((merged == 0).float().mean()) < float((plain == 0).float().mean())
        assert any(not any(torch.equal(column, other) for other in plain.T) for column in merged.T)


def test_exactly_one_amount() -> None:
    for settings_ in ({}, {"keep": 0.5, "count": 3}, {"heuristic": 0.5, "keep": 0.5}):
        with pytest.raises(InputError, match="exactly one"):
            NeuronMerging(**settings_)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="surgery"):
        NeuronMerging(keep=0.5, fold="constant")


def test_a_count_for_layers_that_are_not_there() -> None:
    with pytest.raises(NothingMatched, match=r"no pattern of count.*nowhere"):
        merge(mlp(), X, count={"nowhere": 3})
