"""How small and how fast the artifact is, and whether hostile files can hurt the reader.

    python benchmarks/coding.py              speed and size; a table, and results/coding.json
    python benchmarks/coding.py --fuzz 20000 mutated files; exits with 1 if one did harm

Weights are synthetic and independent: real networks have structure that the codecs may use, so
their ratio to the order-0 entropy is a little lower. Times are CPU seconds on one thread, the
best of five for decoding (of the whole file, into fresh memory) and of three for encoding.
`/entropy` is coded bytes without codebooks over the order-0 entropy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lilliput import artifact
from lilliput.artifact import format as layout
from lilliput.artifact.entries import CODEC_NAMES, DTYPE_NAMES, Document, Entry
from lilliput.errors import ArtifactError

RESULTS = Path(__file__).parent / "results" / "coding.json"

# Speed and size ----------------------------------------------------------------------------------


@dataclass
class Row:
    network: str
    codecs: str
    weights: int
    nonzeros: float
    file_bytes: int
    header_bytes: int
    size_ratio: float
    bytes_over_entropy: float
    encode_mweights_s: float
    decode_gb_s: float
    decode_s: float


Network = dict[str, artifact.Tensor]


def sparse(
    rng: np.random.Generator, shape: tuple[int, ...], kept: float, levels: int
) -> artifact.Coded:
    """Independent zeros, and values that are normal around zero with a gap in the middle."""
    codes = np.zeros(shape, np.uint8)
    for row in codes.reshape(-1, int(np.prod(shape[1:]))):
        at = np.flatnonzero(rng.random(len(row), np.float32) < kept)
        spread = np.abs(rng.normal(0, levels / 5, len(at)))
        side = rng.random(len(at), np.float32) < 0.5
        half = (levels - 1) // 2
        row[at] = 1 + np.minimum(spread, half - 1).astype(np.uint8) + half * side
    values = np.linspace(0.02, 0.2, (levels - 1) // 2)
    return artifact.Coded(codes, np.r_[0, -values, values].astype(np.float32))


def eight_bit(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> artifact.Coded:
    codes = np.clip(np.rint(rng.normal(128, sigma, shape)), 0, 255).astype(np.uint8)
    return artifact.Coded(codes, ((np.arange(256) - 128) * 0.01).astype(np.float32))


def with_biases(rng: np.random.Generator, weights: dict[str, artifact.Coded]) -> Network:
    network: Network = {}
    for name, weight in weights.items():
        network[f"{name}.weight"] = weight
        network[f"{name}.bias"] = rng.normal(0, 0.1, weight.shape[0]).astype(np.float16)
    return network


def lenet_300_100(
    rng: np.random.Generator, kept: tuple[float, float, float], levels: int
) -> Network:
    shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
    pairs = zip(shapes.items(), kept, strict=True)
    return with_biases(
        rng, {name: sparse(rng, shape, part, levels) for (name, shape), part in pairs}
    )


def lenet_5(rng: np.random.Generator) -> Network:
    shapes = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}
    kept = {"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "fc2": 0.19}
    return with_biases(rng, {name: sparse(rng, shapes[name], kept[name], 33) for name in shapes})


def vgg_16(rng: np.random.Generator) -> Network:
    """138 million weights, 7.5 % of them kept, about as in Deep Compression."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    weights = {
        f"conv{i}": sparse(rng, (after, before, 3, 3), 0.33, 255)
        for i, (before, after) in enumerate(itertools.pairwise(widths))
    }
    weights["fc6"] = sparse(rng, (4096, 25088), 0.04, 33)
    weights["fc7"] = sparse(rng, (4096, 4096), 0.04, 33)
    weights["fc8"] = sparse(rng, (1000, 4096), 0.23, 33)
    return with_biases(rng, weights)


