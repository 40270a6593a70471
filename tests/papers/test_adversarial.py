"""Xu, Hsu, Huang 2017: knowledge distillation with conditional adversarial networks."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.run import Run
from lilliput.core.task import accuracy
from lilliput.core.types import Batch
from lilliput.engine.progress import Watcher
from lilliput.errors import Diverged, LilliputWarning, ModelMismatch, UnknownName
from lilliput.methods import Adversarial, Gradual, SoftTargets
from lilliput.methods.distill.adversarial import (
    LogitCritic,
    critic_loss,
    deceiving_loss,
    instance_loss,
)
from lilliput.testing import NETWORKS

MLP, CNN, _ = NETWORKS


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


LABELS = torch.tensor([0, 2, 1, 1, 0])
REAL = (random(5, seed=1), random(5, 3, seed=2))
FAKE = (random(5, seed=3), random(5, 3, seed=4))


class TestLosses:
    def test_the_discriminators_by_hand(self) -> None:
        """-(mean log P(real|t) + log P(fake|s) + log P(l|t) + log P(l|s))."""
        total = 0.0
        for n in range(5):
            total += math.log(sigmoid(float(REAL[0][n]))) + math.log(1 - sigmoid(float(FAKE[0][n])))
            for _, classes in (REAL, FAKE):
                odds = classes[n].exp()
                total += math.log(float(odds[LABELS[n]] / odds.sum()))
        assert float(critic_loss(REAL, FAKE, LABELS)) == pytest.approx(-total / 5)

    def test_the_students_by_hand(self) -> None:
        fake = [math.log(1 - sigmoid(float(x))) for x in FAKE[0]]
        real = [math.log(sigmoid(float(x))) for x in FAKE[0]]
        assert float(deceiving_loss(FAKE[0], "minimax")) == pytest.approx(sum(fake) / 5)
        assert float(deceiving_loss(FAKE[0], "non_saturating")) == pytest.approx(-sum(real) / 5)

    def test_both_objectives_pull_the_same_way_and_one_pulls_harder(self) -> None:
        """While D is sure (odds far below 0), minimax saturates: sigmoid(x) against 1 - sigmoid(x)."""
        for odds in (-5.0, 0.0, 5.0):
            x = torch.tensor([odds], dtype=torch.float64, requires_grad=True)
            (minimax,) = torch.autograd.grad(deceiving_loss(x, "minimax"), x)
            (other,) = torch.autograd.grad(deceiving_loss(x, "non_saturating"), x)
            assert float(minimax) == pytest.approx(-sigmoid(odds))
            assert float(other) == pytest.approx(-(1 - sigmoid(odds)))

    def test_the_distance_is_a_sum_over_classes(self) -> None:
        one, other = random(6, 4), random(6, 4, seed=1)
        expected = sum(abs(float(one[n, c] - other[n, c])) for n in range(6) for c in range(4)) / 6
        assert float(instance_loss(one, other)) == pytest.approx(expected)

    def test_the_best_discriminator_gives_the_ratio_of_densities(self) -> None:
        """D* = p_t / (p_t + p_s), as in Goodfellow 2014."""
        p_t, p_s = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.1, 0.3, 0.6]).double()
        odds = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([odds], max_iter=100, line_search_fn="strong_wolfe")
        counts = [(10 * p).round().long() for p in (p_t, p_s)]
        nothing = torch.zeros(10, 2, dtype=torch.float64)

        def closure() -> Tensor:
            optimizer.zero_grad()
            real, fake = (odds.repeat_interleave(c) for c in counts)
            loss = critic_loss((real, nothing), (fake, nothing), torch.zeros(10, dtype=torch.int64))
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        torch.testing.assert_close(odds.sigmoid().detach(), p_t / (p_t + p_s), rtol=1e-4, atol=1e-4)


class Linear:
    """Linear student, teacher and (one layer) discriminator, and their updates by hand."""

    rate = 0.1
    batches = [  # noqa: RUF012
        Batch(random(6, 4, seed=n), torch.arange(6) % 3) for n in (10, 11, 12)
    ]

    def __init__(self) -> None:
        self.student = self._layer(4, 3, 20)
        self.teacher = self._layer(4, 3, 21)

    def _layer(self, inputs: int, outputs: int, seed: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(random(outputs, inputs, seed=seed))
        return layer

    def by_hand(self, critic: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of student and discriminator ``(1 + classes, classes)`` after one epoch."""
        w, t, v = self.student.weight.detach().clone(), self.teacher.weight.detach(), critic.clone()
        for batch in self.batches:
            x, y = batch.inputs, F.one_hot(batch.target, 3).double()
            s, r, n = x @ w.T, x @ t.T, len(x)
            odds, guess = s @ v[0], torch.softmax(s @ v[1:].T, dim=1)
            # d/ds of: log P(fake|s) - log P(l|s) + H(y, s) + ||s - t||_1, each a mean over n.
            towards = -torch.sigmoid(odds)[:, None] * v[0] + (guess - y) @ v[1:]
            towards = towards + torch.softmax(s, dim=1) - y + (s - r).sign()
            moved = w - self.rate * (towards / n).T @ x
            # d/dv of -(L_A + L_DS), on the logits before the student's step.
            real = torch.sigmoid(r @ v[0]) - 1
            grads = [
                (real[:, None] * r + torch.sigmoid(odds)[:, None] * s).sum(0, keepdim=True) / n
            ]
            guess_t = torch.softmax(r @ v[1:].T, dim=1)
            grads += [((guess_t - y).T @ r + (guess - y).T @ s) / n]
            v, w = v - self.rate * torch.cat(grads), moved
        return w, v


