"""Settings of a recipe that reach the run."""

from __future__ import annotations

from pathlib import Path

import torch

from lilliput.api import run_recipe
from lilliput.core.run import Run
from lilliput.engine.progress import Watcher
from lilliput.engine.recipes import load_recipe

SHORT = [
    "stages.0.train.epochs=1",
    "stages.1.train.epochs=1",
    "stages.2.train.epochs=1",
    "expect={}",
]


def test_threads_are_those_of_the_recipe_during_the_run_and_the_callers_afterwards(
    tmp_path: Path,
) -> None:
    class Count(Watcher):
        seen: set[int] = set()  # noqa: RUF012

        def step_done(self, run: Run) -> None:
            self.seen.add(torch.get_num_threads())

    before = torch.get_num_threads()
    recipe = load_recipe("digits_deep_compression", [*SHORT, "threads=3"])
    run_recipe(recipe, directory=tmp_path / "run", watchers=[Count()])
    assert Count.seen == {3}
    assert torch.get_num_threads() == before
