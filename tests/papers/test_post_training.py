"""Jacob 2018, Nagel 2019 and 2020, Frantar 2023: integers without training."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.core.types import Batch
from lilliput.errors import EmptyData, InputError, NothingMatched
from lilliput.measure import size
from lilliput.mechanisms.activations import quantizer_at, replaced_activations
from lilliput.mechanisms.encodings import StepGrid, encoding_of, put_grid
from lilliput.mechanisms.flow import flows
from lilliput.mechanisms.ranges import noise_ratio, steps_of
from lilliput.methods import Apoz, Codebook, Magnitude, PostTraining, Taylor, Thinet
from lilliput.methods.quantize._bits_by_loss import losses, spread_bits
from lilliput.methods.quantize._equalizing import equalize
from lilliput.methods.quantize._rounding import adaptive, nearest, second_order
from lilliput.testing import NETWORKS

MLP, CNN, TRANSFORMER = NETWORKS
NONE = Train(epochs=0)
ROUNDINGS = ("nearest", "adaptive", "second_order")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def task_of(x: Tensor) -> Task:
    """A task whose training batches are these inputs; what it asks for does not matter."""
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(32)]
    return Task(batches, batches, batches, lambda o, t: o.flatten(1).mean(), lambda o, t: o.mean())


def quantized(model: nn.Module, task: Task, folder: Path | None = None, **settings: Any) -> Any:
    method = PostTraining(**{"samples": 64, **settings})
    stages = [Stage(methods=[method], train=NONE)]
    return lilliput.compress(model, task, stages, directory=folder).model.eval()


def told(folder: Path) -> list[dict[str, Any]]:
    (changes,) = json.loads((folder / "changes.json").read_text())
    return list(changes)


# -- integers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_weights_are_integers_times_a_step(rounding: Any, bits: int) -> None:
    settings = {"bits": bits, "rounding": rounding, "iterations": 30}
    for network in (CNN, TRANSFORMER):
        model, highest = quantized(network.build(), network.task(), **settings), 2 ** (bits - 1) - 1
        for weight in select(model):
            grid = encoding_of(weight, StepGrid)
            if weight.tensor != "in_proj_weight":
                assert grid is not None
                whole = (weight.value / grid.step).detach()
                assert (whole - whole.round()).abs().max() < 1e-4
                assert highest // 2 < whole.abs().max() < highest + 1e-4


def test_a_layer_in_integer_arithmetic() -> None:
    """Jacob, equation 4: only integers are multiplied and summed; one factor for each filter follows."""
    model: Any = quantized(CNN.build(), CNN.task())
    met: list[Tensor] = []
    model[3].register_forward_hook(lambda module, inputs, output: met.extend((inputs[0], output)))
    x = next(iter(CNN.task().validation)).inputs
    model[2].register_forward_hook(lambda module, inputs, output: met.append(output))
    with torch.no_grad():
        model(x)
    seen, rounded, output = met  # what comes from the rectifier, what the layer gets, and makes
    before = quantizer_at(model, "3:input")
    assert before is not None
    codes = ((seen / before.step).round() + before.zero).clamp(0, 255).long()
    torch.testing.assert_close(rounded, (codes - before.zero) * before.step)
    grid: Any = encoding_of(select(model, "3")[0], StepGrid)
    weight = (model[3].weight / grid.step).round().detach()
    sums = F.conv2d((codes - before.zero).double(), weight.double(), stride=2)
    factors = (grid.step.flatten() * before.step).view(-1, 1, 1)
    expected = sums * factors + model[3].bias.view(-1, 1, 1)
    torch.testing.assert_close(output, expected.float().detach(), rtol=1e-4, atol=1e-5)


def test_eight_bits_are_close_and_each_bit_counts() -> None:
    for network in NETWORKS:
        model, x = network.build().eval(), next(iter(network.task().train)).inputs
        ratios = [
            noise_ratio(
                model(x).detach(),
                quantized(model, network.task(), bits=b, activation_bits=b)(x).detach(),
            )
            for b in (4, 8)
        ]
        assert ratios[1] > 30.0
        assert ratios[1] - ratios[0] > 12.0


def test_batch_normalization_only_changes_steps() -> None:
    """Multiplied in before, with steps multiplied too, or left where it is: the same function."""
    layer, norm = nn.Conv2d(3, 6, 3).double(), nn.BatchNorm2d(6).double().eval()
    nn.init.normal_(norm.weight)  # some are negative
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    factor = (norm.weight / (norm.running_var + norm.eps) ** 0.5).detach()  # type: ignore[operator]
    assert (factor < 0).any()
    plain, bias = layer.weight.detach().clone(), layer.bias.detach()  # type: ignore[union-attr]
    steps = steps_of(plain.flatten(1), 4, "mse")
    (weight,) = select(layer)
    put_grid(weight, 4, steps)
    x = drawn(2, 3, 7, 7)
    folded = plain * factor.view(-1, 1, 1, 1)
    own = (steps * factor.abs()).view(-1, 1, 1, 1)
    whole = (folded / own).round().clamp(-7, 7) * own
    shift = (bias - norm.running_mean) * factor + norm.bias  # type: ignore[operator]
    expected = F.conv2d(x, whole, shift.detach())
    torch.testing.assert_close(norm(layer(x)).detach(), expected, rtol=1e-12, atol=1e-12)


# -- equalization ---------------------------------------------------------------------------------


def randomized(net: Any) -> Any:
    """In double precision, scales of filters far apart, and normalizations that have seen something."""
    torch.manual_seed(0)
    net = net.double().eval()
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            spread = torch.randn(len(module.weight)).double().exp()
            module.weight.data.mul_(spread.view(-1, *[1] * (module.weight.ndim - 1)))
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            if module.running_var is not None:
                module.running_mean = torch.randn(module.num_features).double()
                module.running_var = torch.rand(module.num_features).double() + 0.1
    return net


def equalized(net: Any, x: Tensor) -> dict[str, str]:
    """Equalize, and see that outputs stay."""
    with torch.no_grad():
        before = net(x)
        chosen = select(net)
        pairs = equalize(net, chosen, flows(net, [w.layer for w in chosen], x[:2]).layers)
        torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-9)
    return pairs


def ranges(first: Any, second: Any, norm: Any = None) -> tuple[Tensor, Tensor]:
    """r1 and r2: of each channel between two layers, the largest weights on both sides."""
    own = first.weight.detach().abs().flatten(1).amax(1)
    if norm is not None:
        own = own * (norm.weight.abs() / (norm.running_var + norm.eps).sqrt()).detach()
    theirs = second.weight.detach().abs()
    dims = (1, 2, 3) if getattr(second, "groups", 1) > 1 else (0, 2, 3)[: theirs.ndim - 1]
    return own, theirs.amax(dims)


IMAGE, ROWS = drawn(4, 3, 8, 8), drawn(4, 6)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("kind", ["linear", "convolution", "pooled"])
def test_equal_ranges(kind: str, relu: bool) -> None:
    """Equation 11: r1_i = r2_i = sqrt(r1_i r2_i)."""
    x = ROWS if kind == "linear" else IMAGE
    layers: list[Any] = (
        [nn.Linear(6, 5), nn.Linear(5, 4)]
        if kind == "linear"
        else [nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3, bias=False)]
    )
    between = [nn.ReLU()] * relu + [nn.MaxPool2d(2)] * (kind == "pooled")
    net = randomized(nn.Sequential(layers[0], *between, layers[1]))
    first, second = ranges(*layers)
    assert (first.log() - second.log()).abs().max() > 0.3
    assert equalized(net, x) == {"0": str(1 + len(between))}
    for found in ranges(*layers):
        torch.testing.assert_close(found, (first * second).sqrt())


def test_equal_ranges_behind_a_normalization() -> None:
    net = randomized(
        nn.Sequential(
            nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3)
        )
    )
    kept = net[0].weight.clone()
    first, second = ranges(net[0], net[3], net[1])
    assert equalized(net, IMAGE) == {"0": "3"}
    for found in ranges(net[0], net[3], net[1]):
        torch.testing.assert_close(found, (first * second).sqrt())
    assert torch.equal(net[0].weight, kept)  # it is the normalization that was divided


def test_equal_ranges_of_depthwise_layers() -> None:
    """The three of a MobileNet's block, until they settle."""
    net = randomized(
        nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 4, 1),
        )
    )  # fmt: skip
    assert equalized(net, IMAGE) == {"0": "3", "3": "6"}
    for pair in ((net[0], net[3], net[1]), (net[3], net[6], net[4])):
        torch.testing.assert_close(*ranges(*pair), rtol=2e-2, atol=0)


