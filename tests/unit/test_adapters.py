"""Adapters bring a student's feature to its teacher's shape, or say why they cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lilliput.errors import ModelMismatch
from lilliput.mechanisms.adapters import build_adapter


@given(
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    hint=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    extra=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_fitnets_kernel_rule(channels, hint, extra) -> None:  # type: ignore[no-untyped-def]
    guided = (hint[0] + extra[0], hint[1] + extra[1])
    adapter = build_adapter("fitnets", (2, channels[0], *guided), (2, channels[1], *hint))
    convolution = adapter[0]
    assert convolution.kernel_size == (guided[0] - hint[0] + 1, guided[1] - hint[1] + 1)
    weights = (extra[0] + 1) * (extra[1] + 1) * channels[0] * channels[1]
    assert convolution.weight.numel() == weights  # the paper's count of a regressor's parameters
    out = adapter(torch.randn(2, channels[0], *guided))
    assert out.shape == (2, channels[1], *hint) and (out >= 0).all()


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        ((4, 8, 5, 5), (4, 8, 5, 5), nn.Identity),
        ((4, 8, 5, 5), (4, 16, 5, 5), nn.Conv2d),
        ((4, 8, 5, 5), (4, 16, 9, 7), nn.Sequential),
        ((4, 12), (4, 20), nn.Linear),
        ((4, 6, 12), (4, 6, 20), nn.Linear),
    ],
)
def test_auto_is_the_least_that_fits(student, teacher, kind) -> None:  # type: ignore[no-untyped-def]
    adapter = build_adapter("auto", student, teacher)
    assert isinstance(adapter, kind)
    assert adapter(torch.randn(student)).shape == teacher


def test_auto_does_not_mix_channels_where_only_sizes_differ() -> None:
    adapter = build_adapter("auto", (1, 8, 4, 4), (1, 8, 8, 8))
    assert not list(adapter.parameters())
    assert adapter(torch.randn(1, 8, 4, 4)).shape == (1, 8, 8, 8)


@pytest.mark.parametrize(
    ("kind", "student", "teacher"),
    [
        ("fitnets", (1, 8, 4, 4), (1, 8, 5, 5)),
        ("identity", (1, 8), (1, 9)),
        ("conv1x1", (1, 8), (1, 9)),
        ("linear", (1, 5, 8), (1, 6, 8)),
        ("interpolate", (1, 8, 4, 4), (1, 9, 4, 4)),
        ("auto", (1, 8, 4, 4), (1, 8)),
    ],
)
def test_what_cannot_be_bridged_is_told(kind, student, teacher) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelMismatch, match=f"adapter '{kind}' cannot"):
        build_adapter(kind, student, teacher)
