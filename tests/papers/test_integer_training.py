"""Wu et al. 2018: integer training (WAGE)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, NothingMatched
from lilliput.mechanisms.activations import IntegerActivation, integer_error, power_of_two
from lilliput.mechanisms.encodings import on_grid, original_of
from lilliput.methods import Codebook, IntegerTraining, Magnitude
from lilliput.methods.quantize.integer_training import beginning, integer_update
from lilliput.testing import NETWORKS

MLP, CNN, TRANSFORMER = NETWORKS


def test_alpha_of_the_authors_network() -> None:
    """VGG7 at two bits: 2, 16, 16, 32, 32 and 16."""
    found = {n: beginning(n, 2, 3.0, 1.5)[1] for n in (27, 1152, 2304, 4608, 8192, 1024)}
    assert found == {27: 2, 1152: 16, 2304: 16, 4608: 32, 8192: 32, 1024: 16}
    assert beginning(4, 8, 6.0, 1.5) == (math.sqrt(6 / 4), 1.0)


def test_grids_and_powers() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        steps = on_grid(x, bits) * 2 ** (bits - 1)
        assert torch.equal(steps, steps.round())
        assert steps.abs().max() == 2 ** (bits - 1) - 1
    assert on_grid(torch.tensor([-0.9, -0.2, 0.3]), 2).tolist() == [-0.5, 0.0, 0.5]
    powers = power_of_two(x.abs())
    assert torch.equal(powers.log2(), powers.log2().round())
    assert ((x.abs() / powers) >= 2**-0.5 - 1e-6).all()
    assert ((x.abs() / powers) <= 2**0.5 + 1e-6).all()


def test_errors_are_scaled_and_rounded() -> None:
    error = torch.tensor([3e-5, -1e-5, 2e-7, 0.0])
    found = integer_error(error, 8)
    scale = 2.0 ** round(math.log2(3e-5))
    torch.testing.assert_close(found, (error / scale * 128).round().clamp(-127, 127) / 128)
    assert torch.equal(integer_error(torch.zeros(3), 8), torch.zeros(3))


def test_activations_forward_and_backward() -> None:
    x = torch.tensor([-0.5, 0.1, 0.999, 1.5], requires_grad=True)
    y = IntegerActivation(8, 8)(x)
    assert y.tolist() == [0.0, 13 / 128, 127 / 128, 127 / 128]
    y.backward(torch.tensor([1.0, 0.3, 0.004, 1.0]))
    assert x.grad is not None
    # Where the input was negative or clipped nothing passes; the rest is on the grid of errors.
    assert x.grad.tolist() == [0.0, round(0.3 * 128) / 128, 0.0, 0.0]
    assert IntegerActivation(8, 8)(torch.tensor([0.3])).item() == 38 / 128


def test_updates_are_integers_and_right_in_the_mean() -> None:
    gradient = torch.tensor([0.02, -0.013, 0.0007, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(20_000, 4, generator=generator)
    found = torch.stack([integer_update(gradient, 1.0, 8, d) for d in drawn])
    steps = found * 128
    assert torch.equal(steps, steps.round())
    scaled = gradient / power_of_two(gradient.abs().max())
    torch.testing.assert_close(steps.mean(0), scaled, atol=0.012, rtol=0.0)
    assert not integer_update(torch.zeros(3), 8.0, 8, torch.zeros(3)).any()


class Grids(Watcher):
    """What is stored and what multiplies, after every step, and the loss."""

    def __init__(self) -> None:
        self.stored: list[Tensor] = []
        self.effective: list[Tensor] = []

    def step_done(self, run: Run) -> None:
        for weight in select(run.model):
            self.stored.append(original_of(weight).detach().clone())
            self.effective.append(weight.value.detach().clone())


def trained(network: Any = MLP, folder: Path | None = None, epochs: int = 3, **more: Any) -> Any:
    watcher = Grids()
    train = Train(epochs=epochs, optimizer="sgd", lr=4.0, weight_decay=1e-2, momentum=0.9)
    stage = Stage(methods=[IntegerTraining(**more)], train=train)
    result = lilliput.compress(
        network.build(), network.task(), [stage], watchers=[watcher], directory=folder
    )
    return result, watcher


def test_every_weight_is_an_integer_at_every_step() -> None:
    """On the grid of eight bits what is stored, on that of two bits, over a power of two, what multiplies."""
    _, seen = trained()
    for stored, effective in zip(seen.stored, seen.effective, strict=True):
        steps = stored * 128
        assert torch.equal(steps, steps.round())
        assert steps.abs().max() <= 127
        scale = effective.abs().max()
        if scale > 0:
            assert set((effective / scale).unique().tolist()) <= {-1.0, 0.0, 1.0}
            assert float(scale.log2()) == round(float(scale.log2()))
    assert any(not torch.equal(a, b) for a, b in zip(seen.stored, seen.stored[3:], strict=False))


def test_it_learns() -> None:
    wide = nn.Sequential(nn.Linear(12, 256, bias=False), nn.ReLU(), nn.Linear(256, 3, bias=False))
    stage = Stage(methods=[IntegerTraining()], train=Train(epochs=40, optimizer="sgd", lr=4.0))
    figures = lilliput.compress(wide, MLP.task(), [stage]).figures
    assert figures["validation"] > 50


def test_the_file_takes_two_bits_a_weight(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(12, 2000, bias=False), nn.ReLU(), nn.Linear(2000, 3, bias=False))
    stage = Stage(methods=[IntegerTraining()], train=Train(epochs=1, optimizer="sgd", lr=4.0))
    result = lilliput.compress(wide, MLP.task(), [stage], directory=tmp_path)
    with lilliput.artifact.open(result.artifact) as file:
        (first,) = (t for t in file.report().tensors if t.name == "0.weight")
    assert first.bytes <= 12 * 2000 * 2 / 8 + 64
    fresh = nn.Sequential(
        nn.Linear(12, 2000, bias=False), nn.ReLU(), nn.Linear(2000, 3, bias=False)
    )
    loaded, x = lilliput.load(result.artifact, model=fresh), torch.randn(5, 12)
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model.eval()(x))
    assert isinstance(loaded[1], IntegerActivation)  # type: ignore[index]


def _closeness(output: Tensor, target: Tensor) -> Tensor:
    return -(output - target).square().mean(1)


def test_bad_input() -> None:
    with pytest.raises(NothingMatched, match="inside forward"):
        IntegerTraining().check(TRANSFORMER.build())
    stages = [
        Stage(methods=[Codebook(bits=2)], train=Train(epochs=0)),
        Stage(methods=[IntegerTraining()], train=Train(epochs=1, optimizer="sgd")),
    ]
    with pytest.raises(InputError, match="shared values already"):
        lilliput.compress(MLP.build(), MLP.task(), stages)
    batches = [(torch.randn(8, 12), torch.randn(8, 3))]
    task = lilliput.Task(batches, batches, batches, nn.functional.mse_loss, _closeness)
    with pytest.raises(InputError, match="class numbers"):
        stage = Stage(methods=[IntegerTraining()], train=Train(epochs=1, optimizer="sgd"))
        lilliput.compress(MLP.build(), task, [stage])


def test_a_mask_in_a_later_stage_leaves_the_other_weights_as_they_are() -> None:
    """What trains is kept when the stack of encodings is built anew, not what it computes."""
    stages = [
        Stage(methods=[IntegerTraining()], train=Train(epochs=1, optimizer="sgd", lr=4.0)),
        Stage(methods=[Magnitude(sparsity=0.5, remove_dead=False)], train=Train(epochs=0)),
    ]
    first = lilliput.compress(MLP.build(), MLP.task(), stages[:1]).model
    both = lilliput.compress(MLP.build(), MLP.task(), stages).model
    for one, two in zip(select(first), select(both), strict=True):
        kept = two.value != 0
        assert torch.equal(one.value[kept], two.value[kept])


def test_an_own_loop_must_give_its_optimizer() -> None:
    """The learning rate counts in the updates; what is missing is told before the first step."""
    model, batch = MLP.build(), next(iter(MLP.task().train))
    attached = lilliput.attach(model, IntegerTraining())
    with pytest.raises(InputError, match=r"attached\.run\.optimizer before the first step"):
        attached.batch(batch.inputs, batch.target)
    attached.run.optimizer = torch.optim.SGD(attached.parameters(), lr=4.0)
    before = original_of(select(model)[0]).detach().clone()
    attached.batch(batch.inputs, batch.target)
    attached.loss(None, model(batch.inputs)).backward()
    attached.after_backward()
    moved = (original_of(select(model)[0]) - before) * 128
    assert moved.any()
    assert torch.equal(moved, moved.round())
