"""Hinton, Vinyals, Dean 2015: distilling the knowledge in a neural network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.digests import weights_digest
from lilliput.core.method import Method
from lilliput.core.run import Run
from lilliput.core.schedule import Ramp
from lilliput.core.types import Batch
from lilliput.errors import InputError, LilliputError, ModelMismatch
from lilliput.mechanisms.teacher import Cached, Live
from lilliput.methods import (
    Adversarial,
    BornAgain,
    DomainAdaptation,
    Fitnets,
    Kdgan,
    Logits,
    Magnitude,
    Mutual,
    Privileged,
    Rocket,
    SelfLabels,
    Sequence,
    SoftTargets,
)
from lilliput.methods.distill.soft_targets import soft_target_loss, soften
from lilliput.tasks._arrays import ArrayBatches
from lilliput.testing import NETWORKS, TinyNetwork

MLP, CNN, _ = NETWORKS
CPU = torch.device("cpu")


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student = student.clone().requires_grad_(True)
    target = soften(teacher.unsqueeze(0), temperature, "arithmetic")
    soft_target_loss(student, target, temperature).backward()
    assert student.grad is not None
    return student.grad


class TestLoss:
    def test_is_the_definition(self) -> None:
        """T**2 times the mean over the samples of sum_i p_i (log p_i - log q_i)."""
        student, teacher, t = logits(5, 4), logits(5, 4, seed=1), 3.0
        p, q = (teacher / t).exp(), (student / t).exp()
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        expected = t**2 * sum(float((p[n] * (p[n] / q[n]).log()).sum()) for n in range(5)) / 5
        target = soften(teacher.unsqueeze(0), t, "arithmetic")
        assert float(soft_target_loss(student, target, t)) == pytest.approx(expected)

    def test_gradient_is_that_of_the_cross_entropy(self) -> None:
        """dL/dz = T (q - p) / N in closed form."""
        student, teacher, t = logits(6, 5), logits(6, 5, seed=1), 2.5
        expected = t * (F.softmax(student / t, 1) - F.softmax(teacher / t, 1)) / 6
        torch.testing.assert_close(gradient(student, teacher, t), expected)

    def test_high_temperature_is_logit_regression(self) -> None:
        """At T to infinity, for centred logits: dL/dz = (z_s - z_t) / (C N)."""
        student, teacher = logits(6, 5), logits(6, 5, seed=1)
        student = student - student.mean(1, keepdim=True)
        teacher = teacher - teacher.mean(1, keepdim=True)
        expected = (student - teacher) / (5 * 6)
        torch.testing.assert_close(gradient(student, teacher, 1e4), expected, rtol=1e-3, atol=1e-6)

    def test_gradient_norm_hardly_depends_on_the_temperature(self) -> None:
        """That is what T**2 is for: without it, T=20 would have 1/100 of the norm at T=2."""
        student, teacher = logits(64, 10), logits(64, 10, seed=1)
        norms = [float(gradient(student, teacher, t).norm()) for t in (2.0, 5.0, 10.0, 20.0)]
        assert max(norms) / min(norms) < 1.5

    def test_is_the_mean_over_samples_not_over_classes(self) -> None:
        one, other = logits(1, 10), logits(1, 10, seed=1)
        value = float(soft_target_loss(one, soften(other.unsqueeze(0), 2.0, "arithmetic"), 2.0))
        many = soft_target_loss(
            one.repeat(7, 1), soften(other.repeat(1, 7, 1), 2.0, "arithmetic"), 2.0
        )
        assert float(many) == pytest.approx(value)
        p, q = F.softmax(other / 2, 1), F.softmax(one / 2, 1)
        assert value == pytest.approx(float(4 * (p * (p / q).log()).sum()))

    def test_sequences_count_every_prediction(self) -> None:
        student, teacher = logits(3, 4, 5), logits(1, 3, 4, 5, seed=1)
        whole = soft_target_loss(student, soften(teacher, 2.0, "arithmetic"), 2.0)
        flat = soft_target_loss(
            student.reshape(12, 5), soften(teacher.reshape(1, 12, 5), 2.0, "arithmetic"), 2.0
        )
        torch.testing.assert_close(whole, flat)

    def test_is_zero_when_the_student_agrees(self) -> None:
        same = logits(4, 6)
        assert float(soft_target_loss(same, soften(same.unsqueeze(0), 3.0, "arithmetic"), 3.0)) == (
            pytest.approx(0.0, abs=1e-12)
        )


class TestEnsemble:
    def test_arithmetic_mean_of_probabilities(self) -> None:
        members, t = logits(3, 5, 4), 2.0
        expected = sum(F.softmax(m / t, 1) for m in members) / 3
        torch.testing.assert_close(
            soften(members, t, "arithmetic").exp(), expected, rtol=1e-6, atol=1e-8
        )

    def test_geometric_mean_of_probabilities(self) -> None:
        members, t = logits(3, 5, 4), 2.0
        product = torch.ones(5, 4, dtype=torch.float64)
        for member in members:
            product = product * F.softmax(member / t, 1)
        expected = product ** (1 / 3)
        expected = expected / expected.sum(1, keepdim=True)
        torch.testing.assert_close(soften(members, t, "geometric").exp(), expected)

    @pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
    def test_one_member_is_itself(self, mean: Any) -> None:
        torch.testing.assert_close(
            soften(logits(1, 5, 4), 3.0, mean), F.log_softmax(logits(1, 5, 4)[0] / 3, dim=1)
        )

    def test_live_networks_are_stacked_in_order(self) -> None:
        networks = [MLP.build(seed) for seed in (1, 2)]
        x = torch.randn(4, 12)
        outputs = Live(networks, CPU).outputs(Batch(x, None))
        for network, output in zip(networks, outputs, strict=True):
            assert torch.equal(output, network.eval()(x))

    def test_an_ensemble_of_modules_teaches(self) -> None:
        method = SoftTargets(teacher=[MLP.build(1), MLP.build(2)], hard_weight=0.0)
        stage = Stage(methods=[method], train=Train(epochs=1))
        result = lilliput.compress(MLP.build(), MLP.task(), [stage])
        assert result.figures["score"] > 0


class TestTeacher:
    @pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
    def test_is_bitwise_unchanged_and_in_eval_mode(self, network: TinyNetwork) -> None:
        """Buffers of batch normalization included."""
        teacher = network.build(1).train()
        before = weights_digest(teacher)
        live = Live([teacher], CPU)
        for batch in network.task().train:
            outputs = live.outputs(batch)
            assert not outputs.requires_grad
        live.check()
        assert weights_digest(teacher) == before
        assert not any(m.training for m in teacher.modules())

    def test_outputs_may_be_saved_by_a_loss(self) -> None:
        """Inference tensors may not: a squared error on them would fail."""
        outputs = Live([MLP.build(1)], CPU).outputs(Batch(torch.randn(4, 12), None))
        student = torch.randn(1, 4, 3, requires_grad=True)
        (student * outputs).sum().backward()
        assert student.grad is not None

    def test_one_that_is_trained_is_noticed(self) -> None:
        teacher = CNN.build(1)
        live = Live([teacher], CPU)
        teacher.train()(torch.randn(4, 1, 8, 8))  # moves the running statistics
        with pytest.raises(ModelMismatch, match="teacher changed"):
            live.check()

    def test_a_module_is_copied(self) -> None:
        """The user's teacher keeps its mode and its gradients."""
        teacher = MLP.build(1).train()
        stage = Stage(methods=[SoftTargets(teacher=teacher)], train=Train(epochs=1))
        lilliput.compress(MLP.build(), MLP.task(), [stage])
        assert teacher.training
        assert all(p.requires_grad for p in teacher.parameters())

    def test_original_is_the_network_before_the_first_method(self) -> None:
        """In a later stage too, where the model has been pruned."""
        model = MLP.build()
        stages = [
            Stage(methods=[Magnitude(sparsity=0.9)], train=Train(epochs=1)),
            Stage(methods=[SoftTargets(hard_weight=0.0)], train=Train(epochs=1)),
        ]
        seen: list[nn.Module] = []

        class Look(lilliput.engine.progress.Watcher):
            def step_done(self, run: Run) -> None:
                assert run.original is not None
                seen.append(run.original)

        lilliput.compress(model, MLP.task(), stages, watchers=[Look()])
        assert len(seen) == 8
        assert {weights_digest(m) for m in seen} == {weights_digest(model)}

    def test_looks_at_its_view(self) -> None:
        seen: list[Tensor] = []

        class Look(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(x)
                return torch.zeros(len(x), 3)

        views = {"clean": torch.full((32, 12), 7.0)}
        batches = [Batch(b.inputs, b.target, views=views) for b in MLP.task().train]
        task = Task(batches, MLP.task().validation, None, F.cross_entropy, lambda z, y: z[:, 0])
        stage = Stage(methods=[SoftTargets(teacher=Look(), view="clean")], train=Train(epochs=1))
        lilliput.compress(MLP.build(), task, [stage])
        assert len(seen) == 4
        assert all((x == 7.0).all() for x in seen)

    def test_classes_may_lie_in_another_dim(self) -> None:
        """Of maps every pixel is a prediction."""
        torch.manual_seed(0)
        student, teacher = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)
        x = torch.randn(8, 1, 5, 5)
        batches = [(x, torch.zeros(8, 5, 5, dtype=torch.int64))]
        task = Task(batches, batches, None, F.cross_entropy, lambda z, y: z.flatten(1)[:, 0])
        method = SoftTargets(teacher=teacher, class_dim=1, soft_weight=1.0, hard_weight=0.0)
        stage = Stage(methods=[method], train=Train(epochs=1, lr=1e-12))
        result = lilliput.compress(student, task, [stage])
        found = json.loads((result.directory / "metrics.jsonl").read_text().splitlines()[0])
        z, t = (n(x).movedim(1, -1).reshape(-1, 3).detach() for n in (student, teacher))
        expected = soft_target_loss(z, soften(t.unsqueeze(0), 4.0, "arithmetic"), 4.0)
        assert found["loss"] == pytest.approx(float(expected), rel=1e-4)

    def test_other_classes_are_refused(self) -> None:
        method = SoftTargets(teacher=nn.Linear(12, 5))
        stage = Stage(methods=[method], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match="same classes"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])


