"""The recipes that come with qgraph, by name."""

from __future__ import annotations

from typing import Any

from qgraph.recipe.schema import AUTO, DEFAULT_PIPELINE, FLOAT, STATIC, Recipe, Rule

# Rotations mix channels; what differs between heads, or was scaled up in one and down in the next layer, they cannot
# mix away: that is evened out before.
ROTATED_PIPELINE = (DEFAULT_PIPELINE[0], "equalize", "rotate", *DEFAULT_PIPELINE[1:])
STATIC_PIPELINE = (
    "canonicalize",
    "observe",
    "assign-precision",
    "search-ranges",
    "solve-weights",
    "correct-bias",
    "insert-qdq",
    "fuse-qdq",
    "cleanup",
)

TUNED_PIPELINE = (
    *DEFAULT_PIPELINE[: DEFAULT_PIPELINE.index("solve-weights") + 1],
    "tune",
    *DEFAULT_PIPELINE[DEFAULT_PIPELINE.index("solve-weights") + 1 :],
)

_KIND_OPS = {
    "linear": ("MatMul", "Gemm"),
    "conv": ("Conv", "ConvTranspose"),
    "embedding": ("Gather", "Slice"),
    "rnn": ("LSTM", "GRU", "RNN"),
}


def _rule(kind: str, *weights: str, **fields: Any) -> Rule:
    return Rule(id=kind, ops=_KIND_OPS[kind], weights=weights, **fields)


_TIED = Rule(
    id="tied", ops=_KIND_OPS["embedding"], tied=True, weights=("int8.g32", "int8.ch", FLOAT)
)

_TABLES = (_TIED, _rule("embedding", "int8.ch", "int8.g32", FLOAT))
_REST = (
    _rule("conv", "int8.ch", "int8.tensor", FLOAT),
    _rule("rnn", "int8.ch", "int8.tensor", FLOAT),
)

_STATIC = (
    _TIED,
    _rule("embedding", "int8.ch", "int8.g32", FLOAT, min_elements=1024),
    _rule("linear", "int8.ch", "int8.tensor", FLOAT, activations=STATIC),
    _rule("conv", "int8.ch", "int8.tensor", FLOAT, activations=STATIC),
    _rule("rnn", AUTO, min_elements=1024),
)


# A head that was tied to the embedding takes the gain of the last norm when the model is rotated, and is untied so.
_HEAD = Rule(id="head", ops=_KIND_OPS["linear"], head=True, weights=("int8.g32", "int8.ch", FLOAT))


def _int4(group: int, solver: str = "rtn") -> Rule:
    specs = (f"uint4.g{group}.asym", f"int4.g{group}", "int8.ch", FLOAT)
    sensitive = f"int8.g{group}"
    return _rule("linear", *specs, sensitive=sensitive, sensitive_share=0.09, solver=solver)


def _narrow(spec: str, wide: str) -> Rule:
    """So few bits that the most sensitive weights have more, and all are rounded with samples."""
    sensitive = {"sensitive": wide, "sensitive_share": 0.09}
    return _rule("linear", spec, wide, "int8.ch", FLOAT, solver="round-descent", **sensitive)


# Scales of float16 lose nothing and take half of the bytes: with them the steps between formats are fine.
_HALVES = (
    "uint2.g64.asym.f16", "uint2.g32.asym.f16", "uint2.g16.asym.f16", "int4.g256.f16", "int4.g128.f16",
    "int4.g64.f16", "uint4.g64.asym.f16",
    "int4.g32.f16", "uint4.g32.asym.f16", "uint4.g16.asym.f16", "int8.g128.f16", "uint3.g128.asym.f16",
    "uint3.g64.asym.f16", "uint3.g32.asym.f16",
)  # fmt: skip

_NO_DATA = (
    "a convolution is faster in int8 only with activations calibrated on data: --recipe int8-static --data SAMPLES; "
    "--recipe int8-weights makes it smaller"
)
_NO_GAIN = "dynamic int8 convolutions are no faster than float on CPU; --recipe int8-weights makes them smaller"

