"""Romero and others 2015: hints, then the teacher's outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train, artifact, compress
from lilliput.core.method import Method
from lilliput.core.run import Run
from lilliput.core.schedule import Ramp
from lilliput.core.types import Batch
from lilliput.engine.progress import Watcher
from lilliput.errors import (
    InputError,
    LilliputError,
    LilliputWarning,
    ModelMismatch,
    NothingMatched,
)
from lilliput.methods import (
    Attention,
    Codebook,
    FilterL1,
    Fitnets,
    Gradual,
    Hint,
    IntegerTraining,
    SoftTargets,
    StructuredSparsity,
)
from lilliput.methods.distill.fitnets import hint_loss, regressor
from lilliput.testing import NETWORKS

CNN = NETWORKS[1]
TRAIN = Train(epochs=3, lr=0.01)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Counting(nn.Module):
    """Counts its calls in train mode, and by mode whether gradients were wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.trained = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.trained += self.training
        return x


def student(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Counting(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def teacher(seed: int = 2) -> nn.Sequential:
    """Its first feature is 6x6, smaller than the student's."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 9, 3), nn.ReLU(), Counting(), nn.Flatten(), nn.Linear(9 * 36, 3)
    )


HINT = Hint(pairs={"2": "1"})


def staged(
    method: Method, *more: Method, train: Train = TRAIN, net: nn.Module | None = None
) -> Stage:
    return Stage(model=net or student(), methods=[method, *more], train=train)


class TestRegressor:
    def test_the_kernel_rule(self) -> None:
        """N_g - k + 1 = N_h in each direction, and k1 * k2 * O_h * O_g weights."""
        made: Any = regressor((1, 16, 12, 9), (1, 32, 8, 7), "relu")
        convolution, activation = made
        assert tuple(convolution.kernel_size) == (12 - 8 + 1, 9 - 7 + 1)
        assert convolution.weight.numel() == 5 * 3 * 32 * 16
        assert isinstance(activation, nn.ReLU)
        assert made(torch.zeros(2, 16, 12, 9)).shape == (2, 32, 8, 7)

    def test_vectors_have_a_linear_layer(self) -> None:
        made: Any = regressor((1, 16), (1, 32), "none")
        assert isinstance(made, nn.Linear) and made.weight.shape == (32, 16)

    def test_a_hint_that_is_larger_is_refused(self) -> None:
        with pytest.raises(ModelMismatch, match="hint is larger than the guided layer's map"):
            regressor((1, 16, 4, 4), (1, 32, 8, 8), "relu")


class TestStageOne:
    def test_the_loss_by_hand(self) -> None:
        hint, guess = random(3, 4, 2, 5), random(3, 4, 2, 5, seed=1)
        total = 0.0
        for n, c, s, t in np.ndindex(3, 4, 2, 5):
            total += 0.5 * float(hint[n, c, s, t] - guess[n, c, s, t]) ** 2
        assert float(hint_loss(hint, guess, "paper")) == pytest.approx(total / 3)
        assert float(hint_loss(hint, guess, "code")) == pytest.approx(total / (3 * 2 * 5))

    def test_the_term_by_hand(self) -> None:
        net, other, task = student(), teacher(), CNN.task()
        run = Run(net, task, earlier={"previous": lambda: other}, methods=[HINT])
        method = Hint(pairs={"2": "1"}, teacher="previous")
        run.methods = [method]
        run.network = net
        method.attach(run)
        run.batch = next(iter(task.train))
        method.before_step(run)
        run.output = method.forward(run)
        term = method.loss(run)["hint"]
        r = run.extras["0.hint.regressor"]
        expected = hint_loss(other[:2](run.batch.inputs), r(run.output), "paper")
        assert term.value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert r[0].kernel_size == (3, 3)  # type: ignore[index]

    def test_only_the_lower_part_is_trained_and_run(self, tmp_path: Path) -> None:
        net, other = student(), teacher()
        moved: dict[str, int] = {}

        class Look(Watcher):
            def step_done(self, run: Run) -> None:
                assert run.optimizer is not None
                moved["parameters"] = sum(len(g["params"]) for g in run.optimizer.param_groups)
                moved["forward"] = run.model[3].trained  # type: ignore[index]
                moved["regressor"] = sum(
                    p.numel() for p in run.extras["0.hint.regressor"].parameters()
                )

        result = compress(other, CNN.task(), [staged(HINT, net=net)], watchers=[Look()])
        # Convolution, its bias, BatchNorm's two and the regressor's two.
        assert moved == {"parameters": 6, "forward": 0, "regressor": 9 * 4 * 9 + 9}
        before, after = net.state_dict(), result.model.state_dict()
        lower = [name for name in before if name.startswith(("0.", "1."))]
        upper = [name for name in before if name not in lower]
        assert len(upper) == 9, "weights and statistics alike"
        assert all(torch.equal(before[name], after[name]) for name in upper)
        assert not any(torch.equal(before[name], after[name]) for name in lower)
        assert all(p.requires_grad for p in result.model.parameters())

    def test_the_teacher_runs_to_its_hint_only(self) -> None:
        other = teacher()
        method = Hint(pairs={"2": "1"}, teacher="previous")
        run = Run(student(), CNN.task(), earlier={"previous": lambda: other}, methods=[method])
        run.network = run.model
        method.attach(run)
        before = other[2].calls
        run.batch = next(iter(run.task.train))
        method.before_step(run)
        run.output = method.forward(run)
        method.loss(run)
        assert other[2].calls == before

    def test_the_rest_learns_again_in_the_next_stage(self) -> None:
        stages = [staged(HINT), Stage(methods=[Fitnets()], train=TRAIN)]
        result = compress(teacher(), CNN.task(), stages)
        assert not torch.equal(result.model[9].weight, student()[9].weight)  # type: ignore[index]

    def test_a_side_branch_is_not_part_of_the_path(self) -> None:
        """What counts is what the guided layer depends on, not the order of the modules."""

        class Branched(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.head = nn.Linear(36, 3)
                self.side = nn.Linear(64, 3)
                self.late = nn.Conv2d(1, 1, 1)
                self.stem = nn.Conv2d(1, 1, 3)

            def forward(self, x: Tensor) -> Tensor:
                side = self.side(x.flatten(1))
                return self.head(self.late(self.stem(x).relu()).flatten(1)) + side

        method = Hint(pairs={"late:input": "1"}, teacher="previous")
        run = Run(Branched(), CNN.task(), earlier={"previous": teacher}, methods=[method])
        method.attach(run)
        free = {name for name, p in run.model.named_parameters() if p.requires_grad}
        assert free == {"stem.weight", "stem.bias"}
        method.finish(run)
        assert all(p.requires_grad for p in run.model.parameters())

    def test_the_hint_is_learned(self, tmp_path: Path) -> None:
        stage = staged(HINT, train=Train(epochs=20, lr=0.01))
        result = compress(teacher(), CNN.task(), [stage], directory=tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
        names = set(artifact.read(result.artifact))
        assert names == set(student().state_dict()), "the regressor is not in the file"

    def test_the_last_epoch_is_kept(self) -> None:
        """The score of an upper part that has learned nothing must not choose."""

        class Falling:
            """A score that is best in the first epoch."""

            asked = 0

            def reset(self) -> None: ...

            def update(self, output: Any, target: Any) -> None: ...

            def compute(self) -> float:
                self.asked += 1
                return -float(self.asked)

        def kept(keep: str) -> dict[str, Tensor]:
            task = CNN.task()
            task.score = Falling()
            train = Train(epochs=3, lr=0.01, keep=keep)
            return compress(teacher(), task, [staged(HINT, train=train)]).model.state_dict()

        last, best = kept("last"), kept("best")
        assert all(torch.equal(last[name], best[name]) for name in last)

    def test_with_encodings(self) -> None:
        """A hard mask and a codebook in the same stage."""
        stage = staged(
            HINT, Gradual(sparsity=0.5), Codebook(bits=3), train=Train(epochs=4, lr=0.01)
        )
        result = compress(teacher(), CNN.task(), [stage])
        weight = result.model[0].weight  # type: ignore[index]
        assert (weight == 0).float().mean() >= 0.5 and len(weight.unique()) <= 8


class TestStageTwo:
    def test_the_loss_by_hand(self) -> None:
        """H(y, P_S) apart; lambda * H(P_T, P_S) at tau, without tau**2."""
        net, other, task = student(), teacher(), CNN.task()
        method = Fitnets(teacher="previous", temperature=2.5)
        run = Run(net, task, earlier={"previous": lambda: other}, methods=[method], total_steps=8)
        method.attach(run)
        run.batch = next(iter(task.train))
        run.output = net(run.batch.inputs)
        run.step = 2
        term = method.loss(run)["fitnets"]
        total = 0.0
        for own, told in zip(run.output.double(), other(run.batch.inputs).double(), strict=True):
            p, q = (torch.softmax(z / 2.5, 0) for z in (told, own))
            total -= (p * q.log()).sum().item()
        assert term.value.item() == pytest.approx(total / 32, rel=1e-5)
        assert term.weight == pytest.approx(4 - 3 * 2 / 8)
        assert method.task_weight(run) == 1.0

    def test_lambda_falls_from_four_to_one(self, tmp_path: Path) -> None:
        compress(teacher(), CNN.task(), [staged(Fitnets())], directory=tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        # Three epochs of four steps: the means of 4 - 3 * step / 12.
        expected = [4 - 3 * (4 * epoch + 1.5) / 12 for epoch in range(3)]
        assert [line["weight/fitnets"] for line in lines] == pytest.approx(expected)
        assert Fitnets().temperature == 3.0
        assert Fitnets().soft_weight == Ramp(start=4.0, end=1.0)


class TestOneStageIsRefused:
    """The paper says that it fails, and most libraries do it."""

    @pytest.mark.parametrize("other", [SoftTargets(), Fitnets(), Attention(pairs=["2"])])
    @pytest.mark.parametrize("first", [True, False])
    def test_together_with_another_loss(self, other: Method, first: bool) -> None:
        methods = [HINT, other] if first else [other, HINT]
        stage = Stage(model=student(), methods=methods, train=TRAIN)
        with pytest.raises(InputError, match="fails to train deep students") as caught:
            compress(teacher(), CNN.task(), [stage])
        assert other.method_name() in str(caught.value)

    @pytest.mark.parametrize("other", [IntegerTraining, StructuredSparsity])
    @pytest.mark.parametrize("first", [True, False])
    def test_together_with_the_loss_of_another_family(self, other: Any, first: bool) -> None:
        """It would be taken from the guided layer, or be a penalty that the paper does not have."""
        methods = [HINT, other.example()] if first else [other.example(), HINT]
        stage = Stage(model=student(), methods=methods, train=Train(epochs=1, optimizer="sgd"))
        with pytest.raises(InputError, match="fails to train deep students") as caught:
            compress(teacher(), CNN.task(), [stage])
        assert other.method_name() in str(caught.value)

    def test_the_tasks_loss_is_never_asked(self) -> None:
        def unwanted(output: Any, target: Any) -> Tensor:
            raise AssertionError("the labels belong to stage 2")

        task = CNN.task()
        task.loss = unwanted
        compress(teacher(), task, [staged(HINT)])

    def test_in_a_loop_of_ones_own(self) -> None:
        with pytest.raises(InputError, match=r"replaces a part of the training loop \(forward\)"):
            lilliput.attach(student(), HINT, example_inputs=torch.zeros(2, 1, 8, 8))


class TestBadInput:
    def refusal(self, method: Method, *more: Method) -> LilliputError:
        with pytest.raises(LilliputError) as caught:
            compress(teacher(), CNN.task(), [staged(method, *more)])
        return caught.value

    def test_two_guided_layers(self) -> None:
        with pytest.raises(InputError, match=r"one guided layer, and \['1', '2'\] are 2"):
            Hint(pairs=["1", "2"])

    def test_a_hint_that_a_relu_cannot_reach(self) -> None:
        stage = staged(Hint(pairs={"2": "0"}))
        with pytest.warns(LilliputWarning, match="negative at times"):
            compress(teacher(), CNN.task(), [stage])
        compress(teacher(), CNN.task(), [staged(Hint(pairs={"2": "0"}, activation="none"))])

    def test_nothing_in_front_of_the_guided_layer(self) -> None:
        error = self.refusal(Hint(pairs={"0:input": "1"}))
        assert isinstance(error, NothingMatched) and "choose a later layer" in str(error)

    def test_channels_that_are_cut_meanwhile(self) -> None:
        error = self.refusal(HINT, FilterL1(keep=0.5, round_to=1))
        assert "List hint behind the method that cuts them" in str(error)

    def test_an_ensemble(self) -> None:
        error = self.refusal(Hint(pairs={"2": "1"}, teacher=[teacher(), teacher()]))
        assert "an ensemble has no common features" in str(error)


def test_a_view_for_the_teacher() -> None:
    """The hint is taken from the view, as large as the teacher needs it."""
    task = CNN.task()

    def with_view(batches: Any) -> list[Batch]:
        return [Batch(b.inputs, b.target, b.index, {"twice": 2 * b.inputs}) for b in batches]

    task.train = with_view(task.train)
    seen = [
        compress(teacher(), task, [staged(Hint(pairs={"2": "1"}, view=view))]).model[0].weight  # type: ignore[index]
        for view in (None, "twice")
    ]
    assert not torch.equal(*seen)
