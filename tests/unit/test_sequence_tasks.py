"""Load series and spoken digits: windows, splits, views, features, and files that are bad."""

from __future__ import annotations

import gzip
import os
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from lilliput.core.types import Batch
from lilliput.errors import DataNotFound, InputError, UnknownName
from lilliput.tasks import _files
from lilliput.tasks import ett as series
from lilliput.tasks import fsdd as speech
from lilliput.tasks._arrays import ArrayBatches
from lilliput.tasks.ett import ett
from lilliput.tasks.fsdd import fsdd

REAL = os.environ.get("LILLIPUT_DATA")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LILLIPUT_DATA", str(tmp_path))
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_files, "SYSTEM", tmp_path / "system")
    return tmp_path


# Views


def test_views_are_the_batchs_own_samples() -> None:
    inputs = torch.arange(10.0)[:, None]
    batches = ArrayBatches(inputs, torch.arange(10), 4, shuffle=True, views={"twice": 2 * inputs})
    for batch in batches:
        assert torch.equal(batch.views["twice"], 2 * batch.inputs)


def test_views_and_augmentation_do_not_go_together() -> None:
    x = torch.zeros(4, 1)
    with pytest.raises(InputError, match="views clean cannot follow"):
        ArrayBatches(x, x, 2, augment=lambda x, g: x, views={"clean": x})
    with pytest.raises(InputError, match="3 clean and 4 targets"):
        ArrayBatches(x, x, 2, views={"clean": x[:3]})


# ETT


def write_series(folder: Path, rows: int = series.TEST, columns: int = 7) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    values = np.arange(rows)[:, None] + 1000.0 * np.arange(columns)
    with gzip.open(folder / "ETTh1.csv.gz", "wt") as file:
        file.write("date," + ",".join("abcdefg"[:columns]) + "\n")
        for n, row in enumerate(values):
            file.write(f"hour {n}," + ",".join(f"{v:g}" for v in row) + "\n")
    return values


def test_targets_follow_their_windows(data: Path) -> None:
    values = write_series(data / "ett")
    mean, deviation = values[: series.TRAIN].mean(0), values[: series.TRAIN].std(0, ddof=1)
    task = ett(window=5, horizon=3, test_batch_size=7)
    batch: Batch = next(iter(task.test))
    assert batch.inputs.shape == (7, 5, 7) and batch.target.shape == (7, 3, 7)
    hours = batch.inputs[2, :, 0] * deviation[0] + mean[0]
    first = series.VALIDATION + 2
    assert torch.allclose(hours.float(), torch.arange(first - 5, first).float(), atol=0.01)
    ahead = batch.target[2, :, 0] * deviation[0] + mean[0]
    assert torch.allclose(ahead.float(), torch.arange(first, first + 3).float(), atol=0.01)


def test_other_windows_have_the_same_targets(data: Path) -> None:
    write_series(data / "ett")
    day, week = ett(window=24), ett(window=168)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(day, part).target, getattr(week, part).target)


