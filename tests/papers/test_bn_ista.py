"""Sparse scales by proximal steps: the step, exact zeros, the cost, rescaling, folding, the plateau."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.architectures.resnet_cifar import resnet8
from lilliput.core.run import Run
from lilliput.core.task import Task, evaluation
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, NothingChanged, NothingMatched
from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.surgery import plan_of
from lilliput.methods import BnIsta
from lilliput.methods.prune.bn_ista import (
    costs,
    memory_cost,
    rescale_channels,
    rescale_if_invariant,
    soft_threshold,
    speed_cost,
)
from lilliput.testing import NETWORKS, make_batches

MLP, CNN, _ = NETWORKS


def task_of(*shape: int) -> Task:
    train, test = make_batches(*shape, samples=64)
    return Task(train, test, test, nn.functional.cross_entropy, lilliput.accuracy)


def scales(net: nn.Module) -> dict[str, Tensor]:
    norms = nn.modules.batchnorm._BatchNorm
    return {n: m.weight for n, m in net.named_modules() if isinstance(m, norms)}


def logits(net: nn.Module, inputs: Tensor) -> Tensor:
    with evaluation(net), torch.no_grad():
        return net(inputs)


def trained_norms(net: nn.Module) -> nn.Module:
    """Batch normalization as after some training."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.bias.data.normal_(generator=generator)
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return net


@dataclass
class Scales(Watcher):
    """All scales after every step."""

    seen: list[dict[str, Tensor]] = field(default_factory=list)

    def step_done(self, run: Run) -> None:
        self.seen.append({n: s.detach().clone() for n, s in scales(run.model).items()})


@dataclass
class Interruption(Watcher):
    """Ctrl-C after a step."""

    step: int

    def step_done(self, run: Run) -> None:
        if run.step == self.step:
            raise KeyboardInterrupt


# -- the step ---------------------------------------------------------------------------------


def test_soft_threshold_minimizes_what_it_should() -> None:
    values = np.linspace(-2, 2, 17)
    for threshold in (0.0, 0.3, 1.0):
        ours = soft_threshold(torch.from_numpy(values), torch.tensor(threshold))
        for value, found in zip(values, ours, strict=True):

            def objective(x: float, v: float = value, t: float = threshold) -> float:
                return 0.5 * (x - v) ** 2 + t * abs(x)

            best = minimize_scalar(objective, bounds=(-3, 3), method="bounded").x
            assert float(found) == pytest.approx(best, abs=1e-4)
    shrunk = soft_threshold(torch.tensor([0.2, -0.2, 0.3]), torch.tensor(0.2))
    assert (shrunk[:2] == 0.0).all()


def test_scales_follow_plain_ista_whatever_the_optimizer() -> None:
    """Momentum and weight decay move everything but the scales."""
    inputs, target = torch.randn(16, 1, 8, 8), torch.arange(16) % 3
    net = CNN.build().eval()
    method, rate = BnIsta(penalty=0.5, cost="uniform", round_to=1), 0.1
    attached = lilliput.attach(net, method, steps=3, task=CNN.task())
    optimizer = torch.optim.SGD(attached.parameters(), lr=rate, momentum=0.9, weight_decay=0.1)
    attached.run.optimizer = optimizer
    for _ in range(3):
        attached.batch(inputs, target)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), target).backward()
        moved = {n: s.detach() - rate * s.grad for n, s in scales(net).items()}
        wanted = {n: m.sign() * (m.abs() - rate * 0.5).clamp(min=0) for n, m in moved.items()}
        attached.after_backward()
        optimizer.step()
        attached.after_step()
        for name, scale in scales(net).items():
            torch.testing.assert_close(scale.detach(), wanted[name])


