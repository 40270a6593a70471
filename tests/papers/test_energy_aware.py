"""Yang et al. 2017: energy-aware pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.errors import InputError
from lilliput.measure import AccessTable, layer_energies, macs
from lilliput.methods import EnergyAware
from lilliput.methods.prune.energy_aware import fitted, removed_and_restored
from lilliput.testing import NETWORKS

MLP, CNN, _ = NETWORKS


def problem(seed: int = 0, columns: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of different strength that are alike, weights, and the outputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns, generator=generator, dtype=torch.float64)
    x = (x + x.roll(1, 1)) * torch.rand(columns, generator=generator, dtype=torch.float64).exp()
    w = torch.randn(columns, generator=generator, dtype=torch.float64)
    return x, w, x @ w


def test_restoring_is_greedy_in_the_error_of_the_outputs() -> None:
    """By hand: of the absent weights the one whose product explains most of the l1 error comes back first."""
    x, w, y = problem()
    stays = removed_and_restored(x, w, y, kept=8, restore=0.25, steps=2)
    expected = torch.zeros(20, dtype=torch.bool)
    expected[w.abs().topk(6).indices] = True
    for _ in range(2):
        errors = []
        for j in range(20):
            tried = expected.clone()
            tried[j] = True
            errors.append(
                float((y - x[:, tried] @ w[tried]).abs().sum()) if not expected[j] else float("inf")
            )
        expected[int(torch.tensor(errors).argmin())] = True
    assert torch.equal(stays, expected)
    assert int(removed_and_restored(x, w, y, 8, 0.0, 4).sum()) == 8
    assert int(removed_and_restored(x, w, y, 8, 1.0, 3).sum()) == 8


def test_restored_weights_leave_less_error_than_magnitude_alone() -> None:
    better = 0
    for seed in range(20):
        x, w, y = problem(seed)

        def error(stays: Tensor, x: Tensor = x, w: Tensor = w, y: Tensor = y) -> float:
            return float((y - x[:, stays] @ w[stays]).abs().sum())

        plain = removed_and_restored(x, w, y, 8, 0.0, 1)
        better += error(removed_and_restored(x, w, y, 8, 0.5, 4)) <= error(plain)
    assert better >= 18


def test_the_fit_is_least_squares_and_never_worse() -> None:
    for seed in range(10):
        x, w, y = problem(seed)
        stays = removed_and_restored(x, w, y, 8, 0.25, 4)
        found = fitted(x.T @ x, x.T @ y, w, stays)
        assert not found[~stays].any()
        best = torch.linalg.lstsq(x[:, stays], y[:, None]).solution[:, 0]
        torch.testing.assert_close(found[stays], best)
        assert (y - x @ found).square().sum() <= (y - x[:, stays] @ w[stays]).square().sum()


class Crafted(nn.Module):
    """Large maps and little work first, then much work on small maps, and a linear layer with much weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 1)
        self.middle = nn.Conv2d(2, 4, 5, stride=8)
        self.last = nn.Linear(4 * 8 * 8, 40)

    def forward(self, images: Tensor) -> Tensor:
        x = self.middle(torch.relu(self.first(images)))
        return self.last(torch.relu(x).flatten(1))


def test_order_of_energy_is_not_that_of_weights_or_of_macs() -> None:
    model, x = Crafted(), torch.zeros(1, 1, 64, 64)
    energy, work = layer_energies(model, x), macs(model, x).by_module
    by_energy = sorted(energy, key=energy.__getitem__, reverse=True)
    by_weights = sorted(energy, key=lambda n: -model.get_submodule(n).weight.numel())
    by_macs = sorted(energy, key=lambda n: -work[n])
    assert by_energy == ["first", "last", "middle"]
    assert by_weights == ["last", "middle", "first"]
    assert by_macs == ["middle", "last", "first"]
    only_macs = AccessTable("nothing moves", 1.0, 0.0, 0.0, 0.0, 0.0)
    assert layer_energies(model, x, only_macs) == {n: float(work[n]) for n in energy}


