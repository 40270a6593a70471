"""Two processes, each with half of every batch, come to what one comes to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import processes_driver
import pytest

from lilliput import artifact


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories ``one`` and ``two``; starting processes takes longer than all of their work."""
    home = tmp_path_factory.mktemp("processes")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, processes_driver.__file__, str(home / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (home / "printed").write_text(done.stdout)
    processes_driver.run_all(home / "one")
    return home


@pytest.mark.slow
@pytest.mark.parametrize("method", processes_driver.METHODS)
def test_two_processes_come_to_what_one_comes_to(method: str, runs: Path) -> None:
    """The wrapper that shares the gradients is built anew after a cut; a truncated network has its own."""
    one, two = (
        artifact.read(runs / name / method / "model.safetensors") for name in ("one", "two")
    )
    if method == "two_cuts":
        assert one["2.weight"].shape == (14, 12)
    for name, tensor in one.items():
        np.testing.assert_allclose(two[name], tensor, atol=1e-5)


@pytest.mark.slow
def test_the_command_line_prints_one_result(runs: Path) -> None:
    assert (runs / "printed").read_text().count("compressed file") == 1
    assert (runs / "two" / "typed" / "result.json").exists()
