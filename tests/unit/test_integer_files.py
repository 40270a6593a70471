"""Networks of integers: in files, in copies, and cut by surgery."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train, artifact
from lilliput.core.select import select
from lilliput.errors import CorruptArtifact
from lilliput.mechanisms.activations import (
    Quantizer,
    quantizer_at,
    remove_quantizer,
    replace_activation,
    replaced_activations,
)
from lilliput.mechanisms.encodings import Held, StepGrid, bake, encode, encoding_of
from lilliput.mechanisms.ranges import steps_of
from lilliput.methods import FilterL1, LearnedStep, PostTraining
from lilliput.testing import NETWORKS

NAMES = [network.name for network in NETWORKS]
CNN = NETWORKS[1]
PLACES = {"0:input": 5, "3:input": 5, "5:output": 5, "9:input": 5}  # place -> bits


@functools.cache
def integers(name: str, trained: bool = False) -> Any:
    """A network with 4-bit weights and 5-bit activations; never changed by a test."""
    network = NETWORKS[NAMES.index(name)]
    kind: Any = LearnedStep if trained else PostTraining
    method = kind(bits=4, activation_bits=5, samples=64)
    stage = Stage(methods=[method], train=Train(epochs=int(trained)))
    return lilliput.compress(network.build(), network.task(), [stage]).model.eval()


def inputs(name: str = "cnn") -> Tensor:
    batches = NETWORKS[NAMES.index(name)].task().validation
    return torch.cat([batch.inputs for batch in batches])


@torch.no_grad()
def outputs(model: nn.Module, name: str = "cnn") -> Tensor:
    found: Tensor = model(inputs(name))
    return found


def grids(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Bits and steps of each weight that is integers."""
    found = {weight.name: encoding_of(weight, StepGrid) for weight in select(model)}
    return {name: (g.bits, g.step.detach()) for name, g in found.items() if g is not None}


def same(first: dict[str, tuple[int, Tensor]], second: dict[str, tuple[int, Tensor]]) -> bool:
    return first.keys() == second.keys() and all(
        bits == second[name][0] and torch.equal(step, second[name][1])
        for name, (bits, step) in first.items()
    )


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_is_what_was_saved(name: str, trained: bool, tmp_path: Path) -> None:
    model = integers(name, trained)
    lilliput.save(model, tmp_path / "file")
    loaded = lilliput.load(tmp_path / "file", model=NETWORKS[NAMES.index(name)].build(seed=3))
    assert torch.equal(outputs(loaded, name), outputs(model, name))
    assert len(grids(model)) >= 3
    assert same(grids(loaded), grids(model))
    assert replaced_activations(loaded) == replaced_activations(model)
    for place in replaced_activations(model):
        mine, theirs = quantizer_at(loaded, place), quantizer_at(model, place)
        assert mine is not None
        assert theirs is not None
        assert (mine.bits, mine.step, mine.zero) == (theirs.bits, theirs.step, theirs.zero)
    lilliput.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_the_file_holds_integers_and_steps(tmp_path: Path) -> None:
    model = integers("cnn")
    lilliput.save(model, tmp_path / "file")
    with artifact.open(tmp_path / "file") as file:
        whole, steps = file.dense("3.weight"), file.dense("scales/3.weight")
        assert file.structure["grids"] == dict.fromkeys(["0.weight", "3.weight", "9.weight"], 4)
    assert (whole == whole.round()).all()
    assert 4 <= np.abs(whole).max() <= 7
    found = torch.from_numpy(whole * steps[:, None, None, None])
    assert torch.equal(found, model[3].weight.detach())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weight_takes_its_bits(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256, bias=False))
    nn.init.normal_(net[0].weight)  # type: ignore[arg-type]
    (weight,) = select(net)
    steps = steps_of(weight.value.detach(), bits, "mse")
    encode(weight, StepGrid(bits, steps[:, None]))
    lilliput.save(net, tmp_path / "file")
    size = (tmp_path / "file").stat().st_size - 4 * 256 - 2000  # steps; names and tables
    assert size <= bits * 256 * 256 / 8


