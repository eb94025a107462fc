"""The verifier on sound models, `equivalent` and `sample_feeds`."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import errors, files, graph, models, schemas, verify
from qgraph.models import odd
from qgraph.verify import equivalence, rules

NO_DATA = "QGRAPH_TEST_DATA names no folder with models"
UNREADABLE = {"pipeline_vectorize.onnx"}  # has a map as input, which onnx_ir does not read


def parse(body: str, opset: int = 21, extra: str = "") -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : {opset}{extra}]>\n{body}'
    return ir.from_proto(onnx.parser.parse_model(text))


def data_models() -> list[Path]:
    root = os.environ.get("QGRAPH_TEST_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip(NO_DATA)
    return [p for p in sorted(Path(root).rglob("*.onnx")) if p.name not in UNREADABLE]


def loads(path: Path) -> bool:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001  the runtime's exception types are not public
        return False
    return True


class TestRules:
    def test_codes_are_unique_and_in_order(self) -> None:
        codes = [r.code for r in rules.RULES]
        assert len(set(codes)) == len(codes)
        assert set(codes) == {f"V{i:02}" for i in range(1, 14)}

    def test_every_rule_says_what_it_claims(self) -> None:
        assert all(r.find.__doc__ for r in rules.RULES)

    def test_weights_listed_as_inputs_are_no_fault(self) -> None:
        model = parse("g (float[4] x, float[4] w) => (float[4] y) { y = Add(x, w) }", opset=8)
        value = model.graph.inputs[1]
        value.const_value = ir.tensor(np.ones(4, np.float32), name="w")
        model.graph.register_initializer(value)
        assert verify.verify(model) == []

    def test_default_domain_under_its_long_name(self) -> None:
        model = parse("g (float[4] x) => (float[4] y) { y = Relu(x) }")
        model.graph.opset_imports["ai.onnx"] = model.graph.opset_imports.pop("")
        assert verify.verify(model) == []

    def test_operator_that_only_the_runtime_knows(self) -> None:
        body = (
            "g (float[4] x, float[4] s) => (float[4] y) { y = SimplifiedLayerNormalization(x, s) }"
        )
        assert verify.verify(parse(body)) == []

    def test_references_of_a_function_to_its_attributes(self) -> None:
        text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
            g (float[4] x) => (float[4] y) { y = local.F <alpha = 0.5> (x) }
            <domain: "local", opset_import: ["" : 21]>
            F <alpha> (a) => (b) { b = LeakyRelu <alpha: float = @alpha> (a) }"""
        assert verify.verify(ir.from_proto(onnx.parser.parse_model(text))) == []

    def test_large_tensors_are_not_read(self) -> None:
        def refuse() -> ir.TensorProtocol:
            raise AssertionError("was read")

        model = parse("g (float[4] x, float[4] w) => (float[4] y) { y = Add(x, w) }")
        value = model.graph.inputs.pop()
        value.const_value = ir.LazyTensor(
            refuse, dtype=ir.DataType.FLOAT, shape=ir.Shape([4]), name="w"
        )
        model.graph.register_initializer(value)
        assert verify.verify(model) == []

    @pytest.mark.parametrize("seed", range(20))
    def test_never_raises(self, seed: int) -> None:
        """Whatever is broken, it is reported: nodes lose inputs, outputs, attributes, types and names."""
        rng = np.random.default_rng(seed)
        builders = [*odd.ODD.values(), lambda: models.build("tiny-llama")]
        for build in rng.choice(np.array(builders, object), 12, replace=False):
            model = build()
            for _ in range(4):
                break_something(model, rng)
                assert isinstance(verify.verify(model), list)

    def test_is_fast(self) -> None:
        model = chain(2000)
        verify.verify(model)  # fills the schema cache
        seconds = min(timed(model) for _ in range(5))
        print(f"verify: {seconds * 1e3:.1f} ms for 2000 nodes")
        assert seconds < 0.06 * slowness()