def test_own_learning_rate_and_its_absence() -> None:
    net, inputs = CNN.build().eval(), torch.randn(8, 1, 8, 8)
    target = torch.arange(8) % 3
    attached = lilliput.attach(net, BnIsta(penalty=1.0, cost="uniform", lr=0.25), task=CNN.task())
    nn.functional.cross_entropy(net(inputs), target).backward()
    wanted = scales(net)["1"].detach() - 0.25 * scales(net)["1"].grad - 0.25
    attached.after_backward()
    torch.testing.assert_close(scales(net)["1"].detach(), wanted)
    attached = lilliput.attach(CNN.build(), BnIsta(), task=CNN.task())
    with pytest.raises(InputError, match="set lr"):
        attached.after_backward()


def test_zeros_are_exact_where_the_subgradient_leaves_none() -> None:
    train = Train(epochs=4, optimizer="sgd", lr=0.1)
    ista, plain = Scales(), Scales()
    method = BnIsta(penalty=0.35, round_to=1)
    lilliput.compress(
        CNN.build(), CNN.task(), [Stage(methods=[method], train=train)], watchers=[ista]
    )
    control = lilliput.methods.Slimming(keep=0.5, penalty=0.8, round_to=1)
    lilliput.compress(
        CNN.build(), CNN.task(), [Stage(methods=[control], train=train)], watchers=[plain]
    )
    exact = [sum(int((s == 0).sum()) for s in w.seen[-1].values()) for w in (ista, plain)]
    assert 0 < exact[0] < 14
    assert exact[1] == 0


def test_zeros_can_come_back() -> None:
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 1))
    attached = lilliput.attach(net, BnIsta(penalty=1e-3, cost="uniform", lr=1.0), task=task_of(4))
    net[1].weight.data[0] = 0.0
    net(torch.randn(8, 4)).sum().backward()
    net[1].weight.grad[0] = 1.0
    attached.after_backward()
    assert float(net[1].weight.detach()[0]) == pytest.approx(-0.999)


# -- the cost ---------------------------------------------------------------------------------


def test_cost_of_each_layer_by_hand() -> None:
    net, inputs = CNN.build(), torch.randn(2, 1, 8, 8)
    groups = find_groups(net, inputs)
    memory = costs(net, groups, [True, True], inputs, "memory")
    # 3x3 of 1 channel, used by 3x3 into 8 channels, on a map of 8x8; in 8x8 pixels.
    assert memory["1.weight"].tolist() == pytest.approx([(9 * 1 + 9 * 8 + 64) / 64] * 6)
    # 3x3 of 6 channels, used by 4 columns of 3 outputs, on a map of 3x3.
    assert memory["4.weight"].tolist() == pytest.approx([(9 * 6 + 4 * 3 + 9) / 64] * 8)
    speed = costs(net, groups, [True, False], inputs, "speed")
    assert speed["1.weight"].tolist() == pytest.approx([64 * 9 / 64**2] * 6)
    assert "4.weight" not in speed
    uniform = costs(net, groups, [True, True], inputs, "uniform")
    assert uniform["4.weight"].tolist() == [1.0] * 8
    assert memory_cost(9, 72, 64, 64) == memory["1.weight"][0]
    assert speed_cost(64 * 9, 64) == speed["1.weight"][0]


