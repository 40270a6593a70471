"""Hou, Yao, Kwok 2017: loss-aware binarization; and binary activations in files."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.engine.progress import Watcher
from lilliput.errors import CorruptArtifact, InputError, NothingMatched
from lilliput.mechanisms.activations import (
    BinaryActivation,
    replace_activation,
    replaced_activations,
)
from lilliput.mechanisms.encodings import Binary, encode, encoding_of, original_of
from lilliput.methods import Codebook, LossAwareBinary
from lilliput.testing import NETWORKS

MLP, CNN, _ = NETWORKS


def test_the_closed_form_is_the_best_of_all_signs_and_scales() -> None:
    """Of all 2^6 signs, each with its best scale, none has less sum(d (alpha b - w)^2)."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, generator=generator, dtype=torch.float64)
    d = torch.rand(6, generator=generator, dtype=torch.float64)
    best = min(
        float((d * (a * b - w).square()).sum())
        for signs in itertools.product((-1.0, 1.0), repeat=6)
        for b in [torch.tensor(signs, dtype=torch.float64)]
        for a in [(d * b * w).sum().clamp_min(0) / d.sum()]
    )
    found = Binary(d)(w)
    assert float((d * (found - w).square()).sum()) == pytest.approx(best)
    torch.testing.assert_close(Binary(torch.full_like(d, 3.0))(w).abs().unique()[0], w.abs().mean())
    assert Binary(d)(torch.tensor([0.0, -1.0] * 3).double())[0] > 0  # zero counts as plus
    assert set(Binary(d, fixed=1.0)(w).tolist()) == {-1.0, 1.0}


def test_the_gradient_is_taken_at_the_binary_weights_and_moves_the_others() -> None:
    layer = nn.Linear(5, 3)
    (weight,) = select(layer)
    encode(weight, Binary(torch.rand(3, 5)))
    x = torch.randn(7, 5)
    plain = nn.Linear(5, 3)
    with torch.no_grad():
        plain.weight.copy_(weight.value)
        plain.bias.copy_(layer.bias)
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(original_of(weight).grad, plain.weight.grad)


