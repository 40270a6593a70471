"""Wang, Zhang, Sun, Qi 2018: KDGAN."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.digests import mix, weights_digest
from lilliput.core.run import Run
from lilliput.core.task import accuracy
from lilliput.core.types import Batch
from lilliput.engine.progress import Watcher
from lilliput.errors import Diverged, InputError, ModelMismatch
from lilliput.methods import Gradual, Kdgan, SoftTargets
from lilliput.methods.distill.kdgan import concrete, discriminator_loss, log_refused
from lilliput.testing import NETWORKS

MLP, CNN, _ = NETWORKS
CLASSES, FEATURES = 3, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestConcrete:
    def test_cold_samples_are_labels_with_the_right_frequencies(self) -> None:
        """Gumbel's trick: at tau towards 0 a sample is one-hot, and of class k with probability p_k."""
        logits = torch.tensor([[0.5, -1.0, 2.0, 0.0]]).double()
        drawn = concrete(logits, 1e-3, generator(), samples=40_000)[:, 0]
        assert float((drawn.max(dim=1).values > 0.99).double().mean()) > 0.99
        found = drawn.argmax(dim=1).bincount(minlength=4) / 40_000
        torch.testing.assert_close(found.double(), logits[0].softmax(0), rtol=0, atol=0.01)

    def test_is_the_definition(self) -> None:
        logits, tau = random(5, 4), 0.7
        waits = torch.empty(2, 5, 4, dtype=torch.float64).exponential_(generator=generator(3))
        drawn = concrete(logits, tau, generator(3), samples=2)
        for s in range(2):
            for n in range(5):
                p = logits[n].exp() / logits[n].exp().sum()
                terms = [
                    math.exp((math.log(p[k]) - math.log(waits[s, n, k])) / tau) for k in range(4)
                ]
                expected = torch.tensor([t / sum(terms) for t in terms], dtype=torch.float64)
                torch.testing.assert_close(drawn[s, n], expected)

    def test_hot_samples_are_nearly_uniform(self) -> None:
        drawn = concrete(random(5, 4), 1e4, generator())
        torch.testing.assert_close(drawn, torch.full_like(drawn, 0.25), rtol=0, atol=1e-3)

    def test_gradient_is_that_of_the_expectation_at_a_low_temperature(self) -> None:
        """d/dz sum_k p_k log(1 - sigma(h_k)) in closed form, against the mean over many samples."""
        h = random(1, 4, seed=2)
        z = random(1, 4, seed=1).requires_grad_(True)
        values = -F.softplus(h[0])
        (expected,) = torch.autograd.grad((z.softmax(1)[0] * values).sum(), z)
        drawn = concrete(z, 0.1, generator(), samples=200_000)
        # The expectation of the relaxed label times fixed values, which at tau towards 0 is the above.
        (found,) = torch.autograd.grad((drawn * values).sum(-1).mean(), z)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)

    def test_gradient_varies_less_than_that_of_drawn_labels(self) -> None:
        """What the paper relaxes labels for: against the score-function estimator."""
        z, h = random(1, 10, seed=1), random(1, 10, seed=2)
        relaxed, drawn, noise = [], [], generator()
        for _ in range(400):
            free = z.clone().requires_grad_(True)
            (g,) = torch.autograd.grad(log_refused(h, concrete(free, 1.0, noise)), free)
            relaxed.append(g)
            label = torch.multinomial(z.softmax(1)[0], 1, generator=noise)
            reward = -F.softplus(h[0, label])
            (score,) = torch.autograd.grad(free.log_softmax(1)[0, label].sum(), free)
            drawn.append(reward * score)
        variances = [float(torch.cat(parts).var(dim=0).sum()) for parts in (relaxed, drawn)]
        assert variances[0] < 0.2 * variances[1]


