"""Mallya et al. 2018: Piggyback. What it shares with PackNet is tested there."""

from __future__ import annotations

from dataclasses import dataclass, field
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
from lilliput.errors import InputError
from lilliput.mechanisms.encodings import Threshold, encode, encoding_of
from lilliput.mechanisms.packing import pack_of
from lilliput.methods import Codebook, HalfWave, LowRank, Magnitude, Piggyback, PostTraining
from lilliput.testing import NETWORKS
from lilliput.testing.contract import Trained

_, CNN, _ = NETWORKS
TRAIN = Train(epochs=4, optimizer="adam", lr=2e-3, weight_decay=1e-2)


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs)


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def add(model: nn.Module, name: str, train: Train = TRAIN, **settings: Any) -> Any:
    stage = Stage(methods=[Piggyback(**{"task": name, **settings})], train=train)
    return lilliput.compress(model, CNN.task(), [stage])


def test_the_mask_and_its_gradient() -> None:
    """All ones at first; the numbers get the effective gradient times the weight, the weight none."""
    layer = nn.Linear(5, 3)
    (weight,) = select(layer)
    known = weight.value.detach().clone()
    encode(weight, Threshold(known, 5e-3, 1e-2))
    encoding = encoding_of(weight, Threshold)
    assert encoding is not None
    assert torch.equal(weight.value, known)
    with torch.no_grad():
        encoding.numbers[0] = 4e-3
        encoding.numbers[1] = 5e-3
    assert not weight.value[:2].any()  # at the threshold is not above it
    x = torch.randn(7, 5)
    (layer(x).square().sum() / 2).backward()
    effective = layer(x).detach().T @ x
    torch.testing.assert_close(encoding.numbers.grad, effective * known)
    assert layer.parametrizations.weight.original.grad is None  # type: ignore[union-attr]


def test_weights_that_are_zero_are_never_masked() -> None:
    layer = nn.Linear(5, 3)
    (weight,) = select(layer)
    with torch.no_grad():
        layer.weight[:, 2] = 0.0
    encode(weight, Threshold(weight.value, 5e-3, 1e-2))
    layer(torch.randn(7, 5)).square().sum().backward()
    encoding = encoding_of(weight, Threshold)
    assert encoding is not None
    assert encoding.numbers.grad is not None
    assert not encoding.numbers.grad[:, 2].any()


@dataclass
class Backbone(Watcher):
    """The weights under the masks, at every step."""

    seen: list[Tensor] = field(default_factory=list)

    def step_done(self, run: Run) -> None:
        weight = select(run.model)[0]
        stacks: Any = weight.module.parametrizations
        self.seen.append(stacks[weight.tensor].original.detach().clone())


def test_the_backbone_does_not_move() -> None:
    """With weight decay, and batch normalization whose statistics belong to the backbone."""
    model, watcher = CNN.build(), Backbone()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stage = Stage(methods=[Piggyback(task="a")], train=TRAIN)
    result = lilliput.compress(model, CNN.task(), [stage], watchers=[watcher])
    assert all(torch.equal(seen, before["0.weight"]) for seen in watcher.seen)
    pack = pack_of(result.model)
    assert pack is not None
    for name, weight in pack.weights.items():
        assert torch.equal(weight, before[name])
    after = result.model.state_dict()
    for name in ("1.running_mean", "1.weight", "3.bias", "4.running_var", "4.bias"):
        assert torch.equal(after[name], before[name])


def test_the_base_and_every_task_stay_what_they_were(inputs: Tensor, tmp_path: Path) -> None:
    model = CNN.build()
    base = logits(model, inputs)
    one = add(model, "one", base="zero", outputs=4)
    two = add(one.model, "two", outputs=6)
    assert lilliput.tasks_of(two.model) == ["zero", "one", "two"]
    expected = {"zero": base, "one": logits(one.model, inputs), "two": logits(two.model, inputs)}
    for name, known in expected.items():
        loaded = lilliput.load(two.artifact, model=CNN.build(), task=name)
        assert torch.equal(logits(loaded, inputs), known)
        assert torch.equal(logits(lilliput.switch(two.model, name), inputs), known)
    pack = pack_of(two.model)
    assert pack is not None
    assert all(mask.all() for mask in pack.masks["zero"].values())
    assert any(not mask.all() for mask in pack.masks["two"].values())


def test_tasks_go_in_any_order_but_not_the_last(inputs: Tensor) -> None:
    one = add(CNN.build(), "one", base="zero", outputs=4).model
    expected = logits(one, inputs)
    lilliput.remove_task(one, "zero")
    assert lilliput.tasks_of(one) == ["one"]
    assert torch.equal(logits(one, inputs), expected)
    with pytest.raises(InputError, match="only task"):
        lilliput.remove_task(one, "one")


