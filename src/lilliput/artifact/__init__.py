"""The compressed file: one ordinary ``.safetensors`` file, or a compact one for tiny networks.

Usable without torch: NumPy arrays go in and come out. ``docs/artifact-format.md`` is the
specification.

Example:
    >>> import tempfile, pathlib
    >>> import numpy as np
    >>> from lilliput import artifact
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.llp"
    >>> codes = np.array([[0, 0, 2], [1, 0, 0]], np.uint8)
    >>> _ = artifact.write(path, {"w": artifact.Coded(codes, np.array([0, -1, 1], np.float32))})
    >>> with artifact.open(path) as file:
    ...     file.dense("w").tolist()
    [[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]]
"""

from lilliput.artifact.codecs.deep_compression import PaperColumns, paper_columns
from lilliput.artifact.reader import Artifact, is_artifact, open, read
from lilliput.artifact.report import SizeReport, TensorReport
from lilliput.artifact.tensors import BFloat16, Coded, Tensor
from lilliput.artifact.writer import annotate, write

__all__ = [
    "Artifact",
    "BFloat16",
    "Coded",
    "PaperColumns",
    "SizeReport",
    "Tensor",
    "TensorReport",
    "annotate",
    "is_artifact",
    "open",
    "paper_columns",
    "read",
    "write",
]
