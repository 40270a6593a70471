"""Ready-made tasks: batches, splits, augmentation, files, and every way in which data are bad."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import os
import sys
import tarfile
import threading
import zlib
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.core.registry import entries, load
from lilliput.core.task import Task, evaluate, read
from lilliput.core.types import Batch
from lilliput.errors import DataNotFound, EmptyData, InputError, MissingDependency, UnknownName
from lilliput.tasks import _files, _idx
from lilliput.tasks import cifar10 as cifar
from lilliput.tasks._arrays import ArrayBatches, standardized
from lilliput.tasks._augment import mirror, shift
from lilliput.tasks._images import Images, hold_out
from lilliput.tasks.digits import digits
from lilliput.tasks.fashion_mnist import FASHION_MNIST, fashion_mnist
from lilliput.tasks.mnist import MNIST, mnist

REAL = Path(os.environ.get("LILLIPUT_DATA", "no-data"))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LILLIPUT_DATA, cache and system folder, and no network."""
    monkeypatch.setenv("LILLIPUT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_files, "SYSTEM", tmp_path / "system")

    def no_network(*args: object, **kwargs: object) -> str:
        raise OSError("no network in tests")

    monkeypatch.setattr("pooch.retrieve", no_network)
    return tmp_path / "data"


# Batches


def numbered(samples: int, batch_size: int, **options) -> ArrayBatches:
    return ArrayBatches(
        torch.arange(samples).float().unsqueeze(1), torch.arange(samples), batch_size, **options
    )


def everything(batches: ArrayBatches) -> list[int]:
    return [int(n) for batch in batches for n in batch.target]


@given(
    samples=st.integers(0, 50), size=st.integers(1, 20), shuffle=st.booleans(), drop=st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_batches_hold_every_sample_once(samples: int, size: int, shuffle: bool, drop: bool) -> None:
    batches = numbered(samples, size, shuffle=shuffle, drop_last=drop)
    cut = list(batches)
    seen = [int(n) for batch in cut for n in batch.target]
    assert len(cut) == len(batches)
    assert len(set(seen)) == len(seen) == (samples - samples % size if drop else samples)
    assert all(len(batch.target) == size for batch in cut[:-1])
    for batch in cut:
        assert isinstance(batch, Batch)
        assert batch.index.dtype == torch.int64
        assert torch.equal(batch.index, batch.target)
        assert torch.equal(batch.index.float().unsqueeze(1), batch.inputs)
    if not shuffle:
        assert seen == list(range(len(seen)))


@given(seed=st.integers(0, 2**63 - 1))
@settings(max_examples=30, deadline=None)
def test_equal_seeds_give_equal_batches(seed: int) -> None:
    def noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return x + torch.rand(x.shape, generator=generator)

    batches = numbered(40, 16, shuffle=True, augment=noise)
    batches.reshuffle(seed)
    first, again = list(batches), list(batches)
    batches.reshuffle(seed ^ 1)
    other = list(batches)
    batches.reshuffle(seed)
    for before, *after in zip(first, again, batches, strict=True):
        for batch in after:
            assert torch.equal(before.inputs, batch.inputs)
            assert torch.equal(before.index, batch.index)
    assert not torch.equal(first[0].inputs, other[0].inputs)
    assert not torch.equal(first[0].index, other[0].index)


def test_two_iterations_at_once_do_not_disturb_each_other() -> None:
    batches = numbered(30, 7, shuffle=True)
    assert all(torch.equal(a.index, b.index) for a, b in zip(batches, batches, strict=True))


def test_batches_are_copies() -> None:
    batches = numbered(4, 4)
    next(iter(batches)).inputs.zero_()
    assert everything(batches) == [0, 1, 2, 3]
    assert batches.inputs.sum() == 6


def test_prepare_follows_augment() -> None:
    batches = ArrayBatches(
        torch.full((2, 1), 4, dtype=torch.uint8),
        torch.zeros(2),
        2,
        augment=lambda x, _: x + 1,
        prepare=lambda x: x.float() / 10,
    )
    assert next(iter(batches)).inputs.tolist() == [[0.5], [0.5]]
    assert batches.augmented
    assert not numbered(2, 2).augmented


def test_moving_keeps_order_and_draws() -> None:
    batches = numbered(20, 6, shuffle=True, augment=lambda x, g: x + torch.rand(1, generator=g))
    batches.reshuffle(5)
    moved = batches.to("cpu")
    assert moved is not batches
    for a, b in zip(batches, moved, strict=True):
        assert torch.equal(a.inputs, b.inputs)
    on_meta = batches.to("meta")
    assert on_meta.inputs.is_meta
    assert on_meta.target.is_meta
    assert not batches.inputs.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_batches() -> None:
    crop = functools.partial(shift, pixels=2)
    batches = ArrayBatches(
        torch.randn(20, 1, 8, 8), torch.arange(20), 6, shuffle=True, augment=crop
    )
    for a, b in zip(batches, batches.to("cuda"), strict=True):
        assert b.inputs.is_cuda
        assert b.index.is_cuda
        assert torch.equal(a.inputs, b.inputs.cpu())
        assert torch.equal(a.index, b.index.cpu())


def test_batches_refuse_what_makes_no_sense() -> None:
    with pytest.raises(InputError, match="3 inputs and 2 targets"):
        ArrayBatches(torch.zeros(3), torch.zeros(2), 1)
    with pytest.raises(InputError, match="batch_size is 0"):
        numbered(3, 0)
    with pytest.raises(EmptyData):
        list(read(numbered(0, 3), "the batches"))


def test_columns_are_standardized_by_the_known_ones() -> None:
    values = 5 + 3 * torch.randn(40, 3)
    values[:30, 1] = 0.1  # of which the mean is another number, by rounding
    found = standardized(values, values[:30])
    torch.testing.assert_close(found[:30].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:30].std(0), torch.tensor([1.0, 0.0, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[30:, 1], values[30:, 1] - 0.1)


# Augmentation


@given(
    count=st.integers(1, 6),
    height=st.integers(2, 7),
    width=st.integers(2, 7),
    pixels=st.integers(0, 4),
    seed=st.integers(0, 1000),
    as_bytes=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_shift_crops_the_padded_image(
    count: int, height: int, width: int, pixels: int, seed: int, as_bytes: bool
) -> None:
    images = torch.randint(1, 200, (count, 2, height, width)).to(
        torch.uint8 if as_bytes else torch.float32
    )
    moved = shift(images, torch.Generator().manual_seed(seed), pixels, fill=7)
    assert moved.shape == images.shape
    assert moved.dtype == images.dtype
    for image, result in zip(images, moved, strict=True):
        padded = torch.full((2, height + 2 * pixels, width + 2 * pixels), 7, dtype=images.dtype)
        padded[:, pixels : pixels + height, pixels : pixels + width] = image
        crops = (
            padded[:, y : y + height, x : x + width]
            for y in range(2 * pixels + 1)
            for x in range(2 * pixels + 1)
        )
        assert any(torch.equal(result, crop) for crop in crops)


def test_shift_draws_every_offset_equally_and_per_image() -> None:
    images = torch.zeros(4000, 1, 5, 5)
    images[:, :, 2, 2] = 1
    moved = shift(images, torch.Generator().manual_seed(0), pixels=1)
    counts = moved.sum(dim=(0, 1))[1:4, 1:4]
    assert counts.sum() == 4000
    deviation = (4000 * (1 / 9) * (8 / 9)) ** 0.5
    assert (counts - 4000 / 9).abs().max() < 5 * deviation


def test_mirror_flips_half_of_the_images() -> None:
    images = torch.rand(2000, 1, 2, 3)
    result = mirror(images, torch.Generator().manual_seed(0))
    kept = (result == images).flatten(1).all(1)
    flipped = (result == images.flip(3)).flatten(1).all(1)
    assert (kept ^ flipped).all()
    assert 900 < int(kept.sum()) < 1100


# Splits


@given(samples=st.integers(2, 200), share=st.floats(0, 0.99), limit=st.integers(1, 300) | st.none())
@settings(max_examples=50, deadline=None)
def test_hold_out_is_fixed_and_disjoint(samples: int, share: float, limit: int | None) -> None:
    numbers = torch.arange(samples)
    validation = int(share * samples)
    train, held = hold_out(Images(numbers * 10, numbers), validation, limit)
    whole, _ = hold_out(Images(numbers * 10, numbers), validation, None)
    available = samples - validation
    assert len(held.labels) == validation
    assert len(train.labels) == (available if limit is None else min(limit, available))
    assert torch.equal(train.labels, whole.labels[:limit])
    assert sorted([*whole.labels.tolist(), *held.labels.tolist()]) == numbers.tolist()
    assert torch.equal(train.inputs, train.labels * 10)


@pytest.mark.parametrize(
    ("validation", "limit", "message"),
    [(10, None, "validation=10 of 10"), (-1, None, "validation=-1"), (2, 0, "limit=0")],
)
def test_hold_out_refuses(validation: int, limit: int | None, message: str) -> None:
    images = Images(torch.zeros(10), torch.zeros(10))
    with pytest.raises(InputError, match=message):
        hold_out(images, validation, limit)


# Digits


def labels_of(batches: ArrayBatches) -> list[int]:
    return torch.bincount(batches.target, minlength=10).tolist()


def test_digits_are_split_evenly_and_always_alike() -> None:
    first, again = digits(), digits()
    parts = [first.train, first.validation, first.test]
    assert [part.samples for part in parts] == [1197, 300, 300]
    for part in parts:
        assert max(labels_of(part)) - min(labels_of(part)) <= 0.05 * part.samples
    for a, b in zip(parts, [again.train, again.validation, again.test], strict=True):
        assert torch.equal(a.inputs, b.inputs)
    together = torch.cat([part.inputs for part in parts])
    assert abs(float(together.mean())) < 1e-3
    assert abs(float(together.std()) - 1) < 1e-3
    assert first.example_inputs().shape == (1, 1, 8, 8)
    assert len({image.numpy().tobytes() for image in together}) == len(together)


def test_digits_can_train_on_all_or_on_few() -> None:
    everything_trains = digits(validation=0)
    assert everything_trains.train.samples == 1497
    assert everything_trains.test is None
    assert torch.equal(everything_trains.reported.inputs, digits().test.inputs)
    few = digits(limit=50)
    assert few.train.samples == 50
    assert torch.equal(few.validation.inputs, digits().validation.inputs)


def test_digits_can_be_learned_by_a_linear_model() -> None:
    task = digits()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for epoch in range(12):
        task.train.reshuffle(epoch)
        for batch in task.train:
            optimizer.zero_grad()
            task.loss(model(batch.inputs), batch.target).backward()
            optimizer.step()
    assert evaluate(model, task.test, task.score) > 90


@pytest.mark.parametrize("wrong", [{"validation": 5}, {"validation": 1490}, {"limit": 0}])
def test_digits_refuse_bad_counts(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"validation=|limit="):
        digits(**wrong)


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependency, match=r"scikit-learn.*lilliput\[data\]"):
        digits()


# idx files


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx_set(folder: Path, train: int = 30, test: int = 10, *, packed: bool = True) -> None:
    """A tiny data set in the form of MNIST: image i has the pixel value i and the label i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        images = np.arange(count).reshape(-1, 1, 1) * np.ones((1, 28, 28))
        for part, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            path = folder / f"{prefix}-{part}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("make", "folder", "mean", "deviation"),
    [(mnist, "mnist", 0.1307, 0.3081), (fashion_mnist, "fashion-mnist", 0.2860, 0.3530)],
)
def test_idx_tasks(data: Path, make, folder: str, mean: float, deviation: float, packed) -> None:
    write_idx_set(data / folder, packed=packed)
    task = make(batch_size=8, validation=6, limit=20)
    assert isinstance(task, Task)
    assert (task.train.samples, task.validation.samples, task.test.samples) == (20, 6, 10)
    assert len(task.train) == 3
    assert task.example_inputs().shape == (1, 1, 28, 28)
    pixels = task.test.inputs * deviation + mean
    torch.testing.assert_close(pixels[:, 0, 5, 5] * 255, torch.arange(10.0), rtol=0, atol=1e-3)
    for batch in task.train:
        values = ((batch.inputs[:, 0, 0, 0] * deviation + mean) * 255).round().long()
        assert torch.equal(values % 10, batch.target)
    assert task.score_name == "accuracy, %"
    assert not task.train.augmented


def test_idx_task_without_validation_says_that_it_reports_it(data: Path) -> None:
    write_idx_set(data / "mnist")
    task = mnist(validation=0)
    assert task.train.samples == 30
    assert task.test is None
    assert task.validation.samples == 10


def test_mnist_shifts_over_black(data: Path) -> None:
    write_idx_set(data / "mnist")
    task = mnist(validation=0, augment=True)
    assert task.train.augmented
    assert not task.validation.augmented
    smallest = min(float(batch.inputs.min()) for batch in task.train)
    assert smallest == pytest.approx(-0.1307 / 0.3081)


GOOD = idx(np.zeros((3, 28, 28)))
HEADER = bytes([0, 0, 8, 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-1], "the length does not fit"),
        (GOOD + b"x", "the length does not fit"),
        (b"", "its first bytes"),
        (GOOD[:7], "its first bytes|announces"),
        (GOOD[:8], "announces"),
        (idx(np.zeros(3)), "its first bytes, 00000801"),
        (b"<html>not found</html>", "its first bytes, 3c68746d"),
        (HEADER + b"\xff" * 4 + GOOD[8:], "announces"),
        (HEADER + GOOD[4:8] + b"\x00\x00\x00\x10" * 2, "announces"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_damaged_idx_files_are_named(
    tmp_path: Path, content: bytes, message: str, packed: bool
) -> None:
    path = tmp_path / ("images.gz" if packed else "images")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match=message) as caught:
        _idx.read_idx(path, 3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("cut", [5, 30])
def test_truncated_and_altered_gzip_is_named(tmp_path: Path, cut: int) -> None:
    packed = gzip.compress(idx(np.random.default_rng(0).integers(0, 255, (3, 28, 28))))
    altered = bytearray(packed)
    altered[len(packed) // 2] ^= 0xFF
    no_block = packed[:10] + b"\xff" * 60
    with pytest.raises(zlib.error):
        gzip.decompress(no_block)
    for content in (packed[:-cut], bytes(altered), no_block, b"plain bytes"):
        path = tmp_path / "images.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"images\.gz is not usable as an idx file"):
            _idx.read_idx(path, 3)


def test_labels_must_fit_the_images(data: Path) -> None:
    write_idx_set(data / "mnist")
    labels = data / "mnist" / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(29))))
    with pytest.raises(InputError, match=r"train-labels.*29 labels for the 30"):
        mnist(validation=0)
    labels.write_bytes(gzip.compress(idx(np.full(30, 10))))
    with pytest.raises(InputError, match=r"train-labels.*a label is 10"):
        mnist(validation=0)


# Reading files


@pytest.mark.parametrize("error", _files.UNREADABLE)
def test_what_a_reader_raises_names_the_file(error: type[Exception]) -> None:
    kind = _files.Kind("MNIST")
    with (
        pytest.raises(
            InputError, match=r"d/x is not usable as MNIST: .*read \(.+\)\. Delete"
        ) as caught,
        kind.readable("d/x"),
    ):
        raise error
    assert isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize(
    "error", [InputError("own"), AssertionError("own"), KeyboardInterrupt("own")]
)
def test_other_errors_are_what_they_were(error: BaseException) -> None:
    with pytest.raises(type(error), match=r"^own$"), _files.Kind("MNIST").readable("d/x"):
        raise error


@pytest.mark.parametrize("packed", [True, False])
def test_text_keeps_what_only_unicode_calls_line_ends(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("text.gz" if packed else "text")
    content = "eins\u2028zwei\r\ndrei\x85vier\x0bfünf\n".encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    assert _files.text(path) == "eins\u2028zwei\ndrei\x85vier\x0bfünf\n"


def picture(form: str) -> bytearray:
    image_module = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    image_module.fromarray(noise).save(stream, form)
    return bytearray(stream.getvalue())


@pytest.mark.parametrize(
    ("form", "where", "what"),
    [
        ("PNG", slice(37, 41), b"\xbf\xa1\x96\xfe"),  # a chunk without a name: SyntaxError
        ("PNG", slice(8, 12), bytes(4)),  # a header of no length: ValueError
        ("BMP", slice(18, 26), b"\xff\xff\xff\x3f" * 2),  # a size beyond all memory
        ("JPEG", slice(400, None), b""),  # OSError
    ],
)
def test_damaged_pictures_are_named(form: str, where: slice, what: bytes) -> None:
    content = picture(form)
    kind = _files.Kind("a picture")
    with kind.picture(bytes(content), "some place") as image:
        assert np.array(image).shape == (64, 64, 3)
    content[where] = what
    with (
        pytest.raises(InputError, match="some place is not usable as a picture: it cannot be read"),
        kind.picture(bytes(content), "some place") as image,
    ):
        image.load()


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_no_part_of_a_damaged_archive_is_taken_for_the_whole(tmp_path: Path, packing: str) -> None:
    """tarfile itself ends at a member that it cannot read, and compares no checksum."""
    path, draw = tmp_path / "x.tar", np.random.default_rng(0)
    with tarfile.open(path, f"w:{packing}") as archive:
        for number in range(20):
            member = tarfile.TarInfo(f"{number}.bin")
            member.size = 300
            archive.addfile(member, io.BytesIO(draw.bytes(300)))
    whole = path.read_bytes()
    for where in range(60, len(whole) - 60, 97):
        path.write_bytes(whole[:where] + bytes([whole[where] ^ 0x10]) + whole[where + 1 :])
        with (
            pytest.raises(InputError, match=r"x\.tar is not usable as an archive"),
            _files.Kind("an archive").readable(path),
            _files.archive(path) as archive,
        ):
            assert all(archive.extractfile(member) for member in archive)


# Finding files


def test_places_are_tried_in_order(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = [data, data.parent / "cache", data.parent / "system"]
    for size, root in ((13, roots[2]), (12, roots[1]), (11, roots[0])):
        write_idx_set(root / "mnist", train=size)
        assert mnist(validation=0).train.samples == size
    monkeypatch.delenv("LILLIPUT_DATA")
    assert mnist(validation=0).train.samples == 12


def test_without_variable_the_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LILLIPUT_CACHE", raising=False)
    assert _files.cache_folder() == Path.home() / ".cache" / "lilliput"


@pytest.mark.parametrize(
    ("make", "folder", "address", "hint"),
    [
        (mnist, "mnist", "ossci-datasets.s3", ""),
        (fashion_mnist, "fashion-mnist", "fashion-mnist.s3", "dataset-fashion-mnist"),
        (cifar.cifar10, "cifar10", "cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "batches-bin"),
    ],
)
def test_missing_data_lists_every_place(
    data: Path, make, folder: str, address: str, hint: str
) -> None:
    with pytest.raises(DataNotFound) as caught:
        make()
    message = str(caught.value)
    for part in (data, data.parent / "cache", data.parent / "system"):
        assert str(part / folder) in message
    for part in (address, "no network in tests", "LILLIPUT_DATA=D", hint):
        assert part in message


def test_missing_data_says_when_the_variable_is_not_set(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LILLIPUT_DATA")
    with pytest.raises(DataNotFound, match="LILLIPUT_DATA is not set"):
        mnist()


def test_download_needs_pooch(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(MissingDependency, match=r"ossci-datasets.*'pooch'.*lilliput\[data\]"):
        mnist()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A web server on this machine: its address and its folder."""
    monkeypatch.delenv("LILLIPUT_DATA", raising=False)
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "www").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "www"
    server.shutdown()
    server.server_close()


def test_download_is_kept_in_the_cache(served: tuple[str, Path]) -> None:
    address, folder = served
    (folder / "some.bin").write_bytes(b"content")
    remote = _files.Remote("demo", f"{address}/some.bin", hashlib.md5(b"content").hexdigest())
    path = _files.fetch(remote)
    assert path == _files.cache_folder() / "demo" / "some.bin"
    assert path.read_bytes() == b"content"
    (folder / "some.bin").unlink()
    assert _files.fetch(remote) == path


def test_download_with_another_checksum_is_refused_and_not_kept(served: tuple[str, Path]) -> None:
    address, folder = served
    (folder / "some.bin").write_bytes(b"something else")
    remote = _files.Remote("demo", f"{address}/some.bin", hashlib.md5(b"content").hexdigest())
    with pytest.raises(DataNotFound, match=r"(?s)some\.bin.*hash"):
        _files.fetch(remote)
    assert not (_files.cache_folder() / "demo" / "some.bin").exists()


def test_absent_download_is_reported(served: tuple[str, Path]) -> None:
    address, _ = served
    with pytest.raises(DataNotFound, match="404"):
        _files.fetch(_files.Remote("demo", f"{address}/none.bin", "0" * 32))


# CIFAR-10

PER_FILE = 5


def cifar_record(number: int) -> bytes:
    """Label number % 10; red is the number, green 100 + number, blue 200 + number."""
    planes = [bytes([base + number]) * 1024 for base in (0, 100, 200)]
    return bytes([number % 10]) + b"".join(planes)


def cifar_files() -> dict[str, bytes]:
    names = [*cifar.TRAIN_FILES, *cifar.TEST_FILES]
    return {
        name: b"".join(cifar_record(PER_FILE * i + k) for k in range(PER_FILE))
        for i, name in enumerate(names)
    }


def write_cifar(folder: Path, *, packed: bool) -> None:
    folder.mkdir(parents=True)
    if not packed:
        (folder / cifar.UNPACKED).mkdir()
        for name, content in cifar_files().items():
            (folder / cifar.UNPACKED / name).write_bytes(content)
        return
    with tarfile.open(folder / cifar.BINARY.name, "w:gz") as archive:
        for name, content in cifar_files().items():
            member = tarfile.TarInfo(f"{cifar.UNPACKED}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("source", ["auto", "binary"])
def test_cifar_binary(
    data: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, source: str
) -> None:
    monkeypatch.setattr(cifar, "PER_FILE", PER_FILE)
    write_cifar(data / "cifar10", packed=packed)
    task = cifar.cifar10(source=source, validation=5)
    assert task.name == "CIFAR-10"
    assert (task.train.samples, task.validation.samples, task.test.samples) == (20, 5, 5)
    (batch,) = task.test
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (batch.inputs[:, :, 3, 4] * deviation + mean) * 255
    expected = torch.tensor([[n, 100 + n, 200 + n] for n in range(25, 30)]).float()
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-3)
    assert batch.target.tolist() == [5, 6, 7, 8, 9]
    assert task.train.inputs.dtype == torch.uint8


def test_cifar_validation_is_a_tenth_unless_told(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "PER_FILE", PER_FILE)
    write_cifar(data / "cifar10", packed=False)
    assert cifar.cifar10().validation.samples == 2
    assert cifar.cifar10(validation=0).test is None


def test_cifar_augmentation_draws_anew_each_epoch_and_pads_with_black(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "PER_FILE", PER_FILE)
    write_cifar(data / "cifar10", packed=False)
    train = cifar.cifar10(augment=True).train
    assert train.augmented
    (first,) = train
    train.reshuffle(1)
    (second,) = train
    assert not torch.equal(first.inputs, second.inputs)
    assert first.inputs[:, 0].min() == pytest.approx(-0.485 / 0.229)


def test_damaged_cifar_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "PER_FILE", PER_FILE)
    write_cifar(data / "cifar10", packed=False)
    damaged = data / "cifar10" / cifar.UNPACKED / "data_batch_3.bin"
    content = damaged.read_bytes()
    for bad, message in (
        (content[:-1], "bytes instead of"),
        (b"\x0b" + content[1:], "label is 11"),
    ):
        damaged.write_bytes(bad)
        with pytest.raises(InputError, match=rf"{cifar.UNPACKED} is not usable.*{message}"):
            cifar.cifar10()
    damaged.unlink()
    with pytest.raises(InputError, match=r"data_batch_3\.bin"):
        cifar.cifar10()


def test_damaged_cifar_archive_is_named(data: Path) -> None:
    path = data / "cifar10" / cifar.BINARY.name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"cifar-10-binary\.tar\.gz is not usable"):
        cifar.cifar10()
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(InputError, match=r"cifar-10-binary\.tar\.gz is not usable.*data_batch_1"):
        cifar.cifar10()


