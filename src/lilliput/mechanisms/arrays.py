"""Tensors as the arrays that a file holds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..artifact import BFloat16


def to_numpy(tensor: Tensor) -> np.ndarray | BFloat16:
    """The values of a tensor; every zero is 0.0.

    A negative weight times a mask's zero is -0.0, which codecs would have to store as a value of its own:
    that would be half of a pruned file.

    Example:
        >>> to_numpy(torch.tensor([-1.0, 2.0]) * torch.tensor([0.0, 1.0]))
        array([0., 2.], dtype=float32)
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point():
        tensor = tensor + 0.0
    if tensor.dtype == torch.bfloat16:
        return BFloat16(tensor.view(torch.int16).numpy().view(np.uint16))
    return tensor.numpy()
