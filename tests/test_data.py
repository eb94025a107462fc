"""Data sources: every kind of `--data`, and one test per refusal."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph import data, errors
from qgraph.data import InputInfo

IMAGE = InputInfo("image", np.dtype(np.float32), ("batch", 2, 3))
IDS = InputInfo("input_ids", np.dtype(np.int64), ("batch", "seq"))
MASK = InputInfo("attention_mask", np.dtype(np.int64), ("batch", "seq"))
RATE = InputInfo("rate", np.dtype(np.int64), ())


def image(count: int) -> np.ndarray[Any, Any]:
    return np.arange(count * 6, dtype=np.float32).reshape(count, 2, 3)


def refusal(source: Any, *inputs: InputInfo, samples: int | None = None) -> str:
    with pytest.raises(errors.InputError) as caught:
        data.load(source, inputs, samples)
    return str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_rows_become_batches_of_one(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", image=image(3))
    found = list(data.load(tmp_path / "a.npz", [IMAGE]))
    assert [s["image"].shape for s in found] == [(1, 2, 3)] * 3
    np.testing.assert_array_equal(np.concatenate([s["image"] for s in found]), image(3))


def test_an_extra_axis_counts_samples(tmp_path: Path) -> None:
    batches = image(6).reshape(3, 2, 2, 3)
    np.savez(tmp_path / "a.npz", image=batches, rate=np.array([8, 16, 16]))
    found = list(data.load(str(tmp_path / "a.npz"), [IMAGE, RATE]))
    assert [s["image"].shape for s in found] == [(2, 2, 3)] * 3
    assert [(s["rate"].shape, int(s["rate"])) for s in found] == [((), 8), ((), 16), ((), 16)]


def test_fortran_order_is_read_right(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.asfortranarray(image(3)))
    found = [s["image"] for s in data.load(tmp_path / "a.npz", [IMAGE])]
    np.testing.assert_array_equal(np.concatenate(found), image(3))


def test_npy_for_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", image(4))
    found = data.load(tmp_path / "a.npy", [IMAGE])
    assert len(found) == 4
    np.testing.assert_array_equal(next(iter(found))["image"], image(4)[:1])


def test_folder_holds_one_sample_per_file_in_name_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", input_ids=[[1, 2, 3]], attention_mask=[[1, 1, 1]])
    np.savez(tmp_path / "a.npz", input_ids=[[7]], attention_mask=[[1]])
    (tmp_path / "readme.txt").write_text("not a sample")
    found = [s["input_ids"].tolist() for s in data.load(tmp_path, [IDS, MASK])]
    assert found == [[[7]], [[1, 2, 3]]]


def test_folder_of_npy(tmp_path: Path) -> None:
    for index in range(2):
        np.save(tmp_path / f"{index}.npy", image(1) + index)
    assert [s["image"][0, 0, 0] for s in data.load(tmp_path, [IMAGE])] == [0, 1]


def test_python_sources_start_anew_each_time() -> None:
    feeds = [{"image": image(1)}, {"image": image(2)}]

    def produce() -> Iterator[dict[str, Any]]:
        yield from feeds

    for source in (feeds, tuple(feeds), produce, produce()):
        dataset = data.load(source, [IMAGE])
        shapes = [[s["image"].shape[0] for s in dataset] for _ in range(2)]
        assert shapes == [[1, 2], [1, 2]]
        assert len(dataset) == 2


def test_an_endless_source_is_cut() -> None:
    def endless() -> Iterator[dict[str, Any]]:
        while True:
            yield {"image": image(1)}

    for source in (endless, endless()):
        dataset = data.load(source, [IMAGE], samples=3)
        assert len(list(dataset)) == len(dataset) == 3


def test_function_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "calib.py"
    file.write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    for i in range(3):\n"
        "        yield {'image': np.full((1, 2, 3), i, np.float32)}\n"
    )
    dataset = data.load(f"{file}:feeds", [IMAGE])
    assert [int(s["image"][0, 0, 0]) for s in dataset] == [0, 1, 2]


def test_function_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "calib_for_test.py").write_text("def feeds():\n    return [{'x': 1.0}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    scalar = InputInfo("x", np.dtype(np.float32), ())
    assert len(data.load("calib_for_test:feeds", [scalar])) == 1
    sys.modules.pop("calib_for_test")


def test_a_file_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", image=image(3))
    read = []
    original = zipfile.ZipExtFile.read

    def spy(self: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        read.append(n)
        return original(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", spy)
    data.load(tmp_path / "a.npz", [IMAGE])
    assert read.count(24) == 3, "each row of 24 bytes is read by itself"
    assert -1 not in read


def test_fewer_samples_than_asked_for_is_noted() -> None:
    dataset = data.load([{"image": image(1)}], [IMAGE], samples=5)
    assert str(dataset.notes[0]).startswith(
        "note QG119 feeds: 5 samples were asked for, 1 are there"
    )


def test_digest_is_of_content_not_container(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=image(3))
    np.savez_compressed(tmp_path / "b.npz", image=image(3).astype(">f4"))
    np.save(tmp_path / "c.npy", image(3).astype(np.float64))
    feeds = [{"image": image(3)[i : i + 1]} for i in range(3)]
    sources = [tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "c.npy", feeds]
    assert len({data.load(source, [IMAGE]).digest() for source in sources}) == 1
    assert data.load(feeds, [IMAGE], samples=2).digest() != data.load(feeds, [IMAGE]).digest()
    assert data.load(feeds[::-1], [IMAGE]).digest() != data.load(feeds, [IMAGE]).digest()


def test_digest_is_stable_across_versions() -> None:
    feeds = {"input_ids": np.array([[1, 2]])}
    expected = hashlib.sha256(b"input_ids\0int64\0(1, 2)\0")
    expected.update(np.array([1, 2], "<i8").tobytes() + b"\n")
    assert data.load([feeds], [IDS]).digest() == expected.hexdigest()


def test_allowed_casts_are_noted_once() -> None:
    feeds = {"input_ids": np.array([[1, 2]], np.int32)}
    dataset = data.load([feeds, feeds], [IDS])
    assert next(iter(dataset))["input_ids"].dtype == np.int64
    (note,) = map(str, dataset.notes)
    assert note.startswith(
        "note QG114 feeds sample 0[input_ids]: input input_ids int64[batch, seq]"
    )
    assert note.endswith(": int32 is cast to int64")
    narrowed = data.load([{"x": [2.0**40, 5]}], [InputInfo("x", np.dtype(np.float32), (None,))])
    assert next(iter(narrowed))["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("values", "wanted", "text"),
    [
        (np.array([300]), np.uint8, "int64 values 300 … 300 do not fit"),
        (np.array([-1]), np.uint64, "int64 values -1 … -1 do not fit"),
        (np.array([1e300]), np.float32, "float64 values overflow float32"),
        (np.array([1], np.uint8), np.float32, "found uint8"),
        (np.array([1.0]), np.int64, "found float64"),
        (np.array([1.0], np.float32), np.float16, "found float32"),
        (np.array([1.0], np.float32), ml_dtypes.bfloat16, "found float32"),
        (np.array([True]), np.int64, "found bool"),
        (np.array(["a"]), np.int64, "found <U1"),
    ],
)
def test_qg114_dtype(values: Any, wanted: Any, text: str) -> None:
    message = refusal([{"x": values}], InputInfo("x", np.dtype(wanted), (1,)))
    assert f"error QG114 feeds sample 0[x]: input x {np.dtype(wanted)}[1]: {text}" in message


def test_text_inputs() -> None:
    dataset = data.load([{"x": ["a", "b"]}], [InputInfo("x", np.dtype(object), (2,))])
    assert next(iter(dataset))["x"].tolist() == ["a", "b"]
    assert len(dataset.digest()) == 64


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("missing.npz", "does not exist", "did you mean missing2.npz?"),
        ("calib.py", "is a module", "calib.py:function"),
        ("calib.csv", "is not a kind of data that is known", "give a .npz, .npy or folder"),
        ("calib.py:fedes", "there is no function 'fedes'", "did you mean feeds?"),
        ("bad.py:feeds", "cannot be imported: ZeroDivisionError: division by zero", ""),
        ("no_module:feeds", "cannot be imported: ModuleNotFoundError", "folder/file.py:function"),
        ("calib.py:number", "there is no function 'number'", ""),
        ("calib.py:nothing", "gives NoneType, nothing to iterate", "yield feeds dicts"),
        ("empty", "holds no .npz or .npy files", "one file per sample"),
    ],
)
def test_qg111_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("missing2.npz").touch()
    Path("calib.csv").touch()
    Path("calib.py").write_text("number = 1\ndef feeds(): ...\ndef nothing(): ...\n")
    Path("bad.py").write_text("1 / 0")
    Path("empty").mkdir()
    message = refusal(name, IMAGE)
    assert message.startswith(f"error QG111 {name}: ")
    assert text in message
    assert hint in message


@pytest.mark.parametrize("source", [{"image": 1}, 3, None, b"x", np.zeros(3)])
def test_qg111_objects(source: Any) -> None:
    assert "error QG111 data:" in refusal(source, IMAGE)


def test_qg112_unreadable(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", image=np.array([{}], object))
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    whole = tmp_path / "whole.npz"
    np.savez(whole, image=image(3))
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.npy").write_text("hello")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("image", "hello")
    corrupt = bytearray(whole.read_bytes())
    corrupt[200] ^= 255
    (tmp_path / "corrupt.npz").write_bytes(corrupt)
    for name in (
        "objects.npz",
        "objects.npy",
        "cut.npz",
        "text.npz",
        "text.npy",
        "other.npz",
        "corrupt.npz",
    ):
        message = refusal(tmp_path / name, IMAGE)
        assert f"error QG112 {tmp_path / name}: cannot be read: " in message
        assert ("Python objects" in message) == name.startswith("objects")


def test_qg112_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "0.npz").write_text("hello")
    assert f"error QG112 {tmp_path / '0.npz'}" in refusal(tmp_path, IMAGE)


def test_qg113_names_all_at_once(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_id=np.ones((2, 5), np.int64))
    message = refusal(tmp_path / "a.npz", IDS, MASK)
    where = tmp_path / "a.npz"
    assert f"QG113 {where}[input_id]: is no input of the model\n  help: did you mean" in message
    assert f"QG113 {where}: model input 'attention_mask' is missing" in message
    assert "found: input_id" in message
    assert message.count("QG113") == 3


def test_qg113_npy_for_many_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 5), np.int64))
    for source in (tmp_path / "a.npy", tmp_path):
        message = refusal(source, IDS, MASK)
        assert "one array for 2 model inputs" in message
        assert "arrays named input_ids, attention_mask" in message


def test_qg113_a_sample_is_a_dict() -> None:
    message = refusal([image(1)], IMAGE)
    assert "QG113 feeds sample 0: a sample is a dict of arrays, found ndarray" in message
    assert "yield dicts like {'image': array}" in message


def test_qg115_rank(tmp_path: Path) -> None:
    message = refusal([{"image": image(1)[0]}], IMAGE)
    assert f"QG115 feeds sample 0[image]: input {IMAGE}: found shape [2, 3], rank 2" in message
    assert "add the batch axis: array[None]" in message
    assert "reshape it to 3 dimensions" in refusal([{"image": image(1)[None]}], IMAGE)
    np.savez(tmp_path / "a.npz", image=np.zeros((2, 3), np.float32))
    message = refusal(tmp_path / "a.npz", IMAGE)
    assert "found shape [2, 3], expected rank 3 or 4" in message
    assert "put the sample axis in front" in message
    np.savez(tmp_path / "b.npz", rate=16000)
    assert "found shape [], expected rank 1" in refusal(tmp_path / "b.npz", RATE)


def test_qg116_dimension() -> None:
    message = refusal([{"image": np.zeros((1, 2, 4), np.float32)}], IMAGE)
    assert f"QG116 feeds sample 0[image]: input {IMAGE}: found shape [1, 2, 4]" in message
    assert "dimension 2 must be 3" in message


def test_qg117_symbolic_dimension() -> None:
    same = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}
    other = {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1]]}
    message = refusal([same, other], IDS, MASK)
    assert "QG117 feeds sample 1[attention_mask]" in message
    assert "seq is 2 here and 3 in 'input_ids'" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_qg118_finite(value: float) -> None:
    bad = image(1)
    bad[0, 1, 2] = value
    message = refusal([{"image": bad}], IMAGE)
    assert f"QG118 feeds sample 0[image]: input {IMAGE}: {value} at index [0, 1, 2]" in message


def test_qg118_in_bfloat16() -> None:
    bad = np.array([np.nan], ml_dtypes.bfloat16)
    assert "QG118" in refusal([{"x": bad}], InputInfo("x", bad.dtype, (1,)))


def test_qg119_counts(tmp_path: Path) -> None:
    assert "QG119 feeds: holds no samples" in refusal([], IMAGE)
    assert "QG119 samples: 0 is not a positive number" in refusal(
        [{"image": image(1)}], IMAGE, samples=0
    )
    np.savez(
        tmp_path / "a.npz", input_ids=np.ones((2, 5), int), attention_mask=np.ones((3, 5), int)
    )
    message = refusal(tmp_path / "a.npz", IDS, MASK)
    assert "arrays differ in the number of samples: input_ids 2, attention_mask 3" in message


def test_later_iterations_are_checked_too() -> None:
    feeds = {"image": image(1)}
    dataset = data.load([feeds], [IMAGE])
    feeds["image"][0] = np.nan
    with pytest.raises(errors.InputError, match="QG118"):
        list(dataset)


def model() -> ir.Model:
    return ir.from_onnx_text(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 2, ?] x, float[3] w, bfloat16 b, string s) => (float[batch, 2, ?] y)
        <float[3] w = {1, 2, 3}> { y = Identity(x) }
        """
    )


