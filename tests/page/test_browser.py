"""Pages in a real browser: they open without a word and without a request, and their tables and plots work."""

import time

import pytest

PLOTS = 4  # bytes in whole, errors, bytes of each, activations


@pytest.fixture
def opened(browser, small_report, tmp_path):
    browser.open(small_report().to_html(), tmp_path)
    return browser


def cells(browser, table, column):
    script = (
        "return [...document.getElementById(arguments[0]).tBodies[0].rows]"
        ".filter(r => !r.hidden).map(r => r.cells[arguments[1]].innerText)"
    )
    return browser.script(script, table, column)


def test_it_opens_without_a_word_and_without_a_request(opened):
    assert opened.complaints == []
    assert len(opened.requests) == 1  # the page itself
    assert opened.requests[0].startswith("file://")
    assert "model.onnx" in opened.driver.title


def test_complaints_and_requests_are_seen(browser, tmp_path):
    """What the test above relies on."""
    text = "<script>console.error('bad')</script><img src='other.png'>"
    browser.open(text, tmp_path)
    assert any("bad" in each for each in browser.complaints)
    assert any(url.endswith("other.png") for url in browser.requests)


def test_plots_are_drawn(opened):
    plots = opened.all("svg.chart")
    assert len(plots) == PLOTS
    for plot in plots:
        assert plot.size["width"] > 400
        assert plot.size["height"] > 60
        assert len(plot.get_attribute("aria-label")) > 20
    bars = "return [...document.querySelectorAll('svg.jump')].map(s => s.querySelectorAll('.mark').length)"
    assert opened.script(bars) == [3, 4]  # the one that stays float has no error
    heights = "return [...document.querySelectorAll('svg.jump')[0].querySelectorAll('rect:not(.hit)')].map(r => r.getBBox().height)"  # noqa: E501
    low, middle, high = opened.script(heights)
    assert low < middle < high
    assert low / high == pytest.approx(20 / 22, rel=0.01)


def test_a_heading_sorts_both_ways_and_back(opened):
    assert cells(opened, "ledger", 5) == ["20.0 dB", "21.0 dB", "22.0 dB", ""]
    heading = opened.all("#ledger thead th")[5]
    button = heading.find_element("css selector", "button")
    seen = []
    for _ in range(3):
        button.send_keys("\ue007")  # Enter
        seen.append((heading.get_attribute("aria-sort"), cells(opened, "ledger", 5)))
    assert seen == [
        ("ascending", ["20.0 dB", "21.0 dB", "22.0 dB", ""]),
        ("descending", ["22.0 dB", "21.0 dB", "20.0 dB", ""]),
        ("none", ["20.0 dB", "21.0 dB", "22.0 dB", ""]),
    ]


def test_sizes_sort_as_numbers(opened):
    opened.all("#ledger thead button")[3].click()
    assert cells(opened, "ledger", 3) == ["32 B", "8.2 kB", "16.4 kB", "24.6 kB"]


def test_the_ledger_is_searched(opened):
    search = opened.all("form.tools input")[0]
    search.send_keys("matmulnbits layers.1")
    assert [c.split("\n")[0] for c in cells(opened, "ledger", 0)] == ["layers.1.weight"]
    assert opened.all("form.tools output")[0].text == "1 of 4 shown"
    search.clear()
    search.send_keys("QG312")
    assert [c.split("\n")[0] for c in cells(opened, "ledger", 0)] == ["norm"]


def test_the_ledger_is_filtered_by_how_weights_are_stored(opened):
    opened.script("arguments[0].focus()", opened.all("form.tools select")[0])
    opened.driver.switch_to.active_element.send_keys("float")
    assert [c.split("\n")[0] for c in cells(opened, "ledger", 0)] == ["norm"]


