"""The report's page: every number is in its result.json, and the page fits on a screen and on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from base64 import b64decode
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kd.core.statistics import paired
from kd.tools.paper.page.content import (
    STAGE_HEADINGS,
    about_stages,
    findings,
    of_two_seeds,
    published_of,
    stage_entries,
)
from kd.tools.paper.page.figures import COLOURS, draw_row
from kd.tools.paper.report import Draw, Report
from kd.tools.paper.reproduction import main
from kd.tools.paper.screen import print_tables

TINY = ("teacher=plane6", "train.epochs=2", "train.precision=fp32", "runtime.threads=1", "--report")
KINDS = {"accuracy", "curves", "fidelity", "calibration", "confusion", "cost"}
SVG = "{http://www.w3.org/2000/svg}"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a small row of each of two tables, on digits; the store is beside it."""
    place = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_STORE", str(place / "store"))
        patch.setenv("KD_DATA", str(place / "data"))
        patch.setattr("kd.tools.paper.cost.step_seconds", lambda stage, device, batch: batch / 1000)
        chosen = "--table", "takd_cifar10,size_cifar10", "--row", "plane", "--out", str(place / "out")
        assert main([*chosen, *TINY[:-1]]) == 0
    return place


class _Keys(HTMLParser):
    """The text of each element with data-key, and the files that the page loads from elsewhere."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[list[str], str]] = []
        self.outside: list[str] = []
        self._open: list[str] | None = None
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if keys := named.get("data-key"):
            self.found.append((keys.split(), ""))
            self._open = keys.split()
        links = [value or "" for name, value in attrs if name in ("src", "href")]
        self.outside += [link for link in links if not link.startswith(("#", "data:"))]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "span"):
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            keys, text = self.found[-1]
            self.found[-1] = keys, text + data


def test_every_number_leads_to_its_results(folder: Path) -> None:
    page, report = _Keys(folder / "out" / "report.html"), Report.model_validate_json(_read(folder, "tables.json"))
    assert page.outside == []
    results = {key: json.loads((folder / "store" / key / "result.json").read_text()) for key in report.stages}
    for keys, text in page.found:
        assert set(keys) <= set(results), text
    texts = {(tuple(keys), text.strip()) for keys, text in page.found}
    for table in report.tables:
        for cell in table.rows[0].cells:
            accuracies = [results[key]["test_acc"] for key in cell.students]
            mean = sum(accuracies) / len(accuracies)
            assert any(keys == cell.students and text.startswith(f"{mean:.2f} ± ") for keys, text in texts)
            assert (cell.keys, f"{cell.flops / 1e15:.3g}") in texts
    for key, result in results.items():
        assert ((key,), f"{result['test_acc']:.2f}") in texts
        assert ((key,), f"{result['val_acc']:.2f}") in texts


def test_every_cell_of_a_table_with_a_number_has_its_keys(folder: Path) -> None:
    """Except numbers that are no results: the published number, n, a seed, the epochs."""
    report = Report.model_validate_json(_read(folder, "tables.json"))
    rows = [row for table in report.tables for row in table.rows]
    published = {published_of(cell, row.baseline) for row in rows for cell in row.cells}
    lines = re.findall(r"<tr>(.*?)</tr>", _read(folder, "report.html"), re.DOTALL)
    assert len(lines) > 7
    for line in lines:
        bare = re.findall(r"<td>(.*?)</td>", line, re.DOTALL)
        assert not [text for text in bare[2:] if re.search(r"\d\.\d", text) and text not in published], line


def test_the_twin_says_the_same(folder: Path) -> None:
    report, text = Report.model_validate_json(_read(folder, "tables.json")), _read(folder, "report.md")
    for table in report.tables:
        for cell in table.rows[0].cells:
            assert cell.test_acc is not None
            assert f"| {cell.label} | " in text
            assert f"{cell.test_acc.mean:.2f} ± {cell.test_acc.std:.2f}" in text
        for cell in table.rows[0].cells:
            assert f"- {cell.label}, {cell.chain}: `python run.py " in text
    linked = re.findall(r"!\[[^]]+\]\((figures/[^)]+)\)", text)
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (folder / "out" / "figures").iterdir())
    kinds = {Path(name).stem.rpartition("-")[2] for name in linked}
    assert kinds == {*KINDS, "axis"}


def test_the_findings_come_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence a row, the same on both pages and in the terminal, before any table and figure."""
    report, text = Report.model_validate_json(_read(folder, "tables.json")), _read(folder, "report.md")
    lines = [*findings(report)]
    assert len(lines) == sum(len(table.rows) for table in report.tables) == 2
    assert text.index("## Findings") < text.index("- " + lines[0]) < text.index("\n| ")
    page = unescape(_read(folder, "report.html"))
    assert page.index(lines[0].partition("**, ")[2]) < page.index("<table>")
    print_tables(report)
    said = capsys.readouterr().out
    assert lines[0].replace("**", "") in said.splitlines()
    few = of_two_seeds(report)  # the same beside them
    assert few.startswith("n = 2: ")
    assert all(few in shown for shown in (text, page, said))
    print_tables(report.model_copy(update={"title": "of [/b] and [x]"}))  # no markup, but what was typed
    assert capsys.readouterr().out.startswith("of [/b] and [x]\n")
    title = "# The papers' tables, on digits\n"
    assert text.startswith(title)
    assert f"<h1>{title[2:-1]}</h1>" in page
    assert re.search(r"published,\s+cifar10 %", said)