class OneLayer(nn.Module):
    """A discriminator whose gradients are easily written down."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        out = logits @ self.weight.T
        return out[:, 0], out[:, 1:]


class TestAlgorithm:
    def test_is_the_hand_written_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Plain SGD on linear networks: the student, then the discriminator on the same logits."""
        linear, start = Linear(), 0.5 * random(4, 3, seed=30)
        module = "lilliput.methods.distill.adversarial.LogitCritic"
        monkeypatch.setattr(module, lambda classes, width: OneLayer(start))
        found: list[Tensor] = []

        class Look(Watcher):
            def step_done(self, run: Run) -> None:
                (player,) = run.players.values()
                found.append(player.network.weight.detach().clone())  # type: ignore[arg-type]

        task = Task(linear.batches, linear.batches, None, F.cross_entropy, accuracy)
        method = Adversarial(teacher=linear.teacher)
        stage = Stage(methods=[method], train=Train(epochs=1, optimizer="sgd", lr=linear.rate))
        with pytest.warns(LilliputWarning, match="no noise"):
            result = lilliput.compress(linear.student, task, [stage], watchers=[Look()])
        student, critic = linear.by_hand(start)
        torch.testing.assert_close(
            result.model.weight.detach().double(),  # type: ignore[operator]
            student,
            rtol=1e-6,
            atol=1e-7,
        )
        torch.testing.assert_close(found[-1], critic)

    def test_the_student_leaves_no_gradient_in_the_discriminator(self) -> None:
        data = [Batch(torch.randn(8, 12), torch.arange(8) % 3)]
        method, model = Adversarial.example(), MLP.build()
        run = Run(model, Task(data, data, None, F.cross_entropy, accuracy), methods=[method])
        run.original, run.new_optimizer = MLP.build(1), lambda p: torch.optim.SGD(p, lr=0.1)
        method.attach(run)
        run.batch, run.output = data[0], model(data[0].inputs)
        terms = method.loss(run)
        (player,) = run.players.values()
        sum(t.value * t.weight for t in terms.values()).backward()  # type: ignore[union-attr]
        assert all(p.grad is None and p.requires_grad for p in player.network.parameters())
        assert all(p.grad is not None for p in model.parameters())
        method.after_step(run)
        assert all(p.grad is not None for p in player.network.parameters())

    def test_weights_scale_the_terms(self) -> None:
        def first(**weights: float) -> dict[str, Any]:
            method = Adversarial(teacher=MLP.build(1), **weights)
            stage = Stage(methods=[method], train=Train(epochs=1, lr=1e-9))
            result = lilliput.compress(MLP.build(), MLP.task(), [stage])
            lines = (result.directory / "metrics.jsonl").read_text().splitlines()
            found: dict[str, Any] = json.loads(lines[0])
            return found

        one = first()
        other = first(
            adversarial_weight=2.0, class_weight=3.0, instance_weight=0.5, hard_weight=4.0
        )
        for name, factor in {"adversarial": 2, "class": 3, "instance": 0.5, "task": 4}.items():
            assert other[f"loss/{name}"] == pytest.approx(factor * one[f"loss/{name}"], rel=1e-4)

    def test_the_discriminator_learns_to_tell_apart(self, tmp_path: Path) -> None:
        """Against a student that hardly moves, from a teacher of another scale."""
        teacher = MLP.build(1)
        with torch.no_grad():
            teacher[5].weight.mul_(8.0)  # type: ignore[index]
        method = Adversarial(teacher=teacher, discriminator_lr=1e6)
        stage = Stage(methods=[method], train=Train(epochs=15, lr=1e-8))
        lilliput.compress(MLP.build(), MLP.task(), [stage], directory=tmp_path)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["adversary/accuracy"] > 0.85

    def test_the_student_comes_nearer_to_the_teacher(self) -> None:
        teacher, student = MLP.build(1).eval(), MLP.build(2)
        method = Adversarial(teacher=teacher, hard_weight=0.0, class_weight=0.0)
        stage = Stage(methods=[method], train=Train(epochs=30, lr=0.01))
        result = lilliput.compress(student, MLP.task(), [stage])
        x = torch.cat([b.inputs for b in MLP.task().train])

        def distance(network: nn.Module) -> float:
            return float(instance_loss(network.eval()(x), teacher(x)).detach())

        assert distance(result.model) < 0.5 * distance(student)

    def test_composes_with_masks_and_soft_targets(self, tmp_path: Path) -> None:
        methods = [Gradual(sparsity=0.8), SoftTargets(), Adversarial.example()]
        stage = Stage(methods=methods, train=Train(epochs=2, lr=0.01))
        lilliput.compress(MLP.build(), MLP.task(), [stage], directory=tmp_path)
        found = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
        parts = sum(v for k, v in found.items() if k.startswith("loss/"))
        assert found["loss"] == pytest.approx(parts, rel=1e-5)


