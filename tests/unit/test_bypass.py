"""Modules that are taken away: what goes with them, what is refused, and what a plan says of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from lilliput.core.select import Weight
from lilliput.errors import CorruptArtifact, InputError, ModelMismatch, SurgeryFailed
from lilliput.mechanisms.encodings import Codebook, Mask, encode
from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.surgery import (
    Plan,
    apply_plan,
    bypass,
    checked_plan,
    cut,
    plan_of,
    replace,
)


class Around(nn.Sequential):
    """Its layers, and a path around them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + super().forward(x))


class Net(nn.Module):
    """Two layers with a path around each pair, between a first layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.Sequential(*(Around(nn.Linear(6, 5), nn.Linear(5, 6)) for _ in range(3)))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.blocks(torch.relu(self.first(x))))
        return answer


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def net_with_zero_blocks(*zero: int) -> Net:
    torch.manual_seed(0)
    net = Net()
    for number in zero:
        for parameter in net.blocks[number][1].parameters():
            parameter.data.zero_()
    return net


def everything(net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    plain = [
        {k: repr(v) for k, v in vars(m).items() if not isinstance(v, Tensor | dict)}
        for m in net.modules()
    ]
    return [
        {k: t.detach().clone() for k, t in tensors.items()},
        {k: (id(t), t.requires_grad) for k, t in tensors.items()},
        plain,
        [(id(m), [*m._modules], [*m._forward_hooks, *m._forward_pre_hooks]) for m in net.modules()],
        copy.deepcopy(optimizer.state_dict()) if optimizer else None,
        torch.get_rng_state().clone(),
    ]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    ours, theirs = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(ours) == len(theirs) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(ours, theirs, strict=True)
    )


@pytest.fixture
def untouched() -> Iterator[Callable[..., None]]:
    """Call it with the model before the failure; at the end the model must be the same."""
    watched: list[tuple[Any, ...]] = []

    def watch(*parts: Any) -> None:
        watched.append((parts, everything(*parts)))

    yield watch
    assert watched
    for parts, before in watched:
        assert same(everything(*parts), before)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()


# -- what goes ----------------------------------------------------------------------------------


def test_an_identity_stands_where_the_module_was() -> None:
    net = net_with_zero_blocks(1)
    net.blocks[1].eval()
    answer, others = net(X), {id(p) for n, p in net.named_parameters() if "blocks.1" not in n}
    done = bypass(net, "blocks.1", X)
    assert done.error == 0.0
    assert done.moved is None
    assert type(net.blocks[1]) is nn.Identity
    assert not net.blocks[1].training
    assert net.blocks[0].training
    assert torch.equal(net(X), answer)
    assert {id(p) for p in net.parameters()} == others
    assert plan_of(net) == done.plan == Plan({}, removed=("blocks.1",))


def test_the_optimizer_forgets_what_is_gone_and_trains_on() -> None:
    net = net_with_zero_blocks(1)
    named = dict(net.named_parameters())
    ends = [(n, p) for n, p in named.items() if "blocks" not in n]
    block = [(n, p) for n, p in named.items() if "blocks.1" in n]
    rest = [(n, p) for n, p in named.items() if "blocks.0" in n or "blocks.2" in n]
    optimizer = torch.optim.Adam([{"params": ends + block, "lr": 0.1}, {"params": rest}])
    for parameter in net.blocks[1].parameters():
        parameter.requires_grad_(False)  # so that the block stays zero
    train(net, optimizer)
    optimizer.state[net.blocks[1][0].weight] = {"exp_avg": torch.ones(5, 6)}
    kept = {id(p): copy.deepcopy(optimizer.state[p]) for _, p in ends + rest}
    bypass(net, "blocks.1", X, optimizer=optimizer)
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 8]
    assert [len(g["param_names"]) for g in optimizer.param_groups] == [4, 8]
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in ends]
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert {id(p) for p in optimizer.state} == kept.keys()
    assert all(same(optimizer.state[p], kept[id(p)]) for p in optimizer.state)
    train(net, optimizer)
    other = torch.optim.Adam(
        [{"params": [p for n, p in net.named_parameters() if "blocks" not in n], "lr": 0.1},
         {"params": net.blocks.parameters()}]
    )  # fmt: skip
    other.load_state_dict(optimizer.state_dict())


def test_a_parameter_group_that_becomes_empty_stays() -> None:
    net = net_with_zero_blocks(0)
    groups = [net.blocks[0].parameters(), net.head.parameters()]
    optimizer = torch.optim.SGD([{"params": g} for g in groups], 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 0.5**n, lambda n: 0.9**n])
    bypass(net, "blocks.0", X, optimizer=optimizer)
    train(net, optimizer, 1)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.09000000000000001]


def test_encodings_go_with_the_module_and_others_stay() -> None:
    net = net_with_zero_blocks(0)
    for name in ("blocks.0.0", "blocks.0.1", "blocks.1.0", "head"):
        weight = Weight(name, net.get_submodule(name), "weight")
        encode(weight, Mask(torch.rand(weight.value.shape) < 0.5))
        if name != "blocks.0.1":
            encode(weight, Codebook.fitted(weight.value, 2, "linear"))
    optimizer = torch.optim.Adam(net.parameters())
    answer = net(X).detach()
    optimizer.zero_grad()
    bypass(net, "blocks.0", X, optimizer=optimizer)
    assert torch.equal(net(X), answer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}
    assert not any("blocks.0" in name for name in net.state_dict())
    train(net, optimizer)


def test_several_modules_go_at_once_and_what_is_inside_goes_along() -> None:
    net = net_with_zero_blocks(0, 2)
    answer = net(X)
    bypass(net, ["blocks.2", "blocks.2.1", "blocks.0"], X)
    assert torch.equal(net(X), answer)
    assert plan_of(net).removed == ("blocks.0", "blocks.2")
    whole = net_with_zero_blocks(0, 1, 2)
    assert bypass(whole, "blocks", X).plan.removed == ("blocks",)


def test_a_constant_is_silenced_and_the_shift_of_the_output_is_told() -> None:
    net = net_with_zero_blocks(1)
    net.blocks[1][1].bias.data.normal_()
    silent, answer = net_with_zero_blocks(1), net(X)
    wanted = silent(X)
    done = bypass(net, "blocks.1", X, silenced=["blocks.1.1"])
    assert done.error == 0.0
    moved = (wanted - answer).detach().abs().max() / answer.detach().abs().max()
    assert done.moved == pytest.approx(float(moved))
    assert torch.equal(net(X), wanted)


def test_an_edit_can_bring_the_constant_elsewhere() -> None:
    block = nn.Sequential(nn.Linear(3, 3))
    net = nn.Sequential(nn.Linear(2, 3), Plus(block), nn.Linear(3, 2))
    block[0].weight.data.zero_()
    x = torch.randn(5, 2)
    answer, constant = net(x), block[0].bias.detach().clone()

    def fold(model: nn.Module) -> None:
        bias = model.get_parameter("0.bias")
        replace(bias, bias + constant)

    assert bypass(net, "1", x, edit=fold).error < 1e-6
    torch.testing.assert_close(net(x), answer)


class Plus(nn.Module):
    """A path around a module, and nothing after it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_a_module_that_works_in_place_is_compared_with_what_came_in() -> None:
    class Negated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.neg_()

    net = nn.Sequential(nn.Linear(4, 4), Negated())
    with pytest.raises(SurgeryFailed, match=r"without 1 .* differs from its input by 2\.0e\+00"):
        bypass(net, "1", X)


