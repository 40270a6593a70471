"""Network slimming: the subgradient, the global threshold, what a removed channel leaves, the floor."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.architectures.resnet_cifar import resnet8
from lilliput.core.run import Run
from lilliput.core.task import Task, evaluation
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, NothingMatched
from lilliput.mechanisms.surgery import plan_of
from lilliput.methods import Slimming
from lilliput.methods.prune.slimming import subgradient
from lilliput.testing import NETWORKS, make_batches

MLP, CNN, TRANSFORMER = NETWORKS
SGD = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}


def task_of(*shape: int) -> Task:
    train, test = make_batches(*shape, samples=64)
    return Task(train, test, test, nn.functional.cross_entropy, lilliput.accuracy)


def scales(net: nn.Module) -> dict[str, Tensor]:
    norms = nn.modules.batchnorm._BatchNorm
    return {n: m.weight for n, m in net.named_modules() if isinstance(m, norms)}


def with_scales(net: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    for name, value in values.items():
        scales(net)[name].data.copy_(value)
    return net


def shifted(net: nn.Module) -> nn.Module:
    """Batch normalization as after some training: no shift is zero."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data.normal_(generator=generator)
            module.bias.data.normal_(generator=generator)
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return net


def logits(net: nn.Module, inputs: Tensor) -> Tensor:
    with evaluation(net), torch.no_grad():
        return net(inputs)


def kept(net: nn.Module, tensor: str) -> list[int]:
    plan = plan_of(net)
    assert plan is not None
    whole = range(len(net.get_parameter(tensor)))
    return plan.kept[tensor][0].tolist() if tensor in plan.kept else list(whole)


@dataclass
class Scales(Watcher):
    """All scales after every step."""

    seen: list[dict[str, Tensor]] = field(default_factory=list)

    def step_done(self, run: Run) -> None:
        self.seen.append({n: s.detach().clone() for n, s in scales(run.model).items()})


# -- the penalty ------------------------------------------------------------------------------


def test_subgradient_is_the_sign_and_zero_at_zero() -> None:
    scale = torch.tensor([0.3, -2.0, 0.0, 1e-9])
    assert torch.equal(subgradient(scale, 0.5), torch.tensor([0.5, -0.5, 0.0, 0.5]))


