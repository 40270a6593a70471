"""What methods see of a run, and the recipe that describes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lilliput.core.digests import mix, weights_digest
from lilliput.core.recipe import Recipe, Stage, Train
from lilliput.core.run import Player, Run
from lilliput.core.schedule import Schedule
from lilliput.engine import training
from lilliput.errors import InputError
from lilliput.methods import Magnitude
from lilliput.testing import NETWORKS

MLP = NETWORKS[0]


def run() -> Run:
    return Run(MLP.build(), MLP.task())


def test_progress() -> None:
    world = run()
    assert world.progress == 1.0, "a stage that does not train is at its end"
    world.total_steps = 4
    seen = []
    for world.step in range(5):
        seen.append(world.progress)
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_memory_belongs_to_the_place_in_the_stage() -> None:
    world = run()
    world.methods = [Magnitude(sparsity=0.5), Magnitude(sparsity=0.5)]
    first, second = (m.memory(world) for m in world.methods)
    first["x"] = 1
    assert second == {}
    assert world.methods[0].memory(world) == {"x": 1}
    with pytest.raises(InputError, match="not part of this stage"):
        Magnitude(sparsity=0.5).memory(world)


def test_generators_differ_by_purpose_stage_and_step_only() -> None:
    def draw(purpose: str = "a", **place: int) -> float:
        world = run()
        for name, value in place.items():
            setattr(world, name, value)
        torch.rand(3)
        return float(torch.rand(1, generator=world.generator(purpose)))

    assert draw() == draw()
    assert len({draw(), draw("b"), draw(stage=1), draw(step=1), draw(seed=1)}) == 5


def test_calibration_stops_when_it_has_enough() -> None:
    assert sum(len(b.inputs) for b in run().calibration(33)) == 64
    assert sum(len(b.inputs) for b in run().calibration(10_000)) == 128


def test_networks_that_are_found_are_copies() -> None:
    world = run()
    world.original = MLP.build(1)
    found = world.find_network("original")
    assert found is not world.original
    assert weights_digest(found) == weights_digest(world.original)
    own = nn.Linear(2, 2)
    assert world.find_network(own) is not own
    with pytest.raises(InputError, match="only from a recipe"):
        world.find_network({"architecture": "lenet_5"})
    world.original = None
    with pytest.raises(InputError, match="no original"):
        world.find_network("original")


def test_logged_figures_are_detached() -> None:
    world = run()
    world.log("x", torch.ones(1, requires_grad=True))
    assert not world.logged["x"].requires_grad  # type: ignore[union-attr]


def test_digests_are_the_same_in_every_process() -> None:
    assert mix(0, "stage", 1) == 6196867255989403311
    assert mix("a", "b") != mix("ab")
    assert 0 <= mix("x") < 2**63


def test_weights_digest_sees_names_values_and_buffers() -> None:
    model = nn.BatchNorm1d(3)
    before = weights_digest(model)
    model.running_mean.add_(1.0)  # type: ignore[union-attr]
    assert weights_digest(model) != before
    assert weights_digest(nn.Sequential(nn.BatchNorm1d(3))) != before


@pytest.mark.parametrize("every", [None, 1, 7])
def test_schedule_is_due(every: int | None) -> None:
    schedule = Schedule(every=every)
    due = [step for step in range(300) if schedule.due(step, 300)]
    assert due == list(range(0, 300, every or 3))
    assert Schedule().due(5, 10), "a short stage updates at every step"


def test_constant_schedule_is_final_at_once() -> None:
    assert [Schedule().amount(p, 0.7) for p in (0.0, 0.5, 1.0)] == [0.7] * 3


def test_initial_amount_never_exceeds_the_final() -> None:
    schedule = Schedule(shape="linear", initial=0.9)
    assert schedule.amount(0.0, 0.5) == 0.5
    assert schedule.amount(0.5, 0.5) == 0.5


def test_stage_is_named_after_its_methods() -> None:
    assert Stage(methods=["codebook", {"method": "magnitude", "sparsity": 0.5}]).name == (
        "codebook + magnitude"
    )
    assert Stage(train=Train(epochs=1)).name == "train"
    assert Stage(name="mine", train=Train(epochs=1)).name == "mine"


def test_short_forms_of_a_recipe() -> None:
    short = Recipe.model_validate(
        {
            "task": {"name": "digits", "batch_size": 64},
            "model": "lenet_5",
            "stages": [{"methods": ["codebook"]}],
        }
    )
    assert short.task.arguments == {"batch_size": 64}
    assert short.model.architecture == "lenet_5"
    assert Recipe.model_validate(short.model_dump(mode="json")) == short


class TestScaledPlayers:
    """Gradients of players in 16-bit floats, scaled as the student's are."""

    def player(self, scaler: torch.amp.GradScaler | None = None) -> Player:
        torch.manual_seed(0)
        network = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        return Player(network, optimizer, 1.0, "peer", scaler=scaler)

    def moved(self, player: Player, factor: float) -> torch.Tensor:
        """How far one step moves the weights, forward in float16."""
        weight: torch.Tensor = player.network.get_parameter("weight")
        before = weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            loss = player.network(torch.ones(3, 4)).float().sum() * factor
        player.descend(loss)
        return weight.detach() - before

    def test_a_small_gradient_is_not_lost(self) -> None:
        assert not self.moved(self.player(), 1e-8).any()
        found = self.moved(self.player(torch.amp.GradScaler("cpu")), 1e-8)
        torch.testing.assert_close(found, torch.full((2, 4), -3e-8), rtol=0.1, atol=0)

    def test_the_gradient_is_clipped_at_its_own_size(self) -> None:
        player = self.player(torch.amp.GradScaler("cpu", init_scale=64.0))
        player.clip = 0.5
        self.moved(player, 1.0)
        gradients = [p.grad.flatten() for p in player.network.parameters() if p.grad is not None]
        assert float(torch.cat(gradients).norm()) == pytest.approx(0.5, rel=1e-3)

    def test_a_step_that_overflows_is_left_out(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        assert not self.moved(self.player(scaler), 1.0).any()
        assert scaler.get_scale() == 2.0**19

    def test_the_scale_is_in_the_checkpoint(self) -> None:
        player = self.player(torch.amp.GradScaler("cpu", init_scale=2.0**20))
        self.moved(player, 1.0)
        other = self.player(torch.amp.GradScaler("cpu"))
        training._load_player(other, training._player_state(player))
        assert other.scaler is not None and other.scaler.get_scale() == 2.0**19
        training._load_player(other, training._player_state(player)[:2])  # of an earlier version
        training._load_player(self.player(), training._player_state(self.player()))

    def test_each_player_gets_one_where_the_student_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make = torch.amp.GradScaler
        monkeypatch.setattr(torch.amp, "GradScaler", lambda: make("cpu"))
        scalers = []
        for device in ("cuda", "cpu"):
            world = run()
            world.player("peer", MLP.build(), lambda ps: torch.optim.SGD(ps, lr=0.1))
            world.device = torch.device(device)
            home: Any = None
            made = training.Training(world, Train(precision="float16"), home)
            scalers.append((made.loop.scaler, world.players["peer"].scaler))
        (student, peer), without = scalers
        assert student is not None and peer is not None and peer is not student
        assert without == (None, None)
