"""Damaged, foreign and malicious files: each a clear error, before anything is allocated."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import resource
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lilliput import artifact
from lilliput.artifact import Coded, huffman, json_text, streams
from lilliput.artifact import container_compact as compact
from lilliput.artifact import format as layout
from lilliput.artifact.bits import Bytes, varint
from lilliput.artifact.codecs import CODECS
from lilliput.artifact.container_safetensors import SEAL
from lilliput.artifact.deflate import DEFAULT, deflate
from lilliput.artifact.writer import _refused
from lilliput.errors import (
    ArtifactError,
    ArtifactTooLarge,
    CorruptArtifact,
    InputError,
    UnsupportedArtifact,
)

PROFILES = ("safetensors", "compact")


def tensors():
    rng = np.random.default_rng(0)
    codes = np.where(rng.random((60, 50)) < 0.2, rng.integers(1, 9, (60, 50)), 0).astype(np.uint8)
    book = np.r_[0, rng.normal(size=8)].astype(np.float32)
    return {"first": Coded(codes, book), "second": rng.normal(size=7).astype(np.float32)}


def file_of(folder, profile, **options):
    path = folder / "file"
    artifact.write(path, tensors(), profile=profile, **options)
    return path


def reseal(path, **changes):
    """Change the entry of the first tensor, and correct the checksum of the header."""
    with path.open("rb") as file:
        document, profile, _ = layout.unseal(file, path.stat().st_size)
    entries = {name: document.entries[name] for name in document.entries}
    payloads = {n: path.read_bytes()[e.offset : e.offset + e.size] for n, e in entries.items()}
    if "payload" in changes:
        payloads["first"] = changes.pop("payload")
        part = (len(payloads["first"]), zlib.crc32(payloads["first"]))
        changes["parts"] = (part,)
    entries["first"] = replace(entries["first"], **changes)
    head, order = layout.seal(replace(document, entries=entries), profile)
    path.write_bytes(head + b"".join(payloads[name] for name in order))
    return path


def read(path, **options):
    with artifact.open(path, **options) as file:
        file.verify()
        return {name: file.dense(name) for name in file.names()}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_flipped_bit_is_detected(tmp_path, profile):
    path = file_of(tmp_path, profile)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in {*range(60), *rng.integers(len(data), size=300).tolist()}:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
        with pytest.raises(ArtifactError):
            read(path)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_truncation_is_detected(tmp_path, profile):
    path = file_of(tmp_path, profile)
    data = path.read_bytes()
    for size in {*range(60), *range(60, len(data), 37), len(data) - 1}:
        path.write_bytes(data[:size])
        with pytest.raises(ArtifactError):
            artifact.open(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CorruptArtifact, match="belong to no tensor"):
        artifact.open(path)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_error_names_file_and_tensor(tmp_path, profile):
    path = file_of(tmp_path, profile)
    with artifact.open(path) as file:
        entry = file.info("first")
    data = bytearray(path.read_bytes())
    data[entry.offset + entry.size // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match=r"file: tensor 'first': part 0 .*checksum.*again"):
        read(path)
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptArtifact, match=r"truncated: .* cuts tensor '(first|second)'"):
        read(path)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (1 << 20, 1 << 20)}, "needs"),
        ({"shape": (1 << 40, 1 << 40)}, "2\\^48"),
        ({"shape": (0, 1 << 62)}, "2\\^48"),
        ({"shape": (1,) * 33}, "32"),
        ({"shape": (10, 50)}, "counts|beyond|escapes"),
        ({"nonzeros": 5}, "which is wrong"),
        ({"nonzeros": 5000}, "counts are impossible"),
        ({"rows": 7}, "parts|are left"),
        ({"levels": 1 << 17}, "counts"),
        ({"levels": 5000}, "codebook is longer|code"),
        ({"levels": 8}, "."),
        ({"book": "second"}, "does not fit"),
        ({"book": "first"}, "does not fit"),
        ({"dtype": "F64", "stored": "F64"}, "codebook of F64"),
        ({"dtype": "F16"}, "cannot stand for"),
        ({"codec": "dense"}, "."),
        ({"codec": "raw"}, "."),
        ({"levels": 0}, "."),
    ],
)
def test_a_lie_in_a_sealed_header(tmp_path, profile, changes, words):
    path = reseal(file_of(tmp_path, profile, codec="gap"), **changes)
    with pytest.raises(ArtifactError, match=words):
        read(path)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_huge_claim_costs_nothing(tmp_path, profile):
    zeros = {"first": Coded(np.zeros((4, 4), np.uint8), np.zeros(1, np.float32))}
    path = tmp_path / "file"
    artifact.write(path, zeros, profile=profile, codec="gap")
    reseal(path, shape=(1 << 20, 1 << 20))
    tracemalloc.start()
    for use in (
        lambda file: file.dense("first"),
        lambda file: file.csr("first"),
        lambda file: file.codes("first"),
    ):
        with artifact.open(path) as file, pytest.raises(ArtifactTooLarge, match="max_bytes"):
            use(file)
    with pytest.raises(ArtifactTooLarge):
        artifact.read(path)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_the_cap_is_the_callers(tmp_path):
    path = tmp_path / "file"
    plain = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    artifact.write(path, {"a": plain, "b": plain})
    assert len(artifact.read(path, max_bytes=8000)) == 2
    with pytest.raises(ArtifactTooLarge, match="8,000 bytes, above the cap of 7,999"):
        artifact.read(path, max_bytes=7999)
    with artifact.open(path, max_bytes=4000) as file:
        assert np.array_equal(file.dense("a"), plain)


def test_the_cap_holds_for_what_a_decoder_takes_too(tmp_path):
    artifact.write(tmp_path / "file", {"a": np.ones(1000, np.float32)})
    with (
        artifact.open(tmp_path / "file", max_bytes=31_999) as file,
        pytest.raises(ArtifactTooLarge, match=r"decoding a chunk .* 32,000 bytes"),
    ):
        file.dense("a")


def gap(runs, symbols, escape=255, escapes=0, stored=bytes([0])):
    head = bytes([escape]) + varint(len(symbols)) + varint(escapes)
    return head + stored + bytes(runs) + bytes([0]) + bytes(symbols)


BAD_CHUNKS = [
    ("gap", gap([200], [1]), "beyond"),
    ("gap", gap([255], [1]), "do not end"),
    ("gap", gap([20], [1], escape=15), "do not end"),
    ("gap", gap([1], [1], escape=16), "escapes"),
    ("gap", gap([], [], escapes=1 << 50), "escapes"),
    ("gap", gap([1] * 101, [1] * 101), "symbols"),
    ("gap", gap([1], [1]) + b"\0", "left over"),
    ("gap", gap([1], [1])[:-1], "are left"),
    ("deep_compression", varint(1 << 60) + bytes([8]), "entries"),
    ("deep_compression", varint(1) + bytes([9]), "9-bit"),
    ("deep_compression", varint(2) + bytes([8, 0, 90, 90, 0, 1, 1]), "beyond"),
    ("deep_compression", varint(2) + bytes([8, 3]), "mode 3"),
    ("deep_compression", varint(1) + bytes([1, 0, 9, 0, 1]), "gap 9 does not fit a 1-bit"),
    ("packed", bytes([17]), "17 bits"),
    ("packed", bytes([9]) + bytes(113), "9 bits"),
    ("packed", bytes([4]) + bytes(49), "50 bytes are needed"),
    ("packed", bytes([4]) + bytes(49) + b"\x0f", "code 15 of 9"),
    ("dense", bytes([3]), "mode 3"),
    ("dense", bytes([0x48]), "mode 72"),
    ("dense", bytes([8]) + varint(2) + b"\x03\0", "cannot hold"),
    ("dense", bytes([8]) + varint(20) + bytes(20), "deflate stream is broken"),
    ("dense", bytes([8]) + b"\xff" * 12, "nine bytes"),
]


@pytest.mark.parametrize(("codec", "chunk", "words"), BAD_CHUNKS)
def test_a_sealed_payload_that_no_writer_wrote(tmp_path, codec, chunk, words):
    path = tmp_path / "file"
    book = np.arange(9, dtype=np.float32)
    artifact.write(path, {"first": Coded(np.zeros((10, 10), np.uint8), book)}, codec=codec)
    reseal(path, payload=book.astype(np.float16).tobytes() + chunk, nonzeros=0)
    with pytest.raises(CorruptArtifact, match=f"tensor 'first'.*{words}"):
        read(path)


@pytest.mark.parametrize("codec", CODECS)
def test_a_boolean_is_0_or_1(tmp_path, codec):
    path = tmp_path / "file"
    artifact.write(path, {"first": np.array([True, False, True])})
    reseal(path, codec=codec, payload=bytes(CODECS[codec].encode(np.array([1, 0, 2], np.uint8))))
    with pytest.raises(CorruptArtifact, match=r"tensor 'first'.*code 2 of 2"):
        read(path)


@pytest.mark.parametrize("unit", [b"[],", b'{"":{}},', b"[[[[[[[[]]]]]]]],"])
def test_a_header_that_inflates_to_much_more_is_not_inflated(tmp_path, unit):
    text = b'{"t":[],"figures":[' + unit * (15_999_900 // len(unit)) + b"0]}"
    body = varint(0) + varint(len(text)) + deflate(text, DEFAULT)
    head = compact.MAGIC + bytes([1]) + varint(len(body)) + body
    (tmp_path / "file").write_bytes(head + zlib.crc32(head).to_bytes(4, "little"))
    del text
    tracemalloc.start()
    with pytest.raises(CorruptArtifact, match="header counts 1599"):
        artifact.open(tmp_path / "file")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled):
    was = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        for text in ("{}", "{", '{"a":1,"a":1}'):
            with contextlib.suppress(CorruptArtifact):
                json_text.load(text)
            assert gc.isenabled() == enabled
    finally:
        gc.enable() if was else gc.disable()


def test_a_deflate_stream_of_another_length():
    data = np.random.default_rng(0).integers(0, 16, 1000).astype(np.uint8)
    coded = streams._encode(data, 8)
    for count in (999, 1001):
        with pytest.raises(CorruptArtifact, match="exactly"):
            streams.decode(Bytes(coded), count)


def test_a_deflate_bomb_is_not_inflated():
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    coded = bomb.compress(bytes(100_000_000)) + bomb.flush()
    with pytest.raises(CorruptArtifact, match="cannot hold"):
        streams.decode(Bytes(bytes([8]) + varint(len(coded)) + coded), 100_000_000)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 2, 2], [0, 0], [13, 1], [1]])
def test_huffman_tables_that_are_no_complete_code(lengths):
    table = bytes([2]) + varint(len(lengths)) + bytes([0x11] * 40)
    nibbles = np.array(lengths, np.uint8)
    packed = huffman.pack(nibbles, 4)
    with pytest.raises(CorruptArtifact, match="Huffman table"):
        huffman.decode(Bytes(table[: 1 + len(varint(len(lengths)))] + packed + bytes(40)), 5)


def test_huffman_lanes_that_do_not_fit():
    coded = bytearray(huffman.encode(np.tile([0, 0, 1, 0, 0, 2], 4).astype(np.uint8)))
    coded[4] = 31  # bits of the only lane
    with pytest.raises(CorruptArtifact, match="lane"):
        huffman.decode(Bytes(bytes(coded)), 24)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"x", "78"),
        (b"PK\x03\x04....", "PyTorch checkpoint"),
        (b"\x80\x02}q", "pickle"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"<!DOCTYPE html>", "failed download"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (bytes(100), "00 00"),
    ],
)
def test_foreign_files(tmp_path, content, words):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UnsupportedArtifact, match=words):
        artifact.open(tmp_path / "file")


def test_foreign_safetensors(tmp_path):
    save_file({"w": np.ones(3)}, tmp_path / "file")
    with pytest.raises(UnsupportedArtifact, match="did not write"):
        artifact.open(tmp_path / "file")
    save_file({"w": np.ones(3)}, tmp_path / "file", metadata={"lilliput": "{}"})
    with pytest.raises(UnsupportedArtifact, match="rewritten"):
        artifact.open(tmp_path / "file")


def forge(path, header):
    """A safetensors file with this header and a right checksum."""
    text = bytearray(header.encode())
    at = len(SEAL)
    text[at : at + 8] = b"00000000"
    length = len(text).to_bytes(8, "little")
    text[at : at + 8] = b"%08x" % zlib.crc32(length + text)
    path.write_bytes(length + bytes(text))


def header(document, outer=""):
    return (
        '{"__metadata__":{"lilliput.crc32":"########","lilliput":'
        + json.dumps(document)
        + "}"
        + outer
        + "}"
    )


def one(dtype="U8", at=0, **changes):
    """A header with one empty tensor, and something wrong with it."""
    entry = {"c": "raw", "s": [0], "d": "U8", "n": 0, "k": [0, 0]} | changes
    seen = {"dtype": dtype, "shape": [0], "data_offsets": [at, at]}
    return header(json.dumps({"v": 1, "t": {"a": entry}}), f',"a":{json.dumps(seen)}')


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (header('{"v":1,"t":{}}'), None, ""),
        (header('{"v":1,"t":{},"future":1}'), None, ""),
        (header('{"v":2,"t":{}}'), UnsupportedArtifact, "newer Lilliput"),
        (header('{"v":1,"t":{},"q":["lz"]}'), UnsupportedArtifact, "requires lz"),
        (header('{"v":1,"t":{},"q":"lz"}'), CorruptArtifact, "no list"),
        (header('{"v":1,"v":1,"t":{}}'), CorruptArtifact, "twice"),
        (header('{"v":1,"t":{"a":{},"a":{}}}'), CorruptArtifact, "twice"),
        (header('{"v":1,"t":{},"figures":NaN}'), CorruptArtifact, "NaN"),
        (header('{"v":1,"t":{},"figures":[-Infinity]}'), CorruptArtifact, "-Infinity"),
        (header('{"v":1,"t":[]}'), CorruptArtifact, "no.*object|not a JSON object"),
        (header("[" * 100_000), CorruptArtifact, "JSON is broken"),
        (header("9" * 5000), CorruptArtifact, "JSON is broken"),
        (header('{"v":1,"t":{"a":{}}}'), CorruptArtifact, "should stand"),
        (header('{"v":1,"t":{}}', ',"a":{}'), CorruptArtifact, "same tensors"),
        (header(7), CorruptArtifact, "string"),
        (one(c="lzma"), UnsupportedArtifact, "lzma"),
        (one(s=[-1]), CorruptArtifact, "integer"),
        (one(s=[1.5]), CorruptArtifact, "integer"),
        (one(s=[True]), CorruptArtifact, "integer"),
        (one(at=9), CorruptArtifact, "no tensor|truncated"),
        (one(dtype="I8"), CorruptArtifact, "contradict"),
    ],
)  # fmt: skip
def test_forged_headers(tmp_path, text, error, words):
    forge(tmp_path / "file", text)
    if error is None:
        assert read(tmp_path / "file") == {}
        return
    with pytest.raises(error, match=words):
        read(tmp_path / "file")


def test_an_overlap_is_refused(tmp_path):
    path = tmp_path / "file"
    artifact.write(
        path, {"a": np.ones(2, np.uint8), "b": np.ones(2, np.uint8)}, profile="safetensors"
    )
    data = path.read_bytes()
    forged = re.sub(rb"\[2,4\]", b"[1,3]", data[8:-4]).decode()
    forge(path, forged)
    with path.open("ab") as file:
        file.write(data[-4:])
    with pytest.raises(CorruptArtifact, match="belong to no tensor, or to two"):
        artifact.open(path)


def test_a_future_compact_version(tmp_path):
    path = file_of(tmp_path, "compact")
    data = bytearray(path.read_bytes())
    data[4] = 9
    path.write_bytes(data)
    with pytest.raises(UnsupportedArtifact, match="version is 9"):
        artifact.open(path)


@pytest.mark.parametrize("codec", CODECS)
def test_random_bytes_do_not_crash_a_decoder(codec):
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = Bytes(rng.bytes(int(rng.integers(0, 60))))
        with contextlib.suppress(CorruptArtifact):
            CODECS[codec].decode(data, 100, int(rng.choice([1, 2, 4])))


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_mutated_files_do_no_harm():
    script = Path(__file__).parents[2] / "benchmarks" / "coding.py"
    command = [sys.executable, str(script), "--fuzz", "700", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 did harm" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_disk_that_refuses_leaves_everything_as_it_was(tmp_path, before):
    path = tmp_path / "file"
    if before:
        path.write_bytes(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ArtifactError, match=r"cannot write .*file"):
            artifact.write(path, {"w": np.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if before else [])
    assert before is None or path.read_bytes() == before


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ArtifactError, match=r"No space left.*Free some space"):
        artifact.write(tmp_path / "file", tensors())
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        artifact.write(tmp_path / "file", tensors())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs permissions and links")
def test_permissions_and_links_stay(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    artifact.write(path, tensors())
    path.chmod(0o600)
    link.symlink_to("file")
    artifact.write(link, {"w": np.ones(3)}, figures={})
    artifact.annotate(link, link, figures={"score": 1})
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(artifact.read(path)) == ["w"]
    artifact.write(tmp_path / "new", tensors())
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_is_not_called_an_untouched_file(tmp_path):
    assert "untouched" not in _refused(tmp_path, OSError(21, "Is a directory"))
    with pytest.raises(InputError, match="a folder or nothing"):
        artifact.write(tmp_path, tensors())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ArtifactError, match="Make the folder"):
        artifact.write(tmp_path / "none" / "file", tensors())


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    path = tmp_path / "file"
    artifact.write(path, {"w": np.ones(100_000)})
    with artifact.open(path) as file:
        with path.open("r+b") as other:
            other.truncate(20_000)
        with pytest.raises(CorruptArtifact, match=r"tensor 'w': .*truncated while it was open"):
            file.dense("w")
