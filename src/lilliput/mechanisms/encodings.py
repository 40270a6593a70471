"""How a weight is stored while it trains: masked, of shared values, on a grid, of low rank, partly held.

An encoding is a torch parametrization: the layer keeps its attribute ``weight``, every other part of
torch sees an ordinary tensor, and what trains is the encoding's original. Encodings stack: whatever
defines the values (a codebook) lies inside, masks lie outside, so that a zero stays a zero.

The surprising rule: a hard mask does not multiply in the forward pass while the weight itself is what
trains. The zeros are *stored*, and :func:`reapply` restores them after each optimizer step, which is
what makes them survive momentum and weight decay.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.select import Weight, weights
from ..errors import InputError, SurgeryFailed, UnknownName
from . import clustering

E = TypeVar("E", bound="Encoding")


class Encoding(nn.Module):
    """Base of the encodings.

    Class attributes:
        kind: its name in checkpoints.
        depth: encodings with smaller numbers lie further inside the stack.
    """

    kind: ClassVar[str]
    depth: ClassVar[int] = 0
    innermost: bool = True  # kept by `encode`: the stored tensor lies directly inside

    def settings(self) -> dict[str, Any]:
        """What a checkpoint needs beside the buffers to build this encoding again."""
        return {}

    def right_inverse(self, value: Tensor) -> Tensor:
        """What trains, computed from the value that the weight has now; called by torch."""
        return value

    def shape_of(self, original: Tensor) -> torch.Size:
        """The weight's shape, from what trains."""
        return original.shape

    def forget(self) -> None:
        """Drop what was computed from the buffers: they were loaded, or cut by surgery."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()


class Mask(Encoding):
    """Which weights live.

    Policies: ``"hard"`` stores zeros, see the module's docstring; ``"straight_through"`` keeps the
    value of a pruned weight and gives it the dense gradient at the masked weight, so that it can
    return (``w + (w*m - w).detach()``).

    Args:
        mask: bool, in the weight's shape; True lives.
        policy: see above.
    """

    kind = "mask"
    depth = 10
    mask: Tensor

    def __init__(self, mask: Tensor, policy: str = "hard") -> None:
        super().__init__()
        if policy not in ("hard", "straight_through"):
            raise UnknownName("mask policy", policy, ("hard", "straight_through"))
        self.register_buffer("mask", mask.bool())
        self.policy = policy
        # In a tuple, lest torch takes what lies further inside the stack for parts of the mask.
        self.inside: tuple[Codebook, ...] = ()
        self._factor: Tensor | None = None
        self._rests: bool | None = None

    def settings(self) -> dict[str, Any]:
        """The policy."""
        return {"policy": self.policy}

    def right_inverse(self, value: Tensor) -> Tensor:
        """The weight with its zeros stored, or untouched where pruned weights may return."""
        return value * self.mask if self.policy == "hard" else value

    def update(self, mask: Tensor) -> None:
        """Replace the mask; a hard mask is stored at the next :func:`reapply`."""
        self.mask.copy_(mask)
        self.forget()

    def factor(self, like: Tensor) -> Tensor:
        """The mask as numbers of the weight's type, which multiply faster than booleans."""
        known = self._factor
        if known is None or known.device != like.device or known.dtype != like.dtype:
            known = self._factor = self.mask.to(like)
        return known

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        if self.policy == "straight_through":
            return value + (value * self.factor(value) - value).detach()
        return value if self.innermost or self.rests() else value * self.factor(value)

    def rests(self) -> bool:
        """Whether its zeros are structural further inside, as after clustering a pruned weight."""
        if self._rests is None:
            self._rests = any(bool((self.mask | (e.codes == 0)).all()) for e in self.inside)
        return self._rests

    def lie_on(self, inside: list[Encoding]) -> None:
        """Learn what lies further inside the stack."""
        self.inside = tuple(e for e in inside if isinstance(e, Codebook))
        self.forget()

    def forget(self) -> None:
        """Drop the mask as numbers, and whether it rests."""
        self._factor = self._rests = None


