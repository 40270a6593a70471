"""The curve of data-free neuron merging on MNIST: accuracy against the share of parameters removed.

    python benchmarks/neuron_merging.py                      # trains both LeNets for 10 epochs first
    python benchmarks/neuron_merging.py --seeds 0 1 2
    python benchmarks/neuron_merging.py --lenet-5 model.safetensors

Each network is thinned without data and without retraining, in four ways: merging as in the paper, the same
without its surgery ``a_i += a_j``, neurons at random, and by the paper's own heuristic. LeNet-300-100 loses
the same fraction of both hidden layers, LeNet-5 neurons of its fully connected layer only, as in the paper.
Needs MNIST (``LILLIPUT_DATA``). Trained networks are kept in ``--work``; started again it trains no more.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import lilliput
from lilliput.core import registry
from lilliput.core.method import Method
from lilliput.core.task import Task, evaluate
from lilliput.engine.records import environment

Row = dict[str, Any]

KEEP = (0.8, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.05, 0.04)
HEURISTIC = (0.25, 0.5, 0.75, 1.0)
# Caffe's settings for LeNet, but for the schedule. Without weight decay fewer neurons are redundant.
TRAIN: Row = {
    "optimizer": "sgd",
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "lr_schedule": "cosine",
}
LAYERS = {"lenet_300_100": ["fc1", "fc2"], "lenet_5": ["fc1"]}
PAPER = "about 85 % of the parameters of an MNIST network, without significant loss (abstract)"
RESULT = Path(__file__).resolve().parent / "results" / "neuron_merging.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lenet-300-100", type=Path, help="trained artifact, instead of training")
    parser.add_argument("--lenet-5", type=Path, help="trained artifact, instead of training")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = registry.load("task", "mnist")()
    runs = [measure(name, seed, task, options) for name in LAYERS for seed in options.seeds]
    for name in LAYERS:
        show(name, [run for run in runs if run["network"] == name])
    content = {"paper": PAPER, "epochs": options.epochs, "environment": environment(), "runs": runs}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


def measure(name: str, seed: int, task: Task, options: argparse.Namespace) -> Row:
    """All curves of one trained network."""
    model = trained(name, seed, task, options)
    found = {
        "network": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dense": evaluate(model, task.reported, task.score),
        "nearest": nearest(model.get_submodule(LAYERS[name][0])),
    }
    for kind, methods in ways(LAYERS[name]).items():
        points = (thinned(model, method, task, seed) for method in methods())
        found[kind] = sorted(points, key=lambda point: point["removed"])
    print(f"{name} seed {seed}: dense {found['dense']:.2f} %", flush=True)
    return found


@torch.no_grad()
def nearest(layer: Any) -> float:
    """How far the most similar neuron is, in units of a neuron's own norm; the median over the neurons."""
    weights = torch.cat([layer.weight, layer.bias[:, None]], dim=1).double()
    distances = torch.cdist(weights, weights).fill_diagonal_(float("inf")).amin(dim=1)
    return float((distances / weights.norm(dim=1)).median())


def trained(name: str, seed: int, task: Task, options: argparse.Namespace) -> nn.Module:
    given = getattr(options, name)
    if given is not None:
        return lilliput.load(given)
    train = lilliput.Train(epochs=options.epochs, keep="best", **TRAIN)
    home = options.work / f"neuron_merging-{name}-{seed}-{options.epochs}"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = lilliput.build(name)
    result = lilliput.compress(
        start, task, [lilliput.Stage(train=train)], directory=home, seed=seed
    )
    return result.model


def ways(layers: list[str]) -> dict[str, Callable[[], Iterable[Method]]]:
    methods = lilliput.methods
    rest: dict[str, Any] = {"layers": layers, "round_to": 1}
    return {
        "merged": lambda: [methods.NeuronMerging(keep=k, **rest) for k in KEEP],
        "without_surgery": lambda: [
            methods.NeuronMerging(keep=k, surgery=False, **rest) for k in KEEP
        ],
        "random": lambda: [methods.Random(keep=k, **rest) for k in KEEP],
        "heuristic": lambda: [methods.NeuronMerging(heuristic=h, **rest) for h in HEURISTIC],
    }


def thinned(dense: nn.Module, method: Method, task: Task, seed: int) -> Row:
    """One point of a curve: nothing is trained."""
    model = copy.deepcopy(dense)
    lilliput.attach(model, method, task=task, seed=seed).finish()
    whole, left = (sum(p.numel() for p in m.parameters()) for m in (dense, model))
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return {
        "removed": 1 - left / whole,
        "accuracy": evaluate(model, task.reported, task.score),
        "widths": [layer.out_features for layer in layers[:-1]],
        **({} if getattr(method, "heuristic", None) is None else {"fraction": method.heuristic}),
    }


def without_loss(run: Row, kind: str, points: float) -> float:
    """The largest share removed so that it, and every smaller share measured, loses at most so much."""
    best = 0.0
    for point in run[kind]:
        if run["dense"] - point["accuracy"] > points:
            break
        best = point["removed"]
    return best


def show(name: str, runs: list[Row]) -> None:
    print(f"\n{name}: dense {mean(r['dense'] for r in runs):.2f} %; paper: {PAPER}")
    print("  parameters removed   merged   without surgery   random")
    for number, point in enumerate(runs[0]["merged"]):
        cells = [
            mean(r[kind][number]["accuracy"] for r in runs)
            for kind in ("merged", "without_surgery", "random")
        ]
        print(f"  {point['removed']:18.1%} {cells[0]:8.2f} {cells[1]:17.2f} {cells[2]:8.2f}")
    for kind in ("merged", "without_surgery", "random"):
        shares = [mean(without_loss(r, kind, limit) for r in runs) for limit in (0.5, 1.0)]
        print(f"  {kind}: {shares[0]:.1%} removed at -0.5 points, {shares[1]:.1%} at -1 point")
    print(f"  the most similar neuron is {mean(r['nearest'] for r in runs):.2f} norms away")
    for number, fraction in enumerate(HEURISTIC):
        found = [sorted(r["heuristic"], key=lambda p: p["fraction"])[number] for r in runs]
        removed, accuracy = (mean(p[key] for p in found) for key in ("removed", "accuracy"))
        print(f"  heuristic, {fraction:.0%} of its number: {removed:.1%} removed, {accuracy:.2f} %")


if __name__ == "__main__":
    main()
