"""Hinton, Vinyals, Dean 2015, section 3: the bias of a class that the transfer set lacks."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.task import accuracy, evaluate, read
from lilliput.engine.outcome import Result
from lilliput.errors import InputError, ModelMismatch
from lilliput.methods import ClassBias, SoftTargets
from lilliput.methods.distill.class_bias import (
    correct_bias,
    offset_for_accuracy,
    offset_for_frequency,
)
from lilliput.tasks.digits import digits
from lilliput.testing import NETWORKS

MLP = NETWORKS[0]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


class TestOffset:
    @given(
        seed=st.integers(0, 1000),
        frequency=st.floats(0.001, 0.999),
        classes=st.sampled_from([[0], [3], [1, 4], [0, 1, 2, 3]]),
    )
    @settings(max_examples=40, deadline=None)
    def test_mean_probability_is_the_frequency(
        self, seed: int, frequency: float, classes: list[int]
    ) -> None:
        logits = draw(30, 5, seed=seed)
        logits[:, classes] += offset_for_frequency(logits, classes, frequency)
        share = logits.softmax(1)[:, classes].sum(1).mean()
        assert float(share) == pytest.approx(frequency, abs=1e-7)

    @given(seed=st.integers(0, 1000), classes=st.sampled_from([[0], [2, 3], [0, 1, 2]]))
    @settings(max_examples=40, deadline=None)
    def test_accuracy_is_the_best_of_all_offsets(self, seed: int, classes: list[int]) -> None:
        """Against every offset that makes a difference, tried one by one."""
        logits = draw(40, 4, seed=seed)
        labels = torch.randint(4, (40,), generator=torch.Generator().manual_seed(seed))

        def correct(offset: float) -> int:
            moved = logits.clone()
            moved[:, classes] += offset
            return int((moved.argmax(1) == labels).sum())

        rest = [c for c in range(4) if c not in classes]
        margins = (logits[:, rest].amax(1) - logits[:, classes].amax(1)).tolist()
        tried = [m + e for m in margins for e in (-1e-9, 1e-9)]
        found = offset_for_accuracy(logits, labels, classes)
        assert correct(found) == max(map(correct, tried))
        # No nearer offset is as good.
        nearer = [o for o in tried if abs(o) < abs(found) - 1e-3]
        assert all(correct(o) < correct(found) for o in nearer)

    def test_nothing_to_gain_is_no_offset(self) -> None:
        logits = torch.eye(3) * 5
        assert offset_for_accuracy(logits, torch.arange(3), [1]) == 0.0

    def test_a_class_that_is_always_missed(self) -> None:
        """Class 2 is second everywhere; it should win on its own sample, margin 1, and no other."""
        logits = torch.tensor([[5.0, 0.0, 4.0], [0.0, 9.0, 6.0], [9.0, 0.0, 4.0]])
        offset = offset_for_accuracy(logits, torch.tensor([2, 1, 0]), [2])
        assert offset == pytest.approx(1.001)


class TestModel:
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def test_only_that_bias_moves(self) -> None:
        model, x = self.model(), torch.randn(20, 6)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert correct_bias(model, [1, 2], [(x, None)], by=0.75) == 0.75
        after = model.state_dict()
        difference = after["2.bias"] - before["2.bias"]
        torch.testing.assert_close(difference, torch.tensor([0.0, 0.75, 0.75, 0.0]))
        del before["2.bias"]
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_batches_count_by_their_samples(self) -> None:
        """Not the mean of the batches' means: the last one may be small."""
        model, x = self.model(), torch.randn(21, 6)
        batches = [(part, None) for part in x.split(20)]
        correct_bias(model, [0], batches, frequency=0.3)
        assert float(model(x).softmax(1)[:, 0].mean().detach()) == pytest.approx(0.3, abs=1e-5)

    def test_a_layer_with_something_behind_it_is_refused_and_restored(self) -> None:
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Tanh())
        before = model[1].bias.detach().clone()
        for layer in (None, "0"):
            with pytest.raises(ModelMismatch, match="did not move with the bias"):
                correct_bias(model, [0], [(torch.randn(5, 6), None)], by=1.0, layer=layer)
        assert torch.equal(model[1].bias, before)

    def test_refuses_what_makes_no_sense(self) -> None:
        model, batches = self.model(), [(torch.randn(5, 6), None)]
        with pytest.raises(InputError, match="0 to 3, each once"):
            correct_bias(model, [4], batches, by=1.0)
        with pytest.raises(InputError, match="not all of them"):
            correct_bias(model, [0, 1, 2, 3], batches, by=1.0)
        with pytest.raises(InputError, match="no labels"):
            correct_bias(model, [0], batches)
        with pytest.raises(InputError, match="not both"):
            correct_bias(model, [0], batches, by=1.0, frequency=0.5)
        with pytest.raises(ModelMismatch, match=r"\(8,\) bias, and the model 4 logits"):
            correct_bias(model, [0], batches, by=1.0, layer="0")
        with pytest.raises(ModelMismatch, match="no linear layer"):
            correct_bias(nn.Sequential(nn.Flatten()), [0], batches, by=1.0)
        with pytest.raises(ModelMismatch, match="one row of logits"):
            correct_bias(nn.Linear(6, 2), [0], [(torch.randn(5, 3, 6), None)], by=1.0)

    def test_settings_are_checked(self) -> None:
        with pytest.raises(InputError, match="not both"):
            ClassBias(classes=[0], by=1.0, frequency=0.1)
        with pytest.raises(InputError, match="frequency"):
            ClassBias(classes=[0], frequency=1.0)
        with pytest.raises(InputError, match="classes"):
            ClassBias(classes=[])


