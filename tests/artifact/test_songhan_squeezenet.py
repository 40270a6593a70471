"""SqueezeNet 1.0 as the authors of Deep Compression released it, decoded by our relative index.

Needs the data set ``squeezenet-deep-compression`` under LILLIPUT_DATA; the benchmark reads its form.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lilliput import artifact
from lilliput.artifact import Coded
from lilliput.artifact.codecs.deep_compression import relative_index

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from squeezenet_file import FILE, authors_layers, same, tensors

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not FILE.exists(), reason="LILLIPUT_DATA has no SqueezeNet"),
]


def test_the_authors_file(tmp_path):
    entries = 0
    for layer in authors_layers():
        dense = layer.coded().codes
        assert layer.codebook[0] == 0
        ours, _ = relative_index(dense.reshape(-1), 4)
        assert abs(len(ours) - len(layer.gaps)) <= 1  # they may end with a filler
        entries += len(layer.gaps)
    weights = [tensor for tensor in tensors().values() if isinstance(tensor, Coded)]
    assert entries == 422_083
    assert sum(tensor.codes.size for tensor in weights) == 1_244_448
    assert sum(np.count_nonzero(t.codebook[t.codes]) for t in weights) == 415_921
    for codec in ("deep_compression", "gap", "auto"):
        report = artifact.write(tmp_path / codec, tensors(), codec=codec)
        assert report.file_bytes < FILE.stat().st_size
        with artifact.open(tmp_path / codec) as file:
            same(file)
