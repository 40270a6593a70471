"""What a forward pass is computed in."""

from __future__ import annotations

import pytest
import torch

from lilliput.engine import precision
from lilliput.engine.precision import autocast, fast_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_auto_asks_the_processor(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    with autocast("auto", CPU):
        found = torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype
    assert found == expected == getattr(torch, fast_precision(CPU))


def test_a_torch_that_cannot_be_asked_computes_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert fast_precision(CPU) == "float32"


@pytest.mark.parametrize(
    ("named", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_what_is_named_is_done(named: str, expected: torch.dtype) -> None:
    with precision.autocast(named, CPU):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected
