"""``lilliput doctor``: is this machine ready, and if not, what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..engine.records import environment
from ..tasks import cifar10, fashion_mnist, mnist
from ..tasks._files import cache_folder, places
from ._print import columns, print_json, print_text

OPTIONAL = {
    "plotly": "report",
    "jinja2": "report",
    "sklearn": "data",
    "pooch": "data",
    "PIL": "data",
    "tensorboard": "tensorboard",
}
_FOLDERS = {
    "mnist": (mnist.MNIST.train[0].folder,),
    "fashion_mnist": (fashion_mnist.FASHION_MNIST.train[0].folder,),
    "cifar10": (cifar10.BINARY.folder, "cifar10-jpeg", "cifar10-lossless"),
    "ett": ("ett",),
    "fsdd": ("fsdd",),
}


def doctor(*, json: bool = False) -> int:
    """Check this machine: versions, packages, data sets, disk.

    Exit code 1 says that runs cannot be written in the working directory.

    Args:
        json: print one JSON object.
    """
    content = examine()
    if json:
        print_json(content)
    else:
        print_text(_render(content))
    return 0 if content["run_directory"]["writable"] else 1


def examine() -> dict[str, Any]:
    """What there is to know about this machine, JSON-ready."""
    return {
        "lilliput": __version__,
        **environment(),
        "threads": torch.get_num_threads(),
        "optional": {name: _optional(name, extra) for name, extra in OPTIONAL.items()},
        "data": {"digits": _with_sklearn(), **{name: _found(f) for name, f in _FOLDERS.items()}},
        "cache": str(cache_folder()),
        "run_directory": _run_directory(Path("runs")),
    }


def _optional(name: str, extra: str) -> dict[str, Any]:
    return {"present": importlib.util.find_spec(name) is not None, "extra": extra}


def _with_sklearn() -> dict[str, Any]:
    present = importlib.util.find_spec("sklearn") is not None
    return {"found": "scikit-learn" if present else None, "tried": ["scikit-learn"]}


def _found(folders: tuple[str, ...]) -> dict[str, Any]:
    tried = [place for folder in folders for place in places(folder)]
    # A folder that is there and empty is what an interrupted download leaves.
    found = next((place for place in tried if place.is_dir() and any(place.iterdir())), None)
    return {"found": None if found is None else str(found), "tried": [str(p) for p in tried]}


def _run_directory(path: Path) -> dict[str, Any]:
    """Whether runs can be written, tried where they would be, and the space there."""
    place = path if path.is_dir() else Path()
    problem = ""
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        problem = str(error)
    free = shutil.disk_usage(place).free
    return {
        "path": str(path.absolute()),
        "writable": not problem,
        "problem": problem,
        "free_bytes": free,
    }


def _render(content: dict[str, Any]) -> str:
    packages = {**content["packages"], "lilliput": content["lilliput"]}
    home = content["run_directory"]
    machine = [
        ("python", content["python"]),
        *((name, version or "missing") for name, version in packages.items()),
        ("system", content["system"]),
        ("processor", f"{content['processor']}, {content['cores']} cores"),
        ("torch threads", content["threads"]),
        ("GPU", content["gpu"] or "none that torch sees"),
        ("data folder", os.environ.get("LILLIPUT_DATA", "LILLIPUT_DATA is not set")),
        ("cache", content["cache"]),
        ("runs", f"{home['path']}, {'can be written' if home['writable'] else home['problem']}"),
        ("free disk", f"{home['free_bytes'] / 1e9:.1f} GB"),
    ]
    parts = (columns(machine), _packages(content["optional"]), _data(content["data"]))
    return "\n\n".join(parts)


def _packages(optional: dict[str, Any]) -> str:
    rows = [
        (name, "present" if p["present"] else f"missing: pip install 'lilliput[{p['extra']}]'")
        for name, p in optional.items()
    ]
    return f"optional packages\n{columns([('  ' + name, state) for name, state in rows])}"


def _data(data: dict[str, Any]) -> str:
    rows = [
        ("  " + name, d["found"] or f"not here (tried {', '.join(d['tried'])})")
        for name, d in data.items()
    ]
    return f"data sets\n{columns(rows)}"
