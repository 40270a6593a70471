"""Guo et al. 2016: dynamic network surgery."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError
from lilliput.mechanisms.encodings import Mask, encode, encoding_of, original_of
from lilliput.methods import DynamicSurgery
from lilliput.methods.prune.dynamic_surgery import spliced, threshold
from lilliput.testing import NETWORKS

MLP, *_ = NETWORKS


@dataclass
class Steps(Watcher):
    """After every step the masks, what is stored, and the effective weights, of every layer."""

    masks: list[list[Tensor]] = field(default_factory=list)
    stored: list[list[Tensor]] = field(default_factory=list)
    effective: list[list[Tensor]] = field(default_factory=list)

    def step_done(self, run: Run) -> None:
        chosen = select(run.model)
        encodings = [encoding_of(w, Mask) for w in chosen]
        self.masks.append([e.mask.clone() for e in encodings if e is not None])
        self.stored.append([original_of(w).detach().clone() for w in chosen])
        self.effective.append([w.value.detach().clone() for w in chosen])


def run(watcher: Watcher, epochs: int = 3, **settings: Any) -> Any:
    stage = Stage(
        methods=[DynamicSurgery(**{"deviations": 0.0, "remove_dead": False, **settings})],
        train=Train(epochs=epochs, optimizer="sgd", lr=0.05),
    )
    return lilliput.compress(MLP.build(), MLP.task(), [stage], watchers=[watcher])


def test_threshold_by_hand() -> None:
    weight = torch.tensor([0.0, 0.0, 1.0, -2.0, 3.0])
    mean, deviation = 2.0, (2 / 3) ** 0.5
    assert threshold(weight, 1.5) == pytest.approx(mean + 1.5 * deviation)
    assert threshold(weight, -10.0) == 0.0
    assert threshold(torch.zeros(4), 1.0) == 0.0


def test_between_the_thresholds_both_states_stay() -> None:
    weight = torch.tensor([0.89, 0.9, 1.0, 1.09, 1.1, -0.5, -1.0, -1.2]).repeat(2)
    mask = torch.arange(16) < 8
    expected = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 1]).bool()
    assert torch.equal(spliced(mask, weight, 0.9, 1.1), expected)


def brute_force(mask: Tensor, weight: Tensor, lower: float, upper: float) -> Tensor:
    found = mask.clone()
    for i, (w, m) in enumerate(zip(weight.flatten(), mask.flatten(), strict=True)):
        found.view(-1)[i] = False if abs(w) < lower else True if abs(w) >= upper else m
    return found


def test_masks_follow_the_rule_at_every_step() -> None:
    steps = Steps()
    run(steps, gamma=0.0, stop=1.0)
    start = [w.value.detach() for w in select(MLP.build())]
    middles = [threshold(w, 0.0) for w in start]
    masks, values = [torch.ones_like(w).bool() for w in start], start
    for step, found in enumerate(steps.masks):
        masks = [
            brute_force(m, v, 0.9 * t, 1.1 * t)
            for m, v, t in zip(masks, values, middles, strict=True)
        ]
        assert all(map(torch.equal, masks, found)), step
        values = steps.stored[step]


def test_what_is_cut_is_stored_and_computes_as_zero() -> None:
    steps = Steps()
    run(steps)
    for masks, stored, effective in zip(steps.masks, steps.stored, steps.effective, strict=True):
        for mask, kept, value in zip(masks, stored, effective, strict=True):
            assert bool((kept[~mask] != 0).any())
            assert not value[~mask].any()
            assert torch.equal(value[mask], kept[mask])


def test_a_cut_weight_gets_the_gradient_at_the_masked_weight() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    masked = (layer.weight.detach() * mask).requires_grad_(True)
    nn.functional.linear(x, masked, layer.bias).square().sum().backward()
    [weight] = select(layer)
    encode(weight, Mask(mask, "straight_through"))
    layer(x).square().sum().backward()
    assert torch.allclose(original_of(weight).grad, masked.grad)  # type: ignore[arg-type]
    assert bool((masked.grad[~mask] != 0).all())  # type: ignore[index]


def regression(wanted: list[float]) -> Task:
    """One output, whose weights should be these."""
    inputs = torch.eye(len(wanted)).repeat(8, 1)
    target = inputs @ torch.tensor(wanted)[:, None]
    batches = [(inputs, target)]
    return Task(
        batches,
        batches,
        None,
        loss=nn.functional.mse_loss,
        score=lambda o, t: -(o - t).square().mean(1),
    )


def test_a_cut_weight_that_the_loss_wants_is_spliced_back() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, 0.1, 0.1]]))
    steps = Steps()
    stage = Stage(
        methods=[DynamicSurgery(deviations=0.0, stop=1.0, gamma=0.0)],
        train=Train(epochs=60, optimizer="sgd", lr=0.2, momentum=0.0),
    )
    result = lilliput.compress(model, regression([1.0, 1.0, 1.0, 0.0]), [stage], watchers=[steps])
    states = [masks[0][0].tolist() for masks in steps.masks]
    assert states[0] == [True, True, False, False]
    assert states[-1] == [True, True, True, False]
    assert result.model.weight[0, 3] == 0
    assert result.model.weight[0, 2].item() == pytest.approx(1.0, abs=0.05)


def test_masks_are_final_behind_the_stop() -> None:
    steps = Steps()
    run(steps, epochs=6, stop=0.5, gamma=0.0)
    half = len(steps.masks) // 2
    changed = [
        not all(map(torch.equal, one, next_))
        for one, next_ in zip(steps.masks, steps.masks[1:], strict=False)
    ]
    assert any(changed[: half - 1])
    assert not any(changed[half - 1 :])


def test_changes_become_rare() -> None:
    steps = Steps()
    # The first step has probability 1, every later one next to none.
    run(steps, gamma=1e9, power=5.0)
    first = steps.masks[0]
    assert any(bool((~mask).any()) for mask in first)
    assert all(map(torch.equal, steps.masks[-1], first))


def test_zeros_are_for_good_when_the_stage_ends() -> None:
    later = Stage(train=Train(epochs=2, lr=0.05))
    surgery = Stage(methods=[DynamicSurgery(deviations=0.5)], train=Train(epochs=2, lr=0.05))
    result = lilliput.compress(MLP.build(), MLP.task(), [surgery, later])
    first, second = result.figures["stages"]
    assert second["nonzeros"] == first["nonzeros"] < 0.6 * first["parameters"]


def test_a_layer_that_would_lose_everything_is_named() -> None:
    model = MLP.build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(InputError, match=r"all of .*weight would be cut.*Lower deviations for"):
        lilliput.compress(
            model,
            MLP.task(),
            [Stage(methods=[DynamicSurgery(deviations=50.0)], train=Train(epochs=1))],
        )
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())
