"""Hu et al. 2016: network trimming by the average percentage of zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train
from lilliput.architectures.lenet_5 import lenet_5
from lilliput.core.run import Run
from lilliput.core.task import accuracy
from lilliput.errors import InputError, NothingChanged, NothingMatched
from lilliput.mechanisms.budget import Budget
from lilliput.mechanisms.groups import Groups, Site
from lilliput.methods.prune.apoz import Apoz, after_relu, outliers
from lilliput.testing import NETWORKS

MLP, CNN, TRANSFORMER = NETWORKS


def batches(*shape: int, examples: int = 60, size: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(examples, *shape, generator=generator)
    target = torch.randint(0, 3, (examples,), generator=generator)
    return list(zip(inputs.split(size), target.split(size), strict=True))


def task_of(data: Sequence[Any]) -> Task:
    return Task(data, data, None, F.cross_entropy, accuracy)


def shares(model: nn.Module, data: Sequence[Any], **settings: Any) -> dict[str, np.ndarray]:
    """APoZ of the channels of each group by its first layer."""
    method = Apoz(**{"samples": 10**6, **settings})
    run = Run(model=model, task=task_of(data), methods=[method])
    groups = method.groups(run)
    found = method.scores(run, groups)
    mine = method.takes_part(groups)
    return {g.name: 1 - s for g, s, m in zip(groups.groups, found, mine, strict=True) if m}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make()


def units(weights: list[float], biases: list[float], *after: nn.Module) -> nn.Module:
    """One input, a unit for each weight, the given modules, two outputs."""
    first = nn.Linear(1, len(weights))
    with torch.no_grad():
        first.weight.copy_(torch.tensor(weights)[:, None])
        first.bias.copy_(torch.tensor(biases))
    return nn.Sequential(first, *after, nn.Linear(len(weights), 3))


# -- the statistic ------------------------------------------------------------------------------


def test_hand_counted() -> None:
    """A dead unit has 1, one that always fires has 0: not the other way round."""
    model = units([0.0, 0.0, 1.0, -1.0, 1.0], [-1.0, 1.0, 0.0, 0.0, 2.0], nn.ReLU())
    inputs = torch.tensor([[-3.0], [-1.0], [0.0], [1.0], [2.0]])
    data = [(inputs[:3], torch.zeros(3).long()), (inputs[3:], torch.zeros(2).long())]
    assert shares(model, data)["0"].tolist() == pytest.approx([1.0, 0.0, 0.6, 0.6, 0.2])


def test_positions_of_a_map_count_each() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))  # type: ignore[union-attr]
        model[0].bias.zero_()  # type: ignore[union-attr]
    inputs = torch.tensor([[1.0, 2.0, 3.0, -1.0], [1.0, -2.0, -3.0, -4.0]]).view(2, 1, 2, 2)
    found = shares(model, [(inputs, torch.zeros(2).long())])["0"]
    assert found.tolist() == pytest.approx([4 / 8, 4 / 8])
    inputs[0, 0, 1, 1] = 0.0
    found = shares(model, [(inputs, torch.zeros(2).long())])["0"]
    assert found.tolist() == pytest.approx([4 / 8, 5 / 8])


@pytest.mark.parametrize("inplace", [False, True])
def test_counted_after_the_relu_and_before_the_pooling(inplace: bool) -> None:
    def make() -> nn.Module:
        pool, head = nn.MaxPool2d(2), nn.Linear(4 * 9, 3)
        return nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(inplace), pool, nn.Flatten(), head)

    model, data = seeded(make), batches(1, 6, 6)
    with torch.no_grad():
        maps = F.relu(model[0](torch.cat([x for x, _ in data])))  # type: ignore[index]
    expected = (maps == 0).double().mean((0, 2, 3))
    np.testing.assert_allclose(shares(model, data)["0"], expected)


def test_statistics_in_eval_mode() -> None:
    """Dropout in training would make zeros, batch statistics other ones."""
    model, data = CNN.build(), list(CNN.task().train)
    for _ in range(3):
        model.train()(data[0].inputs)
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        first = copied[:3](torch.cat([b.inputs for b in data]))  # type: ignore[index]
        second = copied[3:6](first)  # type: ignore[index]
    found = shares(model.train(), data)
    np.testing.assert_allclose(found["0"], (first == 0).double().mean((0, 2, 3)))
    np.testing.assert_allclose(found["3"], (second == 0).double().mean((0, 2, 3)))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Residual(nn.Module):
    """A stream that passes three ReLUs, as functions or as one shared module."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.relu: Any = nn.ReLU(inplace=True) if module else F.relu
        self.stem = nn.Linear(4, 6)
        self.inside = nn.ModuleList(nn.Linear(6, 5) for _ in range(2))
        self.outside = nn.ModuleList(nn.Linear(5, 6) for _ in range(2))
        self.skip = nn.Identity()
        self.head = nn.Linear(6, 3)
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        self.maps = [x.clone()]
        for inside, outside in zip(self.inside, self.outside, strict=True):
            branch = outside(self.relu(inside(x)))
            x = self.relu(branch + self.skip(x))
            self.maps.append(x.clone())
        return self.head(x)


