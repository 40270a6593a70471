"""Records of activations: what data-free distillation needs to know of a training set.

They are taken where the data are, kept in a safetensors file, and are all that leaves that site: of each
class and place in the network the mean, the standard deviation and the covariance of the activations.

The surprising rule: a place with very many neurons (early convolutions) has no covariance in the records,
whose size would be their square; its neurons are sampled independently of each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ...core.files import unfinished
from ...core.select import example_device
from ...core.task import answer, evaluation, move, read
from ...core.types import Batch
from ...errors import CorruptArtifact, InputError
from ...mechanisms.taps import Taps
from ._spectrum import Which, activation_graph, check_graph, fourier_basis, kept_columns

#: A place with more neurons gets no covariance.
LARGEST_COVARIANCE = 2500
_KEY = "lilliput.activation_records"


@dataclass(frozen=True)
class Moments:
    """Of each class, in the order of the labels, statistics of some numbers.

    Attributes:
        mean: ``(classes, numbers)``.
        deviation: standard deviation, with one degree of freedom taken, ``(classes, numbers)``.
        covariance: likewise, ``(classes, numbers, numbers)``; None where it would be too large.
    """

    mean: Tensor
    deviation: Tensor
    covariance: Tensor | None


@dataclass(frozen=True)
class Spectrum:
    """Activations of several places together, as coefficients of a graph's Fourier transform.

    Attributes:
        places: whose activations, one after the other, are the signal.
        basis: of each class, orthonormal columns, ``(classes, neurons, coefficients)``.
        moments: of the coefficients.
    """

    places: tuple[str, ...]
    basis: Tensor
    moments: Moments


@dataclass(frozen=True)
class Records:
    """What is known of a training set.

    Attributes:
        labels: the classes, ascending.
        counts: samples of each class.
        places: in a network, see :mod:`lilliput.mechanisms.taps`, in the order of the layers.
        shapes: of one sample's activation at each place.
        moments: by place.
        spectra: of all places together, or of adjacent pairs; empty where they were not asked for.
        input_shape: of one sample.
        input_mean: over all numbers of all samples.
        input_deviation: likewise.
    """

    labels: list[int]
    counts: list[int]
    places: list[str]
    shapes: dict[str, tuple[int, ...]]
    moments: dict[str, Moments]
    spectra: list[Spectrum]
    input_shape: tuple[int, ...]
    input_mean: float
    input_deviation: float

    def place_of(self, label: int) -> int:
        """The row of a class in all statistics.

        Raises:
            InputError: the class has no records.
        """
        if label not in self.labels:
            raise InputError(
                f"there are no activation records of class {label}, only of {self.labels}: nothing can be "
                "sampled for it. Record with samples of every class that the teacher knows."
            )
        return self.labels.index(label)


def record_activations(
    network: nn.Module,
    batches: Iterable[Any],
    places: Sequence[str],
    *,
    file: str | Path | None = None,
    spectrum: float | None = None,
    pairs: bool = False,
    coefficients: Which = "energy",
) -> Records:
    """Take the records of a network on labeled data; call it where the data are.

    Args:
        network: the teacher; run in eval mode, not changed.
        batches: of ``(inputs, labels)``, one tensor of floats and int64 ``(batch,)``.
        places: whose activations, in the order of the layers; see :mod:`lilliput.mechanisms.taps`.
        file: a safetensors file to write them to.
        spectrum: also record the Fourier coefficients of all places together, this fraction of them.
        pairs: of each two adjacent places instead of all together.
        coefficients: which part of them, those of most ``"energy"`` or of ``"lowest"`` frequency.

    Returns:
        The records, in 32-bit floats as in the file.

    Raises:
        InputError: labels or inputs are of another kind, or a class has a single sample.
        EmptyData: there is no batch.

    Example:
        >>> batches = [(torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1]))]
        >>> records = record_activations(nn.Sequential(nn.Linear(4, 3)), batches, ["0"])
        >>> records.labels, records.moments["0"].covariance.shape
        ([0, 1], torch.Size([2, 3, 3]))
    """
    places = list(dict.fromkeys(places))
    groups = _groups(places, pairs) if spectrum is not None else []
    shapes: dict[str, tuple[int, ...]] = {}
    sums = {key: _Sums() for key in [*((place,) for place in places), *groups]}
    inputs = _Sums()
    for batch, seen in _watched(network, batches, places):
        flat = {place: seen[place].flatten(1).double() for place in places}
        shapes = {place: tuple(seen[place].shape[1:]) for place in places}
        for group in groups:
            check_graph(sum(flat[place].shape[1] for place in group))
        for key, total in sums.items():
            total.add(torch.cat([flat[place] for place in key], 1), batch.target)
        numbers = batch.inputs.double().reshape(-1, 1)
        inputs.add(numbers, numbers.new_zeros(len(numbers), dtype=torch.int64))
        input_shape = tuple(batch.inputs.shape[1:])
    labels = sorted(sums[(places[0],)].counts)
    whole = inputs.moments([0])
    records = Records(
        labels=labels,
        counts=[sums[(places[0],)].counts[label] for label in labels],
        places=places,
        shapes=shapes,
        moments={place: _single(sums[(place,)].moments(labels)) for place in places},
        spectra=[
            _spectrum(group, shapes, sums[group].moments(labels), spectrum or 1.0, coefficients)
            for group in groups
        ],
        input_shape=input_shape,
        input_mean=float(whole.mean),
        input_deviation=float(whole.deviation),
    )
    if file is not None:
        save_records(records, file)
    return records


# -- the file -----------------------------------------------------------------------------------


def save_records(records: Records, file: str | Path) -> None:
    """Write records as a safetensors file: tensors by place, everything else as JSON in the metadata."""
    tensors: dict[str, Tensor] = {}
    for number, place in enumerate(records.places):
        tensors |= _tensors(f"place.{number}", records.moments[place])
    for number, spectrum in enumerate(records.spectra):
        tensors |= _tensors(f"spectrum.{number}", spectrum.moments)
        tensors[f"spectrum.{number}.basis"] = spectrum.basis
    about = {
        "labels": records.labels,
        "counts": records.counts,
        "places": records.places,
        "shapes": [list(records.shapes[place]) for place in records.places],
        "spectra": [list(spectrum.places) for spectrum in records.spectra],
        "input": [list(records.input_shape), records.input_mean, records.input_deviation],
    }
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(file)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(whole, temporary, {_KEY: json.dumps(about)})
    temporary.replace(file)


def load_records(file: str | Path) -> Records:
    """Read what :func:`save_records` wrote.

    Raises:
        InputError: there is no such file.
        CorruptArtifact: it holds no activation records.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(
            f"there is no file {file} with activation records: make it with record_activations(teacher, "
            "batches, places, file=...), where the data are."
        )
    try:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            about = json.loads((opened.metadata() or {})[_KEY])
            return _put_together(about, safetensors.torch.load_file(file))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CorruptArtifact(
            f"{file} does not hold whole activation records ({error}): record them anew."
        ) from error


