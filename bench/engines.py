"""The engines of bench/kernels.py: each a session of several products, with weights of their own.

A product with one row must read cold memory, so nodes rotate through more than 300 MB of weights where rows are few.
Every node has an input of its own: engines fuse products that share one. Weights differ, or ONNX Runtime would keep one
packed copy for all.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qgraph import ops, runtime

COLD_BYTES = 320 << 20
GGML = ("ggml q4_0", "ggml q4_K", "ggml q4_K plain")  # rivals where bench/ggml.py finds them
RNG = np.random.default_rng(0)


@dataclass
class Engine:
    """One kernel: how to write its node, and which engines it is measured against."""

    name: str
    domain: str
    op: str
    weights: object  # (k, n) -> list of constants after X
    attributes: dict
    bits: float
    rivals: tuple[str, ...] = ()
    sizes: bool = True
    session: object = None
    feeds: dict = field(default_factory=dict)
    copies: int = 1

    def build(self, m, k, n, threads, copies):
        """A session of `copies` independent nodes, each with an input of its own."""
        graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, self.domain: 1}, name="bench")
        model = ir.Model(graph, ir_version=10)
        for i in range(copies):
            x = ir.Value(
                name=f"x{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([m, k])
            )
            y = ir.Value(
                name=f"y{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([m, n])
            )
            graph.inputs.append(x)
            graph.outputs.append(y)
            inputs = [x]
            for j, array in enumerate(self.weights(k, n)):
                tensor = ir.tensor(array, name=f"w{i}_{j}")
                value = ir.Value(
                    name=tensor.name,
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(array.shape),
                    const_value=tensor,
                )
                graph.register_initializer(value)
                inputs.append(value)
            sizes = {"N": n, "K": k} if self.sizes else {}
            attributes = [
                ir.convenience.convert_attribute(a, v) for a, v in (sizes | self.attributes).items()
            ]
            graph.append(
                ir.Node(self.domain, self.op, inputs, attributes, outputs=[y], name=f"n{i}")
            )
        if self.domain == ops.DOMAIN:
            ops.require(model, self.op)
        # A pool that spins on after its run would take a core from the next engine.
        config = {"session.force_spinning_stop": "1"}
        self.session = runtime.session(model, threads=threads, config=config)
        self.feeds = {
            f"x{i}": RNG.standard_normal((m, k)).astype(np.float32) for i in range(copies)
        }
        self.copies = copies

    def close(self):
        """Forget the session."""
        self.session, self.feeds = None, {}

    def seconds(self):
        """Time of one node."""
        start = time.perf_counter()
        self.session.run(None, self.feeds)
        return (time.perf_counter() - start) / self.copies


def random_bytes(*shape):
    return np.frombuffer(RNG.bytes(math.prod(shape)), np.uint8).reshape(shape)


def int4(group, block, bits=8):
    def weights(k, n):
        groups = k // group
        return [
            random_bytes(n // 16, k // 8, 64),
            RNG.uniform(0.01, 0.02, (n // 16, groups, 16)).astype(np.float16),
            np.full((1, 1, 1), 8, np.uint8),
            np.zeros(1, np.float32),
        ]

    attributes = {"block_size": group, "activation_bits": bits, "activation_block": block}
    return weights, attributes


def ternary_weights(k, n):
    # Any two bits but 3: clear the high bit where the low one is set.
    codes = random_bytes(n // 16, k // 16, 64)
    codes = codes & ~((codes & 0x55) << 1)
    return [codes, np.ones(1, np.float32), np.zeros(1, np.float32)]


def nbits(bits, block):
    def weights(k, n):
        scales = RNG.uniform(0.01, 0.02, (n, k // block)).astype(np.float32)
        return [random_bytes(n, k // block, block * bits // 8), scales]

    return weights


def dynamic_weights(k, n):
    return [random_bytes(k, n).view(np.int8), np.full(n, 0.01, np.float32)]


@dataclass
class OpenVino(Engine):
    """OpenVINO's product with compressed weights, float32 activations by hint."""

    group: int = 128

    def build(self, m, k, n, threads, copies):
        """A compiled model of independent products."""
        import openvino
        from openvino import opset13 as op

        parameters, results = [], []
        for i in range(copies):
            x = op.parameter([m, k], np.float32, name=f"x{i}")
            packed = random_bytes(n * k // 2)
            codes = openvino.Tensor(packed, [n, k // self.group, self.group], openvino.Type.i4)
            w = op.convert(op.constant(codes, shared_memory=False), np.float16)
            scales = RNG.uniform(0.01, 0.02, (n, k // self.group, 1)).astype(np.float16)
            w = op.reshape(op.multiply(w, op.constant(scales)), np.array([n, k]), False)
            y = op.matmul(x, op.convert(w, np.float32), False, True)
            parameters.append(x)
            results.append(op.result(y))
        options = {
            "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
        }  # fmt: skip
        model = openvino.Model(results, parameters)
        compiled = openvino.Core().compile_model(model, "CPU", options)
        self.session = compiled.create_infer_request()
        self.feeds = {i: RNG.standard_normal((m, k)).astype(np.float32) for i in range(copies)}
        self.copies = copies

    def seconds(self):
        """Time of one product."""
        start = time.perf_counter()
        self.session.infer(self.feeds, share_inputs=True, share_outputs=True)
        return (time.perf_counter() - start) / self.copies


def engines():
    made = []
    for name, group, block, bits, rivals in (
        ("int4 g32", 32, 32, 8, ("ort nb4 b32", "ov int4 g32", "ort dynamic int8", *GGML)),
        ("int4 g32 a128", 32, 128, 8, ("ort nb4 b32", "ov int4 g32", *GGML)),
        ("int4 g128", 128, 128, 8, ("ort nb4 b128", "ort nb4 b32", "ov int4 g128", *GGML)),
        ("int4 g32 float", 32, 0, 0, ("ort nb4 b32 float",)),
    ):
        weights, attributes = int4(group, block, bits)
        made.append(
            Engine(name, ops.DOMAIN, "MatMulInt4", weights, attributes, 4 + 16 / group, rivals)
        )
    attributes = {"activation_bits": 8, "activation_block": 0}
    made.append(
        Engine(
            "ternary",
            ops.DOMAIN,
            "MatMulTernary",
            ternary_weights,
            attributes,
            2,
            ("ort nb2 b64", "ggml tq2_0"),
        )
    )
    for name, bits, block, level in (
        ("ort nb4 b32", 4, 32, 4),
        ("ort nb4 b128", 4, 128, 4),
        ("ort nb2 b64", 2, 64, 4),
        ("ort nb4 b32 float", 4, 32, 1),
    ):
        attributes = {"bits": bits, "block_size": block, "accuracy_level": level}
        made.append(
            Engine(
                name,
                "com.microsoft",
                "MatMulNBits",
                nbits(bits, block),
                attributes,
                bits + 32 / block,
            )
        )
    made.append(
        Engine(
            "ort dynamic int8",
            "com.microsoft",
            "DynamicQuantizeMatMul",
            dynamic_weights,
            {},
            8,
            sizes=False,
        )
    )
    return made + [
        OpenVino(f"ov int4 g{group}", "", "", None, {}, 4 + 16 / group, group=group)
        for group in (32, 128)
    ]