def break_something(model: ir.Model, rng: np.random.Generator) -> None:
    """One random fault."""
    nodes = graph.nodes(model) or [ir.Node("", "Relu", [])]
    node = nodes[rng.integers(len(nodes))]
    other = nodes[rng.integers(len(nodes))]
    fault = rng.integers(9)
    if fault == 0 and node.inputs:
        node.resize_inputs(len(node.inputs) - 1)
    elif fault == 1 and node.inputs:
        node.replace_input_with(int(rng.integers(len(node.inputs))), None)
    elif fault == 2 and node.inputs and other.outputs:
        node.replace_input_with(0, other.outputs[0])
    elif fault == 3:
        node.op_type, node.domain = rng.choice(
            [
                ["DequantizeLinear", ""],
                ["QuantizeLinear", ""],
                ["MatMulNBits", "com.microsoft"],
                ["GatherBlockQuantized", "com.microsoft"],
                ["Loop", ""],
                ["Nothing", "some.where"],
            ]
        ).tolist()
        node.attributes["block_size"] = ir.AttrInt64("block_size", int(rng.integers(-1, 40)))
        node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(rng.integers(0, 99)))
        node.attributes["N"] = node.attributes["K"] = ir.AttrInt64("K", int(rng.integers(0, 99)))
    elif fault == 4 and node.attributes:
        del node.attributes[next(iter(node.attributes))]
    elif fault == 5 and node.outputs:
        node.outputs[0].shape, node.outputs[0].type = ir.Shape([]), None
    elif fault == 6 and node.outputs:
        node.outputs[0].name = (other.outputs[0].name if other.outputs else "") or "x"
    elif fault == 7:
        model.graph.opset_imports[""] = int(rng.integers(-1, 30))
    elif model.graph.initializers:
        held = list(model.graph.initializers.values())
        held[rng.integers(len(held))].const_value = None


def timed(model: ir.Model) -> float:
    start = time.perf_counter()
    assert verify.verify(model) == []
    return time.perf_counter() - start


def slowness() -> float:
    """How much slower this machine is now than a usual one, so that a busy one does not fail the test."""
    start = time.perf_counter()
    sum(range(2_000_000))
    return max(1.0, (time.perf_counter() - start) / 0.03)


def chain(count: int) -> ir.Model:
    """x -> Add, Relu, MatMul, ... with a weight for each third node."""
    x = graph.value("x", ir.DataType.FLOAT, [4, 4])
    nodes, weights, last = [], [], x
    for index in range(count):
        inputs = [last]
        op = ("Add", "Relu", "MatMul")[index % 3]
        if op != "Relu":
            w = graph.value(f"w{index}", ir.DataType.FLOAT, [4, 4])
            w.const_value = ir.tensor(np.eye(4, dtype=np.float32), name=w.name)
            weights.append(w)
            inputs.append(w)
        out = graph.value(f"v{index}", ir.DataType.FLOAT, [4, 4])
        nodes.append(ir.Node("", op, inputs, outputs=[out], name=f"n{index}"))
        last = out
    main = ir.Graph(
        [x], [last], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g"
    )
    return ir.Model(main, ir_version=10)


@pytest.mark.slow
def test_no_error_on_any_model_that_the_runtime_loads() -> None:
    checked, wrong = 0, []
    for path in data_models():
        if loads(path):
            checked += 1
            found = [d for d in verify.verify(ir.load(path)) if d.severity == "error"]
            wrong += [f"{path.name}: {d}" for d in found]
    print(f"verified {checked} models without an error")
    assert checked > 0
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_what_the_runtime_refuses_for_its_graph_is_found() -> None:
    """A model with an operator or domain that nobody knows is an error or, for custom domains, a warning."""
    silent = []
    for path in data_models():
        if not loads(path):
            found = verify.verify(ir.load(path))
            if not found:
                silent.append(path)
    # What is left: kernels that the runtime lacks, and operators that type inference alone refuses.
    print("not found:", [str(p.parent.name + "/" + p.name) for p in silent])
    assert len(silent) <= 10


