"""Networks that are small by design, side by side on Fashion-MNIST: accuracy against size, work and time.

    python benchmarks/compact_architectures.py               # three seeds, about an hour of one core
    python benchmarks/compact_architectures.py --only V2 --seeds 0
    python benchmarks/compact_architectures.py --latency     # the times only
    python benchmarks/compact_architectures.py --figure      # draw (needs matplotlib)
    python benchmarks/compact_architectures.py --table       # only print

SqueezeNet, MobileNet in three widths, MobileNetV2, and a plain stack of 3x3 convolutions that has as many
parameters as SqueezeNet. The data are reduced, so that an hour will do: means of 2x2 pixels, 10,000 images,
five epochs; the networks are built for small images. All train alike, with Adam and no tuning of their own;
differences between them are differences under these conditions. Times are those of ONNX Runtime, one thread,
one image, all networks in one process in turn. Done rows are kept; killed and started again, it goes on.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from curves import panels
from rows import Row, Rows, markdown, named, parser, seeded, settle, spread, trained
from runtimes import Deployed, timed
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from lilliput.core import registry
from lilliput.core.recipe import Stage, TaskSettings, Train
from lilliput.core.task import Task
from lilliput.deploy import export
from lilliput.engine.recipes import build_task

IMAGES, EPOCHS = 10_000, 5
SIDE = 14
#: Of the plain network: with it there are as many parameters as in SqueezeNet, within 1 %.
WIDTH = 51


def plain(width: int = WIDTH, classes: int = 10) -> nn.Module:
    """Six convolutions, normalized, as wide as 1, 1, 2, 2, 4, 4 times the width."""
    layers: list[nn.Module] = []
    before = 1
    for number, after in enumerate((width, width, 2 * width, 2 * width, 4 * width, 4 * width)):
        if number in (2, 4):
            layers.append(nn.MaxPool2d(2))
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def registered(name: str, **settings: Any) -> Callable[[], nn.Module]:
    build = registry.load("architecture", name)
    return functools.partial(build, classes=10, channels=1, small_images=True, **settings)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "SqueezeNet 1.1": registered("squeezenet_1_1"),
    "MobileNet 1.0": registered("mobilenet_v1", width=1.0),
    "MobileNet 0.5": registered("mobilenet_v1", width=0.5),
    "MobileNet 0.25": registered("mobilenet_v1", width=0.25),
    "MobileNetV2": registered("mobilenet_v2"),
}


# -- the rows -----------------------------------------------------------------------------------


@functools.cache
def task(images: int) -> Task:
    whole = build_task(
        TaskSettings(name="fashion_mnist", arguments={"limit": images, "batch_size": 64})
    )
    parts = {p: halved(getattr(whole, p)) for p in ("train", "validation", "test")}
    return Task(**parts, loss=whole.loss, score=whole.score, score_name=whole.score_name)


def halved(batches: Any) -> Any:
    """The same batches, four pixels becoming one."""
    made, prepare = copy.copy(batches), batches.prepare

    def pooled(images: Tensor) -> Tensor:
        return avg_pool2d(images if prepare is None else prepare(images), 2)

    made.prepare = pooled
    return made


def do(job: Row, work: Path) -> Row:
    train = Train(
        epochs=job["epochs"], optimizer="adam", lr=1e-3, lr_schedule="cosine", weight_decay=1e-4,
        precision="auto", channels_last=True, evaluate_every=job["epochs"],
    )  # fmt: skip
    network = seeded(NETWORKS[job["row"]], job["seed"])
    home = named(work, "compact", *job.values())
    found = trained(
        network, task(job["images"]), [Stage(train=train)], directory=home, seed=job["seed"]
    )
    return {name: found.figures[name] for name in ("score", "validation", "parameters", "macs")}


def times(seconds: float) -> Iterator[Row]:
    """Of all networks in turn; random weights take as long as others."""
    image = torch.randn(1, 1, SIDE, SIDE)
    with tempfile.TemporaryDirectory() as folder:
        running = {
            name: Deployed(
                export(build().eval(), image, Path(folder) / f"{name}.onnx").path, "onnxruntime"
            ).load()
            for name, build in NETWORKS.items()
        }
        for row in timed(running, {}, image, seconds):
            yield {"row": row["row"], "seconds": seconds, "milliseconds": row["milliseconds"]}


# -- all of them --------------------------------------------------------------------------------


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=IMAGES, help="to train on, at most")
    options.add_argument("--epochs", type=int, default=EPOCHS)
    options.add_argument("--seconds", type=float, default=60.0, help="of timing")
    options.add_argument("--latency", action="store_true", help="train nothing")
    options.add_argument("--figure", action="store_true", help="run nothing, draw")
    options.add_argument(
        "--results", type=Path, default=Path(__file__).resolve().parent / "results"
    )
    chosen = options.parse_args()
    done = Rows(chosen.results / "compact_architectures.json")
    if chosen.figure:
        print(figure(done.read()))
    elif not chosen.table:
        run_all(done, chosen)
    print(table(done.read()))


def run_all(done: Rows, options: argparse.Namespace) -> None:
    settle()
    if not any("milliseconds" in row for row in done.read()):
        for row in times(options.seconds):
            done.keep(row)
    amount = {"images": options.images, "epochs": options.epochs}
    jobs = [
        {"row": row, "seed": seed, **amount}
        for seed in ([] if options.latency else options.seeds)
        for row in NETWORKS
        if any(part in row for part in options.only)
    ]
    done.run(jobs, functools.partial(do, work=options.work), options.jobs)


def by_network(done: list[Row]) -> Iterator[tuple[str, list[Row], float | None]]:
    """A network, its trained rows, and its milliseconds."""
    for name in NETWORKS:
        mine = [r for r in done if r["row"] == name]
        if found := [r for r in mine if "score" in r]:
            yield name, found, next((r["milliseconds"] for r in mine if "milliseconds" in r), None)


def table(done: list[Row]) -> str:
    head = ("network", "parameters", "million MACs", "ms, ONNX Runtime", "accuracy, %")
    return markdown(head, [
        (
            name, f"{found[0]['parameters']:,}", f"{mean(r['macs'] for r in found) / 1e6:.1f}",
            "" if ms is None else f"{ms:.2f}", spread([r["score"] for r in found]),
        )
        for name, found, ms in by_network(done)
    ])  # fmt: skip


def figure(done: list[Row]) -> Path:
    """Accuracy against each of the three costs; a line joins the widths of a family."""
    parts: dict[str, dict[str, list[Any]]] = {
        "parameters": {}, "multiply-adds": {}, "ONNX Runtime, ms": {},
    }  # fmt: skip
    for name, found, ms in by_network(done):
        scores = [r["score"] for r in found]
        costs = (found[0]["parameters"], found[0]["macs"], ms)
        for lines, cost in zip(parts.values(), costs, strict=True):
            if cost is not None:
                lines.setdefault(name.split()[0], []).append((cost, scores))
    return panels("compact_architectures.svg", parts, y="accuracy on Fashion-MNIST, %")


if __name__ == "__main__":
    main()
