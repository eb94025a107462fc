"""Real models through recipes and targets: none crashes, none is silent, none is wrong, and the trained ones stay good.

Needs QGRAPH_TEST_DATA. By default each model goes through one recipe, its neighbours through the others; QGRAPH_FULL=1
runs the whole sweep. The bands are on the same data as the recorded float baselines (test_baselines.py), some
of them on the first texts only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import qgraph
from qgraph import graph

HERE = Path(__file__).parent
FULL = os.environ.get("QGRAPH_FULL") == "1"

STORIES = "lm/stories260K/stories260K.onnx"
TINY_VIT = "conformance/deeploy/Models/TinyViT/Demo/network.onnx"  # normalizes values of 1e-3
BITLLAMA = "lm/bitllama_3M/bitllama_3M.onnx"
RXNMAPPER = "lm/rxnmapper_albert/rxnmapper_albert.onnx"
MINILM = "encoder/minilm_l6_v2/minilm_l6_v2.onnx"
MAGIKA = "other/magika/standard_v3_3.onnx"
SILERO = "other/silero_vad/silero_vad_16k_op15.onnx"
GTCRN = "other/gtcrn/gtcrn.onnx"
RESNET = "vision/cifar_resnet/resnet20.onnx"
ULTRAFACE = "vision/ultraface/version-RFB-320.onnx"

REAL = (
    STORIES,
    BITLLAMA,
    RXNMAPPER,
    MINILM,
    MAGIKA,
    SILERO,
    GTCRN,
    RESNET,
    ULTRAFACE,
    "vision/mnist/mnist.onnx",
    "vision/espcn/float_model.onnx",
    "vision/squeezenet1.1/squeezenet1.1.onnx",
    "vision/mobilenetv2_tf/mobilenetv2_1.0_224_tf.onnx",
    "vision/mobilenetv2_cifar_probe/mobilenetv2_cifar_probe.onnx",
    "stress/stories_norm100.onnx",
)
QUICK = ("auto", "int4", "int8-dynamic")
PORTABLE = (STORIES, RXNMAPPER, SILERO, GTCRN, "vision/mnist/mnist.onnx")
STATIC = (MAGIKA, GTCRN, TINY_VIT)  # language models are in test_static_text.py


@pytest.fixture(scope="module")
def folder() -> Path:
    name = os.environ.get("QGRAPH_TEST_DATA")
    if not name:
        pytest.skip("QGRAPH_TEST_DATA names no folder with the test models")
    return Path(name)


@pytest.fixture(scope="module")
def tools(folder: Path) -> Any:
    """sweep.py, which its workers import too."""
    sys.path.insert(0, str(HERE))
    try:
        import sweep

        yield sweep
    finally:
        sys.path.remove(str(HERE))


def judge(rows: list[Any]) -> None:
    bad = [row.text() for row in rows if row.outcome in ("CRASH", "WRONG")]
    assert not bad, "\n".join(bad)


QUICK_CASES = [
    *((REAL[i::3], recipe, "ort") for i, recipe in enumerate(QUICK)),
    *((PORTABLE[i::3], QUICK[i - 1], "onnx") for i in range(3)),
    (PORTABLE[:3], "int4", "openvino"),
]
STATIC_CASES = [(STATIC, "int8-static", "ort"), (STATIC, "int8-static", "openvino")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "recipe", "target"), STATIC_CASES + ([] if FULL else QUICK_CASES)
)
def test_real_models(tools, folder, models, recipe, target):
    if target == "openvino":
        pytest.importorskip("openvino")
    missing = [m for m in models if not (folder / m).exists()]
    if missing:
        pytest.skip(f"QGRAPH_TEST_DATA holds no {missing[0]}")
    rows = list(tools.sweep(folder, [folder / m for m in models], (recipe,), (target,)))
    assert len(rows) == len(models)
    judge(rows)
    assert all(row.outcome == "ok" for row in rows)


# First model, step, recipe.
SMALL = [(0, 6, "int8-static")] if FULL else [(0, 12, "int4"), (6, 12, "int8-static")]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "step", "recipe"), SMALL)
def test_small_models_of_every_kind(tools, folder, first, step, recipe):
    """Some models of the conformance collections, in one recipe: odd exporters, custom domains, broken files."""
    models = tools.find(folder, "conformance/*")[first::step]
    if not models:
        pytest.skip("QGRAPH_TEST_DATA holds no conformance models")
    judge(list(tools.sweep(folder, models, (recipe,), ("ort",))))


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="set QGRAPH_FULL=1 for the whole sweep")
def test_everything(tools, folder):
    rows = list(tools.sweep(folder, tools.find(folder)))
    print(tools.summary(rows))
    judge(rows)


def optimized(folder: Path, path: Path, model: str, recipe: str, *overrides: str) -> qgraph.Result:
    if not (folder / model).exists():
        pytest.skip(f"QGRAPH_TEST_DATA holds no {model}")
    output = path / "model.q.onnx"
    return qgraph.optimize(
        folder / model, recipe, output=output, overrides=overrides, verify="off", inspect=False
    )


# task, model, recipe, overrides, how many texts or images, the figure, its band
BANDS = [
    ("stories", STORIES, "auto", (), None, "kl_mean", 0, 0.005),
    ("stories", STORIES, "int4", (), None, "kl_mean", 0, 0.0759),
    ("bitllama", BITLLAMA, "auto", (), 10, "kl_mean", 0, 5e-4),
    ("bitllama", BITLLAMA, "int4", (), 10, "kl_mean", 0, 5e-4),
    ("rxnmapper", RXNMAPPER, "int4", (), 40, "top1", 0.98, 1),
    ("minilm", MINILM, "int4", (), 60, "cosine_mean", 0.979, 1),
    ("magika", MAGIKA, "auto", (), None, "agreement", 1, 1),
    ("silero", SILERO, "int8-weights", (), 300, "mean_abs", 0, 0.01),
    ("resnet", RESNET, "int8-weights", (), 300, "agreement", 0.97, 1),
    (
        "ultraface",
        ULTRAFACE,
        "int8-weights",
        ("options.canonicalize.freeze_inputs=true",),
        3,
        "recall",
        0.95,
        1,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model", "recipe", "overrides", "limit", "figure", "low", "high"),
    BANDS,
    ids=[f"{b[0]}-{b[2]}" for b in BANDS],
)
def test_trained_models_stay_good(
    tools, folder, tmp_path, task, model, recipe, overrides, limit, figure, low, high
):
    import baselines

    if task == "minilm":
        pytest.importorskip("tokenizers")
    if task == "ultraface":
        pytest.importorskip("PIL")
    result = optimized(folder, tmp_path, model, recipe, *overrides)
    try:
        found = baselines.TASKS[task](result.path, limit=limit, float_model=folder / model)
    except baselines.real_data.MissingData as e:
        pytest.skip(str(e))
    assert low <= found[figure] <= high


def test_layers_that_share_their_weights_still_do(folder, tmp_path):
    result = optimized(folder, tmp_path, RXNMAPPER, "int4")
    assert result.path is not None and result.path.stat().st_size <= 0.85e6
    codes = [v for _, v in graph.initializers(result.model) if ".codes" in str(v.name)]
    assert len(codes) == len(result.ledger) == len(result.report.quantized) == 11
    # Twelve layers, of one set of weights.
    assert sorted(len(v.uses()) for v in codes)[-6:] == [12] * 6


def test_a_tied_table_is_stored_once(folder, tmp_path):
    result = optimized(folder, tmp_path, STORIES, "int4")
    tied = [e for e in result.report.quantized if len(e.operators) > 1]
    assert len(tied) == 1
    codes = [
        v for _, v in graph.initializers(result.model) if str(v.name) == f"{tied[0].weight}.codes"
    ]
    assert len(codes) == 1 and len(codes[0].uses()) == 2


@pytest.mark.parametrize("target", ["ort", "ort-qgraph"])
def test_ternary_layers_stay_exact(tools, folder, tmp_path, target):
    """Every ternary weight of bitllama_3M keeps its very values, and the model almost its distribution."""
    import baselines

    if not (folder / BITLLAMA).exists():
        pytest.skip(f"QGRAPH_TEST_DATA holds no {BITLLAMA}")
    output = tmp_path / "model.q.onnx"
    result = qgraph.optimize(
        folder / BITLLAMA, "ternary", target=target, output=output, verify="ends", inspect=False
    )
    exact = [e for e in result.report.quantized if "ternary" in e.spec or "int2" in e.spec]
    assert len(exact) == 56 and all(e.sqnr_db == float("inf") for e in exact)
    assert output.stat().st_size <= 3.2e6
    found = baselines.TASKS["bitllama"](output, limit=10, float_model=folder / BITLLAMA)
    assert found["kl_mean"] <= 5e-4
