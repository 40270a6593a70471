"""Commands as a user types them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lilliput
from lilliput.cli import main

TINY = """\
# A recipe that is done in a second.
task: {name: digits, limit: 256}
model: digits_cnn
threads: 1
stages:
  - train: {epochs: 1}
  - methods:
      - {method: magnitude, sparsity: 0.5}
"""


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def typed(*arguments: str | Path) -> Answer:
    """Call the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(a) for a in arguments])
    return Answer(code, out.getvalue(), err.getvalue())


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that finds this Lilliput wherever it starts."""
    home = str(Path(lilliput.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": home, "OMP_NUM_THREADS": "1", **more}


def process(*arguments: str | Path, cwd: Path | None = None, **more: str) -> Answer:
    """Call the command line in a process of its own."""
    command = [sys.executable, "-m", "lilliput", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=120
    )
    return Answer(done.returncode, done.stdout, done.stderr)
