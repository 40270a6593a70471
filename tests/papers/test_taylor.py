"""Molchanov et al. 2017: pruning convolutional neural networks for resource efficient inference."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.run import Run
from lilliput.core.task import accuracy
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, NothingMatched
from lilliput.measure import macs, size
from lilliput.measure.oracle import oracle, rank_correlation
from lilliput.mechanisms.budget import Budget
from lilliput.mechanisms.groups import Group, Groups, Site, find_groups
from lilliput.mechanisms.surgery import cut
from lilliput.methods.prune._activations import by_channel, by_example, watching
from lilliput.methods.prune._costs import Costs
from lilliput.methods.prune.taylor import (
    Taylor,
    effects,
    lowest_of,
    over_examples,
    saved_flops,
    weight_gradient,
)
from lilliput.testing import NETWORKS

MLP, CNN, TRANSFORMER = NETWORKS


class Branched(nn.Module):
    """A stem with two users, a residual sum, a concatenation, functional ReLUs and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 3, 3, padding=1)
        self.inner = nn.Conv2d(4, 5, 1)
        self.outer = nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Linear(7 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        stem = F.max_pool2d(F.relu(self.stem(x)), 2)
        summed = F.relu(stem + self.outer(F.relu(self.inner(stem))))
        return self.head(torch.cat([F.relu(self.left(stem)), summed], 1).flatten(1))


def batches(
    *shape: int, examples: int = 12, size: int = 4, dtype: Any = torch.float64
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(examples, *shape, generator=generator, dtype=dtype)
    target = torch.randint(0, 3, (examples,), generator=generator)
    return list(zip(inputs.split(size), target.split(size), strict=True))


def branched() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Branched().double().eval()


def run_of(model: nn.Module, data: Sequence[Any], method: Taylor) -> Run:
    task = Task(data, data, None, F.cross_entropy, accuracy)
    return Run(model=model, task=task, methods=[method])


def scores(
    model: nn.Module, data: Sequence[Any], **settings: Any
) -> tuple[Groups, Sequence[np.ndarray]]:
    method = Taylor(**{"keep": 0.5, "samples": 10**6, **settings})
    run = run_of(model, data, method)
    groups = method.groups(run)
    return groups, method.scores(run, groups)


def scaled(model: nn.Module, group: Group, channel: int, factor: float) -> nn.Module:
    """The model with one channel scaled wherever it is used."""
    probe = copy.deepcopy(model)
    for member in group.with_role("uses"):
        weight = probe.get_parameter(member.tensor)
        index = (*[slice(None)] * member.dim, torch.from_numpy(member.index[channel]))
        with torch.no_grad():
            weight[index] *= factor
    return probe


def losses(model: nn.Module, data: Sequence[Any]) -> Tensor:
    """Of each example."""
    with torch.no_grad():
        return torch.cat([F.cross_entropy(model(x), y, reduction="none") for x, y in data])


# -- the criterion ----------------------------------------------------------------------------


def test_criterion_is_the_change_of_the_loss_to_first_order() -> None:
    """Residual sums, concatenation, two users, pooling and flattening included."""
    model, data, step = branched(), batches(2, 6, 6), 1e-6
    groups, found = scores(model, data)
    positions = {"stem": 36, "left": 9, "inner": 9}
    assert sum(g.channels for g in groups.groups) == 4 + 3 + 5
    for group, score in zip(groups.groups, found, strict=True):
        for channel in range(group.channels):
            up = losses(scaled(model, group, channel, 1 + step), data)
            down = losses(scaled(model, group, channel, 1 - step), data)
            each = (up - down) / (2 * step)
            expected = float(each.abs().mean()) / positions[group.name]
            assert score[channel] == pytest.approx(expected, rel=1e-5, abs=1e-10)


def test_magnitude_is_taken_for_each_example() -> None:
    """a = (1, 1) and g = (1, -1): 1 as in the paper, 0 after averaging over the batch."""
    each = effects(torch.ones(2, 1, 1), torch.tensor([1.0, -1.0]).view(2, 1, 1))
    assert float(over_examples(each) / 2) == 1.0
    assert float(over_examples(each, batch_mean=True).abs() / 2) == 0.0


def test_mean_over_positions_comes_before_the_magnitude() -> None:
    activation = torch.ones(1, 1, 2)
    gradient = torch.tensor([[[1.0, -1.0]]])
    assert float(over_examples(effects(activation, gradient))) == 0.0
    gradient = torch.tensor([[[1.0, 3.0]]])
    assert float(over_examples(effects(activation, gradient))) == 2.0


def test_batch_mean_lets_examples_cancel() -> None:
    model, data, step = branched(), batches(2, 6, 6), 1e-6
    groups, found = scores(model, data, batch_mean=True)
    group, score = groups.groups[1], found[1]
    for channel in range(group.channels):
        up = losses(scaled(model, group, channel, 1 + step), data)
        down = losses(scaled(model, group, channel, 1 - step), data)
        expected = abs(float(((up - down) / (2 * step)).mean())) / 9
        assert score[channel] == pytest.approx(expected, rel=1e-4, abs=1e-10)
    assert (score <= scores(model, data)[1][1] + 1e-12).all()


def test_zero_map_has_score_zero() -> None:
    model = branched()
    with torch.no_grad():
        model.inner.weight[2] = 0
        model.inner.bias[2] = 0
    groups, found = scores(model, batches(2, 6, 6))
    assert groups.groups[2].name == "inner"
    assert found[2][2] == 0
    assert (np.delete(found[2], 2) > 0).all()


def test_each_layer_has_unit_norm_after_normalization() -> None:
    model, data = branched(), batches(2, 6, 6)
    method = Taylor(keep=0.5)
    groups, found = scores(model, data)
    for values in method._comparable(groups, found):
        assert values is not None
        assert float(np.linalg.norm(values)) == pytest.approx(1.0)


def test_score_does_not_depend_on_how_examples_are_batched() -> None:
    model = branched()
    together = scores(model, batches(2, 6, 6, size=12))[1]
    apart = scores(model, batches(2, 6, 6, size=5))[1]  # 5, 5 and 2
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_frozen_weights_do_not_hide_gradients() -> None:
    model, data = branched(), batches(2, 6, 6)
    expected = scores(model, data)[1]
    for one, other in zip(expected, scores(model.requires_grad_(False), data)[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_ranks_like_the_oracle_better_than_random() -> None:
    """On a trained network, Spearman against the true change of the loss."""
    task = MLP.task()
    data = list(task.validation)
    stage = Stage(train=Train(epochs=12, lr=0.01), name="train")
    model = lilliput.compress(MLP.build(), task, [stage]).model
    method = Taylor(keep=0.5)
    run = Run(model=model, task=Task(data, data, None, task.loss, task.score), methods=[method])
    groups = method.groups(run)
    truth = oracle(model, groups.groups, data, task.loss)
    assert rank_correlation(groups.groups, method.scores(run, groups), truth).overall > 0.6


# -- the other criteria -------------------------------------------------------------------------


def test_weight_gradient_is_the_effect_of_scaling_a_filter() -> None:
    model, data, step = branched(), batches(2, 6, 6, size=12), 1e-6
    groups, found = scores(model, data, criterion="weight_gradient")
    for group, score in zip(groups.groups, found, strict=True):
        for channel in range(group.channels):
            change = []
            for factor in (1 + step, 1 - step):
                probe = copy.deepcopy(model)
                for member in group.with_role("makes"):
                    with torch.no_grad():
                        probe.get_parameter(member.tensor)[member.index[channel]] *= factor
                change.append(float(losses(probe, data).mean()))
            expected = abs(change[0] - change[1]) / (2 * step)
            assert score[channel] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_weight_gradient_sums_before_the_magnitude() -> None:
    weight, gradient = torch.tensor([[1.0, 2.0], [1.0, 1.0]]), torch.tensor([[3.0, -2.0], [1, 1]])
    assert weight_gradient(weight, gradient).tolist() == [1.0, 2.0]


def test_weight_gradient_of_frozen_weights_by_calibration() -> None:
    model, data = branched(), batches(2, 6, 6)
    expected = scores(model, data, criterion="weight_gradient")[1]
    found = scores(model.requires_grad_(False), data, criterion="weight_gradient")[1]
    assert not any(p.requires_grad for p in model.parameters())
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other)


def test_baselines_by_hand() -> None:
    model, data = branched(), batches(2, 6, 6)
    with torch.no_grad():
        x = torch.cat([x for x, _ in data])
        stem = F.max_pool2d(F.relu(model.stem(x)), 2)
        inner = F.relu(model.inner(stem)).transpose(0, 1).flatten(1)
        weight = model.inner.weight.flatten(1).square().mean(1)
    place = 2  # the group of `inner`
    np.testing.assert_allclose(scores(model, data, criterion="mean")[1][place], inner.mean(1))
    deviation = inner.std(1, unbiased=False)
    np.testing.assert_allclose(scores(model, data, criterion="std")[1][place], deviation)
    np.testing.assert_allclose(scores(model, data, criterion="weight")[1][place], weight)


def test_random_follows_the_seed() -> None:
    model, data = branched(), batches(2, 6, 6)
    first, again = (scores(model, data, criterion="random")[1] for _ in range(2))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert len(set(np.concatenate(first))) == 12


# -- costs and the global ranking -----------------------------------------------------------------


def test_flops_are_what_one_channel_less_saves() -> None:
    model, example = branched(), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    groups = find_groups(model, example)
    saved = saved_flops(Costs(groups.groups, size(model), macs(model, example)))
    for number in range(len(groups.groups)):
        thin = copy.deepcopy(model)
        cut(thin, find_groups(thin, example), {number: np.array([0])})
        difference = macs(model, example).total - macs(thin, example).total
        assert saved[number] * 1e6 == pytest.approx(2 * difference)


def test_expensive_layers_go_first_under_a_large_flops_weight() -> None:
    model, data = branched(), batches(2, 6, 6, dtype=torch.float64)
    settings: dict[str, Any] = {"keep": 0.75, "round_to": 1, "scope": "global"}

    def widths(**more: Any) -> list[int]:
        task = Task(data, data, None, F.cross_entropy, accuracy)
        thin = lilliput.compress(model, task, [Taylor(**settings, **more)]).model
        return [thin.stem.out_channels, thin.left.out_channels, thin.inner.out_channels]

    example = data[0][0][:1]
    groups = find_groups(model, example)
    saved = saved_flops(Costs(groups.groups, size(model), macs(model, example)))
    dearest = int(saved.argmax())
    assert widths(flops_weight=1e6)[dearest] == 1
    assert widths()[dearest] > 1


def test_lowest_of_counts_over_all_groups() -> None:
    values = [np.array([5.0, 1.0, 4.0]), None, np.array([2.0, 3.0])]
    going = {0: np.array([0, 1, 2]), 2: np.array([0, 1])}
    found = lowest_of(values, going, 3)
    assert {g: c.tolist() for g, c in found.items()} == {0: [1], 2: [0, 1]}
    assert lowest_of(values, going, 0) == {}


# -- greedy removal while training ------------------------------------------------------------------


@dataclass
class Widths(Watcher):
    """The width of each layer after every step."""

    layers: tuple[str, ...] = ("0", "3")
    seen: list[list[int]] = field(default_factory=list)

    def step_done(self, run: Run) -> None:
        self.seen.append([len(run.model.get_parameter(f"{n}.weight")) for n in self.layers])
        assert not any(_hooks(run.model))


def _hooks(model: nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def test_one_channel_at_a_time() -> None:
    watcher = Widths()
    method = Taylor(keep=0.8, channels=1, every=2, round_to=1)
    stage = Stage(methods=[method], train=Train(epochs=6, lr=0.01))  # 24 steps
    lilliput.compress(MLP.build(), MLP.task(), [stage], watchers=[watcher])
    totals = [sum(widths) for widths in watcher.seen]
    # The step numbered s (from 0) runs after the removals at 2, 4, ..., s.
    assert totals == [max(40 - step // 2, 32) for step in range(24)]


def test_several_channels_at_a_time_for_a_budget() -> None:
    watcher = Widths()
    method = Taylor(budget=Budget(macs=0.5), channels=3, every=1, round_to=1)
    stage = Stage(methods=[method], train=Train(epochs=6, lr=0.01))
    result = lilliput.compress(MLP.build(), MLP.task(), [stage], watchers=[watcher])
    totals = [40, *(sum(widths) for widths in watcher.seen)]
    assert all(0 <= before - after <= 3 for before, after in itertools.pairwise(totals))
    example = MLP.task().example_inputs()
    dense, thin = macs(MLP.build(), example).total, macs(result.model, example).total
    assert 0.45 * dense < thin <= 0.5 * dense


def test_what_is_left_at_the_end_goes_at_once() -> None:
    method = Taylor(keep=0.5, channels=1, every=3, round_to=1)
    stage = Stage(methods=[method], train=Train(epochs=1, lr=0.01))
    result = lilliput.compress(MLP.build(), MLP.task(), [stage])
    assert len(result.model[0].weight) + len(result.model[3].weight) == 20


def test_greedy_without_training_goes_to_the_target() -> None:
    method = Taylor(keep=0.5, channels=1, every=30, round_to=1)
    result = lilliput.compress(MLP.build(), MLP.task(), [method])
    assert len(result.model[0].weight) + len(result.model[3].weight) == 20


@dataclass
class Stop(Watcher):
    """Ends the process at a step, as Ctrl-C does."""

    step: int

    def step_done(self, run: Run) -> None:
        if run.step == self.step:
            raise KeyboardInterrupt


def test_resumed_between_two_removals(tmp_path: Path) -> None:
    """What the gradients have added up to since the last removal survives."""
    train = Train(epochs=4, lr=0.01, checkpoint_minutes=1e-9)
    stage = Stage(methods=[Taylor(keep=0.6, channels=2, every=3, round_to=1)], train=train)

    def compress(name: str, *watchers: Watcher) -> dict[str, Tensor]:
        folder = tmp_path / name
        result = lilliput.compress(
            MLP.build(), MLP.task(), [stage], directory=folder, watchers=watchers
        )
        return result.model.state_dict()

    expected = compress("undisturbed")
    with pytest.raises(KeyboardInterrupt):
        compress("resumed", Stop(8))
    resumed = compress("resumed")
    assert all(torch.equal(expected[name], value) for name, value in resumed.items())


def test_gradients_of_training_are_those_of_calibration() -> None:
    """One step at a rate of almost 0, in which nothing is random, sees what calibration sees."""
    model, data = branched(), batches(2, 6, 6)
    expected = scores(model, data)[1]
    seen: list[np.ndarray] = []

    class Recording(Taylor):
        def scores(self, run: Run, groups: Groups) -> Sequence[np.ndarray]:
            found = super().scores(run, groups)
            seen.extend(found)
            return found

    task = Task(data, data, None, F.cross_entropy, accuracy)
    method = Recording(keep=0.9, channels=1, every=len(data), round_to=1)
    train = Train(epochs=2, optimizer="sgd", lr=1e-12)
    lilliput.compress(model, task, [Stage(methods=[method], train=train)])
    for one, other in zip(expected, seen, strict=False):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("criterion", ["weight_gradient", "mean", "std", "weight", "random"])
def test_other_criteria_in_rounds(criterion: Any) -> None:
    method = Taylor(keep=0.5, round_to=1, rounds=3, criterion=criterion)
    stage = Stage(methods=[method], train=Train(epochs=2, lr=0.01))
    result = lilliput.compress(CNN.build(), CNN.task(), [stage])
    assert result.model[0].out_channels + result.model[3].out_channels == 7


def test_two_of_them_in_one_stage() -> None:
    first = Taylor(layers="0", keep=0.5, channels=1, every=1, round_to=1)
    second = Taylor(layers="3", keep=0.5, channels=1, every=1, round_to=1)
    stage = Stage(methods=[first, second], train=Train(epochs=4, lr=0.01))
    result = lilliput.compress(MLP.build(), MLP.task(), [stage])
    assert [len(result.model[0].weight), len(result.model[3].weight)] == [12, 8]


def test_layers_that_train_alone() -> None:
    """Frozen layers are ranked too: the gradient reaches their maps although no weight asks for it."""
    method = Taylor(keep=0.5, round_to=1, channels=2, every=1)
    stage = Stage(methods=[method], train=Train(epochs=4, lr=0.01, trainable="5"))
    result = lilliput.compress(MLP.build(), MLP.task(), [stage])
    assert len(result.model[0].weight) + len(result.model[3].weight) == 20


def test_weight_gradient_of_frozen_weights_in_training_is_refused() -> None:
    method = Taylor(keep=0.5, round_to=1, channels=2, every=1, criterion="weight_gradient")
    stage = Stage(methods=[method], train=Train(epochs=1, lr=0.01, trainable="5"))
    with pytest.raises(InputError, match=r"0\.weight has no gradient"):
        lilliput.compress(MLP.build(), MLP.task(), [stage])


# -- nothing is left behind -------------------------------------------------------------------------


def test_calibration_leaves_no_trace() -> None:
    model, data = CNN.build(), list(CNN.task().train)
    model.train()
    model[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = copy.deepcopy(model.state_dict())
    for criterion in ("taylor", "weight_gradient", "mean"):
        scores(model, data, criterion=criterion)
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in model.parameters())  # type: ignore[arg-type]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in model[:3]] == [True, False, True]
    assert not _hooks(model)


def test_hooks_go_when_the_loss_fails() -> None:
    model, data = branched(), batches(2, 6, 6)

    def fail(output: Any, target: Any) -> Tensor:
        raise RuntimeError("no loss today")

    method = Taylor(keep=0.5)
    run = Run(model=model, task=Task(data, data, None, fail, accuracy), methods=[method])
    groups = method.groups(run)
    with pytest.raises(RuntimeError, match="no loss today"):
        method.scores(run, groups)
    assert not _hooks(model)


def test_hooks_go_when_they_cannot_be_placed() -> None:
    model = branched()
    sites = [
        Site(name, "input", 0, 0, 1, np.arange(4)[:, None]) for name in ("inner", "no_such_layer")
    ]
    with pytest.raises(AttributeError), watching(model, sites, lambda n, t: None):
        pass
    assert not _hooks(model)


def test_hooks_go_with_a_run_that_failed() -> None:
    """A step that fails never reaches its end; the user's own model must not keep the hooks."""
    model, data = branched(), batches(2, 6, 6)
    task = Task(data, data, None, F.cross_entropy, accuracy)
    method = Taylor(keep=0.5, channels=1, every=2, round_to=1)
    attached = lilliput.attach(model, method, steps=9, task=task)
    attached.batch(*data[0])
    assert _hooks(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 5, dtype=torch.float64))
    del attached
    gc.collect()
    assert not _hooks(model)


# -- what is refused ----------------------------------------------------------------------------------


def test_attention_is_left_whole_and_said() -> None:
    """Fused attention reads the stream of width 8 where nothing can watch it."""
    for settings in ({"layers": "embed"}, {"layers": ["embed", "*linear1"]}, {"layers": "emb*"}):
        with pytest.raises(NothingMatched, match=r"channels of embed .* no activation"):
            method = Taylor(**settings, keep=0.5)
            lilliput.compress(TRANSFORMER.build(), TRANSFORMER.task(), [method])
    by_weight = Taylor(layers="embed", keep=0.5, round_to=2, criterion="weight_gradient")
    assert lilliput.compress(TRANSFORMER.build(), TRANSFORMER.task(), [by_weight]).model


def test_a_branch_that_the_loss_does_not_hear_is_refused() -> None:
    class Bypassed(Branched):
        def forward(self, x: Tensor) -> Tensor:
            stem = F.max_pool2d(F.relu(self.stem(x)), 2)
            summed = F.relu(stem + self.outer(F.relu(self.inner(stem))).detach())
            return self.head(torch.cat([F.relu(self.left(stem)), summed], 1).flatten(1))

    data = batches(2, 6, 6)
    with pytest.raises(InputError, match="no gradient came through the channels of inner"):
        scores(Bypassed().double(), data)


@pytest.mark.parametrize(
    "settings",
    [
        {"channels": 1},
        {"every": 30},
        {"channels": 1, "every": 30},  # round_to is 8
        {"channels": 1, "every": 30, "round_to": 1, "rounds": 2},
        {"criterion": "oracle"},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Taylor(keep=0.5, **settings)


# -- the layout of activations --------------------------------------------------------------------------


def test_rows_of_each_example() -> None:
    index = np.array([[0, 3], [1, 4]])
    seen = torch.arange(2 * 5 * 3.0).reshape(2, 5, 3)  # batch, channels, positions
    rows = by_channel(seen, Site("x", "input", 0, 0, 1, index))
    assert torch.equal(rows[1, 0], torch.cat([seen[1, 0], seen[1, 3]]))
    tokens = seen.permute(2, 0, 1)  # tokens first, then the batch
    found = by_example(tokens, Site("x", "input", 0, 0, 2, index), examples=2)
    assert found.shape == (2, 2, 6)
    assert torch.equal(found[1, 1].sort().values, torch.cat([seen[1, 1], seen[1, 4]]).sort().values)


def test_windows_of_one_example_belong_together() -> None:
    windows = torch.arange(6 * 4 * 2.0).reshape(6, 4, 2)  # three windows each, tokens, channels
    found = by_example(windows, Site("x", "input", 0, 0, 2, np.arange(2)[:, None]), examples=2)
    assert torch.equal(found[1, 0], windows[3:, :, 0].flatten())


def test_activation_without_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match="no dim holds the 5 examples"):
        by_example(torch.zeros(3, 2), Site("x", "input", 0, 0, 1, np.arange(2)[:, None]), 5)


def test_a_pace_of_its_own_is_refused_under_several_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lilliput.methods.prune import _channels

    monkeypatch.setattr(_channels, "_processes", lambda: 2)
    method = Taylor(keep=0.8, channels=1, every=2, round_to=1)
    with pytest.raises(InputError, match="several processes"):
        method._refuse_processes()
    Taylor(keep=0.8)._refuse_processes()