@pytest.mark.parametrize("module", [False, True])
def test_each_relu_of_a_residual_stream_counts_once(module: bool) -> None:
    model, data = seeded(lambda: Residual(module)), batches(4)
    with torch.no_grad():
        model(torch.cat([x for x, _ in data]))
    each = [(m == 0).double().mean(0) for m in model.maps]
    assert not torch.equal(each[0], each[1])
    np.testing.assert_allclose(shares(model, data)["stem"], torch.stack(each).mean(0))


def site(module: str, side: Any, call: int = 0) -> Site:
    return Site(module, side, call, 0, 1, np.arange(3)[:, None])


def test_which_sites_follow_a_relu() -> None:
    conv, relu = site("conv", "output"), [site("relu", "input"), site("relu", "output")]
    pool, following = [site("pool", "input"), site("pool", "output")], site("next", "input")
    as_module = [conv, *relu, *pool, following]
    flags = [False, False, True, True, True, True]
    alone: list[set[int]] = [set() for _ in as_module]
    assert after_relu(as_module, flags, alone) == [2]
    as_function = [conv, *pool, following]
    assert after_relu(as_function, [False, True, True, True], alone[:4]) == [1, 3]
    same = [set(), set(), set(), {2}]
    assert after_relu(as_function, [False, True, True, True], same) == [1]
    assert after_relu(as_module, [False] * 6, alone) == []


# -- what goes ----------------------------------------------------------------------------------


def test_dead_units_leave_the_outputs_as_they_are_exactly() -> None:
    """With whole numbers no sum is rounded, whatever its order."""
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))
        model[0].weight[[1, 5, 6]], model[0].bias[[1, 5, 6]] = 0.0, -1.0
    data = [(torch.randint(-5, 6, (50, 4), generator=generator).float(), torch.zeros(50).long())]
    found = shares(model, data, layers="0")["0"]
    assert (found == 1).nonzero()[0].tolist() == [1, 5, 6]
    thin = lilliput.compress(model, task_of(data), [Apoz(layers="0", keep=0.75, round_to=1)]).model
    assert thin[0].out_features == 9
    assert torch.equal(thin(data[0][0]), model(data[0][0]))


def test_kept_weights_are_not_initialized_again() -> None:
    model, data = MLP.build(), batches(12)
    silent = shares(model, data)["0"]
    thin = lilliput.compress(model, task_of(data), [Apoz(layers="0", keep=0.5, round_to=1)]).model
    kept = np.sort(np.argsort(silent, kind="stable")[:12])
    assert torch.equal(thin[0].weight, model[0].weight[kept])
    assert torch.equal(thin[3].weight, model[3].weight[:, kept])


def test_the_rule_is_mean_plus_standard_deviation() -> None:
    values = np.array([0.1, 0.2, 0.1, 0.2, 0.9, 0.1])
    limit = values.mean() + values.std()
    assert outliers(values).tolist() == [bool(v > limit) for v in values]
    assert not outliers(np.full(5, 0.7)).any()
    assert not outliers(values, deviations=3.0).any()


def trimmed(model: nn.Module, data: Sequence[Any], **settings: Any) -> list[int]:
    thin = lilliput.compress(model, task_of(data), [Apoz(**settings)]).model
    return [m.out_features for m in thin if isinstance(m, nn.Linear)][:-1]


def layered() -> nn.Module:
    """Two layers; three units of the second are nearly dead."""

    def make() -> nn.Module:
        first, second, last = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 3)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    model = seeded(make)
    with torch.no_grad():
        model[0].bias += 0.5  # type: ignore[index]
        model[2].bias[:3] -= 3.0  # type: ignore[index]
    return model


def test_without_an_amount_the_rule_acts_layer_by_layer() -> None:
    model, data = layered(), batches(12)
    found = shares(model, data)
    expected = [20 - int((s > s.mean() + s.std()).sum()) for s in (found["0"], found["2"])]
    assert max(expected) < 20
    assert trimmed(model, data, round_to=1) == expected


