"""Tables whose rows take minutes each: run what is missing, keep each row at once, tell mean and spread.

A job is a dict of settings (a row's name, a seed, ...), a row is that dict with the figures of the run. Rows
lie in a JSON file; the file is written anew after each of them, so that a killed benchmark goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import nn

from lilliput.api import compress
from lilliput.core.recipe import Stage
from lilliput.core.task import Task
from lilliput.engine.memory import keep_freed_memory
from lilliput.engine.precision import fast_precision
from lilliput.engine.records import environment
from lilliput.errors import LilliputError
from lilliput.io import load

Row = dict[str, Any]


class Rows:
    """The rows of one file, and what else stands in it (``about``: what all rows have in common)."""

    def __init__(self, path: Path, **about: Any) -> None:
        self.path = path
        self.about = about

    def read(self) -> list[Row]:
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def run(self, jobs: Iterable[Row], do: Callable[[Row], Row], processes: int = 1) -> None:
        """Do the jobs that have no row yet, each in a process with one thread; a failed one is told."""
        missing = [
            job for job in jobs if not any(job.items() <= row.items() for row in self.read())
        ]
        with ProcessPoolExecutor(processes, initializer=settle) as pool:
            for done in as_completed([pool.submit(attempt, do, job) for job in missing]):
                self.keep(done.result())

    def run_seeds(
        self,
        options: argparse.Namespace,
        jobs: Iterable[Row],
        do: Callable[..., Row],
        first: Callable[..., Any],
    ) -> None:
        """For each seed what its rows start from, then those of the jobs whose row is asked for.

        Args:
            options: of :func:`parser`.
            jobs: settings of the rows, without the seed.
            do: ``do(job, work=...)``.
            first: ``first(seed, work)``.
        """
        for seed in options.seeds:
            alone(first, seed, options.work)
            wanted = [j for j in jobs if any(part in j["row"] for part in options.only)]
            seeds_own = [{**job, "seed": seed} for job in wanted]
            self.run(seeds_own, functools.partial(do, work=options.work), options.jobs)

    def keep(self, row: Row) -> None:
        print(", ".join(f"{k} {v}" for k, v in row.items() if not isinstance(v, dict)), flush=True)
        if "failed" in row:
            return
        content = {**self.about, "environment": environment(), "rows": [*self.read(), row]}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(content, indent=1) + "\n")
        new.replace(self.path)


def once(
    description: str | None,
    file: Path,
    measure: Callable[[], list[Row]],
    table: Callable[[list[Row]], str],
) -> None:
    """The ``main`` of a benchmark that takes minutes as a whole: measure, keep, print; or only print."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--table", action="store_true", help="measure nothing, print the table")
    if not options.parse_args().table:
        content = {"environment": environment(), "rows": measure()}
        file.write_text(json.dumps(content, indent=1) + "\n")
    print(table(json.loads(file.read_text())["rows"]))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all such benchmarks have."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("--only", nargs="*", default=[""], help="parts of rows' names")
    found.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    found.add_argument("--jobs", type=int, default=1, help="rows at the same time")
    found.add_argument("--work", type=Path, default=Path("runs"), help="run directories")
    found.add_argument("--table", action="store_true", help="run nothing, print the table")
    return found


def settle() -> None:
    """What a process does first."""
    torch.set_num_threads(1)
    keep_freed_memory()


def alone(do: Callable[..., Any], *arguments: Any) -> Any:
    """Do what several rows start from in a process of its own, before they all ask for it."""
    with ProcessPoolExecutor(1, initializer=settle) as pool:
        return pool.submit(do, *arguments).result()


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new network whose weights are the seed's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


class Trained(NamedTuple):
    """A network and the figures of the run that trained it."""

    model: nn.Module
    figures: dict[str, Any]


def trained(
    network: nn.Module, task: Task, stages: list[Stage], *, directory: Path, seed: int
) -> Trained:
    """What :func:`lilliput.compress` returns; a run that is finished is read, by any number of processes."""
    result = directory / "result.json"
    if result.exists():
        return Trained(
            load(directory / "model.safetensors", model=network), json.loads(result.read_text())
        )
    found = compress(network, task, stages, directory=directory, seed=seed)
    return Trained(found.model, found.figures)


def named(home: Path, *parts: Any) -> Path:
    """A run directory whose name is made of a row's settings."""
    return home / re.sub(r"[^\w.-]+", "_", "-".join(map(str, parts)))


def attempt(do: Callable[[Row], Row], job: Row) -> Row:
    """A job's row; or why it failed, which is told and must not stop the other rows."""
    try:
        return {**job, **do(job), "auto_precision": fast_precision(torch.device("cpu"))}
    except Exception as error:
        if not isinstance(error, LilliputError):
            traceback.print_exc()
        return {**job, "failed": f"{type(error).__name__}: {error}"}


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation; a single value says that it is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (one seed)"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def change(
    found: list[Row], without: list[Row], name: str = "score", digits: int = 2, sign: int = 1
) -> str:
    """How far rows lie from others of the same seeds in the mean; nothing where no seed is in both."""
    reference = {row["seed"]: row[name] for row in without}
    apart = [sign * (r[name] - reference[r["seed"]]) for r in found if r["seed"] in reference]
    return f"{mean(apart):+.{digits}f}" if apart else ""


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table: the first column is text, the others are figures."""
    names = list(head)
    rule = ["---", *["---:"] * (len(names) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rule, *lines))