def networks(rng: np.random.Generator) -> Iterator[tuple[str, Network, str]]:
    yield "LeNet-300-100, 3.3 % of 16", lenet_300_100(rng, (0.03, 0.05, 0.25), 17), "auto"
    yield "LeNet-300-100, 8 % of 32", lenet_300_100(rng, (0.08, 0.09, 0.26), 33), "auto"
    yield "the same", lenet_300_100(rng, (0.08, 0.09, 0.26), 33), "deep_compression"
    yield "LeNet-5, 8 % of 32", lenet_5(rng), "auto"
    side = (4096, 4096)
    for sigma in (16, 28, 36):
        yield f"dense int8, sigma {sigma}", {"w": eight_bit(rng, side, sigma)}, "auto"
    for kept, levels in ((0.2, 33), (0.1, 33), (0.05, 17), (0.01, 17)):
        yield f"{kept:.0%} of {levels - 1} values", {"w": sparse(rng, side, kept, levels)}, "auto"
    yield "10% of 32 values", {"w": sparse(rng, side, 0.1, 33)}, "deep_compression"
    yield "VGG-16, 7.5 %", vgg_16(rng), "auto"


def measure(folder: Path, name: str, network: Network, codec: str) -> Row:
    path = folder / "network.llp"
    report = artifact.write(path, network, codec=codec)
    encoding = seconds(lambda: artifact.write(path, network, codec=codec), 3)
    decoding = seconds(lambda: artifact.read(path), 5)
    codecs = Counter(tensor.codec for tensor in report.tensors if tensor.is_coded)
    return Row(
        network=name,
        codecs=" ".join(sorted(codecs)),
        weights=report.weights,
        nonzeros=report.nonzeros / report.weights,
        file_bytes=report.file_bytes,
        header_bytes=report.header_bytes,
        size_ratio=report.ratio,
        bytes_over_entropy=report.entropy_ratio,
        encode_mweights_s=report.weights / encoding / 1e6,
        decode_gb_s=report.dense_bytes / decoding / 1e9,
        decode_s=decoding,
    )


def seconds(work: Callable[[], object], times: int) -> float:
    """CPU seconds of the quickest of some runs: other processes disturb it least."""
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def benchmark() -> int:
    rng = np.random.default_rng(0)
    rows = []
    head = (
        "network",
        "codecs",
        "non-zero",
        "file bytes",
        "header",
        "ratio",
        "/entropy",
        "Mw/s",
        "GB/s",
        "s",
    )
    line = "{:26} {:22} {:>8} {:>11} {:>6} {:>7} {:>8} {:>6} {:>6} {:>6}"
    print(line.format(*head))
    with tempfile.TemporaryDirectory() as folder:
        for name, network, codec in networks(rng):
            row = measure(Path(folder), name, network, codec)
            rows.append(row)
            print(
                line.format(
                    row.network,
                    row.codecs,
                    f"{row.nonzeros:.1%}",
                    row.file_bytes,
                    row.header_bytes,
                    f"{row.size_ratio:.1f}x",
                    f"{row.bytes_over_entropy:.4f}",
                    f"{row.encode_mweights_s:.0f}",
                    f"{row.decode_gb_s:.2f}",
                    f"{row.decode_s:.3f}",
                ),
                flush=True,
            )
    environment = {
        "processor": processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "threads": 1,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"environment": environment, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
    )
    return 0


# Hostile files -----------------------------------------------------------------------------------

CAP = 16 << 20
#: Address space beyond what the process has at the start: the cap, its working memory, and slack.
ROOM = 256 << 20
SLOWEST = 5.0

Mutation = Callable[[np.random.Generator, list[bytes]], bytes]


