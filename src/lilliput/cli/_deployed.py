"""What a network would gain: as it is, in integers, with half of its channels, and both, in each runtime.

The surprising rule: the thin variants are not retrained, so they have a time and a size, and no score.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.task import Task, as_batch, evaluate
from ..deploy import export, inspect, installed
from ..deploy.ceiling import Ceiling, ceiling
from ..deploy.deployment import without_integers
from ..deploy.runtime import RUNTIMES
from ..errors import LilliputError
from ..measure import latency, macs
from ..mechanisms.activations import quantizer_at, replaced_activations
from ..quantizing import quantize
from ..thinning import thin
from ._print import columns, note

#: Variants whose weights are fit to be scored.
_TRAINED = ("as it is", "integers")


@dataclass(frozen=True)
class Row:
    """A variant in a runtime.

    Attributes:
        variant: what was done to the network.
        runtime: where it runs.
        seconds: median time of one sample.
        faster: time of the network as it is in torch over that, in the same rounds.
        ceiling: multiply-accumulates a second over the most that this machine does in that type.
        bytes: of the file; None in torch.
        score: of the task; None without a task, and where the network would have to be retrained.
        integers: products that run in integers.
        floats: products that run in float.
    """

    variant: str
    runtime: str
    seconds: float
    faster: float
    ceiling: float
    bytes: int | None
    score: float | None
    integers: int
    floats: int


def profile_deployment(
    model: nn.Module, inputs: Any, task: Task | None, threads: int = 1, seconds: float = 2.0
) -> tuple[list[Row], Ceiling, dict[str, str]]:
    """Measure all variants side by side.

    Returns:
        The rows, the first of them being the network in torch; the machine's ceiling; and variants that
        could not be made, with the reason.
    """
    made, failed = variants(model, inputs, task)
    best = ceiling(threads)
    with tempfile.TemporaryDirectory() as folder:
        files = _exported(made, inputs, Path(folder), failed)
        running = {("as it is", "torch"): made["as it is"]}
        running |= {
            (name, runtime): RUNTIMES[runtime](file, threads)
            for runtime in installed()
            for name, file in files.items()
        }
        note("timing ...")
        named = {f"{name}/{runtime}": network for (name, runtime), network in running.items()}
        timed = latency(named, inputs, threads=threads, seconds=seconds * len(named), clock="cpu")
        rows = []
        for name, runtime in running:
            own = timed.models[f"{name}/{runtime}"]
            scores = task is not None and name in _TRAINED
            rows.append(Row(
                name, runtime, own.seconds.median, 1.0 / own.ratio.median,
                bytes=files[name].stat().st_size if runtime != "torch" else None,
                score=_score(running[name, runtime], task) if scores else None,
                **_used(made[name], inputs, files.get(name), runtime, own.seconds.median / threads, best),
            ))  # fmt: skip
    return rows, best, failed


def _exported(
    made: dict[str, nn.Module], inputs: Any, folder: Path, failed: dict[str, str]
) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, network in made.items():
        note(f"exporting: {name} ...")
        try:
            files[name] = export(network, inputs, folder / f"{len(files)}.onnx").path
        except LilliputError as error:
            failed[name] = str(error)
    return files


def _score(network: nn.Module, task: Task | None) -> float:
    assert task is not None
    return evaluate(network, task.reported, task.score)


def _used(
    network: nn.Module, inputs: Any, file: Path | None, runtime: str, seconds: float, best: Ceiling
) -> dict[str, Any]:
    """What runs in integers, and how near to the machine's most it comes in that type."""
    executed = inspect(file, runtime) if file is not None and runtime != "torch" else None
    integers, floats = (0, 0) if executed is None else (executed.integers, executed.floats)
    peak = best.integer if integers else best.real
    reached = macs(network, inputs).total / seconds / peak
    return {"ceiling": reached, "integers": integers, "floats": floats}


def variants(
    model: nn.Module, inputs: Any, task: Task | None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The network as it is, in integers, and both with half of the channels; and what could not be made."""
    made, failed = {"as it is": model.eval()}, dict[str, str]()
    if any(quantizer_at(model, place) for place in replaced_activations(model)):
        made = {"as it is": without_integers(model), "integers": model}
    else:
        _try(made, failed, "integers", lambda: quantized(model, inputs, task))
    half: dict[str, nn.Module] = {}
    _try(half, failed, "half the channels", lambda: thin(without_integers(model), inputs).model)
    for name, network in half.items():
        made[name] = network.eval()
        _try(made, failed, f"{name}, integers", lambda: quantized(network, inputs, task))  # noqa: B023
    return made, failed


def _try(made: dict[str, Any], failed: dict[str, str], name: str, make: Any) -> None:
    try:
        made[name] = make()
    except LilliputError as error:
        failed[name] = str(error)


def quantized(model: nn.Module, inputs: Any, task: Task | None) -> nn.Module:
    """The network in 8-bit integers, calibrated on the task, or on the example where there is none."""
    seen = [inputs] if task is None else [as_batch(item).inputs for item in task.train]
    return quantize(model, seen).model


def as_dict(rows: list[Row], best: Ceiling, failed: dict[str, str]) -> dict[str, Any]:
    """A JSON-ready form."""
    return {"rows": [asdict(row) for row in rows], "ceiling": asdict(best), "failed": failed}


def render(found: dict[str, Any]) -> str:
    """The table, and the ceiling below."""
    head = (
        "variant",
        "runtime",
        "ms",
        "faster",
        "of ceiling",
        "bytes",
        "score",
        "integer products",
    )
    lines = [
        (
            r["variant"], r["runtime"], f"{r['seconds'] * 1e3:.3f}", f"{r['faster']:.2f}x",
            f"{r['ceiling']:.0%}", "" if r["bytes"] is None else f"{r['bytes']:,}",
            "" if r["score"] is None else f"{r['score']:.2f}",
            "" if r["bytes"] is None else f"{r['integers']} of {r['integers'] + r['floats']}",
        )
        for r in found["rows"]
    ]  # fmt: skip
    real, integer = found["ceiling"]["real"], found["ceiling"]["integer"]
    best = (
        f"ceiling of this machine: {real / 1e9:.0f} billion multiply-accumulates a second in float, "
        f"{integer / 1e9:.0f} in integers ({integer / real:.1f}x)"
    )
    missing = [f"{name}: {reason}" for name, reason in found["failed"].items()]
    return "\n".join([columns([head, *lines], right=range(2, 8)), "", best, *missing])
