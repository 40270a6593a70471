"""Han, Pool, Tran, Dally 2015: learning both weights and connections."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.method import Method
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.engine.progress import Watcher
from lilliput.mechanisms.encodings import Mask, encoding_of
from lilliput.methods import Magnitude
from lilliput.methods.prune.magnitude import corrected_dropout
from lilliput.testing import NETWORKS

MLP, CNN, TRANSFORMER = NETWORKS


@dataclass
class Recorder(Watcher):
    """Keeps what a function sees at the start of a stage and after every step."""

    look: Callable[[nn.Module], Any]
    seen: list[Any] = field(default_factory=list)

    def stage_begins(self, run: Run, stage: Stage) -> None:
        self.seen.append(self.look(run.model))

    def step_done(self, run: Run) -> None:
        self.seen.append(self.look(run.model))


def masks(model: nn.Module) -> dict[str, Tensor]:
    found = {w.name: encoding_of(w, Mask) for w in select(model)}
    return {name: mask.mask.clone() for name, mask in found.items() if mask is not None}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {w.name: w.value.detach().clone() for w in select(model)}


def attached(model: nn.Module, method: Method, total_steps: int = 0) -> Run:
    """A run that has the method attached and does not train."""
    run = Run(model, MLP.task(), total_steps=total_steps, methods=[method])
    method.attach(run)
    return run


def test_masks_are_monotone() -> None:
    watcher = Recorder(masks)
    stage = Stage(methods=[Magnitude(sparsity=0.9, rounds=4)], train=Train(epochs=4, lr=0.01))
    lilliput.compress(MLP.build(), MLP.task(), [stage], watchers=[watcher])
    densities = []
    for earlier, later in zip(watcher.seen, watcher.seen[1:], strict=False):
        for name in later:
            assert not (later[name] & ~earlier[name]).any(), "a pruned weight came back"
        densities.append(sum(int(m.sum()) for m in later.values()))
    assert len(set(densities)) == 4, "four rounds leave four densities"


def test_retraining_continues_from_the_kept_weights() -> None:
    model = MLP.build()
    before, watcher = values(model), Recorder(values)
    stage = Stage(methods=[Magnitude(sparsity=0.5)], train=Train(epochs=1))
    lilliput.compress(model, MLP.task(), [stage], watchers=[watcher])
    for name, value in watcher.seen[0].items():
        alive = value != 0
        assert 0 < alive.sum() < alive.numel()
        assert torch.equal(value[alive], before[name][alive])


@pytest.mark.parametrize("quality", [0.5, 1.0])
def test_threshold_is_q_standard_deviations(quality: float) -> None:
    model = MLP.build()
    expected = {n: v.abs() >= quality * v.std() for n, v in values(model).items()}
    attached(model, Magnitude(threshold=quality))
    for name, value in values(model).items():
        assert torch.equal(value != 0, expected[name])


def test_threshold_uses_the_deviation_of_the_dense_layer() -> None:
    """The second of two rounds prunes at q times the *dense* deviation, though half is zero by then."""
    model, method = MLP.build(), Magnitude(threshold=1.0, rounds=2)
    dense = values(model)
    run = attached(model, method, total_steps=2)
    first = {n: v.abs() >= 0.5 * v.std() for n, v in dense.items()}
    assert {n: int((v != 0).sum()) for n, v in values(model).items()} == {
        n: int(m.sum()) for n, m in first.items()
    }
    run.step = 1
    method.before_step(run)
    for name, value in values(model).items():
        assert torch.equal(value != 0, dense[name].abs() >= dense[name].std())


def test_threshold_by_pattern_leaves_other_layers_dense() -> None:
    model = MLP.build()
    attached(model, Magnitude(threshold={"0": 1.0, "3": 0.5}))
    zeros = {n: int((v == 0).sum()) for n, v in values(model).items()}
    assert zeros["0.weight"] > zeros["3.weight"] * 0.5 > 0
    assert zeros["5.weight"] == 0


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83])
def test_sparsity_is_exact_in_every_layer(sparsity: float) -> None:
    model = CNN.build()
    attached(model, Magnitude(sparsity=sparsity, remove_dead=False))
    for value in values(model).values():
        assert int((value == 0).sum()) == round(sparsity * value.numel())


def test_half_of_an_all_equal_tensor_is_exactly_half() -> None:
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 3))
    with torch.no_grad():
        for weight in select(model):
            weight.value.fill_(0.25)
    attached(model, Magnitude(sparsity=0.5))
    assert [int((v == 0).sum()) for v in values(model).values()] == [60, 15]


def test_global_scope_ranks_all_layers_together() -> None:
    model = MLP.build()
    with torch.no_grad():
        model[5].weight.mul_(100.0)  # type: ignore[index]
    dense = values(model)
    attached(model, Magnitude(sparsity=0.5, scope="global"))
    flat = torch.cat([v.abs().flatten() for v in dense.values()])
    cut = flat.sort().values[round(0.5 * flat.numel())]
    for name, value in values(model).items():
        assert torch.equal(value != 0, dense[name].abs() >= cut)
    assert bool((values(model)["5.weight"] != 0).all()), "the large layer keeps everything"


def test_twenty_steps_of_momentum_and_decay_leave_zeros_at_zero() -> None:
    """Momentum from before, and weight decay, push on masked weights at every step."""
    watcher = Recorder(values)
    train = Train(epochs=5, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=1e-2)
    stages = [Stage(train=train), Stage(methods=[Magnitude(sparsity=0.6)], train=train)]
    lilliput.compress(CNN.build(), CNN.task(), stages, watchers=[watcher])
    pruned = watcher.seen[-21:]
    assert len(pruned) == 21
    for name, start in pruned[0].items():
        zero = start == 0
        assert int(zero.sum()) == round(0.6 * zero.numel())
        for value in pruned:
            assert bool((value[name][zero] == 0).all())
        assert not torch.equal(pruned[-1][name], start), "the others train"


@pytest.mark.parametrize(("kept", "expected"), [(100, 0.5), (25, 0.25), (0, 0.0)])
def test_dropout_formula(kept: int, expected: float) -> None:
    assert corrected_dropout(0.5, kept, 100) == pytest.approx(expected)


def test_dropout_is_weakened_with_the_layer_before_it() -> None:
    model = nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3), nn.Dropout(0.2)
    )
    run = attached(model, method := Magnitude(sparsity={"0": 0.75, "3": 0.0}, remove_dead=False))
    assert model[2].p == pytest.approx(0.25)
    assert model[4].p == pytest.approx(0.2)
    told = {c.where: (c.before, c.after) for c in method.finish(run) if c.what == "dropout rate"}
    assert told == {"2": (0.5, pytest.approx(0.25))}


def test_dropout_is_computed_from_the_dense_rate_in_every_round() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Dropout(0.5), nn.Linear(20, 3))
    run = attached(model, method := Magnitude(sparsity=0.75, rounds=3), total_steps=3)
    for run.step in (1, 2):
        method.before_step(run)
    assert model[1].p == pytest.approx(0.25)


def test_dropout_behind_a_layer_that_takes_no_part_stays() -> None:
    model = nn.Sequential(
        nn.Linear(12, 20), nn.Dropout(0.4), nn.Linear(20, 20), nn.Dropout(0.5), nn.Linear(20, 3)
    )
    attached(model, Magnitude(sparsity={"0": 0.75}))
    assert model[1].p == pytest.approx(0.2)
    assert model[3].p == 0.5


def test_dropout_counts_each_connection_once_over_two_stages() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Dropout(0.5), nn.Linear(20, 3))
    for sparsity in (0.5, 0.75):
        attached(model, Magnitude(sparsity={"0": sparsity}))
    assert model[1].p == pytest.approx(0.5 * (0.25) ** 0.5)


@pytest.mark.parametrize("step", [2, 7, 10])
def test_dropout_survives_an_interruption(step: int, tmp_path: Any) -> None:
    """The weakened rate is no tensor, and yet a resumed run must have it."""

    class Stop(Watcher):
        def step_done(self, run: Run) -> None:
            if run.stage * 8 + run.step == step:
                raise KeyboardInterrupt

    stages = [
        Stage(methods=[Magnitude(sparsity=0.75, rounds=2)], train=Train(epochs=2, lr=0.01)),
        Stage(train=Train(epochs=1, lr=0.01)),
    ]
    model = MLP.build()
    with pytest.raises(KeyboardInterrupt):
        lilliput.compress(model, MLP.task(), stages, directory=tmp_path / "a", watchers=[Stop()])
    resumed = lilliput.compress(model, MLP.task(), stages, directory=tmp_path / "a")
    undisturbed = lilliput.compress(model, MLP.task(), stages, directory=tmp_path / "b")
    assert resumed.model[2].p == undisturbed.model[2].p  # type: ignore[index]
    for name, tensor in undisturbed.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


class TestDeadNeurons:
    """A neuron without inputs sends the constant relu(b); one without outputs sends nothing."""

    def pruned(self, model: nn.Module, method: Method | None = None) -> tuple[nn.Module, nn.Module]:
        """The model with its dead neurons, and after their removal."""
        method = method or Magnitude(sparsity=0.0)
        run = attached(model, method)
        with_dead = copy.deepcopy(model)
        method.finish(run)
        return with_dead, model

    def mlp(self) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
        )
        with torch.no_grad():
            model[0].weight[2] = 0  # type: ignore[operator]  # unfed, sends relu(0.7)
            model[0].bias[2] = 0.7  # type: ignore[operator]
            model[0].weight[3] = 0  # type: ignore[operator]  # unfed, sends relu(-0.7) = 0
            model[0].bias[3] = -0.7  # type: ignore[operator]
            model[4].weight[:, 1] = 0  # type: ignore[operator]  # unneeded
        return model

    def test_outputs_are_equal(self) -> None:
        before, after = self.pruned(self.mlp())
        x = torch.randn(500, 12)
        torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-6)

    def test_connections_of_dead_neurons_are_gone(self) -> None:
        _, model = self.pruned(self.mlp())
        _, second, third = values(model).values()
        assert not second[:, 2].any(), "what the unfed neuron sent"
        assert not second[:, 3].any()
        assert not second[1].any(), "what fed the unneeded neuron"
        assert int(third.count_nonzero()) == 5 * 3

    def test_the_constant_is_folded_into_the_next_bias(self) -> None:
        model = self.mlp()
        column, bias = model[2].weight[:, 2].clone(), model[2].bias.clone()  # type: ignore[index,operator]
        self.pruned(model)
        torch.testing.assert_close(model[2].bias, bias + 0.7 * column)

    def test_death_spreads_through_layers(self) -> None:
        """A neuron that is fed by dead neurons only is dead too."""
        model = self.mlp()
        with torch.no_grad():
            keep = torch.tensor([False, False, True, True, False, False, False, False])
            model[2].weight[0, ~keep] = 0  # type: ignore[operator]  # fed by neurons 2 and 3 only
        before, after = self.pruned(model)
        x = torch.randn(500, 12)
        torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-6)
        assert not values(after)["4.weight"][:, 0].any()

    def test_convolutions_with_batch_norm(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(80, 3),
        )  # fmt: skip
        with torch.no_grad():
            model[0].weight[1] = 0  # type: ignore[operator]
            model[1].bias.copy_(torch.tensor([0.1, 0.9, 0.2, 0.3]))  # type: ignore[operator]
        method = Magnitude(sparsity=0.0)
        run = Run(model, CNN.task(), methods=[method])
        method.attach(run)
        before = copy.deepcopy(model).eval()
        method.finish(run)
        x = torch.randn(64, 1, 8, 8)
        torch.testing.assert_close(model.eval()(x), before(x), rtol=1e-4, atol=1e-5)
        assert not values(model)["3.weight"][:, 1].any()

    def test_padding_keeps_what_cannot_be_folded(self) -> None:
        """At a padded border the constant is missing, so folding would be wrong there."""
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.Flatten(),
            nn.Linear(180, 3),
        )
        with torch.no_grad():
            model[0].weight[1] = 0  # type: ignore[operator]
            model[0].bias[1] = 0.9  # type: ignore[operator]
        method = Magnitude(sparsity=0.0)
        run = Run(model, CNN.task(), methods=[method])
        method.attach(run)
        before = copy.deepcopy(model)
        method.finish(run)
        x = torch.randn(64, 1, 8, 8)
        torch.testing.assert_close(model(x), before(x), rtol=1e-5, atol=1e-6)
        assert values(model)["2.weight"][:, 1].any()

    def test_softmax_attention_is_left_alone_or_equal(self) -> None:
        method = Magnitude(sparsity=0.9)
        model = TRANSFORMER.build().eval()
        run = Run(model, TRANSFORMER.task(), methods=[method])
        method.attach(run)
        before = copy.deepcopy(model)
        method.finish(run)
        x = torch.randn(256, 6, 8)
        torch.testing.assert_close(model(x), before(x), rtol=1e-3, atol=1e-4)


class Hidden(nn.Module):
    """Two layers, the second of which reads a hidden unit that is always zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.first.weight[2] = 0.0
            self.first.bias[2] = -0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


