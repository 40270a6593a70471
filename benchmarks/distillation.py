"""Every distillation method for images, side by side, at the same epochs.

    python benchmarks/distillation.py fashion_mnist            # all rows, three seeds
    python benchmarks/distillation.py fashion_mnist --seeds 0  # small enough to repeat in ten minutes
    python benchmarks/distillation.py cifar10 --jobs 2
    python benchmarks/distillation.py cifar10 --table          # only print

Each row trains the same small network from the same random weights on the same images, and gets the same
number of epochs, also where a method has two stages: they share the epochs. The methods have the weights
and temperatures of their papers, as the library's defaults are; nothing is tuned for a row but what stands
in ``PLANS``. Done rows are kept in ``benchmarks/results/distillation_DATA.json``; killed and started again,
it goes on.

cifar10: ResNet-20 with the published weights, fine-tuned on the images at hand, teaches a ResNet-8.
fashion_mnist: a network of six convolutions teaches one of three.

Not here: methods that need something other than labeled images and a trained teacher. ``privileged`` and
``domain_adaptation`` (two views), ``sequence``, ``detection``, ``hidden_states``, ``transparent``,
specialists (many classes), ``class_bias`` (a missing class), ``data_free`` (no images).
"""

from __future__ import annotations

import argparse
import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import channels
import torch
from rows import Row, Rows, Trained, alone, change, markdown, named, parser, seeded, spread, trained
from torch import nn

import lilliput
from lilliput.core.recipe import Stage, TaskSettings, Train
from lilliput.core.task import Task
from lilliput.engine.recipes import build_task

HERE = Path(__file__).resolve().parent
Methods = list[dict[str, Any]]


# -- the two settings ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Data, networks, and the places in them that methods ask for, the student's before the teacher's."""

    task: TaskSettings
    teacher: Callable[[int, Path], Trained]
    student: Callable[[], nn.Module]
    untrained_teacher: Callable[[], nn.Module]
    assistant: Callable[[], nn.Module]
    epochs: int
    lr: float
    features: dict[str, str]
    hint: dict[str, str]
    last_feature: str
    hidden_neurons: dict[str, str]
    shared: list[str]

    def train(self, epochs: int, rate: float = 1.0) -> Train:
        """Adam, for its steps do not grow with the loss: methods weigh their terms from 0.03 to 1,000."""
        return Train(
            epochs=epochs, optimizer="adam", lr=rate * self.lr, lr_schedule="cosine",
            precision="auto", channels_last=True, evaluate_every=epochs,
        )  # fmt: skip


def small_network(depth: int, width: int = 16) -> nn.Module:
    """Three groups of ``depth`` convolutions for images of 28x28 pixels; a group ends at half the size."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = 1
    for group in (1, 2, 3):
        after = width * 2 ** (group - 1)
        for place in range(1, depth + 1):
            layers[f"conv{group}_{place}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
            layers[f"bn{group}_{place}"] = nn.BatchNorm2d(after)
            layers[f"relu{group}_{place}"] = nn.ReLU()
            before = after
        layers[f"pool{group}"] = nn.MaxPool2d(2)
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(before, 10)
    return nn.Sequential(layers)


def fashion_teacher(seed: int, work: Path) -> Trained:
    """Trained for twice the epochs of a row."""
    setting = SETTINGS["fashion_mnist"]
    stage = Stage(train=setting.train(2 * setting.epochs))
    return trained(
        seeded(setting.untrained_teacher, seed),
        task("fashion_mnist"),
        [stage],
        directory=named(work, "fashion_mnist", seed, "teacher"),
        seed=seed,
    )


def cifar_teacher(seed: int, work: Path) -> Trained:
    return channels.start("resnet20", seed, work)


_BY_DEPTH = {"relu1_1": "relu1_2", "relu2_1": "relu2_2", "relu3_1": "relu3_2"}
SETTINGS = {
    "fashion_mnist": Setting(
        task=TaskSettings(name="fashion_mnist", arguments={"limit": 10_000}),
        teacher=fashion_teacher,
        student=functools.partial(small_network, 1),
        untrained_teacher=functools.partial(small_network, 2),
        assistant=functools.partial(small_network, 1, 24),
        epochs=6,
        lr=1e-2,
        features=_BY_DEPTH,
        hint={"relu2_1": "relu2_2"},
        last_feature="linear:input",
        hidden_neurons={"linear:input": "linear:input"},
        shared=["conv*_1"],
    ),
    "cifar10": Setting(
        task=TaskSettings(
            name="cifar10", arguments={"source": "jpeg", "augment": True, "limit": channels.IMAGES}
        ),
        teacher=cifar_teacher,
        student=functools.partial(lilliput.build, "resnet8"),
        untrained_teacher=functools.partial(lilliput.build, "resnet20"),
        assistant=functools.partial(lilliput.build, "resnet14"),
        epochs=8,
        lr=2e-3,
        features={name: name for name in ("layer1", "layer2", "layer3")},
        hint={"layer2": "layer2"},
        last_feature="linear:input",
        hidden_neurons={"linear:input": "linear:input"},
        shared=["conv1", "layer*.0.conv*"],
    ),
}


# -- the rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A stage of a row: its methods, and the learning rate as a multiple of the setting's."""

    methods: tuple[dict[str, Any], ...] = ()
    rate: float = 1.0


def part(*names: str, rate: float = 1.0, **settings: Any) -> Part:
    """A stage with the methods of these names; the settings are those of the first."""
    first, *others = names
    return Part(({"method": first, **settings}, *({"method": n} for n in others)), rate)


