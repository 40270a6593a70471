"""Multiply-accumulate operations of one forward pass, by torch's own FLOP counter.

Two surprising rules. One MAC is two FLOPs, and only what torch has a FLOP formula for is counted
(matrix products, convolutions, attention): every other operator that computes something is listed
in ``uncounted`` with its number of calls, so that nothing disappears in silence. And the figure
is for the *whole* batch that is given: measure one example to get MACs per example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lilliput.core.task import evaluation
from lilliput.errors import InputError, ModelMismatch
from lilliput.measure.size import effective_state

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A tensor is the only argument, a tuple holds positional ones, a mapping keyword ones."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulate operations (MACs) of one forward pass over the given batch.

    Attributes:
        total: MACs of the dense computation.
        sparse_macs: an estimate of the MACs left if every multiplication by a zero weight were
            skipped: each operator's MACs times the density of the weight that it reads. Operators
            that read no weight (attention scores, say) count in full.
        by_module: MACs by module name; a module's figure leaves out its children's, so the
            figures add up to ``total``. ``""`` is the model's own ``forward``.
        uncounted: operators that compute something and have no formula, with their number of calls.
            Views and data movement are not listed.
        sparse_by_weight: of ``sparse_macs`` those with each weight, by its name in ``state_dict``. Where
            one operator reads several weights, each has its share of them by its elements: in an LSTM
            that is exact.
    """

    total: int
    sparse_macs: int
    by_module: Mapping[str, int]
    uncounted: Mapping[str, int]
    sparse_by_weight: Mapping[str, int] = field(default_factory=dict)