def test_a_flat_input_counts_its_features() -> None:
    net = nn.Sequential(nn.Linear(20, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    inputs = torch.randn(4, 20)
    found = costs(net, find_groups(net, inputs), [True], inputs, "memory")
    assert found["1.weight"].tolist() == pytest.approx([(20 + 3 + 1) / 20] * 6)


def test_scales_that_feed_an_addition_are_not_penalized() -> None:
    net, task = resnet8(classes=3), task_of(3, 16, 16)
    attached = lilliput.attach(net, BnIsta(penalty=1e3, cost="uniform", lr=1.0), task=task)
    batch = next(iter(task.train))
    nn.functional.cross_entropy(net(batch.inputs), batch.target).backward()
    attached.after_backward()
    zero = {name for name, scale in scales(net).items() if bool((scale == 0).any())}
    # Of the last stream 32 channels are the last block's alone: its shortcut pads there with zeros.
    assert zero == {"layer1.0.bn1", "layer2.0.bn1", "layer3.0.bn1", "layer3.0.bn2"}
    assert int((scales(net)["layer3.0.bn2"] == 0).sum()) == 32


# -- rescaling --------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.01, 0.001])
def test_rescaling_leaves_the_function_as_it_is(alpha: float) -> None:
    net, inputs = trained_norms(CNN.build()).double(), torch.randn(4, 1, 8, 8).double()
    before, old = logits(net, inputs), scales(net)["1"].detach().clone()
    for group in find_groups(net, inputs).groups:
        rescale_channels(net, group, alpha)
    torch.testing.assert_close(logits(net, inputs), before, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(scales(net)["1"].detach(), alpha * old)


def test_rescaling_is_left_out_where_it_would_change_the_function() -> None:
    net = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(),
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    inputs = torch.randn(32, 6)
    before = copy.deepcopy(net.state_dict())
    groups = find_groups(net, inputs).groups
    done = [rescale_if_invariant(net, group, 0.1, inputs) for group in groups]
    assert done == [False, True]
    after = net.state_dict()
    assert torch.equal(after["1.weight"], before["1.weight"])
    torch.testing.assert_close(after["4.weight"], 0.1 * before["4.weight"])
    torch.testing.assert_close(after["6.weight"], 10 * before["6.weight"])


def test_rescaling_is_undone_at_the_end() -> None:
    """With no step between, scales and weights are back where they were, but for rounding."""
    net = CNN.build()
    net[1].weight.data[2] = 0.0
    method = BnIsta(penalty=1e-9, rescale=0.01, round_to=1)
    result = lilliput.compress(net, CNN.task(), [method])
    state = result.model.state_dict()
    stay = [0, 1, 3, 4, 5]
    torch.testing.assert_close(state["1.weight"], net[1].weight.detach()[stay])
    torch.testing.assert_close(state["3.weight"], net[3].weight.detach()[:, stay])
    torch.testing.assert_close(state["9.weight"], net[9].weight.detach())


def test_rescaling_brings_zeros_sooner() -> None:
    zeros = []
    for alpha in (1.0, 0.01):
        watcher, method = Scales(), BnIsta(penalty=0.05, rescale=alpha, round_to=1)
        stage = Stage(methods=[method], train=Train(epochs=2, optimizer="sgd", lr=0.01))
        try:
            lilliput.compress(CNN.build(), CNN.task(), [stage], watchers=[watcher])
        except NothingChanged:
            assert alpha == 1.0
        zeros.append(sum(int((s == 0).sum()) for s in watcher.seen[-1].values()))
    assert zeros[0] == 0 < zeros[1]


# -- removal ----------------------------------------------------------------------------------


def net_with_zeros(kernel: int, padding: int) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 5, kernel, padding=padding, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    trained_norms(net)
    net[1].weight.data[[1, 4]] = 0.0
    net[1].bias.data[[1, 4]] = torch.tensor([0.7, 1.3])
    net[4].weight.data[2] = 0.0
    return net


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 0)])
def test_constants_are_absorbed_exactly_without_padding(kernel: int, padding: int) -> None:
    net, task = net_with_zeros(kernel, padding), task_of(2, 10, 10)
    result = lilliput.compress(net, task, [BnIsta(round_to=1)])
    inputs = next(iter(task.validation)).inputs
    assert result.model[0].out_channels == 4
    assert result.model[3].out_channels == 4
    torch.testing.assert_close(logits(result.model, inputs), logits(net, inputs))
    plain = lilliput.compress(net, task, [BnIsta(round_to=1, fold="none")])
    assert not torch.allclose(logits(plain.model, inputs), logits(net, inputs), atol=1e-2)


