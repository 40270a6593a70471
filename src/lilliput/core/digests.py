"""Hashes that are the same in every process: of seeds and of networks."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def mix(*parts: object) -> int:
    """63 bits from any parts."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def weights_digest(*networks: nn.Module) -> str:
    """A hash of all parameters and buffers, names included."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
