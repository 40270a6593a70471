"""Three tiny classifiers, each with data that it can learn: what the contract is checked on.

Methods that only detectors can use are checked on a tiny detector instead.

The surprising rule: the batches are shuffled with torch's global generator, and every network has
dropout, so a run that does not restore the random state after an interruption is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..architectures.detector import detector
from ..core.digests import mix
from ..core.method import Method
from ..core.task import Task, accuracy
from ..core.types import Batch
from ..mechanisms.detection import detection_loss
from ..tasks.voc import MeanAveragePrecision

CLASSES = 3


class ShuffledBatches:
    """Batches of a data set in memory, in a new order every time they are read.

    Args:
        inputs: shape ``(samples, ...)``.
        target: shape ``(samples, ...)``.
        size: samples a batch.
    """

    def __init__(self, inputs: Tensor, target: Tensor, size: int = 32) -> None:
        self.inputs, self.target, self.size = inputs, target, size

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        for rows in torch.randperm(len(self.inputs)).split(self.size):
            yield Batch(self.inputs[rows], self.target[rows], rows)


def make_batches(
    *shape: int, samples: int = 128, size: int = 32, seed: int = 0
) -> tuple[ShuffledBatches, list[Batch]]:
    """Random inputs of one sample's shape with labels that a linear layer can learn.

    Returns:
        Shuffled batches to train on, and a list of other batches to evaluate on.

    Example:
        >>> train, test = make_batches(8, samples=64)
        >>> len(train), test[0].inputs.shape
        (2, torch.Size([32, 8]))
    """
    generator = torch.Generator().manual_seed(mix("batches", *shape, seed))
    inputs = torch.randn(2 * samples, *shape, generator=generator)
    direction = torch.randn(inputs[0].numel(), CLASSES, generator=generator)
    target = (inputs.flatten(1) @ direction).argmax(1)
    index = torch.arange(samples)
    test = zip(
        inputs[samples:].split(size), target[samples:].split(size), index.split(size), strict=True
    )
    return ShuffledBatches(inputs[:samples], target[:samples], size), [
        Batch(*part) for part in test
    ]


class TinyTransformer(nn.Module):
    """One encoder layer of width 8 over six tokens of eight numbers; input ``(batch, 6, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, 3)``."""
        logits: Tensor = self.head(self.encoder(self.embed(tokens)).mean(1))
        return logits


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 24),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, CLASSES),
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


@dataclass(frozen=True)
class TinyNetwork:
    """A network of the contract.

    Attributes:
        name: of the kind of network.
        make: builds it, with random weights.
        shape: of one sample.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def build(self, seed: int = 0) -> nn.Module:
        """The network, always with the same weights; the global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix("network", self.name, seed))
            return self.make()

    def task(self) -> Task:
        """Classification of random inputs into three classes."""
        train, test = make_batches(*self.shape)
        return Task(train, test, test, nn.functional.cross_entropy, accuracy, f"tiny {self.name}")


NETWORKS = (
    TinyNetwork("mlp", _mlp, (12,)),
    TinyNetwork("cnn", _cnn, (1, 8, 8)),
    TinyNetwork("transformer", TinyTransformer, (6, 8)),
)


@dataclass(frozen=True)
class TinyDetector(TinyNetwork):
    """A network of the contract that finds squares, of two classes."""

    def task(self) -> Task:
        """Detection of one bright square in noise; its channel is its class."""
        (x, boxes), (seen, known) = (_squares(self.shape, count, count) for count in (32, 16))
        test = [Batch(seen, known)]
        metric = MeanAveragePrecision(classes=2)
        return Task(
            ShuffledBatches(x, boxes, 8), test, test, detection_loss, metric, "tiny squares"
        )


def _squares(shape: tuple[int, ...], samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images, and of each its box, its class from 1, and that it is not difficult."""
    generator = torch.Generator().manual_seed(mix("squares", seed))
    images = torch.randn(samples, *shape, generator=generator) / 4
    corner = torch.randint(2, 17, (samples, 2), generator=generator)
    target = torch.zeros(samples, 1, 6)
    for number, (x, y) in enumerate(corner.tolist()):
        images[number, number % 2, y : y + 12, x : x + 12] += 2.0
        target[number, 0] = torch.tensor([x, y, x + 12, y + 12, 1 + number % 2, 0])
    return images, target


def _detector() -> nn.Module:
    return detector(width=4, classes=2, sizes=(8, 14), proposals=16, found=8)


DETECTORS = (TinyDetector("detector", _detector, (3, 32, 32)),)


def networks_for(*methods: Method) -> tuple[TinyNetwork, ...]:
    """The tiny networks on which methods are tried, alone or together.

    Example:
        >>> from lilliput.methods import Codebook
        >>> [network.name for network in networks_for(Codebook(bits=2))]
        ['mlp', 'cnn', 'transformer']
    """
    detect = any(type(method).example_task == "detection" for method in methods)
    return DETECTORS if detect else NETWORKS
