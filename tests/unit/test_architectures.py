"""Architectures: exact counts, names, shapes, initialization, and published weights."""

from __future__ import annotations

import inspect
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lilliput.architectures.digits_cnn import digits_cnn
from lilliput.architectures.lenet_5 import lenet_5
from lilliput.architectures.lenet_300_100 import lenet_300_100
from lilliput.architectures.mlp import mlp
from lilliput.architectures.resnet_cifar import _Shortcut, resnet8, resnet20
from lilliput.core.registry import entries, load
from lilliput.core.task import evaluate
from lilliput.errors import InputError
from lilliput.tasks.cifar10 import cifar10
from lilliput.testing import stand_in_for_torchvision

DATA = Path(os.environ.get("LILLIPUT_DATA", "no-data"))
WEIGHTS = DATA / "cifar10-resnet"
MNIST_SHAPE, DIGIT_SHAPE, CIFAR_SHAPE = (1, 28, 28), (1, 8, 8), (3, 32, 32)

# name, input, parameters, multiply-adds; ResNet's counts are summed by hand in `resnet_counts` too.
COUNTS = [
    ("lenet_300_100", MNIST_SHAPE, 266_610, 266_200),
    ("lenet_5", MNIST_SHAPE, 431_080, 2_293_000),
    ("mlp", MNIST_SHAPE, 545_810, 545_000),
    ("digits_cnn", DIGIT_SHAPE, 48_938, 624_576),
    ("resnet8", CIFAR_SHAPE, 75_290, 12_239_488),
    ("resnet14", CIFAR_SHAPE, 172_506, 26_395_264),
    ("resnet20", CIFAR_SHAPE, 269_722, 40_551_040),
    ("resnet32", CIFAR_SHAPE, 464_154, 68_862_592),
    ("resnet44", CIFAR_SHAPE, 658_586, 97_174_144),
    ("resnet56", CIFAR_SHAPE, 853_018, 125_485_696),
    ("resnet110", CIFAR_SHAPE, 1_727_962, 252_887_680),
]

# Networks that do not classify images, or whose work torch's counter does not see: name, input,
# parameters (summed by hand) and the output for a batch of two.
OTHERS = [
    ("lstm_forecaster", (24, 7), 4 * 64 * (7 + 64 + 2) + 65 * 24 * 7, (2, 24, 7)),
    ("speech_lstm", (63, 40), 4 * 128 * (40 + 128 + 2) + 129 * 10, (2, 10)),
    ("additive", (10,), 10 * (32 + 1) + 1, (2, 1)),
    ("tree_ensemble", (10,), 100 * 2**3 + 1, (2, 1)),
    ("detector", (3, 64, 96), 548_463, (2, 60, 6)),  # summed in test_detector.py
    ("speech_cnn", (63, 40), 9 * (32 + 32 * 64 + 64 * 128) + 2 * 224 + 129 * 10, (2, 10)),
]

