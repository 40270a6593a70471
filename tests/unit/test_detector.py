"""Two-stage detectors: proposals, detections, draws and losses by hand, and the networks as a whole."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput.architectures.detector import Limits, detector
from lilliput.architectures.torchvision_detector import TorchvisionDetector
from lilliput.errors import InputError, ModelMismatch
from lilliput.mechanisms.boxes import anchor_grid, decode, encode, suppress
from lilliput.mechanisms.detection import (
    BETA,
    DEVIATION,
    Judged,
    Parts,
    Proposed,
    Sample,
    TwoStage,
    classification_loss,
    detection_loss,
    detections,
    draw_anchors,
    draw_proposals,
    of_class,
    promising,
    regression_loss,
    two_classes,
)
from lilliput.mechanisms.groups import find_groups
from lilliput.methods import Detection
from lilliput.tasks.voc import MeanAveragePrecision
from lilliput.testing import stand_in_for_torchvision
from lilliput.testing.networks import DETECTORS

SIZE = (64, 96)


def targets(*images: list[tuple[float, ...]]) -> Tensor:
    most = max(map(len, images))
    rows = [[*image, *[(0.0,) * 6] * (most - len(image))] for image in images]
    return torch.tensor(rows, dtype=torch.float32)


def small(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return detector(**{"width": 4, "sizes": (12, 24), "proposals": 20, "found": 10, **settings})


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def test_as_many_boxes_as_were_asked_for() -> None:
    """However few the defaults look at."""
    net = small(proposals=600)
    assert net.propose(torch.zeros(1, 3, 128, 160)).boxes.shape == (1, 600, 4)
    corners = torch.cartesian_prod(torch.arange(25.0), torch.arange(20.0)) * 4
    boxes = torch.cat([corners, corners + 3], 1)[None]
    logits = torch.tensor([0.0, 9.0]).expand(1, 500, 2)
    proposed = Proposed(None, boxes[0], torch.zeros(1, 500), torch.zeros(1, 500, 4), boxes)
    parts = Parts(proposed, Judged(logits, torch.zeros(1, 500, 1, 4)))
    assert (detections(parts, (100, 100), most=450)[0, :, 5] == 1).all()


def test_a_batch_without_boxes_or_without_detections_is_scored() -> None:
    metric, box = MeanAveragePrecision(classes=1), torch.tensor([[[0.0, 0.0, 8.0, 8.0, 1.0, 0.0]]])
    seen = torch.tensor([[[0.0, 0.0, 8.0, 8.0, 0.9, 1.0]]])
    metric.update(seen, box)
    metric.update(seen, torch.zeros(1, 0, 6))  # one in two detections is right, the first
    metric.update(torch.zeros(1, 0, 6), box)  # one in two boxes is found
    assert metric.compute() == 50.0


class TestProposals:
    anchors = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [40, 40, 60, 60], [80, 50, 120, 90]])

    def test_the_best_after_suppression(self) -> None:
        objectness = torch.tensor([[1.0, 3.0, 2.0, 0.0], [3.0, 1.0, 0.0, 2.0]])
        found = promising(self.anchors, objectness, torch.zeros(2, 4, 4), SIZE, before=4, after=3)
        corner = [80.0, 50, 96, 64]  # clipped
        assert found.tolist() == [
            [[1, 0, 11, 10], [40, 40, 60, 60], corner],
            [[0, 0, 10, 10], corner, [40, 40, 60, 60]],
        ]

    def test_suppressed_ones_fill_up(self) -> None:
        objectness = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
        found = promising(self.anchors, objectness, torch.zeros(1, 4, 4), SIZE, before=3, after=3)
        assert found[0].tolist() == [[1, 0, 11, 10], [40, 40, 60, 60], [0, 0, 10, 10]]

    def test_anchors_are_shifted_and_give_no_gradient(self) -> None:
        shifts = torch.zeros(1, 4, 4)
        shifts[..., 1] = 0.5
        objectness = torch.zeros(1, 4, requires_grad=True)
        found = promising(self.anchors[:1], objectness[:, :1], shifts[:, :1], SIZE, 9, 9)
        assert found.tolist() == [[[0, 5, 10, 15]]] and not found.requires_grad


def parts(boxes: Tensor, logits: Tensor, shifts: Tensor) -> Parts:
    return Parts(
        Proposed(None, boxes[0], torch.zeros(1), torch.zeros(1), boxes), Judged(logits, shifts)
    )


class TestDetections:
    def test_by_hand(self) -> None:
        """Two proposals see one object of class 2, a third sees nothing."""
        boxes = torch.tensor([[[0.0, 0, 20, 20], [2, 0, 22, 20], [50, 30, 70, 60]]])
        chances = torch.tensor([[[0.1, 0.005, 0.895], [0.2, 0.005, 0.795], [0.99, 0.004, 0.006]]])
        shifts = torch.zeros(1, 3, 2, 4)
        shifts[0, 0, 1, 0] = 1.0  # a tenth of its width to the right
        found = detections(parts(boxes, chances.log(), shifts), SIZE, most=4)
        torch.testing.assert_close(found[0, 0], torch.tensor([2.0, 0, 22, 20, 0.895, 2]))
        assert torch.equal(found[0, 1:], torch.zeros(3, 6))

    def test_classes_do_not_suppress_each_other(self) -> None:
        boxes = torch.tensor([[[0.0, 0, 20, 20]]])
        chances = torch.tensor([[[0.1, 0.4, 0.5]]])
        found = detections(parts(boxes, chances.log(), torch.zeros(1, 1, 2, 4)), SIZE, most=3)
        assert found[0, :, 5].tolist() == [2, 1, 0]
        torch.testing.assert_close(found[0, :, 4], torch.tensor([0.5, 0.4, 0.0]))

    def test_the_number_is_fixed(self) -> None:
        net = small().eval()
        with torch.no_grad():
            assert net(images(3)).shape == (3, 10, 6)
            assert net(torch.zeros(1, 3, 16, 16)).shape == (1, 10, 6)
            scores = net(images())[..., 4]
        assert torch.equal(scores, scores.sort(1, descending=True).values)


class TestDraws:
    def proposed(self, anchors: Tensor, batch: int = 1) -> Proposed:
        zeros = torch.zeros(batch, len(anchors))
        return Proposed(None, anchors, zeros, zeros[..., None].expand(-1, -1, 4), anchors[None])

    def test_anchors_by_their_overlap(self) -> None:
        """Object at 0.8, or as a box's best; background below 0.3; in between neither."""
        anchors = torch.tensor(
            [[0.0, 0, 10, 8], [0, 0, 10, 5], [0, 0, 10, 2], [60, 40, 70, 44], [90, 60, 95, 64]]
        )
        target = targets([(0, 0, 10, 10, 3, 0), (60, 40, 70, 50, 1, 0)])
        drawn = draw_anchors(self.proposed(anchors), target)
        assert drawn.rows.tolist() == [0, 2, 3, 4]
        assert drawn.classes.tolist() == [1, 0, 1, 0]
        wanted = encode(target[0, :2, :4], anchors[[0, 3]])
        torch.testing.assert_close(drawn.shifts[[0, 2]], wanted)
        assert torch.equal(drawn.shifts[[1, 3]], torch.zeros(2, 4))

    def test_proposals_get_the_class_of_their_box(self) -> None:
        boxes = torch.tensor([[[0.0, 0, 10, 6], [0, 0, 10, 4], [30, 30, 40, 40]]] * 2)
        target = targets([(0, 0, 10, 10, 3, 0)], [(31, 30, 41, 40, 2, 0), (0, 0, 10, 6, 1, 1)])
        drawn = draw_proposals(boxes, target, count=8, positive=0.5)
        assert drawn.rows.tolist() == list(range(6))
        assert drawn.classes.tolist() == [3, 0, 0, 0, 0, 2]  # a difficult box is nobody's
        wanted = encode(target[0, 0, :4], boxes[0, 0], DEVIATION)
        torch.testing.assert_close(drawn.shifts[0], wanted)
        assert torch.equal(drawn.of(boxes), boxes.view(6, 4))

    def test_no_more_than_asked_and_the_rest_is_background(self) -> None:
        anchors = anchor_grid(torch.tensor([[-8.0, -8, 8, 8]]), 10, 10, 8)
        boxes = (anchors[None] + 0.5).repeat(3, 1, 1)
        boxes[1] += 500.0
        boxes[2, 4:] += 500.0
        target = torch.cat(
            [anchors.repeat(3, 1, 1), torch.ones(3, 100, 1), torch.zeros(3, 100, 1)], 2
        )
        drawn = draw_proposals(boxes, target, count=20, positive=0.25)
        image = drawn.rows // 100
        assert [int((drawn.positive & (image == n)).sum()) for n in range(3)] == [5, 0, 4]
        assert image.bincount().tolist() == [5, 20, 20]

    def test_an_image_without_objects(self) -> None:
        boxes = torch.tensor([[[0.0, 0, 10, 10], [3, 3, 3, 3]]])
        drawn = draw_proposals(boxes, torch.zeros(1, 1, 6))
        assert drawn.classes.tolist() == [0, 0] and drawn.shifts.isfinite().all()

    def test_draws_are_random_and_seeded(self) -> None:
        anchors = anchor_grid(torch.tensor([[-8.0, -8, 8, 8]]), 10, 10, 8)

        def rows(seed: int) -> list[int]:
            generator = torch.Generator().manual_seed(seed)
            proposed, target = self.proposed(anchors), torch.zeros(1, 1, 6)
            return draw_anchors(proposed, target, count=10, generator=generator).rows.tolist()

        assert rows(1) == rows(1) != rows(2)
        assert len(rows(1)) == 10


