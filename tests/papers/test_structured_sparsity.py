"""Structured sparsity learning: the penalty, both updates, thresholds, and what becomes of zeros."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lilliput
from lilliput import Stage, Train
from lilliput.architectures.resnet_cifar import resnet8, resnet20
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.core.task import Task, evaluation
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, NothingChanged, NothingMatched
from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.surgery import plan_of
from lilliput.methods import Codebook, Magnitude, StructuredSparsity
from lilliput.methods.prune._blocks import find_blocks
from lilliput.methods.prune.structured_sparsity import (
    alive,
    bypassed,
    matrix,
    penalty,
    removable,
    shrunk,
    spare_border,
    unfolded,
)
from lilliput.testing import NETWORKS, make_batches

MLP, CNN, _ = NETWORKS
KINDS = ("filters", "channels", "shapes", "depth")
SGD = {"optimizer": "sgd", "lr": 0.1}


def task_of(*shape: int, size: int = 32) -> Task:
    train, test = make_batches(*shape, samples=64, size=size)
    return Task(train, test, test, cross_entropy, lilliput.accuracy)


def logits(net: nn.Module, inputs: Tensor) -> Tensor:
    with evaluation(net), torch.no_grad():
        return net(inputs)


def members(weight: Tensor, kind: str) -> list[Tensor]:
    """The groups of one kind as index masks, written out."""
    filters, channels, positions = weight.shape
    found = []
    for n, c, p in itertools.product(range(filters), range(channels), range(positions)):
        key = {"filters": n, "channels": c, "shapes": (c, p), "depth": 0}[kind]
        found.append((key, (n, c, p)))
    groups: dict[Any, list[tuple[int, int, int]]] = {}
    for key, place in found:
        groups.setdefault(key, []).append(place)
    masks = []
    for places in groups.values():
        mask = torch.zeros_like(weight, dtype=torch.bool)
        for place in places:
            mask[place] = True
        masks.append(mask)
    return masks


class Residual(nn.Module):
    """A first layer, two blocks of two convolutions with a path around them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.a1 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.a2 = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.b1 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.b2 = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.a2(torch.relu(self.a1(x))))
        x = torch.relu(x + self.b2(torch.relu(self.b1(x))))
        return self.head(x.mean((2, 3)))


@dataclass
class Weights(Watcher):
    """All weights after every step of every stage."""

    seen: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)

    def step_done(self, run: Run) -> None:
        values = {w.name: w.value.detach().clone() for w in select(run.model)}
        self.seen.append((run.stage, values))


# -- the penalty ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_penalty_is_lambda_w_over_its_norm(kind: Any) -> None:
    weight = torch.randn(3, 4, 5, dtype=torch.double, requires_grad=True)
    penalty(weight, {kind: 0.7}).backward()
    wanted = torch.zeros_like(weight)
    for mask in members(weight, kind):
        wanted[mask] = 0.7 * weight.detach()[mask] / weight.detach()[mask].norm()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, wanted)


def test_gradient_is_zero_at_a_zero_group() -> None:
    weight = torch.randn(3, 4, 5)
    weight[1] = 0.0
    weight[:, 2] = 0.0
    weight.requires_grad_()
    penalty(weight, dict.fromkeys(KINDS[:3], 1.0)).backward()
    assert weight.grad is not None
    assert bool((weight.grad[1] == 0).all())
    assert bool((weight.grad[:, 2] == 0).all())
    assert bool(weight.grad.isfinite().all())


def test_overlapping_penalties_add_up() -> None:
    weight = torch.randn(3, 4, 5, dtype=torch.double)
    strengths: Any = dict(zip(KINDS, (0.1, 0.2, 0.3, 0.4), strict=True))
    by_hand = sum(
        strength * float(weight[mask].norm())
        for kind, strength in strengths.items()
        for mask in members(weight, kind)
    )
    assert float(penalty(weight, strengths)) == pytest.approx(by_hand)


