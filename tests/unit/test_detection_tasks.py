"""VOC folders, whole and damaged; mirrored boxes; mean average precision by hand; the real blood cells."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lilliput.core.task import Metric, evaluate
from lilliput.errors import (
    DataNotFound,
    InputError,
    LilliputWarning,
    MissingDependency,
    ModelMismatch,
    UnknownName,
)
from lilliput.tasks import _files
from lilliput.tasks.bccd import bccd
from lilliput.tasks.voc import (
    BoxBatches,
    DetectionTask,
    MeanAveragePrecision,
    flipped,
    read_voc,
    voc,
)

REAL = Path(os.environ.get("LILLIPUT_DATA", "no-data"))
Image = pytest.importorskip("PIL.Image")

CAT, DOG = ("cat", (3, 5, 10, 16)), ("dog", (11, 1, 20, 8))


def write_image(
    folder: Path, name: str, objects: list[tuple[Any, ...]], size: tuple[int, int] = (20, 16)
) -> None:
    """A black image of that width and height, white where the first object is."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    entries = []
    for label, (x1, y1, x2, y2), *difficult in objects:
        if not entries:
            image.paste((255, 255, 255), (x1 - 1, y1 - 1, x2, y2))
        box = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        flag = "".join(f"<difficult>{d}</difficult>" for d in difficult)
        entries.append(f"<object><name>{label}</name>{flag}<bndbox>{box}</bndbox></object>")
    image.save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
    (folder / "Annotations" / f"{name}.xml").write_text(
        f"<annotation>{''.join(entries)}</annotation>"
    )


def write_voc(folder: Path, classes: tuple[str, str] = ("cat", "dog")) -> Path:
    cat, dog = (classes[0], CAT[1]), (classes[1], DOG[1])
    write_image(folder, "a", [cat])
    write_image(folder, "b", [dog, cat])
    write_image(folder, "c", [(*cat, 1)], size=(40, 32))
    write_image(folder, "d", [])
    for split, names in {"train": "a\nb  1\n", "val": "c\n", "test": "d\nb\n"}.items():
        (folder / "ImageSets/Main" / f"{split}.txt").write_text(names)
    return folder


def pack(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "some/folder")
    return path


