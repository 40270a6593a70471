"""Making a finished network run: thin adapters to what executes it.

``lilliput.deploy.export`` writes an ONNX file, integers as integers; ``deploy`` also measures it in every
runtime that is installed. ``sparse`` skips the zeros of pruned layers where that is faster on this machine.
"""

from .csr import Decision, SparseNetwork, sparse
from .deployment import Deployment, InRuntime, deploy
from .onnx import Exported, export
from .overflow import overflows
from .runtime import Executed, OnnxNetwork, OpenvinoNetwork, inspect, installed

__all__ = [
    "Decision",
    "Deployment",
    "Executed",
    "Exported",
    "InRuntime",
    "OnnxNetwork",
    "OpenvinoNetwork",
    "SparseNetwork",
    "deploy",
    "export",
    "inspect",
    "installed",
    "overflows",
    "sparse",
]