def write_jpegs(folder: Path, count: int = 12, size: tuple[int, int] = (32, 32)) -> None:
    image_module = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    for name in cifar.JPEG_FILES:
        coded = []
        for number in range(count):
            stream = io.BytesIO()
            image_module.new("RGB", size, (20 * number, 100, 30)).save(stream, "JPEG")
            coded.append(stream.getvalue())
        np.savez(
            folder / name,
            jpeg=np.frombuffer(b"".join(coded), dtype=np.uint8),
            offset=np.cumsum([0, *map(len, coded)]),
            label=np.arange(count, dtype=np.uint8) % 10,
        )


@pytest.mark.parametrize("source", ["auto", "jpeg"])
def test_cifar_jpeg_is_labeled_as_such(data: Path, source: str) -> None:
    write_jpegs(data / "cifar10-jpeg")
    task = cifar.cifar10(source=source, validation=2)
    assert task.name == "CIFAR-10 (JPEG)"
    assert (task.train.samples, task.validation.samples, task.test.samples) == (10, 2, 12)
    colors = task.test.inputs[:, :, 16, 16].float()
    expected = torch.tensor([[20.0 * n, 100, 30] for n in range(12)])
    assert (colors - expected).abs().max() <= 4
    assert task.test.target.tolist() == [*range(10), 0, 1]


