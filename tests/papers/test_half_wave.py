"""Cai et al. 2017: half-wave Gaussian quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.select import select
from lilliput.errors import CorruptArtifact, InputError, NothingMatched
from lilliput.mechanisms.activations import HalfWave as Quantizer
from lilliput.mechanisms.encodings import Binary, encode, original_of
from lilliput.methods import FilterL1, HalfWave, Magnitude, PostTraining
from lilliput.methods.quantize.half_wave import half_wave_levels, squared_error
from lilliput.testing import NETWORKS

MLP, CNN, TRANSFORMER = NETWORKS


def test_the_constants_of_the_paper() -> None:
    """2 bits uniform 0.538, 1.076, 1.614; two free levels 0.453, 1.510; three by Lloyd; 3 bits uniform."""
    assert half_wave_levels(3, True) == pytest.approx([0.538, 1.076, 1.614], abs=3e-3)
    assert half_wave_levels(2, False) == pytest.approx([0.4528, 1.5104], abs=1e-4)
    assert half_wave_levels(3, False) == pytest.approx([0.318, 1.000, 1.894], abs=1e-3)
    assert half_wave_levels(7, True)[0] == pytest.approx(0.3215, abs=1e-3)


def test_the_error_is_that_of_samples_and_the_levels_are_its_minimum() -> None:
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = list(half_wave_levels(3, True))
    with torch.no_grad():
        found = (x - Quantizer(levels)(x))[x > 0].square().sum() / len(x)
    assert squared_error(levels) == pytest.approx(float(found), rel=0.02)
    step = levels[0]
    assert all(
        squared_error([s, 2 * s, 3 * s]) > squared_error(levels) for s in (0.98 * step, 1.02 * step)
    )


def test_intervals_by_hand() -> None:
    x = torch.tensor([-1.0, 0.0, 1e-6, 0.74, 0.76, 1.74, 1.76, 9.0])
    assert Quantizer([0.5, 1.0, 2.5])(x).tolist() == [0, 0, 0.5, 0.5, 1.0, 1.0, 2.5, 2.5]


@pytest.mark.parametrize(
    ("gate", "expected"),
    [("clipped", [0, 0, 1, 1, 0]), ("relu", [0, 0, 1, 1, 1]), ("log", [0, 0, 1, 1, 1 / 3])],
)
def test_the_gates(gate: str, expected: list[float]) -> None:
    x = torch.tensor([-1.0, 0.0, 0.3, 2.0, 4.0], requires_grad=True)
    Quantizer([1.0, 2.0], gate)(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor(expected, dtype=torch.float32))


def test_two_values_a_filter_and_an_unchanged_gradient() -> None:
    layer = nn.Conv2d(3, 4, 3)
    (weight,) = select(layer)
    known = weight.value.detach().clone()
    encode(weight, Binary(torch.ones_like(known), by_filter=True))
    for mine, before in zip(weight.value, known, strict=True):
        alpha = before.abs().mean()
        torch.testing.assert_close(mine, torch.where(before >= 0, alpha, -alpha))
    x = torch.randn(2, 3, 6, 6)
    plain = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        plain.weight.copy_(weight.value)
        plain.bias.copy_(layer.bias)  # type: ignore[union-attr,arg-type]
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(original_of(weight).grad, plain.weight.grad)


def trained(folder: Path | None = None, *more: Any, **settings: Any) -> Any:
    method = HalfWave(**{"layers": ["!0", "!9"], **settings})
    stages = [Stage(methods=[method], train=Train(epochs=3, lr=0.01)), *more]
    model: Any = CNN.build()
    with torch.no_grad():
        for norm in (model[1], model[4]):  # as if they had trained
            norm.weight.fill_(1.5)
            norm.bias.fill_(0.3)
    return lilliput.compress(model, CNN.task(), stages, directory=folder)


def test_a_network_of_levels_and_signs(tmp_path: Path) -> None:
    model = trained(tmp_path).model.eval()
    x = next(iter(CNN.task().validation)).inputs
    with torch.no_grad():
        assert len(model[:3](x).unique()) <= 4
        assert len(model[:6](x).unique()) <= 4
    assert all(len(f.unique()) == 2 for f in model[3].weight)
    assert len(model[0].weight.unique()) > 20
    for norm in (model[1], model[4]):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
        assert norm.weight.requires_grad


def test_the_file_keeps_signs_and_scales_apart(tmp_path: Path) -> None:
    result = trained(tmp_path)
    loaded = lilliput.load(result.artifact, model=CNN.build())
    assert torch.equal(loaded[3].weight, result.model[3].weight)  # type: ignore[index]
    with lilliput.artifact.open(result.artifact) as file:
        assert file.dense("scales/3.weight").shape == (8,)
        assert sorted(set(file.dense("3.weight").flatten().tolist())) == [-1.0, 1.0]
        tensors = {name: file.dense(name) for name in file.names()}
        structure = file.structure
    tensors["scales/3.weight"] = tensors["scales/3.weight"][:5]
    lilliput.artifact.write(tmp_path / "bad.safetensors", tensors, structure=structure)
    with pytest.raises(CorruptArtifact, match="one for each filter"):
        lilliput.load(tmp_path / "bad.safetensors", model=CNN.build())


def test_filters_that_a_mask_takes_whole_are_zeros_in_the_file(tmp_path: Path) -> None:
    """All weights of a filter have one magnitude, so a ranking takes whole filters."""
    stage = Stage(
        methods=[HalfWave(), Magnitude(sparsity=0.5, remove_dead=False)], train=Train(epochs=1)
    )
    model = lilliput.compress(MLP.build(), MLP.task(), [stage], directory=tmp_path).model
    filters = model[0].weight  # type: ignore[index]
    assert filters.isfinite().all()
    gone = (filters == 0).all(1)
    assert gone.any()
    assert all(len(f.unique()) == 2 for f in filters[~gone])


def test_activations_alone() -> None:
    model = trained(binary=False).model
    assert len(model[3].weight.unique()) > 100
    assert isinstance(model[2], Quantizer)


def test_thinned_afterwards() -> None:
    model = trained(
        None, Stage(methods=[FilterL1(keep=0.5, round_to=1)], train=Train(epochs=1))
    ).model
    assert model[3].weight.shape[:2] == (4, 3)
    assert all(len(f.unique()) == 2 for f in model[3].weight)


def test_what_is_quantized_already_is_told() -> None:
    first = Stage(methods=[PostTraining()], train=Train(epochs=0))
    then = Stage(methods=[HalfWave()], train=Train(epochs=1))
    with pytest.raises(InputError, match=r"integers of 8 bits already.*Leave it out"):
        lilliput.compress(CNN.build(), CNN.task(), [first, then])


def test_what_cannot_be_replaced() -> None:
    with pytest.raises(NothingMatched, match="inside forward"):
        HalfWave().check(TRANSFORMER.build())
    with pytest.raises(NothingMatched, match="covers no activation"):
        HalfWave(activations="zz").check(CNN.build())
    with pytest.raises(InputError, match="ascending"):
        Quantizer([1.0, 0.5])
