"""Mallya & Lazebnik 2018: PackNet; and what packnet and piggyback share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.select import select
from lilliput.errors import CorruptArtifact, InputError, ModelMismatch, SurgeryFailed, UnknownName
from lilliput.mechanisms.encodings import Mask, encode
from lilliput.mechanisms.packing import pack_of
from lilliput.methods import BornAgain, FilterL1, Magnitude, Packnet, Piggyback
from lilliput.testing import NETWORKS
from lilliput.testing.contract import Trained

_, CNN, _ = NETWORKS
ROUGH = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def train(epochs: int = 3, **settings: Any) -> Train:
    return Train(**{"epochs": epochs, **ROUGH, **settings})


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs)


def other_task(classes: int, seed: int) -> lilliput.Task:
    """Other labels for the same kind of images."""
    plain = CNN.task()
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(64, classes, generator=generator)

    def relabeled(batches: Any) -> list[tuple[Tensor, Tensor]]:
        return [(b.inputs, (b.inputs.flatten(1) @ direction).argmax(1)) for b in batches]

    parts = [relabeled(p) for p in (plain.train, plain.validation, plain.validation)]
    return lilliput.Task(*parts, nn.functional.cross_entropy, lilliput.accuracy)


TASKS = {"a": (3, None), "b": (5, 1), "c": (2, 2)}


def add(model: nn.Module, name: str, folder: Path | None = None, **settings: Any) -> Any:
    classes, seed = TASKS[name]
    task = CNN.task() if seed is None else other_task(classes, seed)
    method = Packnet(**{"task": name, "prune": 0.6, "outputs": classes, **settings})
    return lilliput.compress(
        model, task, [Stage(methods=[method], train=train())], directory=folder
    )


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def three(tmp_path_factory: Any) -> list[Any]:
    """The results after each of three tasks; nobody changes them."""
    folder, model, found = tmp_path_factory.mktemp("tasks"), CNN.build(), []
    for name in TASKS:
        found.append(add(model, name, folder / name))
        model = found[-1].model
    return found


def as_task(result: Any, name: str) -> nn.Module:
    return lilliput.load(result.artifact, model=CNN.build(), task=name)


def test_earlier_tasks_are_bit_identical_after_later_ones(three: list[Any], inputs: Tensor) -> None:
    """With batch normalization, momentum and weight decay, and last layers of other widths."""
    first = logits(as_task(three[0], "a"), inputs)
    second = logits(as_task(three[1], "b"), inputs)
    assert first.shape == (40, 3)
    assert second.shape == (40, 5)
    assert torch.equal(logits(as_task(three[1], "a"), inputs), first)
    assert torch.equal(logits(as_task(three[2], "a"), inputs), first)
    assert torch.equal(logits(as_task(three[2], "b"), inputs), second)
    assert torch.equal(logits(as_task(three[2], "c"), inputs), logits(three[2].model, inputs))


def test_owners_come_and_go_as_the_paper_says(three: list[Any]) -> None:
    """A weight is free, or one task's for ever; each task keeps 40 % of what it found free."""
    packs = [pack_of(result.model) for result in three]
    for name, owner in packs[0].owners.items():  # type: ignore[union-attr]
        free = owner.numel()
        for number, pack in enumerate(packs, 1):
            now = pack.owners[name]  # type: ignore[union-attr]
            earlier = packs[number - 2].owners[name] if number > 1 else torch.zeros_like(now)  # type: ignore[union-attr]
            assert torch.equal(now[earlier > 0], earlier[earlier > 0])
            assert set(now[earlier == 0].unique().tolist()) <= {0, number}
            assert int((now == number).sum()) == free - round(0.6 * free)
            assert not pack.weights[name][now == 0].any()  # type: ignore[union-attr]
            free = round(0.6 * free)


def test_a_task_trains_beside_the_weights_of_earlier_ones(three: list[Any], inputs: Tensor) -> None:
    """Task 2 sees task 1's weights too; task 1 does not see task 2's."""
    pack = pack_of(three[1].model)
    assert pack is not None
    for name, owner in pack.owners.items():
        assert torch.equal(pack.sees("b")[name], owner > 0)
        assert torch.equal(pack.sees("a")[name], owner == 1)


def test_statistics_and_biases_are_the_first_tasks(three: list[Any]) -> None:
    first, last = three[0].model.state_dict(), three[2].model.state_dict()
    for name in (
        "1.running_mean",
        "1.running_var",
        "1.weight",
        "1.bias",
        "3.bias",
        "4.running_var",
    ):
        assert torch.equal(first[name], last[name]), name


def test_the_weights_that_are_kept_are_the_largest_and_are_retrained() -> None:
    torch.manual_seed(0)
    method = Packnet(task="a", prune=0.5, until=0.0)
    model = CNN.build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stage = Stage(methods=[method], train=train(1, lr=1e-3))
    result = lilliput.compress(model, CNN.task(), [stage])
    pack = pack_of(result.model)
    assert pack is not None
    for name, owner in pack.owners.items():
        size = before[name].abs()
        assert size[owner == 1].min() >= size[owner == 0].max()
        assert not torch.equal(pack.weights[name][owner == 1], before[name][owner == 1])


