"""Time to find the channels of a network and to cut half of them, side by side with Torch-Pruning.

    python benchmarks/analysis_time.py            # prints the table, writes results/analysis_time.json

Both start from a whole network and end with a thin one: find what belongs together, rank by the sum of
magnitudes, cut half of every group. They take turns in one process on one thread; the figure is the
median of CPU times. Neither checks the result here (Lilliput's own check is timed apart). Needs
``torch-pruning`` and torchvision.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from lilliput.engine.records import environment
from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.surgery import cut
from lilliput.methods.prune._norms import norms
from lilliput.testing import stand_in_for_torchvision

RESULTS = Path(__file__).parent / "results" / "analysis_time.json"
KEEP = 0.5
DEPTHS = (50, 100, 200, 500, 1000)


def plain(depth: int) -> nn.Module:
    """Convolutions one after the other, each with a normalization."""
    layers: list[nn.Module] = []
    for number in range(depth):
        layers += [
            nn.Conv2d(3 if number == 0 else 16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def from_torchvision(name: str) -> nn.Module:
    stand_in_for_torchvision()
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def lilliput_halves(model: nn.Module, x: torch.Tensor, checked: bool = False) -> None:
    groups = find_groups(model, x)
    gone = {}
    for number, group in enumerate(groups.groups):
        order = np.argsort(norms(model, group, 1))
        gone[number] = np.sort(order[: group.channels - max(1, round(group.channels * KEEP))])
    cut(model, groups, {g: c for g, c in gone.items() if len(c)}, inputs=x if checked else None)


def torch_pruning_halves(model: nn.Module, x: torch.Tensor) -> None:
    import torch_pruning as tp

    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    importance = tp.importance.MagnitudeImportance(p=1)
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=importance, pruning_ratio=1 - KEEP, ignored_layers=[head]
    )
    pruner.step()


def timed(act: Callable[[], None]) -> float:
    begin = time.process_time()
    act()
    return time.process_time() - begin


def compare(
    name: str, model: nn.Module, x: torch.Tensor, rounds: int, peer: bool
) -> dict[str, Any]:
    model.eval()
    sides: dict[str, Callable[[nn.Module], None]] = {
        "lilliput": lambda m: lilliput_halves(m, x),
        "lilliput_checked": lambda m: lilliput_halves(m, x, checked=True),
    }
    if peer:
        sides["torch_pruning"] = lambda m: torch_pruning_halves(m, x)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    row: dict[str, Any] = {"network": name, "rounds": rounds}
    for _ in range(rounds):
        for side, act in sides.items():
            fresh = copy.deepcopy(model)
            seconds[side].append(timed(lambda act=act, fresh=fresh: act(fresh)))  # type: ignore[misc]
            row[f"{side}_parameters"] = sum(p.numel() for p in fresh.parameters())
    row["seconds"] = {side: round(median(taken), 4) for side, taken in seconds.items()}
    if peer:
        row["times_faster"] = round(row["seconds"]["torch_pruning"] / row["seconds"]["lilliput"], 2)
    return row


def main() -> None:
    warnings.filterwarnings("ignore")
    sys.setrecursionlimit(100_000)  # the peer walks the graph by recursion
    torch.set_num_threads(1)
    rows = []
    image = torch.zeros(1, 3, 64, 64)
    for name in ("resnet50", "mobilenet_v2", "densenet121", "densenet201"):
        rows.append(compare(name, from_torchvision(name), image, rounds=5, peer=True))
        tell(rows[-1])
    for depth in DEPTHS:
        small = torch.zeros(1, 3, 8, 8)
        rows.append(compare(f"{depth} convolutions", plain(depth), small, rounds=3, peer=True))
        tell(rows[-1])
    RESULTS.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n")


def tell(row: dict[str, Any]) -> None:
    times = "  ".join(f"{side} {seconds:.3f} s" for side, seconds in row["seconds"].items())
    print(f"{row['network']:20s} {times}  {row.get('times_faster', '')}", flush=True)


if __name__ == "__main__":
    main()