class TestWeights:
    def losses(self, method: SoftTargets) -> dict[str, Any]:
        stage = Stage(methods=[method], train=Train(epochs=1, lr=1e-9))
        result = lilliput.compress(CNN.build(), CNN.task(), [stage])
        first: dict[str, Any] = json.loads(
            (result.directory / "metrics.jsonl").read_text().splitlines()[0]
        )
        return first

    def test_the_loss_is_the_weighted_sum(self) -> None:
        one = self.losses(SoftTargets(soft_weight=1.0, hard_weight=1.0))
        other = self.losses(SoftTargets(soft_weight=0.25, hard_weight=3.0))
        assert other["loss/task"] == pytest.approx(3 * one["loss/task"], rel=1e-5)
        assert other["loss/soft_targets"] == pytest.approx(
            0.25 * one["loss/soft_targets"], rel=1e-5
        )
        assert other["loss"] == pytest.approx(
            other["loss/task"] + other["loss/soft_targets"], rel=1e-5
        )

    def test_weights_that_move(self) -> None:
        """FitNets' lambda from 4 to 1, and the labels' weight the other way; steps 0 to 3 of 4."""
        teacher = CNN.build(1)
        still = self.losses(SoftTargets(teacher=teacher, soft_weight=1.0, hard_weight=1.0))
        soft, hard = Ramp(start=4.0, end=1.0), Ramp(start=1.0, end=3.0)
        moving = self.losses(SoftTargets(teacher=teacher, soft_weight=soft, hard_weight=hard))
        assert moving["weight/soft_targets"] == pytest.approx(4.0 - 3.0 * 1.5 / 4)
        # The batches' losses differ a little, so the mean weight gives the means roughly.
        ratio = moving["loss/soft_targets"] / still["loss/soft_targets"]
        assert ratio == pytest.approx(4.0 - 3.0 * 1.5 / 4, rel=0.1)
        assert moving["loss/task"] / still["loss/task"] == pytest.approx(1.0 + 3 / 4, rel=0.1)

    def test_a_ramp_can_end_without_labels(self) -> None:
        found = SoftTargets.model_validate({"hard_weight": {"start": 1, "end": 0, "over": 0.5}})
        run = Run(model=MLP.build(), task=MLP.task(), total_steps=4)
        weights = []
        for run.step in range(4):
            weights.append(found.task_weight(run))
        assert weights == [1.0, 0.5, 0.0, 0.0]

    def test_without_hard_weight_no_label_is_needed(self) -> None:
        def no_loss(output: Any, target: Any) -> Tensor:
            raise AssertionError("the labels were asked for")

        task = MLP.task()
        task.loss = no_loss
        stage = Stage(methods=[SoftTargets(hard_weight=0.0)], train=Train(epochs=1))
        lilliput.compress(MLP.build(), task, [stage])

    def test_the_student_comes_nearer_to_the_teacher(self) -> None:
        teacher, student = MLP.build(1).eval(), MLP.build(2)
        method = SoftTargets(teacher=teacher, hard_weight=0.0, soft_weight=1.0)
        stage = Stage(methods=[method], train=Train(epochs=30, lr=0.01))
        result = lilliput.compress(student, MLP.task(), [stage])
        x = torch.cat([b.inputs for b in MLP.task().train])

        def distance(network: nn.Module) -> float:
            target = soften(teacher(x).unsqueeze(0), 4.0, "arithmetic")
            return float(soft_target_loss(network.eval()(x), target, 4.0).detach())

        assert distance(result.model) < 0.2 * distance(student)


