"""Mallya & Lazebnik 2018, Mallya et al. 2018: three tasks in one network, against a network for each.

    python benchmarks/many_tasks.py
    python benchmarks/many_tasks.py --only packnet --seeds 0
    python benchmarks/many_tasks.py --table

Digits (MNIST), then clothes (Fashion-MNIST), then, from the clothes again, whether one is worn on the feet:
three tasks for one LeNet-5 with batch normalization, whose last layers differ. ``alone`` is a network of
its own for each task. ``packnet`` gives back 75 % after the first and the second task; ``piggyback`` learns
masks over the network of the first task. Every row has the same images and epochs a task. After the last
task every earlier one is evaluated again from the one file, and its score must be what it was.

Bytes are those of the files: of all three networks, or of the one. The time to switch is the median of 20.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rows import Row, Rows, markdown, named, parser, seeded, spread
from torch import nn

import lilliput
from lilliput import Stage, Task, Train, compress
from lilliput.core.recipe import TaskSettings
from lilliput.core.task import evaluate
from lilliput.engine.recipes import build_task
from lilliput.methods import Packnet, Piggyback

HERE = Path(__file__).resolve().parent
TASKS = {"digits": 10, "clothes": 10, "on the feet": 2}
#: Sandals, sneakers and ankle boots.
FEET = (5, 7, 9)
IMAGES, EPOCHS = 20_000, 6
MASKS = Train(epochs=EPOCHS, optimizer="adam", lr=1e-3, lr_schedule="cosine")
TRAIN = Train(epochs=EPOCHS, optimizer="adam", lr=1e-3, lr_schedule="cosine", weight_decay=5e-5)


def network() -> nn.Module:
    """LeNet-5's sizes with batch normalization behind the convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


@functools.cache
def task(name: str) -> Task:
    source = "mnist" if name == "digits" else "fashion_mnist"
    found = build_task(TaskSettings(name=source, arguments={"limit": IMAGES}))
    return found if name != "on the feet" else worn_on_the_feet(found)


def worn_on_the_feet(clothes: Task) -> Task:
    """Two classes in place of ten."""
    classes = torch.tensor([int(number in FEET) for number in range(10)])

    def relabeled(batches: Any) -> Any:
        own = copy.copy(batches)
        own.target = classes[own.target]
        return own

    parts = {part: relabeled(getattr(clothes, part)) for part in ("train", "validation", "test")}
    return replace(clothes, **parts, name="on the feet")


def alone(seed: int, work: Path) -> Row:
    """A network for each task."""
    found = {
        name: compress(
            with_outputs(network, outputs, seed), task(name), [Stage(train=TRAIN)],
            directory=named(work, "alone", seed, name), seed=seed,
        )
        for name, outputs in TASKS.items()
    }  # fmt: skip
    return {
        "scores": {name: result.figures["score"] for name, result in found.items()},
        "bytes": [sum(r.artifact.stat().st_size for r in list(found.values())[: n + 1]) for n in range(3)],
    }  # fmt: skip


def with_outputs(build: Any, outputs: int, seed: int) -> nn.Module:
    model = seeded(build, seed)
    torch.manual_seed(seed)
    model[-1] = nn.Linear(500, outputs)
    return model


def together(seed: int, work: Path, row: str) -> Row:
    """One network; each task is added to the file of the tasks before."""
    model, scores, sizes = seeded(network, seed), {}, []
    for number, (name, outputs) in enumerate(TASKS.items()):
        stages = stages_of(row, name, outputs, number)
        home = named(work, row, seed, name)
        result = compress(model, task(name), stages, directory=home, seed=seed)
        model, scores[name] = result.model, result.figures["score"]
        sizes.append(result.artifact.stat().st_size)
    return {
        "scores": scores, "bytes": sizes, "unchanged": unchanged(result.artifact, scores),
        "milliseconds": time_to_switch(model),
    }  # fmt: skip


def stages_of(row: str, name: str, outputs: int, number: int) -> list[Stage]:
    if row == "packnet":
        last = number == len(TASKS) - 1
        method = Packnet(task=name, prune=0.0 if last else 0.75, outputs=outputs)
        return [Stage(methods=[method], train=TRAIN)]
    if number == 0:  # the backbone is a network that has learned its own task
        return [Stage(train=TRAIN)]
    base = next(iter(TASKS)) if number == 1 else None
    return [Stage(methods=[Piggyback(task=name, base=base, outputs=outputs)], train=MASKS)]


def unchanged(file: Path, scores: dict[str, float]) -> bool:
    """Whether every task in the file still has the score that it had at the end of its stage."""
    again = {
        name: evaluate(lilliput.load(file, model=network(), task=name), task(name).reported, task(name).score)
        for name in scores
    }  # fmt: skip
    return again == scores


def time_to_switch(model: nn.Module) -> float:
    times = []
    for name in list(TASKS) * 7:
        begin = time.perf_counter()
        lilliput.switch(model, name)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def do(job: Row, work: Path) -> Row:
    if job["row"] == "alone":
        return alone(job["seed"], work)
    return together(job["seed"], work, job["row"])


def main() -> None:
    options = parser(__doc__).parse_args()
    done = Rows(HERE / "results" / "many_tasks.json", images=IMAGES, epochs=EPOCHS)
    jobs = [
        {"row": row, "seed": seed}
        for seed in options.seeds
        for row in ("alone", "packnet", "piggyback")
        if any(part in row for part in options.only)
    ]
    if not options.table:
        done.run(jobs, functools.partial(do, work=options.work), options.jobs)
    print(table(done.read()))


def table(done: list[Row]) -> str:
    head = ("row", *(f"{name}, %" for name in TASKS), "bytes", "a further task", "switch, ms")
    lines = []
    for row in ("alone", "packnet", "piggyback"):
        if found := [r for r in done if r["row"] == row]:
            sizes = [r["bytes"] for r in found]
            added = [(last - first) / 2 for first, _, last in sizes]
            times = [r["milliseconds"] for r in found if "milliseconds" in r]
            lines.append((
                row, *(spread([r["scores"][name] for r in found]) for name in TASKS),
                f"{statistics.mean(s[-1] for s in sizes):,.0f}", f"{statistics.mean(added):,.0f}",
                f"{statistics.median(times):.1f}" if times else "",
            ))  # fmt: skip
    return markdown(head, lines)


if __name__ == "__main__":
    main()
