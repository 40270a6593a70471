"""Yim and others 2017: the flow of the solution procedure."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Train, compress
from lilliput.core.run import Run
from lilliput.core.types import Batch
from lilliput.errors import InputError, LilliputError, ModelMismatch
from lilliput.methods import FilterL1, Fsp
from lilliput.methods.distill.fsp import fsp_loss, fsp_matrix
from lilliput.testing import NETWORKS

CNN = NETWORKS[1]
PAIRS = ["1", "3", "5"]
FLOWS = [("1", "3"), ("3", "5")]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def images(*widths: int, seed: int = 0, stride: int = 2) -> nn.Sequential:
    """Three convolutions and a linear layer for 8x8 images; the second makes the map smaller."""
    torch.manual_seed(seed)
    a, b, c = widths
    return nn.Sequential(
        nn.Conv2d(1, a, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(a, b, 3, stride=stride, padding=1),
        nn.ReLU(),
        nn.Conv2d(b, c, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * c, 3),
    )


def prepared(method: Fsp, student: nn.Module, teacher: nn.Module, seed: int = 0) -> Run:
    run = Run(
        student, CNN.task(), seed=seed, earlier={"previous": lambda: teacher}, methods=[method]
    )
    method.attach(run)
    return run


def term_of(method: Fsp, run: Run, batch: Batch) -> Any:
    run.batch = replace(batch)  # each step has a batch of its own
    method.before_step(run)
    run.output = run.model(batch.inputs)
    return method.loss(run)["fsp"]


def matrix_by_hand(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """G of one sample with four loops."""
    (m, height, width), n = first.shape, len(second)
    g = np.zeros((m, n))
    for i, j, s, t in itertools.product(range(m), range(n), range(height), range(width)):
        g[i, j] += first[i, s, t] * second[j, s, t] / (height * width)
    return g


class TestMatrix:
    def test_by_hand(self) -> None:
        first, second = random(3, 4, 2, 5), random(3, 6, 2, 5, seed=1)
        found = fsp_matrix(first, second)
        for n in range(3):
            expected = matrix_by_hand(first[n].numpy(), second[n].numpy())
            np.testing.assert_allclose(found[n].numpy(), expected, atol=1e-12)

    @pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
    def test_sixteen_bits_do_not_overflow_nor_round(self, precision: torch.dtype) -> None:
        """1024 products of up to 400 are beyond float16; the matrix is that of the same numbers."""
        feature = (20 * torch.rand(2, 16, 32, 32)).to(precision)
        with torch.autocast("cpu", dtype=precision):
            found = fsp_matrix(feature, feature)
        torch.testing.assert_close(found, fsp_matrix(feature.float(), feature.float()))

    def test_one_matrix_a_sample(self) -> None:
        """Not one over the whole batch, which would be another loss."""
        first, second = random(2, 3, 4, 4), random(2, 5, 4, 4, seed=1)
        assert fsp_matrix(first, second).shape == (2, 3, 5)
        alone = torch.cat([fsp_matrix(first[n : n + 1], second[n : n + 1]) for n in range(2)])
        torch.testing.assert_close(fsp_matrix(first, second), alone)

    def test_the_larger_map_is_max_pooled(self) -> None:
        first, second = random(2, 3, 8, 8), random(2, 5, 4, 4, seed=1)
        pooled = F.max_pool2d(first, 2)
        torch.testing.assert_close(fsp_matrix(first, second), fsp_matrix(pooled, second))
        torch.testing.assert_close(
            fsp_matrix(second, first), fsp_matrix(first, second).transpose(1, 2)
        )

    def test_each_map_may_be_larger_in_one_direction(self) -> None:
        first, second = random(2, 3, 8, 2), random(2, 5, 4, 6, seed=1)
        expected = fsp_matrix(F.max_pool2d(first, (2, 1)), F.max_pool2d(second, (1, 3)))
        torch.testing.assert_close(fsp_matrix(first, second), expected)

    def test_vectors_have_one_position(self) -> None:
        first, second = random(2, 3), random(2, 5, seed=1)
        expected = first[:, :, None] * second[:, None, :]
        torch.testing.assert_close(fsp_matrix(first, second), expected)


class TestLoss:
    def test_is_a_sum_over_the_matrix_and_a_mean_over_the_batch(self) -> None:
        own, taught = random(4, 3, 5), random(4, 3, 5, seed=1)
        expected = sum(float(((own[n] - taught[n]) ** 2).sum()) for n in range(4)) / 4
        assert float(fsp_loss(own, taught)) == pytest.approx(expected)

    def test_the_whole_by_hand(self) -> None:
        """Two flows with lambdas, maps of other sizes in the teacher, and the weight beside."""
        student, teacher = images(3, 4, 5, seed=1), images(3, 4, 5, seed=2, stride=1)
        method = Fsp(pairs=PAIRS, flows=FLOWS, teacher="previous", lambdas=[0.5, 3.0], weight=2.0)
        batch = next(iter(CNN.task().train))
        term = term_of(method, prepared(method, student, teacher), batch)
        expected = 0.0
        with torch.no_grad():
            for n in range(len(batch.inputs)):
                for factor, (first, second) in zip((0.5, 3.0), ((2, 4), (4, 6)), strict=True):
                    g = []
                    for net in (student, teacher):
                        one, other = (
                            net[:first](batch.inputs[n : n + 1]),
                            net[:second](batch.inputs[n : n + 1]),
                        )
                        if one.shape[2:] != other.shape[2:]:
                            one = F.max_pool2d(one, 2)
                        g.append(matrix_by_hand(one[0].double().numpy(), other[0].double().numpy()))
                    expected += factor * float(((g[0] - g[1]) ** 2).sum())
        assert term.weight == 2.0
        assert term.value.item() == pytest.approx(expected / len(batch.inputs), rel=1e-4)

    def test_gradients_reach_what_lies_before_the_last_place_only(self) -> None:
        student = images(3, 4, 5, seed=1)
        method = Fsp(pairs=PAIRS, flows=FLOWS, teacher="previous")
        run = prepared(method, student, images(3, 4, 5, seed=2))
        term_of(method, run, next(iter(run.task.train))).value.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student[:6].parameters())
        assert student[8].weight.grad is None


class TestShuffle:
    def test_rows_and_columns_are_those_of_a_teacher_with_permuted_channels(self) -> None:
        student, teacher = images(3, 4, 5, seed=1), images(3, 4, 5, seed=2)
        method = Fsp(pairs=PAIRS, flows=FLOWS, teacher="previous", shuffle=True)
        run = prepared(method, student, teacher)
        batch = next(iter(run.task.train))
        value = term_of(method, run, batch).value
        assert term_of(method, run, batch).value.item() == value.item(), "the permutation is fixed"
        order = [method._order[place] for place in PAIRS]
        for permutation, channels in zip(order, (3, 4, 5), strict=True):
            assert permutation.sort().values.tolist() == list(range(channels))
        with torch.no_grad():  # the same function, with its channels in that order
            for layer, permutation in zip((teacher[0], teacher[2], teacher[4]), order, strict=True):
                layer.weight.copy_(layer.weight[permutation])  # type: ignore[operator,union-attr,index]
                layer.bias.copy_(layer.bias[permutation])  # type: ignore[operator,union-attr,index]
            for layer, permutation in zip((teacher[2], teacher[4]), order, strict=False):
                layer.weight.copy_(layer.weight[:, permutation])  # type: ignore[operator,union-attr,index]
        plain = Fsp(pairs=PAIRS, flows=FLOWS, teacher="previous")
        expected = term_of(plain, prepared(plain, student, teacher), batch).value
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_another_seed_is_another_permutation(self) -> None:
        def drawn(seed: int) -> list[int]:
            method = Fsp(pairs=["1", "5"], flows=[("1", "5")], teacher="previous", shuffle=True)
            prepared(method, images(8, 4, 8, seed=1), images(8, 4, 8, seed=2), seed)
            return [*method._order["1"].tolist(), *method._order["5"].tolist()]

        assert drawn(0) == drawn(0) != drawn(1)


class Labels:
    """A loss that counts how often labels were asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.asked += 1
        return F.cross_entropy(output, target)


