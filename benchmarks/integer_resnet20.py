"""ResNet-20 in integers: score as the network computes, and as ONNX Runtime executes the exported file.

    python benchmarks/integer_resnet20.py            # all rows, three seeds, 15 minutes of one core
    python benchmarks/integer_resnet20.py --table

The published weights are fine-tuned on the JPEG copy of CIFAR-10 (the baseline, one for each seed); every row
starts there. What is learned or measured is so on training images, nothing was chosen on the test set. The
last column is the same network on the first 1,000 official test images.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from channels import start, task
from rows import Row, Rows, change, markdown, parser, spread
from torch import nn

from lilliput import Stage, Task, Train, compress
from lilliput.core.recipe import TaskSettings
from lilliput.core.task import evaluate
from lilliput.deploy import OnnxNetwork, export, inspect
from lilliput.engine.recipes import build_task
from lilliput.methods import LearnedStep, PostTraining

FILE = Path(__file__).resolve().parent / "results" / "integer_resnet20.json"
NETWORK = "resnet20"
#: As the paper of learned steps has it, the first and the last layer keep 8 bits.
ENDS = {"conv1": 8, "linear": 8}


def training() -> Train:
    return Train(
        epochs=2, optimizer="sgd", lr=0.01, momentum=0.9, lr_schedule="cosine", weight_decay=1e-4,
        evaluate_every=2,
    )  # fmt: skip


def methods() -> dict[str, tuple[Any, Train]]:
    """A row's method and how it trains."""
    at_once, four = Train(epochs=0), {**ENDS, "*": 4}
    return {
        "8 bits": (PostTraining(), at_once),
        "8 bits, whole ranges": (PostTraining(calibration="minmax", steps="max"), at_once),
        "4-bit weights, nearest": (PostTraining(bits=four), at_once),
        "4-bit weights, adaptive": (PostTraining(bits=four, rounding="adaptive"), at_once),
        "4-bit weights, second order": (PostTraining(bits=four, rounding="second_order"), at_once),
        "4 or 8 bits, 6 in the mean, adaptive": (
            PostTraining(mean_bits=6.0, rounding="adaptive"), at_once,
        ),
        "4-bit weights, learned steps": (LearnedStep(bits=four), training()),
    }  # fmt: skip


def begin(seed: int, work: Path) -> None:
    start(NETWORK, seed, work)


def do(job: Row, work: Path) -> Row:
    dense = start(NETWORK, job["seed"], work).model
    if job["row"] == "float":
        return figures(dense)
    method, train = methods()[job["row"]]
    with tempfile.TemporaryDirectory() as folder:
        made = compress(
            copy.deepcopy(dense), task(), [Stage(methods=[method], train=train)],
            directory=Path(folder) / "run", seed=job["seed"],
        )  # fmt: skip
        return {**figures(made.model), "bytes": made.figures["bytes"]}


def figures(model: nn.Module) -> Row:
    """Scores here and in ONNX Runtime, and what runs in integers there."""
    jpeg, official = task(), lossless()
    with tempfile.TemporaryDirectory() as folder:
        file = export(model, jpeg.example_inputs(), Path(folder) / "net.onnx").path
        executed, deployed = inspect(file), OnnxNetwork(file)
        size = file.stat().st_size
    return {
        "score": evaluate(model, jpeg.reported, jpeg.score),
        "deployed": evaluate(deployed, jpeg.reported, jpeg.score),
        "official": evaluate(model, official.reported, official.score),
        "in_integers": executed.integers,
        "in_float": executed.floats,
        "onnx_bytes": size,
    }


def lossless() -> Task:
    return build_task(TaskSettings(name="cifar10", arguments={"source": "lossless"}))


def table(found: list[Row]) -> str:
    head = (
        "row", "accuracy, %", "to float", "in ONNX Runtime", "layers in integers", "ONNX file, kB",
        "our file, kB", "1,000 official images",
    )  # fmt: skip
    return markdown(head, [line(name, found) for name in ("float", *methods())])


def line(name: str, found: list[Row]) -> tuple[str, ...]:
    mine = [r for r in found if r["row"] == name]
    if not mine:
        return (name, *[""] * 7)
    counts = {f"{r['in_integers']} of {r['in_integers'] + r['in_float']}" for r in mine}
    own = [r["bytes"] for r in mine if "bytes" in r]
    return (
        name,
        spread([r["score"] for r in mine]),
        change(mine, [r for r in found if r["row"] == "float"]),
        spread([r["deployed"] for r in mine]),
        " or ".join(sorted(counts)),
        f"{mean(r['onnx_bytes'] for r in mine) / 1e3:.0f}",
        f"{mean(own) / 1e3:.0f}" if own else "",
        spread([r["official"] for r in mine], 1),
    )


def main() -> None:
    options = parser(__doc__).parse_args()
    done = Rows(FILE)
    if not options.table:
        torch.set_num_threads(1)
        jobs = [{"row": name} for name in ("float", *methods())]
        done.run_seeds(options, jobs, do, begin)
    print(table(done.read()))


if __name__ == "__main__":
    main()
