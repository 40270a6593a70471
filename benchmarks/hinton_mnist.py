"""Hinton et al. 2015, section 3: soft targets on MNIST, and a digit that the student has never seen.

    python benchmarks/hinton_mnist.py
    python benchmarks/hinton_mnist.py --table

A network of two layers of 1200 units, with dropout and on shifted images, teaches one of two layers of 800
without either. Figures are errors on the 10,000 test images. Differs from the paper: Adam, fewer epochs,
no limit on the length of a unit's weights, 5,000 images held out for validation, on which the last row's
bias is chosen too (the paper chooses it on the test set). Needs MNIST (``LILLIPUT_DATA``).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from rows import Row, Rows, markdown, named, parser, seeded, spread, trained
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core import registry
from lilliput.core.task import evaluation, read

HERE = Path(__file__).resolve().parent
MISSING = 3
TEACHER_EPOCHS, EPOCHS = 40, 20
# The paper's temperature; the weights are not tuned.
SOFT = {"method": "soft_targets", "temperature": 20, "soft_weight": 0.9, "hard_weight": 0.1}
ONLY_SOFT = {**SOFT, "soft_weight": 1.0, "hard_weight": 0.0}
PAPER = {
    "teacher": "67",
    "alone": "146",
    "taught": "74",
    "taught, no 3 seen": "206",
    "taught, no 3 seen, bias corrected": "109, of which 14 are 3s",
}


def train(epochs: int) -> Train:
    return Train(
        epochs=epochs, optimizer="adam", lr=1e-3, lr_schedule="cosine", evaluate_every=epochs
    )


@functools.cache
def mnist(**settings: Any) -> Task:
    return registry.load("task", "mnist")(**settings)


def network(seed: int, units: int, **dropout: float) -> nn.Module:
    build = functools.partial(lilliput.build, "mlp", hidden=[units, units], **dropout)
    return seeded(build, seed)


def teacher(seed: int, work: Path) -> nn.Module:
    large = network(seed, 1200, dropout=0.5, input_dropout=0.2)
    home = named(work, "hinton", seed, "teacher")
    task = mnist(augment=True)
    return trained(
        large, task, [Stage(train=train(TEACHER_EPOCHS))], directory=home, seed=seed
    ).model


def student(seed: int, work: Path, row: str, task: Task, *methods: dict[str, Any]) -> nn.Module:
    stage = Stage(methods=list(methods), train=train(EPOCHS))
    home = named(work, "hinton", seed, row)
    return trained(network(seed, 800), task, [stage], directory=home, seed=seed).model


def corrected(seed: int, work: Path, model: nn.Module) -> nn.Module:
    stage = Stage(methods=[{"method": "class_bias", "classes": [MISSING]}])
    home = named(work, "hinton", seed, "corrected")
    return trained(model, mnist(), [stage], directory=home, seed=seed).model


def model_of(row: str, seed: int, work: Path) -> nn.Module:
    if row == "teacher":
        return teacher(seed, work)
    if row == "alone":
        return student(seed, work, row, mnist())
    taught_by = {"teacher": teacher(seed, work), "cache": True}
    if row == "taught":
        return student(seed, work, row, mnist(), {**SOFT, **taught_by})
    unseen = student(seed, work, "no 3", mnist(without=(MISSING,)), {**ONLY_SOFT, **taught_by})
    return unseen if row == "taught, no 3 seen" else corrected(seed, work, unseen)


def prepare(seed: int, work: Path) -> None:
    """The network that two rows share; its teacher is that of all."""
    model_of("taught, no 3 seen", seed, work)


def do(job: Row, work: Path) -> Row:
    model = model_of(job["row"], job["seed"], work)
    wrong = errors(model, mnist().test)
    held_out = errors(model, mnist().validation)
    return {
        "errors": sum(wrong),
        "errors_on_3s": wrong[MISSING],
        "validation_errors": sum(held_out),
    }


def errors(model: nn.Module, batches: Any) -> list[int]:
    """How many samples of each class are taken for another one."""
    wrong = torch.zeros(10, dtype=torch.int64)
    with evaluation(model), torch.no_grad():
        for batch in read(batches, "the images"):
            missed: Tensor = batch.target[model(batch.inputs).argmax(1) != batch.target]
            wrong += torch.bincount(missed, minlength=10)
    return wrong.tolist()


def main() -> None:
    options = parser(__doc__).parse_args()
    done = Rows(HERE / "results" / "hinton_mnist.json", paper=PAPER)
    if not options.table:
        jobs = [{"row": row, "epochs": EPOCHS} for row in PAPER]
        done.run_seeds(options, jobs, do, first=prepare)
    print(table(done.read()))


def table(done: list[Row]) -> str:
    lines = []
    for row, paper in PAPER.items():
        if found := [r for r in done if r["row"] == row]:
            figures = [spread([r[name] for r in found], 0) for name in ("errors", "errors_on_3s")]
            lines.append((row, *figures, paper))
    return markdown(("row", "errors", "on 3s (1,010)", "paper, errors"), lines)


if __name__ == "__main__":
    main()
