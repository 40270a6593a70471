"""Random networks of all kinds of blocks: what is cut equals what is silenced, however they are stacked.

``LILLIPUT_DRAWS`` sets how many networks are drawn.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
from cutting import error, randomize, removal, zeroed
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.surgery import cut

DRAWS = int(os.environ.get("LILLIPUT_DRAWS", "160"))
LOTS = 8  # tests, so that processes can share them


def conv(a: int, b: int, size: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(a, b, size, padding=size // 2, groups=groups), nn.BatchNorm2d(b), nn.ReLU()
    )


class Residual(nn.Module):
    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        inner = draw.choice([4, 6])
        self.a, self.b = conv(width, inner), conv(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


class Concatenated(nn.Module):
    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        self.more = draw.choice([2, 4])
        self.a, self.back = conv(width, self.more), conv(width + self.more, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.cat([x, self.a(x)], 1))


class Grouped(nn.Module):
    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        self.a = conv(width, width, 3, draw.choice([2, 4, width]))
        self.b = conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Shuffled(nn.Module):
    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        self.groups = draw.choice([2, 4])
        self.a = conv(width, width, 1, self.groups)
        self.b = conv(width, width, 1, draw.choice([1, self.groups]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.channel_shuffle(self.a(x), self.groups))


class Halved(nn.Module):
    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        self.branch = conv(width // 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([left, self.branch(right)], 1)


class Excited(nn.Module):
    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class Attention(nn.Module):
    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        self.heads = draw.choice([1, 2])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rows = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(rows).view(b, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # With the usual scale, which comes from the width, a thinner head would not be comparable.
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        mixed = mixed.transpose(1, 2).reshape(b, h * w, -1)
        return x + self.out(mixed).transpose(1, 2).reshape(b, c, h, w)


class Upsampled(nn.Module):
    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.up(x), 2)


class Rearranged(nn.Module):
    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        self.a = conv(width // 4, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.a(F.pixel_shuffle(x, 2)), 2)


BLOCKS: tuple[Callable[[int, random.Random], nn.Module], ...] = (
    Residual, Concatenated, Grouped, Shuffled, Halved, Excited, Attention, Upsampled, Rearranged,
)  # fmt: skip


def network(seed: int) -> nn.Module:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width = draw.choice([8, 12, 16])
    blocks = [draw.choice(BLOCKS)(width, draw) for _ in range(draw.randint(1, 4))]
    pixels = draw.choice([1, 2])
    end = [nn.AdaptiveAvgPool2d(pixels), nn.Flatten(), nn.Linear(width * pixels**2, 3)]
    return randomize(nn.Sequential(conv(3, width), *blocks, *end).double(), seed)


def judged(seed: int) -> tuple[float, float]:
    """The error of a random cut of a random network, and how much it took away."""
    draw = random.Random(-1 - seed)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    model = network(seed)
    groups = find_groups(model, x, heads=draw.choice(["channels", "whole"]))
    gone = removal(groups, draw.choice([0.25, 0.5, 0.75]), seed, exact=True)
    whole = zeroed(model, groups, gone)
    before = sum(p.numel() for p in model.parameters())
    cut(model, groups, gone)
    return error(model, whole, x), 1 - sum(p.numel() for p in model.parameters()) / before


@pytest.mark.parametrize("lot", range(LOTS))
def test_random_cuts_of_random_networks(lot: int) -> None:
    taken = []
    for seed in range(lot, DRAWS, LOTS):
        worst, share = judged(seed)
        assert worst < 1e-10, f"network {seed} differs by {worst:.1e}"
        taken.append(share)
    assert sum(taken) / len(taken) > 0.2
