"""Everything random, in one place: seeding, saving and restoring the generators."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..core.digests import mix


def seed_all(*parts: object, deterministic: bool = True) -> None:
    """Seed Python, numpy and torch from the parts."""
    seed = mix(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - users' data code may draw from it
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def reshuffle(batches: Any, *parts: object) -> None:
    """Give batches that can be told the order that belongs to the parts; others draw from the generators."""
    if hasattr(batches, "reshuffle"):
        batches.reshuffle(mix(*parts))


def random_state() -> dict[str, Any]:
    """The state of all generators, as tensors and plain values."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).copy()), place, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Give the caller's generators and determinism setting back, whatever happens inside."""
    state, deterministic = random_state(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        restore_random_state(state)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def restore_random_state(state: dict[str, Any]) -> None:
    """Put all generators back."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy(), place, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
