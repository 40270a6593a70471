"""A stage may bring its own network; the ones before it are there to learn from, also after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lilliput.api import compress, run_recipe
from lilliput.core.digests import weights_digest
from lilliput.core.method import Method
from lilliput.core.recipe import Stage, Train
from lilliput.core.run import Run
from lilliput.core.schedule import Ramp
from lilliput.core.types import Term
from lilliput.engine.progress import Watcher
from lilliput.engine.recipes import validate
from lilliput.errors import Diverged, InputError, RecipeError
from lilliput.methods import SoftTargets
from lilliput.testing.networks import NETWORKS

MLP = NETWORKS[0]
TRAIN = Train(epochs=2, lr=0.01, checkpoint_minutes=1e-9)


def small(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3))


def chain() -> list[Stage]:
    """A teacher, an assistant that learns from it, and a student of the assistant."""
    return [
        Stage(name="teacher", train=TRAIN),
        Stage(name="assistant", model=small(10), methods=[SoftTargets()], train=TRAIN),
        Stage(model=small(4), methods=[SoftTargets(teacher="assistant")], train=TRAIN),
    ]


class Stop(Watcher):
    def __init__(self, stage: int, step: int) -> None:
        self.at = (stage, step)

    def step_done(self, run: Run) -> None:
        if (run.stage, run.step) == self.at:
            raise KeyboardInterrupt


def test_a_chain_of_networks(tmp_path: Path) -> None:
    result = compress(MLP.build(), MLP.task(), chain(), directory=tmp_path)
    sizes = [stage["parameters"] for stage in result.figures["stages"]]
    assert sizes == [12 * 24 + 24 + 24 * 16 + 16 + 16 * 3 + 3, 12 * 10 + 10 + 33, 12 * 4 + 4 + 15]
    # Everything is measured against the network that the first method met: the trained teacher.
    assert result.figures["dense_bytes"] == 4 * sizes[0]
    assert result.figures["baseline_score"] == result.figures["stages"][0]["score"]


@pytest.mark.parametrize("at", [(0, 3), (1, 2), (1, 7), (2, 5)])
def test_a_chain_goes_on_bit_for_bit(tmp_path: Path, at: tuple[int, int]) -> None:
    whole = compress(MLP.build(), MLP.task(), chain(), directory=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compress(MLP.build(), MLP.task(), chain(), directory=tmp_path / "cut", watchers=[Stop(*at)])
    again = compress(MLP.build(), MLP.task(), chain(), directory=tmp_path / "cut")
    assert weights_digest(again.model) == weights_digest(whole.model)
    for file in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


class Remember(Method):
    """Notes which networks it can find."""

    family = "distill"
    changes_model = False
    seen: dict[str, str] = {}  # noqa: RUF012 - pydantic copies defaults

    def attach(self, run: Run) -> None:
        for name in ("original", "previous", *run.earlier):
            self.memory(run)[name] = weights_digest(run.find_network(name))
        type(self).found = dict(self.memory(run))  # type: ignore[attr-defined]


def test_networks_by_name_are_the_trained_ones(tmp_path: Path) -> None:
    student = small(4)
    stages = [
        Stage(name="first", train=TRAIN),
        Stage(name="second", model=student, train=TRAIN),
        Stage(methods=[Remember()], train=TRAIN),
    ]
    compress(MLP.build(), MLP.task(), stages, directory=tmp_path)
    found = Remember.found  # type: ignore[attr-defined]
    assert found["previous"] == found["second"] != weights_digest(student)
    assert found["original"] == found["first"] != weights_digest(MLP.build())


def test_the_users_networks_stay_as_they_are(tmp_path: Path) -> None:
    model, student = MLP.build(), small(4)
    before = weights_digest(model), weights_digest(student)
    compress(model, MLP.task(), [Stage(train=TRAIN), Stage(model=student, train=TRAIN)])
    assert (weights_digest(model), weights_digest(student)) == before


def test_a_first_stage_with_its_own_network_has_the_recipes_as_previous(tmp_path: Path) -> None:
    teacher = MLP.build()
    stage = Stage(model=small(4), methods=[Remember()], train=TRAIN)
    compress(teacher, MLP.task(), [stage])
    found = Remember.found  # type: ignore[attr-defined]
    assert found["previous"] == found["original"] == weights_digest(teacher)


def test_a_recipe_names_networks(tmp_path: Path) -> None:
    recipe = {
        "task": {"name": "digits"},
        "model": "digits_cnn",
        "stages": [
            {"name": "teacher", "train": {"epochs": 1}},
            {
                "model": "lenet_300_100",
                "methods": [{"method": "soft_targets", "teacher": "teacher"}],
                "train": {"epochs": 1},
            },
        ],
    }
    with pytest.raises(RecipeError, match=r"stages\.1\.model: no architecture is named 'lenet_30'"):
        unknown = {"model": "lenet_30", "train": {"epochs": 1}}
        validate({**recipe, "stages": [recipe["stages"][0], unknown]})  # type: ignore[index]
    assert validate(recipe).stages[1].model.architecture == "lenet_300_100"


def test_names_of_networks_are_not_stages_names() -> None:
    with pytest.raises(InputError, match="already names a network"):
        Stage(name="previous", train=TRAIN)


def test_an_unknown_teacher_names_the_stages(tmp_path: Path) -> None:
    stages = [
        Stage(name="assistant", train=TRAIN),
        Stage(methods=[SoftTargets(teacher="asistant")], train=TRAIN),
    ]
    with pytest.raises(InputError, match="Did you mean 'assistant'"):
        compress(MLP.build(), MLP.task(), stages, directory=tmp_path)


class Two(Method):
    """Adds a term whose weight moves."""

    family = "distill"
    changes_model = False
    weight: Ramp = Ramp(start=4.0, end=1.0)

    def loss(self, run: Run) -> dict[str, Term]:
        return {"two": Term(run.output.square().mean(), self.weight.at(run.progress))}


def test_terms_are_logged_with_their_weights(tmp_path: Path) -> None:
    import json

    stage = Stage(methods=[Two(), Two()], train=TRAIN)
    compress(MLP.build(), MLP.task(), [stage], directory=tmp_path)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    # Four steps an epoch, eight in all: the means of 4 - 3 * step / 8.
    assert first["weight/two"] == pytest.approx(4 - 3 * 1.5 / 8)
    assert second["weight/two 2"] == pytest.approx(4 - 3 * 5.5 / 8)
    parts = first["loss/task"] + first["loss/two"] + first["loss/two 2"]
    assert first["loss"] == pytest.approx(parts, rel=1e-5)


class Peer(Method):
    """A player that learns the student's outputs, or collapses."""

    family = "distill"
    changes_model = False
    collapse: bool = False
    rates: list[float] = []  # noqa: RUF012

    def attach(self, run: Run) -> None:
        run.player("peer", small(5))

    def after_step(self, run: Run) -> None:
        peer = run.players["peer"]
        loss = (peer.network(run.batch.inputs) - run.output.detach()).square().mean()
        type(self).rates.append(peer.optimizer.param_groups[0]["lr"])  # type: ignore[misc]
        peer.descend(loss * float("nan") if self.collapse else loss)