def _tensors(name: str, moments: Moments) -> dict[str, Tensor]:
    found = {f"{name}.mean": moments.mean, f"{name}.deviation": moments.deviation}
    if moments.covariance is not None:
        found[f"{name}.covariance"] = moments.covariance
    return found


def _put_together(about: dict[str, Any], tensors: dict[str, Tensor]) -> Records:
    def moments(name: str) -> Moments:
        covariance = tensors.get(f"{name}.covariance")
        return Moments(tensors[f"{name}.mean"], tensors[f"{name}.deviation"], covariance)

    places = about["places"]
    shape, mean, deviation = about["input"]
    return Records(
        labels=about["labels"],
        counts=about["counts"],
        places=places,
        shapes={p: tuple(s) for p, s in zip(places, about["shapes"], strict=True)},
        moments={place: moments(f"place.{n}") for n, place in enumerate(places)},
        spectra=[
            Spectrum(tuple(group), tensors[f"spectrum.{n}.basis"], moments(f"spectrum.{n}"))
            for n, group in enumerate(about["spectra"])
        ],
        input_shape=tuple(shape),
        input_mean=mean,
        input_deviation=deviation,
    )


# -- taking them --------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Sums over the samples of each class, in double precision, from which all moments follow."""

    counts: dict[int, int] = field(default_factory=dict)
    first: dict[int, Tensor] = field(default_factory=dict)
    second: dict[int, Tensor] = field(default_factory=dict)

    def add(self, values: Tensor, labels: Tensor) -> None:
        """Take in values ``(batch, numbers)`` of samples with labels ``(batch,)``."""
        full = values.shape[1] <= LARGEST_COVARIANCE
        for label in labels.unique().tolist():
            own = values[labels == label]
            squares = own.t() @ own if full else own.square().sum(0)
            known = label in self.counts
            self.counts[label] = self.counts.get(label, 0) + len(own)
            self.first[label] = self.first[label] + own.sum(0) if known else own.sum(0)
            self.second[label] = self.second[label] + squares if known else squares

    def moments(self, labels: Sequence[int]) -> Moments:
        """In double precision."""
        lonely = [label for label in labels if self.counts[label] < 2]
        if lonely:
            raise InputError(
                f"a single sample of class {lonely[0]}: its activations have no covariance. Record at least "
                "two samples a class, better many more."
            )
        count = torch.tensor([float(self.counts[label]) for label in labels], dtype=torch.float64)
        mean = torch.stack([self.first[label].cpu() for label in labels]) / count[:, None]
        second = torch.stack([self.second[label].cpu() for label in labels])
        spare = count / (count - 1)
        if second.ndim == 2:
            square = (second / count[:, None] - mean.square()).clamp_min(0) * spare[:, None]
            return Moments(mean, square.sqrt(), None)
        outer = mean[:, :, None] * mean[:, None, :]
        covariance = (second / count[:, None, None] - outer) * spare[:, None, None]
        variance = covariance.diagonal(dim1=1, dim2=2).clamp_min(0)
        return Moments(mean, variance.sqrt(), covariance)


