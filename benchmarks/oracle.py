"""How well each criterion ranks channels: Spearman's correlation with what removing each really costs.

    python benchmarks/oracle.py                    # LeNet-5 on MNIST, ResNet-20 on CIFAR-10
    python benchmarks/oracle.py lenet_5 --seeds 0 1 2
    python benchmarks/oracle.py --table            # only print

As in Molchanov et al. (2017, arXiv 1611.06440): one channel at a time is silenced, nothing is retrained, and
the oracle is the size of the change of the loss. Criteria and oracle see the same few training images
(``IMAGES``), in eval mode and without augmentation. LeNet-5 is trained first, with the settings of its
shipped recipes, or taken from files; ResNet-20 has its published weights (``LILLIPUT_DATA``) and meets a
lossy copy of CIFAR-10. The cost is one pass over the images a channel: minutes on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import nn

import lilliput
from lilliput.core.recipe import ModelSettings, TaskSettings
from lilliput.core.run import Run
from lilliput.core.task import Task
from lilliput.engine.memory import keep_freed_memory
from lilliput.engine.recipes import build_model, build_task
from lilliput.engine.records import environment
from lilliput.measure.oracle import oracle, rank_correlation
from lilliput.mechanisms.budget import normalized
from lilliput.mechanisms.groups import Groups, find_groups

RESULT = Path(__file__).resolve().parent / "results" / "oracle.json"
WEIGHTS = "$LILLIPUT_DATA/cifar10-resnet/resnet20-12fca82f.th"
TASKS = {
    "lenet_5": TaskSettings(name="mnist"),
    "resnet20": TaskSettings(name="cifar10", arguments={"source": "jpeg"}),
}
TRAIN = lilliput.Train(
    epochs=10, lr_schedule="cosine", keep="best", precision="auto", channels_last=True
)
IMAGES = {"lenet_5": 1024, "resnet20": 512}
DRAWS = 20  # of random scores, of which the table has the mean

Row = dict[str, Any]


def criteria(network: str) -> dict[str, Any]:
    """The criteria by their names in the table; activations, gradients, weights, chance."""
    make = lilliput.methods
    rest: Row = {"keep": 0.5, "round_to": 1}
    every: Row = {**rest, "samples": IMAGES[network]}
    found = {
        "Taylor, activation x gradient": make.Taylor(**every),
        "the same, averaged over the batch first": make.Taylor(**every, batch_mean=True),
        "Taylor, weight x gradient": make.Taylor(**every, criterion="weight_gradient"),
        "mean activation": make.Taylor(**every, criterion="mean"),
        "standard deviation of the activation": make.Taylor(**every, criterion="std"),
        "APoZ": make.Apoz(**every, unrectified="not_positive"),
        "mean squared weight": make.Taylor(**rest, criterion="weight"),
        "L1 norm of the filter": make.FilterL1(**rest),
        "L2 norm of the filter": make.FilterL2(**rest),
        "distance to the other filters (FPGM)": make.Fpgm(**rest),
    }
    if network == "resnet20":
        found["scale of batch normalization"] = make.Slimming(**rest, penalty=1e-4)
    return {**found, "random": make.Random(**rest)}


# -- one network ----------------------------------------------------------------------------------


def measure(network: str, seed: int, model: nn.Module) -> Row:
    """The oracle of one network, and each criterion's correlation with it."""
    started, task = time.process_time(), task_of(network)
    groups = find_groups(model, task.example_inputs())
    signed = oracle(model, groups.groups, task.train, task.loss, absolute=False)
    ranked = {
        name: correlations(method, model, task, groups, [np.abs(change) for change in signed])
        for name, method in criteria(network).items()
    }
    together = np.concatenate(signed)
    return {
        "network": network,
        "seed": seed,
        "images": IMAGES[network],
        "channels": len(together),
        "helpful_to_remove": float((together < 0).mean()),
        "criteria": ranked,
        "cpu_seconds": round(time.process_time() - started),
    }