def test_switching_in_place(three: list[Any], inputs: Tensor) -> None:
    model = as_task(three[2], "c")
    expected = {name: logits(as_task(three[2], name), inputs) for name in TASKS}
    assert lilliput.tasks_of(model) == ["a", "b", "c"]
    for name in ("a", "c", "b", "a"):
        assert lilliput.switch(model, name) is model
        assert torch.equal(logits(model, inputs), expected[name])
    assert model[-1].out_features == 3  # type: ignore[index]
    with pytest.raises(UnknownName, match=r"'bb'.*'b'"):
        lilliput.switch(model, "bb")
    assert torch.equal(logits(model, inputs), expected["a"])
    with pytest.raises(InputError, match="holds no tasks"):
        lilliput.switch(nn.Linear(2, 2), "a")


def test_a_copy_and_a_saved_switch_keep_all_tasks(
    three: list[Any], inputs: Tensor, tmp_path: Path
) -> None:
    model = copy.deepcopy(three[2].model)
    expected = logits(as_task(three[2], "b"), inputs)
    lilliput.switch(model, "a")
    lilliput.save(model, tmp_path / "a.safetensors")
    loaded = lilliput.load(tmp_path / "a.safetensors", model=CNN.build())
    assert torch.equal(logits(loaded, inputs), logits(as_task(three[0], "a"), inputs))
    assert torch.equal(logits(lilliput.switch(loaded, "b"), inputs), expected)


def test_removing_tasks(three: list[Any], inputs: Tensor) -> None:
    model = as_task(three[2], "a")
    with pytest.raises(InputError, match="build on its weights: b, c"):
        lilliput.remove_task(model, "a")
    lilliput.remove_task(model, "c")
    assert lilliput.tasks_of(model) == ["a", "b"]
    assert torch.equal(logits(model, inputs), logits(as_task(three[0], "a"), inputs))
    pack = pack_of(model)
    assert pack is not None
    assert all(int(owner.max()) == 2 for owner in pack.owners.values())
    again = add(model, "c").model  # the room of the third task is free again
    assert lilliput.tasks_of(again) == ["a", "b", "c"]
    assert torch.equal(
        logits(lilliput.switch(again, "b"), inputs), logits(as_task(three[1], "b"), inputs)
    )


def test_a_task_that_cannot_be_removed_yet_stays(three: list[Any], inputs: Tensor) -> None:
    """A network that still trains cannot become another task, and knows all of its tasks afterwards."""
    model = as_task(three[2], "c")
    pack, expected = pack_of(model), logits(model, inputs)
    weight = select(model)[1]
    encode(weight, Mask(torch.ones_like(weight.value)))
    for change in (lilliput.remove_task, lambda m, _: lilliput.switch(m, "a")):
        with pytest.raises(InputError, match="still trains"):
            change(model, "c")
        assert pack_of(model) is pack
        assert torch.equal(logits(model, inputs), expected)
    assert lilliput.tasks_of(model) == ["a", "b", "c"]


def test_two_stages_of_one_task_go_on(inputs: Tensor) -> None:
    """The second prunes nothing more, and does not take back what the first gave away."""
    stages = [
        Stage(methods=[Packnet(task="a", prune=0.6, until=1.0)], train=train(), name="prune"),
        Stage(methods=[Packnet(task="a", prune=0.0)], train=train(1), name="retrain"),
    ]
    result = lilliput.compress(CNN.build(), CNN.task(), stages)
    pack = pack_of(result.model)
    assert pack is not None
    assert pack.tasks == ("a",)
    for owner in pack.owners.values():
        assert int((owner == 0).sum()) == round(0.6 * owner.numel())


def test_one_run_of_several_tasks(inputs: Tensor, tmp_path: Path) -> None:
    """Stages with tasks of their own; the first stays what it was in a file of its own."""
    stages = [
        Stage(name="a", methods=[Packnet(task="a", prune=0.6)], train=train()),
        Stage(name="b", methods=[Packnet(task="b", prune=0.6, outputs=5)], train=train(),
              task=other_task(5, 1)),
    ]  # fmt: skip
    lilliput.compress(CNN.build(), CNN.task(), stages, directory=tmp_path)
    (first,) = (tmp_path / "stages").glob("0-*.safetensors")
    alone = lilliput.load(first, model=CNN.build())
    together = lilliput.load(tmp_path / "model.safetensors", model=CNN.build(), task="a")
    assert torch.equal(logits(alone, inputs), logits(together, inputs))