def test_with_zero_padding_only_the_border_differs() -> None:
    net, task = net_with_zeros(3, 1), task_of(2, 10, 10)
    result = lilliput.compress(net, task, [BnIsta(round_to=1)])
    inputs = next(iter(task.validation)).inputs
    plan = plan_of(result.model)
    assert plan is not None
    with evaluation(net), evaluation(result.model), torch.no_grad():
        whole = net[:6](inputs)[:, plan.kept["3.weight"][0]]
        error = (result.model[:6](inputs) - whole).abs()
    assert float(error[..., 1:-1, 1:-1].max()) < 1e-5
    assert float(error.max()) > 1e-3


def test_rounding_keeps_some_zeros() -> None:
    net = CNN.build()
    net[1].weight.data[:3] = 0.0
    result = lilliput.compress(net, CNN.task(), [BnIsta(round_to=2)])
    assert result.model[0].out_channels == 4
    assert int((result.model[1].weight == 0).sum()) == 1


def test_a_dead_layer_keeps_its_floor() -> None:
    net = CNN.build()
    net[1].weight.data[:] = 0.0
    result = lilliput.compress(net, CNN.task(), [BnIsta(round_to=1, at_least=2)])
    assert result.model[0].out_channels == 2


def test_no_zero_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(NothingChanged, match="Raise penalty"):
        lilliput.compress(CNN.build(), CNN.task(), [BnIsta()])
    with pytest.raises(InputError, match="penalty says"):
        BnIsta(keep=0.5)
    with pytest.raises(NothingMatched, match="batch normalization"):
        lilliput.compress(MLP.build(), MLP.task(), [BnIsta()])
    with pytest.raises(NothingMatched, match="residual"):
        lilliput.compress(resnet8(), task_of(3, 16, 16), [BnIsta(layers="conv1")])


# -- the plateau ------------------------------------------------------------------------------

PATIENT: dict[str, Any] = {"penalty": 0.05, "lr": 1.0, "round_to": 1, "patience": 1}
TRAIN = Train(epochs=7, lr=0.01, checkpoint_minutes=1e-9)


def test_channels_go_when_the_zeros_plateau_and_the_rest_trains_on() -> None:
    watcher = Scales()
    stage = Stage(methods=[BnIsta(**PATIENT)], train=TRAIN)
    result = lilliput.compress(CNN.build(), CNN.task(), [stage], watchers=[watcher])
    widths = [len(seen["1"]) for seen in watcher.seen]
    epochs = [widths[k : k + 4] for k in range(0, len(widths), 4)]
    zeros = [int((watcher.seen[4 * k + 3]["1"] == 0).sum()) for k in range(7)]
    ended = next(k for k, epoch in enumerate(epochs) if epoch[0] < 6)
    assert 1 < ended < 7
    assert all(epoch == [widths[-1]] * 4 for epoch in epochs[ended:])
    assert zeros[ended - 1] <= max(zeros[: ended - 1])
    assert widths[-1] == result.model[0].out_channels < 6
    assert not torch.equal(watcher.seen[-1]["1"], watcher.seen[4 * ended]["1"])


@pytest.mark.parametrize("rescale", [1.0, 0.5])
def test_resumed_across_the_plateau(rescale: float, tmp_path: Any) -> None:
    stage = Stage(methods=[BnIsta(**PATIENT, rescale=rescale)], train=TRAIN)

    def run(name: str, *watchers: Watcher) -> Any:
        folder = tmp_path / name
        return lilliput.compress(
            CNN.build(), CNN.task(), [stage], directory=folder, watchers=watchers
        )

    undisturbed = run("undisturbed")
    for step in (6, 15, 18, 27):  # before the removal, just before it, and after it
        with pytest.raises(KeyboardInterrupt):
            run("resumed", Interruption(step))
    resumed = run("resumed").model.state_dict()
    for name, value in undisturbed.model.state_dict().items():
        assert torch.equal(value, resumed[name]), name
