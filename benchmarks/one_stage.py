"""Distil, prune and share values in one stage, against the same three steps one after the other.

    python benchmarks/one_stage.py lenet_5            # all rows, three seeds
    python benchmarks/one_stage.py resnet20 --jobs 2
    python benchmarks/one_stage.py resnet20 --table   # only print

A trained dense network is where every row starts, and it is the teacher. Each row trains for the same number
of epochs on the same images, with the same fractions of zeros and as many shared values, and keeps the epoch
that is best on the validation images:

- dense: the network trains on;
- one stage: what is to be zero goes at once, the rest is clustered, then the clusters' values train towards
  the teacher and the labels;
- one after the other: the teacher teaches; then the weights become sparse step by step; then they share
  values. In its second form the teacher teaches in all three stages, as the shipped recipes have it;
- no teacher: the same without it; the first of the three stages then just trains on.

Within one stage a weight cannot move alone, for the clusters are found before the first step, when the
network has not recovered from its zeros. So that stage has a learning rate of its own; for LeNet-5 the
validation images choose it of three, for ResNet-20 two rates around it came out alike in a short trial. And
it prunes at once: zeros that came after the clusters would leave the other weights fewer of the codes.
Everything else is near the recipes ``deep_compression_lenet_5`` and ``deep_compression_resnet20``, with
fewer epochs and images, k-means that is exact, and a teacher of temperature 2 for LeNet-5.

Bytes are the whole file's, as it lies on the disk; the ratio is that of the dense network's 32-bit weights to
it. The dense row's file has 16-bit weights. Needs MNIST, or CIFAR-10 as JPEG and the published weights
(``LILLIPUT_DATA``). Done rows are kept in ``benchmarks/results/one_stage_NETWORK.json``; killed and started
again, it goes on.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import channels
from rows import Row, Rows, Trained, alone, change, markdown, named, parser, seeded, spread, trained

import lilliput
from lilliput.api import compress
from lilliput.core.recipe import ArtifactSettings, Stage, TaskSettings, Train
from lilliput.core.task import Task
from lilliput.engine.recipes import build_task

HERE = Path(__file__).resolve().parent
ARTIFACT = ArtifactSettings(codec="auto", floats="float16", profile="compact")
Methods = list[dict[str, Any]]


# -- the two settings ---------------------------------------------------------------------------


def train(epochs: int, optimizer: str, lr: float, **more: Any) -> Train:
    return Train(
        epochs=epochs, optimizer=optimizer, lr=lr, lr_schedule="cosine", keep="best",
        precision="auto", channels_last=True, **more,
    )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Data, the dense network, how it is taught, pruned and clustered, and how that trains.

    Attributes:
        epochs: of the three stages one after the other; one stage has their sum.
        at_once: prunes before the first step.
        gradually: prunes to the same fractions while the stage trains.
        weights: how single weights train.
        values: how shared values train behind a stage of pruning.
        rates: at which they train where all is one stage; one of them is chosen.
    """

    task: TaskSettings
    start: Callable[[int, Path], Trained]
    epochs: tuple[int, int, int]
    teach: dict[str, Any]
    at_once: dict[str, Any]
    gradually: dict[str, Any]
    share: dict[str, Any]
    weights: Callable[[int], Train]
    values: Callable[[int], Train]
    rates: tuple[float, ...]


def dense_lenet(seed: int, work: Path) -> Trained:
    """Trained for as many epochs as a row has."""
    setting = SETTINGS["lenet_5"]
    stage = Stage(train=setting.weights(sum(setting.epochs)))
    network = seeded(functools.partial(lilliput.build, "lenet_5"), seed)
    home = named(work, "one_stage", "lenet_5", seed, "start")
    return trained(network, task("lenet_5"), [stage], directory=home, seed=seed)


def dense_resnet(seed: int, work: Path) -> Trained:
    return channels.start("resnet20", seed, work)


