"""Who watches a run: a progress bar on a terminal, plain lines elsewhere, trackers on request."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..core.recipe import Stage
from ..core.run import Run
from ..errors import MissingDependency


class Watcher:
    """Base: sees nothing."""

    def stage_begins(self, run: Run, stage: Stage) -> None:
        """A stage is about to train."""

    def step_done(self, run: Run) -> None:
        """One optimizer step is done."""

    def epoch_done(self, run: Run, figures: dict[str, Any]) -> None:
        """An epoch is done; the figures are those of ``metrics.jsonl``."""

    def stage_ends(self, record: dict[str, Any]) -> None:
        """A stage is finished; the record is that of ``result.json``."""

    def close(self) -> None:
        """The run is over."""


class Lines(Watcher):
    """Plain lines, one every few seconds at most while a stage trains."""

    def __init__(self, out: TextIO | None = None, seconds: float = 5.0) -> None:
        self.out, self.seconds = out or sys.stderr, seconds
        self._last = 0.0

    def stage_begins(self, run: Run, stage: Stage) -> None:
        """Name the stage."""
        self._say(f"stage {run.stage + 1}: {stage.name}")

    def epoch_done(self, run: Run, figures: dict[str, Any]) -> None:
        """Show the epoch, unless one was shown a moment ago."""
        if time.monotonic() - self._last >= self.seconds:
            self._say(f"  epoch {run.epoch}, {describe(figures)}")

    def stage_ends(self, record: dict[str, Any]) -> None:
        """Show what came out."""
        self._say(
            f"  {record['score']:.2f} {record['score_name']}, {record['bytes']:,} bytes, "
            f"{record['size_ratio']:.1f}x smaller"
        )

    def _say(self, text: str) -> None:
        print(text, file=self.out, flush=True)
        self._last = time.monotonic()


class Bar(Watcher):
    """A rich progress bar."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self.progress.start()
        self._bar: Any = None
        self._last = 0.0

    def stage_begins(self, run: Run, stage: Stage) -> None:
        """Start a bar."""
        name = f"{run.stage + 1} {stage.name}"
        self._bar = self.progress.add_task(name, total=run.total_steps or 1, figures="")

    def step_done(self, run: Run) -> None:
        """Move the bar, four times a second at most: a step must not pay for its display."""
        now = time.monotonic()
        if now - self._last > 0.25:
            self.progress.update(self._bar, completed=run.step)
            self._last = now

    def epoch_done(self, run: Run, figures: dict[str, Any]) -> None:
        """Show the epoch's figures."""
        self.progress.update(self._bar, completed=run.step, figures=describe(figures))

    def stage_ends(self, record: dict[str, Any]) -> None:
        """Show what came out."""
        text = f"{record['score']:.2f} {record['score_name']}, {record['size_ratio']:.1f}x smaller"
        self.progress.update(self._bar, completed=self.progress.tasks[-1].total, figures=text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.progress.stop()


class TensorBoard(Watcher):
    """Writes the metrics as TensorBoard events; opt-in."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependency(
                "tensorboard", "tensorboard", "writing TensorBoard events"
            ) from error
        # Made when the run begins: a run directory must be empty until the run has claimed it.
        self._make: Callable[[], Any] = partial(SummaryWriter, str(folder))
        self.writer: Any = None

    def stage_begins(self, run: Run, stage: Stage) -> None:
        """Open the event file."""
        self.writer = self.writer or self._make()

    def epoch_done(self, run: Run, figures: dict[str, Any]) -> None:
        """Write the epoch's figures, by stage."""
        for name, value in figures.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"stage {run.stage + 1}/{name}", value, run.step)

    def close(self) -> None:
        """Finish the event file."""
        if self.writer is not None:
            self.writer.close()


def watcher(console: Console | None = None) -> Watcher:
    """A bar on a terminal, lines elsewhere."""
    console = console or Console(stderr=True)
    return Bar(console) if console.is_terminal else Lines()


def describe(figures: dict[str, Any]) -> str:
    """The figures of an epoch in one short line."""
    parts = [f"loss {figures['loss']:.4f}"] if "loss" in figures else []
    if figures.get("validation") is not None:
        parts.append(f"validation {figures['validation']:.2f}")
    return ", ".join(parts)