class TestReading:
    def read(self, folder: Path, **settings: Any) -> DetectionTask:
        return voc(str(folder), height=16, width=20, **{"augment": False, **settings})

    def test_boxes_and_classes(self, tmp_path: Path) -> None:
        task = self.read(write_voc(tmp_path))
        assert task.classes == ("cat", "dog") and task.dropped == 0
        assert task.train.target.tolist() == [
            [[2, 4, 10, 16, 1, 0], [0] * 6],
            [[10, 0, 20, 8, 2, 0], [2, 4, 10, 16, 1, 0]],
        ]
        assert task.test.target[0].tolist() == [[0] * 6] * 2

    def test_boxes_follow_the_images_size(self, tmp_path: Path) -> None:
        """The box of the larger image shrinks with it, and what is white in it is where the box is."""
        write_image(tmp_path, "c", [("cat", (9, 5, 32, 24), 1)], size=(40, 32))
        (tmp_path / "ImageSets/Main/val.txt").write_text("c\n")
        found = read_voc(tmp_path, "val", (16, 20))
        assert found.target(("cat",)).tolist() == [[[4, 2, 16, 12, 1, 1]]]
        assert found.pixels.shape == (1, 3, 16, 20)
        bright = found.pixels[0, 0] > 127
        assert bright.nonzero().amin(0).tolist() == [2, 4]
        assert bright.nonzero().amax(0).tolist() == [11, 15]

    def test_a_tar_file_is_the_same(self, tmp_path: Path) -> None:
        plain = self.read(write_voc(tmp_path / "voc"))
        packed = self.read(pack(tmp_path / "voc", tmp_path / "voc.tar.gz"))
        for part in ("train", "validation", "test"):
            a, b = getattr(plain, part), getattr(packed, part)
            assert torch.equal(a.inputs, b.inputs) and torch.equal(a.target, b.target)

    def test_some_classes_in_another_order(self, tmp_path: Path) -> None:
        write_voc(tmp_path)
        task = self.read(tmp_path, classes=["dog"])
        assert task.train.target[..., 4].tolist() == [[0], [1]]
        assert self.read(tmp_path, classes=["dog", "cat"]).train.target[0, 0, 4] == 2
        with pytest.raises(UnknownName, match="Did you mean 'dog'"):
            self.read(tmp_path, classes=["dogs"])

    def test_boxes_without_an_area_are_counted_and_left_out(self, tmp_path: Path) -> None:
        write_voc(tmp_path)
        write_image(tmp_path, "a", [CAT, ("cat", (7, 7, 7, 9)), ("dog", (99, 3, 120, 9))])
        with pytest.warns(LilliputWarning, match="2 boxes have no area"):
            task = self.read(tmp_path)
        assert task.dropped == 2 and task.train.target[0, :, 4].tolist() == [1, 0]

    def test_boxes_end_at_the_image(self, tmp_path: Path) -> None:
        write_voc(tmp_path)
        write_image(tmp_path, "a", [("cat", (0, -4, 30, 99))])
        assert self.read(tmp_path).train.target[0, 0].tolist() == [0, 0, 20, 16, 1, 0]

    def test_limit_and_no_test(self, tmp_path: Path) -> None:
        task = self.read(write_voc(tmp_path), limit=1, test=None)
        assert task.train.samples == 1 and task.test is None
        with pytest.raises(InputError, match="leaves nothing"):
            self.read(tmp_path, limit=0)
        with pytest.raises(InputError, match="no pixel"):
            voc(str(tmp_path), height=0)

    def test_batches_are_normalized(self, tmp_path: Path) -> None:
        batch = next(iter(self.read(write_voc(tmp_path)).train))
        assert batch.inputs.dtype == torch.float32 and batch.inputs.shape == (2, 3, 16, 20)
        assert float(batch.inputs.min()) == pytest.approx(-0.485 / 0.229, abs=0.1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("JPEGImages/b.jpg", Path.unlink, "missing"),
    ("JPEGImages/b.jpg", cut, "as an image.*cannot be read"),
    ("JPEGImages/b.jpg", lambda p: p.write_text("no image"), "as an image.*cannot be read"),
    ("Annotations/b.xml", Path.unlink, "missing"),
    ("Annotations/b.xml", cut, "as an annotation.*cannot be read"),
    ("Annotations/b.xml", lambda p: p.write_text("<a><object/></a>"), "has no name"),
    (
        "Annotations/b.xml",
        lambda p: p.write_text("<a><object><name>x</name></object></a>"),
        "no bndbox/xmin",
    ),
    (
        "Annotations/b.xml",
        lambda p: p.write_text(p.read_text().replace("<ymax>8<", "<ymax>nan<")),
        "bndbox/ymax is nan",
    ),
    (
        "Annotations/b.xml",
        lambda p: p.write_text(p.read_text().replace("<ymax>8<", "<ymax>eight<")),
        "as an annotation.*cannot be read",
    ),
    ("ImageSets/Main/train.txt", Path.unlink, "missing"),
    ("ImageSets/Main/train.txt", lambda p: p.write_text("\n"), "names no image"),
]


