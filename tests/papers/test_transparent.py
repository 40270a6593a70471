"""Tan, Caruana, Hooker, Gordo 2018: transparent model distillation; and Distill-and-Compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Task, Train
from lilliput.architectures.additive import Additive, Curve, Surface, additive
from lilliput.architectures.tree_ensemble import TreeEnsemble, tree_ensemble
from lilliput.core.task import accuracy, evaluate
from lilliput.core.types import Batch
from lilliput.errors import (
    InputError,
    LilliputWarning,
    MissingDependency,
    ModelMismatch,
    RunError,
)
from lilliput.mechanisms.teacher import Live
from lilliput.methods import Codebook, Magnitude, Transparent
from lilliput.methods.distill import _boosting
from lilliput.methods.distill._audit import _area, _grid, compare
from lilliput.methods.distill._boosting import (
    Boosting,
    common_pairs,
    fit_additive,
    fit_trees,
    whole_tree,
)
from lilliput.methods.distill.transparent import disagreement, explained, log_odds
from lilliput.testing import NETWORKS

ensemble = pytest.importorskip("sklearn.ensemble")

QUICK = {"rounds": 200, "bags": 2}
#: For ``compare``.
BRIEF: dict[str, Any] = {"learning_rate": 0.1, "rounds": 300, "bags": 1}


def data(samples: int, features: int, seed: int = 0) -> np.ndarray:
    """32-bit numbers, in double precision."""
    values = np.random.default_rng(seed).normal(size=(samples, features))
    return values.astype(np.float32).astype(np.float64)


def single(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float()


class Teacher(nn.Module):
    """A known function of three features, with two of them in one term, ``(batch, outputs)``."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, outputs + 1))

    def forward(self, x: Tensor) -> Tensor:
        curves = torch.sin(2 * x[:, 0]) + x[:, 1].abs() + x[:, 0] * x[:, 2]
        return curves[:, None] * self.scale


class Filled(Teacher):
    """Takes missing and infinite values for zero."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.nan_to_num(0.0, 0.0, 0.0))


def regression(inputs: Tensor, teacher: nn.Module, size: int = 64) -> Task:
    """The teacher's outputs with noise, as batches."""
    with torch.no_grad():
        wanted = teacher(inputs)
    target = wanted + 0.3 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    batches = [Batch(*part) for part in zip(inputs.split(size), target.split(size), strict=True)]
    return Task(
        batches, batches, None, nn.functional.mse_loss, lambda o, t: -((o - t) ** 2).mean(1)
    )


def distilled(
    student: nn.Module, method: Transparent, task: Task, teacher: nn.Module, **more: Any
) -> Any:
    stage = Stage(model=student, methods=[method], **more)
    return lilliput.compress(teacher, task, [stage])


