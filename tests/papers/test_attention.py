"""Zagoruyko & Komodakis 2017: attention transfer by activations and by gradients."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train, compress
from lilliput.core.method import Method
from lilliput.core.run import Run
from lilliput.core.schedule import Ramp
from lilliput.core.types import Batch
from lilliput.errors import InputError, LilliputError, ModelMismatch
from lilliput.methods import Attention, GradientAttention, SoftTargets
from lilliput.methods.distill.attention import (
    attention_loss,
    attention_map,
    input_gradient,
    mirrored,
)
from lilliput.testing import NETWORKS, make_batches

MLP, CNN, TRANSFORMER = NETWORKS
NAME = "gradient_attention"


def maps(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def flat_attention(feature: np.ndarray, power: float) -> np.ndarray:
    """Q of one sample, divided by its norm, with loops."""
    channels, height, width = feature.shape
    q = np.zeros(height * width)
    for c in range(channels):
        for s in range(height):
            for t in range(width):
                q[s * width + t] += abs(feature[c, s, t]) ** power
    return q / math.sqrt((q**2).sum())


def images(*widths: int, seed: int = 0) -> nn.Module:
    """Two convolutions and a linear layer for 8x8 images."""
    torch.manual_seed(seed)
    one, two = widths
    return nn.Sequential(
        nn.Conv2d(1, one, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(one, two, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * two, 3),
    )


def prepared(method: Method, student: nn.Module, teacher: nn.Module, task: Task) -> Run:
    run = Run(student, task, earlier={"previous": lambda: teacher}, methods=[method])
    method.attach(run)
    return run


def term_of(method: Method, run: Run, batch: Batch, name: str) -> Any:
    run.batch = batch
    method.before_step(run)
    run.output = run.model(batch.inputs)
    return method.loss(run)[name]


class TestActivations:
    @pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
    def test_the_papers_loss_by_hand(self, power: float) -> None:
        own, taught = maps(3, 4, 2, 5), maps(3, 7, 2, 5, seed=1)
        expected = 0.0
        for n in range(3):
            apart = flat_attention(own[n].numpy(), power) - flat_attention(taught[n].numpy(), power)
            expected += math.sqrt((apart**2).sum()) / 3
        pair = attention_map(own, power), attention_map(taught, power)
        assert float(attention_loss(*pair, "paper")) == pytest.approx(expected)

    def test_the_codes_loss_is_the_official_expression(self) -> None:
        own, taught = maps(3, 4, 2, 5), maps(3, 7, 2, 5, seed=1)

        def official(x: Tensor) -> Tensor:
            return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

        expected = (official(own) - official(taught)).pow(2).mean()
        found = attention_loss(attention_map(own), attention_map(taught), "code")
        torch.testing.assert_close(found, expected)

    def test_how_strongly_a_layer_is_active_does_not_matter(self) -> None:
        own, taught = attention_map(maps(3, 4, 4, 4)), attention_map(maps(3, 4, 4, 4, seed=1))
        for form in ("paper", "code"):
            value = attention_loss(own, taught, form)  # type: ignore[arg-type]
            torch.testing.assert_close(attention_loss(7 * own, 0.1 * taught, form), value)  # type: ignore[arg-type]

    def test_the_teachers_map_is_interpolated_to_the_students_size(self) -> None:
        """Bilinear by hand: from (a, b) to (a, 3a/4 + b/4, a/4 + 3b/4, b)."""
        a, b = 1.0, 5.0
        taught = torch.tensor([[[a, b]]], dtype=torch.float64)
        own = torch.tensor([[[a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, b]]]).double()
        assert float(attention_loss(own, taught, "paper")) == pytest.approx(0.0, abs=1e-9)
        assert float(attention_loss(taught, own, "paper")) > 0.01  # shrinking averages: other maps

    @pytest.mark.parametrize("form", ["paper", "code"])
    def test_no_gradient_is_undefined(self, form: Any) -> None:
        """Where a layer is dead, and where the maps are the same already."""
        for own in (torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)):
            own.requires_grad_(True)
            attention_loss(attention_map(own), torch.ones(2, 4, 4), form).backward()
            assert own.grad is not None and bool(own.grad.isfinite().all())

    @pytest.mark.parametrize(("form", "factor"), [("paper", 0.5), ("code", 1.0)])
    def test_the_sum_over_pairs_and_half_of_beta(self, form: Any, factor: float) -> None:
        student, teacher, task = images(3, 4, seed=1), images(5, 6, seed=2), CNN.task()
        batch = next(iter(task.train))
        method = Attention(pairs=["1", "3"], teacher="previous", form=form, beta=3.0)
        term = term_of(method, prepared(method, student, teacher, task), batch, "attention")
        assert term.weight == 3.0 * factor
        total = 0.0
        for depth in (2, 4):
            pair = [attention_map(net[:depth](batch.inputs)).detach() for net in (student, teacher)]  # type: ignore[index]
            total += float(attention_loss(pair[0], pair[1], form))
        assert term.value.item() == pytest.approx(total, rel=1e-5)

    def test_beta_moves_and_is_logged(self, tmp_path: Path) -> None:
        method = Attention(pairs=["2", "5"], beta=Ramp(start=8.0, end=0.0))
        stage = Stage(methods=[method], train=Train(epochs=2, lr=0.01))
        compress(CNN.build(), CNN.task(), [stage], directory=tmp_path)
        first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        # Four steps an epoch: the means of (8 - step) / 2.
        assert (first["weight/attention"], second["weight/attention"]) == (3.25, 1.25)

    def test_the_default_of_beta_belongs_to_the_form(self) -> None:
        assert Attention(pairs=["1"], form="code").weight == 1000.0
        assert Attention(pairs=["1"]).weight == 1.0
        assert Attention(pairs=["1"], form="code", beta=0.5).weight == 0.5

    def test_a_student_comes_to_look_where_its_teacher_looks(self, tmp_path: Path) -> None:
        def distance(beta: float) -> float:
            method = Attention(pairs=["1", "3"], beta=beta)
            stage = Stage(
                model=images(3, 4, seed=3), methods=[method], train=Train(epochs=15, lr=0.01)
            )
            student = compress(images(8, 8, seed=2), CNN.task(), [stage]).model
            x = torch.cat([b.inputs for b in CNN.task().validation])
            found = [attention_map(net[:2](x)) for net in (student, images(8, 8, seed=2))]  # type: ignore[index]
            return float(attention_loss(found[0].detach(), found[1].detach(), "paper"))

        assert distance(30.0) < 0.7 * distance(0.0)


class TestGradients:
    def test_the_loss_and_its_gradient_by_hand(self) -> None:
        """Of a linear classifier J = W^T (p - y), in closed form; its derivative by finite differences."""
        torch.manual_seed(0)
        student, teacher = (nn.Linear(5, 3).double() for _ in range(2))
        x, labels = maps(4, 5), torch.tensor([0, 2, 1, 2])
        task = Task([(x, labels)], [(x, labels)], None, F.cross_entropy, lilliput.accuracy)
        method = GradientAttention(teacher="previous", beta=3.0)
        run = prepared(method, student, teacher, task)

        def by_hand(weight: Tensor) -> float:
            total = 0.0
            for n in range(4):
                j = []
                for w, b in ((weight, student.bias), (teacher.weight, teacher.bias)):
                    p = torch.softmax(w @ x[n] + b, 0)
                    p = p - F.one_hot(labels[n], 3)
                    j.append(w.t() @ p)
                total += (j[0] - j[1]).norm().item() / 4
            return total

        term = term_of(method, run, Batch(x, labels), NAME)
        assert term.weight == 1.5
        assert term.value.item() == pytest.approx(by_hand(student.weight.detach()), rel=1e-6)
        term.value.backward()
        assert student.weight.grad is not None
        for place in ((0, 0), (1, 3), (2, 4)):
            step = torch.zeros(3, 5, dtype=torch.float64)
            step[place] = 1e-5
            weight = student.weight.detach()
            slope = (by_hand(weight + step) - by_hand(weight - step)) / 2e-5
            assert float(student.weight.grad[place]) == pytest.approx(slope, rel=1e-4)

    def test_a_sample_counts_alike_in_any_batch(self) -> None:
        net, (x, labels) = images(3, 4), (torch.randn(6, 1, 8, 8), torch.arange(6) % 3)

        def gradients(rows: slice) -> Tensor:
            leaf = x[rows].clone().requires_grad_()
            return input_gradient(F.cross_entropy(net(leaf), labels[rows]), leaf)

        alone = torch.cat([gradients(slice(n, n + 1)) for n in range(6)])
        torch.testing.assert_close(gradients(slice(0, 6)), alone)

    def test_symmetry_by_hand(self) -> None:
        student, task = images(3, 4), CNN.task()
        batch = next(iter(task.train))
        method = GradientAttention(symmetric=True)
        run = prepared(method, student, student, task)
        term = term_of(method, run, batch, NAME)

        def attention(x: Tensor) -> Tensor:
            leaf = x.clone().requires_grad_()
            loss = F.cross_entropy(student(leaf), batch.target, reduction="sum")
            return torch.autograd.grad(loss, leaf)[0]

        apart = attention(batch.inputs) - attention(batch.inputs.flip(3)).flip(3)
        assert term.value.item() == pytest.approx(
            float(apart.flatten(1).norm(dim=1).mean()), rel=1e-4
        )

    def test_both_sides_of_the_symmetry_are_differentiated(self) -> None:
        """Of a linear classifier in closed form, its derivative by finite differences."""
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Linear(6, 3, bias=False)).double()
        x, labels = maps(4, 1, 2, 3), torch.tensor([0, 2, 1, 2])
        task = Task([(x, labels)], [(x, labels)], None, F.cross_entropy, lilliput.accuracy)
        method = GradientAttention(symmetric=True)
        term = term_of(method, prepared(method, student, student, task), Batch(x, labels), NAME)

        def by_hand(weight: Tensor) -> float:
            total = 0.0
            for n in range(4):
                j = []
                for image in (x[n, 0], x[n, 0].flip(1)):
                    p = torch.softmax(weight @ image.flatten(), 0) - F.one_hot(labels[n], 3)
                    j.append((weight.t() @ p).view(2, 3))
                total += (j[0] - j[1].flip(1)).norm().item() / 4
            return total

        layer: Any = student[1]
        weight = layer.weight.detach().clone()
        assert term.value.item() == pytest.approx(by_hand(weight), rel=1e-6)
        term.value.backward()
        for place in ((0, 0), (1, 3), (2, 5)):
            step = torch.zeros(3, 6, dtype=torch.float64)
            step[place] = 1e-5
            slope = (by_hand(weight + step) - by_hand(weight - step)) / 2e-5
            assert float(layer.weight.grad[place]) == pytest.approx(slope, rel=1e-4)

    def test_a_symmetric_network_has_nothing_to_learn(self) -> None:
        net = images(3, 4)
        with torch.no_grad():
            for layer in (net[0], net[2]):  # type: ignore[index]
                layer.weight.copy_((layer.weight + layer.weight.flip(3)) / 2)
            net[2].stride = (1, 1)  # type: ignore[index]
            head = net[6].weight.view(3, 4, 2, 2)  # type: ignore[index]
            head.copy_((head + head.flip(3)) / 2)
        method, task = GradientAttention(symmetric=True), CNN.task()
        run = prepared(method, net, net, task)
        term = term_of(method, run, next(iter(task.train)), NAME)
        assert term.value.item() < 1e-6
        assert torch.equal(mirrored(torch.tensor([[[[1.0, 2.0]]]])), torch.tensor([[[[2.0, 1.0]]]]))

    def test_batch_normalization_counts_a_batch_once(self) -> None:
        stage = Stage(methods=[GradientAttention(symmetric=True)], train=Train(epochs=2, lr=0.01))
        result = compress(CNN.build(), CNN.task(), [stage])
        assert int(result.model[1].num_batches_tracked) == 8  # type: ignore[index]

    def test_the_students_gradients_come_near_the_teachers(self) -> None:
        def last(beta: float) -> float:
            method = GradientAttention(beta=beta)
            stage = Stage(
                model=images(4, 6, seed=3), methods=[method], train=Train(epochs=12, lr=0.01)
            )
            teacher = compress(
                images(8, 8, seed=2), CNN.task(), [Stage(train=Train(epochs=12, lr=0.01))]
            )
            student = compress(teacher.model, CNN.task(), [stage]).model
            distances = []
            for batch in CNN.task().train:
                found = []
                for net in (student, teacher.model):
                    leaf = batch.inputs.clone().requires_grad_()
                    found.append(input_gradient(F.cross_entropy(net(leaf), batch.target), leaf))
                distances.append(float((found[0] - found[1]).flatten(1).norm(dim=1).mean()))
            return sum(distances)

        assert last(20.0) < 0.8 * last(0.0)


class Peek(Method):
    """Notes what a batch and a run look like in ``loss``."""

    family = "quantize"
    changes_model = False
    seen: list[bool] = []  # noqa: RUF012

    def loss(self, run: Run) -> dict[str, Any]:
        type(self).seen.append(run.batch.inputs.requires_grad)
        return {}


def first_terms(methods: list[Method], task: Task | None = None) -> dict[str, float]:
    """The figures of an epoch of one step, before anything has moved."""
    task = task or CNN.task()
    batch = next(iter(make_batches(1, 8, 8)[1]))
    task.train = [batch]
    stages = [Stage(model=images(8, 8, seed=4), methods=methods, train=Train(epochs=1))]
    result = compress(images(8, 8), task, stages)
    line = (result.directory / "metrics.jsonl").read_text().splitlines()[-1]
    found: dict[str, float] = json.loads(line)
    return found


class TestTogether:
    """The second pass, the teacher's gradient and the leaf are invisible to the other methods."""

    def test_every_order_gives_every_term_its_own_value(self) -> None:
        methods = [
            Attention(pairs=["1", "3"]),
            GradientAttention(),
            GradientAttention(symmetric=True),
            SoftTargets(hard_weight=1.0),
        ]
        alone = {}
        for method in methods:
            name = method.method_name() + (" 2" if getattr(method, "symmetric", False) else "")
            alone[name] = first_terms([method])[f"loss/{method.method_name()}"]
        assert all(value > 1e-4 for value in alone.values())
        for order in (methods, [methods[n] for n in (2, 1, 0, 3)]):
            found = first_terms(list(order))
            swap = order is not methods
            for name, value in alone.items():
                other = {"gradient_attention": "gradient_attention 2"}
                other |= {v: k for k, v in other.items()}
                shown = other.get(name, name) if swap else name
                assert found[f"loss/{shown}"] == pytest.approx(value, rel=1e-5), name

    def test_the_teachers_features_carry_no_gradient(self) -> None:
        """Its gradient is taken in a pass of its own, which nobody's taps see."""
        carried = []

        class Look(Attention):
            def features(self, run: Run) -> list[tuple[Tensor, Tensor]]:
                found = super().features(run)
                carried.append([feature.requires_grad for pair in found for feature in pair])
                return found

        cached_first = [SoftTargets(hard_weight=1.0), GradientAttention(), Look(pairs=["1"])]
        stage = Stage(methods=cached_first, train=Train(epochs=1))
        compress(images(3, 4), CNN.task(), [stage])
        assert carried == [[True, False]] * 4

    def test_a_batch_stays_without_a_gradient_and_a_cache_works(self, tmp_path: Path) -> None:
        Peek.seen = []
        task = CNN.task()
        cached = SoftTargets(cache=str(tmp_path / "teacher.f16"), hard_weight=1.0)
        stage = Stage(methods=[GradientAttention(), Peek(), cached], train=Train(epochs=1))
        compress(CNN.build(), task, [stage])
        assert Peek.seen == [False] * 4

    def test_copies_have_no_leaf_and_removal_leaves_no_hook(self) -> None:
        net, task = images(3, 4), CNN.task()
        method = GradientAttention(teacher="previous")
        run = prepared(method, net, images(5, 6), task)
        run.batch = next(iter(task.train))
        method.before_step(run)
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        seen = []
        for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
            other[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].requires_grad))
            torch.testing.assert_close(other(run.batch.inputs), net(run.batch.inputs))
        assert seen == [False, False]
        run.output = net(run.batch.inputs)
        method.loss(run)
        assert method.finish(run) == []
        assert not net._forward_pre_hooks

    def test_in_a_loop_of_ones_own(self) -> None:
        torch.manual_seed(0)
        net, task = images(4, 6, seed=3), CNN.task()
        attached = lilliput.attach(
            net, GradientAttention(teacher=images(8, 8)), steps=12, task=task
        )
        optimizer = torch.optim.Adam(attached.parameters(), lr=0.01)
        values = []
        for batch in [b for _ in range(3) for b in task.train]:
            attached.batch(batch.inputs, batch.target)
            output = net(batch.inputs)
            loss = attached.loss(F.cross_entropy(output, batch.target), output)
            optimizer.zero_grad()
            loss.backward()
            attached.after_backward()
            optimizer.step()
            attached.after_step()
            values.append(float(loss.detach()))
            assert not batch.inputs.requires_grad
        assert attached.finish() == [] and sum(values[-4:]) < sum(values[:4])