class TestDamage:
    @pytest.mark.parametrize(("name", "damage", "words"), DAMAGES)
    def test_a_damaged_file_is_named(
        self, tmp_path: Path, name: str, damage: Callable[[Path], Any], words: str
    ) -> None:
        damage(write_voc(tmp_path) / name)
        with pytest.raises(InputError, match=f"{name} is not usable.*{words}"):
            voc(str(tmp_path), height=16, width=20)

    def test_no_folder_no_tar_file_no_boxes(self, tmp_path: Path) -> None:
        with pytest.raises(DataNotFound, match="nowhere does not exist"):
            voc(str(tmp_path / "nowhere"))
        (tmp_path / "file.tar").write_bytes(b"no tar file")
        with pytest.raises(InputError, match="as a tar file"):
            voc(str(tmp_path / "file.tar"))
        (tmp_path / "other").mkdir()
        with pytest.raises(InputError, match="holds 0 folders with ImageSets"):
            voc(str(pack(tmp_path / "other", tmp_path / "other.tar.gz")))
        write_image(tmp_path / "bare", "a", [])
        (tmp_path / "bare/ImageSets/Main/all.txt").write_text("a")
        with pytest.raises(InputError, match="no box of any object"):
            voc(str(tmp_path / "bare"), train="all", validation="all", test=None)

    @pytest.mark.parametrize("packing", ["gz", "xz", "bz2"])
    def test_a_damaged_tar_file_is_named(self, tmp_path: Path, packing: str) -> None:
        write_voc(tmp_path / "voc")
        with tarfile.open(tmp_path / "voc.tar", f"w:{packing}") as archive:
            archive.add(tmp_path / "voc", "voc")
        content = bytearray((tmp_path / "voc.tar").read_bytes())
        middle = len(content) // 2
        content[middle : middle + 30] = b"\xff" * 30
        (tmp_path / "voc.tar").write_bytes(content)
        with pytest.raises(InputError, match=r"voc\.tar is not usable as a tar file"):
            voc(str(tmp_path / "voc.tar"))

    def test_without_pillow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_voc(tmp_path)
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(MissingDependency, match="pillow"):
            voc(str(tmp_path))


class TestBloodCells:
    @pytest.fixture
    def data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("LILLIPUT_DATA", str(tmp_path))
        monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(_files, "SYSTEM", tmp_path / "system")
        return tmp_path

    def test_packed_or_not(self, data: Path) -> None:
        with pytest.raises(DataNotFound, match="Shenggan/BCCD_Dataset"):
            bccd()
        folder = write_voc(data / "bccd" / "BCCD", ("RBC", "Platelets"))
        write_image(folder, "c", [("WBC", (1, 1, 9, 9))])
        plain = bccd(height=16, width=20)
        assert plain.classes == ("RBC", "WBC", "Platelets")
        assert plain.train.target[..., 4].tolist() == [[1, 0], [3, 1]]
        pack(folder, data / "bccd" / "bccd.tar.gz")
        assert torch.equal(bccd(height=16, width=20).train.inputs, plain.train.inputs)

    @pytest.mark.data
    @pytest.mark.skipif(not (REAL / "bccd").is_dir(), reason="needs LILLIPUT_DATA with bccd")
    def test_the_real_data_have_their_counts(self) -> None:
        task = bccd()
        parts = (task.train, task.validation, task.test)
        assert [p.samples for p in parts] == [205, 87, 72]
        counts = sum((p.target[..., 4].long().flatten().bincount(minlength=4) for p in parts), 0)
        assert counts[1:].tolist() == [4153, 372, 361] and task.dropped == 2  # type: ignore[index]
        sides = task.train.target[..., 2:4] - task.train.target[..., :2]
        medians = [sides[task.train.target[..., 4] == c].prod(1).sqrt().median() for c in (1, 2, 3)]
        assert [round(float(m)) for m in medians] == pytest.approx([51, 94, 22], abs=2)


class TestMirrors:
    def test_boxes_go_with_the_pixels(self) -> None:
        images, target = torch.zeros(2, 3, 16, 20), torch.zeros(2, 2, 6)
        images[:, :, 4:10, 2:7] = 1
        target[:, 0] = torch.tensor([2.0, 4, 7, 10, 2, 1])
        for dim, box in ((-1, [13, 4, 18, 10]), (-2, [2, 6, 7, 12])):
            x, boxes = flipped(images, target, dim, torch.tensor([True, False]))
            assert boxes[0].tolist() == [[*box, 2, 1], [0] * 6]
            assert torch.equal(boxes[1], target[1]) and torch.equal(x[1], images[1])
            x1, y1, x2, y2 = box
            assert x[0, :, y1:y2, x1:x2].all() and x[0].sum() == images[0].sum()

    def test_are_drawn_from_the_seed(self) -> None:
        images = torch.arange(20.0).expand(64, 3, 16, 20)
        target = torch.tensor([[[2.0, 4, 7, 10, 2, 0]]]).expand(64, 1, 6)
        batches = BoxBatches(images, target, 64, flips=(-1, -2))
        assert batches.augmented and not BoxBatches(images, target, 64).augmented

        def boxes(seed: int) -> Tensor:
            batches.reshuffle(seed)
            return next(iter(batches)).target

        assert torch.equal(boxes(1), boxes(1)) and not torch.equal(boxes(1), boxes(2))
        kinds = {tuple(row) for row in boxes(1)[:, 0, :4].tolist()}
        assert kinds == {(2, 4, 7, 10), (13, 4, 18, 10), (2, 6, 7, 12), (13, 6, 18, 12)}


