"""Luo and others 2016: distilling knowledge from selected neurons."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train, artifact, compress
from lilliput.core.run import Run
from lilliput.core.types import Batch
from lilliput.errors import InputError, LilliputError, ModelMismatch
from lilliput.methods import FilterL1, NeuronSelection
from lilliput.methods.distill.neuron_selection import (
    decided,
    discriminativeness,
    mean_field,
    regression_loss,
    select_neurons,
    squared_correlations,
)
from lilliput.testing import NETWORKS

MLP = NETWORKS[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(seed: int, neurons: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Phi and lambda * Psi of a random selection."""
    generator = np.random.default_rng(seed)
    unary = generator.uniform(-0.8, 0.4, neurons)
    pairwise = generator.uniform(0, 0.6, (neurons, neurons)) ** 3
    return unary, np.triu(pairwise, 1) + np.triu(pairwise, 1).T


def energy(y: Any, unary: np.ndarray, pairwise: np.ndarray) -> float:
    """E with two loops."""
    total = sum(float(u) for u, chosen in zip(unary, y, strict=True) if chosen)
    for i, j in itertools.combinations(range(len(unary)), 2):
        total += float(pairwise[i, j]) * y[i] * y[j]
    return total


def free_energy(q: np.ndarray, unary: np.ndarray, pairwise: np.ndarray, t: float) -> float:
    """The expected energy of independent neurons minus T times their entropy."""
    inside = q[(q > 0) & (q < 1)]
    entropy = -float((inside * np.log(inside) + (1 - inside) * np.log(1 - inside)).sum())
    return float(unary @ q + 0.5 * q @ pairwise @ q) - t * entropy


class TestDiscriminativeness:
    def test_is_the_share_of_variance_between_the_classes(self) -> None:
        neurons, labels = random(60, 4), torch.arange(60) % 3
        neurons[:, 1] += labels
        found = discriminativeness(neurons, labels)
        for i in range(4):
            column = neurons[:, i].numpy()
            whole = ((column - column.mean()) ** 2).sum()
            parts = [column[labels.numpy() == c] for c in range(3)]
            between = sum(len(p) * (p.mean() - column.mean()) ** 2 for p in parts)
            assert float(found[i]) == pytest.approx(between / whole)
        assert found.argmax() == 1

    def test_of_attributes_the_best_counts(self) -> None:
        neurons, attributes = random(50, 3), (random(50, 4, seed=1) > 0).double()
        neurons[:, 2] += 3 * attributes[:, 3]
        table = np.corrcoef(attributes.numpy().T, neurons.numpy().T)[:4, 4:]
        found = discriminativeness(neurons, attributes)
        np.testing.assert_allclose(found.numpy(), (table**2).max(0))
        assert found[2] > 0.5

    def test_a_constant_neuron_says_nothing(self) -> None:
        neurons = random(40, 3)
        neurons[:, 1] = 0.1  # whose variance is not exactly 0 in floating point
        for labels in (torch.arange(40) % 2, (torch.arange(40)[:, None] % 2).double()):
            assert float(discriminativeness(neurons, labels)[1]) == 0.0
        assert float(squared_correlations(neurons)[1].abs().sum()) == 0.0

    def test_classes_without_samples_do_not_matter(self) -> None:
        neurons = random(40, 3)
        few = discriminativeness(neurons, torch.arange(40) % 2)
        torch.testing.assert_close(discriminativeness(neurons, 7 * (torch.arange(40) % 2)), few)

    def test_redundancy_is_the_squared_correlation(self) -> None:
        neurons = random(50, 5)
        neurons[:, 4] = 2 - 3 * neurons[:, 0]
        expected = np.corrcoef(neurons.numpy().T) ** 2
        np.fill_diagonal(expected, 0)
        np.testing.assert_allclose(squared_correlations(neurons).numpy(), expected, atol=1e-12)
        assert float(squared_correlations(neurons)[0, 4]) == pytest.approx(1.0)