def refusal(student: nn.Module, method: Method, task: Task) -> LilliputError:
    with pytest.raises(LilliputError) as caught:
        compress(student, task, [Stage(methods=[method], train=Train(epochs=1))])
    return caught.value


class TestBadInput:
    def test_a_feature_without_positions(self) -> None:
        error = refusal(MLP.build(), Attention(pairs=["1"]), MLP.task())
        assert isinstance(error, ModelMismatch) and "no positions to look at" in str(error)

    def test_what_cannot_be_mirrored(self) -> None:
        error = refusal(MLP.build(), GradientAttention(symmetric=True), MLP.task())
        assert "(32, 12) cannot be mirrored" in str(error)

    def test_symmetric_attention_has_no_teacher(self) -> None:
        with pytest.raises(InputError, match="leave teacher and view out"):
            GradientAttention(symmetric=True, teacher="previous")

    def test_an_ensemble(self) -> None:
        teachers = [images(3, 4), images(3, 4)]
        error = refusal(CNN.build(), GradientAttention(teacher=teachers), CNN.task())
        assert "name one teacher" in str(error)

    def test_inputs_that_are_not_numbers(self) -> None:
        words = [(torch.randint(5, (4, 7)), torch.zeros(4, dtype=torch.long))]
        net = nn.Sequential(nn.Embedding(5, 8), nn.Flatten(), nn.Linear(56, 3))
        task = Task(words, words, None, F.cross_entropy, lilliput.accuracy)
        error = refusal(net, GradientAttention(), task)
        assert "one tensor of floats, not torch.int64" in str(error)

    def test_what_cannot_be_differentiated_twice(self) -> None:
        net = TRANSFORMER.build()
        error = refusal(net, GradientAttention(), TRANSFORMER.task())
        assert "Fused attention is a usual reason" in str(error)
        torch.backends.cuda.enable_flash_sdp(False)
        try:
            stage = Stage(methods=[GradientAttention()], train=Train(epochs=1))
            compress(net, TRANSFORMER.task(), [stage])
        finally:
            torch.backends.cuda.enable_flash_sdp(True)

    def test_a_view_of_another_shape(self) -> None:
        task = CNN.task()
        task.train = [
            Batch(b.inputs, b.target, None, {"large": b.inputs.repeat(1, 1, 2, 2)})
            for b in task.train
        ]
        error = refusal(CNN.build(), GradientAttention(view="large"), task)
        assert "their gradients cannot be compared" in str(error)

    def test_a_network_that_is_not_called(self) -> None:
        method, task = GradientAttention(teacher="previous"), CNN.task()
        run = prepared(method, images(3, 4), images(3, 4), task)
        run.batch = next(iter(task.train))
        method.before_step(run)
        run.output = torch.zeros(32, 3)
        with pytest.raises(ModelMismatch, match="was not called"):
            method.loss(run)
