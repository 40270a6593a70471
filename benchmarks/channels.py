"""Every method that removes channels, side by side on CIFAR-10: score against work.

    python benchmarks/channels.py resnet20               # all rows, three seeds
    python benchmarks/channels.py resnet56 --jobs 2
    python benchmarks/channels.py resnet20 --only taylor --seeds 0
    python benchmarks/channels.py resnet56 --only dense better --epochs 8 --images 50000
    python benchmarks/channels.py resnet20 --table       # only print

The published weights are first fine-tuned on the data at hand; that network is where every row starts. Then
each row gets the same images, epochs and schedule: a method that removes at once retrains all the time, one
that trains towards zeros first has half of it for that, and the dense row just trains on. Done rows are
kept in ``benchmarks/results/channels_NETWORK.json``; killed and started again, it goes on.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from rows import Row, Rows, Trained, change, markdown, named, parser, spread, trained
from torch import nn

from lilliput.api import compress
from lilliput.core.recipe import ModelSettings, Stage, TaskSettings, Train
from lilliput.core.task import Task
from lilliput.engine.recipes import build_model, build_task
from lilliput.errors import InputError
from lilliput.io import load
from lilliput.mechanisms.initializing import draw_fresh_weights

HERE = Path(__file__).resolve().parent
IMAGES, EPOCHS = 10_000, 6
WEIGHTS = {
    "resnet20": "$LILLIPUT_DATA/cifar10-resnet/resnet20-12fca82f.th",
    "resnet56": "$LILLIPUT_DATA/cifar10-resnet/resnet56-4bfd9763.th",
}
BUDGETS = (0.7, 0.5)
RATE, RATE_FROM_SCRATCH = 0.01, 0.1


# -- the rows -----------------------------------------------------------------------------------


def train(epochs: int, rate: float = RATE) -> Train:
    return Train(
        epochs=epochs, optimizer="sgd", lr=rate, momentum=0.9, lr_schedule="cosine",
        weight_decay=1e-4, precision="auto", channels_last=True,
        evaluate_every=max(1, epochs),
    )  # fmt: skip


def at_once(epochs: int, *methods: dict[str, Any]) -> list[Stage]:
    """Remove, and retrain all the time."""
    return [Stage(methods=list(methods), train=train(epochs))]


def towards_zeros(
    epochs: int, *methods: dict[str, Any], rate: float = RATE, then: float = RATE
) -> list[Stage]:
    """Train towards zeros in the first half, remove, retrain in the second."""
    first = Stage(methods=list(methods), train=train(epochs // 2, rate))
    return [first, Stage(train=train(epochs - epochs // 2, then))]


def shrinking(epochs: int, *methods: dict[str, Any]) -> list[Stage]:
    """The same at small rates: behind a normalization short filters move fast, and a lasso makes short ones.

    At the rate of the other rows the first stage lost the network. Of 1e-4, 1e-3 and 1e-2 for the second one
    the middle was best on validation images.
    """
    return towards_zeros(epochs, *methods, rate=1e-4, then=1e-3)


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


# The residual stream stays whole, what lies between the two convolutions of a block is thinned.
INSIDE = {"method": "filter_l1", "layers": ["layer*.conv1"]}


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
    "filter_l1, inside blocks": (at_once, {**INSIDE, "budget": {"macs": 0.5}}),
    "Li's A": (at_once, li("A")),
    "Li's B": (at_once, li("B")),
    # Here the penalty says how much goes: from nothing to nearly everything within a factor of 4.
    "bn_ista, weaker": (towards_zeros, {"method": "bn_ista", "penalty": 0.3}),
    "bn_ista, stronger": (towards_zeros, {"method": "bn_ista", "penalty": 0.45}),
    "structured_sparsity, weaker": (shrinking, wen(141.0)),
    "structured_sparsity, stronger": (shrinking, wen(158.0)),
}
TEACHER = {"method": "soft_targets", "teacher": "original", "temperature": 4}
#: The name of the rows whose teacher is not the network that they start from, but the dense row's.
BETTER = "better teacher"


def stages(row: str, budget: float, epochs: int, teacher: nn.Module | None = None) -> list[Stage]:
    """What happens to the fine-tuned network in one row."""
    if row == "dense":
        return [Stage(train=train(epochs))]
    name, _, taught = row.partition(" + ")
    lesson = TEACHER if teacher is None else {**TEACHER, "teacher": teacher}
    plan, settings = (PLANS | OWN_AMOUNT)[name]
    amount = {} if name in OWN_AMOUNT else {"budget": {"macs": budget}}
    methods = [{**settings, **amount, "round_to": 1}]
    return list(plan(epochs, *methods, *([lesson] if taught else [])))


def rows(network: str) -> Iterator[tuple[str, float]]:
    yield "dense", 1.0
    if network == "resnet56":  # with what the paper reports of the FLOPs
        yield from (("Li's A", 0.896), ("Li's B", 0.724))
        yield from (("filter_l1 + teacher", 0.5), ("taylor + teacher", 0.5))
        yield from ((f"filter_l1, inside blocks + {who}", 0.5) for who in ("teacher", BETTER))
        return
    for name in ("bn_ista", "structured_sparsity"):  # what comes out is in the table
        yield from ((f"{name}, weaker", 0.7), (f"{name}, stronger", 0.5))
    for budget in BUDGETS:
        for row in (*PLANS, "from scratch", "filter_l1 + teacher", "taylor + teacher"):
            yield row, budget


# -- one row ------------------------------------------------------------------------------------


@functools.cache
def task(images: int = IMAGES) -> Task:
    arguments = {"source": "jpeg", "augment": True, "limit": images}
    return build_task(TaskSettings(name="cifar10", arguments=arguments))


def start(network: str, seed: int, work: Path) -> Trained:
    """The published network, fine-tuned on the data at hand; each seed has its own."""
    published = build_model(ModelSettings(architecture=network, weights=WEIGHTS[network]))
    home = named(work, network, seed, "start")
    return trained(published, task(), [Stage(train=train(EPOCHS))], directory=home, seed=seed)


def from_scratch(like: nn.Module, seed: int) -> nn.Module:
    """A network as thin as ``like`` with new random weights; it gets the epochs of both trainings."""
    fresh = copy.deepcopy(like).train()
    draw_fresh_weights(fresh, seed)
    return fresh


def do(job: Row, network: str, work: Path) -> Row:
    row, budget, seed, epochs = (job[k] for k in ("row", "budget", "seed", "epochs"))
    dense = start(network, seed, work).model
    home, data = home_of(job, network, work), task(job["images"])
    if row == "from scratch":
        thin = compress(dense, data, stages("filter_l1", budget, 0), seed=seed).model
        plan, model = [Stage(train=train(2 * epochs, RATE_FROM_SCRATCH))], from_scratch(thin, seed)
    else:
        plan, model = stages(row, budget, epochs, better(job, network, work)), dense
    figures = compress(model, data, plan, directory=home, seed=seed).figures
    kept = ("score", "baseline_score", "validation", "parameters", "macs", "bytes", "latency_ratio")
    return {**{name: figures[name] for name in kept}, "widths": widths(home)}


def better(job: Row, network: str, work: Path) -> nn.Module | None:
    """The dense network that was trained as long as the row, for the rows that it teaches."""
    if not job["row"].endswith(BETTER):
        return None
    found = home_of({**job, "row": "dense", "budget": 1.0}, network, work) / "model.safetensors"
    if not found.exists():
        raise InputError(f"run the dense row first: {found} is its network, and the teacher here.")
    return load(found)


def home_of(job: Row, network: str, work: Path) -> Path:
    parts = ("seed", "row", "budget", "images", "epochs")
    return named(work, network, *(job[part] for part in parts))


def widths(home: Path) -> dict[str, list[int]]:
    """How many channels the layers had before and have after."""
    return {
        change["where"]: [change["before"], change["after"]]
        for stage in json.loads((home / "changes.json").read_text())
        for change in stage
        if change["what"] == "channels"
    }


# -- all of them --------------------------------------------------------------------------------


def main() -> None:
    options = parser(__doc__)
    options.add_argument("network", choices=sorted(WEIGHTS))
    options.add_argument("--images", type=int, default=IMAGES, help="that a row trains on, at most")
    options.add_argument("--epochs", type=int, default=EPOCHS, help="of a row")
    chosen = options.parse_args()
    done = Rows(HERE / "results" / f"channels_{chosen.network}.json")
    if not chosen.table:
        amount = {"images": chosen.images, "epochs": chosen.epochs}
        jobs = [{"row": row, "budget": left, **amount} for row, left in rows(chosen.network)]
        with_network = functools.partial(do, network=chosen.network)
        done.run_seeds(chosen, jobs, with_network, functools.partial(start, chosen.network))
    print(table(chosen.network, done.read()))


def table(network: str, done: list[Row]) -> str:
    head = ("row", "MACs", "parameters", "accuracy, %", "to dense")
    amounts = sorted({(r["images"], r["epochs"]) for r in done})
    lines = [line for amount in amounts for line in lines_of(network, done, *amount)]
    return markdown(head, lines)


def lines_of(network: str, done: list[Row], images: int, epochs: int) -> Iterator[tuple[str, ...]]:
    """The rows that trained as much, compared with the dense network that trained as much."""
    alike = [r for r in done if (r["images"], r["epochs"]) == (images, epochs)]
    dense = {r["seed"]: r for r in alike if r["row"] == "dense"}
    more = "" if (images, epochs) == (IMAGES, EPOCHS) else f", {images:,} images, {epochs} epochs"
    for row, budget in rows(network):
        if found := [r for r in alike if (r["row"], r["budget"]) == (row, budget)]:
            yield line(row + more, found, dense)


def line(row: str, found: list[Row], dense: dict[int, Row]) -> tuple[str, ...]:
    pairs = [(r, dense[r["seed"]]) for r in found if r["seed"] in dense]

    def share(name: str) -> str:
        return f"{100 * mean(r[name] / d[name] for r, d in pairs):.0f} %" if pairs else ""

    score, apart = spread([r["score"] for r in found]), change(found, list(dense.values()))
    return row, share("macs"), share("parameters"), score, apart


if __name__ == "__main__":
    main()
