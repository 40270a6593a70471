"""What a compressed file holds, tensor by tensor; no torch needed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import artifact
from ._print import columns


def describe(path: Path, *, verify: bool) -> dict[str, Any]:
    """Everything about a compressed file, JSON-ready.

    Raises:
        ArtifactError: the file is damaged or foreign.
    """
    with artifact.open(path) as file:
        if verify:
            file.verify()
        report = file.report()
        sections = {"structure": file.structure, "figures": file.figures, "recipe": file.recipe}
    return {
        "kind": "artifact",
        "path": str(path),
        "profile": report.profile,
        "bytes": report.file_bytes,
        "header_bytes": report.header_bytes,
        "dense_bytes": report.dense_bytes,
        "size_ratio": report.ratio,
        "entropy_bytes": report.entropy_bytes,
        "coded_over_entropy": report.entropy_ratio,
        "weights": report.weights,
        "nonzeros": report.nonzeros,
        "verified": verify,
        "tensors": [{**asdict(tensor), "ratio": tensor.ratio} for tensor in report.tensors],
        **sections,
    }


def render(content: dict[str, Any]) -> str:
    """The description as text."""
    totals = (
        f"{content['path']}: {content['bytes']:,} bytes, {content['size_ratio']:.1f}x smaller than "
        f"{content['dense_bytes']:,} bytes dense\n"
        f"{content['nonzeros']:,} of {content['weights']:,} values are not zero\n"
        f"order-0 entropy {content['entropy_bytes']:,.0f} bytes; coded tensors over their entropy "
        f"{content['coded_over_entropy']:.3f}; header {content['header_bytes']:,} bytes "
        f"({content['profile']} profile)"
    )
    checked = "\nevery checksum and count is right" if content["verified"] else ""
    return f"{totals}{checked}\n\n{_tensors(content['tensors'])}\n{_sections(content)}".rstrip()


def _tensors(tensors: list[dict[str, Any]]) -> str:
    head = ("tensor", "shape", "codec", "non-zeros", "bytes", "entropy", "ratio")
    rows = [
        (
            t["name"],
            "x".join(map(str, t["shape"])) or "scalar",
            t["codec"],
            f"{t['nonzeros']:,} of {t['weights']:,}",
            f"{t['bytes']:,}",
            f"{t['entropy_bytes']:,.0f}",
            f"{t['ratio']:.1f}x",
        )
        for t in tensors
    ]
    return columns([head, *rows], right=(3, 4, 5, 6))


def _sections(content: dict[str, Any]) -> str:
    structure, figures, recipe = (content[k] or {} for k in ("structure", "figures", "recipe"))
    lines = [f"{key}: {value}" for key, value in {**structure, **figures}.items()]
    if "name" in recipe:
        lines.append(f"recipe: {recipe['name']}")
    return "\n" + "\n".join(lines) if lines else ""
