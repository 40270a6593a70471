"""What came out: the figures of each stage and of the whole run.

``size_ratio`` is the dense network's bytes over the file's, larger is better; ``latency_ratio`` is the time
over the dense network's time, measured side by side, smaller is better. ``energy_pj`` is an
estimate for hardware that skips zeros (see :mod:`lilliput.measure.energy`). ``simulated`` is there where
integers are computed in floats, which takes longer than in the runtimes that execute them as integers.
``bytes`` is the size of the file on the disk; ``entropy_bytes`` beside it is what an ideal coder of single
weights would need.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from .. import artifact
from ..artifact.codecs import CODECS
from ..core.recipe import Stage
from ..core.run import Run
from ..core.task import evaluate
from ..errors import InputError, LilliputError, UnknownName
from ..measure import energy, latency, macs, size
from ..mechanisms.activations import Quantizer, replaced_activations

#: What a recipe may expect of a run.
FIGURES = (
    "score",
    "score_drop",
    "parameters",
    "nonzeros",
    "bytes",
    "size_ratio",
    "entropy_bytes",
    "macs",
    "sparse_macs",
    "latency_ratio",
)
#: Passes of each network that are timed, at most half a second in all.
TIMED_ROUNDS = 60
_CONDITION = re.compile(r"^\s*(<=|>=|<|>|==)\s*(-?[0-9.]+(?:e-?[0-9]+)?)\s*$")


@dataclass
class Result:
    """A finished run.

    Attributes:
        figures: JSON-ready, as in ``result.json``: those of the last stage, the baseline's score, and
            the list ``stages`` with the figures of each.
        model: the compressed network as the file holds it, in eval mode.
        artifact: the compressed file.
        directory: the run directory.
    """

    figures: dict[str, Any]
    model: nn.Module
    artifact: Path
    directory: Path

    @classmethod
    def of(
        cls,
        records: list[dict[str, Any]],
        baseline: dict[str, Any],
        model: nn.Module,
        path: Path,
        directory: Path,
    ) -> Result:
        """Put the stages' records together."""
        last = {
            k: v for k, v in records[-1].items() if k not in ("name", "methods", "epochs", "layers")
        }
        figures = {
            **last,
            "baseline_score": baseline["score"],
            "score_drop": baseline["score"] - last["score"],
            "artifact": str(path),
            "run": str(directory),
            "bytes": path.stat().st_size,
            "stages": records,
        }
        figures["size_ratio"] = figures["dense_bytes"] / figures["bytes"]
        return cls(figures, model, path, directory)

    def table(self) -> Table:
        """The stages as a table for the terminal."""
        score = self.figures["score_name"]
        table = Table(title=None, header_style="bold")
        for name in ("stage", score, "parameters", "non-zeros", "bytes on disk", "size", "latency"):
            table.add_column(name, justify="left" if name == "stage" else "right")
        for stage in self.figures["stages"]:
            table.add_row(
                stage["name"],
                f"{stage['score']:.2f}",
                f"{stage['parameters']:,}",
                f"{stage['nonzeros']:,}",
                f"{stage['bytes']:,}",
                f"{stage['size_ratio']:.1f}x smaller",
                "" if stage["latency_ratio"] is None else f"{stage['latency_ratio']:.2f}x",
            )
        return table


def stage_record(
    run: Run, stage: Stage, path: Path, loaded: nn.Module, baseline: dict[str, Any] | None
) -> dict[str, Any]:
    """The figures of one stage, all taken from the file that it wrote and read back."""
    dense = run.original if run.original is not None else loaded
    counted = size(loaded)
    on_disk, dense_bytes = path.stat().st_size, size(dense).dense_bytes
    with artifact.open(path) as file:
        report, columns = file.report(), _columns(file)
    task = run.task
    score = evaluate(loaded, task.reported, task.score, run.device)
    same = task.reported is task.validation
    validation = score if same else evaluate(loaded, task.validation, task.score, run.device)
    return {
        "name": stage.name,
        "methods": [method.method_name() for method in stage.methods],
        "epochs": stage.train.epochs,
        "score": score,
        "score_name": task.score_name,
        "score_on": "validation" if task.test is None else "test",
        "validation": validation,
        "score_drop": baseline["score"] - score if baseline else 0.0,
        "parameters": counted.parameters,
        "nonzeros": counted.nonzeros,
        "bytes": on_disk,
        "dense_bytes": dense_bytes,
        "size_ratio": dense_bytes / on_disk,
        "entropy_bytes": report.entropy_bytes,
        "deep_compression": columns,
        **_compute(loaded.cpu(), run),
        "artifact": str(path.relative_to(run.directory)) if run.directory else str(path),
        "layers": [_layer(tensor) for tensor in report.tensors],
    }