def test_plots_tell_of_their_marks_by_keyboard_and_find_them_in_the_ledger(opened):
    plot = opened.all("svg.jump")[0]
    opened.script("arguments[0].focus()", plot)
    told = opened.all("figure output")[0]
    body = opened.driver.switch_to.active_element
    body.send_keys("\ue014\ue014")  # right, right
    assert told.text == "layers.1.weight: 21.0 dB as uint4.g32.asym"
    body.send_keys("\ue007")
    assert opened.script("return document.querySelector('tr.on').id") == "ledger-1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(opened, scheme):
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    try:
        for selector in (
            "h1",
            ".lead",
            ".tile .note",
            "td .soft",
            "svg text",
            ".badge",
            "thead button",
        ):
            assert contrast(opened, selector) >= 4.5, selector
    finally:
        opened.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(browser, selector):
    """Of the text's colour to what lies behind it, as WCAG 2 defines it; 4.5 is what it asks for."""
    script = """
        const element = document.querySelector(arguments[0]), style = getComputedStyle(element);
        let behind = element;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        const ink = element instanceof SVGElement ? style.fill : style.color;
        return [ink, getComputedStyle(behind).backgroundColor].map(c => c.match(/[\\d.]+/g).slice(0, 3).map(Number));
    """

    def luminance(colour):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (v / 255 for v in colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(luminance(c) for c in browser.script(script, selector))
    return (light + 0.05) / (dark + 0.05)


def test_a_narrow_window_does_not_scroll_sideways(opened):
    opened.driver.set_window_size(500, 900)
    try:
        wide = opened.script("return [document.documentElement.scrollWidth, innerWidth]")
    finally:
        opened.driver.set_window_size(1280, 900)
    assert wide[0] <= wide[1]


def test_on_paper_everything_is_open(opened):
    closed = "return [...document.querySelectorAll('details:not([open])')].length"
    assert opened.script(closed) > 0
    opened.driver.execute_cdp_cmd("Page.printToPDF", {})
    assert opened.script(closed) == 0


def test_hostile_names_are_text(browser, small_report, hostile, tmp_path):
    report = small_report((hostile, "a\x00b\u202ec", "<!-- & ]]>"))
    report.source = report.recipe = hostile
    report.resolved_recipe = {"name": hostile}
    report.command = ["qgraph", "optimize", hostile]
    browser.open(report.to_html(), tmp_path)
    assert browser.complaints == []
    assert len(browser.requests) == 1
    assert browser.driver.title == f"{hostile.rpartition('/')[2]} · qgraph report"
    assert browser.all("img") == []
    assert len(browser.all("script")) == 1
    told = [c.split("\n")[0] for c in cells(browser, "ledger", 0)]
    assert told[:3] == [hostile, "a␀b\ufffdc", "<!-- & ]]>"]
    assert hostile in browser.script(
        "return document.getElementById('recipe').textContent"
    ).replace('\\"', '"')


def test_two_thousand_layers_open_quickly(browser, small_report, tmp_path):
    report = small_report([f"layers.{i}.weight" for i in range(2000)])
    text = report.to_html()
    start = time.monotonic()
    browser.open(text, tmp_path)
    browser.all("#ledger thead button")[5].click()
    assert time.monotonic() - start < 10  # about 1 s on an idle machine
    assert cells(browser, "ledger", 5)[-1] == ""
    assert len(text) < 4_000_000


def test_the_report_of_a_real_run(browser, tmp_path):
    import qgraph

    result = qgraph.optimize("zoo:tiny-cnn", "int8-weights", verify="off")
    browser.open(result.report.to_html(), tmp_path)
    assert browser.complaints == []
    assert len(browser.requests) == 1
    labels = [c.split("\n")[0] for c in cells(browser, "ledger", 0)]
    assert labels == [entry.label for entry in result.ledger]
    kernels = cells(browser, "kernels-table", 0)
    assert sorted(kernels) == sorted({run for entry in result.ledger for run in entry.runs})
    assert kernels


def test_the_page_of_an_evaluation(browser, hostile, tmp_path):
    from qgraph.evaluate import TensorLosses, telling
    from qgraph.evaluate.isolated import TensorLoss
    from qgraph.evaluate.tensors import TensorError

    errors = [TensorError(db, 0.1, 0.99, 0.9, 0) for db in (20.0, 30.0)]
    losses = (
        TensorLoss(hostile, f"MatMul {hostile}", *errors),
        TensorLoss("b", "Conv 'c'", *errors[::-1]),
    )
    found = telling.of_tensors(TensorLosses(losses, ("moved",)), hostile, "float.onnx", "d.npz")
    browser.open(found.to_html(), tmp_path)
    assert browser.complaints == []
    assert len(browser.requests) == 1
    assert cells(browser, "table-0", 2) == ["20.0 dB", "30.0 dB"]  # the worst by itself first
    assert cells(browser, "table-0", 0) == [hostile, "b"]
    assert len(browser.all("svg.chart")) == 2
    assert browser.all("img") == []
