"""Soft weight-sharing: weights are drawn to the centers of a mixture that learns along, one of them at zero.

Paper: Soft Weight-Sharing for Neural Network Compression (Ullrich, Meeds, Welling; ICLR 2017; arXiv
  1702.04008)
Paper: Simplifying Neural Networks by Soft Weight-Sharing (Nowlan, Hinton; Neural Computation 1992)

A trained network trains on under a prior over all its weights together (equations 3 and 4)::

    L = task loss - tau / N * log p(w),        p(w) = prod_i sum_j pi_j Normal(w_i; mu_j, sigma_j^2)

where N is the number of training samples. Component 0 is fixed at ``mu_0 = 0`` with ``pi_0`` near 1, so
that most weights shrink to it; the other means, all variances and the other shares learn with the weights.
Gamma hyper-priors on the precisions keep variances from collapsing: ``(1 - alpha) log precision + beta
precision`` is added for each component, with other alpha and beta for the zero.

When the stage ends, components that have become the same are merged, every weight takes the mean of the
component that most likely made it, and those of the zero become zero. From then on they are shared values.

Faithful: prior, hyper-priors, joint training, merging, snapping. Differs: biases keep out; the means, the
precisions and the shares have learning rates of their own as multiples of the stage's (``rates``), which is
exact for Adam only.

The surprising rule: pruning and clustering are one; how sparse the network becomes is found. tau is small,
since a log likelihood over all weights is large.

Cost: the density of every weight under every component each step. When not to use it:
on networks of many millions of weights; on a network that is not trained yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.method import LayerMethod
from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.task import batch_size, read
from ...core.types import Change, Positive, Term
from ...errors import InputError, NothingChanged
from ...mechanisms.encodings import Codebook, encode, share_codebook

#: Below this divergence two components are one.
_SAME = 1e-10
#: Weights whose densities are in memory at once.
_PIECE = 1 << 13
_ALL_ZERO = (
    "soft_weight_sharing: every weight most likely belongs to the zero component, so all its layers would be "
    "zero: no weight was changed. Let the mixture learn more (more epochs, a larger tau), or let it begin "
    "narrower (a smaller deviation, a smaller zero)."
)


class Mixture(nn.Module):
    """The prior.

    Every quantity that learns is kept divided by its rate, so that Adam's steps in it are that much longer.

    Args:
        components: the zero included.
        zero: share of the zero, fixed.
        spread: the other means lie evenly between minus and plus this.
        deviation: of all components at the beginning.
        rates: of means, and of precisions and shares.
    """

    def __init__(
        self,
        components: int,
        zero: float,
        spread: float,
        deviation: float,
        rates: tuple[float, float],
    ) -> None:
        super().__init__()
        self.zero, self.rates = zero, rates
        means = torch.linspace(-spread, spread, components - 1)
        precision = torch.full((components,), -2.0 * math.log(deviation))
        self.raw_means = nn.Parameter(means / rates[0])
        self.raw_precisions = nn.Parameter(precision / rates[1])
        self.raw_shares = nn.Parameter(torch.zeros(components - 1))

    def means(self) -> Tensor:
        """mu, the zero first."""
        return torch.cat([self.raw_means.new_zeros(1), self.raw_means * self.rates[0]])

    def log_precisions(self) -> Tensor:
        """``log 1 / sigma^2``."""
        return self.raw_precisions * self.rates[1]

    def log_shares(self) -> Tensor:
        """``log pi``; that of the zero does not learn."""
        others = torch.log_softmax(self.raw_shares * self.rates[1], dim=0) + math.log1p(-self.zero)
        return torch.cat([others.new_full((1,), math.log(self.zero)), others])

    def log_joint(self, weights: Tensor) -> Tensor:
        """``log pi_j Normal(w_i; mu_j, sigma_j^2)``, shape ``(weights, components)``."""
        precision = self.log_precisions()
        squares = (weights[:, None] - self.means()).square()
        normal = 0.5 * (precision - math.log(2.0 * math.pi) - squares * precision.exp())
        return self.log_shares() + normal

    def forward(self, weights: Tensor, priors: list[tuple[float, float]]) -> Tensor:
        """``-log p(w)`` and the hyper-priors on the precisions.

        Args:
            weights: all of them, one dim.
            priors: alpha and beta of the zero, and of the others.
        """
        precision = self.log_precisions()
        alpha, beta = (
            torch.full_like(precision, priors[1][0]),
            torch.full_like(precision, priors[1][1]),
        )
        alpha[0], beta[0] = priors[0]
        hyper = ((1.0 - alpha) * precision + beta * precision.exp()).sum()
        apply: Any = _Surprise.apply
        found: Tensor = hyper + apply(weights, self.means(), precision, self.log_shares())
        return found

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor]:
        """The means after merging, the zero first; and which of them each component has become."""
        means, variances = self.means(), (-self.log_precisions()).exp()
        shares = self.log_shares().exp()
        becomes = torch.arange(len(means))
        for j in range(1, len(means)):
            for i in range(j):
                if (
                    becomes[i] == i
                    and divergence(means[j], variances[j], means[i], variances[i]) < _SAME
                ):
                    becomes[j] = i
                    break
        joined = torch.zeros_like(means).index_add_(0, becomes, shares * means)
        total = torch.zeros_like(shares).index_add_(0, becomes, shares)
        joined = torch.where(total > 0, joined / total.clamp_min(1e-30), means)
        joined[0] = 0.0
        return joined, becomes


class _Surprise(torch.autograd.Function):
    """``-sum_i log sum_j pi_j Normal(w_i; mu_j, sigma_j^2)``, in pieces that fit into a processor's cache.

    All derivatives are moments of the responsibilities r, the shares of the components in a weight's
    density, so they are found on the way: with ``d = w - mu`` and precisions p, ``sum_j r p d`` by a weight,
    ``-p sum_i r d`` by a mean, ``1/2 sum_i r (p d^2 - 1)`` by a log precision, ``-sum_i r`` by a log share.
    """

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, means: Tensor, log_precisions: Tensor, log_shares: Tensor
    ) -> Tensor:
        precisions = log_precisions.exp()
        constants = log_shares + 0.5 * (log_precisions - math.log(2.0 * math.pi))
        total, moments, slopes = weights.new_zeros(()), means.new_zeros(3, len(means)), []
        for some in weights.split(_PIECE):
            apart = some[:, None] - means
            shares = torch.addcmul(constants, apart * apart, -0.5 * precisions)
            density = shares.logsumexp(1, keepdim=True)
            shares = shares.sub_(density).exp_()
            pulls = shares * apart
            total -= density.sum()
            moments += torch.stack([shares.sum(0), pulls.sum(0), (pulls * apart).sum(0)])
            slopes.append(pulls @ precisions)
        ctx.save_for_backward(
            torch.cat(slopes), -precisions * moments[1],
            0.5 * (precisions * moments[2] - moments[0]), -moments[0],
        )  # fmt: skip
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradients[0] * slope for slope in ctx.saved_tensors)


def divergence(mean: Tensor, variance: Tensor, other: Tensor, of_other: Tensor) -> float:
    """The Kullback-Leibler divergence of one normal distribution from another."""
    ratio = variance / of_other
    return float(0.5 * (ratio - 1.0 - ratio.log() + (mean - other).square() / of_other))


@method
class SoftWeightSharing(LayerMethod):
    """Train under a mixture prior, and let the weights share its means in the end.

    Attributes:
        tau: weight of the prior.
        components: of the mixture, the zero included.
        zero: share of the zero.
        spread: the means begin evenly between minus and plus this; by default at the largest weight.
        deviation: of all components at the beginning.
        zero_prior: alpha and beta of the hyper-prior on the zero's precision.
        prior: the same for the others.
        rates: of the means, and of precisions and shares, as multiples of the stage's learning rate.
        layers: pattern over module names.

    Raises:
        InputError: all weights are zero.
        NothingChanged: in the end every weight belongs to the zero.

    Example:
        >>> SoftWeightSharing(tau=0.003).components
        17
    """

    family: ClassVar[str] = "quantize"

    tau: Positive = 0.005
    components: Annotated[int, Field(ge=2, le=256)] = 17
    zero: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    spread: Positive | None = None
    deviation: Positive = 0.25
    zero_prior: tuple[Positive, Positive] = (5e3, 2.0)
    prior: tuple[Positive, Positive] = (250.0, 0.1)
    rates: tuple[Positive, Positive] = (0.2, 6.0)

    @classmethod
    def example(cls) -> SoftWeightSharing:
        """Five narrow components: in a few steps, wider ones leave all weights to the zero."""
        return cls(components=5, zero=0.5, deviation=0.05)

    def attach(self, run: Run) -> None:
        """Put the mixture beside the network."""
        chosen, memory = self.weights(run.model), self.memory(run)
        memory["before"] = {w.name: len(w.value.detach().unique()) for w in chosen}
        largest = max(float(w.value.detach().abs().max()) for w in chosen)
        if largest == 0.0:
            raise InputError("soft_weight_sharing: all weights are zero: nothing to share.")
        memory["samples"] = sum(batch_size(b) for b in read(run.task.train, "the training batches"))
        spread = largest if self.spread is None else self.spread
        mixture = Mixture(self.components, self.zero, spread, self.deviation, self.rates)
        run.extra(self._name(run), mixture)

    def loss(self, run: Run) -> Mapping[str, Term]:
        """The prior's part."""
        flat = torch.cat([w.value.flatten() for w in self.weights(run.model)])
        penalty = run.extras[self._name(run)](flat, [self.zero_prior, self.prior])
        return {"prior": Term(penalty, self.tau / self.memory(run)["samples"])}

    @torch.no_grad()
    def finish(self, run: Run) -> list[Change]:
        """Snap every weight to a mean; zeros stay zeros."""
        chosen, mixture = self.weights(run.model), run.extras[self._name(run)]
        mixture = getattr(mixture, "module", mixture)  # several processes wrap it
        assert isinstance(mixture, Mixture)
        means, becomes = mixture.merged()
        codes = {w.name: _codes(mixture, w, becomes) for w in chosen}
        used = sorted({int(c) for code in codes.values() for c in code.unique()} - {0})
        if not used:
            raise NothingChanged(_ALL_ZERO)
        place = torch.zeros(len(means), dtype=torch.int32)
        place[used] = torch.arange(1, len(used) + 1, dtype=torch.int32)
        for weight in chosen:
            code = place[codes[weight.name].cpu()].to(weight.value.device)
            laid_out = torch.zeros_like(weight.value, dtype=torch.int32).copy_(code)
            encode(weight, Codebook(laid_out, means[used].to(weight.value), run.key_of(self)))
        share_codebook(chosen)
        return [
            Change(w.name, "distinct values", self.memory(run)["before"][w.name],
                   len(w.value.unique()), self.method_name())
            for w in chosen
        ]  # fmt: skip

    def _name(self, run: Run) -> str:
        return f"{run.key_of(self)}.mixture"


def _codes(mixture: Mixture, weight: Weight, becomes: Tensor) -> Tensor:
    """Which component each weight most likely comes from; 0 for what is zero already."""
    value = weight.value.detach()
    likely = mixture.log_joint(value.flatten()).argmax(dim=1).view(value.shape)
    found = becomes.to(value.device)[likely]
    return torch.where(value == 0, 0, found)