def test_a_step_follows_loss_and_penalty_together() -> None:
    """One step of SGD against autograd on the loss of the paper, written out."""
    net = CNN.build().eval()
    free, (x, y) = copy.deepcopy(net), (torch.randn(8, 1, 8, 8), torch.arange(8) % 3)
    method = StructuredSparsity(penalty={"filters": 0.1, "channels": 0.2}, threshold=1e-12)
    attached = lilliput.attach(net, method, steps=1, task=CNN.task())
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.1)
    attached.batch(x, y)
    out = net(x)
    attached.loss(cross_entropy(out, y), out).backward()
    attached.after_backward()
    optimizer.step()
    attached.after_step()
    loss = cross_entropy(free(x), y)
    for name in ("0", "3", "9"):
        weight: Any = free.get_parameter(f"{name}.weight")
        columns = weight.transpose(0, 1).flatten(1)
        loss = loss + 0.2 * columns.norm(dim=1).sum()
        if name != "9":  # the rows of the output must stay
            loss = loss + 0.1 * weight.flatten(1).norm(dim=1).sum()
    loss.backward()
    for name, value in free.named_parameters():
        wanted = value.detach() - 0.1 * value.grad  # type: ignore[operator]
        torch.testing.assert_close(net.get_parameter(name).detach(), wanted, msg=name)


# -- the proximal step ------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("filters",), ("channels",), ("shapes", "channels", "depth")])
def test_proximal_step_minimizes_what_it_should(kinds: Any) -> None:
    """Exact for one kind, and for kinds whose groups lie in each other."""
    weight = torch.randn(2, 2, 2, dtype=torch.double)
    strengths = dict.fromkeys(kinds, 0.8)

    def objective(x: np.ndarray) -> float:
        moved = torch.from_numpy(x.reshape(2, 2, 2))
        return float(0.5 * (moved - weight).square().sum() + 0.5 * penalty(moved, strengths))

    ours = shrunk(weight, strengths, 0.5).numpy().ravel()
    starts = (weight.numpy().ravel(), ours)
    best = min(
        minimize(
            objective, s, method="Nelder-Mead", options={"maxiter": 20_000, "fatol": 1e-12}
        ).fun
        for s in starts
    )
    assert objective(ours) <= best + 1e-7


def test_proximal_step_reaches_zero_exactly_and_keeps_directions() -> None:
    weight = torch.randn(6, 4, 9)
    weight[:3] *= 0.01
    moved = shrunk(weight, {"filters": 1.0}, 0.3)
    assert bool((moved[:3] == 0.0).all())
    for before, after in zip(weight[3:], moved[3:], strict=True):
        assert float(after.norm()) == pytest.approx(float(before.norm()) - 0.3, rel=1e-5)
        torch.testing.assert_close(after / after.norm(), before / before.norm())
    assert bool((shrunk(torch.zeros(2, 2, 1), {"filters": 1.0}, 0.3) == 0).all())


# -- the threshold ----------------------------------------------------------------------------


def test_a_group_dies_as_a_whole_or_not_at_all() -> None:
    weight = torch.full((2, 2, 1), 1e-5)
    weight[0, 1] = 1.0
    lives = alive(weight, {"filters": 1.0}, 1e-4)
    assert lives[:, :, 0].tolist() == [[True, True], [False, False]]
    lives = alive(weight, {"filters": 1.0, "channels": 1.0}, 1e-4)
    assert lives[:, :, 0].tolist() == [[False, True], [False, False]]


def test_no_partial_groups_while_training() -> None:
    watcher = Weights()
    method = StructuredSparsity(penalty={"filters": 0.13}, threshold=0.02, round_to=1)
    stage = Stage(methods=[method], train=Train(epochs=10, **SGD))
    lilliput.compress(MLP.build(), MLP.task(), [stage], watchers=[watcher])
    dead = 0
    for _, values in watcher.seen:
        zero = values["0.weight"] == 0
        assert torch.equal(zero.all(1), zero.any(1))
        dead = int(zero.all(1).sum())
    assert 0 < dead < 24


def test_single_weights_may_be_zeroed_as_in_the_authors_code() -> None:
    net = MLP.build()
    method = StructuredSparsity(penalty={"filters": 1e-9}, threshold=0.05, zero_out="weight")
    attached = lilliput.attach(net, method, task=MLP.task())
    before = net[0].weight.detach().clone()
    attached.after_step()
    wanted = torch.where(before.abs() < 0.05, 0.0, before)
    assert torch.equal(net[0].weight.detach(), wanted)
    assert 0 < int((wanted == 0).sum()) < wanted.numel()
    assert not (wanted == 0).all(1).any()