def test_equal_ranges_inside_a_transformer() -> None:
    net = randomized(TRANSFORMER.build())
    assert equalized(net, drawn(4, 6, 8)) == {"encoder.linear1": "encoder.linear2"}
    torch.testing.assert_close(*ranges(net.encoder.linear1, net.encoder.linear2))


def test_a_dead_filter_keeps_its_scale() -> None:
    net = randomized(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)))
    net[0].weight.data[1] = 0.0
    net[2].weight.data[:, 3] = 0.0
    kept = [net[0].weight[3].clone(), net[2].weight[:, 1].clone(), net[0].bias[[1, 3]].clone()]
    equalized(net, ROWS)
    assert torch.equal(net[0].weight[3], kept[0])
    assert torch.equal(net[2].weight[:, 1], kept[1])
    assert torch.equal(net[0].bias[[1, 3]], kept[2])


class Function(nn.Module):
    """Two convolutions or linear layers, normalizations, and how they are called."""

    def __init__(self, run: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(inputs: int = 3, outputs: int = 4, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


APART: dict[str, tuple[Any, Tensor]] = {
    "relu6": (nn.Sequential(conv(), nn.ReLU6(), conv(4)), IMAGE),
    "clamped above zero": (Function(lambda n, x: n.b(n.a(x).clamp(min=0.1)), a=conv(), b=conv(4)), IMAGE),
    "sigmoid": (nn.Sequential(conv(), nn.Sigmoid(), conv(4)), IMAGE),
    "an add": (Function(lambda n, x: n.b(n.a(x).relu() + x), a=conv(3, 3), b=conv()), IMAGE),
    "read by two": (
        Function(lambda n, x: (lambda y: n.b(y) + n.c(y))(n.a(x).relu()), a=conv(), b=conv(4), c=conv(4)),
        IMAGE,
    ),
    "read by a mean": (
        Function(lambda n, x: (lambda y: n.b(y) + y.mean())(n.a(x).relu()), a=conv(), b=conv(4)),
        IMAGE,
    ),
    "flattened": (nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)), IMAGE),
    "grouped": (nn.Sequential(conv(), nn.ReLU(), conv(4, 4, groups=2)), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_is_no_pair(name: str) -> None:
    net, x = APART[name]
    net = randomized(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert equalized(net, x) == {}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def layout(name: str, net: Any, x: Tensor = IMAGE) -> Any:
    return pytest.param(net, x, id=name)


@pytest.mark.parametrize(
    ("net", "x"),
    [
        layout("shuffled", nn.Sequential(conv(), nn.ReLU(), nn.ChannelShuffle(2), conv(4))),
        layout(
            "transposed",
            Function(
                lambda n, x: n.b(n.a(x).relu().transpose(1, 2)), a=nn.Linear(6, 4), b=nn.Linear(4, 4)
            ),
            drawn(2, 4, 6),
        ),
        layout("second twice", Function(lambda n, x: n.b(n.b(n.a(x).relu())), a=conv(), b=conv(4))),
        layout(
            "one normalization",
            Function(
                lambda n, x: n.b(n.norm(n.a(x)).relu()) + n.d(n.norm(n.c(x)).relu()),
                a=conv(), b=conv(4), c=conv(), d=conv(4), norm=nn.BatchNorm2d(4),
            ),
        ),
        layout(
            "multiplier",
            nn.Sequential(conv(), nn.ReLU(), conv(4, 8, groups=4)),
        ),
        layout(
            "no scale",
            nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False), nn.ReLU(), conv(4)),
        ),
        layout(
            "no statistics",
            nn.Sequential(
                conv(), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), conv(4)
            ),
        ),
    ],
)  # fmt: skip
def test_networks_that_equalizing_must_leave_alone_or_keep(net: Any, x: Tensor) -> None:
    equalized(randomized(net), x)


