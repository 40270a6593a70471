"""FSDD, the free spoken digit dataset: one digit a recording, six speakers, 8 kHz.

Paper: Free Spoken Digit Dataset (Jackson, Souza, Flaks, Pan, Nicolas, Thite; Zenodo 2018; doi
10.5281/zenodo.1342401)
"""

from __future__ import annotations

import io
import re
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.registry import task
from ..core.task import Task, accuracy
from . import _files
from ._arrays import ArrayBatches, check_limit, standardized

RATE, SAMPLES = 8000, 8000  # of one second; longer recordings are cut, shorter ones end in silence
WINDOW, HOP, BANDS = 256, 128, 40
TEST_TAKES, VALIDATION_TAKES = range(0, 5), range(5, 10)
ARCHIVE, FOLDER = "fsdd.tar.xz", "recordings"
KIND = _files.Kind("FSDD")
_NAME = re.compile(r"(?:.*/)?(\d)_(\w+)_(\d+)\.wav")


@task
def fsdd(
    noise: float | None = None,
    batch_size: int = 64,
    test_batch_size: int = 300,
    limit: int | None = None,
) -> Task:
    """FSDD, spoken digits as log-mel spectrograms, 10 classes, 3,000 recordings.

    Inputs ``(63, 40)``: 63 frames of 32 ms, 16 ms apart, in 40 mel bands, each band standardized by
    the training recordings. Takes 0 to 4 of each speaker and digit are the test set (300), as the data
    set's authors say, 5 to 9 are for validation (300), the rest for training (2,400).

    Args:
        noise: signal-to-noise ratio in dB of white noise that is added to every recording, always the
            same noise; the view ``"clean"`` of the batches then has the recordings without it, for
            a teacher. None for clean recordings and no further view.
        batch_size: training recordings a batch.
        test_batch_size: recordings a batch of validation and test.
        limit: train on at most so many recordings.

    Raises:
        DataNotFound: the recordings are nowhere; they are not downloaded.
        InputError: a file is damaged, or ``limit`` leaves nothing to train on.
    """
    check_limit(limit)
    path = _find()
    sound, digit, take = _load(path)
    train, held, tests = _split(take, path)
    train = train[:limit]
    clean = log_mel(sound)
    heard = clean if noise is None else log_mel(noisy(sound, noise))

    def by_training(values: Tensor) -> Tensor:
        return standardized(values, values[train].flatten(0, 1))

    def batches(chosen: Tensor, size: int, shuffle: bool = False) -> ArrayBatches:
        views = {} if noise is None else {"clean": by_training(clean)[chosen]}
        return ArrayBatches(
            by_training(heard)[chosen], digit[chosen], size, shuffle=shuffle, views=views
        )

    return Task(
        train=batches(train, batch_size, shuffle=True),
        validation=batches(held, test_batch_size),
        test=batches(tests, test_batch_size),
        loss=cross_entropy,
        score=accuracy,
        name="FSDD" if noise is None else f"FSDD, {noise:g} dB",
        score_name="accuracy, %",
    )


def log_mel(sound: Tensor) -> Tensor:
    """Log-mel spectrograms: from ``(recordings, samples)`` to ``(recordings, frames, bands)``."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(sound, WINDOW, HOP, window=window, return_complex=True, center=True)
    power = spectrum.abs().square().transpose(1, 2)
    return (power @ mel_bands().T).clamp_min(1e-6).log()


def mel_bands() -> Tensor:
    """Triangles on the mel scale, ``(bands, frequencies)``: mel = 2595 log10(1 + f / 700)."""
    highest = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, BANDS + 2) / 2595) - 1)
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)).astype(np.float32))


def noisy(sound: Tensor, decibels: float) -> Tensor:
    """The recordings with white noise at a signal-to-noise ratio, the same for the same recordings."""
    white = torch.randn(sound.shape, generator=torch.Generator().manual_seed(1))
    power = sound.square().mean(1, keepdim=True)
    return sound + white * (power / 10 ** (decibels / 10)).sqrt()


def _split(take: Tensor, path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Which recordings train, always in the same random order, which validate and which test."""
    tests, held = (
        torch.isin(take, torch.tensor(takes)) for takes in (TEST_TAKES, VALIDATION_TAKES)
    )
    order = torch.randperm(len(take), generator=torch.Generator().manual_seed(0))
    parts = order[~(tests | held)[order]], held.nonzero()[:, 0], tests.nonzero()[:, 0]
    for part, name in zip(parts, ("train on", "validate on", "test on"), strict=True):
        if not len(part):
            why = f"its {len(take)} recordings leave none to {name}: takes 0 to 4 test, 5 to 9 validate"
            raise KIND.damaged(path, why)
    return parts


def _find() -> Path:
    found = _files.find("fsdd", [ARCHIVE, FOLDER])
    if found is None:
        advice = "Put the archive, or the folder of recordings, into a folder D/fsdd and set LILLIPUT_DATA=D."
        raise _files.not_found("fsdd", [ARCHIVE, FOLDER], advice)
    return found


def _load(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Sound ``(recordings, samples)``, digits and takes ``(recordings,)``, in the order of the names."""
    found = []
    with KIND.readable(path):
        for name, file in _recordings(path):
            named = _NAME.fullmatch(name)
            if named:
                sound = _sound(file, f"{path}: {name}")
                found.append((named[2], int(named[1]), int(named[3]), sound))
    if len(found) < 100:
        why = f"it holds {len(found)} recordings named like 7_jackson_32.wav"
        raise KIND.damaged(path, why)
    found.sort(key=lambda item: item[:3])
    _, digits, takes, sounds = zip(*found, strict=True)
    return torch.stack(sounds), torch.tensor(digits), torch.tensor(takes)


def _recordings(path: Path) -> Iterator[tuple[str, io.BytesIO]]:
    if path.is_dir():
        for file in sorted(path.glob("*.wav")):
            yield file.name, io.BytesIO(file.read_bytes())
        return
    with _files.archive(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".wav") else None
            if content is not None:
                yield member.name, io.BytesIO(content.read())


def _sound(file: io.BytesIO, place: str) -> Tensor:
    with KIND.readable(place), wave.open(file, "rb") as recording:
        if (recording.getframerate(), recording.getsampwidth()) != (RATE, 2):
            raise KIND.damaged(place, "it is not 16-bit at 8 kHz")
        raw = np.frombuffer(recording.readframes(SAMPLES), dtype="<i2")
        mono = raw.reshape(-1, recording.getnchannels()).mean(1) / 32768
    sound = torch.zeros(SAMPLES)
    sound[: len(mono)] = torch.from_numpy(mono.astype(np.float32))
    return sound
