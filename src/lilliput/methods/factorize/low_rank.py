"""Low-rank factorization: a layer becomes a chain of thin layers, and is fine-tuned on few samples.

Paper: Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation (Denton, Zaremba,
  Bruna, LeCun, Fergus; NeurIPS 2014; arXiv 1404.0736)
Paper: Speeding up Convolutional Neural Networks with Low Rank Expansions (Jaderberg, Vedaldi, Zisserman; BMVC
  2014; arXiv 1405.3866)
Paper: Convolutional Neural Networks with Low-Rank Regularization (Tai, Xiao, Zhang, Wang, E; ICLR 2016; arXiv
  1511.06067)
Paper: Accelerating Very Deep Convolutional Networks for Classification and Detection (Zhang, Zou, He, Sun;
  TPAMI 2016; arXiv 1505.06798)
Paper: Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications (Kim,
  Park, Yoo, Choi, Yang, Shin; ICLR 2016; arXiv 1511.06530)
Paper: Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition (Lebedev, Ganin, Rakhuba,
  Oseledets, Lempitsky; ICLR 2015; arXiv 1412.6553)
Paper: Network Decoupling: From Regular to Depthwise Separable Convolutions (Guo, Li, Lin, Chen, Li; BMVC
  2018; arXiv 1808.05517)
Paper: Global Analytic Solution of Fully-observed Variational Bayesian Matrix Factorization (Nakajima,
  Sugiyama, Babacan, Tomioka; JMLR 2013)
Paper: On the Compression of Recurrent Neural Networks with an Application to LVCSR Acoustic Modeling for
  Embedded Speech Recognition (Prabhavalkar, Alsharif, Bruguier, McGraw; ICASSP 2016; arXiv 1603.08042)

For n inputs, m outputs, kernels of K x K and the ranks r and s, a layer and what takes its place::

    linear     W = B A                      n -> r -> m                      r (m + n)
    channel    as linear, W is m x n K K    K x K, 1 x 1                     r (n K K + m)
    spatial    W is m K x n K               K x 1, 1 x K                     r K (n + m)
    separable  each input by itself         K x K depthwise, 1 x 1           r n (K K + m)
    tucker     Tucker-2                     1 x 1, K x K, 1 x 1              n r + r s K K + s m
    cp         sum of r outer products      1 x 1, K x 1, 1 x K, 1 x 1       r (n + m + 2 K)

Separable has r kernels for each input channel: architecture as compression, every K x K convolution becomes
one of MobileNet's, with nothing between its halves. The first four are singular value decompositions, so
the squared error is the sum of the squared singular values that are left out (Eckart, Young 1936). Tucker
begins with HOSVD and goes on with HOOI; CP is found by alternating least squares, from singular vectors and
a fixed seed. A recurrent matrix stays one tensor for torch, as the product of two factors that train.

Ranks: given; by energy, the part of the squared size that is kept; ``evbmf``, the components that variational
Bayes takes for signal (Nakajima 2013; in Tucker of both unfoldings, as Kim 2016); or by one budget for the
network, spent so that the product of all kept parts falls least for what is saved (Zhang 2016). With
``calibrate`` the error is that of the layers' outputs on training samples: in closed form for linear and
channel (Zhang 2016, equation 4), by least squares for the last layer of the others.

A layer is left whole, with a note, where a chain would have no fewer weights or more operations.

Faithful: the chains and the closed forms. Differs: Zhang 2016 takes the mean off, and looks at the
rectifier behind; here is neither, and each layer sees the inputs that the whole network gives it. Lebedev
2015 finds CP by non-linear least squares. Kim 2016 skips the input side of the first layer. Ours: grouped
convolutions have a chain for each group.

The surprising rule: a layer ``conv2`` is ``conv2.0``, ``conv2.1``, ... afterwards, and patterns of later
stages must say ``conv2*``. Masks and shared values of a layer that becomes a chain are gone: factorize first.

Cost: an SVD a layer; of CP a dozen decompositions a layer, where ranks are not given. When not to use it: on
layers that are thin already (depthwise, 1 x 1 with few channels), or on attention's own matrices, which
stay whole. A factorized recurrent layer makes a smaller file, and is not faster.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.method import LayerMethod
from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Change, Keep, PerLayer, resolve
from ...errors import EmptyData, InputError, NothingChanged
from ...mechanisms.budget import Budget
from ...mechanisms.encodings import LowRank as Product
from ...mechanisms.encodings import encode, strip
from ...mechanisms.factors import Ranks, Shape, check_ranks, factorize, why_not
from ...mechanisms.packing import pack_of
from ...mechanisms.surgery import transaction
from ._calibration import Visit, output_errors, output_moments, refitted, visiting
from ._decompositions import CLOSED, decompose, projected, relative_error
from ._others import refuse_others
from ._ranks import Place, by_energy, measure_work, options, variational_ranks
from ._spending import Offer, spend

Rank = Annotated[int, Field(ge=1)]
Given: TypeAlias = Rank | tuple[Rank, Rank] | Literal["evbmf"]
Convolution = Literal["channel", "spatial", "separable", "tucker", "cp"]

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


@method
class LowRank(LayerMethod):
    """Put chains of thin layers in the place of layers, by what their weights or outputs lose least.

    Give one of rank, energy and budget.

    Attributes:
        layers: pattern over module names.
        convolutions: the kind of chain for convolutions; for all or by layer pattern. A kernel of one
            position always becomes ``channel``, a linear layer the product of two.
        rank: of each layer, or by layer pattern: a number, two of them (input, output) for Tucker, or
            ``evbmf``.
        energy: instead, the part of the squared size of each layer that is kept.
        budget: instead, what the network may cost, as a fraction of the dense one.
        calibrate: fit outputs on training samples, instead of weights.
        samples: for the calibration.
        positions: of a convolution's output that are looked at in each sample.

    Raises:
        NothingMatched: the pattern covers no weight.
        InputError: a rank above the full one; a kind of chain that a layer cannot be; a transposed
            convolution; another method of the stage that changes the model stands before this one.
        NothingChanged: no layer would gain.

    Example:
        >>> LowRank(rank={"conv2": (10, 20), "fc1": "evbmf"}, convolutions="tucker").calibrate
        False
    """

    family: ClassVar[str] = "factorize"
    initializes: ClassVar[bool] = True

    convolutions: PerLayer[Convolution] = "tucker"
    rank: PerLayer[Given] | None = None
    energy: PerLayer[Keep] | None = None
    budget: Budget | None = None
    calibrate: bool = False
    samples: Annotated[int, Field(ge=1)] = 256
    positions: Annotated[int, Field(ge=1)] = 16

    @model_validator(mode="after")
    def _one(self) -> LowRank:
        if sum(given is not None for given in (self.rank, self.energy, self.budget)) != 1:
            raise ValueError("give exactly one of rank, energy and budget")
        return self

    @classmethod
    def example(cls) -> LowRank:
        """Somewhat more than half of each layer's squared size."""
        return cls(energy=0.6)

    def amounts(self) -> Any:
        """The setting that decides which layers take part."""
        return self.energy if self.rank is None else self.rank

    # -- hooks ------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        """Kinds and ranks must fit the layers."""
        for place in self._places(model, {}):
            self._given(place)

    def attach(self, run: Run) -> None:
        """Choose ranks, decompose, and put the chains in place."""
        memory = self.memory(run)
        memory.update(done={}, whole={})
        places = self._places(run.model, memory["whole"])
        self._refuse_others(run, places)
        inputs = self._inputs(run)
        if inputs is not None:
            measure_work(run.model, places, inputs)
        visit, moments = self._visit(run), {}
        if self.calibrate:
            moments = output_moments([p for p in places if not p.encoded], visit)
        ranks = self._ranks(run, places, inputs, moments)
        chosen = {place.name: place for place in places if ranks.get(place.name)}
        chains = self._solved(chosen, ranks, moments, visit)
        measured = {name: place for name, place in chosen.items() if name in moments}
        errors = output_errors(measured, chains, visit) if measured else {}
        if not chosen:
            raise self._nothing(memory["whole"])
        with transaction(run.model):  # all of them, or none
            for name, place in chosen.items():
                told = self._told(place, ranks[name], chains[name], errors.get(name))
                memory["done"][name] = told
                self._put(run, place, ranks[name], chains[name])

    def finish(self, run: Run) -> list[Change]:
        """For each layer its ranks, or why it stayed whole."""
        memory = self.memory(run)
        return [
            Change(name, "rank", full, rank, self.method_name(), note)
            for name, (full, rank, note) in memory["done"].items()
        ] + [
            Change(name, "rank", full, full, self.method_name(), f"left whole: {why}")
            for name, (full, why) in memory["whole"].items()
        ]

    # -- which layers -----------------------------------------------------------------------------

    def _places(self, model: nn.Module, whole: dict[str, Any]) -> list[Place]:
        """The layers that may become chains; of the others it is noted why not."""
        found = []
        for weight in self.weights(model):
            if isinstance(weight.module, _TRANSPOSED):
                raise InputError(
                    f"low_rank: {weight.layer} is a transposed convolution, of which there is no chain: "
                    f"leave it out with '!{weight.layer}'."
                )
            place = self._place(weight)
            if isinstance(place, str):
                whole[weight.name] = [None, place]
            else:
                found.append(place)
        return found

    def _place(self, weight: Weight) -> Place | str:
        layer: Any = weight.module
        if isinstance(layer, _RECURRENT):
            rows, columns = weight.value.shape
            return Place(weight, weight.name, "svd", Shape(columns, rows), encoded=True)
        if weight.tensor != "weight" or not weight.layer:
            return f"{weight.name} is not the weight of a layer inside the network"
        kind = self._kind(weight)
        reason = why_not(layer, kind) if kind else "no pattern of convolutions covers it"
        return reason or Place(weight, weight.layer, kind, Shape.of(layer))

    def _kind(self, weight: Weight) -> str:
        """The kind of chain for a layer; none where no pattern covers it."""
        layer: Any = weight.module
        if not isinstance(layer, nn.modules.conv._ConvNd):
            return "svd"
        if set(layer.kernel_size) == {1}:
            return "channel"
        asked: Any = self.convolutions
        kind: str = resolve(asked, weight.layer) or ""
        if kind == "spatial" and len(layer.kernel_size) != 2:
            raise InputError(
                f"low_rank: {weight.layer}: {why_not(layer, kind)}. Set convolutions for it, by its name."
            )
        return kind

    def _given(self, place: Place) -> Ranks | None:
        """The ranks that the settings give, checked; none where they are to be found."""
        given = resolve(self.rank, place.weight.layer)
        if given is None:
            return None
        if given == "evbmf":
            if place.kind == "cp":
                raise InputError(
                    f"low_rank: {place.name}: variational ranks are those of matrices, and CP has none. Give "
                    "a number, energy or budget, or another kind of chain."
                )
            return None
        ranks = given if isinstance(given, tuple) else (given,) * len(place.full)
        try:
            check_ranks(place.shape, place.kind, ranks)  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(f"low_rank: {place.name}: {error}") from error
        return ranks  # type: ignore[return-value]

    def _refuse_others(self, run: Run, places: list[Place]) -> None:
        """What cannot go together with chains."""
        refuse_others(self, run, any(place.weight.encodings() for place in places))
        recurrent = [place.name for place in places if place.encoded]
        if recurrent and pack_of(run.model) is not None:
            raise InputError(
                f"low_rank: {recurrent[0]} belongs to a network with tasks, which keep whole matrices. Leave "
                "it out, or factorize before the first task."
            )

    # -- which ranks ------------------------------------------------------------------------------

    def _ranks(
        self, run: Run, places: list[Place], inputs: Any, moments: dict[str, Tensor]
    ) -> dict[str, Ranks]:
        """The ranks of each layer that becomes a chain; of the others it is noted why not."""
        if self.budget is not None:
            found = self._spent(run, places, inputs, moments)
        else:
            found = {p.name: self._ranks_of(p, moments.get(p.name)) for p in places}
        for place in places:
            if reason := self._why_whole(place, found[place.name]):
                self.memory(run)["whole"][place.name] = [_short(place.full), reason]
                del found[place.name]
        return found

    def _ranks_of(self, place: Place, moments: Tensor | None) -> Ranks:
        given = self._given(place)
        if given is not None:
            return given
        if self.rank is not None:
            return variational_ranks(place)
        energy = resolve(self.energy, place.weight.layer)
        assert energy is not None
        return by_energy(options(place, moments), energy)

    def _why_whole(self, place: Place, ranks: Ranks) -> str:
        if not ranks:
            return "the budget allows it"
        if not all(ranks):
            return "evbmf finds nothing in it but noise"
        if place.pays(ranks):
            return ""
        return (
            f"rank {_short(ranks)} would have {place.weights(ranks):,} weights instead of "
            f"{place.shape.numbers:,}, and {place.work(ranks):,.0f} operations instead of {place.macs:,.0f}"
        )

    def _spent(
        self, run: Run, places: list[Place], inputs: Any, moments: dict[str, Tensor]
    ) -> dict[str, Ranks]:
        """Meet the budget; times are not the same twice, so what they led to is kept in a file."""
        assert self.budget is not None
        timed = self.budget.quantity == "latency"
        if inputs is None and (timed or self.budget.quantity == "macs"):
            raise InputError(
                f"low_rank: a budget in {self.budget.quantity} needs an example: give lilliput.attach(..., "
                "task=...), or a budget in parameters or bytes."
            )
        if timed and _processes() > 1:
            raise InputError(
                "low_rank: several processes that train together would each measure another latency: give a "
                "budget in macs."
            )
        if not timed or run.directory is None:
            return self._bought(run, places, inputs, moments)
        number = next(n for n, other in enumerate(run.methods) if other is self)
        file = run.directory / f"ranks-{run.stage}-{number}.json"
        if not file.exists():
            half_done = file.with_suffix(".tmp")
            half_done.write_text(json.dumps(self._bought(run, places, inputs, moments)))
            half_done.replace(file)
        return {name: tuple(ranks) for name, ranks in json.loads(file.read_text()).items()}

    def _bought(
        self, run: Run, places: list[Place], inputs: Any, moments: dict[str, Tensor]
    ) -> dict[str, Ranks]:
        """The ranks that meet the budget."""
        assert self.budget is not None
        comparable = all(place.name in moments and place.kind in CLOSED for place in places)
        seen = moments if comparable else {}  # errors of outputs and of weights cannot be compared
        offers = [Offer.of(place, options(place, seen.get(place.name))) for place in places]
        dense = run.model if run.original is None else run.original
        ranks = spend(offers, self.budget, run.model, dense, inputs)
        return {place.name: each for place, each in zip(places, ranks, strict=True)}

    # -- the chains -------------------------------------------------------------------------------

    def _solved(
        self,
        places: dict[str, Place],
        ranks: dict[str, Ranks],
        moments: dict[str, Tensor],
        visit: Visit,
    ) -> dict[str, list[Tensor]]:
        """The weights of the chains."""
        found = {}
        for name, place in places.items():
            closed = name in moments and place.kind in CLOSED
            found[name] = (
                projected(place.blocks, place.kind, moments[name], ranks[name][0])
                if closed
                else decompose(place.blocks, place.kind, ranks[name])
            )
        left = {n: p for n, p in places.items() if n in moments and p.kind not in CLOSED}
        return refitted(left, found, visit) if left else found

    def _told(
        self, place: Place, ranks: Ranks, chain: list[Tensor], error: float | None
    ) -> list[Any]:
        """Full ranks, ranks, and a note, of a layer that is about to become a chain."""
        of = "weights" if error is None else "outputs"
        error = relative_error(place.blocks, chain) if error is None else error
        kinds = ", ".join(e.kind for e in place.weight.encodings())
        note = (
            f"{place.kind}: {place.shape.numbers:,} -> {place.weights(ranks):,} weights, relative squared "
            f"error of {of} {error:.3g}{f'; no longer {kinds}' if kinds else ''}"
        )
        return [_short(place.full), _short(ranks), note]

    def _put(self, run: Run, place: Place, ranks: Ranks, chain: list[Tensor]) -> None:
        if place.encoded:
            strip(place.weight)
            encode(place.weight, Product(ranks[0], place.shape.leaves, place.shape.enters))
        else:
            factorize(run.model, place.name, place.kind, ranks, chain)

    # -- the run ----------------------------------------------------------------------------------

    def _visit(self, run: Run) -> Visit:
        def generator() -> torch.Generator:
            return run.generator("low_rank calibration")

        return visiting(run.model, lambda: run.calibration(self.samples), self.positions, generator)

    def _inputs(self, run: Run) -> Any:
        """One example's inputs; none in a training loop of the user's own that gives none."""
        try:
            example = run.task.example_inputs()
        except EmptyData:
            return None
        return pytree.tree_map_only(Tensor, lambda t: t.to(run.device), example)

    def _nothing(self, whole: dict[str, Any]) -> NothingChanged:
        reasons = "; ".join(f"{name}: {why}" for name, (_, why) in list(whole.items())[:5])
        return NothingChanged(
            f"low_rank leaves every layer whole ({reasons}). Ask for lower ranks, less energy or a smaller "
            "budget, or choose other layers."
        )


def _processes() -> int:
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def _short(ranks: Ranks) -> int | list[int]:
    return ranks[0] if len(ranks) == 1 else list(ranks)
