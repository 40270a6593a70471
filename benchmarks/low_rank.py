"""Low rank: how much faster than its operations promise, and how much data brings the accuracy back.

    python benchmarks/low_rank.py speed              # minutes; VGG-16 and two ResNets
    python benchmarks/low_rank.py accuracy           # ResNet-20, three seeds, an hour of one core
    python benchmarks/low_rank.py accuracy --only tucker --seeds 0
    python benchmarks/low_rank.py speed --table      # only print

Speed: networks with random weights, which do not change the time, within a budget of multiply-adds; dense and
thin take turns in ONNX Runtime, one thread, one image, CPU time, and the figure is the median of ratios.
Accuracy, on CIFAR-10 (JPEG): the published ResNet-20, its layers fitted to their outputs on 100 images, then
fine-tuned on 1, 10 or 100 % of 10,000 images, few of which get more epochs; the dense row is the same network
fine-tuned on all of them. Done rows are kept in ``benchmarks/results/low_rank.json``; killed and started
again, it goes on.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rows import Row, Rows, markdown, named, parser, seeded, spread
from runtimes import Deployed, timed
from torch import nn

from lilliput.api import compress
from lilliput.core import registry
from lilliput.core.recipe import ModelSettings, Stage, TaskSettings, Train
from lilliput.core.task import Task, accuracy
from lilliput.deploy import export
from lilliput.engine.recipes import build_model, build_task
from lilliput.measure import macs

KINDS = ("channel", "spatial", "tucker")
#: Of the speed: network -> side of its images, in pixels.
NETWORKS = {"vgg16_cifar": 32, "resnet18": 224, "resnet20": 32}
BUDGETS = (0.5, 0.3)
WEIGHTS = "$LILLIPUT_DATA/cifar10-resnet/resnet20-12fca82f.th"
IMAGES, BUDGET = 10_000, 0.5
TUNED = ("channel", "tucker")
#: Part of the images -> epochs, so that few images get more of them.
EPOCHS = {0.0: 0, 0.01: 40, 0.1: 12, 1.0: 4}
RATE = 0.01


# -- speed ----------------------------------------------------------------------------------------


def low_rank(kind: str, budget: float, **settings: Any) -> dict[str, Any]:
    return {"method": "low_rank", "convolutions": kind, "budget": {"macs": budget}, **settings}


def random_task(side: int) -> Task:
    """One random image, for methods that want to see what a network works on."""
    batches = [(torch.randn(1, 3, side, side), torch.zeros(1).long())]
    return Task(batches, batches, batches, nn.functional.cross_entropy, accuracy)


def speed(job: Row, seconds: float) -> Row:
    side = NETWORKS[job["network"]]
    dense = seeded(lambda: registry.load("architecture", job["network"])(), 0).eval()
    stage = Stage(methods=[low_rank(job["kind"], job["budget"])], train=Train(epochs=0))
    thin = compress(dense, random_task(side), [stage], seed=0).model.eval()
    image = torch.randn(1, 3, side, side)
    with tempfile.TemporaryDirectory() as folder:
        running = {
            name: Deployed(
                export(model, image, Path(folder) / f"{name}.onnx").path, "onnxruntime"
            ).load()
            for name, model in {"dense": dense, "thin": thin}.items()
        }
        whole, found = timed(running, {}, image, seconds)
    return {
        "macs_ratio": macs(thin, image).total / macs(dense, image).total,
        "faster": found["faster"], "dense_milliseconds": whole["milliseconds"],
    }  # fmt: skip


def speed_jobs() -> Iterator[Row]:
    for network in NETWORKS:
        for kind in KINDS:
            for budget in BUDGETS:
                row = f"{network}, {kind}"
                yield {"row": row, "network": network, "kind": kind, "budget": budget}


def speed_table(done: list[Row]) -> str:
    head = ("network, kind", "MACs", "promise", "measured", "of the promise")
    return markdown(head, [
        (
            r["row"], f"{100 * r['macs_ratio']:.0f} %", f"{1 / r['macs_ratio']:.2f}x",
            f"{r['faster']:.2f}x", f"{100 * r['faster'] * r['macs_ratio']:.0f} %",
        )
        for r in done if "faster" in r
    ])  # fmt: skip


# -- accuracy -------------------------------------------------------------------------------------


@functools.cache
def task(images: int) -> Task:
    arguments = {"source": "jpeg", "augment": True, "limit": images, "batch_size": min(128, images)}
    return build_task(TaskSettings(name="cifar10", arguments=arguments))


def tuned(job: Row, work: Path) -> Row:
    """A row of the published network, as a chain or dense."""
    epochs = EPOCHS[job["part"]]
    train = Train(
        epochs=epochs, optimizer="sgd", lr=RATE, momentum=0.9, lr_schedule="cosine",
        weight_decay=1e-4, precision="auto", channels_last=True, evaluate_every=max(1, epochs),
    )  # fmt: skip
    chain = (
        [] if job["row"] == "dense" else [low_rank(job["row"], BUDGET, calibrate=True, samples=100)]
    )
    model = build_model(ModelSettings(architecture="resnet20", weights=WEIGHTS))
    home = named(work, "low_rank", *job.values())
    images = max(100, round(job["part"] * job["images"]))
    figures = compress(
        model, task(images), [Stage(methods=chain, train=train)], directory=home, seed=job["seed"]
    ).figures
    return {
        n: figures[n] for n in ("score", "baseline_score", "parameters", "macs", "latency_ratio")
    }


def accuracy_jobs(options: argparse.Namespace) -> Iterator[Row]:
    for seed in options.seeds:
        for row in ("dense", *TUNED):
            for part in (1.0,) if row == "dense" else EPOCHS:
                if any(word in row for word in options.only):
                    yield {"row": row, "part": part, "seed": seed, "images": options.images}


def accuracy_table(done: list[Row]) -> str:
    found = [r for r in done if "part" in r]
    head = ("kind", "parameters", *(f"{100 * part:.0f} % of the images" for part in EPOCHS))
    lines = []
    for row in dict.fromkeys(r["row"] for r in found):
        mine = [r for r in found if r["row"] == row]
        scores = [[r["score"] for r in mine if r["part"] == part] for part in EPOCHS]
        size = f"{mean(r['parameters'] for r in mine):,.0f}"
        lines.append((row, size, *(spread(s) if s else "" for s in scores)))
    return markdown(head, lines)


# -- all of them ----------------------------------------------------------------------------------


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=("speed", "accuracy"))
    options.add_argument("--images", type=int, default=IMAGES, help="that are 100 %%")
    options.add_argument("--seconds", type=float, default=20.0, help="of timing, a row")
    options.add_argument(
        "--results", type=Path, default=Path(__file__).resolve().parent / "results"
    )
    chosen = options.parse_args()
    done = Rows(chosen.results / "low_rank.json")
    fast = chosen.what == "speed"
    if not chosen.table and fast:
        jobs = [j for j in speed_jobs() if any(part in j["row"] for part in chosen.only)]
        done.run(jobs, functools.partial(speed, seconds=chosen.seconds))
    elif not chosen.table:
        done.run(
            list(accuracy_jobs(chosen)), functools.partial(tuned, work=chosen.work), chosen.jobs
        )
    print((speed_table if fast else accuracy_table)(done.read()))


if __name__ == "__main__":
    main()
