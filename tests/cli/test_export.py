"""export and profile --deploy."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from _typed import typed

import lilliput

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("one_reading_of_operators")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: Any) -> Path:
    """A network of integers as a compressed file that names its task."""
    home = tmp_path_factory.mktemp("quantized")
    recipe = home / "tiny.yaml"
    recipe.write_text(
        "task: {name: digits, limit: 256}\nmodel: digits_cnn\nthreads: 1\nstages:\n"
        "  - train: {epochs: 1}\n  - methods: [{method: post_training, samples: 64, bits: 7}]\n"
        "    train: {epochs: 0}\n"
    )
    assert typed("run", recipe, "--directory", home / "run", "--no-report", "--quiet").code == 0
    return home / "run"


def test_the_file_runs_in_integers_and_scores_as_the_network_does(
    quantized: Path, tmp_path: Path
) -> None:
    out = tmp_path / "net.onnx"
    dense = next((quantized / "stages").glob("0-*.safetensors"))
    answer = typed("export", quantized / "model.safetensors", out, "--against", dense, "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    model = lilliput.load(quantized / "model.safetensors")
    layers = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    ]
    assert found["exported"]["integer_layers"] == layers
    assert found["exported"]["bytes"] == out.stat().st_size
    runtime = found["runtimes"][0]
    assert runtime["runtime"] == "onnxruntime"
    assert (runtime["executed"]["integers"], runtime["executed"]["floats"]) == (len(layers), 0)
    assert abs(runtime["score"] - found["score"]) <= 1.0
    assert runtime["agreement"] > 30.0
    assert set(found["noise"]) == set(layers)
    assert all(10.0 < ratio < 80.0 for ratio in found["noise"].values())


def test_the_table_says_what_runs_in_integers(quantized: Path, tmp_path: Path) -> None:
    answer = typed("export", quantized / "model.safetensors", tmp_path / "net.onnx")
    assert answer.code == 0
    assert "layers have integer weights and inputs" in answer.out
    assert "onnxruntime" in answer.out
    assert "signal over noise, dB" in answer.out


def test_a_network_in_float_is_exported_too(tmp_path: Path) -> None:
    answer = typed(
        "export", "lenet_300_100", tmp_path / "net.onnx", "--input", "1,1,28,28", "--json"
    )
    assert answer.code == 0, answer.err
    assert answer.json["exported"]["integer_layers"] == []
    assert answer.json["runtimes"][0]["executed"]["integers"] == 0
    assert answer.json["score"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lenet_300_100", "net.onnx"], ["example", "task"]),
        (["no.safetensors", "net.onnx"], ["no.safetensors"]),
        (["lenet5", "net.onnx"], ["lenet5", "'lenet_5'"]),
        (["lenet_5", "net.onnx", "--to", "tflite"], ["tflite"]),
        (["lenet_5", "net.onnx", "--input", "1,1,28,28", "--products"], ["--task"]),
    ],
)
def test_what_cannot_be_exported(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    answer = typed("export", arguments[0], tmp_path / arguments[1], *arguments[2:])
    assert answer.code == 2
    assert all(word in answer.err for word in words), answer.err
    assert not list(tmp_path.iterdir())


def test_profile_deploy_compares_variants_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "times.svg"
    answer = typed(
        "profile", "lenet_5", "--input", "1,1,28,28", "--deploy", "--picture", picture, "--json"
    )
    assert answer.code == 0, answer.err
    found = answer.json["deployment"]
    rows = {(r["variant"], r["runtime"]): r for r in found["rows"]}
    assert rows["as it is", "torch"]["faster"] == 1.0
    assert rows["integers", "onnxruntime"]["integers"] == 4
    assert rows["integers", "onnxruntime"]["floats"] == 0
    assert rows["as it is", "onnxruntime"]["integers"] == 0
    half, whole = rows["half the channels", "onnxruntime"], rows["as it is", "onnxruntime"]
    assert half["bytes"] < 0.5 * whole["bytes"]
    assert 1.0 < found["ceiling"]["integer"] / found["ceiling"]["real"] < 8.0
    assert all(0.0 < row["ceiling"] < 1.5 for row in found["rows"])
    assert found["failed"] == {}
    bars = ElementTree.fromstring(picture.read_text()).iter("{http://www.w3.org/2000/svg}rect")
    assert len(list(bars)) == len(rows)


def test_profile_deploy_wants_inputs(tmp_path: Path) -> None:
    assert "--input" in typed("profile", "lenet_5", "--deploy").err
    answer = typed("profile", "lenet_5", "--picture", tmp_path / "p.svg")
    assert answer.code == 2
    assert "--deploy" in answer.err
