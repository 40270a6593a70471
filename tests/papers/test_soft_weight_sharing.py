"""Ullrich et al. 2017: soft weight-sharing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

import lilliput
from lilliput import Stage, Train
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, NothingChanged
from lilliput.mechanisms.encodings import original_of
from lilliput.methods import Magnitude, SoftWeightSharing
from lilliput.methods.quantize import soft_weight_sharing
from lilliput.methods.quantize.soft_weight_sharing import Mixture, divergence
from lilliput.testing import NETWORKS

MLP, *_ = NETWORKS


def mixture(components: int = 5, **settings: Any) -> Mixture:
    plain = {"zero": 0.9, "spread": 0.6, "deviation": 0.25, "rates": (0.2, 6.0)}
    found = Mixture(components, **{**plain, **settings})
    with torch.no_grad():
        found.raw_shares.copy_(
            torch.randn(components - 1, generator=torch.Generator().manual_seed(0)) / 6
        )
        found.raw_precisions.add_(torch.linspace(-0.1, 0.1, components))
    return found


def test_the_prior_is_torchs_mixture() -> None:
    prior = mixture()
    weights = torch.randn(50, generator=torch.Generator().manual_seed(1))
    deviations = (-0.5 * prior.log_precisions()).exp()
    theirs = MixtureSameFamily(
        Categorical(prior.log_shares().exp()), Normal(prior.means(), deviations)
    )
    # With alpha 1 and beta 0 the hyper-priors say nothing.
    ours = prior(weights, [(1.0, 0.0), (1.0, 0.0)])
    torch.testing.assert_close(ours, -theirs.log_prob(weights).sum())
    assert float(prior.log_shares().exp().sum().detach()) == pytest.approx(1.0)
    assert prior.means()[1:].tolist() == pytest.approx([-0.6, -0.2, 0.2, 0.6])


def test_the_derivatives_are_autograds(monkeypatch: Any) -> None:
    """Of all that learns, with the weights in several pieces."""
    monkeypatch.setattr(soft_weight_sharing, "_PIECE", 16)
    prior = mixture().double()
    weights = torch.linspace(-1.0, 1.0, 50, dtype=torch.float64).requires_grad_()
    learning = [weights, *prior.parameters()]
    ours = torch.autograd.grad(prior(weights, [(1.0, 0.0), (1.0, 0.0)]), learning)
    plain = -torch.logsumexp(prior.log_joint(weights), dim=1).sum()
    for mine, theirs in zip(ours, torch.autograd.grad(plain, learning), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_hyper_priors() -> None:
    """(1 - alpha) gamma + beta e^gamma for each component, the zero with its own."""
    prior, nothing = mixture(3), torch.zeros(0)
    gamma = prior.log_precisions()
    expected = (1 - 5e3) * gamma[0] + 2.0 * gamma[0].exp()
    expected += ((1 - 250.0) * gamma[1:] + 0.1 * gamma[1:].exp()).sum()
    torch.testing.assert_close(prior(nothing, [(5e3, 2.0), (250.0, 0.1)]), expected)


def test_with_the_zero_alone_it_is_weight_decay() -> None:
    prior = mixture(2, zero=1 - 1e-7, spread=1e3)
    weights = torch.randn(20, requires_grad=True)
    prior(weights, [(1.0, 0.0), (1.0, 0.0)]).backward()
    torch.testing.assert_close(
        weights.grad, weights.detach() * prior.log_precisions()[0].exp().detach()
    )


def test_rates_are_multiples_of_adams_step() -> None:
    prior = mixture()
    before = prior.means().detach(), prior.log_precisions().detach(), prior.log_shares().detach()
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-3)
    prior(torch.randn(100), [(5e3, 2.0), (250.0, 0.1)]).backward()
    optimizer.step()
    moved = (prior.means().detach() - before[0])[1:].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.2e-3), rtol=1e-2, atol=1e-6)
    moved = (prior.log_precisions().detach() - before[1]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 6e-3), rtol=1e-2, atol=1e-6)
    assert prior.means()[0] == 0.0
    assert float(prior.log_shares()[0]) == pytest.approx(math.log(0.9))
    assert float(prior.log_shares().exp().sum().detach()) == pytest.approx(1.0)


def test_components_that_are_the_same_are_merged() -> None:
    prior = mixture(4)
    with torch.no_grad():
        prior.raw_means.copy_(torch.tensor([0.3, 0.3, -0.5]) / 0.2)
        prior.raw_precisions.fill_(2.0 / 6)
        prior.raw_shares.copy_(torch.tensor([0.0, math.log(3.0), 0.0]) / 6)
    means, becomes = prior.merged()
    assert becomes.tolist() == [0, 1, 1, 3]
    assert float(means[1]) == pytest.approx(0.3)
    with torch.no_grad():
        prior.raw_means[0] = 0.0  # the same as the zero
    means, becomes = prior.merged()
    assert becomes.tolist() == [0, 0, 2, 3]
    assert float(means[0]) == 0.0
    one, two = Normal(0.1, 0.5), Normal(-0.2, 0.7)
    ours = divergence(torch.tensor(0.1), torch.tensor(0.25), torch.tensor(-0.2), torch.tensor(0.49))
    assert ours == pytest.approx(float(torch.distributions.kl_divergence(one, two)))


class Last(Watcher):
    """The weights and the mixture after the last step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.mixture: Mixture | None = None

    def step_done(self, run: Run) -> None:
        self.weights = [w.value.detach().clone() for w in select(run.model)]
        self.mixture = next((m for m in run.extras.values() if isinstance(m, Mixture)), None)


