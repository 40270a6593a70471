"""Files of both profiles: what is written is read, whole or in part, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
from safetensors import safe_open

from lilliput import artifact
from lilliput.artifact import BFloat16, Coded, paper_columns
from lilliput.artifact import format as layout
from lilliput.artifact.codecs import CODECS
from lilliput.artifact.entries import Document, Entry
from lilliput.errors import InputError, UnknownName

PROFILES = ("safetensors", "compact")


def coded(shape, kept, levels, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.integers(1, levels, shape)
    codes = np.where(rng.random(shape) < kept, values, 0).astype(np.uint8)
    return Coded(codes, np.r_[0, rng.normal(size=levels - 1)].astype(np.float32))


def network():
    rng = np.random.default_rng(7)
    conv = coded((20, 6, 5, 5), 0.2, 17)
    many = rng.normal(size=1000).astype(np.float32)
    sparse = np.where(rng.random((100, 90)) < 0.1, rng.normal(size=(100, 90)), 0)
    return {
        "conv": conv,
        "shared": Coded(conv.codes[::2], conv.codebook),
        "fc": coded((500, 90), 0.05, 33),
        "wide": Coded(rng.integers(0, 1000, (40, 37)).astype(np.uint16), many),
        "constant": Coded(np.zeros((4, 5), np.uint8), np.array([3.0], np.float32)),
        "no zero": Coded(rng.integers(0, 2, (30, 30)).astype(np.uint8), np.array([-1, 1], np.float32)),
        "sparse": sparse.astype(np.float32),
        "odd": np.array([0.0, -0.0, np.nan, np.inf, 1e-40] * 60, np.float32).reshape(20, 15),
        "double": rng.normal(size=(3, 2)),
        "steps": np.array(5, np.int64),
        "flags": np.array([True, False]),
        "bf16": BFloat16(rng.integers(0, 65535, (3, 4)).astype(np.uint16)),
        "none": np.zeros((0, 4), np.float32),
        "big endian": np.arange(6, dtype=">i4").reshape(2, 3).T,
    }  # fmt: skip


def values(tensor):
    if isinstance(tensor, Coded):
        return tensor.codebook[tensor.codes]
    return tensor.bits if isinstance(tensor, BFloat16) else tensor


def equal(one, other):
    same = np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other, one.dtype).tobytes()
    return one.shape == other.shape and one.dtype == other.dtype.newbyteorder("<") and same


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("codec", ["auto", *CODECS])
@pytest.mark.parametrize("chunk", [1 << 20, 700])
def test_what_is_written_is_read(tmp_path, profile, codec, chunk):
    tensors = network()
    path = tmp_path / "file"
    report = artifact.write(path, tensors, codec=codec, profile=profile, chunk_weights=chunk)
    with artifact.open(path, threads=2) as file:
        assert file.names() == list(tensors)
        file.verify()
        assert file.report() == report
        for name, tensor in tensors.items():
            truth = values(tensor)
            assert equal(file.dense(name), truth), name
            if truth.ndim:
                assert equal(file.dense(name, slice(1, 3)), truth[1:3]), name
                assert equal(file.dense(name, slice(-1, None)), truth[-1:]), name
            if isinstance(tensor, Coded):
                codes, book = file.codes(name)
                assert np.array_equal(codes, tensor.codes)
                assert np.array_equal(book, tensor.codebook)
    assert report.file_bytes == path.stat().st_size
    assert report.header_bytes + sum(t.bytes for t in report.tensors) == report.file_bytes


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("chunk", [1 << 20, 700])
def test_csr_is_scipys(tmp_path, codec, chunk):
    tensors = {
        name: network()[name] for name in ("conv", "fc", "no zero", "sparse", "steps", "none")
    }
    artifact.write(tmp_path / "file", tensors, codec=codec, chunk_weights=chunk)
    with artifact.open(tmp_path / "file") as file:
        for name, tensor in tensors.items():
            truth = values(tensor)
            rows = len(truth) if truth.ndim else 1
            matrix = truth.reshape(rows, int(np.prod(truth.shape[1:])))
            expected = scipy.sparse.csr_matrix(matrix)
            data, columns, starts = file.csr(name)
            assert np.array_equal(data, expected.data), name
            assert np.array_equal(columns, expected.indices), name
            assert np.array_equal(starts, expected.indptr), name


def test_any_safetensors_reader_opens_it(tmp_path):
    tensors = network()
    del tensors["bf16"]  # safetensors cannot hand it to NumPy
    path = tmp_path / "net.safetensors"
    artifact.write(path, tensors, structure={"architecture": "lenet"})
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(tensors)
        assert np.array_equal(file.get_tensor("double"), tensors["double"])
        assert file.get_tensor("fc").dtype == np.uint8
        for name in tensors:
            file.get_tensor(name)


@pytest.mark.parametrize("profile", PROFILES)
def test_sections_come_back(tmp_path, profile):
    sections = {
        "structure": {"architecture": "lenet_5", "arguments": {"width": 1.5, "ünïcode": None}},
        "recipe": {"stages": [{"methods": []}], '"quoted\\': [True]},
        "figures": {},
    }
    artifact.write(tmp_path / "file", {}, profile=profile, **sections)
    with artifact.open(tmp_path / "file") as file:
        assert {name: getattr(file, name) for name in sections} == sections
    artifact.write(tmp_path / "file", {}, profile=profile)
    with artifact.open(tmp_path / "file") as file:
        assert file.structure is None


def test_the_same_input_gives_the_same_file(tmp_path):
    for profile in PROFILES:
        for name in "ab":
            artifact.write(tmp_path / name, network(), profile=profile, recipe={"a": 1})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_profile_follows_size_and_name(tmp_path):
    big = np.random.default_rng(0).normal(size=300_000).astype(np.float32)
    for name, tensors, profile in (
        ("net.safetensors", network(), "safetensors"),
        ("net.llp", network(), "compact"),
        ("net.llp", {"w": big}, "safetensors"),
    ):
        assert artifact.write(tmp_path / name, tensors).profile == profile
        assert artifact.is_artifact(tmp_path / name)
    (tmp_path / "other").write_bytes(b"PK\x03\x04 and so on")
    assert not artifact.is_artifact(tmp_path / "other")


def test_one_tensor_is_read_without_the_others(tmp_path):
    path = tmp_path / "file"
    artifact.write(path, {"a": coded((100, 100), 0.1, 9, 1), "b": coded((100, 100), 0.1, 9, 2)})
    with artifact.open(path) as file:
        start, size = file.info("b").offset, file.info("b").size
    damaged = bytearray(path.read_bytes())
    damaged[start : start + size] = bytes(size)
    path.write_bytes(damaged)
    with artifact.open(path) as file:
        assert np.array_equal(file.dense("a"), values(coded((100, 100), 0.1, 9, 1)))


def test_some_rows_are_read_without_the_others(tmp_path):
    path = tmp_path / "file"
    tensor = coded((100, 100), 0.1, 9)
    artifact.write(path, {"w": tensor}, chunk_weights=1000)
    with artifact.open(path) as file:
        entry = file.info("w")
        assert (entry.rows, len(entry.parts)) == (10, 10)
    damaged = bytearray(path.read_bytes())
    damaged[entry.offset + entry.starts[5]] ^= 1
    path.write_bytes(damaged)
    with artifact.open(path) as file:
        assert np.array_equal(file.dense("w", slice(60, 100)), values(tensor)[60:])


def test_a_shared_codebook_is_stored_once(tmp_path):
    book = np.linspace(0, 1, 256).astype(np.float32)
    codes = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    alone = artifact.write(tmp_path / "a", {"a": Coded(codes, book)}, codec="packed")
    both = artifact.write(
        tmp_path / "b", {"a": Coded(codes, book), "b": Coded(codes, book.copy())}, codec="packed"
    )
    assert alone.tensors[0].codebook_bytes == 1024
    assert [tensor.codebook_bytes for tensor in both.tensors] == [1024, 0]
    assert artifact.open(tmp_path / "b").info("b").book == "a"


def test_float16_only_where_it_is_near(tmp_path):
    rng = np.random.default_rng(0)
    fine, tiny = rng.normal(size=(8, 9)).astype(np.float32), np.full(300, 1e-7, np.float32)
    huge = np.full(3, 1e6, np.float32)
    tensors = {
        "fine": fine,
        "tiny": tiny,
        "huge": huge,
        "mixed": np.array([0.1, -0.2, 1e-6], np.float32),
        "double": np.ones(3),
        "coded": coded((9, 9), 0.5, 5),
    }
    artifact.write(tmp_path / "file", tensors, floats="float16")
    with artifact.open(tmp_path / "file") as file:
        assert {name: file.info(name).stored for name in tensors} == {
            "fine": "F16", "tiny": "F32", "huge": "F32", "mixed": "F16", "double": "F64", "coded": "F16",
        }  # fmt: skip
        assert file.info("fine").codec == "f16"
        assert file.dense("fine").dtype == np.float32
        np.testing.assert_allclose(file.dense("fine"), fine, rtol=2**-10)
        assert np.array_equal(file.dense("tiny"), tiny)


def test_the_smallest_codec_wins(tmp_path):
    rng = np.random.default_rng(0)
    flat = np.linspace(-1, 1, 256).astype(np.float32)
    tensors = {
        "uniform": Coded(rng.integers(0, 256, (100, 100)).astype(np.uint8), flat),
        "bell": Coded(rng.normal(128, 20, (100, 100)).clip(0, 255).astype(np.uint8), flat),
        "sparse": coded((300, 784), 0.03, 17),
        "blocks": Coded(
            np.repeat(np.eye(40, dtype=np.uint8), 40, axis=0), np.array([0, 1], np.float32)
        ),
    }
    for name, tensor in tensors.items():
        one = {name: tensor}
        sizes = [artifact.write(tmp_path / "x", one, codec=c).tensors[0].bytes for c in CODECS]
        assert artifact.write(tmp_path / "x", one).tensors[0].bytes == min(sizes), name


def test_no_other_codec_is_smaller(tmp_path):
    """On small tensors the headers and tables of codecs decide, which no estimate knows."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        size, levels = int(10 ** rng.uniform(0.3, 3.9)), int(rng.choice([2, 5, 17, 200]))
        codes = np.where(rng.random(size) < rng.random(), rng.integers(0, levels, size), 0)
        one = {"w": Coded(codes.astype(np.uint8), np.arange(levels, dtype=np.float32))}
        sizes = [artifact.write(tmp_path / "x", one, codec=c).tensors[0].bytes for c in CODECS]
        assert artifact.write(tmp_path / "x", one).tensors[0].bytes == min(sizes)