def test_without_inputs_nothing_is_compared() -> None:
    net = net_with_zero_blocks()
    assert bypass(net, "blocks.1").error is None
    assert type(net.blocks[1]) is nn.Identity


# -- what is refused ----------------------------------------------------------------------------


def test_a_module_that_does_something_is_named(untouched: Callable[..., None]) -> None:
    net = net_with_zero_blocks(0, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    train(net, optimizer, 1)
    for number in (0, 2):
        net.blocks[number][1].weight.data.zero_()
        net.blocks[number][1].bias.data.zero_()
    untouched(net, optimizer)
    with pytest.raises(SurgeryFailed, match=r"without blocks\.1 the network would not"):
        bypass(net, ["blocks.0", "blocks.1", "blocks.2"], X, optimizer=optimizer)
    with pytest.raises(SurgeryFailed, match=r"first the network would .* another shape"):
        bypass(net, ["first", "blocks.0"], X, optimizer=optimizer)


def test_a_failing_edit_undoes_everything(untouched: Callable[..., None]) -> None:
    net, calls = net_with_zero_blocks(1), []

    def spoil(model: nn.Module) -> None:
        calls.append(1)
        if len(calls) == 2:  # the first time is the rehearsal
            model.register_buffer("extra", torch.zeros(1))
            raise RuntimeError("no")

    untouched(net)
    with pytest.raises(SurgeryFailed, match=r"taking blocks\.1 away failed: RuntimeError: no"):
        bypass(net, "blocks.1", X, edit=spoil)


@pytest.mark.parametrize(
    ("names", "silenced", "message"),
    [
        ("", (), "no module ''"),
        ((), (), "name at least one"),
        ("block.1", (), "Did you mean 'blocks.1'"),
        ("blocks.1.0.weight", (), "no module"),
        ("head.parametrizations", (), "no module"),
        ("head.parametrizations.weight", (), "no module"),
        ("training", (), "no module"),
        ("blocks.1", ("blocks.0.1",), r"blocks\.0\.1 is to be silent and would stay"),
        ("blocks.1", ("blocks.1.7",), "no module"),
    ],
)
def test_names_that_cannot_be_meant(
    names: Any, silenced: Any, message: str, untouched: Callable[..., None]
) -> None:
    net = net_with_zero_blocks(1)
    parametrizations.weight_norm(net.head)
    untouched(net)
    with pytest.raises(InputError, match=message):
        bypass(net, names, X, silenced=silenced)


def test_tied_tensors_go_together_or_not_at_all(untouched: Callable[..., None]) -> None:
    net = net_with_zero_blocks(0, 1)
    net.blocks[1][1].weight = net.blocks[0][1].weight
    untouched(net)
    with pytest.raises(ModelMismatch, match=r"blocks\.0\.1\.weight is tied: blocks\.1\.1\.weight"):
        bypass(net, "blocks.0", X)
    other = copy.deepcopy(net)
    bypass(other, ["blocks.0", "blocks.1"], X)
    assert sum(p.numel() for p in other.parameters()) == 4 * 6 + 6 + 6 * 5 * 2 + 11 + 6 * 2 + 2


def test_a_module_that_the_network_also_holds_elsewhere_is_refused(
    untouched: Callable[..., None],
) -> None:
    class Listed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            for block in vars(self)["plain"]:
                x = block(x)
            answer: Tensor = self.head(x)
            return answer

    net = Listed()
    net.blocks[1][1].weight.data.zero_()
    net.blocks[1][1].bias.data.zero_()
    vars(net)["plain"] = list(net.blocks)
    untouched(net)
    with pytest.raises(SurgeryFailed, match=r"blocks\.1 in another place too"):
        bypass(net, "blocks.1", X)


def test_a_module_that_does_not_run_is_refused(untouched: Callable[..., None]) -> None:
    net = net_with_zero_blocks()
    net.spare = nn.Linear(2, 2)
    untouched(net)
    with pytest.raises(SurgeryFailed, match="spare does not run"):
        bypass(net, "spare", X)


def test_inputs_that_do_not_fit_are_named(untouched: Callable[..., None]) -> None:
    net = net_with_zero_blocks(1)
    untouched(net)
    with pytest.raises(ModelMismatch, match="cannot run on the example inputs"):
        bypass(net, "blocks.1", X[:, :3])


def test_a_module_with_two_inputs_is_refused(untouched: Callable[..., None]) -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return x * factor

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Second()

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.inner(x, torch.ones(()))
            return answer

    net = Twice()
    untouched(net)
    with pytest.raises(SurgeryFailed, match=r"without inner .*TypeError"):
        bypass(net, "inner", X)


# -- plans --------------------------------------------------------------------------------------


def cut_half(net: nn.Module) -> None:
    """Take every second channel of each group away."""
    groups = find_groups(net, X)
    removal = {n: np.arange(0, g.channels, 2) for n, g in enumerate(groups.groups)}
    cut(net, groups, removal, inputs=X)


def rewritten(plan: Plan) -> Plan:
    return Plan.from_dict(json.loads(json.dumps(plan.as_dict())))


def test_a_plan_of_cuts_and_bypasses_thins_a_fresh_network() -> None:
    net, early, fresh = net_with_zero_blocks(0, 1), Net(), Net()
    cut_half(net)  # channels inside of blocks that go later, too
    bypass(net, "blocks.1", X)
    apply_plan(early, rewritten(plan_of(net)))
    cut_half(net)
    bypass(net, "blocks.0", X)
    plan = plan_of(net)
    assert plan.removed == ("blocks.0", "blocks.1")
    assert not any(name.startswith(("blocks.0", "blocks.1")) for name in plan.kept)
    assert not any(name.startswith(("blocks.0", "blocks.1")) for name in plan.sizes)
    assert rewritten(plan) == plan
    for other in (early, fresh, net):
        apply_plan(other, rewritten(plan))
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(X), net(X))
        assert plan_of(other) == plan


