"""Yosinski, Clune, Bengio, Lipson 2014: how transferable are features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lilliput import Stage, Train, compress, io
from lilliput.api import run_recipe
from lilliput.core.run import Run
from lilliput.errors import InputError, NothingChanged, NothingMatched
from lilliput.methods import Inherit, Magnitude
from lilliput.methods.grow.inherit import obstacle
from lilliput.testing.networks import NETWORKS

MLP, CNN, _ = NETWORKS


def network(classes: int, seed: int, hidden: int = 10) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(12, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )
    net(torch.randn(64, 12))  # the running statistics of each are its own
    return net


def run_with(own: nn.Module, source: nn.Module) -> Run:
    return Run(own, MLP.task(), earlier={"previous": lambda: source})


def attached(method: Inherit, own: nn.Module, source: nn.Module) -> list[Any]:
    run = run_with(own, source)
    run.methods = [method]
    method.attach(run)
    return method.finish(run)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_exactly_what_agrees_is_copied_and_nothing_else() -> None:
    """Buffers too; the head of two classes stays where it is."""
    own, source = network(3, seed=1), network(2, seed=2)
    before = state(own)
    attached(Inherit(), own, source)
    for name, tensor in own.state_dict().items():
        expected = before[name] if name.startswith("3.") else source.state_dict()[name]
        assert torch.equal(tensor, expected), name
    x = torch.randn(5, 12)
    assert torch.equal(own[:3].eval()(x), source[:3].eval()(x)), "the trunk is the other's trunk"


def test_the_copy_is_the_heirs_own() -> None:
    own, source = network(3, seed=1), network(2, seed=2)
    before = state(source)
    attached(Inherit(), own, source)
    with torch.no_grad():
        own[0].weight.add_(1.0)
    assert all(torch.equal(before[n], t) for n, t in source.state_dict().items())


def test_a_pattern_keeps_layers_out() -> None:
    own, source = network(3, seed=1), network(3, seed=2)
    before = state(own)
    attached(Inherit(layers="!3"), own, source)
    assert torch.equal(own[3].weight, before["3.weight"])
    assert torch.equal(own[0].weight, source[0].weight)
    attached(Inherit(layers=["3"]), own, source)
    assert torch.equal(own[3].weight, source[3].weight)


def test_changes_say_what_was_inherited_and_why_not() -> None:
    changes = attached(Inherit(), network(3, seed=1), network(2, seed=2))
    told = {c.where: (c.before, c.after, c.note) for c in changes}
    assert told["0"] == (0, 2, "from 'previous'")
    assert told["1"] == (0, 5, "from 'previous'")
    assert told["3"] == (
        0,
        0,
        "weight is (3, 10) here and (2, 10) there, bias is (3,) here and (2,) there",
    )
    assert obstacle("a.b", {"a.b": torch.ones(2)}, {}) == "b is not there"


def test_no_tensor_that_agrees_is_an_error_that_says_why() -> None:
    own, before = network(3, seed=1), state(network(3, seed=1))
    with pytest.raises(NothingMatched, match=r"3: weight is \(3, 10\) here and \(2, 10\) there"):
        attached(Inherit(layers="3"), own, network(2, seed=2))
    with pytest.raises(NothingMatched, match="weight is not there"):
        attached(Inherit(layers="0"), own, nn.Sequential(nn.ReLU()))
    assert all(torch.equal(t, before[n]) for n, t in own.state_dict().items())


def test_a_pattern_without_a_module_is_told_before_anything_trains() -> None:
    with pytest.raises(NothingMatched, match=r"'hed' covers no module.*Did you mean 'head'"):
        Inherit(layers="hed").check(nn.ModuleDict({"head": nn.Linear(2, 2)}))


def test_the_network_itself_is_no_source(tmp_path: Path) -> None:
    """Without a network of its own the stage would inherit from the very network that it has."""
    with pytest.raises(NothingChanged, match="Give the stage a network of its own"):
        compress(MLP.build(), MLP.task(), [Stage(methods=[Inherit()], train=Train(epochs=1))])


def test_encoded_weights_are_refused() -> None:
    """A mask that was computed from random weights must not fall on inherited ones."""
    methods = [Magnitude(sparsity=0.5), Inherit()]
    stage = Stage(model=MLP.build(1), methods=methods, train=Train(epochs=1))
    with pytest.raises(
        InputError, match=r"0\.weight is encoded already \(mask\).*List inherit before"
    ):
        compress(MLP.build(), MLP.task(), [stage])
    stage = Stage(model=MLP.build(1), methods=methods[::-1], train=Train(epochs=1))
    compress(MLP.build(), MLP.task(), [stage])


@pytest.mark.parametrize("frozen", [True, False])
def test_inherited_layers_are_frozen_or_fine_tuned(frozen: bool) -> None:
    """AnB and AnB+: the trunk stays bit for bit, or learns on."""
    source = MLP.build(5)
    train = Train(epochs=2, lr=0.01, trainable="5" if frozen else "*")
    stage = Stage(model=MLP.build(1), methods=[Inherit(layers="!5")], train=train)
    result = compress(source, MLP.task(), [stage])
    same = [
        torch.equal(t, source.state_dict()[n])
        for n, t in result.model.state_dict().items()
        if not n.startswith("5.")
    ]
    assert all(same) if frozen else not any(same)
    assert not torch.equal(result.model[5].weight, MLP.build(1)[5].weight)  # type: ignore[index]


def test_an_earlier_stage_by_name(tmp_path: Path) -> None:
    """Not the stage before, but the one that is named."""
    nothing = Train(epochs=1, lr=1e-12, optimizer="sgd")
    stages = [
        Stage(name="first", train=nothing),
        Stage(name="second", model=MLP.build(2), train=nothing),
        Stage(model=MLP.build(3), methods=[Inherit(source="first")], train=nothing),
    ]
    result = compress(MLP.build(1), MLP.task(), stages)
    torch.testing.assert_close(result.model[0].weight, MLP.build(1)[0].weight)  # type: ignore[index]


def test_a_file_as_source(tmp_path: Path) -> None:
    import lilliput

    source = lilliput.build("lenet_300_100", classes=2)
    io.save(source, tmp_path / "source.safetensors")
    own = lilliput.build("lenet_300_100")
    run = Run(own, MLP.task(), build=lambda reference: io.load(reference))
    method = Inherit(source=str(tmp_path / "source.safetensors"))
    run.methods = [method]
    method.attach(run)
    assert torch.equal(own.fc2.weight, source.fc2.weight)  # type: ignore[union-attr]


def test_two_classes_first_then_ten(tmp_path: Path) -> None:
    """The shipped recipe, shortened: the trunk goes over, the head of ten classes is new."""
    short = ["stages.0.train.epochs=2", "stages.1.train.epochs=2"]
    result = run_recipe("binary_first_digits", short, directory=tmp_path / "run", watchers=())
    _, told = json.loads((tmp_path / "run" / "changes.json").read_text())
    assert {c["where"]: c["after"] for c in told} == {"conv1": 2, "conv2": 2, "conv3": 2, "fc1": 2}
    sizes = [stage["parameters"] for stage in result.figures["stages"]]
    assert sizes == [48_938 - 8 * 97, 48_938]
