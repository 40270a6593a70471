"""What lies in a run directory, as one object.

The surprising rule: paths inside the files are not trusted to be right. A run directory may have been
moved or copied, so stages' artifacts are looked for below the directory that was given.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import artifact
from ..errors import InputError

_FIGURES = frozenset((
    "score", "score_name", "baseline_score", "score_drop", "parameters", "nonzeros", "bytes",
    "dense_bytes", "size_ratio", "entropy_bytes", "latency_ratio", "stages",
))  # fmt: skip
_STAGE_FIGURES = _FIGURES - {"baseline_score", "stages"} | {"name", "methods", "artifact", "layers"}


@dataclass(frozen=True)
class RunData:
    """A finished run, read from its directory.

    Attributes:
        directory: the run directory.
        name: the recipe's name; several runs that share one have the directory's added.
        figures: ``result.json``: figures of the final file and, under ``stages``, of each stage.
        recipe: ``resolved.json``: the recipe with all defaults filled in.
        environment: ``environment.json``: versions, processor and devices.
        metrics: ``metrics.jsonl``: one mapping an epoch.
        changes: ``changes.json``: for each stage, what its methods did to each layer.
        sensitivity: ``sensitivity.json``, or None where the run has no such file.
    """

    directory: Path
    name: str
    figures: dict[str, Any]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    changes: list[list[dict[str, Any]]]
    sensitivity: dict[str, Any] | None

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The figures of each stage, in order."""
        stages: list[dict[str, Any]] = self.figures["stages"]
        return stages

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Channels of each layer that lost some: before the first stage and after the last.

        Layers of blocks that were removed later are not among them.
        """
        found: dict[str, tuple[int, int]] = {}
        for change in itertools.chain.from_iterable(self.changes):
            if change["what"] == "channels":
                before, _ = found.get(change["where"], (change["before"], 0))
                found[change["where"]] = before, change["after"]
        gone = tuple(f"{block}." for block in self.removed)
        return {layer: w for layer, w in found.items() if not f"{layer}.".startswith(gone)}

    @property
    def removed(self) -> dict[str, str]:
        """Blocks that were removed whole, and what each was before."""
        changes = itertools.chain.from_iterable(self.changes)
        return {c["where"]: str(c["before"]) for c in changes if c["what"] == "block"}

    def artifact(self, stage: int) -> Path | None:
        """The file that a stage wrote (-1: the last); None where it is no longer there."""
        path = self.directory / "stages" / Path(self.stages[stage]["artifact"]).name
        return path if path.is_file() else None

    def codebook_bytes(self, stage: int) -> dict[str, int]:
        """Bytes of each tensor's codebook, where it has one, from the header of the stage's file."""
        path = self.artifact(stage)
        if path is None:
            return {}
        with artifact.open(path) as file:
            books = {name: file.info(name).codebook_bytes for name in file.names()}
        return {name: size for name, size in books.items() if size}


def read_run(path: Path) -> RunData:
    """Read a finished run.

    Args:
        path: a run directory.

    Raises:
        InputError: it is no directory, no run directory, the run has not finished, or a file in it
            cannot be read; the message names the file.
    """
    path = Path(path)
    _check_finished(path)
    figures = _object(path / "result.json")
    _check_figures(path / "result.json", figures)
    recipe = _object(path / "resolved.json")
    return RunData(
        directory=path,
        name=str(recipe.get("name") or path.resolve().name),
        figures=figures,
        recipe=recipe,
        environment=_object(path / "environment.json"),
        metrics=_lines(path / "metrics.jsonl"),
        changes=_json(path / "changes.json"),
        sensitivity=_sensitivity(path / "sensitivity.json"),
    )


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Read several finished runs; no two get the same name.

    Raises:
        InputError: no path is given, or as :func:`read_run`.
    """
    if not paths:
        raise InputError("no run directory is given; name at least one, like runs/digits.")
    runs = [read_run(path) for path in paths]
    shared = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{run.name} ({_told_apart(run, runs)})") if shared[run.name] > 1 else run
        for run in runs
    ]


def _told_apart(run: RunData, runs: Sequence[RunData]) -> str:
    """The directory's name, or its whole path where another run's directory is named alike."""
    names = [other.directory.resolve().name for other in runs]
    name = run.directory.resolve().name
    return name if names.count(name) == 1 else str(run.directory)


def _check_finished(path: Path) -> None:
    if not path.is_dir():
        raise InputError(
            f"{path} is no directory. Name a run directory, as `lilliput run` writes it."
        )
    needed = ("resolved.json", "environment.json", "result.json", "changes.json")
    missing = [name for name in needed if not (path / name).is_file()]
    if "resolved.json" in missing:
        raise InputError(
            f"{path} is no run directory: {', '.join(missing)} missing. Name the directory that "
            "`lilliput run` printed."
        )
    if missing:
        raise InputError(
            f"{path} holds a run that has not finished: {', '.join(missing)} missing. Give the same "
            "`lilliput run` command again, and it goes on where it stopped."
        )


def _check_figures(file: Path, figures: dict[str, Any]) -> None:
    _check_keys(file, "", figures, _FIGURES)
    stages = figures["stages"]
    if not isinstance(stages, list) or not stages:
        raise InputError(f"{file}: stages must be a list with at least one stage. {_ADVICE}")
    for number, stage in enumerate(stages):
        _check_keys(file, f"stages.{number}.", stage, _STAGE_FIGURES)


def _check_keys(file: Path, where: str, figures: Any, needed: frozenset[str]) -> None:
    present = figures.keys() if isinstance(figures, dict) else set()
    if missing := sorted(needed - present):
        names = ", ".join(where + name for name in missing)
        raise InputError(f"{file} lacks {names}. {_ADVICE}")


_ADVICE = "It was written by another version or altered; run the recipe again with --fresh."


def _object(file: Path) -> dict[str, Any]:
    content = _json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not an object. {_ADVICE}")
    return content


def _json(file: Path) -> Any:
    return _parse(_text(file), str(file))


def _lines(file: Path) -> list[dict[str, Any]]:
    """One object a line; no file where no stage trained."""
    if not file.exists():
        return []
    texts = enumerate(_text(file).splitlines(), start=1)
    lines = [_parse(text, f"{file}:{number}") for number, text in texts if text.strip()]
    for number, line in enumerate(lines, start=1):
        _check_keys(file, f"{number}.", line, frozenset({"stage", "epoch"}))
    return lines


def _sensitivity(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    content = _object(file)
    _check_keys(file, "", content, frozenset({"baseline", "score_name", "rows"}))
    for number, row in enumerate(content["rows"]):
        _check_keys(file, f"rows.{number}.", row, frozenset({"layer", "kind", "amount", "score"}))
    return content


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}. {_ADVICE}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}. {_ADVICE}") from error
