"""What ``load`` and ``load_weights`` refuse: of files whose checksums are right, and of what is no file."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train, artifact, io
from lilliput.artifact import Coded
from lilliput.core import registry
from lilliput.core.select import weights
from lilliput.errors import (
    ArtifactError,
    ArtifactTooLarge,
    CorruptArtifact,
    InputError,
    LilliputError,
    MissingDependency,
    ModelMismatch,
    UnsupportedArtifact,
)
from lilliput.mechanisms.activations import IntegerActivation, Quantizer, replace_activation
from lilliput.mechanisms.encodings import LowRank, encode
from lilliput.mechanisms.packing import Pack, pack_of, set_pack
from lilliput.methods import FilterL1, Packnet
from lilliput.testing import NETWORKS

CNN = NETWORKS[1]


def written(folder: Path, tensors: dict[str, Any], structure: Any) -> Path:
    file = folder / "made.safetensors"
    artifact.write(file, tensors, structure=structure)
    return file


# -- the network that a file names ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("lenet_300_100", {"classes": 2_000_000}),
        ("lenet_300_100", {"classes": 2 * 10**12}),
        ("wide_resnet", {"depth": 6 * 10**8 + 4, "width": 1}),
    ],
)
def test_a_named_network_takes_no_more_than_allowed(
    architecture: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    file = written(tmp_path, {}, {"architecture": architecture, "arguments": arguments})
    start = time.process_time()
    with pytest.raises(ArtifactTooLarge, match=f"made.*{architecture}.*max_bytes"):
        lilliput.load(file, max_bytes=1000 if arguments.get("classes") == 2_000_000 else None)
    assert time.process_time() - start < 60


@pytest.mark.parametrize(
    "arguments",
    [
        {"foo": 1}, {"classes": "x"}, {"classes": 1.5}, {"classes": None}, {"classes": 0}, {"classes": -1},
        {"classes": 10**30}, {"classes": [3]}, [10], None, "classes", 3,
    ],
)  # fmt: skip
def test_arguments_with_which_nothing_can_be_built(arguments: Any, tmp_path: Path) -> None:
    file = written(tmp_path, {}, {"architecture": "lenet_300_100", "arguments": arguments})
    with pytest.raises((CorruptArtifact, InputError), match=r"made.*lenet_300_100"):
        lilliput.load(file)


@pytest.mark.parametrize(
    "structure",
    [
        {"architecture": "lenet_300_100"},
        *({"architecture": a, "arguments": {}} for a in (7, None, ["a"], {}, "nope", "timm:nope", ":", "")),
    ],
)  # fmt: skip
def test_names_of_no_network(structure: Any, tmp_path: Path) -> None:
    with pytest.raises((CorruptArtifact, InputError, MissingDependency)):
        lilliput.load(written(tmp_path, {}, structure))


def test_a_network_that_looks_at_values_is_built_with_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_announced", dict(registry._announced))

    @registry.architecture
    def looking(units: int = 4) -> nn.Module:
        net = nn.Linear(units, units)
        net.scale = float(net.weight.detach().max())  # type: ignore[assignment]
        nn.init.constant_(net.weight, float(np.random.default_rng(0).normal()))
        return net

    monkeypatch.setattr(sys.modules[__name__], "looking", looking, raising=False)
    net = looking()
    lilliput.save(net, tmp_path / "net")
    assert torch.equal(lilliput.load(tmp_path / "net").weight, net.weight)
    with pytest.raises(ArtifactTooLarge, match="looking"):
        lilliput.load(
            written(tmp_path, {}, {"architecture": "looking", "arguments": {"units": 1000}}),
            max_bytes=3_900_000,
        )


def test_seeing_how_large_a_network_is_draws_nothing() -> None:
    torch.manual_seed(0)
    with torch.device("meta"), io._Counting():
        assert all(p.is_meta for p in lilliput.build("resnet18").parameters())
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)


# -- all tensors together -------------------------------------------------------------------------


def test_the_limit_is_that_of_all_tensors_together(tmp_path: Path) -> None:
    """A file of a few kilobytes: every tensor alone keeps the limit, and together they are ten times it."""
    constant = Coded(np.zeros((1000, 20), np.uint8), np.zeros(1, np.float32))
    file = written(tmp_path, {f"t{i}": constant for i in range(100)}, {})
    assert file.stat().st_size < 40_000
    with pytest.raises(ArtifactTooLarge, match=r"made.*8,000,000 bytes"):
        lilliput.load(file, model=nn.Linear(2, 2), max_bytes=800_000)
    with pytest.raises(ModelMismatch):
        lilliput.load(file, model=nn.Linear(2, 2), max_bytes=8_000_000)


# -- activations ----------------------------------------------------------------------------------


def quantized(folder: Path, settings: Any, step: Any = 0.5, zero: Any = 3) -> Path:
    net = nn.Sequential(nn.Linear(3, 3))
    replace_activation(net, "0:input", Quantizer(8, 0.1, 3))
    lilliput.save(net, folder / "net")
    with artifact.open(folder / "net") as file:
        tensors = {name: file.dense(name) for name in file.names()}
    tensors["0.input_quantizer.step"] = np.asarray(step)
    tensors["0.input_quantizer.zero"] = np.asarray(zero)
    return written(folder, tensors, {"activations": {"0:input": settings}})


def test_a_sound_quantizer_is_loaded(tmp_path: Path) -> None:
    file = quantized(tmp_path, {"kind": "quantizer", "bits": 8, "learned": False})
    loaded = lilliput.load(file, model=nn.Sequential(nn.Linear(3, 3)))
    assert float(loaded[0].input_quantizer.step) == 0.5  # type: ignore[index, union-attr, arg-type]


@pytest.mark.parametrize("bits", [3_000_000_000, 10**400, -1, 1, 9, True, 2.0, "x", None, [8]])
@pytest.mark.parametrize("kind", ["quantizer", "integer"])
def test_bits_that_no_quantizer_has(kind: str, bits: Any, tmp_path: Path) -> None:
    bits = 17 if (kind, bits) == ("integer", 9) else bits
    file = quantized(tmp_path, {"kind": kind, "bits": bits})
    start = time.process_time()
    with pytest.raises(CorruptArtifact):
        lilliput.load(file, model=nn.Sequential(nn.Linear(3, 3)))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("step", "zero"),
    [
        (np.nan, 3), (np.inf, 3), (0.0, 3), (-1.0, 3), (1e-60, 3), ([0.5, 0.5], 3), ([], 3),
        (0.5, np.nan), (0.5, np.inf), (0.5, -1), (0.5, 256), (0.5, 1.5), (0.5, [1, 2]),
    ],
)  # fmt: skip
def test_steps_and_zeros_that_cannot_be(step: Any, zero: Any, tmp_path: Path) -> None:
    file = quantized(tmp_path, {"kind": "quantizer", "bits": 8, "learned": False}, step, zero)
    with pytest.raises(CorruptArtifact, match="0:input"):
        lilliput.load(file, model=nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize(
    "settings",
    [
        None, [], "quantizer", 3, {}, {"kind": []}, {"kind": "half_wave"},
        {"kind": "half_wave", "levels": "ab"},
        {"kind": "half_wave", "levels": [10**400]}, {"kind": "half_wave", "levels": [1, 0]},
        {"kind": "integer", "bits": "x"}, {"kind": "integer", "error_bits": 0.5}, {"kind": "integer", "x": 1},
        {"kind": "quantizer", "step": 10**400}, {"kind": "quantizer", "zero": 2**70},
        {"kind": "quantizer", "zero": {}}, {"kind": "binary", "x": 1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["1", "0:input"])
def test_settings_that_no_activation_has(place: str, settings: Any, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    tensors = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    with pytest.raises(CorruptArtifact):
        lilliput.load(written(tmp_path, tensors, {"activations": {place: settings}}), model=net)
    assert type(net[1]) is nn.ReLU


def test_a_module_has_two_sides_and_an_activation_few_bits() -> None:
    with pytest.raises(InputError, match="no 'inside'"):
        replace_activation(nn.Sequential(nn.ReLU()), "0:inside", IntegerActivation())
    for bits in ((17, 8), (8, 1), ("8", 8)):
        with pytest.raises(InputError, match="2 to 16 bits"):
            IntegerActivation(*bits)  # type: ignore[arg-type]


# -- tasks ----------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A recurrent layer, a layer that tasks share, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.body, self.head = nn.LSTM(5, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(self.cell(inputs)[0]))
        return found


def two_tasks(kind: str, dtype: torch.dtype = torch.float32, thin: bool = False) -> nn.Module:
    """A network with the tasks a and b; ``thin`` has products of factors beside them."""
    torch.manual_seed(0)
    net = Heads().to(dtype)
    if thin:
        for weight in list(weights(net)):
            if weight.layer == "cell":
                encode(weight, LowRank(2, *weight.value.shape))
    state = {name: t.detach().clone() for name, t in lilliput.measure.effective_state(net).items()}
    own = {name: state.pop(name) for name in ("head.weight", "head.bias")}
    body = state.pop("body.weight")
    second = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in own.items()}
    mask = {"body.weight": torch.ones_like(body, dtype=torch.bool)}
    owners = {"body.weight": torch.ones_like(body, dtype=torch.uint8)}
    owners, masks = (owners, {}) if kind == "owners" else ({}, {"a": mask, "b": mask})
    pack = Pack(
        kind, ("a", "b"), "a", {"body.weight": body}, owners, masks, {"a": own, "b": second}, state
    )
    set_pack(net, pack)
    return net


@pytest.mark.parametrize("kind", ["owners", "masks"])
def test_tasks_of_bfloat16_are_saved(kind: str, tmp_path: Path) -> None:
    net = two_tasks(kind, torch.bfloat16)
    lilliput.save(net, tmp_path / "net")
    loaded = lilliput.load(tmp_path / "net", model=Heads().bfloat16(), task="b")
    pack = pack_of(net)
    assert pack is not None
    assert torch.equal(loaded.head.weight, pack.own["b"]["head.weight"])  # type: ignore[union-attr, arg-type]
    assert torch.equal(loaded.body.weight, net.body.weight)  # type: ignore[union-attr, arg-type]


def test_own_tensors_have_zeros_without_a_sign(tmp_path: Path) -> None:
    net = two_tasks("owners")
    pack = pack_of(net)
    assert pack is not None
    second = {name: -torch.zeros_like(tensor) for name, tensor in pack.own["b"].items()}
    set_pack(net, replace(pack, own={**pack.own, "b": second}))
    lilliput.save(net, tmp_path / "net")
    with artifact.open(tmp_path / "net") as file:
        assert not np.signbit(file.dense("tasks/2/own/head.weight")).any()


@pytest.mark.parametrize("kind", ["owners", "masks"])
@pytest.mark.parametrize(
    "marks",
    [
        np.zeros((0, 6), np.float32), np.full((4, 6), -1.0), np.full((4, 6), -300.0),
        np.full((4, 6), 0.5), np.full((4, 6), 3.0), np.full((4, 6), 256.0), np.full((4, 6), np.nan),
        np.full((4, 6), np.inf), np.ones((6, 4)), np.ones((4, 6, 1)),
        *(np.ones((4, 6), kind) for kind in ("u2", "u4", "u8", "i1", "i8")),
    ],
)  # fmt: skip
def test_marks_that_no_task_has(kind: str, marks: Any, tmp_path: Path) -> None:
    file = changed(two_tasks(kind), tmp_path, {MARKS[kind]: marks})
    with pytest.raises(CorruptArtifact, match="tasks"):
        lilliput.load(file, model=Heads())


MARKS = {"owners": "tasks/owners/body.weight", "masks": "tasks/1/mask/body.weight"}


def changed(
    net: nn.Module, folder: Path, tensors: dict[str, Any], tasks: dict[str, Any] | None = None
) -> Path:
    """The file of a network with tasks, where some tensors are others, and what is said of tasks."""
    lilliput.save(net, folder / "net")
    with artifact.open(folder / "net") as file:
        known, structure = {n: file.dense(n) for n in file.names()}, file.structure
    structure = structure | {"tasks": structure["tasks"] | (tasks or {})}
    return written(folder, {n: t for n, t in (known | tensors).items() if t is not None}, structure)


@pytest.mark.parametrize(
    "tasks",
    [
        {"kind": "masks"}, {"own": ["head.weight", "body.weight"]}, {"own": ["head.weight"]}, {"own": [[]]},
        {"own": 3}, {"names": []}, {"names": ["a"] * 2}, {"names": ["a", []]}, {"current": []},
    ],
)  # fmt: skip
def test_descriptions_that_no_tasks_have(tasks: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match="tasks"):
        lilliput.load(changed(two_tasks("owners"), tmp_path, {}, tasks), model=Heads())


@pytest.mark.parametrize("shape", [(8,), (), (2, 4, 1), (2, 5), (0, 4)])
@pytest.mark.parametrize("mine", [True, False])
def test_own_weights_of_shapes_that_a_layer_cannot_have(
    mine: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    name = "head.weight" if mine else "tasks/2/own/head.weight"
    wrong = np.ones(shape, np.float32)
    files = [{name: wrong}, {"head.weight": wrong, "tasks/2/own/head.weight": wrong}]
    for tensors in files:
        net = Heads()
        before = {n: t.clone() for n, t in net.state_dict().items()}
        with pytest.raises((CorruptArtifact, ModelMismatch)):
            lilliput.load(changed(two_tasks("owners"), tmp_path, tensors), model=net)
        assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
        assert net.head.weight.shape == (2, 4)


def test_own_tensors_that_the_network_lacks(tmp_path: Path) -> None:
    extra = {"nowhere.weight": np.ones((2, 2)), "tasks/2/own/nowhere.weight": np.ones((2, 2))}
    own = {"own": ["head.bias", "head.weight", "nowhere.weight"]}
    with pytest.raises(ModelMismatch, match="nowhere"):
        lilliput.load(changed(two_tasks("owners"), tmp_path, extra, own), model=Heads())


def test_a_backbone_of_whole_numbers_is_none(tmp_path: Path) -> None:
    file = changed(two_tasks("owners"), tmp_path, {"body.weight": np.ones((4, 6), np.uint32)})
    with pytest.raises(CorruptArtifact, match="backbone"):
        lilliput.load(file, model=Heads())


def test_tasks_beside_factors_can_be_saved_again(tmp_path: Path) -> None:
    """The file has factors, and what the tasks share is their product."""
    lilliput.save(two_tasks("owners", thin=True), tmp_path / "first")
    loaded = lilliput.load(tmp_path / "first", model=Heads())
    lilliput.save(loaded, tmp_path / "second")
    assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()


def test_a_thinned_network_with_a_task_is_loaded(tmp_path: Path) -> None:
    """The head in the file has lost inputs, which the fresh network loses by the plan, after the head."""
    stages = [
        Stage(methods=[Packnet(task="a", prune=0.6, outputs=3)], train=Train(epochs=0)),
        Stage(methods=[FilterL1(keep=0.5, round_to=1)], train=Train(epochs=0)),
    ]
    thin = lilliput.compress(CNN.build(), CNN.task(), stages, directory=tmp_path)
    loaded = lilliput.load(str(thin.artifact), model=CNN.build())
    assert loaded[9].weight.shape == (3, 16)  # type: ignore[index, union-attr]
    inputs = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(inputs), thin.model.eval()(inputs))


# -- weights alone, and what is no file -----------------------------------------------------------


def test_weights_of_an_artifact_of_any_name(tmp_path: Path) -> None:
    net = nn.Linear(3, 3)
    for name in ("net.llp", "net.safetensors", "net", "net.pt"):
        lilliput.save(net, tmp_path / name)
        filled = io.load_weights(nn.Linear(3, 3), tmp_path / name)
        assert torch.equal(filled.weight, net.weight)  # type: ignore[arg-type]


def test_weights_of_other_files(tmp_path: Path) -> None:
    net = nn.Linear(3, 3)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "plain.safetensors")
    torch.save(
        {"state_dict": {f"module.{n}": t for n, t in net.state_dict().items()}}, tmp_path / "p"
    )
    for name in ("plain.safetensors", "p"):
        filled = io.load_weights(nn.Linear(3, 3), tmp_path / name)
        assert torch.equal(filled.weight, net.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["net.llp", "net.safetensors"])
def test_a_file_of_the_future_asks_for_a_newer_version(name: str, tmp_path: Path) -> None:
    tensors = {n: t.detach().numpy() for n, t in nn.Linear(3, 3).state_dict().items()}
    artifact.write(file := tmp_path / name, tensors, profile="compact")
    data = bytearray(file.read_bytes())
    assert data[4] == 1
    data[4] = 2
    file.write_bytes(data)
    for read in (io.load_weights, lambda net, path: lilliput.load(path, model=net)):
        with pytest.raises(UnsupportedArtifact, match="newer Lilliput"):
            read(nn.Linear(3, 3), file)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x08" + b"\0" * 7 + b"{}      ", b"\xff" * 99]
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_damaged_weights(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        io.load_weights(nn.Linear(3, 3), tmp_path / name)


def test_a_damaged_artifact_is_told_as_one(tmp_path: Path) -> None:
    lilliput.save(nn.Linear(3, 3), file := tmp_path / "a.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=r"a\.safetensors"):
        io.load_weights(nn.Linear(3, 3), file)


@pytest.mark.parametrize("name", ["nowhere.safetensors", "folder.safetensors"])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    net = nn.Linear(3, 3)
    for read in (io.load_weights, lambda net, path: lilliput.load(path, model=net)):
        with pytest.raises(LilliputError, match=name):
            read(net, tmp_path / name)
