"""Each kind of layer: its channels are found, and a network cut by hand equals the silenced one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cutting import cut, error, randomize, removal, zeroed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lilliput.mechanisms import surgery
from lilliput.mechanisms.groups import exported, find_groups


class Code(nn.Module):
    """Layers, and a forward pass over them."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.code = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def head(inputs: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 3))


def conv(a: int, b: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, size, padding=size // 2, **options)


def image(channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size)


def tokens() -> Tensor:
    return torch.randn(2, 5, 8)


def attend(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, m.heads, -1).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
    return m.out(m.proj(mixed.transpose(1, 2).reshape(b, n, -1)))


def separate_attention(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = (f(x).view(b, n, m.heads, m.width).transpose(1, 2) for f in (m.q, m.k, m.v))
    mixed = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    return m.out(mixed.transpose(1, 2).reshape(b, n, -1))


def excite(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    gate = m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))).sigmoid()
    return m.head(x * gate)


def shuffle(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    b, c, h, w = x.shape
    x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    return m.head(m.b(x))


def half_branch(m: Any, x: Tensor) -> Tensor:
    left, right = m.first(x).chunk(2, 1)
    return m.head(torch.cat([left, m.branch(right)], 1))


def position(m: Any, x: Tensor) -> Tensor:
    return m.out(F.gelu(m.first(x) + m.table) * m.scale)


def last_state(m: Any, x: Tensor) -> Tensor:
    return m.out(m.recurrent(x)[0][:, -1])


#: name -> network, example, whether every channel can go that is neither input nor output.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "plain": (lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), head()), image),
    "one-dimensional": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 6, 3, dilation=2), nn.Flatten(),
            nn.Linear(6 * 4, 2),
        ),
        lambda: torch.randn(2, 3, 10),
    ),
    "three-dimensional": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 1, groups=4), nn.Flatten(), nn.Linear(32, 2)
        ),
        lambda: torch.randn(2, 1, 4, 4, 4),
    ),
    "depthwise": (
        lambda: nn.Sequential(conv(3, 8, 1), conv(8, 8, groups=8), conv(8, 8, 1), head()), image,
    ),
    "depthwise that multiplies": (
        lambda: nn.Sequential(conv(3, 4, 1), conv(4, 8, groups=4), nn.ReLU(), head()), image,
    ),
    "grouped": (
        lambda: nn.Sequential(conv(3, 8), conv(8, 12, groups=2), nn.ReLU(), head(12)), image,
    ),
    "grouped twice": (
        lambda: nn.Sequential(conv(3, 12), conv(12, 12, groups=2), conv(12, 12, groups=3), head(12)),
        image,
    ),
    "transposed": (
        lambda: nn.Sequential(
            conv(3, 6), nn.ConvTranspose2d(6, 8, 2, stride=2), nn.ReLU(), head()
        ), image,
    ),
    "transposed and grouped": (
        lambda: nn.Sequential(conv(3, 16), nn.ConvTranspose2d(16, 16, 2, groups=4), head(16)), image,
    ),
    "group norm": (
        lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(8, 8), nn.ReLU(), conv(8, 8), head()), image,
    ),
    "prelu": (lambda: nn.Sequential(conv(3, 8), nn.PReLU(8), head()), image),
    "residual": (
        lambda: Code(
            lambda m, x: m.head(F.relu(m.first(x) + m.b(F.relu(m.a(m.first(x)))))),
            first=conv(3, 8), a=conv(8, 6), b=conv(6, 8), head=head(),
        ), image,
    ),
    "dense": (
        lambda: Code(
            lambda m, x: m.head(torch.cat([m.first(x), m.second(m.first(x))], 1)),
            first=conv(3, 5), second=conv(5, 3), head=head(),
        ), image,
    ),
    "split": (
        lambda: Code(half_branch, first=conv(3, 8), branch=conv(4, 4), head=head()), image,
    ),
    "shuffled": (
        lambda: Code(shuffle, a=conv(3, 8), b=conv(8, 8, groups=2), head=head()), image,
    ),
    "pixel shuffle": (
        lambda: nn.Sequential(conv(3, 16), nn.PixelShuffle(2), conv(4, 8), head()), image,
    ),
    "squeeze and excitation": (
        lambda: Code(excite, first=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), head=head()),
        image,
    ),
    "flatten": (
        lambda: nn.Sequential(conv(3, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(80, 6), nn.Linear(6, 2)),
        image,
    ),
    "attention": (
        lambda: Code(attend, qkv=nn.Linear(8, 24), proj=nn.Linear(8, 6), out=nn.Linear(6, 2), heads=2),
        tokens,
    ),
    "attention in three parts": (
        lambda: Code(
            separate_attention, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8),
            out=nn.Linear(8, 2), heads=2, width=4,
        ), tokens,
    ),
    "einsum": (
        lambda: Code(
            lambda m, x: m.out(torch.einsum("bnc,cd->bnd", m.first(x), m.matrix)),
            first=nn.Linear(8, 6), matrix=nn.Parameter(torch.randn(6, 4)), out=nn.Linear(4, 2),
        ), tokens,
    ),
    "position table and layer scale": (
        lambda: Code(
            position, first=nn.Linear(8, 6), table=nn.Parameter(torch.randn(1, 5, 6)),
            scale=nn.Parameter(torch.randn(6)), out=nn.Linear(6, 2),
        ), tokens,
    ),
    "gated": (
        lambda: Code(
            lambda m, x: m.out(torch.mul(*m.both(x).chunk(2, -1))), both=nn.Linear(8, 12),
            out=nn.Linear(6, 2),
        ), tokens,
    ),
    "LSTM": (
        lambda: Code(last_state, recurrent=nn.LSTM(8, 6, batch_first=True), out=nn.Linear(6, 2)),
        tokens,
    ),
    "GRU in both directions": (
        lambda: Code(
            last_state, recurrent=nn.GRU(8, 6, batch_first=True, bidirectional=True),
            out=nn.Linear(12, 2),
        ), tokens,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75])
