"""Li, Seltzer, Wang, Zhao, Gong 2017: large-scale domain adaptation via teacher-student learning."""

from __future__ import annotations

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
from lilliput.core.digests import weights_digest
from lilliput.core.task import accuracy, evaluate
from lilliput.core.types import Batch
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, ModelMismatch
from lilliput.methods import DomainAdaptation, FilterL1, Magnitude
from lilliput.methods.distill.domain_adaptation import adaptation_loss
from lilliput.tasks.digits import digits, digits_noisy
from lilliput.testing import NETWORKS

MLP, CNN, _ = NETWORKS
STILL = Train(epochs=1, lr=1e-12)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestLoss:
    def test_is_the_definition(self) -> None:
        """-1/N sum_f sum_s P_T(s | x_src) log P_S(s | x_tgt), frame by frame."""
        student, teacher = draw(2, 3, 4), draw(1, 2, 3, 4, seed=1)
        total = 0.0
        for own, taught in zip(student.reshape(6, 4), teacher.reshape(6, 4), strict=True):
            p = [math.exp(float(z)) for z in taught]
            q = [math.exp(float(z)) for z in own]
            total -= sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q, strict=True))
        assert float(adaptation_loss(student, teacher)) == pytest.approx(total / 6)

    def test_least_where_the_student_agrees(self) -> None:
        """Its value is then the teacher's entropy, and its gradient 0."""
        teacher = draw(5, 4)
        student = (teacher + 7.0).requires_grad_(True)
        value = adaptation_loss(student, teacher.unsqueeze(0))
        value.backward()
        p = teacher.softmax(1)
        assert float(value.detach()) == pytest.approx(float(-(p * p.log()).sum(1).mean()))
        torch.testing.assert_close(student.grad, torch.zeros_like(teacher))


def paired(source: Tensor, target: Tensor, labels: Tensor | None = None) -> Task:
    batches = [Batch(target, labels, views={"source": source})]
    held = [(target, torch.zeros(len(target), dtype=torch.int64) if labels is None else labels)]
    return Task(batches, held, None, F.cross_entropy, accuracy)


class TestMethod:
    def test_teacher_and_student_see_different_inputs_and_no_label_is_asked_for(self) -> None:
        torch.manual_seed(0)
        network, source, target = nn.Linear(6, 3), torch.randn(10, 6), torch.randn(10, 6)
        stage = Stage(methods=[DomainAdaptation()], train=STILL)
        result = lilliput.compress(network, paired(source, target), [stage])
        found = json.loads((result.directory / "metrics.jsonl").read_text().splitlines()[0])
        expected = F.cross_entropy(network(target), network(source).softmax(1))
        assert found["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)

    def test_without_parallel_samples_it_says_so(self) -> None:
        stage = Stage(methods=[DomainAdaptation()], train=STILL)
        with pytest.raises(ModelMismatch, match="the view 'source', and the batches have no"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_the_student_starts_as_the_teacher(self) -> None:
        """Buffers too: a student's running statistics are the teacher's before the first step."""
        teacher = CNN.build(1)
        with torch.no_grad():
            teacher[1].running_mean.add_(1.0)  # type: ignore[index]
        student = CNN.build(2)
        method = DomainAdaptation(teacher=teacher, view=None)
        lilliput.attach(student, method, steps=1, task=CNN.task())
        assert weights_digest(student) == weights_digest(teacher)

    def test_goes_on_bit_for_bit(self, tmp_path: Path) -> None:
        """Gone on with, the student has what it had learned: it does not start as the teacher again."""

        class Stop(Watcher):
            def step_done(self, run: Any) -> None:
                if run.step == 5:
                    raise KeyboardInterrupt

        task = digits_noisy(limit=64, batch_size=16)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        train = Train(epochs=2, lr=0.01, checkpoint_minutes=1e-9)
        stages = [Stage(methods=[DomainAdaptation()], train=train)]
        whole = lilliput.compress(network, task, stages, directory=tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            lilliput.compress(network, task, stages, directory=tmp_path / "cut", watchers=[Stop()])
        again = lilliput.compress(network, task, stages, directory=tmp_path / "cut")
        assert weights_digest(again.model) == weights_digest(whole.model)

    def test_or_keeps_its_own_weights_where_it_is_told_to(self) -> None:
        student = MLP.build(2)
        before = weights_digest(student)
        method = DomainAdaptation(teacher=MLP.build(1), view=None, initialize=False)
        lilliput.attach(student, method, steps=1, task=MLP.task())
        assert weights_digest(student) == before

    def test_another_network_cannot_start_as_the_teacher(self) -> None:
        stage = Stage(methods=[DomainAdaptation(teacher=nn.Linear(12, 3), view=None)], train=STILL)
        with pytest.raises(ModelMismatch, match=r"(?s)teacher's weights.*Set initialize to False"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_a_pruned_student_is_not_overwritten(self) -> None:
        adapt = DomainAdaptation(view=None)
        stage = Stage(methods=[Magnitude(sparsity=0.5), adapt], train=STILL)
        with pytest.raises(InputError, match="encoded already"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])
        thin = Stage(methods=[FilterL1(keep=0.5, layers="0", round_to=1)], train=STILL)
        with pytest.raises(ModelMismatch, match="Set initialize to False"):
            lilliput.compress(MLP.build(), MLP.task(), [thin, Stage(methods=[adapt], train=STILL)])

    def test_an_ensemble_cannot_be_copied(self) -> None:
        method = DomainAdaptation(teacher=[MLP.build(1), MLP.build(2)], view=None)
        stage = Stage(methods=[method], train=STILL)
        with pytest.raises(InputError, match="cannot start as an ensemble"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_a_cached_teacher_says_the_same(self, tmp_path: Path) -> None:
        """The cache holds what the teacher says of the source domain, not of the student's inputs."""
        task, losses = digits_noisy(limit=64, batch_size=16), []
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        for cache in (False, True):
            stage = Stage(methods=[DomainAdaptation(cache=cache)], train=Train(epochs=2, lr=0.01))
            result = lilliput.compress(network, task, [stage], directory=tmp_path / str(cache))
            lines = (result.directory / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["loss"] for line in lines])
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        assert (tmp_path / "True" / "teacher-0-source.f16").exists()


def test_a_network_for_clean_digits_learns_noisy_ones_without_a_label() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    noisy = digits_noisy(batch_size=32)
    clean = lilliput.compress(
        network, digits(batch_size=32), [Stage(train=Train(epochs=20, lr=0.003))]
    )

    def forbidden(output: Any, target: Any) -> Tensor:
        raise AssertionError("the labels were asked for")

    before = evaluate(clean.model, noisy.reported, noisy.score)
    noisy.loss = forbidden
    stage = Stage(methods=[DomainAdaptation()], train=Train(epochs=20, lr=0.003))
    adapted = lilliput.compress(clean.model, noisy, [stage])
    assert clean.figures["score"] > 93
    assert adapted.figures["score"] > before + 5
