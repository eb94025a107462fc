"""Pages as text: what stands in them, and that nothing in them can be more than text."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from qgraph.page import charts, numbers
from qgraph.page.charts import Mark
from qgraph.page.elements import el, html
from qgraph.report import Entry, Report


class Texts(HTMLParser):
    """What a page shows, what it may load, and how many scripts it has."""

    def __init__(self, text):
        super().__init__()
        self.shown, self.addresses, self.inside = [], [], []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside.append(tag)
        self.scripts += tag == "script"
        self.addresses += [v for k, v in attrs if k in ("href", "src", "srcset", "action", "data")]
        assert not any(k.startswith("on") for k, _ in attrs)

    def handle_endtag(self, tag):
        self.inside.pop(len(self.inside) - 1 - self.inside[::-1].index(tag))

    def handle_data(self, data):
        if not {"script", "style"} & set(self.inside):
            self.shown.append(data)


def test_nothing_is_loaded_from_anywhere(small_report):
    page = Texts(small_report().to_html())
    assert page.scripts == 1
    assert all(address == "data:," or address.startswith("#") for address in page.addresses)
    assert "http" not in "".join(page.addresses)


def test_hostile_names_stay_text(small_report, hostile):
    report = small_report((hostile, "x", "y"))
    report.notes.append(hostile)
    page = Texts(report.to_html())
    assert page.scripts == 1
    assert "".join(page.shown).count(hostile) >= 3


def test_what_it_says_is_in_its_json_twin(small_report):
    report = small_report()
    page = " ".join(Texts(report.to_html()).shown)
    twin = json.loads(report.to_json())
    for entry in twin["ledger"]:
        assert entry["label"] in page
        assert entry["reason"] in page
    summary = twin["summary"]
    assert summary["headline"] in page
    assert f"{summary['bits_per_weight']:.2f}" in page
    assert summary["bits_per_weight"] == pytest.approx(8 * 7712 / (64 * (32 + 64 + 96) + 8))
    assert [k["runs"] for k in summary["kernels"]] == ["MatMulIntegerToFloat", "MatMul float32"]
    assert summary["kernels"][0]["macs"] == 3000
    assert "75.0 %" in page
    assert twin["shifts"][0]["after"]["largest"] == 2.0
    assert "9.0x → 2.0x" in page
    for found in twin["diagnostics"]:
        assert found["message"] in page
        assert found["hint"] in page
    assert "qgraph optimize model.onnx -o model.q.onnx --recipe recipe.json --data d.npz" in page


def test_a_report_of_nothing_is_a_page():
    page = " ".join(Texts(Report("m.onnx", "", "int4", "ort").to_html()).shown)
    assert "no quantizable weights" in page
    assert "No model was written" in page


def test_numbers_that_are_not_finite_are_drawn():
    entries = [
        Entry("a", "a", {"MatMul": 1}, (4, 4), 64, 16, "ternary", sqnr_db=math.inf),
        Entry("b", "b", {"MatMul": 1}, (4, 4), 64, 16, "ternary", sqnr_db=-3.0),
        Entry("c", "c", {"MatMul": 1}, (4, 0), 0, 0, "ternary", sqnr_db=math.nan),
    ]
    text = Report("m", "q", "r", "t", 100, 50, entries).to_html()
    assert "a: exact as ternary" in text
    assert "b: -3.0 dB" in text
    assert 'nan"' not in text


@pytest.mark.parametrize("count", [1, 2, 2000])
def test_bars_stay_inside_the_plot(count):
    marks = [Mark(str(i), float(i % 40), before=40.0) for i in range(count)]
    for drawing in (charts.errors(marks, ""), charts.sizes(marks, "")):
        for box in drawing.iter("rect"):
            left, wide = float(box.get("x")), float(box.get("width"))
            assert left >= charts.LEFT - 0.01
            assert left + wide <= charts.WIDTH - charts.RIGHT + 0.01
            assert float(box.get("height")) >= 0


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 47.3), (3, 3), (2.1, 4.7), (0, 1e9)])
def test_ticks_cover_what_is_drawn(low, high):
    found = numbers.ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 9


@pytest.mark.parametrize(
    ("low", "high"), [(1, 1), (1, 4.6), (0.9, 10), (1e-6, 0.3), (3, 7), (1, 100)]
)
def test_levels_cover_what_is_drawn(low, high):
    found = numbers.decades(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert len(found) >= 2


def test_attributes_cannot_be_left():
    page = Texts(html(el("p", el("b", "inside"), title='"><script>')))
    assert page.scripts == 0
    assert "".join(page.shown).strip() == "inside"


def mixed_figures():
    points = [(3.2, 0.2, False), (4.5, 0.01, True), (9.0, 0.0, False)]
    return {
        "budget": "--avg-bits 4.5", "floors": "", "measure": "kl", "samples": 8, "measurements": 84,
        "bytes": 700, "avg_bits": 4.5, "predicted": 0.009, "measured": 0.01, "swaps": {"tried": 3, "taken": 1},
        "front": [
            {"bytes": int(100 * bits), "avg_bits": bits, "predicted": loss, "measured": loss, "chosen": chosen}
            for bits, loss, chosen in points
        ],
        "groups": [
            {"weights": ["q", "k"], "labels": ["layers.0.q", "layers.0.k"], "elements": 64, "format": "int4.g32",
             "options": [{"format": "int4.g32", "loss": 0.0014}, {"format": "int8.ch", "loss": 8e-06}]}
        ],
    }  # fmt: skip


def test_mixed_precision_shows_its_front_and_what_was_weighed(small_report):
    report = small_report()
    assert "Mixed precision" not in report.to_html()
    report.mixed = mixed_figures()
    text = report.to_html()
    page = " ".join(Texts(text).shown)
    for told in (
        "Asked for: --avg-bits 4.5",
        "layers.0.k",
        "int8.ch 8e-06",
        "Of 3 swaps that were tried 1 helped",
    ):
        assert told in page
    assert text.count('class="chosen"') == 1
    assert "4.50 bits per weight, 450 B: measured 0.01, predicted 0.01, chosen" in text


def test_recipe_auto_shows_what_it_measured(small_report):
    report = small_report()
    returned = {
        "label": "stem",
        "from": "int8.ch.sym",
        "to": "float",
        "alone": {"logits": {"sqnr_db": 12.0}},
    }
    report.choice = {
        "clock": "processor",
        "uniform": {"static": {"ratio": 0.56, "sqnr_db": 40.9}, "table": {"ratio": 1.04, "sqnr_db": "inf"}},
        "classes": [
            {"name": "Conv 3x3", "weights": ["a", "b"], "form": "static", "times": {"static": 1.0, "float": 2.217}},
            {"name": "Gemm 10x96", "weights": ["c"], "form": "static", "times": {}},
        ],
        "given_back": [{"for": "repair", "why": "SQNR is 9 dB", "returned": [returned]}] * 2,
    }  # fmt: skip
    report.control = {"why": "SQNR is 20 dB", "returned": [returned]}
    text = report.to_html()
    page = " ".join(Texts(text).shown)
    for told in (
        "Conv 3x3",
        "static 1.00x, float 2.22x",
        "not timed",
        "0.56x",
        "exact",
        "after the choice: repair",
        "12.0 dB",
    ):
        assert told in page
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("asked", [True, False])
def test_what_runs_is_told_of_weights_where_nothing_was_counted(small_report, asked):
    report = small_report()
    report.operators = []
    for entry in report.ledger:
        entry.runs = entry.runs if asked else []
    page = " ".join(Texts(report.to_html()).shown)
    assert ("Read from the graph that the runtime made" in page) is asked
    assert ("was not asked; these are the forms" in page) is not asked
    assert ("matmul-nbits" in page) is not asked
