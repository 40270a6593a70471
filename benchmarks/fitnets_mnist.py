"""Romero et al. 2015, FitNets: a thin and deep network on MNIST, with and without hints.

    python benchmarks/fitnets_mnist.py
    python benchmarks/fitnets_mnist.py --table

The paper's teacher, a maxout network with 361 thousand parameters, and a student with twice its layers. All
begin from the paper's uniform weights in +-0.005, with which a deep network hardly starts to learn. Besides
the paper's rows there are those of which it says that they fail: the hint and the labels, or the hint and
the teacher's outputs, in one stage. Differs from the paper: 20,000 training images and 20 epochs in place of
50,000 and up to 500 a stage; a student of 21 thousand parameters, where the paper's has 30 (its exact layers
are not known to us). A row's stages share its epochs. Needs MNIST (``LILLIPUT_DATA``).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from pydantic import PrivateAttr
from rows import Row, Rows, Trained, markdown, named, parser, seeded, spread, trained
from torch import Tensor, nn

from lilliput import Stage, Task, Train
from lilliput.core import registry
from lilliput.core.run import Run
from lilliput.core.types import Term
from lilliput.methods.distill._features import FeatureMethod
from lilliput.methods.distill.fitnets import hint_loss

HERE = Path(__file__).resolve().parent
IMAGES, EPOCHS, TEACHER_EPOCHS = 20_000, 20, 10
RATE = 5e-4  # the paper's
PAIR = {"4": "2"}  # the student's fourth layer is guided by the teacher's second
PAPER = {
    "teacher": "0.55",
    "alone": "1.9",
    "taught": "0.65",
    "fitnet": "0.51",
    "hint and labels in one stage": "fails",
    "hint and teacher in one stage": "fails",
}


# -- the networks -------------------------------------------------------------------------------


class Maxout(nn.Sequential):
    """A convolution of whose two maps the larger one counts, and a pooling behind it."""

    def __init__(
        self, before: int, after: int, kernel: int, padding: int, pool: int | None
    ) -> None:
        super().__init__(nn.Conv2d(before, 2 * after, kernel, padding=padding))
        # pylearn2 keeps a border that does not fill a whole window
        self.pool = nn.MaxPool2d(pool, 2, ceil_mode=True) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self[0](x)
        larger: Tensor = self.pool(maps.unflatten(1, (-1, 2)).amax(2))
        return larger


def start_small(network: nn.Module) -> nn.Module:
    """The paper's weights, U(-0.005, 0.005), and biases of zero."""
    for name, parameter in network.named_parameters():
        with torch.no_grad():
            parameter.zero_() if name.endswith("bias") else parameter.uniform_(-0.005, 0.005)
    return network


def maxout_network(*layers: Maxout, units: int) -> nn.Module:
    ends = (nn.Flatten(), nn.Linear(units, 10))
    return start_small(nn.Sequential(nn.Identity(), *layers, *ends))  # layer 1 is called "1"


def teacher_network() -> nn.Module:
    """48-48-24, Goodfellow's network for MNIST."""
    layers = (Maxout(1, 48, 8, 0, 4), Maxout(48, 48, 8, 3, 4), Maxout(48, 24, 5, 3, 2))
    return maxout_network(*layers, units=24 * 9)


def student_network() -> nn.Module:
    """16-16-16-16-12-12, a pooling behind every second layer."""
    widths, pools = (1, 16, 16, 16, 16, 12, 12), (None, 4, None, 4, None, 2)
    layers = [
        Maxout(before, after, 3, 1, pool)
        for before, after, pool in zip(widths, widths[1:], pools, strict=False)
    ]
    return maxout_network(*layers, units=12 * 9)


# -- the rows -----------------------------------------------------------------------------------


class OneStageHint(FeatureMethod):
    """What FitNets is not: the hint beside the loss of the whole student, all layers trained at once."""

    _regressors: list[nn.Module] = PrivateAttr()

    def attach(self, run: Run) -> None:
        super().attach(run)
        self._regressors = self.adapters(run, "fitnets")

    def loss(self, run: Run) -> dict[str, Term]:
        [(own, taught)], [regressor] = self.features(run), self._regressors
        return {"hint": Term(hint_loss(taught, regressor[0](own), "paper"))}


def train(epochs: int) -> Train:
    return Train(
        epochs=epochs, optimizer="rmsprop", lr=RATE, lr_schedule="cosine", evaluate_every=epochs,
        precision="auto", channels_last=True,
    )  # fmt: skip


def stages(row: str, teacher: nn.Module) -> list[Stage]:
    taught = {"method": "fitnets", "teacher": teacher}
    hint = {"method": "hint", "teacher": teacher, "pairs": PAIR, "activation": "none"}
    together = OneStageHint(teacher=teacher, pairs=PAIR)
    plan: dict[str, list[list[Any]]] = {
        "alone": [[]],
        "taught": [[taught]],
        "fitnet": [[hint], [taught]],
        "hint and labels in one stage": [[together]],
        "hint and teacher in one stage": [[together, taught]],
    }
    parts = plan[row]
    return [Stage(methods=methods, train=train(EPOCHS // len(parts))) for methods in parts]


@functools.cache
def mnist() -> Task:
    return registry.load("task", "mnist")(limit=IMAGES)


def teacher(seed: int, work: Path) -> Trained:
    large = seeded(teacher_network, seed)
    home = named(work, "fitnets", seed, "teacher")
    return trained(large, mnist(), [Stage(train=train(TEACHER_EPOCHS))], directory=home, seed=seed)


def do(job: Row, work: Path) -> Row:
    row, seed = job["row"], job["seed"]
    result = teacher(seed, work)
    if row != "teacher":
        plan, home = stages(row, result.model), named(work, "fitnets", seed, row)
        result = trained(seeded(student_network, seed), mnist(), plan, directory=home, seed=seed)
    kept = {name: result.figures[name] for name in ("score", "validation", "parameters", "macs")}
    return {**kept, "error": 100 - result.figures["score"]}


def main() -> None:
    options = parser(__doc__).parse_args()
    done = Rows(HERE / "results" / "fitnets_mnist.json", paper=PAPER)
    if not options.table:
        jobs = [{"row": row} for row in PAPER]
        done.run_seeds(options, jobs, do, first=teacher)
    print(table(done.read()))


def table(done: list[Row]) -> str:
    lines = []
    for row, paper in PAPER.items():
        if found := [r for r in done if r["row"] == row]:
            lines.append((row, spread([r["error"] for r in found]), paper))
    return markdown(("row", "error, %", "paper, %"), lines)


if __name__ == "__main__":
    main()