@pytest.mark.parametrize("update", ["subgradient", "proximal"])
def test_a_larger_lambda_leaves_fewer_filters(update: Any) -> None:
    widths = []
    for strength in (0.05, 0.12):
        method = StructuredSparsity(
            penalty={"filters": strength}, update=update, threshold=0.02, round_to=1
        )
        stage = Stage(methods=[method], train=Train(epochs=14, **SGD))
        try:
            result = lilliput.compress(MLP.build(), MLP.task(), [stage])
            widths.append(result.model[0].out_features + result.model[3].out_features)
        except NothingChanged:
            widths.append(40)
    assert widths[1] < widths[0]


def test_frozen_layers_are_not_touched() -> None:
    net = MLP.build()
    method = StructuredSparsity(penalty={"filters": 50.0}, update="proximal", round_to=1)
    stage = Stage(methods=[method], train=Train(epochs=1, trainable="!0", **SGD))
    watcher = Weights()
    lilliput.compress(net, MLP.task(), [stage], watchers=[watcher])
    _, values = watcher.seen[-1]
    assert torch.equal(values["0.weight"], net[0].weight)
    assert not values["3.weight"].any()


# -- filters and channels ---------------------------------------------------------------------


def test_zero_filters_go_and_their_constants_are_folded() -> None:
    net = MLP.build()
    net[0].weight.data[[3, 7, 20]] = 0.0
    net[0].bias.data[[3, 7, 20]] = torch.tensor([0.5, -0.5, 1.0])
    result = lilliput.compress(
        net, MLP.task(), [StructuredSparsity(penalty={"filters": 0.1}, round_to=1)]
    )
    inputs = next(iter(MLP.task().validation)).inputs
    assert result.model[0].out_features == 21
    torch.testing.assert_close(logits(result.model, inputs), logits(net, inputs))


def test_channels_that_nobody_uses_go_and_so_do_theirs() -> None:
    net = MLP.build()
    net[5].weight.data[:, 4] = 0.0
    net[3].weight.data[:, 2] = 0.0
    net[3].weight.data[5:, 9] = 0.0
    net[3].weight.data[:4, 9] = (
        0.0  # unit 9 of the first layer is used by unit 4 of the second alone
    )
    net[3].weight.data[4, 9] = 1.0
    result = lilliput.compress(
        net, MLP.task(), [StructuredSparsity(penalty={"channels": 0.1}, round_to=1)]
    )
    inputs = next(iter(MLP.task().validation)).inputs
    plan = plan_of(result.model)
    assert plan is not None
    assert set(range(16)) - set(plan.kept["3.weight"][0].tolist()) == {4}
    assert set(range(24)) - set(plan.kept["0.weight"][0].tolist()) == {2, 9}
    torch.testing.assert_close(logits(result.model, inputs), logits(net, inputs))


def test_layers_that_are_left_out_keep_their_channels() -> None:
    net = MLP.build()
    net[5].weight.data[:, 4] = 0.0
    net[3].weight.data[:, 2] = 0.0
    method = StructuredSparsity(penalty={"channels": 0.1}, layers=["*", "!0"], round_to=1)
    result = lilliput.compress(net, MLP.task(), [method])
    assert (result.model[0].out_features, result.model[3].out_features) == (24, 15)


def test_a_residual_stream_needs_all_its_filters_zero() -> None:
    net, inputs = resnet8(classes=3), torch.randn(2, 3, 16, 16)
    (stream,) = [g for g in find_groups(net, inputs).groups if "conv1" in g.layers]
    net.conv1.weight.data[5] = 0.0
    assert not removable(net, stream).any()
    for member in stream.with_role("makes"):
        net.get_parameter(member.tensor).data[member.index[5]] = 0.0
    assert removable(net, stream).nonzero()[0].tolist() == [5]


def test_what_normalization_or_attention_counts_stays() -> None:
    net = NETWORKS[2].build()
    for name, parameter in net.named_parameters():
        if "norm" not in name:
            parameter.data.zero_()
    for group in find_groups(net, torch.randn(2, 6, 8)).groups:
        removed = removable(net, group)
        assert not removed.any() if group.mixed_by or group.pairwise else removed.all()


def test_rounding_leaves_zeros_that_are_frozen_and_stay_zero_in_fine_tuning() -> None:
    net = MLP.build()
    net[0].weight.data[[3, 7, 20]] = 0.0
    net[0].weight.data[:, 5] = 0.0  # an input, which cannot go
    watcher = Weights()
    fine_tune = Train(epochs=5, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-2)
    stages = [
        StructuredSparsity(penalty={"filters": 0.1, "channels": 0.1}, round_to=8),
        Stage(train=fine_tune),
        Stage(methods=[Codebook(bits=4)], train=fine_tune),
    ]
    result = lilliput.compress(net, MLP.task(), stages, watchers=[watcher])
    assert result.model[0].out_features == 24
    for _, values in watcher.seen:
        assert bool((values["0.weight"][[3, 7, 20]] == 0).all())
        assert bool((values["0.weight"][:, 5] == 0).all())
    assert len({stage for stage, _ in watcher.seen}) == 2
    assert int((result.model[0].weight == 0).sum()) >= 3 * 12 + 21


