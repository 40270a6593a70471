"""Chains of thin layers in the place of one layer: few channels in between, and so fewer weights.

The channels in between are the *ranks*. A kind of chain says which dims of the kernel each thin layer has::

    svd       a linear layer: two of them, r (m + n) weights instead of m n
    channel   K x K, then 1 x 1
    spatial   K x 1, then 1 x K
    separable K x K with every channel by itself, then 1 x 1
    tucker    1 x 1, then K x K, then 1 x 1: two ranks
    cp        1 x 1, then K x 1 and 1 x K with every channel by itself, then 1 x 1

A fire module (``fire.py``) takes a layer's place in the same way, and is no chain: a rectifier is inside.

Bias, stride, padding, dilation and groups are those of the layer; in a grouped convolution every group has
a chain of its own, all of the same ranks. The modules themselves remember kind and ranks, so that copies,
checkpoints and the compressed file can rebuild the chains in a fresh instance of the user's class.

The surprising rule: chains come before cuts. A network that lost channels is rebuilt from chains of whole
width, which are then thinned. So when a layer that was cut becomes a chain, the plan's entries move to
the thin layers that have its channels now.
"""

from .chains import (
    KINDS,
    Kind,
    Link,
    Ranks,
    Shape,
    chain,
    check_ranks,
    compose,
    full_ranks,
    numbers,
)
from .fire import Fire, fire_for, why_no_fire
from .modules import Factors, thin, why_not
from .networks import factorize, factorize_as, factors_of, multiplied, put_fire

__all__ = [
    "KINDS",
    "Factors",
    "Fire",
    "Kind",
    "Link",
    "Ranks",
    "Shape",
    "chain",
    "check_ranks",
    "compose",
    "factorize",
    "factorize_as",
    "factors_of",
    "fire_for",
    "full_ranks",
    "multiplied",
    "numbers",
    "put_fire",
    "thin",
    "why_no_fire",
    "why_not",
]
