"""Run directories become a table, figures, one HTML page and a picture for a README.

Reading runs, tables and the picture need no optional package; the page needs plotly and Jinja2, the
extra ``report``. The surprising rule: nothing is computed anew. What the page shows was measured by
the run and lies in its directory; only the weights are read from the artifacts.
"""

from __future__ import annotations

from .page import write_report
from .picture import Bar, draw_bars, picture
from .read import RunData, read_run, read_runs
from .tables import comparison, markdown_table

__all__ = [
    "Bar",
    "RunData",
    "comparison",
    "draw_bars",
    "markdown_table",
    "picture",
    "read_run",
    "read_runs",
    "write_report",
]