def test_shared_values_get_masks() -> None:
    net = MLP.build()
    net[0].weight.data[:6] *= 0.01
    method = StructuredSparsity(penalty={"filters": 0.1}, threshold=0.02, round_to=1)
    result = lilliput.compress(net, MLP.task(), [Codebook(bits=4), method])
    assert result.model[0].out_features == 18


# -- shapes -----------------------------------------------------------------------------------


def kernel_net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, **options), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 2},
        {"padding": 1},
        {"padding": 3, "stride": 2},
        {"padding": (4, 6), "dilation": (2, 3)},
        {"padding": "same"},
    ],
    ids=str,
)
def test_zero_borders_of_a_kernel_are_cut(options: Any, tmp_path: Any) -> None:
    net, task = kernel_net(**options), task_of(1, 16, 16)
    net[0].weight.data[:, :, [0, 4]] = 0.0
    net[0].weight.data[:, :, :, [0, 4]] = 0.0
    result = lilliput.compress(
        net, task, [StructuredSparsity(penalty={"shapes": 0.1})], directory=tmp_path
    )
    thin, inputs = result.model[0], next(iter(task.validation)).inputs
    assert thin.weight.shape == (4, 1, 3, 3)
    assert thin.kernel_size == (3, 3)
    torch.testing.assert_close(logits(result.model, inputs), logits(net, inputs))
    loaded = lilliput.load(result.artifact, model=kernel_net(**options))
    assert torch.equal(logits(loaded, inputs), logits(result.model, inputs))
    assert '"kernel"' in (tmp_path / "changes.json").read_text()


def test_borders_without_enough_padding_stay_and_are_frozen(tmp_path: Any) -> None:
    net = kernel_net()
    net[0].weight.data[:, :, [0, 4]] = 0.0
    net[0].weight.data[:, :, 2, 3] = 0.0
    stages = [
        StructuredSparsity(penalty={"shapes": 0.1}),
        Stage(train=Train(epochs=1, optimizer="sgd", lr=0.1, weight_decay=1e-2)),
    ]
    result = lilliput.compress(net, task_of(1, 16, 16), stages, directory=tmp_path)
    weight = result.model[0].weight
    assert weight.shape == (4, 1, 5, 5)
    assert int((weight == 0).sum()) == 4 * 11
    assert "44% of a weight that is still computed whole" in (tmp_path / "changes.json").read_text()


def test_borders_are_cut_alike_on_both_sides() -> None:
    conv = nn.Conv2d(2, 3, 7, padding=3)
    conv.weight.data[:, :, [0, 1, 6]] = 0.0
    conv.weight.data[:, :, :, [0, 1, 2, 5, 6]] = 0.0
    assert spare_border(conv) == [1, 2]
    conv.weight.data.zero_()
    assert spare_border(conv) == [3, 3]
    reflecting = nn.Conv2d(2, 3, 5, padding=2, padding_mode="reflect")
    reflecting.weight.data[:, :, [0, 4]] = 0.0
    assert spare_border(reflecting) == [0, 0]
    assert spare_border(nn.Conv1d(2, 3, 5, padding="valid")) == [0]


def test_matrix_and_its_way_back() -> None:
    for shape, transposed in (((3, 4, 2, 5), False), ((3, 4, 2, 5), True), ((3, 4), False)):
        value = torch.randn(shape)
        folded = matrix(value, transposed)
        assert folded.shape[:2] == ((4, 3) if transposed else (3, 4))
        assert torch.equal(unfolded(folded, value, transposed), value)


# -- depth ------------------------------------------------------------------------------------


def test_layers_with_a_path_around_them_are_found() -> None:
    net, inputs = Residual(), torch.randn(4, 1, 8, 8)
    found = {
        name for name in ("first", "a1", "a2", "b1", "b2", "head") if bypassed(net, name, inputs)
    }
    assert found == {"a1", "a2", "b1", "b2"}
    assert not any(module._forward_hooks for module in net.modules())