class TestLosses:
    """Two boxes: one with an object of class 2, one background."""

    sample = Sample(
        rows=torch.tensor([0, 1]),
        classes=torch.tensor([2, 0]),
        shifts=torch.tensor([[1.0, 0, 0, 0.1], [0, 0, 0, 0]]),
    )

    def test_classes(self) -> None:
        chances = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]])
        found = classification_loss(chances.log(), self.sample)
        assert float(found) == pytest.approx(-(math.log(0.5) + math.log(0.7)) / 2)

    def test_boxes(self) -> None:
        shifts = torch.tensor([[3.0, 0.5, 0, 0.1], [9, 9, 9, 9]])
        # Errors 2 and 0.5: 2 - 1/2 and 0.5**2 / 2; background does not count, but divides.
        assert float(regression_loss(shifts, self.sample)) == pytest.approx((1.5 + 0.125) / 2)
        steep = (2 - BETA / 2 + 0.5 - BETA / 2) / 2
        assert float(regression_loss(shifts, self.sample, BETA)) == pytest.approx(steep)

    def test_shifts_of_the_class(self) -> None:
        shifts = torch.arange(24.0).view(2, 3, 4)
        assert of_class(shifts, torch.tensor([2, 0])).tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]

    def test_objectness_is_two_classes(self) -> None:
        logits = torch.tensor([0.3, -2.0])
        torch.testing.assert_close(two_classes(logits).softmax(-1)[:, 1], logits.sigmoid())

    def test_the_whole_is_the_sum_of_four(self) -> None:
        """No draw is left to chance: few anchors, few proposals."""
        torch.manual_seed(0)
        anchors = torch.tensor([[0.0, 0, 10, 10], [40, 40, 60, 60]])
        proposed = Proposed(
            None, anchors, torch.randn(1, 2), torch.randn(1, 2, 4), anchors[None].clone()
        )
        judged = Judged(torch.randn(1, 2, 4), torch.randn(1, 2, 3, 4))
        target = targets([(1, 0, 11, 10, 2, 0)])
        first = Sample(torch.arange(2), torch.tensor([1, 0]), torch.zeros(2, 4))
        first.shifts[0] = encode(target[0, 0, :4], anchors[0])
        second = Sample(
            torch.arange(2), torch.tensor([2, 0]), first.shifts / torch.tensor([0.1, 0.1, 0.2, 0.2])
        )
        wanted = (
            classification_loss(two_classes(proposed.objectness[0]), first)
            + regression_loss(proposed.shifts[0], first, BETA)
            + classification_loss(judged.logits[0], second)
            + regression_loss(judged.shifts[0, :, 1], second)
        )
        torch.testing.assert_close(detection_loss(Parts(proposed, judged), target), wanted)

    def test_without_any_box_it_is_finite(self) -> None:
        loss = detection_loss(small()(images()), torch.zeros(2, 1, 6))
        assert loss.isfinite()

    def test_what_is_no_output_of_a_detector_is_refused(self) -> None:
        net = small().eval()
        with pytest.raises(ModelMismatch, match="in eval mode"):
            detection_loss(net(images()), torch.zeros(2, 1, 6))  # type: ignore[arg-type]