class TestEquivalent:
    BODY = (
        "g (float[N, 4] x) => (float[N, 4] y, int64[1] k) { y = Relu(x) k = Shape <end = 1> (x) }"
    )
    FEEDS = ({"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)},)

    def test_same_model(self) -> None:
        model = parse(self.BODY)
        found = verify.equivalent(model, ir.to_proto(model), self.FEEDS)
        assert found.ok
        assert (found.max_rel_error, found.unequal_share, found.reason) == (0.0, 0.0, "")

    def test_paths(self, tmp_path: Path) -> None:
        model = parse(self.BODY)
        path = files.save(model, tmp_path / "m.onnx")
        assert verify.equivalent(path, model, self.FEEDS).ok

    def test_large_models_go_through_a_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = chain(30)
        monkeypatch.setattr(equivalence, "IN_MEMORY", 100)
        assert verify.equivalent(model, model, [{"x": np.ones((4, 4), np.float32)}]).ok

    def test_relative_to_the_largest_value(self) -> None:
        other = parse(self.BODY.replace("Relu(x)", "LeakyRelu <alpha = 0.001> (x)"))
        found = verify.equivalent(parse(self.BODY), other, self.FEEDS)
        assert not found.ok
        assert found.worst_output == "y"
        assert found.max_rel_error == pytest.approx(0.001, rel=1e-3)
        assert "relative error 0.001" in found.reason
        assert verify.equivalent(parse(self.BODY), other, self.FEEDS, rtol=0.01).ok

    def test_integers_are_equal_or_not(self) -> None:
        body = "g (float[4] x) => (int64[4] y) {{ y = Cast <to = 7> ({}) }}"
        plain = parse(body.format("x"))
        other = parse("g (float[4] x) => (int64[4] y) { z = Ceil(x) y = Cast <to = 7> (z) }")
        feeds = [{"x": np.float32([1, 2, 3, 4.5])}]
        found = verify.equivalent(plain, other, feeds)
        assert (found.ok, found.unequal_share, found.worst_output) == (False, 0.25, "y")
        assert verify.equivalent(plain, other, feeds, ties=0.25).ok

    def test_other_dtype_or_shape(self) -> None:
        other = parse(self.BODY.replace("k = Shape <end = 1> (x)", "k = Shape(x)"))
        found = verify.equivalent(parse(self.BODY), other, self.FEEDS)
        assert not found.ok
        assert math.isinf(found.max_rel_error)
        assert "int64[1] against int64[2]" in found.reason

    def test_other_outputs(self) -> None:
        other = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
        found = verify.equivalent(parse(self.BODY), other, self.FEEDS)
        assert not found.ok
        assert "the outputs differ" in found.reason

    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ([1.0, np.nan], [1.0, np.nan], 0.0),
            ([1.0, np.nan], [1.0, 2.0], math.inf),
            ([1.0, 2.0], [1.0, np.nan], math.inf),
            ([1.0, np.inf], [1.0, np.inf], 0.0),
            ([1.0, np.inf], [1.0, -np.inf], math.inf),
            ([np.nan], [np.nan], 0.0),
            ([0.0, 0.0], [0.0, 0.0], 0.0),
            ([0.0, 0.0], [0.0, 1e-6], 1e-6),
            ([10.0, 1.0], [10.0, 2.0], 0.1),
            ([], [], 0.0),
        ],
    )
    def test_relative_error(self, a: list[float], b: list[float], expected: float) -> None:
        assert equivalence.relative_error(np.array(a), np.array(b)) == pytest.approx(expected)

    def test_sequences(self) -> None:
        body = "g (float[4] x) => (seq(float[4]) y) {{ z = {}(x) y = SequenceConstruct(x, z) }}"
        feeds = [{"x": np.float32([1, 2, 3, 4])}]
        relu, neg = parse(body.format("Relu")), parse(body.format("Neg"))
        assert verify.equivalent(relu, relu, feeds).ok
        assert verify.equivalent(relu, neg, feeds).max_rel_error == pytest.approx(2)

    def test_a_model_that_does_not_run(self) -> None:
        with pytest.raises(errors.RuntimeFailure, match="QG602"):
            verify.equivalent(parse(self.BODY), parse(self.BODY), [{"x": np.ones(3, np.int64)}])

    def test_no_feeds(self) -> None:
        with pytest.raises(errors.InputError, match="nothing to compare on"):
            verify.equivalent(parse(self.BODY), parse(self.BODY), [])