def test_pairs_are_told(tmp_path: Path) -> None:
    model = CNN.build().eval()
    x = next(iter(CNN.task().train)).inputs
    found = quantized(model, CNN.task(), tmp_path, equalize=True)
    pairs = [(c["where"], c["after"]) for c in told(tmp_path) if c["what"] == "equalized with"]
    assert pairs == [("0", "3")]
    assert noise_ratio(model(x).detach(), found(x).detach()) > 30.0


# -- bias correction ------------------------------------------------------------------------------

LAYERS: dict[str, Any] = {
    "linear": nn.Linear(6, 5),
    "convolution": nn.Conv2d(4, 5, 3, padding=1, stride=2),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "one dimension": nn.Conv1d(4, 5, 3),
    "normalized": nn.Sequential(nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)),
    "both": nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_of_the_output_is_corrected(name: str) -> None:
    """Of each channel over all samples and positions; few bits, so that there is something to correct."""
    net = nn.Sequential(LAYERS[name]).eval()
    shape = {"linear": (64, 6), "one dimension": (64, 4, 7)}.get(name, (64, 4, 7, 7))
    x = (drawn(*shape) + drawn(1, *shape[1:], seed=1) + 1.0).float()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            module.running_mean = torch.randn(5)
        elif not isinstance(module, nn.Sequential):
            module.reset_parameters()  # type: ignore[operator]
    over = [d for d in range(x.ndim) if d != 1]
    errors = []
    for correct in (False, True):
        settings: dict[str, Any] = {"bits": 3, "positions": 100, "correct_bias": correct}
        model = quantized(net, task_of(x), activation_bits=None, **settings)
        with torch.no_grad():
            errors.append((model(x) - net(x)).double().mean(over).abs().max())
    assert errors[0] > 1e-2
    assert errors[1] < 1e-5


