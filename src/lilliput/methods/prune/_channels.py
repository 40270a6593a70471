"""Methods that remove whole channels: what they share, so that a paper's file holds only the paper.

For who writes such a method. Derive from :class:`ChannelMethod` and override one of

``scores(run, groups)``
    an importance for each channel of each group; the base counts, rounds and removes the lowest.
``removal(run, groups)``
    the channels themselves, for criteria in which one choice changes the next. ``self.counts(run,
    groups)`` says how many each group keeps; a group whose count is its width loses nothing.
    ``self.part(run)`` says how far the rounds are, where a method counts by a rule of its own; one that
    only has ratios of its own for the layers overrides ``ratios``.

and, where the paper changes what stays (scaling, merging), ``edit(run, groups, removal)``: called before
the cut, while everything still is there; the function that it returns is called on the thin network, inside
the transaction, and gives tensors new values only through ``surgery.replace``.

``when = "start"`` removes in ``attach``, and again in later rounds, so that the stage retrains what is
left. ``when = "end"`` lets the stage train first, with a penalty or under soft zeros (the ordinary hooks
``loss``, ``after_step``, ``after_epoch``), and removes in ``finish``. Call ``super()`` in the hooks that are
overridden: ``attach`` and ``finish`` always, ``before_step`` where ``when`` is ``"start"``. A method with
an amount of its own beside ``keep`` and ``budget`` overrides ``_check_amount``.

``self.groups(run)`` is the analysis of the model as it is now; it is kept until a shape changes, so a
penalty may ask at every step. ``self.takes_part(groups)`` tells which of them the settings mean,
``self.allowed(run, groups)`` which counts each may keep; ``self.note(run, layer, text)`` tells the reader of
the report something about a layer. :mod:`._norms` has the numbers of each channel, :mod:`._activations`
its activations. State belongs into ``self.memory(run)``; a criterion must come to the same result when
``attach`` runs again after an interruption, so draw only from ``run.generator``.

Which layers a pattern means: a group is one choice for all layers that make its channels (a residual
stream has many). It takes part if ``layers`` covers one of them and takes none away with ``"!"``. Of several
``keep`` ratios for one group the largest counts; a group that no pattern of ``keep`` covers stays whole.

The surprising rule: ``keep`` is a fraction of the network as the stage begins, ``budget`` one of the dense
network, as it was before the first method touched it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.method import Method
from ...core.run import Run
from ...core.select import matches
from ...core.types import Change, Fraction, Keep, Layers, PerLayer
from ...errors import EmptyData, InputError, NothingChanged, NothingMatched, did_you_mean
from ...measure import macs, size
from ...mechanisms.budget import (
    Budget,
    Normalize,
    Scope,
    by_importance,
    by_loss,
    by_rank,
    evenly,
    keep_of,
    lowest,
    normalized,
    rounded,
    takes_part,
    widths_allowed,
)
from ...mechanisms.folding import fold_constants
from ...mechanisms.groups import Groups, find_groups
from ...mechanisms.groups.classes import Group, Removal
from ...mechanisms.surgery import cut
from ._costs import Offer
from ._norms import effective
from ._rounds import rounds_due

#: Changes values of the thin network; see :meth:`ChannelMethod.edit`.
Edit = Callable[[nn.Module], object]

_FOLDING_SAMPLES = 256


class ChannelMethod(Method):
    """Base of the methods that remove channels.

    Attributes:
        layers: pattern over the modules that make channels.
        keep: fraction of the channels that stay; for every layer or by layer pattern.
        budget: instead of keep, what the network may cost, as a fraction of the dense one.
        scope: the same fraction of every layer, or the most important channels of all layers together.
        normalize: how importances are made comparable between layers, for the global scope.
        round_to: widths become multiples of it, which runtimes like; 1 for exact counts.
        at_least: channels that every layer keeps.
        rounds: how often the stage removes, each time retraining afterwards.
        until: part of the stage over which the rounds are spread; the rest is the last retraining.
        fold: add what removed channels always send to the bias or running mean behind them.
        heads: remove channels inside of attention heads, the same of each, or whole heads.

    Class attributes:
        when: remove at the start of the stage, or at its end.
        data_free: whether weights alone decide, so that ``lilliput.thin`` can use the method.
    """

    family: ClassVar[str] = "prune"
    when: ClassVar[Literal["start", "end"]] = "start"
    data_free: ClassVar[bool] = False

    layers: Layers = "*"
    keep: PerLayer[Keep] | None = None
    budget: Budget | None = None
    scope: Scope = "layer"
    normalize: Normalize = "none"
    round_to: Annotated[int, Field(ge=1)] = 8
    at_least: Annotated[int, Field(ge=1)] = 1
    rounds: Annotated[int, Field(ge=1)] = 1
    until: Fraction = 0.5
    fold: Literal["none", "constant"] = "none"
    heads: Literal["channels", "whole"] = "channels"

    _groups: tuple[Any, Groups] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _consistent(self) -> ChannelMethod:
        self._check_amount()
        if self.scope == "global" and isinstance(self.keep, dict):
            raise ValueError("scope: global ranks all layers together: give one keep for all")
        if self.when == "end" and self.rounds != 1:
            raise ValueError("it removes once, at the end of its stage: repeat the stage instead")
        return self

    def _check_amount(self) -> None:
        """Hold that the settings say in one way how much goes."""
        if (self.keep is None) == (self.budget is None):
            raise ValueError("give either keep or budget, and not both")

    @classmethod
    def example(cls) -> ChannelMethod:
        """Half of the channels go, in steps of two."""
        return cls(keep=0.5, round_to=2)

    # -- what a paper overrides -------------------------------------------------------------------

    def scores(self, run: Run, groups: Groups) -> Sequence[np.ndarray]:
        """An importance for each channel, ``(channels,)`` for each of ``groups.groups``; lowest go first."""
        raise NotImplementedError

    def removal(self, run: Run, groups: Groups) -> Removal:
        """The channels that go now: group number -> channel numbers, ascending."""
        scores = self._comparable(groups, self.scores(run, groups))
        return lowest(scores, self.counts(run, groups, scores))

    def edit(self, run: Run, groups: Groups, removal: Removal) -> Edit | None:
        """Look at the whole network, and return what is to be done to the thin one, if anything."""
        return None

    # -- what a paper may ask ---------------------------------------------------------------------

    def groups(self, run: Run) -> Groups:
        """The groups of the model as it is now.

        Raises:
            NothingMatched: the settings mean none of them.
        """
        key = [(name, p.shape) for name, p in run.model.named_parameters()]
        if self._groups is None or self._groups[0] != key:
            found = find_groups(run.model, self.inputs(run), heads=self.heads)
            if not any(self.takes_part(found)):
                raise self._nothing(found)
            self._groups = key, found
        return self._groups[1]

    def takes_part(self, groups: Groups) -> list[bool]:
        """Whether the settings mean each of the groups."""
        return [
            takes_part(group, self.layers)
            and (self.keep is None or keep_of(group, self.keep) is not None)
            for group in groups.groups
        ]

    def part(self, run: Run) -> float:
        """Which part of the final amount the present round reaches, 1 in the last."""
        return float(self.memory(run)["round"] / self.rounds)

    def counts(
        self, run: Run, groups: Groups, scores: Sequence[np.ndarray | None] | None = None
    ) -> np.ndarray:
        """How many channels each group keeps in this round: int64 ``(groups,)``.

        Args:
            run: the run.
            groups: of the model as it is now.
            scores: importances that can be compared between groups, None for a group that takes no
                part; only the global scope needs them.

        Raises:
            InputError: the budget is out of reach, or the global scope has nothing to rank by.
        """
        now, allowed = _channels(groups), self.allowed(run, groups)
        known = self.memory(run)["channels"]
        start = np.array([known.get(k, n) for k, n in zip(_keys(groups), now, strict=True)])
        if self.scope == "global":
            if scores is None:
                raise self._no_ranking()
            wish, rank = by_rank(scores, now), by_importance(scores)
        else:
            wish, rank = evenly(start), by_loss(start)
        if self.budget is not None:
            dense = run.model if run.original is None else run.original
            offer = Offer(run.model, dense, groups, self.inputs(run), wish, allowed, rank)
            return self._within(run, offer)
        wishes = self._wishes(run, groups, wish, start)
        self._note_floors(run, groups, wishes)
        return rounded(wishes, allowed)

    def allowed(self, run: Run, groups: Groups) -> list[np.ndarray]:
        """The counts that each group may keep, ascending, int64; only all, if it takes no part."""
        return [
            self._allowed(run.model, group) if mine else np.array([group.channels])
            for group, mine in zip(groups.groups, self.takes_part(groups), strict=True)
        ]

    def ratios(self, run: Run, groups: Groups) -> list[float | None]:
        """The fraction that each group keeps in the end, in the scope of a layer; None for all."""
        return [keep_of(group, self.keep) for group in groups.groups]

    def note(self, run: Run, layer: str, text: str) -> None:
        """Tell the reader of the changes something about a layer."""
        self.memory(run)["notes"][layer] = text

    def inputs(self, run: Run) -> Any:
        """One example's inputs, on the run's device.

        Raises:
            InputError: there is none yet, in a training loop of the user's own.
        """
        try:
            example = run.task.example_inputs()
        except EmptyData as error:
            raise InputError(
                f"{self.method_name()} must see an example before it can tell which channels belong "
                "together: give lilliput.attach(..., task=...)."
            ) from error
        return pytree.tree_map_only(Tensor, lambda t: t.to(run.device), example)

    @property
    def once(self) -> bool:
        """Whether a stage removes channels only once."""
        return self.rounds == 1

    # -- hooks ------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        """The pattern must cover a layer that has channels at all."""
        names = _owners(model)
        if not any(matches(self.layers, name) for name in names):
            raise _no_layer(self.method_name(), self.layers, names)

    def attach(self, run: Run) -> None:
        """Note how wide everything is; remove for the first time, unless the end is the time."""
        self._refuse_processes()
        groups, memory = self.groups(run), self.memory(run)
        memory.update(round=0, error=None, unchecked="")
        memory.update(widths={}, totals={}, notes={}, folded={})  # what the changes will say
        memory["channels"] = dict(zip(_keys(groups), _channels(groups).tolist(), strict=True))
        if self.when == "start":
            self._prune_if_due(run)

    def before_step(self, run: Run) -> None:
        """Remove again when the next round begins."""
        if self.when == "start":
            self._prune_if_due(run)

    def settled(self, run: Run) -> bool:
        """Whether the last round has removed."""
        return bool(self.when == "end" or self.memory(run)["round"] == self.rounds)

    def finish(self, run: Run) -> list[Change]:
        """Remove, if the end is the time; report the width of every layer before and after."""
        if self.memory(run)["round"] < self.rounds:
            self._prune(run, self.rounds)
        return self._changes(run)

    # -- how --------------------------------------------------------------------------------------

    def _prune_if_due(self, run: Run) -> None:
        done = self.memory(run)["round"]
        if done == self.rounds:
            return
        due = rounds_due(run, self.rounds, self.until)
        if due > done:
            self._refuse_unknown_optimizer(run)
            self._prune(run, due)

    def _prune(self, run: Run, number: int) -> None:
        """Remove what the round of this number, from 1, is to remove."""
        memory = self.memory(run)
        memory["round"] = number  # the criterion may ask for `part`
        groups = self.groups(run)
        removal = {g: gone for g, gone in self.removal(run, groups).items() if len(gone)}
        if removal:
            self._cut(run, groups, removal)
        elif number == self.rounds and not memory["widths"]:
            raise NothingChanged(
                f"{self.method_name()} has no channel to remove: with round_to={self.round_to} and "
                f"at_least={self.at_least} every layer stays as wide as it is. Keep less, or set "
                "round_to to 1."
            )

    def _cut(self, run: Run, groups: Groups, removal: Removal) -> None:
        edits = [self._folding(run, groups, removal), self.edit(run, groups, removal)]

        def edit(model: nn.Module) -> None:
            for change in edits:
                if change is not None:
                    change(model)

        inputs, memory = self.inputs(run), self.memory(run)
        before = {} if memory["totals"] else self._figures(run)
        done = cut(run.model, groups, removal, inputs=inputs, optimizer=run.optimizer, edit=edit)
        for change in done.changes:
            memory["widths"].setdefault(change.where, [change.before, 0])[1] = change.after
        for what, now in self._figures(run).items():
            memory["totals"].setdefault(what, [before.get(what), 0])[1] = now
        errors = [e for e in (memory["error"], done.error) if e is not None]
        memory["error"] = max(errors, default=None)
        memory["unchecked"] = "; ".join(done.unchecked)

    def _folding(self, run: Run, groups: Groups, removal: Removal) -> Edit | None:
        if self.fold == "none":
            return None
        batches = (batch.inputs for batch in run.calibration(_FOLDING_SAMPLES))
        folding = fold_constants(run.model, groups, removal, batches)
        memory = self.memory(run)
        memory["notes"].update(folding.notes)
        for name, count in folding.folded.items():
            memory["folded"][name] = memory["folded"].get(name, 0) + count
        return folding.apply

    def _comparable(self, groups: Groups, scores: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        return [
            normalized(np.asarray(values, dtype=float), self.normalize) if mine else None
            for values, mine in zip(scores, self.takes_part(groups), strict=True)
        ]

    def _allowed(self, model: nn.Module, group: Group) -> np.ndarray:
        shapes = {m.tensor: effective(model, m.tensor).shape for m in group.with_role("makes")}
        return widths_allowed(group, self.round_to, self.at_least, shapes)

    def _wishes(
        self, run: Run, groups: Groups, wish: Callable[[float], np.ndarray], start: np.ndarray
    ) -> np.ndarray:
        """What ``keep`` asks for in this round, before rounding."""
        if self.scope == "global":
            taking = np.array(self.takes_part(groups))
            left = self._left(run, float(self.keep or 1.0))  # type: ignore[arg-type]
            return wish(min(1.0, left * start[taking].sum() / _channels(groups)[taking].sum()))
        asked = self.ratios(run, groups)
        return start * [1.0 if ratio is None else self._left(run, ratio) for ratio in asked]

    def _left(self, run: Run, final: float) -> float:
        return 1 - (1 - final) * self.part(run)

    def _within(self, run: Run, offer: Offer) -> np.ndarray:
        """Meet the budget; times are not the same twice, so what they led to is kept in a file."""
        assert self.budget is not None
        fraction = self._left(run, self.budget.fraction)
        if self.budget.quantity != "latency" or run.directory is None:
            return offer.within(self.budget.quantity, fraction)
        place = next(n for n, other in enumerate(run.methods) if other is self)
        number = self.memory(run)["round"]
        file = run.directory / f"widths-{run.stage}-{place}-{number}.json"
        if not file.exists():
            half_done = file.with_suffix(".tmp")
            half_done.write_text(json.dumps(offer.within("latency", fraction).tolist()))
            half_done.replace(file)
        return np.array(json.loads(file.read_text()))

    def _note_floors(self, run: Run, groups: Groups, wishes: np.ndarray) -> None:
        for group, wish in zip(groups.groups, wishes, strict=True):
            if round(float(wish)) < self.at_least:
                for layer in group.layers:
                    self.note(run, layer, f"would be emptied; at_least={self.at_least} holds it")

    def _figures(self, run: Run) -> dict[str, int]:
        inputs = self.inputs(run)
        return {"parameters": size(run.model).parameters, "macs": macs(run.model, inputs).total}

    def _changes(self, run: Run) -> list[Change]:
        """What this method's own cuts did, whatever others did in the same stage."""
        memory, name = self.memory(run), self.method_name()
        error, notes = memory["error"], memory["notes"]
        equal = "" if error is None else f"equals the silenced network but for {error:.0e}"
        checked = "; ".join(text for text in (equal, memory["unchecked"]) if text)
        return [
            *(
                Change(layer, "channels", before, after, name, notes.get(layer, ""))
                for layer, (before, after) in memory["widths"].items()
            ),
            *(
                Change(tensor, "constants folded", 0, count, name, notes.get(_owner(tensor), ""))
                for tensor, count in memory["folded"].items()
            ),
            *(
                Change("model", what, before, after, name, checked)
                for what, (before, after) in memory["totals"].items()
            ),
        ]

    def _refuse_processes(self) -> None:
        """Several processes cannot follow a change of shape, and would each measure another time."""
        timed = self.budget is not None and self.budget.quantity == "latency"
        if (self.once and not timed) or _processes() == 1:
            return
        raise InputError(
            f"{self.method_name()} with {'one round' if self.once else 'several rounds'}"
            f"{' and a latency budget' if timed else ''} does not work where several processes train "
            "together: they cannot follow a change of shape, nor measure the same time. Write the "
            "rounds as stages of one round each, with a budget in macs."
        )

    def _refuse_unknown_optimizer(self, run: Run) -> None:
        if run.step and run.optimizer is None:
            raise InputError(
                f"{self.method_name()} with {self.rounds} rounds cuts the optimizer's state along and "
                "must know it: set attached.run.optimizer before the first step, or use one round."
            )

    def _no_ranking(self) -> InputError:
        return InputError(
            f"{self.method_name()} chooses layer by layer and has nothing to rank all layers by: "
            "leave scope at 'layer'."
        )

    def _nothing(self, groups: Groups) -> NothingMatched:
        """Why the settings mean no group: nothing of that name, or nothing that may go."""
        asked = list(self.keep) if isinstance(self.keep, dict) else self.layers
        reasons = {
            place: why
            for place, why in groups.unprunable.items()
            if matches(asked, _owner(place.rpartition(" dim ")[0]))
        }
        if not reasons:
            names = [layer for group in groups.groups for layer in group.layers]
            return _no_layer(self.method_name(), asked, names)
        shown = "; ".join(f"{place}: {why}" for place, why in list(reasons.items())[:5])
        return NothingMatched(
            f"{self.method_name()}: {asked!r} covers only layers whose channels must stay ({shown}). "
            "Choose other layers."
        )


def _processes() -> int:
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _channels(groups: Groups) -> np.ndarray:
    return np.array([group.channels for group in groups.groups], dtype=np.int64)


def _keys(groups: Groups) -> list[str]:
    """A name for each group that stays the same when channels go."""
    names = [group.name for group in groups.groups]
    return [f"{name} {names[:place].count(name)}" for place, name in enumerate(names)]


def _owners(model: nn.Module) -> list[str]:
    """Layers that own a tensor of two dims or more, under its plain name."""
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1]
    plain = [name.partition("parametrizations.")[0].rstrip(".") for name in names]
    return list(
        dict.fromkeys(
            short if short != name else name.rpartition(".")[0]
            for short, name in zip(plain, names, strict=True)
        )
    )


def _no_layer(method: str, layers: Layers, names: Sequence[str]) -> NothingMatched:
    pattern = layers if isinstance(layers, str) else ", ".join(layers)
    hint = did_you_mean(pattern.strip("*!"), names) or " The model has no such layer at all."
    return NothingMatched(f"{method}: the pattern {layers!r} covers no layer with channels.{hint}")
