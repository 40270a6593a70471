"""Tan et al. 2018: what a network has learned from a table, as an additive model or as decision trees.

    python benchmarks/transparent.py
    python benchmarks/transparent.py --only breast_cancer --seeds 0 1 2 3 4 5 6 7 8 9
    python benchmarks/transparent.py --table

A small fully connected network teaches students of both kinds on two real tables that come with scikit-learn:
diabetes (442 patients, a number to predict) and breast cancer (569 tumors, two classes). Beside each student
stands the same kind of model, of the same sizes, fitted on the true labels of the same samples; for classes
that is one for log-loss, as is usual, while the students have squared error on the scores.

A seed draws which rows train, validate and test, and with them the teacher's first weights; that is what the
spread tells of. Figures are those of the test rows, 88 patients or 114 tumors:

- fidelity: how much of the variance of the teacher's scores a model explains, in percent. Scores are the
  predictions, or for classes the logits less their mean. A model of the labels may be surer or less sure than
  the teacher without a difference in its answers, so that its fidelity may even be negative;
- agreement: for how many samples it names the teacher's class;
- score: on the true labels, the variance that is explained or the accuracy, in percent.

How deep the trees are, and whether the additive model has pairs, is chosen for every model on the validation
rows: students by their fidelity, models of the labels by their score.

Differs from the paper: other tables and sizes of the models, for only its abstract was at hand. It found the
results "not yet conclusive", additive models promising for classes and trees for numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rows import Row, Rows, alone, markdown, named, parser, seeded, spread, trained
from sklearn import ensemble
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Task, Train, compress
from lilliput.core import registry
from lilliput.core.task import Metric, evaluation
from lilliput.methods.distill._boosting import Boosting, boosted
from lilliput.methods.distill.transparent import explained, log_odds
from lilliput.tasks._arrays import ArrayBatches

HERE = Path(__file__).resolve().parent
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Table:
    features: int
    classes: int = 0

    @property
    def outputs(self) -> int:
        return self.classes or 1

    def scores(self, outputs: Tensor) -> Tensor:
        """What a student is to say where the teacher says this."""
        return log_odds(outputs) if self.classes else outputs


TABLES = {"diabetes": Table(10), "breast_cancer": Table(30, 2)}
HIDDEN = [64, 32]
TRAIN = Train(epochs=30, optimizer="adam", lr=1e-3, keep="best")
# What is common to all models of a kind, and the sizes among which the validation rows choose.
COMMON = {"additive": {"bins": 32, "pair_bins": 8}, "tree_ensemble": {"trees": 100}}
SIZES: dict[str, tuple[dict[str, int], ...]] = {
    "additive": ({"pairs": 0}, {"pairs": 5}),
    "tree_ensemble": ({"depth": 1}, {"depth": 2}, {"depth": 3}),
}
KINDS = {"additive": "additive", "trees": "tree_ensemble"}
ROWS = ("teacher", *KINDS, *(f"{name}, labels" for name in KINDS))


# -- the samples --------------------------------------------------------------------------------


@functools.cache
def drawn(data: str, seed: int) -> Task:
    """The table with other rows to train, to validate and to test than the task has."""
    task: Any = registry.load("task", data)()
    parts = (task.train, task.validation, task.test)
    inputs, target = (torch.cat([getattr(p, what) for p in parts]) for what in ("inputs", "target"))
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    rows = order.split([part.samples for part in parts])
    # By the new training rows: the task's own mean and deviation knew some of the new test rows.
    inputs = standardized(inputs, rows[0])
    target = standardized(target, rows[0]) if target.is_floating_point() else target
    train, validation, test = (
        ArrayBatches(inputs[r], target[r], p.batch_size, shuffle=p.shuffle)
        for r, p in zip(rows, parts, strict=True)
    )
    return replace(task, train=train, validation=validation, test=test)


def standardized(values: Tensor, train: Tensor) -> Tensor:
    return (values - values[train].mean(0)) / values[train].std(0)


# -- the models ---------------------------------------------------------------------------------


def teacher(data: str, seed: int, work: Path) -> nn.Module:
    arguments = {"inputs": TABLES[data].features, "classes": TABLES[data].outputs}
    network = seeded(functools.partial(lilliput.build, "mlp", hidden=HIDDEN, **arguments), seed)
    home = named(work, "transparent", data, seed, "teacher")
    stage = Stage(train=TRAIN)
    return trained(network, drawn(data, seed), [stage], directory=home, seed=seed).model


def student(data: str, seed: int, work: Path, kind: str, size: dict[str, int]) -> Predict:
    """A model of the teacher's scores."""
    shape = {"features": TABLES[data].features, "outputs": TABLES[data].outputs}
    fit = {"method": "transparent", "scores": "log_odds" if TABLES[data].classes else "outputs"}
    stage = Stage(model={"architecture": kind, **shape, **COMMON[kind], **size}, methods=[fit])
    home = named(work, "transparent", data, seed, kind, *size.items())
    start = teacher(data, seed, work)
    found = compress(start, drawn(data, seed), [stage], directory=home, seed=seed)
    return functools.partial(said, found.model)


