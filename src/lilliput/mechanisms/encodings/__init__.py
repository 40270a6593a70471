"""How a weight is stored while it trains: masked, of shared values, on a grid, of low rank, partly held.

An encoding is a torch parametrization: the layer keeps its attribute ``weight``, every other part of
torch sees an ordinary tensor, and what trains is the encoding's original. Encodings stack: whatever
defines the values (a codebook) lies inside, masks lie outside, so that a zero stays a zero.

The surprising rule: a hard mask does not multiply in the forward pass while the weight itself is what
trains. The zeros are *stored*, and :func:`reapply` restores them after each optimizer step, which is
what makes them survive momentum and weight decay.
"""

from .attaching import bake, describe, encode, put_grid, rebuild, share_codebook, strip, take_off
from .base import KINDS, Encoding
from .codebooks import Codebook
from .integers import Binary, IntegerGrid, StepGrid, on_grid, rounded, settle_step, slowed
from .masks import Held, LeftOut, Mask, Threshold, reapply, stored_masks
from .products import LowRank
from .stack import encoding_of, original_of

__all__ = [
    "KINDS",
    "Binary",
    "Codebook",
    "Encoding",
    "Held",
    "IntegerGrid",
    "LeftOut",
    "LowRank",
    "Mask",
    "StepGrid",
    "Threshold",
    "bake",
    "describe",
    "encode",
    "encoding_of",
    "on_grid",
    "original_of",
    "put_grid",
    "reapply",
    "rebuild",
    "rounded",
    "settle_step",
    "share_codebook",
    "slowed",
    "stored_masks",
    "strip",
    "take_off",
]
