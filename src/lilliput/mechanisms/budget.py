"""How many channels stay in each group, and which: from importances to a removal.

Three steps, each usable by itself: :func:`widths_allowed` says what counts of channels a group may keep,
:func:`count` finds how many of them stay (a ratio, or the most that a cost allows), :func:`lowest` names
the channels that go. Costs are plain functions of the kept counts, so this module knows no network.

The surprising rule: a count is rounded so that the *stored* width becomes a multiple of ``round_to``. A
channel that occupies six rows of a fused attention matrix counts six times, and rows that must
stay count too. Half way between two widths the larger one wins.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from pydantic import Field, model_validator

from ..core.select import matches
from ..core.types import Keep, Layers, PerLayer, Settings, resolve
from ..errors import InputError
from .groups.classes import Group, Removal

Scope: TypeAlias = Literal["layer", "global"]
Normalize: TypeAlias = Literal["none", "max", "mean", "l2"]
Quantity: TypeAlias = Literal["macs", "parameters", "bytes", "latency"]

#: What a network costs when it keeps so many channels of each group, int64 ``(groups,)``.
Cost: TypeAlias = Callable[[np.ndarray], float]


class Budget(Settings):
    """What the thin network may cost, as a fraction of the dense one. Give exactly one.

    Attributes:
        macs: multiply-accumulate operations of a forward pass.
        parameters: numbers in the parameters.
        bytes: of the parameters and persistent buffers, uncompressed, each at its own type.
        latency: time of a forward pass, measured side by side on the machine at hand.

    Example:
        >>> Budget(macs=0.5).quantity
        'macs'
    """

    macs: Keep | None = Field(default=None)
    parameters: Keep | None = None
    bytes: Keep | None = None
    latency: Keep | None = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("give exactly one of macs, parameters, bytes and latency")
        return self

    def __repr__(self) -> str:
        """The form that a method's setting takes, in Python as in a recipe."""
        return repr({self.quantity: self.fraction})

    @property
    def quantity(self) -> Quantity:
        """Which of them is given."""
        given: Any = next(name for name, value in self if value is not None)
        return cast(Quantity, given)

    @property
    def fraction(self) -> float:
        """How much of it may stay."""
        return float(getattr(self, self.quantity))


# -- which groups take part -------------------------------------------------------------------


def takes_part(group: Group, layers: Layers) -> bool:
    """Whether a pattern over layers means the group.

    A residual stream is made by several layers. It takes part if the pattern covers at least one of
    them and takes none away with ``"!"``.
    """
    patterns = [layers] if isinstance(layers, str) else layers
    unwanted = [p[1:] for p in patterns if p.startswith("!")]
    taken_away = any(fnmatch.fnmatchcase(name, p) for name in group.layers for p in unwanted)
    return not taken_away and any(matches(layers, name) for name in group.layers)


def keep_of(group: Group, keep: PerLayer[float] | None) -> float | None:
    """The fraction to keep of a group: the largest that a pattern asks of one of its layers.

    Returns:
        None where no pattern covers a layer of the group.
    """
    asked = [value for name in group.layers if (value := resolve(keep, name)) is not None]
    return max(asked, default=None)


# -- how many ---------------------------------------------------------------------------------


def widths_allowed(
    group: Group, round_to: int = 8, at_least: int = 1, shapes: Mapping[str, Any] | None = None
) -> np.ndarray:
    """The counts of channels that a group may keep, ascending; all of them is the last.

    Args:
        group: whose channels.
        round_to: the stored width of the layers that make the channels shall be a multiple of it. A
            group that cannot reach one (it is narrower) may keep any count.
        at_least: the smallest count, or all channels where there are fewer.
        shapes: tensor name -> shape; by default the channels are all that a dim holds.

    Returns:
        int64 ``(counts,)``.

    Example:
        >>> from lilliput.mechanisms.groups import Member
        >>> conv = Member("conv.weight", 0, "makes", np.arange(20)[:, None])
        >>> widths_allowed(Group(20, (conv,)))
        array([ 8, 16, 20])
    """
    counts = np.arange(1, group.channels + 1)
    fits = np.ones(len(counts), bool)
    for member in group.with_role("makes"):
        repeats = member.index.shape[1]
        full = group.channels * repeats
        size = full if shapes is None else shapes[member.tensor][member.dim]
        fits &= (size - full + counts * repeats) % round_to == 0
    fits |= not fits.any()
    fits[-1] = True
    return counts[fits & (counts >= min(at_least, group.channels))]


def count(
    wish: Callable[[float], np.ndarray],
    allowed: Sequence[np.ndarray],
    *,
    part: float | None = None,
    cost: Cost | None = None,
    target: float = math.inf,
    rank: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    precision: float = 1e-6,
) -> np.ndarray:
    """How many channels each group keeps.

    Args:
        wish: fraction of all channels to keep -> wished count of each group; see :func:`evenly` and
            :func:`by_rank`. It must not fall when the fraction grows.
        allowed: the counts that each group may keep.
        part: the fraction; or
        cost: what the counts cost, where the largest fraction is sought that costs at most
        target: this much.
        rank: of two counts, the lower of which fits, the groups in the order in which they are
            raised to the higher one, while the target holds; by default nothing is raised.
        precision: of the fraction; a cost that is slow to measure wants a coarse one.

    Returns:
        int64 ``(groups,)``, each one of the allowed counts.

    Raises:
        InputError: the target is out of reach; the message says what is the smallest reachable.
    """
    if part is not None:
        return rounded(wish(part), allowed)
    assert cost is not None
    smallest = np.array([steps[0] for steps in allowed])
    if (least := cost(smallest)) > target:
        raise InputError(
            f"the budget of {target:,.6g} cannot be reached: with every layer at its floor there "
            f"still are {least:,.6g}. Ask for more, lower at_least or round_to, or let more layers "
            "take part."
        )
    low, high, kept = 0.0, 1.0, smallest
    if cost(full := rounded(wish(1.0), allowed)) <= target:
        return full
    while high - low > precision:
        middle = (low + high) / 2
        found = rounded(wish(middle), allowed)
        if cost(found) <= target:
            low, kept = middle, found
        else:
            high = middle
    return _raise(kept, rounded(wish(high), allowed), rank, lambda c: cost(c) <= target)


