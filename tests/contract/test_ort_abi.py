"""Our own declaration of ONNX Runtime's C ABI, against its recorded facts and the installed runtime."""

import ctypes
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx.parser
import onnxruntime
import pytest

from qgraph import errors, runtime
from qgraph.runtime import library

HEADER = Path(__file__).parents[2] / "runtime_ops" / "ort_abi.h"
MODEL = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
).SerializeToString()


def facts():
    """Recorded slots, structs and enumerations: $QGRAPH_FACTS, or beside the test data."""
    folder = os.environ.get("QGRAPH_FACTS")
    if folder is None and "QGRAPH_TEST_DATA" in os.environ:
        folder = Path(os.environ["QGRAPH_TEST_DATA"]).parent / "facts"
    path = Path(folder) / "ort_api_slots.json" if folder else None
    if path is None or not path.is_file():
        pytest.skip("set QGRAPH_FACTS to the folder with ort_api_slots.json")
    return json.loads(path.read_text())


def source():
    return re.sub(r"\\\n", "\n", HEADER.read_text())


def declared_slots():
    return {name: int(slot) for slot, name in re.findall(r"\bX\((\d+), (\w+),", source())}


def test_every_function_has_the_slot_of_the_runtime():
    known = {s["name"]: s["slot"] for s in facts()["slots"]}
    slots = declared_slots()
    assert len(slots) > 30
    assert slots == {name: known[name] for name in slots}


def test_every_function_exists_at_our_api_version():
    version = int(re.search(r"kApiVersion = (\d+)", source())[1])
    since = {s["name"]: s["since"] for s in facts()["slots"]}
    newer = [n for n in declared_slots() if since[n] and int(since[n].split(".")[1]) > version]
    assert newer == []


def test_custom_op_fields_are_in_the_order_of_the_runtime():
    body = re.search(r"struct OrtCustomOp \{(.*?)\n\};", source(), re.S)[1]
    ours = re.findall(r"^  (?:[\w*]+ )+?\(?\*?(\w+)(?:;|\)\()", body, re.M)
    version = int(re.search(r"kApiVersion = (\d+)", source())[1])
    assert ours == [name for name, since in facts()["custom_op"]["fields"] if since <= version]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("OrtErrorCode", "OrtErrorCode"),
        ("OrtElementType", "ONNXTensorElementDataType"),
        ("OrtCharacteristic", "OrtCustomOpInputOutputCharacteristic"),
        ("OrtMemoryType", "OrtMemType"),
        ("OrtAttributeType", "OrtOpAttrType"),
        ("OrtAllocatorType", "OrtAllocatorType"),
    ],
)
def test_enumerations_have_the_values_of_the_runtime(ours, theirs):
    def plain(name):
        return re.sub(r"^k|^Attribute|Allocator$|_", "", re.sub(r"^k", "", name)).lower()

    body = re.search(rf"enum {ours} : int \{{(.*?)\}};", source(), re.S)[1]
    declared = {plain(name): int(value) for name, value in re.findall(r"(\w+) = (-?\d+)", body)}
    known = {plain(name): value for name, value in facts()["enums"][theirs].items()}
    assert declared
    assert declared == {name: known[name] for name in declared}


def options():
    found = onnxruntime.SessionOptions()
    found.log_severity_level = 3
    found.register_custom_ops_library(library.library_path())
    return found


def run(session):
    (y,) = session.run(None, {"x": np.ones(2, np.float32)})
    return y.tolist()


def test_two_sessions_of_one_process_share_the_library():
    first = onnxruntime.InferenceSession(MODEL, options(), providers=["CPUExecutionProvider"])
    second = onnxruntime.InferenceSession(MODEL, options(), providers=["CPUExecutionProvider"])
    assert run(first) == run(second) == [-1, -1]
    del first
    assert run(second) == [-1, -1]


