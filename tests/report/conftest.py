"""A run directory made by hand: two stages, a layer of 40 weights and a bias."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lilliput import artifact

DENSE = np.linspace(-1, 1, 40, dtype=np.float32).reshape(4, 10)
CODES = np.array([[0] * 6 + [1, 1, 2, 2]] * 3 + [[0] * 6 + [1, 3, 3, 3]], np.uint8)
BOOK = np.array([0.0, -0.5, 0.25, 1.0], np.float32)
BIAS = np.ones(4, np.float32)
Make = Callable[..., Path]


def stage(folder: Path, number: int, name: str, tensors: dict[str, Any], **figures: Any) -> Any:
    path = folder / "stages" / f"{number}-{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    artifact.write(path, tensors)
    with artifact.open(path) as file:
        report = file.report()
    layers = [
        {"name": t.name, "shape": list(t.shape), "weights": t.weights, "nonzeros": t.nonzeros,
         "codec": t.codec, "bytes": t.bytes, "entropy_bytes": t.entropy_bytes}
        for t in report.tensors
    ]  # fmt: skip
    return {
        "name": name, "methods": [], "epochs": 3, "score": 98.0, "score_name": "accuracy, %",
        "score_on": "test", "score_drop": 0.0, "parameters": 44, "nonzeros": report.nonzeros,
        "bytes": report.file_bytes, "dense_bytes": 176, "size_ratio": 176 / report.file_bytes,
        "entropy_bytes": report.entropy_bytes, "latency_ratio": 1.0, "deep_compression": None,
        "artifact": f"stages/{path.name}", "layers": layers, **figures,
    }  # fmt: skip


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """A function that writes a run directory; keywords replace figures of ``result.json``."""

    def make(folder: str = "run", name: str = "tiny", **figures: Any) -> Path:
        home = tmp_path / folder
        home.mkdir()
        coded = {"fc.weight": artifact.Coded(CODES, BOOK), "fc.bias": BIAS}
        stages = [
            stage(home, 0, "train", {"fc.weight": DENSE, "fc.bias": BIAS}),
            stage(home, 1, "cluster", coded, methods=["codebook"], score=97.5, score_drop=0.5),
        ]
        last = {k: v for k, v in stages[-1].items() if k not in ("name", "methods", "layers")}
        expect = [
            {"figure": "size_ratio", "condition": ">= 1e9", "value": 1.0, "holds": False},
            {"figure": "score_drop", "condition": "<= 1.0", "value": 0.5, "holds": True},
        ]
        result = {**last, "baseline_score": 98.0, "stages": stages, "expect": expect, **figures}
        write(home, "result.json", result)
        write(home, "resolved.json", {"version": 1, "name": name, "description": f"About {name}."})
        write(home, "environment.json", {"python": "3.11", "packages": {"torch": "2"}, "gpu": None})
        change = {"where": "fc.weight", "what": "distinct values", "before": 40, "after": 4,
                  "method": "codebook", "note": ""}  # fmt: skip
        write(home, "changes.json", [[], [change]])
        lines = [
            {"stage": s, "epoch": e, "step": e, "loss": 1 / e, "loss/task": 0.5 / e, "validation": 90 + e}
            for s in (0, 1)
            for e in (1, 2, 3)
        ]  # fmt: skip
        (home / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return home

    return make