def evenly(channels: np.ndarray) -> Callable[[float], np.ndarray]:
    """The same fraction of every group."""
    return lambda part: part * channels


def by_rank(
    scores: Sequence[np.ndarray | None], channels: np.ndarray
) -> Callable[[float], np.ndarray]:
    """The most important channels of all groups together; a group without scores stays whole.

    Args:
        scores: an importance for each channel of each group.
        channels: int64 ``(groups,)``, how many each has.
    """
    scored = {g: s for g, s in enumerate(scores) if s is not None}
    owner = np.concatenate([np.full(len(s), g) for g, s in scored.items()])
    order = np.argsort(-np.concatenate(list(scored.values())), kind="stable")

    def wish(part: float) -> np.ndarray:
        wished = channels.astype(float)
        wished[list(scored)] = 0
        np.add.at(wished, owner[order[: round(part * len(order))]], 1)
        return wished

    return wish


def rounded(wishes: np.ndarray, allowed: Sequence[np.ndarray]) -> np.ndarray:
    """The allowed count nearest to each wish; the larger one half way between two."""
    nearest = [
        steps[::-1][np.argmin(np.abs(steps[::-1] - wish))]
        for wish, steps in zip(wishes, allowed, strict=True)
    ]
    return np.array(nearest, dtype=np.int64)


def by_importance(scores: Sequence[np.ndarray | None]) -> Callable[..., np.ndarray]:
    """Groups in the order of the mean importance of the channels that they would get back."""

    def rank(kept: np.ndarray, raised: np.ndarray) -> np.ndarray:
        gains = [
            -np.inf if s is None or more <= few else float(np.sort(s)[::-1][few:more].mean())
            for s, few, more in zip(scores, kept, raised, strict=True)
        ]
        return np.argsort(-np.array(gains), kind="stable")

    return rank


def by_loss(channels: np.ndarray) -> Callable[..., np.ndarray]:
    """Groups in the order of the fraction that they have lost, the poorest first."""
    return lambda kept, raised: np.argsort(kept / channels, kind="stable")


# -- which ------------------------------------------------------------------------------------


def normalized(scores: np.ndarray, how: Normalize) -> np.ndarray:
    """Importances of one layer on a scale that can be compared with other layers'.

    Example:
        >>> normalized(np.array([3.0, 4.0]), "l2")
        array([0.6, 0.8])
    """
    scale = {
        "none": 1.0,
        "max": np.abs(scores).max(),
        "mean": np.abs(scores).mean(),
        "l2": np.linalg.norm(scores),
    }[how]
    return scores / scale if scale else scores


def lowest(scores: Sequence[np.ndarray | None], kept: np.ndarray) -> dict[int, np.ndarray]:
    """The channels of smallest importance, so that each group keeps its count.

    Of equal ones the last go, so that exactly so many go, and always the same ones.
    """
    removal = {}
    for number, (values, stay) in enumerate(zip(scores, kept, strict=True)):
        if values is not None and stay < len(values):
            best_first = np.argsort(-values, kind="stable")
            removal[number] = np.sort(best_first[stay:])
    return removal


def choose(
    groups: Sequence[Group],
    scores: Sequence[np.ndarray],
    *,
    keep: float | None = None,
    cost: Cost | None = None,
    target: float = math.inf,
    scope: Scope = "layer",
    normalize: Normalize = "none",
    round_to: int = 8,
    at_least: int = 1,
) -> Removal:
    """The least important channels of all groups, so that a fraction stays or a target is met.

    Args:
        groups: which can lose channels.
        scores: an importance for each channel of each group; the smallest go first.
        keep: fraction of the channels that stay; or
        cost: what kept counts cost, of which as many stay as cost at most
        target: this much.
        scope: the same fraction of each group, or the most important of all groups together.
        normalize: how importances are made comparable between groups.
        round_to: stored widths become multiples of it; 1 for exact counts.
        at_least: what every group keeps.

    Returns:
        group number -> channels that go.

    Raises:
        InputError: the target is out of reach.

    Example:
        >>> from lilliput.mechanisms.groups import Member
        >>> conv = Member("conv.weight", 0, "makes", np.arange(4)[:, None])
        >>> choose([Group(4, (conv,))], [np.array([3.0, 1.0, 2.0, 4.0])], keep=0.5)
        {0: array([1, 2])}
    """
    comparable = [normalized(np.asarray(s, float), normalize) for s in scores]
    channels = np.array([g.channels for g in groups])
    ranked = scope == "global"
    kept = count(
        by_rank(comparable, channels) if ranked else evenly(channels),
        [widths_allowed(g, round_to, at_least) for g in groups],
        part=keep,
        cost=cost,
        target=target,
        rank=by_importance(comparable) if ranked else by_loss(channels),
    )
    return lowest(comparable, kept)


def _raise(
    kept: np.ndarray, raised: np.ndarray, rank: Any, fits: Callable[[np.ndarray], bool]
) -> np.ndarray:
    """Use up what rounding has left: raise groups one by one where the budget still holds."""
    for group in rank(kept, raised) if rank is not None else ():
        more = kept.copy()
        more[group] = max(kept[group], raised[group])
        if more[group] > kept[group] and fits(more):
            kept = more
    return kept
