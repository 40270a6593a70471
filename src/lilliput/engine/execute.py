"""A recipe from its first stage to its artifact; :mod:`lilliput.engine.loop` draws the whole.

The surprising rule: the score that is reported is that of the *file*. After each stage the model is
written, read back, and what was read is evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import artifact, io
from ..core.method import Method
from ..core.recipe import ArtifactSettings, Stage
from ..core.run import Run
from ..core.task import Task, evaluate
from ..core.types import Change
from ..errors import InputError, NothingChanged
from ..measure.latency import torch_threads
from ..mechanisms.encodings import bake
from . import distributed
from .checkpoint import load_model_tree, model_tree
from .optim import build_optimizer, freeze_others, optimizer_class
from .outcome import Result, check_codec, expectations, stage_record
from .progress import Watcher
from .records import RunDirectory, fingerprint
from .seeds import preserved_randomness, reshuffle, seed_all
from .training import Training, length


@dataclass
class Job:
    """What is to be executed: a recipe with its model and tasks built.

    Attributes:
        model: the network to start from; it stays as it is.
        task: what it must do.
        stages: what happens to it.
        description: JSON-ready; the run directory belongs to it.
        seed: of everything random.
        device: where to train.
        deterministic: use torch's deterministic algorithms.
        threads: torch threads; None leaves them as they are.
        artifact: how files are written.
        expect: conditions on the result.
        stage_tasks: tasks of the stages that have their own.
        stage_models: networks of the stages that bring their own, by the stages' numbers.
        build: makes the networks that methods refer to.
    """

    model: nn.Module
    task: Task
    stages: Sequence[Stage]
    description: dict[str, Any]
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    deterministic: bool = True
    threads: int | None = None
    artifact: ArtifactSettings = field(default_factory=ArtifactSettings)
    expect: dict[str, str] = field(default_factory=dict)
    stage_tasks: dict[int, Task] = field(default_factory=dict)
    stage_models: dict[int, nn.Module] = field(default_factory=dict)
    build: Callable[[Any], nn.Module] | None = None


def execute(
    job: Job, directory: Path, *, fresh: bool = False, watchers: Sequence[Watcher] = ()
) -> Result:
    """Execute a job, or go on with it where an earlier process stopped.

    Args:
        job: what to do.
        directory: the run directory; see :mod:`lilliput.engine.records`.
        fresh: throw an earlier run there away.
        watchers: told of every step.

    Returns:
        The figures, the model and the artifact.

    Raises:
        RunConflict: the directory belongs to another run.
        Diverged, NothingChanged: see there; the last checkpoint is kept.
    """
    leader = distributed.rank() == 0
    watchers = watchers if leader else ()
    try:
        with (
            RunDirectory(directory, job.description, fresh=fresh, leader=leader) as home,
            preserved_randomness(),
            torch_threads(job.threads or torch.get_num_threads()),
        ):
            distributed.barrier()
            return _Execution(job, home, watchers).run_all()
    finally:
        for watcher in watchers:
            watcher.close()


#: The number of the "stage" that brings the run's first network.
_START = -1


class _Execution:
    """One execution of a job."""

    def __init__(self, job: Job, home: RunDirectory, watchers: Sequence[Watcher]) -> None:
        self.job, self.home, self.watchers = job, home, watchers
        # Stages work on copies, so that a network can be built anew as any stage left it.
        self.templates = {_START: job.model, **job.stage_models}
        self.run = Run(
            model=self._fresh(_START),
            task=job.task,
            device=job.device,
            seed=job.seed,
            directory=home.path,
            wrap=distributed.wrap,
            build=job.build,
        )
        self.baseline: dict[str, Any] | None = None
        self.records: list[dict[str, Any]] = []
        self.changes: list[list[dict[str, Any]]] = []

    def run_all(self) -> Result:
        """All stages that are not done yet, and the conclusion."""
        self._check()
        self._take_up()
        for number in range(len(self.records), len(self.job.stages)):
            self._stage(number)
        return self._conclude()

    def _check(self) -> None:
        """Raise what can be known before the first step."""
        if not self.job.stages:
            raise InputError("there is nothing to do: give at least one stage.")
        check_codec(self.job.artifact.codec)
        for number, stage in enumerate(self.job.stages):
            optimizer_class(stage.train.optimizer)
            for method in stage.methods:
                method.check(self.templates[self._owner(number)])

    def _owner(self, number: int) -> int:
        """The stage that brought the network of a stage."""
        return max(n for n in self.templates if n <= number)

    def _fresh(self, number: int) -> nn.Module:
        """A copy of a stage's network before anything happened to it."""
        return copy.deepcopy(self.templates[self._owner(number)]).to(self.job.device)

    def _take_up(self) -> None:
        """Begin, or go on after the last finished stage."""
        run, home = self.run, self.home
        if home.load("start") is None:
            home.save("start", {"model": model_tree(run.model)})
            return
        original = home.load("original")
        if original is not None:
            run.model = self._as_left("original", original["stage"])
            self._set_original(original["figures"])
        done = [n for n in range(len(self.job.stages)) if home.checkpoint(f"stage-{n}").exists()]
        if done:
            last: Any = home.load(f"stage-{done[-1]}")
            run.model = self._as_left(f"stage-{done[-1]}", done[-1])
            self.records, self.changes = last["records"], last["changes"]
        else:
            run.model = self._as_left("start", _START)

    def _as_left(self, checkpoint: str, number: int) -> nn.Module:
        """A stage's network as a checkpoint has it."""
        tree: Any = self.home.load(checkpoint)
        model = self._fresh(number)
        load_model_tree(model, tree["model"])
        return model

    def _end_of(self, number: int) -> nn.Module:
        """The plain network that a finished stage left, to learn from."""
        name = "start" if number == _START else f"stage-{number}"
        distributed.barrier()
        return bake(self._as_left(name, number)).eval().requires_grad_(False)

    def _set_original(self, figures: dict[str, Any]) -> None:
        """Keep the network as it is now: the baseline, and the usual teacher."""
        self.run.original = copy.deepcopy(self.run.model).eval().requires_grad_(False)
        self.baseline = figures

    def _stage(self, number: int) -> None:
        stage, run = self.job.stages[number], self.run
        self._prepare(number, stage)
        for method in run.methods:
            method.attach(run)
        frozen = freeze_others(run, stage.train)
        for watcher in self.watchers:
            watcher.stage_begins(run, stage)
        if stage.train.epochs:
            Training(run, stage.train, self.home, self.watchers).train_all()
        changes = [
            change for method in reversed(run.methods) for change in finish_method(method, run)
        ]
        for parameter in frozen:
            parameter.requires_grad_(True)
        self._close_stage(stage, changes)

    def _prepare(self, number: int, stage: Stage) -> None:
        """A clean run for the stage; the method objects are its own."""
        run = self.run
        run.stage, run.step, run.epoch = number, 0, 0
        run.task = self._task(number)
        if (stage.methods or stage.model is not None) and run.original is None:
            self._measure_original(number)
        if stage.model is not None:
            run.model = self._fresh(number)
        run.methods = [method.model_copy() for method in stage.methods]
        run.memories, run.extras, run.players, run.optimizer = {}, {}, {}, None
        run.network, run.shared = run.model, {}
        run.new_optimizer = partial(build_optimizer, stage.train)
        done = list(enumerate(self.job.stages))[:number]
        run.earlier = {earlier.name: partial(self._end_of, n) for n, earlier in done}
        run.earlier["previous"] = partial(self._end_of, number - 1)
        run.total_steps = stage.train.epochs * length(run.task.train) if stage.train.epochs else 0
        seed_all(run.seed, number, deterministic=self.job.deterministic)
        # What is calibrated before the first epoch must not depend on what was read before this stage.
        reshuffle(run.task.train, run.seed, number)

    def _task(self, number: int) -> Task:
        """What the network of a stage must do."""
        return self.job.stage_tasks.get(number, self.job.task).placed(self.run.device)

    def _measure_original(self, number: int) -> None:
        """The network before the first method: what every ratio is taken to."""
        run, before = self.run, number - 1
        task = self._task(max(0, before))  # what it was trained for
        figures = {"score": evaluate(run.model, task.reported, task.score, run.device)}
        tree = {"model": model_tree(run.model), "figures": figures, "stage": before}
        self.home.save("original", tree)
        self._set_original(figures)

    def _close_stage(self, stage: Stage, changes: list[Change]) -> None:
        """Write the file, measure what it holds, and only then call the stage done."""
        run, home = self.run, self.home
        path = self._stage_file(run.stage)
        self._write(path)
        loaded = self._read(path)
        record = stage_record(run, stage, path, loaded, self.baseline)
        self.records.append(record)
        self.changes.append([change.as_dict() for change in changes])
        home.write_json("changes.json", self.changes)
        done = {"records": self.records, "changes": self.changes}
        home.save(f"stage-{run.stage}", {"model": model_tree(run.model), **done})
        home.forget("inside")
        for watcher in self.watchers:
            watcher.stage_ends(record)

    def _stage_file(self, number: int) -> Path:
        name = _file_name(self.job.stages[number].name)
        return self.home.path / "stages" / f"{number}-{name}.safetensors"

    def _write(self, path: Path) -> None:
        if self.home.leader:
            path.parent.mkdir(parents=True, exist_ok=True)
            settings, recipe = self.job.artifact, self.job.description
            if settings.profile == "compact":  # where a recipe would be a tenth of the file
                recipe = {"fingerprint": fingerprint(recipe)}
            io.save(self.run.model, path, settings=settings, recipe=recipe)
        distributed.barrier()

    def _read(self, path: Path) -> nn.Module:
        empty = bake(copy.deepcopy(self.run.model)).cpu()
        return io.load(path, model=empty).to(self.run.device)

    def _conclude(self) -> Result:
        """The last stage's file is the run's, with the figures in it."""
        last = self.records[-1]
        baseline = self.baseline or {"score": last["score"]}
        source, path = self._stage_file(len(self.records) - 1), self.home.path / "model.safetensors"
        if not source.exists():  # somebody has tidied up in a finished run
            self._write(source)
        if self.home.leader:
            figures = {"score": last["score"], "baseline_score": baseline["score"]}
            artifact.annotate(source, path, figures=figures)
        distributed.barrier()
        model = self._read(path)
        result = Result.of(self.records, baseline, model, path, self.home.path)
        result.figures["expect"] = expectations(self.job.expect, result.figures)
        self.home.write_json("result.json", result.figures)
        return result


def finish_method(method: Method, run: Run) -> list[Change]:
    """Let a method conclude.

    Raises:
        NothingChanged: it should have changed the model and has not.
    """
    changes = method.finish(run)
    if method.changes_model and not changes:
        raise NothingChanged(
            f"{method.method_name()} has finished stage {run.stage + 1} and changed nothing: the model "
            "is as it was. Ask for more (a higher sparsity, fewer bits), or leave the method out."
        )
    return changes


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")[:40]