RANDOM = np.random.default_rng(0)
NORMAL = RANDOM.normal(0, 0.05, (100, 100)).astype(np.float32)
MASK = np.full((64, 64), -np.inf, np.float32)
MASK[np.tril_indices(64)] = 0


@pytest.mark.parametrize(
    ("tensor", "most"),
    [
        (np.arange(2401).reshape(49, 49), 3000),
        (RANDOM.random(10_000) < 0.95, 450),
        (RANDOM.random(10_000) < 0.5, 1251),
        (np.ones(512, np.float32), 11),
        (np.zeros(63, np.float32), 6),
        (np.ones(63, np.float64), 20),
        (MASK, 400),
        (BFloat16((NORMAL.view(np.uint32) >> 16).astype(np.uint16)), 13_500),
        (NORMAL.astype(np.float16).astype(np.float32), 18_000),
        (RANDOM.normal(0, 20, (64, 64)).astype(np.int8), 3400),
    ],
)
def test_plain_values_that_repeat_are_coded(tmp_path, tensor, most):
    assert artifact.write(tmp_path / "x", {"w": tensor}).tensors[0].bytes <= most
    with artifact.open(tmp_path / "x") as file:
        file.verify()
        assert equal(file.dense("w"), values(tensor))
        assert file.report().entropy_ratio >= 0.999


