"""The papers of few bits on MNIST, beside what they report.

    python benchmarks/few_bits_mnist.py               # all rows, three seeds
    python benchmarks/few_bits_mnist.py --only codebook --seeds 0
    python benchmarks/few_bits_mnist.py --table

Files: a dense LeNet trains, and each row makes it small; the size is that of the file on the disk. Single
bits and integers: a fully connected network of three wide layers, each row in the same training from random
weights (``wide, float`` is the network in float). Settings were chosen on validation images of seed 0. The
papers of single bits train longer on wider layers (2,048) and without a validation split; half-wave
quantization has no row on MNIST in its paper.
"""

from __future__ import annotations

import functools
from pathlib import Path
from statistics import mean
from typing import Any

from rows import Row, Rows, Trained, change, markdown, named, parser, seeded, spread, trained
from torch import nn

from lilliput import ArtifactSettings, Stage, Task, Train, compress
from lilliput.core import registry
from lilliput.core.recipe import TaskSettings
from lilliput.engine.recipes import build_task

FILE = Path(__file__).resolve().parent / "results" / "few_bits_mnist.json"
TEACHER = {"method": "soft_targets", "teacher": "original", "temperature": 2}
WIDE = {"inputs": 784, "hidden": [1024, 1024, 1024], "norm": True}
INNER = ["!fc1", "!fc4"]


def train(epochs: int, rate: float = 1e-3, **more: Any) -> Train:
    return Train(
        epochs=epochs, optimizer="adam", lr=rate, lr_schedule="cosine", keep="best", **more
    )


def pruned(sparsity: Any, *methods: dict[str, Any], epochs: int, **scope: Any) -> list[Stage]:
    """Prune under the dense network's teaching, then let weights share values."""
    gradual = {"method": "gradual", "sparsity": sparsity, **scope, "schedule": {"end": 0.4}}
    return [
        Stage(methods=[gradual, TEACHER], train=train(epochs, weight_decay=1e-5)),
        Stage(methods=[*methods, TEACHER], train=train(5, 3e-4)),
    ]


_SMALL_300 = {"fc1": 0.97, "fc2": 0.95, "fc3": 0.7}
_SMALL_5 = {"conv1": 0.5, "conv2": 0.925, "fc1": 0.99, "fc2": 0.88}

#: Row -> network, what happens to it (trained; wide ones: of random weights), what the paper reports.
ROWS: dict[str, tuple[str, list[Stage], str]] = {
    "LeNet-300-100, dense": ("lenet_300_100", [Stage(train=train(30, weight_decay=1e-5))], ""),
    "LeNet-300-100, hessian_codebook": (
        "lenet_300_100",
        pruned(_SMALL_300, {"method": "hessian_codebook", "bits": 4}, epochs=30),
        "",
    ),
    "LeNet-300-100, entropy_codebook": (
        "lenet_300_100",
        pruned(_SMALL_300, {"method": "entropy_codebook", "penalty": 0.005}, epochs=30),
        "",
    ),
    "LeNet-300-100, soft_weight_sharing": (
        "lenet_300_100",
        [Stage(methods=[{"method": "soft_weight_sharing"}], train=Train(epochs=40, lr=1e-3))],
        "64x, 1.89 -> 1.94 %",
    ),
    "LeNet-5, dense": ("lenet_5", [Stage(train=train(25, weight_decay=1e-5))], ""),
    "LeNet-5, hessian_codebook": (
        "lenet_5", pruned(_SMALL_5, {"method": "hessian_codebook", "bits": 4}, epochs=25), "",
    ),
    "LeNet-5, entropy_codebook": (
        "lenet_5",
        pruned(_SMALL_5, {"method": "entropy_codebook", "penalty": 0.005}, epochs=25),
        "51x",
    ),
    "LeNet-5, soft_weight_sharing": (
        "lenet_5",
        [Stage(methods=[{"method": "soft_weight_sharing"}], train=Train(epochs=30, lr=1e-3))],
        "162x, 0.88 -> 0.97 %",
    ),
    "wide, float": ("wide", [Stage(train=train(20))], ""),
    "wide, loss_aware_binary": (
        "wide", [Stage(methods=[{"method": "loss_aware_binary", "layers": INNER}], train=train(20))],
        "1.18 %",
    ),
    "wide, loss_aware_binary, binary activations": (
        "wide",
        [Stage(
            methods=[{"method": "loss_aware_binary", "layers": INNER, "activations": "*"}],
            train=train(20),
        )],
        "1.36 %",
    ),
    "wide, half_wave": (
        "wide", [Stage(methods=[{"method": "half_wave", "layers": INNER}], train=train(20))], "",
    ),
    "wide, integer_training": (
        "plain",
        [Stage(
            methods=[{"method": "integer_training"}],
            train=Train(epochs=20, optimizer="sgd", lr=4, lr_schedule="cosine", keep="best"),
        )],
        "0.4 % (convolutions)",
    ),
}  # fmt: skip


@functools.cache
def task() -> Task:
    return build_task(TaskSettings(name="mnist"))


def fresh(network: str, seed: int) -> nn.Module:
    """With random weights."""
    wide = {"wide": WIDE, "plain": {**WIDE, "norm": False}}
    name, settings = ("mlp", wide[network]) if network in wide else (network, {})
    return seeded(lambda: registry.load("architecture", name)(**settings), seed)


def start(network: str, seed: int, work: Path) -> Trained:
    """The trained dense network of a seed."""
    plan = [Stage(train=train(20, weight_decay=1e-4))]
    home = named(work, network, seed, "few-bits-start")
    return trained(fresh(network, seed), task(), plan, directory=home, seed=seed)


def do(job: Row, work: Path) -> Row:
    row, seed = job["row"], job["seed"]
    network, plan, _ = ROWS[row]
    small = network.startswith("lenet")
    begin = start(network, seed, work).model if small else fresh(network, seed)
    found = compress(
        begin, task(), plan, seed=seed,
        directory=named(work, "few-bits", seed, row),
        artifact=ArtifactSettings(floats="float16", profile="compact"),
    ).figures  # fmt: skip
    kept = ("score", "validation", "parameters", "nonzeros", "bytes", "entropy_bytes", "size_ratio")
    return {name: found[name] for name in kept}


def main() -> None:
    options = parser(__doc__).parse_args()
    done = Rows(FILE)
    if not options.table:
        wanted = {ROWS[row][0] for row in ROWS if any(part in row for part in options.only)}
        small = sorted(name for name in wanted if name.startswith("lenet"))
        begin = functools.partial(begin_all, small)
        done.run_seeds(options, [{"row": row} for row in ROWS], do, begin)
    print(table(done.read()))


def begin_all(networks: list[str], seed: int, work: Path) -> None:
    for network in networks:
        start(network, seed, work)


def table(found: list[Row]) -> str:
    head = ("row", "error, %", "to float", "bytes", "smaller", "validation, %", "the paper")
    return markdown(head, [line(row, found) for row in ROWS if any(r["row"] == row for r in found)])


def line(row: str, found: list[Row]) -> tuple[str, ...]:
    mine = [r for r in found if r["row"] == row]
    home = row.partition(",")[0]
    plain = [r for r in found if r["row"] == f"{home}, {'float' if home == 'wide' else 'dense'}"]
    return (
        row,
        spread([100 - r["score"] for r in mine]),
        change(mine, plain, sign=-1),
        f"{mean(r['bytes'] for r in mine):,.0f}",
        f"{mean(r['size_ratio'] for r in mine):.1f}x",
        spread([r["validation"] for r in mine]),
        ROWS[row][2],
    )


if __name__ == "__main__":
    main()
