"""Exported files: what is in them, and that they compute what the network computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput.core.types import Batch
from lilliput.deploy import OnnxNetwork, export, inspect, overflows
from lilliput.deploy.runtime import RUNTIMES
from lilliput.errors import EmptyData, ExportFailed, InputError, UnknownName
from lilliput.mechanisms.ranges import noise_ratio
from lilliput.testing import NETWORKS

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("one_reading_of_operators")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class PadsItself(nn.Conv2d):
    """As TensorFlow pads strided convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Residual(nn.Module):
    """A block whose sum should stay integers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(inner))).relu()


class Attention(nn.Module):
    """Two products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return scores @ self.value(x)


def convolutions() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), Residual(8),
        PadsItself(8, 8, 3, stride=2), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    net.train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(16, 3, 12, 12))
    return net.eval()


def integers(net: nn.Module, x: Any) -> nn.Module:
    """Weights of 7 bits, whose sums overflow on no processor."""
    return lilliput.quantize(net, [x], bits=7).model


def outputs(path: Path, x: Any) -> Tensor:
    found: Tensor = OnnxNetwork(path)(x)
    return found


def test_every_layer_runs_in_integers_and_agrees(tmp_path: Path) -> None:
    net, x = convolutions(), torch.randn(32, 3, 12, 12)
    small = integers(net, x)
    made = export(small, x[:1], tmp_path / "net.onnx")
    assert made.float_layers == []
    assert made.integer_layers == ["0", "3.conv1", "3.conv2", "4.conv1", "4.conv2", "5", "9"]
    assert made.folded["1"] == "0"
    assert len(made.folded) == 5
    executed = inspect(made.path)
    assert (executed.integers, executed.floats) == (7, 0)
    fresh = torch.randn(8, 3, 12, 12)  # another batch size
    with torch.no_grad():
        assert noise_ratio(small(fresh), outputs(made.path, fresh)) > 30.0


def test_sums_of_blocks_are_integers(tmp_path: Path) -> None:
    import onnx

    net, x = convolutions(), torch.randn(32, 3, 12, 12)
    file = export(integers(net, x), x, tmp_path / "net.onnx").path
    OnnxNetwork(file, optimized=tmp_path / "run.onnx")
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "run.onnx")).graph.node]
    assert kinds.count("QLinearAdd") == 2
    assert "Conv" not in kinds
    assert "Pad" not in kinds  # the convolution's own now


def test_products_of_two_activations(tmp_path: Path) -> None:
    net, x = nn.Sequential(Attention(), nn.Linear(16, 3)).eval(), torch.randn(16, 10, 16)
    small = integers(net, x)
    plain = export(small, x, tmp_path / "plain.onnx")
    assert (inspect(plain.path).integers, inspect(plain.path).floats) == (4, 2)
    made = export(small, x, tmp_path / "net.onnx", products=[Batch(x, None)])
    assert len(made.products) == 2
    assert (inspect(made.path).integers, inspect(made.path).floats) == (6, 0)
    with torch.no_grad():
        assert noise_ratio(net(x), outputs(made.path, x)) > 25.0


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
@pytest.mark.parametrize("bits", [7, 3])
def test_the_tiny_networks(network: Any, bits: int, tmp_path: Path) -> None:
    x = next(iter(network.task().train)).inputs
    small = lilliput.quantize(network.build(), [x], bits=bits).model
    file = export(small, x[:2], tmp_path / "net.onnx").path
    with torch.no_grad():
        assert noise_ratio(small(x), outputs(file, x)) > 30.0


@pytest.mark.parametrize("quantized", [False, True], ids=["real", "integer"])
def test_a_norm_behind_maxima_is_not_multiplied_into_what_it_would_turn_round(
    quantized: bool, tmp_path: Path
) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)
    ).eval()
    norm: Any = net[2]
    with torch.no_grad():
        norm.weight.normal_()
        norm.running_mean.normal_()
    x = torch.randn(16, 3, 12, 12)
    made = integers(net, x) if quantized else net
    file = export(made, x[:1], tmp_path / "net.onnx")
    assert file.folded == {}
    with torch.no_grad():
        assert noise_ratio(made(x), outputs(file.path, x)) > 30.0


