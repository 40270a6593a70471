"""Ideas that are lists of stages: teaching assistants (Mirzadeh 2020) and teacher checkpoints (Jin 2019)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput.api import run_recipe
from lilliput.core.digests import weights_digest
from lilliput.core.recipe import Recipe
from lilliput.core.run import Run
from lilliput.engine.progress import Watcher
from lilliput.engine.recipes import find_recipe, load_recipe
from lilliput.errors import InputError
from lilliput.tasks.binary_digits import binary_digits
from lilliput.tasks.digits import digits


class Teachers(Watcher):
    """The teacher's weights in each stage, and the network's at the end of each."""

    def __init__(self) -> None:
        self.teachers: dict[int, list[str]] = {}
        self.ends: dict[int, str] = {}

    def step_done(self, run: Run) -> None:
        self.ends[run.stage] = weights_digest(run.model)
        live = [value for key, value in run.shared.items() if key[0] == "teacher"]
        self.teachers[run.stage] = [weights_digest(n) for one in live for n in one.networks]


def shortened(name: str, tmp_path: Path) -> tuple[Recipe, Teachers, Any]:
    recipe = load_recipe(find_recipe(name))
    overrides = [f"stages.{n}.train.epochs=1" for n in range(len(recipe.stages))]
    seen = Teachers()
    result = run_recipe(name, overrides, directory=tmp_path / "run", watchers=[seen])
    return recipe, seen, result


def test_an_assistant_stands_between_teacher_and_student(tmp_path: Path) -> None:
    """Each network learns from the end of the one before, and is smaller."""
    _, seen, result = shortened("takd_digits", tmp_path)
    assert seen.teachers == {0: [], 1: [seen.ends[0]], 2: [seen.ends[1]]}
    sizes = [stage["parameters"] for stage in result.figures["stages"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_the_student_follows_its_teachers_checkpoints(tmp_path: Path) -> None:
    """Three anchors of one teacher; the student goes on from one to the next and keeps its own weights."""
    recipe, seen, result = shortened("rco_digits", tmp_path)
    assert [seen.teachers[n] for n in range(6)] == [[], [], []] + [[seen.ends[n]] for n in range(3)]
    assert len({seen.ends[n] for n in range(3)}) == 3, "the teacher has gone on"
    sizes = [stage["parameters"] for stage in result.figures["stages"]]
    assert sizes[:3] == [sizes[0]] * 3
    assert sizes[3:] == [sizes[3]] * 3
    assert [stage.model is None for stage in recipe.stages] == [True, True, True, False, True, True]


def test_binary_digits_are_the_digits_with_other_labels() -> None:
    plain, binary = digits(batch_size=64), binary_digits(positive=[1, 8], batch_size=64)
    for part in ("train", "validation", "test"):
        ours, theirs = getattr(binary, part), getattr(plain, part)
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.target, ((theirs.target == 1) | (theirs.target == 8)).long())
    assert binary.train.batch_size == 64
    assert binary_digits(validation=0).test is None


@pytest.mark.parametrize("positive", [[], list(range(10)), [3, 11]])
def test_binary_digits_need_two_classes(positive: list[int]) -> None:
    with pytest.raises(InputError, match="one to nine of the digits"):
        binary_digits(positive=positive)
