"""Bytes and time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import evaluate
from qgraph.evaluate import cost


def model(size: int, times: int = 1) -> ir.Model:
    steps = "".join(f" x{i + 1} = MatMul(x{i}, w)" for i in range(times))
    result = ir.from_onnx_text(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[{size}, {size}] x0, float[{size}, {size}] w) => (float[{size}, {size}] x{times})
        {{ {steps} }}
        """
    )
    value = result.graph.inputs.pop()
    value.const_value = ir.tensor(np.eye(size, dtype=np.float32), name="w")
    result.graph.register_initializer(value)
    return result


def test_bytes_of_a_file_count_its_external_data(tmp_path: Path) -> None:
    ir.save(model(64), tmp_path / "one.onnx")
    ir.save(model(64), tmp_path / "two.onnx", external_data="two.data")
    one = evaluate.model_bytes(tmp_path / "one.onnx")
    assert one == (tmp_path / "one.onnx").stat().st_size > 64 * 64 * 4
    parts = [(tmp_path / name).stat().st_size for name in ("two.onnx", "two.data")]
    assert evaluate.model_bytes(str(tmp_path / "two.onnx")) == sum(parts)
    in_memory = evaluate.model_bytes(ir.load(tmp_path / "two.onnx"))
    assert in_memory == parts[0] + 64 * 64 * 4


def test_bytes_of_models_in_memory(tmp_path: Path) -> None:
    ir.save(model(8), tmp_path / "m.onnx")
    size = (tmp_path / "m.onnx").stat().st_size
    assert evaluate.model_bytes(model(8)) == evaluate.model_bytes(ir.to_proto(model(8))) == size


def test_twenty_times_the_work_is_slower() -> None:
    feeds = {"x0": np.ones((128, 128), np.float32)}
    found = evaluate.latency_ratio(model(128), model(128, 20), feeds, rounds=7)
    assert found.ratio > 3
    assert found.lower_quartile <= found.ratio <= found.upper_quartile
    assert found.seconds_b > found.seconds_a > 0
    assert found.to_json()["rounds"] == 7


class Clock:
    """Sessions whose runs take what we say, on a clock of our own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order = ""
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def session(self, name: str, seconds: list[float]) -> Any:
        clock, left = self, iter(seconds)

        class Session:
            def run(self, *_: Any) -> None:
                clock.now += next(left)
                clock.order += name

        return Session()


def test_rounds_are_interleaved_and_medians_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    warm = [9.0] * 4
    a = clock.session("a", [*warm, 1, 1, 2, 1, 1])
    b = clock.session("b", [*warm, 2, 3, 8, 1, 50])
    found = cost.interleave(a, b, {}, 5)
    assert clock.order[8:] == "ababababab"
    # Ratios are 2, 3, 4, 1, 50.
    assert (found.lower_quartile, found.ratio, found.upper_quartile) == (2, 3, 4)
    assert (found.seconds_a, found.seconds_b) == (1, 3)


def test_short_runs_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    a = clock.session("a", [0.0005] * 100)
    b = clock.session("b", [0.001] * 100)
    found = cost.interleave(a, b, {}, 2)
    assert clock.order[8:] == "aaaabb" * 2
    assert found.ratio == pytest.approx(2)


def test_rounds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="0 is not a positive number"):
        cost.interleave(None, None, {}, 0)


def test_bits_count_scales_and_padding_but_not_what_stays() -> None:
    import qgraph

    assert evaluate.bits_per_weight(model(64), model(64)) == 32
    options = {"recipe": "int8-weights", "overrides": ["min_elements=0"], "inspect": False}
    result = qgraph.optimize(model(64), **options)
    # Two scales of 32 bits for each row of 64 codes of 8 bits.
    found = evaluate.bits_per_weight(model(64), result.model)
    assert found is not None
    assert found == 8 + 2 * 32 / 64
    told = result.report.bits_per_weight()
    assert told is not None
    assert found == pytest.approx(told, rel=0.01)


def test_no_weights_no_bits() -> None:
    bare = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Neg(x) }'
    )
    assert evaluate.bits_per_weight(bare, bare) is None
