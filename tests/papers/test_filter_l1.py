"""Pruning Filters for Efficient ConvNets: the criterion, both selections, shortcuts, rates, and rounds."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput.core.run import Run
from lilliput.core.task import Task
from lilliput.errors import InputError, NothingChanged, NothingMatched
from lilliput.measure import macs, size
from lilliput.measure.sensitivity import Row, Sensitivity
from lilliput.mechanisms.budget import Budget
from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.surgery import plan_of
from lilliput.methods.prune import _channels
from lilliput.methods.prune.filter_l1 import (
    FilterL1,
    filter_sensitivity,
    magnitudes,
    rates,
    shortcut_makers,
)
from lilliput.testing.networks import NETWORKS

CLASSES = 3


def one_shot(method: FilterL1, net: nn.Module, inputs: Tensor) -> tuple[nn.Module, Run]:
    """The method on a copy, without training."""
    data = [(inputs, torch.zeros(len(inputs), dtype=torch.long))]
    task = Task(data, data, None, nn.functional.cross_entropy, lilliput.accuracy)
    run = Run(copy.deepcopy(net), task, original=net, methods=[method])
    method.attach(run)
    method.finish(run)
    return run.model, run


def kept(net: nn.Module, tensor: str, dim: int = 0) -> list[int]:
    plan = plan_of(net)
    assert plan is not None
    return [int(i) for i in plan.kept[tensor][dim]]


# -- the criterion ----------------------------------------------------------------------------


def test_smallest_sum_of_magnitudes_goes() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 2, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 2))
    filters = torch.zeros(4, 2, 2, 2)
    filters[0, 0, 0, 0] = 9.0  # one large weight: the largest l2 norm, the second smallest sum
    filters[1] = -2.0
    filters[2] = 1.0
    filters[3] = 1.5
    net[0].weight.data = filters
    thin, _ = one_shot(FilterL1(keep=0.5, round_to=1), net, torch.randn(1, 2, 5, 5))
    assert kept(thin, "0.weight") == [1, 3]
    assert torch.equal(thin[0].weight, net[0].weight[[1, 3]])
    assert torch.equal(thin[2].weight, net[2].weight[:, [1, 3]])


def test_greedy_ignores_kernels_of_removed_channels() -> None:
    """The first layer loses channel 1, which is all that makes filter 0 of the second layer large."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 1, 1)
    )
    net[0].weight.data = torch.tensor([3.0, 1.0]).view(2, 1, 1, 1)
    net[1].weight.data = torch.tensor([[0.1, 9.0], [2.0, 0.0]]).view(2, 2, 1, 1)
    x = torch.randn(1, 1, 3, 3)
    independent, _ = one_shot(FilterL1(keep=0.5, round_to=1), net, x)
    greedy, _ = one_shot(FilterL1(keep=0.5, round_to=1, selection="greedy"), net, x)
    assert kept(independent, "0.weight") == kept(greedy, "0.weight") == [0]
    assert kept(independent, "1.weight") == [0]
    assert kept(greedy, "1.weight") == [1]