def test_two_stages(tmp_path: Path) -> None:
    """The first learns the flow without labels and leaves the head alone; the second learns the task."""
    task, labels = CNN.task(), Labels()
    task.loss = labels
    student = images(6, 6, 6, seed=3)
    method = Fsp(pairs=PAIRS, flows=FLOWS, teacher="teacher")
    stages = [
        Stage(name="teacher", train=Train(epochs=10, lr=0.01)),
        Stage(name="flow", model=student, methods=[method], train=Train(epochs=10, lr=0.01)),
    ]
    result = compress(images(6, 6, 6), task, stages, directory=tmp_path)
    assert labels.asked == 40, "of the teacher's stage alone"
    assert torch.equal(result.model[8].weight, student[8].weight)  # type: ignore[index]
    assert not torch.equal(result.model[0].weight, student[0].weight)  # type: ignore[index]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.5 * lines[10]["loss"]
    whole = compress(images(6, 6, 6), task, [*stages, Stage(train=Train(epochs=15, lr=0.01))])
    assert whole.figures["score"] > result.figures["score"]


class TestBadInput:
    def refusal(self, method: Fsp, student: nn.Module, teacher: nn.Module) -> LilliputError:
        stage = Stage(model=student, methods=[method], train=Train(epochs=1))
        with pytest.raises(LilliputError) as caught:
            compress(teacher, CNN.task(), [stage])
        return caught.value

    def test_unequal_channels(self) -> None:
        method = Fsp(pairs=PAIRS, flows=FLOWS)
        error = self.refusal(method, images(3, 4, 5), images(3, 8, 5))
        assert isinstance(error, ModelMismatch)
        assert (
            "'3' of the student hands over (32, 4, 4, 4), '3' of the teacher (32, 8, 4, 4)"
            in str(error)
        )
        assert "without adapters" in str(error)

    def test_channels_that_are_cut_meanwhile(self) -> None:
        method = Fsp(pairs=PAIRS, flows=FLOWS)
        stage = Stage(methods=[method, FilterL1(keep=0.5, round_to=1)], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match="List fsp behind the method that cuts them"):
            compress(images(4, 4, 4), CNN.task(), [stage])

    def test_features_of_another_kind(self) -> None:
        method = Fsp(pairs=["embed", "encoder"], flows=[("embed", "encoder")])
        stage = Stage(methods=[method], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match="name places with maps"):
            compress(NETWORKS[2].build(), NETWORKS[2].task(), [stage])

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"flows": [("1", "4")]}, "flows name ['4'], which pairs do not have"),
            ({"flows": [("1", "3")]}, "no flow begins or ends at ['5']"),
            ({"flows": FLOWS, "lambdas": [1.0]}, "1 lambdas for 2 flows"),
            ({"flows": []}, "at least 1 item"),
        ],
    )
    def test_settings_that_do_not_fit(self, settings: dict[str, Any], told: str) -> None:
        with pytest.raises(InputError) as caught:
            Fsp(pairs=PAIRS, **settings)
        assert told in str(caught.value)

    def test_a_loop_of_ones_own_without_an_example(self) -> None:
        method = Fsp(pairs=PAIRS, flows=FLOWS)
        with pytest.raises(InputError, match=r"give attach\(\.\.\., example_inputs=\.\.\.\)"):
            lilliput.attach(images(3, 4, 5), method, steps=4)
