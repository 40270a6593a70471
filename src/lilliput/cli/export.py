"""``lilliput export``: a network as a file for other runtimes, and what they make of it.

The surprising rule: figures come with the file. How many layers really run in integers, the score there and
the time are measured each time, for a runtime may do otherwise than the file says.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

from .. import io
from ..core.recipe import TaskSettings
from ..core.task import Task, as_batch
from ..core.types import Batch
from ..deploy import Deployment, deploy
from ..engine.recipes import build_task
from ..errors import InputError
from ._network import inputs_of, network_of
from ._print import columns, note, print_json, print_text

#: Batches on which products of activations are measured.
_CALIBRATION = 8


def export(
    model: str,
    /,
    out: Path,
    *,
    to: Literal["onnx"] = "onnx",
    task: str | None = None,
    input_: str | None = None,
    weights: Path | None = None,
    against: Path | None = None,
    products: bool = False,
    tables: bool = False,
    threads: int = 1,
    json: bool = False,
) -> int:
    """Write a network for other runtimes, integers as integers.

    The file is measured in the runtimes that are installed. Integer weights and activations stay integers.
    Without a task there is no score.

    Args:
        model: a compressed file, an architecture's name, timm:NAME and the like, or package.module:function.
        out: the file to write, for example model.onnx.
        to: the kind of file.
        task: a task's name or package.module:function; by default the one that a compressed file names.
        input_: shape of a random input instead, for example 1,3,224,224.
        weights: a file to fill the network from.
        against: the compressed file of the network before it was quantized, for the noise of each layer. A
            run directory has one for each stage, in stages.
        products: make products of two activations, as in attention, integers too, measured on the
            task's training batches.
        tables: store embeddings as bytes, a step for each row.
        threads: of the runtimes.
        json: print one JSON object.
    """
    with redirect_stdout(sys.stderr if json else sys.stdout):
        network, found = network_of(model, weights, "export")
        asked = TaskSettings(name=task) if task else found
        job = build_task(asked) if asked else None
        inputs = inputs_of(job, input_)
        note("exporting and measuring ...")
        before = None if against is None else io.load(against)
        made = deploy(
            network,
            out,
            task=job,
            inputs=inputs,
            reference=before,
            products=_calibration(job) if products else None,
            tables=tables,
            threads=threads,
        )
    if json:
        print_json({"model": model, "to": to, **made.as_dict()})
    else:
        print_text(_render(made))
    return 0


def _calibration(task: Task | None) -> Iterator[Batch]:
    if task is None:
        raise InputError("--products measures on a task's training batches: give --task NAME.")
    return itertools.islice(map(as_batch, task.train), _CALIBRATION)


def _render(made: Deployment) -> str:
    exported = made.exported
    inside = len(exported.integer_layers)
    lines = [
        f"{exported.path}: {exported.bytes:,} bytes, {made.float_bytes / exported.bytes:.1f}x smaller than "
        f"the same network in float",
        f"{inside} of {inside + len(exported.float_layers)} layers have integer weights and inputs"
        + (f"; in float: {', '.join(exported.float_layers[:8])}" if exported.float_layers else ""),
        *([f"{len(exported.tables)} embeddings are stored as bytes"] if exported.tables else []),
        f"{len(exported.folded)} batch normalizations are multiplied into the layers before them",
    ]
    if made.score is not None:
        lines.append(f"{made.score:.2f} {made.score_name} as the network itself computes")
    parts = ["\n".join(lines), _runtimes(made), *_overflows(made), _noise(made.noise)]
    return "\n\n".join(parts)


def _runtimes(made: Deployment) -> str:
    head = (
        "runtime",
        "in integers",
        "in float",
        "score",
        "agreement, dB",
        "time to its float",
        "ms",
    )
    rows = [
        (
            r.runtime,
            r.executed.integers,
            r.executed.floats,
            "" if r.score is None else f"{r.score:.2f}",
            f"{r.agreement:.1f}",
            f"{r.ratio:.2f}",
            f"{r.seconds * 1e3:.3f}",
        )
        for r in made.runtimes
    ]
    return columns([head, *rows], right=range(1, len(head)))


def _overflows(made: Deployment) -> list[str]:
    found = [r.runtime for r in made.runtimes if r.overflows and r.executed.integers]
    told = (
        f"On this processor sums of products of bytes overflow in {' and '.join(found)}. If the score or the "
        "agreement is too low, quantize with weights of 7 bits (bits: 7), whose sums fit."
    )
    return [told] if found else []


def _noise(noise: dict[str, float]) -> str:
    rows: list[tuple[Any, ...]] = [(layer, f"{ratio:.1f}") for layer, ratio in noise.items()]
    return columns([("layer", "signal over noise, dB"), *rows], right=(1,))
