"""Zhu, Gupta 2017: to prune, or not to prune."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.run import Run
from lilliput.core.schedule import Schedule
from lilliput.core.select import select
from lilliput.engine.progress import Watcher
from lilliput.methods import FilterL1, Gradual, Magnitude
from lilliput.testing import NETWORKS

MLP, CNN, _ = NETWORKS
# s over 11 steps to 0.9, to four decimals.
TABLE = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]


@dataclass
class Zeros(Watcher):
    """The weights of every layer after every step."""

    seen: list[dict[str, Tensor]] = field(default_factory=list)

    def step_done(self, run: Run) -> None:
        self.seen.append({w.name: w.value.detach().clone() for w in select(run.model)})


def test_cubic_schedule_reproduces_the_table() -> None:
    schedule = Schedule(shape="cubic")
    amounts = [schedule.amount(t / 10, final=0.9) for t in range(11)]
    assert amounts == pytest.approx(TABLE, abs=5e-5)


def test_schedule_stays_at_both_ends() -> None:
    schedule = Schedule(shape="cubic", begin=0.2, end=0.6, initial=0.1)
    assert [schedule.amount(p, 0.8) for p in (0.0, 0.1, 0.2)] == [0.1] * 3
    assert [schedule.amount(p, 0.8) for p in (0.6, 0.7, 1.0)] == [0.8] * 3
    middle = 0.8 + (0.1 - 0.8) * (1 - (0.3 - 0.2) / 0.4) ** 3
    assert schedule.amount(0.3, 0.8) == pytest.approx(middle)


def test_schedule_rises() -> None:
    for shape in ("linear", "cubic", "constant"):
        amounts = [Schedule(shape=shape).amount(t / 50, 0.9) for t in range(51)]
        assert amounts == sorted(amounts)
        assert amounts[-1] == 0.9


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_zeros_are_exactly_the_rounded_amount_at_every_step(scope: str) -> None:
    watcher, schedule = Zeros(), Schedule(shape="cubic", end=0.75, every=1)
    method = Gradual(sparsity=0.9, scope=scope, schedule=schedule, remove_dead=False)
    stage = Stage(methods=[method], train=Train(epochs=5, lr=0.01))
    lilliput.compress(MLP.build(), MLP.task(), [stage], watchers=[watcher])
    assert len(watcher.seen) == 20
    for step, weights in enumerate(watcher.seen):
        left = max(0.0, 1 - (step / 20) / 0.75)
        amount = 0.9 - 0.9 * left**3
        together = torch.cat([w.flatten() for w in weights.values()])
        groups = list(weights.values()) if scope == "layer" else [together]
        for value in groups:
            assert int((value == 0).sum()) == round(amount * value.numel()), step


def test_ranking_is_within_the_layer() -> None:
    model = MLP.build()
    with torch.no_grad():
        model[0].weight.mul_(1000.0)  # type: ignore[index]
    result = lilliput.compress(model, MLP.task(), [Gradual(sparsity=0.5, remove_dead=False)])
    assert [int((w.value == 0).sum()) * 2 for w in select(result.model)] == [
        w.value.numel() for w in select(model)
    ]


def test_smallest_go_first() -> None:
    model = MLP.build()
    dense = {w.name: w.value.detach().clone() for w in select(model)}
    result = lilliput.compress(model, MLP.task(), [Gradual(sparsity=0.7, remove_dead=False)])
    for weight in select(result.model):
        before, gone = dense[weight.name].abs(), weight.value == 0
        assert before[gone].max() <= before[~gone].min()


def test_pruned_weights_stay_pruned_under_momentum_and_decay() -> None:
    watcher = Zeros()
    train = Train(epochs=5, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=1e-2)
    stage = Stage(methods=[Gradual(sparsity=0.8, remove_dead=False)], train=train)
    lilliput.compress(CNN.build(), CNN.task(), [stage], watchers=[watcher])
    for earlier, later in zip(watcher.seen, watcher.seen[1:], strict=False):
        for name in later:
            assert bool((later[name][earlier[name] == 0] == 0).all())


def test_initial_sparsity_is_there_from_the_first_step() -> None:
    watcher = Zeros()
    schedule = Schedule(shape="cubic", initial=0.5, begin=0.5, every=1)
    stage = Stage(
        methods=[Gradual(sparsity=0.9, schedule=schedule, remove_dead=False)], train=Train(epochs=1)
    )
    lilliput.compress(MLP.build(), MLP.task(), [stage], watchers=[watcher])
    first = watcher.seen[0]
    assert [int((v == 0).sum()) * 2 for v in first.values()] == [v.numel() for v in first.values()]


def test_final_sparsity_is_reached_whatever_the_schedule() -> None:
    """Updates that are too far apart to hit the end are made up for at the end."""
    schedule = Schedule(shape="linear", every=1000)
    stage = Stage(
        methods=[Gradual(sparsity=0.6, schedule=schedule, remove_dead=False)], train=Train(epochs=1)
    )
    result = lilliput.compress(MLP.build(), MLP.task(), [stage])
    assert [round(0.6 * w.value.numel()) for w in select(result.model)] == [
        int((w.value == 0).sum()) for w in select(result.model)
    ]


def test_best_epoch_has_the_final_sparsity() -> None:
    """An early epoch with few zeros must not be kept as the best one."""
    train = Train(epochs=6, lr=0.01, keep="best")
    stage = Stage(methods=[Gradual(sparsity=0.95, remove_dead=False)], train=train)
    result = lilliput.compress(MLP.build(), MLP.task(), [stage])
    assert isinstance(result.model, nn.Sequential)
    for weight in select(result.model):
        assert int((weight.value == 0).sum()) == round(0.95 * weight.value.numel())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_an_earlier_stage_has_pruned_stays_so(scope: str) -> None:
    """Also while the schedule asks for less than there is; and it counts."""
    watcher, schedule = Zeros(), Schedule(shape="cubic", end=0.75, every=1)
    method = Gradual(sparsity=0.9, scope=scope, schedule=schedule, remove_dead=False)
    stages = [
        Stage(methods=[Magnitude(sparsity=0.6, remove_dead=False)], train=Train(epochs=0)),
        Stage(methods=[method], train=Train(epochs=3, lr=0.01)),
    ]
    pruned = lilliput.compress(MLP.build(), MLP.task(), stages[:1]).model
    gone = {w.name: w.value == 0 for w in select(pruned)}
    result = lilliput.compress(MLP.build(), MLP.task(), stages, watchers=[watcher])
    for weights in watcher.seen:
        assert not any(bool(weights[name][zero].any()) for name, zero in gone.items())
    assert all(torch.equal(watcher.seen[0][n] == 0, zero) for n, zero in gone.items())
    total = sum(w.value.numel() for w in select(result.model))
    zeros = sum(int((w.value == 0).sum()) for w in select(result.model))
    assert zeros == pytest.approx(0.9 * total, abs=2)


def test_weights_that_begin_at_zero_train() -> None:
    """No earlier stage has pruned them, though they look so."""
    model = MLP.build()
    with torch.no_grad():
        model[5].weight.zero_()  # type: ignore[index]
    schedule = Schedule(shape="linear", begin=0.5)
    stage = Stage(
        methods=[Gradual(sparsity=0.5, schedule=schedule, remove_dead=False)], train=Train(epochs=3)
    )
    last = select(lilliput.compress(model, MLP.task(), [stage]).model)[-1].value
    assert int(last.count_nonzero()) == last.numel() - round(0.5 * last.numel())


def test_what_was_pruned_is_cut_with_the_channels() -> None:
    """Surgery in the same stage makes the masks of the earlier stage thinner too."""
    watcher = Zeros()
    methods = [
        Gradual(sparsity=0.8, schedule=Schedule(shape="cubic", every=1), remove_dead=False),
        FilterL1(keep=0.5, round_to=1, rounds=2),
    ]
    stages = [
        Stage(methods=[Magnitude(sparsity=0.6, remove_dead=False)], train=Train(epochs=0)),
        Stage(methods=methods, train=Train(epochs=3, lr=0.01)),
    ]
    lilliput.compress(MLP.build(), MLP.task(), stages, watchers=[watcher])
    for earlier, later in zip(watcher.seen, watcher.seen[1:], strict=False):
        for name in later:
            if later[name].shape == earlier[name].shape:
                assert not bool(later[name][earlier[name] == 0].any())
    assert watcher.seen[0]["0.weight"].shape != watcher.seen[-1]["0.weight"].shape