@pytest.mark.parametrize(
    "tensor",
    [
        NORMAL,
        NORMAL.astype(np.float16),
        NORMAL[0],
        NORMAL[0, :16],
        np.array(1234),
        RANDOM.integers(0, 256, 5000).astype(np.uint8),
        np.zeros((0, 3)),
        np.zeros(4, np.float32),
    ],
)
@pytest.mark.parametrize("codec", ["auto", "gap"])
def test_plain_values_stay_as_they_are(tmp_path, tensor, codec):
    assert artifact.write(tmp_path / "x", {"w": tensor}, codec=codec).tensors[0].codec == "raw"


def test_large_floats_are_not_encoded_to_find_out_that_they_stay(tmp_path):
    large = RANDOM.normal(size=(2000, 1000)).astype(np.float32)
    times = []
    for codec in ("auto", {"w": "dense"}):
        start = time.process_time()
        report = artifact.write(tmp_path / "x", {"w": large}, codec=codec)
        times.append(time.process_time() - start)
        assert report.tensors[0].codec == ("raw" if codec == "auto" else "dense")
    assert times[0] < times[1] / 2


def test_a_named_codec_holds_for_arrays_with_many_zeros_only(tmp_path):
    tensors = {"ones": np.ones(512, np.float32), "half": RANDOM.random(10_000) < 0.5}
    artifact.write(tmp_path / "x", tensors, codec="gap")
    with artifact.open(tmp_path / "x") as file:
        assert file.info("ones").codec != "gap"
        assert file.info("half").codec == "gap"


