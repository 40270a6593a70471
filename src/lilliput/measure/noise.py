"""How far each layer's output is from that of another network of the same kind, in decibels.

The surprising rule: noise is handed on, so the layer where the ratio *falls* is the one to look at, not the
one where it is lowest.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from lilliput.core.select import weights
from lilliput.core.task import answer
from lilliput.measure.macs import Inputs, strided_tensors, undisturbed, unfused
from lilliput.mechanisms.ranges import noise_ratio


def layer_noise(model: nn.Module, reference: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Signal over noise at the output of every layer with weights that both networks call.

    Args:
        model: the network with noise, quantized or pruned.
        reference: what it should compute.
        inputs: of both.

    Returns:
        Layer -> decibels, in the order of the calls; layers whose outputs have other shapes are left out.
        Of a layer that answers with several tensors, as a recurrent one does, it is the first.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> layer_noise(net, net, torch.ones(1, 4))
        {'0': inf}
    """
    noisy, clean = _outputs(model, inputs), _outputs(reference, inputs)
    return {
        name: noise_ratio(clean[name], output)
        for name, output in noisy.items()
        if name in clean and clean[name].shape == output.shape
    }


def _outputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """What each layer gives, copied at once: whoever comes behind may work in place."""
    found: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, given: Any, output: Any) -> None:
        first = next(iter(strided_tensors(output)), None)
        if first is not None:
            found[name] = first.clone()

    layers = {weight.layer: weight.module for weight in weights(model)}
    handles = [m.register_forward_hook(partial(see, n)) for n, m in layers.items()]
    try:
        with undisturbed(model), unfused():
            answer(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