def expectations(expect: dict[str, str], figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold a recipe's conditions against the figures.

    Raises:
        InputError: a condition is not of the form ``">= 40"``, or names no figure.
    """
    return [_expectation(name, condition, figures) for name, condition in expect.items()]


def check_codec(name: str) -> None:
    """Raise UnknownName unless there is such a codec."""
    if name not in ("auto", *CODECS):
        raise UnknownName("codec", name, ("auto", *CODECS))


def check_condition(name: str, condition: str) -> tuple[str, float]:
    """The operator and the number of a condition.

    Raises:
        UnknownName: there is no such figure.
        InputError: the condition has another form.
    """
    if name not in FIGURES:
        raise UnknownName("figure", name, FIGURES)
    found = _CONDITION.match(condition)
    if not found:
        raise InputError(f"expect.{name} is {condition!r}; write it like '>= 40' or '<= 0.5'.")
    return found[1], float(found[2])


def _expectation(name: str, condition: str, figures: dict[str, Any]) -> dict[str, Any]:
    operator, bound = check_condition(name, condition)
    value = figures[name]
    if value is None:
        return {"figure": name, "condition": condition, "value": None, "holds": False}
    holds = {
        "<=": value <= bound,
        ">=": value >= bound,
        "<": value < bound,
        ">": value > bound,
        "==": value == bound,
    }[operator]
    return {"figure": name, "condition": condition, "value": value, "holds": holds}


def _columns(file: artifact.Artifact) -> dict[str, int] | None:
    """Deep Compression's three columns in bytes: pruned; with shared values; Huffman-coded.

    Tensors without a codebook (biases) count as they lie in the file. None where no tensor has one.
    """
    coded = [name for name in file.names() if file.info(name).levels]
    if not coded:
        return None
    rest = sum(t.bytes for t in file.report().tensors if t.name not in coded)
    columns = []
    for name in coded:
        codes, codebook = file.codes(name)
        columns.append(artifact.paper_columns(codes, len(codebook)))
    return {
        "P": rest + sum(c.pruned for c in columns),
        "P+Q": rest + sum(c.quantized for c in columns),
        "P+Q+H": rest + sum(c.coded for c in columns),
    }


def _compute(loaded: nn.Module, run: Run) -> dict[str, Any]:
    """Work and time of a forward pass of one sample, on the processor.

    A network that cannot run there alone is still worth its other figures, and so is one whose
    original takes other inputs.
    """
    example = run.task.example_inputs()
    nothing = dict.fromkeys(("macs", "sparse_macs", "energy_pj", "latency_ratio"))
    try:
        work = macs(loaded, example)
        figures = nothing | {
            "macs": work.total,
            "sparse_macs": work.sparse_macs,
            "energy_pj": energy(loaded, example, skip_zeros=True, work=work).total_pj,
        }
    except LilliputError as error:
        return {**nothing, "unmeasured": str(error)}
    try:
        ratio = 1.0 if run.original is None else _time_ratio(loaded, run.original, example)
    except LilliputError as error:
        return {**figures, "unmeasured": str(error)}
    kinds = {settings["kind"] for settings in replaced_activations(loaded).values()}
    simulated = {"simulated": True} if Quantizer.kind in kinds else {}
    return {**figures, "latency_ratio": ratio, **simulated}


def _time_ratio(loaded: nn.Module, dense: nn.Module, example: Any) -> float:
    """Time over the dense network's; that one is copied in the same layout, so that it is fair."""
    plain = copy.deepcopy(dense).cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    timed = latency({"dense": plain, "model": loaded}, example, repeats=TIMED_ROUNDS, seconds=0.5)
    return timed.models["model"].ratio.median


def _layer(tensor: artifact.TensorReport) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "weights": tensor.weights,
        "nonzeros": tensor.nonzeros,
        "codec": tensor.codec,
        "bytes": tensor.bytes,
        "entropy_bytes": tensor.entropy_bytes,
    }
