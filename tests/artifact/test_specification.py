"""The examples of docs/artifact-format.md are true."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from lilliput import artifact
from lilliput.artifact import Coded, huffman
from lilliput.artifact.bits import Bytes
from lilliput.artifact.codecs import CODECS
from lilliput.artifact.codecs.gap import _run_bytes
from lilliput.artifact.tensors import DTYPES

TEXT = (Path(__file__).parents[2] / "docs" / "artifact-format.md").read_text(encoding="utf-8")


def example(kind):
    """The bytes of a block: what stands before two spaces on each line."""
    block = re.search(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)
    return bytes.fromhex(" ".join(line.split("  ")[0] for line in block[1].splitlines()))


def tensors():
    codes = np.zeros((4, 16), np.uint8)
    codes[0, 2], codes[1, 0], codes[3, 15] = 1, 2, 1
    book = np.array([0, -1, 1], np.float32)
    return {"w": Coded(codes, book), "b": np.array([0.5, 0], np.float16)}


def test_the_whole_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(example("file"))
    with artifact.open(tmp_path / "file") as file:
        file.verify()
        assert file.names() == ["w", "b"]
        coded = tensors()["w"]
        assert np.array_equal(file.dense("w"), coded.codebook[coded.codes])
        assert file.dense("b").tolist() == [0.5, 0]


def test_the_whole_file_is_what_the_writer_writes(tmp_path):
    settings = {"codec": "deep_compression", "index_bits": 4, "floats": "float16"}
    artifact.write(tmp_path / "file", tensors(), profile="compact", **settings)
    written, shown = (tmp_path / "file").read_bytes(), example("file")
    assert written[-24:] == shown[-24:]
    assert written[:35] == shown[:35]  # what follows is deflated: another zlib may differ


def test_the_huffman_stream():
    symbols = np.tile([0, 0, 1, 0, 0, 2], 4).astype(np.uint8)
    assert huffman.encode(symbols) == example("stream")
    assert np.array_equal(huffman.decode(Bytes(example("stream")), 24), symbols)


def test_the_runs():
    assert _run_bytes(np.array([2, 300, 0]), 255).tobytes().hex(" ") in TEXT


@pytest.mark.parametrize("names", [CODECS, DTYPES])
def test_numbers_are_listed(names):
    for number, name in enumerate(names):
        assert f"`{name}` ({number})" in TEXT or f"`{name}` {number}" in TEXT.replace("\n", " ")
