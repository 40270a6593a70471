"""Every method that removes channels, side by side on CIFAR-10: score against work.

    python benchmarks/channels.py resnet20               # all rows, three seeds
    python benchmarks/channels.py resnet56 --jobs 2
    python benchmarks/channels.py resnet20 --only taylor --seeds 0
    python benchmarks/channels.py resnet20 --table       # only print

The published weights are first fine-tuned on the data at hand; that network is where every row starts. Then
each row gets the same images, epochs and schedule: a method that removes at once retrains all the time, one
that trains towards zeros first has half of it for that, and the dense row just trains on. Done rows are
kept in ``benchmarks/results/channels_NETWORK.json``; killed and started again, it goes on.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from lilliput.api import compress
from lilliput.core.recipe import ModelSettings, Stage, TaskSettings, Train
from lilliput.core.task import Task
from lilliput.engine.memory import keep_freed_memory
from lilliput.engine.recipes import build_model, build_task
from lilliput.engine.records import environment
from lilliput.errors import LilliputError
from lilliput.io import load

HERE = Path(__file__).resolve().parent
IMAGES = 10_000
WEIGHTS = {
    "resnet20": "$LILLIPUT_DATA/cifar10-resnet/resnet20-12fca82f.th",
    "resnet56": "$LILLIPUT_DATA/cifar10-resnet/resnet56-4bfd9763.th",
}
BUDGETS = (0.7, 0.5)
RATE, SMALL_RATE, RATE_FROM_SCRATCH = 0.01, 1e-4, 0.1

Job = tuple[str, str, float, int, int]  # network, row, budget, seed, epochs


# -- the rows -----------------------------------------------------------------------------------


def train(epochs: int, rate: float = RATE) -> Train:
    return Train(
        epochs=epochs, optimizer="sgd", lr=rate, momentum=0.9, lr_schedule="cosine",
        weight_decay=1e-4, precision="bfloat16", channels_last=True, evaluate_every=epochs,
    )  # fmt: skip


def at_once(epochs: int, *methods: dict[str, Any]) -> list[Stage]:
    """Remove, and retrain all the time."""
    return [Stage(methods=list(methods), train=train(epochs))]


def towards_zeros(epochs: int, *methods: dict[str, Any], rate: float = RATE) -> list[Stage]:
    """Train towards zeros in the first half, remove, retrain in the second."""
    first = Stage(methods=list(methods), train=train(epochs // 2, rate))
    return [first, Stage(train=train(epochs - epochs // 2, rate))]


def shrinking(epochs: int, *methods: dict[str, Any]) -> list[Stage]:
    """The same at a small rate: behind a normalization short filters move fast, and a lasso makes short ones.

    At the rate of the other rows the network was lost (validation 29 % where this gives 81 %).
    """
    return towards_zeros(epochs, *methods, rate=SMALL_RATE)


# Li 2017, ResNet-56: these blocks are sensitive and stay whole; of the others the first layer is thinned.
_LI_WHOLE = {
    "A": ["layer1.7", "layer2.0", "layer3.0", "layer3.8"],
    "B": ["layer1.7", "layer1.8", "layer2.0", "layer2.7", "layer3.0", "layer3.8"],
}
# 10 % of every group go in A, 60, 30 and 10 % in B; what stays is rounded down.
_LI_KEEP = {"A": (14 / 16, 28 / 32, 57 / 64), "B": (6 / 16, 22 / 32, 57 / 64)}


def li(row: str) -> dict[str, Any]:
    """The paper's rates for ResNet-56 in place of a budget."""
    return {
        "method": "filter_l1",
        "layers": ["layer*.conv1", *(f"!{block}.conv1" for block in _LI_WHOLE[row])],
        "keep": {f"layer{n}.*.conv1": keep for n, keep in enumerate(_LI_KEEP[row], 1)},
    }


def wen(strength: float) -> dict[str, Any]:
    """Filters under a proximal group lasso."""
    penalty = {"filters": strength}
    return {"method": "structured_sparsity", "penalty": penalty, "update": "proximal"}


