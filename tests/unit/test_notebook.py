"""The catalogue of the notebook: every paper is there, and each has code, a paper test and benchmark rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lilliput.core import registry
from lilliput.core.notebook import Noted, notebook

ROOT = Path(__file__).resolve().parents[2]

#: The notebook's own list, in its own words.
LIST = """
Distilling the Knowledge in a Neural Network; Dark Knowledge; FitNets; A Gift from Knowledge
Distillation; Rocket Launching; Learning Efficient Object Detection Models; Do Deep Nets Really Need
to be Deep; Deep Mutual Learning; Data-Free Knowledge Distillation; Large-Scale Domain Adaptation
via Teacher-Student Learning; Transparent Model Distillation; Sequence-Level Knowledge Distillation;
Unifying Distillation and Privileged Information; Face Model Compression; Paying More Attention to
Attention; Conditional Adversarial Networks; KDGAN; Deep Compression; Towards the Limit of Network
Quantization; Loss-aware Binarization; Half-wave Gaussian Quantization; Training and Inference with
Integers; Optimal Brain Surgeon; Data-free Parameter Pruning; Learning both Weights and Connections;
Network Trimming; Dynamic Network Surgery; Pruning Filters for Efficient ConvNets; Learning
Structured Sparsity; Resource Efficient Inference; Energy-Aware Pruning; Soft Weight-Sharing; DSD;
ThiNet; PackNet; Network Slimming; To Prune, or Not to Prune; Piggyback; Targeted Dropout;
Rethinking the Smaller-Norm-Less-Informative Assumption; Soft Filter Pruning; SqueezeNet;
MobileNets; MobileNetV2; Xception; Low-Rank Decomposition with Limited Training Data; Resource
Efficient Transfer Learning; Transfer Knowledge for High Sparsity; Transferring and Compressing;
First Order Taylor Series Ranking
"""
IDEAS = ("second student", "auxiliary", "own labels", "curriculum", "growing", "binary", "periods")

#: What is owed, by name; a test fails also when something of it is there and still stands here.
WITHOUT_CODE: set[str] = set()
WITHOUT_ROWS = {
    "compact_architectures", "detection_bccd", "distillation_cifar10", "few_bits_mnist", "fitnets_mnist",
    "low_rank", "translation_multi30k",
}  # fmt: skip


def plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


@pytest.mark.parametrize("title", [*(" ".join(t.split()) for t in LIST.split(";")), *IDEAS])
def test_nothing_of_the_list_is_missing(title: str) -> None:
    assert any(plain(title) in plain(paper.title) for paper in notebook()), title


@pytest.mark.parametrize("paper", notebook(), ids=lambda p: p.title[:40])
def test_a_paper_has_code_and_a_paper_test(paper: Noted) -> None:
    known = {n for kind in ("method", "architecture", "recipe") for n in registry.entries(kind)}
    if paper.title in WITHOUT_CODE:
        assert not paper.code
        return
    assert paper.code
    assert set(paper.code) <= known
    homes = (ROOT / "tests" / "papers", ROOT / "tests" / "unit")
    assert any((home / f"test_{paper.test}.py").exists() for home in homes), paper.test


def test_what_is_owed_in_benchmark_rows_is_what_is_said() -> None:
    asked = {paper.benchmark for paper in notebook() if paper.benchmark}
    there = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert asked - there == WITHOUT_ROWS