def test_registering_twice_in_one_session_is_refused_in_words():
    twice = options()
    twice.register_custom_ops_library(library.library_path())
    with pytest.raises(Exception, match="already"):
        onnxruntime.InferenceSession(MODEL, twice, providers=["CPUExecutionProvider"])


def test_the_library_exports_nothing_but_its_interface():
    exported = re.findall(
        r"^QG_EXPORT .*?\b(\w+)\(", (HEADER.parent / "qgraph_ops.h").read_text(), re.M
    )
    dll = ctypes.CDLL(library.library_path())
    for name in [*exported, "RegisterCustomOps"]:
        assert hasattr(dll, name)
    assert not hasattr(dll, "_ZN6qgraph8best_isaEv")


class FakeRuntime:
    """An OrtApiBase of a given version, whose functions record what they are asked."""

    def __init__(self, version, **functions):
        self.texts = []
        self.keep = []
        slots = declared_slots()
        status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
        self.table = (ctypes.c_void_p * 300)()
        self.put(slots["CreateStatus"], status(self.create_status))
        for name, function in functions.items():
            self.put(slots[name], function)
        get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
            lambda wanted: ctypes.addressof(self.table) if wanted <= version else None
        )
        text = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(self.version))
        self.version = ctypes.create_string_buffer(f"1.{version}.0".encode())
        self.base = (ctypes.c_void_p * 2)()
        for i, function in enumerate((get_api, text)):
            self.base[i] = ctypes.cast(function, ctypes.c_void_p)
            self.keep.append(function)

    def put(self, slot, function):
        self.table[slot] = ctypes.cast(function, ctypes.c_void_p)
        self.keep.append(function)

    def create_status(self, code, text):
        self.texts.append((code, text.decode()))
        return 1


@pytest.fixture
def register(tmp_path):
    """RegisterCustomOps of a copy of the library, whose statics other tests have not touched."""
    dll = ctypes.CDLL(shutil.copy(library.library_path(), tmp_path))
    dll.RegisterCustomOps.restype = ctypes.c_void_p
    return lambda fake: dll.RegisterCustomOps(None, ctypes.byref(fake.base))


def test_a_runtime_that_is_too_old_is_told_so(register):
    fake = FakeRuntime(16)
    assert register(fake) == 1
    ((code, text),) = fake.texts
    assert code == 9  # ORT_NOT_IMPLEMENTED
    assert "need ONNX Runtime 1.17 or newer; this is 1.16.0" in text


def test_a_refusal_by_the_runtime_comes_back_as_a_status(register):
    message = ctypes.create_string_buffer(b"no room for a domain")
    released = []
    fake = FakeRuntime(
        17,
        CreateCustomOpDomain=ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
            lambda name, out: 7
        ),
        GetErrorMessage=ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
            lambda status: ctypes.addressof(message)
        ),
        ReleaseStatus=ctypes.CFUNCTYPE(None, ctypes.c_void_p)(released.append),
    )
    assert register(fake) == 1
    assert fake.texts == [(1, "no room for a domain")]
    assert released == [7]


def test_each_domain_is_created_once(register):
    created, added = [], []

    def create(name, out):
        created.append(name)
        ctypes.c_void_p.from_address(out).value = 41 + len(created)

    fake = FakeRuntime(
        31,
        CreateCustomOpDomain=ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
            create
        ),
        CustomOpDomain_Add=ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
            lambda domain, op: None
        ),
        AddCustomOpDomain=ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
            lambda options, domain: added.append(domain)
        ),
    )
    assert register(fake) is None
    assert register(fake) is None
    assert created == [b"ai.qgraph", b"ai.qgraph.calibration"]
    assert added == [42, 43] * 2


def test_our_domain_is_unknown_without_the_library():
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21, "ai.qgraph": 1]>'
        "g (float[2] x) => (float[2] y) { y = ai.qgraph.NoSuchOp(x) }"
    )
    with pytest.raises(errors.RuntimeFailure, match="NoSuchOp"):
        runtime.session(model)