def test_gradient_of_each_scale_gets_lambda_times_its_sign() -> None:
    net = with_scales(CNN.build(), {"1": torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -0.1])})
    free, batch = copy.deepcopy(net), next(iter(CNN.task().train))
    attached = lilliput.attach(net, Slimming(keep=0.5, penalty=0.25), steps=1, task=CNN.task())
    for model in (net, free):
        with evaluation(model):  # dropout would differ
            loss = nn.functional.cross_entropy(model(batch.inputs), batch.target)
            if model is free:
                loss = loss + 0.25 * sum(s.abs().sum() for s in scales(free).values())
        loss.backward()
    attached.batch(batch.inputs, batch.target)
    attached.after_backward()
    for (name, ours), (_, theirs) in zip(
        net.named_parameters(), free.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_scales_of_layers_that_take_no_part_are_free() -> None:
    watcher, control = Scales(), Scales()
    for penalty, seen in ((0.5, watcher), (0.0, control)):
        method = Slimming(keep=0.5, layers="0", penalty=penalty, round_to=1)
        stage = Stage(methods=[method], train=Train(epochs=1, **SGD))
        lilliput.compress(CNN.build(), CNN.task(), [stage], watchers=[seen])
    assert not torch.equal(watcher.seen[0]["1"], control.seen[0]["1"])
    assert torch.equal(watcher.seen[0]["4"], control.seen[0]["4"])


def test_a_larger_lambda_leaves_more_small_scales() -> None:
    small = []
    for penalty in (0.0, 0.25, 0.6):
        watcher, method = Scales(), Slimming(keep=0.5, penalty=penalty, round_to=1)
        train = Train(epochs=5, optimizer="sgd", lr=0.1)
        lilliput.compress(
            CNN.build(), CNN.task(), [Stage(methods=[method], train=train)], watchers=[watcher]
        )
        last = torch.cat(list(watcher.seen[-1].values()))
        small.append(int((last.abs() < 0.5).sum()))
    assert small[0] == 0
    assert small[0] < small[1] < small[2]


def test_initial_scale_is_set_once_at_the_start() -> None:
    watcher, method = Scales(), Slimming(keep=0.5, penalty=0.0, initial_scale=0.5, round_to=1)
    train = Train(epochs=1, optimizer="sgd", lr=1e-9)
    lilliput.compress(
        CNN.build(), CNN.task(), [Stage(methods=[method], train=train)], watchers=[watcher]
    )
    for values in watcher.seen[0].values():
        torch.testing.assert_close(values, torch.full_like(values, 0.5))
    with pytest.raises(InputError, match="erase"):
        Slimming(keep=0.5, initial_scale=0.5, prune="start")


# -- the threshold ----------------------------------------------------------------------------


def test_threshold_is_global() -> None:
    first = torch.tensor([0.1, 0.9, -0.2, 0.8, 0.05, 0.3])
    second = torch.tensor([-0.7, 0.6, 0.25, 1.0, -1.2, 0.4, 0.5, 0.15])
    net = with_scales(CNN.build(), {"1": first, "4": second})
    result = lilliput.compress(net, CNN.task(), [Slimming(keep=8 / 14, round_to=1)])
    threshold = torch.cat([first, second]).abs().sort().values[6]
    for tensor, values in (("0.weight", first), ("3.weight", second)):
        assert (
            kept(result.model, tensor) == (values.abs() >= threshold).nonzero().flatten().tolist()
        )
    assert len(kept(result.model, "0.weight")) / 6 != len(kept(result.model, "3.weight")) / 8


def test_no_layer_collapses() -> None:
    net = with_scales(CNN.build(), {"1": torch.full((6,), 1e-4), "4": torch.linspace(1, 2, 8)})
    net[1].weight.data[3] = 2e-4
    result = lilliput.compress(net, CNN.task(), [Slimming(keep=0.2, round_to=1)])
    assert kept(result.model, "0.weight") == [3]
    result = lilliput.compress(net, CNN.task(), [Slimming(keep=0.2, round_to=1, at_least=2)])
    assert len(kept(result.model, "0.weight")) == 2


def test_residual_stream_counts_its_scales_together() -> None:
    net = resnet8(classes=3)
    both = {"bn1": torch.linspace(0.1, 1, 16), "layer1.0.bn2": torch.linspace(3, 0.2, 16)}
    with_scales(net, both)
    stream = ["bn1", "layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"]
    method = Slimming(layers="conv1", keep=0.5, round_to=1)
    result = lilliput.compress(net, task_of(3, 16, 16), [method])
    # The first stream's channels lie in the middle of the wider ones: 8 zeros before and after each.
    places = dict(zip(stream, (0, 0, 8, 24), strict=True))
    values = {
        n: s.detach()[places[n] : places[n] + 16] for n, s in scales(net).items() if n in places
    }
    mean = torch.stack([values[name].abs() for name in stream]).mean(0)
    assert kept(result.model, "conv1.weight") == sorted(mean.argsort()[8:].tolist())
    assert kept(result.model, "layer1.0.conv2.weight") == kept(result.model, "conv1.weight")


# -- what a removed channel leaves ------------------------------------------------------------


def test_thin_equals_scale_and_shift_set_to_zero() -> None:
    net = shifted(CNN.build())
    inputs = next(iter(CNN.task().validation)).inputs
    result = lilliput.compress(net, CNN.task(), [Slimming(keep=0.5, round_to=1)])
    masked = copy.deepcopy(net)
    for conv, norm in (("0", "1"), ("3", "4")):
        gone = sorted(
            set(range(len(scales(net)[norm]))) - set(kept(result.model, f"{conv}.weight"))
        )
        module: Any = masked.get_submodule(norm)
        module.weight.data[gone] = 0.0
        module.bias.data[gone] = 0.0
    torch.testing.assert_close(logits(result.model, inputs), logits(masked, inputs))
    assert not torch.allclose(logits(masked, inputs), logits(net, inputs))


def test_prune_at_the_start_uses_the_scales_as_they_are_and_trains_on() -> None:
    values = torch.tensor([1.0, 0.1, 1.0, 0.1, 1.0, 0.1])
    net = with_scales(CNN.build(), {"1": values, "4": torch.ones(8)})
    watcher = Scales()
    method = Slimming(keep=11 / 14, prune="start", penalty=0.0, round_to=1)
    stage = Stage(methods=[method], train=Train(epochs=1, **SGD))
    result = lilliput.compress(net, CNN.task(), [stage], watchers=[watcher])
    assert [len(seen["1"]) for seen in watcher.seen] == [3] * len(watcher.seen)
    assert kept(result.model, "0.weight") == [0, 2, 4]


def test_thin_by_slimming_needs_no_data() -> None:
    net = with_scales(CNN.build(), {"1": torch.arange(1.0, 7.0), "4": torch.arange(1.0, 9.0)})
    thinned = lilliput.thin(net, torch.randn(1, 1, 8, 8), keep=0.5, by="slimming", round_to=1)
    assert thinned.plan["0.weight"][0].tolist() == [3, 4, 5]


@pytest.mark.parametrize("network", [MLP, TRANSFORMER], ids=["mlp", "transformer"])
def test_a_network_without_batch_normalization_is_refused(network: Any) -> None:
    with pytest.raises(NothingMatched, match="batch normalization"):
        lilliput.compress(network.build(), network.task(), [Slimming(keep=0.5)])
    with pytest.raises(NothingMatched, match="batch normalization"):
        lilliput.thin(network.build(), torch.randn(2, *network.shape), by="slimming")