class TestMethod:
    def test_is_reported_as_a_change(self) -> None:
        attached = lilliput.attach(MLP.build(), ClassBias(classes=[1], by=0.5), task=MLP.task())
        (change,) = attached.finish()
        assert (change.where, change.after) == ("5.bias[1]", 0.5)

    def test_looks_at_validation_only(self) -> None:
        """Training and test batches are not touched."""

        def forbidden() -> None:
            raise AssertionError("only the validation batches may be read")

        class Never:
            def __iter__(self) -> None:  # type: ignore[override]
                forbidden()

        plain = MLP.task()
        task = Task(Never(), plain.validation, Never(), plain.loss, plain.score)
        model = MLP.build()
        lilliput.attach(model, ClassBias(classes=[1], frequency=0.9), task=task).finish()
        shares = [model.eval()(b.inputs).softmax(1)[:, 1] for b in read(task.validation, "")]
        assert float(torch.cat(shares).mean().detach()) == pytest.approx(0.9, abs=1e-4)


def taught_without(classes: list[int], *more: Stage) -> Result:
    """A teacher for all digits, and a student that learns its soft targets without some of them."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    torch.manual_seed(0)
    teacher, student = network(), network()
    task = digits(batch_size=32, without=classes)
    assert not any(torch.isin(b.target, torch.tensor(classes)).any() for b in read(task.train, ""))
    soft = SoftTargets(temperature=8.0, soft_weight=1.0, hard_weight=0.0)
    stages = [
        Stage(name="teacher", train=Train(epochs=15, lr=0.003)),
        Stage(model=student, task=task, methods=[soft], train=Train(epochs=30, lr=0.003)),
        *more,
    ]
    return lilliput.compress(teacher, digits(batch_size=32), stages)


def test_a_digit_that_the_student_has_never_seen() -> None:
    """The mythical 3: soft targets alone tell what it looks like."""
    model = taught_without([3]).model
    test = digits().test
    threes = [(b.inputs[b.target == 3], b.target[b.target == 3]) for b in read(test, "")]
    assert evaluate(model, threes, accuracy) > 80


def test_a_student_that_has_seen_two_digits() -> None:
    """Only 7s and 8s in the transfer set, section 3 again: the corrected bias brings most digits back."""
    correct = Stage(name="correct", methods=[ClassBias(classes=[7, 8])])
    result = taught_without([0, 1, 2, 3, 4, 5, 6, 9], correct)
    before, after = (stage["score"] for stage in result.figures["stages"][1:])
    assert before < 80
    assert after > before + 15
    change = json.loads((result.directory / "changes.json").read_text())[2][0]
    assert change["after"] < -1, "the paper lowers the biases by 7.6"
