"""The page is whole in itself, and whatever tasks are called cannot get out of their place."""

import ast
import importlib.util
import os
import subprocess
import sys
from html.parser import HTMLParser
from math import nan

import pytest

from lightning_odem.metrics import TaskMetric
from lightning_odem.report import MergeRecord, StreamReport, save
from lightning_odem.report.page import render_page

HOSTILE = """</summary><script src="https://example.org/x.js">alert("'{{ 7 * 7 }}&amp;\x1b[2J</script>"""
PNG = b"\x89PNG made up"
BROWSER = all(importlib.util.find_spec(name) for name in ("PyQt6", "PyQt6.QtWebEngineWidgets"))
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Structure(HTMLParser):
    """Reads a page: every element that is opened has to be closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def report():
    path = {"t": [0.0, 0.5], "loss": [1.0, 0.9], "gamma": [1.0], "alignment_ratio": [0.5]}
    record = MergeRecord(
        HOSTILE, 0.5, "ode_paper", path, loss_before=1.0, loss_after=0.9, loss_incoming=1.5, merge_seconds=2.5,
        calibration={"mnist": 12, HOSTILE: 13},
    )  # fmt: skip
    return StreamReport(
        tasks=["mnist", HOSTILE],
        weights=[1.0, 1.0],
        accuracy=[[0.9], [0.8, 0.7]],
        pretrained=[0.1, 0.75],
        fine_tuned=[0.9, 0.8],
        before_training=[nan, 0.2],
        merges=[MergeRecord("mnist", 1.0, "ode_paper"), record],
    )


def test_every_element_is_closed_and_nothing_is_fetched(report):
    page = Structure(render_page(report, {"changes": PNG}, {1: PNG}))
    assert page.tags.count("details") == 2
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_names_are_text_wherever_they_stand(report):
    text = render_page(report, {}, {1: PNG})
    page = Structure(text)
    assert "\x1b" not in text
    shown = [text for text in page.texts if "7 * 7" in text]
    assert len(shown) >= 7
    assert all(
        """<script src="https://example.org/x.js">alert("'{{ 7 * 7 }}&amp;\\x1b[2J</script>""" in text for text in shown
    )


def test_a_merge_is_told_with_its_reason_its_cost_and_its_warnings(report):
    texts = Structure(render_page(report, {}, {})).texts
    for expected in (
        "t = 0.5 is the task's share of the utility weights so far.",
        "2.50 (gradients: 0.00)",
        "1 before, 0.9 after, 1.5 incoming model",
    ):
        assert expected in texts
    (warning,) = (text for text in texts if text.startswith("The merged model is worse"))
    assert "(70.0 % instead of 75.0 %)" in warning


def test_it_begins_with_a_conclusion(report):
    (told,) = (text for text in Structure(render_page(report, {}, {})).texts if "tasks are merged" in text)
    assert told == ("2 tasks are merged. ACC 75.0 %, BWT -10.0 %. Forgotten most: mnist (80.0 % instead of 90.0 %).")


def test_unlike_metrics_and_unmeasured_scores_have_a_page_too(report):
    report.metrics = {"mnist": TaskMetric("MeanSquaredError", "", False)}
    texts = Structure(render_page(report, {}, {})).texts
    assert any(text.startswith("2 tasks are merged. Their metrics differ, so there is no ACC.") for text in texts)
    report.metrics, report.accuracy = {}, [[nan], [nan, nan]]
    texts = Structure(render_page(report, {}, {})).texts
    assert any("ACC was not measured" in text for text in texts)


SHOW = """
import sys
from PyQt6.QtCore import QUrl
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

app = QApplication(sys.argv)
view = QWebEngineView()
script = "[document.images.length, [...document.images].filter(i => i.complete && i.naturalWidth > 100).length, " \\
    "document.scripts.length, document.querySelectorAll('details').length, document.body.innerText]"
view.loadFinished.connect(lambda ok: view.page().runJavaScript(script, lambda found: (print(repr(found)), app.quit())))
view.load(QUrl.fromLocalFile(sys.argv[1]))
app.exec()
"""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no browser: PyQt6-WebEngine is not installed")
def test_a_browser_shows_all_of_it(report, tmp_path):
    save(report, tmp_path)
    flags = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu"}
    command = [sys.executable, "-c", SHOW, str(tmp_path / "report.html")]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=120, check=True)
    images, complete, scripts, merges, text = ast.literal_eval(done.stdout.splitlines()[-1])
    assert (images, complete, scripts, merges) == (4, 4, 0, 2)
    assert "2. </summary><script src=" in text
