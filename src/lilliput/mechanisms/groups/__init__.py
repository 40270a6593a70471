"""Which channels of a network must live or die together.

Every dim of every tensor carries one integer label per index. One forward pass on fake tensors emits
equalities between labels, one rule an operator (:mod:`.rules`); the connected components of all
equalities are the channels that can be removed, one by one, and the components that touch label 0
must stay. Channels that reach into the same dims of the same tensors form a :class:`Group`.

The surprising rule: an operator without a rule ties its inputs to 0. Then channels are lost for
pruning, and :attr:`Groups.unprunable` says which and why, but nothing is ever cut wrongly.
"""

from .classes import Group, Groups, Member, Site
from .export import exported
from .finding import find_groups

__all__ = ["Group", "Groups", "Member", "Site", "exported", "find_groups"]