class TestNetwork:
    target = targets([(0, 0, 24, 24, 1, 0), (50, 20, 62, 32, 3, 0)], [(30, 30, 60, 60, 2, 0)])

    def test_counts(self) -> None:
        convolutions = 9 * (3 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 2 * 64 * 64)
        first = 9 * 64 * 64 + 64 + 65 * 3 + 65 * 12
        second = (64 * 49 + 1) * 128 + 129 * 4 + 129 * 12
        whole = convolutions + 2 * (16 + 2 * 32 + 3 * 64) + first + second
        assert sum(p.numel() for p in detector().parameters()) == whole == 548_463

    def test_every_parameter_learns(self) -> None:
        net = small()
        torch.manual_seed(0)
        # An untrained network may propose nothing that is right; here a proposal is.
        output = net(images())
        near = torch.cat([self.target[:, :1, :4] + 1, output.proposed.boxes[:, 1:]], 1)
        output = Parts(output.proposed._replace(boxes=near), net.judge(output.proposed.maps, near))
        detection_loss(output, self.target).backward()
        assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]

    def test_equal_seeds_equal_losses(self) -> None:
        net = small(sizes=(8, 12, 24), ratios=(0.5, 1, 2))
        output = net(images())

        def loss(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return detection_loss(output, self.target)

        assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))

    def test_it_learns_to_find_squares(self) -> None:
        """Overfitted to two images, it finds what is there and nothing else."""
        net, x = small(width=8), images() / 10
        for number, image in enumerate(self.target):
            for x1, y1, x2, y2, label, _ in image[image[:, 4] > 0].int().tolist():
                x[number, label - 1, y1:y2, x1:x2] += 2
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            detection_loss(net(x), self.target).backward()
            optimizer.step()
        with torch.no_grad():
            found = net.eval()(x)
        metric = MeanAveragePrecision(classes=3)
        metric.update(found, self.target)
        assert metric.compute() == pytest.approx(100)

    def test_a_proposal_may_be_judged_alone(self) -> None:
        net = small().eval()
        proposed = net.propose(images())
        whole = net.judge(proposed.maps, proposed.boxes)
        alone = net.judge(proposed.maps, proposed.boxes[:, 3:4])
        torch.testing.assert_close(alone.logits, whole.logits[:, 3:4])

    def test_round_trip_of_the_file(self, tmp_path: Path) -> None:
        net = small(classes=5, ratios=(0.5, 1)).eval()
        lilliput.save(net, tmp_path / "net.safetensors")
        loaded = lilliput.load(tmp_path / "net.safetensors").eval()
        assert torch.equal(loaded(images()), net(images()))

    def test_thin_cuts_everything_but_the_outputs(self) -> None:
        net = small(width=16).eval()
        thinned = lilliput.thin(net, images(1))
        assert thinned.error is not None and thinned.error < 1e-5
        counts = [sum(p.numel() for p in m.parameters()) for m in (thinned.model, small(width=8))]
        assert counts[0] == counts[1]
        outputs = ("rpn.objectness", "rpn.shifts", "head.classes", "head.shifts")
        assert set(thinned.unprunable) == {f"{name}.weight dim 0" for name in outputs}
        assert all(thinned.unprunable.values())

    def test_channels_behind_the_cut_out_regions_are_found(self) -> None:
        groups = find_groups(small(), images(1)).groups
        (last,) = (
            g
            for g in groups
            if ("backbone.conv6.weight", 0) in {(m.tensor, m.dim) for m in g.members}
        )
        readers = {(m.tensor, m.dim): m.index.shape for m in last.members if m.role == "uses"}
        assert readers == {("rpn.conv.weight", 1): (16, 1), ("head.fc.weight", 1): (16, 49)}

    def test_16_bit_floats(self) -> None:
        net = small()
        with torch.autocast("cpu", torch.bfloat16):
            output = net(images())
            loss = detection_loss(output, self.target)
        assert output.proposed.boxes.dtype == torch.float32 and loss.isfinite()

    @pytest.mark.parametrize(
        "wrong", [{"width": 0}, {"sizes": ()}, {"ratios": (0,)}, {"classes": -1}]
    )
    def test_refuses(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="must be positive"):
            detector(**wrong)


