"""A run that kills its own process, as ``kill -9`` does, at a moment of choice."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

import lilliput
from lilliput import Stage, Train
from lilliput.core.run import Run
from lilliput.engine.progress import Watcher
from lilliput.engine.records import RunDirectory
from lilliput.methods import Codebook, Gradual, SoftTargets
from lilliput.testing import NETWORKS


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(Watcher):
    """Kills in a step of a stage, or right after the end of the first stage."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def step_done(self, run: Run) -> None:
        if self.moment == f"inside {run.stage} {run.step}":
            die()

    def stage_ends(self, record: dict[str, Any]) -> None:
        if self.moment == "between":
            die()


def kill_before_forgetting(moment: str) -> None:
    """The stage is saved, and the checkpoint inside it is still there."""
    real = RunDirectory.forget

    def forget(self: RunDirectory, name: str) -> None:
        if moment == "before forgetting":
            die()
        real(self, name)

    RunDirectory.forget = forget  # type: ignore[method-assign]


def kill_while_writing(moment: str) -> None:
    """The file's bytes are half on the disk, under its temporary name."""
    real = os.fsync

    def fsync(handle: int) -> None:
        name = str(Path(f"/proc/self/fd/{handle}").readlink())
        if moment.startswith("writing ") and moment.removeprefix("writing ") in name:
            os.truncate(handle, os.fstat(handle).st_size // 2)
            die()
        real(handle)

    os.fsync = fsync  # type: ignore[assignment]


def run(directory: Path, *watchers: Watcher) -> None:
    """Two stages, dropout, batch statistics, shuffled batches, a cached teacher, checkpoints."""
    network = NETWORKS[1]
    train = Train(epochs=2, lr=0.01, checkpoint_minutes=1e-9, lr_schedule="cosine")
    stages = [
        Stage(methods=[Gradual(sparsity=0.6), SoftTargets(cache=True)], train=train),
        Stage(methods=[Codebook(bits=3)], train=train),
    ]
    lilliput.compress(
        network.build(), network.task(), stages, directory=directory, watchers=watchers
    )


def main(directory: Path, moment: str) -> None:
    """Without a moment the run is undisturbed, or goes on."""
    torch.set_num_threads(1)
    kill_before_forgetting(moment)
    kill_while_writing(moment)
    run(directory, Killer(moment))
