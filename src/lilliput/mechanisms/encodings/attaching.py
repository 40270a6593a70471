"""Put encodings on weights and take them off again; describe those of a network, and put them on another.

The surprising rule: torch gives a parametrized module a class that its deep copies share, and numbers an
optimizer's states by the order of parameters. Both are mended here, or a copy would break its original.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...core.select import Weight, weights
from ...errors import InputError, UnknownName
from .base import KINDS, Encoding
from .codebooks import Codebook
from .integers import StepGrid
from .masks import Mask
from .products import LowRank
from .stack import encoding_of, original_of

#: Where a module remembers the order of its parameters while an encoding holds one of them.
_ORDER = "_lilliput_parameter_order"


def encode(weight: Weight, encoding: Encoding) -> None:
    """Put an encoding on a weight, at its place in the stack; one of the same kind is replaced.

    Raises:
        InputError: the weight is a product of factors, over which this encoding cannot lie.
    """
    outer = encoding.depth >= Mask.depth and getattr(encoding, "policy", "hard") == "hard"
    if not outer and not isinstance(encoding, LowRank) and encoding_of(weight, LowRank) is not None:
        raise InputError(
            f"{weight.name} is a product of two factors, and {encoding.kind} would undo it: leave it out "
            f"with layers: '!{weight.layer}', or do not factorize it."
        )
    _restack(weight, [*_without(weight, encoding.kind), encoding])


def put_grid(weight: Weight, bits: int, steps: Tensor, learned: bool = False) -> None:
    """Let a weight be integers times a step for each filter, ``(filters,)``."""
    shape = (-1, *[1] * (weight.value.ndim - 1))
    encode(weight, StepGrid(bits, steps.view(shape).to(weight.value), learned))


def take_off(weight: Weight, kind: type[Encoding]) -> None:
    """Take one kind of encoding off; what is beneath and above it stays."""
    _restack(weight, _without(weight, kind.kind))


def strip(weight: Weight) -> None:
    """Take all encodings off; the effective value becomes an ordinary parameter again."""
    if parametrize.is_parametrized(weight.module, weight.tensor):
        _own_class(weight.module)
        _leave_shared(weight)
        parametrize.remove_parametrizations(weight.module, weight.tensor, leave_parametrized=True)
        _drop_gradient(getattr(weight.module, weight.tensor))
        _restore_order(weight.module)


def bake(model: nn.Module) -> nn.Module:
    """Take all encodings off the model, in place; its outputs stay the same, bit for bit."""
    for weight in list(weights(model)):
        strip(weight)
    return model


def share_codebook(weights: list[Weight]) -> None:
    """Let the codebooks of some weights train as one: theirs is a single parameter from now on."""
    first = original_of(weights[0])
    assert isinstance(first, nn.Parameter)
    for weight in weights:
        codebook = encoding_of(weight, Codebook)
        assert codebook is not None
        codebook.shared = (first,)
        _put_shared(weight)


def describe(model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """The encodings of each encoded weight, innermost first, as plain JSON values."""
    return {
        weight.name: [{"kind": e.kind, **e.settings()} for e in weight.encodings()]
        for weight in weights(model)
        if weight.encodings()
    }


def rebuild(model: nn.Module, description: dict[str, list[dict[str, Any]]]) -> None:
    """Put on the encodings of :func:`describe`, empty; ``load_state_dict`` then fills them."""
    for weight in list(weights(model)):
        for entry in description.get(weight.name, []):
            encode(weight, _empty(weight, dict(entry)))
    books: dict[str, list[Weight]] = {}
    for weight in weights(model):
        codebook = encoding_of(weight, Codebook)
        if codebook is not None and codebook.book:
            books.setdefault(codebook.book, []).append(weight)
    for sharing in books.values():
        share_codebook(sharing)


def _empty(weight: Weight, settings: dict[str, Any]) -> Encoding:
    kind = settings.pop("kind")
    if kind not in KINDS:
        raise UnknownName("encoding", kind, KINDS)
    return KINDS[kind].empty(weight.value, settings)


def _without(weight: Weight, kind: str) -> list[Encoding]:
    return [e for e in weight.encodings() if e.kind != kind]


def _restack(weight: Weight, encodings: list[Encoding]) -> None:
    """Let a weight have these encodings; what trains stays as it is where the innermost is the same."""
    stack, before = sorted(encodings, key=lambda e: e.depth), weight.encodings()
    same = bool(stack and before and stack[0] is before[0])
    trained = original_of(weight).detach().clone()
    strip(weight)
    if not stack:
        return
    _own_class(weight.module)
    _note_order(weight.module)
    for place, part in enumerate(stack):
        part.innermost = place == 0
        if isinstance(part, Mask):
            part.lie_on(stack[:place])
        parametrize.register_parametrization(weight.module, weight.tensor, part, unsafe=True)
    if same:
        original_of(weight).data.copy_(trained)
    _put_shared(weight)
    _drop_gradient(original_of(weight))
    if isinstance(weight.module, nn.RNNBase):
        _refresh_before_forward(weight.module)


def _drop_gradient(trained: Tensor) -> None:
    """Where a gradient belongs to what trained before, in another shape, it would break whoever copies it."""
    if trained.grad is not None and trained.grad.shape != trained.shape:
        trained.grad = None


def _put_shared(weight: Weight) -> None:
    codebook = encoding_of(weight, Codebook)
    if codebook is not None and codebook.shared:
        stacks: Any = weight.module.parametrizations
        stacks[weight.tensor].original = codebook.shared[0]


def _leave_shared(weight: Weight) -> None:
    """Give a weight centroids of its own: torch is about to write into what trains."""
    codebook = encoding_of(weight, Codebook)
    if codebook is not None and codebook.shared:
        stacks: Any = weight.module.parametrizations
        stacks[weight.tensor].original = nn.Parameter(original_of(weight).detach().clone())


def _note_order(module: nn.Module) -> None:
    """Remember in which order the module's class registered its parameters."""
    vars(module).setdefault(_ORDER, tuple(module._parameters))


def _restore_order(module: nn.Module) -> None:
    """Put a parameter that came back at its old place: optimizers number their states by it."""
    order = vars(module).get(_ORDER, ())
    if all(name in module._parameters for name in order):
        for name in (*order, *(n for n in tuple(module._parameters) if n not in order)):
            module._parameters[name] = module._parameters.pop(name)
        vars(module).pop(_ORDER, None)


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    Torch puts the encoded attributes into a class that deep copies of the module share, so that
    taking an encoding off a copy would break the original.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        members = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, members)


def _refresh_before_forward(module: nn.RNNBase) -> None:
    """Recurrent layers keep a private list of their weights: let it follow the encodings."""
    if _refresh not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_refresh)


def _refresh(module: Any, inputs: Any) -> None:
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