def test_a_weight_that_something_holds_elsewhere_is_saved_as_it_is(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    (weight,) = select(net)
    before = weight.value.detach().clone()
    encode(weight, StepGrid(4, torch.full((4, 1), 0.05)))
    encode(weight, Held(torch.arange(24).view(4, 6) != 3, before))
    lilliput.save(net, tmp_path / "file")
    loaded = lilliput.load(tmp_path / "file", model=nn.Sequential(nn.Linear(6, 4)))
    (found,) = select(loaded)
    assert torch.equal(found.value, weight.value)
    assert found.value[0, 3] == before[0, 3]
    assert not grids(loaded)


# -- forged files ---------------------------------------------------------------------------------

Forgery = Callable[[dict[str, Any], dict[str, Any]], Any]


def forged(folder: Path, change: Forgery) -> Path:
    """The file of the tiny CNN after somebody has changed its tensors and what it says of them."""
    lilliput.save(integers("cnn"), folder / "file")
    with artifact.open(folder / "file") as file:
        tensors, structure = {n: file.dense(n) for n in file.names()}, file.structure
    change(structure, tensors)
    artifact.write(folder / "forged", tensors, structure=structure)
    return folder / "forged"


def bits(given: Any) -> Forgery:
    return lambda structure, tensors: structure["grids"].update({"3.weight": given})


def scales(change: Callable[[Any], Any], name: str = "3.weight") -> Forgery:
    def forge(structure: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors[f"scales/{name}"] = change(tensors["scales/3.weight"])
        structure["grids"][name] = 4

    return forge


def activation(**settings: Any) -> Forgery:
    return lambda structure, tensors: structure["activations"]["3:input"].update(settings)


def quantizer(**changed: float) -> Forgery:
    return lambda structure, tensors: tensors.update(
        {
            f"3.input_quantizer.{name}": np.full((), value, np.float32)
            for name, value in changed.items()
        }
    )


FORGERIES = {
    "no steps": lambda structure, tensors: structure["grids"].update({"other": 8}),
    "no weight": scales(lambda s: s, "other"),
    "not a weight that multiplies": scales(lambda s: s[:6], "1.weight"),
    "no mapping": lambda structure, tensors: structure.update(grids=[["3.weight", 4]]),
    "no grids": lambda structure, tensors: structure.update(grids=None),
    "99 bits": bits(99),
    "1 bit": bits(1),
    "-4 bits": bits(-4),
    "bits of text": bits("4"),
    "bits of truth": bits(True),
    "bits of a list": bits([4]),
    "half a bit": bits(4.5),
    "too few steps": scales(lambda s: s[:5]),
    "too many steps": scales(lambda s: np.r_[s, s]),
    "steps of steps": scales(lambda s: s[:, None]),
    "a negative step": scales(lambda s: np.r_[-s[:1], s[1:]]),
    "a step of zero": scales(lambda s: np.r_[s[1:], np.float32(0)]),
    "a step that is none": scales(lambda s: s * np.float32(np.nan)),
    "an endless step": scales(lambda s: s * np.float32(np.inf)),
    "a quantizer of 99 bits": activation(bits=99),
    "a quantizer of no bits": activation(bits=0),
    "a quantizer of text": activation(bits="8"),
    "a quantizer in no words": activation(step="large"),
    "a quantizer of a step of zero": quantizer(step=0.0),
    "a quantizer of a negative step": quantizer(step=-1.0),
    "a quantizer of no step": quantizer(step=np.nan),
    "a zero beyond the integers": quantizer(zero=999.0),
    "a quantizer of nothing": lambda s, t: s["activations"].update({"nothing:input": {}}),
    "a quantizer nowhere": lambda s, t: s["activations"].update(
        {"nothing:input": {"kind": "quantizer"}}
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files(name: str, tmp_path: Path) -> None:
    path, target = forged(tmp_path, FORGERIES[name]), CNN.build()
    with pytest.raises(CorruptArtifact, match=r"Get (it|the file) again from its source"):
        lilliput.load(path, model=target)
    assert not grids(target)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.modules())


def test_values_that_are_no_integers_of_those_bits(tmp_path: Path) -> None:
    """Four bits that are said to be three: refused, or loaded as they are."""
    path, target = forged(tmp_path, bits(3)), CNN.build()
    try:
        loaded: Any = lilliput.load(path, model=target)
    except CorruptArtifact:
        return
    assert torch.equal(loaded[3].weight, integers("cnn")[3].weight)


def test_a_network_that_refused_a_file_is_as_before(tmp_path: Path) -> None:
    path, target = forged(tmp_path, FORGERIES["a negative step"]), CNN.build()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CorruptArtifact):
        lilliput.load(path, model=target)
    assert all(torch.equal(v, before[name]) for name, v in target.state_dict().items())


# -- copies ---------------------------------------------------------------------------------------


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    """Torch pickles no parametrized modules, so the weights are made plain before."""
    found: nn.Module = pickle.loads(pickle.dumps(bake(copy.deepcopy(model))))
    return found


@pytest.mark.parametrize("make", [copied, pickled])
def test_copies_round_by_themselves(make: Callable[[nn.Module], nn.Module]) -> None:
    model = integers("cnn")
    expected, twin = outputs(model), make(model)
    assert torch.equal(outputs(twin), expected)
    assert {p: quantizer_at(twin, p).bits for p in replaced_activations(twin)} == PLACES  # type: ignore[union-attr]
    for place in PLACES:
        mine = quantizer_at(twin, place)
        assert mine is not None
        assert mine is not quantizer_at(model, place)
        mine.step.mul_(3.0)
        assert not torch.equal(outputs(twin), expected)
        remove_quantizer(twin, place)
    assert not replaced_activations(twin)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert torch.equal(outputs(model), expected)
    assert replaced_activations(model).keys() == PLACES.keys()


def test_grids_of_a_copy_are_its_own() -> None:
    model = integers("cnn")
    expected, twin = outputs(model), copy.deepcopy(model)
    for weight in select(twin):
        encoding_of(weight, StepGrid).step.mul_(2.0)  # type: ignore[union-attr]
    assert not torch.equal(outputs(twin), expected)
    assert torch.equal(outputs(model), expected)
    bake(twin)
    assert torch.equal(outputs(model), expected)


def test_a_quantizer_that_is_replaced_works_once() -> None:
    """Putting a second one in a place leaves one hook, not two."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    x = torch.rand(4, 3)
    for side in ("input", "output"):
        for step in (0.5, 0.25):
            replace_activation(model, f"1:{side}", Quantizer(8, step))
    with torch.no_grad():
        inner = model[0](x)
        expected = ((inner / 0.25).round().clamp(0, 255) * 0.25).relu()
        torch.testing.assert_close(model(x), expected)
    assert len(model[1]._forward_hooks) == len(model[1]._forward_pre_hooks) == 1


# -- surgery --------------------------------------------------------------------------------------


def kept(model: Any, thin: Any) -> tuple[list[int], list[int]]:
    """Which filters of the two convolutions are left: the first has no bias, but a mean of its own."""

    def places(whole: Tensor, cut: Tensor) -> list[int]:
        return [whole.tolist().index(value) for value in cut.tolist()]

    return places(model[1].running_mean, thin[1].running_mean), places(model[3].bias, thin[3].bias)


def by_thin(model: nn.Module) -> nn.Module:
    return lilliput.thin(model, inputs()[:1], keep=0.5, round_to=1).model


def by_stage(model: nn.Module) -> nn.Module:
    method = FilterL1(keep=0.5, round_to=1, scope="layer")
    stage = Stage(methods=[method], train=Train(epochs=0))
    return lilliput.compress(model, CNN.task(), [stage]).model.eval()


@pytest.mark.parametrize("by", [by_thin, by_stage])
def test_steps_are_cut_along(by: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = integers("cnn")
    thin: Any = by(copy.deepcopy(model)).eval()
    first, second = kept(model, thin)
    assert (len(first), len(second)) == (3, 4)
    whole, cut = grids(model), grids(thin)
    assert torch.equal(cut["0.weight"][1], whole["0.weight"][1][first])
    assert torch.equal(cut["3.weight"][1], whole["3.weight"][1][second])
    assert torch.equal(cut["9.weight"][1], whole["9.weight"][1])
    assert torch.equal(thin[3].weight, model[3].weight[second][:, first])
    silent = copy.deepcopy(model)
    for norm, left in ((silent[1], first), (silent[4], second)):
        gone = [c for c in range(norm.num_features) if c not in left]
        norm.weight.data[gone] = norm.bias.data[gone] = 0.0
    torch.testing.assert_close(outputs(thin), outputs(silent), rtol=1e-5, atol=1e-6)
    lilliput.save(thin, tmp_path / "file")
    loaded = lilliput.load(tmp_path / "file", model=CNN.build())
    assert torch.equal(outputs(loaded), outputs(thin))
    assert same(grids(loaded), cut)