def test_bytes_of_booleans_are_0_or_1(tmp_path):
    odd = np.array([0, 2, 255], np.uint8).view(bool)
    artifact.write(tmp_path / "x", {"w": odd})
    assert artifact.read(tmp_path / "x")["w"].view(np.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("book", "stored"),
    [
        ([0, -127, 127, 0.5], "F16"),
        ([-0.0, np.inf, np.nan, 6e-8], "F32"),
        ([-0.0, np.inf, 2**-24, -65504], "F16"),
        ([0, 2049], "F32"),
        ([0, 65520], "F32"),
        ([0, 0.1], "F32"),
    ],
)
def test_a_codebook_is_halved_if_not_a_bit_is_lost(tmp_path, book, stored):
    tensor = Coded(np.arange(len(book), dtype=np.uint8), np.array(book, np.float32))
    artifact.write(tmp_path / "x", {"w": tensor, "shares": tensor})
    with artifact.open(tmp_path / "x") as file:
        assert file.info("w").stored == stored
        assert equal(file.dense("shares"), values(tensor))
        assert equal(file.codes("w")[1], tensor.codebook)


@pytest.mark.parametrize("codec", ["auto", *CODECS])
def test_the_sign_of_a_zero_is_kept(tmp_path, codec):
    tensor = Coded(np.array([0, 0, 1] * 40, np.uint8), np.array([-0.0, 1], np.float32))
    artifact.write(tmp_path / "x", {"w": tensor}, codec=codec)
    with artifact.open(tmp_path / "x") as file:
        file.verify()
        assert equal(file.dense("w"), values(tensor))
        assert len(file.csr("w")[0]) == 40


def test_the_owner_of_a_codebook_is_not_searched_for():
    owner = Entry("packed", (1,), "F32", "F16", 0, ((3, 0),), levels=1)
    shared = {f"t{at}": replace(owner, book="owner") for at in range(5000)}

    def seconds(entries):
        start = time.process_time()
        layout.seal(Document(entries, {}), "compact")
        return time.process_time() - start

    assert seconds(shared | {"owner": owner}) < 3 * seconds({"owner": owner} | shared)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_open_file_survives_a_fork(tmp_path):
    tensors = {f"t{at}": np.random.default_rng(at).normal(size=20_000) for at in range(6)}
    artifact.write(tmp_path / "x", tensors)
    with artifact.open(tmp_path / "x") as file:
        if not (child := os.fork()):
            file.dense("t3")  # moves a place in the file that both share
            os._exit(0)
        os.waitpid(child, 0)
        for name in ("t0", "t1", "t2", "t3", "t4", "t5"):
            assert equal(file.dense(name), tensors[name])


def test_it_reads_where_the_system_must_seek(tmp_path, monkeypatch):
    artifact.write(tmp_path / "x", network())
    whole = artifact.read(tmp_path / "x")
    monkeypatch.delattr("os.pread", raising=False)
    for name, array in artifact.read(tmp_path / "x", threads=2).items():
        assert equal(array, whole[name])


def test_large_parts_are_read_in_pieces(tmp_path, monkeypatch):
    artifact.write(tmp_path / "x", network())
    whole = artifact.read(tmp_path / "x")
    monkeypatch.setattr("lilliput.artifact.reader._MOST_READ", 7)
    for name, array in artifact.read(tmp_path / "x").items():
        assert equal(array, whole[name])


def test_large_tensors_choose_as_well(tmp_path):
    tensor = coded((3000, 1000), 0.1, 17)
    auto = artifact.write(tmp_path / "x", {"w": tensor}).tensors[0]
    gap = artifact.write(tmp_path / "x", {"w": tensor}, codec="gap").tensors[0]
    assert (auto.codec, auto.bytes) == ("gap", gap.bytes)
    assert len(artifact.open(tmp_path / "x").info("w").parts) == 3