def test_a_zero_block_is_the_identity() -> None:
    net, inputs = Residual(), torch.randn(4, 1, 8, 8)
    net.b2.weight.data.zero_()
    with torch.no_grad():
        x = torch.relu(net.first(inputs))
        x = torch.relu(x + net.a2(torch.relu(net.a1(x))))
        without = net.head(x.mean((2, 3)))
    torch.testing.assert_close(logits(net, inputs), without)


def resnet(build: Any = resnet20) -> Any:
    """A CIFAR ResNet with statistics and shifts that are not the identity."""
    torch.manual_seed(0)
    net = build(classes=3)
    for name, parameter in net.named_parameters():
        if "bn" in name and name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    net(torch.randn(16, 3, 16, 16))
    return net.eval()


def without(net: Any, *blocks: str) -> Any:
    """A copy in which blocks of the network are identities."""
    other = copy.deepcopy(net)
    for block in blocks:
        group, _, number = block.partition(".")
        other.get_submodule(group)[int(number)] = nn.Identity()
    return other


def silence(net: nn.Module, norm: str) -> None:
    """Let a batch normalization send zeros."""
    net.get_parameter(f"{norm}.weight").data.zero_()
    net.get_parameter(f"{norm}.bias").data.zero_()


def finished(net: nn.Module, task: Task, **settings: Any) -> dict[str, Any]:
    """What the method changes in the network as it is: (where, what) -> the change."""
    method = StructuredSparsity(**{"penalty": {"depth": 0.1}, "round_to": 1, **settings})
    changes = lilliput.attach(net, method, task=task).finish()
    return {(c.where, c.what): c for c in changes}


@pytest.mark.parametrize("zero", ["conv1", "conv2"])
def test_a_block_is_removed_whole_when_its_depth_group_is_zero(zero: str) -> None:
    """ResNet-20: nothing of the block is left, and the network computes what it did without it."""
    net, task = resnet(), task_of(3, 16, 16)
    net.get_submodule(f"layer2.1.{zero}").weight.data.zero_()
    silence(net, "layer2.1.bn2")
    whole, inputs = copy.deepcopy(net), next(iter(task.validation)).inputs
    changes = finished(net, task)
    assert torch.equal(logits(net, inputs), logits(whole, inputs))
    assert torch.equal(logits(net, inputs), logits(without(whole, "layer2.1"), inputs))
    assert type(net.layer2[1]) is nn.Identity
    assert plan_of(net).removed == ("layer2.1",)
    gone = sum(p.numel() for p in whole.layer2[1].parameters())
    assert sum(p.numel() for p in net.parameters()) == 269_267 - gone
    block = changes["layer2.1", "block"]
    assert (block.before, block.after) == (f"{gone:,} parameters", "removed")
    assert zero in block.note
    assert "moved" not in block.note
    assert changes["model", "parameters"].after == 269_267 - gone
    assert set(changes) == {("layer2.1", "block"), ("model", "parameters"), ("model", "macs")}


@pytest.mark.parametrize("zero", ["conv1", "conv2"])
def test_a_constant_behind_a_dead_layer_is_silenced_and_what_that_costs_is_told(zero: str) -> None:
    net, task = resnet(), task_of(3, 16, 16)
    net.get_submodule(f"layer1.2.{zero}").weight.data.zero_()
    whole = copy.deepcopy(net)
    task.train = list(task.validation)  # in the same order each time
    inputs = task.train[0].inputs
    block = finished(net, task)["layer1.2", "block"]
    before, after = logits(whole, inputs), logits(without(whole, "layer1.2"), inputs)
    torch.testing.assert_close(logits(net, inputs), after)
    moved = float((after - before).abs().max() / before.abs().max())
    assert moved > 1e-3
    assert f"moved the output by {moved:.1e}" in block.note


def test_dead_blocks_go_together_and_others_stay_as_they_are() -> None:
    net, task = resnet(), task_of(3, 16, 16)
    for block in ("layer1.1", "layer1.2", "layer3.1"):
        net.get_submodule(block).conv2.weight.data.zero_()
    silence(net, "layer3.1.bn2")
    whole = copy.deepcopy(net)
    task.train = list(task.validation)
    inputs = task.train[0].inputs
    changes = finished(net, task)
    assert plan_of(net).removed == ("layer1.1", "layer1.2", "layer3.1")
    wanted = without(whole, "layer1.1", "layer1.2", "layer3.1")
    torch.testing.assert_close(logits(net, inputs), logits(wanted, inputs))
    assert "moved" not in changes["layer3.1", "block"].note
    middle = logits(without(whole, "layer1.1"), inputs)
    after = logits(without(whole, "layer1.1", "layer1.2"), inputs)
    moved = float((after - middle).abs().max() / middle.abs().max())
    assert f"{moved:.1e}" in changes["layer1.2", "block"].note


