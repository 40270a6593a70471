"""Hinton, Vinyals, Dean 2015, section 5: specialists for confusable classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Train
from lilliput.core.task import Task, accuracy, evaluate, read
from lilliput.errors import EmptyData, InputError, ModelMismatch, RunError
from lilliput.methods.distill.specialists import (
    Specialists,
    combine,
    confusable_classes,
    enriched,
    log_oversampling,
    specialist_of,
    specialist_targets,
    specialist_task,
)
from lilliput.tasks.digits import digits


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits.softmax(dim=-1)


def objective(
    q: Tensor,
    general: Tensor,
    said: Sequence[Tensor],
    sets: Sequence[Sequence[int]],
    active: Tensor,
) -> Tensor:
    """Equation 5 of one sample, written out: KL(p_g, q) + sum over A of KL(p_m, q)."""
    value = (general * (general / q).log()).sum()
    for m, members in enumerate(sets):
        if active[m]:
            outside = [c for c in range(len(q)) if c not in members]
            coarse = torch.cat([q[list(members)], q[outside].sum().unsqueeze(0)])
            value = value + (said[m] * (said[m] / coarse).log()).sum()
    return value


class TestCombine:
    SETS = ([0, 3], [2, 3, 4], [5])

    def case(self, scale: float = 2.0) -> tuple[Tensor, list[Tensor]]:
        said = [draw(7, len(s) + 1, scale=scale, seed=n + 1) for n, s in enumerate(self.SETS)]
        return draw(7, 6, scale=scale), said

    def test_is_what_gradient_descent_on_logits_finds(self) -> None:
        """The paper's way, for each sample by itself."""
        general, said = self.case()
        active = torch.tensor([[True, True, False], [False, True, True]])[torch.arange(7) % 2]
        found = combine(general, said, self.SETS, active, gap=1e-9)
        for n in range(7):
            z = general[n].log().clone().requires_grad_(True)
            descent = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-10, lr=0.5)

            def loss(z: Tensor = z, n: int = n, descent: torch.optim.LBFGS = descent) -> Tensor:
                descent.zero_grad()
                value = objective(
                    z.softmax(0), general[n], [s[n] for s in said], self.SETS, active[n]
                )
                value.backward()
                return value

            descent.step(loss)  # type: ignore[arg-type]
            torch.testing.assert_close(found[n], z.detach().softmax(0), rtol=1e-3, atol=1e-5)

    def test_one_specialist_in_closed_form(self) -> None:
        """Inside its set the mean of both; the rest of q has the proportions of the generalist."""
        general, said = self.case()
        q = combine(general, said[:1], self.SETS[:1], gap=1e-9)
        inside, outside = list(self.SETS[0]), [1, 2, 4, 5]
        torch.testing.assert_close(
            q[:, inside], (general[:, inside] + said[0][:, :2]) / 2, rtol=1e-4, atol=1e-7
        )
        rest = general[:, outside]
        share = (rest.sum(1, keepdim=True) + said[0][:, 2:]) / 2
        expected = share * rest / rest.sum(1, keepdim=True)
        torch.testing.assert_close(q[:, outside], expected, rtol=1e-4, atol=1e-7)

    def test_without_an_active_specialist_it_is_the_generalist(self) -> None:
        general, said = self.case()
        none = torch.zeros(7, 3, dtype=torch.bool)
        torch.testing.assert_close(
            combine(general, said, self.SETS, none), general, atol=1e-6, rtol=0
        )

    def test_specialists_that_agree_change_nothing(self) -> None:
        general, _ = self.case()
        agree = [
            torch.cat([general[:, list(s)], 1 - general[:, list(s)].sum(1, keepdim=True)], dim=1)
            for s in self.SETS
        ]
        torch.testing.assert_close(combine(general, agree, self.SETS), general, atol=1e-5, rtol=0)

    def test_the_dustbin_is_compared_with_a_sum(self) -> None:
        """Treated as a class of its own, or left out, it would not take from the classes of its set."""
        general = torch.full((1, 4), 0.25, dtype=torch.float64)
        said = [torch.tensor([[0.05, 0.05, 0.9]], dtype=torch.float64)]
        q = combine(general, said, [[0, 1]], gap=1e-10)
        expected = torch.tensor([[0.15, 0.15, 0.35, 0.35]], dtype=torch.float64)
        torch.testing.assert_close(q, expected, rtol=1e-5, atol=0)

    @given(
        seed=st.integers(0, 10_000),
        classes=st.integers(2, 12),
        count=st.integers(1, 5),
        scale=st.sampled_from([0.1, 1.0, 5.0, 20.0]),
    )
    @settings(max_examples=60, deadline=None)
    def test_nothing_near_it_is_better(
        self, seed: int, classes: int, count: int, scale: float
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        sets = [
            torch.randperm(classes, generator=generator)[: 1 + m % (classes - 1)].tolist()
            for m in range(count)
        ]
        general = draw(3, classes, scale=scale, seed=seed)
        said = [draw(3, len(s) + 1, scale=scale, seed=seed + m) for m, s in enumerate(sets)]
        q = combine(general, said, sets)
        torch.testing.assert_close(q.sum(1), torch.ones(3, dtype=torch.float64))
        active = torch.ones(count, dtype=torch.bool)
        for n in range(3):
            own = [s[n].clamp(min=1e-300) for s in said]
            here = objective(q[n], general[n], own, sets, active)
            for _ in range(20):
                moved = q[n].log() + 0.05 * torch.randn(
                    classes, generator=generator, dtype=torch.float64
                )
                there = objective(moved.softmax(0), general[n], own, sets, active)
                assert float(here) <= float(there) + 2e-5

    def test_probabilities_that_are_zero(self) -> None:
        general = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        said = [torch.tensor([[0.0, 1.0], [1.0, 0.0]])]
        q = combine(general, said, [[0]])
        assert torch.isfinite(q).all()
        # Sample 0: half says class 0, half says it is another one, no matter which.
        assert q[0].tolist() == pytest.approx([0.5, 0.25, 0.25], abs=1e-4)
        assert q[1].tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-4)

    def test_says_when_it_does_not_get_there(self) -> None:
        general, said = self.case()
        with pytest.raises(RunError, match="within 1e-06 nats"):
            combine(general, said, self.SETS, gap=1e-6, steps=1)

    def test_refuses_what_does_not_fit(self) -> None:
        general, said = self.case()
        with pytest.raises(InputError, match="the set"):
            combine(general, said[:1], [[0, 6]])
        with pytest.raises(InputError, match="and not all"):
            combine(general, [draw(7, 7)], [[0, 1, 2, 3, 4, 5]])
        with pytest.raises(InputError, match="its classes and the dustbin"):
            combine(general, said[:1], [[0, 1, 2]])
        with pytest.raises(InputError, match="2 specialists for 1 sets"):
            combine(general, said[:2], [[0, 1]])