def _lookup(centroids: Tensor, codes: Tensor, places: Tensor | None, shape: torch.Size) -> Tensor:
    """The centroid of each member, at its place among zeros.

    Differentiated, it sums over the members of each cluster, which is equation 3 of Deep Compression:
    dL/dC_k is the sum of dL/dW_ij over all ij with I_ij = k.
    """
    values = centroids.index_select(0, codes)
    if places is not None:
        # Its gradient, an index_select, is faster than the gather of scatter_.
        values = centroids.new_zeros(shape.numel()).index_copy_(0, places, values)
    return values.view(shape)


class Codebook(Encoding):
    """Shared values: the centroids train, the assignment of weights to them is frozen.

    Code 0 is the zero that pruning left; it has no centroid and stays exactly zero. Code ``k`` is
    centroid ``k - 1``. Several layers may share one codebook, see :func:`share_codebook`.

    Args:
        codes: integers in the weight's shape, 0 to the number of centroids.
        centroids: float, shape ``(clusters,)``; where training starts.
        book: name of a codebook that several weights share.
    """

    kind = "codebook"
    codes: Tensor

    def __init__(self, codes: Tensor, centroids: Tensor, book: str = "") -> None:
        super().__init__()
        self.register_buffer(
            "codes", codes.to(torch.uint8 if len(centroids) < 256 else torch.int32)
        )
        self._start = centroids.detach().clone()
        self.book = book
        # What trains, where several weights share it; in a tuple, lest torch takes it for a part of this.
        self.shared: tuple[nn.Parameter, ...] = ()
        self._members: tuple[Tensor, Tensor | None] | None = None

    @classmethod
    def fitted(cls, value: Tensor, bits: int, init: clustering.Init, seed: int = 0) -> Codebook:
        """Cluster the non-zero entries of a weight so that a code fits into ``bits`` bits.

        Where the weight has zeros, one code is theirs.
        """
        flat = value.detach().cpu().reshape(-1)
        places = flat.nonzero().view(-1)
        clusters = 2**bits - (len(places) < len(flat))
        found = clustering.kmeans(flat[places].numpy(), clusters, init=init, seed=seed)
        codes = torch.zeros(len(flat), dtype=torch.int32)
        codes[places] = torch.from_numpy(found.codes.astype("int32")) + 1
        centroids = torch.from_numpy(found.centroids).to(value.device)
        return cls(
            torch.zeros_like(value, dtype=torch.int32).copy_(codes.view(value.shape)), centroids
        )

    @property
    def start(self) -> Tensor:
        """The centroids from which training starts, shape ``(clusters,)``."""
        return self._start

    def settings(self) -> dict[str, Any]:
        """How many centroids there are, and whose they are."""
        return {"clusters": len(self._start), **({"book": self.book} if self.book else {})}

    def right_inverse(self, value: Tensor) -> Tensor:
        """The centroids are what trains."""
        return self._start.to(value)

    def shape_of(self, original: Tensor) -> torch.Size:
        """That of the codes; what trains are the centroids."""
        return self.codes.shape

    def members(self) -> tuple[Tensor, Tensor | None]:
        """Centroid number of each non-zero weight and its place; places None where none is zero."""
        if self._members is None or self._members[0].device != self.codes.device:
            flat = self.codes.reshape(-1)
            places = flat.nonzero().view(-1)
            dense = len(places) == flat.numel()
            self._members = (
                (flat if dense else flat[places]).long() - 1,
                None if dense else places,
            )
        return self._members

    def forward(self, centroids: Tensor) -> Tensor:
        """The effective weight."""
        codes = self.codes  # looked up once: torch's attributes are slow
        weight = _lookup(centroids, *self.members(), codes.shape)
        # The codes are laid out as the layer is: hand the weight over in the same layout.
        channels_last = codes.ndim == 4 and not codes.is_contiguous()
        return weight.contiguous(memory_format=torch.channels_last) if channels_last else weight

    def table(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Codes in the weight's shape, and the value of each code; the zero has one where it occurs."""
        if self.members()[1] is None and not self.book:
            return self.codes - 1, centroids
        return self.codes, torch.cat([centroids.new_zeros(1), centroids])

    def forget(self) -> None:
        """Drop the list of members."""
        self._members = None


class Binary(Encoding):
    """One of two values, minus and plus a scale, chosen by the sign of a number that trains.

    The scale is ``sum(d |w|) / sum(d)`` with the curvature d of every entry: equal curvatures give the mean
    magnitude. The gradient passes to the number unchanged. Zero counts as plus.

    Args:
        curvature: in the weight's shape, positive.
        fixed: the scale, where it is not computed.
        by_filter: a scale for each filter, instead of one for the layer.
    """

    kind = "binary"
    curvature: Tensor

    def __init__(
        self, curvature: Tensor, fixed: float | None = None, by_filter: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("curvature", curvature.detach().clone())
        self.fixed, self.by_filter = fixed, by_filter

    def settings(self) -> dict[str, Any]:
        """How the scale is found."""
        return {"fixed": self.fixed, "by_filter": self.by_filter}

    def scale(self, value: Tensor) -> Tensor:
        """alpha: a scalar, or ``(filters, 1, ...)``."""
        if self.fixed is not None:
            return value.new_tensor(self.fixed)
        over = tuple(range(int(self.by_filter), value.ndim))
        total = (self.curvature * value.abs()).sum(over, keepdim=self.by_filter)
        return total / self.curvature.sum(over, keepdim=self.by_filter)

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        known = value.detach()
        binary = torch.where(known >= 0, 1.0, -1.0).to(known) * self.scale(known)
        return binary + (value - known)  # in this order what is added is exactly zero


class IntegerGrid(Encoding):
    """Multiples of a power of two between minus and plus one, divided by a layer's scale.

    ``round(clip(w) / s) s / divisor`` with ``s = 2^(1 - bits)`` and w clipped to ``-1 + s ... 1 - s``. The
    gradient passes to w unchanged.

    Args:
        bits: of a weight, sign included.
        divisor: a power of two.
    """

    kind = "integer_grid"

    def __init__(self, bits: int, divisor: float) -> None:
        super().__init__()
        self.bits, self.divisor = bits, divisor

    def settings(self) -> dict[str, Any]:
        """Bits and divisor."""
        return {"bits": self.bits, "divisor": self.divisor}

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        known = value.detach()
        return on_grid(known, self.bits) / self.divisor + (value - known) / self.divisor


def on_grid(value: Tensor, bits: int) -> Tensor:
    """The nearest multiple of ``2^(1 - bits)`` that lies between minus and plus one.

    Example:
        >>> on_grid(torch.tensor([-3.0, 0.2, 0.3]), 2)
        tensor([-0.5000,  0.0000,  0.5000])
    """
    step = 2.0 ** (1 - bits)
    return (value.clamp(step - 1.0, 1.0 - step) / step).round() * step


class StepGrid(Encoding):
    """Multiples of a step, one for each filter: signed integers of a few bits times a scale.

    ``clip(round(w / s), -h, h) s`` with ``h = 2^(bits - 1) - 1``. The gradient passes to w where it was not
    clipped. To a step that trains goes ``round(w / s) - w / s`` times the gradient, or plus or minus h
    where it was clipped (Esser et al. 2020, equation 3), all over ``sqrt(h * weights of the filter)``.

    Args:
        bits: of a weight, sign included.
        step: positive, ``(filters, 1, ...)``.
        learned: whether the steps train.
    """

    kind = "step_grid"
    step: Tensor

    def __init__(self, bits: int, step: Tensor, learned: bool = False) -> None:
        super().__init__()
        self.bits, self.learned = bits, learned
        step = step.detach().clone()
        if learned:
            self.step = nn.Parameter(step)
        else:
            self.register_buffer("step", step)

    @property
    def highest(self) -> int:
        """h, the largest integer."""
        return _highest(self.bits)

    def settle(self) -> None:
        """Let the steps stay as they are from now on."""
        settle_step(self)

    def settings(self) -> dict[str, Any]:
        """Bits, and whether steps train."""
        return {"bits": self.bits, "learned": self.learned}

    def integers(self, value: Tensor) -> Tensor:
        """The weights as integers, in the weight's shape and type."""
        found: Tensor = (value / self.step).round().clamp(-self.highest, self.highest)
        return found

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        step, high = self.step, self.highest
        if self.learned:
            step = slowed(step, high * value[0].numel())
        weight: Tensor = rounded((value / step).clamp(-high, high)) * step
        return weight


def _highest(bits: int) -> int:
    return int(2 ** (bits - 1)) - 1


def settle_step(module: Any) -> None:
    """Make the step of a module a buffer, so that no optimizer of a later stage moves it."""
    if module.learned:
        step = module._parameters.pop("step").detach()
        module.learned = False
        others = dict(module._buffers)
        module._buffers.clear()  # lest the order of tensors depends on what the module once was
        module.register_buffer("step", step)
        module._buffers.update(others)


def rounded(value: Tensor) -> Tensor:
    """To the nearest integer, to the even one of two; the gradient passes unchanged.

    Example:
        >>> rounded(torch.tensor([0.5, 1.5, -0.7]))
        tensor([0., 2., -1.])
    """
    whole: Tensor = value.detach().round()
    return whole + (value - value.detach())  # what is added is exactly zero


def slowed(step: Tensor, values: int) -> Tensor:
    """The step itself, but its gradient is divided by the root of a number."""
    slow: Tensor = step * float(values) ** -0.5
    return step.detach() + (slow - slow.detach())


class LowRank(Encoding):
    """A product of two thin matrices, which train together as one tensor.

    For matrices that no two layers can stand for, those of recurrent layers. What trains is ``(rank, rows +
    columns)``, the left factor transposed and beside it the right one; at the beginning the nearest matrix
    of that rank (singular value decomposition), each component shared equally between both.

    The surprising rule: it lies under masks only. Whatever else says which values there are would undo it.

    Args:
        rank: of the product.
        rows: of the matrix.
        columns: of the matrix.
    """

    kind = "low_rank"

    def __init__(self, rank: int, rows: int, columns: int) -> None:
        super().__init__()
        self.rank, self.rows, self.columns = rank, rows, columns

    def settings(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}

    def right_inverse(self, value: Tensor) -> Tensor:
        """Both factors, from a matrix."""
        if value.shape != (self.rows, self.columns):
            raise SurgeryFailed(
                f"a {self.rows} x {self.columns} matrix is a product of rank {self.rank}: it cannot be cut "
                f"to {' x '.join(map(str, value.shape))}. Remove channels first, and factorize then."
            )
        left, size, right = torch.linalg.svd(value.detach().double(), full_matrices=False)
        root = size[: self.rank].sqrt()
        both = torch.cat([left[:, : self.rank] * root, right[: self.rank].T * root])
        return both.T.contiguous().to(value)

    def shape_of(self, original: Tensor) -> torch.Size:
        """That of the product."""
        return torch.Size((self.rows, self.columns))

    def factors(self, original: Tensor) -> tuple[Tensor, Tensor]:
        """The left one ``(rows, rank)`` and the right one ``(rank, columns)``."""
        return original[:, : self.rows].T, original[:, self.rows :]

    def forward(self, original: Tensor) -> Tensor:
        """The effective weight."""
        left, right = self.factors(original)
        product: Tensor = left @ right
        return product


class Held(Encoding):
    """Some entries are held at given values, and only the others train.

    What is held lies in a buffer, so that no optimizer, momentum or weight decay can move it.

    Args:
        free: bool, in the weight's shape; True trains.
        value: in the weight's shape; read where nothing is free.
    """

    kind = "held"
    depth = 5
    free: Tensor
    held: Tensor

    def __init__(self, free: Tensor, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("free", free.bool())
        self.register_buffer("held", value.detach().clone())

    def update(self, free: Tensor, value: Tensor) -> None:
        """Hold other entries."""
        self.free.copy_(free)
        self.held.copy_(value)

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        return torch.where(self.free, value, self.held)


class Threshold(Encoding):
    """A fixed weight under a mask that trains: to every entry belongs a number that does.

    An entry lives where its number is above the threshold. The numbers get the gradient of the mask as if
    they were the mask, ``dL/d(effective) * weight``; the weight gets none.

    Args:
        like: the weight.
        threshold: of the numbers.
        start: all numbers at the beginning.
    """

    kind = "threshold"
    depth = 5

    def __init__(self, like: Tensor, threshold: float, start: float) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.full_like(like, start, requires_grad=True))
        self.threshold, self.start = threshold, start

    def settings(self) -> dict[str, Any]:
        """The threshold and the start."""
        return {"threshold": self.threshold, "start": self.start}

    def mask(self) -> Tensor:
        """Which entries live, bool."""
        return self.numbers.detach() > self.threshold

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        numbers = self.numbers
        # In this order what is added to the mask is exactly zero.
        return value.detach() * (self.mask().to(numbers) + (numbers - numbers.detach()))


class LeftOut(Encoding):
    """Weights that count as zero in training, at one step, and as they are otherwise.

    They get no gradient at that step. In eval mode, and in every file, nothing is left out.

    Args:
        left_out: bool, in the weight's shape.
    """

    kind = "left_out"
    depth = 20
    left_out: Tensor

    def __init__(self, left_out: Tensor) -> None:
        super().__init__()
        self.register_buffer("left_out", left_out.bool())

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        return value.masked_fill(self.left_out, 0.0) if self.training else value


#: Where a module remembers the order of its parameters while an encoding holds one of them.
_ORDER = "_lilliput_parameter_order"

KINDS: dict[str, type[Encoding]] = {
    cls.kind: cls
    for cls in (Mask, Codebook, Binary, IntegerGrid, StepGrid, LowRank, Held, Threshold, LeftOut)
}


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
    if isinstance(weight.module, nn.RNNBase):
        _refresh_before_forward(weight.module)


def share_codebook(weights: list[Weight]) -> None:
    """Let the codebooks of some weights train as one: theirs is a single parameter from now on."""
    first = original_of(weights[0])
    assert isinstance(first, nn.Parameter)
    for weight in weights:
        codebook = encoding_of(weight, Codebook)
        assert codebook is not None
        codebook.shared = (first,)
        _put_shared(weight)


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


def strip(weight: Weight) -> None:
    """Take all encodings off; the effective value becomes an ordinary parameter again."""
    if parametrize.is_parametrized(weight.module, weight.tensor):
        _own_class(weight.module)
        _leave_shared(weight)
        parametrize.remove_parametrizations(weight.module, weight.tensor, leave_parametrized=True)
        _restore_order(weight.module)


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


def bake(model: nn.Module) -> nn.Module:
    """Take all encodings off the model, in place; its outputs stay the same, bit for bit."""
    for weight in list(weights(model)):
        strip(weight)
    return model


def encoding_of(weight: Weight, kind: type[E]) -> E | None:
    """The weight's encoding of one kind, if it has one."""
    return next((e for e in weight.encodings() if isinstance(e, kind)), None)


def original_of(weight: Weight) -> Tensor:
    """What trains: the innermost encoding's original, or the weight itself."""
    if parametrize.is_parametrized(weight.module, weight.tensor):
        stacks: Any = weight.module.parametrizations
        original: Tensor = stacks[weight.tensor].original
        return original
    return weight.value


def stored_masks(model: nn.Module) -> list[tuple[Tensor, Mask]]:
    """The weights whose zeros are stored, with their masks: what :func:`reapply` keeps at zero."""
    return [
        (original_of(weight), encoding)
        for weight in weights(model)
        for encoding in weight.encodings()
        if isinstance(encoding, Mask) and encoding.policy == "hard" and encoding.innermost
    ]


@torch.no_grad()
def reapply(stored: list[tuple[Tensor, Mask]]) -> None:
    """Store the zeros again, after an optimizer has moved the weights."""
    if stored:
        torch._foreach_mul_([w for w, _ in stored], [m.factor(w) for w, m in stored])


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
    kind, like = settings.pop("kind"), weight.value
    if kind == "mask":
        return Mask(torch.ones_like(like, dtype=torch.bool), **settings)
    if kind == "codebook":
        return Codebook(
            torch.ones_like(like, dtype=torch.int32),
            like.new_zeros(settings["clusters"]),
            settings.get("book", ""),
        )
    if kind == "binary":
        return Binary(torch.ones_like(like), **settings)
    if kind == "integer_grid":
        return IntegerGrid(**settings)
    if kind == "step_grid":
        return StepGrid(step=like.new_ones(len(like), *[1] * (like.ndim - 1)), **settings)
    if kind == "low_rank":
        return LowRank(rows=like.shape[0], columns=like.shape[1], **settings)
    if kind == "held":
        return Held(torch.ones_like(like, dtype=torch.bool), like)
    if kind == "threshold":
        return Threshold(like, **settings)
    if kind == "left_out":
        return LeftOut(torch.zeros_like(like, dtype=torch.bool))
    raise UnknownName("encoding", kind, KINDS)


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
