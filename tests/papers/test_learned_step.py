"""Esser et al. 2020: learned step size quantization."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.select import select
from lilliput.errors import InputError, NothingMatched
from lilliput.mechanisms.activations import Quantizer, remove_quantizer, replaced_activations
from lilliput.mechanisms.encodings import StepGrid, encode, encoding_of, original_of, take_off
from lilliput.mechanisms.ranges import noise_ratio
from lilliput.methods import LearnedStep
from lilliput.testing import NETWORKS

MLP, CNN, _ = NETWORKS
SHAPES: tuple[tuple[int, ...], ...] = ((5, 7), (4, 3, 3, 3))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_equations(
    v: Tensor, s: Tensor, n: int, p: int, error: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 1, 2, 3 and 5, entry by entry: v', and what an error there is for v and for s."""
    scaled = v / s
    inside = (scaled > -n) & (scaled < p)
    out = torch.where(scaled <= -n, -n, torch.where(scaled >= p, p, scaled.round())) * s
    slope = torch.where(scaled <= -n, -n, torch.where(scaled >= p, p, scaled.round() - scaled))
    return out, error * inside, error * slope


# -- weights --------------------------------------------------------------------------------------


def gridded(shape: tuple[int, ...], bits: int, steps: Tensor, learned: bool = True) -> Any:
    layer: Any = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(3, 4, 3)
    layer.weight.data.copy_(drawn(*shape))
    layer.bias.data.zero_()
    (weight,) = select(layer)
    encode(weight, StepGrid(bits, steps.view(-1, *[1] * (len(shape) - 1)), learned))
    return layer


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_their_gradients(shape: tuple[int, ...], bits: int) -> None:
    """Steps are so small that some weights of each filter are clipped; N counts one filter."""
    high = 2 ** (bits - 1) - 1
    steps = torch.linspace(0.5, 1.1, shape[0]) / high
    layer, v, error = gridded(shape, bits, steps), drawn(*shape), drawn(*shape, seed=1)
    (layer.weight * error).sum().backward()
    (weight,) = select(layer)
    grid: Any = encoding_of(weight, StepGrid)
    expected, to_v, to_s = by_equations(v, grid.step.detach(), high, high, error)
    assert 0 < int((to_v == 0).sum()) < v.numel() // 2
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(original_of(weight).grad, to_v)
    per_filter = to_s.flatten(1).sum(1) / (v[0].numel() * high) ** 0.5
    torch.testing.assert_close(grid.step.grad.flatten(), per_filter, rtol=1e-4, atol=1e-5)


def test_a_step_answers_for_its_own_filter() -> None:
    layer = gridded((5, 7), 4, torch.full((5,), 0.1))
    layer.weight[2].square().sum().backward()
    (weight,) = select(layer)
    grid: Any = encoding_of(weight, StepGrid)
    assert (grid.step.grad.flatten() != 0).tolist() == [False, False, True, False, False]
    assert (original_of(weight).grad != 0).any(1).tolist() == [False, False, True, False, False]  # type: ignore[union-attr]


def test_fixed_steps_round_alike_and_let_gradients_pass_alike() -> None:
    steps = torch.linspace(0.05, 0.4, 5)
    trained, fixed = gridded((5, 7), 4, steps), gridded((5, 7), 4, steps, learned=False)
    assert torch.equal(trained.weight, fixed.weight)
    for layer in (trained, fixed):
        layer(drawn(3, 7)).square().sum().backward()
    first, second = (original_of(select(layer)[0]).grad for layer in (trained, fixed))
    assert torch.equal(first, second)  # type: ignore[arg-type]
    assert len(list(trained.parameters())) == len(list(fixed.parameters())) + 1


