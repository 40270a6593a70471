"""Lopes, Fenu, Starner 2017: data-free knowledge distillation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.run import Run
from lilliput.core.task import accuracy, evaluate
from lilliput.core.types import Batch
from lilliput.errors import CorruptArtifact, InputError, ModelMismatch
from lilliput.mechanisms.teacher import Live
from lilliput.methods import DataFree
from lilliput.methods.distill._generated import dropout_filters
from lilliput.methods.distill._records import Moments, Records
from lilliput.methods.distill._spectrum import (
    activation_graph,
    check_graph,
    fourier_basis,
    kept_columns,
)
from lilliput.methods.distill.data_free import (
    Sampler,
    Targets,
    cholesky,
    default_places,
    load_records,
    mixer,
    optimize_inputs,
    reconstruction_loss,
    record_activations,
    sample_activations,
)
from lilliput.testing import NETWORKS

MLP, CNN, _ = NETWORKS
PLACES = ["0", "3", "5"]


def labeled(samples: int = 90, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 12, generator=generator)
    labels = torch.arange(samples) % 3
    return [Batch(*part) for part in zip(inputs.split(32), labels.split(32), strict=True)]


def teacher() -> nn.Module:
    """One that has learned its task."""
    result = lilliput.compress(MLP.build(), MLP.task(), [Stage(train=Train(epochs=15, lr=0.01))])
    return result.model.eval().requires_grad_(False)


def records(network: nn.Module | None = None, **more: Any) -> Records:
    return record_activations(network or MLP.build(), labeled(), PLACES, **more)


class TestRecords:
    def test_are_numpys(self) -> None:
        """Of each class and layer, before the ReLU and without dropout."""
        network = MLP.build().eval()
        found = record_activations(network.train(), labeled(), PLACES)
        network.eval()
        inputs = torch.cat([b.inputs for b in labeled()])
        labels = torch.cat([b.target for b in labeled()])
        assert (found.labels, found.counts) == ([0, 1, 2], [30, 30, 30])
        for depth, place in ((1, "0"), (4, "3"), (6, "5")):
            values = network[:depth](inputs).detach().double().numpy()  # type: ignore[index]
            for label in range(3):
                own, moments = values[labels.numpy() == label], found.moments[place]
                covariance = moments.covariance
                assert covariance is not None
                np.testing.assert_allclose(moments.mean[label], own.mean(0), rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(covariance[label], np.cov(own.T), rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(
                    moments.deviation[label], own.std(0, ddof=1), rtol=1e-4, atol=1e-6
                )
        assert found.input_mean == pytest.approx(float(inputs.mean()), abs=1e-6)
        assert found.input_deviation == pytest.approx(float(inputs.std()), rel=1e-5)
        assert found.input_shape == (12,)

    def test_batches_of_any_size_give_the_same(self) -> None:
        whole = [
            Batch(
                torch.cat([b.inputs for b in labeled()]), torch.cat([b.target for b in labeled()])
            )
        ]
        one, other = records(), record_activations(MLP.build(), whole, PLACES)
        for place in PLACES:
            torch.testing.assert_close(one.moments[place].mean, other.moments[place].mean)
            torch.testing.assert_close(
                one.moments[place].covariance, other.moments[place].covariance
            )

    def test_maps_are_flattened(self) -> None:
        task = CNN.task()
        found = record_activations(CNN.build(), task.train, ["0", "3"])
        assert found.shapes == {"0": (6, 8, 8), "3": (8, 3, 3)}
        assert found.moments["3"].mean.shape == (3, 72)

    def test_large_layers_have_no_covariance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lilliput.methods.distill import _records

        full = records()
        monkeypatch.setattr(_records, "LARGEST_COVARIANCE", 20)
        found = records()
        assert found.moments["0"].covariance is None
        assert found.moments["3"].covariance is not None
        torch.testing.assert_close(found.moments["0"].deviation, full.moments["0"].deviation)
        assert mixer(found.moments["0"], 0, "cholesky").shape == (24,)

    @pytest.mark.parametrize("pairs", [False, True])
    def test_file_holds_all_of_them(self, tmp_path: Path, pairs: bool) -> None:
        file = tmp_path / "somewhere" / "records.safetensors"
        written = records(file=file, spectrum=0.5, pairs=pairs)
        read = load_records(file)
        assert (read.labels, read.counts, read.places) == ([0, 1, 2], [30, 30, 30], PLACES)
        assert (read.shapes, read.input_shape) == (written.shapes, (12,))
        assert read.input_deviation == written.input_deviation
        for place in PLACES:
            same_moments(read.moments[place], written.moments[place])
        assert [s.places for s in read.spectra] == (
            [("0", "3"), ("3", "5")] if pairs else [("0", "3", "5")]
        )
        for one, other in zip(read.spectra, written.spectra, strict=True):
            assert torch.equal(one.basis, other.basis)
            same_moments(one.moments, other.moments)

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="record_activations"):
            load_records(tmp_path / "nothing")
        (tmp_path / "garbage").write_bytes(b"garbage" * 9)
        with pytest.raises(CorruptArtifact, match="record them anew"):
            load_records(tmp_path / "garbage")
        lilliput.save(MLP.build(), tmp_path / "network")
        with pytest.raises(CorruptArtifact, match="record them anew"):
            load_records(tmp_path / "network")

    def test_the_network_stays_as_it_is(self) -> None:
        network = MLP.build().train()
        records(network)
        assert all(m.training for m in network.modules())
        assert not any(m._forward_hooks for m in network.modules())

    @pytest.mark.parametrize(
        ("batch", "told"),
        [
            (Batch(torch.zeros(4, 12), torch.zeros(4, 3)), "no class labels"),
            (Batch(torch.zeros(4, 12), torch.tensor([0, 0, 0, 1])), "single sample of class 1"),
            (Batch((torch.zeros(4, 12),), torch.zeros(4).long()), "tensor of floats, not tuple"),
        ],
    )
    def test_bad_data(self, batch: Batch, told: str) -> None:
        with pytest.raises(InputError, match=told):
            record_activations(MLP.build(), [batch], PLACES)


def same_moments(one: Moments, other: Moments) -> None:
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.deviation, other.deviation)
    assert one.covariance is not None
    assert other.covariance is not None
    assert torch.equal(one.covariance, other.covariance)


class TestSampling:
    sigma = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, -0.5], [0.0, -0.5, 0.3]])
    moments = Moments(torch.tensor([[1.0, -2.0, 3.0]]), sigma.diagonal().sqrt()[None], sigma[None])

    def drawn(self, noise: Any, count: int = 200_000) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        mix_by = mixer(self.moments, 0, noise)
        return sample_activations(self.moments.mean[0], mix_by, count, generator)

    @pytest.mark.parametrize("noise", ["cholesky", "code", "deviation"])
    def test_covariance_of_samples(self, noise: Any) -> None:
        """Sigma by the paper, Sigma squared by the code, its diagonal where neurons stay apart."""
        expected = {
            "cholesky": self.sigma,
            "code": self.sigma @ self.sigma,
            "deviation": self.sigma.diagonal().diag(),
        }[noise]
        samples = self.drawn(noise)
        torch.testing.assert_close(samples.mean(0), self.moments.mean[0], atol=0.05, rtol=0)
        torch.testing.assert_close(samples.t().cov(), expected, atol=0.15, rtol=0.02)

    def test_more_samples_come_nearer(self) -> None:
        apart = [
            float((self.drawn("cholesky", n).t().cov() - self.sigma).norm()) for n in (100, 100_000)
        ]
        assert apart[1] < apart[0] / 5

    def test_singular_covariance(self) -> None:
        """Of three samples in ten dims, and of dead neurons."""
        few = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
        few[:, 4] = 0
        sigma = few.t().cov()
        factor = cholesky(sigma)
        torch.testing.assert_close(factor @ factor.t(), sigma, atol=1e-4, rtol=1e-3)
        assert torch.equal(factor, factor.tril())
        assert cholesky(torch.zeros(3, 3)).isfinite().all()

    def test_no_covariance(self) -> None:
        with pytest.raises(InputError, match="not positive"):
            cholesky(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))
        with pytest.raises(InputError, match="not positive"):
            cholesky(torch.full((2, 2), torch.nan))

    def test_top_layer_is_the_last_place(self) -> None:
        found = records()
        draw = Sampler(found, 1, "top_layer", "cholesky").draw(7, torch.Generator().manual_seed(0))
        assert [(t.places, [v.shape for v in t.values]) for t in draw] == [
            (("5",), [torch.Size([7, 3])])
        ]
        every = Sampler(found, 1, "all_layers", "cholesky").draw(
            7, torch.Generator().manual_seed(0)
        )
        assert [t.places for t in every] == [("0",), ("3",), ("5",)]

    def test_of_the_class_that_is_asked_for(self) -> None:
        network = teacher()
        task = MLP.task()
        found = record_activations(network, task.train, PLACES)
        for label in range(3):
            sampler = Sampler(found, found.place_of(label), "top_layer", "cholesky")
            (targets,) = sampler.draw(500, torch.Generator().manual_seed(label))
            said = targets.values[0].argmax(1)
            assert float((said == label).float().mean()) > 0.7


class TestReconstruction:
    def test_is_the_sum_over_layers(self) -> None:
        """Neuron by neuron and sample by sample."""
        found = [torch.randn(5, n) for n in (4, 3)]
        wanted = [torch.randn(5, n) for n in (4, 3)]
        expected = 0.0
        for phi, a in zip(found, wanted, strict=True):
            n = phi.shape[1]
            squares = [
                (max(0.0, float(a[s, i])) - max(0.0, float(phi[s, i]))) ** 2
                for s in range(5)
                for i in range(n)
            ]
            expected += sum(squares) / (5 * n) / n
        assert float(reconstruction_loss(found, wanted, divide=True)) == pytest.approx(expected)

    def test_a_top_layer_is_not_divided(self) -> None:
        phi, a = torch.randn(5, 4), torch.randn(5, 4)
        whole = reconstruction_loss([phi], [a], divide=False)
        assert float(whole) == pytest.approx(
            4 * float(reconstruction_loss([phi], [a], divide=True))
        )

    @pytest.mark.parametrize("objective", ["top_layer", "all_layers"])
    def test_descends_to_inputs_that_move_the_teacher_alike(self, objective: Any) -> None:
        network = teacher()
        found = record_activations(network, MLP.task().train, PLACES)
        generator = torch.Generator().manual_seed(0)
        targets = Sampler(found, 2, objective, "cholesky").draw(32, generator)
        start = torch.randn(32, 12, generator=generator)
        inputs, before, after = optimize_inputs(
            network, start, targets, steps=200, lr=0.07, divide=objective != "top_layer"
        )
        assert after < before / 5
        assert float((network(inputs).argmax(1) == 2).float().mean()) > 0.8
        assert not any(m._forward_hooks for m in network.modules())
        assert all(p.grad is None for p in network.parameters())

    def test_its_own_activations_are_reached_exactly(self) -> None:
        """Targets that some inputs give have a loss of zero there."""
        network = teacher()
        inputs = torch.randn(6, 12)
        values = [network[:d](inputs).detach() for d in (1, 4, 6)]  # type: ignore[index]
        targets = [Targets((p,), [v]) for p, v in zip(PLACES, values, strict=True)]
        _, before, _ = optimize_inputs(network, inputs, targets, steps=1, lr=1e-9, divide=True)
        assert before == 0.0

    def test_records_of_another_teacher(self) -> None:
        targets = [Targets(("0",), [torch.zeros(4, 7)])]
        with pytest.raises(ModelMismatch, match=r"'0' hands over 24 numbers a sample, and.* 7"):
            optimize_inputs(teacher(), torch.zeros(4, 12), targets, steps=1, lr=0.1, divide=True)


class TestDropoutFilters:
    def test_drop_the_same_in_every_call(self) -> None:
        network = nn.Sequential(nn.Identity(), nn.Dropout(0.4), nn.Dropout2d(0.5)).eval()
        ones = torch.ones(50, 4, 3, 3)
        torch.manual_seed(0)
        with dropout_filters(network):
            first, second = network(ones), network(ones)
        assert torch.equal(first, second)
        assert torch.equal(network(ones), ones)
        assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.6 / 0.5])
        # Dropout2d drops whole maps; what it keeps, the other one has thinned out.
        maps = (first > 0).flatten(2).any(2).float().mean()
        assert float(maps) == pytest.approx(0.5, abs=0.1)

    def test_another_batch_gets_other_filters(self) -> None:
        network, ones = nn.Sequential(nn.Dropout(0.5)).eval(), torch.ones(20, 20)
        found = []
        for _ in range(2):
            with dropout_filters(network):
                found.append(network(ones))
        assert not torch.equal(*found)

    def test_a_teacher_without_dropout(self) -> None:
        stage = Stage(
            methods=[DataFree(teacher=nn.Linear(12, 3), objective="all_layers_dropout")],
            train=Train(epochs=1),
        )
        with pytest.raises(InputError, match="no dropout layer"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])


class TestSpectrum:
    means = tuple(
        torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        for n in (5, 4, 3)
    )

    def test_graph_ties_adjacent_layers(self) -> None:
        graph = activation_graph(self.means)
        layer = [0] * 5 + [1] * 4 + [2] * 3
        flat = torch.cat(self.means)
        for i in range(12):
            for j in range(12):
                near = abs(layer[i] - layer[j]) == 1
                expected = abs(float(flat[i] * flat[j])) if near else 0.0
                assert float(graph[i, j]) == pytest.approx(expected)

    def test_basis_is_orthonormal_and_ordered_by_frequency(self) -> None:
        graph = activation_graph(self.means)
        basis = fourier_basis(graph)
        identity = torch.eye(12, dtype=torch.float64)
        torch.testing.assert_close(basis.t() @ basis, identity)
        frequencies = []
        for u in basis.t():  # the sum over edges, by hand
            edges = [float(graph[i, j] * (u[i] - u[j]) ** 2) for i in range(12) for j in range(i)]
            frequencies.append(sum(edges))
        assert frequencies == sorted(frequencies)
        assert frequencies[0] == pytest.approx(0.0, abs=1e-9)
        torch.testing.assert_close(basis[:, 0].abs(), torch.full((12,), 12**-0.5).double())

    def test_full_rank_transform_is_the_identity(self) -> None:
        basis = fourier_basis(activation_graph(self.means))
        signal = torch.randn(7, 12, dtype=torch.float64)
        torch.testing.assert_close(signal @ basis @ basis.t(), signal)

    @pytest.mark.parametrize("which", ["energy", "lowest"])
    def test_more_of_the_spectrum_keeps_more(self, which: Any) -> None:
        basis = fourier_basis(activation_graph(self.means))
        signal = torch.randn(7, 12, dtype=torch.float64)
        mean, covariance = signal.mean(0), signal.t().cov()
        lost = []
        for share, count in ((0.1, 2), (0.3, 4), (0.6, 8), (1.0, 12)):
            kept = kept_columns(basis, mean, covariance, share, which)
            assert kept.shape == (12, count)
            lost.append(float((signal - signal @ kept @ kept.t()).norm()))
        assert lost == sorted(lost, reverse=True)
        assert lost[0] > 1
        assert lost[-1] < 1e-9

    def test_columns_of_most_energy_lose_least(self) -> None:
        """Against every other choice of three of the twelve; the lowest are the first three."""
        basis = fourier_basis(activation_graph(self.means))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(50, 12, generator=generator, dtype=torch.float64)
        signal = noise + torch.cat(self.means)
        mean, covariance = signal.mean(0), signal.t().cov(correction=0)

        def lost(columns: Tensor) -> float:
            return float((signal - signal @ columns @ columns.t()).square().sum())

        every = [lost(basis[:, list(c)]) for c in itertools.combinations(range(12), 3)]
        best = kept_columns(basis, mean, covariance, 0.25, "energy")
        assert lost(best) == pytest.approx(min(every))
        lowest = kept_columns(basis, mean, covariance, 0.25, "lowest")
        assert torch.equal(lowest, basis[:, :3])

    @pytest.mark.parametrize(("pairs", "objective"), [
        (False, "spectral_all_layers"), (True, "spectral_layer_pairs")])  # fmt: skip
    def test_samples_at_full_rank_are_those_of_the_joint_distribution(
        self, pairs: bool, objective: Any
    ) -> None:
        """Mean and covariance of all layers together, correlations between layers included."""
        network = MLP.build()
        found = record_activations(network, labeled(900), PLACES, spectrum=1.0, pairs=pairs)
        sampler = Sampler(found, 1, objective, "cholesky")
        drawn = sampler.draw(100_000, torch.Generator().manual_seed(0))
        network.eval()
        inputs = torch.cat([b.inputs[b.target == 1] for b in labeled(900)])
        depth = {"0": 1, "3": 4, "5": 6}
        for targets in drawn:
            real = torch.cat([network[: depth[p]](inputs) for p in targets.places], 1).detach()  # type: ignore[index]
            made = torch.cat(targets.values, 1)
            torch.testing.assert_close(made.mean(0), real.mean(0), atol=0.03, rtol=0)
            torch.testing.assert_close(made.t().cov(), real.t().cov(), atol=0.03, rtol=0.03)
        assert [t.places for t in drawn] == (
            [("0", "3"), ("3", "5")] if pairs else [("0", "3", "5")]
        )

    def test_records_without_the_spectrum(self) -> None:
        with pytest.raises(InputError, match=r"no spectrum for spectral_all_layers.*spectrum=0.1"):
            Sampler(records(spectrum=0.5, pairs=True), 0, "spectral_all_layers", "cholesky")
        with pytest.raises(InputError, match="pairs=True"):
            Sampler(records(), 0, "spectral_layer_pairs", "cholesky")
        with pytest.raises(InputError, match="at least two places"):
            record_activations(MLP.build(), labeled(), ["0"], spectrum=0.5)

    def test_graphs_that_are_too_large(self) -> None:
        with pytest.raises(InputError, match="11,520 neurons; 2,500 are the limit"):
            check_graph(11_520)


class OnceThenNever:
    """Training batches that break when they are read again."""

    def __init__(self, batches: Any, times: int) -> None:
        self.batches, self.times = batches, times

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        if self.times == 0:
            raise AssertionError("the student was about to see the training data")
        self.times -= 1
        yield from self.batches


def guarded(times: int) -> Task:
    task = MLP.task()
    return Task(OnceThenNever(task.train, times), task.validation, task.test, task.loss, task.score)


class TestMethod:
    settings: dict[str, Any] = {"batches": 2, "batch_size": 32, "steps": 60}  # noqa: RUF012

    def test_the_student_never_sees_the_training_data(self) -> None:
        """They are read once for the records, and never with a file of records."""
        stage = Stage(methods=[DataFree(**self.settings)], train=Train(epochs=2))
        lilliput.compress(MLP.build(), guarded(1), [stage])
        with pytest.raises(AssertionError, match="about to see"):
            lilliput.compress(MLP.build(), guarded(0), [stage])

    def test_a_file_of_records_needs_no_training_data(self, tmp_path: Path) -> None:
        file = tmp_path / "records.safetensors"
        network = teacher()
        record_activations(network, MLP.task().train, PLACES, file=file)
        method = DataFree(teacher=network, records=str(file), **self.settings)
        seen: list[Tensor] = []

        class Look(lilliput.engine.progress.Watcher):
            def step_done(self, run: Run) -> None:
                seen.append(run.batch.inputs)

        stage = Stage(methods=[method], train=Train(epochs=30, lr=0.01))
        result = lilliput.compress(MLP.build(5), guarded(0), [stage], watchers=[Look()])
        real = {tuple(row) for b in MLP.task().train for row in b.inputs.tolist()}
        made = {tuple(row) for batch in seen for row in batch.tolist()}
        assert len(made) == 3 * 2 * 32
        assert not made & real
        changes = json.loads((result.directory / "changes.json").read_text())[0]
        assert changes[0]["after"] == 192
        assert str(file) in changes[0]["note"]
        assert changes[1]["after"] < changes[1]["before"] / 2
        # It has learned the task without its data.
        task = MLP.task()
        untrained = evaluate(MLP.build(5), task.validation, accuracy)
        assert result.figures["score"] > max(60, untrained + 20)
        assert result.figures["score"] <= evaluate(network, task.validation, accuracy) + 5

    @pytest.mark.parametrize(
        "objective",
        [
            "top_layer",
            "all_layers",
            "all_layers_dropout",
            "spectral_all_layers",
            "spectral_layer_pairs",
        ],
    )
    def test_every_objective_runs_and_reduces_its_loss(self, objective: Any) -> None:
        method = DataFree(
            teacher=MLP.build(), objective=objective, spectrum=0.5, batches=1, steps=40
        )
        result = lilliput.compress(
            MLP.build(5), MLP.task(), [Stage(methods=[method], train=Train(epochs=1))]
        )
        told = json.loads((result.directory / "changes.json").read_text())[0]
        assert "not data-free" in told[0]["note"]
        assert told[1]["note"] == objective
        assert told[1]["after"] < told[1]["before"] / 2

    def test_loss_is_the_cross_entropy_to_the_softened_teacher(self) -> None:
        network, student = MLP.build(1).eval(), MLP.build(2).eval()
        inputs = torch.randn(9, 12)
        method = DataFree(teacher=network, temperature=3.0)
        run = Run(student, MLP.task(), methods=[method])
        run.batch, run.output = Batch(inputs, None), student(inputs)
        from lilliput.mechanisms.teacher import shared_teacher

        method._teacher = shared_teacher(run, network)
        found = float(method.loss(run)["data_free"].detach())
        p = (network(inputs) / 3).softmax(1).detach()
        q = (student(inputs) / 3).softmax(1).detach()
        expected = -sum(float((p[s] * q[s].log()).sum()) for s in range(9)) / 9
        assert found == pytest.approx(expected, rel=1e-5)
        assert method.task_weight(run) == 0

    def test_inputs_are_kept_and_made_anew_for_another_teacher(self, tmp_path: Path) -> None:
        stage = Stage(methods=[DataFree(**self.settings)], train=Train(epochs=1))
        lilliput.compress(MLP.build(), MLP.task(), [stage], directory=tmp_path / "run")
        kept = tmp_path / "run" / "generated-0-0.data_free.safetensors"
        before = kept.stat().st_mtime_ns
        run = Run(MLP.build(), MLP.task(), original=MLP.build(), directory=tmp_path / "run")
        method = DataFree(**self.settings)
        run.methods = [method]
        method.attach(run)
        assert kept.stat().st_mtime_ns == before
        run.shared, run.original = {}, MLP.build(3)
        method.attach(run)
        assert kept.stat().st_mtime_ns != before

    def test_a_class_without_records(self, tmp_path: Path) -> None:
        file = tmp_path / "records.safetensors"
        two = [Batch(b.inputs[b.target < 2], b.target[b.target < 2]) for b in labeled()]
        record_activations(MLP.build(), two, PLACES, file=file)
        stage = Stage(methods=[DataFree(records=str(file), **self.settings)], train=Train(epochs=1))
        with pytest.raises(InputError, match=r"no activation records of class 2, only of \[0, 1\]"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_a_teacher_with_other_classes(self) -> None:
        stage = Stage(
            methods=[DataFree(teacher=nn.Linear(12, 2), **self.settings)], train=Train(epochs=1)
        )
        with pytest.raises(ModelMismatch, match="same classes"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_a_teacher_with_one_class(self) -> None:
        stage = Stage(
            methods=[DataFree(teacher=nn.Linear(12, 1), **self.settings)], train=Train(epochs=1)
        )
        with pytest.raises(ModelMismatch, match=r"data_free: .* two outputs"):
            lilliput.compress(nn.Linear(12, 1), MLP.task(), [stage])

    def test_a_student_that_answers_with_logits(self) -> None:
        """As those of Hugging Face do."""
        method = DataFree()
        method._teacher = Live([MLP.build()], torch.device("cpu"))
        run = Run(MLP.build(), MLP.task(), methods=[method])
        run.batch = Batch(torch.randn(4, 12), None)
        logits = run.model(run.batch.inputs)
        run.output = logits
        expected = method.loss(run)
        run.output = type("Answer", (), {"logits": logits})()
        assert torch.equal(method.loss(run)["data_free"], expected["data_free"])

    def test_an_ensemble_is_refused(self) -> None:
        stage = Stage(methods=[DataFree(teacher=[MLP.build(), MLP.build(1)])])
        with pytest.raises(InputError, match="name one teacher"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_default_places(self) -> None:
        assert default_places(MLP.build(), "all_layers") == ["0", "3", "5"]
        assert default_places(MLP.build(), "top_layer") == [""]
