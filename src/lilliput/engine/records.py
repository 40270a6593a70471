"""The run directory: who may use it, what lies where, and how its files are written.

::

    recipe.yaml  resolved.json  environment.json   what was asked, with all defaults, on which machine
    metrics.jsonl                                   a line an epoch; no clock in it, so runs can be compared
    changes.json                                    what each method did to each layer
    checkpoints/                                    start, original, stage-0, stage-1, ..., inside
    stages/0-train.safetensors ...                  the artifact after each stage
    model.safetensors  result.json  log.txt
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import filelock
import torch

from ..errors import RunConflict
from .checkpoint import cannot_write, load_tree, save_tree, write_atomically
from .precision import fast_precision


class RunDirectory:
    """One run's files, locked against other processes while open.

    Args:
        path: the directory; made if it does not exist.
        description: what the run is, JSON-ready; the directory belongs to it.
        fresh: delete an earlier run that lies there.
        leader: False for the processes of a group that write nothing.

    Raises:
        RunConflict: the directory holds another run or other files, or another process writes it.
    """

    def __init__(
        self, path: Path, description: dict[str, Any], *, fresh: bool = False, leader: bool = True
    ) -> None:
        self.path, self.leader = path, leader
        self._lock: filelock.BaseFileLock | None = None
        if leader:
            _make(path)
            self._lock = _take_lock(path)
            _sweep(path)
            self._claim(description, fresh)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def _claim(self, description: dict[str, Any], fresh: bool) -> None:
        resolved = self.path / "resolved.json"
        if resolved.exists() and fresh:
            _clear(self.path)
        if resolved.exists():
            known = _read_description(resolved)
            if fingerprint(known) != fingerprint(description):
                raise RunConflict(
                    f"{self.path} belongs to another recipe: {_first_difference(known, description)}. "
                    "Choose another directory, or start this one anew with --fresh."
                )
            return
        if others := [p.name for p in self.path.iterdir() if p.name != "lock"]:
            raise RunConflict(
                f"{self.path} is not a run directory, and holds {', '.join(sorted(others)[:3])}. "
                "Choose an empty or a new directory."
            )
        self.write_json("environment.json", environment())
        self.write_json("resolved.json", description)

    def checkpoint(self, name: str) -> Path:
        """Path of a checkpoint."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def save(self, name: str, tree: Any) -> None:
        """Write a checkpoint."""
        if self.leader:
            save_tree(self.checkpoint(name), tree)

    def load(self, name: str) -> Any | None:
        """Read a checkpoint; None where there is none."""
        path = self.checkpoint(name)
        return load_tree(path) if path.exists() else None

    def forget(self, name: str) -> None:
        """Delete a checkpoint."""
        if self.leader:
            self.checkpoint(name).unlink(missing_ok=True)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        if self.leader:
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def keep_metrics_until(self, stage: int, epoch: int) -> None:
        """Drop the metrics of what is going to be done again."""
        path = self.path / "metrics.jsonl"
        if self.leader and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _place(line) <= (stage, epoch)]
            write_atomically(path, lambda file: file.write("".join(kept).encode()))

    def add_metrics(self, figures: dict[str, Any]) -> None:
        """Append one line of metrics."""
        if self.leader:
            path = self.path / "metrics.jsonl"
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(figures) + "\n")
            except OSError as error:
                raise cannot_write(path, error) from error


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise RunConflict(f"{path} is a file: choose another name for the directory.") from error
    except OSError as error:
        raise cannot_write(path, error) from error


def _sweep(path: Path) -> None:
    """Delete the temporary files that a killed process has left."""
    for left in path.rglob(".*.tmp"):
        left.unlink(missing_ok=True)


def _read_description(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunConflict(
            f"{path} is damaged ({error}), so nobody can say whose run this is. Choose another "
            "directory, or start this one anew with --fresh."
        ) from error


def fingerprint(description: dict[str, Any]) -> str:
    """A short hash of what a run is."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def environment() -> dict[str, Any]:
    """Versions, processor and devices, for the record."""
    packages = ("lilliput", "torch", "numpy", "scipy", "safetensors", "pydantic")
    return {
        "python": platform.python_version(),
        "packages": {p: _version(p) for p in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "auto_precision": fast_precision(
            torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's name, as well as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _place(line: str) -> tuple[float, float]:
    """Stage and epoch of a line of metrics; a line that a kill has torn is after everything."""
    try:
        figures = json.loads(line)
    except ValueError:
        return (float("inf"), 0)
    return (figures["stage"], figures["epoch"])


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _take_lock(path: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(path / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise RunConflict(
            f"another process is writing {path}. Wait for it, or choose another directory."
        ) from error
    return lock


def _clear(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name == "lock":
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _first_difference(known: Any, asked: Any, where: str = "") -> str:
    if isinstance(known, dict) and isinstance(asked, dict):
        for key in [*known, *asked]:
            if known.get(key) != asked.get(key):
                return _first_difference(
                    known.get(key), asked.get(key), f"{where}.{key}".lstrip(".")
                )
    if isinstance(known, list) and isinstance(asked, list) and len(known) == len(asked):
        for place, (a, b) in enumerate(zip(known, asked, strict=True)):
            if a != b:
                return _first_difference(a, b, f"{where}.{place}")
    return f"{where or 'it'} is {_short(known)} there and {_short(asked)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
