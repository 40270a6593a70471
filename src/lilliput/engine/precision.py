"""In which precision a forward pass is computed, and which is the fast one of a device.

The surprising rule: torch computes in bfloat16 on any processor, but one without instructions for it takes
three times as long as in 32 bits; ``"auto"`` therefore asks the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def fast_precision(device: torch.device) -> str:
    """What ``precision: auto`` means on a device: bfloat16 where it multiplies in that, else float32.

    Example:
        >>> fast_precision(torch.device("cpu")) in ("bfloat16", "float32")
        True
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # Torch offers these questions under private names only; a release without them gets the safe answer.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    able = any(getattr(torch.cpu, name, bool)() for name in questions)
    return "bfloat16" if device.type == "cpu" and able else "float32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a forward pass has a precision of :class:`~lilliput.Train`."""
    chosen = fast_precision(device) if precision == "auto" else precision
    if chosen == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, chosen))