def test_nothing_takes_a_correction_of_a_layer_without_bias() -> None:
    net = nn.Sequential(nn.Linear(6, 5, bias=False))
    model: Any = quantized(net, task_of(drawn(64, 6).float() + 1.0), bits=3)
    assert model[0].bias is None


# -- rounding -------------------------------------------------------------------------------------


def correlated(columns: int, seed: int = 0) -> Tensor:
    """The Hessian of inputs that are alike: each is mixed of few others."""
    x = drawn(4 * columns, columns, seed=seed) @ (
        drawn(columns, columns, seed=seed + 1) + 2.0 * drawn(1, columns, seed=seed + 2)
    )
    hessian = x.T @ x / len(x)
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)


def errors(found: Tensor, rows: Tensor, hessian: Tensor) -> Tensor:
    """Of each filter's output, d^T H d."""
    return torch.stack([(d @ hessian @ d) for d in found - rows])


def best_of_all(row: Tensor, hessian: Tensor, step: Tensor, highest: int) -> float:
    """The least error over every way of rounding each weight up or down."""
    low = (row / step).floor()
    ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(row))), dtype=row.dtype)
    moved = (low + ways).clamp(-highest, highest) * step - row
    return float(torch.einsum("ni,ij,nj->n", moved, hessian, moved).min())


@pytest.mark.parametrize("highest", [1, 3, 7])
@pytest.mark.parametrize("alike", [0.5, 2.0])
def test_adaptive_rounding_is_nearly_the_best_of_all(highest: int, alike: float) -> None:
    """Inputs have a little or much in common: the more, the further the best is from the nearest."""
    rows, x = drawn(12, 8, seed=4), drawn(32, 8) + alike * drawn(32, 1, seed=9)
    hessian = x.T @ x / 32
    steps = 0.8 * rows.abs().amax(1) / highest
    found, plain = adaptive(rows, hessian, steps, highest), nearest(rows, steps, highest)
    whole = found / steps[:, None]
    low = (rows / steps[:, None]).floor()
    assert (whole - whole.round()).abs().max() < 1e-9
    assert (whole.round() - low.clamp(-highest, highest) >= 0).all()
    assert (whole.round() - (low + 1).clamp(-highest, highest) <= 0).all()
    mine, theirs = (errors(f, rows, hessian) for f in (found, plain))
    best = torch.tensor(
        [best_of_all(r, hessian, s, highest) for r, s in zip(rows, steps, strict=True)],
        dtype=torch.float64,
    )
    assert (mine <= theirs * (1 + 1e-12)).all()
    assert (mine >= best * (1 - 1e-9)).all()
    assert mine.sum() <= 1.15 * best.sum()
    assert theirs.sum() > 1.15 * best.sum()
    assert mine.sum() < 0.95 * theirs.sum()