PLANS: dict[str, tuple[Any, dict[str, Any]]] = {
    "random": (at_once, {"method": "random"}),
    "filter_l1": (at_once, {"method": "filter_l1"}),
    "filter_l1, greedy": (at_once, {"method": "filter_l1", "selection": "greedy"}),
    "filter_l2": (at_once, {"method": "filter_l2"}),
    "fpgm": (at_once, {"method": "fpgm"}),
    "thinet": (at_once, {"method": "thinet"}),
    "apoz": (at_once, {"method": "apoz", "rounds": 3, "scope": "layer"}),
    "taylor": (at_once, {"method": "taylor", "rounds": 10}),
    "taylor, weight x gradient": (at_once, {"method": "taylor", "criterion": "weight_gradient"}),
    "slimming": (towards_zeros, {"method": "slimming", "penalty": 1e-3}),
    "soft_filter": (towards_zeros, {"method": "soft_filter"}),
}
OWN_AMOUNT: dict[str, tuple[Any, dict[str, Any]]] = {
    "Li's A": (at_once, li("A")),
    "Li's B": (at_once, li("B")),
    # Here the penalty says how much goes: from nothing to nearly everything within a factor of 4.
    "bn_ista, weaker": (towards_zeros, {"method": "bn_ista", "penalty": 0.3}),
    "bn_ista, stronger": (towards_zeros, {"method": "bn_ista", "penalty": 0.45}),
    "structured_sparsity, weaker": (shrinking, wen(141.0)),
    "structured_sparsity, stronger": (shrinking, wen(158.0)),
}
TEACHER = {"method": "soft_targets", "teacher": "original", "temperature": 4}


def stages(row: str, budget: float, epochs: int) -> list[Stage]:
    """What happens to the fine-tuned network in one row."""
    if row == "dense":
        return [Stage(train=train(epochs))]
    name, _, taught = row.partition(" + ")
    plan, settings = (PLANS | OWN_AMOUNT)[name]
    amount = {} if name in OWN_AMOUNT else {"budget": {"macs": budget}}
    methods = [{**settings, **amount, "round_to": 1}]
    return list(plan(epochs, *methods, *([TEACHER] if taught else [])))


def rows(network: str) -> Iterator[tuple[str, float]]:
    yield "dense", 1.0
    if network == "resnet56":  # with what the paper reports of the FLOPs
        yield from (("Li's A", 0.896), ("Li's B", 0.724))
        yield from ((row, 0.5) for row in ("filter_l1 + teacher", "taylor + teacher"))
        return
    for name in ("bn_ista", "structured_sparsity"):  # what comes out is in the table
        yield from ((f"{name}, weaker", 0.7), (f"{name}, stronger", 0.5))
    for budget in BUDGETS:
        for row in (*PLANS, "from scratch", "filter_l1 + teacher", "taylor + teacher"):
            yield row, budget


# -- one row ------------------------------------------------------------------------------------


@functools.cache
def task() -> Task:
    arguments = {"source": "jpeg", "augment": True, "limit": IMAGES}
    return build_task(TaskSettings(name="cifar10", arguments=arguments))


def start(network: str, seed: int, epochs: int, work: Path) -> nn.Module:
    """The published network, fine-tuned on the data at hand; each seed has its own."""
    path = work / f"{network}-{seed}-start"
    published = build_model(ModelSettings(architecture=network, weights=WEIGHTS[network]))
    return compress(
        published, task(), [Stage(train=train(epochs))], directory=path, seed=seed
    ).model


def from_scratch(like: nn.Module, seed: int) -> nn.Module:
    """A network as thin as ``like`` with new random weights; it gets the epochs of both trainings."""
    torch.manual_seed(seed)  # a run that goes on begins from the same weights
    fresh = copy.deepcopy(like).train()
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return fresh