def test_a_cut_network_equals_the_silenced_one(name: str, keep: float) -> None:
    torch.manual_seed(0)
    build, example = NETWORKS[name]
    model, x = randomize(build().double()), example().double()
    groups = find_groups(model, x)
    assert groups.groups, groups.unprunable
    gone = removal(groups, keep, exact=True)
    assert gone
    thin = cut(model, groups, gone)
    assert error(thin, zeroed(model, groups, gone), x) < 1e-12
    assert sum(p.numel() for p in thin.parameters()) < sum(p.numel() for p in model.parameters())


def test_layer_norm_is_cut_but_not_comparable() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    groups = find_groups(model, tokens().double())
    assert groups.groups[0].mixed_by
    thin = cut(model, groups, removal(groups))
    assert thin[1].normalized_shape == (3,)
    assert thin(tokens().double()).shape == (2, 5, 2)


def test_all_of_a_group_norm_s_groups_lose_the_same() -> None:
    model = nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), head())
    groups = find_groups(model, image())
    assert [g.channels for g in groups.groups] == [2]  # one offset in each of the four
    assert cut(model, groups, removal(groups))(image()).shape == (2, 3)


def test_tied_weights_are_one_member() -> None:
    encoder, decoder = nn.Linear(6, 4), nn.Linear(4, 6)
    decoder.weight = nn.Parameter(encoder.weight.t().contiguous())
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    model = nn.Sequential(nn.Linear(3, 5), first, second, nn.Linear(5, 2))
    groups = find_groups(model, torch.zeros(1, 3))
    tensors = {m.tensor for g in groups.groups for m in g.members}
    assert "1.weight" in tensors
    assert "2.weight" not in tensors


def test_whole_heads_can_go() -> None:
    model = NETWORKS["attention"][0]().double()
    x = tokens().double()
    groups = find_groups(model, x, heads="whole")
    attention = next(g for g in groups.groups if g.layers == ("qkv",) or "qkv" in g.layers)
    assert attention.channels == 2
    number = groups.groups.index(attention)
    thin = cut(model, groups, {number: np.array([0])})
    assert thin.heads == 1
    assert thin.qkv.weight.shape == (12, 8)
    assert thin(x).shape == (2, 5, 2)


def test_an_unknown_operator_keeps_its_channels_and_is_named() -> None:
    model = Code(lambda m, x: m.b(torch.linalg.qr(m.a(x))[0]), a=nn.Linear(8, 5), b=nn.Linear(5, 2))
    groups = find_groups(model, tokens())
    assert not groups.groups
    assert any("qr" in why for why in groups.unprunable.values())


def test_numbers_in_the_code_hold_channels_unless_exported() -> None:
    model = Code(
        lambda m, x: m.b(m.a(x).view(-1, 5, 2, 3).flatten(2)), a=nn.Linear(8, 6), b=nn.Linear(6, 2)
    ).double().eval()  # fmt: skip
    x = tokens().double()
    assert not find_groups(model, x).groups
    assert find_groups(model, x).constants
    graph = exported(model, x)
    torch.testing.assert_close(graph(x), model(x))
    groups = find_groups(graph, x)
    assert groups.groups
    gone = removal(groups)
    assert error(cut(graph, groups, gone), zeroed(graph, groups, gone), x) < 1e-12


def test_weight_normalization_is_one_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    plain = find_groups(model, tokens())
    parametrizations.weight_norm(model[0])
    parametrizations.weight_norm(model[2])
    groups = find_groups(model, tokens())
    found, known = ({m.tensor for m in g.groups[0].members} for g in (groups, plain))
    assert found == known
    done = surgery.cut(model, groups, {0: np.array([1, 4])}, inputs=tokens())
    assert done.error is not None
    assert model[2].weight.shape == (2, 4)
