"""Time and quality of one-dimensional k-means on a layer of 25 million weights.

    python benchmarks/clustering.py                       # about 5 CPU minutes
    python benchmarks/clustering.py --only codebook_methods

Prints the tables and writes ``results/clustering.json`` beside this file; a part that is not asked for keeps
its figures. How long each initialization takes on the large layer; how far the binned search is from the
optimum where the optimum can be computed; how scikit-learn's KMeans compares where it is installed; and how
long each method with a codebook takes to put one on such a layer, beside scikit-learn in the same run.

Methods that ask for curvature take it from the gradients of four batches (``curvature: adam``), whose time
is a row of its own; with 5,000 outputs ``gauss_newton`` needs as many backward passes a sample. scikit-learn
makes at most 10 turns here, and has not come to rest then. ``soft_weight_sharing`` is not among them: its
values are found in training, step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy and scikit-learn are imported

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from lilliput import Task, accuracy
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.core.types import Batch
from lilliput.mechanisms import clustering
from lilliput.mechanisms.clustering import Init, kmeans
from lilliput.mechanisms.curvature import second_moments
from lilliput.mechanisms.scalar_quantizers import entropy
from lilliput.methods import Codebook, EntropyCodebook, HessianCodebook

CLUSTERS = 32
LARGE = 25_000_000
SMALL = 1_000_000
TURNS = 10
FILE = Path(__file__).resolve().parent / "results" / "clustering.json"
Row = dict[str, Any]


def draws(size: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    side = np.where(rng.random(size) < 0.3, -0.1, 0.1)
    samples = {
        "laplace": rng.laplace(0, 0.02, size),
        "gaussian": rng.normal(0, 0.02, size),
        "bimodal": side + rng.normal(0, 0.02, size),
        "student t, 2 degrees": rng.standard_t(2, size),
    }
    return {name: values.astype(np.float32) for name, values in samples.items()}


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, wall seconds, and CPU seconds (which other processes do not disturb)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def large_layer() -> list[Row]:
    values = np.random.default_rng(0).laplace(0, 0.02, LARGE).astype(np.float32)
    rows: list[Row] = []
    # The first run of a process pays for fresh memory pages: it is kept as a row of its own.
    for init in ("exact", *get_args(Init)):
        found, wall, cpu = timed(partial(kmeans, values, CLUSTERS, init=init))
        rows.append(
            {
                "init": init if rows else "exact, first run",
                "seconds": wall,
                "cpu_seconds": cpu,
                "centroids": found.centroids.size,
                "distortion": found.distortion,
            }
        )
    for row in rows:
        row["relative_to_exact"] = row["distortion"] / rows[0]["distortion"]
    return rows


def against_the_optimum() -> list[Row]:
    rows: list[Row] = []
    for name, values in draws(SMALL).items():
        binned, wall, _ = timed(partial(kmeans, values, CLUSTERS, init="exact"))
        limit, clustering.EXACT_LIMIT = clustering.EXACT_LIMIT, SMALL
        optimum, full, _ = timed(partial(kmeans, values, CLUSTERS, init="exact"))
        clustering.EXACT_LIMIT = limit
        excess = binned.distortion / optimum.distortion - 1
        rows.append(
            {"draw": name, "seconds": wall, "optimum_seconds": full, "excess_distortion": excess}
        )
    return rows


def against_scikit_learn() -> list[Row]:
    try:
        import sklearn  # type: ignore[import-untyped]
        from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    except ImportError:
        return []
    values = draws(SMALL)["laplace"]
    start = np.linspace(values.min(), values.max(), CLUSTERS)[:, None]
    other = KMeans(CLUSTERS, init=start, n_init=1, max_iter=300, tol=0)
    rows = []
    for name, run in (
        (f"scikit-learn {sklearn.__version__}, linear", partial(other.fit, values[:, None])),
        ("lilliput, linear", partial(kmeans, values, CLUSTERS, init="linear")),
        ("lilliput, exact", partial(kmeans, values, CLUSTERS, init="exact")),
    ):
        found, wall, cpu = timed(run)
        error = getattr(found, "inertia_", None) or found.distortion
        rows.append({"what": name, "seconds": wall, "cpu_seconds": cpu, "distortion": float(error)})
    return rows


def codebook_methods() -> list[Row]:
    """Each method on the large layer: from trained weights to shared values that could train."""
    values = np.random.default_rng(0).laplace(0, 0.02, LARGE).astype(np.float32)
    bits = (CLUSTERS - 1).bit_length()
    methods = {
        "codebook": Codebook(bits=bits),
        "hessian_codebook": HessianCodebook(bits=bits, curvature="adam"),
        "entropy_codebook": EntropyCodebook(clusters=CLUSTERS, curvature="adam"),
        "entropy_codebook, uniform": EntropyCodebook(quantizer="uniform", curvature="adam"),
    }
    rows = [{"what": name, **attached(method, values)} for name, method in methods.items()]
    return [curvature(values), *rows, *scikit_learn(values)]


def layer(values: NDArray[np.float32]) -> tuple[nn.Module, list[Batch]]:
    """A square layer of these weights, and what it is to see."""
    side = round(values.size**0.5)
    net = nn.Linear(side, side, bias=False)
    net.weight = nn.Parameter(torch.from_numpy(values.copy()).view(side, side))
    torch.manual_seed(0)
    batches = [Batch(torch.randn(32, side), torch.randint(side, (32,))) for _ in range(4)]
    return nn.Sequential(net), batches


def curvature(values: NDArray[np.float32]) -> Row:
    net, batches = layer(values)
    measure = partial(second_moments, net, select(net), batches, functional.cross_entropy)
    _, wall, cpu = timed(measure)
    return {"what": "the curvature alone", "seconds": wall, "cpu_seconds": cpu}


def attached(method: Any, values: NDArray[np.float32]) -> Row:
    net, batches = layer(values)
    task = Task(batches, batches, batches, functional.cross_entropy, accuracy)
    run = Run(model=net, task=task, device=torch.device("cpu"), original=net, methods=[method])
    _, wall, cpu = timed(partial(method.attach, run))
    shared: NDArray[np.float32] = net[0].weight.detach().numpy().ravel()  # type: ignore[index]
    return {"seconds": wall, "cpu_seconds": cpu, **quality(values, shared)}


def quality(values: NDArray[np.float32], shared: NDArray[np.float32]) -> Row:
    """Distinct values, bits of a code at best, and squared error over squared weights."""
    found, codes = np.unique(shared, return_inverse=True)
    error = float(np.sum(np.square(shared - values), dtype=np.float64))
    return {
        "values": found.size, "entropy": entropy(codes),
        "relative_error": error / float(np.sum(np.square(values), dtype=np.float64)),
    }  # fmt: skip


def scikit_learn(values: NDArray[np.float32]) -> list[Row]:
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        return []
    start = np.linspace(values.min(), values.max(), CLUSTERS)[:, None]
    other = KMeans(CLUSTERS, init=start, n_init=1, max_iter=TURNS, tol=0)
    _, wall, cpu = timed(partial(other.fit, values[:, None]))
    shared = other.cluster_centers_[other.labels_, 0].astype(np.float32)
    row = {"what": f"scikit-learn's KMeans, {TURNS} turns", "seconds": wall, "cpu_seconds": cpu}
    return [row | quality(values, shared)]


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(title: str, rows: list[Row]) -> None:
    print(f"\n{title}")
    for row in rows:
        cells = (f"{k} {v:.6g}" if isinstance(v, float) else f"{v}" for k, v in row.items())
        print("  " + "  ".join(cells))


PARTS: dict[str, tuple[str, Callable[[], list[Row]]]] = {
    "large_layer": (f"{LARGE:,} Laplace weights into {CLUSTERS} values", large_layer),
    "against_the_optimum": (f"{SMALL:,} values: binned search over optimum", against_the_optimum),
    "against_scikit_learn": (f"{SMALL:,} Laplace weights", against_scikit_learn),
    "codebook_methods": (f"{LARGE:,} Laplace weights by each method", codebook_methods),
}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    torch.set_num_threads(1)
    report: Row = json.loads(FILE.read_text()) if FILE.exists() else {}
    machine = {
        "processor": processor(), "python": platform.python_version(), "numpy": np.__version__,
        "threads": 1,
    }  # fmt: skip
    report["settings"] = {"clusters": CLUSTERS, "large": LARGE, "small": SMALL}
    for part in options.parse_args().only:
        title, measure = PARTS[part]
        report[part] = measure()
        report.setdefault("machines", {})[part] = (
            machine  # each part was measured on one of its own
        )
        if part == "large_layer":
            report["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        show(title, report[part])
    FILE.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
