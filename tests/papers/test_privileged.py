"""Lopez-Paz, Bottou, Schoelkopf, Vapnik 2016: unifying distillation and privileged information."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.task import accuracy
from lilliput.core.types import Batch
from lilliput.errors import InputError, ModelMismatch
from lilliput.methods import Privileged
from lilliput.methods.distill.privileged import privileged_loss
from lilliput.tasks.digits import digits, digits_privileged
from lilliput.testing import NETWORKS

MLP = NETWORKS[0]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestLoss:
    def test_is_the_definition(self) -> None:
        """-1/N sum_i sum_k softmax(f_t / T)_k log softmax(f_s)_k, term by term."""
        student, teacher, t = draw(5, 4), draw(1, 5, 4, seed=1), 3.0
        total = 0.0
        for n in range(5):
            s = [math.exp(float(z) / t) for z in teacher[0, n]]
            q = [math.exp(float(z)) for z in student[n]]
            total -= sum(a / sum(s) * math.log(b / sum(q)) for a, b in zip(s, q, strict=True))
        assert float(privileged_loss(student, teacher, t)) == pytest.approx(total / 5)

    def test_only_the_teacher_is_softened(self) -> None:
        """The gradient is (q - s) / N with q at T=1: Hinton's would be T (q_T - s) / N."""
        student, teacher, t = draw(5, 4).requires_grad_(True), draw(1, 5, 4, seed=1), 10.0
        privileged_loss(student, teacher, t).backward()
        expected = (student.detach().softmax(1) - (teacher[0] / t).softmax(1)) / 5
        assert student.grad is not None
        torch.testing.assert_close(student.grad, expected)

    def test_an_ensemble_is_the_mean_of_its_probabilities(self) -> None:
        student, teacher = draw(5, 4), draw(3, 5, 4, seed=1)
        target = (teacher / 2).softmax(-1).mean(0)
        expected = F.cross_entropy(student, target)
        torch.testing.assert_close(privileged_loss(student, teacher, 2.0), expected)


class Views:
    """Batches whose view ``privileged`` is another tensor than the inputs."""

    def __init__(self, inputs: Tensor, target: Tensor, privileged: Tensor) -> None:
        self.inputs, self.target, self.privileged = inputs, target, privileged

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        parts = (self.inputs.chunk(4), self.target.chunk(4), self.privileged.chunk(4))
        for x, y, better in zip(*parts, strict=True):
            yield Batch(x, y, views={"privileged": better})


class TestMethod:
    """One epoch with a student that hardly moves, so that its logged losses can be computed beside."""

    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.x, self.better = torch.randn(40, 6), torch.randn(40, 9)
        self.y = torch.randint(3, (40,))
        self.teacher, self.student = nn.Linear(9, 3), nn.Linear(6, 3)

    def log(self, target: Tensor | None = None, **settings: Any) -> dict[str, float]:
        method = Privileged(teacher=self.teacher, **settings)
        batches = Views(self.x, self.y if target is None else target, self.better)
        task = Task(batches, batches, None, F.cross_entropy, accuracy)
        stage = Stage(methods=[method], train=Train(epochs=1, lr=1e-12))
        result = lilliput.compress(self.student, task, [stage])
        line = (result.directory / "metrics.jsonl").read_text().splitlines()[0]
        found: dict[str, float] = json.loads(line)
        return found

    def soft(self, t: float) -> float:
        return float(
            F.cross_entropy(
                self.student(self.x), (self.teacher(self.better) / t).softmax(1)
            ).detach()
        )

    def hard(self, rows: Any = slice(None)) -> float:
        return float(F.cross_entropy(self.student(self.x)[rows], self.y[rows]).detach())

    def test_is_equation_4(self) -> None:
        found = self.log(imitation=0.3, temperature=5.0)
        assert found["loss/labels"] == pytest.approx(0.7 * self.hard(), rel=1e-5)
        assert found["loss/imitation"] == pytest.approx(0.3 * self.soft(5.0), rel=1e-5)
        assert found["weight/imitation"] == pytest.approx(0.3)
        assert found["loss"] == pytest.approx(0.7 * self.hard() + 0.3 * self.soft(5.0), rel=1e-5)

    def test_the_authors_code_weighs_by_the_squared_temperature(self) -> None:
        found = self.log(imitation=0.3, temperature=5.0, weight_by_temperature=True)
        assert found["loss/imitation"] == pytest.approx(25 * 0.3 * self.soft(5.0), rel=1e-5)
        assert found["loss/labels"] == pytest.approx(0.7 * self.hard(), rel=1e-5)

    def test_ends_of_the_imitation(self) -> None:
        assert self.log(imitation=0.0)["loss"] == pytest.approx(self.hard(), rel=1e-5)
        assert self.log(imitation=1.0)["loss"] == pytest.approx(self.soft(1.0), rel=1e-5)
        assert "loss/labels" not in self.log(imitation=1.0)

    def test_samples_without_a_label_count_with_their_soft_term_only(self) -> None:
        """And they are part of n: the labeled tenth has a tenth of the hard term's weight."""
        target, labeled = self.y.clone(), torch.arange(0, 40, 10)
        target[torch.ones(40, dtype=torch.bool).index_fill(0, labeled, False)] = -1
        found = self.log(target, imitation=0.4, temperature=2.0)
        assert found["loss/imitation"] == pytest.approx(0.4 * self.soft(2.0), rel=1e-5)
        assert found["loss/labels"] == pytest.approx(0.6 * self.hard(labeled) / 10, rel=1e-5)

    def test_batches_without_any_label(self) -> None:
        found = self.log(torch.full((40,), -1), imitation=0.4)
        assert found["loss"] == pytest.approx(0.4 * self.soft(1.0), rel=1e-5)
        assert found["loss/labels"] == 0.0

    def test_the_teacher_sees_its_view_and_needs_it(self) -> None:
        batches = [(self.x, self.y)]
        task = Task(batches, batches, None, F.cross_entropy, accuracy)
        stage = Stage(methods=[Privileged(teacher=self.teacher)], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match="the view 'privileged', and the batches have no"):
            lilliput.compress(self.student, task, [stage])

    def test_a_target_outside_the_classes_is_told(self) -> None:
        with pytest.raises(ModelMismatch, match="the loss cannot take"):
            self.log(torch.full((40,), 7))

    def test_settings_are_checked(self) -> None:
        with pytest.raises(InputError, match="imitation"):
            Privileged(imitation=1.5)
        with pytest.raises(InputError, match="temperature"):
            Privileged(temperature=0.0)