def test_inputs_of_leaves_out_defaults(tmp_path: Path) -> None:
    expected = (
        InputInfo("x", np.dtype(np.float32), ("batch", 2, None)),
        InputInfo("b", np.dtype(ml_dtypes.bfloat16), ()),
        InputInfo("s", np.dtype(object), ()),
    )
    ir.save(model(), tmp_path / "m.onnx")
    for form in (model(), ir.to_proto(model()), tmp_path / "m.onnx"):
        assert data.inputs_of(form) == expected
    assert str(expected[0]) == "x float32[batch, 2, ?]"


def test_inputs_of_unknown_rank() -> None:
    proto = ir.to_proto(model())
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    info = data.inputs_of(proto)[0]
    assert info.shape is None
    assert str(info) == "x float32[…]"
    assert len(data.load([{"x": image(1)}, {"x": image(2)[0]}], [info])) == 2


def test_qg110_input_that_is_no_tensor() -> None:
    proto = ir.to_proto(model())
    sequence = onnx.TypeProto()
    sequence.sequence_type.elem_type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    proto.graph.input[0].type.CopyFrom(sequence)
    with pytest.raises(
        errors.InputError, match=r"QG110 model input 'x': is Sequence\(.*, not a tensor"
    ):
        data.inputs_of(proto)
