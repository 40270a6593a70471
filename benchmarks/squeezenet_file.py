"""SqueezeNet as Deep Compression's authors released it, and the very same weights in our file.

    python benchmarks/squeezenet_file.py             # some seconds; a table, results/squeezenet_file.json
    python benchmarks/squeezenet_file.py --table     # only print

Their file needs to lie as ``squeezenet-deep-compression/compressed_SqueezeNet.net`` under LILLIPUT_DATA:
uint32 entries of 26 layers; then a layer: float32 codebook[256], float32 bias[n], uint8 code[entries], and
4-bit gaps, the low half of a byte first. Every row is read back and compared with their weights, number for
number.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rows import Row, Rows, markdown, parser

from lilliput import artifact
from lilliput.artifact import Coded
from lilliput.artifact.bits import Bytes
from lilliput.artifact.codecs._codec import Sparse

FILE = (
    Path(os.environ.get("LILLIPUT_DATA", "/nonexistent"))
    / "squeezenet-deep-compression"
    / "compressed_SqueezeNet.net"
)
FIRES = ((96, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128), (256, 48, 192))
FIRES += ((384, 48, 192), (384, 64, 256), (512, 64, 256))
AUTHORS = "the authors' file"
CODECS = {
    "relative index and Huffman codes": "deep_compression",
    "zero runs": "gap",
    "best of all": "auto",
}


class Layer(NamedTuple):
    """A layer of their file: shape, codebook, bias, and codes and gaps of its entries."""

    shape: tuple[int, ...]
    codebook: Any
    bias: Any
    codes: Any
    gaps: Any

    def coded(self) -> Coded:
        """The whole weight as codes; the fillers of long gaps are zeros like any other."""
        dense = np.zeros(np.prod(self.shape), np.uint8)
        dense[Sparse(self.gaps + 1, self.codes, dense.size).positions] = self.codes
        return Coded(dense.reshape(self.shape), self.codebook)


def shapes() -> Iterator[tuple[int, ...]]:
    yield (96, 3, 7, 7)
    for before, squeeze, expand in FIRES:
        yield (squeeze, before, 1, 1)
        yield (expand, squeeze, 1, 1)
        yield (expand, squeeze, 3, 3)
    yield (1000, 512, 1, 1)


def authors_layers(file: Path = FILE) -> Iterator[Layer]:
    data = Bytes(file.read_bytes())
    layers = list(shapes())
    for shape, entries in zip(layers, data.array(len(layers), "<u4").tolist(), strict=True):
        codebook, bias = data.array(256, "<f4"), data.array(shape[0], "<f4")
        codes, packed = data.array(entries), data.array(-(-entries // 2))
        gaps = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:entries]
        yield Layer(shape, codebook, bias, codes, gaps)
    data.end()


@functools.cache
def tensors() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, layer in enumerate(authors_layers()):
        found[f"{number}.weight"], found[f"{number}.bias"] = layer.coded(), layer.bias
    return found


def do(job: Row) -> Row:
    dense = sum(4 * t.codes.size if isinstance(t, Coded) else t.nbytes for t in tensors().values())
    if job["row"] == AUTHORS:
        return {"bytes": FILE.stat().st_size, "dense_bytes": dense}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "squeezenet"
        begin = time.process_time()
        report = artifact.write(path, tensors(), codec=CODECS[job["row"]])
        encoded, begin = time.process_time() - begin, time.process_time()
        with artifact.open(path) as file:
            same(file)
        read = time.process_time() - begin
        return {
            "bytes": path.stat().st_size, "dense_bytes": dense, "entropy_ratio": report.entropy_ratio,
            "encode_seconds": round(encoded, 3), "decode_seconds": round(read, 3),
        }  # fmt: skip


def same(file: artifact.Artifact) -> None:
    for name, tensor in tensors().items():
        truth = tensor.codebook[tensor.codes] if isinstance(tensor, Coded) else tensor
        if not np.array_equal(file.dense(name), truth):
            raise AssertionError(f"{name} did not come back as it was")


def table(done: list[Row]) -> str:
    theirs = next((r["bytes"] for r in done if r["row"] == AUTHORS), None)
    return markdown(("file", "bytes", "of theirs", "smaller than dense", "of the entropy"), [
        (
            r["row"], f"{r['bytes']:,}", f"{100 * r['bytes'] / theirs:.1f} %" if theirs else "",
            f"{r['dense_bytes'] / r['bytes']:.2f}x",
            f"{r['entropy_ratio']:.3f}" if "entropy_ratio" in r else "",
        )
        for r in done
    ])  # fmt: skip


def main() -> None:
    options = parser(__doc__).parse_args()
    done = Rows(Path(__file__).resolve().parent / "results" / "squeezenet_file.json")
    if not options.table:
        done.run([{"row": row} for row in (AUTHORS, *CODECS)], do)
    print(table(done.read()))


if __name__ == "__main__":
    main()
