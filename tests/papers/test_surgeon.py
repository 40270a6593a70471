"""LeCun et al. 1989, Hassibi & Stork 1993: Optimal Brain Damage and Surgeon, and their layer-wise heirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.core.types import Batch
from lilliput.errors import InputError
from lilliput.mechanisms.curvature import (
    as_rows,
    extended,
    from_rows,
    input_hessians,
    inverse_by_recursion,
    loss_vectors,
    one_by_one,
    output_vectors,
)
from lilliput.methods import Surgeon
from lilliput.methods.prune import surgeon
from lilliput.methods.prune._removals import greedy, prices, removals, remove, sweep

G = torch.Generator()
HALF = lambda output, target: 0.5 * (output - target).square().sum(-1).mean()  # noqa: E731


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=G.manual_seed(seed), dtype=torch.float64)


def spd(size: int, seed: int = 0) -> Tensor:
    x = drawn(3 * size, size, seed=seed) @ drawn(size, size, seed=seed + 1)
    return x.T @ x / (3 * size)


def constrained(w: Tensor, hessian: Tensor, gone: Tensor) -> Tensor:
    """The minimum of (v - w)^T H (v - w) / 2 with v zero where ``gone``: the free part of H is solved."""
    free = ~gone
    v = torch.zeros_like(w)
    right = (hessian @ w)[free]
    v[free] = torch.linalg.solve(hessian[free][:, free], right)
    return v


def cost(v: Tensor, w: Tensor, hessian: Tensor) -> float:
    return float((v - w) @ hessian @ (v - w) / 2)


def test_one_removal_on_a_quadratic() -> None:
    """Equation 5: the price is the true increase; leaving the others where they are costs more."""
    hessian, w = spd(8), drawn(8, seed=5)
    inverse = torch.linalg.inv(hessian)
    price = prices(w, inverse)
    q = int(price.argmin())
    weights, working = w[None].clone(), inverse[None].clone()
    remove(weights, working, torch.tensor([q]))
    assert weights[0, q] == 0.0
    assert cost(weights[0], w, hessian) == pytest.approx(float(price[q]), rel=1e-6)
    torch.testing.assert_close(weights[0], constrained(w, hessian, torch.arange(8) == q))
    alone = w.clone()
    alone[q] = 0.0
    assert cost(alone, w, hessian) == pytest.approx(float(hessian[q, q] * w[q] ** 2 / 2))
    assert cost(alone, w, hessian) > 1.2 * float(price[q])


def test_many_removals_are_constrained_least_squares() -> None:
    hessian, w = spd(10, seed=3), drawn(10, seed=4)
    weights, inverse = w[None].clone(), torch.linalg.inv(hessian)[None]
    alive = torch.ones(1, 10, dtype=torch.bool)
    total = sum(float(p) for _, p in removals(weights, inverse, alive, torch.tensor([6])))
    assert int((weights == 0).sum()) == 6
    torch.testing.assert_close(weights[0], constrained(w, hessian, weights[0] == 0))
    assert total == pytest.approx(cost(weights[0], w, hessian), rel=1e-9)


def test_several_problems_at_once_are_each_alone() -> None:
    ws, hessians = drawn(3, 6, seed=7), torch.stack([spd(6, seed=s) for s in (11, 12, 13)])
    together, inverse = ws.clone(), torch.linalg.inv(hessians)
    alive = torch.ones_like(ws, dtype=torch.bool)
    list(removals(together, inverse, alive, torch.tensor([3, 0, 5])))
    assert (together == 0).sum(1).tolist() == [3, 0, 5]
    for mine, w, hessian in zip(together, ws, hessians, strict=True):
        torch.testing.assert_close(mine, constrained(w, hessian, mine == 0))


@pytest.mark.parametrize("at_once", [1, 3, 40])
def test_recursion_is_the_inverse(at_once: int) -> None:
    """Equation 8, one vector after the other or several together."""
    x = drawn(40, 7)
    found = inverse_by_recursion(x.split(at_once), 40, damping=1e-3)
    expected = torch.linalg.inv(x.T @ x / 40 + 1e-3 * torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    one = extended(torch.eye(7, dtype=torch.float64), x[:1], 1)
    moved = x[0] / (1 + x[0] @ x[0])
    torch.testing.assert_close(one, torch.eye(7, dtype=torch.float64) - torch.outer(x[0], moved))


def test_vectors_make_the_hessian_of_a_linear_network() -> None:
    """Where outputs are linear in the weights, Gauss-Newton is the Hessian: cross-entropy, by autograd."""
    x, y = drawn(9, 4), torch.arange(9) % 3
    model = nn.Linear(4, 3).double()
    samples = one_by_one([Batch(x, y)], 9)
    vectors = list(
        output_vectors(model, select(model), [model.bias], samples, nn.functional.cross_entropy)
    )
    found = sum(v.T @ v for v in vectors) / 9

    def loss(flat: Tensor) -> Tensor:
        logits = x @ flat[:12].view(3, 4).T + flat[12:]
        return nn.functional.cross_entropy(logits, y)

    at = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    expected = torch.autograd.functional.hessian(loss, at)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def regression(columns: int = 6, outputs: int = 2) -> tuple[nn.Module, Task]:
    """A linear network at the minimum of its squared error."""
    x, model = drawn(60, columns, seed=1).float(), nn.Linear(columns, outputs)
    y = x @ drawn(columns, outputs, seed=2).float() + 0.1 * drawn(60, outputs, seed=3).float()
    ones = torch.cat([x, torch.ones(60, 1)], dim=1)
    best = torch.linalg.lstsq(ones, y).solution
    with torch.no_grad():
        model.weight.copy_(best[:-1].T)
        model.bias.copy_(best[-1])
    batches = [(x[:32], y[:32]), (x[32:], y[32:])]
    return model, Task(batches, batches, batches, HALF, lambda o, t: -(o - t).square().mean())


def loss_of(model: nn.Module, task: Task) -> float:
    x, y = (torch.cat([b[i] for b in task.train]) for i in (0, 1))
    return float(HALF(model(x).detach(), y))


def operated(model: nn.Module, task: Task, **settings: Any) -> Any:
    method = Surgeon(**{"samples": 60, "remove_dead": False, **settings})
    return lilliput.compress(model, task, [Stage(methods=[method], train=Train(epochs=0))])


def test_the_summed_price_is_the_increase_of_the_loss(tmp_path: Path) -> None:
    """All weights and the bias move; what the method says it costs is what it costs."""
    model, task = regression()
    method = Surgeon(sparsity=0.5, curvature="network", damping=1e-9, samples=60)
    stage = Stage(methods=[method], train=Train(epochs=0))
    result = lilliput.compress(model, task, [stage], directory=tmp_path)
    increase = loss_of(result.model, task) - loss_of(model, task)
    (changes,) = json.loads((tmp_path / "changes.json").read_text())
    told = float(changes[0]["note"].removeprefix("summed price "))
    assert told == pytest.approx(increase, rel=0.01)
    assert int((result.model.weight == 0).sum()) == 6
    assert not torch.equal(result.model.bias, model.bias)


def test_surgery_costs_less_than_damage_and_magnitude() -> None:
    model, task = regression(12)
    increase = {
        curvature: loss_of(operated(model, task, sparsity=0.5, curvature=curvature).model, task)
        for curvature in ("network", "diagonal")
    }
    stage = Stage(methods=[lilliput.methods.Magnitude(sparsity=0.5)], train=Train(epochs=0))
    magnitude = loss_of(lilliput.compress(model, task, [stage]).model, task)
    assert increase["network"] < increase["diagonal"] <= magnitude


def test_damage_by_hand() -> None:
    """The price is half of h w^2 with h the mean of x^2, and what stays is untouched."""
    model, task = regression()
    result = operated(model, task, sparsity=0.5, curvature="diagonal")
    x = torch.cat([b[0] for b in task.train])
    price = x.square().mean(0) * model.weight.detach().square() / 2
    kept = result.model.weight != 0
    assert price[kept].min() > price[~kept].max()
    assert torch.equal(result.model.weight[kept], model.weight[kept])
    assert torch.equal(result.model.bias, model.bias)


@pytest.mark.parametrize("curvature", ["network", "diagonal"])
def test_stops_at_the_allowed_increase(curvature: str) -> None:
    model, task = regression(12)
    counts = []
    for allowed in (0.05, 0.2, 1.0):
        result = operated(model, task, allowed=allowed, curvature=curvature, damping=1e-9)
        assert loss_of(result.model, task) - loss_of(model, task) <= allowed * 1.5 + 1e-6
        counts.append(int((result.model.weight == 0).sum()))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_rounds_measure_again() -> None:
    """On a quadratic a second look at the same Hessian changes nothing that matters."""
    model, task = regression(12)
    once = operated(model, task, sparsity=0.5, curvature="network", damping=1e-9).model
    thrice = operated(model, task, sparsity=0.5, curvature="network", damping=1e-9, rounds=3).model
    assert int((thrice.weight == 0).sum()) == int((once.weight == 0).sum()) == 12
    assert loss_of(thrice, task) == pytest.approx(loss_of(once, task), rel=0.05)


# -- layer by layer -------------------------------------------------------------------------------

LAYERS = [
    (nn.Linear(5, 4), (8, 5)),
    (nn.Linear(5, 4), (8, 3, 5)),
    (nn.Conv2d(4, 6, 3, padding=1), (8, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3, groups=2, stride=2), (8, 4, 7, 7)),
    (nn.Conv1d(3, 4, 2), (8, 3, 6)),
    (nn.ConvTranspose2d(3, 4, 3, stride=2), (8, 3, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: type(x).__name__)
def test_rows_and_their_hessian(layer: Any, shape: tuple[int, ...]) -> None:
    """Over all positions the mean squared change of the outputs is d^T H d; and rows go back."""
    layer = layer.double()
    assert torch.equal(from_rows(layer, as_rows(layer)), layer.weight)
    x = drawn(*shape)
    model = nn.Sequential(layer)
    hessians, seen = input_hessians(model, ["0"], [Batch(x, None)], 4000, G.manual_seed(0))
    other = drawn(*layer.weight.shape, seed=9)
    with torch.no_grad():
        before = layer(x)
        step = other - layer.weight
        layer.weight.copy_(other)
        change = layer(x) - before
        layer.weight.copy_(step)
        rows = as_rows(layer)
    found = torch.einsum("gfa,gab,gfb->", rows, hessians["0"], rows)
    positions = change.numel() // rows.shape[0] // rows.shape[1]
    assert seen["0"] == positions
    assert float(found) == pytest.approx(float(change.square().sum()) / positions)


def test_greedy_is_exact_on_its_support_and_finds_the_cheapest() -> None:
    rows, hessian = drawn(4, 8, seed=1), spd(8, seed=2)
    inverse = torch.linalg.inv(hessian).expand(4, -1, -1)
    moved = greedy(rows, inverse, 16)
    assert int((moved == 0).sum()) == 16
    total = 0.0
    for mine, w in zip(moved, rows, strict=True):
        torch.testing.assert_close(mine, constrained(w, hessian, mine == 0))
        total += cost(mine, w, hessian)
    even = 0.0  # four from each filter, each filter by itself
    for w in rows:
        alone = greedy(w[None], inverse[:1], 4)[0]
        even += cost(alone, w, hessian)
    assert total <= even


def test_sweep_is_exact_where_the_first_columns_go() -> None:
    """Nothing to the left of a removed weight stays, so that moving what lies right is all there is."""
    rows, hessian = drawn(3, 10, seed=3), spd(10, seed=4)
    rows[:, :4] *= 1e-4
    moved = sweep(rows, hessian, 0.4, block=10, pattern=None)
    gone = torch.arange(10) < 4
    for mine, w in zip(moved, rows, strict=True):
        assert torch.equal(mine == 0, gone)
        torch.testing.assert_close(mine, constrained(w, hessian, gone))


@pytest.mark.parametrize("block", [3, 8, 64])
def test_sweep_counts_exactly_and_beats_magnitude(block: int) -> None:
    x = drawn(200, 33, seed=6) * drawn(33, seed=7).exp()  # inputs of different strength, alike
    rows, hessian = drawn(20, 33, seed=5), (x + x.roll(1, 1)).T @ (x + x.roll(1, 1)) / 200
    rows[:, 7] = 0.0
    moved = sweep(rows, hessian, 0.6, block, None)
    assert int((moved == 0).sum()) == round(0.6 * rows.numel())
    assert (moved[:, 7] == 0).all()
    plain = rows * lilliput.mechanisms.ranking.keep_largest(rows.abs(), 0.6)

    def error(v: Tensor) -> float:
        return float(torch.einsum("fa,ab,fb->", v - rows, hessian, v - rows))

    assert error(moved) < 0.7 * error(plain)


def test_pattern_of_two_in_four() -> None:
    moved = sweep(drawn(6, 16), spd(16), 0.0, 64, (2, 4))
    assert ((moved.unflatten(1, (4, 4)) == 0).sum(2) == 2).all()


def test_pattern_lies_along_the_channels_of_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5, 2))
    x, y = drawn(64, 4, 3, 3).float(), torch.arange(64) % 2
    batches = [(x, y)]
    task = Task(batches, batches, batches, nn.functional.cross_entropy, lilliput.accuracy)
    result = operated(model, task, pattern="2:4", layers="0", samples=64)
    assert ((result.model[0].weight == 0).sum(1) == 2).all()


@pytest.mark.parametrize("solver", ["sweep", "greedy"])
@pytest.mark.parametrize("kind", ["grouped", "transposed"])
def test_layers_of_every_kind(solver: str, kind: str) -> None:
    layer = nn.Conv2d(4, 4, 3, groups=2) if kind == "grouped" else nn.ConvTranspose2d(4, 4, 2)
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = drawn(64, 4, 6, 6).float().cumsum(1).cumsum(2)  # neighbors are alike
    batches = [(x, torch.arange(64) % 2)]
    task = Task(batches, batches, batches, nn.functional.cross_entropy, lilliput.accuracy)
    result = operated(model, task, sparsity=0.5, layers="0", solver=solver, samples=64)
    assert int((result.model[0].weight == 0).sum()) == layer.weight.numel() // 2
    plain = layer.weight * lilliput.mechanisms.ranking.keep_largest(layer.weight.abs(), 0.5)
    with torch.no_grad():
        target, ours = layer(x), result.model[0](x)
        layer.weight.copy_(plain)
        assert (ours - target).square().mean() < (layer(x) - target).square().mean()


def test_what_was_zero_before_stays_zero() -> None:
    model, task = regression(12)
    stages = [
        Stage(methods=[lilliput.methods.Magnitude(sparsity=0.25)], train=Train(epochs=0)),
        Stage(methods=[Surgeon(sparsity=0.5, samples=60)], train=Train(epochs=0)),
    ]
    for curvature in ("layer", "network", "blocks", "diagonal"):
        stages[1].methods = [Surgeon(sparsity=0.5, samples=60, curvature=curvature, block=8)]
        first = lilliput.compress(model, task, stages[:1]).model.weight == 0
        both = lilliput.compress(model, task, stages).model.weight == 0
        assert int(both.sum()) == 12
        assert (both | ~first).all()


def test_damping_of_blocks_is_a_part_of_the_mean_curvature(monkeypatch: Any) -> None:
    """Whatever the number of samples: of the mean over them, not of their sum."""
    model, task = regression()
    alphas: list[float] = []

    def noted(vectors: Any, total: int, damping: float) -> Tensor:
        alphas.append(damping)
        return inverse_by_recursion(vectors, total, damping)

    monkeypatch.setattr(surgeon, "inverse_by_recursion", noted)
    operated(model, task, sparsity=0.5, curvature="blocks", damping=0.5)
    samples = one_by_one([Batch(*b) for b in task.train], 60)
    slopes = torch.cat(list(loss_vectors(model, select(model), [], samples, HALF)))
    assert alphas == [pytest.approx(0.5 * float(slopes.square().mean()), rel=1e-5)]


def test_more_zeros_than_are_due_stay_zeros() -> None:
    """The first block has lost all of its weights already, the second none."""
    rows, hessian = drawn(4, 16, seed=1), spd(16, seed=2)
    rows[:, :8] = 0.0
    for sparsity, zeros in ((0.5, 32), (0.75, 48), (0.25, 32)):
        moved = sweep(rows, hessian, sparsity, 8, None)
        assert not moved[:, :8].any()
        assert int((moved == 0).sum()) == zeros
    rows[:, 9:12] = 0.0
    moved = sweep(rows, hessian, 0.0, 8, (2, 4))
    assert not moved[:, :8].any()
    assert not moved[:, 9:12].any()


def test_magnitude_before_a_sweep_in_blocks() -> None:
    model, task = regression(16)
    with torch.no_grad():
        model.weight[:, :8] *= 1e-3
    stages = [
        Stage(methods=[lilliput.methods.Magnitude(sparsity=0.5)], train=Train(epochs=0)),
        Stage(methods=[Surgeon(sparsity=0.75, samples=60, block=8)], train=Train(epochs=0)),
    ]
    first = lilliput.compress(model, task, stages[:1]).model.weight == 0
    both = lilliput.compress(model, task, stages).model.weight == 0
    assert first[:, :8].all()  # twelve are due there, and sixteen are gone
    assert both[:, :8].all()
    assert int(both.sum()) == 24


class Elsewhere(TorchFunctionMode):
    """A tensor that is made without a device lies where the network does not."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.tensor:
            kwargs = {"device": "meta", **(kwargs or {})}
        return func(*args, **(kwargs or {}))


