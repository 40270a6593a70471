"""Pictures of faces with the number of the person, from where they are to be had.

No package brings faces of several persons with it: scikit-image's subset of Labeled Faces in the Wild has no
names, scikit-learn downloads the Olivetti faces. So there are three sources: a folder of the user's own,
scikit-learn's Olivetti faces where it has downloaded them before, and *drawn* faces, which need nothing. A
score on drawn faces says that a recipe works, and nothing of real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..core.digests import mix
from ..core.optional import optional
from ..errors import DataNotFound, InputError, UnknownName
from ._files import BILINEAR, Kind
from ._images import Images

SOURCES = ("drawn", "olivetti", "folder")
_ENDINGS = (".jpg", ".jpeg", ".png", ".pgm", ".bmp")
_KIND = Kind("a picture", "Repair it, or take it away.")
#: Of drawn faces.
PERSONS, PICTURES = 60, 12


def faces(source: str, folder: str | None, size: int, channels: int) -> Images:
    """All pictures ``(N, channels, size, size)`` in [0, 1], persons numbered from 0.

    Args:
        source: one of :data:`SOURCES`.
        folder: of the source ``folder``: a folder for each person with pictures inside, as Labeled Faces in
            the Wild has it.
        size: pixels a side.
        channels: 1 for grey, 3 for color.

    Raises:
        UnknownName: no such source.
        InputError: a number is out of range, a folder is missing from the settings, a picture is damaged.
        DataNotFound: the pictures are nowhere.
        MissingDependency: pillow or scikit-learn is not installed.
    """
    if source not in SOURCES:
        raise UnknownName("source of face_pairs", source, SOURCES)
    if size < 8 or channels not in (1, 3):
        raise InputError(
            f"face_pairs: size={size}, channels={channels}: give at least 8, and 1 or 3."
        )
    if (source == "folder") != (folder is not None):
        raise InputError(
            f"face_pairs: source={source!r} and folder={folder!r}: one asks for the other."
        )
    if source == "folder":
        return _from_folder(Path(str(folder)).expanduser(), size, channels)
    inputs, labels = drawn_faces(size) if source == "drawn" else _olivetti(size)
    return Images(inputs.expand(-1, channels, -1, -1).contiguous(), labels)


def _olivetti(size: int) -> tuple[Tensor, Tensor]:
    """40 persons, 10 grey pictures each, where scikit-learn has them."""
    sets: Any = optional("sklearn.datasets", "scikit-learn", "data", "the Olivetti faces")
    try:
        found = sets.fetch_olivetti_faces(download_if_missing=False)
    except OSError as error:
        raise DataNotFound(
            "scikit-learn has not downloaded the Olivetti faces on this machine. Call "
            "sklearn.datasets.fetch_olivetti_faces() once, or use another source: a folder, or drawn faces."
        ) from error
    pictures = torch.from_numpy(found.images)[:, None].float()
    return _resized(pictures, size), torch.from_numpy(found.target).long()


def _resized(pictures: Tensor, size: int) -> Tensor:
    return interpolate(pictures, (size, size), mode="bilinear", antialias=True)


def _from_folder(folder: Path, size: int, channels: int) -> Images:
    persons = [p for p in sorted(folder.iterdir()) if p.is_dir()] if folder.is_dir() else []
    named = [(number, file) for number, person in enumerate(persons) for file in _files(person)]
    if not named:
        raise DataNotFound(
            f"{folder} has no folders with pictures ({', '.join(_ENDINGS)}): put each person's into one of "
            "its own, as Labeled Faces in the Wild has them."
        )
    pictures = torch.stack([_picture(file, size, channels) for _, file in named])
    return Images(pictures, torch.tensor([number for number, _ in named]))


def _files(person: Path) -> Iterator[Path]:
    return (file for file in sorted(person.iterdir()) if file.suffix.lower() in _ENDINGS)


def _picture(file: Path, size: int, channels: int) -> Tensor:
    with _KIND.picture(file, file) as image:
        colors = image.convert("RGB" if channels == 3 else "L").resize((size, size), BILINEAR)
        pixels = np.array(colors, dtype=np.float32)
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1) / 255.0


# -- drawn faces -----------------------------------------------------------------------------------


def drawn_faces(
    size: int, persons: int = PERSONS, pictures: int = PICTURES
) -> tuple[Tensor, Tensor]:
    """Faces of ellipses, always the same ones; a person has features, a picture light, place and mood.

    Returns:
        Pictures ``(persons x pictures, 1, size, size)`` in [0, 1], and numbers of the persons.

    Example:
        >>> inputs, labels = drawn_faces(16, persons=2, pictures=3)
        >>> inputs.shape, labels.tolist()
        (torch.Size([6, 1, 16, 16]), [0, 0, 0, 1, 1, 1])
    """
    drawn = torch.Generator().manual_seed(mix("drawn faces"))
    features = torch.rand(persons, 9, generator=drawn).repeat_interleave(pictures, 0)
    mood = torch.randn(persons * pictures, 5, generator=drawn)
    noise = torch.randn(persons * pictures, size, size, generator=drawn)
    found = _draw(features.T[..., None, None], mood.T[..., None, None], size) + 0.15 * noise
    return found.clamp(0.0, 1.0)[:, None], torch.arange(persons).repeat_interleave(pictures)


def _draw(features: Tensor, mood: Tensor, size: int) -> Tensor:
    """One picture for each column of features in [0, 1] and moods around 0."""
    wide, tall, apart, height, eye, nose, mouth, hair, skin = features
    right, down, light, smile, turn = mood
    line = torch.linspace(-1.0, 1.0, size)
    x, y = line[None, None, :] - 0.12 * right, line[None, :, None] - 0.12 * down

    def blob(at: Any, below: Any, width: Any, tall: Any) -> Tensor:
        inside = 1.0 - ((x - at) / width).square() - ((y - below) / tall).square()
        found: Tensor = torch.sigmoid(0.4 * size * inside)
        return found

    head = blob(0.0, 0.05, 0.5 + 0.25 * wide, 0.65 + 0.25 * tall)
    picture = 0.15 + head * (0.4 + 0.3 * skin)
    picture = picture * (1.0 - 0.8 * blob(0.0, -1.0, 0.9, 0.25 + 0.4 * hair))
    side, level, middle = 0.2 + 0.15 * apart, -0.3 + 0.25 * height, 0.06 * turn
    for at in (middle - side, middle + side):
        picture = picture * (1.0 - 0.7 * blob(at, level, 0.07 + 0.09 * eye, 0.06 + 0.05 * eye))
    picture = picture * (1.0 - 0.35 * blob(middle, 0.1, 0.06, 0.08 + 0.18 * nose))
    curve = 0.45 + 0.1 * smile * (x - middle).square()
    picture = picture * (1.0 - 0.7 * blob(middle, curve, 0.12 + 0.25 * mouth, 0.06))
    shaded: Tensor = picture * (1.0 + 0.3 * light * x)
    return shaded