def test_layers_are_pruned_in_that_order(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, order = Crafted(), []
    whole = EnergyAware._prune_layer

    def noted(self: EnergyAware, run: Any, weight: Any, *rest: Any) -> None:
        order.append(weight.layer)
        whole(self, run, weight, *rest)

    monkeypatch.setattr(EnergyAware, "_prune_layer", noted)
    x = torch.randn(8, 1, 64, 64)
    batches = [(x, torch.arange(8))]
    task = lilliput.Task(batches, batches, batches, nn.functional.cross_entropy, lilliput.accuracy)
    method = EnergyAware(sparsity=0.5, samples=8, remove_dead=False)
    lilliput.compress(model, task, [Stage(methods=[method], train=Train(epochs=0))])
    assert order == ["first", "last", "middle"]


def test_zeros_save_what_is_skipped_and_nothing_else() -> None:
    layer, x = nn.Linear(10, 10, bias=False), torch.zeros(3, 10)
    with torch.no_grad():
        layer.weight[:5] = 0.0
    whole, half = layer_energies(nn.Linear(10, 10, bias=False), x)[""], layer_energies(layer, x)[""]
    assert whole == 300 * 4 + (100 + 60) * 208
    assert half == 150 * 4 + (50 + 60) * 208


def compressed(
    network: Any, directory: Path | None = None, epochs: int = 0, **settings: Any
) -> Any:
    method = EnergyAware(**{"sparsity": 0.5, "samples": 64, "remove_dead": False, **settings})
    stage = Stage(methods=[method], train=Train(epochs=epochs, lr=1e-3))
    return lilliput.compress(network.build(), network.task(), [stage], directory=directory)


def test_every_filter_keeps_its_share() -> None:
    model = compressed(CNN, sparsity={"*": 0.5}).model
    for name, whole in (("0", 9), ("3", 54), ("9", 32)):
        weight = model.get_submodule(name).weight
        assert (weight.flatten(1).count_nonzero(1) == whole - round(whole / 2)).all()


def test_outputs_suffer_less_than_from_magnitude() -> None:
    model = MLP.build().eval()
    inputs = torch.cat([b.inputs for b in MLP.task().train])
    ours = compressed(MLP).model.eval()
    stage = Stage(methods=[lilliput.methods.Magnitude(sparsity=0.5)], train=Train(epochs=0))
    plain = lilliput.compress(MLP.build(), MLP.task(), [stage]).model.eval()
    with torch.no_grad():
        error = [float((m(inputs) - model(inputs)).square().mean()) for m in (ours, plain)]
    assert error[0] < error[1]


def test_a_bound_on_the_loss_of_accuracy(tmp_path: Path) -> None:
    """Where any loss is forbidden, less goes than where all is allowed; and nothing is lost on validation."""
    strict = compressed(MLP, tmp_path / "a", sparsity=0.9, bound=0.0).figures
    free = compressed(MLP, tmp_path / "b", sparsity=0.9).figures
    assert strict["nonzeros"] >= free["nonzeros"]
    dense = compressed(MLP, tmp_path / "c", sparsity=0.02).figures
    assert strict["validation"] >= dense["validation"] - 5.0


def test_energies_are_told(tmp_path: Path) -> None:
    compressed(MLP, tmp_path)
    (changes,) = json.loads((tmp_path / "changes.json").read_text())
    shares = [c for c in changes if c["what"] == "share of the energy"]
    assert sum(c["before"] for c in shares) == pytest.approx(1.0, abs=1e-3)
    assert all(c["after"] < c["before"] for c in shares)


def test_rounds_and_retraining() -> None:
    model = compressed(MLP, epochs=3, rounds=3).model
    for name in ("0", "3", "5"):
        weight = model.get_submodule(name).weight
        columns = weight.shape[1]
        assert (weight.count_nonzero(1) == columns - round(columns / 2)).all()


def test_layers_whose_inputs_cannot_be_seen() -> None:
    with pytest.raises(InputError, match="'!rnn'"):
        EnergyAware(sparsity=0.5).check(nn.ModuleDict({"rnn": nn.LSTM(3, 3)}))


def test_products_are_charged_once_to_the_layer_whose_weights_they_read() -> None:
    """Whatever holds several weights, and whoever calls them."""
    products = AccessTable("nothing moves", 1.0, 0.0, 0.0, 0.0, 0.0)
    lstm = nn.LSTM(3, 4, num_layers=2)
    assert layer_energies(lstm, torch.zeros(5, 2, 3), products) == {"": 10 * 16 * (3 + 4 + 4 + 4)}
    attention, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.zeros(1, 5, 4)
    assert layer_energies(attention, (x, x, x), products) == {"": 3 * 5 * 16, "out_proj": 5 * 16}