def network_of(network: str, seed: int, options: argparse.Namespace) -> nn.Module:
    """ResNet-20 as published, or a LeNet-5 from a file or trained here."""
    if network == "resnet20":
        return build_model(ModelSettings(architecture=network, weights=WEIGHTS))
    if options.lenet_5 is not None:
        return lilliput.load(options.lenet_5[options.seeds.index(seed)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = lilliput.build(network)
    stages = [lilliput.Stage(train=TRAIN)]
    home, task = options.work / f"oracle-{network}-{seed}", build_task(TASKS[network])
    return lilliput.compress(start, task, stages, directory=home, seed=seed).model


def task_of(network: str) -> Task:
    """The task with a few training images in its train, which are the same whenever they are read."""
    task = build_task(TASKS[network])
    batches = list(Run(model=nn.Identity(), task=task).calibration(IMAGES[network]))
    return dataclasses.replace(task, train=batches)


def correlations(
    method: Any, model: nn.Module, task: Task, groups: Groups, truth: Sequence[np.ndarray]
) -> Row:
    """Of one criterion: mean over the layers, over all channels, and that with normalized layers."""
    seeds = range(DRAWS if method.method_name() == "random" else 1)
    found = [
        correlation(scores(method, model, task, groups, seed), groups, truth) for seed in seeds
    ]
    return {**found[0], **{what: mean(row[what] for row in found) for what in COLUMNS}}


def scores(
    method: Any, model: nn.Module, task: Task, groups: Groups, seed: int
) -> list[np.ndarray | None]:
    """What the criterion says of each channel; None for a group that it does not judge."""
    run = Run(model=model, task=task, methods=[method], seed=seed)
    given = method.scores(run, groups)
    taking = method.takes_part(groups)
    return [np.asarray(s, float) if mine else None for s, mine in zip(given, taking, strict=True)]


def correlation(
    given: Sequence[np.ndarray | None], groups: Groups, truth: Sequence[np.ndarray]
) -> Row:
    scaled = [None if s is None else normalized(s, "l2") for s in given]
    plain = rank_correlation(groups.groups, given, truth)
    together = rank_correlation(groups.groups, scaled, truth).overall
    return {
        "layer_mean": plain.mean,
        "all": plain.overall,
        "all_normalized": together,
        "layers": plain.as_dict()["layers"],
    }


COLUMNS = {"layer_mean": "per layer", "all": "all layers", "all_normalized": "all, normalized"}


# -- all of them ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("network", nargs="?", choices=list(TASKS), help="default: both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of LeNet-5")
    parser.add_argument("--lenet-5", type=Path, nargs="+", help="trained files, one for each seed")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    options = parser.parse_args()
    if options.lenet_5 is not None and len(options.lenet_5) != len(options.seeds):
        parser.error("--lenet-5 wants a file for each of --seeds")
    if not options.table:
        torch.set_num_threads(1)
        keep_freed_memory()
        for network in [options.network] if options.network else TASKS:
            for seed in options.seeds if network == "lenet_5" else [0]:
                keep(measure(network, seed, network_of(network, seed, options)))
    print(table(read()["runs"]))


def keep(row: Row) -> None:
    """Put a network's figures in the place of its earlier ones."""
    print(f"{row['network']}, seed {row['seed']}: {row['cpu_seconds']} s", flush=True)
    place: Callable[[Row], Any] = lambda r: (r["network"], r["seed"])  # noqa: E731
    others = [r for r in read()["runs"] if place(r) != place(row)]
    content = {"environment": environment(), "runs": sorted([*others, row], key=place)}
    RESULT.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read() -> Row:
    if not RESULT.exists():
        return {"runs": []}
    content: Row = json.loads(RESULT.read_text(encoding="utf-8"))
    return content


def table(runs: list[Row]) -> str:
    """A row a criterion; for each network three columns, means over its seeds."""
    networks = {name: [r for r in runs if r["network"] == name] for name in TASKS}
    known = {name: found for name, found in networks.items() if found}
    heads = [f"{name}, {column}" for name in known for column in COLUMNS.values()]
    lines = [f"| criterion | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for criterion in criteria("resnet20"):
        cells = [cell(found, criterion, what) for found in known.values() for what in COLUMNS]
        lines.append(f"| {criterion} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(runs: list[Row], criterion: str, what: str) -> str:
    values = [r["criteria"][criterion][what] for r in runs if criterion in r["criteria"]]
    if not values:
        return ""
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
