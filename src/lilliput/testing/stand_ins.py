"""What a machine may lack that the tests can do without."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_BOXES = "Tensor dets, Tensor scores, float iou_threshold"
_POOLED = "int pooled_height, int pooled_width, int sampling_ratio, bool aligned"
_SCHEMAS = (
    f"nms({_BOXES}) -> Tensor",
    f"qnms({_BOXES}) -> Tensor",
    f"roi_align(Tensor input, Tensor rois, float spatial_scale, {_POOLED}) -> Tensor",
)
_declared: list[torch.library.Library] = []


def stand_in_for_torchvision() -> None:
    """Declare torchvision's compiled operators where its binary does not fit this torch.

    Call it before torchvision, or a package that imports it, is imported. Its networks then can be built
    and run, except for those that call one of these operators. Where they work, nothing happens.
    """
    if _declared:
        return
    place = importlib.util.find_spec("torchvision")
    binary = Path(place.origin).with_name("_C.so") if place and place.origin else Path()
    try:
        torch.ops.load_library(str(binary))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