class Logistic:
    """Experiments 1 and 3 of section 5: logistic regressions with 200 samples in 50 dims."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.alpha = torch.randn(50, generator=self.generator)
        self.relevant = torch.randperm(50, generator=self.generator)[:3]

    def clean_labels(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(n, 50, generator=self.generator)
        better = x @ self.alpha
        noise = torch.randn(n, generator=self.generator)
        return x, better.unsqueeze(1), (better + noise > 0).long()

    def relevant_features(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(n, 50, generator=self.generator)
        better = x[:, self.relevant]
        return x, better, (better @ self.alpha[self.relevant] > 0).long()

    def scores(self, draw_samples: Any) -> tuple[float, float, float]:
        """Accuracy of the teacher, of the student alone, and of the student with lambda = T = 1."""
        (x, better, y), (x2, better2, y2) = draw_samples(200), draw_samples(10_000)
        plain = self.task(x, y, x, x2, y2, x2)
        paired = self.task(x, y, better, x2, y2, better2)
        seen = self.task(better, y, better, better2, y2, better2)
        width = better.shape[1]
        teacher = self.fit(nn.Linear(width, 2), seen, [])
        alone = self.fit(nn.Linear(50, 2), plain, [])
        method = Privileged(teacher=teacher.model, imitation=1.0)
        taught = self.fit(nn.Linear(50, 2), paired, [method])
        return tuple(r.figures["score"] for r in (teacher, alone, taught))  # type: ignore[return-value]

    def task(self, x: Tensor, y: Tensor, better: Tensor, *test: Tensor) -> Task:
        held = [(test[0], test[1])]
        train = [Batch(x, y, views={"privileged": better})]
        return Task(train, held, None, F.cross_entropy, accuracy)

    def fit(self, network: nn.Module, task: Task, methods: list[Any]) -> Any:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        train = Train(epochs=200, lr=0.1, evaluate_every=200)
        return lilliput.compress(network, task, [Stage(methods=methods, train=train)])


@pytest.mark.parametrize(
    ("kind", "paper"),
    [("clean_labels", (96, 88, 95)), ("relevant_features", (98, 89, 97))],
)
def test_synthetic_experiments_of_the_paper(kind: str, paper: tuple[int, int, int]) -> None:
    """Privileged, regular and distilled accuracy, the mean of two repetitions."""
    runs = []
    for seed in range(2):
        world = Logistic(seed)
        runs.append(world.scores(getattr(world, kind)))
    found = torch.tensor(runs).mean(0)
    assert (found - torch.tensor(paper)).abs().max() < 4, found
    assert found[2] > found[1] + 4


def test_the_privileged_view_helps_where_labels_are_few() -> None:
    """Semi-supervised, on digits: 40 labels; the teacher sees 8x8, the student 4x4 pixels."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"batch_size": 32}

    def network(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 10))

    seen = digits(limit=40, **sizes)
    few, many = digits_privileged(40, **sizes), digits_privileged(None, labeled=40, **sizes)
    teacher = lilliput.compress(network(64), seen, [Stage(train=Train(epochs=150, lr=0.003))])
    start = network(16)
    alone = lilliput.compress(start, few, [Stage(train=Train(epochs=150, lr=0.003))])
    method = Privileged(teacher=teacher.model, imitation=0.9)
    taught = lilliput.compress(
        start, many, [Stage(methods=[method], train=Train(epochs=20, lr=0.003))]
    )
    assert taught.figures["score"] > alone.figures["score"] + 2
