"""FSDD, the free spoken digit dataset: one digit a recording, six speakers, 8 kHz.

Paper: Free Spoken Digit Dataset (Jackson, Souza, Flaks, Pan, Nicolas, Thite; Zenodo 2018; doi
10.5281/zenodo.1342401)
"""

from __future__ import annotations

import io
import re
import tarfile
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.registry import task
from ..core.task import Task, accuracy
from ..errors import InputError
from . import _files
from ._arrays import ArrayBatches

RATE, SAMPLES = 8000, 8000  # of one second; longer recordings are cut, shorter ones end in silence
WINDOW, HOP, BANDS = 256, 128, 40
TEST_TAKES, VALIDATION_TAKES = range(0, 5), range(5, 10)
ARCHIVE, FOLDER = "fsdd.tar.xz", "recordings"
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
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} leaves nothing to train on: give at least 1, or none.")
    sound, digit, take = _load(_find())
    order = torch.randperm(len(take), generator=torch.Generator().manual_seed(0))
    tests, held = _among(take, TEST_TAKES), _among(take, VALIDATION_TAKES)
    train = order[~(tests | held)[order]][:limit]
    clean = log_mel(sound)
    heard = clean if noise is None else log_mel(noisy(sound, noise))

    def batches(chosen: Tensor, size: int, shuffle: bool = False) -> ArrayBatches:
        views = {} if noise is None else {"clean": _standardized(clean, train)[chosen]}
        inputs = _standardized(heard, train)[chosen]
        return ArrayBatches(inputs, digit[chosen], size, shuffle=shuffle, views=views)

    return Task(
        train=batches(train, batch_size, shuffle=True),
        validation=batches(held.nonzero()[:, 0], test_batch_size),
        test=batches(tests.nonzero()[:, 0], test_batch_size),
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


def _standardized(values: Tensor, train: Tensor) -> Tensor:
    known = values[train].flatten(0, 1)
    return (values - known.mean(0)) / known.std(0).clamp_min(1e-3)


def _among(take: Tensor, takes: range) -> Tensor:
    return (take >= takes.start) & (take < takes.stop)


def _find() -> Path:
    found = _files.find("fsdd", [ARCHIVE, FOLDER])
    if found is None:
        advice = "Put the archive, or the folder of recordings, into a folder D/fsdd and set LILLIPUT_DATA=D."
        raise _files.not_found("fsdd", [ARCHIVE, FOLDER], advice)
    return found


def _load(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Sound ``(recordings, samples)``, digits and takes ``(recordings,)``, in the order of the names."""
    found = []
    try:
        for name, file in _recordings(path):
            named = _NAME.fullmatch(name)
            if named:
                found.append((named[2], int(named[1]), int(named[3]), _sound(file)))
    except (OSError, EOFError, wave.Error, tarfile.TarError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error
    if len(found) < 100:
        raise _damaged(path, f"it holds {len(found)} recordings named like 7_jackson_32.wav")
    found.sort(key=lambda item: item[:3])
    _, digits, takes, sounds = zip(*found, strict=True)
    return torch.stack(sounds), torch.tensor(digits), torch.tensor(takes)


def _recordings(path: Path) -> Iterator[tuple[str, BinaryIO | io.BytesIO]]:
    if path.is_dir():
        for file in sorted(path.glob("*.wav")):
            yield file.name, io.BytesIO(file.read_bytes())
        return
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".wav") else None
            if content is not None:
                yield member.name, io.BytesIO(content.read())


def _sound(file: BinaryIO | io.BytesIO) -> Tensor:
    with wave.open(file, "rb") as recording:
        if (recording.getframerate(), recording.getsampwidth()) != (RATE, 2):
            raise wave.Error("a recording is not 16-bit at 8 kHz")
        raw = np.frombuffer(recording.readframes(SAMPLES), dtype="<i2")
    mono = raw.reshape(-1, recording.getnchannels()).mean(1) / 32768
    sound = torch.zeros(SAMPLES)
    sound[: len(mono)] = torch.from_numpy(mono.astype(np.float32))
    return sound


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not usable as FSDD: {why}. Delete it and get it anew.")
