"""Surgery: whatever fails, and whenever, the model is bit for bit as it was; and cuts add up.

The faults are real exceptions, raised by a tracer at the n-th line that surgery executes, for n over
the whole operation. Of the lines that restore a model only Ctrl-C is raised: it is the one thing that
can happen there.
"""

from __future__ import annotations

import copy
import itertools
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from lilliput.core.select import Weight
from lilliput.errors import ModelMismatch, SurgeryFailed
from lilliput.mechanisms import encodings, surgery
from lilliput.mechanisms.encodings import Codebook, Mask, encode
from lilliput.mechanisms.groups.classes import Group, Groups, Member
from lilliput.mechanisms.surgery import Plan, apply_plan, bypass, cut, plan_of, replace
from lilliput.mechanisms.surgery.transaction import precision_switches

FOLDER = str(Path(surgery.__file__).parent)
ENCODINGS = encodings.__file__
RESTORING = ("restore", "_restore_tensor", "_same_memory", "surely", "_set", "<lambda>")


class ByHand(Groups):
    """Groups without numbers to correct."""

    def attributes(self, removal: Any) -> dict[str, int]:
        return {}


def group(channels: int, *places: tuple[str, int, str, int]) -> Group:
    return Group(
        channels,
        tuple(
            Member(t, d, r, np.arange(channels * n).reshape(n, channels).T)  # type: ignore[arg-type]
            for t, d, r, n in places
        ),
    )


# -- faults -------------------------------------------------------------------------------------


@dataclass
class Faults:
    """Raises at the n-th line of surgery, and once more so many lines later, where it restores."""

    at: int
    problem: type[BaseException]
    again: int = 0
    lines: int = 0
    raised: bool = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not (file.startswith(FOLDER) or file == ENCODINGS):
            return None
        # Nothing can be done about the one line that calls what restores.
        calls = linecache.getline(file, frame.f_lineno).strip().startswith("surely(")
        if event == "line" and not calls:
            self._line(frame.f_code.co_name in RESTORING, frame.f_code.co_name == "surely")
        return self

    def _line(self, restoring: bool, loop: bool) -> None:
        if self.raised:
            self.again -= restoring and not loop
            if self.again == 0 and restoring and not loop:
                self.again = -1
                raise KeyboardInterrupt
            return
        self.lines += 1
        if self.lines >= self.at and not (restoring and self.problem is not KeyboardInterrupt):
            self.raised = True
            raise self.problem("injected")


@contextmanager
def tracing(faults: Faults) -> Iterator[Faults]:
    before = sys.gettrace()
    sys.settrace(faults)
    try:
        yield faults
    finally:
        sys.settrace(before)


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    plain = [
        {k: repr(v) for k, v in vars(m).items() if not isinstance(v, Tensor | dict)}
        for m in net.modules()
    ]
    kinds = [(type(m), list(vars(m)), list(m._forward_pre_hooks)) for m in net.modules()]
    return [
        {k: t.detach().clone() for k, t in tensors.items()},
        {k: t.grad.clone() for k, t in tensors.items() if t.grad is not None},
        {k: (id(t), t.requires_grad, t.stride()) for k, t in tensors.items()},
        plain,
        kinds,
        copy.deepcopy(optimizer.state_dict()),
        torch.get_rng_state(),
        _precision(),
    ]


def _precision() -> list[str]:
    """How torch multiplies float32, which the self-check sets."""
    return [getattr(library, name) for library, name, _ in precision_switches()]


def same(a: Any, b: Any) -> bool:
    ours, theirs = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(ours) == len(theirs) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(ours, theirs, strict=True)
    )


Case = tuple[nn.Module, Groups, dict[int, np.ndarray], Tensor]


def _cnn() -> Case:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=6),
        nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip
    along = [f"1.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
    found = group(
        6, ("0.weight", 0, "makes", 1), *((name, 0, "along", 1) for name in along),
        ("3.weight", 0, "along", 1), ("3.bias", 0, "along", 1),
    )  # fmt: skip
    pixels = Member("5.weight", 1, "uses", np.arange(54).reshape(6, 9))
    return (
        net, ByHand((Group(6, (*found.members, pixels)),)), {0: np.array([1, 2])}, torch.randn(2, 2, 5, 5)
    )  # fmt: skip


def _mlp(encoded: Callable[[nn.Module], None] | None = None) -> Case:
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))
    if encoded is not None:
        encoded(net)
    first = group(
        7, ("0.weight", 0, "makes", 1), ("0.bias", 0, "along", 1), ("2.weight", 1, "uses", 1)
    )
    second = group(
        5, ("2.weight", 0, "makes", 1), ("2.bias", 0, "along", 1), ("4.weight", 1, "uses", 1)
    )
    return net, ByHand((first, second)), {0: np.array([0, 6]), 1: np.array([3])}, torch.randn(3, 4)