class TestAdditiveNetwork:
    def filled(self) -> tuple[Additive, list[Curve], list[Surface]]:
        generator = torch.Generator().manual_seed(0)

        def scores(*shape: int) -> Tensor:
            return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

        def edges(count: int) -> Tensor:
            return torch.randn(count, generator=generator).sort().values.double()

        curves = [Curve(edges(n), scores(n + 2)) for n in (0, 3, 7)]
        surfaces = [Surface((0, 2), (edges(2), edges(1)), scores(4, 3))]
        network = additive(features=3, outputs=2, bins=8, pairs=2, pair_bins=4)
        network.fill(torch.tensor([0.5, -0.5]), curves, surfaces)
        return network, curves, surfaces

    @staticmethod
    def bin_of(value: float, edges: Tensor) -> int:
        return 0 if np.isnan(value) else 1 + sum(value >= float(edge) for edge in edges)

    def test_is_the_sum_of_its_terms(self) -> None:
        """Sample by sample and term by term; edges, missing and infinite values included."""
        network, curves, surfaces = self.filled()
        inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
        inputs[0, 1], inputs[4, 2] = curves[1].edges[1], surfaces[0].edges[1][0]
        inputs[1], inputs[2] = torch.nan, torch.inf
        inputs[3] = -torch.inf
        found = network(inputs)
        for sample, output in zip(inputs.tolist(), found, strict=True):
            expected = torch.tensor([0.5, -0.5], dtype=torch.float64)
            for value, curve in zip(sample, curves, strict=True):
                expected = expected + curve.scores[:, self.bin_of(value, curve.edges)]
            (first, second), both, scores = surfaces[0]
            cell = self.bin_of(sample[first], both[0]), self.bin_of(sample[second], both[1])
            expected = expected + scores[:, cell[0], cell[1]]
            torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)

    def test_rounding_of_edges_moves_no_sample(self) -> None:
        """An edge between two 32-bit numbers parts them, on whichever side it would be rounded."""
        below = np.float32(0.1)
        above = np.nextafter(below, np.float32(1))
        for share in (0.1, 0.9):
            edge = float(below) + share * (float(above) - float(below))
            network = additive(features=1, bins=2)
            scores = torch.tensor([[9.0, 0.0, 1.0]])
            network.fill(torch.zeros(1), [Curve(torch.tensor([edge], dtype=torch.float64), scores)])
            inputs = torch.tensor([[float(below)], [float(above)]])
            assert network(inputs).flatten().tolist() == [0.0, 1.0]

    def test_too_much_to_fill_in(self) -> None:
        curve = Curve(torch.arange(5.0), torch.zeros(1, 7))
        with pytest.raises(ModelMismatch, match="build it larger"):
            additive(features=1, bins=5).fill(torch.zeros(1), [curve])
        with pytest.raises(ModelMismatch, match=r"\(1, 6, 0, 0\)"):
            additive(features=2, bins=6).fill(torch.zeros(1), [curve])

    def test_wrong_sizes(self) -> None:
        with pytest.raises(InputError, match="bins=1: give at least 2"):
            additive(bins=1)
        with pytest.raises(ModelMismatch, match="3 features, and a sample has 4"):
            additive(features=3)(torch.zeros(2, 4))

    def test_file_of_an_additive_network(self, tmp_path: Path) -> None:
        network, _, _ = self.filled()
        lilliput.save(network, tmp_path / "network.safetensors")
        inputs = torch.randn(20, 3)
        assert torch.equal(lilliput.load(tmp_path / "network.safetensors")(inputs), network(inputs))


class TestTreeNetwork:
    def test_walks_like_the_library(self) -> None:
        """Trees with leaves at every depth, and fewer of them than the network has room for."""
        features, target = data(150, 4), data(150, 2, seed=1)
        boosters = [
            ensemble.GradientBoostingRegressor(
                n_estimators=6, max_depth=4, max_leaf_nodes=6, random_state=0
            ).fit(features, target[:, k])
            for k in range(2)
        ]
        depths = {t.tree_.max_depth for b in boosters for t in b.estimators_[:, 0]}
        assert depths >= {3, 4}
        network = tree_ensemble(features=4, outputs=2, trees=8, depth=4)
        _boosting.fill_trees(network, boosters)
        fresh = data(400, 4, seed=2)
        expected = np.stack([b.predict(fresh) for b in boosters], 1)
        np.testing.assert_allclose(network(single(fresh)).detach().numpy(), expected, atol=1e-5)

    def test_whole_tree_by_hand(self) -> None:
        class Tree:
            """Root on feature 1 at 0.5; its first side is a leaf, its second parts feature 0 at -1."""

            children_left = np.array([1, -1, 3, -1, -1])
            children_right = np.array([2, -1, 4, -1, -1])
            feature = np.array([1, -2, 0, -2, -2])
            threshold = np.array([0.5, -2.0, -1.0, -2.0, -2.0])
            value = np.array([0.0, 10.0, 0.0, 20.0, 30.0]).reshape(-1, 1, 1)

        feature, threshold, leaves = whole_tree(Tree, 2)
        assert feature.tolist() == [1, 0, 0]
        assert threshold.tolist() == [0.5, np.inf, -1.0]
        assert leaves.tolist() == [10.0, 10.0, 20.0, 30.0]

    def test_rounding_of_thresholds_moves_no_sample(self) -> None:
        below = np.float32(0.1)
        above = np.nextafter(below, np.float32(1))
        for share in (0.1, 0.9):
            between = float(below) + share * (float(above) - float(below))
            network = tree_ensemble(features=1, trees=1, depth=1)
            threshold = torch.tensor([[[between]]], dtype=torch.float64)
            feature, leaves = torch.zeros(1, 1, 1, dtype=torch.int64), torch.tensor([[[0.0, 1.0]]])
            network.fill(torch.zeros(1), feature, threshold, leaves)
            inputs = torch.tensor([[float(below)], [float(above)]])
            assert network(inputs).flatten().tolist() == [0.0, 1.0]

    def test_a_missing_value_gives_nan(self) -> None:
        output = tree_ensemble(features=2, outputs=3)(torch.tensor([[0.0, torch.nan], [0.0, 0.0]]))
        assert output.isnan().tolist() == [[True] * 3, [False] * 3]

    def test_wrong_sizes(self) -> None:
        with pytest.raises(InputError, match=r"depth=20.*1,048,576 leaves"):
            tree_ensemble(depth=20)
        with pytest.raises(InputError, match="trees=0"):
            tree_ensemble(trees=0)
        with pytest.raises(ModelMismatch, match="room for"):
            network = tree_ensemble(trees=1, depth=1)
            nodes = torch.zeros(1, 2, 1)
            network.fill(torch.zeros(1), nodes.long(), nodes, torch.zeros(1, 2, 2))