def test_no_training_target_lies_in_another_split(data: Path) -> None:
    values = write_series(data / "ett")
    task = ett(horizon=24)
    deviation = values[: series.TRAIN, 0].std(ddof=1)
    hour = task.train.target[-1, -1, 0] * deviation + values[: series.TRAIN, 0].mean()
    assert round(float(hour)) == series.TRAIN - 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"series": "h3"}, UnknownName, "no series of ett is named 'h3'"),
        ({"window": 0}, InputError, "window=0"),
        ({"horizon": 10_000}, InputError, "horizon=10000"),
    ],
)
def test_ett_refuses(data: Path, arguments: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        ett(**arguments)


def test_ett_without_or_with_a_bad_file(data: Path) -> None:
    with pytest.raises(DataNotFound, match=r"ETTh1\.csv"):
        ett()
    write_series(data / "ett", rows=100)
    with pytest.raises(InputError, match="not usable as ETT"):
        ett()
    write_series(data / "ett", columns=6)
    with pytest.raises(InputError, match="not usable as ETT"):
        ett()
    path = data / "ett" / "ETTh1.csv.gz"
    write_series(data / "ett")
    for content in (
        b"not gzip",
        path.read_bytes()[:10] + b"\xff" * 60,  # zlib.error
        path.read_bytes()[:-20],  # EOFError
        gzip.compress(b"date,a\n" + b"x" * 200_000),  # csv.Error
        gzip.compress(b"date,a\n\xe4\xf6\xfc,1\n"),  # UnicodeDecodeError
        gzip.compress(b""),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"ETTh1\.csv\.gz is not usable.*cannot be read"):
            ett()


def test_a_constant_series_is_zeros(data: Path) -> None:
    values = write_series(data / "ett")
    values[:, 2] = 0.1
    values[:, 3] = 0.0
    values[-1, 3] = 2.0
    lines = [f"hour {n}," + ",".join(f"{v:g}" for v in row) for n, row in enumerate(values)]
    with gzip.open(data / "ett" / "ETTh1.csv.gz", "wt") as file:
        file.write("\n".join(["date,a,b,c,d,e,f,g", *lines]) + "\n")
    task = ett()
    for batches in (task.train, task.test):
        assert batches.inputs.isfinite().all()
        torch.testing.assert_close(
            batches.target[:, :, 2], torch.zeros(batches.samples, 24), atol=1e-5, rtol=0
        )
    assert float(task.test.target[-1, -1, 3]) == 2.0  # shifted, in its own unit


def test_a_target_starts_at_each_hour_that_leaves_it_room(data: Path) -> None:
    write_series(data / "ett")
    task = ett(horizon=24)
    assert task.train.samples == series.TRAIN - series.LONGEST - 23
    assert task.test.samples == series.TEST - series.VALIDATION - 23


# FSDD


def write_digits(folder: Path, takes: int = 12, rate: int = 8000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for digit in range(10):
        for take in range(takes):
            tone = np.sin(np.arange(4000) * (0.1 + 0.15 * digit)) * 9000
            with wave.open(str(folder / f"{digit}_ann_{take}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(rate)
                file.writeframes(tone.astype("<i2").tobytes())


def test_takes_are_split_as_the_authors_say(data: Path) -> None:
    write_digits(data / "fsdd" / "recordings")
    task = fsdd()
    assert [b.samples for b in (task.train, task.validation, task.test)] == [20, 50, 50]
    assert next(iter(task.test)).inputs.shape == (50, 63, 40)
    assert sorted(task.train.target.tolist()) == sorted([*range(10)] * 2)


def test_mel_bands_are_triangles() -> None:
    bands = speech.mel_bands()
    assert bands.shape == (40, 129) and (bands >= 0).all() and (bands.sum(1) > 0).all()
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(8000) / 8000)[None]
    loudest = speech.log_mel(tone)[0, 30].argmax()
    frequencies = torch.linspace(0, 4000, 129)
    center = frequencies[bands[loudest].argmax()]
    assert abs(float(center) - 1000) < 80


def test_noise_has_the_ratio_and_is_always_the_same() -> None:
    sound = torch.randn(3, 8000) * torch.tensor([[0.1], [1.0], [3.0]])
    heard = speech.noisy(sound, 6.0)
    ratio = 10 * torch.log10(sound.square().mean(1) / (heard - sound).square().mean(1))
    assert torch.allclose(ratio, torch.full((3,), 6.0), atol=0.3)
    assert torch.equal(heard, speech.noisy(sound, 6.0))


def test_noisy_recordings_bring_their_clean_view(data: Path) -> None:
    write_digits(data / "fsdd" / "recordings")
    clean, task = fsdd(), fsdd(noise=5)
    batch = next(iter(task.test))
    assert torch.equal(batch.views["clean"], next(iter(clean.test)).inputs)
    assert not torch.equal(batch.inputs, batch.views["clean"])


def test_a_damaged_recording_is_named(data: Path) -> None:
    folder = data / "fsdd" / "recordings"
    write_digits(folder)
    path = folder / "3_ann_4.wav"
    whole = path.read_bytes()
    for content, words in (
        (b"no sound", "RIFF"),
        (whole[:20], "cannot be read"),
        (whole[:-1], "cannot be read"),  # half a sample
        (b"", "EOFError"),
        (whole[:16] + b"\xff\xff\xff\x7f" + whole[20:], "cannot be read"),  # RuntimeError
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"3_ann_4\.wav is not usable as FSDD.*{words}"):
            fsdd()
    with tarfile.open(data / "fsdd" / "fsdd.tar.xz", "w:xz") as archive:
        archive.add(folder, "recordings")
    with pytest.raises(InputError, match=r"fsdd\.tar\.xz: recordings/3_ann_4\.wav is not usable"):
        fsdd()


def test_a_damaged_archive_is_named(data: Path) -> None:
    write_digits(data / "fsdd" / "recordings")
    path = data / "fsdd" / "fsdd.tar.xz"
    with tarfile.open(path, "w:xz") as archive:
        archive.add(data / "fsdd" / "recordings", "recordings")
    content = bytearray(path.read_bytes())
    content[-200] ^= 0xFF  # LZMAError
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"fsdd\.tar\.xz is not usable as FSDD: it cannot be read"):
        fsdd()


@pytest.mark.parametrize(
    ("takes", "missing"),
    [
        (range(10), "train on"),
        ([*range(5), *range(10, 20)], "validate on"),
        (range(5, 20), "test on"),
    ],
)
def test_recordings_that_leave_a_part_empty(data: Path, takes: list[int], missing: str) -> None:
    folder = data / "fsdd" / "recordings"
    write_digits(folder, takes=20)
    for file in folder.iterdir():
        if int(file.stem.split("_")[2]) not in takes:
            file.unlink()
    with pytest.raises(InputError, match=f"recordings is not usable.*leave none to {missing}"):
        fsdd()


def test_fsdd_refuses(data: Path) -> None:
    with pytest.raises(DataNotFound, match="LILLIPUT_DATA"):
        fsdd()
    write_digits(data / "fsdd" / "recordings", takes=3)
    with pytest.raises(InputError, match="it holds 30 recordings"):
        fsdd()
    write_digits(data / "fsdd" / "recordings", rate=16000)
    with pytest.raises(InputError, match="not 16-bit at 8 kHz"):
        fsdd()
    with pytest.raises(InputError, match="leaves nothing"):
        fsdd(limit=0)


@pytest.mark.data
@pytest.mark.skipif(REAL is None, reason="LILLIPUT_DATA is not set")
def test_the_real_data_have_their_counts() -> None:
    task = ett()
    assert [b.samples for b in (task.train, task.validation, task.test)] == [7177, 2857, 2857]
    spoken = fsdd(limit=100)
    assert [b.samples for b in (spoken.train, spoken.validation, spoken.test)] == [100, 300, 300]
    assert spoken.test.target.bincount().tolist() == [30] * 10
