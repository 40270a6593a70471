"""Tensors that a network holds under several names are in its file once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lilliput import artifact, io
from lilliput.core.recipe import ArtifactSettings
from lilliput.errors import CorruptArtifact


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("profile", ["safetensors", "compact"])
def test_the_file_has_a_tied_tensor_once(tmp_path: Path, profile: str) -> None:
    net, tokens = Tied(), torch.arange(50)
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.randn(50, 16))
    for name, model in (("tied", net), ("untied", untied)):
        io.save(model, tmp_path / name, settings=ArtifactSettings(profile=profile))
    with artifact.open(tmp_path / "tied") as file:
        assert list(file.names()) == ["embedding.weight"]
    sizes = [(tmp_path / name).stat().st_size for name in ("tied", "untied")]
    assert sizes[1] - sizes[0] > 0.9 * 4 * 50 * 16
    loaded = io.load(tmp_path / "tied", model=Tied())
    assert torch.equal(loaded(tokens), net(tokens))
    assert loaded.head.weight is loaded.embedding.weight


def test_equal_tensors_that_are_two_stay_two(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].load_state_dict(net[0].state_dict())
    io.save(net, tmp_path / "net")
    with artifact.open(tmp_path / "net") as file:
        assert len(list(file.names())) == 4


def test_a_fresh_network_without_the_tie_gets_both(tmp_path: Path) -> None:
    net, other = Tied(), Tied()
    other.head.weight = nn.Parameter(torch.zeros(50, 16))
    io.save(net, tmp_path / "net")
    io.load(tmp_path / "net", model=other)
    assert torch.equal(other.head.weight, net.head.weight)


@pytest.mark.parametrize(
    "tied",
    [
        {"head.weight": "nothing"},
        {"embedding.weight": "embedding.weight"},
        {"head.weight": 3},
        ["head.weight"],
    ],
)
def test_a_file_that_lies_about_its_names(tmp_path: Path, tied: object) -> None:
    parts = {"embedding.weight": np.zeros((50, 16), np.float32)}
    artifact.write(tmp_path / "net", parts, structure={"tied": tied}, recipe={}, figures={})
    with pytest.raises(CorruptArtifact, match="tied tensors cannot be"):
        io.load(tmp_path / "net", model=Tied())