class TestTrees:
    def test_fit_the_teachers_scores(self) -> None:
        teacher, inputs = Teacher(), single(data(600, 3))
        task = regression(inputs, teacher)
        result = distilled(tree_ensemble(features=3, trees=100), Transparent(), task, teacher)
        with torch.no_grad():
            assert explained(result.model(inputs), teacher(inputs)) > 95
        changes = json.loads((result.directory / "changes.json").read_text())[0]
        assert changes[0]["what"].startswith("variance of the teacher's scores")
        assert changes[0]["after"] > 95
        importances = {c["where"]: c["after"] for c in changes[1:]}
        assert sum(importances.values()) == pytest.approx(1.0)

    def test_labels_are_not_looked_at(self) -> None:
        """The student is the teacher's: other labels, the same student."""
        teacher, inputs = Teacher(), single(data(200, 3))
        task = regression(inputs, teacher)
        lies = [Batch(b.inputs, -5 * b.target.flip(0)) for b in task.train]
        other = Task(lies, task.validation, None, task.loss, task.score)
        students = [
            distilled(tree_ensemble(features=3, trees=9), Transparent(), t, teacher).model
            for t in (task, other)
        ]
        assert torch.equal(students[0](inputs), students[1](inputs))

    def test_a_classifier_of_real_data(self) -> None:
        """One sum of trees a class; most decisions are the teacher's."""
        teacher = NETWORKS[0].build()
        task = NETWORKS[0].task()
        stages = [
            Stage(train=Train(epochs=20, lr=0.01)),
            Stage(
                model=tree_ensemble(features=12, outputs=3, trees=60, depth=3),
                methods=[Transparent(scores="log_odds")],
            ),
        ]
        result = lilliput.compress(teacher, task, stages)
        seen = torch.cat([b.inputs for b in task.train])
        assert result.model(seen).shape == (128, 3)
        assert result.figures["stages"][0]["score"] - result.figures["score"] < 25

    def test_the_network_is_held_against_the_library(self) -> None:
        features, scores = data(80, 3), data(80, 1, seed=1)
        network = tree_ensemble(features=3, trees=5)
        fitted = fit_trees(network, features, scores, Boosting())
        assert disagreement(network, features, fitted.predictions) < 1e-6
        with torch.no_grad():
            network.leaves.bias += 1e-3
        with pytest.raises(RunError, match="computes other values"):
            disagreement(network, features, fitted.predictions)

    def test_tables_train_on(self) -> None:
        """With epochs the leaves go on from the fitted ones."""
        teacher, inputs = Teacher(), single(data(200, 3))
        task = regression(inputs, teacher)
        train = Train(epochs=3, lr=1e-3)
        plain = distilled(tree_ensemble(features=3, trees=9), Transparent(), task, teacher)
        tuned = distilled(
            tree_ensemble(features=3, trees=9), Transparent(), task, teacher, train=train
        )
        assert torch.equal(plain.model.threshold, tuned.model.threshold)
        assert not torch.equal(plain.model.leaves.weight, tuned.model.leaves.weight)
        assert tuned.figures["score"] > plain.figures["score"]

    def test_composes_with_encodings(self) -> None:
        """Leaves share values in the same stage, or are pruned in a later one."""
        teacher, inputs = Teacher(), single(data(200, 3))
        task = regression(inputs, teacher)
        network = tree_ensemble(features=3, trees=20)
        stages = [Stage(model=network, methods=[Transparent(), Codebook(bits=4)])]
        shared = lilliput.compress(teacher, task, stages).model
        assert len(shared.leaves.weight.unique()) <= 17
        with torch.no_grad():
            assert explained(shared(inputs), teacher(inputs)) > 60
        stages = [
            Stage(model=network, methods=[Transparent()]),
            Stage(methods=[Magnitude(sparsity=0.5)]),
        ]
        pruned = lilliput.compress(teacher, task, stages)
        assert (pruned.model.leaves.weight == 0).float().mean() >= 0.5


