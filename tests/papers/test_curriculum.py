"""Hacohen, Weinshall 2019 and Bengio and others 2009: easy samples first."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train, compress
from lilliput.core.run import Run
from lilliput.core.task import accuracy
from lilliput.core.types import Batch
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, ModelMismatch
from lilliput.methods import Curriculum
from lilliput.methods.distill._easy_first import EasyFirst, one_pass, ranks_of
from lilliput.methods.distill.curriculum import in_order, losses, pace
from lilliput.tasks._arrays import ArrayBatches
from lilliput.testing.networks import NETWORKS

MLP = NETWORKS[0]


class Seen(Watcher):
    """The numbers and inputs of the samples of each step."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.numbers: list[list[int]] = []
        self.inputs: list[Tensor] = []
        self.stop = stop

    def step_done(self, run: Run) -> None:
        self.numbers.append(run.batch.index.tolist())
        self.inputs.append(run.batch.inputs)
        if self.stop == (run.stage, run.step):
            raise KeyboardInterrupt


# -- Pacing and order -----------------------------------------------------------------------------


def test_exponential_pacing_is_the_papers_formula() -> None:
    """g(t) = min(start * increase ** floor(t / length), 1), length such that the end falls on ``over``."""
    start, increase, steps = 0.04, 1.9, 1000
    jumps = next(k for k in range(99) if start * increase**k >= 1)
    length = 0.5 * steps / jumps
    for t in range(steps):
        expected = min(start * increase ** int(t / length + 1e-9), 1.0) if t < 500 else 1.0
        assert pace(t / steps, start, 0.5, "exponential", increase) == pytest.approx(expected)


@pytest.mark.parametrize("pacing", ["exponential", "step", "linear"])
def test_pacing_rises_from_the_start_to_all(pacing: Any) -> None:
    parts = [pace(t / 400, 0.2, 0.5, pacing, 1.5) for t in range(401)]
    assert parts[0] == 0.2
    assert parts == sorted(parts)
    assert parts[199] < 1.0 == parts[200] == parts[-1]
    assert [pace(p, 1.0, 0.5, pacing, 1.5) for p in (0.0, 0.3, 0.9)] == [1.0] * 3


def test_linear_and_step_by_hand() -> None:
    assert pace(0.25, 0.2, 0.5, "linear", 2.0) == pytest.approx(0.6)
    assert pace(0.49, 0.2, 0.5, "step", 2.0) == 0.2


def test_every_beginning_of_the_order_is_balanced() -> None:
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.rand(200, generator=generator)
    classes = (torch.arange(200) % 10 < 3).long()  # 30 and 70 %
    difficulty = difficulty + 5 * classes  # one class is harder than the other
    order = in_order(difficulty, classes)
    assert sorted(order.tolist()) == list(range(200))
    for count in (10, 50, 130, 200):
        assert abs(int(classes[order[:count]].sum()) - 0.3 * count) <= 1
    for one in (0, 1):
        inside = difficulty[order][classes[order] == one]
        assert torch.equal(inside, inside.sort().values), "by difficulty within the class"
    plain = in_order(difficulty, None)
    assert torch.equal(difficulty[plain], difficulty.sort().values)
    assert not classes[plain[:100]].any()


def test_losses_are_those_of_single_samples() -> None:
    network = MLP.build().eval()
    batch = next(iter(MLP.task().validation))
    expected = F.cross_entropy(network(batch.inputs), batch.target, reduction="none")
    torch.testing.assert_close(losses(network, batch, F.cross_entropy), expected.detach().double())

    def in_python(output: Tensor, target: Tensor) -> Tensor:
        """A loss that looks at numbers, which cannot be mapped over samples at once."""
        assert len(output) == 1
        return F.cross_entropy(output, torch.tensor([target.tolist()[0]]))

    torch.testing.assert_close(losses(network, batch, in_python), expected.detach().double())


# -- Batches --------------------------------------------------------------------------------------


def easy_first(part: float, samples: int = 20, size: int = 6) -> EasyFirst:
    """Sample n has the place n in the order."""
    x = torch.arange(float(samples))
    batches = ArrayBatches(x, x.long(), size, shuffle=True)
    sizes = [len(b.target) for b in batches]
    return EasyFirst(batches, sizes, lambda: ranks_of(torch.arange(samples)), lambda _: part)


def test_only_the_first_samples_appear_and_equally_often() -> None:
    source = easy_first(0.5)
    source.reshuffle(3)
    found = [batch.index.tolist() for batch in source]
    assert [len(batch) for batch in found] == [6, 6, 6, 2], "size and number are as before"
    flat = sorted(n for batch in found for n in batch)
    assert flat == sorted([*range(10), *range(10)])
    for batch in source:
        assert torch.equal(batch.inputs, batch.index.float())
        assert torch.equal(batch.target, batch.index)