def test_a_larger_module_takes_the_smaller_one_s_place_in_the_plan() -> None:
    net = net_with_zero_blocks(0, 1, 2)
    bypass(net, "blocks.1", X)
    early = Net()
    apply_plan(early, plan_of(net))
    bypass(net, "blocks", X)
    assert plan_of(net).removed == ("blocks",)
    apply_plan(early, plan_of(net))
    assert type(early.blocks) is nn.Identity
    assert plan_of(early) == plan_of(net)


def test_attributes_inside_of_a_removed_module_are_forgotten() -> None:
    first = Plan({}, {"a.heads": 2, "ab.heads": 3}, {"a.weight": {0: 4}})
    assert first.then(Plan({}, removed=("a",))) == Plan({}, {"ab.heads": 3}, removed=("a",))


def test_a_plan_without_the_field_is_as_before() -> None:
    old = {"sets": ["6:kA"], "tensors": {"first.weight": [0]}}
    assert Plan.from_dict(old).removed == ()
    assert Plan.from_dict(old).as_dict() == old
    assert Plan.from_dict(old) != Plan.from_dict(old | {"removed": ["blocks.1"]})


def test_a_network_that_lost_another_module_is_refused(untouched: Callable[..., None]) -> None:
    net, other = net_with_zero_blocks(0), net_with_zero_blocks(1)
    bypass(net, "blocks.0", X)
    bypass(other, "blocks.1", X)
    untouched(net)
    with pytest.raises(ModelMismatch, match=r"already lost blocks\.0 .* fresh"):
        apply_plan(net, plan_of(other))