class TestRefusals:
    task = property(lambda self: regression(single(data(60, 3)), Teacher()))

    def refused(self, student: nn.Module, method: Transparent | None = None, **more: Any) -> str:
        task = more.get("task", self.task)
        with pytest.raises(InputError) as caught:
            distilled(student, method or Transparent(), task, more.get("teacher", Teacher()))
        return str(caught.value)

    @pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
    def test_ordinary_networks(self, network: Any) -> None:
        with pytest.raises(InputError, match=r"student of its own kind.*architecture: additive"):
            lilliput.compress(network.build(), network.task(), [Stage(methods=[Transparent()])])

    def test_another_number_of_features_or_outputs(self) -> None:
        assert "3 features and the student has 4" in self.refused(tree_ensemble(features=4))
        told = self.refused(tree_ensemble(features=3, outputs=2))
        assert "outputs have the shape (1,)" in told
        assert "student has 2 outputs" in told

    def test_missing_and_infinite_values(self) -> None:
        for value, what in ((torch.nan, "missing"), (torch.inf, "infinite")):
            inputs = single(data(60, 3))
            inputs[7, 1] = value
            task = regression(inputs, Filled())
            told = self.refused(tree_ensemble(features=3), task=task, teacher=Filled())
            assert f"1 samples have {what} values, in the features 1" in told

    def test_a_teacher_that_is_not_finite(self) -> None:
        inputs = single(data(60, 3))
        inputs[7, 1] = torch.nan
        told = self.refused(tree_ensemble(features=3), task=regression(inputs, Teacher()))
        assert "for 1 of 60 samples are not finite" in told

    def test_a_constant_feature_is_told(self) -> None:
        inputs = single(data(60, 3))
        inputs[:, 1] = 4.0
        task, student = regression(inputs, Teacher()), tree_ensemble(features=3)
        with pytest.warns(LilliputWarning, match="features 1 are the same in all 60"):
            distilled(student, Transparent(), task, Teacher())

    def test_encoded_tables(self) -> None:
        stage = Stage(model=tree_ensemble(features=3), methods=[Codebook(bits=2), Transparent()])
        with pytest.raises(InputError):
            lilliput.compress(Teacher(), self.task, [stage])

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "interpret.glassbox", None)
        stage = Stage(model=additive(features=3), methods=[Transparent()])
        with pytest.raises(MissingDependency, match=r"interpret-core.*lilliput\[audit\]"):
            lilliput.compress(Teacher(), self.task, [stage])

    def test_inputs_of_several_tensors(self) -> None:
        inputs = single(data(60, 3))
        batches = [Batch({"x": inputs}, inputs[:, :1])]
        task = Task(batches, batches, None, nn.functional.mse_loss, accuracy)
        assert "one tensor of numbers" in self.refused(tree_ensemble(features=3), task=task)