def column_by_column(rows: Tensor, hessian: Tensor, steps: Tensor, highest: int) -> Tensor:
    """Optimal Brain Surgeon in a fixed order: what is free solves its least squares again each time."""
    settled = rows.clone()
    for column in range(rows.shape[1]):
        for filter_, step in enumerate(steps):
            fixed = settled[filter_, :column] - rows[filter_, :column]
            right = hessian[column:, :column] @ fixed
            free = rows[filter_, column:] - torch.linalg.solve(hessian[column:, column:], right)
            whole = (free[0] / step).round().clamp(-highest, highest)
            settled[filter_, column] = whole * step
    return settled


@pytest.mark.parametrize(("columns", "highest"), [(12, 7), (12, 1), (140, 7)])
def test_second_order_rounding_is_brain_surgery(columns: int, highest: int) -> None:
    """Also where weights are clipped, and beyond the 128 columns that are settled together."""
    rows, hessian = drawn(3, columns, seed=4), correlated(columns)
    steps = 0.7 * rows.abs().amax(1) / highest
    found = second_order(rows, hessian, steps, highest)
    expected = column_by_column(rows, hessian, steps, highest)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    if highest > 1:
        plain = nearest(rows, steps, highest)
        assert errors(found, rows, hessian).sum() < 0.7 * errors(plain, rows, hessian).sum()


def test_inputs_that_are_not_alike_are_rounded_to_the_nearest() -> None:
    """A diagonal Hessian leaves nothing to make up for."""
    rows, hessian = drawn(4, 9), drawn(9).square().diag() + torch.eye(9, dtype=torch.float64)
    steps = rows.abs().amax(1) / 7
    expected = nearest(rows, steps, 7)
    torch.testing.assert_close(second_order(rows, hessian, steps, 7), expected)
    torch.testing.assert_close(adaptive(rows, hessian, steps, 7, 300), expected)


@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped"])
def test_outputs_of_a_layer_like_both_better(kind: str) -> None:
    """On the samples that were seen, in every layout of a weight."""
    shape = (64, 12) if kind == "linear" else (64, 4, 6, 6)
    torch.manual_seed(1)
    layer = {
        "linear": nn.Linear(12, 6),
        "convolution": nn.Conv2d(4, 6, 3, stride=2),
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
    }[kind]
    x = drawn(*shape).cumsum(-1).float()
    found = {}
    for rounding in ROUNDINGS:
        settings: dict[str, Any] = {"bits": 3, "positions": 50, "correct_bias": False}
        settings |= {"activation_bits": None, "rounding": rounding}
        model = quantized(nn.Sequential(layer), task_of(x), **settings)
        with torch.no_grad():
            found[rounding] = float((model(x) - layer(x)).square().mean())
    assert found["adaptive"] < 0.97 * found["nearest"]
    assert found["second_order"] < 0.8 * found["nearest"]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("masked", [True, False])
def test_pruned_weights_stay_zero(rounding: Any, masked: bool) -> None:
    """Also where inputs are so alike that a removed weight could make up for others."""
    task = task_of(drawn(64, 12).float() + 2.0 * drawn(64, 1, seed=1).float())
    stage = Stage(methods=[Magnitude(sparsity=0.5, remove_dead=False)], train=NONE)
    pruned = lilliput.compress(nn.Sequential(nn.Linear(12, 8)), task, [stage]).model
    if not masked:
        pruned = lilliput.mechanisms.encodings.bake(pruned)
    model = quantized(pruned, task, rounding=rounding, bits=3)
    ((before,), (after,)) = select(pruned), select(model)
    assert int((before.value == 0).sum()) == 48
    assert (after.value[before.value == 0] == 0).all()
    assert int((after.value != 0).sum()) > 24