def trained(before: Any = None, epochs: int = 20, **settings: Any) -> tuple[Any, Last]:
    watcher = Last()
    method = SoftWeightSharing(**{"components": 6, "tau": 0.05, "zero": 0.9, **settings})
    stages = [Stage(methods=[before], train=Train(epochs=1))] if before else []
    stages.append(Stage(methods=[method], train=Train(epochs=epochs, lr=5e-3)))
    return lilliput.compress(MLP.build(), MLP.task(), stages, watchers=[watcher]).model, watcher


def test_every_weight_takes_the_mean_that_most_likely_made_it() -> None:
    model, last = trained()
    assert last.mixture is not None
    means, becomes = last.mixture.merged()
    for weight, before in zip(select(model), last.weights, strict=True):
        likely = last.mixture.log_joint(before.flatten()).argmax(1).view(before.shape)
        torch.testing.assert_close(weight.value, means[becomes[likely]])
    values = {v for w in select(model) for v in w.value.flatten().tolist()}
    assert len(values) <= 6
    assert any((w.value == 0).float().mean() > 0.3 for w in select(model))


def test_the_prior_draws_weights_to_its_means() -> None:
    """After training under it weights lie nearer to a mean than without."""

    def distance(tau: float) -> float:
        _, last = trained(tau=tau)
        assert last.mixture is not None
        flat = torch.cat([w.flatten() for w in last.weights])
        return float((flat[:, None] - last.mixture.means()).abs().amin(1).mean())

    assert distance(0.5) < 0.5 * distance(1e-9)


def test_what_is_pruned_stays_zero() -> None:
    before = Magnitude(sparsity=0.5, remove_dead=False)
    model, _ = trained(before=before, epochs=2, deviation=0.05)
    assert all(len(w.value.unique()) <= 6 for w in select(model))
    for weight in select(model):
        assert (weight.value == 0).float().mean() >= 0.5


def test_a_network_of_zeros_is_told() -> None:
    model = MLP.build()
    with torch.no_grad():
        for weight in select(model):
            weight.value.zero_()
    with pytest.raises(InputError, match="nothing to share"):
        lilliput.compress(
            model, MLP.task(), [Stage(methods=[SoftWeightSharing()], train=Train(epochs=1))]
        )


def test_a_mixture_that_leaves_all_to_the_zero_is_told() -> None:
    """Every weight would become zero; until now nothing became of it, and nothing was said."""
    model = MLP.build()
    attached = lilliput.attach(model, SoftWeightSharing(zero=0.999, deviation=0.5), task=MLP.task())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NothingChanged, match=r"zero component.*more epochs.*smaller deviation"):
        attached.finish()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_gradient_of_another_shape_is_left() -> None:
    """Surgery in a later stage could not put it back."""
    model, batch = MLP.build(), next(iter(MLP.task().train))
    method = SoftWeightSharing(components=5, zero=0.5, deviation=0.05)
    attached = lilliput.attach(model, method, task=MLP.task())
    model(batch.inputs).sum().backward()
    attached.finish()
    trained = [original_of(w) for w in select(model)]
    assert all(p.grad is None or p.grad.shape == p.shape for p in trained)