def flows(s: Setting) -> list[tuple[str, str]]:
    places = list(s.features)
    return list(pairwise(places))


# A row's stages; every method that takes a teacher gets the setting's, unless it names another.
PLANS: dict[str, Callable[[Setting], list[Part]]] = {
    "alone": lambda s: [Part()],
    "soft_targets": lambda s: [part("soft_targets")],
    "logits": lambda s: [part("logits")],
    "fitnets": lambda s: [part("hint", pairs=s.hint), part("fitnets")],
    "fsp": lambda s: [part("fsp", pairs=s.features, flows=flows(s)), Part()],
    "attention": lambda s: [part("attention", pairs=s.features)],
    "attention, code's form": lambda s: [part("attention", pairs=s.features, form="code")],
    "attention + soft_targets": lambda s: [part("attention", "soft_targets", pairs=s.features)],
    "gradient_attention": lambda s: [part("gradient_attention")],
    "neuron_selection": lambda s: [part("neuron_selection", pairs=s.hidden_neurons), Part()],
    "rocket": lambda s: [part("rocket", booster=s.untrained_teacher(), share=s.shared)],
    "rocket + soft_targets": lambda s: [
        part("rocket", "soft_targets", booster=s.untrained_teacher(), share=s.shared)
    ],
    "mutual, two students": lambda s: [part("mutual", peers=1)],
    "mutual, with an untrained teacher": lambda s: [part("mutual", peers=[s.untrained_teacher()])],
    "adversarial": lambda s: [part("adversarial", noise={list(s.features)[-1]: 0.1})],
    "kdgan": lambda s: [Part(), part("kdgan", rate=0.25, hard_weight=0.5)],
    "auxiliary": lambda s: [part("auxiliary", places=list(s.features)[:2], feature=s.last_feature)],
    "born_again": lambda s: [Part(), part("born_again", teacher="previous")],
    "self_labels": lambda s: [Part(), part("self_labels", teacher="previous")],
    "curriculum": lambda s: [part("curriculum")],
    "teaching assistant": lambda s: [part("soft_targets", teacher="assistant")],
}
NO_TEACHER = ("rocket", "mutual", "auxiliary")


def stages(row: str, setting: Setting, **teachers: nn.Module) -> list[Stage]:
    """The row's stages with the networks that teach in them."""
    parts = PLANS[row](setting)
    found = []
    for number, stage in enumerate(parts):
        epochs = (setting.epochs + number) // len(parts)
        methods = [with_teacher(m, teachers) for m in stage.methods]
        found.append(Stage(methods=methods, train=setting.train(epochs, stage.rate)))
    return found


def with_teacher(method: dict[str, Any], teachers: dict[str, nn.Module]) -> dict[str, Any]:
    if method["method"] in NO_TEACHER:
        return method
    named = method.get("teacher", "teacher")
    return {**method, "teacher": teachers.get(named, named)}


# -- one row ------------------------------------------------------------------------------------


@functools.cache
def task(data: str) -> Task:
    return build_task(SETTINGS[data].task)


def assistant(data: str, seed: int, teacher: nn.Module, work: Path) -> nn.Module:
    """A network of middle size, taught by the teacher for as many epochs as a row has."""
    setting = SETTINGS[data]
    return trained(
        seeded(setting.assistant, seed),
        task(data),
        stages("soft_targets", setting, teacher=teacher),
        directory=named(work, data, seed, "assistant"),
        seed=seed,
    ).model


def do(job: Row, data: str, work: Path) -> Row:
    row, seed = job["row"], job["seed"]
    setting = SETTINGS[data]
    teacher = setting.teacher(seed, work)
    if row == "teacher":
        return shown(teacher.figures)
    teachers = {"teacher": teacher.model}
    if row == "teaching assistant":
        teachers["assistant"] = assistant(data, seed, teacher.model, work)
    home = named(work, data, seed, row)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # for the networks that a plan brings
        plan = stages(row, setting, **teachers)
    student = seeded(setting.student, seed)
    return shown(trained(student, task(data), plan, directory=home, seed=seed).figures)


def shown(figures: dict[str, Any]) -> Row:
    return {name: figures[name] for name in ("score", "validation", "parameters", "macs")}


# -- all of them --------------------------------------------------------------------------------


def main() -> None:
    options = parser(__doc__)
    options.add_argument("data", choices=sorted(SETTINGS))
    chosen = options.parse_args()
    done = Rows(HERE / "results" / f"distillation_{chosen.data}.json")
    if not chosen.table:
        run_all(done, chosen)
    print(table(done.read()))


def run_all(done: Rows, options: argparse.Namespace) -> None:
    setting = SETTINGS[options.data]
    for seed in options.seeds:
        alone(do, {"row": "teacher", "seed": seed}, options.data, options.work)
        jobs = [
            {"row": row, "seed": seed, "epochs": setting.epochs}
            for row in ("teacher", *PLANS)
            if any(part in row for part in options.only)
        ]
        done.run(jobs, functools.partial(do, data=options.data, work=options.work), options.jobs)


def table(done: list[Row]) -> str:
    without = [r for r in done if r["row"] == "alone"]
    lines = []
    for row in ("teacher", *PLANS):
        if found := [r for r in done if r["row"] == row]:
            lines.append((row, spread([r["score"] for r in found]), change(found, without)))
    return markdown(("row", "accuracy, %", "to the student alone"), lines)


if __name__ == "__main__":
    main()
