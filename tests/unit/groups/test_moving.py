"""Operators that only move entries: labels must say which entries of the output go.

An entry goes if any of its indices goes. So the operator, applied to a tensor that says which entries
stay, must give the tensor that the output's labels say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lilliput.mechanisms.groups.labels import Dims, Solution
from lilliput.mechanisms.groups.trace import Trace
from lilliput.mechanisms.groups.tracing import _Operators

Move = Callable[[Tensor], Any]

MOVES: dict[str, tuple[tuple[int, ...], Move]] = {
    "merge": ((2, 4, 3, 5), lambda x: x.flatten(1)),
    "merge in the middle": ((2, 4, 3, 5), lambda x: x.flatten(1, 2)),
    "split": ((2, 12, 3), lambda x: x.view(2, 3, 4, 3)),
    "split in three": ((2, 24), lambda x: x.view(2, 2, 3, 4)),
    "split and merge again": ((2, 12, 3), lambda x: x.view(2, 3, 4, 3).reshape(2, 12, 3)),
    "shuffle": ((2, 12, 3), lambda x: x.view(2, 3, 4, 3).transpose(1, 2).reshape(2, 12, 3)),
    "regroup": ((2, 6, 4), lambda x: x.reshape(2, 4, 6)),
    "squeeze and unsqueeze": ((2, 4, 1, 3), lambda x: x.squeeze(2).unsqueeze(1)),
    "permute": ((2, 4, 3, 5), lambda x: x.permute(3, 0, 2, 1)),
    "movedim": ((2, 4, 3, 5), lambda x: x.movedim(1, -1)),
    "matrix transpose": ((2, 4, 3), lambda x: x.mT),
    "flip": ((2, 4, 3), lambda x: x.flip(1)),
    "roll": ((2, 4, 3), lambda x: x.roll(1, 1)),
    "slice": ((2, 6, 3), lambda x: x[:, 2:5]),
    "every second": ((2, 6, 3), lambda x: x[:, 1::2]),
    "every second of an odd number": ((2, 7, 3), lambda x: x[:, ::2]),
    "narrow": ((2, 6, 3), lambda x: x.narrow(1, 1, 4)),
    "select": ((2, 6, 3), lambda x: x[:, 2]),
    "select from the end": ((2, 6, 3), lambda x: x[:, -2]),
    "chunk": ((2, 6, 3), lambda x: x.chunk(2, 1)),
    "chunk with a remainder": ((2, 7, 3), lambda x: x.chunk(3, 1)),
    "split with sizes": ((2, 7, 3), lambda x: x.split([2, 4, 1], 1)),
    "unbind": ((2, 4, 3), lambda x: x.unbind(1)),
    "cat": ((2, 4, 3), lambda x: torch.cat([x, x.flip(1), x[:, 1:]], 1)),
    "stack": ((2, 4, 3), lambda x: torch.stack([x, x.flip(1)], 1)),
    "stack and merge": ((2, 4, 3), lambda x: torch.stack([x, x], 2).flatten(1, 2)),
    "repeat": ((2, 4, 3), lambda x: x.repeat(1, 3, 1)),
    "repeat_interleave": ((2, 4, 3), lambda x: x.repeat_interleave(2, 1)),
    "pixel_shuffle": ((2, 8, 3, 3), lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": ((2, 3, 4, 4), lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": ((2, 12, 3, 3), lambda x: F.channel_shuffle(x, 3)),
    "unfold": ((2, 3, 4, 4), lambda x: F.unfold(x, 2)),
    "windows": ((2, 6, 3), lambda x: x.unfold(1, 2, 2)),
    "index_select": ((2, 6, 3), lambda x: x.index_select(1, torch.tensor([0, 2]))),
    "index": ((2, 6, 3), lambda x: x[:, torch.tensor([[0, 2], [1, 3]])]),
    "gather": ((2, 6, 3), lambda x: x.gather(1, torch.tensor([[[0] * 3] * 2] * 2))),
    "crop by padding": ((2, 6, 3), lambda x: F.pad(x, (0, 0, -1, -2))),
    "diagonal": ((2, 6, 6), lambda x: x.diagonal(0, 1, 2)),
    "contiguous": ((2, 6, 3), lambda x: x.transpose(1, 2).contiguous()),
}


def followed(
    shape: tuple[int, ...], move: Move, only: int | None = None
) -> tuple[Trace, Dims, list[Dims]]:
    """Labels before and after; the batch stays, and with ``only`` every other dim."""
    trace = Trace()
    x = torch.empty(shape, device="meta")
    before = trace.fresh(shape)
    for k, dim in enumerate(before):
        if k == 0 or len(dim) == 1 or only not in (None, k):  # a group keeps at least one channel
            before[k] = trace.labels.still(len(dim))
    trace.put(x, before)
    with _Operators(trace, torch.nn.Module()):
        out = move(x)
    outs = [out] if isinstance(out, Tensor) else list(out)
    return trace, before, [trace.dims(t) for t in outs]


def stays(dims: Dims, keeps: np.ndarray) -> Tensor:
    """Which entries of a tensor stay."""
    mask = torch.ones([len(d) for d in dims], dtype=torch.bool)
    for k, dim in enumerate(dims):
        kept = torch.from_numpy(keeps[np.maximum(dim, 0)])
        mask &= kept.view([-1 if k == j else 1 for j in range(len(dims))])
    return mask


def random_keeps(solution: Solution, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (solution.fixed | (generator.random(len(solution.fixed)) < 0.6))[solution.of]


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("seed", range(3))
def test_entries_that_go_are_those_that_the_labels_say(name: str, seed: int) -> None:
    shape, move = MOVES[name]
    trace, before, after = followed(shape, move)
    keeps = random_keeps(trace.labels.solve(), seed)
    moved = move(stays(before, keeps).double())
    moved = [moved] if isinstance(moved, Tensor) else list(moved)
    for tensor, dims in zip(moved, after, strict=True):
        assert torch.equal(tensor.bool(), stays(dims, keeps))


@pytest.mark.parametrize(
    "name", ["merge", "split", "shuffle", "chunk", "cat", "every second", "pixel_shuffle", "unfold"]
)
def test_channels_survive_the_move(name: str) -> None:
    shape, move = MOVES[name]
    trace, before, _ = followed(shape, move, only=1)
    assert trace.labels.solve().live(before[1]).all()


SHAPES = st.sampled_from(
    [(2, 3, 4), (6, 4), (2, 12), (24,), (4, 2, 3), (2, 2, 2, 3), (3, 8), (1, 24)]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(SHAPES, min_size=2, max_size=4), st.integers(0, 100))
def test_any_chain_of_views_keeps_the_order(shapes: list[tuple[int, ...]], seed: int) -> None:
    def move(x: Tensor) -> Tensor:
        for shape in shapes[1:]:
            x = x.reshape(shape)
        return x

    trace, before, (after,) = followed(shapes[0], move)
    keeps = random_keeps(trace.labels.solve(), seed)
    moved = move(stays(before, keeps).double())
    assert torch.equal(moved.bool(), stays(after, keeps))
