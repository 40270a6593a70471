"""What cannot be cut, said before anything is touched, with what to do instead."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ...errors import InputError

#: Modules that cannot be cut themselves, by the names of their classes.
_KINDS = {
    "DistributedDataParallel": "keeps the gradients of all parameters in buffers of fixed size. "
    "Cut model.module, then wrap it again.",
    "FullyShardedDataParallel": "holds the parameters flattened. Cut the model before wrapping it.",
    "OptimizedModule": "is compiled for its shapes. Cut model._orig_mod, then compile it again.",
}


def refuse(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise what can be known before anything is touched.

    Raises:
        InputError: the model, the optimizer or the moment is one that cannot be cut.
    """
    reason = _why_not_now() or _why_not_model(model) or _why_not_optimizer(optimizer)
    if reason:
        raise InputError(f"channels cannot be cut here: {reason} Nothing was changed.")


def _why_not_now() -> str:
    if torch._C._current_graph_task_id() != -1:
        return (
            "backward() is running, and the gradients that it still brings have the old shapes. "
            "Cut before it or after it, for example in a hook of the optimizer's step."
        )
    return ""


def _why_not_model(model: nn.Module) -> str:
    for name, module in model.named_modules():
        reason = _KINDS.get(type(module).__name__, "")
        if isinstance(module, torch.jit.ScriptModule):
            reason = "is TorchScript, whose shapes are fixed. Cut the Python module instead."
        if reason:
            return f"{type(module).__name__}{f' {name!r}' if name else ''} {reason}"
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                if tensor is not None and (reason := _why_not_tensor(tensor)):
                    return f"{f'{name}.{leaf}'.lstrip('.')} {reason}"
    return ""


def _why_not_tensor(tensor: Tensor) -> str:
    if nn.parameter.is_lazy(tensor):
        return "has no shape yet. Run the model once on an example batch."
    if tensor.is_meta:
        return "is on the meta device and has no values. Load the weights first."
    return ""


def _why_not_optimizer(optimizer: torch.optim.Optimizer | None) -> str:
    if isinstance(optimizer, torch.optim.LBFGS):
        return (
            "LBFGS remembers all parameters as one flat vector. Make a new one after cutting, and do "
            "not hand this one over."
        )
    return ""


def refuse_tensor(name: str, module: nn.Module, tensor: Tensor | None) -> None:
    """Raise where surgery does not know how a tensor is stored or computed.

    Raises:
        InputError: naming the tensor.
    """
    reason = _why_not_hooks(module) or _why_not_storage(tensor)
    if reason:
        raise InputError(f"{name} cannot be cut: {reason} The model is as it was.")


def _why_not_hooks(module: nn.Module) -> str:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            how = "weight" if isinstance(hook, WeightNorm) else "spectral"
            return (
                f"its layer computes its weight in a hook ({how} normalization), from the norm of all "
                f"channels. Call torch.nn.utils.remove_{how}_norm on it first."
            )
    return ""


def _why_not_storage(tensor: Tensor | None) -> str:
    if tensor is None:  # parametrized: what it is computed from decides
        return ""
    if tensor.layout != torch.strided:
        return f"it is stored as {tensor.layout}. Make it dense first: tensor.to_dense()."
    if type(tensor.detach()) is not Tensor:
        kind = type(tensor.detach()).__name__
        return f"it is a {kind}, not an ordinary tensor. Cut before it is sharded or quantized."
    return ""
