"""Data-free distillation: inputs are made up that move a teacher as its training set once did.

Paper: Data-Free Knowledge Distillation for Deep Neural Networks (Lopes, Fenu, Starner; NIPS Workshop on
Learning with Limited Labeled Data 2017; arXiv 1710.07535)

Three steps, of which only the first one sees data:

1. :func:`record_activations`, where the data are: of each class c and layer l the mean ``mu``, the standard
   deviation and the covariance ``Sigma`` of the activations ``phi_l(x)`` (before their ReLU).
2. For each batch of a class: sample ``a_l ~ N(mu_cl, Sigma_cl)``, start from noise, and descend by Adam on
   the *inputs*: ``min over x of MSE(relu(a), relu(phi(x)))``.
3. The student learns the teacher's softened outputs for these inputs, ``H(p_T, p_S)``.

What is matched in step 2 is the ``objective``:

- ``top_layer``: the last place only.
- ``all_layers``: ``sum over l of (1 / n_l) MSE_l``, where n_l is the layer's number of neurons.
- ``all_layers_dropout``: the same through a teacher whose dropout layers keep one filter for each batch of
  inputs, for teachers that were trained with dropout.
- ``spectral_all_layers``: layers are not sampled apart. All activations of a sample are one signal on a
  graph of neurons; U_c are some columns of its Fourier basis, and ``s ~ N(U' mu, U' Sigma U)`` is sampled.
  The target is ``a = U s``, matched as in ``all_layers``: at full rank that is ``all_layers`` with the
  layers' correlations.
- ``spectral_layer_pairs``: the same for each two adjacent places, with the sum over the pairs.

Faithful, to the paper and the official code (iRapha/replayed_distillation): records, sampling, losses, Adam
at 0.07, 1000 steps, batches of 64, 100 batches a class, temperature 8.

Not confirmed: everything spectral. The official classes for it are copies of ``all_layers``, and its
statistics stop at an undefined name; from them and the paper's outline come the graph (an edge between
neurons of adjacent layers, weighted by the product of their mean activations) and its eigenvectors. That
weights lose their sign, that the eigenvectors are the Laplacian's, and which of them are kept (those with
most of the activations' energy; ``coefficients: lowest`` keeps the lowest frequencies, which are those of the
least active neurons), and how many, are choices made here.

Differs: ``noise: cholesky`` draws from ``N(mu, Sigma)`` as the paper says; the code multiplies standard noise
by Sigma itself, ``noise: code``, whose samples have the covariance Sigma squared. A singular covariance
gets the least multiple of the identity that makes it factor; the code falls back on standard deviations
(``noise: deviation``). Inputs start from noise with the recorded mean and deviation of the inputs, where the
code has constants for each data set. Dropout filters keep torch's factor 1 / (1 - p). Logits are recorded and
matched as they are, where the code divides them by the temperature. The official student is trained by Adam
at 1e-5 for 30 epochs: that is the stage's ``train``.

Cost: ``steps`` passes forward and backward of the teacher for every generated batch, once; the inputs are
kept in the run directory. When not to use it: where any real inputs may be seen, even unlabeled ones; for
inputs that are not real numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.digests import mix, weights_digest
from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.select import weights
from ...core.task import answer
from ...core.types import Change, Fraction, Positive
from ...errors import InputError, ModelMismatch
from ...mechanisms.taps import Taps
from ...mechanisms.teacher import Live, logits_of, shared_teacher
from ...tasks._arrays import ArrayBatches
from ._generated import Calibration, Generated, digest_of, dropout_filters, dropouts
from ._records import Moments, Records, load_records, record_activations, save_records
from ._responses import mean_cross_entropy, require_classes
from ._spectrum import Which

__all__ = ["DataFree", "load_records", "record_activations", "save_records"]

Objective = Literal[
    "top_layer",
    "all_layers",
    "all_layers_dropout",
    "spectral_all_layers",
    "spectral_layer_pairs",
]
Noise = Literal["cholesky", "code", "deviation"]


def cholesky(covariance: Tensor) -> Tensor:
    """The lower factor L of ``Sigma + e I``, for the least e of 0, 1e-9, 1e-8, ... that allows one.

    Dead neurons and few samples make a covariance singular. e is relative to the mean variance.

    Args:
        covariance: ``(numbers, numbers)``.

    Raises:
        InputError: it is no covariance.

    Example:
        >>> cholesky(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))
        tensor([[2., 0.],
                [1., 1.]])
    """
    whole = covariance.double()
    identity = torch.eye(len(whole), dtype=torch.float64, device=whole.device)
    scale = whole.diagonal().mean().clamp_min(1e-30)
    for ridge in (0.0, *(10.0**power for power in range(-9, -1))):
        factor, failed = torch.linalg.cholesky_ex(whole + ridge * scale * identity)
        if not failed:
            found: Tensor = factor.to(covariance.dtype)
            return found
    raise InputError(
        "a recorded covariance is not positive: the activation records are damaged, or not finite. Record "
        "them anew."
    )


def mixer(moments: Moments, place: int, noise: Noise) -> Tensor:
    """What standard noise is multiplied by, ``(numbers, numbers)``, or ``(numbers,)`` where it stays apart.

    Args:
        moments: recorded.
        place: of the class among them.
        noise: see :class:`DataFree`.
    """
    if moments.covariance is None or noise == "deviation":
        return moments.deviation[place]
    covariance = moments.covariance[place]
    return covariance if noise == "code" else cholesky(covariance)


def sample_activations(
    mean: Tensor, mix_by: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Samples ``mu + M z`` with standard noise z, ``(count, numbers)``; their covariance is ``M M'``.

    Args:
        mean: mu, ``(numbers,)``.
        mix_by: M, see :func:`mixer`.
        count: of samples.
        generator: on the processor.
    """
    noise = torch.randn(count, len(mean), generator=generator)
    return mean + (noise * mix_by if mix_by.ndim == 1 else noise @ mix_by.t())


