"""How tensors become the parts of a file, and what of a file cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn
from torch.nn.utils import prune

import lilliput
from lilliput import artifact
from lilliput.artifact import Coded
from lilliput.core.select import weights
from lilliput.errors import CorruptArtifact, InputError
from lilliput.mechanisms.encodings import Codebook, IntegerGrid, LowRank, encode, encoding_of


def saved(model: nn.Module, folder: Path) -> Path:
    lilliput.save(model, file := folder / "net.safetensors")
    return file


def test_pruned_weights_are_zeros_without_a_sign(tmp_path: Path) -> None:
    """Torch's own mask leaves a negative zero of each negative weight: a value for the codecs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 300, bias=False))
    prune.l1_unstructured(net[0], "weight", 0.9)
    prune.remove(net[0], "weight")
    assert torch.signbit(net[0].weight[net[0].weight == 0]).any()
    file = saved(net, tmp_path)
    with artifact.open(file) as opened:
        entry = opened.info("0.weight")
        assert entry.nonzeros == 9_000
        assert sum(length for length, _ in entry.parts) < 9_000 * 5.2
    loaded = lilliput.load(file, model=nn.Sequential(nn.Linear(300, 300, bias=False)))
    assert torch.equal(loaded[0].weight, net[0].weight)  # type: ignore[index]
    assert not torch.signbit(loaded[0].weight[loaded[0].weight == 0]).any()  # type: ignore[index]


@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(max_dims=2, min_side=0, max_side=40),
        elements=st.integers(-400, 400).map(float)
        | st.sampled_from([-0.0, 2.5, float("nan"), 2.0**25]),
    ),
    st.booleans(),
)
def test_codes_of_any_values(values: np.ndarray, frequent_first: bool) -> None:
    coded = Coded.of(values, frequent_first=frequent_first)
    assert np.array_equal(coded.codebook[coded.codes], values, equal_nan=True)
    if frequent_first and values.size:
        counts = np.bincount(coded.codes.reshape(-1))
        assert counts[0] == counts.max()


def test_codes_beyond_a_byte_and_values_beyond_32_bits() -> None:
    many = Coded.of(np.arange(300.0))
    assert many.codes.dtype == np.uint16
    assert many.codebook[many.codes].tolist() == list(range(300))
    for wrong in (np.array([0.1]), np.array([2**25 + 1])):
        with pytest.raises(InputError, match="float32"):
            Coded.of(wrong)


def test_integers_of_more_than_eight_bits_are_whole(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    (weight,) = weights(net)
    encode(weight, IntegerGrid(12, 1.0))
    expected = weight.value.detach().clone()
    loaded = lilliput.load(saved(net, tmp_path), model=nn.Sequential(nn.Linear(64, 64)))
    assert torch.equal(loaded[0].weight, expected)  # type: ignore[index]


def test_shared_values_of_64_bits_are_not_rounded(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(20, 20)).double()
    (weight,) = weights(net)
    encode(weight, Codebook.fitted(weight.value, 3, "exact"))
    with torch.no_grad():
        net[0].parametrizations.weight.original.add_(1e-9)  # type: ignore[union-attr]
    expected = weight.value.detach().clone()
    loaded = lilliput.load(saved(net, tmp_path), model=nn.Sequential(nn.Linear(20, 20)).double())
    assert torch.equal(loaded[0].weight, expected)  # type: ignore[index]


def test_factors_are_taken_as_they_are(tmp_path: Path, monkeypatch: Any) -> None:
    """A decomposition of the product would take seconds, and be thrown away."""
    net = nn.Sequential(nn.LSTM(6, 8))
    for weight in weights(net):
        encode(weight, LowRank(2, *weight.value.shape))
    file = saved(net, tmp_path)
    monkeypatch.delattr(torch.linalg, "svd")
    loaded = lilliput.load(file, model=nn.Sequential(nn.LSTM(6, 8)))
    for weight, again in zip(weights(net), weights(loaded), strict=True):
        assert torch.equal(again.value, weight.value)
        product = encoding_of(again, LowRank)
        assert product is not None and product.rank == 2


@pytest.mark.parametrize("name", ["scales/x", "left/x", "right/x", "tasks/x"])
def test_names_that_mean_something_else_in_a_file_are_refused(name: str, tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    net.register_buffer(name, torch.zeros(2))
    with pytest.raises(InputError, match=f"'{name}' cannot be saved"):
        saved(net, tmp_path)


def test_tensors_that_are_no_arrays_are_named(tmp_path: Path) -> None:
    for odd in (torch.zeros(2, device="meta"), torch.eye(2).to_sparse()):
        net = nn.Linear(2, 2)
        net.register_buffer("odd", odd)
        with pytest.raises(InputError, match="odd cannot be saved"):
            saved(net, tmp_path)


GRID = {"structure": {"grids": {"weight": 4}}}
FINE = {"weight": np.ones((2, 2), np.float32), "bias": np.zeros(2, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "structure"),
    [
        ({"weight": np.ones((2, 2), np.uint32), "scales/weight": np.ones(2, np.float32)}, GRID),
        ({"weight": np.ones((2, 2), np.float32), "scales/weight": np.ones(2, np.uint16)}, GRID),
        ({"weight": np.ones((0, 2), np.float32), "scales/weight": np.ones(0, np.float32)}, GRID),
        ({"left/weight": np.ones((2, 1), np.float64), "right/weight": np.ones((1, 2), "f4")}, {}),
        ({"left/weight": np.full((2, 1), np.nan, "f4"), "right/weight": np.ones((1, 2), "f4")}, {}),
        ({"left/weight": np.ones((2, 1), np.int32), "right/weight": np.ones((1, 2), np.int32)}, {}),
    ],
)
def test_forms_that_cannot_be(
    tensors: dict[str, Any], structure: dict[str, Any], tmp_path: Path
) -> None:
    artifact.write(tmp_path / "x", {"bias": FINE["bias"], **tensors}, **structure)
    with pytest.raises(CorruptArtifact):
        lilliput.load(tmp_path / "x", model=nn.Linear(2, 2))