def test_auto_prefers_the_original(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "PER_FILE", PER_FILE)
    write_jpegs(data / "cifar10-jpeg")
    write_cifar(data / "cifar10", packed=False)
    assert cifar.cifar10().name == "CIFAR-10"


def test_damaged_jpeg_files_are_named(data: Path) -> None:
    path = data / "cifar10-jpeg" / cifar.JPEG_FILES[0]
    write_jpegs(path.parent, size=(31, 32))
    with pytest.raises(InputError, match=r"train\.npz.*\(31, 32\) pixels"):
        cifar.cifar10(source="jpeg")
    write_jpegs(path.parent)
    with np.load(path) as good:
        parts = dict(good)
    for key, value in (
        ("offset", parts["offset"] + 1),
        ("offset", parts["offset"][::-1]),
        ("label", parts["label"][1:]),
        ("jpeg", np.zeros_like(parts["jpeg"])),
        ("label", parts["label"] + 1),
        ("label", np.array([None] * 12)),
    ):
        np.savez(path, **{**parts, key: value})
        with pytest.raises(InputError, match=r"cifar10_jpeg_train\.npz is not usable"):
            cifar.cifar10(source="jpeg")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cifar10_jpeg_train\.npz is not usable"):
        cifar.cifar10(source="jpeg")
    np.savez_compressed(path, **parts)
    content = bytearray(path.read_bytes())
    content[58:118] = b"\xff" * 60  # zlib.error
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cifar10_jpeg_train\.npz is not usable"):
        cifar.cifar10(source="jpeg")


