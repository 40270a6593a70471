"""``lilliput run``: a recipe from start to end, or from where it was interrupted.

The surprising rule: with ``--json`` everything that a model or a task prints goes to stderr, so
that stdout holds exactly one JSON object.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console

from ..api import default_directory, run_recipe
from ..engine import distributed
from ..engine.memory import keep_freed_memory
from ..engine.outcome import Result
from ..engine.progress import TensorBoard, Watcher, watcher
from ..engine.recipes import load_recipe
from ..errors import MissingDependency
from ..report.read import read_run
from ._print import columns, leads, note, print_json, print_text

EXPECTATION_FAILED = 3


def run(
    recipe: str,
    /,
    *overrides: str,
    directory: Path | None = None,
    fresh: bool = False,
    no_report: bool = False,
    tensorboard: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> int:
    """Run a recipe, or go on with it where it was interrupted.

    The run directory keeps the compressed file (model.safetensors), the figures (result.json) and
    the report (report.html). To train on several processes:
    torchrun --nproc-per-node 2 -m lilliput run RECIPE

    Args:
        recipe: a file, or the name of a shipped recipe.
        overrides: dotted key=value pairs, for example stages.0.train.epochs=3.
        directory: the run directory; by default runs/NAME-FINGERPRINT, which depends on the recipe
            and the overrides, so that the same command goes on with the same run.
        fresh: throw away an earlier run in the directory.
        no_report: do not write the HTML report.
        tensorboard: write TensorBoard events into the run directory as well.
        quiet: show no progress on stderr.
        json: print the figures as one JSON object instead of the table.
    """
    with redirect_stdout(sys.stderr if json else sys.stdout):
        result = _execute(recipe, overrides, directory, fresh, tensorboard, quiet)
        report = None if no_report else _report(result.directory)
    _show(result, report, json)
    return _verdict(result.figures["expect"])


def _execute(
    recipe: str,
    overrides: tuple[str, ...],
    directory: Path | None,
    fresh: bool,
    tensorboard: bool,
    quiet: bool,
) -> Result:
    settings = load_recipe(recipe, overrides)
    keep_freed_memory()
    home = directory or default_directory(settings)
    watchers: list[Watcher] = [] if quiet or not leads() else [watcher()]
    if tensorboard and leads():
        watchers.append(TensorBoard(home / "tensorboard"))
    try:
        return run_recipe(settings, directory=home, fresh=fresh, watchers=watchers)
    finally:
        distributed.stop()


def _report(directory: Path) -> Path | None:
    """Write the HTML report; a run is worth having without it."""
    if not leads():
        return None
    from ..report import write_report

    try:
        return write_report([directory], directory / "report.html")
    except MissingDependency as error:
        note(f"no HTML report: {error}")
        return None


def _show(result: Result, report: Path | None, json: bool) -> None:
    if json:
        print_json(result.figures)
    elif leads():
        wide = None if sys.stdout.isatty() else 120
        Console(width=wide).print(result.table())
        _show_widths(result.directory)
        print_text(f"compressed file  {result.artifact} ({result.figures['bytes']:,} bytes)")
        print_text(f"report           {report or 'none'}")


def _show_widths(directory: Path) -> None:
    """The blocks that were removed, and the layers that lost channels, where a method removed any."""
    run = read_run(directory)
    if run.removed:
        blocks = [("block", "before", "after")]
        blocks += [(name, before, "removed") for name, before in run.removed.items()]
        print_text(columns(blocks, right=(1, 2)) + "\n")
    if run.widths:
        rows = [(name, f"{before:,}", f"{after:,}") for name, (before, after) in run.widths.items()]
        print_text(columns([("layer", "channels before", "after"), *rows], right=(1, 2)) + "\n")


def _verdict(conditions: list[dict[str, Any]]) -> int:
    failed = [c for c in conditions if not c["holds"]]
    for condition in failed:
        note(
            f"lilliput: expect.{condition['figure']}: {condition['value']:.6g} is not "
            f"{condition['condition']}."
        )
    return EXPECTATION_FAILED if failed else 0
