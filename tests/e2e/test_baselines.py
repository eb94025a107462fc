"""The float models reach the figures that MANIFEST.md of the test data records, to every digit.

Needs QGRAPH_TEST_DATA; QGRAPH_FULL=1 adds the slower half. What is checked here is the harness: a
figure of a quantized model means something only if that of the float model is right.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
FULL = os.environ.get("QGRAPH_FULL") == "1"

STORIES = "lm/stories260K/stories260K.onnx"
RESNET_20, RESNET_56 = (f"vision/cifar_resnet/resnet{depth}.onnx" for depth in (20, 56))
FACES = [44, 19, 2, 5, 4, 3, 5, 1, 14, 50, 8]

# task, model, figures with the digits that count, packages, part of the default run
RECORDED: list[tuple[str, str, dict[str, Any], list[str], bool]] = [
    ("stories", STORIES, {"perplexity": 4.2387, "nll": 1.44426, "tokens": 39376}, [], True),
    (
        "bitllama",
        "lm/bitllama_3M/bitllama_3M.onnx",
        {"perplexity": 3.8029, "nll": 1.33576},
        [],
        False,
    ),
    (
        "rxnmapper",
        "lm/rxnmapper_albert/rxnmapper_albert.onnx",
        {"top1": 0.9883, "perplexity": 1.0395, "masked": 4973},
        [],
        False,
    ),
    (
        "minilm",
        "encoder/minilm_l6_v2/minilm_l6_v2.onnx",
        {"spearman": 0.8672, "pairs": 1500},
        ["tokenizers"],
        False,
    ),
    ("mnist", "vision/mnist/mnist.onnx", {"top1": 0.9891, "images": 10000}, [], True),
    ("resnet", RESNET_20, {"top1": 0.8135, "images": 2000}, [], True),
    (
        "silero",
        "other/silero_vad/silero_vad_16k_op15.onnx",
        {"mean": 0.789, "speech": 0.783, "silence": 0.180, "frames": 937},
        [],
        True,
    ),
    ("magika", "other/magika/standard_v3_3.onnx", {"right": 129, "files": 129}, [], True),
    ("ultraface", "vision/ultraface/version-RFB-320.onnx", {"faces": FACES}, ["PIL"], True),
    ("resnet", RESNET_56, {"top1": 0.8315, "images": 2000}, [], False),
    (
        "squeezenet",
        "vision/squeezenet1.1/squeezenet1.1.onnx",
        {"top1": 0.586, "top5": 0.808, "images": 500},
        ["PIL"],
        False,
    ),
    (
        "mobilenet",
        "vision/mobilenetv2_tf/mobilenetv2_1.0_224_tf.onnx",
        {"top1": 0.876, "top5": 0.976, "images": 500},
        ["PIL"],
        False,
    ),
    (
        "cifar_probe",
        "vision/mobilenetv2_cifar_probe/mobilenetv2_cifar_probe.onnx",
        {"top1": 0.7310, "images": 2000},
        ["PIL"],
        False,
    ),
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    return load("baselines")


def model(name: str) -> Path:
    folder = os.environ.get("QGRAPH_TEST_DATA")
    if not folder:
        pytest.skip("QGRAPH_TEST_DATA is not set: real models and data are not in the repository")
    path = Path(folder, name)
    if not path.exists():
        pytest.skip(f"QGRAPH_TEST_DATA holds no {name}")
    return path


@pytest.mark.parametrize(
    ("task", "name", "figures", "packages", "quick"),
    [pytest.param(*case, id=f"{case[0]}-{Path(case[1]).stem}") for case in RECORDED],
)
def test_float_baseline(
    baselines: ModuleType,
    task: str,
    name: str,
    figures: dict[str, Any],
    packages: list[str],
    quick: bool,
) -> None:
    path = model(name)
    if not quick and not FULL:
        pytest.skip("slow; set QGRAPH_FULL=1")
    for package in packages:
        pytest.importorskip(package, reason=f"needs the package {package}")
    found = baselines.TASKS[task](path)
    digits = {key: len(repr(value).partition(".")[2]) for key, value in figures.items()}
    shown = {
        key: round(found[key], digits[key]) if isinstance(found[key], float) else found[key]
        for key in figures
    }
    assert shown == figures


def test_a_model_agrees_with_itself(baselines: ModuleType) -> None:
    path = model(STORIES)
    found = baselines.stories(path, limit=2, float_model=path)
    assert (found["kl_mean"], found["kl_max"], found["agreement"]) == (0, 0, 1)
    path = model(RESNET_20)
    found = baselines.resnet(path, limit=50, float_model=path)
    assert (found["sqnr_db"], found["agreement"]) == (float("inf"), 1)


def test_outliers_that_preserve_the_function_change_nothing(baselines: ModuleType) -> None:
    stressed = model("stress/stories_norm100.onnx")
    found = baselines.stories(stressed, limit=5, float_model=model(STORIES))
    assert found["kl_max"] < 1e-6
    assert found["agreement"] == 1


def test_command_prints_json() -> None:
    path = model(STORIES)
    command = [sys.executable, str(HERE / "baselines.py"), "stories", str(path)]
    printed = subprocess.run(
        [*command, "--float", str(path), "--limit", "1"], check=True, capture_output=True, text=True
    )
    found = json.loads(printed.stdout)
    assert found["task"] == "stories"
    assert found["kl_mean"] == 0


def test_missing_data_is_told(
    baselines: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QGRAPH_TEST_DATA", raising=False)
    with pytest.raises(baselines.real_data.MissingData, match="set QGRAPH_TEST_DATA"):
        baselines.stories("model.onnx")
    with pytest.raises(SystemExit):
        baselines.main(["stories", "model.onnx"])
    assert "error: set QGRAPH_TEST_DATA to the folder" in capsys.readouterr().err


# What is fed, without any data


def test_pieces_merge_best_score_first(tmp_path: Path) -> None:
    # ids 0..2 are special, 3..258 bytes, then characters and pieces; "ab" scores above "bc".
    vocabulary = [(b"<unk>", 0.0), (b"<s>", 0.0), (b"</s>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>".encode(), 0.0) for byte in range(256)]
    pieces = [b" ", b"a", b"b", b"c", b"ab", b"bc", b"abc", b" a"]
    vocabulary += list(zip(pieces, [0, 0, 0, 0, -1, -2, -3, -9], strict=True))
    raw = np.int32(7).tobytes()
    for piece, score in vocabulary:
        raw += np.float32(score).tobytes() + np.int32(len(piece)).tobytes() + piece
    (tmp_path / "tok.bin").write_bytes(raw)
    encoder = load("real_data").SentencePieces(tmp_path / "tok.bin", len(vocabulary))
    names = {259 + index: piece.decode() for index, piece in enumerate(pieces)}

    def pieces_of(text: str) -> list[str]:
        ids = encoder.encode(text).tolist()
        assert ids[0] == 1
        return [names.get(i, f"<{i - 3}>") for i in ids[1:]]

    assert pieces_of("abc") == [" ", "abc"]
    assert pieces_of("bcab") == [" ", "bc", "ab"]
    assert pieces_of("abbc") == [" ", "ab", "bc"]
    assert pieces_of("a") == [" a"]
    assert pieces_of("é") == [" ", "<195>", "<169>"]
    assert encoder.encode("").tolist() == [1]


def test_reactions_are_cut_into_tokens() -> None:
    smiles = load("real_data").SMILES
    text = "C[C@@H]1CC(Br)=N%12>>Clc1ccccc1.[Na+]"
    found = smiles.findall(text)
    assert "".join(found) == text
    assert found[:6] == ["C", "[C@@H]", "1", "C", "C", "("]
    assert found[6:12] == ["Br", ")", "=", "N", "%12", ">>"]
    assert found[-2:] == [".", "[Na+]"]


def test_overlap_by_hand(baselines: ModuleType) -> None:
    box = np.array([0.0, 0, 2, 2])
    others = np.array([[1.0, 0, 3, 2], [0, 0, 2, 2], [5, 5, 6, 6]])
    np.testing.assert_allclose(baselines.overlap(box, others), [1 / 3, 1, 0])