def test_all_samples_are_the_batches_themselves() -> None:
    source = easy_first(1.0)
    for seed in (1, 2):
        source.reshuffle(seed)
        source.batches.reshuffle(seed)  # type: ignore[attr-defined]
        for ours, theirs in zip(source, list(source.batches), strict=True):
            assert torch.equal(ours.index, theirs.index)


def test_at_least_a_batch_is_shown() -> None:
    found = [batch.index.tolist() for batch in easy_first(0.01)]
    assert {n for batch in found for n in batch} == set(range(6))


def test_other_seeds_other_batches() -> None:
    source = easy_first(0.5)
    orders = []
    for seed in (1, 2, 1):
        source.reshuffle(seed)
        orders.append([batch.index.tolist() for batch in source])
    assert orders[0] == orders[2] != orders[1]


def test_trees_of_inputs_and_views_are_cut_along() -> None:
    x = torch.arange(8.0)
    batches = [
        Batch(
            {"a": x[n : n + 4], "b": (x[n : n + 4, None],)},
            None,
            torch.arange(n, n + 4),
            {"v": x[n : n + 4]},
        )
        for n in (0, 4)
    ]
    source = EasyFirst(
        batches, [4, 4], lambda: ranks_of(torch.tensor([7, 2, 5, 0, 1, 3, 4, 6])), lambda _: 0.5
    )
    for batch in source:
        assert sorted(batch.index.tolist()) == [0, 2, 5, 7]
        assert torch.equal(batch.inputs["a"], batch.index.float())
        assert torch.equal(batch.inputs["b"][0][:, 0], batch.index.float())
        assert torch.equal(batch.views["v"], batch.index.float())
        assert batch.target is None


def test_numbers_may_be_a_list() -> None:
    x = torch.arange(8.0)
    batches = [Batch(x[n : n + 4], None, list(range(n, n + 4))) for n in (0, 4)]
    for batch in EasyFirst(batches, [4, 4], lambda: ranks_of(torch.arange(8)), lambda _: 0.5):
        assert sorted(batch.index.tolist()) == [0, 1, 2, 3]
        assert torch.equal(batch.inputs, batch.index.float())


def test_samples_that_were_not_measured_come_last() -> None:
    x = torch.arange(10.0)
    batches = [Batch(x, None, torch.arange(10))]
    ranks = ranks_of(torch.arange(5))
    assert {
        n for b in EasyFirst(batches, [4], lambda: ranks, lambda _: 0.9) for n in b.index.tolist()
    } <= set(range(5))
    everything = [b.index.tolist() for b in EasyFirst(batches, [10], lambda: ranks, lambda _: 1.0)]
    assert sorted(everything[0]) == list(range(10))


class Drawing:
    """Batches that draw from all generators, an order and an augmentation."""

    def __iter__(self) -> Iterator[Batch]:
        for rows in torch.randperm(32).split(8):
            noise = torch.rand(1) + random.random() + float(np.random.rand())  # noqa: NPY002
            yield Batch(rows[:, None] + noise, rows, rows)


def test_what_batches_draw_does_not_depend_on_what_training_draws() -> None:
    """Else a resumed epoch, which draws its batches without the steps between them, would differ."""

    def read(disturbed: bool) -> list[Tensor]:
        source = EasyFirst(Drawing(), [8] * 4, lambda: ranks_of(torch.arange(32)), lambda _: 0.3)
        source.reshuffle(5)
        found = []
        for batch in source:
            found.append(batch.inputs)
            if disturbed:
                torch.rand(7), random.random(), np.random.rand()  # noqa: NPY002
        return found

    for one, other in zip(read(False), read(True), strict=True):
        assert torch.equal(one, other)