PRESETS: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe(
            name="auto",
            summary="the best that needs no data; with --data what measured best here, for each class of operators",
            rules=(
                _rule("embedding", AUTO),
                _rule("linear", AUTO),
                _rule("conv", FLOAT, reason=_NO_DATA),
                _rule("rnn", AUTO),
            ),
        ),
        Recipe(
            name="int8-dynamic",
            summary="int8 weights per output channel, activations quantized at run time (MatMul, Gemm)",
            rules=(
                _TIED,
                _rule("embedding", "int8.ch", "int8.g32", FLOAT),
                _rule("linear", "int8.ch", FLOAT, activations="int8"),
                _rule(
                    "conv",
                    FLOAT,
                    reason=_NO_GAIN,
                ),
                _rule("rnn", AUTO),
            ),
        ),
        Recipe(
            name="int8-static",
            summary="int8 weights, activations on grids calibrated with --data: integer kernels for Conv, Gemm, MatMul",
            pipeline=STATIC_PIPELINE,
            # A weight that callers may override has no grid; exporters list all weights as inputs for no reason.
            options={"canonicalize": {"to_gemm": True, "freeze_inputs": True}},
            rules=_STATIC,
            min_elements=1,
        ),
        Recipe(
            name="int8-tensor",
            summary="as int8-static with one scale per weight tensor, channels evened out first: for simple devices",
            pipeline=("canonicalize", "equalize", *STATIC_PIPELINE[1:]),
            options={"canonicalize": {"to_gemm": True}, "equalize": {"clips": "measured"}},
            rules=(
                _rule("embedding", "int8.tensor", FLOAT, min_elements=1024),
                _rule("linear", "int8.tensor", FLOAT, activations=STATIC),
                _rule("conv", "int8.tensor", FLOAT, activations=STATIC),
                _rule("rnn", "int8.tensor", FLOAT, min_elements=1024),
            ),
            min_elements=1,
        ),
        Recipe(
            name="int8-smooth",
            summary="as int8-static, with outliers of activations moved into the weights first: for transformers",
            pipeline=("canonicalize", "smooth", *STATIC_PIPELINE[1:]),
            options={
                "canonicalize": {"to_gemm": True, "freeze_inputs": True},
                "smooth": {"insert": True},
            },
            rules=_STATIC,
            min_elements=1,
        ),
        Recipe(
            name="int8-weights",
            summary="int8 weights, float activations: a quarter of the size, nearly no error",
            rules=(*_TABLES, _rule("linear", "int8.g32", "int8.ch", FLOAT), *_REST),
        ),
        Recipe(
            name="int4",
            summary="4-bit weights in groups of 32; int8 for embeddings, convolutions and the most sensitive 9 %",
            rules=(*_TABLES, _int4(32), *_REST),
        ),
        Recipe(
            name="int4-g128",
            summary="as int4, in groups of 128: 0.8 bits per weight less and faster kernels, somewhat more error",
            rules=(*_TABLES, _int4(128), *_REST),
        ),
        Recipe(
            name="int4-gptq",
            summary="as int4, rounded so that errors cancel on the samples of --data (gptq, then coordinate descent)",
            rules=(*_TABLES, _int4(32, "round-descent"), *_REST),
        ),
        Recipe(
            name="int3-gptq",
            target="ort-qgraph",
            summary="as int4-gptq in 3 bits, the most sensitive 9 % in 4: a file that is a fifth smaller",
            rules=(*_TABLES, _narrow("uint3.g32.asym.f16", "uint4.g32.asym.f16"), *_REST),
        ),
        Recipe(
            name="int4-tuned",
            summary="as int4-gptq, then all weights tuned together by gradients (tune): for models of up to 100 MB",
            pipeline=TUNED_PIPELINE,
            options={"tune": {"written": 256}},
            rules=(*_TABLES, _int4(32, "round-descent"), *_REST),
        ),
        Recipe(
            name="int3-tuned",
            target="ort-qgraph",
            summary="as int4-tuned in 3 bits, the most sensitive 9 % in 4",
            pipeline=TUNED_PIPELINE,
            options={"tune": {"written": 256}},
            rules=(*_TABLES, _narrow("uint3.g32.asym.f16", "uint4.g32.asym.f16"), *_REST),
        ),
        Recipe(
            name="int2-tuned",
            summary="as int4-tuned in 2 bits, the most sensitive 9 % in 4: the smallest, and the most lossy",
            pipeline=TUNED_PIPELINE,
            options={"tune": {"written": 256}},
            rules=(*_TABLES, _narrow("uint2.g32.asym", "uint4.g32.asym"), *_REST),
        ),
        Recipe(
            name="int4-awq",
            summary="as int4, channels that are large on the samples of --data scaled up first (awq): for outliers",
            pipeline=(DEFAULT_PIPELINE[0], "awq", *DEFAULT_PIPELINE[1:]),
            options={"solve-weights": {"inputs": "float"}},
            rules=(*_TABLES, _int4(32, "clip"), *_REST),
        ),
        Recipe(
            name="mixed",
            summary="a format for each weight by measured sensitivity, within --max-size or --avg-bits",
            rules=(
                _TIED.model_copy(
                    update={"choices": ("int4.g32.f16", "int4.g32", "int8.g32", "int8.ch", FLOAT)}
                ),
                _rule(
                    "embedding",
                    "int8.ch",
                    "int8.g32",
                    FLOAT,
                    choices=("int4.g32.f16", "int4.g32", "int8.ch", "int8.g32", FLOAT),
                ),
                _rule(
                    "linear",
                    "uint4.g32.asym",
                    "int4.g32",
                    "int8.ch",
                    FLOAT,
                    choices=(
                        *_HALVES,
                        "uint2.g32.asym",
                        "uint2.g16.asym",
                        "uint4.g128.asym",
                        "uint4.g32.asym",
                        "int4.g128",
                        "int4.g32",
                        "int8.g128",
                        "int8.g32",
                        "int8.ch",
                        FLOAT,
                    ),
                    solver="round-descent",
                ),
                *_REST,
            ),
        ),
        Recipe(
            name="w4a8",
            summary="4-bit weights in groups of 32 and int8 activations in qgraph's own operators",
            target="ort-qgraph",
            rules=(*_TABLES, _rule("linear", "int4.g32.f16", "int4.g32", "int8.ch", FLOAT), *_REST),
        ),
        Recipe(
            name="w4a8-rotated",
            summary="as w4a8, behind rotations that spread outliers over channels (QuaRot's R1 and R2, folded)",
            target="ort-qgraph",
            pipeline=ROTATED_PIPELINE,
            rules=(
                *_TABLES,
                _HEAD,
                _rule("linear", "int4.g32.f16", "int4.g32", "int8.ch", FLOAT),
                *_REST,
            ),
        ),
        Recipe(
            name="w4a4",
            summary="4-bit weights and activations in qgraph's own operators, rotated, where needed at run time",
            target="ort-qgraph",
            pipeline=ROTATED_PIPELINE,
            options={"rotate": {"online": 128}},
            rules=(
                *_TABLES,
                _HEAD,
                _rule("linear", "int4.g32.f16", "int4.g32", "int8.ch", FLOAT, activations="int4"),
                *_REST,
            ),
        ),
        Recipe(
            name="ternary",
            summary="exactly ternary weights in 2 bits without loss; int8 for the others",
            target="ort-qgraph",
            rules=(
                _rule("linear", "int2.ch", ternary=True, solver="ternary").model_copy(
                    update={"id": "ternary"}
                ),
                *_TABLES,
                _rule("linear", "int8.g32", "int8.ch", FLOAT),
                *_REST,
            ),
        ),
    )
}