class TestDiscriminator:
    def test_loss_by_hand(self) -> None:
        """-(E log p_d(y) + alpha E log(1 - p_d(y_c)) + (1 - alpha) E log(1 - p_d(y_t)))."""
        h, labels, alpha = random(4, 3), torch.tensor([2, 0, 1, 1]), 0.3
        c, t = random(2, 4, 3, seed=1).softmax(-1), random(2, 4, 3, seed=2).softmax(-1)

        def accepted(n: int, y: Tensor) -> float:
            return 1 / (1 + math.exp(-sum(float(y[k] * h[n, k]) for k in range(3))))

        total = sum(math.log(accepted(n, torch.eye(3)[labels[n]])) for n in range(4)) / 4
        for share, proposed in ((alpha, c), (1 - alpha, t)):
            refused = [
                math.log(1 - accepted(n, proposed[s, n])) for s in range(2) for n in range(4)
            ]
            total += share * sum(refused) / 8
        found = discriminator_loss(h, labels, c, t, alpha)
        assert float(found) == pytest.approx(-total)

    def test_a_one_hot_label_picks_its_score(self) -> None:
        h, labels = random(4, 3), torch.tensor([2, 0, 1, 1])
        one_hot = F.one_hot(labels, 3).double().unsqueeze(0)
        expected = torch.log(1 - h[torch.arange(4), labels].sigmoid()).mean()
        torch.testing.assert_close(log_refused(h, one_hot), expected)

    def test_at_its_best_it_compares_the_data_with_the_mixture(self) -> None:
        """p_d* = p_u / (p_u + alpha p_c + (1 - alpha) p_t), the lemma behind the equilibrium."""
        p_u, p_c, p_t = (
            torch.tensor(p, dtype=torch.float64)
            for p in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.4, 0.4, 0.2])
        )
        alpha = 0.25

        def exactly(p: Tensor) -> Tensor:
            """Ten labels in which each class occurs as often as p says."""
            return torch.arange(3).repeat_interleave((10 * p).round().long())

        one_hot = [F.one_hot(exactly(p), 3).double().unsqueeze(0) for p in (p_c, p_t)]
        h = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([h], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = discriminator_loss(h.expand(10, 3), exactly(p_u), *one_hot, alpha)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        expected = p_u / (p_u + alpha * p_c + (1 - alpha) * p_t)
        torch.testing.assert_close(h.sigmoid().detach(), expected, rtol=1e-3, atol=1e-4)


def linear(seed: int) -> nn.Linear:
    layer = nn.Linear(FEATURES, CLASSES, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(random(CLASSES, FEATURES, seed=seed))
    return layer


class ByHand:
    """The three players as linear models, their turns with gradients in closed form."""

    rate, alpha, beta, gamma, temperature = 0.2, 0.3, 0.7, 0.5, 2.0
    batches = [  # noqa: RUF012
        Batch(random(6, FEATURES, seed=n), torch.arange(6) % CLASSES) for n in (10, 11)
    ]

    def method(self, **settings: Any) -> Kdgan:
        return Kdgan(
            teacher=linear(2),
            discriminator=linear(3),
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.temperature,
            **settings,
        )

    def noise(self, step: int, purpose: str) -> torch.Generator:
        """The generator of a purpose, as runs make it."""
        return torch.Generator().manual_seed(mix(0, 0, step, purpose))

    def pull(
        self, h: Tensor, z: Tensor, tau: float, noise: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A relaxed label y and the gradient of mean log(1 - sigma(<h, y>)) with respect to z.

        dy/dz = (diag(y) - y y^T) / tau, so du/dz = y * (h - u) / tau with u = <h, y>.
        """
        g = -torch.empty(1, *z.shape, dtype=z.dtype).exponential_(generator=noise)[0].log()
        y = ((z + g) / tau).softmax(1)
        u = (h * y).sum(1, keepdim=True)
        return y, -u.sigmoid() * y * (h - u) / tau / len(z)

    def kl(self, z: Tensor, target: Tensor) -> Tensor:
        """Gradient of T**2 KL(target at T || z at T), the mean over the batch."""
        t = self.temperature
        return t * ((z / t).softmax(1) - (target / t).softmax(1)) / len(z)

    def run(self, method: Kdgan) -> list[Tensor]:
        """Weights of c, t and d after one epoch."""
        c, t, d = (linear(seed).weight.detach().clone() for seed in (1, 2, 3))
        hard = float(method.hard_weight)  # type: ignore[arg-type]
        for step, batch in enumerate(self.batches):
            x, tau = batch.inputs, method.tau(step / len(self.batches))
            truth = F.one_hot(batch.target, CLASSES).double()
            zc, zt = x @ c.T, x @ t.T
            # c, against the others as they are.
            _, adversarial = self.pull(x @ d.T, zc, tau, self.noise(step, "kdgan student"))
            g = self.alpha * adversarial + self.beta * self.kl(zc, zt)
            g = g + hard * (zc.softmax(1) - truth) / len(x)
            c = c - self.rate * g.T @ x
            zc = x @ c.T  # newest
            # d: of -log sigma(h_y) it is sigma(h_y) - 1, of -log(1 - sigma(<h, y>)) it is sigma(<h, y>) y.
            for turn in range(method.discriminator_steps):
                h, noise = x @ d.T, self.noise(step + 1, f"kdgan discriminator {turn}")
                g = (h.sigmoid() - 1) * truth
                for share, z in ((self.alpha, zc), (1 - self.alpha, zt)):
                    y, _ = self.pull(h, z, tau, noise)
                    g = g + share * (h * y).sum(1, keepdim=True).sigmoid() * y
                d = d - self.rate * (g / len(x)).T @ x
            # t, against the newest c and d.
            _, adversarial = self.pull(x @ d.T, zt, tau, self.noise(step + 1, "kdgan teacher"))
            g = (1 - self.alpha) * adversarial + self.gamma * self.kl(zt, zc)
            g = g + hard * (zt.softmax(1) - truth) / len(x)
            t = t - self.rate * g.T @ x
        return [c, t, d]


class TestAlgorithm:
    @pytest.mark.parametrize("settings", [{}, {"hard_weight": 0.5, "discriminator_steps": 3}])
    def test_is_the_hand_written_loop(self, settings: dict[str, Any]) -> None:
        by_hand = ByHand()
        method = by_hand.method(concrete_start=2.0, concrete_end=0.5, **settings)
        players: list[list[Tensor]] = []

        class Look(Watcher):
            def step_done(self, run: Run) -> None:
                networks = [p.network for p in run.players.values()]
                players.append([n.weight.detach().clone() for n in networks])  # type: ignore[operator]

        task = Task(by_hand.batches, by_hand.batches, None, F.cross_entropy, accuracy)
        stage = Stage(methods=[method], train=Train(epochs=1, optimizer="sgd", lr=by_hand.rate))
        result = lilliput.compress(linear(1), task, [stage], watchers=[Look()])
        found = [result.model.weight.detach().double(), *players[-1]]  # type: ignore[operator]
        for one, other in zip(found, by_hand.run(method), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    def test_without_beta_and_gamma_only_the_game_is_left(self) -> None:
        """alpha=1: the teacher proposes nothing, has no loss, and stays."""
        teacher = MLP.build(1)
        states: list[str] = []

        class Look(Watcher):
            def step_done(self, run: Run) -> None:
                states.append(weights_digest(run.players["0.kdgan.teacher"].network))

        method = Kdgan(teacher=teacher, alpha=1.0, beta=0.0, gamma=0.0)
        stage = Stage(methods=[method], train=Train(epochs=1, optimizer="sgd", lr=0.1))
        lilliput.compress(MLP.build(), MLP.task(), [stage], watchers=[Look()])
        assert set(states) == {weights_digest(teacher)}

    def test_distance_of_logits(self) -> None:
        one, other = random(6, 4), random(6, 4, seed=1)
        expected = 0.5 * (one - other).square().sum() / 6
        found = Kdgan(distance="logits")._distance(one, other)
        torch.testing.assert_close(found, expected)

    def test_the_temperature_falls_by_a_constant_factor(self) -> None:
        method = Kdgan(concrete_start=10.0, concrete_end=0.1)
        taus = [method.tau(step / 10) for step in range(11)]
        assert (taus[0], taus[10]) == pytest.approx((10.0, 0.1))
        ratios = [b / a for a, b in pairwise(taus)]
        assert ratios == pytest.approx([ratios[0]] * 10)

    def test_the_discriminator_is_a_fresh_one_of_the_teachers_kind(self) -> None:
        teacher = CNN.build(1)

        class Look(Watcher):
            def step_done(self, run: Run) -> None:
                taught, critic = (p.network for p in run.players.values())
                assert str(taught) == str(critic)
                assert not torch.allclose(taught[0].weight, critic[0].weight, atol=1e-3)  # type: ignore[index]

        stage = Stage(methods=[Kdgan(teacher=teacher)], train=Train(epochs=1, lr=1e-9))
        lilliput.compress(CNN.build(), CNN.task(), [stage], watchers=[Look()])

    def test_learns_labels_through_the_discriminator_alone(self) -> None:
        """No cross-entropy, no distillation: the game by itself, against an untrained teacher."""
        method = Kdgan(
            teacher=MLP.build(1), alpha=0.5, beta=0.0, gamma=0.0, samples=8,
            concrete_start=1.0, concrete_end=0.5, discriminator_steps=2,
        )  # fmt: skip
        model = MLP.build()
        before = lilliput.core.task.evaluate(model, MLP.task().train, accuracy)
        stage = Stage(methods=[method], train=Train(epochs=60, lr=0.003))
        result = lilliput.compress(model, MLP.task(), [stage])
        after = lilliput.core.task.evaluate(result.model, MLP.task().train, accuracy)
        assert after > before + 25

    def test_composes_with_masks_and_soft_targets(self, tmp_path: Path) -> None:
        methods = [Gradual(sparsity=0.8), SoftTargets(), Kdgan(teacher=MLP.build(1))]
        stage = Stage(methods=methods, train=Train(epochs=2, lr=0.01))
        lilliput.compress(MLP.build(), MLP.task(), [stage], directory=tmp_path)
        found = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
        parts = sum(v for k, v in found.items() if k.startswith("loss/"))
        assert found["loss"] == pytest.approx(parts, rel=1e-5)

    def test_the_file_has_only_the_student(self) -> None:
        stage = Stage(methods=[Kdgan(teacher=CNN.build(1))], train=Train(epochs=1))
        result = lilliput.compress(CNN.build(), CNN.task(), [stage])
        assert result.model.state_dict().keys() == CNN.build().state_dict().keys()
        assert int(result.model[1].num_batches_tracked) == 4, "looked at again, it does not count"  # type: ignore[index]


class TestBadInput:
    @pytest.mark.parametrize("player", ["teacher", "discriminator"])
    def test_other_classes(self, player: str) -> None:
        method = Kdgan(**{"teacher": MLP.build(1), player: nn.Linear(12, 5)})
        stage = Stage(methods=[method], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match=f"outputs of the {player} have the shape"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_targets_that_are_no_classes(self) -> None:
        x = torch.randn(8, 12)
        data = [Batch(x, torch.randn(8, 3))]
        task = Task(data, data, None, F.mse_loss, lambda z, y: -(z - y).abs().mean())
        stage = Stage(methods=[Kdgan()], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match="one class number"):
            lilliput.compress(MLP.build(), task, [stage])

    @pytest.mark.parametrize("label", [-100, 3])
    def test_samples_without_a_label(self, label: int) -> None:
        target = torch.arange(8) % 3
        target[2] = label
        data = [Batch(torch.randn(8, 12), target)]
        task = Task(data, data, None, lambda z, y: z.sum(), accuracy)
        stage = Stage(methods=[Kdgan()], train=Train(epochs=1))
        with pytest.raises(InputError, match="kdgan needs a label for every sample, 0 to 2"):
            lilliput.compress(MLP.build(), task, [stage])

    def test_a_teacher_that_collapses_is_told(self) -> None:
        teacher = MLP.build(1)
        with torch.no_grad():
            teacher[5].bias[0] = 2e38  # type: ignore[index]
        method = Kdgan(teacher=teacher, discriminator=MLP.build(2), beta=0.0, hard_weight=1.0)
        stage = Stage(methods=[method], train=Train(epochs=1))
        with pytest.raises(Diverged, match=r"loss of 0\.kdgan\.teacher is"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])
