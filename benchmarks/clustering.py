"""Time and quality of one-dimensional k-means on a layer of 25 million weights.

Run ``python benchmarks/clustering.py``. Prints the tables and writes ``results/clustering.json``
beside this file. Three questions: how long each initialization takes on the large layer, how far
the binned search is from the optimum where the optimum can be computed, and how scikit-learn's
KMeans compares where it is installed.
"""

from __future__ import annotations

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
from numpy.typing import NDArray

from lilliput.mechanisms import clustering
from lilliput.mechanisms.clustering import Init, kmeans

CLUSTERS = 32
LARGE = 25_000_000
SMALL = 1_000_000
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


def main() -> None:
    report: Row = {
        "machine": {
            "processor": processor(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "threads": 1,
        },
        "settings": {"clusters": CLUSTERS, "large": LARGE, "small": SMALL},
        "large_layer": large_layer(),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "against_the_optimum": against_the_optimum(),
        "against_scikit_learn": against_scikit_learn(),
    }
    show(f"{LARGE:,} Laplace weights into {CLUSTERS} values", report["large_layer"])
    show(f"{SMALL:,} values: binned search over optimum", report["against_the_optimum"])
    show(f"{SMALL:,} Laplace weights", report["against_scikit_learn"])
    print(f"\npeak memory of the large layer: {report['peak_memory_gb']:.2f} GB")
    target = Path(__file__).parent / "results" / "clustering.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
