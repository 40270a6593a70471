"""The examples of loops that belong to somebody else run, where their packages are present."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_plain_loop() -> None:
    score = runpy.run_path(str(EXAMPLES / "plain_torch.py"))["main"](epochs=12)
    assert score > 70  # about 87: nine tenths of the weights have gone in twelve epochs


@pytest.mark.parametrize(
    ("name", "packages", "brief", "at_least"),
    [
        ("lightning_module", ("lightning",), "epochs=4", 85.0),
        ("hugging_face_trainer", ("transformers", "accelerate"), "steps=180", 75.0),
    ],
)
def test_somebody_elses_loop(
    name: str, packages: tuple[str, ...], brief: str, at_least: float
) -> None:
    """In a process of its own: these packages change warnings and logging for good."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    script = (
        "from lilliput.testing import stand_in_for_torchvision; stand_in_for_torchvision();"
        f"import runpy, sys; print('score', runpy.run_path(sys.argv[1])['main']({brief}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split("score ")[-1]) > at_least