def _masked(net: nn.Module) -> None:
    for layer in (0, 2):
        weight = Weight(str(layer), net[layer], "weight")  # type: ignore[index]
        encode(
            weight,
            Mask(torch.rand(weight.value.shape) < 0.7, "straight_through" if layer else "hard"),
        )
    encode(weight, Codebook.fitted(weight.value, 2, "linear"))


def _normalized(net: nn.Module) -> None:
    parametrizations.weight_norm(net[2])  # type: ignore[index]


class Recurrent(nn.Module):
    """The last state of an LSTM, and a linear layer on it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.inner(x)[0][:, -1])
        return answer


def _lstm() -> Case:
    gates = [(f"inner.{n}_l0", 0, "makes" if "w" in n else "along", 4) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]  # fmt: skip  # noqa: E501
    found = group(4, *gates, ("inner.weight_hh_l0", 1, "uses", 1), ("head.weight", 1, "uses", 1))  # type: ignore[arg-type]
    return Recurrent(), ByHand((found,)), {0: np.array([1])}, torch.randn(2, 5, 3)


CASES: dict[str, Callable[[], Case]] = {
    "cnn": _cnn,
    "mlp": _mlp,
    "encoded": lambda: _mlp(_masked),
    "weight_norm": lambda: _mlp(_normalized),
    "lstm": _lstm,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}
FAULTS_EACH = 50
PROBLEMS = (KeyboardInterrupt, RuntimeError, MemoryError, OSError)


def halve_the_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            replace(parameter, parameter / 2)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_a_fault_at_any_step_leaves_everything_as_it_was(name: str, optimizer_name: str) -> None:
    """20 combinations, 50 faults each: 1,000 surgeries that fail somewhere else each time."""
    torch.manual_seed(len(name))
    net, groups, removal, x = CASES[name]()
    optimizer = OPTIMIZERS[optimizer_name](net.parameters())
    net(x).square().mean().backward()
    optimizer.step()

    def operate(model: nn.Module, its: torch.optim.Optimizer | None) -> None:
        cut(model, groups, removal, inputs=x, optimizer=its, edit=halve_the_biases)

    trial = copy.deepcopy(net)
    with tracing(Faults(sys.maxsize, RuntimeError)) as counting:
        operate(trial, None)
    answer, before = net(x).detach(), everything(net, optimizer)
    for number in range(FAULTS_EACH):
        problem = PROBLEMS[number % len(PROBLEMS)]
        at = 1 + (counting.lines - 2) * number // FAULTS_EACH
        with (
            pytest.raises((SurgeryFailed, problem, KeyboardInterrupt)),
            tracing(Faults(at, problem, again=7 * number if number % 3 == 0 else 0)),
        ):
            operate(net, optimizer)
        assert same(everything(net, optimizer), before), f"fault {problem.__name__} at line {at}"
    assert torch.equal(net(x), answer)
    operate(net, optimizer)  # and then it works
    assert same(net(x), trial(x))
    optimizer.step()


class CtrlC(Faults):
    """Ctrl-C at the n-th line of the functions in which a rehearsal runs and ends."""

    where = ("answers", "_rehearsed", "rehearsal", "surely", "restore", "_restore_tensor")

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        self.lines += event == "line" and frame.f_code.co_name in self.where
        if self.lines == self.at and not self.raised:
            self.raised = True
            raise self.problem("injected")
        return self


def test_ctrl_c_where_a_rehearsal_ends_leaves_everything_as_it_was() -> None:
    """At every single line: what the check sets for all of torch is put back as well."""
    torch.manual_seed(0)
    net, groups, removal, x = _mlp()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    before = everything(net, optimizer)
    with tracing(CtrlC(sys.maxsize, KeyboardInterrupt)) as counting:
        cut(copy.deepcopy(net), groups, removal, inputs=x)
    assert counting.lines > 100
    for at in range(1, counting.lines + 1):
        with pytest.raises(KeyboardInterrupt), tracing(CtrlC(at, KeyboardInterrupt)):
            cut(net, groups, removal, inputs=x)
        assert same(everything(net, optimizer), before), f"Ctrl-C at line {at}"


# -- cuts ---------------------------------------------------------------------------------------

widths = st.lists(st.integers(2, 9), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(widths, st.integers(0, 2**31), st.booleans())
def test_several_cuts_are_one_plan(widths: list[int], seed: int, encoded: bool) -> None:
    """A chain of layers, cut three times at random: equal to silencing, to the plan and its JSON."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    sizes = [3, *widths, 2]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*layers[:-1])
    if encoded:
        for number in range(0, len(net), 2):
            weight = Weight(str(number), net[number], "weight")
            encode(weight, Mask(torch.rand(weight.value.shape) < 0.6))
    fresh, silent, x = copy.deepcopy(net), copy.deepcopy(net), torch.randn(4, 3)
    left = [np.arange(width) for width in widths]
    for _ in range(3):
        groups = ByHand(tuple(
            group(len(kept), (f"{2 * n}.weight", 0, "makes", 1), (f"{2 * n}.bias", 0, "along", 1), (f"{2 * n + 2}.weight", 1, "uses", 1))  # noqa: E501
            for n, kept in enumerate(left)
        ))  # fmt: skip
        removal = {
            n: np.sort(random.permutation(len(kept))[: random.integers(0, len(kept))])
            for n, kept in enumerate(left)
        }
        done = cut(net, groups, removal, inputs=x)
        assert done.error is None or done.error < 1e-5
        left = [np.delete(kept, removal[n]) for n, kept in enumerate(left)]
    plan = plan_of(net)
    for n, kept in enumerate(left):
        gone = np.setdiff1d(np.arange(widths[n]), kept)
        with torch.no_grad():
            weight = Weight("", silent[2 * n + 2], "weight")
            encodings.original_of(weight)[:, gone] = 0
    torch.testing.assert_close(net(x), silent(x))
    if plan is not None:
        apply_plan(fresh, Plan.from_dict(plan.as_dict()))
    assert torch.equal(fresh(x), net(x))
    assert [fresh[2 * n].out_features for n in range(len(widths))] == [len(kept) for kept in left]


