"""Reports without a run, and a browser that opens them."""

import json
import shutil
from dataclasses import dataclass, field

import pytest

from qgraph.errors import Diagnostic
from qgraph.report import Activation, Entry, Operator, Reach, Report, Shift

_HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)


@pytest.fixture
def hostile():
    """A name that wants to be a script."""
    return _HOSTILE


@pytest.fixture
def small_report():
    return _small_report


def _small_report(names=("layers.0.weight", "layers.1.weight", "head.weight")):
    """A report with something in each of its parts."""
    ledger = [
        Entry(
            name, name, {"MatMul": 1}, (64, 32 * (i + 1)), 8192 * (i + 1), 1280 * (i + 1), "uint4.g32.asym",
            reason="rule 'linear'", by="rule linear", forms=["matmul-nbits"], runs=["MatMulNBits"],
            sqnr_db=20.0 + i, mse=1e-6,
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    ledger.append(
        Entry("norm", "norm", {"MatMul": 2}, (8,), 32, 32, code="QG312", reason="it is small")
    )
    report = Report("model.onnx", "model.q.onnx", "int4", "ort", 60_000, 12_000, ledger)
    report.activations = [
        Activation(names[0] + ".x", "uint8.tensor.asym", -1.0, 2.0, 0.01, 85, "mse")
    ]
    report.operators = [
        Operator("y0", "MatMul", names[0], names[0], 3000, "MatMulIntegerToFloat", integer=True),
        Operator("y1", "MatMul", names[-1], names[-1], 1000, "MatMul float32", reason="floats"),
    ]
    report.integer_macs = 0.75
    reaches = Reach(9.0, 1.0, [0.5, 1.0, 9.0]), Reach(2.0, 1.0, [0.9, 1.0, 2.0])
    report.shifts = [Shift(names[0], "smooth", 32, *reaches)]
    report.diagnostics = [Diagnostic("warning", "QG710", names[0], "is slow", "use another recipe")]
    report.notes, report.checks = ["a note"], ["a check"]
    report.seconds, report.versions = {"solve-weights": 1.5}, {"qgraph": "0.1.0"}
    report.resolved_recipe = {"name": "int4", "rules": []}
    report.command = ["qgraph", "optimize", "model.onnx", "--data", "d.npz", "-o", "model.q.onnx"]
    estimate = {"value": 0.01, "low": 0.005, "high": 0.02}
    report.metrics = {
        "samples": 4,
        "outputs": [
            {
                "name": "logits", "equal": None,
                "error": {"sqnr_db": 21.5, "max_abs": 0.5, "cosine": 0.999, "worst_cosine": 0.9, "broken": 0},
                "divergence": {"kl_mean": estimate, "kl_p99": 0.1, "kl_max": "inf", "predictions": 8,
                               "agreement": {"value": 0.97, "low": 0.9, "high": 1.0}},
            }
        ],
    }  # fmt: skip
    report.latency = {"ratio": 0.5, "lower_quartile": 0.4, "upper_quartile": 0.6, "float_seconds": 0.001,
                      "clock": "processor", "why": ""}  # fmt: skip
    return report


@dataclass
class Browser:
    """A real browser; it remembers what a page complained of and asked for."""

    driver: object
    complaints: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    def open(self, text, folder):
        path = folder / "page.html"
        path.write_text(text, encoding="utf-8")
        self._listen()  # what earlier pages left
        self.driver.get(path.as_uri())
        self._listen()
        return self.driver

    def _listen(self):
        self.complaints = [entry["message"] for entry in self.driver.get_log("browser")]
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        self.requests = [
            m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"
        ]  # fmt: skip

    def script(self, text, *args):
        return self.driver.execute_script(text, *args)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)


@pytest.fixture(scope="session")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    service = shutil.which("chromedriver")
    if chromium is None or service is None:
        pytest.skip("there is no chromium with chromedriver (apt-get install chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for each in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{each}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    yield Browser(driver)
    driver.quit()