def test_local_copies_of_cifar_that_are_missing(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("jpeg", "lossless"):
        with pytest.raises(DataNotFound, match=rf"cifar10-{source}.*LILLIPUT_DATA=D"):
            cifar.cifar10(source=source)
    write_jpegs(data / "cifar10-jpeg")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependency, match="pillow"):
        cifar.cifar10(source="jpeg")


def test_unknown_source_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'lossless'"):
        cifar.cifar10(source="losless")


# The catalog and the real data


def test_the_catalog_knows_the_tasks() -> None:
    known = entries("task")
    assert {"digits", "mnist", "fashion_mnist", "cifar10"} <= set(known)
    assert all(known[name].summary for name in known)
    assert known["cifar10"].papers[0].year == 2009
    assert known["fashion_mnist"].papers[0].year == 2017
    assert load("task", "digits") is digits


def present(data_set: _idx.IdxSet) -> bool:
    return all(
        _files.find(remote.folder, [remote.name]) for remote in (*data_set.train, *data_set.test)
    )


@pytest.mark.data
@pytest.mark.parametrize("data_set", [MNIST, FASHION_MNIST], ids=lambda s: s.name)
def test_real_idx_sets_are_normalized(data_set: _idx.IdxSet) -> None:
    if not present(data_set):
        pytest.skip(f"needs {data_set.name} in LILLIPUT_DATA")
    images = _idx._load(data_set, data_set.train)
    assert images.inputs.shape == (60_000, 1, 28, 28)
    assert abs(float(images.inputs.mean())) < 1e-3
    assert abs(float(images.inputs.std()) - 1) < 1e-3
    assert len(torch.bincount(images.labels)) == 10


@pytest.mark.data
@pytest.mark.skipif(
    not (REAL / "cifar10-lossless").is_dir(), reason="needs LILLIPUT_DATA with cifar10-lossless"
)
def test_real_lossless_cifar() -> None:
    task = cifar.cifar10(source="lossless")
    assert (task.train.samples, task.validation.samples, task.test.samples) == (6340, 704, 1000)
