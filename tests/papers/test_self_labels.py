"""Lee 2013: pseudo-labels."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import Stage, Task, Train, compress
from lilliput.core.run import Run
from lilliput.core.schedule import Ramp
from lilliput.core.types import Batch
from lilliput.errors import ModelMismatch, NothingMatched
from lilliput.methods import SelfLabels
from lilliput.methods.distill.self_labels import chosen_cross_entropy, own_labels
from lilliput.testing.networks import NETWORKS

MLP = NETWORKS[0]
NOTHING = Train(epochs=1, lr=1e-12, optimizer="sgd")


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def step(
    method: SelfLabels, student: Tensor, teacher: Tensor, target: Tensor
) -> tuple[Run, float, float]:
    """One step with given logits: the run, the method's term and its weight of the task's loss."""
    given = {"previous": nn.Identity}
    run = Run(nn.Linear(1, 1), MLP.task(), earlier=given, methods=[method], total_steps=10)
    method.attach(run)
    run.batch, run.output = Batch(teacher, target), student
    term = method.loss(run)["self_labels"]
    return run, float(term.value * term.weight), method.task_weight(run)


def test_labels_are_the_likeliest_classes() -> None:
    label, sure = own_labels(logits(1, 5, 4))
    p = logits(1, 5, 4)[0].softmax(1)
    assert label.tolist() == p.argmax(1).tolist()
    torch.testing.assert_close(sure, p.max(1).values)


def test_members_probabilities_are_averaged() -> None:
    """Not their votes, and not their logits."""
    members = torch.tensor([[[0.0, 1.0, -9.0]], [[0.0, 1.0, -9.0]], [[9.0, -9.0, -9.0]]])
    label, sure = own_labels(members)
    mean = members.softmax(2).mean(0)
    assert label.tolist() == [0], "two of three vote for class 1"
    torch.testing.assert_close(sure, mean.max(1).values)


def test_all_samples_by_hand() -> None:
    student, teacher = logits(6, 4), logits(6, 4, seed=1)
    q, labels = student.softmax(1), teacher.argmax(1)
    expected = -sum(float(q[n, labels[n]].log()) for n in range(6)) / 6
    _, value, hard = step(
        SelfLabels(weight=0.5, hard_weight=0.25), student, teacher, torch.zeros(6)
    )
    assert value == pytest.approx(0.5 * expected)
    assert hard == 0.25


def test_only_samples_without_a_label_by_hand() -> None:
    """The mean is over those samples, not over the batch."""
    student, teacher = logits(6, 4), logits(6, 4, seed=1)
    target = torch.tensor([0, -100, 1, -100, -100, 2])
    q, labels = student.softmax(1), teacher.argmax(1)
    expected = -sum(float(q[n, labels[n]].log()) for n in (1, 3, 4)) / 3
    _, value, hard = step(SelfLabels(which="unlabeled"), student, teacher, target)
    assert value == pytest.approx(expected)
    assert hard == 1.0
    other = SelfLabels(which="unlabeled", unlabeled=2)
    assert step(other, student, teacher, target)[1] == pytest.approx(-float(q[5, labels[5]].log()))


def test_the_threshold_leaves_out_what_the_teacher_doubts() -> None:
    student, teacher = logits(40, 4), logits(40, 4, seed=1)
    sure = teacher.softmax(1).max(1).values > 0.8
    assert 5 < int(sure.sum()) < 35
    expected = F.cross_entropy(student[sure], teacher.argmax(1)[sure])
    run, value, _ = step(SelfLabels(threshold=0.8), student, teacher, torch.zeros(40))
    assert value == pytest.approx(float(expected))
    assert float(run.logged["self_labels/share"]) == pytest.approx(int(sure.sum()) / 40)


def test_a_step_without_a_chosen_sample_adds_nothing() -> None:
    value = chosen_cross_entropy(
        logits(3, 4), torch.zeros(3).long(), torch.zeros(3, dtype=torch.bool)
    )
    assert float(value) == 0.0


def test_a_batch_without_labels_has_no_task_loss() -> None:
    """Cross-entropy over no sample is not a number."""
    blank = torch.full((6,), -100)
    assert F.cross_entropy(logits(6, 4), blank).isnan()
    _, value, hard = step(SelfLabels(which="unlabeled"), logits(6, 4), logits(6, 4, seed=1), blank)
    assert hard == 0.0
    assert value > 0


def test_the_papers_own_form_labels_by_the_network_of_this_step() -> None:
    """The label is no path for the gradient: it is that of the cross-entropy with a constant."""
    student = logits(6, 4).requires_grad_(True)
    method = SelfLabels(teacher="self", weight=Ramp(start=0.0, end=3.0, over=0.5))
    run = Run(nn.Linear(1, 1), MLP.task(), methods=[method], total_steps=10)
    method.attach(run)
    run.batch, run.output, run.step = Batch(None, torch.zeros(6)), student, 2
    term = method.loss(run)["self_labels"]
    assert term.weight == pytest.approx(3 * 0.2 / 0.5)
    term.value.backward()
    q = student.detach().softmax(1)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (q - F.one_hot(q.argmax(1), 4)) / 6)


class Mixed:
    """The tiny network's samples; most of them have no label."""

    def __init__(self, labeled: int) -> None:
        self.inner, self.labeled = MLP.task().train, labeled

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __iter__(self) -> Any:
        for batch in self.inner:
            target = torch.where(batch.index < self.labeled, batch.target, -100)
            yield Batch(batch.inputs, target, batch.index)


def mixed(labeled: int) -> Task:
    task = MLP.task()
    return Task(Mixed(labeled), task.validation, task.test, task.loss, task.score)


def test_samples_without_labels_help() -> None:
    """Twelve labels; the network of the first stage labels the other samples for the second."""
    train = Train(epochs=40, lr=0.01)
    few = [Stage(train=train, task=labeled_only(12))]
    own = Stage(methods=[SelfLabels(which="unlabeled", threshold=0.6)], train=train, task=mixed(12))
    first, second = compress(MLP.build(), MLP.task(), [*few, own]).figures["stages"]
    assert second["score"] >= first["score"]


def labeled_only(count: int) -> Task:
    task = MLP.task()
    inner: Any = task.train
    batches = [(inner.inputs[:count], inner.target[:count])]
    return Task(batches, task.validation, task.test, task.loss, task.score)


def test_nothing_to_label_is_an_error() -> None:
    stage = Stage(methods=[SelfLabels(which="unlabeled")], train=NOTHING)
    with pytest.raises(NothingMatched, match=r"no sample without a label \(target -100\)"):
        compress(MLP.build(), MLP.task(), [stage])
    stage = Stage(methods=[SelfLabels(threshold=1.0)], train=NOTHING)
    with pytest.raises(NothingMatched, match=r"probability 1\.0 or more.*Lower the threshold"):
        compress(MLP.build(), MLP.task(), [stage])


def test_targets_that_are_no_classes_have_no_mark_for_no_label() -> None:
    with pytest.raises(ModelMismatch, match="must be class numbers"):
        step(SelfLabels(which="unlabeled"), logits(6, 4), logits(6, 4), torch.zeros(6, 4))


def test_the_share_is_logged() -> None:
    stage = Stage(methods=[SelfLabels()], train=NOTHING)
    result = compress(MLP.build(), MLP.task(), [stage])
    line = json.loads((result.directory / "metrics.jsonl").read_text().splitlines()[0])
    assert line["self_labels/share"] == 1.0