def test_parts_keep_their_plans() -> None:
    body = net_with_zero_blocks(1)
    bypass(body, "blocks.1", X)
    cut_half(body)
    parent, fresh = nn.Sequential(body, nn.Linear(2, 2)), nn.Sequential(Net(), nn.Linear(2, 2))
    assert plan_of(parent).removed == ("0.blocks.1",)
    apply_plan(fresh, plan_of(parent))
    assert plan_of(fresh) == plan_of(parent)
    bypass(parent, "0")
    assert plan_of(parent) == Plan({}, removed=("0",))


def test_an_optimizer_forgets_what_a_plan_takes_away() -> None:
    net, fresh = net_with_zero_blocks(1), Net()
    bypass(net, "blocks.1", X)
    optimizer = torch.optim.Adam(fresh.parameters())
    apply_plan(fresh, plan_of(net), optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 12


HOSTILE = {
    "a text": "blocks.1",
    "a number": [1],
    "an empty name": [""],
    "twice": ["blocks.1", "blocks.1"],
    "inside of each other": ["blocks.1", "blocks.1.0"],
    "far too many": [f"m{n}" for n in range(5000)],
    "what is kept": ["first"],
}


@pytest.mark.parametrize("removed", HOSTILE.values(), ids=HOSTILE)
def test_a_broken_list_of_modules_is_corrupt(removed: Any) -> None:
    plan = {"sets": ["6:kA"], "tensors": {"first.weight": [0]}, "removed": removed}
    with pytest.raises(CorruptArtifact, match="plan"):
        Plan.from_dict(plan)
    with pytest.raises(CorruptArtifact, match=r"'a\.heads'.* gone"):
        Plan.from_dict({"sets": [], "tensors": {}, "attributes": {"a.heads": 1}, "removed": ["a"]})


@pytest.mark.parametrize(
    "name",
    ["nothing", "blocks.7", "blocks.1.0.weight", "training", "forward", "_modules", ".", "blocks.",
     ".blocks", "blocks..1", "head.parametrizations", "head.parametrizations.weight.0", "__class__"],
)  # fmt: skip
def test_only_modules_inside_can_be_taken_away(name: str, untouched: Callable[..., None]) -> None:
    net = Net()
    parametrizations.weight_norm(net.head)
    untouched(net)
    with pytest.raises(ModelMismatch, match="no module"):
        apply_plan(net, Plan.from_dict({"sets": [], "tensors": {}, "removed": ["first", name]}))


def test_a_file_cannot_take_half_of_a_tied_tensor_away(untouched: Callable[..., None]) -> None:
    net = Net()
    net.blocks[1][1].weight = net.blocks[0][1].weight
    untouched(net)
    with pytest.raises(ModelMismatch, match="tied"):
        apply_plan(net, Plan.from_dict({"sets": [], "tensors": {}, "removed": ["blocks.1"]}))


# -- plans that are no longer right -------------------------------------------------------------


def test_a_plan_that_is_right_passes() -> None:
    assert checked_plan(Net()) is None
    body = net_with_zero_blocks(1)
    bypass(body, "blocks.1", X)
    cut_half(body)
    parent = nn.Sequential(body, nn.Linear(2, 2))
    assert checked_plan(parent) == plan_of(parent)  # a part that was cut before
    cut_half(parent)
    assert checked_plan(parent) == plan_of(parent)
    encode(Weight("1", parent[1], "weight"), Mask(torch.ones_like(parent[1].weight)))
    assert checked_plan(parent) is not None


def stale_by_the_same_channels(net: nn.Sequential) -> None:
    cut_half(net[0])


def stale_by_other_channels(net: nn.Sequential) -> None:
    vars(net)["lilliput_plan"] = Plan({}, {"0.heads": 1})
    cut_half(net[0])


def stale_by_a_module(net: nn.Sequential) -> None:
    vars(net)["lilliput_plan"] = Plan({}, removed=("0.blocks.1",))
    bypass(net[0], "blocks.0", X)


def stale_by_a_replacement(net: nn.Sequential) -> None:
    net[0].blocks[1] = nn.Linear(3, 3)


def stale_by_something_else(net: nn.Sequential) -> None:
    net[0].blocks = nn.Identity()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (stale_by_the_same_channels, "0.first.weight"),
        (stale_by_other_channels, "0.first.weight"),
        (stale_by_a_module, "0.blocks.0"),
        (stale_by_a_replacement, "0.blocks.1"),
        (stale_by_something_else, "0.blocks.0.0.weight"),
    ],
)
def test_a_part_that_was_cut_alone_makes_the_plan_stale(change: Any, named: str) -> None:
    net = nn.Sequential(net_with_zero_blocks(0, 1), nn.Linear(2, 2))
    cut_half(net)
    bypass(net, "0.blocks.1", X)
    assert checked_plan(net) is not None
    change(net)
    with pytest.raises(ModelMismatch, match="cut or replaced on its own") as caught:
        checked_plan(net)
    assert str(caught.value).startswith(f"{named} differs")