class TestMeanField:
    @pytest.mark.parametrize("seed", range(5))
    def test_each_neuron_solves_its_equation(self, seed: int) -> None:
        unary, pairwise = problem(seed)
        q = mean_field(unary, pairwise, 0.2)
        field = unary + pairwise @ q
        np.testing.assert_allclose(q, 1 / (1 + np.exp(field / 0.2)), atol=1e-7)

    @pytest.mark.parametrize("seed", range(5))
    def test_no_sweep_raises_the_free_energy(self, seed: int) -> None:
        unary, pairwise = problem(seed)
        pairwise = 4 * pairwise  # strong enough to go to and fro, if all moved at once
        course = [
            free_energy(mean_field(unary, pairwise, 0.1, sweeps), unary, pairwise, 0.1)
            for sweeps in range(1, 12)
        ]
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(course))

    def test_without_pairs_the_probabilities_are_exact(self) -> None:
        unary, _ = problem(0)
        q = mean_field(unary, np.zeros((9, 9)), 0.3)
        np.testing.assert_allclose(q, np.exp(-unary / 0.3) / (1 + np.exp(-unary / 0.3)))

    def test_the_selection_has_the_lowest_energy(self) -> None:
        """Against all 512 selections; mean field may end beside the best one, and then near it."""
        exact = 0
        for seed in range(20):
            unary, pairwise = problem(seed)
            chosen = select_neurons(unary, pairwise, 0.02)
            found = energy([i in chosen for i in range(9)], unary, pairwise)
            best = min(energy(y, unary, pairwise) for y in itertools.product((0, 1), repeat=9))
            assert found <= 0.97 * best < 0
            exact += found == pytest.approx(best)
        assert exact >= 16

    def test_of_neurons_that_all_say_the_same_a_few_are_selected(self) -> None:
        """At one temperature each would be selected a little, and none for good."""
        unary = np.linspace(-0.6, -0.59, 300)
        pairwise = 0.07 * (np.ones((300, 300)) - np.eye(300))
        assert mean_field(unary, pairwise, 0.05).max() < 0.5
        chosen = select_neurons(unary, pairwise, 0.05)
        # One more is worth it while 0.6 > 0.07 * (those that are in).
        assert len(chosen) == 9
        best = energy(np.arange(300) < 9, unary, pairwise)
        assert energy([i in chosen for i in range(300)], unary, pairwise) <= 0.98 * best

    def test_a_number_of_neurons(self) -> None:
        unary, pairwise = problem(3)
        fields = unary + pairwise @ decided(unary, pairwise, 0.05)
        for count in (1, 4, 9):
            chosen = select_neurons(unary, pairwise, 0.05, count)
            assert chosen == sorted(np.argsort(fields)[:count].tolist())