def macs(model: nn.Module, example_inputs: Inputs) -> Macs:
    """Count the MACs of one forward pass in eval mode.

    Training flags, buffers, gradients and the random state are left as they were. The arithmetic of
    parametrizations (masks, codebooks) is left out: it is not there in a deployed model.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        Total, sparse estimate, figures by module, and what could not be counted.

    Raises:
        InputError: ``example_inputs`` is of another type.
        ModelMismatch: the model cannot run on ``example_inputs``.

    Example:
        >>> macs(nn.Linear(784, 300), torch.zeros(1, 784)).total
        235200
    """
    with undisturbed(model), unfused(), ExitStack() as stack:
        tally = _Tally(_weights(model))
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(partial(tally.enter, name))
            after = module.register_forward_hook(tally.leave, always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        with tally.counter, tally:
            call(model, example_inputs)
    total = sum(tally.by_module.values())
    return Macs(total, tally.sparse, tally.by_module, tally.uncounted, tally.by_weight)


def bind(model: nn.Module, example_inputs: Inputs) -> Callable[[], Any]:
    """Give the call of a model on its inputs as a function without arguments.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        A function that runs the model and returns its output.

    Raises:
        InputError: ``example_inputs`` is of another type.
    """
    if isinstance(example_inputs, Tensor):
        return partial(model, example_inputs)
    if isinstance(example_inputs, tuple):
        return partial(model, *example_inputs)
    if isinstance(example_inputs, Mapping):
        return partial(model, **example_inputs)
    raise InputError(
        f"example_inputs is a {type(example_inputs).__name__}, so it is not clear how to "
        "pass it to the model: give a tensor, a tuple of positional arguments or a dict of "
        "keyword arguments."
    )


def call(model: nn.Module, example_inputs: Inputs) -> Any:
    """Run a model once, and say which model and which inputs if it fails.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        The model's output.

    Raises:
        InputError: ``example_inputs`` is of another type.
        ModelMismatch: the model cannot run on ``example_inputs``.
    """
    forward = bind(model, example_inputs)
    try:
        return forward()
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = [tuple(leaf.shape) for leaf in strided_tensors(example_inputs)]
        raise ModelMismatch(
            f"{type(model).__name__} cannot be measured: its forward failed on example inputs of "
            f"shapes {shapes} ({error}). Give inputs that the model accepts, with their batch dim."
        ) from error


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model run in eval mode and without gradients, and leave no trace.

    Training flags, buffers and random state are restored. Parametrized weights are computed
    once, on first use, so what runs costs what the model costs without its encodings.

    Args:
        model: any module.
    """
    saved = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices), evaluation(model), parametrize.cached():
        try:
            yield
        finally:
            _restore(model, saved)


def _restore(model: nn.Module, saved: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (buffer, values) in saved.items():
        if not torch.equal(buffer, values):  # an idle copy would invalidate a pending backward
            buffer.copy_(values)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, buffer)


@contextmanager
def unfused() -> Iterator[None]:
    """Keep torch from running a transformer layer as one operator that nothing can look into."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _Tally(TorchDispatchMode):
    """Reads torch's FLOP counter around each operator and books the difference.

    It must be entered after the counter: the mode entered last sees an operator first, and passes
    it on to the others.
    """

    def __init__(self, weights: Mapping[int, list[_Filled]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
        self.weights = weights
        self.running = [""]
        self.by_module: Counter[str] = Counter()
        self.by_weight: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.sparse = 0

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.running.append(name)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = self.counter.get_total_flops()
        output = func(*args, **(kwargs or {}))
        count = (self.counter.get_total_flops() - before) // 2
        if count:
            self.by_module[self.running[-1]] += count
            self.sparse += self._without_zeros(count, args)
        elif not _only_moves(func):
            self.uncounted[str(func.overloadpacket)] += 1
        return output

    def _without_zeros(self, count: int, args: tuple[Any, ...]) -> int:
        """What is left of an operator's MACs without the zeros of the weights that it reads."""
        pointers = {leaf.untyped_storage().data_ptr() for leaf in strided_tensors(args)}
        read = [weight for pointer in pointers for weight in self.weights.get(pointer, ())]
        if not read:
            return count
        elements = sum(weight.elements for weight in read)
        for weight in read:
            self.by_weight[weight.name] += count * weight.nonzeros // elements
        return count * sum(weight.nonzeros for weight in read) // elements


class _Filled(NamedTuple):
    """A weight, as the tally knows it."""

    name: str
    nonzeros: int
    elements: int


def _weights(model: nn.Module) -> dict[int, list[_Filled]]:
    """Map a storage's address to the weights in it.

    By address, since an operator sees a transposed view of the weight and not the parameter.
    Biases are left out: they ride along in the same operator and cost no MAC.
    """
    found: dict[int, list[_Filled]] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, weight in effective_state(model).items():
        key = weight.data_ptr(), weight.shape
        if weight.dim() >= 2 and weight.numel() and key not in seen:
            seen.add(key)
            filled = _Filled(name, int(torch.count_nonzero(weight)), weight.numel())
            found.setdefault(weight.untyped_storage().data_ptr(), []).append(filled)
    return found


def strided_tensors(tree: Any) -> list[Tensor]:
    """List the tensors in nested tuples, lists and dicts, less the sparse ones."""
    leaves = tree_leaves(tree)
    return [x for x in leaves if isinstance(x, Tensor) and x.layout is torch.strided]


def _only_moves(func: Any) -> bool:
    return func.is_view or func._schema.name.removeprefix("aten::") in _MOVES


# fmt: off
_MOVES = frozenset({
    "_local_scalar_dense", "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "arange", "cat",
    "channel_shuffle", "clone", "constant_pad_nd", "copy", "copy_", "detach", "detach_",
    "embedding", "empty", "empty_like", "empty_strided", "eye", "fill", "fill_", "flip", "full",
    "full_like", "gather", "index", "index_select", "lift", "lift_fresh", "native_channel_shuffle",
    "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones", "ones_like",
    "pixel_shuffle", "pixel_unshuffle", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "repeat", "replication_pad1d", "replication_pad2d", "replication_pad3d", "roll",
    "scalar_tensor", "split_with_sizes_copy", "squeeze_", "stack", "t_", "transpose_", "tril",
    "triu", "unsafe_split", "unsafe_split_with_sizes", "unsqueeze_", "where", "zero_", "zeros",
    "zeros_like",
})
# fmt: on
"""Operators that create or move numbers and compute none. Whatever is not here is reported."""


def _dot_flops(a: Any, b: Any, *, out_shape: Any) -> int:
    return int(2 * prod(a))


def _addmv_flops(bias: Any, matrix: Any, vector: Any, *, out_shape: Any, **options: Any) -> int:
    return int(2 * prod(matrix))


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Scores and their product with the values; a causal mask is not taken off, as in torch."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[-2] * (width + value[-1]))


def _recurrent_flops(inputs: Any, w_input: Any, w_hidden: Any, *rest: Any, **options: Any) -> int:
    """One layer and direction of an LSTM: both matrices, at every step of every sequence."""
    return int(2 * inputs[0] * inputs[1] * (prod(w_input) + prod(w_hidden)))


def _packed_recurrent_flops(inputs: Any, parameters: Any, *rest: Any, **options: Any) -> int:
    """All layers and directions of cuDNN's LSTM or GRU; biases are no matrices."""
    return int(2 * prod(inputs[:-1]) * sum(prod(p) for p in parameters if len(p) == 2))


def _trilinear_flops(left: Any, weight: Any, right: Any, *rest: Any, **options: Any) -> int:
    """``nn.Bilinear``: one product an entry of the weight; the sums over one side's inputs are left out."""
    return int(2 * left[0] * prod(weight))


# Torch's table has no entry for these, and its backends run attention, LSTMs and ``Bilinear`` through them.
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.dot: _dot_flops,
    torch.ops.aten.mv: _dot_flops,
    torch.ops.aten.addmv: _addmv_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
    torch.ops.aten._cudnn_rnn: _packed_recurrent_flops,
    torch.ops.aten._trilinear: _trilinear_flops,
}