class TestSampleFeeds:
    def test_same_seed_same_feeds(self) -> None:
        model = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
        first, second = verify.sample_feeds(model), verify.sample_feeds(model)
        assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(first, second, strict=True))
        assert not np.array_equal(first[0]["x"], verify.sample_feeds(model, seed=1)[0]["x"])
        assert [f["x"].shape for f in first] == [(1, 4), (2, 4)]

    def test_one_symbol_is_one_number(self) -> None:
        body = "g (float[batch, seq, 4] x, float[batch, 4, seq] z) => (float[batch, seq, seq] y)"
        for feed in verify.sample_feeds(parse(body + " { y = MatMul(x, z) }")):
            assert feed["x"].shape[1] == feed["z"].shape[2]

    def test_indices_stay_in_the_table(self) -> None:
        model = parse(
            """g (int64[batch, seq] ids) => (float[batch, seq, 2] y)
            <float[3, 2] table = {1, 2, 3, 4, 5, 6}> {
                wide = Unsqueeze(ids, axis)  flat = Squeeze(wide, axis)  y = Gather(table, flat) }"""
        )
        axis = graph.add_initializer(model.graph, "axis", np.array([0]))
        model.graph[0].replace_input_with(1, axis)
        model.graph[1].replace_input_with(1, axis)
        for feed in verify.sample_feeds(model, count=3):
            assert 0 <= feed["ids"].min() <= feed["ids"].max() < 3

    def test_indices_inside_a_function(self) -> None:
        text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
            g (int64[seq] ids) => (float[seq, 2] y)
            <float[3, 2] table = {1, 2, 3, 4, 5, 6}> { y = local.F(table, ids) }
            <domain: "local", opset_import: ["" : 21]> F (t, i) => (o) { o = Gather(t, i) }"""
        model = ir.from_proto(onnx.parser.parse_model(text))
        for feed in verify.sample_feeds(model, count=3):
            assert feed["ids"].max() < 3

    def test_weights_fix_dimensions(self) -> None:
        model = parse(
            """g (float[N, D] x) => (float[N, M] y)
            <float[5, 2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}> { r = Relu(x) y = MatMul(r, w) }"""
        )
        assert all(f["x"].shape[1] == 5 for f in verify.sample_feeds(model))

    def test_decoder_inputs(self) -> None:
        model = parse(
            """g (int64[batch, seq] input_ids, int64[batch, total_seq] attention_mask,
                  int64[batch, seq] position_ids, float[batch, 2, past_seq, 4] past_key)
            => (float[batch, 2, all, 4] y) {
                y = Concat <axis = 2> (past_key, past_key) }"""
        )
        first, second = verify.sample_feeds(model)
        assert first["past_key"].shape == (1, 2, 0, 4)
        assert second["past_key"].shape == (2, 2, 3, 4)
        assert (second["attention_mask"] == 1).all()
        assert second["attention_mask"].shape[1] == second["input_ids"].shape[1] + 3
        assert second["position_ids"][0].tolist() == list(
            range(3, 3 + second["input_ids"].shape[1])
        )

    def test_shapes_as_inputs(self) -> None:
        model = parse("g (float[4] x, int64[2] s) => (float[A, B] y) { y = Reshape(x, s) }")
        assert verify.sample_feeds(model)[0]["s"].tolist() == [-1, 1]

    def test_booleans_strings_and_sequences(self) -> None:
        model = parse(
            """g (bool c, string[2] s, seq(float[2]) q) => (bool d, string[2] t, float[2] f) {
                d = Not(c) t = Identity(s) zero = Constant <value_int = 0> ()
                f = SequenceAt(q, zero) }"""
        )
        feed = verify.sample_feeds(model)[0]
        assert feed["c"].all()
        assert feed["s"].dtype == object
        assert len(feed["q"]) == 2

    def test_nothing_runs(self) -> None:
        model = parse("g (float[3, 2] a, float[4, 5] b) => (float[3, 5] y) { y = MatMul(a, b) }")
        model.graph.inputs[0].shape = ir.Shape([3, 2])
        with pytest.raises(errors.QGraphError, match=r"--data|QG601"):
            verify.sample_feeds(model)

    def test_model_is_not_changed(self) -> None:
        model = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
        before = ir.to_proto(model).SerializeToString(deterministic=True)
        verify.sample_feeds(model)
        assert ir.to_proto(model).SerializeToString(deterministic=True) == before

    @pytest.mark.slow
    def test_share_of_real_models(self) -> None:
        count, failed = 0, []
        for path in data_models():
            if not loads(path):
                continue
            count += 1
            try:
                verify.sample_feeds(path)
            except errors.InputError as e:
                failed.append(f"{path.parent.name}/{path.name}: {e.diagnostics[0].message[:200]}")
        print(f"runnable feeds for {count - len(failed)} of {count} models", *failed, sep="\n")
        assert count > 0
        assert len(failed) <= 0.05 * count


class TestSchemas:
    def test_standard_and_contrib(self) -> None:
        relu = schemas.find("", "Relu", 21)
        assert relu is not None
        assert (relu.since, relu.input_counts) == (14, (1, 1))
        nbits = schemas.find("com.microsoft", "MatMulNBits", 1)
        assert nbits is not None
        assert nbits.attributes["K"].required
        assert schemas.find("", "Nothing", 21) is None
        assert schemas.find("some.where", "Relu", 1) is None

    def test_a_kernel_without_end_fits_its_first_version_only(self) -> None:
        assert schemas.has_kernel("", "RandomNormal", 1)
        assert not schemas.has_kernel("", "RandomNormal", 22)
        assert schemas.has_kernel("", "Mish", 18)  # by its function body

    def test_loadable(self) -> None:
        assert schemas.is_loadable(10, 21)
        assert not schemas.is_loadable(99, 21)
        assert not schemas.is_loadable(10, 99)