class TestCache:
    def source(self, tmp_path: Path, teacher: nn.Module | None = None, **task: Any) -> Cached:
        live = Live([teacher or MLP.build(1)], CPU)
        return Cached(tmp_path / "teacher.f16", live, task.get("batches", MLP.task().train), CPU)

    def test_is_the_live_teacher_to_a_thousandth(self, tmp_path: Path) -> None:
        members = [MLP.build(1), MLP.build(2)]
        live = Live(members, CPU)
        cached = Cached(tmp_path / "t.f16", live, MLP.task().train, CPU)
        for batch in MLP.task().train:
            expected = live.outputs(batch)
            assert cached.outputs(batch).shape == expected.shape
            torch.testing.assert_close(cached.outputs(batch), expected, rtol=1e-3, atol=1e-3)

    def test_file_is_half_precision_and_read_in_place(self, tmp_path: Path) -> None:
        cached = self.source(tmp_path)
        assert (tmp_path / "teacher.f16").stat().st_size == 128 * 3 * 2
        assert not cached._rows.flags.owndata, "the rows stay on the disk"

    def test_training_with_it_is_training_without_it(self) -> None:
        scores = []
        for cache in (False, True):
            stage = Stage(methods=[SoftTargets(cache=cache)], train=Train(epochs=3, lr=0.01))
            result = lilliput.compress(MLP.build(), MLP.task(), [stage])
            scores.append(result.model.state_dict())
        for name in scores[0]:
            torch.testing.assert_close(scores[0][name], scores[1][name], rtol=1e-2, atol=1e-2)

    def test_refuses_batches_that_say_they_are_augmented(self, tmp_path: Path) -> None:
        batches = MLP.task().train
        batches.augmented = True  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="random augmentation"):
            self.source(tmp_path, batches=batches)

    def test_refuses_an_augmented_sample(self, tmp_path: Path) -> None:
        cached = self.source(tmp_path)
        batch = next(iter(MLP.task().train))
        noisy = Batch(
            batch.inputs + 0.1 * torch.randn_like(batch.inputs), batch.target, batch.index
        )
        with pytest.raises(InputError, match="not the one whose teacher outputs were cached"):
            cached.outputs(noisy)

    def test_refuses_exchanged_data(self, tmp_path: Path) -> None:
        """The file of another run's data: the same teacher and numbers, other samples."""
        self.source(tmp_path)
        other = TinyNetwork("mlp", MLP.make, MLP.shape).task()
        other.train.inputs = other.train.inputs.roll(1, 0)  # type: ignore[attr-defined]
        cached = self.source(tmp_path, batches=other.train)
        with pytest.raises(InputError, match="not the one whose teacher outputs were cached"):
            cached.outputs(next(iter(other.train)))

    def test_refuses_a_batch_of_which_one_sample_is_exchanged(self, tmp_path: Path) -> None:
        cached = self.source(tmp_path)
        batch = next(iter(MLP.task().train))
        inputs = batch.inputs.clone()
        inputs[5] = torch.randn(12)
        with pytest.raises(InputError, match="not the one whose teacher outputs were cached"):
            cached.outputs(Batch(inputs, batch.target, batch.index))

    def test_refuses_a_sample_that_it_has_not_seen(self, tmp_path: Path) -> None:
        cached = self.source(tmp_path)
        batch = next(iter(MLP.task().train))
        for place in (0, 5):
            index = batch.index.clone()
            index[place] = 1000
            with pytest.raises(LilliputError):
                cached.outputs(Batch(batch.inputs, batch.target, index))

    def test_is_made_anew_for_changed_weights(self, tmp_path: Path) -> None:
        self.source(tmp_path)
        teacher = MLP.build(1)
        with torch.no_grad():
            teacher[5].bias.add_(1.0)  # type: ignore[index]
        cached = self.source(tmp_path, teacher)
        batch = next(iter(MLP.task().train))
        expected = Live([teacher], CPU).outputs(batch)
        torch.testing.assert_close(cached.outputs(batch), expected, rtol=1e-3, atol=1e-3)

    def test_is_not_made_anew_for_the_same_weights(self, tmp_path: Path) -> None:
        self.source(tmp_path)
        written = (tmp_path / "teacher.f16").stat().st_mtime_ns
        self.source(tmp_path)
        assert (tmp_path / "teacher.f16").stat().st_mtime_ns == written

    @pytest.mark.parametrize("moment", ["index is written", "rows move", "index moves"])
    def test_an_interruption_leaves_no_index_beside_other_rows(
        self, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Teacher B is recorded over A and stopped: what A finds then is A's."""
        batch, move = next(iter(MLP.task().train)), Path.replace

        def stopped(*args: Any, **more: Any) -> Any:
            raise KeyboardInterrupt

        def moved(self: Path, target: Path) -> Path:
            stop = target.name.endswith("npz") == (moment == "index moves")
            return stopped() if stop else move(self, target)

        self.source(tmp_path)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if moment == "index is written":
                patch.setattr(np, "savez", stopped)
            else:
                patch.setattr(Path, "replace", moved)
            self.source(tmp_path, MLP.build(2))
        expected = Live([MLP.build(1)], CPU).outputs(batch)
        found = self.source(tmp_path).outputs(batch)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    def test_the_index_moves_last_and_no_process_writes_anothers_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moves: list[tuple[str, str]] = []
        move = Path.replace

        def moved(self: Path, target: Path) -> Path:
            moves.append((self.name, Path(target).name))
            return move(self, target)

        monkeypatch.setattr(Path, "replace", moved)
        self.source(tmp_path)
        assert [target for _, target in moves] == ["teacher.f16", "teacher.f16.index.npz"]
        assert all(f".{os.getpid()}." in name for name, _ in moves)
        assert {file.name for file in tmp_path.iterdir()} == {target for _, target in moves}

    @pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:100], lambda b: b"PK" + b[9:]])
    def test_a_damaged_index_is_made_anew(
        self, damage: Callable[[bytes], bytes], tmp_path: Path
    ) -> None:
        self.source(tmp_path)
        index = tmp_path / "teacher.f16.index.npz"
        index.write_bytes(damage(index.read_bytes()))
        assert self.source(tmp_path).outputs(next(iter(MLP.task().train))).shape == (1, 32, 3)

    def test_an_index_without_a_key_is_made_anew(self, tmp_path: Path) -> None:
        self.source(tmp_path)
        np.savez(tmp_path / "teacher.f16.index.npz", shape=(1, 2))
        assert self.source(tmp_path).outputs(next(iter(MLP.task().train))).shape == (1, 32, 3)

    def test_a_sample_that_was_left_out_is_named(self, tmp_path: Path) -> None:
        """The pass that was recorded has dropped its last batch; another one drops others."""
        whole = torch.cat([b.inputs for b in MLP.task().train])
        batches = ArrayBatches(whole, torch.zeros(128), 50, drop_last=True)
        cached = self.source(tmp_path, batches=batches)
        batch = Batch(whole[90:110], None, torch.arange(90, 110))
        with pytest.raises(InputError, match=r"sample 100 was not in the pass.*drop_last"):
            cached.outputs(batch)

    @pytest.mark.parametrize("size", [1e-4, 1e4])
    def test_exchanged_samples_are_refused_whatever_their_size(
        self, size: float, tmp_path: Path
    ) -> None:
        inputs = size * torch.cat([b.inputs for b in MLP.task().train])
        cached = self.source(tmp_path, batches=[Batch(inputs, None, torch.arange(128))])
        nearly = inputs * (1 + 1e-6 * torch.randn(inputs.shape))
        cached.outputs(Batch(nearly, None, torch.arange(128)))  # another device rounds otherwise
        with pytest.raises(InputError, match="not the one whose teacher outputs were cached"):
            cached.outputs(Batch(inputs.flip(0), None, torch.arange(128)))

    def test_samples_of_zeros_are_themselves(self, tmp_path: Path) -> None:
        batch = Batch(torch.zeros(8, 12), None, torch.arange(8))
        assert self.source(tmp_path, batches=[batch]).outputs(batch).shape == (1, 8, 3)

    def test_outputs_of_several_lengths_are_refused(self, tmp_path: Path) -> None:
        lengths = ((5, 0), (7, 4))
        batches = [Batch(torch.randn(4, n, 8), None, torch.arange(m, m + 4)) for n, m in lengths]
        with pytest.raises(InputError, match="differ in length from batch to batch"):
            self.source(tmp_path, nn.Linear(8, 3), batches=batches)

    def test_numbers_may_be_a_list(self, tmp_path: Path) -> None:
        batch = next(iter(MLP.task().train))
        listed = Batch(batch.inputs, batch.target, batch.index.tolist())
        found = self.source(tmp_path, batches=[listed]).outputs(listed)
        assert torch.equal(found, self.source(tmp_path).outputs(batch))

    def test_needs_sample_numbers(self, tmp_path: Path) -> None:
        batches = [(b.inputs, b.target) for b in MLP.task().train]
        with pytest.raises(InputError, match="inputs, target, index"):
            self.source(tmp_path, batches=batches)

    def test_whole_run_refuses_augmentation(self) -> None:
        """Batches that do not say so, but change from epoch to epoch."""

        class Noisy:
            def __len__(self) -> int:
                return 4

            def __iter__(self) -> Any:
                for b in MLP.task().train:
                    yield Batch(b.inputs + 0.1 * torch.randn_like(b.inputs), b.target, b.index)

        task = MLP.task()
        task = Task(Noisy(), task.validation, task.test, task.loss, task.score)
        stage = Stage(methods=[SoftTargets(cache=True)], train=Train(epochs=1))
        with pytest.raises(InputError, match="augmented at random"):
            lilliput.compress(MLP.build(), task, [stage])