def test_a_block_whose_shape_changes_stays_and_is_shrunk() -> None:
    net, task = resnet(resnet8), task_of(3, 16, 16)
    for block in ("layer1.0", "layer2.0"):
        net.get_submodule(block).conv2.weight.data.zero_()
        silence(net, f"{block}.bn2")
    whole, inputs = copy.deepcopy(net), next(iter(task.train)).inputs
    changes = finished(net, task)
    assert plan_of(net).removed == ("layer1.0",)
    assert net.layer2[0].conv1.weight.shape == (1, 16, 3, 3)
    assert net.layer2[0].conv2.weight.shape == (32, 1, 1, 1)
    assert "only the path" in changes["layer2.0.conv2.weight", "frozen zeros"].note
    torch.testing.assert_close(logits(net, inputs), logits(whole, inputs))


def test_blocks_may_be_shrunk_instead() -> None:
    net, task = resnet(resnet8), task_of(3, 16, 16)
    net.layer1[0].conv2.weight.data.zero_()
    whole, inputs = copy.deepcopy(net), next(iter(task.train)).inputs
    changes = finished(net, task, depth="shrink")
    assert net.layer1[0].conv1.out_channels == 1
    assert net.layer1[0].conv2.kernel_size == (1, 1)
    assert plan_of(net).removed == ()
    assert not any(what == "block" for _, what in changes)
    torch.testing.assert_close(logits(net, inputs), logits(whole, inputs))


class Path(nn.Module):
    """A path around layers; with or without a ReLU behind."""

    def __init__(self, *layers: nn.Module, relu: bool = True) -> None:
        super().__init__()
        self.layers, self.relu = nn.Sequential(*layers), relu

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.layers(x)
        return torch.relu(y) if self.relu else y


