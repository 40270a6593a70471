"""Every method that prunes single weights, on MNIST at one sparsity a network, beside what the papers report.

    python benchmarks/sparse_lenets.py lenet_300_100         # all rows, three seeds
    python benchmarks/sparse_lenets.py lenet_5 --jobs 2
    python benchmarks/sparse_lenets.py lenet_300_100 --only surgeon --seeds 0
    python benchmarks/sparse_lenets.py lenet_300_100 --table

A dense network trains first, and is where every row of its seed starts: the dense one that trains on, and
the methods, each with the same epochs, optimizer and schedule. All methods leave the same number of
weights, 1 of 56 in LeNet-300-100 and 1 of 108 in LeNet-5, what dynamic network surgery reports without a
loss; ``dynamic_surgery`` finds its sparsity, and its ``deviations`` were chosen on validation images so
that it is at least that. ``magnitude, Han`` has the layers' densities of Han et al. 2015,
``targeted_dropout`` the rate of its paper's ramps. LeNet-5 sees 20,000 of the training images, since a
step of it takes twenty times as long. Bytes are those of the file, weights in float32;
entropy is what an ideal coder of single weights would need.
"""

from __future__ import annotations

import functools
from pathlib import Path
from statistics import mean
from typing import Any

from rows import Row, Rows, Trained, change, markdown, named, parser, seeded, spread, trained

import lilliput
from lilliput import Stage, Task, Train, compress
from lilliput.core import registry
from lilliput.core.recipe import TaskSettings
from lilliput.engine.recipes import build_task

HERE = Path(__file__).resolve().parent
#: Epochs of the dense training and of every row, training images, and what dynamic network surgery reports.
EPOCHS = {"lenet_300_100": (20, 30), "lenet_5": (8, 12)}
IMAGES = {"lenet_300_100": None, "lenet_5": 20_000}
RATIO = {"lenet_300_100": 56, "lenet_5": 108}
HAN = {
    "lenet_300_100": {"fc1": 0.92, "fc2": 0.91, "fc3": 0.74},
    "lenet_5": {"conv1": 0.34, "conv2": 0.88, "fc1": 0.92, "fc2": 0.81},
}
DEVIATIONS = {
    "lenet_300_100": {"fc1": 6.5, "fc2": 4.2, "fc3": 1.0},
    "lenet_5": {"conv1": 0.0, "conv2": 2.0, "fc1": 4.0, "fc2": 2.0},
}
REPORTED = {
    ("lenet_300_100", "magnitude, Han"): "1.59 %, 12x",
    ("lenet_300_100", "dynamic_surgery"): "1.99 %, 56x",
    ("lenet_5", "magnitude, Han"): "0.77 %, 12x",
    ("lenet_5", "dynamic_surgery"): "0.91 %, 108x",
}
TEACHER = {"method": "soft_targets", "teacher": "original", "temperature": 4}


def rows(network: str) -> dict[str, list[dict[str, Any]]]:
    """What acts on the trained network in each row."""
    sparsity = 1.0 - 1.0 / RATIO[network]
    ranked = {"sparsity": sparsity, "allocation": "magnitude"}
    return {
        "dense": [],
        "magnitude, Han": [{"method": "magnitude", "sparsity": HAN[network], "rounds": 3}],
        "magnitude": [
            {"method": "magnitude", "sparsity": sparsity, "scope": "global", "rounds": 10}
        ],
        "gradual": [{"method": "gradual", "sparsity": sparsity, "scope": "global"}],
        "gradual, erk": [{"method": "gradual", "sparsity": sparsity, "allocation": "erk"}],
        "gradual + teacher": [
            {"method": "gradual", "sparsity": sparsity, "scope": "global"}, TEACHER,
        ],
        "dynamic_surgery": [{"method": "dynamic_surgery", "deviations": DEVIATIONS[network]}],
        "targeted_dropout": [{"method": "targeted_dropout", **ranked, "rate": 0.99, "ramp": 0.5}],
        "surgeon": [{"method": "surgeon", **ranked, "rounds": 10, "samples": 2048}],
        "energy_aware": [{"method": "energy_aware", **ranked, "rounds": 3, "samples": 2048}],
    }  # fmt: skip


def train(epochs: int) -> Train:
    return Train(
        epochs=epochs,
        optimizer="adam",
        lr=1e-3,
        lr_schedule="cosine",
        weight_decay=5e-5,
        keep="best",
    )


@functools.cache
def task(network: str) -> Task:
    return build_task(TaskSettings(name="mnist", arguments={"limit": IMAGES[network]}))


def start(network: str, seed: int, work: Path) -> Trained:
    """The dense network of a seed."""
    fresh = seeded(lambda: registry.load("architecture", network)(), seed)
    plan = [Stage(train=train(EPOCHS[network][0]))]
    return trained(
        fresh, task(network), plan, directory=named(work, network, seed, "start"), seed=seed
    )


def do(job: Row, network: str, work: Path) -> Row:
    row, seed = job["row"], job["seed"]
    dense = start(network, seed, work).model
    stage = Stage(methods=rows(network)[row], train=train(EPOCHS[network][1]))
    found = compress(
        dense, task(network), [stage], directory=named(work, network, seed, row), seed=seed
    )
    kept = ("score", "validation", "parameters", "nonzeros", "bytes", "entropy_bytes")
    weights = {
        w.layer: int(w.value.count_nonzero()) / w.value.numel()
        for w in lilliput.core.select.select(found.model)
    }
    return {**{name: found.figures[name] for name in kept}, "density": weights}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("network", choices=sorted(EPOCHS))
    chosen = options.parse_args()
    done = Rows(HERE / "results" / f"sparse_{chosen.network}.json")
    if not chosen.table:
        jobs = [{"row": row} for row in rows(chosen.network)]
        own = functools.partial(do, network=chosen.network)
        done.run_seeds(chosen, jobs, own, functools.partial(start, chosen.network))
    print(table(chosen.network, done.read()))


def table(network: str, done: list[Row]) -> str:
    head = ("row", "error, %", "to dense", "kept, %", "fewer", "bytes", "entropy", "the paper")
    dense = [r for r in done if r["row"] == "dense"]
    lines = []
    for row in rows(network):
        if found := [r for r in done if r["row"] == row]:
            layers = [mean(r["density"][name] for r in found) for name in found[0]["density"]]
            lines.append((
                row, spread([100 - r["score"] for r in found]), change(found, dense, sign=-1),
                ", ".join(f"{100 * density:.1f}" for density in layers),
                f"{mean(r['parameters'] / r['nonzeros'] for r in found):.0f}x",
                f"{mean(r['bytes'] for r in found):,.0f}",
                f"{mean(r['entropy_bytes'] for r in found):,.0f}",
                REPORTED.get((network, row), ""),
            ))  # fmt: skip
    return markdown(head, lines)


if __name__ == "__main__":
    main()