def one_number() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))


def binary(model: nn.Module, *methods: Method) -> Any:
    """Train a network whose only output is the log-odds of one class."""
    x = torch.randn(16, 12)
    batches = [Batch(x, torch.rand_like(model(x)), torch.arange(16))]
    loss = F.binary_cross_entropy_with_logits
    task = Task(batches, batches, None, loss, lambda z, y: -(z - y).abs().mean())
    stage = Stage(methods=list(methods), train=Train(epochs=1))
    return lilliput.compress(model, task, [stage])


class TestOneNumber:
    """A softmax over one class is 1 whatever the network says: nothing would be learned."""

    @pytest.mark.parametrize(
        "method",
        [
            SoftTargets(),
            Fitnets(),
            Privileged(view=None),
            BornAgain(teacher="original"),
            SelfLabels(teacher="self"),
            DomainAdaptation(view=None, initialize=False),
            Adversarial(noise={"1": 0.1}),
            Mutual(),
            Kdgan(),
            Rocket(booster="original", share=["0"], hint="probabilities"),
            Sequence(level="word"),
        ],
        ids=lambda method: method.method_name(),
    )
    def test_is_refused_where_a_softmax_is_taken(self, method: Method) -> None:
        told = rf"{method.method_name()}: the outputs have the shape \(16, 1\).*two outputs"
        with pytest.raises(ModelMismatch, match=told):
            binary(one_number(), method)

    def test_a_batch_is_not_taken_for_classes(self) -> None:
        flat = nn.Sequential(one_number(), nn.Flatten(0))
        with pytest.raises(ModelMismatch, match=r"the outputs have the shape \(16,\)"):
            binary(flat, SoftTargets())

    def test_may_be_regressed(self) -> None:
        assert binary(one_number(), Logits(teacher=one_number()[:3])).figures


