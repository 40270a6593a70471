"""One network as files of several makers, each in its runtime: what benchmarks of integers share.

Everything is calibrated on the same samples. All networks run in one process in turn, one thread, CPU time;
ratios are medians of rounds.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rows import Row
from torch import nn

from lilliput.core.types import Batch
from lilliput.deploy import OnnxNetwork, export, inspect, overflows
from lilliput.deploy.runtime import RUNTIMES, tensors_of
from lilliput.measure import latency

Named = Iterator[tuple[str, "Deployed"]]


class Deployed(NamedTuple):
    """A file, and the runtime that is to execute it."""

    file: Path
    runtime: str

    def load(self) -> nn.Module:
        return RUNTIMES[self.runtime](self.file)

    def figures(self) -> Row:
        """What multiplies in integers there, and bytes."""
        found = inspect(self.file, self.runtime)
        beside = self.file.with_suffix(".bin")  # OpenVINO keeps weights apart
        parts = [self.file, *([beside] if beside.exists() else [])]
        return {
            "in_integers": found.integers, "in_float": found.floats,
            "bytes": sum(part.stat().st_size for part in parts), "operators": found.operators,
            "overflows": overflows(self.runtime),
        }  # fmt: skip


def deployed(
    model: nn.Module, ours: Mapping[str, nn.Module], seen: list[Any], inputs: Any, folder: Path
) -> dict[str, Deployed]:
    """Files of the network in float, of the runtimes' own tools, and of ours, in every runtime there is.

    Args:
        model: in float.
        ours: row -> the same network in integers.
        seen: inputs to calibrate on.
        inputs: an example.
        folder: for the files.
    """
    return dict(_deployed(model, ours, seen, inputs, folder))


def _deployed(
    model: nn.Module, ours: Mapping[str, nn.Module], seen: list[Any], inputs: Any, folder: Path
) -> Named:
    real = export(model, inputs, folder / "float.onnx").path
    yield "ONNX Runtime, float", Deployed(real, "onnxruntime")
    with contextlib.redirect_stdout(None):
        yield from _of_onnxruntime(real, seen, folder)
    batches = [Batch(x, None) for x in seen]
    files = {
        row: export(small, inputs, folder / f"{row}.onnx", products=batches, tables=True).path
        for row, small in ours.items()
    }
    for row, file in files.items():
        yield f"{row}, in ONNX Runtime", Deployed(file, "onnxruntime")
    if importlib.util.find_spec("openvino"):
        yield "OpenVINO, float", Deployed(real, "openvino")
        for row, file in files.items():
            yield f"{row}, in OpenVINO", Deployed(file, "openvino")
    if importlib.util.find_spec("nncf"):
        yield from _of_nncf(real, seen, folder)


def _of_onnxruntime(real: Path, seen: list[Any], folder: Path) -> Named:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    names = OnnxNetwork(real).inputs

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([_feed(names, x) for x in seen])

        def get_next(self) -> Any:
            return next(self.left, None)

    best = {
        "per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8,
    }  # fmt: skip
    ways = {"quantize_static's defaults": {}, "quantize_static at its best": best}
    if overflows("onnxruntime"):
        ways["quantize_static at its best, 7-bit weights"] = {**best, "reduce_range": True}
    prepared = str(folder / "prepared.onnx")
    quant_pre_process(str(real), prepared, skip_symbolic_shape=True)
    for row, settings in ways.items():
        file = folder / f"{row}.onnx"
        quantize_static(prepared, str(file), Reader(), **settings)
        yield f"ONNX Runtime, {row}", Deployed(file, "onnxruntime")


def _feed(names: list[str], inputs: Any) -> dict[str, Any]:
    return {name: t.numpy() for name, t in zip(names, tensors_of(inputs), strict=True)}


def _of_nncf(real: Path, seen: list[Any], folder: Path) -> Named:
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import OverflowFix

    names = OnnxNetwork(real).inputs
    data = nncf.Dataset(seen, lambda x: _feed(names, x))
    settings: Row = {} if len(names) == 1 else {"model_type": nncf.ModelType.TRANSFORMER}
    ways: dict[str, Row] = {"NNCF": {}}
    if overflows("openvino"):
        narrow = nncf.AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE)
        ways["NNCF, 7-bit weights"] = {"advanced_parameters": narrow}
    for row, more in ways.items():
        model = openvino.Core().read_model(str(real))
        file = folder / f"{row}.xml"
        openvino.save_model(nncf.quantize(model, data, **settings, **more), str(file))
        yield f"OpenVINO, {row}", Deployed(file, "openvino")


def timed(
    running: Mapping[str, nn.Module], made: Mapping[str, Deployed], inputs: Any, seconds: float
) -> list[Row]:
    """A row for each network: how much faster than the first one, milliseconds, and what runs in integers."""
    found = latency(running, inputs, seconds=seconds, repeats=10_000, clock="cpu").models
    return [
        {
            "row": row,
            "faster": 1.0 / found[row].ratio.median,
            "milliseconds": 1e3 * found[row].seconds.median,
            **(made[row].figures() if row in made else {}),
        }
        for row in running
    ]
