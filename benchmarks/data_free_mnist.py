"""Lopes et al. 2017: a student of MNIST that has seen no digit.

    python benchmarks/data_free_mnist.py
    python benchmarks/data_free_mnist.py --table

LeNet-5 teaches a LeNet-5 with half of the filters and units, on inputs that were made up from records of
the teacher's activations; a row for each objective of the inputs, beside the same student on the real
images. Differs from the paper: Caffe's LeNet-5, 3 batches a class in place of 100 and 300 steps in place of
1,000, and Adam at 1e-3 in place of 1e-5, for fewer inputs. Needs MNIST (``LILLIPUT_DATA``).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

from rows import Row, Rows, Trained, markdown, named, parser, seeded, spread, trained
from torch import nn

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core import registry

HERE = Path(__file__).resolve().parent
TEACHER_EPOCHS, EPOCHS, EPOCHS_MADE_UP = 10, 10, 60
MADE_UP = {"method": "data_free", "batches": 3, "steps": 300, "batch_size": 64}
# A node of the graph is a neuron: the maps of the convolutions would be 14,720 of them.
SPECTRAL = {**MADE_UP, "places": ["pool2", "fc1", "fc2"]}
PLANS: dict[str, dict[str, Any] | None] = {
    "real images, labels": None,
    "real images, soft targets": {"method": "soft_targets", "temperature": 8},
    "top layer": {**MADE_UP, "objective": "top_layer"},
    "all layers": {**MADE_UP, "objective": "all_layers"},
    "spectral, all layers": {**SPECTRAL, "objective": "spectral_all_layers"},
    "spectral, all layers, lowest frequencies": {
        **SPECTRAL, "objective": "spectral_all_layers", "coefficients": "lowest",
    },
    "spectral, pairs of layers": {**SPECTRAL, "objective": "spectral_layer_pairs"},
}  # fmt: skip
PAPER = {"best spectral variant": "92.47 % (reported)"}


def train(epochs: int) -> Train:
    return Train(
        epochs=epochs, optimizer="adam", lr=1e-3, lr_schedule="cosine", evaluate_every=epochs,
        precision="auto", channels_last=True,
    )  # fmt: skip


@functools.cache
def mnist() -> Task:
    return registry.load("task", "mnist")()


def half_lenet_5() -> nn.Module:
    """LeNet-5 with 10, 25 and 250 in place of 20, 50 and 500."""
    layers = OrderedDict(
        conv1=nn.Conv2d(1, 10, 5), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(10, 25, 5), pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(), fc1=nn.Linear(25 * 4 * 4, 250), relu1=nn.ReLU(), fc2=nn.Linear(250, 10),
    )  # fmt: skip
    return nn.Sequential(layers)


def teacher(seed: int, work: Path) -> Trained:
    large = seeded(functools.partial(lilliput.build, "lenet_5"), seed)
    home = named(work, "data_free", seed, "teacher")
    return trained(large, mnist(), [Stage(train=train(TEACHER_EPOCHS))], directory=home, seed=seed)


def do(job: Row, work: Path) -> Row:
    row, seed = job["row"], job["seed"]
    if row == "teacher":
        return shown(teacher(seed, work))
    plan = PLANS[row]
    methods = [{**plan, "teacher": teacher(seed, work).model}] if plan else []
    made_up = plan is not None and plan["method"] == "data_free"
    stage = Stage(methods=methods, train=train(EPOCHS_MADE_UP if made_up else EPOCHS))
    home = named(work, "data_free", seed, row)
    return shown(trained(seeded(half_lenet_5, seed), mnist(), [stage], directory=home, seed=seed))


def shown(found: Trained) -> Row:
    return {name: found.figures[name] for name in ("score", "validation", "parameters")}


def main() -> None:
    options = parser(__doc__).parse_args()
    done = Rows(HERE / "results" / "data_free_mnist.json", paper=PAPER)
    if not options.table:
        jobs = [{"row": row} for row in ("teacher", *PLANS)]
        done.run_seeds(options, jobs, do, first=teacher)
    print(table(done.read()))


def table(done: list[Row]) -> str:
    lines = []
    for row in ("teacher", *PLANS):
        if found := [r for r in done if r["row"] == row]:
            lines.append(
                (row, *(spread([r[name] for r in found]) for name in ("validation", "score")))
            )
    return markdown(("row", "validation, %", "test, %"), lines)


if __name__ == "__main__":
    main()