class WithLogits(nn.Module):
    """Answers as Hugging Face's networks do."""

    def __init__(self, name: str = "logits") -> None:
        super().__init__()
        self.inner, self.name = nn.Linear(12, 3), name

    def forward(self, x: Tensor) -> Any:
        return type("Answer", (), {self.name: self.inner(x)})()


class TestOutputsWithLogits:
    def trained(self, method: Method, name: str = "logits", unlabeled: int = 0) -> Any:
        def loss(output: Any, target: Tensor) -> Tensor:
            return F.cross_entropy(getattr(output, name), target)

        target = torch.arange(12) % 3
        target[:unlabeled] = -1
        batches = [Batch(torch.randn(12, 12), target, torch.arange(12))]
        task = Task(batches, batches, None, loss, lambda z, y: getattr(z, name)[:, 0])
        stage = Stage(methods=[method], train=Train(epochs=1))
        return lilliput.compress(WithLogits(name), task, [stage])

    @pytest.mark.parametrize(
        "method",
        [SoftTargets(), SelfLabels(teacher="self"), Privileged(view=None), Logits()],
        ids=lambda method: method.method_name(),
    )
    def test_teach_and_learn(self, method: Method) -> None:
        assert self.trained(method).figures

    def test_the_network_without_logits_is_named(self) -> None:
        with pytest.raises(ModelMismatch, match="the student's output is a Answer without logits"):
            self.trained(SoftTargets(teacher=nn.Linear(12, 3)), "scores")

    def test_samples_without_a_label_cannot_be_taken_out(self) -> None:
        with pytest.raises(ModelMismatch, match="let the network return its logits"):
            self.trained(Privileged(view=None), unlabeled=4)
