"""Chen 2017: weighted soft classes, boxes bounded by the teacher, hints, and whose proposals are judged."""

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
from lilliput import Stage, Train
from lilliput.architectures.detector import Detector, detector
from lilliput.core.digests import weights_digest
from lilliput.core.method import Method
from lilliput.core.run import Run
from lilliput.core.task import Task
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, ModelMismatch, UnknownName
from lilliput.mechanisms.detection import (
    BETA,
    Judged,
    Parts,
    Sample,
    classification_loss,
    draw_anchors,
    draw_proposals,
    of_class,
    regression_loss,
    two_classes,
)
from lilliput.methods import Detection, Gradual
from lilliput.methods.distill.detection import bounded_loss, hint_loss, soft_loss
from lilliput.testing import NETWORKS
from lilliput.testing.networks import DETECTORS

(TINY,) = DETECTORS


def wide(**settings: Any) -> nn.Module:
    torch.manual_seed(5)
    own = {"width": 6, "classes": 2, "sizes": (8, 14), "proposals": 24, "found": 8}
    return detector(**{**own, **settings})


class TestSoftClasses:
    own = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])
    taught = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.1, 0.8]])

    def test_by_hand(self) -> None:
        """Two boxes; background counts one and a half times."""
        wanted = 0.0
        for p, q in zip(self.own.tolist(), self.taught.tolist(), strict=True):
            wanted -= 1.5 * q[0] * math.log(p[0]) + q[1] * math.log(p[1]) + q[2] * math.log(p[2])
        assert float(soft_loss(self.own.log(), self.taught.log())) == pytest.approx(wanted / 2)

    def test_without_the_weight_it_is_the_cross_entropy(self) -> None:
        found = soft_loss(self.own.log(), self.taught.log(), background=1.0)
        torch.testing.assert_close(found, F.cross_entropy(self.own.log(), self.taught))

    def test_the_weight_is_on_the_teachers_probability_of_background(self) -> None:
        """A teacher that is sure of an object does not notice it."""
        sure = torch.tensor([[-1e4, 0.0, 1.0]])
        one, two = (soft_loss(self.own[:1].log(), sure, background=w) for w in (1.0, 9.0))
        assert torch.equal(one, two)

    def test_temperature_softens_both(self) -> None:
        found = soft_loss(self.own.log(), self.taught.log(), 1.0, temperature=2.0)
        p, q = ((x.sqrt() / x.sqrt().sum(1, keepdim=True)) for x in (self.own, self.taught))
        torch.testing.assert_close(found, -(q * p.log()).sum() / 2)

    def test_no_box_no_loss(self) -> None:
        assert float(soft_loss(torch.zeros(0, 3), torch.zeros(0, 3))) == 0.0


class TestBoundedBoxes:
    sample = Sample(torch.arange(2), torch.tensor([1, 0]), torch.zeros(2, 4))

    def loss(self, own: float, taught: float, margin: float) -> tuple[float, Tensor]:
        """Of one box with an error of ``own``, a teacher with ``taught``, and a box of background."""
        shifts = torch.tensor([[own, 0.0, 0, 0], [3.0, 3, 3, 3]], requires_grad=True)
        teacher = torch.tensor([[0.0, taught, 0, 0], [0.0, 0, 0, 0]])
        loss = bounded_loss(shifts, teacher, self.sample, margin)
        loss.backward()
        assert shifts.grad is not None
        return float(loss.detach()), shifts.grad

    def test_a_student_that_is_worse_pays_its_error_to_the_truth(self) -> None:
        value, gradient = self.loss(own=2.0, taught=1.0, margin=0.0)
        assert value == 4.0 / 2  # of two boxes that were drawn
        assert gradient.tolist() == [[2.0, 0, 0, 0], [0, 0, 0, 0]]

    def test_a_student_that_is_better_by_less_than_the_margin_still_pays(self) -> None:
        assert self.loss(own=1.0, taught=2.0, margin=3.5)[0] == 1.0 / 2

    def test_a_student_that_is_better_by_the_margin_is_left_alone(self) -> None:
        for margin in (0.0, 3.0):
            value, gradient = self.loss(own=1.0, taught=2.0, margin=margin)
            assert value == 0.0 and not gradient.any()

    def test_the_teacher_is_no_target(self) -> None:
        """Where it bounds, the gradient leads to the truth, wherever the teacher's box is."""
        one, other = (self.loss(own=2.0, taught=t, margin=0.0)[1] for t in (0.5, -1.5))
        assert torch.equal(one, other)


def test_hint_is_the_mean_squared_distance() -> None:
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(hint_loss(a, b), ((a - b) ** 2).sum() / a.numel())


def stage(method: Method, **settings: Any) -> Stage:
    return Stage(methods=[method], train=Train(epochs=1, lr=1e-3, **settings))


def first_metrics(method: Method) -> dict[str, float]:
    result = lilliput.compress(TINY.build(), one_batch(), [stage(method)])
    metrics: dict[str, float] = json.loads((result.directory / "metrics.jsonl").read_text())
    return metrics