def do(job: Job, work: Path) -> dict[str, Any]:
    network, row, budget, seed, epochs = job
    dense = start(network, seed, epochs, work)
    home = work / f"{network}-{seed}-{row}-{budget}".replace(" ", "_").replace(",", "")
    if row == "from scratch":
        thin = load(work / f"{network}-{seed}-filter_l1-{budget}" / "model.safetensors")
        plan, model = [Stage(train=train(2 * epochs, RATE_FROM_SCRATCH))], from_scratch(thin, seed)
    else:
        plan, model = stages(row, budget, epochs), dense
    figures = compress(model, task(), plan, directory=home, seed=seed).figures
    kept = ("score", "baseline_score", "validation", "parameters", "macs", "bytes", "latency_ratio")
    widths = {
        change["where"]: [change["before"], change["after"]]
        for stage in json.loads((home / "changes.json").read_text())
        for change in stage
        if change["what"] == "channels"
    }
    return {
        "row": row, "budget": budget, "seed": seed, "epochs": epochs,
        **{name: figures[name] for name in kept}, "widths": widths,
    }  # fmt: skip


# -- all of them --------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("network", choices=sorted(WEIGHTS))
    parser.add_argument("--only", nargs="*", default=[""], help="parts of rows' names")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=1, help="rows at the same time")
    parser.add_argument("--work", type=Path, default=Path("runs/channels"))
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    options = parser.parse_args()
    path = HERE / "results" / f"channels_{options.network}.json"
    if not options.table:
        run_all(path, options)
    print(table(options.network, read(path)["rows"]))


def run_all(path: Path, options: argparse.Namespace) -> None:
    done = {(r["row"], r["budget"], r["seed"], r["epochs"]) for r in read(path)["rows"]}
    with ProcessPoolExecutor(options.jobs, initializer=settle) as pool:
        for seed in options.seeds:
            # All rows of a seed start from one network: it must be there before they do.
            pool.submit(prepare, options.network, seed, options.epochs, options.work).result()
            jobs = [
                (options.network, row, budget, seed, options.epochs)
                for row, budget in rows(options.network)
                if any(part in row for part in options.only)
                and (row, budget, seed, options.epochs) not in done
            ]
            for finished in as_completed([pool.submit(attempt, job, options.work) for job in jobs]):
                keep(path, finished.result())


def settle() -> None:
    """What a process does first."""
    torch.set_num_threads(1)
    keep_freed_memory()


def prepare(network: str, seed: int, epochs: int, work: Path) -> None:
    start(network, seed, epochs, work)


def attempt(job: Job, work: Path) -> dict[str, Any]:
    """A row that is refused is told and left out."""
    try:
        return do(job, work)
    except LilliputError as error:
        return {"row": job[1], "budget": job[2], "seed": job[3], "refused": str(error)}


def keep(path: Path, row: dict[str, Any]) -> None:
    if "refused" in row:
        print(f"{row['row']} at {row['budget']}, seed {row['seed']}: {row['refused']}", flush=True)
        return
    print(
        f"{row['row']} at {row['budget']}, seed {row['seed']}: {row['baseline_score']:.2f} -> "
        f"{row['score']:.2f}, {row['macs']:,} MACs, {row['parameters']:,} parameters",
        flush=True,
    )
    content = read(path)
    content["rows"].append(row)
    content["rows"].sort(key=lambda r: (-r["budget"], r["row"], r["seed"]))
    content["environment"] = environment()
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"images": IMAGES, "rows": []}


def table(network: str, done: list[dict[str, Any]]) -> str:
    lines = [
        "| row | MACs | parameters | accuracy, % | to dense |",
        "|---|---:|---:|---:|---:|",
    ]
    dense = [r for r in done if r["row"] == "dense"]
    for row, budget in rows(network):
        found = [r for r in done if (r["row"], r["budget"]) == (row, budget)]
        if found:
            lines.append(line(row, found, dense))
    return "\n".join(lines)


def line(row: str, found: list[dict[str, Any]], dense: list[dict[str, Any]]) -> str:
    scores = [r["score"] for r in found]
    spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else " (one seed)"
    reference = {r["seed"]: r for r in dense}
    pairs = [(r, reference[r["seed"]]) for r in found if r["seed"] in reference]

    def share(name: str) -> str:
        return f"{100 * mean(r[name] / d[name] for r, d in pairs):.0f} %" if pairs else ""

    change = f"{mean(r['score'] - d['score'] for r, d in pairs):+.2f}" if pairs else ""
    cells = (row, share("macs"), share("parameters"), f"{mean(scores):.2f}{spread}", change)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
