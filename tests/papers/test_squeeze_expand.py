"""Iandola 2016: convolutions become fire modules, near to what they were; beside what else is done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train
from lilliput.architectures.squeezenet import squeezenet_1_1
from lilliput.core.method import Method
from lilliput.deploy import OnnxNetwork, export
from lilliput.errors import CorruptArtifact, InputError, ModelMismatch, NothingChanged
from lilliput.mechanisms.factors import factorize_as, factors_of, fire_for, put_fire
from lilliput.mechanisms.ranges import noise_ratio
from lilliput.mechanisms.structure import apply_structure, structure_of
from lilliput.mechanisms.surgery import Plan, apply_plan, plan_of
from lilliput.methods import FilterL1, LowRank, PostTraining, SqueezeExpand
from lilliput.methods.factorize.squeeze_expand import squeezing

NONE, ONCE = Train(epochs=0), Train(epochs=1, lr=0.01)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def task() -> Task:
    x = images()
    batches = list(zip(x.split(16), x.mean((1, 2, 3)).gt(0).long().split(16), strict=True))
    return Task(batches, batches, batches, F.cross_entropy, lilliput.accuracy)


def burnt(**settings: Any) -> Any:
    stage = Stage(methods=[SqueezeExpand(layers=["2", "5"], **settings)], train=NONE)
    return lilliput.compress(small(), task(), [stage]).model.eval()


def test_it_is_squeezenets_module() -> None:
    """With the same weights it computes what the architecture's own computes, but for the last rectifier."""
    torch.manual_seed(0)
    own: Any = squeezenet_1_1().features[3]
    fire = fire_for(nn.Conv2d(64, 128, 3, padding=1), (16, 64))
    fire.load_state_dict(own.state_dict())
    x = torch.randn(2, 64, 7, 7)
    torch.testing.assert_close(F.relu(fire(x)), own(x))


def test_no_combinations_of_channels_lose_less() -> None:
    """Against random ones: what is left of the layer's outputs at one position, on given inputs."""
    torch.manual_seed(0)
    kernel = torch.randn(5, 6, 9).double()
    x = torch.randn(400, 6).double() @ torch.randn(6, 6).double() + 1.0
    y = x @ kernel.transpose(0, 1).flatten(1)

    def left(directions: Tensor) -> float:
        z = x @ directions.mT
        return float((y - z @ torch.linalg.lstsq(z, y).solution).square().sum())

    found, bias = squeezing(kernel, x.mT @ x / 400, x.mean(0), 2)
    assert all(left(found) <= left(torch.randn(2, 6).double()) for _ in range(50))
    z = x @ found.mT
    torch.testing.assert_close(z.square().mean(0), torch.ones(2).double(), atol=1e-4, rtol=0)
    assert ((z + bias) > 0).double().mean() > 0.99  # the rectifier begins open


def test_nothing_is_lost_where_nothing_is_squeezed() -> None:
    """As many squeezed channels as there are, and outputs that need no neighbors: only the border differs."""
    net = small()
    layer: Any = net[2]
    with torch.no_grad():
        center = layer.weight[:6, :, 1, 1].clone()
        layer.weight[:6] = 0.0
        layer.weight[:6, :, 1, 1] = center
    method = SqueezeExpand(layers=["2"], squeeze_ratio=0.7, samples=64, positions=64)
    made: Any = lilliput.compress(net, task(), [Stage(methods=[method], train=NONE)]).model
    assert made[2].ranks == (8, 6)
    x = net[:2](images())
    inside = (..., slice(1, -1), slice(1, -1))
    expected, found = layer(x)[inside], made[2](x)[inside]
    assert (found - expected).square().sum() < 0.02 * expected.square().sum()


def test_counts_and_copies() -> None:
    model = burnt()
    assert factors_of(model) == {
        "2": {"kind": "fire", "ranks": [2, 6]},
        "5": {"kind": "fire", "ranks": [2, 8]},
    }
    assert sum(p.numel() for p in model[2].parameters()) == 2 * 8 + 2 + 6 * 2 + 6 + 6 * 2 * 9 + 6
    assert model[:6](images()).shape == (64, 16, 4, 4)
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))


