"""`compare` against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import data, errors, evaluate


def model(body: str, outputs: str = "float[n, 2] y", inputs: str = "float[n, 2] x") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )


IDENTITY = model("y = Identity(x)")
TENTH_MORE = model("c = Constant<value_float=1.1>() y = Mul(x, c)")
FEEDS = [{"x": np.array([[1, 2]], np.float32)}, {"x": np.array([[2, 4], [0, 0]], np.float32)}]


def only(comparison: evaluate.Comparison) -> evaluate.OutputError:
    (output,) = comparison.outputs
    return output


def test_errors_by_hand() -> None:
    error = only(evaluate.compare(IDENTITY, TENTH_MORE, FEEDS, rounds=0)).error
    assert error is not None
    assert error.sqnr_db == pytest.approx(20, abs=1e-5)  # noise is (1/10 x)²
    assert error.max_abs == pytest.approx(0.4, rel=1e-5)
    assert error.cosine == pytest.approx(1)
    assert error.worst_cosine == pytest.approx(1)
    assert error.broken == 0


def test_cosine_by_hand() -> None:
    first_only = model("c = Constant<value_floats=[1.0, 0.0]>() y = Mul(x, c)")
    feeds = [{"x": np.array([[3, 4]], np.float32)}, {"x": np.array([[4, 3]], np.float32)}]
    error = only(evaluate.compare(IDENTITY, first_only, feeds, rounds=0)).error
    assert error is not None
    assert error.cosine == pytest.approx(25 / math.sqrt(50 * 25))
    assert error.worst_cosine == pytest.approx(3 / 5)
    assert error.sqnr_db == pytest.approx(10 * math.log10(50 / 25))
    assert error.max_abs == 4


def test_equal_models() -> None:
    found = evaluate.compare(IDENTITY, IDENTITY, FEEDS, rounds=0)
    assert only(found).error == evaluate.TensorError(math.inf, 0, pytest.approx(1), 1, 0)
    assert found.size_ratio == 1
    assert found.float_bytes == found.quant_bytes == evaluate.model_bytes(IDENTITY)
    assert found.samples == 2
    assert found.latency is None
    assert found.data_digest == data.load(FEEDS, data.inputs_of(IDENTITY)).digest()
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["outputs"][0]["error"]["sqnr_db"] == "inf"


def test_broken_outputs_are_counted() -> None:
    inverse = model("one = Constant<value_float=1.0>() z = Div(one, x) y = Div(one, z)")
    feeds = [{"x": np.array([[2, 0]], np.float32)}]
    good = only(evaluate.compare(IDENTITY, inverse, feeds, rounds=0)).error
    assert good is not None
    assert good.sqnr_db == math.inf
    log = model("y = Log(x)")
    bad = only(evaluate.compare(IDENTITY, log, feeds, rounds=0)).error
    assert bad is not None
    assert (bad.sqnr_db, bad.max_abs, bad.broken) == (-math.inf, math.inf, 1)


def test_divergence_goes_by_the_name_of_the_output() -> None:
    names = ("logits", "class_probs", "Scores_2", "hidden")
    body = " ".join(f"{name} = Identity(x)" for name in names) + " score_ids = ArgMax<axis=1>(x)"
    outputs = ", ".join(f"float[n, 2] {name}" for name in names) + ", int64[n, 1] score_ids"
    both = model(body, outputs)
    found = evaluate.compare(both, both, FEEDS, rounds=0)
    told = {o.name for o in found.outputs if o.divergence is not None}
    assert told == {"logits", "class_probs", "Scores_2"}
    ids = found.outputs[-1]
    assert (ids.error, ids.equal, ids.divergence) == (None, 1, None)
    (hidden,) = [
        o for o in evaluate.compare(both, both, FEEDS, logits="hidden", rounds=0).outputs
        if o.divergence is not None
    ]  # fmt: skip
    assert hidden.name == "hidden"


def test_one_class_is_no_distribution() -> None:
    single = model("logits = ReduceSum(x)", "float[k, l] logits")
    assert only(evaluate.compare(single, single, FEEDS, rounds=0)).divergence is None


def test_divergence_by_hand() -> None:
    half = model("c = Constant<value_floats=[0.0, 0.0]>() logits = Mul(x, c)", "float[n, 2] logits")
    tilted = model(
        f"c = Constant<value_floats=[{math.log(3)}, 0.0]>() z = Sub(x, x) logits = Add(z, c)",
        "float[n, 2] logits",
    )
    divergence = only(evaluate.compare(half, tilted, FEEDS, rounds=0)).divergence
    assert divergence is not None
    assert divergence.kl_mean.value == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert divergence.kl_mean.low == pytest.approx(divergence.kl_mean.value)
    assert divergence.agreement == evaluate.Estimate(1, 1, 1)  # a tie is won by the first class
    assert divergence.predictions == 3


def test_equal_share_of_integers() -> None:
    ids = model("y = ArgMax<axis=1, keepdims=0>(x)", "int64[n] y")
    least = model("y = ArgMin<axis=1, keepdims=0>(x)", "int64[n] y")
    assert only(evaluate.compare(ids, least, FEEDS, rounds=0)).equal == 1 / 3


def test_models_of_every_kind(tmp_path: Path) -> None:
    ir.save(IDENTITY, tmp_path / "m.onnx")
    for form in (tmp_path / "m.onnx", str(tmp_path / "m.onnx"), ir.to_proto(IDENTITY)):
        found = evaluate.compare(form, form, FEEDS, rounds=0)
        assert only(found).error is not None
        assert found.float_bytes == (tmp_path / "m.onnx").stat().st_size


def test_data_of_every_kind(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((5, 2), np.float32))
    assert evaluate.compare(IDENTITY, IDENTITY, tmp_path / "x.npy", count=3, rounds=0).samples == 3
    dataset = data.load(tmp_path / "x.npy", data.inputs_of(IDENTITY))
    assert evaluate.compare(IDENTITY, IDENTITY, dataset, rounds=0).samples == 5


def test_latency_is_measured() -> None:
    latency = evaluate.compare(IDENTITY, IDENTITY, FEEDS, rounds=3).latency
    assert latency is not None
    assert latency.rounds == 3


def test_outputs_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from qgraph.evaluate import sessions

    alive: list[weakref.ref[Any]] = []
    peak = 0

    class Session:
        def __init__(self, given: Any, **_: Any) -> None:
            self.real = real(given)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def run(self, *given: Any) -> Any:
            nonlocal peak
            results = self.real.run(*given)
            alive.extend(weakref.ref(r) for r in results)
            peak = max(peak, sum(ref() is not None for ref in alive))
            return results

    real = sessions.open_session
    monkeypatch.setattr(sessions, "open_session", Session)
    many = ({"x": np.ones((1, 2), np.float32)} for _ in range(20))
    evaluate.compare(IDENTITY, IDENTITY, many, rounds=0)
    assert len(alive) == 40
    assert peak <= 4


def test_one_sample_from_a_function() -> None:
    def feeds() -> Iterator[dict[str, Any]]:
        yield {"x": [[1.0, 2.0]]}

    found = evaluate.compare(IDENTITY, TENTH_MORE, feeds, rounds=1)
    assert found.samples == 1
    assert dataclasses.asdict(found)["outputs"][0]["name"] == "y"


def refusal(first: ir.Model, second: ir.Model, **more: Any) -> str:
    with pytest.raises(errors.InputError) as caught:
        evaluate.compare(first, second, FEEDS, rounds=0, **more)
    return str(caught.value)


def test_qg120_names_and_types() -> None:
    other = model("z = ArgMax(k)", "int64[a, b] z", "float[n, 2] k")
    message = refusal(IDENTITY, other)
    assert "QG120 input 'x': tensor(float) in the float model, nothing in the quantized" in message
    assert "QG120 output 'z': nothing in the float model, tensor(int64) in the quantized" in message
    assert message.count("QG120") == 4


def test_qg120_shape() -> None:
    wide = model("y = Concat<axis=1>(x, x)", "float[n, m] y")
    message = refusal(IDENTITY, wide)
    assert "QG120 value 'y': shape [1, 2] in the float model, [1, 4] in the quantized" in message


def test_qg121_output() -> None:
    assert "QG121: there is no float output 'z'\n  help: known: y" in refusal(
        IDENTITY, IDENTITY, logits=["z"]
    )


def test_data_errors_come_first() -> None:
    with pytest.raises(errors.InputError, match="QG113"):
        evaluate.compare(IDENTITY, TENTH_MORE, [{"y": 1}])


def test_rows_of_an_archive_can_be_fed(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.arange(10, dtype=np.float32).reshape(5, 2))
    error = only(evaluate.compare(IDENTITY, TENTH_MORE, tmp_path / "x.npz", rounds=0)).error
    assert error is not None
    assert error.max_abs == pytest.approx(0.9, rel=1e-5)