# -- mean average precision ---------------------------------------------------------------------


def rows(*values: tuple[float, ...]) -> Tensor:
    return torch.tensor([values], dtype=torch.float32).view(1, -1, 6)


BOX, AWAY = (0.0, 0, 10, 10), (50.0, 50, 60, 60)


def score(output: Tensor, target: Tensor, classes: int = 1, **settings: Any) -> list[float | None]:
    metric = MeanAveragePrecision(classes, **settings)
    metric.update(output, target)
    return metric.per_class()


class TestAveragePrecision:
    def test_by_hand(self) -> None:
        """Right, wrong, right, of three boxes: precision 1 up to a third, 2/3 up to two thirds."""
        target = rows((*BOX, 1, 0), (*AWAY, 1, 0), (80, 80, 90, 90, 1, 0))
        output = rows((*AWAY, 0.7, 1), (20, 20, 30, 30, 0.8, 1), (*BOX, 0.9, 1))
        assert score(output, target) == pytest.approx([100 * (1 + 2 / 3) / 3])
        # At recalls 0, .1, .2, .3 it is 1, at .4, .5, .6 it is 2/3, beyond 0.
        assert score(output, target, points=11) == pytest.approx([100 * (4 + 3 * 2 / 3) / 11])

    def test_a_second_detection_of_a_box_is_wrong(self) -> None:
        """The more probable one counts, wherever it stands, and even if the other fits better."""
        target = rows((*BOX, 1, 0))
        output = rows((*BOX, 0.6, 1), (0, 0, 10, 8, 0.7, 1))
        assert score(output, target) == [100.0]
        output[0, 1, 3] = 4.0  # overlaps by 0.4 only
        assert score(output, target) == [50.0]

    def test_a_detection_claims_the_box_that_it_overlaps_most(self) -> None:
        target = rows((0, 0, 10, 10, 1, 0), (0, 2, 10, 12, 1, 0))
        output = rows((0, 0, 10, 11, 0.9, 1), (0, 0, 10, 10, 0.8, 1))
        # 10/11 with the first; the second detection finds it taken, though the other box is free.
        assert score(output, target) == [50.0]

    def test_exactly_enough_is_enough(self) -> None:
        assert score(rows((0, 0, 10, 5, 0.9, 1)), rows((*BOX, 1, 0))) == [100.0]

    def test_difficult_boxes_count_neither_way(self) -> None:
        target = rows((*BOX, 1, 1), (*AWAY, 1, 0))
        output = rows((*BOX, 0.9, 1), (*BOX, 0.8, 1), (*AWAY, 0.7, 1))
        assert score(output, target) == [100.0]

    def test_classes_are_apart_and_absent_ones_left_out(self) -> None:
        target = rows((*BOX, 1, 0), (*AWAY, 3, 0))
        output = rows((*BOX, 0.9, 2), (*AWAY, 0.8, 3))
        metric = MeanAveragePrecision(3)
        metric.update(output, target)
        assert metric.per_class() == [0.0, None, 100.0]
        assert metric.compute() == 50.0

    def test_padding_is_nothing(self) -> None:
        target = torch.cat([rows((*BOX, 1, 0)), torch.zeros(1, 3, 6)], 1)
        output = torch.cat([rows((*BOX, 0.9, 1)), torch.zeros(1, 5, 6)], 1)
        assert score(output, target) == [100.0]

    def test_images_are_ranked_together(self) -> None:
        """A sure mistake in one image stands before a right detection in another."""
        metric = MeanAveragePrecision(1)
        metric.update(rows((*BOX, 0.5, 1)), rows((*BOX, 1, 0)))
        metric.update(rows((*AWAY, 0.9, 1)), torch.zeros(1, 1, 6))
        assert metric.compute() == 50.0
        metric.reset()
        metric.update(rows((*BOX, 0.5, 1)), rows((*BOX, 1, 0)))
        assert metric.compute() == 100.0

    @given(seed=st.integers(0, 1000), points=st.sampled_from([None, 11]))
    @settings(max_examples=40)
    def test_is_the_challenges_own_loop(self, seed: int, points: int | None) -> None:
        generator = torch.Generator().manual_seed(seed)
        corner = torch.randint(0, 12, (2, 3, 20, 2), generator=generator).float()
        size = torch.randint(4, 9, (2, 3, 20, 2), generator=generator)
        boxes = torch.cat([corner, corner + size], -1)
        label = torch.randint(0, 3, (2, 3, 20, 1), generator=generator).float()
        chance = torch.rand(3, 20, 1, generator=generator)
        difficult = (torch.rand(3, 6, 1, generator=generator) < 0.2).float()
        output = torch.cat([boxes[0], chance, label[0]], -1)
        target = torch.cat([boxes[1, :, :6], label[1, :, :6], difficult], -1)
        target[..., 5] *= target[..., 4] > 0
        found = score(output, target, 2, points=points)
        assert found == pytest.approx([by_the_rules(output, target, c, points) for c in (1, 2)])

    def test_it_is_a_metric_of_the_engine(self) -> None:
        metric = MeanAveragePrecision(1)
        assert isinstance(metric, Metric)
        target = rows((*BOX, 1, 0))

        class Perfect(torch.nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return rows((*BOX, 0.9, 1)).expand(len(images), 1, 6)

        batches = [(torch.zeros(2, 3, 8, 8), target.expand(2, 1, 6))] * 2
        assert evaluate(Perfect(), batches, metric) == 100.0
        with pytest.raises(ModelMismatch, match="shape"):
            evaluate(torch.nn.Flatten(), batches, metric)

    def test_refuses(self) -> None:
        with pytest.raises(InputError, match="no box"):
            MeanAveragePrecision(2).compute()
        for wrong in ({"classes": 0}, {"overlap": 1.0}, {"points": 1}):
            with pytest.raises(InputError, match="at least 1 class"):
                MeanAveragePrecision(**{"classes": 1, **wrong})


def by_the_rules(output: Tensor, target: Tensor, label: int, points: int | None) -> float | None:
    """Detections one after the other, as the challenge describes it."""
    from lilliput.mechanisms.boxes import iou

    boxes = sum(int(row[4]) == label and not row[5] for image in target for row in image)
    if not boxes:
        return None
    told = [(float(d[4]), n, d) for n, image in enumerate(output) for d in image if d[5] == label]
    taken: set[tuple[int, int]] = set()
    right, wrong, curve = 0, 0, []
    for _, image, detection in sorted(told, key=lambda t: -t[0]):
        overlaps = [
            float(iou(detection[None, :4], row[None, :4])) if row[4] == label else -1.0
            for row in target[image]
        ]
        best = max(range(len(overlaps)), key=lambda k: overlaps[k])
        if overlaps[best] >= 0.5 and target[image, best, 5]:
            continue
        if overlaps[best] >= 0.5 and (image, best) not in taken:
            taken.add((image, best))
            right += 1
        else:
            wrong += 1
        curve.append((right / boxes, right / (right + wrong)))
    at = [max((p for r, p in curve if r >= k / 10 - 1e-9), default=0.0) for k in range(11)]
    if points == 11:
        return 100 * sum(at) / 11
    area, before = 0.0, 0.0
    for recall, _ in curve:
        area += (recall - before) * max(p for r, p in curve if r >= recall)
        before = recall
    return 100 * area


def test_a_broken_stream_is_no_tar_file(tmp_path: Path) -> None:
    packed = pack(write_voc(tmp_path / "voc"), tmp_path / "voc.tar.gz")
    packed.write_bytes(io.BytesIO(packed.read_bytes()).read(300))
    with pytest.raises(InputError, match=r"voc\.tar\.gz is not usable as a tar file"):
        voc(str(packed))