# -- how many bits --------------------------------------------------------------------------------


def cheapest(sizes: list[int], choices: list[int], costs: list[list[float]], mean: float) -> float:
    """The least sum of costs over all ways of giving bits that meet the mean."""
    ways = itertools.product(range(len(choices)), repeat=len(sizes))
    return min(
        sum(costs[layer][place] for layer, place in enumerate(way))
        for way in ways
        if sum(n * choices[p] for n, p in zip(sizes, way, strict=True)) <= mean * sum(sizes)
    )


@pytest.mark.parametrize("choices", [[4, 8], [2, 4, 6, 8]])
@pytest.mark.parametrize("mean", [4.0, 5.3, 6.0, 8.0])
def test_spread_bits_is_optimal_where_layers_are_of_one_size(
    choices: list[int], mean: float
) -> None:
    """Costs that fall ever more slowly; the method's own rule is greedy."""
    for seed in range(8):
        falls = drawn(6, len(choices) - 1, seed=seed).abs().sort(1, descending=True).values
        costs = torch.cat([falls, torch.zeros(6, 1)], 1).flip(1).cumsum(1).flip(1).tolist()
        given = spread_bits([50] * 6, choices, costs, mean)
        assert sum(given) <= 6 * mean
        paid = sum(row[choices.index(bits)] for row, bits in zip(costs, given, strict=True))
        assert paid == pytest.approx(cheapest([50] * 6, choices, costs, mean))


def test_spread_bits_weighs_what_a_layer_saves() -> None:
    """The large layer costs more, but much less a bit."""
    assert spread_bits([10, 1000], [4, 8], [[0.1, 0.0], [0.5, 0.0]], 4.5) == [8, 4]
    assert spread_bits([500, 500], [4, 8], [[0.1, 0.0], [0.5, 0.0]], 6.0) == [4, 8]
    for mean in (4.0, 5.0, 6.7, 8.0):
        sizes, costs = [3, 70, 41, 9], drawn(4, 2, seed=int(mean)).abs().tolist()
        given = spread_bits(sizes, [4, 8], costs, mean)
        assert sum(n * b for n, b in zip(sizes, given, strict=True)) <= mean * sum(sizes)


def test_prices_are_losses_with_one_layer_rounded() -> None:
    model, task = MLP.build().eval(), MLP.task()
    run, chosen = Run(model, task), select(model)
    batches = [Batch(*b) for b in [(b.inputs, b.target) for b in task.validation]]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = losses(run, chosen, [2, 8], batches)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for weight, row in zip(chosen, found, strict=True):
        kept = weight.value.detach().clone()
        for bits, price in zip((2, 8), row, strict=True):
            steps = steps_of(kept, bits, "mse")[:, None]
            highest = 2 ** (bits - 1) - 1
            with torch.no_grad():
                weight.value.copy_((kept / steps).round().clamp(-highest, highest) * steps)
                each = [F.cross_entropy(model(b.inputs), b.target) for b in batches]
                weight.value.copy_(kept)
            assert price == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)


def test_mixed_bits_meet_the_mean(tmp_path: Path) -> None:
    model = quantized(CNN.build(), CNN.task(), tmp_path, mean_bits=5.0, choices=[3, 4, 8])
    bits = {c["where"]: c["after"] for c in told(tmp_path)}
    sizes = {w.name: w.value.numel() for w in select(model)}
    assert sum(bits[n] * sizes[n] for n in sizes) <= 5.0 * sum(sizes.values())
    assert {encoding_of(w, StepGrid).bits for w in select(model)} == set(bits.values())  # type: ignore[union-attr]
    assert len(set(bits.values())) > 1


# -- activations ----------------------------------------------------------------------------------


