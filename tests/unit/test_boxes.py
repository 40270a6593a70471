"""Boxes: overlap, shifts, anchors, suppression and RoIAlign, against loops that follow the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lilliput.mechanisms.boxes import (
    LARGEST,
    align,
    anchor_grid,
    anchor_shapes,
    clip,
    decode,
    encode,
    iou,
    suppress,
)


def random_boxes(count: int, seed: int, side: float = 100.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ends = torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * side
    return torch.cat([ends.amin(1), ends.amax(1) + 0.1], 1)


def overlap_by_hand(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    common = width * height
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / both if both > 0 else 0.0


class TestOverlap:
    def test_of_all_pairs(self) -> None:
        a, b = random_boxes(6, 0), random_boxes(5, 1)
        wanted = [[overlap_by_hand(x, y) for y in b.tolist()] for x in a.tolist()]
        torch.testing.assert_close(iou(a, b), torch.tensor(wanted, dtype=torch.float64))

    def test_of_batches(self) -> None:
        a, b = random_boxes(12, 2).view(3, 4, 4), random_boxes(6, 3).view(3, 2, 4)
        assert torch.equal(iou(a, b), torch.stack([iou(x, y) for x, y in zip(a, b, strict=True)]))

    def test_of_boxes_without_an_area_is_zero(self) -> None:
        none = torch.tensor([[3.0, 3, 3, 3], [5, 5, 4, 4], [0, 0, 0, 0]])
        assert torch.equal(iou(none, none), torch.zeros(3, 3))


class TestShifts:
    @given(seed=st.integers(0, 10_000))
    def test_decode_undoes_encode(self, seed: int) -> None:
        boxes, anchors = random_boxes(8, seed), random_boxes(8, seed + 1)
        # Beyond the limit of what a shift may enlarge there is no way back.
        size = lambda b: b[:, 2:] - b[:, :2]  # noqa: E731
        near = (size(boxes) / size(anchors)).log().amax(1) < LARGEST
        for deviation in ((1.0, 1.0), (0.1, 0.2)):
            back = decode(encode(boxes, anchors, deviation), anchors, deviation)
            torch.testing.assert_close(back[near], boxes[near])

    def test_by_hand(self) -> None:
        anchor, box = torch.tensor([0.0, 0, 10, 20]), torch.tensor([5.0, 10, 25, 20])
        # Centers (5, 10) and (15, 15), sizes (10, 20) and (20, 10).
        wanted = torch.tensor([1.0, 0.25, math.log(2), -math.log(2)])
        torch.testing.assert_close(encode(box, anchor), wanted)
        torch.testing.assert_close(
            encode(box, anchor, (0.1, 0.2)), wanted / torch.tensor([0.1, 0.1, 0.2, 0.2])
        )

    def test_an_untrained_network_gives_finite_boxes(self) -> None:
        wild = decode(torch.full((4,), 1e4), torch.tensor([0.0, 0, 8, 8]))
        assert wild.isfinite().all()

    def test_clipped(self) -> None:
        boxes = torch.tensor([[-3.0, -4, 500, 600], [400, 300, 500, 320]])
        assert clip(boxes, 240, 320).tolist() == [[0, 0, 320, 240], [320, 240, 320, 240]]


def test_anchors_stand_around_the_centers_of_cells() -> None:
    shapes = torch.tensor(anchor_shapes([8, 16], [0.25, 1]))
    grid = anchor_grid(shapes, rows=2, columns=3, stride=4)
    assert grid.shape == (2 * 3 * 4, 4)
    number = 0
    for row in range(2):
        for column in range(3):
            for size in (8, 16):
                for ratio in (0.25, 1.0):
                    x1, y1, x2, y2 = grid[number].tolist()
                    assert ((x1 + x2) / 2, (y1 + y2) / 2) == (4 * column + 2, 4 * row + 2)
                    assert (x2 - x1) * (y2 - y1) == size**2
                    assert (y2 - y1) / (x2 - x1) == ratio
                    number += 1


def greedy(boxes: list[list[float]], overlap: float, labels: list[int]) -> list[bool]:
    stay: list[bool] = []
    for number, box in enumerate(boxes):
        stay.append(
            not any(
                stay[k] and labels[k] == labels[number] and overlap_by_hand(boxes[k], box) > overlap
                for k in range(number)
            )
        )
    return stay


class TestSuppression:
    @given(seed=st.integers(0, 10_000), overlap=st.sampled_from([0.1, 0.3, 0.5, 0.7]))
    @settings(max_examples=60)
    def test_is_the_greedy_rule(self, seed: int, overlap: float) -> None:
        boxes = random_boxes(40, seed, side=30.0)
        labels = torch.randint(2, (40,), generator=torch.Generator().manual_seed(seed))
        assert suppress(boxes, overlap).tolist() == greedy(boxes.tolist(), overlap, [0] * 40)
        wanted = greedy(boxes.tolist(), overlap, labels.tolist())
        assert suppress(boxes, overlap, labels).tolist() == wanted

    def test_a_long_chain_needs_many_rounds(self) -> None:
        """Each box overlaps with its neighbors only: every second one stays."""
        start = torch.arange(31.0) * 4
        boxes = torch.stack([start, start * 0, start + 10, start * 0 + 10], 1)
        assert suppress(boxes, 0.4).tolist() == [k % 2 == 0 for k in range(31)]

    def test_batches_do_not_see_each_other(self) -> None:
        boxes = torch.stack([random_boxes(20, seed, side=20.0) for seed in range(3)])
        assert torch.equal(suppress(boxes, 0.3), torch.stack([suppress(b, 0.3) for b in boxes]))

    def test_on_the_meta_device_it_ends(self) -> None:
        assert suppress(torch.zeros(2, 5, 4, device="meta"), 0.5).shape == (2, 5)


def bilinear(plane: list[list[float]], y: float, x: float) -> float:
    rows, columns = len(plane), len(plane[0])
    if y < -1 or y > rows or x < -1 or x > columns:
        return 0.0
    y, x = min(max(y, 0.0), rows - 1.0), min(max(x, 0.0), columns - 1.0)
    top, left = min(int(y), rows - 2), min(int(x), columns - 2)
    down, right = y - top, x - left
    return (
        plane[top][left] * (1 - down) * (1 - right)
        + plane[top][left + 1] * (1 - down) * right
        + plane[top + 1][left] * down * (1 - right)
        + plane[top + 1][left + 1] * down * right
    )


def align_by_hand(
    plane: list[list[float]], box: list[float], cells: int, stride: float, samples: int, half: bool
) -> list[list[float]]:
    shift = 0.5 if half else 0.0
    x1, y1, x2, y2 = (edge / stride - shift for edge in box)
    found = [[0.0] * cells for _ in range(cells)]
    for row in range(cells):
        for column in range(cells):
            for j in range(samples):
                for i in range(samples):
                    y = y1 + (row + (j + 0.5) / samples) * (y2 - y1) / cells
                    x = x1 + (column + (i + 0.5) / samples) * (x2 - x1) / cells
                    found[row][column] += bilinear(plane, y, x) / samples**2
    return found


class TestAlign:
    @pytest.mark.parametrize(
        ("cells", "stride", "samples", "half"), [(3, 8.0, 2, True), (2, 4.0, 3, False)]
    )
    def test_is_a_mean_of_bilinear_samples(
        self, cells: int, stride: float, samples: int, half: bool
    ) -> None:
        maps = torch.randn(
            2, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        inside = random_boxes(8, 1, side=6 * stride)
        beyond = torch.tensor(
            [[-3 * stride, -stride, 9 * stride, 2 * stride], [0, 0, 7 * stride, 6 * stride]]
        )
        boxes = torch.cat([inside, beyond.double()]).view(2, 5, 4)
        found = align(maps, boxes, cells, stride, samples, half=half)
        assert found.shape == (2, 5, 3, cells, cells)
        for b in range(2):
            for n in range(5):
                for c in range(3):
                    wanted = align_by_hand(
                        maps[b, c].tolist(), boxes[b, n].tolist(), cells, stride, samples, half
                    )
                    torch.testing.assert_close(found[b, n, c], torch.tensor(wanted).double())

    def test_gradient_reaches_the_maps_and_not_the_boxes(self) -> None:
        maps = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
        boxes = random_boxes(3, 4, side=16.0)[None].requires_grad_()
        assert torch.autograd.gradcheck(lambda m: align(m, boxes, 2, 4.0), maps)
        align(maps, boxes, 2, 4.0).sum().backward()
        assert boxes.grad is None
