"""Batches in their forms, scores, and evaluation that leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lilliput.core.task import (
    Task,
    accuracy,
    as_batch,
    batch_size,
    call,
    evaluate,
    evaluation,
    move,
    read,
)
from lilliput.core.types import Batch, Change, resolve
from lilliput.errors import EmptyData, InputError, ModelMismatch

X, Y = torch.randn(10, 4), torch.arange(10) % 3


@pytest.mark.parametrize("item", [(X, Y), [X, Y], Batch(X, Y)])
def test_batches_of_every_form(item: Any) -> None:
    batch = as_batch(item)
    assert batch.inputs is X
    assert batch.target is Y
    assert batch.index is None


def test_index_is_the_third_part() -> None:
    assert as_batch((X, Y, torch.arange(10))).index.tolist() == list(range(10))


def test_inputs_of_every_form() -> None:
    def model(a: Tensor, b: Tensor | None = None) -> Tensor:
        return a if b is None else a + b

    assert torch.equal(call(model, X), X)
    assert torch.equal(call(model, (X, X)), 2 * X)
    assert torch.equal(call(model, {"a": X, "b": X}), 2 * X)


def test_accuracy_is_in_percent_a_sample() -> None:
    output = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert accuracy(output, torch.tensor([0, 1, 1])).tolist() == [100.0, 100.0, 0.0]


@pytest.mark.parametrize("sizes", [(10,), (3, 3, 4), (1, 9)])
@pytest.mark.parametrize("a_mean", [False, True])
def test_score_is_the_mean_over_samples_not_over_batches(
    sizes: tuple[int, ...], a_mean: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    batches = list(zip(X.split(sizes), Y.split(sizes), strict=True))

    def score(output: Tensor, target: Tensor) -> Tensor:
        each = accuracy(output, target)
        return each.mean() if a_mean else each

    expected = float((model(X).argmax(1) == Y).float().mean()) * 100
    assert evaluate(model, batches, score) == pytest.approx(expected, rel=1e-5)


def test_metric_objects_see_all_batches() -> None:
    class Count:
        def reset(self) -> None:
            self.seen = 0

        def update(self, output: Tensor, target: Tensor) -> None:
            self.seen += len(output)

        def compute(self) -> Tensor:
            return torch.tensor(self.seen)

    metric = Count()
    assert evaluate(nn.Linear(4, 3), [(X, Y)] * 3, metric) == 30
    assert evaluate(nn.Linear(4, 3), [(X, Y)], metric) == 10


def test_evaluation_puts_every_flag_back() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    model[1].eval()
    before = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, [(X, Y)], accuracy)
    with pytest.raises(KeyError), evaluation(model):
        raise KeyError
    assert [m.training for m in model.modules()] == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model(X).isnan().any()


def test_reading_nothing() -> None:
    with pytest.raises(EmptyData, match="my batches are empty"):
        list(read([], "my batches"))
    with pytest.raises(EmptyData, match="generator can be read only once"):
        list(read(iter([]), "my batches"))


def test_reading_is_lazy() -> None:
    def endless() -> Any:
        while True:
            yield X, Y

    assert next(read(endless(), "batches")).inputs is X


@pytest.mark.parametrize("item", [(X,), X, "xy", {"inputs": X}, None])
def test_batches_of_no_known_form(item: Any) -> None:
    with pytest.raises(InputError, match="should be"):
        as_batch(item)


def test_mismatch_tells_both_shapes() -> None:
    with pytest.raises(ModelMismatch, match="cannot take the task's inputs"):
        evaluate(nn.Linear(5, 3), [(X, Y)], accuracy)
    with pytest.raises(ModelMismatch, match=r"score .*\(10, 3\).*\(7,\)"):
        evaluate(nn.Linear(4, 3), [(X, Y[:7])], accuracy)


def test_example_inputs_are_one_sample() -> None:
    pair = [((X, {"mask": Y}), Y)]
    inputs = Task(pair, pair, None, nn.functional.cross_entropy, accuracy).example_inputs()
    assert inputs[0].shape == (1, 4)
    assert inputs[1]["mask"].shape == (1,)


def test_reported_figure_is_the_tests_where_there_is_one() -> None:
    task = Task([1], [2], [3], nn.functional.cross_entropy, accuracy)
    assert task.reported == [3]
    task.test = None
    assert task.reported == [2]


def test_moving_keeps_the_form() -> None:
    moved = move(Batch((X, {"a": Y}), None, "x"), torch.device("cpu"))
    assert torch.equal(moved.inputs[1]["a"], Y)
    assert (moved.target, moved.index) == (None, "x")


@pytest.mark.parametrize(
    ("batch", "size"),
    [(Batch(X, Y), 10), (Batch({"a": X}, Y), 10), (Batch("text", Y), 10), (Batch(1, 2), 1)],
)
def test_batch_size(batch: Batch, size: int) -> None:
    assert batch_size(batch) == size


def test_first_matching_pattern_wins() -> None:
    setting = {"conv1": 8, "conv*": 6, "fc": 5}
    found = [resolve(setting, name) for name in ("conv1", "conv2", "fc", "head")]  # type: ignore[arg-type]
    assert found == [8, 6, 5, None]
    assert resolve(3, "anything") == 3


def test_change_is_json_ready() -> None:
    change = Change("fc.weight", "nonzeros", 10, 5, "magnitude")
    assert change.as_dict() == {
        "where": "fc.weight", "what": "nonzeros", "before": 10, "after": 5,
        "method": "magnitude", "note": "",
    }  # fmt: skip
