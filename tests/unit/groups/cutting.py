"""The plainest cut there is, to judge groups by: slice tensors by members, correct integers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from lilliput.core.task import call
from lilliput.mechanisms.groups import Group, Groups
from lilliput.mechanisms.surgery.attributes import set_attributes

Removal = dict[int, np.ndarray]


def removal(groups: Groups, keep: float = 0.5, seed: int = 0, exact: bool = False) -> Removal:
    """Random channels of every group; with ``exact`` only of those where zeroing is comparable."""
    generator = np.random.default_rng(seed)
    chosen = {}
    for number, group in enumerate(groups.groups):
        gone = group.channels - max(1, round(group.channels * keep))
        if gone > 0 and not (exact and group.mixed_by):
            chosen[number] = np.sort(generator.permutation(group.channels)[:gone])
    return chosen


def cut(model: nn.Module, groups: Groups, removal: Removal) -> nn.Module:
    """A thinned copy."""
    thin = copy.deepcopy(model)
    gone: dict[tuple[str, int], list[int]] = {}
    for number, channels in removal.items():
        for member in groups.groups[number].members:
            gone.setdefault((member.tensor, member.dim), []).extend(
                member.index[channels].reshape(-1).tolist()
            )
    tensors = {**dict(thin.named_parameters()), **dict(thin.named_buffers())}
    for (name, dim), indices in gone.items():
        tensor = tensors[name]
        kept = np.setdiff1d(np.arange(tensor.shape[dim]), indices)
        tensor.data = tensor.data.index_select(dim, torch.from_numpy(kept)).contiguous()
    set_attributes(thin, groups.attributes(removal))
    for module in thin.modules():
        settle(module)
    return thin


def zeroed(model: nn.Module, groups: Groups, removal: Removal) -> nn.Module:
    """A copy in which nothing reads the removed channels."""
    whole = copy.deepcopy(model)
    tensors = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    for number, channels in removal.items():
        for member in members_to_zero(groups.groups[number]):
            index = torch.from_numpy(member.index[channels].reshape(-1))
            tensors[member.tensor].data.index_fill_(member.dim, index, 0)
    return whole


def members_to_zero(group: Group) -> Any:
    return [m for m in group.members if m.role == "uses" or group.pairwise]


def settle(module: nn.Module) -> None:
    """Let the integers of torch's own modules follow their tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        depthwise = module.groups > 1 and module.groups == module.in_channels
        first, second = module.weight.shape[:2]
        if depthwise:
            module.groups = first if transposed else first * module.groups // module.out_channels
        module.in_channels = first if transposed else second * module.groups
        module.out_channels = second * module.groups if transposed else first
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        for tensor in (module.weight, module.running_mean):
            if tensor is not None:
                module.num_features = len(tensor)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        if module.num_groups == module.num_channels:
            module.num_groups = len(weight)
        module.num_channels = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.RNNBase):
        module.input_size = module.weight_ih_l0.shape[1]
        module.hidden_size = module.weight_ih_l0.shape[0] // module_gates(module)
        if module.proj_size:
            module.proj_size = module.weight_hr_l0.shape[0]
    elif isinstance(module, nn.MultiheadAttention):
        module.embed_dim = module.out_proj.weight.shape[0]
        module.head_dim = module.embed_dim // module.num_heads
        packed = module.in_proj_weight is not None
        module.kdim = module.embed_dim if packed else module.k_proj_weight.shape[1]
        module.vdim = module.embed_dim if packed else module.v_proj_weight.shape[1]


def module_gates(module: nn.RNNBase) -> int:
    return {"LSTM": 4, "GRU": 3}.get(module.mode, 1)


def error(thin: nn.Module, whole: nn.Module, inputs: Any) -> float:
    """Largest difference of the outputs over the largest output."""
    with torch.no_grad():
        left, right = (outputs(call(m.eval(), inputs)) for m in (thin, whole))
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item())
    return worst


def outputs(value: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give normalizations and biases values that matter, and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.copy_(
                torch.randn(module.running_mean.shape, generator=generator) / 5
            )
            module.running_var.copy_(
                torch.rand(module.running_var.shape, generator=generator) + 0.5
            )
    for tensor in model.parameters():
        if tensor.dim() == 1:
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / 10)
    return model.eval()
