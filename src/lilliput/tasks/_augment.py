"""Random changes of image batches, a whole batch at once.

Each takes ``(N, channels, height, width)`` of any type and a CPU generator, and returns the same
shape.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def shift(images: Tensor, generator: torch.Generator, pixels: int, fill: float = 0.0) -> Tensor:
    """Move each image by up to ``pixels`` in both directions; what enters is ``fill``.

    The same as padding by ``pixels`` on each side and cropping at a random place.
    """
    count, _, height, width = images.shape
    drawn = torch.randint(2 * pixels + 1, (2, count), generator=generator).to(images.device)
    padded = pad(images, (pixels,) * 4, value=fill)
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, row, column, H, W)
    return crops[torch.arange(count, device=images.device), :, drawn[0], drawn[1]]


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each image left to right with probability 1/2."""
    flipped = torch.randint(2, (len(images), 1, 1, 1), generator=generator).to(images.device)
    return torch.where(flipped.bool(), images.flip(-1), images)