# -- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 5])
@pytest.mark.parametrize("shape", [(6, 10), (6, 3, 4, 4)])
def test_activations_and_their_gradients(shape: tuple[int, ...], zero: int) -> None:
    """Unsigned integers of 4 bits, 0 ... 15, of which one is zero: n = z and p = 15 - z."""
    step = 1.2 / 15
    x, error = drawn(*shape).requires_grad_(), drawn(*shape, seed=1)
    quantizer = Quantizer(4, step, zero, learned=True)
    found = quantizer(x)
    (found * error).sum().backward()
    v, s = x.detach(), quantizer.step.detach()
    expected, to_v, to_s = by_equations(v, s, zero, 15 - zero, error)
    torch.testing.assert_close(found.detach(), expected)
    torch.testing.assert_close(x.grad, to_v)
    features = v[0].numel()
    alone = to_s.sum() / (features * 15) ** 0.5
    torch.testing.assert_close(quantizer.step.grad, alone, rtol=1e-4, atol=1e-5)


def test_a_batch_does_not_count_as_features() -> None:
    x, gradients = drawn(2, 10), []
    for inputs in (x, torch.cat([x] * 8)):
        quantizer = Quantizer(4, 0.1, 3, learned=True)
        quantizer(inputs).square().sum(1).mean().backward()
        gradients.append(float(quantizer.step.grad))  # type: ignore[arg-type]
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5)


# -- the method -----------------------------------------------------------------------------------


def trained(network: Any, *more: Any, train: Train | None = None, **settings: Any) -> Any:
    method = LearnedStep(**{"samples": 128, **settings})
    stages = [Stage(methods=[method], train=train or Train(epochs=2)), *more]
    return lilliput.compress(network.build(), network.task(), stages)


def steps_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.endswith("step")}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_stay_positive_at_a_huge_rate(optimizer: str) -> None:
    train = Train(epochs=2, lr=100.0, optimizer=optimizer, clip=1.0)
    steps = steps_of(trained(CNN, train=train, bits=4).model)
    assert len(steps) == 7  # three weights, three inputs, and what the mean reads
    before = steps_of(trained(CNN, train=Train(epochs=0), bits=4).model)
    assert all((step > 0).all() and step.isfinite().all() for step in steps.values())
    moved = torch.cat([(step / before[name]).flatten() for name, step in steps.items()])
    assert moved.min() >= 0.99**8 - 1e-6  # eight moves, none of them further than one may be
    assert moved.max() <= 1.01**8 + 1e-6
    assert (moved - 1.0).abs().max() > 0.015  # and more than one of them goes that far


def test_steps_train_in_their_stage_and_rest_afterwards() -> None:
    start = steps_of(trained(CNN, train=Train(epochs=0)).model)
    first = trained(CNN).model
    steps, parameters = steps_of(first), dict(first.named_parameters())
    assert steps.keys() == start.keys()
    assert not any(torch.equal(steps[name], start[name]) for name in steps)
    assert not steps.keys() & parameters.keys()
    assert steps.keys() < dict(first.named_buffers()).keys()
    later = trained(CNN, Stage(train=Train(epochs=2))).model
    assert all(torch.equal(step, steps[name]) for name, step in steps_of(later).items())
    assert not torch.equal(original_of(select(later)[0]), original_of(select(first)[0]))


def test_steps_that_do_not_learn_stay_as_they_are_measured() -> None:
    start = steps_of(trained(CNN, train=Train(epochs=0)).model)
    steps = steps_of(trained(CNN, learned=False).model)
    assert all(torch.equal(step, steps[name]) for name, step in start.items())


def test_how_many_values_there_are() -> None:
    """Four bits are 15 values of a filter at most, three bits 7; activations have 16."""
    model = trained(CNN, bits={"0": 3, "*": 4}, activation_bits=4).model.eval()
    for layer, most in ((model[0], 7), (model[3], 15), (model[9], 15)):
        assert all(len(f.unique()) <= most for f in layer.weight)
    assert max(len(f.unique()) for f in model[9].weight) > 7
    met: list[Tensor] = []
    model[3].register_forward_pre_hook(lambda module, inputs: met.append(inputs[0]))
    model(next(iter(CNN.task().validation)).inputs)
    assert 4 < len(met[0].unique()) <= 16