# -- modules ------------------------------------------------------------------------------------


def renew_the_biases(model: nn.Module) -> None:
    """An edit that changes no output."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            replace(parameter, parameter.detach())


class Around(nn.Sequential):
    """Its layers, and a path around them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + super().forward(x))


def _residual() -> tuple[nn.Module, Tensor]:
    """A dead layer under a mask, a living one under a codebook, and a constant that is silenced."""
    block = Around(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 6))
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), block, nn.Linear(6, 2))
    living, dead = Weight("2.0", block[0], "weight"), Weight("2.3", block[3], "weight")
    encode(living, Codebook.fitted(living.value, 2, "linear"))
    encode(dead, Mask(torch.zeros(6, 5)))
    return net, torch.randn(8, 4)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_a_fault_while_a_module_goes_leaves_everything_as_it_was(optimizer_name: str) -> None:
    torch.manual_seed(0)
    net, x = _residual()
    ends = [{"params": net[i].parameters()} for i in (0, 3)]  # type: ignore[index]
    optimizer = OPTIMIZERS[optimizer_name]([*ends, {"params": net[2].parameters(), "lr": 0.02}])  # type: ignore[index]
    net(x).square().mean().backward()
    optimizer.step()

    def operate(model: nn.Module, its: torch.optim.Optimizer | None) -> None:
        bypass(model, "2", x, silenced=["2.3"], optimizer=its, edit=renew_the_biases)

    trial = copy.deepcopy(net)
    with tracing(Faults(sys.maxsize, RuntimeError)) as counting:
        operate(trial, None)
    answer, before, block = net.eval()(x).detach(), everything(net, optimizer), net[2]  # type: ignore[index]
    for number in range(FAULTS_EACH):
        problem = PROBLEMS[number % len(PROBLEMS)]
        at = 1 + (counting.lines - 2) * number // FAULTS_EACH
        with (
            pytest.raises((SurgeryFailed, ModelMismatch, problem, KeyboardInterrupt)),
            tracing(Faults(at, problem, again=7 * number if number % 3 == 0 else 0)),
        ):
            operate(net, optimizer)
        assert same(everything(net, optimizer), before), f"fault {problem.__name__} at line {at}"
        assert net[2] is block and plan_of(net) is None  # type: ignore[index]
    assert torch.equal(net(x), answer)
    operate(net, optimizer)  # and then it works
    assert type(net[2]) is nn.Identity  # type: ignore[index]
    assert same(net(x), trial.eval()(x))
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 2, 0]
    assert len(optimizer.state) == 4
    net(x).square().mean().backward()
    optimizer.step()