def test_generators_of_training_are_left_alone() -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    list(one_pass(Drawing(), seed=3))
    assert (torch.rand(1), random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_batches_of_other_samples_do_not_hang() -> None:
    batches = [Batch(torch.zeros(4), None, torch.arange(100, 104))]
    source = EasyFirst(batches, [4], lambda: ranks_of(torch.arange(8)), lambda _: 0.5)
    with pytest.raises(InputError, match="none of the batches holds one of the first samples"):
        next(iter(source))


# -- In a run -------------------------------------------------------------------------------------


def difficulty(teacher: nn.Module) -> Tensor:
    """Loss of each training sample of the tiny task, by number."""
    data: Any = MLP.task().train
    with torch.no_grad():
        return F.cross_entropy(teacher.eval()(data.inputs), data.target, reduction="none")


@pytest.mark.parametrize("order", ["easy", "hard", "random"])
def test_the_first_steps_see_the_first_samples_of_the_order(order: Any) -> None:
    teacher, seen = MLP.build(3), Seen()
    method = Curriculum(
        teacher=teacher, order=order, start=0.25, over=1.0, pacing="step", balanced=False
    )
    compress(
        MLP.build(), MLP.task(), [Stage(methods=[method], train=Train(epochs=2))], watchers=[seen]
    )
    shown = {n for batch in seen.numbers for n in batch}
    assert len(shown) == 32
    assert [len(batch) for batch in seen.numbers] == [32] * 8
    ranked = difficulty(teacher).argsort().tolist()
    if order == "random":
        assert shown != set(ranked[:32])
        assert shown != set(ranked[-32:])
    else:
        assert shown == set(ranked[:32] if order == "easy" else ranked[-32:])


def test_balanced_by_class() -> None:
    teacher, seen = MLP.build(3), Seen()
    method = Curriculum(teacher=teacher, start=0.5, over=1.0, pacing="step")
    compress(
        MLP.build(), MLP.task(), [Stage(methods=[method], train=Train(epochs=2))], watchers=[seen]
    )
    shown = torch.tensor(sorted({n for batch in seen.numbers for n in batch}))
    data: Any = MLP.task().train
    whole, part = (torch.bincount(t, minlength=3) for t in (data.target, data.target[shown]))
    assert (part - whole / 2).abs().max() <= 1


def test_own_loss_is_that_of_the_previous_stage() -> None:
    seen = Seen()
    train = Train(epochs=5, lr=0.01)
    method = Curriculum(start=0.25, over=1.0, pacing="step", balanced=False)
    stages = [Stage(train=train), Stage(methods=[method], train=Train(epochs=2))]
    compress(MLP.build(), MLP.task(), stages, watchers=[seen])
    network = compress(MLP.build(), MLP.task(), stages[:1]).model
    shown = {n for batch in seen.numbers[20:] for n in batch}
    assert shown == set(difficulty(network).argsort()[:32].tolist())


def test_from_all_samples_on_it_is_ordinary_training() -> None:
    """With start 1 the run is bit for bit the run without a curriculum."""
    task = lilliput.Task(
        ArrayBatches(torch.randn(50, 12), torch.arange(50) % 3, 16, shuffle=True),
        *[next(iter([list(MLP.task().validation)]))] * 2,
        F.cross_entropy,
        accuracy,
    )
    train = Train(epochs=3, lr=0.01)
    plain = compress(MLP.build(), task, [Stage(train=train)])
    method = Curriculum(start=1.0)
    paced = compress(MLP.build(), task, [Stage(methods=[method], train=train)])
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, paced.model.state_dict()[name])


@pytest.mark.parametrize("stop", [(1, 2), (1, 5), (1, 9)])
def test_resumed_is_undisturbed_whatever_the_batches_draw(
    tmp_path: Path, stop: tuple[int, int]
) -> None:
    """Inside of an epoch that reads its data several times, with dropout between the draws."""
    nets = MLP.build(), MLP.task()
    task = Task(Augmented(), nets[1].validation, nets[1].test, nets[1].loss, nets[1].score)
    train = Train(epochs=3, lr=0.01, checkpoint_minutes=1e-9)
    stages = [Stage(train=train), Stage(methods=[Curriculum(start=0.2, over=0.9)], train=train)]
    whole = compress(nets[0], task, stages, directory=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compress(nets[0], task, stages, directory=tmp_path / "cut", watchers=[Seen(stop)])
    again = compress(nets[0], task, stages, directory=tmp_path / "cut")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    for file in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


class Augmented:
    """The tiny task's batches with noise from torch's generator on each."""

    def __init__(self) -> None:
        self.inner = MLP.task().train

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.inner:
            yield Batch(
                batch.inputs + 0.1 * torch.randn_like(batch.inputs), batch.target, batch.index
            )


def test_the_part_that_is_shown_is_logged() -> None:
    method = Curriculum(start=0.25, over=1.0, pacing="linear")
    result = compress(MLP.build(), MLP.task(), [Stage(methods=[method], train=Train(epochs=2))])
    lines = [
        json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()
    ]
    parts = [0.25 + 0.75 * step / 8 for step in range(8)]
    assert lines[0]["curriculum/part"] == pytest.approx(sum(parts[:4]) / 4)
    assert lines[1]["curriculum/part"] == pytest.approx(sum(parts[4:]) / 4)
    assert lines[0]["step"] == 4, "as many steps as without"


def test_samples_need_numbers() -> None:
    task = MLP.task()
    task.train = [(b.inputs, b.target) for b in task.train]
    with pytest.raises(InputError, match="inputs, target, index"):
        compress(MLP.build(), task, [Stage(methods=[Curriculum()], train=Train(epochs=1))])


def test_balance_needs_classes() -> None:
    task = MLP.task()
    task.train = [Batch(b.inputs, F.one_hot(b.target, 3).float(), b.index) for b in task.train]
    stage = Stage(methods=[Curriculum()], train=Train(epochs=1))
    with pytest.raises(ModelMismatch, match="Set balanced to false"):
        compress(MLP.build(), task, [stage])
    stage = Stage(methods=[Curriculum(balanced=False)], train=Train(epochs=1))
    compress(MLP.build(), task, [stage])


@pytest.mark.parametrize(
    "settings",
    [{"start": 0.0}, {"start": 1.5}, {"over": 0.0}, {"increase": 1.0}, {"pacing": "cubic"}],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"Curriculum\.{next(iter(settings))}"):
        Curriculum(**settings)