def test_greedy_equals_a_brute_force_from_input_to_output() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3),
        nn.Flatten(), nn.Linear(4 * 9, 6), nn.Linear(6, 2),
    )  # fmt: skip
    thin, _ = one_shot(
        FilterL1(keep=0.5, round_to=1, selection="greedy"), net, torch.randn(2, 3, 9, 9)
    )
    inputs = [0, 1, 2]
    for name, pixels in (("0", 1), ("2", 1), ("4", 1), ("6", 9)):
        weight = net[int(name)].weight.detach()
        columns = [pixels * c + p for c in inputs for p in range(pixels)]
        sums = weight[:, columns].abs().flatten(1).sum(1)
        inputs = sums.topk(len(sums) // 2).indices.sort().values.tolist()
        assert kept(thin, f"{name}.weight") == inputs


def conv(before: int, after: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    made = nn.Sequential(
        nn.Conv2d(before, after, size, stride, size // 2, bias=False), nn.BatchNorm2d(after)
    )
    nn.init.uniform_(made[1].weight, 0.5, 1.5)
    nn.init.normal_(made[1].bias)
    nn.init.normal_(made[1].running_mean)
    return made


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(before, after), conv(after, after)
        self.shortcut = conv(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x).relu())
        return (out + self.shortcut(x)).relu()


class Residual(nn.Module):
    """Two stages, the second with a projection shortcut and a block with an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16), Block(16, 16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))
        return logits


X = torch.randn(2, 3, 8, 8)


def test_shrunk_equals_masked() -> None:
    """With the shift of batch normalization zeroed too; else a zero filter still sends relu(beta)."""
    net = Residual().eval()
    thin, _ = one_shot(FilterL1(keep=0.5, round_to=1), net, X)
    masked = copy.deepcopy(net)
    with torch.no_grad():
        for name, module in masked.named_modules():
            if isinstance(module, nn.Conv2d):
                gone = sorted(set(range(module.out_channels)) - set(kept(thin, f"{name}.weight")))
                norm = masked.get_submodule(name.rpartition(".")[0])[1]
                for tensor in (module.weight, norm.weight, norm.bias):
                    tensor[gone] = 0
        torch.testing.assert_close(thin.eval()(X), masked(X))


def test_index_sets_are_equal_across_every_sum() -> None:
    thin, _ = one_shot(FilterL1(keep=0.5, round_to=1), Residual(), X)
    stream = [kept(thin, f"{name}.0.weight") for name in ("blocks.1.conv2", "blocks.2.conv2")]
    assert stream[0] == stream[1] == kept(thin, "blocks.1.shortcut.0.weight")
    assert stream[0] == kept(thin, "head.weight", 1) == kept(thin, "blocks.2.conv1.0.weight", 1)
    assert kept(thin, "stem.0.weight") == kept(thin, "blocks.0.conv2.0.weight")


def test_the_projection_shortcut_ranks_the_sum() -> None:
    net = Residual()
    shortcut = net.blocks[1].shortcut[0]
    with torch.no_grad():  # the projection is for channels 0 to 7, everybody else against them
        shortcut.weight[8:] *= 0.01
        net.blocks[1].conv2[0].weight[:8] *= 0.01
        net.blocks[2].conv2[0].weight[:8] *= 0.01
    by_projection, _ = one_shot(FilterL1(keep=0.5, round_to=1), net, X)
    by_all, _ = one_shot(FilterL1(keep=0.5, round_to=1, shortcut="all"), net, X)
    assert kept(by_projection, "head.weight", 1) == list(range(8))
    assert kept(by_all, "head.weight", 1) == list(range(8, 16))


def test_which_layers_are_projections() -> None:
    groups = find_groups(Residual(), X)
    ranking = {
        frozenset(group.layers): {m.layer for m in shortcut_makers(groups, number)}
        for number, group in enumerate(groups.groups)
    }
    first = frozenset({"stem.0", "blocks.0.conv2.0"})
    second = frozenset({"blocks.1.conv2.0", "blocks.1.shortcut.0", "blocks.2.conv2.0"})
    assert ranking[first] == set(first)  # identity shortcuts only: all of them
    assert ranking[second] == {"blocks.1.shortcut.0"}


class Squeeze(nn.Module):
    """A block whose hidden channels are read by two layers, of which none is a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = conv(3, 8), conv(8, 16, 1), conv(16, 8, 1)
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        hidden = self.wide(x).relu()
        gate = self.up(self.down(hidden.mean((2, 3))).relu()).sigmoid()
        x = x + self.narrow(hidden * gate[:, :, None, None])
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_squeeze_and_excitation_is_no_projection() -> None:
    groups = find_groups(Squeeze(), X)
    number = next(n for n, g in enumerate(groups.groups) if "stem.0" in g.layers)
    assert {m.layer for m in shortcut_makers(groups, number)} == {"stem.0", "narrow.0"}


# -- amounts ----------------------------------------------------------------------------------


def vgg16() -> nn.Sequential:
    """The paper's network for CIFAR-10: 13 convolutions, one hidden linear layer."""
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            block = (nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            layers.append(nn.Sequential(*block))
            before = width
        else:
            layers.append(nn.MaxPool2d(2))
    head = (nn.Flatten(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10))
    return nn.Sequential(*layers, *head)


def test_vgg16_a_of_the_paper() -> None:
    """Table 2: -64.0 % of the parameters, -34.2 % of the FLOPs, from halving conv1 and conv8 to 13."""
    net, x = vgg16(), torch.randn(1, 3, 32, 32)
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    halved = {name: 0.5 for n, name in enumerate(names, 1) if n == 1 or n >= 8}
    thinned = lilliput.thin(net, x, keep=halved)
    widths = [m.out_channels for m in thinned.model.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [32, 64, 128, 128, 256, 256, 256, *[256] * 6]
    assert 1 - size(thinned.model).parameters / size(net).parameters == pytest.approx(
        0.640, abs=0.001
    )
    assert 1 - macs(thinned.model, x).total / macs(net, x).total == pytest.approx(0.342, abs=0.001)


@pytest.mark.parametrize("quantity", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_budget_is_met(quantity: str, scope: Any) -> None:
    net = Residual()
    method = FilterL1(budget={quantity: 0.5}, scope=scope, normalize="mean", round_to=1)
    thin, _ = one_shot(method, net, X)

    def cost(model: nn.Module) -> int:
        counted = size(model)
        known = {"parameters": counted.parameters, "bytes": counted.dense_bytes}
        return known[quantity] if quantity in known else macs(model, X[:1]).total

    assert 0.45 * cost(net) < cost(thin) <= 0.5 * cost(net)


def test_attention_meets_a_budget_in_macs() -> None:
    """Its multiplications of activations with each other are not proportional to any weight."""
    layer = nn.TransformerEncoderLayer(48, 2, 64, batch_first=True)
    net = nn.Sequential(nn.Linear(6, 48), layer, nn.Linear(48, CLASSES))
    tokens = torch.randn(1, 64, 6)
    thin, _ = one_shot(FilterL1(budget={"macs": 0.5}, round_to=1), net, tokens)
    assert 0.45 < macs(thin, tokens).total / macs(net, tokens).total <= 0.5


def test_what_a_latency_led_to_is_kept(tmp_path: Path) -> None:
    """Times are never the same twice, and a run that goes on must come to the same widths."""
    widths = []
    for kept_widths in (None, [16] * 3):
        if kept_widths:
            next(tmp_path.glob("widths-*.json")).write_text(json.dumps(kept_widths))
        net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        data = [(torch.randn(4, 64), torch.zeros(4, dtype=torch.long))]
        task = Task(data, data, None, nn.functional.cross_entropy, lilliput.accuracy)
        method = FilterL1(budget={"latency": 1.0}, at_least=8)
        run = Run(net, task, original=copy.deepcopy(net), methods=[method], directory=tmp_path)
        with contextlib.suppress(NothingChanged):  # at first nothing has to become faster
            method.attach(run)
        widths.append([layer.out_features for layer in net])
    assert widths[1] == [16, 16, 16, 64]


def test_several_processes_cannot_follow_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_channels, "_processes", lambda: 2)
    with pytest.raises(InputError, match="several processes"):
        one_shot(FilterL1(keep=0.5, rounds=2), Residual(), X)
    with pytest.raises(InputError, match="same time"):
        one_shot(FilterL1(budget={"latency": 0.5}), Residual(), X)
    one_shot(FilterL1(keep=0.5, round_to=1), Residual(), X)  # before they train, all cut the same


def test_folded_constants_are_told() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        net[0].weight[[1, 4]] = 0
        net[0].bias[[1, 4]] = 0.7
    x = torch.randn(16, 5).double()
    method = FilterL1(keep=0.75, round_to=1, fold="constant")
    thin, run = one_shot(method, net, x)
    torch.testing.assert_close(thin(x), net(x))
    assert ("2.bias", "constants folded", 2) in [
        (c.where, c.what, c.after) for c in method.finish(run)
    ]


def test_global_scope_gives_layers_different_widths() -> None:
    net = Residual()
    with torch.no_grad():
        net.blocks[0].conv1[0].weight *= 1e-6
    method = FilterL1(keep=0.6, scope="global", round_to=1, at_least=2)
    thin, run = one_shot(method, net, X)
    assert thin.blocks[0].conv1[0].out_channels == 2
    assert thin.blocks[2].conv1[0].out_channels > 8
    notes = {c.where: c.note for c in method.finish(run)}
    assert "at_least=2" in notes["blocks.0.conv1.0"]


def test_a_budget_out_of_reach_says_what_is_reachable() -> None:
    net = Residual()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match="cannot be reached"):
        one_shot(FilterL1(budget=Budget(parameters=0.001)), net, X)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_rounding_that_removes_nothing_is_an_error() -> None:
    with pytest.raises(NothingChanged, match="round_to"):
        one_shot(FilterL1(keep=0.9, round_to=8), Residual(), X)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"keep": 0.5, "budget": {"macs": 0.5}},
        {"keep": 0.0},
        {"keep": {"*": 0.5}, "scope": "global"},
        {"keep": 0.5, "scope": "global", "selection": "greedy"},
        {"max_drop": 1.0, "keep": 0.5},
        {"keep": 0.5, "round_to": 0},
    ],
    ids=str,
)
def test_settings_that_contradict_each_other(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        FilterL1(**settings)


# -- patterns ---------------------------------------------------------------------------------


def test_a_pattern_prunes_inside_of_the_blocks_only() -> None:
    net = Residual()
    thin, _ = one_shot(FilterL1(keep={"*conv1*": 0.5}, round_to=1), net, X)
    changed = {n for n, p in thin.named_parameters() if p.shape != net.get_parameter(n).shape}
    assert {n.split(".")[2] for n in changed} == {"conv1", "conv2"}
    assert thin.head.in_features == 16


def test_a_pattern_of_the_output_says_why_it_must_stay() -> None:
    with pytest.raises(NothingMatched, match=r"head\.weight dim 0.*output"):
        one_shot(FilterL1(keep=0.5, layers="head"), Residual(), X)


def test_a_pattern_of_nothing_names_the_nearest_layers() -> None:
    with pytest.raises(NothingMatched, match=r"stem\.0"):
        FilterL1(keep=0.5, layers="stem.9").check(Residual())
    with pytest.raises(NothingMatched, match=r"stem\.0"):
        one_shot(FilterL1(keep={"stem.9": 0.5}), Residual(), X)


# -- rates by sensitivity ---------------------------------------------------------------------


def test_rates_end_at_the_first_amount_that_costs_too_much() -> None:
    points = {
        "easy.weight": [90.0, 89.9, 89.6],
        "hard.weight": [80.0, 90.0, 90.0],
        "middle": [89.8, 88.0, 89.9],
    }
    rows = [
        Row(layer, "sparsity", amount, score)
        for layer, scores in points.items()
        for amount, score in zip((0.2, 0.4, 0.6), scores, strict=True)
    ]
    rows.append(Row("easy.weight", "bits", 8, 10.0))
    found = rates(Sensitivity(90.0, "accuracy", rows), max_drop=0.5)
    assert found == {"easy": pytest.approx(0.4), "hard": 1.0, "middle": pytest.approx(0.8)}


def test_scan_silences_the_smallest_filters_and_nothing_else() -> None:
    network = NETWORKS[1]
    net, task = network.build().eval(), network.task()
    groups = find_groups(net, torch.randn(2, *network.shape))
    before = copy.deepcopy(net.state_dict())
    scan = filter_sensitivity(net, task, groups, fractions=(0.5,), limit=2)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for number, row in enumerate(scan.rows):
        probe = copy.deepcopy(net)
        group = groups.groups[number]
        sums = magnitudes(net, groups, number, group.with_role("makes"))
        gone = sums.argsort()[: group.channels // 2]
        (reader,) = group.with_role("uses")
        with torch.no_grad():
            probe.get_parameter(reader.tensor)[:, reader.index[gone].ravel()] = 0
            first = list(task.validation)[:2]
            hits = [lilliput.accuracy(probe(b.inputs), b.target) for b in first]
        assert row.layer == group.name
        assert row.score == pytest.approx(float(torch.cat(hits).mean()))


def test_max_drop_keeps_what_the_score_needs() -> None:
    """The first layer's small filters do nothing at all; in the second every unit decides."""
    net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        for layer in (net[0], net[2], net[4]):
            layer.bias.zero_()
        net[0].weight[:] = torch.cat([torch.eye(4), 1e-3 * torch.randn(6, 4)])
        net[2].weight[:] = torch.cat([torch.eye(4), torch.zeros(4, 6)], 1)
        net[4].weight[:] = torch.eye(4)
        net[4].bias[1:] = 0.1  # else class 0 would win without its unit too
    inputs, labels = torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8)
    data = [(inputs, labels)]
    task = Task(data, data, None, nn.functional.cross_entropy, lilliput.accuracy)
    method = FilterL1(max_drop=1.0, round_to=1)
    run = Run(copy.deepcopy(net), task, original=net, methods=[method])
    method.attach(run)
    assert (run.model[0].out_features, run.model[2].out_features) == (4, 4)
    with torch.no_grad():
        assert lilliput.accuracy(run.model(inputs), labels).mean() == 100


# -- one shot and iterative -------------------------------------------------------------------


def widths_over_time(method: FilterL1, steps: int) -> list[tuple[int, ...]]:
    """Widths of the two hidden layers after every step of a loop of the user's own, momentum included."""
    network = NETWORKS[0]
    net = network.build()
    attached = lilliput.attach(net, method, steps=steps, task=network.task())
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    attached.run.optimizer = optimizer
    seen = []
    for step, batch in zip(range(steps), 10 * list(network.task().train), strict=False):
        attached.batch(batch.inputs, batch.target)
        output = net(batch.inputs)
        loss = attached.loss(nn.functional.cross_entropy(output, batch.target), output)
        optimizer.zero_grad()
        loss.backward()
        attached.after_backward()
        optimizer.step()
        attached.after_step()
        buffers = [optimizer.state[p]["momentum_buffer"].shape for p in net.parameters()]
        assert buffers == [p.shape for p in net.parameters()], step
        seen.append((net[0].out_features, net[3].out_features))
    totals = {c.what: (c.before, c.after) for c in attached.finish() if c.where == "model"}
    assert totals["parameters"] == (size(network.build()).parameters, size(net).parameters)
    return seen


def test_one_shot_prunes_before_the_first_step() -> None:
    assert widths_over_time(FilterL1(keep=0.5, round_to=1), 4) == [(12, 8)] * 4


def test_rounds_are_spread_over_the_stage() -> None:
    method = FilterL1(keep=0.5, round_to=1, rounds=4, until=0.5)
    seen = widths_over_time(method, 16)
    expected = [(21, 14), (18, 12), (15, 10), (12, 8)]
    assert seen == [expected[min(step // 2, 3)] for step in range(16)]


def test_rounds_over_all_layers_together_reach_the_same_total() -> None:
    method = FilterL1(keep=0.5, scope="global", round_to=1, rounds=4, until=0.5)
    totals = [sum(widths) for widths in widths_over_time(method, 16)]
    assert totals[0::4] == [35, 25, 20, 20]  # 7/8, 5/8 (the third round), 4/8 of 40 channels
    assert totals[2] == 30


def test_rounds_in_a_loop_of_ones_own_need_the_optimizer() -> None:
    network = NETWORKS[0]
    net = network.build()
    method = FilterL1(keep=0.5, round_to=1, rounds=2)
    attached = lilliput.attach(net, method, steps=4, task=network.task())
    (batch, *_) = network.task().train
    with pytest.raises(InputError, match=r"attached\.run\.optimizer"):
        for _ in range(4):
            attached.batch(batch.inputs, batch.target)
            attached.after_step()


def test_an_own_loop_must_give_an_example() -> None:
    with pytest.raises(InputError, match="task="):
        lilliput.attach(NETWORKS[0].build(), FilterL1(keep=0.5), steps=4)


def test_layers_and_totals_are_told() -> None:
    net = Residual()
    method = FilterL1(keep=0.5, round_to=1)
    thin, run = one_shot(method, net, X)
    told = {(c.where, c.what): (c.before, c.after) for c in method.finish(run)}
    assert told["blocks.1.conv1.0", "channels"] == (16, 8)
    assert told["model", "macs"] == (macs(net, X[:1]).total, macs(thin, X[:1]).total)
    assert all(method.method_name() == c.method for c in method.finish(run))
    assert np.isfinite(method.memory(run)["error"])