def in_float(model: nn.Module) -> nn.Module:
    """The same network with the weights that train, and nothing rounded."""
    plain = copy.deepcopy(model)
    for place in list(replaced_activations(plain)):
        remove_quantizer(plain, place)
    for weight in select(plain):
        known = original_of(weight).detach().clone()
        take_off(weight, StepGrid)
        weight.value.data.copy_(known)
    return plain


@functools.cache
def learned_network() -> nn.Module:
    """The tiny CNN after it has learned its task."""
    stage = Stage(train=Train(epochs=60, lr=3e-3))
    return lilliput.compress(CNN.build(), CNN.task(), [stage]).model


def test_eight_bits_are_close_to_float_and_fewer_are_further() -> None:
    x, ratios = torch.cat([b.inputs for b in CNN.task().validation]), []
    for bits in (8, 4, 2):
        method = LearnedStep(bits=bits, activation_bits=bits, samples=128)
        stage = Stage(methods=[method], train=Train(epochs=5, lr=3e-4))
        model = lilliput.compress(learned_network(), CNN.task(), [stage]).model.eval()
        with torch.no_grad():
            ratios.append(noise_ratio(in_float(model)(x), model(x)))
    assert ratios[0] > 28.0
    assert ratios[0] > ratios[1] + 8.0 > ratios[2] + 12.0


def test_training_makes_up_for_few_bits() -> None:
    """Two bits for weights and activations: after some epochs less is lost than by rounding alone."""
    x, y = CNN.task().train.inputs, CNN.task().train.target  # type: ignore[attr-defined]
    losses = []
    for epochs in (0, 10):
        method = LearnedStep(bits=2, activation_bits=2, samples=128)
        stage = Stage(methods=[method], train=Train(epochs=epochs, lr=1e-3))
        model = lilliput.compress(learned_network(), CNN.task(), [stage]).model.eval()
        losses.append(float(nn.functional.cross_entropy(model(x).detach(), y)))
    assert losses[1] < 0.85 * losses[0]


def test_what_was_pruned_stays_zero_while_steps_train() -> None:
    pruning = Stage(methods=[lilliput.methods.Magnitude(sparsity=0.6)], train=Train(epochs=0))
    learning = Stage(methods=[LearnedStep(bits=4, samples=128)], train=Train(epochs=2, lr=1e-2))
    pruned = lilliput.compress(CNN.build(), CNN.task(), [pruning]).model
    model = lilliput.compress(CNN.build(), CNN.task(), [pruning, learning]).model
    for before, after in zip(select(pruned), select(model), strict=True):
        assert (after.value[before.value == 0] == 0).all()
        assert (after.value != 0).any()


def test_no_filter_is_lost_at_the_default_rate() -> None:
    """Four steps of the default optimizer."""
    start = steps_of(trained(CNN, train=Train(epochs=0)).model)
    found = steps_of(trained(CNN, train=Train(epochs=1)).model)
    assert all((step > start[name] / 10).all() for name, step in found.items())


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 9, 0, {"0": 9}])
def test_bits_outside_two_to_eight(bits: Any) -> None:
    with pytest.raises(InputError, match="bits"):
        LearnedStep(bits=bits)
    if isinstance(bits, int):
        with pytest.raises(InputError, match="activation_bits"):
            LearnedStep(activation_bits=bits)


def test_layers_that_cannot_become_integers() -> None:
    with pytest.raises(NothingMatched, match="covers only layers that cannot"):
        LearnedStep().check(nn.Sequential(nn.ConvTranspose2d(3, 4, 3)))
    with pytest.raises(InputError, match="quantized already"):
        stage = Stage(methods=[lilliput.methods.Codebook(bits=2)], train=Train(epochs=0))
        lilliput.compress(
            MLP.build(), MLP.task(), [stage, Stage(methods=[LearnedStep()], train=Train(epochs=0))]
        )