def test_a_network_that_is_one_layer(tmp_path: Path) -> None:
    net, x = nn.Linear(8, 4), torch.randn(32, 8)
    made = export(integers(net, x), x[:1], tmp_path / "net.onnx")
    assert (made.integer_layers, made.float_layers) == ([""], [])
    with torch.no_grad():
        assert noise_ratio(net(x), outputs(made.path, x)) > 25.0


def test_pruned_thin_and_real_networks_export_too(tmp_path: Path) -> None:
    net, x = convolutions(), torch.randn(4, 3, 12, 12)
    thin = lilliput.thin(net, x, round_to=2).model
    for name, model in {"whole": net, "thin": thin}.items():
        made = export(model, x, tmp_path / f"{name}.onnx")
        assert made.integer_layers == []
        assert (outputs(made.path, x) - model(x)).abs().max() < 1e-5
    small = integers(thin, x)
    assert inspect(export(small, x, tmp_path / "small.onnx").path).floats == 0


def test_the_network_stays_as_it_is(tmp_path: Path) -> None:
    net, x = convolutions(), torch.randn(4, 3, 12, 12)
    small = integers(net, x)
    before, out = {k: v.clone() for k, v in small.state_dict().items()}, small(x)
    export(small, x, tmp_path / "net.onnx")
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert torch.equal(small(x), out)


