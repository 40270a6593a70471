"""Accuracy against sparsity on Fashion-MNIST for every method that prunes single weights, and DSD.

    python benchmarks/sparsity_curve.py                      # all rows, three seeds
    python benchmarks/sparsity_curve.py --only gradual --seeds 0 --jobs 2
    python benchmarks/sparsity_curve.py --table              # only print; draws docs/figures

One dense LeNet-300-100 a seed is where all rows start, and every row has the same epochs, optimizer and
schedule. A row is a method at one sparsity of all weights together. ``gradual + teacher`` is the recipe
``high_sparsity_transfer``. ``dense`` is the network that trains on; ``dense_sparse_dense`` has the same
epochs, half of them with 30 % of the weights at zero and half dense again at a tenth of the rate.
"""

from __future__ import annotations

import functools
from pathlib import Path
from statistics import mean
from typing import Any

from curves import curves
from rows import Row, Rows, Trained, change, markdown, named, parser, seeded, spread, trained

from lilliput import Stage, Task, Train, compress
from lilliput.core import registry
from lilliput.core.recipe import TaskSettings
from lilliput.engine.recipes import build_task

HERE = Path(__file__).resolve().parent
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
EPOCHS = 10
TEACHER = {"method": "soft_targets", "teacher": "original", "temperature": 4}
#: What acts at a sparsity; magnitudes of all layers are ranked together where a method allows it.
METHODS: dict[str, Any] = {
    "magnitude": lambda s: [
        {"method": "magnitude", "sparsity": s, "scope": "global", "rounds": 10}
    ],
    "gradual": lambda s: [{"method": "gradual", "sparsity": s, "scope": "global"}],
    "gradual, erk": lambda s: [{"method": "gradual", "sparsity": s, "allocation": "erk"}],
    "gradual + teacher": lambda s: [
        {"method": "gradual", "sparsity": s, "scope": "global"}, TEACHER,
    ],
    "targeted_dropout": lambda s: [
        {
            "method": "targeted_dropout", "sparsity": s, "allocation": "magnitude", "rate": 0.99,
            "ramp": 0.5,
        }
    ],
    "surgeon": lambda s: [
        {"method": "surgeon", "sparsity": s, "allocation": "magnitude", "rounds": 5}
    ],
    "energy_aware": lambda s: [
        {"method": "energy_aware", "sparsity": s, "allocation": "magnitude", "samples": 1024}
    ],
}  # fmt: skip
#: c of dynamic network surgery, which finds its sparsity.
DEVIATIONS = (0.5, 1.0, 2.0, 3.0)


def train(epochs: int = EPOCHS, rate: float = 1e-3) -> Train:
    return Train(
        epochs=epochs,
        optimizer="adam",
        lr=rate,
        lr_schedule="cosine",
        weight_decay=5e-5,
        keep="best",
    )


@functools.cache
def task() -> Task:
    return build_task(TaskSettings(name="fashion_mnist"))


def start(seed: int, work: Path) -> Trained:
    """The dense network of a seed."""
    fresh = seeded(lambda: registry.load("architecture", "lenet_300_100")(), seed)
    home = named(work, "curve", seed, "start")
    return trained(fresh, task(), [Stage(train=train())], directory=home, seed=seed)


def stages(row: str, amount: float) -> list[Stage]:
    if row == "dense":
        return [Stage(train=train())]
    if row == "dense_sparse_dense":
        sparse = {"method": "dense_sparse_dense", "sparsity": amount}
        half = EPOCHS // 2
        return [Stage(methods=[sparse], train=train(half)), Stage(train=train(EPOCHS - half, 1e-4))]
    if row == "dynamic_surgery":
        return [Stage(methods=[{"method": row, "deviations": amount}], train=train())]
    return [Stage(methods=METHODS[row](amount), train=train())]


def do(job: Row, work: Path) -> Row:
    row, amount, seed = job["row"], job["amount"], job["seed"]
    home = named(work, "curve", seed, row, amount)
    found = compress(
        start(seed, work).model, task(), stages(row, amount), directory=home, seed=seed
    ).figures
    kept = ("score", "validation", "parameters", "nonzeros", "bytes")
    return {name: found[name] for name in kept}


def jobs() -> list[Row]:
    found = [{"row": "dense", "amount": 0.0}, {"row": "dense_sparse_dense", "amount": 0.3}]
    found += [{"row": row, "amount": s} for row in METHODS for s in SPARSITIES]
    return found + [{"row": "dynamic_surgery", "amount": c} for c in DEVIATIONS]


def main() -> None:
    options = parser(__doc__).parse_args()
    done = Rows(HERE / "results" / "sparsity_curve.json", epochs=EPOCHS)
    if not options.table:
        done.run_seeds(options, jobs(), do, start)
    print(table(done.read()))
    print(draw(done.read()))


def share_kept(row: Row) -> float:
    return 100 * row["nonzeros"] / row["parameters"]


def draw(done: list[Row]) -> Path:
    """Accuracy over kept weights, a line a method."""
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for job in jobs():
        found = [r for r in done if job.items() <= r.items()]
        if found and job["row"] not in ("dense", "dense_sparse_dense"):
            point = mean(map(share_kept, found)), [r["score"] for r in found]
            lines.setdefault(job["row"], []).append(point)
    dense = mean(r["score"] for r in done if r["row"] == "dense")
    return curves("sparsity_curve.svg", lines, x="weights kept, %", y="accuracy, %", level=dense)


def table(done: list[Row]) -> str:
    head = ("row", "kept, %", "accuracy, %", "to dense")
    dense = [r for r in done if r["row"] == "dense"]
    lines = []
    for job in jobs():
        if found := [r for r in done if job.items() <= r.items()]:
            share = mean(map(share_kept, found))
            scores = spread([r["score"] for r in found])
            lines.append((job["row"], f"{share:.1f}", scores, change(found, dense)))
    return markdown(head, lines)


if __name__ == "__main__":
    main()
