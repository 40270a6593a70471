"""Jiao and others 2020: hidden states, here of recurrent layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import Stage, Task, Train, compress
from lilliput.core.run import Run
from lilliput.core.types import Batch
from lilliput.errors import InputError, LilliputError, ModelMismatch, UnknownName
from lilliput.methods import HiddenStates
from lilliput.methods.distill.hidden_states import hidden_state_loss, last_steps

TRAIN = Train(epochs=2, lr=0.01)


class Forecaster(nn.Module):
    """An LSTM over a window; the next value from its last state."""

    def __init__(self, hidden: int, seed: int = 0, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lstm = nn.LSTM(1, hidden, batch_first=batch_first)
        self.head = nn.Linear(hidden, 1)
        self.first = batch_first

    def forward(self, window: Tensor) -> Tensor:
        states, _ = self.lstm(window if self.first else window.transpose(0, 1))
        return self.head(states[:, -1] if self.first else states[-1])


def period_task(window: int, samples: int = 96) -> Task:
    """Forecast a sum of a fast and a slow period."""
    time = torch.arange(samples + window, dtype=torch.float32)
    wave = (time * 2 * torch.pi / 6).sin() + (time * 2 * torch.pi / 25).sin()
    inputs = wave[:-1].unfold(0, window, 1)[:samples, :, None]
    target = wave[window : window + samples, None]
    batches = [
        Batch(x, y, n)
        for x, y, n in zip(
            inputs.split(32), target.split(32), torch.arange(samples).split(32), strict=True
        )
    ]
    return Task(batches, batches, None, F.mse_loss, lambda o, t: -(o - t).square().mean(1))


def prepared(method: HiddenStates, student: nn.Module, teacher: nn.Module, task: Task) -> Run:
    run = Run(
        student,
        task,
        earlier={"previous": lambda: teacher, "day": lambda: teacher},
        methods=[method],
    )
    method.attach(run)
    return run


def term_of(method: HiddenStates, run: Run, batch: Batch) -> Tensor:
    run.batch = batch
    method.before_step(run)
    run.output = run.model(batch.inputs)
    term = method.loss(run)["hidden_states"]
    return term.value * term.weight


def test_the_loss_by_hand() -> None:
    """The mean over samples, steps and numbers of (h_t W - h'_t)**2, with the h_t of the LSTM's equations."""
    student, teacher, task = Forecaster(3, seed=1), Forecaster(5, seed=2), period_task(7)
    method = HiddenStates(pairs=["lstm"], teacher="previous", weight=2.0)
    run = prepared(method, student, teacher, task)
    batch = task.train[0]  # type: ignore[index]
    value = term_of(method, run, batch)
    matrix = run.extras["0.hidden_states.0"].weight  # type: ignore[union-attr]
    total = 0.0
    for n in range(32):
        own, taught = states(student.lstm, batch.inputs[n]), states(teacher.lstm, batch.inputs[n])
        for t in range(7):
            total += float((matrix @ own[t] - taught[t]).square().sum().detach())
    assert float(value.detach()) == pytest.approx(2.0 * total / (32 * 7 * 5), rel=1e-4)


def states(lstm: nn.LSTM, window: Tensor) -> list[Tensor]:
    """h_t step by step, from the gates' equations."""
    width = lstm.hidden_size
    h = c = torch.zeros(width)
    found = []
    for x in window:
        gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
        i, f, g, o = gates.split(width)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        found.append(h.detach())
    return found


def test_no_bias_and_a_matrix_also_where_widths_agree() -> None:
    student, teacher, task = Forecaster(4, seed=1), Forecaster(4, seed=1), period_task(5)
    method = HiddenStates(pairs=["lstm"], teacher="previous")
    run = prepared(method, student, teacher, task)
    adapter: Any = run.extras["0.hidden_states.0"]
    assert isinstance(adapter, nn.Linear) and adapter.bias is None
    assert float(term_of(method, run, task.train[0])) > 0  # type: ignore[index]
    plain = HiddenStates(pairs=["lstm"], teacher="previous", adapter="none")
    run = prepared(plain, student, teacher, task)
    assert float(term_of(plain, run, task.train[0])) == 0.0  # type: ignore[index]


def test_gradients_reach_the_student_and_the_matrix_only() -> None:
    student, teacher, task = Forecaster(3, seed=1), Forecaster(5, seed=2), period_task(7)
    method = HiddenStates(pairs=["lstm"], teacher="previous")
    run = prepared(method, student, teacher, task)
    term_of(method, run, task.train[0]).backward()  # type: ignore[index]
    assert all(p.grad is not None for p in student.lstm.parameters())
    assert student.head.weight.grad is None
    assert run.extras["0.hidden_states.0"].weight.grad is not None  # type: ignore[union-attr]
    assert all(p.grad is None for p in teacher.parameters())


def test_the_ends_of_sequences_are_compared() -> None:
    """The teacher looks at the last day only, through a view; its steps are the student's last ones."""
    student, teacher, task = Forecaster(3, seed=1), Forecaster(5, seed=2), period_task(12)
    whole = task.train[0]  # type: ignore[index]
    batch = Batch(whole.inputs, whole.target, whole.index, {"day": whole.inputs[:, -6:]})
    task.train = [batch]
    method = HiddenStates(pairs=["lstm"], teacher="day", view="day", align="end")
    run = prepared(method, student, teacher, task)
    value = term_of(method, run, batch)
    with torch.no_grad():
        own, _ = student.lstm(whole.inputs)
        taught, _ = teacher.lstm(whole.inputs[:, -6:])
        adapter = run.extras["0.hidden_states.0"]
        expected = (adapter(own)[:, 6:] - taught).square().mean()
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_steps_in_the_first_dim() -> None:
    """A recurrent layer without ``batch_first``: (steps, batch, width)."""
    kinds = {
        "student": Forecaster(3, 1, batch_first=False),
        "teacher": Forecaster(3, 2, batch_first=False),
    }
    task = period_task(12)
    whole = task.train[0]  # type: ignore[index]
    batch = Batch(whole.inputs, whole.target, whole.index, {"day": whole.inputs[:, -6:]})
    task.train = [batch]
    method = HiddenStates(
        pairs=["lstm"], teacher="day", view="day", align="end", step_dim=0, adapter="none"
    )
    value = term_of(method, prepared(method, kinds["student"], kinds["teacher"], task), batch)
    with torch.no_grad():
        own, _ = kinds["student"].lstm(whole.inputs.transpose(0, 1))
        taught, _ = kinds["teacher"].lstm(whole.inputs[:, -6:].transpose(0, 1))
    assert float(value.detach()) == pytest.approx(
        float((own[6:] - taught).square().mean()), rel=1e-5
    )
    assert last_steps(own, 6, 0).shape == (6, 32, 3)


def test_a_mean_over_pairs_and_over_all_numbers() -> None:
    own, taught = torch.zeros(4, 5, 6), torch.full((4, 5, 6), 3.0)
    assert float(hidden_state_loss(own, taught)) == 9.0
    student, teacher, task = Forecaster(3, seed=1), Forecaster(3, seed=2), period_task(7)
    single = HiddenStates(pairs=["lstm"], teacher="previous", adapter="none")
    double = HiddenStates(
        pairs={"lstm": "lstm", "lstm:output:0": "lstm"}, teacher="previous", adapter="none"
    )
    values = [
        float(term_of(m, prepared(m, student, teacher, task), task.train[0]).detach())  # type: ignore[index]
        for m in (single, double)
    ]
    assert values[0] == pytest.approx(values[1])


def test_first_the_short_period_then_the_long_one() -> None:
    """Windows grow from stage to stage; the states of the first stage are held while the second learns."""
    short, long = period_task(6), period_task(30)
    guide = HiddenStates(pairs=["lstm"], teacher="day", adapter="none", weight=30.0)

    def drift(methods: list[Any]) -> float:
        stages = [
            Stage(name="day", train=Train(epochs=15, lr=0.01), task=short),
            Stage(name="month", methods=methods, train=Train(epochs=15, lr=0.01), task=long),
        ]
        result = compress(Forecaster(8), long, stages)
        day = compress(Forecaster(8), long, stages[:1]).model
        x = torch.cat([batch.inputs for batch in long.train])
        with torch.no_grad():
            before, after = (m.lstm(x)[0] for m in (day, result.model))  # type: ignore[union-attr,operator]
        assert result.figures["score"] > -1.0, "the variance of the wave"
        return float((before - after).square().mean())

    assert drift([guide]) < 0.2 * drift([])


def refused(method: HiddenStates, student: nn.Module, task: Task) -> LilliputError:
    stages = [Stage(train=TRAIN), Stage(model=student, methods=[method], train=TRAIN)]
    with pytest.raises(LilliputError) as caught:
        compress(Forecaster(5), task, stages)
    return caught.value


def test_bad_input() -> None:
    task = period_task(7)
    error = refused(
        HiddenStates(pairs=["lstm"], teacher="previous", adapter="none"), Forecaster(3), task
    )
    assert isinstance(error, ModelMismatch)
    assert "states of other widths need adapter: linear" in str(error)
    error = refused(HiddenStates(pairs=["head"], teacher="previous"), Forecaster(3), task)
    assert isinstance(error, ModelMismatch)
    assert "(batch, steps, width)" in str(error)
    error = refused(HiddenStates(pairs=["lstn"], teacher="previous"), Forecaster(3), task)
    assert isinstance(error, UnknownName)
    assert "lstm" in str(error)
    with pytest.raises(InputError, match="name at least one place"):
        HiddenStates(pairs={})


def test_sequences_of_other_lengths_are_refused_unless_their_ends_are_meant() -> None:
    task = period_task(12)
    task.train = [
        Batch(b.inputs, b.target, b.index, {"day": b.inputs[:, -6:]})
        for b in task.train  # type: ignore[union-attr]
    ]
    method = HiddenStates(pairs=["lstm"], teacher="previous", view="day")
    error = refused(method, Forecaster(5), task)
    assert isinstance(error, ModelMismatch)
    assert "differ in length. Set align to 'end'" in str(error)