# -- torchvision --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchvision() -> Any:
    """torchvision with its compiled operators written in plain torch, where it lacks them."""
    stand_in_for_torchvision()
    return pytest.importorskip("torchvision")


def plain_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    order = scores.argsort(descending=True)
    return order[suppress(boxes[order], iou_threshold)]


def plain_roi_align(
    maps: Tensor,
    boxes: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool = False,
) -> Tensor:
    """Box by box, from torchvision's own pure-Python code, uncompiled."""
    import sys

    own: Any = sys.modules["torchvision.ops.roi_align"]._roi_align.__wrapped__
    cells = (output_size[0], output_size[1])
    return own(maps, boxes, spatial_scale, *cells, sampling_ratio, aligned)


@pytest.fixture
def faster_rcnn(torchvision: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    import torchvision.models.detection as zoo
    from torchvision.models.detection import rpn
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign, poolers
    from torchvision.ops import boxes as operators

    monkeypatch.setattr(operators, "nms", plain_nms)
    monkeypatch.setattr(poolers, "roi_align", plain_roi_align)

    def build(classes: int = 3) -> nn.Module:
        torch.manual_seed(0)
        backbone: Any = nn.Sequential(
            nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()
        )
        backbone.out_channels = 8
        network: nn.Module = zoo.FasterRCNN(
            backbone,
            rpn_anchor_generator=rpn.AnchorGenerator(((12, 24),), ((1.0,),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
            box_head=TwoMLPHead(8 * 49, 16),
            box_predictor=FastRCNNPredictor(16, 1 + classes),
            min_size=SIZE[0], max_size=SIZE[1], image_mean=[0.0] * 3, image_std=[1.0] * 3,
            rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=12, box_score_thresh=0.0,
            box_detections_per_img=10,
        )  # fmt: skip
        nn.init.normal_(network.rpn.head.bbox_pred.weight, std=0.5)  # type: ignore[union-attr]
        nn.init.normal_(network.rpn.head.cls_logits.weight, std=0.5)  # type: ignore[union-attr]
        return network

    return build


def taught(teacher: nn.Module, pairs: dict[str, str], **settings: Any) -> lilliput.Stage:
    method = Detection(teacher=teacher, pairs=pairs, **settings)
    return lilliput.Stage(methods=[method], train=lilliput.Train(epochs=1))


class TestTorchvision:
    limits = Limits(before=50, proposals=12, found=10, least=0.0)

    def test_proposals_and_judgements_are_its_own(self, faster_rcnn: Callable[..., Any]) -> None:
        from torchvision.models.detection.image_list import ImageList

        network = faster_rcnn().eval()
        net, x = TorchvisionDetector(network, self.limits).eval(), images()
        listed = ImageList(x, [SIZE] * 2)
        with torch.no_grad():
            levels = {"0": network.backbone(x)}
            wanted, _ = network.rpn(listed, levels)
            proposed = net.propose(x)
            judged = net.judge(proposed.maps, torch.stack([w[:5] for w in wanted]))
            regions = network.roi_heads.box_roi_pool(levels, [w[:5] for w in wanted], [SIZE] * 2)
            logits, shifts = network.roi_heads.box_predictor(network.roi_heads.box_head(regions))
        for own, theirs in zip(proposed.boxes, wanted, strict=True):
            assert len(theirs) >= 5
            torch.testing.assert_close(own[: len(theirs)], theirs, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(judged.logits.flatten(0, 1), logits)
        torch.testing.assert_close(judged.shifts.flatten(0, 1), shifts.view(10, 4, 4)[:, 1:])

    def test_detections_are_its_own(self, faster_rcnn: Callable[..., Any]) -> None:
        network = faster_rcnn().eval()
        x = images()
        with torch.no_grad():
            wanted = network(list(x))
            found = TorchvisionDetector(network, self.limits).eval()(x)
        for own, theirs in zip(found, wanted, strict=True):
            # Its proposals are fewer where suppression leaves fewer: compare the most probable one.
            torch.testing.assert_close(own[0, 4], theirs["scores"][0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(own[0, :4], theirs["boxes"][0], rtol=1e-3, atol=1e-2)
            assert own[0, 5] == theirs["labels"][0]

    def test_it_trains_with_the_same_loss(self, faster_rcnn: Callable[..., Any]) -> None:
        net = TorchvisionDetector(faster_rcnn(), self.limits)
        assert isinstance(net, TwoStage)
        loss = detection_loss(net(images()), TestNetwork.target)
        loss.backward()
        assert loss.isfinite() and net.network.backbone[0].weight.grad.any()

    def test_it_teaches_lilliputs_own(self, faster_rcnn: Callable[..., Any]) -> None:
        """Its anchors are others: the second stage and the features are taught."""
        teacher = TorchvisionDetector(faster_rcnn(classes=2), self.limits)
        pairs, (tiny,) = {"backbone": "network.backbone"}, DETECTORS
        with pytest.raises(ModelMismatch, match="first_stage: false"):
            lilliput.compress(tiny.build(), tiny.task(), [taught(teacher, pairs)])
        stages = [taught(teacher, pairs, first_stage=False)]
        result = lilliput.compress(tiny.build(), tiny.task(), stages)
        metrics = json.loads((result.directory / "metrics.jsonl").read_text())
        assert {"loss/rcn_soft", "loss/rcn_bounded", "loss/hint"} <= set(metrics)

    def test_refuses_what_is_no_faster_rcnn(self, faster_rcnn: Callable[..., Any]) -> None:
        with pytest.raises(ModelMismatch, match=r"a Linear has no backbone, rpn\.head"):
            TorchvisionDetector(nn.Linear(2, 2))
        other = copy.deepcopy(faster_rcnn())
        other.roi_heads.box_coder.weights = (1.0,) * 4
        with pytest.raises(ModelMismatch, match=r"roi_heads\.box_coder has the weights"):
            TorchvisionDetector(other)


def test_decode_of_both_stages_is_the_parametrization_of_torchvision(torchvision: Any) -> None:
    from torchvision.models.detection._utils import BoxCoder

    torch.manual_seed(0)
    anchors = torch.rand(6, 4) * 20 + torch.tensor([0.0, 0, 30, 30])
    shifts = torch.randn(6, 4) * 0.3
    for weights, deviation in (((1.0,) * 4, (1.0, 1.0)), ((10.0, 10.0, 5.0, 5.0), DEVIATION)):
        theirs = BoxCoder(weights).decode_single(shifts, anchors)
        torch.testing.assert_close(decode(shifts, anchors, deviation), theirs)