@pytest.mark.parametrize("kept", [0.03, 0.05, 0.08])
def test_size_is_near_the_entropy(tmp_path, kept):
    lenet = {"fc1": coded((300, 784), kept, 17, 1), "fc2": coded((100, 300), kept, 17, 2)}
    assert artifact.write(tmp_path / "small", lenet).entropy_ratio < 1.03
    large = {"w": coded((1000, 1200), kept, 17, 3)}
    assert artifact.write(tmp_path / "large", large).entropy_ratio < 1.01


def test_report_is_the_definition(tmp_path):
    codes = np.array([0] * 12 + [1, 1, 2, 3], np.uint8).reshape(4, 4)
    book = np.array([0, -1, 1, 2], np.float32)
    report = artifact.write(tmp_path / "x", {"w": Coded(codes, book), "b": np.ones(4, np.float32)})
    weight, bias = report.tensors
    bits = 12 * np.log2(16 / 12) + 2 * np.log2(16 / 2) + 2 * np.log2(16)
    assert weight.entropy_bytes == pytest.approx(bits / 8)
    assert (weight.weights, weight.nonzeros, weight.dense_bytes) == (16, 4, 64)
    assert weight.codebook_bytes == 8  # float16 holds it exactly
    assert (bias.bytes, bias.entropy_bytes) == (16, 16)
    assert report.entropy_ratio == pytest.approx((weight.bytes - 8) / (bits / 8))
    assert report.ratio == (64 + 16) / (tmp_path / "x").stat().st_size


def test_compact_header_is_small(tmp_path):
    shapes = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "ip1": (500, 800), "ip2": (10, 500)}
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = coded(shape, 0.1, 33)
        tensors[f"{name}.bias"] = np.ones(shape[0], np.float16)
    assert artifact.write(tmp_path / "x", tensors, profile="compact").header_bytes <= 200


def test_paper_columns(tmp_path):
    codes = np.zeros(1000, np.uint8)
    codes[[40, 41, 999]] = [1, 2, 3]
    columns = paper_columns(codes, levels=16, index_bits=4)
    assert columns.entries == 3 + 2 + 957 // 16  # 40 zeros need two fillers, 957 need 59
    assert columns.pruned == -(-columns.entries * (4 + 32) // 8)
    assert columns.quantized == -(-columns.entries * (4 + 4) // 8) + 16 * 4
    report = artifact.write(
        tmp_path / "x", {"w": Coded(codes, np.linspace(0, 1, 16, dtype=np.float32))},
        codec="deep_compression", index_bits=4,
    )  # fmt: skip
    assert columns.coded == report.tensors[0].bytes
    assert paper_columns(codes, levels=16).coded <= columns.coded


def test_index_width_of_the_paper(tmp_path):
    tensors = {"conv": coded((20, 20, 5, 5), 0.1, 33), "fc": coded((100, 100), 0.1, 33)}
    path = tmp_path / "x"
    paper = artifact.write(path, tensors, codec="deep_compression", index_bits="paper")
    named = artifact.write(path, tensors, codec="deep_compression", index_bits={"conv": 8, "fc": 5})
    assert [t.bytes for t in paper.tensors] == [t.bytes for t in named.tensors]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"codec": "gapp"}, UnknownName, "Did you mean 'gap'"),
        ({"codec": {"weight": "gap"}}, UnknownName, "'weight'"),
        ({"codec": {"plain": "packed"}}, InputError, "'plain'"),
        ({"profile": "zip"}, UnknownName, "profile"),
        ({"floats": "float8"}, UnknownName, "float8"),
        ({"codec": "deep_compression", "index_bits": 9}, InputError, "0 to 8"),
        ({"figures": {"loss": float("nan")}}, InputError, "not plain JSON"),
        ({"recipe": {"model": object()}}, InputError, "not plain JSON"),
        ({"chunk_weights": 0}, InputError, "chunk_weights"),
        ({"chunk_weights": 1.5}, InputError, "chunk_weights is 1.5"),
        ({"codec": None}, InputError, "codec is None"),
        ({"codec": ["gap"]}, InputError, "codec is \\['gap'\\]"),
        ({"codec": {"w": None}}, InputError, "codec is .*None"),
        ({"codec": "deep_compression", "index_bits": "x"}, InputError, "index_bits is 'x'"),
        ({"figures": {1: 1, "1": 2}}, InputError, "the key 1 is no string"),
        ({"structure": [{"a": ({None: 1},)}]}, InputError, "the key None is no string"),
        ({"recipe": "x" * 9_000_000}, InputError, "8 MB"),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, words):
    tensors = {"w": coded((9, 9), 0.5, 5), "plain": np.ones(3, np.float32)}
    with pytest.raises(error, match=words):
        artifact.write(tmp_path / "x", tensors, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Coded(np.zeros(3, np.int64), np.zeros(1, np.float32)), "uint8 or uint16"),
        (lambda: Coded(np.zeros(3, np.uint8), np.zeros(1)), "float32"),
        (lambda: Coded(np.zeros(3, np.uint8), np.zeros(0, np.float32)), "1 to 65,536"),
        (lambda: Coded(np.full(3, 2, np.uint8), np.zeros(2, np.float32)), "code 2"),
        (lambda: BFloat16(np.zeros(3, np.int16)), "uint16"),
    ],
)
def test_bad_tensors(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    "tensor", [np.ones(3, complex), np.array(["a"]), [1.0, 2.0], np.array([None])]
)
def test_tensors_that_cannot_be_stored(tmp_path, tensor):
    with pytest.raises(InputError, match="'w' is"):
        artifact.write(tmp_path / "x", {"w": tensor})