class TestNoise:
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3))

    def test_is_there_while_the_student_trains_and_gone_afterwards(self) -> None:
        shares: list[float] = []

        class Look(Watcher):
            def step_done(self, run: Run) -> None:
                with torch.no_grad():
                    out = run.model[1](torch.ones(2000, 24))  # type: ignore[index]
                shares.append(float((out == 0).float().mean()))
                copied = pickle.loads(pickle.dumps(copy.deepcopy(run.model)))
                assert float((copied.train()[1](torch.ones(50, 24)) == 0).float().mean()) == 0.0

        method = Adversarial(noise={"1": 0.3}, width=8)
        stage = Stage(methods=[method], train=Train(epochs=1))
        result = lilliput.compress(self.model(), MLP.task(), [stage], watchers=[Look()])
        assert shares == pytest.approx([0.3] * 4, abs=0.02)
        assert not any(m._forward_hooks for m in result.model.modules())

    def test_a_student_without_any_is_told(self) -> None:
        stage = Stage(methods=[Adversarial(width=8)], train=Train(epochs=1))
        with pytest.raises(LilliputWarning, match=r"noise: \{fc1: 0\.3\}"):
            lilliput.compress(self.model(), MLP.task(), [stage])

    def test_no_such_place(self) -> None:
        stage = Stage(methods=[Adversarial(noise={"fc7": 0.3})], train=Train(epochs=1))
        with pytest.raises(UnknownName, match="fc7"):
            lilliput.compress(self.model(), MLP.task(), [stage])


class TestBadInput:
    def test_other_classes(self) -> None:
        stage = Stage(methods=[Adversarial(teacher=nn.Linear(12, 5))], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match="same classes"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_targets_that_are_no_classes(self) -> None:
        x = torch.randn(8, 12)
        data = [Batch(x, torch.randn(8, 3))]
        task = Task(data, data, None, F.mse_loss, lambda z, y: -(z - y).abs().mean())
        stage = Stage(methods=[Adversarial(width=8)], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match="one class number"):
            lilliput.compress(MLP.build(), task, [stage])

    def test_a_discriminator_that_collapses_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Bad(LogitCritic):
            def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
                real, classes = super().forward(logits)
                return (real * float("nan") if len(logits) == 64 else real), classes

        monkeypatch.setattr("lilliput.methods.distill.adversarial.LogitCritic", Bad)
        stage = Stage(methods=[Adversarial(width=8)], train=Train(epochs=1))
        with pytest.raises(Diverged, match=r"loss of 0\.adversarial\.discriminator is nan"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])
