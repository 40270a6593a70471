"""Soft filter pruning: zeros after every epoch that may come back, and their removal at the end."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.architectures.resnet_cifar import resnet8
from lilliput.core.run import Run
from lilliput.core.task import Task, evaluation
from lilliput.engine.progress import Watcher
from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.surgery import plan_of
from lilliput.methods import Codebook, SoftFilter
from lilliput.methods.prune.soft_filter import zero_filters
from lilliput.testing import NETWORKS, make_batches

MLP, CNN, _ = NETWORKS
TRAIN = Train(epochs=8, optimizer="sgd", lr=0.2, momentum=0.9, weight_decay=1e-3)


def task_of(*shape: int) -> Task:
    train, test = make_batches(*shape, samples=64)
    return Task(train, test, test, nn.functional.cross_entropy, lilliput.accuracy)


def zeros(net: nn.Module) -> dict[str, set[int]]:
    """The filters of each convolution that are exactly zero."""
    return {
        name: set((module.weight.flatten(1) == 0).all(1).nonzero().flatten().tolist())
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def kept(net: nn.Module, tensor: str) -> set[int]:
    plan = plan_of(net)
    assert plan is not None
    return set(plan.kept[tensor][0].tolist())


def logits(net: nn.Module, inputs: Tensor) -> Tensor:
    with evaluation(net), torch.no_grad():
        return net(inputs)


@dataclass
class Epochs(Watcher):
    """Zero filters after the first step of each epoch and at its end, and the last network."""

    begun: list[dict[str, set[int]]] = field(default_factory=list)
    ended: list[dict[str, set[int]]] = field(default_factory=list)
    last: nn.Module | None = None
    steps: int = 4

    def step_done(self, run: Run) -> None:
        if run.step % self.steps == 1:
            self.begun.append(zeros(run.model))

    def epoch_done(self, run: Run, figures: dict[str, Any]) -> None:
        self.ended.append(zeros(run.model))
        self.last = copy.deepcopy(run.model)


def watched(method: SoftFilter, train: Train = TRAIN) -> tuple[Epochs, nn.Module]:
    watcher = Epochs()
    stage = Stage(methods=[method], train=train)
    result = lilliput.compress(CNN.build(), CNN.task(), [stage], watchers=[watcher])
    return watcher, result.model


def test_lowest_norms_become_zero_in_every_layer_alike() -> None:
    net = CNN.build()
    inputs = next(iter(CNN.task().train)).inputs
    groups = find_groups(net, inputs)
    norms = [net[k].weight.detach().flatten(1).norm(dim=1) for k in (0, 3)]
    attached = lilliput.attach(net, SoftFilter(keep=0.5, round_to=1), task=CNN.task())
    (method,) = attached.run.methods
    method.after_epoch(attached.run)
    found = zeros(net)
    assert len(groups.groups) == 2
    for name, norm in zip(("0", "3"), norms, strict=True):
        assert found[name] == set(norm.argsort()[: len(norm) // 2].tolist())


def test_zeros_come_after_every_epoch_and_nothing_holds_them() -> None:
    watcher, _ = watched(SoftFilter(keep=0.5, round_to=1))
    assert all(len(ended["0"]) == 3 and len(ended["3"]) == 4 for ended in watcher.ended)
    # One step into an epoch all filters have weights again.
    assert all(not any(begun.values()) for begun in watcher.begun)


def test_the_set_may_change_between_epochs() -> None:
    watcher, _ = watched(SoftFilter(keep=0.5, round_to=1))
    sets = [frozenset(ended["3"]) for ended in watcher.ended]
    assert len(set(sets)) > 1
    assert any(earlier - later for earlier, later in itertools.pairwise(sets))


def test_the_zero_filters_are_those_that_are_removed() -> None:
    watcher, model = watched(SoftFilter(keep=0.5, round_to=1))
    assert kept(model, "0.weight") == set(range(6)) - watcher.ended[-1]["0"]
    assert kept(model, "3.weight") == set(range(8)) - watcher.ended[-1]["3"]
    assert not any(zeros(model).values())


def test_thin_equals_the_network_with_zeros_constants_included() -> None:
    inputs = next(iter(CNN.task().validation)).inputs
    errors = {}
    for fold in ("constant", "none"):
        watcher, model = watched(SoftFilter(keep=0.5, round_to=1, fold=fold))
        assert watcher.last is not None
        expected = logits(watcher.last, inputs)
        errors[fold] = float((logits(model, inputs) - expected).abs().max())
        norm: Any = watcher.last[4]
        gone = sorted(watcher.ended[-1]["3"])
        shift = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
        assert bool((shift[gone] > 0).any())  # something is there to be folded
    assert errors["constant"] < 1e-5
    assert errors["none"] > 1e-3


def test_zeros_before_the_first_epoch_are_an_option() -> None:
    seen = {}
    for first in (False, True):
        net = CNN.build()
        lilliput.attach(net, SoftFilter(keep=0.5, round_to=1, zero_first=first), task=CNN.task())
        seen[first] = {name: len(gone) for name, gone in zeros(net).items()}
    assert seen == {False: {"0": 0, "3": 0}, True: {"0": 3, "3": 4}}


def test_layers_of_a_residual_stream_are_ranked_together() -> None:
    net, task = resnet8(classes=3), task_of(3, 16, 16)
    groups = find_groups(net, task.example_inputs()).groups
    makers = next(g for g in groups if "conv1" in g.layers)
    squares = torch.zeros(16)
    for member in makers.with_role("makes"):
        weight = net.get_parameter(member.tensor).detach()
        squares += weight[member.index[:, 0]].flatten(1).square().sum(1)
    lowest = set(squares.argsort()[:8].tolist())
    stage = Stage(methods=[SoftFilter(keep=0.5, round_to=1)], train=Train(epochs=1, lr=1e-9))
    result = lilliput.compress(net, task, [stage])
    assert kept(result.model, "conv1.weight") == set(range(16)) - lowest
    assert kept(result.model, "layer1.0.conv2.weight") == kept(result.model, "conv1.weight")


def test_shortcuts_can_be_left_out() -> None:
    net, task = resnet8(classes=3), task_of(3, 16, 16)
    method = SoftFilter(keep=0.5, round_to=1, shortcuts="skip")
    result = lilliput.compress(net, task, [Stage(methods=[method], train=Train(epochs=1))])
    widths = {
        n: m.out_channels for n, m in result.model.named_modules() if isinstance(m, nn.Conv2d)
    }
    # Of the last stream 32 channels are made by one layer alone; the others are tied to earlier streams.
    assert widths == {
        "conv1": 16, "layer1.0.conv1": 8, "layer1.0.conv2": 16, "layer2.0.conv1": 16,
        "layer2.0.conv2": 32, "layer3.0.conv1": 32, "layer3.0.conv2": 48,
    }  # fmt: skip


def test_filters_of_shared_values_stay_until_the_end() -> None:
    net = CNN.build()
    stages = [
        Codebook(bits=2),
        Stage(methods=[SoftFilter(keep=0.5, round_to=1)], train=Train(epochs=1)),
    ]
    watcher = Epochs()
    result = lilliput.compress(net, CNN.task(), stages, watchers=[watcher])
    assert watcher.ended == [{"0": set(), "3": set()}]
    assert (result.model[0].out_channels, result.model[3].out_channels) == (3, 4)


def test_zeroing_is_in_place_and_touches_nothing_else() -> None:
    net = CNN.build()
    groups = find_groups(net, torch.randn(2, 1, 8, 8))
    parameters, before = list(net.parameters()), copy.deepcopy(net.state_dict())
    zero_filters(net, groups, {0: np.array([1, 4])})
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    before["0.weight"][[1, 4]] = 0.0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