def reconstruction_loss(
    found: Sequence[Tensor], wanted: Sequence[Tensor], *, divide: bool
) -> Tensor:
    """``sum over layers of MSE(relu(a), relu(phi))``, each over the layer's number of neurons if wished.

    Args:
        found: phi of each layer, ``(batch, neurons)``.
        wanted: a, of the same shapes.
        divide: True for all layers, False for the top layer alone.

    Example:
        >>> ones, twos = torch.ones(3, 4), 2 * torch.ones(3, 4)
        >>> float(reconstruction_loss([twos], [ones], divide=True))
        0.25
    """
    terms = [
        F.mse_loss(F.relu(phi), F.relu(a)) / (phi.shape[1] if divide else 1)
        for phi, a in zip(found, wanted, strict=True)
    ]
    return torch.stack(terms).sum()


@dataclass(frozen=True)
class Targets:
    """What layers should hand over, drawn together.

    Attributes:
        places: in the teacher.
        values: of each place ``(batch, neurons)``.
    """

    places: tuple[str, ...]
    values: list[Tensor]


class Sampler:
    """Draws target activations of one class.

    Args:
        records: of the teacher.
        row: of the class in them.
        objective: which activations are drawn, and how.
        noise: see :class:`DataFree`.

    Raises:
        InputError: the records have not what the objective needs.
    """

    def __init__(self, records: Records, row: int, objective: Objective, noise: Noise) -> None:
        self.records, self.row = records, row
        self.spectral = objective.startswith("spectral")
        if self.spectral:
            self._check_spectra(objective)
            self.moments = [spectrum.moments for spectrum in records.spectra]
        else:
            self.places = records.places[-1:] if objective == "top_layer" else records.places
            self.moments = [records.moments[place] for place in self.places]
        self.mixers = [mixer(moments, row, noise) for moments in self.moments]

    def draw(self, count: int, generator: torch.Generator) -> list[Targets]:
        """Targets of a batch; those of one group of layers belong together."""
        drawn = [
            sample_activations(moments.mean[self.row], mix_by, count, generator)
            for moments, mix_by in zip(self.moments, self.mixers, strict=True)
        ]
        if not self.spectral:
            pairs = zip(self.places, drawn, strict=True)
            return [Targets((place,), [values]) for place, values in pairs]
        shapes, found = self.records.shapes, []
        for spectrum, coefficients in zip(self.records.spectra, drawn, strict=True):
            signal = coefficients @ spectrum.basis[self.row].t()
            sizes = [torch.Size(shapes[place]).numel() for place in spectrum.places]
            found.append(Targets(spectrum.places, list(signal.split(sizes, 1))))
        return found

    def _check_spectra(self, objective: Objective) -> None:
        groups = [spectrum.places for spectrum in self.records.spectra]
        together = groups == [tuple(self.records.places)]
        apart = len(groups) == len(self.records.places) - 1 and all(len(g) == 2 for g in groups)
        if not (together if objective == "spectral_all_layers" else apart):
            pairs = ", pairs=True" if objective == "spectral_layer_pairs" else ""
            raise InputError(
                f"data_free: the records hold no spectrum for {objective}: take them with "
                f"record_activations(..., spectrum=0.1{pairs})."
            )