def said(network: nn.Module, inputs: Tensor) -> Tensor:
    with evaluation(network), torch.no_grad():
        return network(inputs)


def of_labels(data: str, seed: int, kind: str, size: dict[str, int]) -> Predict:
    """A model of the true labels, by the library that fits the students of this kind."""
    train: Any = drawn(data, seed).train
    features, target = train.inputs.double().numpy(), train.target.flatten().double().numpy()
    classify = bool(TABLES[data].classes)
    fit = additive_of_labels if kind == "additive" else trees_of_labels
    model = fit(features, target, seed, classify, **COMMON[kind], **size)
    return functools.partial(library_said, model, classify)


def additive_of_labels(
    features: Any, target: Any, seed: int, classify: bool, bins: int, pair_bins: int, pairs: int
) -> Any:
    # As for the students: the library counts the bins of missing and of unknown values.
    sizes = {"interactions": pairs, "max_bins": bins + 2, "max_interaction_bins": pair_bins + 2}
    return boosted(features, target, Boosting(seed=seed), classify=classify, **sizes)


def trees_of_labels(
    features: Any, target: Any, seed: int, classify: bool, trees: int, depth: int
) -> Any:
    kind = "Classifier" if classify else "Regressor"
    make = getattr(ensemble, f"GradientBoosting{kind}")
    return make(n_estimators=trees, max_depth=depth, random_state=seed).fit(features, target)


def library_said(model: Any, classify: bool, inputs: Tensor) -> Tensor:
    """Predictions, or the scores of both classes, whose mean is 0."""
    features = inputs.double().numpy()
    found = model.decision_function(features) if classify else model.predict(features)
    found = torch.as_tensor(found).float().reshape(-1, 1)
    return torch.cat([-found / 2, found / 2], 1) if classify else found


# -- one row ------------------------------------------------------------------------------------


def do(job: Row, work: Path) -> Row:
    data, row, seed = job["table"], job["row"], job["seed"]
    task: Any = drawn(data, seed)
    taught = functools.partial(said, teacher(data, seed, work))

    def figures(predict: Predict, part: Any) -> Row:
        near = compared(TABLES[data], predict(part.inputs), taught(part.inputs))
        return {"score": graded(task.score, predict(part.inputs), part.target), **near}

    if row == "teacher":
        return figures(taught, task.test)
    name, _, labels = row.partition(", ")
    make = of_labels if labels else functools.partial(student, work=work)
    models = [(make(data, seed, kind=KINDS[name], size=s), s) for s in SIZES[KINDS[name]]]
    by = "score" if labels else "fidelity"
    chosen, size = max(models, key=lambda m: figures(m[0], task.validation)[by])
    return {**figures(chosen, task.test), **size}


def compared(kind: Table, own: Tensor, taught: Tensor) -> Row:
    """How near a model is to the teacher."""
    found = {"fidelity": explained(kind.scores(own), kind.scores(taught))}
    if kind.classes:
        same = own.argmax(1) == taught.argmax(1)
        found["agreement"] = 100 * same.double().mean().item()
    return found


def graded(score: Any, outputs: Tensor, target: Tensor) -> float:
    if not isinstance(score, Metric):
        return float(score(outputs, target).mean())
    score.reset()
    score.update(outputs, target)
    return float(score.compute())


# -- all of them --------------------------------------------------------------------------------


def main() -> None:
    options = parser(__doc__).parse_args()
    done = Rows(HERE / "results" / "transparent.json", hidden=HIDDEN, sizes=SIZES)
    for seed in [] if options.table else options.seeds:
        for data in TABLES:
            alone(teacher, data, seed, options.work)
        jobs = [
            {"table": data, "row": row, "seed": seed, "epochs": TRAIN.epochs}
            for data, row in rows()
            if any(part in f"{data}, {row}" for part in options.only)
        ]
        done.run(jobs, functools.partial(do, work=options.work), options.jobs)
    print(table(done.read()))


def rows() -> Iterator[tuple[str, str]]:
    return ((data, row) for data in TABLES for row in ROWS)


def table(done: list[Row]) -> str:
    lines = []
    for data, row in rows():
        found = [r for r in done if (r["table"], r["row"]) == (data, row)]
        if found:
            cells = [figure(found, name) for name in ("fidelity", "agreement", "score")]
            lines.append((f"{data}, {row}", *cells))
    return markdown(("row", "fidelity, %", "agreement, %", "score on true labels, %"), lines)


def figure(found: list[Row], name: str) -> str:
    return spread([r[name] for r in found]) if name in found[0] else ""


if __name__ == "__main__":
    main()
