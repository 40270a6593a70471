"""What each operator does to labels: one small function a rule, found by the operator's name.

A rule takes a :class:`~.base.Call` and returns the labels of the output, or a list of them where the
operator returns several tensors. Importing this package fills the table.

The surprising rule: rules see operators after torch has decomposed them (``linear`` is an ``addmm``);
only what loses its meaning on the way, such as an LSTM, is met as a function call (:mod:`.functions`).
"""

from . import contractions, elementwise, functions, indexing, normalization, shapes, spatial
from .base import Call, follow
from .functions import call_function

__all__ = [
    "Call",
    "call_function",
    "contractions",
    "elementwise",
    "follow",
    "functions",
    "indexing",
    "normalization",
    "shapes",
    "spatial",
]