def paths(relu: bool, before: nn.Module, width: int = 5) -> Any:
    """A first layer, a path around a dead convolution with a bias, and a head."""
    torch.manual_seed(0)
    dead = nn.Conv2d(width, width, 3, padding=1)
    dead.weight.data.zero_()
    return nn.Sequential(
        nn.Conv2d(1, width, 3), before, Path(nn.Conv2d(width, width, 1), nn.ReLU(), dead, relu=relu),
        nn.Conv2d(width, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


@pytest.mark.parametrize("before", [nn.Identity(), nn.BatchNorm2d(5)], ids=["conv", "norm"])
def test_a_constant_is_folded_into_the_bias_in_front_where_that_is_exact(before: nn.Module) -> None:
    net, task = paths(False, before), task_of(1, 8, 8)
    whole, inputs = copy.deepcopy(net), next(iter(task.train)).inputs
    block = finished(net, task)["2", "block"]
    assert type(net[2]) is nn.Identity
    torch.testing.assert_close(logits(net, inputs), logits(whole, inputs))
    name = "1.bias" if isinstance(before, nn.BatchNorm2d) else "0.bias"
    assert f"is in {name} now" in block.note
    silent = copy.deepcopy(whole)
    note = finished(silent, task, fold="none")["2", "block"].note
    assert "moved the output" in note
    assert torch.equal(silent[0].bias, whole[0].bias)


def test_what_lies_between_the_bias_and_the_block_forbids_folding() -> None:
    net, task = paths(False, nn.ReLU()), task_of(1, 8, 8)
    whole = copy.deepcopy(net)
    block = finished(net, task)["2", "block"]
    assert "moved the output" in block.note
    assert torch.equal(net[0].bias, whole[0].bias)


def test_a_relu_behind_the_sum_needs_inputs_that_are_not_negative() -> None:
    net, task = paths(True, nn.ReLU()), task_of(1, 8, 8)
    net[2].layers[2].bias.data.zero_()
    assert ("2", "block") in finished(net, task)
    net = paths(True, nn.Identity())
    net[2].layers[2].bias.data.zero_()
    whole, inputs = copy.deepcopy(net), next(iter(task.train)).inputs
    changes = finished(net, task)
    assert ("2", "block") not in changes
    assert net[2].layers[2].kernel_size == (1, 1)
    torch.testing.assert_close(logits(net, inputs), logits(whole, inputs))


def test_the_smallest_module_that_passes_its_input_on_is_found() -> None:
    dead = [nn.Conv2d(3, 3, 1) for _ in range(3)]
    for layer in dead:
        layer.weight.data.zero_()
    inner = nn.Sequential(Path(nn.Conv2d(3, 3, 1), dead[0]), Path(nn.Sequential(dead[1])))
    two = nn.ModuleDict({"a": dead[2], "b": nn.Conv2d(3, 3, 1)})
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), inner, Branches(two), nn.Flatten())
    layers, batches = ["2.0.layers.1", "2.1.layers.0.0", "3.of.a"], [torch.randn(8, 1, 4, 4)]
    found = find_blocks(net, layers, batches)
    assert [(b.name, b.zero) for b in found] == [("2.0", (layers[0],)), ("2.1", (layers[1],))]
    two["b"].weight.data.zero_()
    assert find_blocks(net, layers, batches)[-1].name == "3"
    assert find_blocks(net, layers, [torch.randn(1, 1, 4, 4)]) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Branches(nn.Module):
    """A path around several layers side by side."""

    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.of = layers

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + sum(layer(x) for layer in self.of.values()))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [Magnitude(sparsity=0.5), Codebook(bits=3)], ids=["mask", "book"])
def test_blocks_of_encoded_layers_go_too(other: Any, first: bool, tmp_path: Any) -> None:
    """In one stage with another method, before and after it, and after a stage of it."""
    net, task = paths(True, nn.ReLU()), task_of(1, 8, 8)
    net[2].layers[2].weight.data.normal_(0.0, 1e-3)  # a codebook cannot be all zero
    ours = StructuredSparsity(penalty={"depth": 0.1}, threshold=0.02, round_to=1)
    stages = [Stage(methods=[ours, other] if first else [other, ours])]
    result = lilliput.compress(net, task, stages, directory=tmp_path)
    assert type(result.model[2]) is nn.Identity
    loaded, inputs = (
        lilliput.load(result.artifact, model=paths(True, nn.ReLU())),
        torch.randn(4, 1, 8, 8),
    )
    assert torch.equal(logits(loaded, inputs), logits(result.model, inputs))
    values = len(torch.unique(loaded[3].weight))
    assert values <= 8 or float((loaded[3].weight == 0).float().mean()) > 0.3
    after = lilliput.compress(net, task, [other, ours])
    assert type(after.model[2]) is nn.Identity