def _watched(network: nn.Module, batches: Iterable[Any], places: Sequence[str]) -> Any:
    """Each batch with what the network handed over at the places."""
    if not places:
        raise InputError("name at least one place of the network whose activations are recorded.")
    device = example_device(network)
    taps = Taps(network, places)
    try:
        with evaluation(network), torch.no_grad():
            for item in read(batches, "the batches to record activations of"):
                batch = move(item, device)
                _check(batch)
                taps.open()
                answer(network, batch.inputs)
                yield batch, taps
    finally:
        taps.remove()


def _check(batch: Batch) -> None:
    inputs, labels = batch.inputs, batch.target
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(
            f"data-free distillation optimizes inputs, which must be one tensor of floats, not {kind}."
        )
    known = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    if not known:
        raise InputError(
            "activation records are taken class by class, and the batches' targets are no class labels "
            "(int64, one a sample)."
        )


def _groups(places: list[str], pairs: bool) -> list[tuple[str, ...]]:
    if len(places) < 2:
        raise InputError(
            "the spectral objectives look at several layers together: name at least two places."
        )
    return list(pairwise(places)) if pairs else [tuple(places)]


def _spectrum(
    group: tuple[str, ...],
    shapes: dict[str, tuple[int, ...]],
    joint: Moments,
    kept: float,
    which: Which,
) -> Spectrum:
    """The graph's basis for each class, and the moments of the coefficients, ``U' mu`` and ``U' Sigma U``."""
    sizes = [torch.Size(shapes[place]).numel() for place in group]
    assert joint.covariance is not None  # a graph that is not too large is small enough for one
    bases = torch.stack(
        [
            kept_columns(
                fourier_basis(activation_graph(mean.split(sizes))), mean, sigma, kept, which
            )
            for mean, sigma in zip(joint.mean, joint.covariance, strict=True)
        ]
    )
    covariance = bases.mT @ joint.covariance @ bases
    variance = covariance.diagonal(dim1=1, dim2=2).clamp_min(0)
    mean = (bases.mT @ joint.mean[:, :, None]).squeeze(-1)
    return Spectrum(group, bases.float(), _single(Moments(mean, variance.sqrt(), covariance)))


def _single(moments: Moments) -> Moments:
    covariance = None if moments.covariance is None else moments.covariance.float()
    return Moments(moments.mean.float(), moments.deviation.float(), covariance)
