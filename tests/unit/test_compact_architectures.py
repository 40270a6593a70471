"""Compact and reference networks: exact counts, what the papers say of their layers, published names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lilliput
from lilliput.architectures.alexnet import alexnet
from lilliput.architectures.mobilenet_v1 import mobilenet_v1
from lilliput.architectures.mobilenet_v2 import divisible, mobilenet_v2
from lilliput.architectures.nin import nin
from lilliput.architectures.squeezenet import squeezenet_1_0, squeezenet_1_1
from lilliput.architectures.wide_resnet import wide_resnet
from lilliput.architectures.xception import xception
from lilliput.core.registry import load
from lilliput.errors import InputError, LilliputError, ModelMismatch, UnknownName
from lilliput.testing import stand_in_for_torchvision

# name, arguments, pixels a side, parameters, multiply-adds.
COUNTS: list[tuple[str, dict[str, Any], int, int, int]] = [
    ("squeezenet_1_0", {}, 224, 1_248_424, 818_924_576),
    ("squeezenet_1_0", {}, 227, 1_248_424, 832_667_936),
    ("squeezenet_1_0", {"classes": 10}, 224, 740_554, 733_261_856),
    ("squeezenet_1_0", {"bypass": "simple"}, 224, 1_248_424, 818_924_576),
    ("squeezenet_1_0", {"bypass": "complex"}, 224, 1_248_424 + 341_248, 1_165_298_720),
    ("squeezenet_1_1", {}, 224, 1_235_496, 349_151_936),
    ("squeezenet_1_1", {}, 227, 1_235_496, 387_747_520),
    ("squeezenet_1_1", {"classes": 10}, 224, 727_626, 263_489_216),
    ("mobilenet_v1", {}, 224, 4_231_976, 568_740_352),
    ("mobilenet_v1", {"width": 0.75}, 224, 2_585_560, 325_400_448),
    ("mobilenet_v1", {"width": 0.5}, 224, 1_331_592, 149_497_088),
    ("mobilenet_v1", {"width": 0.25}, 224, 470_072, 41_030_272),
    ("mobilenet_v1", {}, 192, 4_231_976, 418_121_728),
    ("mobilenet_v1", {}, 160, 4_231_976, 290_675_200),
    ("mobilenet_v1", {}, 128, 4_231_976, 186_400_768),
    ("mobilenet_v2", {"width": 1.4}, 224, 6_108_776, 582_195_824),
    ("mobilenet_v2", {"width": 1.3}, 224, 5_386_792, 509_374_560),
    ("mobilenet_v2", {}, 224, 3_504_872, 300_774_272),
    ("mobilenet_v2", {"width": 0.75}, 224, 2_636_424, 209_069_792),
    ("mobilenet_v2", {"width": 0.5}, 224, 1_968_680, 97_131_840),
    ("mobilenet_v2", {"width": 0.35}, 224, 1_677_128, 59_285_808),
    ("mobilenet_v2", {}, 192, 3_504_872, 221_316_608),
    ("mobilenet_v2", {}, 160, 3_504_872, 154_083_200),
    ("mobilenet_v2", {}, 128, 3_504_872, 99_074_048),
    ("mobilenet_v2", {}, 96, 3_504_872, 56_289_152),
    ("xception", {}, 299, 22_855_952, 8_357_403_496),
    ("resnet18", {}, 224, 11_689_512, 1_814_073_344),
    ("resnet34", {}, 224, 21_797_672, 3_663_761_408),
    ("resnet50", {}, 224, 25_557_032, 4_089_184_256),
    ("resnet50", {"width": 2}, 224, 68_883_240, 11_398_021_120),
    ("wide_resnet", {}, 32, 36_479_194, 5_243_328_768),
    ("alexnet", {}, 227, 60_965_224, 724_406_816),
    ("alexnet_owt", {}, 224, 61_100_840, 714_188_480),
    ("vgg16", {}, 224, 138_357_544, 15_470_264_320),
    ("vgg16", {"norm": True}, 224, 138_365_992, 15_470_264_320),
    ("vgg16_cifar", {}, 32, 14_991_946, 313_463_808),
    ("nin", {}, 32, 966_986, 222_486_528),
]

# What the networks become for images of 32x32 pixels.
SMALL = {"classes": 10, "small_images": True}
SMALL_COUNTS: list[tuple[str, dict[str, Any], int, int, int]] = [
    ("squeezenet_1_0", SMALL, 32, 740_554 - 96 * 3 * (7**2 - 3**2), 202_211_328),
    ("squeezenet_1_1", SMALL, 32, 727_626, 88_735_744),
    ("mobilenet_v1", SMALL, 32, 4_231_976 - 990 * 1025, 175_556_608),
    ("mobilenet_v2", SMALL, 32, 3_504_872 - 990 * 1281, 87_976_448),
    ("xception", SMALL, 32, 22_855_952 - 990 * 2049, 1_061_668_240),
    ("resnet18", SMALL, 32, 11_689_512 - 990 * 513 - 64 * 3 * 40, 555_422_720),
    ("resnet34", SMALL, 32, 21_797_672 - 990 * 513 - 64 * 3 * 40, 1_159_402_496),
    ("resnet50", SMALL, 32, 25_557_032 - 990 * 2049 - 64 * 3 * 40, 1_297_829_888),
    ("alexnet", {"small_images": True}, 32, 60_965_224 - 32_256, 823_746_560),
    ("alexnet_owt", {"small_images": True}, 32, 61_100_840 - 21_504, 856_039_424),
]

# Each network at a size that runs in a moment, and a side that its strides allow.
LITTLE: dict[str, tuple[dict[str, Any], int]] = {
    "squeezenet_1_0": (SMALL, 16),
    "squeezenet_1_1": (SMALL, 16),
    "mobilenet_v1": (SMALL | {"width": 0.5}, 16),
    "mobilenet_v2": (SMALL | {"width": 0.5}, 16),
    "xception": (SMALL | {"middle": 1}, 8),
    "resnet18": (SMALL, 8),
    "resnet34": (SMALL, 8),
    "resnet50": (SMALL, 8),
    "wide_resnet": ({"depth": 16, "width": 2}, 8),
    "alexnet": (SMALL | {"hidden": 64}, 12),
    "alexnet_owt": (SMALL | {"hidden": 64}, 12),
    "vgg16": ({"classes": 10, "hidden": 64}, 32),
    "vgg16_cifar": ({}, 32),
    "nin": ({}, 8),
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(name: str, **arguments: Any) -> nn.Module:
    """The network without memory for its weights, which 138 million of them would take."""
    with torch.device("meta"):
        model: nn.Module = load("architecture", name)(**arguments)
    return model.eval()


def macs(model: nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape, device="meta"))
    return int(counter.get_total_flops()) // 2


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def operators(model: nn.Module) -> Iterator[nn.Module]:
    """The modules without children, in the order in which they are registered."""
    return (m for m in model.modules() if not [*m.children()])


@pytest.mark.parametrize(("name", "arguments", "side", "size", "work"), COUNTS + SMALL_COUNTS)
def test_counts(name: str, arguments: dict[str, Any], side: int, size: int, work: int) -> None:
    model = on_meta(name, **arguments)
    assert parameters(model) == size
    assert macs(model, 3, side, side) == work


def test_lilliput_counts_the_same() -> None:
    model, x = mobilenet_v1(width=0.25), torch.zeros(1, 3, 224, 224)
    assert lilliput.measure.macs(model, x).total == 41_030_272


def test_batch_statistics_are_what_keras_counts_too() -> None:
    for name, arguments, total in (
        ("mobilenet_v1", {}, 4_253_864),
        ("mobilenet_v1", {"width": 0.75}, 2_601_976),
        ("mobilenet_v1", {"width": 0.5}, 1_342_536),
        ("mobilenet_v1", {"width": 0.25}, 475_544),
        ("mobilenet_v2", {}, 3_538_984),
        ("xception", {}, 22_910_480),
    ):
        state = on_meta(name, **arguments).state_dict().items()
        assert sum(t.numel() for n, t in state if not n.endswith("num_batches_tracked")) == total


@pytest.mark.parametrize(("name", "input_side"), [(n, s) for n, (_, s) in LITTLE.items()])
def test_grey_images_and_other_classes(name: str, input_side: int) -> None:
    arguments = LITTLE[name][0] | {"classes": 7, "channels": 1}
    model = load("architecture", name)(**arguments).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 1, input_side, input_side)).shape == (2, 7)
    assert model.lilliput_origin["arguments"]["classes"] == 7


@pytest.mark.parametrize("name", LITTLE)
def test_images_of_28_pixels_train(name: str) -> None:
    side = 32 if name.startswith("vgg16") else 28  # five poolings
    model = load("architecture", name)(**LITTLE[name][0] | {"channels": 1})
    model(torch.rand(2, 1, side, side)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", LITTLE)
def test_nothing_happens_in_place_and_activations_are_modules(name: str) -> None:
    """Quantizers stand around modules, each of which runs once."""
    arguments, side = LITTLE[name]
    model = load("architecture", name)(**arguments).eval()
    calls = dict.fromkeys(operators(model), 0)

    def count(module: nn.Module, _inputs: Any, _output: Any) -> None:
        calls[module] += 1

    for module in calls:
        assert not getattr(module, "inplace", False)
        module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.rand(1, 3, side, side))
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("name", LITTLE)
def test_thin_and_its_file(name: str, tmp_path: Any) -> None:
    arguments, side = LITTLE[name]
    torch.manual_seed(0)
    model, x = load("architecture", name)(**arguments).eval(), torch.rand(2, 3, side, side)
    thinned = lilliput.thin(model, x, keep=0.5)
    assert parameters(thinned.model) < 0.45 * parameters(model)
    assert thinned.error is not None and thinned.error < 1e-5
    if name in ("squeezenet_1_0", "mobilenet_v2"):
        lilliput.save(thinned.model, tmp_path / "thin.safetensors")
        with torch.no_grad():
            loaded = lilliput.load(tmp_path / "thin.safetensors")
            assert torch.equal(loaded(x), thinned.model(x))


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LITTLE)
def test_images_that_do_not_fit(name: str) -> None:
    for arguments in ({}, LITTLE[name][0]):
        model = on_meta(name, **arguments)
        least = model.smallest
        with torch.no_grad():
            model(torch.zeros(1, 3, least, least + 1, device="meta"))
            with pytest.raises(ModelMismatch, match=f"{name} was given images of .*{least} a side"):
                model(torch.zeros(1, 3, least + 1, least - 1, device="meta"))
            with pytest.raises(ModelMismatch, match=r"takes images \(N, 3, .*channels=\.\.\."):
                model(torch.zeros(1, 1, least, least, device="meta"))
            with pytest.raises(ModelMismatch, match="takes images"):
                model(torch.zeros(3, least, least, device="meta"))


@pytest.mark.parametrize("name", ["squeezenet_1_0", "squeezenet_1_1", "alexnet", "alexnet_owt"])
@pytest.mark.parametrize("small_images", [False, True])
def test_without_padding_the_smallest_image_is_what_the_layers_allow(
    name: str, small_images: bool
) -> None:
    model = on_meta(name, small_images=small_images)
    side = model.smallest - 1
    with torch.no_grad(), pytest.raises(RuntimeError):
        model.logits(torch.zeros(1, 3, side, side, device="meta"))


def test_too_small_images_are_told_what_to_do() -> None:
    with pytest.raises(ModelMismatch, match="Enlarge them, or build it with small_images=True"):
        mobilenet_v1(width=0.25)(torch.zeros(1, 3, 28, 28))
    with pytest.raises(ModelMismatch, match=r"Enlarge them\.$"):
        mobilenet_v1(width=0.25, small_images=True)(torch.zeros(1, 3, 4, 28))
    with pytest.raises(ModelMismatch, match="use vgg16_cifar"):
        load("architecture", "vgg16")(hidden=1)(torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize("width", [0.0, 0.03, -1.0, math.nan, math.inf])
def test_mobilenet_widths_without_channels(width: float) -> None:
    with pytest.raises(InputError, match=f"width={width} leaves"):
        mobilenet_v1(width=width)


@pytest.mark.parametrize("width", [0.0, -0.5, math.nan, math.inf])
def test_mobilenet_v2_widths_without_channels(width: float) -> None:
    with pytest.raises(InputError, match=f"width={width} leaves no channels"):
        mobilenet_v2(width=width)


@pytest.mark.parametrize(
    "arguments",
    [{"squeeze_ratio": 0.001}, {"pct_3x3": 0.0}, {"pct_3x3": 1.0}, {"base_e": 0}, {"incr_e": -64}],
)
def test_fire_modules_without_filters(arguments: dict[str, float]) -> None:
    with pytest.raises(InputError, match="leave a fire module without filters"):
        squeezenet_1_0(**arguments)  # type: ignore[arg-type]


def test_other_arguments_that_cannot_be() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'simple'"):
        squeezenet_1_1(bypass="simpel")
    with pytest.raises(UnknownName, match="relu6"):
        mobilenet_v1(activation="relu66")
    with pytest.raises(InputError, match="depth=27 is not 6n"):
        wide_resnet(depth=27)
    with pytest.raises(InputError, match="freq=0"):
        squeezenet_1_0(freq=0)


@pytest.mark.parametrize("name", LITTLE)
def test_counts_below_one(name: str) -> None:
    for count in ("classes", "channels"):
        with pytest.raises(LilliputError, match=f"{count}=0: give at least 1"):
            load("architecture", name)(**{count: 0})


# --- SqueezeNet -------------------------------------------------------------------------------------


def test_squeezenet_layer_by_layer() -> None:
    net = squeezenet_1_0()
    kinds = [m for m in net.features if next(m.parameters(), None) is not None]
    assert [parameters(m) for m in kinds] == [
        14_208,
        11_920,
        12_432,
        45_344,
        49_440,
        104_880,
        111_024,
        188_992,
        197_184,
    ]
    assert parameters(net.classifier) == 513_000
    assert sum(map(parameters, kinds)) + 513_000 == 1_248_424


def test_fire_modules_have_the_papers_widths() -> None:
    for net in (squeezenet_1_0(), squeezenet_1_1()):
        fires = [m for m in net.modules() if hasattr(m, "squeeze")]
        widths = [
            (16, 64),
            (16, 64),
            (32, 128),
            (32, 128),
            (48, 192),
            (48, 192),
            (64, 256),
            (64, 256),
        ]
        for fire, (squeeze, expand) in zip(fires, widths, strict=True):
            assert fire.squeeze.weight.shape[0::2] == (squeeze, 1)
            assert fire.expand1x1.weight.shape == (expand, squeeze, 1, 1)
            assert fire.expand3x3.weight.shape == (expand, squeeze, 3, 3)
            assert fire.expand3x3.padding == (1, 1)
        assert all(c.bias is not None for c in convolutions(net))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


@pytest.mark.parametrize(
    ("build", "sides"),
    [(squeezenet_1_0, [111, 55, 27, 13]), (squeezenet_1_1, [113, 56, 28, 14])],
)
def test_maps_of_squeezenet(build: Any, sides: list[int]) -> None:
    with torch.device("meta"):
        net = build().eval()
    seen = []
    for layer in net.features:
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[-1]))
    with torch.no_grad():
        net(torch.zeros(1, 3, 227, 227, device="meta"))
    assert list(dict.fromkeys(seen)) == sides


def test_a_fire_module_concatenates_and_its_bypass_adds() -> None:
    net = squeezenet_1_0(bypass="complex", small_images=True)
    complex_, simple = net.features[2:4]
    assert isinstance(complex_.bypass, nn.Conv2d) and isinstance(simple.bypass, nn.Identity)
    for fire in (complex_, simple):
        x = torch.randn(2, fire.squeeze.in_channels, 6, 6)
        squeezed = fire.squeeze(x).relu()
        parts = [fire.expand1x1(squeezed).relu(), fire.expand3x3(squeezed).relu()]
        torch.testing.assert_close(fire(x), torch.cat(parts, 1) + fire.bypass(x))


def test_bypasses_are_around_the_papers_modules() -> None:
    def around(bypass: str, kind: type[nn.Module]) -> list[int]:
        net = squeezenet_1_0(bypass=bypass)
        fires = [m for m in net.modules() if hasattr(m, "squeeze")]
        return [n for n, fire in enumerate(fires, 2) if isinstance(fire.bypass, kind)]

    assert around("none", nn.Module) == []
    assert around("simple", nn.Module) == around("complex", nn.Identity) == [3, 5, 7, 9]
    assert around("complex", nn.Conv2d) == [2, 4, 6, 8]


def test_metaparameters() -> None:
    net = squeezenet_1_0(squeeze_ratio=0.5, base_e=64, incr_e=32, freq=4, pct_3x3=0.25)
    fires = [m for m in net.modules() if hasattr(m, "squeeze")]
    widths = [
        (f.squeeze.out_channels, f.expand1x1.out_channels, f.expand3x3.out_channels) for f in fires
    ]
    assert widths == [(32, 48, 16)] * 4 + [(48, 72, 24)] * 4


# --- MobileNets -------------------------------------------------------------------------------------


def test_mobilenet_is_table_1() -> None:
    net = mobilenet_v1()
    depthwise = [c for c in convolutions(net) if c.groups > 1]
    pointwise = [c for c in convolutions(net) if c.kernel_size == (1, 1)]
    filters = [64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    assert [c.out_channels for c in pointwise] == filters
    assert [c.in_channels for c in depthwise] == [32, *filters[:-1]]
    assert [c.stride[0] for c in depthwise] == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    assert all(c.groups == c.in_channels == c.out_channels for c in depthwise)
    assert len(convolutions(net)) == 27  # with the linear layer the paper's 28


def test_mobilenet_spends_its_work_in_pointwise_convolutions() -> None:
    net = on_meta("mobilenet_v1")
    with FlopCounterMode(display=False, depth=9) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 224, 224, device="meta"))
    flops = {n: sum(f.values()) for n, f in counter.get_flop_counts().items()}
    pointwise = sum(f for n, f in flops.items() if n.endswith("conv_pw"))
    assert pointwise / counter.get_total_flops() == pytest.approx(0.9486, abs=5e-4)  # table 2


def test_mobilenet_activates_after_both_convolutions() -> None:
    kinds = [type(m).__name__ for m in mobilenet_v1().blocks[0][0].children()]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 2


def test_mobilenet_widths_are_rounded_down() -> None:
    pointwise = [c for c in convolutions(mobilenet_v1(width=0.35)) if c.kernel_size == (1, 1)]
    assert [c.out_channels for c in pointwise][:4] == [22, 44, 44, 89]


def test_mobilenet_v2_has_linear_bottlenecks() -> None:
    net = mobilenet_v2()
    blocks = [m for m in net.modules() if hasattr(m, "residual")]
    assert len(blocks) == 17
    for block in blocks:
        *_, projection, last = operators(block)
        assert isinstance(projection, nn.Conv2d) and isinstance(last, nn.BatchNorm2d)
    activated = sum(isinstance(m, nn.ReLU6) for m in net.modules())
    assert activated == 2 * 17 - 1 + 2  # the first block does not expand; first and last layer
    assert len(convolutions(net)) == 52
    assert not any(isinstance(m, nn.ReLU) for m in net.modules())


def test_mobilenet_v2_is_table_2() -> None:
    blocks = [m for m in mobilenet_v2().modules() if hasattr(m, "residual")]
    first, second = (convolutions(b) for b in blocks[:2])
    assert [c.kernel_size for c in first] == [(3, 3), (1, 1)]  # t = 1
    assert [c.kernel_size for c in second] == [(1, 1), (3, 3), (1, 1)]
    assert second[0].out_channels == 6 * 16
    ends = [convolutions(b)[-1].out_channels for b in blocks]
    assert ends == [16, 24, 24, 32, 32, 32, *[64] * 4, *[96] * 3, *[160] * 3, 320]
    strides = [convolutions(b)[-2].stride[0] for b in blocks]
    assert strides == [1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
    residual = [b.residual for b in blocks]
    assert residual == [
        s == 1 and before == after
        for s, before, after in zip(strides, [32, *ends], ends, strict=False)
    ]


def test_a_residual_adds_its_input() -> None:
    block = mobilenet_v2().features[3].eval()
    last = [*operators(block)][-1]
    nn.init.zeros_(last.weight)
    x = torch.randn(1, 24, 5, 5)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("width", [0.1, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4])
def test_divisible_channels_lose_a_tenth_at_most(width: float) -> None:
    for channels in (16, 24, 32, 64, 96, 160, 320, 1280):
        made = divisible(width * channels)
        assert made % 8 == 0 and made >= max(8, 0.9 * width * channels)
        assert made <= width * channels + 8


# --- Xception ---------------------------------------------------------------------------------------


def test_xception_has_36_layers_and_nothing_inside_a_separable_convolution() -> None:
    net = xception()
    separable = [m for m in net.modules() if hasattr(m, "pointwise")]
    assert len(separable) == 34  # and two ordinary convolutions: 36
    for layer in separable:
        depthwise, pointwise = layer.children()
        assert depthwise.groups == depthwise.in_channels
        x = torch.randn(1, depthwise.in_channels, 4, 4)
        assert torch.equal(layer(x), pointwise(depthwise(x)))
    assert len(convolutions(net)) == 2 + 2 * 34 + 4  # with the shortcuts
    assert all(c.bias is None for c in convolutions(net))


def test_modules_of_xception() -> None:
    net = xception()
    modules = [m for m in net.modules() if hasattr(m, "rep")]
    assert len(modules) == 12
    assert [isinstance(m.rep[0], nn.ReLU) for m in modules] == [False] + [True] * 11
    assert [isinstance(m.skip, nn.Conv2d) for m in modules] == [True] * 3 + [False] * 8 + [True]
    widths = [m.rep[-2 if isinstance(m.skip, nn.Conv2d) else -1].num_features for m in modules]
    assert widths == [128, 256, 728, *[728] * 8, 1024]


# --- the others -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "width", "size"),
    [
        (16, 1, 175_066),
        (16, 2, 691_674),
        (40, 1, 563_930),
        (40, 2, 2_243_546),
        (16, 8, 10_961_370),
        (40, 4, 8_949_210),
    ],
)
def test_wide_resnets_summed_by_hand(depth: int, width: int, size: int) -> None:
    """Table 1: groups of n blocks, each two norms and two convolutions; a projection a group."""
    n, before = (depth - 4) // 6, 16
    total = 3 * 9 * 16
    for after in (16 * width, 32 * width, 64 * width):
        total += (before * after if before != after or after > 16 * width else 0) + 2 * before
        total += 9 * before * after + 2 * after + 9 * after * after
        total += (n - 1) * (4 * after + 18 * after * after)
        before = after
    total += 2 * before + 10 * before + 10
    assert parameters(on_meta("wide_resnet", depth=depth, width=width)) == total == size


def test_wide_resnet_activates_first_and_shares_it_with_the_projection() -> None:
    block = wide_resnet(10, 2).layer2[0].eval()
    x = torch.randn(2, 32, 6, 6)
    active = block.bn1(x).relu()
    expected = block.conv2(block.bn2(block.conv1(active)).relu()) + block.shortcut(active)
    torch.testing.assert_close(block(x), expected)


def test_alexnet_has_the_layers_of_the_tables() -> None:
    """Weights in thousands as Han et al. (2015) print them: 35, 307, 885, 663, 442, 38M, 17M, 4M."""
    net = on_meta("alexnet")
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = [m.weight.numel() for m in layers]
    assert weights == [
        34_848,
        307_200,
        884_736,
        663_552,
        442_368,
        37_748_736,
        16_777_216,
        4_096_000,
    ]
    assert sum(weights) == 60_954_656


def test_alexnets_normalization_is_section_3_3() -> None:
    (norm, _) = [m for m in alexnet(hidden=1).modules() if isinstance(m, nn.LocalResponseNorm)]
    a = torch.randn(1, 7, 2, 2)
    expected = torch.empty_like(a)
    for i in range(7):
        nearby = a[:, max(0, i - 2) : i + 3]
        expected[:, i] = a[:, i] / (2 + 1e-4 * nearby.square().sum(1)) ** 0.75
    torch.testing.assert_close(norm(a), expected)


def test_nin_ends_with_a_map_for_each_class() -> None:
    net, seen = nin().eval(), []
    for part in (net.mlpconv1, net.mlpconv2, net.mlpconv3):
        part.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[1:])))
    with torch.no_grad():
        logits = net(torch.randn(2, 3, 32, 32))
    assert seen == [(96, 32, 32), (192, 16, 16), (10, 8, 8)]
    assert logits.shape == (2, 10)


def test_vgg_cifar_is_the_table_of_li() -> None:
    """Table 2 of Pruning Filters: multiply-adds of the convolutions, and 1.5e7 parameters."""
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    printed = [
        1.8e6,
        3.8e7,
        1.9e7,
        3.8e7,
        1.9e7,
        3.8e7,
        3.8e7,
        1.9e7,
        3.8e7,
        3.8e7,
        9.4e6,
        9.4e6,
        9.4e6,
    ]
    for conv, side, work in zip(convolutions(on_meta("vgg16_cifar")), sides, printed, strict=True):
        assert conv.weight.numel() * side**2 == pytest.approx(work, rel=0.04)


# --- published weights ------------------------------------------------------------------------------

# ours, its arguments, theirs, pixels a side.
TORCHVISION = [
    ("squeezenet_1_0", {}, "squeezenet1_0", 64),
    ("squeezenet_1_1", {}, "squeezenet1_1", 64),
    ("mobilenet_v2", {}, "mobilenet_v2", 64),
    ("mobilenet_v2", {"width": 1.4}, "mobilenet_v2", 32),
    ("alexnet_owt", {}, "alexnet", 64),
    ("vgg16", {}, "vgg16", 32),
    ("vgg16", {"norm": True}, "vgg16_bn", None),
    ("resnet18", {}, "resnet18", 64),
    ("resnet34", {}, "resnet34", None),
    ("resnet50", {}, "resnet50", 64),
    ("resnet50", {"width": 2}, "wide_resnet50_2", None),
]
TIMM = [
    ("xception", {}, "legacy_xception", 71),
    ("mobilenet_v1", {"activation": "relu6"}, "mobilenetv1_100", 64),
]


@pytest.mark.parametrize(("name", "arguments", "published", "side"), TORCHVISION)
def test_outputs_equal_torchvisions(
    name: str, arguments: dict[str, Any], published: str, side: int | None
) -> None:
    stand_in_for_torchvision()
    models = pytest.importorskip("torchvision.models")
    options = {"width_mult": arguments["width"]} if name == "mobilenet_v2" and arguments else {}
    with torch.device("meta"):
        theirs = models.get_model(published, **options)
    same_outputs(on_meta(name, **arguments), theirs, side)


@pytest.mark.parametrize(("name", "arguments", "published", "side"), TIMM)
def test_outputs_equal_timms(
    name: str, arguments: dict[str, Any], published: str, side: int
) -> None:
    stand_in_for_torchvision()
    timm = pytest.importorskip("timm")
    same_outputs(load("architecture", name)(**arguments), timm.create_model(published), side)


def same_outputs(ours: nn.Module, theirs: nn.Module, side: int | None) -> None:
    """The published state fits without a change of names, and the outputs are equal."""
    ours, theirs = ours.eval(), theirs.eval()
    if side is None:  # names and shapes alone: a sibling of it is run
        assert {n: t.shape for n, t in ours.state_dict().items()} == {
            n: t.shape for n, t in theirs.state_dict().items()
        }
        return
    theirs.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, tensor in theirs.state_dict().items():
        fill(name, tensor)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    x = torch.rand(2, 3, side, side)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.std() > 1e-3  # something has come through
        assert torch.equal(ours(x), expected)


def fill(name: str, tensor: Tensor) -> None:
    """Random values with which signals neither fade nor grow much."""
    if tensor.ndim > 1:
        bound = math.sqrt(6 / tensor[0].numel())
        tensor.uniform_(-bound, bound)
    elif tensor.is_floating_point():
        tensor.uniform_(*((0.5, 1.5) if name.endswith(("var", "weight")) else (-0.1, 0.1)))
    else:
        tensor.zero_()