def test_a_task_costs_about_a_bit_a_weight(tmp_path: Path) -> None:
    """Of a backbone that is there once; less where the mask is nearly all ones."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 200), nn.ReLU(), nn.Linear(200, 3)
    )  # fmt: skip
    light = TRAIN.model_copy(update={"weight_decay": 0.0})
    one = add(model, "one", light, base="zero")
    two = add(one.model, "two", light)
    bits = 8 * (two.artifact.stat().st_size - one.artifact.stat().st_size)
    weights, head = 64 * 400 + 400 * 200, 32 * (200 * 3 + 3)
    pack = pack_of(two.model)
    assert pack is not None
    dead = sum(int((~m).sum()) for m in pack.masks["two"].values()) / weights
    entropy = -dead * torch.tensor(dead).log2() - (1 - dead) * torch.tensor(1 - dead).log2()
    assert bits - head < 1.05 * float(entropy) * weights + 8 * 1200
    assert 0 < dead < 0.5


def test_own_normalization(inputs: Tensor) -> None:
    model = CNN.build()
    base = logits(model, inputs)
    result = add(model, "one", base="zero", own=["1", "4", "9"])
    after = result.model.state_dict()
    assert not torch.equal(after["1.running_mean"], model.state_dict()["1.running_mean"])
    assert torch.equal(logits(lilliput.switch(result.model, "zero"), inputs), base)


def test_over_shared_values(inputs: Tensor) -> None:
    """A clustered backbone stays clustered: a task takes some of its values away."""
    stages = [
        Stage(methods=[Codebook(bits=3)], train=TRAIN),
        Stage(methods=[Piggyback(task="one")], train=TRAIN),
    ]
    model = lilliput.compress(CNN.build(), CNN.task(), stages).model
    assert len(model[3].weight.unique()) <= 9  # type: ignore[index]


@pytest.mark.parametrize(
    "few",
    [HalfWave(), PostTraining(samples=32), LowRank(rank=2, convolutions="channel")],
    ids=lambda method: method.method_name(),
)
def test_a_backbone_of_few_numbers_is_whole_in_the_file(
    few: Any, inputs: Tensor, tmp_path: Path
) -> None:
    """Scales or factors apart from a weight belong to the backbone, not to what one task sees of it."""
    trained = Trained()
    stages = [
        Stage(methods=[few], train=TRAIN),
        Stage(methods=[Piggyback(task="own")], train=TRAIN),
    ]
    file = tmp_path / "run" / "model.safetensors"
    lilliput.compress(CNN.build(), CNN.task(), stages, directory=file.parent, watchers=[trained])
    assert trained.run is not None
    loaded = lilliput.load(file, model=CNN.build(seed=7))
    assert torch.equal(logits(loaded, inputs), logits(trained.run.model, inputs))
    pack = pack_of(trained.run.model)
    assert pack is not None
    for name, whole in pack.weights.items():
        assert torch.equal(pack_of(loaded).weights[name], whole)  # type: ignore[union-attr]


@pytest.mark.parametrize("earlier", [Magnitude(sparsity=0.5), Codebook(bits=2, layers="9")])
@pytest.mark.parametrize("outputs", [3, 5])
def test_an_encoded_last_layer_is_made_anew(earlier: Any, outputs: int, inputs: Tensor) -> None:
    """The new task's has neither the zeros nor the shared values of the one before."""
    alone = lilliput.compress(CNN.build(), CNN.task(), [Stage(methods=[earlier], train=TRAIN)])
    stages = [
        Stage(methods=[earlier], train=TRAIN),
        Stage(methods=[Piggyback(task="one", base="zero", outputs=outputs)], train=TRAIN),
    ]
    model = lilliput.compress(CNN.build(), CNN.task(), stages).model
    head = model[-1].weight  # type: ignore[index]
    assert head.shape[0] == outputs
    assert len(head.unique()) == head.numel()
    assert bool((head != 0).all())
    assert torch.equal(logits(lilliput.switch(model, "zero"), inputs), logits(alone.model, inputs))


def test_bad_settings(inputs: Tensor) -> None:
    with pytest.raises(InputError, match="not above the threshold"):
        add(CNN.build(), "one", start=1e-3)
    one = add(CNN.build(), "one", base="zero").model
    with pytest.raises(InputError, match="has the tasks zero, one already"):
        add(one, "two", base="minus one")
    assert lilliput.tasks_of(one) == ["zero", "one"]
