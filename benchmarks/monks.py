"""Hassibi & Stork 1993: Optimal Brain Surgeon on the MONK's problems, beside their own counts of weights.

    python benchmarks/monks.py
    python benchmarks/monks.py --only monk1 --seeds 0 1 2 3 4 5 6 7 8 9
    python benchmarks/monks.py --table

The problems are made from their definitions (Thrun et al. 1991): six attributes with 3, 3, 2, 3, 4 and 2
values, 432 robots in all, of which 124, 169 and 122 train; in the third problem 5 % of those have the wrong
class. A seed draws which robots train, and the first weights. All 432 are the test set, as in the paper.

A network of 17 one-hot inputs and one output, with 3, 2 and 2 hidden units, learns by squared error with
weight decay, from five starts of which the best on the training samples counts; biases are weights from a
unit that is always 1, so that they are counted and can be removed, as in the paper: 58, 39 and 39 weights.
Then one weight goes at a time and the rest retrain, for each number of weights downwards. The count that is
told is the smallest after which no more *training* samples are wrong than the whole network had wrong; beside
it stands the same with magnitude in place of second derivatives, and with the diagonal of the Hessian
(Optimal Brain Damage).

Differs from the paper: the samples and the first weights are ours, the outputs are one half of the tanh of
theirs, and it stopped by the rise of the error, not by wrong samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import Row, Rows, markdown, parser, seeded, spread
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import Stage, Task, Train, compress
from lilliput.core.method import Method
from lilliput.engine.outcome import Result
from lilliput.methods import Magnitude, Surgeon

HERE = Path(__file__).resolve().parent
VALUES = (3, 3, 2, 3, 4, 2)
#: Samples that train, hidden units, weights, and what the paper's surgery left of them.
PROBLEMS = {"monk1": (124, 3, 58, 14), "monk2": (169, 2, 39, 15), "monk3": (122, 2, 39, 4)}
#: In the third problem so strong that the wrong classes stay unlearnt: the paper's network got 93.4 % right.
DECAY = {"monk1": 1e-2, "monk2": 1e-2, "monk3": 1e-1}
STARTS = 5
RETRAINING = Train(epochs=150, optimizer="adam", lr=0.01, keep="best")
METHODS: dict[str, Callable[[float], Method]] = {
    "surgeon": lambda sparsity: Surgeon(
        sparsity=sparsity, curvature="network", damping=1e-4, until=0.0, remove_dead=False
    ),
    "damage": lambda sparsity: Surgeon(
        sparsity=sparsity, curvature="diagonal", until=0.0, remove_dead=False
    ),
    "magnitude": lambda sparsity: Magnitude(sparsity=sparsity, scope="global", remove_dead=False),
}


class Monk(nn.Module):
    """Two layers of tanh; a unit that is always 1 stands in for biases."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(sum(VALUES) + 1, hidden, bias=False)
        self.last = nn.Linear(hidden + 1, 1, bias=False)

    def forward(self, robots: Tensor) -> Tensor:
        """The class, -1 or 1, of ``(batch, 17)``."""
        inside = torch.tanh(self.first(F.pad(robots, (0, 1), value=1.0)))
        return torch.tanh(self.last(F.pad(inside, (0, 1), value=1.0)))


# -- the problems ---------------------------------------------------------------------------------


def true_class(problem: str, a: tuple[int, ...]) -> bool:
    """Of a robot, whose attributes count from 1."""
    if problem == "monk1":
        return a[0] == a[1] or a[4] == 1
    if problem == "monk2":
        return sum(value == 1 for value in a) == 2
    return (a[4] == 3 and a[3] == 1) or (a[4] != 4 and a[1] != 3)


def robots(problem: str) -> tuple[Tensor, Tensor]:
    """All 432, one-hot, and their classes."""
    every = list(itertools.product(*(range(1, n + 1) for n in VALUES)))
    parts = [F.one_hot(torch.tensor(column) - 1) for column in zip(*every, strict=True)]
    classes = torch.tensor([[1.0 if true_class(problem, a) else -1.0] for a in every])
    return torch.cat(parts, dim=1).float(), classes


def task(problem: str, seed: int) -> Task:
    """Squared error; the score is the percentage of right signs."""
    x, y = robots(problem)
    generator = torch.Generator().manual_seed(seed)
    count = PROBLEMS[problem][0]
    drawn = torch.randperm(len(x), generator=generator)[:count]
    known = y[drawn].clone()
    if problem == "monk3":
        known[: round(0.05 * count)] *= -1.0
    seen = [(x[drawn], known)]
    return Task(seen, seen, [(x, y)], F.mse_loss, right, "right, %")


def right(output: Tensor, target: Tensor) -> Tensor:
    return 100.0 * (output.sign() == target).float().flatten()


# -- one row ----------------------------------------------------------------------------------------


def trained(problem: str, data: Task, seed: int) -> Result:
    """The dense network: of several starts the one that gets most training samples right."""
    hidden = PROBLEMS[problem][1]
    train = Train(epochs=1500, optimizer="adam", lr=0.02, weight_decay=DECAY[problem], keep="best")
    found = []
    for start in range(STARTS):
        model = seeded(lambda: Monk(hidden), 100 * start + seed)
        found.append(compress(model, data, [Stage(train=train)], seed=seed))
        if found[-1].figures["validation"] == 100.0:
            break
    return max(found, key=lambda result: result.figures["validation"])


def do(job: Row) -> Row:
    problem, seed = job["problem"], job["seed"]
    weights, data = PROBLEMS[problem][2], task(problem, seed)
    found = trained(problem, data, seed)
    dense = found.figures
    best: dict[str, Any] = {"weights": weights, "score": dense["score"]}
    for left in range(weights - 1, 1, -1):  # one a layer stays
        stage = Stage(methods=[METHODS[job["row"]](1.0 - left / weights)], train=RETRAINING)
        found = compress(found.model, data, [stage], seed=seed)
        if found.figures["validation"] >= dense["validation"]:
            best = {"weights": left, "score": found.figures["score"]}
    return {**best, "dense_score": dense["score"], "dense_training": dense["validation"]}


def main() -> None:
    options = parser(__doc__).parse_args()
    done = Rows(HERE / "results" / "monks.json")
    jobs = [
        {"problem": problem, "row": row, "seed": seed}
        for seed in options.seeds
        for problem in PROBLEMS
        for row in METHODS
        if any(part in f"{problem} {row}" for part in options.only)
    ]
    if not options.table:
        done.run(jobs, do, options.jobs)
    print(table(done.read()))


def table(done: list[Row]) -> str:
    head = (
        "problem, method",
        "weights",
        "left",
        "the paper",
        "right, dense, %",
        "right, sparse, %",
    )
    lines = []
    for problem, (_, _, weights, reported) in PROBLEMS.items():
        for row in METHODS:
            if found := [r for r in done if (r["problem"], r["row"]) == (problem, row)]:
                told = str(reported) if row == "surgeon" else ""
                columns = [[r[name] for r in found] for name in ("dense_score", "score")]
                left = spread([float(r["weights"]) for r in found], 1)
                lines.append((f"{problem}, {row}", str(weights), left, told, *map(spread, columns)))
    return markdown(head, lines)


if __name__ == "__main__":
    main()
