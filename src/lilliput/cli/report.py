"""``lilliput report``: run directories as a page."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ._print import print_json, print_text


def report(
    runs: list[Path],
    /,
    *,
    out: Path | None = None,
    picture: Path | None = None,
    json: bool = False,
) -> int:
    """Write an HTML report of one run, or a comparison of several.

    Args:
        runs: run directories.
        out: the page to write; by default report.html in the run directory, or in the working
            directory for several runs.
        picture: write a small SVG picture of a single run as well.
        json: print one JSON object with the paths of what was written.
    """
    from ..report import write_report
    from ..report.picture import picture as draw

    if picture and len(runs) > 1:
        raise InputError(f"--picture draws one run, and {len(runs)} are given.")
    page = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    written = {"report": str(write_report(runs, page))}
    if picture:
        written["picture"] = str(draw(runs[0], picture))
    if json:
        print_json(written)
    else:
        print_text("\n".join(written.values()))
    return 0