def one_row(report: Report, values: list[float], base: list[float], cells: int = 1) -> str:
    """The sentence of a row in which cells with these accuracies stand beside their baseline."""
    table = report.tables[0]
    first = table.rows[0].cells[0]
    draws = tuple(Draw(seed=i, chain=first.draws[0].chain) for i in range(len(values)))
    against = paired(values, base) if len(values) > 1 else None
    named = {"draws": draws, "against": None}
    beside = [
        first.model_copy(update={**named, "label": f"X{i}" if i else "X", "against": against}) for i in range(cells)
    ]
    row = table.rows[0].model_copy(
        update={"baseline": "B", "cells": (first.model_copy(update={**named, "label": "B"}), *beside)}
    )
    (line,) = findings(report.model_copy(update={"tables": (table.model_copy(update={"rows": (row,)}),)}))
    return line.partition(", digits: ")[2]


def test_a_finding_says_how_certain_it_is(folder: Path) -> None:
    report = Report.model_validate_json(_read(folder, "tables.json"))
    # differences 1 and 3: half of the interval is 12.7062 times their deviation √2, by √2
    told = one_row(report, [71.0, 73.0], [70.0, 70.0])
    assert told == "X and B cannot be told apart (+2.00, 95 % interval -10.71 to +14.71, n = 2)."
    assert one_row(report, [68.61, 70.0], [70.0, 71.39]) == "X differs from B by -1.39 at every seed (n = 2)."
    # 1, 1.1 and 1.2: 4.3027 times .1, by √3
    better = one_row(report, [71.0, 71.1, 71.2], [70.0] * 3)
    assert better == "X is better than B by 1.10 points (95 % interval +0.85 to +1.35, n = 3)."
    assert one_row(report, [70.0] * 3, [71.0, 71.1, 71.2]).startswith("X is worse than B by 1.10 points")
    assert one_row(report, [71.0], [70.0]).endswith(": one seed, which does not tell them apart.")
    many = one_row(report, [71.0, 71.1, 71.2], [70.0] * 3, cells=5)
    assert many.startswith("5 of 5 cells are better than B, 0 worse, 0 cannot be told apart; the highest: X is better")


def test_numbers_of_other_data_are_on_no_axis(folder: Path) -> None:
    """The published ones are CIFAR's, and ours of digits. A copy of CIFAR-10 keeps them."""
    report = Report.model_validate_json(_read(folder, "tables.json"))
    table = next(table for table in report.tables if any(c.published_accuracy for c in table.rows[0].cells))
    for data, shown in (("digits", False), (table.dataset, True), ("CIFAR-10 (JPEG copy)", True)):
        drawings = draw_row(report, table.model_copy(update={"data": data}), table.rows[0])
        assert any("published" in drawing.svg + drawing.caption for drawing in drawings) == shown, data


def test_a_stage_says_what_its_training_has_of_its_own(folder: Path) -> None:
    report = Report.model_validate_json(_read(folder, "tables.json"))
    stages = [*report.stages.values()]
    longer = stages[0].training.replace("weight decay", "warmup 3, weight decay")
    stages[0] = stages[0].model_copy(update={"training": longer, "made_with": {"torch": "9", "threads": 1}})
    stages[1:] = [stage.model_copy(update={"made_with": {"torch": "8", "threads": 1}}) for stage in stages[1:]]
    changed = report.model_copy(update={"stages": {stage.key: stage for stage in stages}})
    place = STAGE_HEADINGS.index("training")
    shown = [stage_entries(changed, stage)[place].text for stage in stages]
    assert shown == ["warmup 3", *[""] * (len(stages) - 1)]
    assert [stage_entries(changed, each)[-1].text for each in stages[:2]] == ["torch 9", "torch 8"]
    assert about_stages(changed).endswith(" All are made with threads 1.")
    assert "weight decay" in about_stages(changed)
    assert "warmup" not in about_stages(changed)


