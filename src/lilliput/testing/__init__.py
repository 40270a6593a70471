"""The contract of a method, as tests that anyone's method can be held to.

In a test module, with pytest::

    from lilliput.testing import MethodContract

    class TestMine(MethodContract):
        methods = [Mine(strength=2.0)]

Lilliput's own tests hand in every registered method, so a new one is tested without a test being written.

The surprising rule: a method may refuse a network, if it refuses with a ``LilliputError``; but it must
accept one of those that it is tried on, or the contract is not met.
"""

from .contract import MethodContract
from .examples import registered_examples
from .networks import NETWORKS, TinyNetwork, TinyTransformer, make_batches
from .stand_ins import stand_in_for_torchvision

__all__ = [
    "NETWORKS",
    "MethodContract",
    "TinyNetwork",
    "TinyTransformer",
    "make_batches",
    "registered_examples",
    "stand_in_for_torchvision",
]