class Counts(nn.Module):
    """Of a size that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 12, 12)
    few = lilliput.quantize(convolutions(), [x], activation_bits=4).model
    with pytest.raises(InputError, match="4 bits cannot be exported"):
        export(few, x, tmp_path / "net.onnx")
    with pytest.raises(ExportFailed, match="Counts cannot be written as ONNX"):
        export(Counts(), x, tmp_path / "net.onnx")
    with pytest.raises(UnknownName, match="runtime"):
        inspect(tmp_path / "net.onnx", "onnxruntme")
    (tmp_path / "bad.onnx").write_bytes(b"no such thing")
    with pytest.raises(ExportFailed, match="does not take"):
        OnnxNetwork(tmp_path / "bad.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_filters_that_are_zero_beside_their_bias(tmp_path: Path) -> None:
    """Their steps are chosen for the bias, which is an integer too."""
    net, x = convolutions(), torch.randn(8, 3, 12, 12)
    with torch.no_grad():
        net[3].norm1.weight[:3] = 0.0
        net[3].norm1.weight[3] = 1e-12
        net[3].norm1.bias[:4] = torch.tensor([0.7, -0.3, 2.5, 1.0])
    small = integers(net, x)
    file = export(small, x, tmp_path / "net.onnx").path
    with torch.no_grad():
        assert noise_ratio(small(x), outputs(file, x)) > 30.0


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def test_poolings_are_of_integers_in_every_runtime(tmp_path: Path) -> None:
    import onnx

    net, x = pooled(), torch.randn(16, 3, 14, 14)
    small = integers(net, x)
    made = export(small, x, tmp_path / "net.onnx")
    nodes = onnx.load(str(made.path)).graph.node
    by_output = {node.output[0]: node.op_type for node in nodes}
    before = [by_output[n.input[0]] for n in nodes if n.op_type == "MaxPool"]
    assert before == ["DequantizeLinear"] * 2
    executed = inspect(made.path)
    assert (executed.integers, executed.floats) == (4, 0)
    with torch.no_grad():
        assert noise_ratio(small(x), outputs(made.path, x)) > 30.0


def test_a_pooling_that_others_read_in_real_numbers_stays_as_it_is(tmp_path: Path) -> None:
    import onnx

    file = export(pooled(), torch.randn(2, 3, 14, 14), tmp_path / "net.onnx").path
    kinds = {node.op_type for node in onnx.load(str(file)).graph.node}
    assert "MaxPool" in kinds
    assert "QuantizeLinear" not in kinds


class Words(nn.Module):
    """Two tables and a layer; one row is all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(2000, 16, padding_idx=0)
        self.places = nn.Embedding(7, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        return self.out(self.words(tokens) + self.places(places))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_tables_are_stored_as_bytes(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    net, tokens = Words().eval(), torch.arange(14).view(2, 7)
    plain = export(net, tokens, tmp_path / "plain.onnx")
    made = export(net, tokens, tmp_path / "net.onnx", tables=True)
    assert plain.tables == []
    assert made.tables == ["words", "places"]
    assert plain.bytes - made.bytes > 2000 * 16 * 3 - 2000 * 4 - 4000  # steps; operators
    with torch.no_grad():
        found = RUNTIMES[runtime](made.path)(tokens.flip(1))
        assert 30.0 < noise_ratio(net(tokens.flip(1)), found) < 70.0


def test_sums_of_seven_bits_are_right_where_those_of_eight_overflow(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(64, 4, bias=False)), torch.ones(2, 64)
    nn.init.ones_(net[0].weight)  # type: ignore[arg-type]
    for bits in (7, 8):
        small = lilliput.quantize(
            net, [torch.rand(8, 64), x], bits=bits, calibration="minmax"
        ).model
        found = outputs(export(small, x, tmp_path / "net.onnx").path, x)
        right = bool((found - 64.0).abs().max() < 1.0)
        assert right == (bits == 7 or not overflows())
    with pytest.raises(UnknownName, match="tflite"):
        overflows("tflite")


@pytest.fixture
def _soon_large(monkeypatch: Any) -> None:
    """Take a network for large that has more than a kilobyte, as torch does from 1.5 GB on."""
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)


@pytest.mark.usefixtures("_soon_large")
def test_large_networks_have_their_weights_in_a_second_file(tmp_path: Path) -> None:
    net, x = nn.Sequential(Attention(), nn.Linear(16, 500)).eval(), torch.randn(4, 10, 16)
    for products in (None, [Batch(x, None)]):
        made = export(net, x, tmp_path / "net.onnx", products=products)
        sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
        assert set(sizes) == {"net.onnx", "net.onnx.data"}
        assert sizes["net.onnx.data"] >= 16 * 500 * 4
        assert made.bytes == sum(sizes.values())
        with torch.no_grad():
            assert noise_ratio(net(x), outputs(made.path, x)) > 25.0
    assert len(made.products) == 2
    moved = tmp_path.rename(tmp_path.with_name("elsewhere")) / "net.onnx"
    assert outputs(moved, x).shape == (4, 10, 500)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_inputs_of_another_length_are_told(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    file = export(nn.Linear(16, 3), torch.randn(2, 5, 16), tmp_path / "net.onnx").path
    network = RUNTIMES[runtime](file)
    assert network(torch.randn(7, 5, 16)).shape == (7, 5, 3)
    for shape in ((7, 6, 16), (7, 16)):
        with pytest.raises(InputError, match=r"\(batch, 5, 16\) and got .*Pad all inputs") as told:
            network(torch.randn(shape))
        assert str(shape) in str(told.value)


class Similar(nn.Module):
    """A product whose factors nobody has computed."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y


def test_products_of_what_the_network_is_given(tmp_path: Path) -> None:
    pair = torch.randn(4, 6, 8), torch.randn(4, 8, 5)
    made = export(Similar(), pair, tmp_path / "net.onnx", products=[Batch(pair, None)])
    assert len(made.products) == 1
    assert (inspect(made.path).integers, inspect(made.path).floats) == (1, 0)
    assert noise_ratio(pair[0] @ pair[1], OnnxNetwork(made.path)(*pair)) > 25.0


def test_without_ranges_of_its_products_there_is_no_file(tmp_path: Path) -> None:
    """Nor is the one replaced that was there."""
    net, x, file = Attention().eval(), torch.randn(2, 5, 16), tmp_path / "net.onnx"
    for before in (None, b"an older one"):
        if before is not None:
            file.write_bytes(before)
        with pytest.raises(EmptyData):
            export(net, x, file, products=[])
        assert [f.read_bytes() for f in tmp_path.iterdir()] == ([] if before is None else [before])
