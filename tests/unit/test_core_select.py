"""Layer patterns, and which weights they offer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lilliput.core.select import example_device, matches, select, weights
from lilliput.errors import InputError, NothingMatched
from lilliput.mechanisms.encodings import Mask, encode


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", "a.b", True),
        ("a*", "a.b", True),
        ("a.?", "a.b", True),
        ("A*", "a.b", False),
        ("!head", "head", False),
        ("!head", "body", True),
        (["a*", "b*"], "b.c", True),
        (["a*", "!a.b"], "a.b", False),
        (["a*", "!a.b"], "a.c", True),
        (["a*", "!a.b"], "c", False),
        (["!a", "!b"], "c", True),
        ("[ab]", "b", True),
        ([], "anything", True),
    ],
)
def test_matches(pattern: str | list[str], name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_only_weights_that_multiply_are_offered() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2),
        nn.LSTM(2, 3), nn.MultiheadAttention(4, 2), nn.ConvTranspose2d(2, 3, 3), nn.GRUCell(2, 3),
    )  # fmt: skip
    assert [w.name for w in weights(model)] == [
        "0.weight", "4.weight", "5.weight_hh_l0", "5.weight_ih_l0", "6.in_proj_weight",
        "6.out_proj.weight", "7.weight", "8.weight_hh", "8.weight_ih",
    ]  # fmt: skip


def test_encoding_a_weight_changes_neither_order_nor_names() -> None:
    for model in (nn.LSTM(2, 3), nn.Sequential(nn.Linear(2, 3), nn.MultiheadAttention(4, 2))):
        before = [w.name for w in weights(model)]
        for weight in list(weights(model)):
            encode(weight, Mask(torch.ones_like(weight.value)))
        assert [w.name for w in weights(model)] == before


def test_a_model_that_is_one_layer() -> None:
    (weight,) = select(nn.Linear(3, 2))
    assert (weight.layer, weight.name) == ("", "weight")


def test_nothing_matched_names_the_nearest_layer_and_who_asked() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
    with pytest.raises(NothingMatched, match=r"magnitude: the pattern 'fc3' .*Did you mean 'fc.'"):
        select(model, "fc3", by="magnitude")
    with pytest.raises(NothingMatched, match="Known: fc1, fc2"):
        select(model, "zzz*")


def test_a_module_used_twice_is_offered_once() -> None:
    layer = nn.Linear(2, 2)
    assert len(select(nn.Sequential(layer, nn.ReLU(), layer))) == 1


def test_tied_weights_outside_the_pattern_do_not_matter() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert [w.name for w in select(model, "2")] == ["2.weight"]
    with pytest.raises(InputError, match="tied"):
        select(model, "1")


def test_example_device() -> None:
    assert example_device(nn.Linear(1, 1)) == torch.device("cpu")
    assert example_device(nn.BatchNorm1d(1, affine=False)) == torch.device("cpu")
    assert example_device(nn.ReLU()) == torch.device("cpu")
