"""What networks for images share: they say so when an image, or a width, does not fit.

The surprising rule: an image needs as many pixels a side as the network's strides multiply to, even
where padding would let it through. Below that a stride steps over nothing but padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ModelMismatch

#: What to do where images are small and the network has the option.
SMALL = "build it with small_images=True, which leaves out its first strides"


class ImageNetwork(nn.Module):
    """Base of the networks that classify images; they write ``logits``.

    Args:
        channels: of an image.
        smallest: pixels that an image must have a side.
        remedy: what else than larger images helps; part of the error.
    """

    def __init__(self, channels: int, smallest: int, remedy: str = "") -> None:
        super().__init__()
        self.channels, self.smallest, self.remedy = channels, smallest, remedy

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, channels, height, width)``.

        Raises:
            ModelMismatch: the images have other channels, or are too small for the strides.
        """
        # Tracing takes sizes for data, and warns of every comparison; torch has no types for it.
        if not torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            self._check(images)
        return self.logits(images)

    def logits(self, images: Tensor) -> Tensor:
        """What ``forward`` returns, of images that fit."""
        raise NotImplementedError

    def _check(self, images: Tensor) -> None:
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != self.channels:
            raise ModelMismatch(
                f"{self._name()} takes images (N, {self.channels}, height, width) and was given {shape}. "
                "Build it with channels=... of your images."
            )
        if min(shape[2:]) < self.smallest:
            also = f", or {self.remedy}" if self.remedy else ""
            raise ModelMismatch(
                f"{self._name()} was given images of {shape[2]}x{shape[3]} pixels, and its strides need at "
                f"least {self.smallest} a side. Enlarge them{also}."
            )

    def _name(self) -> str:
        built: dict[str, str] = getattr(self, "lilliput_origin", {})
        return built.get("architecture", type(self).__name__)
