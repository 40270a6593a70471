"""Loading: files of every kind whose checksums are right and whose content is anything at all.

Small networks are saved, one a kind of what a file can say. Then what the file says, or its tensors, are
changed at random places, and the result is written as any file is. It is loaded, or refused with an error of
Lilliput's that leaves the given model bit for bit as it was; what is loaded can be saved and run.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train, artifact
from lilliput.artifact import BFloat16
from lilliput.artifact.tensors import DTYPES
from lilliput.core.recipe import ArtifactSettings
from lilliput.core.select import Weight, weights
from lilliput.errors import InputError, LilliputError
from lilliput.mechanisms.activations import (
    BinaryActivation,
    HalfWave,
    Quantizer,
    replace_activation,
)
from lilliput.mechanisms.encodings import Binary, Codebook, LowRank, encode, put_grid
from lilliput.mechanisms.factors import factorize
from lilliput.methods import FilterL1, Packnet, Piggyback
from lilliput.testing import NETWORKS

_, CNN, _ = NETWORKS
#: Changed files a kind.
FILES = 50


class Small(nn.Module):
    """A convolution, two layers of which one is there twice, and a normalization; for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.r, self.f = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()
        self.l, self.bn, self.r2 = nn.Linear(144, 6), nn.BatchNorm1d(6), nn.ReLU()
        self.o, self.twin = nn.Linear(6, 3), nn.Linear(6, 3)
        self.twin.weight = self.o.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.o(self.r2(self.bn(self.l(self.f(self.r(self.c(x)))))))
        return found