ONE = Coded(np.zeros(1, np.uint8), np.zeros(1, np.float32))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"": ONE, "b": ONE}, "named ''"),
        ({1: np.ones(2)}, "named 1;"),
        ({1: np.ones(2), "1": np.zeros(2)}, "named 1;"),
        ({"__metadata__": np.ones(2)}, "reserves"),
        ([np.ones(2)], "tensors is list"),
        ({"w": Coded(np.zeros((1,) * 33, np.uint8), np.zeros(1, np.float32))}, "'w'.*32 axes"),
        ({"w": np.zeros((1 << 30, 1 << 30, 0), np.uint8)}, r"'w' cannot be stored: .*2\^48"),
    ],
)
@pytest.mark.parametrize("profile", PROFILES)
def test_what_no_reader_would_open_replaces_nothing(tmp_path, profile, tensors, words):
    artifact.write(tmp_path / "x", {"good": np.ones(3)}, profile=profile)
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(InputError, match=words):
        artifact.write(tmp_path / "x", tensors, profile=profile)
    assert (tmp_path / "x").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_a_document_that_repeats_itself_is_read(tmp_path, profile):
    figures = {"losses": [0.0] * 200_000}  # deflate makes it 900 times smaller
    artifact.write(tmp_path / "x", {}, figures=figures, profile=profile)
    with artifact.open(tmp_path / "x") as file:
        assert file.figures == figures


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_that_is_no_file(path):
    for use in (
        lambda: artifact.write(path, {}),
        lambda: artifact.open(path),
        lambda: artifact.annotate(path, path, figures={}),
    ):
        with pytest.raises(InputError, match=f"path is '{path}'"):
            use()


@pytest.mark.parametrize("value", [0, -1, None, 1e9, "1"])
@pytest.mark.parametrize("name", ["max_bytes", "threads"])
def test_limits_are_positive_integers(tmp_path, name, value):
    artifact.write(tmp_path / "x", {"w": np.ones(3)})
    with pytest.raises(InputError, match=f"{name} is"):
        artifact.open(tmp_path / "x", **{name: value})


def test_a_closed_file_says_so(tmp_path):
    artifact.write(tmp_path / "x", {"w": np.ones(3)})
    with artifact.open(tmp_path / "x") as file:
        pass
    for use in (file.dense, file.csr):
        with pytest.raises(InputError, match="x is closed"):
            use("w")


def test_reading_what_is_not_there(tmp_path):
    artifact.write(tmp_path / "x", {"weight": np.ones(3, np.float32)})
    with artifact.open(tmp_path / "x") as file:
        with pytest.raises(UnknownName, match="Did you mean 'weight'"):
            file.dense("wieght")
        with pytest.raises(InputError, match="no codebook"):
            file.codes("weight")
        with pytest.raises(InputError, match="step 1"):
            file.dense("weight", slice(0, 3, 2))


def test_torch_is_not_imported():
    code = "import sys, lilliput.artifact; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