def test_log_odds_change_no_probability() -> None:
    logits = torch.randn(5, 4) + 3
    torch.testing.assert_close(log_odds(logits).softmax(1), logits.softmax(1))
    torch.testing.assert_close(log_odds(logits).sum(1), torch.zeros(5), atol=1e-5, rtol=0)


def test_an_ensemble_is_fitted_by_its_mean() -> None:
    inputs = single(data(120, 3))
    task = regression(inputs, Teacher())
    ensemble_of_two = Transparent(teacher=[Teacher(), nn.Linear(3, 1)])

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(ensemble_of_two.teacher)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([m(x) for m in self.members]).mean(0)

    students = [
        distilled(tree_ensemble(features=3, trees=5), method, task, Teacher()).model
        for method in (ensemble_of_two, Transparent(teacher=Mean()))
    ]
    assert torch.equal(students[0](inputs), students[1](inputs))


class TestAdditive:
    """With the package interpret."""

    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("interpret.glassbox")

    def test_computes_what_the_library_predicts(self) -> None:
        """On samples that it has not seen, with missing values and values beyond all edges."""
        features = data(300, 4)
        features[::9, 1] = np.nan
        scores = np.stack([np.sin(features[:, 0]), features[:, 2] * features[:, 3]], 1)
        scores[:, 0] += np.nan_to_num(features[:, 1], nan=2.0)
        network = additive(features=4, outputs=2, bins=16, pairs=2, pair_bins=6)
        how = Boosting(rounds=200, bags=2)
        machines: list[Any] = []
        make = _boosting.boosted

        def noted(*args: Any, **options: Any) -> Any:
            machines.append(make(*args, **options))
            return machines[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_boosting, "boosted", noted)
            fitted = fit_additive(network, features, scores, how)
        assert disagreement(network, features, fitted.predictions) < 1e-5
        fresh = 3 * data(500, 4, seed=5)
        fresh[::7, 1] = np.nan
        fresh[::11, 3] = np.nan
        # The last machine of each output is the one that the network holds.
        last = [[m for m in machines if np.allclose(m.predict(features), p)][-1]
                for p in fitted.predictions.T]  # fmt: skip
        expected = np.stack([m.predict(fresh) for m in last], 1)
        np.testing.assert_allclose(network(single(fresh)).detach().numpy(), expected, atol=1e-5)
        assert all(len([t for t in m.term_features_ if len(t) == 2]) == 2 for m in last)

    def test_finds_the_terms_of_an_additive_teacher(self) -> None:
        """Its curves are the teacher's, up to a constant, and the pair is the one that interacts."""
        teacher, inputs = Teacher(), single(data(2000, 3))
        task = regression(inputs, teacher, size=500)
        student = additive(features=3, bins=32, pairs=1, pair_bins=12)
        result = distilled(student, Transparent(bags=4), task, teacher)
        assert result.model.pair_features.tolist() == [[0, 2]]
        with torch.no_grad():
            assert explained(result.model(inputs), teacher(inputs)) > 93
        edges = result.model.edges[1]
        curve = result.model.table.weight[0, 33:66][1 : 1 + int((edges < 1e30).sum())].detach()
        middles = torch.cat([edges[:1] - 0.1, (edges[:-1] + edges[1:]) / 2])[: len(curve)]
        truth = middles.abs()
        assert np.corrcoef(curve.numpy(), truth.numpy())[0, 1] > 0.95

    def test_pairs_are_needed_for_what_interacts(self) -> None:
        teacher, inputs = Teacher(), single(data(1000, 3))
        task = regression(inputs, teacher, size=500)
        fidelity = []
        for pairs in (0, 1):
            student = additive(features=3, bins=32, pairs=pairs, pair_bins=12)
            model = distilled(student, Transparent(bags=2), task, teacher).model
            with torch.no_grad():
                fidelity.append(explained(model(inputs), teacher(inputs)))
        assert fidelity[0] < 75 < 95 < fidelity[1]

    def test_missing_values_have_a_bin(self) -> None:
        """The teacher looks at a view without them."""
        teacher, whole = Teacher(), single(data(600, 3))
        holes = whole.clone()
        holes[::3, 1] = torch.nan
        batches = [
            Batch(h, teacher(w).detach(), views={"whole": w})
            for h, w in zip(holes.split(100), whole.split(100), strict=True)
        ]
        task = Task(batches, batches, None, nn.functional.mse_loss, lambda o, t: -(o - t).square())
        method = Transparent(teacher=teacher, view="whole", **QUICK)
        model = distilled(additive(features=3, pairs=1), method, task, Filled()).model
        assert model(holes).isfinite().all()
        assert explained(model(holes).detach(), teacher(whole).detach()) > 50

    def test_breast_cancer(self) -> None:
        from lilliput.architectures.mlp import mlp
        from lilliput.tasks.tabular import breast_cancer

        stages = [
            Stage(train=Train(epochs=10)),
            Stage(
                model=additive(features=30, outputs=2, bins=16),
                methods=[Transparent(scores="log_odds", **QUICK)],
            ),
        ]
        torch.manual_seed(0)
        result = lilliput.compress(mlp([32], 30, 2), breast_cancer(), stages)
        assert result.figures["score"] > 90
        loaded = lilliput.load(result.artifact)
        task = breast_cancer()
        assert evaluate(loaded, task.reported, task.score) == result.figures["score"]