def test_a_gate_that_is_one_is_not_silenced() -> None:
    """A constant may matter by being there: silenced, the block would send zeros."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(x)

    net = nn.Sequential(nn.Conv2d(1, 3, 1), Gated(), nn.Flatten())
    net[1].gate.weight.data.zero_()
    net[1].gate.bias.data.fill_(1.0)
    x = torch.randn(8, 1, 4, 4)
    [block] = find_blocks(net, ["1.gate"], [x])
    assert (block.name, block.silenced) == ("1", ())
    net[1].gate.bias.data.fill_(0.5)
    assert find_blocks(net, ["1.gate"], [x]) == []


def test_a_block_that_surgery_cannot_take_stays_and_the_report_says_why() -> None:
    class Listed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for module in vars(self)["plain"]:
                x = module(x)
            return x

    net, task = Listed(*paths(True, nn.ReLU())), task_of(1, 8, 8)
    vars(net)["plain"] = list(net)
    whole, inputs = copy.deepcopy(net), next(iter(task.train)).inputs
    changes = finished(net, task)
    assert isinstance(net[2], Path)
    assert net[2].layers[0].out_channels == 1
    note = changes["2.layers.2.weight", "frozen zeros"].note
    assert "2 stays: " in note
    assert "in another place too" in note
    torch.testing.assert_close(logits(net, inputs), logits(whole, inputs))


def test_a_pattern_that_covers_only_the_block_is_enough() -> None:
    net, task = resnet(resnet8), task_of(3, 16, 16)
    net.layer1[0].conv2.weight.data.zero_()
    changes = finished(net, task, layers="layer1.0.*")
    assert set(changes) == {("layer1.0", "block"), ("model", "parameters"), ("model", "macs")}


def test_the_depth_penalty_trains_blocks_away_and_the_rest_is_fine_tuned(tmp_path: Any) -> None:
    """Penalty, removal, masks and shared values on what is left, and the file of it all."""

    def build() -> nn.Module:
        torch.manual_seed(1)
        blocks = (
            Path(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
            for _ in range(3)
        )
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)  # noqa: E501
        )  # fmt: skip

    method = StructuredSparsity(penalty={"depth": 2.0}, update="proximal", layers=["3*", "4*"])
    train = Train(epochs=8, optimizer="sgd", lr=0.05, momentum=0.5)
    stages = [
        Stage(methods=[method], train=train),
        Stage(methods=[Magnitude(sparsity=0.5)], train=train),
        Stage(methods=[Codebook(bits=4)], train=train),
    ]
    task = task_of(1, 8, 8)
    result = lilliput.compress(build(), task, stages, directory=tmp_path)
    model: Any = result.model
    assert type(model[3]) is type(model[4]) is nn.Identity
    assert isinstance(model[2], Path)
    assert (model[2].layers[0].weight == 0).float().mean() > 0.3
    loaded, inputs = lilliput.load(result.artifact, model=build()), next(iter(task.test)).inputs
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    changes = (tmp_path / "changes.json").read_text()
    assert changes.count('"block"') == 2


def test_the_optimizer_forgets_the_block_and_trains_on() -> None:
    net, task = resnet(resnet8), task_of(3, 16, 16)
    method = StructuredSparsity(penalty={"depth": 1e-6}, threshold=1e-9, round_to=1)
    attached = lilliput.attach(net, method, steps=1, task=task)
    optimizer = attached.run.optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 3
    cross_entropy(net(x), y).backward()
    optimizer.step()
    net.layer1[0].conv1.weight.data.zero_()
    gone = {id(p) for p in net.layer1[0].parameters()}
    attached.finish()
    left = {id(p) for p in net.parameters()}
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == left
    assert {id(p) for p in optimizer.state} == left
    assert not left & gone
    cross_entropy(net(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("zero", ["b1", "b2"])
def test_a_zero_layer_leaves_next_to_nothing_of_its_block(zero: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    net, task = Residual(), task_of(1, 8, 8)
    net.get_submodule(zero).weight.data.zero_()
    result = lilliput.compress(
        net, task, [StructuredSparsity(penalty={"depth": 0.1})], directory=tmp_path
    )
    inputs = next(iter(task.validation)).inputs
    assert result.model.b1.weight.shape[:2] == (1, 4)
    assert result.model.b2.weight.shape[:2] == (4, 1)
    assert result.model.get_submodule(zero).kernel_size == (1, 1)
    assert result.model.a1.weight.shape == (6, 4, 3, 3)
    torch.testing.assert_close(logits(result.model, inputs), logits(net, inputs))
    assert "only the path around the layer counts" in (tmp_path / "changes.json").read_text()


def test_the_depth_penalty_removes_layers_with_a_shortcut_only() -> None:
    torch.manual_seed(0)
    net, task = Residual(), task_of(1, 8, 8)
    method = StructuredSparsity(penalty={"depth": 2.0}, update="proximal")
    stage = Stage(methods=[method], train=Train(epochs=8, optimizer="sgd", lr=0.05))
    result = lilliput.compress(net, task, [stage])
    model: Any = result.model
    for first, second in ((model.a1, model.a2), (model.b1, model.b2)):
        assert not first.weight.any() or not second.weight.any()
        assert first.out_channels == second.in_channels == 1
    assert model.first.weight.any()
    assert model.head.weight.any()


# -- errors -----------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(InputError, match="penalty says"):
        StructuredSparsity(penalty={"filters": 0.1}, keep=0.5)
    with pytest.raises(InputError, match="above 0"):
        StructuredSparsity(penalty={"filters": 0.0})
    with pytest.raises(InputError, match="filters"):
        StructuredSparsity(penalty={"rows": 0.1})
    with pytest.raises(NothingChanged, match="Raise penalty"):
        lilliput.compress(MLP.build(), MLP.task(), [StructuredSparsity(penalty={"filters": 0.1})])
    with pytest.raises(NothingMatched, match="path"):
        lilliput.compress(MLP.build(), MLP.task(), [StructuredSparsity(penalty={"depth": 0.1})])
    attached = lilliput.attach(
        MLP.build(),
        StructuredSparsity(penalty={"filters": 1.0}, update="proximal"),
        task=MLP.task(),
    )
    with pytest.raises(InputError, match=r"run\.optimizer"):
        attached.after_step()