def victims(folder: Path) -> list[bytes]:
    """Small valid files of both profiles that use every codec, chunks and a shared codebook."""
    rng = np.random.default_rng(1)
    coded = sparse(rng, (40, 50), 0.1, 17)
    floats = np.where(rng.random((30, 30)) < 0.2, rng.normal(size=(30, 30)), 0).astype(np.float32)
    wide = artifact.Coded(
        rng.integers(0, 300, (20, 20)).astype(np.uint16), rng.normal(size=300).astype(np.float32)
    )
    network: Network = {
        "gap": coded, "huffman": replace(coded, codes=coded.codes[:10]), "floats": floats,
        "packed": eight_bit(rng, (8, 9), 20), "dense": eight_bit(rng, (30, 30), 20), "wide": wide,
        "bf16": artifact.BFloat16(np.arange(12, dtype=np.uint16)), "half": np.ones(5, np.float16),
        "steps": np.array(7, np.int64), "none": np.zeros((0, 3), np.float32),
    }  # fmt: skip
    codecs = {"gap": "gap", "huffman": "deep_compression", "floats": "deep_compression"}
    codecs |= {"packed": "packed", "dense": "dense"}
    files = []
    for profile in ("safetensors", "compact"):
        for chunk in (1 << 20, 600):
            path = folder / "victim"
            sections = {"structure": {"architecture": "x"}, "figures": {"score": 0.5}}
            artifact.write(
                path, network, codec=codecs, profile=profile, chunk_weights=chunk, **sections
            )
            files.append(path.read_bytes())
    return files


def flip(rng: np.random.Generator, files: list[bytes]) -> bytes:
    data = bytearray(files[rng.integers(len(files))])
    for at in rng.integers(len(data), size=rng.integers(1, 5)):
        data[at] ^= 1 << rng.integers(8)
    return bytes(data)


def overwrite(rng: np.random.Generator, files: list[bytes]) -> bytes:
    data = bytearray(files[rng.integers(len(files))])
    start = int(rng.integers(len(data)))
    end = min(len(data), start + int(rng.integers(1, 40)))
    data[start:end] = rng.choice(
        [rng.bytes(end - start), bytes(end - start), b"\xff" * (end - start)]
    )
    return bytes(data)


def truncate(rng: np.random.Generator, files: list[bytes]) -> bytes:
    data = files[rng.integers(len(files))]
    return data[: rng.integers(len(data))]


def extend(rng: np.random.Generator, files: list[bytes]) -> bytes:
    data = files[rng.integers(len(files))]
    at = int(rng.integers(len(data) + 1))
    return data[:at] + rng.bytes(int(rng.integers(1, 30))) + data[at:]


def splice(rng: np.random.Generator, files: list[bytes]) -> bytes:
    one, other = (files[i] for i in rng.integers(len(files), size=2))
    return one[: rng.integers(len(one))] + other[rng.integers(len(other)) :]


def resealed_payload(rng: np.random.Generator, files: list[bytes]) -> bytes:
    """Change payload bytes and correct every checksum, so that the decoders meet them."""
    document, profile, payloads = dissect(files[rng.integers(len(files))])
    name = str(rng.choice([name for name in payloads if payloads[name]]))
    payload = bytearray(payloads[name])
    for at in rng.integers(len(payload), size=rng.integers(1, 4)):
        payload[at] = rng.choice([payload[at] ^ 1 << rng.integers(8), 0, 255, rng.integers(256)])
    payloads[name] = bytes(payload)
    entries = document.entries | {name: checksummed(document.entries[name], payloads[name])}
    return assemble(replace(document, entries=entries), profile, payloads)


def resealed_header(rng: np.random.Generator, files: list[bytes]) -> bytes:
    """Change what the header says of a tensor or two, and correct every checksum."""
    document, profile, payloads = dissect(files[rng.integers(len(files))])
    entries = dict(document.entries)
    for name in rng.choice(list(entries), size=rng.integers(1, 3)):
        entries[name] = lie(rng, entries[name], list(entries))
    return assemble(replace(document, entries=entries), profile, payloads)