def test_the_page_holds_the_figures(folder: Path) -> None:
    """Each figure is as in its file, with its caption as alternative text."""
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)"', _read(folder, "report.html"))
    pictures = [b64decode(encoded) for encoded, _ in found]
    assert sorted(pictures) == sorted(path.read_bytes() for path in (folder / "out" / "figures").iterdir())
    text = _read(folder, "report.md")
    assert all(f"![{unescape(caption)}](" in text for _, caption in found)


def test_a_figure_names_its_cells_in_text(folder: Path) -> None:
    report = Report.model_validate_json(_read(folder, "tables.json"))
    for table in report.tables:
        for kind in ("accuracy", "curves", "calibration", "confusion", "cost"):
            root = ElementTree.parse(folder / "out" / "figures" / f"{table.id}-plane-{kind}.svg").getroot()
            texts = [text for text in ("".join(each.itertext()).strip() for each in root.iter(f"{SVG}text")) if text]
            for cell in table.rows[0].cells:
                guided = kind != "confusion" or "→" in cell.chain
                assert any(text.partition(":")[0] == cell.label for text in texts) == guided, (kind, cell.label)


def test_the_report_is_written_again_without_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KD_STORE", str(folder / "store"))
    monkeypatch.setenv("KD_DATA", str(folder / "data"))
    monkeypatch.setattr("kd.training.loop.train_stage", None)
    chosen = "--table", "takd_cifar10", "--row", "plane", "--seeds", "0,1,7", "--out", str(tmp_path)
    assert main([*chosen, *TINY]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "NOKD, seed 7: **no result**, `not trained`" in text
    again = Report.model_validate_json((tmp_path / "tables.json").read_text())
    before = Report.model_validate_json(_read(folder, "tables.json"))
    assert again.stages.items() <= before.stages.items()
    assert [cell.test_acc for cell in again.tables[0].rows[0].cells] == [
        cell.test_acc for cell in before.tables[0].rows[0].cells
    ]
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes() == (folder / "out" / "figures" / path.name).read_bytes(), path.name


def test_colours_stand_off_white_paper() -> None:
    """By WCAG's 3:1 for graphics."""
    for colour in COLOURS:
        assert 1.05 / (_luminance(colour) + 0.05) >= 3, colour


def _luminance(colour: str) -> float:
    """Relative, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# Runs in a copy of the page, and leaves what it has seen in the document.
PROBE = """<script>addEventListener("load", () => {
  const figures = [...document.querySelectorAll("figure")].map(f => {
    const image = f.querySelector("img"), box = image.getBoundingClientRect();
    return {id: f.id, width: box.width, height: box.height, drawn: image.complete && image.naturalWidth > 0,
      paper: getComputedStyle(image).backgroundColor};
  });
  const cells = [...document.querySelector("table").rows[1].cells];
  const seen = {figures, edges: cells.slice(2, 5).map(c => c.getBoundingClientRect().right),
    overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color};
  top.document.body.innerHTML = `<pre id="seen">${JSON.stringify(seen)}</pre>`;
})</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(1300, False), (1300, True), (375, False)])
def test_a_browser_shows_it(folder: Path, tmp_path: Path, width: int, dark: bool) -> None:
    page, text = tmp_path / "report.html", _read(folder, "report.html").replace("</body>", f"{PROBE}</body>")
    phone = f'<body><iframe width="{width}" height="2000" style="border: 0" srcdoc="{escape(text)}"></iframe></body>'
    page.write_text(text if width > 500 else phone)  # headless windows are no narrower
    seen, complaints = _browse(page, width, dark)
    assert complaints == []
    report = Report.model_validate_json(_read(folder, "tables.json"))
    ids = {figure["id"] for figure in seen["figures"]}
    for table in report.tables:
        assert {f"{table.id}-plane-{kind}" for kind in KINDS} <= ids
    assert "size_cifar10-plane-axis" in ids
    assert all(f["width"] > 200 and f["height"] > 50 and f["drawn"] for f in seen["figures"])
    assert {f["paper"] for f in seen["figures"]} == {"rgb(255, 255, 255)"}  # on a dark page too
    assert seen["width"] == width
    assert all(0 < edge <= width for edge in seen["edges"])  # mean, interval and difference are seen without scrolling
    assert seen["overflow"] <= 0  # nothing to scroll sideways but the tables in their own frames
    paper, ink = (tuple(map(int, re.findall(r"\d+", seen[name]))) for name in ("paper", "ink"))
    assert (sum(paper) < sum(ink)) == dark


def _browse(page: Path, width: int, dark: bool) -> tuple[Any, list[str]]:
    """The probe's measurements, and the browser's console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={max(width, 500)},2000"]
    command = [str(BROWSER), *options, *scheme, f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:]
    return json.loads(found[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def _read(folder: Path, name: str) -> str:
    return (folder / "out" / name).read_text()