def test_running_statistics_stay_where_nothing_is_left_to_freeze(inputs: Tensor) -> None:
    """Normalization without parameters, layers without biases: only the statistics could move."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16, affine=False), nn.ReLU(),
        nn.Linear(16, 3),
    )  # fmt: skip
    first = add(model, "a")
    known = logits(first.model, inputs)
    assert not torch.equal(first.model[2].running_mean, torch.zeros(16))
    second = add(first.model, "b")
    assert torch.equal(second.model[2].running_mean, first.model[2].running_mean)
    assert torch.equal(logits(lilliput.switch(second.model, "a"), inputs), known)


# -- bad input ------------------------------------------------------------------------------------


def test_names_and_layers_that_do_not_fit(three: list[Any]) -> None:
    model = three[1].model
    with pytest.raises(InputError, match="has a task 'a' already"):
        add(model, "a")
    with pytest.raises(InputError, match="share one backbone"):
        add(model, "c", layers="!0")
    with pytest.raises(InputError, match="does not extend"):
        method = Piggyback(task="c", outputs=2)
        lilliput.compress(model, other_task(2, 2), [Stage(methods=[method], train=train(1))])
    with pytest.raises(InputError, match="single linear layer"):
        Packnet(task="c", own="3", outputs=2).check(CNN.build())
    assert lilliput.tasks_of(model) == ["a", "b"]


def test_a_full_network(inputs: Tensor) -> None:
    full = add(CNN.build(), "a", prune=0.0).model
    before = logits(full, inputs)
    with pytest.raises(InputError, match="no weight is free for b"):
        add(full, "b")
    assert torch.equal(logits(full, inputs), before)


def test_what_tasks_share_cannot_be_changed_unseen(three: list[Any], tmp_path: Path) -> None:
    """Training on as if there were one task, pruning or thinning is refused, and nothing is written."""
    model = copy.deepcopy(three[1].model)
    with pytest.raises(ModelMismatch, match="tasks a, b share"):
        lilliput.compress(model, other_task(5, 1), [Stage(train=train(1))])
    with pytest.raises(ModelMismatch, match="tasks a, b share"):
        stage = Stage(methods=[Magnitude(sparsity=0.9)], train=Train(epochs=0))
        lilliput.compress(model, other_task(5, 1), [stage])
    with pytest.raises(SurgeryFailed, match="holds the tasks a, b"):
        stage = Stage(methods=[FilterL1(keep=0.5, round_to=1)], train=Train(epochs=0))
        lilliput.compress(model, other_task(5, 1), [stage])
    with torch.no_grad():
        model[3].bias.add_(1.0)  # type: ignore[index]
    with pytest.raises(ModelMismatch, match=r"3\.bias has changed"):
        lilliput.save(model, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_single_task_may_be_thinned_and_go_on(inputs: Tensor) -> None:
    stages = [
        Stage(methods=[Packnet(task="a", prune=0.6)], train=train()),
        Stage(methods=[FilterL1(keep=0.5, round_to=1)], train=train(1)),
    ]
    thin = lilliput.compress(CNN.build(), CNN.task(), stages)
    pack = pack_of(thin.model)
    assert pack is not None
    assert all(pack.owners[n].shape == thin.model.state_dict()[n].shape for n in pack.owners)
    more = add(thin.model, "b").model
    assert torch.equal(logits(lilliput.switch(more, "a"), inputs), logits(thin.model, inputs))


@pytest.mark.parametrize(
    "packed", [Packnet(task="a", prune=0.6, outputs=3), Piggyback(task="a", outputs=3)]
)
@pytest.mark.parametrize("later", [[], [BornAgain()]], ids=["trained on", "drawn anew"])
def test_a_single_task_owns_what_trains_after_it(
    packed: Any, later: list[Any], inputs: Tensor, tmp_path: Path
) -> None:
    """What was free is not any more; a file without it would be another network."""
    first = lilliput.compress(CNN.build(), CNN.task(), [Stage(methods=[packed], train=train())])
    trained = Trained()
    stage = Stage(methods=later, train=train(), model=None)
    result = lilliput.compress(
        first.model, CNN.task(), [stage], directory=tmp_path, watchers=[trained]
    )
    trained.assert_is_in(result)
    pack = pack_of(result.model)
    assert pack is not None and lilliput.tasks_of(result.model) == ["a"]
    sees = pack.sees("a")["0.weight"]
    assert torch.equal(sees, sees | (result.model[0].weight != 0))  # type: ignore[index]


def test_files_without_tasks_and_damaged_ones(three: list[Any], tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    lilliput.save(CNN.build(), plain)
    with pytest.raises(InputError, match="has no tasks"):
        lilliput.load(plain, model=CNN.build(), task="a")
    with pytest.raises(UnknownName):
        as_task(three[1], "c")
    with lilliput.artifact.open(three[1].artifact) as file:
        tensors = {name: file.dense(name) for name in file.names()}
        good = file.structure
    for change in (
        {"names": ["a"]}, {"names": ["a", "a"]}, {"current": "x"}, {"kind": "x"}, {"own": ["zz"]},
        {"names": [1, 2]}, {"own": []}, {"names": None},
    ):  # fmt: skip
        bad = tmp_path / "bad.safetensors"
        structure = {**good, "tasks": {**good["tasks"], **change}}
        lilliput.artifact.write(bad, tensors, structure=structure)
        model = CNN.build()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises((CorruptArtifact, ModelMismatch)):
            lilliput.load(bad, model=model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