class Recurrent(nn.Module):
    """An LSTM with a head; the images' rows are its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.LSTM(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.o(self.r(x.flatten(1, 2))[0])
        return found


@dataclass
class Kind:
    """A kind of file: how a fresh network is built, and what makes it into one whose file is of that kind."""

    build: Callable[[], nn.Module]
    make: Callable[[nn.Module], nn.Module]


def on_grids(net: nn.Module) -> nn.Module:
    for weight in (_weight(net, "c.weight"), _weight(net, "l.weight")):
        put_grid(weight, 4, (weight.value.abs().flatten(1).amax(1) / 7).detach())
    replace_activation(net, "r", HalfWave([0.5, 1.0]))
    replace_activation(net, "r2", BinaryActivation())
    replace_activation(net, "l:input", Quantizer(8, 0.1, 3))
    return net


def of_factors(net: nn.Module) -> nn.Module:
    factorize(net, "l", "svd", (2,))
    factorize(net, "c", "spatial", (2,))
    return net


def of_codes(net: nn.Module) -> nn.Module:
    weight = _weight(net, "l.weight")
    encode(weight, Codebook.fitted(weight.value, 3, "linear"))
    weight = _weight(net, "c.weight")
    encode(weight, Binary(torch.ones_like(weight.value), by_filter=True))
    return net


def of_low_rank(net: nn.Module) -> nn.Module:
    for weight in list(weights(net)):
        if weight.layer == "r" and weight.value.ndim == 2:
            encode(weight, LowRank(2, *weight.value.shape))
    return net


def with_tasks(
    method: type[Packnet] | type[Piggyback], **settings: Any
) -> Callable[..., nn.Module]:
    def make(net: nn.Module) -> nn.Module:
        for task in ("a", "b"):
            stage = Stage(methods=[method(task=task, **settings)], train=Train(epochs=0))
            net = lilliput.compress(net, CNN.task(), [stage]).model
        return net

    return make


def thinned(net: nn.Module) -> nn.Module:
    stage = Stage(methods=[FilterL1(keep=0.5, round_to=1)], train=Train(epochs=0))
    return lilliput.compress(net, CNN.task(), [stage]).model


def _weight(net: nn.Module, name: str) -> Weight:
    return next(weight for weight in weights(net) if weight.name == name)


KINDS = {
    "plain": Kind(Small, lambda net: net),
    "grids": Kind(Small, on_grids),
    "factors": Kind(Small, of_factors),
    "codes": Kind(Small, of_codes),
    "low rank": Kind(Recurrent, of_low_rank),
    "thin": Kind(CNN.build, thinned),
    "owners": Kind(CNN.build, with_tasks(Packnet, prune=0.6, outputs=3)),
    "masks": Kind(CNN.build, with_tasks(Piggyback)),
}

#: What stands in a changed file where something else stood.
ANYTHING: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 255, 256, 2**31, 2**63, 10**400, -(2**64), 0.5, -0.0, 1e308, 1e-320,
    "", "x", "svd", "fire", "spatial", "tucker", "binary", "quantizer", "integer", "half_wave", "owners",
    "masks", "l", "c", "l:input", "bn:output", "o.weight", "../..", "0", "AAAA", "5:/w", [], [0], [[]],
    [None], [1, 2], [-1], {}, {"kind": "svd"}, {"kind": "quantizer", "bits": 8}, {"x": 1}, {"kind": []},
    [{}], ["a"], ["a", "a"],
]  # fmt: skip
PLACES = [
    "l", "c", "o", "r", "bn", "zz", "", "l.weight", "o.weight", "c.weight", "l:input", "r:output", "a", "b",
    "kind", "bits", "step", "zero", "levels", "ranks", "learned", "gate", "plan", "tasks", "tied", "grids",
    "factors", "activations",
]  # fmt: skip
BESIDE = [
    "scales/", "left/", "right/", "tasks/owners/", "tasks/1/mask/", "tasks/1/own/", "tasks/2/own/",
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place inside a JSON value: what holds it, and its key there."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in inside:
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def change_said(said: dict[str, Any], chance: random.Random) -> None:
    """Take a value of the structure away, put another in its place, or one beside it."""
    holder, key = chance.choice([*places(said), (said, chance.choice(PLACES))])
    other = copy.deepcopy(chance.choice([*ANYTHING, *(h[k] for h, k in places(said))]))
    how = chance.random()
    if how < 0.2 and key in (holder if isinstance(holder, dict) else range(len(holder))):
        del holder[key]
    elif how < 0.4 and isinstance(holder, dict):
        holder[chance.choice(PLACES)] = other
    elif how < 0.4:
        holder.append(other)
    else:
        holder[key] = other


def change_tensor(tensors: dict[str, Any], chance: random.Random) -> None:
    """Take a tensor away, give it other values, another shape or type, or put it beside another name."""
    name = chance.choice(sorted(n for n, t in tensors.items() if isinstance(t, np.ndarray)))
    old = tensors.pop(name)
    wrong = old.astype(np.float32).copy()
    wrong.reshape(-1)[:1] = chance.choice([np.nan, np.inf, -1.0, 300.0, 0.5, 1e30])
    dtype = chance.choice([kind for dtype, kind in DTYPES.items() if dtype != "BF16"])
    with np.errstate(invalid="ignore"):
        converted = old.astype(dtype)
    others = [
        converted, wrong, old.reshape(-1), old.reshape(*old.shape, 1), old[:0] if old.ndim else old[None],
        np.full((), chance.choice([0, 1.5, np.nan, -3]), np.float32),
        BFloat16(np.zeros(old.shape, np.uint16)),
    ]  # fmt: skip
    how = chance.random()
    if how < 0.7:
        tensors[name] = chance.choice(others)
    elif how < 0.9:
        tensors[name] = old
        tensors[chance.choice(BESIDE) + chance.choice(sorted(tensors))] = old


def changed(content: tuple[dict[str, Any], dict[str, Any]], seed: str, file: Path) -> None:
    """A file with one or two changes, of those of this seed."""
    chance = random.Random(seed)
    tensors, said = dict(content[0]), copy.deepcopy(content[1])
    for _ in range(chance.choice([1, 1, 2])):
        if chance.random() < 0.6:
            change_said(said, chance)
        else:
            change_tensor(tensors, chance)
    artifact.write(
        file, tensors, structure=said, codec=dict.fromkeys(tensors, "raw")
    )  # the fastest


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_changed_file_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "os.fsync", lambda _: None
    )  # thousands of them would be all that this waits for
    torch.manual_seed(0)
    build = KINDS[kind].build
    lilliput.save(KINDS[kind].make(build()), tmp_path / "good")
    with artifact.open(tmp_path / "good") as file:
        content = {name: file.dense(name) for name in file.names()}, file.structure
    lilliput.load(tmp_path / "good", model=build())
    outcomes = set()
    for number in range(FILES):
        changed(content, f"{kind} {number}", bad := tmp_path / "bad")
        try:
            outcomes.add(outcome_of(bad, build()))
        except Exception as error:
            error.add_note(f"in file {number} of the kind {kind!r}")
            raise
    assert outcomes == {"loaded", "refused"}


def outcome_of(file: Path, net: nn.Module) -> str:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modules = {name: type(module) for name, module in net.named_modules()}
    try:
        loaded = lilliput.load(file, model=net, max_bytes=50_000_000)
    except LilliputError:
        after = net.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert {name: type(module) for name, module in net.named_modules()} == modules
        return "refused"
    with torch.no_grad():
        loaded(torch.zeros(2, 1, 8, 8))
    with contextlib.suppress(
        InputError
    ):  # what tasks share is not-a-number, say, and equals nothing
        lilliput.save(loaded, file, settings=ArtifactSettings(codec="raw"))
    return "loaded"
