"""Gomez et al. 2018: targeted dropout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.core.task import evaluation
from lilliput.engine.progress import Watcher
from lilliput.mechanisms.encodings import LeftOut, encode, encoding_of, original_of
from lilliput.methods import TargetedDropout
from lilliput.methods.prune.targeted_dropout import candidate_units, candidate_weights, ramped
from lilliput.testing import NETWORKS

MLP, CNN, _ = NETWORKS


@dataclass
class Steps(Watcher):
    """After every step what was left out of a layer, and what is stored of it."""

    layer: int = 0
    left_out: list[Tensor] = field(default_factory=list)
    stored: list[Tensor] = field(default_factory=list)
    trained: list[Tensor] = field(default_factory=list)
    whole: list[Tensor] = field(default_factory=list)

    def step_done(self, run: Run) -> None:
        weight = select(run.model)[self.layer]
        encoding = encoding_of(weight, LeftOut)
        assert encoding is not None
        self.left_out.append(encoding.left_out.clone())
        self.stored.append(original_of(weight).detach().clone())
        self.trained.append(weight.value.detach().clone())
        with evaluation(run.model):
            self.whole.append(weight.value.detach().clone())


def run(network: Any = MLP, epochs: int = 5, **settings: Any) -> tuple[nn.Module, Steps]:
    method = TargetedDropout(**{"sparsity": 0.5, "remove_dead": False, **settings})
    stage = Stage(methods=[method], train=Train(epochs=epochs, optimizer="sgd", lr=0.05))
    watcher = Steps()
    model = lilliput.compress(network.build(), network.task(), [stage], watchers=[watcher]).model
    return model, watcher


def test_candidates_by_hand() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.1, 0.2, -0.3, 0.4]])
    found = candidate_weights(weight, 0.5)
    assert torch.equal(found, torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]]).bool())
    assert int(candidate_weights(torch.ones(3, 10), 0.3).sum()) == 9  # ties do not take more
    assert torch.equal(candidate_units(weight, 0.5), torch.tensor([False, True]))
    kernel = torch.arange(16.0).view(2, 2, 2, 2)
    assert candidate_weights(kernel, 0.25).flatten(1).sum(1).tolist() == [2, 2]


def test_ramps() -> None:
    """Gamma to 0.95 of its value in the first half, alpha on one line."""
    found = [ramped(p, 0.8, 0.9, 0.5) for p in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    gammas = [0.0, 0.4275, 0.855, 0.8775, 0.9, 0.9]
    assert [g for g, _ in found] == pytest.approx(gammas)
    assert [a for _, a in found] == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5])
    assert ramped(0.0, 0.0, 0.9, 0.5) == (0.9, 0.5)


def test_important_weights_are_never_left_out_and_others_as_often_as_stated() -> None:
    torch.manual_seed(0)
    _, seen = run(epochs=30, rate=0.4)
    before = seen.stored[:-1]  # what the next step chose from
    shares = []
    for left_out, stored in zip(seen.left_out[1:], before, strict=True):
        assert not (left_out & ~candidate_weights(stored, 0.5)).any()
        shares.append(float(left_out.float().mean()))
    assert sum(shares) / len(shares) == pytest.approx(0.4 * 0.5, rel=0.03)


def test_nothing_is_scaled_and_eval_sees_everything() -> None:
    _, seen = run()
    for left_out, stored, trained, whole in zip(
        seen.left_out, seen.stored, seen.trained, seen.whole, strict=True
    ):
        assert torch.equal(trained, stored * ~left_out)
        assert torch.equal(whole, stored)


def test_only_what_is_left_out_gets_no_gradient() -> None:
    layer = nn.Linear(4, 2)
    (weight,) = select(layer)
    gone = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]]).bool()
    encode(weight, LeftOut(gone))
    layer(torch.ones(3, 4)).sum().backward()
    gradient = original_of(weight).grad
    assert gradient is not None
    assert torch.equal(gradient, 3.0 * ~gone)


def test_units_are_left_out_whole() -> None:
    _, seen = run(CNN, by="unit", rate=0.6, epochs=10)
    assert any(left_out.any() for left_out in seen.left_out)
    for left_out in seen.left_out:
        per_unit = left_out.flatten(1)
        assert torch.equal(per_unit.any(1), per_unit.all(1))
        assert int(per_unit.all(1).sum()) <= 3


@pytest.mark.parametrize("by", ["weight", "unit"])
def test_candidates_are_pruned_at_the_end(by: str) -> None:
    model, seen = run(by=by)
    first = select(model)[0].value
    expected = (
        candidate_weights(seen.stored[-1], 0.5)
        if by == "weight"
        else candidate_units(seen.stored[-1], 0.5)[:, None].expand_as(first)
    )
    assert torch.equal(first == 0, expected)
    assert torch.equal(first[~expected], seen.stored[-1][~expected])


def test_nothing_is_left_out_at_rate_zero() -> None:
    _, seen = run(rate=0.0)
    assert not any(left_out.any() for left_out in seen.left_out)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("by", ["weight", "unit"])
def test_units_of_a_transposed_convolution_are_its_outputs(by: str, groups: int) -> None:
    """They lie in the second dim of its weight, those of each group apart."""
    layer = nn.ConvTranspose2d(6, 4, 2, groups=groups, bias=False)
    outputs = 4 // groups
    with torch.no_grad():
        layer.weight[-1, :].mul_(1e-3)  # the last input is weak, which nobody asks for
        layer.weight[: 6 // groups, 1].mul_(1e-2)  # the second output
    method = TargetedDropout(sparsity=0.25, by=by, remove_dead=False)
    run = Run(nn.Sequential(layer), MLP.task(), methods=[method])
    method.attach(run)
    method.before_step(run)
    method.finish(run)
    gone = (layer.weight == 0).view(groups, 6 // groups, outputs, 4).transpose(1, 2).reshape(4, -1)
    if by == "unit":
        assert gone.all(1).tolist() == [False, True, False, False]
    assert gone.sum(1).tolist() == ([0, 24 // groups, 0, 0] if by == "unit" else [6 // groups] * 4)
