"""Making a finished network run: thin adapters to what executes it.

``lilliput.deploy.sparse`` skips the zeros of pruned layers where that is faster on this machine.
"""

from .csr import Decision, SparseNetwork, sparse

__all__ = ["Decision", "SparseNetwork", "sparse"]
