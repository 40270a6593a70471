"""From a network to a file and what comes of it: bytes, score and time in each runtime, noise in each layer.

The surprising rule: a score is taken in every runtime. Runtimes round differently, and only that of the one
that will run counts.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.task import Task, answer, evaluate, evaluation
from ..core.types import Batch
from ..errors import InputError
from ..measure import latency
from ..measure.noise import layer_noise
from ..mechanisms.activations import quantizer_at, remove_quantizer, replaced_activations
from ..mechanisms.encodings import bake
from ..mechanisms.ranges import noise_ratio
from .onnx import Exported, export
from .overflow import overflows
from .runtime import RUNTIMES, Executed, inspect, installed, tensors_of


@dataclass(frozen=True)
class InRuntime:
    """A file in one runtime.

    Attributes:
        runtime: its name.
        executed: what runs in integers there.
        score: of the task, there; None without a task.
        agreement: the network's outputs over their difference to the runtime's, in decibels.
        ratio: median time for one sample over that of the same network in float, in the same runtime.
        seconds: median time for one sample.
        overflows: whether sums of products of bytes overflow there, on this processor; then weights of 8
            bits cost accuracy, and weights of 7 bits do not. See :mod:`.overflow`.
    """

    runtime: str
    executed: Executed
    score: float | None
    agreement: float
    ratio: float
    seconds: float
    overflows: bool


@dataclass(frozen=True)
class Deployment:
    """An exported network, measured.

    Attributes:
        exported: the file.
        float_bytes: of the same network in float, as a file.
        score: of the network itself, on the task's reported batches; None without a task.
        score_name: what it is.
        runtimes: one for each that is installed.
        noise: layer -> signal over noise against the network without integers, in decibels.
    """

    exported: Exported
    float_bytes: int
    score: float | None
    score_name: str
    runtimes: list[InRuntime]
    noise: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        found = asdict(self)
        found["exported"]["path"] = str(self.exported.path)
        return found


def deploy(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    task: Task | None = None,
    inputs: Any = None,
    reference: nn.Module | None = None,
    products: Iterable[Batch] | None = None,
    tables: bool = False,
    threads: int = 1,
    seconds: float = 1.0,
) -> Deployment:
    """Export a network, and measure the file in every runtime that is installed.

    Args:
        model: with its encodings and quantizers; left as it is.
        path: of the ONNX file.
        task: gives inputs and scores.
        inputs: an example instead, the first dim of each tensor being the batch.
        reference: the network before it was quantized; by default the same one without quantizers, whose
            weights are rounded all the same.
        products: batches for products of two activations; see :func:`.onnx.export`.
        tables: store embeddings as integers; see there.
        threads: of the runtimes.
        seconds: of timing, a runtime.

    Returns:
        The figures.

    Raises:
        InputError: neither task nor inputs.
        ExportFailed: the network cannot be written, or a runtime refuses the file.
    """
    given = example(task, inputs)
    plain = without_integers(model)
    exported = export(model, given, path, products=products, tables=tables)
    with tempfile.TemporaryDirectory() as folder:
        dense = export(plain, given, Path(folder) / "float.onnx")
        runtimes = [
            _in_runtime(name, model, exported.path, dense.path, task, given, threads, seconds)
            for name in installed()
        ]
    noise = layer_noise(model, reference or plain, given)
    score = None if task is None else evaluate(model, task.reported, task.score)
    name = "" if task is None else task.score_name
    return Deployment(exported, dense.bytes, score, name, runtimes, noise)


def example(task: Task | None, inputs: Any) -> Any:
    """Inputs of one sample, from a task where none are given."""
    if inputs is None and task is None:
        raise InputError("an export needs an example: give inputs or a task.")
    return task.example_inputs() if inputs is None and task is not None else inputs


def without_integers(model: nn.Module) -> nn.Module:
    """A copy that computes with real activations and has no encodings."""
    plain = copy.deepcopy(model)
    for place in [p for p in replaced_activations(plain) if quantizer_at(plain, p)]:
        remove_quantizer(plain, place)
    return bake(plain).eval()


def _in_runtime(
    name: str,
    model: nn.Module,
    file: Path,
    dense: Path,
    task: Task | None,
    inputs: Any,
    threads: int,
    seconds: float,
) -> InRuntime:
    build = RUNTIMES[name]
    networks = {"float": build(dense, threads), "integer": build(file, threads)}
    timed = latency(networks, inputs, threads=threads, seconds=seconds, clock="cpu")
    score = None
    if task is not None:
        score = evaluate(networks["integer"], task.reported, task.score)
    with torch.no_grad(), evaluation(model):
        agreement = noise_ratio(
            tensors_of(answer(model, inputs))[0], tensors_of(answer(networks["integer"], inputs))[0]
        )
    own = timed.models["integer"]
    return InRuntime(
        name,
        inspect(file, name),
        score,
        agreement,
        own.ratio.median,
        own.seconds.median,
        overflows(name),
    )