class TestClusters:
    def test_classes_that_are_predicted_together(self) -> None:
        """Three groups that share their probability at random, so that their columns go together."""
        generator = torch.Generator().manual_seed(0)
        groups = [[0, 5, 7], [1, 2], [3, 4, 6]]
        probabilities = torch.zeros(600, 8)
        for n in range(600):
            members = groups[n % 3]
            shares = 1 + 0.2 * torch.rand(len(members), generator=generator)
            probabilities[n, members] = shares / shares.sum()
        assert confusable_classes(probabilities, 3) == groups

    def test_every_class_is_in_one_set_and_always_the_same(self) -> None:
        probabilities = draw(200, 9, scale=2.0)
        sets = confusable_classes(probabilities, 4, seed=3)
        assert sorted(c for s in sets for c in s) == list(range(9))
        assert sets == confusable_classes(probabilities, 4, seed=3)

    def test_refuses_more_sets_than_classes(self) -> None:
        with pytest.raises(InputError, match="give 1 to 9"):
            confusable_classes(draw(20, 9), 10)
        with pytest.raises(InputError, match="ask for fewer sets"):
            confusable_classes(torch.full((20, 4), 0.25), 3)


class TestData:
    LABELS = torch.tensor([0] * 10 + [1] * 20 + [2] * 170)

    def test_half_is_special_and_nothing_special_is_missing(self) -> None:
        numbers = enriched(self.LABELS, [0, 1], torch.Generator())
        assert len(numbers) == 60
        assert sorted(n for n in numbers.tolist() if n < 30) == list(range(30))
        rest = [n for n in numbers.tolist() if n >= 30]
        assert len(set(rest)) == 30

    def test_the_rest_is_drawn_anew(self) -> None:
        generator = torch.Generator()
        first, second = (enriched(self.LABELS, [0, 1], generator).tolist() for _ in range(2))
        assert set(first) != set(second)

    def test_a_small_rest_is_used_again_evenly(self) -> None:
        numbers = enriched(self.LABELS, [1, 2], torch.Generator())
        assert len(numbers) == 380
        assert torch.bincount(numbers)[:10].tolist() == [19] * 10

    def test_correction_restores_the_odds(self) -> None:
        """A specialist that is calibrated on the enriched data is so on all data, once corrected."""
        epoch = self.LABELS[enriched(self.LABELS, [0, 1], torch.Generator())]
        logits = torch.tensor([(epoch == 0).sum(), (epoch == 1).sum(), (epoch == 2).sum()]).log()
        logits[2] += log_oversampling(self.LABELS, [0, 1])
        assert logits.softmax(0).tolist() == pytest.approx([0.05, 0.10, 0.85])

    def test_targets(self) -> None:
        labels = torch.tensor([4, 0, 2, 7, 4])
        assert specialist_targets(labels, [7, 4]).tolist() == [1, 2, 2, 0, 1]

    def test_refuses_sets_without_samples(self) -> None:
        with pytest.raises(EmptyData, match="a specialist needs both"):
            enriched(self.LABELS, [5], torch.Generator())
        with pytest.raises(EmptyData, match="a specialist needs both"):
            enriched(self.LABELS, [0, 1, 2], torch.Generator())

    @pytest.mark.parametrize("classes", [[5], [0, 1, 2]])
    def test_no_odds_of_sets_without_samples(self, classes: list[int]) -> None:
        with pytest.raises(EmptyData, match="a specialist needs both"):
            log_oversampling(self.LABELS, classes)

    def test_task_of_a_specialist(self) -> None:
        task = specialist_task(digits(batch_size=32), [3, 8])
        first = [b.target for b in read(task.train, "")]
        assert len(first) == len(task.train)  # type: ignore[arg-type]
        counts = torch.cat(first).bincount()
        assert counts[2] == counts[0] + counts[1]
        task.train.reshuffle(1)  # type: ignore[attr-defined]
        assert not torch.equal(
            torch.cat([b.target for b in read(task.train, "")]), torch.cat(first)
        )
        assert task.test is not None
        held = torch.cat([b.target for b in read(task.test, "")]).bincount()
        assert held[2] > 3 * (held[0] + held[1])  # as frequent as they are
        with pytest.raises(InputError, match="augmented at random"):
            specialist_task(digits(augment=True), [3, 8])


