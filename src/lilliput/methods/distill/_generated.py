"""Generated inputs in a file, and dropout that drops the same each time, for data-free distillation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ...core.files import unfinished
from ...core.run import Run
from ...core.types import Batch

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Generated:
    """Inputs that stand for a training set.

    Attributes:
        inputs: ``(inputs, ...)``.
        labels: int64, the classes that they were made for.
        before: mean reconstruction loss at the start.
        after: and at the end.
        accuracy: percentage that the teacher takes for the class that they were made for.
    """

    inputs: Tensor
    labels: Tensor
    before: float
    after: float
    accuracy: float

    def save(self, path: Path, key: str) -> None:
        """Write them to a file that knows what they were made from."""
        about = {"key": key, "figures": json.dumps([self.before, self.after, self.accuracy])}
        temporary = unfinished(path)
        tensors = {"inputs": self.inputs, "labels": self.labels}
        safetensors.torch.save_file(tensors, temporary, about)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path | None, key: str) -> Generated | None:
        """Read them; None where there are none, or others."""
        if path is None or not path.exists():
            return None
        with safetensors.safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            figures = json.loads(about["figures"])
            return cls(file.get_tensor("inputs"), file.get_tensor("labels"), *figures)


@contextmanager
def dropout_filters(network: nn.Module) -> Iterator[None]:
    """Let each dropout layer of a network in eval mode drop the same numbers in every call.

    The filters are drawn at the first call, from torch's global generator on the processor.

    Args:
        network: not changed afterwards.
    """
    filters: dict[nn.Module, Tensor] = {}

    def drop(module: Any, args: Any, output: Tensor) -> Tensor:
        if module not in filters:
            filters[module] = type(module)(module.p)(torch.ones_like(output, device="cpu"))
        return output * filters[module].to(output.device)

    handles = [module.register_forward_hook(drop) for module in dropouts(network)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dropouts(network: nn.Module) -> list[Any]:
    """The network's layers that drop something when it trains."""
    return [m for m in network.modules() if isinstance(m, _DROPOUTS) and m.p > 0]


def digest_of(file: str) -> str:
    """A hash of a records file's content."""
    path = Path(file)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


class Calibration:
    """The training batches, until enough samples have been seen; they can be read as often as wanted.

    Args:
        run: whose task has them.
        samples: how many are enough; None for all.
    """

    def __init__(self, run: Run, samples: int | None) -> None:
        self.run, self.samples = run, samples

    def __iter__(self) -> Iterator[Batch]:
        return self.run.calibration(self.samples or 2**62)
