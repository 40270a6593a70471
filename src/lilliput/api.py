"""What most programs need: compress a model, attach a method, measure, save, load."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - the examples use it
from torch import nn

from .core import registry
from .core.digests import weights_digest
from .core.method import Method
from .core.recipe import ArtifactSettings, Recipe, Stage
from .core.task import Task
from .engine import distributed
from .engine.attachment import Attachment
from .engine.execute import Job, execute
from .engine.outcome import Result
from .engine.progress import Watcher, watcher
from .engine.recipes import build_job, build_network, build_stage_models, load_recipe
from .engine.records import fingerprint


def build(architecture: str, **arguments: Any) -> nn.Module:
    """Build a registered architecture by name.

    Example:
        >>> sum(p.numel() for p in build("lenet_5").parameters())
        431080
    """
    model: nn.Module = registry.load("architecture", architecture)(**arguments)
    return model


def compress(
    model: nn.Module,
    task: Task,
    stages: Sequence[Stage | Method],
    *,
    directory: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    artifact: ArtifactSettings | None = None,
    fresh: bool = False,
    watchers: Sequence[Watcher] = (),
) -> Result:
    """Take a trained model through stages, and get a small file and the figures of every step.

    Args:
        model: any module; it stays as it is, a copy is compressed.
        task: what it must do.
        stages: in order; a method alone stands for a stage that does not train.
        directory: where the run keeps its files and from where it goes on when it was interrupted;
            by default a new temporary directory.
        seed: of everything random.
        device: where to train, ``"auto"`` for a GPU where there is one.
        artifact: how the file is written.
        fresh: throw away an earlier run in the directory.
        watchers: told of every step; by default nobody.

    Returns:
        The compressed model, the file, and the figures of each stage.

    Raises:
        NothingMatched, NothingChanged, Diverged, ModelMismatch, RunConflict: see
            :mod:`lilliput.errors`.

    Example:
        >>> import lilliput
        >>> inputs, labels = torch.randn(64, 8), torch.arange(64) % 2
        >>> batches = [(inputs, labels)]
        >>> task = lilliput.Task(
        ...     batches, batches, batches, nn.functional.cross_entropy, lilliput.accuracy
        ... )
        >>> result = lilliput.compress(
        ...     nn.Linear(8, 2), task, [lilliput.methods.Magnitude(sparsity=0.5)]
        ... )
        >>> result.figures["nonzeros"]
        10
    """
    staged = [s if isinstance(s, Stage) else Stage(methods=[s]) for s in stages]
    description = {
        "model": type(model).__name__,
        "weights": weights_digest(model)[:16],
        "task": task.name,
        "seed": seed,
        "stages": [_description(stage) for stage in staged],
        "artifact": (artifact or ArtifactSettings()).model_dump(mode="json"),
    }
    job = Job(
        model=model,
        task=task,
        stages=staged,
        description=description,
        seed=seed,
        device=distributed.device_of(device),
        artifact=artifact or ArtifactSettings(),
        stage_tasks={n: s.task for n, s in enumerate(staged) if s.task is not None},
        stage_models=build_stage_models(staged),
        build=build_network,
    )
    home = Path(directory) if directory else Path(tempfile.mkdtemp(prefix="lilliput-"))
    return execute(job, home, fresh=fresh, watchers=watchers)


def _description(stage: Stage) -> dict[str, Any]:
    """A stage as the run directory remembers it."""
    left_out = {"task"} if stage.model is not None else {"task", "model"}
    return stage.model_dump(mode="json", exclude=left_out)


def attach(
    model: nn.Module,
    *methods: Method,
    steps: int = 0,
    task: Task | None = None,
    example_inputs: Any = None,
    seed: int = 0,
) -> Attachment:
    """Put methods on a model that trains in the user's own loop.

    Args:
        model: changed in place: encodings appear now, so build the optimizer afterwards.
        methods: which.
        steps: how many optimizer steps the loop will make; schedules need it.
        task: for methods that want data of their own, such as a cached teacher.
        example_inputs: a batch of inputs, for methods that must see shapes first, such as those that
            build adapters between the features of two networks.
        seed: of everything random in the methods.

    Returns:
        The handle that the loop calls; see :class:`~lilliput.engine.attachment.Attachment`.

    Raises:
        NothingMatched: a method's pattern covers no layer.
        InputError: a method replaces a part of the loop and needs :func:`compress`.

    Example:
        >>> import lilliput
        >>> net, x, y = nn.Linear(8, 2), torch.randn(64, 8), torch.arange(64) % 2
        >>> attached = lilliput.attach(net, lilliput.methods.Gradual(sparsity=0.5), steps=100)
        >>> optimizer = torch.optim.SGD(attached.parameters(), lr=0.1)
        >>> for _ in range(100):
        ...     attached.batch(x, y)
        ...     output = net(x)
        ...     loss = attached.loss(nn.functional.cross_entropy(output, y), output)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     attached.after_backward()
        ...     optimizer.step()
        ...     attached.after_step()
        >>> attached.finish()[0].after
        8
    """
    return Attachment(
        model, methods, steps=steps, task=task, example_inputs=example_inputs, seed=seed
    )


def run_recipe(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    directory: str | Path | None = None,
    fresh: bool = False,
    watchers: Sequence[Watcher] | None = None,
) -> Result:
    """Run a recipe: a shipped one by name, a file, or a :class:`Recipe`.

    Args:
        recipe: what to run.
        overrides: dotted ``key=value`` pairs, for a name or a file.
        directory: the run directory; by default ``runs/NAME-FINGERPRINT`` in the working directory,
            so that the same command goes on with the same run.
        fresh: throw away an earlier run in the directory.
        watchers: told of every step; by default a progress bar on a terminal, plain lines elsewhere.
    """
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, list(overrides))
    distributed.start(settings.device)
    job = build_job(settings)
    home = Path(directory) if directory else default_directory(settings)
    return execute(job, home, fresh=fresh, watchers=[watcher()] if watchers is None else watchers)


def default_directory(recipe: Recipe) -> Path:
    """Where a recipe runs unless it is told otherwise."""
    description = recipe.model_dump(mode="json", exclude_none=True)
    return Path("runs") / f"{recipe.name}-{fingerprint(description)}"
