"""One HTML page for one run or several: self-contained, it opens from a folder without a network.

The surprising rule: the page forbids itself the network (a Content-Security-Policy in its head), so a
figure that would fetch something fails visibly here and not on a reader's desk. Plotly's program,
4.8 MB, stands in the page once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from ..core.files import unfinished
from ..core.optional import optional
from ..core.registry import Paper, find
from ..errors import InputError, UnknownName
from .read import RunData, read_runs
from .tables import (
    MISSING,
    comparison,
    count,
    decimals,
    markdown_table,
    notes,
    ratio,
    shared_score_name,
)
from .weights import layer_weights

_load = partial(optional, extra="report", purpose="the HTML report")

if TYPE_CHECKING:
    from .figures import Figure


@dataclass(frozen=True)
class _Section:
    """What the template shows of one run."""

    run: RunData
    figures: list[Figure]
    notes: list[str]
    papers: dict[str, tuple[Paper, ...]]
    recipe: str


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write a page about finished runs; several are compared in a table on top.

    Args:
        runs: run directories.
        out: the HTML file; replaced if it exists, its folder is made.

    Returns:
        ``out``.

    Raises:
        InputError: a directory holds no finished run, or ``out`` cannot be written.
        MissingDependency: plotly or Jinja2 is not installed.
        ArtifactError: a stage's file is damaged.
    """
    from .figures import run_figures, score_against_bytes  # here, because it needs plotly

    data = read_runs(runs)
    sections = [_section(run, run_figures(run, layer_weights(run))) for run in data]
    several = len(data) > 1
    page = _render(
        title=f"{len(data)} runs compared" if several else data[0].name,
        sections=sections,
        rows=comparison(data) if several else [],
        compared=[score_against_bytes(data)] if several else [],
        score_name=shared_score_name(data),
        markdown=markdown_table(data),
    )
    _write(Path(out), page)
    return Path(out)


def _section(run: RunData, figures: list[Figure]) -> _Section:
    names = dict.fromkeys(name for stage in run.stages for name in stage["methods"])
    return _Section(
        run, figures, notes(run), {name: _papers(name) for name in names}, _yaml(run.recipe)
    )


def _papers(method: str) -> tuple[Paper, ...]:
    """Its sources; none for a method of a package that is not installed here."""
    try:
        return find("method", method).papers
    except UnknownName:
        return ()


def _yaml(content: dict[str, Any]) -> str:
    text = StringIO()
    YAML().dump(content, text)
    return text.getvalue()


def _render(**content: Any) -> str:
    jinja2 = _load("jinja2", "jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=count, decimals=decimals, ratio=ratio, value=_value)
    plotly = _load("plotly.offline", "plotly").get_plotlyjs()
    markup = environment.get_template("page.html").render(
        **content, plotly=_safe(plotly), draw=lambda figure, name: _safe(_drawing(figure, name))
    )
    return str(markup)


def _safe(markup: str) -> Any:
    """Markup that plotly wrote, and escaped, itself."""
    return _load("markupsafe", "markupsafe").Markup(markup)


def _drawing(figure: Figure, name: str) -> str:
    """The figure's element and script; plotly escapes ``<`` and ``/`` in what it writes."""
    markup: str = _load("plotly.io", "plotly").to_html(
        figure.drawing,
        config={"displayModeBar": False, "responsive": True},
        include_plotlyjs=False,
        full_html=False,
        div_id=name,
        default_height=f"{figure.drawing.layout.height}px",
    )
    return markup


def _value(value: Any) -> str:
    """A value of a change or of the environment, as a table shows it."""
    if value is None:
        return MISSING
    if isinstance(value, int) and not isinstance(value, bool):
        return count(value)
    if isinstance(value, float):
        return f"{value:,.4g}"
    return str(value)


def _write(out: Path, page: str) -> None:
    """Under a temporary name first, so that no half page stays."""
    temporary = unfinished(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise InputError(
            f"the report cannot be written to {out}: {error.strerror or error}. Name a file in a "
            "folder that you may write to, with room for 5 MB."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