_LENET = {"conv1": 0.34, "conv2": 0.88, "fc1": 0.93, "fc2": 0.81}
_RESNET = {"conv1": 0.3, "layer*": 0.75}
_ADAM = functools.partial(train, optimizer="adam")
SETTINGS = {
    "lenet_5": Setting(
        task=TaskSettings(name="mnist", arguments={"limit": 10_000}),
        start=dense_lenet,
        epochs=(2, 6, 2),
        teach={"method": "soft_targets", "teacher": "original", "temperature": 2},
        at_once={"method": "magnitude", "sparsity": _LENET},
        gradually={"method": "magnitude", "sparsity": _LENET, "rounds": 5},
        share={"method": "codebook", "bits": {"conv*": 8, "fc*": 5}},
        weights=functools.partial(_ADAM, lr=1e-3, weight_decay=3e-5),
        values=functools.partial(_ADAM, lr=1e-4),
        rates=(1e-3, 3e-3, 1e-2),
    ),
    "resnet20": Setting(
        task=TaskSettings(
            name="cifar10", arguments={"source": "jpeg", "augment": True, "limit": channels.IMAGES}
        ),
        start=dense_resnet,
        epochs=(1, 3, 1),
        teach={
            "method": "soft_targets", "teacher": "original", "temperature": 4,
            "soft_weight": 0.9, "hard_weight": 0.1,
        },
        at_once={"method": "magnitude", "sparsity": _RESNET},
        gradually={
            "method": "gradual", "sparsity": _RESNET, "schedule": {"shape": "cubic", "end": 0.5}
        },
        share={"method": "codebook", "bits": {"conv1": 6, "linear": 6, "*": 4}},
        weights=functools.partial(
            train, optimizer="sgd", lr=0.02, momentum=0.9, weight_decay=1e-4
        ),
        values=functools.partial(_ADAM, lr=2e-4),
        rates=(2e-3,),
    ),
}  # fmt: skip


# -- the rows -----------------------------------------------------------------------------------

Plan = list[Stage]


def dense(s: Setting) -> list[Plan]:
    return [[Stage(train=s.weights(sum(s.epochs)))]]


def one_stage(s: Setting, teach: Methods) -> list[Plan]:
    """A plan for each learning rate."""
    # The order matters: what is zero before the clusters are found has a code of its own.
    methods = [s.at_once, s.share, *teach]
    return [[Stage(methods=methods, train=_ADAM(sum(s.epochs), lr=rate))] for rate in s.rates]


def in_turn(s: Setting, first: Methods, later: Methods) -> list[Plan]:
    distil, prune, share = s.epochs
    plan = [
        Stage(name="distil", methods=first, train=s.weights(distil)),
        Stage(name="prune", methods=[s.gradually, *later], train=s.weights(prune)),
        Stage(name="share", methods=[s.share, *later], train=s.values(share)),
    ]
    return [plan]


PLANS: dict[str, Callable[[Setting], list[Plan]]] = {
    "dense": dense,
    "one stage": lambda s: one_stage(s, [s.teach]),
    "one after the other": lambda s: in_turn(s, [s.teach], []),
    "one after the other, taught in all": lambda s: in_turn(s, [s.teach], [s.teach]),
    "one stage, no teacher": lambda s: one_stage(s, []),
    "one after the other, no teacher": lambda s: in_turn(s, [], []),
}


# -- one row ------------------------------------------------------------------------------------


@functools.cache
def task(network: str) -> Task:
    return build_task(SETTINGS[network].task)


def do(job: Row, network: str, work: Path) -> Row:
    row, seed = job["row"], job["seed"]
    start = SETTINGS[network].start(seed, work).model
    found = []
    for plan in PLANS[row](SETTINGS[network]):
        rate = plan[-1].train.lr
        home = named(work, "one_stage", network, seed, row, rate)
        result = compress(start, task(network), plan, directory=home, seed=seed, artifact=ARTIFACT)
        found.append({**kept(result.figures), "rate": rate})
    return max(found, key=lambda figures: figures["validation"])


def kept(figures: dict[str, Any]) -> Row:
    names = ("score", "validation", "bytes", "size_ratio", "nonzeros", "entropy_bytes")
    return {name: figures[name] for name in names}


# -- all of them --------------------------------------------------------------------------------


def main() -> None:
    options = parser(__doc__)
    options.add_argument("network", choices=sorted(SETTINGS))
    chosen = options.parse_args()
    done = Rows(HERE / "results" / f"one_stage_{chosen.network}.json")
    if not chosen.table:
        run_all(done, chosen)
    print(table(done.read()))


def run_all(done: Rows, options: argparse.Namespace) -> None:
    setting = SETTINGS[options.network]
    for seed in options.seeds:
        alone(setting.start, seed, options.work)
        jobs = [
            {"row": row, "seed": seed, "epochs": list(setting.epochs)}
            for row in PLANS
            if any(part in row for part in options.only)
        ]
        done.run(
            jobs, functools.partial(do, network=options.network, work=options.work), options.jobs
        )


def table(done: list[Row]) -> str:
    dense = [r for r in done if r["row"] == "dense"]
    lines = []
    for row in PLANS:
        if found := [r for r in done if r["row"] == row]:
            size = f"{mean(r['bytes'] for r in found):,.0f}"
            ratio = f"{mean(r['size_ratio'] for r in found):.1f}x"
            score = spread([r["score"] for r in found])
            lines.append((row, score, change(found, dense), size, ratio))
    return markdown(("row", "accuracy, %", "to dense", "bytes on disk", "smaller"), lines)


if __name__ == "__main__":
    main()
