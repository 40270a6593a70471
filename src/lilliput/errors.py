"""The exception tree.

::

    LilliputError
    ├── InputError (ValueError)        what the caller gave cannot be used
    │   ├── UnknownName                no such method, architecture, task, layer, key: names the nearest
    │   ├── NothingMatched             a layer pattern that covers no layer
    │   ├── RecipeError                a recipe file, with file:line and the path of the key
    │   ├── ModelMismatch              a model that does not fit its loss, its task or an artifact
    │   └── EmptyData                  an iterable of batches that yields nothing
    ├── DataNotFound                   a data set: lists every place that was tried
    ├── MissingDependency              an optional package: says which extra brings it
    ├── ArtifactError                  a compressed file
    │   ├── CorruptArtifact            truncated, altered, inconsistent: names the tensor
    │   ├── UnsupportedArtifact        foreign, a future version, an unknown codec
    │   └── ArtifactTooLarge           claims more memory than the caller's cap
    ├── ExportFailed                   a network that cannot be written for a runtime: names the operator
    └── RunError                       a run that cannot start, or cannot go on
        ├── Diverged                   the loss is not finite
        ├── NothingChanged             a method finished and the model is as it was
        ├── SurgeryFailed              channels could not be cut: the model is as it was
        └── RunConflict                the run directory belongs to another recipe or process

Every message says what is wrong, where, why, and what to do next.

``LilliputWarning`` is for what is legal and probably not meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LilliputError(Exception):
    """Root of every error that Lilliput raises on purpose."""


class InputError(LilliputError, ValueError):
    """What the caller gave cannot be used."""


class UnknownName(InputError):
    """A name that nothing answers to.

    Args:
        kind: what was looked for, for example ``"method"``.
        name: what was asked.
        known: the names that exist.
        where: where the name stands, for example ``"recipe.yaml:4"``.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], where: str = "") -> None:
        known = sorted(known)
        self.kind, self.name, self.known = kind, name, known
        prefix = f"{where}: " if where else ""
        super().__init__(f"{prefix}no {kind} is named {name!r}.{did_you_mean(name, known)}")


class NothingMatched(InputError):
    """A layer pattern that covers no layer of the model."""


class RecipeError(InputError):
    """A recipe that cannot be read or validated."""


class ModelMismatch(InputError):
    """A model that does not fit its loss, its task or an artifact."""


class EmptyData(InputError):
    """An iterable of batches that yields nothing."""


class DataNotFound(LilliputError):
    """A data set that is in none of the places that were tried."""


class MissingDependency(LilliputError):
    """An optional package that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f"pip install 'lilliput[{extra}]'."
        )


class ArtifactError(LilliputError):
    """A compressed file that cannot be used."""


class CorruptArtifact(ArtifactError):
    """A compressed file that is truncated, altered or inconsistent."""


class UnsupportedArtifact(ArtifactError):
    """A file of another kind, of a future version, or with an unknown codec."""


class ArtifactTooLarge(ArtifactError):
    """A file whose content would exceed the caller's memory cap."""


class ExportFailed(LilliputError):
    """A network cannot be written for a runtime, or the runtime does not take it."""


class RunError(LilliputError):
    """A run that cannot start, or cannot go on."""


class Diverged(RunError):
    """The loss is no longer a finite number."""


class NothingChanged(RunError):
    """A method has finished and the model is as it was before."""


class SurgeryFailed(RunError):
    """Channels could not be cut out; the model is bit-identical to before."""


class RunConflict(RunError):
    """The run directory belongs to another recipe or to another process."""


class LilliputWarning(UserWarning):
    """Something legal that is probably not meant."""


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str:
    """The nearest known names as the tail of a sentence, or the whole list when it is short.

    Example:
        >>> did_you_mean("sparcity", ["sparsity", "layers"])
        " Did you mean 'sparsity'?"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=limit, cutoff=0.6)
    if near:
        return " Did you mean " + " or ".join(repr(n) for n in near) + "?"
    if not known:
        return ""
    shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f" Known: {shown}."