def test_layers_of_highest_mean_come_first() -> None:
    model, data = layered(), batches(12)
    found = shares(model, data)
    assert found["2"].mean() > found["0"].mean()
    first, second = trimmed(model, data, round_to=1, layers_at_once=1)
    assert first == 20
    assert second == 20 - int(outliers(found["2"]).sum())


def test_a_layer_without_outliers_gives_its_turn_away() -> None:
    model, data = layered(), batches(12)
    with torch.no_grad():
        model[2].bias.fill_(-50.0)  # type: ignore[index]
        model[2].bias[:2] = 0.0  # type: ignore[index]
    found = shares(model, data)
    assert found["2"].mean() > found["0"].mean()
    assert not outliers(found["2"]).any()
    assert trimmed(model, data, round_to=1, layers_at_once=1)[0] < 20


def test_a_rule_that_names_nothing_says_so() -> None:
    with pytest.raises(NothingChanged, match="no channel is zero more often than 9 standard dev"):
        trimmed(layered(), batches(12), round_to=1, deviations=9.0)


def test_the_rule_iterates_with_training_between() -> None:
    model, data = layered(), batches(12)
    once = trimmed(model, data, round_to=1)
    stage = Stage(methods=[Apoz(round_to=1, rounds=3)], train=Train(epochs=3, lr=0.01))
    thin = lilliput.compress(model, task_of(data), [stage]).model
    again = [thin[0].out_features, thin[2].out_features]
    assert sum(again) < sum(once)


def test_rounding_never_takes_what_the_rule_keeps() -> None:
    model, data = layered(), batches(12)
    exact = trimmed(model, data, round_to=1)
    for step in (2, 5, 10):
        try:
            found = trimmed(model, data, round_to=step)
        except NothingChanged:
            found = [20, 20]
        assert found == [min(20, -(-width // step) * step) for width in exact]


def test_a_budget_takes_the_place_of_the_rule() -> None:
    model, data = layered(), batches(12)
    widths = trimmed(model, data, budget=Budget(parameters=0.5), round_to=1)
    dense, thin = (sum((a + 1) * b for a, b in _pairs(w)) for w in ([20, 20], widths))
    assert 0.4 * dense < thin <= 0.5 * dense


def _pairs(widths: list[int]) -> list[tuple[int, int]]:
    return list(zip([12, *widths], [*widths, 3], strict=True))


# -- without zeros ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Sigmoid(), nn.Identity(), nn.SiLU()])
def test_activations_without_zeros_are_refused(activation: nn.Module) -> None:
    model = seeded(lambda: units([1.0, -1.0, 0.5], [0.0, 0.1, 0.2], activation))
    with pytest.raises(NothingMatched, match=r"no activation of 0 is sometimes zero.*not_positive"):
        lilliput.compress(model, task_of(batches(1)), [Apoz(keep=0.5, round_to=1)])


def test_always_positive_units_are_refused() -> None:
    model = units([0.1, 0.1], [9.0, 9.0], nn.ReLU())
    with pytest.raises(NothingMatched):
        shares(model, batches(1))


def test_caffes_lenet_has_one_layer_with_zeros() -> None:
    """Its convolutions are followed by pooling and nothing else."""
    model, data = seeded(lenet_5), batches(1, 28, 28, examples=20)
    assert list(shares(model, data)) == ["fc1"]
    with pytest.raises(NothingMatched, match="no activation of conv2 "):
        shares(model, data, layers=["conv2", "fc1"])
    extended = shares(model, data, layers=["conv2", "fc1"], unrectified="not_positive")
    with torch.no_grad():
        read = model[:4](torch.cat([x for x, _ in data]))  # type: ignore[index]
    np.testing.assert_allclose(extended["conv2"], (read <= 0).double().mean((0, 2, 3)))


def test_groups_without_zeros_stay_whole_beside_others() -> None:
    """In a transformer only the hidden units of the feed-forward layers have a ReLU."""
    result = lilliput.compress(TRANSFORMER.build(), TRANSFORMER.task(), [Apoz(keep=0.5)])
    assert result.model.encoder.linear1.out_features == 8
    assert result.model.embed.out_features == 8


def test_scores_of_what_cannot_be_judged_do_not_count() -> None:
    method = Apoz(keep=0.5)
    run = Run(model=TRANSFORMER.build(), task=TRANSFORMER.task(), methods=[method])
    groups: Groups = method.groups(run)
    assert method.takes_part(groups) == [True, True]
    method.scores(run, groups)
    assert method.takes_part(groups) == [False, True]


@pytest.mark.parametrize(
    "settings",
    [{"keep": 0.5, "budget": {"macs": 0.5}}, {"deviations": 0.0}, {"layers_at_once": 0}],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Apoz(**settings)