# The larger networks; test_compact_architectures.py counts them layer by layer and image by image.
LARGER = {
    "squeezenet_1_0": 1_248_424,
    "squeezenet_1_1": 1_235_496,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "xception": 22_855_952,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "wide_resnet": 36_479_194,
    "alexnet": 60_965_224,
    "alexnet_owt": 61_100_840,
    "vgg16": 138_357_544,
    "vgg16_cifar": 14_991_946,
    "nin": 966_986,
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def resnet_counts(depth: int) -> tuple[int, int]:
    """Parameters and multiply-adds, summed from the table of the paper's section 4.2."""
    blocks = (depth - 2) // 6
    convolutions = [(3, 16, 32)]
    before = 16
    for channels, side in ((16, 32), (32, 16), (64, 8)):
        for _ in range(2 * blocks):
            convolutions.append((before, channels, side))
            before = channels
    weights = sum(9 * i * o for i, o, _ in convolutions)
    norms = sum(2 * o for _, o, _ in convolutions)
    macs = sum(9 * i * o * side**2 for i, o, side in convolutions)
    return weights + norms + 64 * 10 + 10, macs + 64 * 10


@pytest.mark.parametrize(("name", "shape", "size", "macs"), COUNTS)
def test_counts(name: str, shape: tuple[int, ...], size: int, macs: int) -> None:
    model = load("architecture", name)().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(torch.zeros(2, *shape))
    assert output.shape == (2, 10)
    assert parameters(model) == size
    assert counter.get_total_flops() == 2 * 2 * macs
    if name.startswith("resnet"):
        assert (size, macs) == resnet_counts(int(name.removeprefix("resnet")))


def test_every_shipped_architecture_is_counted_and_documents_its_count() -> None:
    shipped = {n: e for n, e in entries("architecture").items() if e.module.startswith("lilliput.")}
    counted = {name: size for name, _, size, _ in [*COUNTS, *OTHERS]}
    counted |= {"translator": 1_503_232} | LARGER
    assert set(shipped) == set(counted)
    for name, size in counted.items():
        assert f"{size:,}" in shipped[name].summary


def test_translator_has_its_count() -> None:
    stand_in_for_torchvision()
    pytest.importorskip("transformers")
    layer = 4 * 128 * 129 + 2 * 128 * 512 + 512 + 128 + 2 * 256  # attention, two layers, two norms
    positions, decoders = 2 * 256 * 128, 2 * (4 * 128 * 129 + 256)  # sinusoids; cross-attentions
    summed = 4000 * 128 + positions + 4 * layer + decoders
    assert parameters(load("architecture", "translator")()) == summed == 1_503_232


@pytest.mark.parametrize(("name", "shape", "size", "output"), OTHERS)
def test_other_networks(
    name: str, shape: tuple[int, ...], size: int, output: tuple[int, ...]
) -> None:
    model = load("architecture", name)().eval()
    assert parameters(model) == size
    with torch.no_grad():
        assert model(torch.zeros(2, *shape)).shape == output


def test_published_networks_cite_their_paper() -> None:
    known = entries("architecture")
    assert [str(p) for p in known["resnet20"].papers] == [
        "He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. CVPR 2016, "
        "arXiv 1512.03385"
    ]
    assert [p.year for p in known["lenet_5"].papers] == [1998, 2014]
    assert known["lenet_300_100"].papers[0].year == 1998


@pytest.mark.parametrize(("name", "shape", "size", "macs"), COUNTS)
def test_classes_change_only_the_last_layer(
    name: str, shape: tuple[int, ...], size: int, macs: int
) -> None:
    model = load("architecture", name)(classes=7)
    *_, last = (m for m in model.modules() if isinstance(m, nn.Linear))
    assert last.out_features == 7
    assert parameters(model) == size - 3 * (last.in_features + 1)
    origin = json.loads(json.dumps(model.lilliput_origin))
    assert (origin["architecture"], origin["arguments"]["classes"]) == (name, 7)


def test_layer_names() -> None:
    def weighted(model: nn.Module) -> list[str]:
        return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    assert weighted(lenet_300_100()) == ["fc1", "fc2", "fc3"]
    assert weighted(lenet_5()) == ["conv1", "conv2", "fc1", "fc2"]
    assert weighted(digits_cnn()) == ["conv1", "conv2", "conv3", "fc1", "fc2"]


def test_mlp_of_any_widths() -> None:
    model = mlp([4, 3, 2], inputs=6, classes=5)
    widths = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert widths == [(6, 4), (4, 3), (3, 2), (2, 5)]
    assert model(torch.zeros(2, 2, 3)).shape == (2, 5)
    with pytest.raises(InputError, match=r"hidden\[1\]=0"):
        mlp([4, 0])


#: What may be 0, or be no count although its default is a whole number.
ZERO_IS_FINE = {"pairs", "incr_e"}


def wrong_settings() -> list[tuple[str, str, float]]:
    """Every count of every network as 0, and every dropout as 1.5."""
    found = []
    for name in entries("architecture"):
        for setting in inspect.signature(load("architecture", name)).parameters.values():
            if type(setting.default) is int and setting.name not in ZERO_IS_FINE:
                found.append((name, setting.name, 0))
            elif "dropout" in setting.name:
                found.append((name, setting.name, 1.5))
    return found


@pytest.mark.parametrize(("name", "setting", "value"), wrong_settings())
def test_a_network_that_cannot_be_is_refused(name: str, setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{setting}={value}"):
        load("architecture", name)(**{setting: value})


def test_digits_cnn_grows_in_width_and_depth() -> None:
    model = digits_cnn(width=4, depth=2)
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if hasattr(m, "weight")}
    assert shapes == {
        "conv1": (4, 1, 3, 3),
        "conv1_2": (4, 4, 3, 3),
        "conv2": (8, 4, 3, 3),
        "conv2_2": (8, 8, 3, 3),
        "conv3": (16, 8, 3, 3),
        "conv3_2": (16, 16, 3, 3),
        "fc1": (24, 64),
        "fc2": (10, 24),
    }
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(InputError, match="depth=0"):
        digits_cnn(depth=0)


def test_lenet_5_has_its_only_relu_after_fc1() -> None:
    model, x = lenet_5(), torch.randn(3, 1, 28, 28)
    w = dict(model.named_parameters())
    h = functional.conv2d(x, w["conv1.weight"], w["conv1.bias"])
    h = functional.max_pool2d(h, 2)
    h = functional.conv2d(h, w["conv2.weight"], w["conv2.bias"])
    h = functional.max_pool2d(h, 2).flatten(1)
    h = functional.linear(h, w["fc1.weight"], w["fc1.bias"]).relu()
    expected = functional.linear(h, w["fc2.weight"], w["fc2.bias"])
    torch.testing.assert_close(model(x), expected)


def test_lenet_300_100_takes_images_and_vectors() -> None:
    model, x = lenet_300_100(), torch.randn(3, 1, 28, 28)
    assert torch.equal(model(x), model(x.reshape(3, 784)))
    hidden = functional.relu(model.fc2(functional.relu(model.fc1(x.flatten(1)))))
    torch.testing.assert_close(model(x), model.fc3(hidden))


def test_calls_give_fresh_networks() -> None:
    assert not torch.equal(lenet_5().fc1.weight, lenet_5().fc1.weight)


@pytest.mark.parametrize("build", [lenet_300_100, lenet_5])
def test_caffe_filler_is_uniform_with_variance_one_over_fan_in(build) -> None:
    torch.manual_seed(0)
    for layer in build().modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = math.sqrt(3 / layer.weight[0].numel())
            assert layer.weight.abs().max() <= bound
            assert layer.weight.abs().max() > 0.95 * bound
            assert not layer.bias.any()


@pytest.mark.parametrize("build", [digits_cnn, resnet20])
def test_he_initialization_has_variance_two_over_fan_in(build) -> None:
    torch.manual_seed(0)
    for layer in build().modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.numel() > 2000:
            ratio = layer.weight.detach().var() * layer.weight[0].numel() / 2
            assert abs(float(ratio) - 1) < 6 * math.sqrt(2 / layer.weight.numel())
            assert layer.weight.abs().max() > 2.5 * layer.weight.std()  # not uniform
            assert layer.bias is None or not layer.bias.any()


def test_shortcut_takes_every_second_pixel_and_pads_half_of_the_channels_on_each_side() -> None:
    x = torch.randn(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                expected[:, channel + 2, row, column] = x[:, channel, 2 * row, 2 * column]
    assert torch.equal(_Shortcut(4, 8, 2)(x), expected)


def test_a_block_adds_its_input() -> None:
    block = resnet8().layer1[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 16, 5, 5)
    torch.testing.assert_close(block(x), x)


def published(depth: int) -> dict[str, Tensor]:
    (path,) = WEIGHTS.glob(f"resnet{depth}-*.th")
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


@pytest.mark.data
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="needs LILLIPUT_DATA with cifar10-resnet")
@pytest.mark.parametrize("depth", [20, 32, 56])
def test_published_weights_load_strictly(depth: int) -> None:
    load("architecture", f"resnet{depth}")().load_state_dict(published(depth), strict=True)


@pytest.mark.data
@pytest.mark.skipif(
    not (WEIGHTS.is_dir() and (DATA / "cifar10-lossless").is_dir()),
    reason="needs LILLIPUT_DATA with cifar10-resnet and cifar10-lossless",
)
def test_published_resnet20_scores_as_measured_before() -> None:
    model = resnet20()
    model.load_state_dict(published(20))
    task = cifar10(source="lossless")
    assert task.test is not None
    assert evaluate(model, task.test, task.score) == pytest.approx(91.5, abs=0.2)
