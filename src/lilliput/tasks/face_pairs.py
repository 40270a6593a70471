"""Pairs of faces: the same person, or two? Of people who were not there in training.

After Transferring and Compressing Convolutional Neural Networks for Face Representations (Grundström, Chen,
Ljungqvist, Åström; ICIAR 2016), of which only the abstract could be had: a network is fine-tuned on faces,
compressed, and trained on as a Siamese one.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.digests import mix
from ..core.registry import task
from ..core.task import Task
from ..errors import InputError, UnknownName
from ._arrays import ArrayBatches
from ._faces import faces
from ._images import Images
from ._verification import Verification, contrastive_loss

LESSONS = ("pairs", "persons")


@task
def face_pairs(
    learn: str = "pairs",
    source: str = "drawn",
    folder: str | None = None,
    size: int = 28,
    channels: int = 1,
    margin: float = 1.0,
    measure: str = "accuracy",
    pairs_each: int = 4,
    held_out: float = 0.2,
    batch_size: int = 64,
    test_batch_size: int = 256,
) -> Task:
    """Pairs of faces, the same person or two; drawn ones, scikit-learn's Olivetti faces, or your own folder.

    Persons are split with a fixed seed into those of training, of validation and of test, so that a score is
    about strangers. A batch of pairs is ``(2 pairs, channels, size, size)``, rows 2k and 2k + 1 being pair k,
    with the target 1 for the same person and 0 for two: any network for single images will do, and its
    output is the embedding. Each picture begins as many pairs of one kind as of the other.

    Args:
        learn: ``"pairs"``, by the contrastive loss; ``"persons"``, by naming the person of single pictures:
            the network then needs an output for each person of training, and is scored on pairs all the same.
        source: ``"drawn"``, ``"olivetti"`` or ``"folder"``. Drawn faces need nothing, and figures on them say
            nothing of real ones.
        folder: of the source ``folder``: a folder for each person with pictures inside.
        size: pixels a side; pictures are brought to it.
        channels: 1 for grey, 3 for color.
        margin: of the contrastive loss, in the unit of the embedding: that of logits is several units long.
        measure: the score: ``"accuracy"`` of verification in percent, its threshold chosen on nine tenths of
            the pairs for the last tenth; or ``"equal_error_rate"``, 100 minus that rate.
        pairs_each: pairs of each kind that a picture begins.
        held_out: part of the persons for validation, and again for test.
        batch_size: training pairs, or pictures, a batch.
        test_batch_size: pairs a batch of validation and test.

    Raises:
        DataNotFound: the pictures are nowhere.
        InputError: a number is out of range, or too few persons have two pictures.
        UnknownName: no such source, lesson or measure.
        MissingDependency: pillow or scikit-learn is not installed.

    Example:
        >>> batch = next(iter(face_pairs(batch_size=8).train))
        >>> batch.inputs.shape, batch.target.shape
        (torch.Size([16, 1, 28, 28]), torch.Size([8]))
    """
    if learn not in LESSONS:
        raise UnknownName("what face_pairs learns", learn, LESSONS)
    if margin <= 0 or pairs_each < 1:
        raise InputError(f"face_pairs: margin={margin}, pairs_each={pairs_each}: both are above 0.")
    images = _with_partners(faces(source, folder, size, channels))
    train, *held = _split(images, held_out)
    validation, test = (_pairs(part, pairs_each, test_batch_size, shuffle=False) for part in held)
    naming = learn == "persons"
    return Task(
        _persons(train, batch_size)
        if naming
        else _pairs(train, pairs_each, batch_size, shuffle=True),
        validation,
        test,
        cross_entropy if naming else functools.partial(contrastive_loss, margin=margin),
        Verification(measure),
        f"pairs of faces ({source})",
        "accuracy of verification, %" if measure == "accuracy" else "100 - equal error rate, %",
    )


def draw_pairs(labels: Tensor, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of two pictures a pair ``(pairs, 2)``, and whether both are of one person.

    Args:
        labels: persons ``(pictures,)``, each of at least two pictures, and at least two.
        each: pairs of either kind that a picture begins.
        seed: of the draw.

    Example:
        >>> pairs, same = draw_pairs(torch.tensor([0, 0, 1, 1]), 2, seed=0)
        >>> len(pairs), int(same.sum()), bool((pairs[:, 0] != pairs[:, 1]).all())
        (16, 8, True)
    """
    generator = torch.Generator().manual_seed(seed)
    begin = torch.arange(len(labels)).repeat_interleave(each)
    ends = _partners(labels, begin, generator)
    pairs = torch.stack([torch.cat([begin, begin]), torch.cat(ends)], 1)
    same = torch.tensor([1, 0]).repeat_interleave(len(begin))
    order = torch.randperm(len(pairs), generator=generator)
    return pairs[order], same[order]


def _partners(labels: Tensor, begin: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each of the pictures ``begin`` another one of the same person, and one of somebody else.

    Pictures in the order of their persons: those of one person are a run, and a partner is a step
    along it, or a step from its end round to its beginning.
    """
    ordered = labels.argsort(stable=True)
    place = ordered.argsort()[begin]
    _, person, counts = labels.unique(return_inverse=True, return_counts=True)
    count = counts[person[begin]]
    start = (counts.cumsum(0) - counts)[person[begin]]
    chance = torch.rand(2, len(begin), generator=generator, dtype=torch.float64)
    own = 1 + (chance[0] * (count - 1)).long()
    strange = (chance[1] * (len(labels) - count)).long()
    alike = start + (place - start + own) % count
    other = (start + count + strange) % len(labels)
    return ordered[alike], ordered[other]


def _with_partners(images: Images) -> Images:
    """Only pictures of persons that have at least two; persons are numbered anew."""
    _, place, count = images.labels.unique(return_inverse=True, return_counts=True)
    kept = images.take((count[place] > 1).nonzero()[:, 0])
    return Images(kept.inputs, kept.labels.unique(return_inverse=True)[1])


def _split(images: Images, held_out: float) -> list[Images]:
    persons = int(images.labels.max()) + 1 if len(images.labels) else 0
    held = round(held_out * persons)
    if held < 2 or persons - 2 * held < 2:
        raise InputError(
            f"face_pairs: held_out={held_out} of {persons} persons with two pictures or more leaves fewer "
            "than two for training, validation or test. Give more persons, or another part."
        )
    order = torch.randperm(persons, generator=torch.Generator().manual_seed(mix("persons")))
    parts = order.split([persons - 2 * held, held, held])
    return [images.take(torch.isin(images.labels, part).nonzero()[:, 0]) for part in parts]


def _persons(images: Images, size: int) -> ArrayBatches:
    """Single pictures with the number of their person, from 0."""
    labels = images.labels.unique(return_inverse=True)[1]
    return ArrayBatches(images.inputs, labels, size, shuffle=True, prepare=_normalized)


def _pairs(images: Images, each: int, size: int, *, shuffle: bool) -> ArrayBatches:
    """Pairs as numbers of pictures, which are looked up a batch at a time."""
    pairs, same = draw_pairs(images.labels, each, mix("pairs", len(images.labels)))

    @functools.cache
    def pictures(device: torch.device) -> Tensor:
        return images.inputs.to(device)

    def look_up(numbers: Tensor) -> Tensor:
        return _normalized(pictures(numbers.device)[numbers.flatten()])

    return ArrayBatches(pairs, same, size, shuffle=shuffle, prepare=look_up)


def _normalized(pictures: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]."""
    return pictures * 2.0 - 1.0