def test_weights_only(tmp_path: Path) -> None:
    model = quantized(CNN.build(), CNN.task(), tmp_path, activation_bits=None)
    assert not replaced_activations(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {c["note"] for c in told(tmp_path)} == {"weights only"}
    assert all(encoding_of(w, StepGrid) for w in select(model))


def test_a_second_time_measures_anew() -> None:
    first = quantized(CNN.build(), CNN.task())
    again = quantized(first, CNN.task(), bits=4, activation_bits=None)
    assert not replaced_activations(again)
    assert all(encoding_of(w, StepGrid).bits == 4 for w in select(again))  # type: ignore[union-attr]


def residual() -> Function:
    def run(n: Any, x: Tensor) -> Tensor:
        x = n.relu(n.stem(x))
        result: Tensor = n.head(n.block(x).mean((2, 3)))
        return result

    block = Function(lambda n, x: (n.b(n.a(x).relu()) + x).relu(), a=conv(4), b=conv(4))
    net = Function(run, stem=conv(), relu=nn.ReLU(), block=block, head=nn.Linear(4, 2))
    return net.float()


def test_sums_stay_integers_and_whoever_reads_them_counts_alike() -> None:
    model = quantized(residual(), task_of(IMAGE.repeat(8, 1, 1, 1).float()))
    places = replaced_activations(model)
    assert {p for p in places if p.endswith("output")} == {
        "relu:output", "block.b:output", "block:output",
    }  # fmt: skip
    behind, before = quantizer_at(model, "relu:output"), quantizer_at(model, "block.a:input")
    assert behind is not None
    assert before is not None
    assert (before.step, before.zero) == (behind.step, behind.zero)


def test_a_layer_behind_a_rectifier_counts_as_the_place_before_it() -> None:
    """What is read with its negative values elsewhere has the wider range, for the layer too."""
    net = Function(
        lambda n, x: (lambda y: n.b(y.relu()).mean() + y.sigmoid().mean())(n.a(x))[None, None],
        a=conv(), b=conv(4),
    ).float()  # fmt: skip
    model = quantized(net, task_of(drawn(64, 3, 8, 8).float()))
    behind, before = quantizer_at(model, "a:output"), quantizer_at(model, "b:input")
    assert behind is not None
    assert before is not None
    assert behind.zero > 50
    assert (before.step, before.zero) == (behind.step, behind.zero)


def test_a_layer_that_two_others_feed_keeps_the_range_of_both() -> None:
    """A head that is shared by maps of different strength."""

    def run(n: Any, x: Tensor) -> Any:
        first, second = n.relu_a(n.a(x)), n.relu_c(n.c(x))
        return n.head(first), n.head(second), first.mean() + second.mean()

    net: Any = Function(
        run, a=conv(), c=conv(), relu_a=nn.ReLU(), relu_c=nn.ReLU(), head=conv(4)
    ).float()
    nn.init.normal_(net.a.weight, std=5.0)
    nn.init.normal_(net.c.weight, std=0.05)
    x = drawn(64, 3, 8, 8).float()
    task = task_of(x)
    task.loss = lambda outputs, target: outputs[2]
    task.score = lambda outputs, target: outputs[2]
    expected = net(x)[0].detach()
    assert noise_ratio(expected, quantized(net, task)(x)[0].detach()) > 25.0


def test_what_stays_in_float_is_told(tmp_path: Path) -> None:
    model: Any = quantized(TRANSFORMER.build(), TRANSFORMER.task(), tmp_path)
    lines = {c["where"]: c for c in told(tmp_path)}
    attention = lines["encoder.self_attn.in_proj_weight"]
    assert attention["note"].startswith("left in float: no integer form of MultiheadAttention")
    assert attention["after"] == 32
    assert "bypassed" in lines["encoder.self_attn.out_proj.weight"]["note"]
    assert lines["embed.weight"]["after"] == 8
    assert lines["embed.weight"]["note"].startswith("inputs 8 bits")
    assert not lilliput.core.select.Weight(
        "", model.encoder.self_attn, "in_proj_weight"
    ).encodings()


# -- bad input ------------------------------------------------------------------------------------


def test_networks_that_cannot_become_integers() -> None:
    with pytest.raises(NothingMatched, match=r"cannot become integers: weight_hh_l0"):
        PostTraining().check(nn.LSTM(6, 4))
    with pytest.raises(NothingMatched, match="covers only layers"):
        PostTraining(layers="1").check(nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 4)))
    with pytest.raises(InputError, match=r"0\.weight is quantized already \(codebook\)"):
        coded = [Stage(methods=[Codebook(bits=2)], train=NONE)]
        lilliput.compress(
            CNN.build(), CNN.task(), [*coded, Stage(methods=[PostTraining()], train=NONE)]
        )


