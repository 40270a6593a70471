"""Single weights pruned in rounds, each followed by retraining: what three methods have in common.

A method that derives from this says how one round prunes, in ``_prune``; what it must remember of the dense
network, in ``_remember``; and what it adds to the report, in ``_note`` or its own ``finish``.

The surprising rule: rounds come one after the other even where several are due at once, as in a stage that
does not train, since a method may measure anew in each.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from ...core.run import Run
from ...core.select import Weight
from ...core.types import Change, Fraction
from ...mechanisms.encodings import reapply, stored_masks
from ._allocation import SparsityMethod
from ._dead import remove_dead_connections
from ._masking import changes, nonzeros, put_masks
from ._rounds import rounds_due


class SparseInRounds(SparsityMethod):
    """Base of the methods that prune, retrain, and prune again.

    Attributes:
        rounds: how often the stage prunes, each time retraining afterwards.
        until: part of the stage over which the rounds are spread; the rest is the last retraining.
        remove_dead: cut the other connections of neurons that have lost all inputs or all outputs.
    """

    rounds: Annotated[int, Field(ge=1)] = 1
    until: Fraction = 0.5
    remove_dead: bool = True

    def attach(self, run: Run) -> None:
        """Put masks on, and prune for the first time."""
        chosen, memory = self.weights(run.model), self.memory(run)
        memory["before"] = {w.name: nonzeros(w.value) for w in chosen}
        memory["round"] = 0
        self._remember(run, chosen)
        self.allocate(run, chosen)
        put_masks(chosen)
        self._prune_if_due(run)

    def before_step(self, run: Run) -> None:
        """Prune again when the next round begins."""
        self._prune_if_due(run)

    def settled(self, run: Run) -> bool:
        """Whether the last round has pruned."""
        return bool(self.memory(run)["round"] == self.rounds)

    def finish(self, run: Run) -> list[Change]:
        """Cut dead neurons; report the zeros of every layer."""
        chosen = self.weights(run.model)
        if self.remove_dead:
            remove_dead_connections(run, chosen)
        note = self._note(run)
        return changes(self.method_name(), chosen, self.memory(run)["before"], lambda w: note)

    def _prune_if_due(self, run: Run) -> None:
        memory = self.memory(run)
        due = rounds_due(run, self.rounds, self.until)
        for number in range(memory["round"] + 1, due + 1):
            with torch.no_grad():
                self._prune(run, self.weights(run.model), number / self.rounds)
            reapply(stored_masks(run.model))
            memory["round"] = number

    def _remember(self, run: Run, chosen: list[Weight]) -> None:
        """Keep what the rounds need of the network as it is before the first."""

    def _prune(self, run: Run, chosen: list[Weight], part: float) -> None:
        """Prune up to a part of the final amount; what is already pruned stays so."""
        raise NotImplementedError

    def _note(self, run: Run) -> str:
        """What the report says beside every layer's zeros."""
        return ""