def test_surgery_stays_on_the_networks_device() -> None:
    model, task = regression()
    method = Surgeon(sparsity=0.5, curvature="network")
    run = Run(model, task, methods=[method])
    with Elsewhere():
        moved, _ = method._surgery(
            run, drawn(8), list(drawn(20, 1, 8, seed=1)), torch.ones(8, dtype=torch.bool), 1.0
        )
    assert int((moved == 0).sum()) == 4


# -- bad input ------------------------------------------------------------------------------------


def test_bad_settings_and_networks() -> None:
    with pytest.raises(InputError, match="one of sparsity, allowed and pattern"):
        Surgeon()
    with pytest.raises(InputError, match="units of the loss"):
        Surgeon(allowed=0.1)
    with pytest.raises(InputError, match="of the form '2:4'"):
        Surgeon(pattern="4:2")
    model, task = regression()
    with pytest.raises(InputError, match="does not divide"):
        operated(model, task, pattern="2:4")
    with pytest.raises(InputError, match="too few"):
        operated(*regression(40), sparsity=0.5, samples=32)
    with pytest.raises(InputError, match="one matrix"):
        operated(
            nn.Sequential(nn.Linear(6, 999), nn.Linear(999, 2)),
            task,
            sparsity=0.5,
            curvature="network",
        )
    recurrent = nn.LSTM(6, 2)
    with pytest.raises(InputError, match="curvature: blocks"):
        Surgeon(sparsity=0.5).check(recurrent)


def test_singular_hessian_is_told() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # every unit is off for every sample
    _, task = regression()
    with pytest.raises(InputError, match="singular"):
        operated(model, task, sparsity=0.5, layers="2")
