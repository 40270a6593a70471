"""Numbers with which no network can be built, refused by their names."""

from __future__ import annotations

from ..errors import InputError


def check_counts(network: str, **counts: int) -> None:
    """Refuse a network in which a layer would have no channel.

    Args:
        network: for the error.
        counts: channels, classes, units by name.

    Raises:
        InputError: one is below 1.

    Example:
        >>> check_counts("vgg16", classes=10)
    """
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{network}: {name}={count}: give at least 1.")


def check_probabilities(network: str, **probabilities: float) -> None:
    """Refuse what is no probability, and certainty: it would leave nothing.

    Args:
        network: for the error.
        probabilities: of dropping something, by name.

    Raises:
        InputError: one is not in [0, 1).
    """
    for name, value in probabilities.items():
        if not 0.0 <= value < 1.0:
            raise InputError(
                f"{network}: {name}={value}: give a probability, at least 0 and below 1."
            )