def one_batch() -> Task:
    task = TINY.task()
    task.train = [next(iter(task.validation))]
    return task


class Keep(Watcher):
    """Keeps what the first step saw."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.extras: dict[str, nn.Module] = {}

    def step_done(self, run: Run) -> None:
        self.run, self.extras = run, dict(run.extras)


class TestEquationOne:
    def test_weights_of_the_terms(self) -> None:
        found = first_metrics(
            Detection(
                teacher=wide(),
                hard_weight=0.2,
                regression_weight=3.0,
                bounded_weight=0.25,
                hint_weight=0.75,
            )
        )
        weights = {
            k.removeprefix("weight/"): v for k, v in found.items() if k.startswith("weight/")
        }
        assert weights == pytest.approx(
            {f"{part}_{name}": w for part in ("rpn", "rcn") for name, w in
             {"hard": 0.2, "soft": 0.8, "boxes": 3.0, "bounded": 0.75}.items()} | {"hint": 0.75}
        )  # fmt: skip
        terms = [v for k, v in found.items() if k.startswith("loss/")]
        assert len(terms) == 9  # and no loss of the task's own
        assert found["loss"] == pytest.approx(sum(terms), rel=1e-5)

    def test_the_papers_weights_are_the_defaults(self) -> None:
        method = Detection()
        assert (method.hard_weight, method.bounded_weight, method.hint_weight) == (0.5, 0.5, 0.5)
        assert (method.regression_weight, method.background_weight) == (1.0, 1.5)
        assert (method.temperature, method.margin) == (1.0, 0.0)

    def test_the_terms_are_those_of_the_boxes_drawn(self) -> None:
        """Computed anew from outputs and draws, outside of the method."""
        teacher, student, batch = wide().eval(), TINY.build().train(), next(iter(TINY.task().train))
        method = Detection(teacher=teacher, pairs=["backbone"], hint_weight=0.0)
        attached = lilliput.attach(student, method, steps=1, task=one_batch(), seed=3)
        attached.batch(batch.inputs, batch.target)
        output = student(batch.inputs)
        torch.manual_seed(11)
        whole = attached.loss(torch.tensor(7.0), output)
        torch.manual_seed(11)
        anchors = draw_anchors(output.proposed, batch.target)
        regions = draw_proposals(output.proposed.boxes, batch.target)
        with torch.no_grad():
            taught = teacher.propose(batch.inputs)
            judged = teacher.judge(taught.maps, output.proposed.boxes)

        def part(
            logits: Tensor, told: Tensor, shifts: Tensor, meant: Tensor, drawn: Sample, beta: float
        ) -> Tensor:
            return (
                0.5 * classification_loss(logits, drawn) + 0.5 * soft_loss(logits, told)
                + regression_loss(shifts, drawn, beta) + 0.5 * bounded_loss(shifts, meant, drawn)
            )  # fmt: skip

        first = part(
            *(two_classes(anchors.of(p.objectness)) for p in (output.proposed, taught)),
            *(anchors.of(p.shifts) for p in (output.proposed, taught)),
            anchors, BETA,
        )  # fmt: skip
        second = part(
            *(regions.of(j.logits) for j in (output.judged, judged)),
            *(of_class(regions.of(j.shifts), regions.classes) for j in (output.judged, judged)),
            regions, 1.0,
        )  # fmt: skip
        torch.testing.assert_close(whole, first + second)
        attached.finish()


class Spy(Detector):
    """A detector that remembers which boxes it judged, and on which maps."""

    judged: list[tuple[Tensor, Tensor]]

    def judge(self, maps: Tensor, boxes: Tensor) -> Judged:
        self.judged.append((maps, boxes))
        return super().judge(maps, boxes)


class TestTeacher:
    def test_judges_the_students_proposals_on_its_own_maps(self) -> None:
        teacher, student = wide(), TINY.build().train()
        teacher.__class__, teacher.judged = Spy, []
        batch = next(iter(TINY.task().train))
        method = Detection(teacher=teacher)
        attached = lilliput.attach(student, method, steps=1, task=one_batch())
        attached.batch(batch.inputs, batch.target)
        output: Parts = student(batch.inputs)
        own: Any = attached.run.methods[0]._teacher.networks[0]
        own.judged.clear()
        attached.loss(torch.zeros(()), output).backward()
        ((maps, boxes),) = own.judged
        assert boxes.shape == (8, 16, 4) and torch.equal(boxes, output.proposed.boxes)
        with torch.no_grad():
            assert torch.equal(maps, own.backbone(batch.inputs))
            mine = own.propose(batch.inputs).boxes
        assert mine.shape == (8, 24, 4)  # other boxes, and other in number
        assert maps.shape[1] == 24 and not maps.requires_grad
        attached.finish()

    def test_stays_what_it_is(self) -> None:
        teacher = wide().train()
        before = weights_digest(teacher)
        lilliput.compress(TINY.build(), TINY.task(), [stage(Detection(teacher=teacher))])
        assert weights_digest(teacher) == before and teacher.training

    def test_makes_the_student_agree_with_it(self) -> None:
        """With no weight on the true classes the student's classes come near to the teacher's."""
        task, student = TINY.task(), TINY.build()
        taught = lilliput.compress(wide(), task, [Stage(train=Train(epochs=10, lr=5e-3))])
        teacher = taught.model.eval()
        method = Detection(teacher=teacher, hard_weight=0.0, background_weight=1.0)
        result = lilliput.compress(
            student, task, [Stage(methods=[method], train=Train(epochs=10, lr=5e-3))]
        )
        x = next(iter(task.validation)).inputs

        def distance(network: Any) -> float:
            network = network.eval()
            with torch.no_grad():
                maps, *_, boxes = network.propose(x)
                told = teacher.judge(teacher.propose(x).maps, boxes).logits.log_softmax(-1)
                own = network.judge(maps, boxes).logits.log_softmax(-1)
            return float(F.kl_div(own, told, reduction="sum", log_target=True)) / len(x)

        assert distance(result.model) < 0.3 * distance(student)


class TestHint:
    def test_adapts_by_a_1x1_convolution_even_where_shapes_agree(self) -> None:
        keep = Keep()
        stages = [stage(Detection(teacher="original"))]
        result = lilliput.compress(TINY.build(), TINY.task(), stages, watchers=[keep])
        (adapter,) = keep.extras.values()
        assert isinstance(adapter, nn.Conv2d)
        assert adapter.weight.shape == (16, 16, 1, 1)
        assert set(result.model.state_dict()) == set(TINY.build().state_dict())

    def test_a_moving_weight_and_none(self) -> None:
        moving = first_metrics(Detection(teacher=wide(), hint_weight={"start": 2, "end": 0}))
        assert moving["weight/hint"] == 2.0
        none = first_metrics(Detection(teacher=wide(), hint_weight=0))
        assert "loss/hint" not in none

    def test_channels_that_are_cut_beneath_it_are_told(self) -> None:
        from lilliput.methods import FilterL1

        stages = [
            Stage(methods=[Detection(), FilterL1(keep=0.5, round_to=1)], train=Train(epochs=1))
        ]
        with pytest.raises(ModelMismatch, match="List detection behind the method"):
            lilliput.compress(TINY.build(), TINY.task(), stages)


class TestRefusals:
    @pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
    def test_classifiers(self, network: Any) -> None:
        with pytest.raises(ModelMismatch, match=r"the student.*is no two-stage detector"):
            lilliput.compress(network.build(), network.task(), [stage(Detection())])

    def test_a_teacher_that_is_a_classifier(self) -> None:
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
        method = Detection(teacher=teacher, pairs={"backbone": "1"})
        with pytest.raises(ModelMismatch, match="the teacher, a Sequential, is no two-stage"):
            lilliput.compress(TINY.build(), TINY.task(), [stage(method)])

    def test_other_classes(self) -> None:
        with pytest.raises(ModelMismatch, match="the teacher knows 5 classes, the student 2"):
            lilliput.compress(
                TINY.build(), TINY.task(), [stage(Detection(teacher=wide(classes=5)))]
            )

    def test_other_anchors_unless_the_first_stage_is_left_out(self) -> None:
        for other in ({"sizes": (8, 15)}, {"ratios": (1, 2)}):
            with pytest.raises(ModelMismatch, match="first_stage: false"):
                lilliput.compress(
                    TINY.build(), TINY.task(), [stage(Detection(teacher=wide(**other)))]
                )
        found = first_metrics(Detection(teacher=wide(sizes=(8, 15)), first_stage=False))
        assert found["weight/rpn_hard"] == 1.0
        assert "loss/rpn_soft" not in found and "loss/rcn_soft" in found

    def test_an_ensemble_and_an_unknown_place(self) -> None:
        with pytest.raises(InputError, match="name one teacher"):
            lilliput.compress(
                TINY.build(), TINY.task(), [stage(Detection(teacher=[wide(), wide()]))]
            )
        with pytest.raises(UnknownName, match="Did you mean 'backbone'"):
            lilliput.compress(TINY.build(), TINY.task(), [stage(Detection(pairs=["backbon"]))])


def test_together_with_pruning_and_a_chain_of_stages(tmp_path: Path) -> None:
    """A dense teacher, then a sparse student of another width, from a file and back."""
    stages = [
        Stage(name="teacher", train=Train(epochs=1)),
        Stage(
            methods=[Gradual(sparsity=0.5), Detection(teacher="teacher")],
            model=TINY.build(seed=3),
            train=Train(epochs=2),
        ),
    ]
    result = lilliput.compress(wide(), TINY.task(), stages, directory=tmp_path)
    loaded = lilliput.load(result.artifact).eval()
    x = next(iter(TINY.task().validation)).inputs
    assert torch.equal(loaded(x), result.model.eval()(x))
    assert float((loaded.backbone.conv6.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
