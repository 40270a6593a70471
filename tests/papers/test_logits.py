"""Ba, Caruana 2014: do deep nets really need to be deep?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Task, Train
from lilliput.architectures.mlp import mlp
from lilliput.core.task import accuracy
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, ModelMismatch
from lilliput.methods import Logits, SoftTargets
from lilliput.methods.distill.logits import logit_loss
from lilliput.testing import NETWORKS

MLP = NETWORKS[0]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestLoss:
    def test_is_the_definition(self) -> None:
        """1 / (2 N) times the sum over samples and classes, term by term."""
        student, teacher = draw(5, 4), draw(5, 4, seed=1)
        terms = [
            (float(student[n, c]) - float(teacher[n, c])) ** 2 for n in range(5) for c in range(4)
        ]
        assert float(logit_loss(student, teacher)) == pytest.approx(sum(terms) / (2 * 5))

    def test_gradient(self) -> None:
        """(z_s - z_t) / N: no class is divided by the number of classes."""
        student, teacher = draw(5, 4).requires_grad_(True), draw(5, 4, seed=1)
        logit_loss(student, teacher).backward()
        assert student.grad is not None
        torch.testing.assert_close(student.grad, (student.detach() - teacher) / 5)

    def test_sequences_count_every_prediction(self) -> None:
        student, teacher = draw(3, 6, 4), draw(3, 6, 4, seed=1)
        flat = logit_loss(student.reshape(18, 4), teacher.reshape(18, 4))
        torch.testing.assert_close(logit_loss(student, teacher), flat)

    def test_standardized_is_the_distance_of_standardized_logits(self) -> None:
        student, teacher = draw(5, 4), 3 * draw(5, 4, seed=1) + 7
        mean, deviation = teacher.mean(0), teacher.std(0)
        expected = logit_loss((student - mean) / deviation, (teacher - mean) / deviation)
        torch.testing.assert_close(logit_loss(student, teacher, deviation), expected)


def metrics(method: Any, **options: Any) -> dict[str, float]:
    """What the first epoch of a student that hardly moves logs."""
    stage = Stage(methods=[method], train=Train(epochs=1, lr=1e-12))
    result = lilliput.compress(MLP.build(2), MLP.task(), [stage], **options)
    line = (result.directory / "metrics.jsonl").read_text().splitlines()[0]
    found: dict[str, float] = json.loads(line)
    return found


class TestMethod:
    def quiet(self, seed: int) -> nn.Module:
        """A network without dropout, so that its outputs can be computed beside."""
        network = MLP.build(seed)
        network[2] = nn.Identity()  # type: ignore[index]
        return network

    def first_loss(self, **settings: Any) -> float:
        stage = Stage(methods=[Logits(**settings)], train=Train(epochs=1, lr=1e-12))
        result = lilliput.compress(self.quiet(2), MLP.task(), [stage])
        line = (result.directory / "metrics.jsonl").read_text().splitlines()[0]
        return float(json.loads(line)["loss"])

    def answers(self, *seeds: int) -> list[Tensor]:
        inputs = MLP.task().train.inputs  # type: ignore[attr-defined]
        return [self.quiet(seed).eval()(inputs).detach() for seed in seeds]

    def test_an_ensemble_teaches_with_its_mean_logits(self) -> None:
        student, one, other = self.answers(2, 3, 4)
        expected = logit_loss(student, (one + other) / 2)
        found = self.first_loss(teacher=[self.quiet(3), self.quiet(4)])
        assert found == pytest.approx(float(expected), rel=1e-5)

    def test_standardize_uses_the_whole_training_set(self) -> None:
        student, teacher = self.answers(2, 3)
        expected = logit_loss(student, teacher, teacher.std(0, correction=0))
        found = self.first_loss(teacher=self.quiet(3), standardize=True)
        assert found == pytest.approx(float(expected), rel=1e-5)

    def test_no_label_is_asked_for(self) -> None:
        def no_loss(output: Any, target: Any) -> Tensor:
            raise AssertionError("the labels were asked for")

        task = MLP.task()
        task.loss = no_loss
        lilliput.compress(MLP.build(), task, [Stage(methods=[Logits()], train=Train(epochs=1))])

    def test_weights_are_logged(self) -> None:
        method = Logits(teacher=MLP.build(3), weight={"start": 2.0, "end": 0.0}, hard_weight=0.5)
        found = metrics(method)
        assert found["weight/logits"] == pytest.approx(2.0 - 2.0 * 1.5 / 4)  # steps 0 to 3 of 4
        assert found["loss"] == pytest.approx(found["loss/logits"] + found["loss/task"], rel=1e-5)

    def test_is_soft_targets_at_a_high_temperature(self) -> None:
        """Hinton's equation 4: centred logits, T to infinity, the same step up to the factor 1/C."""

        class Centred(nn.Module):
            def __init__(self, seed: int) -> None:
                super().__init__()
                self.inner = MLP.build(seed)

            def forward(self, x: Tensor) -> Tensor:
                z: Tensor = self.inner(x)
                return z - z.mean(1, keepdim=True)

        moved = []
        for method, rate in (
            (
                SoftTargets(teacher=Centred(3), temperature=1e3, soft_weight=1.0, hard_weight=0.0),
                0.3,
            ),
            (Logits(teacher=Centred(3)), 0.1),
        ):
            train = Train(epochs=1, lr=rate, optimizer="sgd")
            result = lilliput.compress(
                Centred(2), MLP.task(), [Stage(methods=[method], train=train)]
            )
            before = Centred(2).state_dict()
            now = result.model.state_dict()
            moved.append(torch.cat([(now[n] - before[n]).flatten() for n in before]))
        assert float(moved[0].norm()) > 0.05
        assert float((moved[0] - moved[1]).norm()) < 0.02 * float(moved[1].norm())

    def test_standardize_goes_on_bit_for_bit(self, tmp_path: Path) -> None:
        """Its sums are remembered: the batches of another epoch would add up to other last bits."""

        class Stop(Watcher):
            def step_done(self, run: Any) -> None:
                if run.step == 6:
                    raise KeyboardInterrupt

        method = Logits(teacher=MLP.build(3), standardize=True)
        stages = [Stage(methods=[method], train=Train(epochs=3, checkpoint_minutes=1e-9))]
        whole = lilliput.compress(MLP.build(), MLP.task(), stages, directory=tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            lilliput.compress(
                MLP.build(), MLP.task(), stages, directory=tmp_path / "cut", watchers=[Stop()]
            )
        torch.rand(5)
        again = lilliput.compress(MLP.build(), MLP.task(), stages, directory=tmp_path / "cut")
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, again.model.state_dict()[name])

    def test_a_constant_logit_cannot_be_standardized(self) -> None:
        teacher = MLP.build(3)
        with torch.no_grad():
            teacher[5].weight[1] = 0.0  # type: ignore[index]
        stage = Stage(methods=[Logits(teacher=teacher, standardize=True)], train=Train(epochs=1))
        with pytest.raises(InputError, match=r"classes \[1\] the same logit"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_classes_in_another_dim(self) -> None:
        """Maps (batch, classes, height, width), as of segmentation: every pixel is a prediction."""

        def run(dim: int) -> float:
            torch.manual_seed(0)
            inputs, target = torch.randn(8, 1, 5, 5), torch.randint(3, (8, 5, 5))
            batches = [(inputs, target)]
            task = Task(batches, batches, None, nn.functional.cross_entropy, lambda z, y: z.sum())
            networks = [nn.Conv2d(1, 3, 3, padding=1) for _ in range(2)]
            z, t = (n(inputs).movedim(1, -1).reshape(-1, 3) for n in networks)
            self.expected = float(logit_loss(z, t).detach())
            method = Logits(teacher=networks[1], class_dim=dim)
            stage = Stage(methods=[method], train=Train(epochs=1, lr=1e-12))
            result = lilliput.compress(networks[0], task, [stage])
            line = (result.directory / "metrics.jsonl").read_text().splitlines()[0]
            return float(json.loads(line)["loss"])

        assert run(1) == pytest.approx(self.expected, rel=1e-5)
        assert run(-3) == pytest.approx(self.expected, rel=1e-5)
        assert run(-1) != pytest.approx(self.expected, rel=1e-2)
        with pytest.raises(ModelMismatch, match="class_dim=4, and the outputs have 4 dims"):
            run(4)


class TestBottleneck:
    def test_two_factors_stand_for_a_wide_layer(self) -> None:
        """W = U V, with V and U as two linear layers and nothing in between."""
        network = mlp([12], inputs=6, classes=3, bottleneck=2)
        x = torch.randn(4, 6)
        w = network.fc1.weight @ network.bottleneck.weight
        hidden = (x @ w.T + network.fc1.bias).relu()
        expected = hidden @ network.fc2.weight.T + network.fc2.bias
        torch.testing.assert_close(network(x), expected)
        assert torch.linalg.matrix_rank(w) == 2

    def test_needs_fewer_numbers(self) -> None:
        def count(**options: Any) -> int:
            return sum(p.numel() for p in mlp([1200], **options).parameters())

        assert count() - count(bottleneck=50) == 784 * 1200 - 50 * (784 + 1200)

    def test_goes_through_the_artifact_by_name(self, tmp_path: Path) -> None:
        network = mlp([8], inputs=6, classes=3, bottleneck=2, dropout=0.1, activation="tanh")
        lilliput.save(network, tmp_path / "m.safetensors")
        loaded = lilliput.load(tmp_path / "m.safetensors")
        x = torch.randn(4, 6)
        assert torch.equal(loaded.eval()(x), network.eval()(x))

    def test_refuses_a_bottleneck_before_nothing(self) -> None:
        with pytest.raises(InputError, match="a hidden layer to put it before"):
            mlp([], bottleneck=4)
        with pytest.raises(InputError, match="at least 1 unit"):
            mlp([4], bottleneck=0)


def test_a_shallow_student_learns_a_function_from_unlabeled_inputs() -> None:
    """A transfer set without a single label, from which the student comes to agree with its teacher."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 12, generator=generator)
    teacher = MLP.build(1).eval()
    batches = list(zip(inputs.split(64), [None] * 8, strict=True))
    says = teacher(inputs).argmax(1)
    held = [(inputs[:128], says[:128])]
    task = Task(batches[2:], held, None, nn.functional.cross_entropy, accuracy)
    torch.manual_seed(0)
    student = mlp([64], inputs=12, classes=3, bottleneck=6)
    stage = Stage(model=student, methods=[Logits(teacher=teacher)], train=Train(epochs=60, lr=0.01))
    result = lilliput.compress(teacher, task, [stage])
    assert result.figures["score"] > 90