@pytest.mark.parametrize("first", [True, False], ids=["fire first", "cut first"])
def test_channels_go_before_and_after(first: bool) -> None:
    """The file says how wide the modules would be in the whole network, and the plan what is left of them."""
    fire, cut = SqueezeExpand(layers=["2", "5"]), FilterL1(keep=0.6, round_to=1)
    order: list[Method] = [fire, cut] if first else [cut, fire]
    stages = [Stage(methods=[m], train=ONCE) for m in order]
    result = lilliput.compress(small(), task(), stages)
    model: Any = result.model.eval()
    assert model[0].out_channels < 8
    made = model[2]
    assert made.expand1x1.out_channels + made.expand3x3.out_channels < 12
    loaded = lilliput.load(result.artifact, model=small())
    assert torch.equal(loaded(images()), model(images()))
    fresh = small()
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(images()), model(images()))


@pytest.mark.parametrize(
    "then",
    [PostTraining(samples=32), LowRank(layers="2*", rank=1, convolutions="channel")],
    ids=["quantized", "chains"],
)
def test_the_file_fills_a_fresh_network(then: Method) -> None:
    stages = [
        Stage(methods=[m], train=NONE)
        for m in (SqueezeExpand(layers=["2"], squeeze_ratio=0.3), then)
    ]
    result = lilliput.compress(small(), task(), stages)
    loaded = lilliput.load(result.artifact, model=small())
    assert torch.equal(loaded(images()), result.model.eval()(images()))


@torch.no_grad()
def test_it_exports_to_onnx_in_floats_and_integers(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, x = burnt(), images(4)
    made = export(model, x, tmp_path / "floats.onnx")
    torch.testing.assert_close(OnnxNetwork(made.path)(x), model(x), atol=1e-5, rtol=1e-5)
    integers = lilliput.quantize(model, [images()], bits=7).model
    made = export(integers, x, tmp_path / "integers.onnx")
    assert {"2.squeeze", "2.expand1x1", "2.expand3x3"} <= set(made.integer_layers)
    assert made.float_layers == []
    assert noise_ratio(integers(x), OnnxNetwork(made.path)(x)) > 25.0


def test_a_kernel_that_was_cut_is_refused() -> None:
    """A file could not tell which of both kinds of filters has lost what."""
    net = small()
    apply_plan(
        net, Plan({"2.weight": {2: np.array([1])}}, {"2.padding.0": 0}, {"2.weight": {2: 3}})
    )
    before = plan_of(net)
    with pytest.raises(InputError, match="no file could rebuild it"):
        put_fire(net, "2", fire_for(nn.Conv2d(8, 12, 3, padding=1), (2, 6)))
    assert isinstance(net[2], nn.Conv2d)
    assert plan_of(net) == before


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), "2 groups"),
        (nn.Conv2d(4, 6, 1), "1 x 1"),
        (nn.Conv2d(4, 6, (3, 2), padding=1), "3 x 2"),
        (nn.Conv2d(4, 6, 3), r"must be \(1, 1\)"),
        (nn.Conv2d(4, 1, 3, padding=1), "one output"),
        (nn.ConvTranspose2d(4, 6, 3, padding=1), "transposed"),
        (nn.Linear(4, 6), "Linear"),
    ],
)
def test_what_cannot_become_one(layer: nn.Module, why: str) -> None:
    with pytest.raises(InputError, match=why):
        fire_for(layer, (2, 3))


@pytest.mark.parametrize("ranks", [(0, 3), (5, 3), (2, 0), (2, 6), (2,)])
def test_ranks_that_do_not_fit(ranks: tuple[int, ...]) -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    with pytest.raises(InputError, match="1 to 4 filters squeeze, 1 to 5 of those"):
        fire_for(layer, ranks)
    described = {"0": {"kind": "fire", "ranks": list(ranks)}}
    with pytest.raises((ModelMismatch, CorruptArtifact)):
        factorize_as(nn.Sequential(layer), described)


def test_other_shapes() -> None:
    """A sequence; a dilated kernel of 5 with the stride 2; no bias and half precision."""
    for layer, x in (
        (nn.Conv1d(4, 6, 3, padding="same"), torch.ones(2, 4, 9)),
        (nn.Conv2d(4, 6, 5, 2, padding=4, dilation=2), torch.ones(2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding=1, bias=False).bfloat16(), torch.ones(2, 4, 5, 5).bfloat16()),
    ):
        found = fire_for(layer, (2, 3))(x)
        assert (found.shape, found.dtype) == (layer(x).shape, x.dtype)


def test_no_layer_would_gain() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    stage = Stage(methods=[SqueezeExpand()], train=NONE)
    with pytest.raises(NothingChanged, match="leaves every layer whole"):
        lilliput.compress(net, task(), [stage])
