"""What thin networks gain in ONNX Runtime, with widths rounded to multiples of 8 and without.

    python benchmarks/thin_latency.py             # prints the table, writes results/thin_latency.json

The networks have random weights, which do not change the time. Dense, rounded and unrounded sessions take
turns run by run on one thread; the figure is the median of the ratios to the dense run beside it.
Needs onnx, onnxscript, onnxruntime and torchvision.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from analysis_time import from_torchvision
from torch import nn

import lilliput
from lilliput.engine.records import environment
from lilliput.measure import macs, size

RESULTS = Path(__file__).parent / "results" / "thin_latency.json"
ROUND_TO = {"rounded": 8, "unrounded": 1}


def session(model: nn.Module, x: torch.Tensor, place: Path) -> Any:
    import onnxruntime

    torch.onnx.export(model, (x,), str(place), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(place), options, providers=["CPUExecutionProvider"])


def one_run(running: Any, feed: dict[str, Any]) -> float:
    begin = time.perf_counter()
    running.run(None, feed)
    return time.perf_counter() - begin


def over(times: list[float], dense: list[float]) -> float:
    return median(t / d for t, d in zip(times, dense, strict=True))


def compare(name: str, keep: float, rounds: int) -> dict[str, Any]:
    x = torch.randn(1, 3, 224, 224)
    dense = from_torchvision(name).eval()
    models = {"dense": dense}
    for label, step in ROUND_TO.items():
        models[label] = lilliput.thin(
            dense, x, keep=keep, by="filter_l1", round_to=step
        ).model.eval()
    with tempfile.TemporaryDirectory() as folder:
        running = {n: session(m, x, Path(folder) / f"{n}.onnx") for n, m in models.items()}
    feeds = {n: {s.get_inputs()[0].name: x.numpy()} for n, s in running.items()}
    for n in [*running] * 3:
        one_run(running[n], feeds[n])
    times: dict[str, list[float]] = {n: [] for n in running}
    for _ in range(rounds):
        for n in running:
            times[n].append(one_run(running[n], feeds[n]))
    whole = macs(dense, x).total
    return {
        "network": name, "keep": keep, "rounds": rounds,
        "dense_milliseconds": round(1e3 * median(times["dense"]), 2),
        **{
            label: {
                "latency_ratio": round(over(times[label], times["dense"]), 4),
                "macs_ratio": round(macs(models[label], x).total / whole, 4),
                "parameters": size(models[label]).parameters,
            }
            for label in ROUND_TO
        },
    }  # fmt: skip


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in ("resnet50", "mobilenet_v2"):
        for keep in (0.7, 0.5):
            rows.append(compare(name, keep, rounds=40))
            tell(rows[-1])
    RESULTS.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n")


def tell(row: dict[str, Any]) -> None:
    parts = "  ".join(
        f"{label}: time {row[label]['latency_ratio']:.3f}, MACs {row[label]['macs_ratio']:.3f}"
        for label in ROUND_TO
    )
    print(f"{row['network']:14s} keep {row['keep']}  {parts}", flush=True)


if __name__ == "__main__":
    main()