def planted(seed: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """Neurons of known use: four informative ones, worse copies of two, noise, and one that is dead."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(16, (400,), generator=generator)
    noise = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    bits = torch.stack([(labels >> b) % 2 for b in range(4)], 1).double()
    neurons = noise.clone()
    neurons[:, [2, 5, 7, 10]] = bits + 0.3 * noise[:, :4]
    neurons[:, [0, 6]] = neurons[:, [5, 10]] + 0.1 * noise[:, 4:6]
    neurons[:, 11] = 0.0
    return neurons, labels, [2, 5, 7, 10]


def test_informative_neurons_are_selected_and_their_copies_are_not() -> None:
    neurons, labels, useful = planted()
    unary = 0.1 - discriminativeness(neurons, labels).numpy()
    pairwise = squared_correlations(neurons).numpy()
    assert select_neurons(unary, 1.0 * pairwise, 0.05) == useful
    # Without the pairs' part the copies come too; noise never does.
    assert select_neurons(unary, 0.0 * pairwise, 0.05) == sorted([*useful, 0, 6])


def test_the_regression_by_hand() -> None:
    own, selected = random(5, 3), random(5, 3, seed=1)
    expected = sum(float(((selected[n] - own[n]) ** 2).sum()) for n in range(5)) / (2 * 5)
    assert float(regression_loss(own, selected)) == pytest.approx(expected)


def network(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3))


def prepared(method: NeuronSelection, student: nn.Module, *teachers: nn.Module) -> Run:
    run = Run(
        student,
        MLP.task(),
        earlier=dict(zip("ab", [lambda n=n: n for n in teachers], strict=False)),
        methods=[method],
    )  # type: ignore[misc]
    torch.manual_seed(0)
    method.attach(run)
    return run


def term_of(method: NeuronSelection, run: Run, batch: Batch) -> Tensor:
    run.batch = batch
    method.before_step(run)
    run.output = run.model(batch.inputs)
    return method.loss(run)["neuron_selection"].value


class TestMethod:
    def test_neurons_of_an_ensemble_stand_side_by_side(self) -> None:
        student, first, second = network(6), network(9, seed=1), network(7, seed=2)
        method = NeuronSelection(pairs={"1": "1"}, teacher=["a", "b"], count=6)
        run = prepared(method, student, first, second)
        chosen = run.memories["0.neuron_selection"]["selected"]
        assert len(chosen) == 6 and max(chosen) >= 9 > min(chosen), "of both members"
        batch = next(iter(run.task.train))
        neurons = torch.cat([net[:2](batch.inputs) for net in (first, second)], 1)
        expected = regression_loss(student[:2](batch.inputs), neurons[:, chosen])
        assert term_of(method, run, batch).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_the_selection_is_that_of_the_functions(self) -> None:
        teacher = network(9, seed=1)
        method = NeuronSelection(pairs={"1": "1"}, teacher="a", threshold=0.05)
        run = prepared(method, network(6), teacher)
        x, y = run.task.train.inputs, run.task.train.target  # type: ignore[attr-defined]
        neurons = teacher[:2](x).double().detach()
        unary = 0.05 - discriminativeness(neurons, y).numpy()
        pairwise = 0.1 * squared_correlations(neurons).numpy()
        expected = select_neurons(unary, pairwise, 0.05)
        assert 0 < len(expected) < 9
        assert run.memories["0.neuron_selection"]["selected"] == expected

    @pytest.mark.parametrize(("count", "weights"), [(6, 0), (4, 6 * 4 + 4)])
    def test_an_adapter_only_where_widths_differ(self, count: int, weights: int) -> None:
        method = NeuronSelection(pairs={"1": "1"}, teacher="a", count=count)
        run = prepared(method, network(6), network(9, seed=1))
        [adapter] = run.extras.values()
        assert sum(p.numel() for p in adapter.parameters()) == weights

    def test_maps_are_neurons_at_each_position(self) -> None:
        cnn = NETWORKS[1]
        method = NeuronSelection(pairs={"7": "5"}, count=10)
        stage = Stage(methods=[method], train=Train(epochs=1))
        result = compress(cnn.build(), cnn.task(), [stage])
        [change] = json.loads((result.directory / "changes.json").read_text())[0]
        assert (change["before"], change["after"]) == (8 * 3 * 3, 10)

    def test_two_stages(self, tmp_path: Path) -> None:
        """First the neurons, without the head; then the task. Nothing of the adapter is in the file."""
        student = network(6, seed=3)
        method = NeuronSelection(pairs={"1": "1"}, count=8)
        stages = [
            Stage(name="teacher", train=Train(epochs=15, lr=0.01)),
            Stage(name="neurons", model=student, methods=[method], train=Train(epochs=15, lr=0.01)),
        ]
        result = compress(network(16), MLP.task(), stages, directory=tmp_path)
        assert torch.equal(result.model[2].weight, student[2].weight)  # type: ignore[index]
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["loss"] < 0.6 * lines[15]["loss"]
        assert set(artifact.read(result.artifact)) == set(student.state_dict())
        [change] = json.loads((tmp_path / "changes.json").read_text())[1]
        assert (change["where"], change["before"], change["after"]) == ("1", 16, 8)
        both = compress(network(16), MLP.task(), [*stages, Stage(train=Train(epochs=15, lr=0.01))])
        assert both.figures["score"] > result.figures["score"]

    def test_attributes_judge_as_well(self) -> None:
        """Several labels a sample, as the attributes of a face."""
        x, bits = torch.randn(64, 12), (torch.randn(64, 5) > 0).float()
        batches = [(x, bits)]
        score = lambda output, target: -F.binary_cross_entropy_with_logits(output, target)  # noqa: E731
        task = Task(batches, batches, None, F.binary_cross_entropy_with_logits, score)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
        stage = Stage(methods=[NeuronSelection(pairs=["1"], count=3)], train=Train(epochs=1))
        compress(net, task, [stage])


class TestBadInput:
    def refusal(
        self, method: NeuronSelection, *more: Any, task: Task | None = None
    ) -> LilliputError:
        stage = Stage(model=network(6), methods=[method, *more], train=Train(epochs=1))
        with pytest.raises(LilliputError) as caught:
            compress(network(9, seed=1), task or MLP.task(), [stage])
        return caught.value

    def test_more_neurons_than_there_are(self) -> None:
        error = self.refusal(NeuronSelection(pairs=["1"], count=10))
        assert isinstance(error, InputError) and "count=10, and the teacher's layer has 9" in str(
            error
        )

    def test_no_neuron_is_worth_it(self) -> None:
        error = self.refusal(NeuronSelection(pairs=["1"], threshold=0.9))
        assert "no neuron is worth its energy: the labels explain at most 0." in str(error)

    def test_two_layers(self) -> None:
        with pytest.raises(InputError, match="one layer learns from one layer"):
            NeuronSelection(pairs=["1", "2"])

    @pytest.mark.parametrize("target", [torch.zeros(8, 2, 2), torch.full((8,), -1)])
    def test_targets_that_are_no_labels(self, target: Tensor) -> None:
        batches = [(torch.randn(8, 12), target)]
        task = Task(batches, batches, None, lambda o, t: o.sum(), lambda o, t: o.mean())
        error = self.refusal(NeuronSelection(pairs=["1"]), task=task)
        assert isinstance(error, ModelMismatch) and "judges neurons by labels" in str(error)

    def test_a_loop_of_ones_own_needs_a_task(self) -> None:
        method = NeuronSelection(pairs=["1"], count=4)
        with pytest.raises(ModelMismatch, match=r"give attach\(\.\.\., task=\.\.\.\)"):
            lilliput.attach(network(6), method, example_inputs=torch.randn(8, 12))

    def test_channels_that_are_cut_meanwhile(self) -> None:
        cutting = FilterL1(keep=0.5, round_to=1)
        error = self.refusal(NeuronSelection(pairs=["1"], count=4), cutting)
        assert "List neuron_selection behind the method that cuts them" in str(error)
