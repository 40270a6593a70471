"""The true change of the loss when a channel is removed, and rank correlations with it."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.core.select import weights
from lilliput.errors import EmptyData
from lilliput.measure.oracle import oracle, rank_correlation
from lilliput.mechanisms.encodings import Codebook, Mask, encode
from lilliput.mechanisms.groups import Group, Member, find_groups
from lilliput.mechanisms.surgery import cut
from lilliput.testing import NETWORKS

MLP, CNN, TRANSFORMER = NETWORKS


def data_of(network: Any, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(b.inputs, b.target) for b in list(network.task().validation)[:count]]


def mean_loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        each = [F.cross_entropy(model(x), y, reduction="none") for x, y in data]
    return float(torch.cat(each).double().mean())


@pytest.mark.parametrize("network", [MLP, CNN], ids=["mlp", "cnn"])
def test_the_oracle_is_what_cutting_one_channel_does(network: Any) -> None:
    model, data = network.build(), data_of(network)
    data[1] = data[1][0][:7], data[1][1][:7]  # a mean over examples, not over batches
    groups = find_groups(model, data[0][0])
    whole = mean_loss(model, data)
    changes = oracle(model, groups.groups, data, F.cross_entropy, absolute=False)
    for number, group in enumerate(groups.groups):
        for channel in range(group.channels):
            thin = copy.deepcopy(model)
            cut(thin, find_groups(thin, data[0][0]), {number: np.array([channel])})
            expected = mean_loss(thin, data) - whole
            assert changes[number][channel] == pytest.approx(expected, abs=2e-6)


def test_absolute_is_the_size_of_the_signed_change() -> None:
    model, data = MLP.build(), data_of(MLP)
    groups = find_groups(model, data[0][0]).groups
    signed = oracle(model, groups, data, F.cross_entropy, absolute=False)
    absolute = oracle(model, groups, data, F.cross_entropy)
    assert min(change.min() for change in signed) < 0
    for one, other in zip(absolute, signed, strict=True):
        np.testing.assert_array_equal(one, np.abs(other))


def test_a_channel_that_nothing_hears_changes_nothing() -> None:
    model, data = MLP.build(), data_of(MLP)
    with torch.no_grad():
        model[3].weight[:, 5] = 0  # type: ignore[index]
    changes = oracle(model, find_groups(model, data[0][0]).groups, data, F.cross_entropy)
    assert changes[0][5] == 0
    assert (np.delete(changes[0], 5) > 0).any()


def test_attention_can_be_asked_too() -> None:
    model, data = TRANSFORMER.build(), data_of(TRANSFORMER, 1)
    groups = find_groups(model, data[0][0]).groups
    changes = oracle(model, groups, data, F.cross_entropy)
    assert [len(change) for change in changes] == [g.channels for g in groups]
    assert all((change > 0).any() for change in changes)


def test_the_model_stays_as_it_is() -> None:
    model, data = CNN.build().train(), data_of(CNN)
    model[1].eval()  # type: ignore[index]
    state = copy.deepcopy(model.state_dict())
    oracle(model, find_groups(model, data[0][0]).groups, data, F.cross_entropy)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model][:3] == [True, False, True]  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_encoded_weights_count_as_what_they_compute() -> None:
    model, data = MLP.build(), data_of(MLP)
    plain = copy.deepcopy(model)
    for weight, other in zip(weights(model), weights(plain), strict=True):
        mask = torch.rand(weight.value.shape, generator=torch.Generator().manual_seed(1)) > 0.3
        encode(weight, Codebook.fitted(weight.value * mask, 4, "exact"))
        encode(weight, Mask(mask))
        other.module.weight.data = weight.value.detach().clone()
    groups = find_groups(plain, data[0][0]).groups
    for one, other in zip(
        oracle(model, groups, data, F.cross_entropy),
        oracle(plain, groups, data, F.cross_entropy),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_no_batches() -> None:
    model = MLP.build()
    with pytest.raises(EmptyData):
        oracle(model, find_groups(model, torch.zeros(2, 12)).groups, [], F.cross_entropy)


# -- rank correlation -----------------------------------------------------------------------------


def group(name: str, channels: int) -> Group:
    return Group(channels, (Member(f"{name}.weight", 0, "makes", np.arange(channels)[:, None]),))


def by_definition(scores: np.ndarray, truth: np.ndarray) -> float:
    """Pearson's correlation of the ranks; ties share the mean of their ranks."""

    def ranks(values: np.ndarray) -> np.ndarray:
        below = (values[None] < values[:, None]).sum(1)
        equal = (values[None] == values[:, None]).sum(1)
        return below + (equal - 1) / 2

    return float(np.corrcoef(ranks(scores), ranks(truth))[0, 1])


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=12))
def test_spearman_by_its_definition(pairs: list[tuple[int, int]]) -> None:
    scores, truth = np.array(pairs, dtype=float).T
    found = rank_correlation([group("a", len(pairs))], [scores], [truth])
    if np.ptp(scores) == 0 or np.ptp(truth) == 0:
        assert math.isnan(found.overall)
    else:
        assert found.overall == pytest.approx(by_definition(scores, truth), abs=1e-12)


def test_by_layer_and_over_all() -> None:
    groups = [group("a", 3), group("b", 3), group("c", 2), group("d", 1)]
    scores = [np.array([1.0, 2.0, 3.0]), np.array([30.0, 20.0, 10.0]), None, np.array([5.0])]
    truth = [np.array([4.0, 5.0, 6.0]), np.array([7.0, 8.0, 9.0]), np.zeros(2), np.array([1.0])]
    found = rank_correlation(groups, scores, truth)
    assert [(row.layer, row.channels) for row in found.layers] == [("a", 3), ("b", 3), ("d", 1)]
    assert [row.spearman for row in found.layers[:2]] == pytest.approx([1.0, -1.0])
    assert math.isnan(found.layers[2].spearman)
    assert found.mean == pytest.approx(0.0)
    together = [np.concatenate([part[0], part[1], part[3]]) for part in (scores, truth)]  # type: ignore[list-item]
    assert found.overall == pytest.approx(by_definition(*together))
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert written["layers"][1] == {"layer": "b", "channels": 3, "spearman": -1.0}
    assert written["layers"][2]["spearman"] is None


def test_nothing_to_correlate() -> None:
    found = rank_correlation([group("a", 2)], [None], [np.zeros(2)])
    assert math.isnan(found.overall)
    assert math.isnan(found.mean)