def test_samples_on_which_no_range_can_be_measured() -> None:
    net, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), drawn(32, 6).float()
    with pytest.raises(InputError, match="0:input is always 1 "):
        quantized(net, task_of(torch.ones(32, 6)))
    x[3, 2] = math.nan
    with pytest.raises(InputError, match="0:input hands on is not finite"):
        quantized(net, task_of(x))
    task = task_of(drawn(32, 6).float())
    task.train = []
    with pytest.raises(EmptyData, match="training batches"):
        quantized(net, task)


def test_settings() -> None:
    with pytest.raises(InputError, match="one of bits and mean_bits"):
        PostTraining(bits=4, mean_bits=5.0)
    with pytest.raises(InputError, match="choices should ascend"):
        PostTraining(mean_bits=5.0, choices=[8, 4])
    with pytest.raises(InputError, match="choices should ascend"):
        PostTraining(mean_bits=3.0, choices=[4, 8])
    with pytest.raises(InputError, match="rounding"):
        PostTraining(rounding="up")


# -- one call -------------------------------------------------------------------------------------


def test_bits_without_labels_go_where_outputs_move_most() -> None:
    """A layer whose weights few bits hold exactly gets few; which one comes first does not count."""
    torch.manual_seed(0)
    tough, easy = nn.Linear(32, 32), nn.Linear(32, 32)
    with torch.no_grad():
        easy.weight.copy_((easy.weight * 100).sign() * 0.1)  # integers of any bits hold it
    for net in (nn.Sequential(tough, easy), nn.Sequential(easy, tough)):
        found = lilliput.quantize(net, [torch.randn(64, 32)], mean_bits=6.0)
        bits = {c.where: c.after for c in found.changes}
        hard = "0" if net[0] is tough else "1"
        assert bits == {f"{hard}.weight": 8, f"{1 - int(hard)}.weight": 4}


def test_other_layers_keep_their_integers() -> None:
    net, x = CNN.build(), next(iter(CNN.task().train)).inputs
    first = lilliput.quantize(net, [x], layers=["0", "3"]).model
    both = lilliput.quantize(first, [x], layers="9").model
    assert {"0:input", "3:input", "9:input"} <= set(replaced_activations(both))
    for place in ("0:input", "3:input"):
        before, now = quantizer_at(first, place), quantizer_at(both, place)
        assert before is not None and now is not None
        assert torch.equal(before.step, now.step)


def test_a_layer_that_also_reads_something_else_has_a_range_of_its_own() -> None:
    """It reads the network's input, far wider than what a layer of the list hands it in its second call."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            with torch.no_grad():
                self.conv.weight.mul_(0.1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.conv(y.relu()) + y

    net, x = Twice().eval(), 3 * torch.randn(64, 2, 4, 4)
    found = lilliput.quantize(net, [x]).model
    with torch.no_grad():
        assert noise_ratio(net(x), found(x)) > 25.0


@pytest.mark.parametrize("ranking", [Taylor, Apoz, Thinet], ids=lambda kind: kind.method_name())
@pytest.mark.parametrize("network", NETWORKS[:2], ids=lambda network: network.name)
def test_channels_of_integers_are_ranked_by_their_activations(ranking: Any, network: Any) -> None:
    """A quantizer stands beside its layer, whose inputs can be watched as before."""
    pruning = ranking.example()
    stages = [Stage(methods=[PostTraining(samples=32)], train=NONE)]
    stages += [Stage(methods=[pruning], train=Train(epochs=1))]
    model = lilliput.compress(network.build(), network.task(), stages).model
    assert size(model).parameters < size(network.build()).parameters
    assert replaced_activations(model)
