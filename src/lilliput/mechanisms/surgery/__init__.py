"""Cutting channels and modules out: the only code that changes a shape.

A cut takes away channels with all that belongs to them: rows and columns of parameters, gradients,
buffers, encodings, optimizer state, and the sizes that modules keep as Python numbers. It checks itself
where it can, and it is a transaction: whatever goes wrong, the model is bit for bit as it was. So is a
bypass, which takes whole modules away that only pass their input on.

The surprising rule: parameters stay the same objects. An optimizer, tied weights and your own references
go on as if nothing had happened; only shapes are smaller.
"""

from .bypassing import Bypass, bypass
from .cutting import Cut, cut
from .modules import outermost, within
from .plan import Plan, apply_plan, checked_plan, last_plan, plan_of
from .transaction import replace, transaction

__all__ = [
    "Bypass",
    "Cut",
    "Plan",
    "apply_plan",
    "bypass",
    "checked_plan",
    "cut",
    "last_plan",
    "outermost",
    "plan_of",
    "replace",
    "transaction",
    "within",
]
