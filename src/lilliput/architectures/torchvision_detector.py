"""Faster R-CNN of torchvision, so that it answers like Lilliput's own detector.

Paper: Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks (Ren, He, Girshick, Sun;
NIPS 2015; arXiv 1506.01497)

What changes: images are taken as they come, all of one size, where torchvision's network would resize and
normalize them (the tasks ``voc`` and ``bccd`` normalize as its published weights want); proposals are the
best of all levels together, and their number is fixed; suppression is Lilliput's. Layers, anchors and
RoIAlign are torchvision's, so this works where its compiled operators do.

The surprising rule: its anchors sit at the corners of cells, those of Lilliput's detector at their centers.
To teach one with the other, set ``first_stage: false``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ModelMismatch
from ..mechanisms.detection import DEVIATION, Judged, Proposed
from .detector import Limits, TwoStageNetwork

_NEEDED = (
    "backbone",
    "rpn.head",
    "rpn.anchor_generator",
    "rpn.box_coder",
    "roi_heads.box_roi_pool",
    "roi_heads.box_head",
    "roi_heads.box_predictor",
    "roi_heads.box_coder",
)
#: What the second stage's shifts are multiplied by, in torchvision's words.
_WEIGHTS = (1 / DEVIATION[0],) * 2 + (1 / DEVIATION[1],) * 2


class TorchvisionDetector(TwoStageNetwork):
    """A two-stage detector of torchvision's kind.

    Args:
        network: a ``torchvision.models.detection.FasterRCNN``; it is used, not copied.
        limits: how many boxes it looks at.

    Raises:
        ModelMismatch: it lacks a part, or measures shifts in other units than usual.

    Example::

        network = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights="DEFAULT")
        Detection(teacher=TorchvisionDetector(network), pairs={"backbone": "network.backbone"},
                  first_stage=False)
    """

    def __init__(self, network: nn.Module, limits: Limits | None = None) -> None:
        super().__init__()
        _check(network)
        self.network: Any = network
        self.limits = limits or Limits()

    def propose(self, images: Tensor) -> Proposed:
        """The first stage, on images ``(batch, 3, height, width)``."""
        found = self.network.backbone(images)
        levels = {"0": found} if isinstance(found, Tensor) else dict(found)
        objectness, shifts = self.network.rpn.head(list(levels.values()))
        maps = _Levels(levels, (images.shape[2], images.shape[3]))
        return self._proposed(
            images,
            maps,
            self._anchors(images, levels),
            torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in objectness], 1),
            torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in shifts], 1),
        )

    def judge(self, maps: Any, boxes: Tensor) -> Judged:
        """The second stage, on any boxes ``(batch, boxes, 4)``."""
        heads = self.network.roi_heads
        sizes = [maps.size] * len(boxes)
        regions = heads.box_roi_pool(maps.levels, list(boxes), sizes)
        logits, shifts = heads.box_predictor(heads.box_head(regions))
        logits, shifts = (x.unflatten(0, boxes.shape[:2]) for x in (logits, shifts))
        return Judged(logits, shifts.unflatten(2, (-1, 4))[:, :, 1:])  # background is not shifted

    def _anchors(self, images: Tensor, levels: dict[str, Tensor]) -> Tensor:
        size = (images.shape[2], images.shape[3])
        one = SimpleNamespace(tensors=images[:1], image_sizes=[size])
        anchors: Tensor = self.network.rpn.anchor_generator(one, list(levels.values()))[0]
        return anchors


class _Levels(NamedTuple):
    """The maps of a pyramid, and the images' height and width."""

    levels: dict[str, Tensor]
    size: tuple[int, int]


def _check(network: nn.Module) -> None:
    missing = [name for name in _NEEDED if not _has(network, name)]
    if missing:
        raise ModelMismatch(
            f"TorchvisionDetector: a {type(network).__name__} has no {', '.join(missing)}. Give a FasterRCNN "
            "of torchvision.models.detection, or write propose() and judge() for your network."
        )
    for coder, usual in (("rpn", (1.0,) * 4), ("roi_heads", _WEIGHTS)):
        weights = tuple(_part(network, f"{coder}.box_coder").weights)
        if weights != usual:
            raise ModelMismatch(
                f"TorchvisionDetector: {coder}.box_coder has the weights {weights} instead of {usual}, so "
                "its shifts cannot be compared with other detectors'."
            )


def _part(network: Any, name: str) -> Any:
    for step in name.split("."):
        network = getattr(network, step)
    return network


def _has(network: nn.Module, name: str) -> bool:
    try:
        _part(network, name)
    except AttributeError:
        return False
    return True