def optimize_inputs(
    network: nn.Module,
    start: Tensor,
    targets: list[Targets],
    *,
    steps: int,
    lr: float,
    divide: bool,
) -> tuple[Tensor, float, float]:
    """Inputs whose activations come near the targets.

    Args:
        network: the teacher, frozen and in eval mode.
        start: first inputs.
        targets: what its layers should hand over.
        steps: of Adam.
        lr: its learning rate.
        divide: see :func:`reconstruction_loss`.

    Returns:
        The inputs on the processor, and the loss at the start and at the end.

    Raises:
        ModelMismatch: a target has another size than what the layer hands over.
    """
    taps = Taps(network, [place for target in targets for place in target.places])
    wanted = [value.to(start.device) for target in targets for value in target.values]
    places = [place for target in targets for place in target.places]

    def loss() -> Tensor:
        taps.open()
        answer(network, inputs)
        found = [taps[place].flatten(1) for place in places]
        _check_sizes(places, found, wanted)
        return reconstruction_loss(found, wanted, divide=divide)

    inputs = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([inputs], lr=lr)
    try:
        before = float(loss().detach())
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()
        after = float(loss().detach())
    finally:
        taps.remove()
    return inputs.detach().cpu(), before, after


@method
class DataFree(Method):
    """Learn from a teacher on inputs that were optimized to move it as its training data did.

    The task's training batches are replaced. Without ``records`` they are read once more, to take the
    records from, and the report says so: then nothing was data-free yet.

    Attributes:
        teacher: one network; see :meth:`~lilliput.core.run.Run.find_network`.
        records: a file of activation records; see :func:`record_activations`.
        objective: what the inputs are optimized for; see the module's docstring.
        places: in the teacher, in the order of its layers, where there are no ``records``; by default the
            outputs of all layers that have weights, and for ``top_layer`` those of the network.
        noise: ``"cholesky"`` samples from the recorded distribution, ``"code"`` as the official code does,
            ``"deviation"`` each neuron on its own.
        spectrum: fraction of the Fourier coefficients that is recorded.
        coefficients: which part of them: those of most ``"energy"``, or of ``"lowest"`` frequency.
        samples: training samples to record from, at least, where there are no ``records``; None for all.
        batches: generated batches a class.
        batch_size: inputs in each of them, and later in a training batch.
        steps: of Adam on each batch of inputs.
        lr: Adam's learning rate.
        temperature: of both softmaxes of the student's loss.

    Example:
        >>> DataFree(objective="all_layers").steps
        1000
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False

    teacher: Any = "original"
    records: str | None = None
    objective: Objective = "all_layers"
    places: list[str] = Field(default_factory=list)
    noise: Noise = "cholesky"
    spectrum: Fraction = 0.1
    coefficients: Which = "energy"
    samples: int | None = Field(default=None, ge=2)
    batches: int = Field(default=100, ge=1)
    batch_size: int = Field(default=64, ge=1)
    steps: int = Field(default=1000, ge=1)
    lr: Positive = 0.07
    temperature: Positive = 8.0

    _teacher: Live = PrivateAttr()
    _made: Generated = PrivateAttr()

    @classmethod
    def example(cls) -> DataFree:
        """Few inputs and steps."""
        return cls(batches=2, batch_size=12, steps=5)

    def attach(self, run: Run) -> None:
        """Find the teacher; take or read the records; make the inputs, unless they are there already.

        Raises:
            InputError: the records lack a class or what the objective needs, or it needs dropout that the
                teacher has not.
            ModelMismatch: the records do not fit the teacher.
        """
        self._teacher = shared_teacher(run, self.teacher)
        if len(self._teacher.networks) != 1:
            raise InputError("data_free: an ensemble has no common activations: name one teacher.")
        network = self._teacher.networks[0]
        if self.objective == "all_layers_dropout" and not dropouts(network):
            raise InputError(
                "data_free: the teacher has no dropout layer that drops anything, which all_layers_dropout "
                "needs: take all_layers."
            )
        self._made = self._kept_or_made(run, network)
        self._teacher.check()

    def data(self, run: Run, batches: Iterable[Any]) -> Iterable[Any]:
        """The generated inputs with the classes that they were made for."""
        made = self._made
        shuffled = ArrayBatches(made.inputs, made.labels, self.batch_size, shuffle=True)
        return shuffled.to(run.device)

    def task_weight(self, run: Run) -> float:
        """No label was ever given to these inputs: there is only the teacher."""
        return 0.0

    def loss(self, run: Run) -> dict[str, Tensor]:
        """The cross-entropy to the teacher's softened outputs."""
        taught, own = self._teacher.outputs(run.batch)[0], logits_of(run.output, "the student")
        if taught.shape != own.shape:
            raise ModelMismatch(
                f"data_free: the teacher's outputs have the shape {tuple(taught.shape)}, the student's "
                f"{tuple(own.shape)}. Both need the same classes."
            )
        target = F.log_softmax(taught / self.temperature, -1)
        return {"data_free": mean_cross_entropy(own / self.temperature, target)}

    def finish(self, run: Run) -> list[Change]:
        """How many inputs stood for the training data, and how well they move the teacher."""
        self._teacher.check()
        made, name = self._made, self.method_name()
        source = self.records or "the task's own training data, so this stage was not data-free"
        return [
            Change("training data", "inputs", 0, len(made.labels), name, f"records from {source}"),
            Change("reconstruction", "loss", made.before, made.after, name, self.objective),
            Change("generated inputs", "teacher's accuracy on them, %", 0.0, made.accuracy, name),
        ]

    # -- records and inputs -------------------------------------------------------------------

    def _kept_or_made(self, run: Run, network: nn.Module) -> Generated:
        """The generated inputs: from the run directory, or made now and kept there."""
        known = digest_of(self.records) if self.records else f"{run.seed} {run.stage}"
        settings = self.model_dump(exclude={"teacher", "records", "temperature"})
        key = mix(weights_digest(network), known, json.dumps(settings), run.seed, run.stage)
        path = None
        if run.directory is not None:
            path = run.directory / f"generated-{run.stage}-{run.key_of(self)}.safetensors"
        kept = Generated.load(path, str(key))
        if kept is not None:
            return kept
        # What is random here must not depend on, nor change, the generator that other methods draw from.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(run.seed, run.stage, "data_free"))
            made = self._generate(run, network, self._records(run, network))
        if path is not None:
            made.save(path, str(key))
        return made

    def _records(self, run: Run, network: nn.Module) -> Records:
        if self.records:
            return load_records(self.records)
        spectral = self.objective.startswith("spectral")
        return record_activations(
            network,
            Calibration(run, self.samples),
            self.places or default_places(network, self.objective),
            spectrum=self.spectrum if spectral else None,
            pairs=self.objective == "spectral_layer_pairs",
            coefficients=self.coefficients,
        )

    def _generate(self, run: Run, network: nn.Module, records: Records) -> Generated:
        """All batches of all classes."""
        generator = torch.Generator().manual_seed(mix(run.seed, run.stage, "inputs"))
        classes = self._classes(network, records, run.device)
        parts = []
        for label in range(classes):
            sampler = Sampler(records, records.place_of(label), self.objective, self.noise)
            for _ in range(self.batches):
                targets = sampler.draw(self.batch_size, generator)
                start = torch.randn(self.batch_size, *records.input_shape, generator=generator)
                start = records.input_mean + records.input_deviation * start
                parts.append((label, *self._optimized(network, start.to(run.device), targets)))
        return self._collected(network, parts, run.device)

    def _optimized(
        self, network: nn.Module, start: Tensor, targets: list[Targets]
    ) -> tuple[Tensor, float, float]:
        filters = self.objective == "all_layers_dropout"
        with dropout_filters(network) if filters else nullcontext():
            return optimize_inputs(
                network,
                start,
                targets,
                steps=self.steps,
                lr=self.lr,
                divide=self.objective != "top_layer",
            )

    def _classes(self, network: nn.Module, records: Records, device: torch.device) -> int:
        """How many classes the teacher knows; it must take inputs of the recorded shape."""
        with torch.no_grad():
            outputs = answer(network, torch.zeros(2, *records.input_shape, device=device))
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            raise ModelMismatch(
                "data_free: the teacher should give logits (batch, classes), not "
                f"{tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__}."
            )
        require_classes(outputs, 1, "data_free")
        return outputs.shape[1]

    def _collected(
        self, network: nn.Module, parts: list[tuple[int, Tensor, float, float]], device: Any
    ) -> Generated:
        labels = torch.tensor([label for label, *_ in parts]).repeat_interleave(self.batch_size)
        inputs = torch.cat([part[1] for part in parts])
        with torch.no_grad():
            said = [answer(network, part.to(device)).argmax(1).cpu() for part in inputs.split(256)]
        right = (torch.cat(said) == labels).float().mean()
        before = sum(part[2] for part in parts) / len(parts)
        after = sum(part[3] for part in parts) / len(parts)
        return Generated(inputs, labels, before, after, 100 * float(right))


def default_places(network: nn.Module, objective: Objective) -> list[str]:
    """The outputs of all layers with weights, in the order of the modules, or of the network."""
    if objective == "top_layer":
        return [""]
    # An attention multiplies by the weights of its parts without calling them.
    attentions = [n for n, m in network.named_modules() if isinstance(m, nn.MultiheadAttention)]
    layers = dict.fromkeys(weight.layer for weight in weights(network))
    return [layer for layer in layers if not layer.startswith(tuple(f"{a}." for a in attentions))]


def _check_sizes(places: list[str], found: list[Tensor], wanted: list[Tensor]) -> None:
    for place, phi, a in zip(places, found, wanted, strict=True):
        if phi.shape != a.shape:
            raise ModelMismatch(
                f"data_free: {place or 'the network'!r} hands over {phi.shape[1]} numbers a sample, and the "
                f"records have {a.shape[1]}: they belong to another teacher."
            )