class TestSpecialist:
    def test_starts_as_the_generalist(self) -> None:
        """The classes' logits are its own; the dustbin's is log sum exp of the rest, to first order."""
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        with torch.no_grad():
            network[2].weight.mul_(0.1)
        student, x = specialist_of(network, [4, 1], "2"), torch.randn(5, 4)
        expected, logits = network(x), student(x)
        torch.testing.assert_close(logits[:, :2], expected[:, [4, 1]])
        torch.testing.assert_close(
            logits[:, 2], expected[:, [0, 2, 3, 5]].logsumexp(1), rtol=0, atol=0.01
        )
        assert network[2].out_features == 6
        logits.sum().backward()
        assert network[0].weight.grad is None, "the generalist's weights are copied, not shared"

    def test_refuses_another_layer(self) -> None:
        network = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        with pytest.raises(ModelMismatch, match="'1' is not a linear layer"):
            specialist_of(network, [0], "1")
        with pytest.raises(InputError, match="0 to 7"):
            specialist_of(network, [8], "0")

    def test_asks_only_those_whose_set_holds_a_best_class(self) -> None:
        generalist = nn.Identity()
        asked: list[int] = []

        class Count(nn.Module):
            def __init__(self, size: int) -> None:
                super().__init__()
                self.size = size

            def forward(self, x: Tensor) -> Tensor:
                asked.append(len(x))
                return torch.zeros(len(x), self.size)

        x = torch.eye(4)[[0, 1, 1, 3]] * 5
        sets = [[0, 1], [2], [1, 3]]
        model = Specialists(generalist, [Count(3), Count(2), Count(3)], sets)
        log_q = model(x)
        assert asked == [3, 3]  # samples 0 to 2; nobody; samples 1 to 3
        torch.testing.assert_close(log_q.exp().sum(1), torch.ones(4))
        assert Specialists(generalist, [Count(2)], [[2]], best=4).called(x.softmax(1)).all()

    def test_the_correction_acts_on_the_dustbin(self) -> None:
        class Even(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.zeros(len(x), 2)

        x = torch.tensor([[1.0, 0.0]])
        plain, corrected = (
            Specialists(nn.Identity(), [Even()], [[0]], [by])(x).exp()[0]
            for by in (0.0, math.log(3))
        )
        general = x.softmax(1)[0]
        assert float(plain[0]) == pytest.approx((float(general[0]) + 1 / 2) / 2, rel=1e-4)
        assert float(corrected[0]) == pytest.approx((float(general[0]) + 1 / 4) / 2, rel=1e-4)

    def test_refuses_odd_counts(self) -> None:
        with pytest.raises(InputError, match="1 specialists, 2 sets"):
            Specialists(nn.Identity(), [nn.Identity()], [[0], [1]])


def test_from_generalist_to_ensemble_on_digits() -> None:
    """The whole way, through the engine; with so few classes only the machinery is at stake."""
    task = digits(batch_size=32, limit=400)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    train = Train(epochs=15, lr=0.01)
    general = lilliput.compress(network, task, [Stage(train=train)]).model
    predictions = torch.cat([general(b.inputs) for b in read(task.validation, "")]).softmax(1)
    sets = [s for s in confusable_classes(predictions, 3) if 1 < len(s) < 9]
    assert sets
    labels = torch.cat([b.target for b in read(task.train, "")])
    experts = [
        lilliput.compress(
            specialist_of(general, s, "3"), specialist_task(task, s), [Stage(train=train)]
        ).model
        for s in sets
    ]
    whole = Specialists(general, experts, sets, [log_oversampling(labels, s) for s in sets])
    assert task.test is not None
    before = evaluate(general, task.test, accuracy)
    after = evaluate(whole, task.test, accuracy)
    assert before > 80
    assert after >= before - 1


def test_the_ensemble_is_a_classifier_of_any_task() -> None:
    """Its outputs are log-probabilities: cross-entropy and accuracy take them as logits."""
    general = nn.Linear(4, 3)
    model = Specialists(general, [specialist_of(nn.Sequential(general), [0], "0")], [[0]])
    batches = [(torch.randn(6, 4), torch.arange(6) % 3)]
    task = Task(batches, batches, None, F.cross_entropy, accuracy)
    log_q = model(batches[0][0])
    torch.testing.assert_close(log_q.log_softmax(1), log_q, atol=1e-5, rtol=0)
    assert 0 <= evaluate(model, task.validation, task.score) <= 100
