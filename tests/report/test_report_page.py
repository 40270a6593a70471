"""The page: complete, self-contained, escaped; and the picture."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly")
pytest.importorskip("jinja2")

from lilliput.errors import InputError, MissingDependency
from lilliput.report import picture, write_report

EVIL = "<img src=x onerror=document.title='owned'>\"'</script><b>&amp;"
SVG = "{http://www.w3.org/2000/svg}"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def own_markup(page: str) -> str:
    """The page without plotly's program."""
    return re.sub(r"<script>(?:(?!</script>).){1000000,}?</script>", "", page, flags=re.DOTALL)


def test_one_run(make_run: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    assert write_report([make_run()], out) == out
    page = own_markup(out.read_text())
    assert len(page) < 300_000
    for words in ("About tiny.", "97.50", "✗ fails", "✓ holds", "distinct values", "fc.weight",
                  "still run densely", "name: tiny", "Weights before and after"):  # fmt: skip
        assert words in page, words
    assert "runs compared" not in page
    assert page.count('<div class="plot"') == 6
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


def test_several_runs_are_compared(make_run: Any, tmp_path: Path) -> None:
    out = write_report([make_run("a"), make_run("b")], tmp_path / "report.html")
    text = out.read_text()
    page = own_markup(text)
    assert "<h1>2 runs compared</h1>" in page
    assert 'href="#run-2"' in page and 'id="run-2"' in page
    assert page.count("1 of 2") == 2
    assert len(text) - len(page) < 6_000_000  # plotly's program once
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_nothing_is_fetched(make_run: Any, tmp_path: Path) -> None:
    page = own_markup(write_report([make_run()], tmp_path / "report.html").read_text())
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(|<link""", page)
    assert "default-src 'none'" in page


def test_names_are_escaped(make_run: Any, tmp_path: Path) -> None:
    home = make_run(name=EVIL, score_name=EVIL)
    result = json.loads((home / "result.json").read_text())
    result["stages"][1]["name"] = EVIL
    (home / "result.json").write_text(json.dumps(result))
    page = own_markup(write_report([home], tmp_path / "report.html").read_text())
    assert "&lt;img src=x" in page
    assert "<img" not in page
    assert "</script><b>" not in page
    assert "\\u003cimg" not in page  # plotly would take it for a tag


def test_optional_figures(make_run: Any, tmp_path: Path) -> None:
    home = make_run()
    rows = [{"layer": "fc", "kind": "bits", "amount": 2, "score": 50.0}]
    scan = {"baseline": 98.0, "score_name": "accuracy, %", "rows": rows}
    (home / "sensitivity.json").write_text(json.dumps(scan))
    (home / "metrics.jsonl").unlink()
    result = json.loads((home / "result.json").read_text())
    result["stages"][1] |= {"deep_compression": {"P": 71, "P+Q": 43}, "energy_pj": 2.5e6}
    (home / "result.json").write_text(json.dumps(result))
    page = own_markup(write_report([home], tmp_path / "report.html").read_text())
    assert "Sensitivity by layer" in page
    assert ">Training<" not in page
    assert "<td>71</td><td>43</td>" in page
    assert "energy, µJ" in page and "<td>2.50</td>" in page


def test_a_page_that_cannot_be_written(make_run: Any, tmp_path: Path) -> None:
    home, folder = make_run(), tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_report([home], folder)
    with pytest.raises(InputError, match="cannot be written"):
        picture(home, folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "run"]


def test_without_plotly(make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingDependency, match=r"lilliput\[report\]"):
        write_report([make_run()], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_reading_and_tables_need_neither_torch_nor_plotly() -> None:
    code = "import sys, lilliput.report; print({'torch', 'plotly', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_picture(make_run: Any, tmp_path: Path) -> None:
    home = make_run(name=EVIL, dense_bytes=10_000)
    out = picture(home, tmp_path / "picture.svg")
    root = ElementTree.fromstring(out.read_text())
    assert out.stat().st_size < 5_000
    assert root.find(f"{SVG}title").text == EVIL  # type: ignore[union-attr]
    assert EVIL in root.attrib["aria-label"]
    stages = json.loads((home / "result.json").read_text())["stages"]
    widths = [float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect")]
    sizes = [10_000, *(stage["bytes"] for stage in stages)]
    assert widths == pytest.approx([300 * size / 10_000 for size in sizes], abs=0.06)
    words = "".join(root.itertext())
    assert "97.50" in words and f"{stages[1]['bytes']:,}" in words


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_in_a_browser(make_run: Any, tmp_path: Path) -> None:
    out = write_report([make_run("a", name=EVIL), make_run("b")], tmp_path / "report.html")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", "--dump-dom",
        out.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    assert "<title>2 runs compared" in done.stdout
    drawn = re.findall(r'class="plotly-graph-div js-plotly-plot"', done.stdout)
    assert len(drawn) == 13