class Seen(Watcher):
    """Gradients, curvatures and what trains of the first layer after every step."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.curvatures: list[Tensor] = []
        self.originals: list[Tensor] = []
        self.effective: list[Tensor] = []

    def step_done(self, run: Run) -> None:
        weight = select(run.model)[0]
        encoding = encoding_of(weight, Binary)
        assert encoding is not None
        gradient = original_of(weight).grad
        if gradient is not None:
            self.gradients.append(gradient.clone())
        self.curvatures.append(encoding.curvature.clone())
        self.originals.append(original_of(weight).detach().clone())
        self.effective.append(weight.value.detach().clone())


def run(network: Any = CNN, train: Train | None = None, **settings: Any) -> tuple[Any, Seen]:
    watcher = Seen()
    train = train or Train(epochs=4, lr=0.05)
    stage = Stage(methods=[LossAwareBinary(**settings)], train=train)
    result = lilliput.compress(network.build(), network.task(), [stage], watchers=[watcher])
    return result, watcher


def test_what_trains_stays_within_one_and_layers_have_two_values() -> None:
    result, seen = run(train=Train(epochs=4, lr=1.0))
    assert any(o.abs().max() == 1.0 for o in seen.originals)
    assert all(o.abs().max() <= 1.0 for o in seen.originals)
    for effective, original, curvature in zip(
        seen.effective, seen.originals, seen.curvatures, strict=True
    ):
        scale = (curvature * original.abs()).sum() / curvature.sum()
        expected = torch.where(original >= 0, scale, -scale)
        torch.testing.assert_close(effective, expected)
    assert all(len(w.value.unique()) == 2 for w in select(result.model))


def test_the_curvature_is_adams_second_moment_without_correction() -> None:
    """From the gradients at the binary weights: v = 0.999 v + 0.001 g^2, d = sqrt(v) + 1e-8."""
    gradients: list[Tensor] = []

    class Gradients(Watcher):
        def step_done(self, run: Run) -> None:
            weight = select(run.model)[0]
            if original_of(weight).grad is not None:
                gradients.append(original_of(weight).grad.clone())

    method = LossAwareBinary()
    seen = Seen()
    stage = Stage(methods=[method], train=Train(epochs=2, optimizer="sgd", lr=0.05))
    lilliput.compress(CNN.build(), CNN.task(), [stage], watchers=[Gradients(), seen])
    if not gradients:
        pytest.skip("the loop frees gradients before watchers look")
    moment = torch.zeros_like(gradients[0])
    for gradient, curvature in zip(gradients, seen.curvatures, strict=True):
        moment = 0.999 * moment + 0.001 * gradient.square()
        torch.testing.assert_close(curvature, moment.sqrt() + 1e-8, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scale", ["mean", "one"])
def test_what_the_paper_compares_with(scale: str) -> None:
    _, seen = run(scale=scale)
    for effective, original in zip(seen.effective, seen.originals, strict=True):
        expected = original.abs().mean() if scale == "mean" else torch.tensor(1.0)
        torch.testing.assert_close(effective.abs().max(), expected)


# -- binary activations, and the file -----------------------------------------------------------------


def test_the_sign_and_its_gate() -> None:
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.7, 1.0, 1.5], requires_grad=True)
    y = BinaryActivation()(x)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_binary_activations_travel_with_the_file(tmp_path: Path) -> None:
    stage = Stage(
        methods=[LossAwareBinary(activations=["2", "5"], layers="!9")],
        train=Train(epochs=2, lr=0.01),
    )
    result = lilliput.compress(CNN.build(), CNN.task(), [stage], directory=tmp_path)
    x = next(iter(CNN.task().validation)).inputs
    loaded = lilliput.load(result.artifact, model=CNN.build())
    assert isinstance(loaded[2], BinaryActivation)  # type: ignore[index]
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model.eval()(x))
        assert set(loaded[:3](x).unique().tolist()) == {-1.0, 1.0}  # type: ignore[index]
    again = lilliput.load(result.artifact, model=loaded)
    assert replaced_activations(copy.deepcopy(again)) == {
        "2": {"kind": "binary"},
        "5": {"kind": "binary"},
    }


def test_binary_weights_take_one_bit(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 3)
    )
    stage = Stage(methods=[LossAwareBinary(layers="1")], train=Train(epochs=1))
    result = lilliput.compress(model, CNN.task(), [stage], directory=tmp_path)
    with lilliput.artifact.open(result.artifact) as file:
        (first,) = (t for t in file.report().tensors if t.name == "1.weight")
    assert first.bytes <= 64 * 512 / 8 * 1.02 + 64
    loaded = lilliput.load(result.artifact, model=copy.deepcopy(model))
    assert torch.equal(loaded[1].weight, result.model[1].weight)  # type: ignore[index]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(NothingMatched, match="activations"):
        LossAwareBinary(activations="no_such").check(CNN.build())
    with pytest.raises(InputError, match="tensors of its own"):
        replace_activation(CNN.build(), "1", BinaryActivation())
    stages = [
        Stage(methods=[Codebook(bits=2)], train=Train(epochs=0)),
        Stage(methods=[LossAwareBinary()], train=Train(epochs=1)),
    ]
    with pytest.raises(InputError, match="shared values already"):
        lilliput.compress(CNN.build(), CNN.task(), stages)
    lilliput.save(CNN.build(), tmp_path / "a.safetensors")
    with lilliput.artifact.open(tmp_path / "a.safetensors") as file:
        tensors = {name: file.dense(name) for name in file.names()}
    for bad in (
        {"2": {"kind": "zz"}},
        {"no": {"kind": "binary"}},
        {"2": {"kind": "binary", "x": 1}},
        [1],
    ):
        lilliput.artifact.write(tmp_path / "b.safetensors", tensors, structure={"activations": bad})
        with pytest.raises(CorruptArtifact, match="activation"):
            lilliput.load(tmp_path / "b.safetensors", model=CNN.build())