def test_players_follow_the_schedule_and_resume(tmp_path: Path) -> None:
    train = TRAIN.model_copy(update={"lr_schedule": "linear"})
    stages = [Stage(methods=[Peer()], train=train)]
    Peer.rates = []
    compress(MLP.build(), MLP.task(), stages, directory=tmp_path / "whole")
    assert Peer.rates == pytest.approx([0.01 * (1 - step / 8) for step in range(8)])
    with pytest.raises(KeyboardInterrupt):
        compress(MLP.build(), MLP.task(), stages, directory=tmp_path / "cut", watchers=[Stop(0, 5)])
    compress(MLP.build(), MLP.task(), stages, directory=tmp_path / "cut")
    assert Peer.rates[8:] == pytest.approx(Peer.rates[:5] + Peer.rates[5:8])


def test_a_player_that_collapses_is_told(tmp_path: Path) -> None:
    stages = [Stage(methods=[Peer(collapse=True)], train=TRAIN)]
    with pytest.raises(Diverged, match="loss of peer is nan"):
        compress(MLP.build(), MLP.task(), stages, directory=tmp_path)


def test_run_recipe_with_a_student_of_its_own(tmp_path: Path) -> None:
    recipe = validate(
        {
            "name": "chain",
            "task": {"name": "digits"},
            "model": "digits_cnn",
            "stages": [
                {"name": "teacher", "train": {"epochs": 1}},
                {"model": "digits_cnn", "methods": ["soft_targets"], "train": {"epochs": 1}},
            ],
        }
    )
    result = run_recipe(recipe, directory=tmp_path / "run", watchers=())
    assert [s["name"] for s in result.figures["stages"]] == ["teacher", "soft_targets"]
