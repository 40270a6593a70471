"""How much faster zeros are where they are skipped: layers alone, and a whole network.

    python benchmarks/sparse_speed.py
    python benchmarks/sparse_speed.py --table

Each ratio is the time of the sparse form over that of the dense layer, median of turns taken side by side,
wall clock, on random weights of which some are zero at random places. Below 1 is faster.
``lilliput.deploy.sparse`` takes the better library, or leaves the layer dense. Run it on a quiet machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rows import markdown, once
from torch import nn

from lilliput.deploy import sparse

FILE = Path(__file__).resolve().parent / "results" / "sparse_speed.json"
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
BATCHES = (1, 32)
THREADS = (1, 2)
#: A layer and the shape of its input; the convolutions are of ResNet-50.
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear 1024 -> 1024": (lambda: nn.Linear(1024, 1024), (1024,)),
    "linear 4096 -> 4096": (lambda: nn.Linear(4096, 4096), (4096,)),
    "1x1 convolution 256 -> 64, 56x56": (lambda: nn.Conv2d(256, 64, 1), (256, 56, 56)),
    "1x1 convolution 512 -> 128, 28x28": (lambda: nn.Conv2d(512, 128, 1), (512, 28, 28)),
    "1x1 convolution 1024 -> 256, 14x14": (lambda: nn.Conv2d(1024, 256, 1), (1024, 14, 14)),
    "1x1 convolution 2048 -> 512, 7x7": (lambda: nn.Conv2d(2048, 512, 1), (2048, 7, 7)),
}
WHOLE = "whole network, four linear layers of 2048"


def pruned(model: nn.Module, sparsity: float) -> nn.Module:
    """Zeros at random places."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.mul_(torch.rand_like(module.weight) >= sparsity)
    return model


def whole() -> nn.Module:
    layers = [m for _ in range(4) for m in (nn.Linear(2048, 2048), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(2048, 10))


def measure() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    cases = {name: (*case, SPARSITIES) for name, case in LAYERS.items()}
    cases[WHOLE] = (whole, (2048,), (0.95,))
    found = []
    for name, (make, shape, sparsities) in cases.items():
        for sparsity in sparsities:
            model = pruned(nn.Sequential(make()), sparsity)
            for batch in BATCHES:
                for threads in THREADS:
                    done = sparse(
                        model, torch.randn(batch, *shape), threads=threads, faster=float("inf"),
                        remove_channels=False, seconds=0.5,
                    )  # fmt: skip
                    first = done.decisions[0]
                    ratio = done.ratio if name == WHOLE else first.ratio
                    found.append({
                        "layer": name, "sparsity": sparsity, "batch": batch, "threads": threads,
                        "ratio": ratio, "library": first.runs,
                    })  # fmt: skip
                    print(found[-1], flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    cases = [(batch, threads) for batch in BATCHES for threads in THREADS]
    head = ("layer", "zeros", *(f"batch {b}, threads {t}" for b, t in cases))
    by = {(r["layer"], r["sparsity"], r["batch"], r["threads"]): r for r in rows}
    lines = []
    for layer, sparsity in dict.fromkeys((r["layer"], r["sparsity"]) for r in rows):
        cells = (by[layer, sparsity, *case] for case in cases)
        lines.append(
            (
                layer,
                f"{100 * sparsity:.0f} %",
                *(f"{c['ratio']:.2f} ({c['library']})" for c in cells),
            )
        )
    return markdown(head, lines)


if __name__ == "__main__":
    once(__doc__, FILE, measure, table)
