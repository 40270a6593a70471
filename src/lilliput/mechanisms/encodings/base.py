"""What all encodings have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

#: The encodings by the name that checkpoints have for them; each class adds itself.
KINDS: dict[str, type[Encoding]] = {}


class Encoding(nn.Module):
    """Base of the encodings.

    Class attributes:
        kind: its name in checkpoints.
        depth: encodings with smaller numbers lie further inside the stack.
    """

    kind: ClassVar[str]
    depth: ClassVar[int] = 0
    innermost: bool = True  # kept by `encode`: the stored tensor lies directly inside

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        KINDS[cls.kind] = cls

    @classmethod
    def empty(cls, like: Tensor, settings: dict[str, Any]) -> Encoding:
        """One with these settings for a weight like this; ``load_state_dict`` then fills it."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What a checkpoint needs beside the buffers to build this encoding again."""
        return {}

    def right_inverse(self, value: Tensor) -> Tensor:
        """What trains, computed from the value that the weight has now; called by torch."""
        return value

    def shape_of(self, original: Tensor) -> torch.Size:
        """The weight's shape, from what trains."""
        return original.shape

    def forget(self) -> None:
        """Drop what was computed from the buffers: they were loaded, or cut by surgery."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()
