"""Several processes as one run: started by torchrun, each takes its share of every batch."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from ..core.types import Batch
from ..errors import InputError


def start(device: str) -> None:
    """Join the group of processes, if torchrun has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def stop() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(module: nn.Module) -> nn.Module:
    """Let the gradients of a module be averaged over the processes."""
    if world() == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    device = next(module.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids)


def share(batch: Batch) -> Batch:
    """This process's samples of a batch that every process has read.

    Raises:
        InputError: there are more processes than samples.
    """
    if world() == 1:
        return batch

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0:
            return x
        if len(x) < world():
            raise InputError(
                f"a batch of {len(x)} samples cannot be shared by {world()} processes."
            )
        return x[rank() :: world()]

    parts = (batch.inputs, batch.target, batch.index, batch.views)
    return Batch(*(pytree.tree_map(cut, part) for part in parts))


def mean(value: Tensor) -> Tensor:
    """The mean over the processes."""
    if world() > 1:
        dist.all_reduce(value)
        value /= world()
    return value


def device_of(name: str) -> torch.device:
    """The device of this process: ``"auto"`` takes a GPU where torch sees one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"the device {name!r} cannot be used: {reason}") from error