class TestCompare:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("interpret.glassbox")

    @staticmethod
    def world(samples: int = 800, hidden: float = 0.0, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Scores that use feature 1 as the outcomes do not; perhaps a hidden thing that moves both."""
        generator = np.random.default_rng(seed)
        features = generator.normal(size=(samples, 3))
        noise, other, unseen = generator.normal(size=(3, samples))
        truth = np.tanh(features[:, 0]) + 0.5 * features[:, 2] + hidden * unseen
        scores = truth + np.where(features[:, 1] > 0, 1.0, -1.0)
        return scores + 0.5 * noise, truth + 0.5 * other, features

    def test_finds_the_feature_that_is_used_otherwise(self) -> None:
        scores, outcomes, features = self.world()
        audit = compare(
            scores, outcomes, features, bootstraps=6, names=["age", "bias", "income"],
            calibrate=False, **BRIEF,
        )  # fmt: skip
        age, bias, income = audit.differences
        assert bias.size > 0.7 > 0.3 > max(age.size, income.size)
        assert bias.significant.mean() > 0.8
        # The step of 2 at zero is there in the student of the scores, and not in the outcomes.
        above = bias.grid > 0
        step = [c[above].mean() - c[~above].mean() for c in (bias.teacher, bias.outcome)]
        assert step == pytest.approx([2.0, 0.0], abs=0.25)
        for found in audit.differences:
            np.testing.assert_allclose(found.difference, found.teacher - found.outcome)
            assert found.share @ found.teacher == pytest.approx(0.0, abs=1e-9)
            assert (found.low <= found.difference).all()
            assert (found.difference <= found.high).all()
        assert audit.fidelity > 0.9
        text = audit.summary().splitlines()
        assert text[2].startswith("bias: differs by")
        assert "no sign of missing features" in text[1]

    def test_errors_are_correlated_when_a_feature_is_missing(self) -> None:
        seen = compare(*self.world(), bootstraps=2, **BRIEF)
        missing = compare(*self.world(hidden=1.0), bootstraps=2, **BRIEF)
        assert not seen.lacks_features
        assert abs(seen.correlation) < 0.1
        assert missing.lacks_features
        assert missing.correlation > 0.6
        assert missing.low < missing.correlation < missing.high
        assert missing.rank_correlation > 0.5
        assert "likely lack features" in missing.summary()

    def test_binary_outcomes_are_compared_as_log_odds(self) -> None:
        """Scores on another scale are brought to it: a teacher that is right does not differ."""
        generator = np.random.default_rng(0)
        features = generator.normal(size=(700, 2))
        odds = 1.5 * features[:, 0]
        outcomes = (generator.random(700) < 1 / (1 + np.exp(-odds))).astype(int)
        audit = compare(10 + 4 * odds, outcomes, features, bootstraps=2, **BRIEF)
        assert np.ptp(audit.differences[0].outcome) > 2
        assert audit.differences[0].size < 0.4
        assert 0.75 < audit.accuracy < 0.9
        raw = compare(10 + 4 * odds, outcomes, features, bootstraps=2, calibrate=False, **BRIEF)
        assert raw.differences[0].size > 2

    def test_missing_values_are_a_point_of_the_curve(self) -> None:
        scores, outcomes, features = self.world(400)
        features[::4, 0] = np.nan
        found = compare(scores, outcomes, features, bootstraps=2, **BRIEF).differences[0]
        assert np.isnan(found.grid[-1])
        assert found.share[-1] == pytest.approx(0.25)

    def test_a_constant_feature_is_told(self) -> None:
        scores, outcomes, features = self.world(200)
        features[:, 2] = 1.0
        with pytest.warns(LilliputWarning, match="feature 2 is the same"):
            found = compare(scores, outcomes, features, bootstraps=2, **BRIEF).differences[2]
        assert found.size == 0

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"outcomes": np.arange(50) % 3}, "outcomes are 3 classes"),
            ({"outcomes": np.ones(50)}, "all outcomes are the same"),
            ({"teacher_scores": np.ones(50)}, "all scores are the same"),
            ({"teacher_scores": np.full(50, np.nan)}, "not finite"),
            ({"features": np.zeros((49, 2))}, "do not fit"),
            ({"names": ["one"]}, "1 names for 2 features"),
            ({"confidence": 1.5}, "confidence=1.5"),
            ({"bootstraps": 1}, "bootstraps=1"),
            ({"outcomes": np.eye(50)[0].astype(int)}, "50 samples, 1 of the rarest"),
        ],
    )
    def test_bad_input(self, change: dict[str, Any], told: str) -> None:
        good = {
            "teacher_scores": data(50, 1)[:, 0],
            "outcomes": np.arange(50) % 2,
            "features": data(50, 2),
        }
        with pytest.raises(InputError, match=told):
            compare(**{**good, **change})


def test_area_is_the_share_of_ordered_pairs() -> None:
    generator = np.random.default_rng(0)
    outcomes, predicted = generator.integers(0, 2, 40), generator.integers(0, 5, 40).astype(float)
    pairs = [
        (p > n) + 0.5 * (p == n) for p in predicted[outcomes == 1] for n in predicted[outcomes == 0]
    ]
    assert _area(outcomes, predicted) == pytest.approx(np.mean(pairs))


def test_grid_stands_for_all_samples() -> None:
    column = np.append(np.arange(10.0), [np.nan, np.nan])
    grid, share = _grid(column, 5)
    assert grid[:-1].tolist() == [1, 3, 5, 7, 9]
    assert np.isnan(grid[-1])
    assert share.tolist() == pytest.approx([2 / 12] * 6)
    few, share = _grid(np.array([0.0, 1.0, 1.0, 1.0]), 12)
    assert few.tolist() == [1.0] or few.tolist() == [0.0, 1.0]
    assert share.sum() == pytest.approx(1.0)


def test_common_pairs_by_their_sum() -> None:
    found = [{(0,): 9.0, (0, 1): 1.0, (1, 2): 0.6}, {(1, 2): 0.6, (0, 2): 0.9}]
    assert common_pairs(found, 2) == [(0, 1), (1, 2)]


def test_networks_are_registered_architectures(tmp_path: Path) -> None:
    for name in ("additive", "tree_ensemble"):
        network = lilliput.build(name, features=2)
        assert isinstance(network, Additive | TreeEnsemble)
        lilliput.save(network, tmp_path / name)
        assert type(lilliput.load(tmp_path / name)) is type(network)


def test_a_feature_that_is_missing_everywhere_is_named() -> None:
    features = data(50, 2)
    features[:, 1] = np.nan
    with pytest.raises(InputError, match="income is missing in all samples"):
        compare(data(50, 1)[:, 0], np.arange(50) % 2, features, names=["age", "income"])


def test_the_log_odds_of_one_output_are_refused() -> None:
    """Less their mean over one class they are 0 for every sample."""
    method = Transparent(scores="log_odds")
    with pytest.raises(ModelMismatch, match="set scores: outputs"):
        method._scores(Live([Teacher()], torch.device("cpu")), Batch(torch.randn(4, 3), None))
