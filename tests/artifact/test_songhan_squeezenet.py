"""SqueezeNet 1.0 as the authors of Deep Compression released it, decoded by our relative index.

The file: uint32 entries of 26 layers; then a layer: float32 codebook[256], float32 bias[n], uint8
code[entries], and 4-bit gaps, the low half of a byte first. Needs the data set
``squeezenet-deep-compression`` under LILLIPUT_DATA.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lilliput import artifact
from lilliput.artifact import Coded
from lilliput.artifact.bits import Bytes
from lilliput.artifact.codecs._codec import Sparse
from lilliput.artifact.codecs.deep_compression import relative_index

FOLDER = Path(os.environ.get("LILLIPUT_DATA", "/nonexistent")) / "squeezenet-deep-compression"
FILE = FOLDER / "compressed_SqueezeNet.net"
FIRES = ((96, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128), (256, 48, 192))
FIRES += ((384, 48, 192), (384, 64, 256), (512, 64, 256))

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not FILE.exists(), reason="LILLIPUT_DATA has no SqueezeNet"),
]


def shapes():
    yield (96, 3, 7, 7)
    for before, squeeze, expand in FIRES:
        yield (squeeze, before, 1, 1)
        yield (expand, squeeze, 1, 1)
        yield (expand, squeeze, 3, 3)
    yield (1000, 512, 1, 1)


def authors_layers():
    """Shape, codebook, bias, codes of the entries, and gaps of each layer."""
    data = Bytes(FILE.read_bytes())
    layers = list(shapes())
    for shape, entries in zip(layers, data.array(len(layers), "<u4").tolist(), strict=True):
        codebook, bias = data.array(256, "<f4"), data.array(shape[0], "<f4")
        codes, packed = data.array(entries), data.array(-(-entries // 2))
        gaps = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:entries]
        yield shape, codebook, bias, codes, gaps
    data.end()


def test_the_authors_file(tmp_path):
    tensors, entries = {}, 0
    for number, (shape, codebook, bias, codes, gaps) in enumerate(authors_layers()):
        dense = np.zeros(np.prod(shape), np.uint8)
        where = Sparse(gaps + 1, codes, dense.size).positions
        assert where[-1] < dense.size
        assert codebook[0] == 0
        dense[where] = codes
        ours, _ = relative_index(dense, 4)
        assert abs(len(ours) - len(gaps)) <= 1  # they may end with a filler
        tensors[f"{number}.weight"] = Coded(dense.reshape(shape), codebook)
        tensors[f"{number}.bias"] = bias
        entries += len(gaps)
    weights = [tensor for tensor in tensors.values() if isinstance(tensor, Coded)]
    assert entries == 422_083
    assert sum(tensor.codes.size for tensor in weights) == 1_244_448
    assert sum(np.count_nonzero(t.codebook[t.codes]) for t in weights) == 415_921

    print(f"\nauthors {FILE.stat().st_size:,} bytes")
    for codec in ("deep_compression", "gap", "auto"):
        path = tmp_path / codec
        report = artifact.write(path, tensors, codec=codec)
        print(f"{codec:17} {report.file_bytes:,} bytes, {report.entropy_ratio:.4f} of the entropy")
        assert report.file_bytes < FILE.stat().st_size
        with artifact.open(path) as file:
            for name, tensor in tensors.items():
                truth = tensor.codebook[tensor.codes] if isinstance(tensor, Coded) else tensor
                assert np.array_equal(file.dense(name), truth)