class OwnPrecision(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255)


class ByName(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=self.first(input=x).relu())  # type: ignore[no-any-return]


class OwnState(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros(1, len(x), 12)
        seen, _ = self.lstm(x.view(len(x), 3, 4), (start, start))
        return super().forward(seen[:, -1])


class Frozen(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.first(x).relu()
        return self.second(seen)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Hidden, OwnPrecision, ByName, OwnState])
def test_dead_neurons_of_a_forward_with_ways_of_its_own(kind: type[Hidden]) -> None:
    torch.manual_seed(0)
    model = kind()
    run = attached(model, method := Magnitude(sparsity=0.0))
    before = copy.deepcopy(model)
    method.finish(run)
    assert not model.second.weight[:, 2].any()
    assert int(model.second.weight.count_nonzero()) == 7 * 3
    x = torch.randn(64, 12)
    torch.testing.assert_close(model(x), before(x), rtol=1e-5, atol=1e-6)


def test_dead_neurons_stay_where_the_forward_cannot_be_probed() -> None:
    model = Frozen()
    run = attached(model, method := Magnitude(sparsity=0.0))
    before = values(model)
    method.finish(run)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_a_pixel_that_is_dark_in_one_batch_is_not_dead() -> None:
    images = torch.randint(1, 256, (16, 12), dtype=torch.uint8)
    dark = images.clone()
    dark[:, 5] = 0
    labels = torch.arange(16) % 3
    batches = [(dark, labels), (images, labels)]
    task = lilliput.Task(batches, batches, batches, nn.functional.cross_entropy, lilliput.accuracy)
    model, method = OwnPrecision(), Magnitude(sparsity=0.0)
    run = Run(model, task, methods=[method])
    method.attach(run)
    method.finish(run)
    assert model.first.weight[:, 5].any()
    assert not model.second.weight[:, 2].any()


def test_trainable_pattern_freezes_the_convolutions_bit_for_bit() -> None:
    """The paper fixes the convolutions while the linear layers retrain."""
    watcher = Recorder(values)
    train = Train(
        epochs=2, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-2, trainable=["9"]
    )
    stage = Stage(methods=[Magnitude(sparsity=0.5, remove_dead=False)], train=train)
    lilliput.compress(CNN.build(), CNN.task(), [stage], watchers=[watcher])
    start, end = watcher.seen[0], watcher.seen[-1]
    assert torch.equal(start["0.weight"], end["0.weight"])
    assert torch.equal(start["3.weight"], end["3.weight"])
    assert not torch.equal(start["9.weight"], end["9.weight"])