def lie(rng: np.random.Generator, entry: Entry, names: list[str]) -> Entry:
    number = int(rng.choice([0, 1, 2, 255, 256, 1 << 20, 1 << 40, 1 << 62, rng.integers(2000)]))
    field = rng.choice(
        ["shape", "axes", "nonzeros", "rows", "levels", "book", "codec", "dtype", "stored", "parts"]
    )
    shape = list(entry.shape)
    if field == "shape" and shape:
        shape[rng.integers(len(shape))] = number
    changes: dict[str, Any] = {
        "shape": {"shape": tuple(shape)},
        "axes": {"shape": entry.shape + (number,) * int(rng.integers(1, 40))},
        "nonzeros": {"nonzeros": number},
        "rows": {"rows": number},
        "levels": {"levels": number},
        "book": {"book": str(rng.choice(names))},
        "codec": {"codec": str(rng.choice(CODEC_NAMES))},
        "dtype": {"dtype": str(rng.choice(DTYPE_NAMES))},
        "stored": {"stored": str(rng.choice(DTYPE_NAMES))},
        "parts": {"parts": tuple((number, crc) for _, crc in entry.parts)},
    }
    return replace(entry, **changes[str(field)])


def dissect(data: bytes) -> tuple[Document, str, dict[str, bytes]]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        document, profile, _ = layout.unseal(file, len(data))
    spans = {name: slice(e.offset, e.offset + e.size) for name, e in document.entries.items()}
    return document, profile, {name: data[span] for name, span in spans.items()}


def checksummed(entry: Entry, payload: bytes) -> Entry:
    parts, at = [], 0
    for length, _ in entry.parts:
        parts.append((length, zlib.crc32(payload[at : at + length])))
        at += length
    return replace(entry, parts=tuple(parts))


def assemble(document: Document, profile: str, payloads: dict[str, bytes]) -> bytes:
    header, order = layout.seal(document, profile)
    return header + b"".join(payloads[name] for name in order)


MUTATIONS: dict[Mutation, bool] = {  # and whether it leaves the checksums wrong
    flip: True, overwrite: True, truncate: True, extend: True, splice: True,
    resealed_payload: False, resealed_header: False,
}  # fmt: skip


def use(path: Path) -> dict[str, np.ndarray]:
    """Read everything in every way."""
    with artifact.open(path, max_bytes=CAP) as file:
        file.verify()
        file.report()
        for name in file.names():
            file.csr(name)
            if file.info(name).levels:
                file.codes(name)
        return {name: file.dense(name) for name in file.names()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


def fuzz(count: int, seed: int) -> int:
    rng = np.random.default_rng(seed)
    tally: Counter[tuple[str, str]] = Counter()
    slowest, harmed = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        files = victims(Path(folder))
        path = Path(folder) / "mutated"
        path.write_bytes(files[0])
        truth = use(path)
        limit_memory()
        for case in range(count):
            mutation = list(MUTATIONS)[case % len(MUTATIONS)]
            path.write_bytes(mutation(rng, files))
            start = time.perf_counter()
            outcome = judge(path, truth if MUTATIONS[mutation] else None)
            seconds = time.perf_counter() - start
            slowest = max(slowest, seconds)
            tally[mutation.__name__, outcome] += 1
            if outcome.startswith("HARM") or seconds > SLOWEST:
                harmed += 1
                print(f"case {case} (seed {seed}), {mutation.__name__}: {outcome}, {seconds:.2f} s")
    for (name, outcome), times in sorted(tally.items()):
        print(f"{name:18} {outcome:22} {times:6}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count} files, {harmed} did harm; slowest {slowest:.3f} s, peak memory {peak:.0f} MB")
    return int(harmed > 0)


def judge(path: Path, truth: dict[str, np.ndarray] | None) -> str:
    try:
        found = use(path)
    except ArtifactError as error:
        return type(error).__name__
    except Exception as error:
        return f"HARM: {type(error).__name__}: {error}"
    if truth is not None and not same(found, truth):
        return "HARM: wrong weights accepted"
    return "read"


def limit_memory() -> None:
    """Make an allocation beyond the cap fail, instead of only being large."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fuzz", type=int, metavar="N", help="read N mutated files instead")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return benchmark() if options.fuzz is None else fuzz(options.fuzz, options.seed)


if __name__ == "__main__":
    sys.exit(main())
