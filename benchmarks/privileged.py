"""Lopez-Paz et al. 2016, experiment 5: digits in 7x7 pixels, and a teacher that sees 28x28.

    python benchmarks/privileged.py
    python benchmarks/privileged.py --seeds 0 1 2 3 4 --samples 300

Each seed draws other training images. Teacher and students have two hidden layers of 20 units and train for
50 epochs with RMSprop. A student is trained for every temperature and imitation of the grid, once as the
paper's equation says and once with the soft term weighted by T**2, as in the authors' code; which of them is
best is chosen on the validation images, and its figure is that of the test images. Beside it stands what the
paper does: the best mean over the seeds on the test images. All of it twice: on pixels from 0 to 1, as the
authors have them, and on normalized pixels, on which the student learns more in 50 epochs by itself.

Needs MNIST (``LILLIPUT_DATA``). What is in the result already is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core import registry
from lilliput.engine.records import environment
from lilliput.methods import Privileged
from lilliput.tasks._arrays import ArrayBatches
from lilliput.tasks.mnist import MNIST

Row = dict[str, Any]

TEMPERATURES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
IMITATIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
# Keras's defaults of 2015, with which the authors' code runs.
TRAIN = Train(
    epochs=50, optimizer="rmsprop", lr=1e-3, options={"alpha": 0.9, "eps": 1e-6}, evaluate_every=50
)
PAPER = {
    300: "teacher 80.1, student alone 47.0, best student 65.6 % (means of the authors' result files)",
    500: "teacher 83.7, student alone 58.9, best student 74.3 % (means of the authors' result files)",
}
RESULT = Path(__file__).resolve().parent / "results" / "privileged.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    small, large = (registry.load("task", name)() for name in ("mnist_privileged", "mnist"))
    small.train = registry.load("task", "mnist_privileged")(samples=None).train
    for seed, inputs in product(options.seeds, ("pixels", "normalized")):
        key = {"samples": options.samples, "inputs": inputs, "seed": seed}
        if not any(key.items() <= run.items() for run in runs):
            tasks = [t if inputs == "normalized" else as_pixels(t) for t in (small, large)]
            runs.append({**key, **measure(*tasks, options.samples, seed)})
            print(f"{key}: {summary(runs[-1])}", flush=True)
            content = {"paper": PAPER, "environment": environment(), "runs": runs}
            RESULT.write_text(json.dumps(content, indent=1) + "\n")
    for samples, inputs in sorted({(run["samples"], run["inputs"]) for run in runs}):
        alike = [r for r in runs if (r["samples"], r["inputs"]) == (samples, inputs)]
        show(f"{samples} samples, {inputs}; paper: {PAPER.get(samples, 'not reported')}", alike)


def as_pixels(task: Task) -> Task:
    """The same task with inputs and views from 0 (black) to 1 (white)."""

    def scaled(values: torch.Tensor) -> torch.Tensor:
        return values * MNIST.deviation + MNIST.mean

    def part(batches: Any) -> ArrayBatches:
        views = {name: scaled(view) for name, view in batches.views.items()}
        return ArrayBatches(
            scaled(batches.inputs),
            batches.target,
            batches.batch_size,
            shuffle=batches.shuffle,
            views=views,
        )

    parts = {name: part(getattr(task, name)) for name in ("train", "validation", "test")}
    return replace(task, **parts)


def measure(small: Task, large: Task, samples: int, seed: int) -> Row:
    """Teacher, student alone, and the grid of students of one draw of training images."""
    chosen = torch.randperm(large.train.samples, generator=torch.Generator().manual_seed(seed))[
        :samples
    ]
    small, large = subset(small, chosen), subset(large, chosen)
    teacher = trained(784, large, seed)
    found: Row = {
        "teacher": teacher.figures["score"],
        "alone": scores(trained(49, small, seed)),
        "students": [],
    }
    for method in grid(teacher.model):
        result = trained(49, small, seed, method)
        shown = {
            "temperature": method.temperature,
            "imitation": method.imitation,
            "weight_by_temperature": method.weight_by_temperature,
        }
        found["students"].append({**shown, **scores(result)})
    return found


def grid(teacher: nn.Module) -> Iterator[Privileged]:
    for weighted, t, imitation in product((False, True), TEMPERATURES, IMITATIONS):
        if t == 1.0 and weighted:
            continue  # the same loss
        yield Privileged(
            teacher=teacher, temperature=t, imitation=imitation, weight_by_temperature=weighted
        )


def subset(task: Task, chosen: torch.Tensor) -> Task:
    whole: Any = task.train
    views = {name: view[chosen] for name, view in whole.views.items()}
    train = ArrayBatches(
        whole.inputs[chosen], whole.target[chosen], whole.batch_size, shuffle=True, views=views
    )
    return replace(task, train=train)


def trained(inputs: int, task: Task, seed: int, *methods: Privileged) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = lilliput.build("mlp", hidden=[20, 20], inputs=inputs)
        for layer in (m for m in network.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)  # Keras's own
    home = Path(tempfile.mkdtemp(prefix="privileged-"))
    stage = Stage(methods=list(methods), train=TRAIN)
    result = lilliput.compress(network, task, [stage], directory=home, seed=seed)
    shutil.rmtree(home)
    return result


def scores(result: Any) -> Row:
    return {"validation": result.figures["validation"], "test": result.figures["score"]}


def best(run: Row, weighted: bool) -> Row:
    """The student that is best on the validation images."""
    students = [s for s in run["students"] if s["weight_by_temperature"] is weighted]
    return max(students, key=lambda s: s["validation"])


def summary(run: Row) -> str:
    parts = [f"teacher {run['teacher']:.1f}, student alone {run['alone']['test']:.1f}"]
    for weighted, name in ((False, "as the equation"), (True, "weighted by T**2")):
        s = best(run, weighted)
        setting = f"T={s['temperature']:g}, lambda={s['imitation']:g}"
        parts.append(f"{name} {s['test']:.1f} ({setting})")
    return ", ".join(parts)


def show(title: str, runs: list[Row]) -> None:
    print(f"\n{title}")
    for run in runs:
        print(f"  seed {run['seed']}: {summary(run)}")
    columns = {
        "teacher": [run["teacher"] for run in runs],
        "student alone": [run["alone"]["test"] for run in runs],
        "as the equation, chosen on validation": [best(run, False)["test"] for run in runs],
        "weighted by T**2, chosen on validation": [best(run, True)["test"] for run in runs],
    }
    for name, values in columns.items():
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        print(f"  {name}: {mean(values):.1f}{spread} %")
    means = [
        (mean(run["students"][n]["test"] for run in runs), student)
        for n, student in enumerate(runs[0]["students"])
    ]
    top, s = max(means, key=lambda pair: pair[0])
    print(
        f"  best mean on the test images, as the paper chooses: {top:.1f} % (T={s['temperature']:g}, "
        f"lambda={s['imitation']:g}{', weighted by T**2' if s['weight_by_temperature'] else ''})"
    )


if __name__ == "__main__":
    main()
