"""The NEON kernels on an emulated CPU against this machine's kernels and numpy, bit for bit.

Needs the cross compiler aarch64-linux-gnu-g++, cmake, and qemu's user mode emulation (Debian: g++-aarch64-linux-gnu,
cmake, qemu-user-static).
"""

import fcntl
import itertools
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qgraph import native, native_matmul

ROOT = Path(__file__).resolve().parents[2]
INT4, TERNARY = native_matmul.INT4, native_matmul.TERNARY
MATMUL, QUANTIZE, HADAMARD, SEARCH = range(4)  # kOperations of the driver
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
DOT, NO_DOT = "max", "cortex-a72"  # CPUs with and without the dot product
SEEDS = range(4)


def tool(*names):
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"{' or '.join(names)} is not installed")
    return found


def call(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(folder):
    """The whole library for aarch64, warnings being errors; then its objects as a program without shared libraries."""
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    call("cmake", "-S", ROOT / "runtime_ops", "-B", folder, *defines)
    call("cmake", "--build", folder, "--parallel", "2")
    assert (folder / "libqgraph_ops.so").exists()
    program = folder / "neon_driver"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    source = Path(__file__).with_name("neon_driver.cc")
    objects = sorted(folder.rglob("*.cc.o"))
    includes = ["-I", ROOT / "runtime_ops"]
    call(COMPILER, "-std=c++17", "-static", *warnings, *includes, source, *objects, "-o", program)
    return program


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    for names in ([COMPILER], ["cmake"], EMULATORS):
        tool(*names)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return build(folder / "aarch64")
    # Processes of one run share one build.
    with (folder.parent / "aarch64.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        program = folder.parent / "aarch64" / "neon_driver"
        return program if program.exists() else build(program.parent)


@dataclass
class Request:
    kind: int
    arguments: list[int]
    inputs: list[np.ndarray | None]
    # Outputs, given the rows that kernels put side by side.
    expected: object


def encoded(request, outputs):
    sizes = [o.nbytes for o in outputs]
    parts = [struct.pack("<2q", request.kind, len(request.arguments))]
    parts.append(struct.pack(f"<{len(request.arguments)}q", *request.arguments))
    parts.append(struct.pack("<q", len(request.inputs)))
    for array in request.inputs:
        parts.append(struct.pack("<q", -1 if array is None else array.nbytes))
        parts.append(b"" if array is None else array.tobytes())
    parts.append(struct.pack(f"<{1 + len(sizes)}q", len(sizes), *sizes))
    return b"".join(parts)


def emulate(driver, cpu, requests, folder, **environment):
    """The instruction set in use, all of them with their block rows, and the bytes of the responses."""
    (folder / "requests").write_bytes(requests)
    ours = {name: value for name, value in os.environ.items() if name != "QGRAPH_ISA"}
    command = [tool(*EMULATORS), "-cpu", cpu, driver, folder / "requests", folder / "responses"]
    used, *isas = call(*command, env=ours | environment).split()
    block_rows = dict(zip(isas[::2], map(int, isas[1::2]), strict=True))
    return used, block_rows, (folder / "responses").read_bytes()


def same(found, expected):
    """Equal bits; the sign and the payload of a NaN are a CPU's own."""
    if found.dtype.kind != "f":
        return found.tobytes() == expected.tobytes()
    is_nan = np.isnan(expected)
    bits = np.dtype(f"u{found.itemsize}")
    equal = found.view(bits) == np.ascontiguousarray(expected).view(bits)
    return bool(np.where(is_nan, np.isnan(found), equal).all())


def check(driver, requests, folder):
    _, isas, _ = emulate(driver, DOT, b"", folder)
    assert list(isas) == ["scalar", "neon", "neondot"]
    outputs = [{rows: r.expected(rows) for rows in set(isas.values())} for r in requests]
    sizes = [next(iter(o.values())) for o in outputs]
    request_bytes = b"".join(map(encoded, requests, sizes))
    _, _, response = emulate(driver, DOT, request_bytes, folder)
    at = 0
    for request, by_rows in zip(requests, outputs, strict=True):
        for isa, rows in isas.items():
            for i, expected in enumerate(by_rows[rows]):
                found = np.frombuffer(response, expected.dtype, expected.size, at)
                at += expected.nbytes
                assert same(found.reshape(expected.shape), expected), (isa, i, request)
    assert at == len(response)


def activations(rng, m, k):
    """Ordinary rows, and some that are not."""
    x = rng.standard_normal((m, k)).astype(np.float32) * np.float32(10.0 ** rng.integers(-20, 20))
    for row in x:
        match rng.integers(0, 12):
            case 0:
                row[:] = rng.choice([0.0, -0.0], k)
            case 1:
                row[:] = rng.choice([-3, 3], k)
            case 2:
                row[rng.integers(k)] = rng.choice([np.nan, np.inf, -np.inf])
            case 3:
                row[:] = rng.choice([1e-38, -1e-45, 2.0**-100], k)
            case 4:
                row[:] = rng.choice([3e38, -1.0], k)
    return x


def matmul(rng, kind):
    m, n = rng.integers(1, 10), rng.integers(1, 70)
    k = rng.integers(1, 700) if rng.random() < 0.9 else rng.integers(4000, 4200)
    m, n, k = int(m), int(n), int(k)
    group, block, bits = 0, 0, int(rng.choice([8, 8, 4, 0]))
    if kind == INT4:
        group = int(rng.choice([0, 16, 32, 64, 128, 256]))
        half_group = max(group // 2, 16)
        block = int(rng.choice([0, 32, 128] if group == 0 else [0, half_group, group, 4 * group]))
    tiles, multiple = -(-n // 16), group or (8 if kind == INT4 else 16)
    padded = -(-k // multiple) * multiple
    zero_points = None
    if kind == INT4:
        codes = rng.integers(0, 256, (tiles, padded // 8, 64)).astype(np.uint8)
        if rng.random() < 0.3:
            codes = rng.choice([0, 255, 15, 240], codes.shape).astype(np.uint8)
        dtype = rng.choice([np.float16, np.float32])
        shape = (tiles, padded // (group or padded), 16)
        scales = rng.uniform(-0.1, 0.1, shape).astype(dtype)
        scales[rng.random(shape) < 0.1] = 3e-7  # subnormal in float16
        if rng.random() < 0.5:
            zero_points = rng.integers(0, 16, shape).astype(np.uint8)
    else:
        values = rng.integers(0, 3, (4, tiles, padded // 16, 64))
        codes = sum(v << 2 * f for f, v in enumerate(values)).astype(np.uint8)
        scales = rng.uniform(0.5, 2, 16 * tiles).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if rng.random() < 0.5 else None
    x = activations(rng, m, k)
    order = int(rng.integers(2))
    with np.errstate(invalid="ignore"):
        y = native_matmul.matmul(
            x, codes, scales, zero_points, bias, n=n, format=kind, group=group, activation_bits=bits,
            activation_block=block,
        )  # fmt: skip
    return Request(
        MATMUL,
        [kind, m, n, k, group, bits, block, scales.dtype == np.float16, order],
        [codes, scales, zero_points, x, bias],
        lambda _: [y],
    )


def side_by_side(values, rows, depth):
    """[m, c] → as the kernels keep it: [blocks of rows][c / depth][rows][depth]."""
    count = -(-len(values) // rows)
    starts = [len(values) * i // count for i in range(count + 1)]
    blocks = [values[a:b] for a, b in itertools.pairwise(starts)]
    parts = [b.reshape(len(b), -1, depth).transpose(1, 0, 2).ravel() for b in blocks]
    return np.concatenate(parts)


def quantize(rng):
    m, k = int(rng.integers(1, 10)), int(rng.integers(1, 1500))
    unit = int(rng.choice([16, 32, 128]))
    padded = -(-k // unit) * unit
    if rng.random() < 0.3:
        block = unit = padded
    else:
        block = int(rng.choice([unit, 4 * unit, padded]))
    levels = int(rng.choice([7, 127]))
    x = activations(rng, m, k)
    codes = np.zeros((m, padded), np.int8)
    scales = np.zeros((m, -(-padded // block)), np.float32)
    for s in range(scales.shape[1]):
        part = x[:, s * block : min((s + 1) * block, k)]
        peak = np.abs(part).max(1, initial=0)
        is_bad, is_zero = ~np.isfinite(peak), peak < 2.0**-100
        scales[:, s] = np.where(is_bad, np.nan, np.where(is_zero, 0, peak / np.float32(levels)))
        good = ~(is_bad | is_zero)
        factor = np.float32(levels) / peak[good]
        codes[good, s * block : s * block + part.shape[1]] = np.rint(part[good] * factor[:, None])
    starts = np.arange(0, padded, unit)
    sums = -np.add.reduceat(codes.astype(np.int32), starts, axis=1)
    return Request(
        QUANTIZE,
        [m, k, padded, block, unit, levels],
        [x],
        lambda rows: [
            side_by_side(codes, rows, 4),
            side_by_side(scales, rows, 1),
            side_by_side(sums.astype(np.int32), rows, 1),
        ],
    )


def hadamard(rng):
    blocks, factor_size = int(rng.integers(1, 4)), int(rng.choice([1, 1, 3, 12, 20]))
    n = 1 << int(rng.integers(0, 10))
    factor = rng.choice([-1, 1], (factor_size, factor_size)).astype(np.float32)
    x = rng.standard_normal((blocks, factor_size, n)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = rng.choice([0.0, -0.0])
    y = x * (np.float32(1) / np.sqrt(np.float32(factor_size * n)))
    distance = 1
    while distance < n:
        pairs = y.reshape(blocks, factor_size, -1, 2, distance)
        first, second = pairs[:, :, :, 0], pairs[:, :, :, 1]
        y = np.stack([first + second, first - second], axis=3).reshape(x.shape)
        distance *= 2
    if factor_size > 1 or factor[0, 0] != 1:
        mixed = np.zeros_like(y)
        for i in range(factor_size):
            mixed += factor[:, i, None] * y[:, i, None]
        y = mixed
    return Request(HADAMARD, [factor_size, factor_size * n, blocks], [x, factor], lambda _: [y])


def search(rng):
    rows, columns = int(rng.integers(1, 5)), int(rng.integers(1, 300))
    group, bits, mode = int(rng.choice([16, 100])), int(rng.choice([2, 4, 8])), int(rng.integers(3))
    half = bool(rng.integers(2))
    w = rng.standard_normal((rows, columns)).astype(np.float32)
    importance = rng.uniform(0, 3, columns).astype(np.float32) if rng.integers(2) else None
    codes, scales, points, error = native.rtn_search(
        w, group=group, bits=bits, symmetric=mode > 0, importance=importance, signed_scale=mode == 2,
        scale_dtype="float16" if half else "float32",
    )  # fmt: skip
    points = np.empty(0, np.uint8) if points is None else points
    return Request(
        SEARCH,
        [rows, columns, group, bits, mode, half],
        [w, importance],
        lambda _: [codes, scales, points, error],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", [INT4, TERNARY])
def test_products_are_those_of_this_machine(driver, kind, seed, tmp_path):
    rng = np.random.default_rng([kind, seed])
    check(driver, [matmul(rng, kind) for _ in range(120)], tmp_path)


@pytest.mark.parametrize("make", [quantize, hadamard], ids=lambda make: make.__name__)
def test_the_other_kernels_are_numpys(driver, make, tmp_path):
    rng = np.random.default_rng(9)
    check(driver, [make(rng) for _ in range(100)], tmp_path)


def test_the_weight_search_is_that_of_this_machine(driver, tmp_path):
    rng = np.random.default_rng(10)
    check(driver, [search(rng) for _ in range(30)], tmp_path)


def test_the_dot_product_is_used_where_the_cpu_has_it(driver, tmp_path):
    assert emulate(driver, DOT, b"", tmp_path)[0] == "neondot"
    used, isas, _ = emulate(driver, NO_DOT, b"", tmp_path)
    assert (used, list(isas)) == ("neon", ["scalar", "neon"])
    for cap in ("scalar", "neon", "neondot"):
        assert emulate(driver, DOT, b"", tmp_path, QGRAPH_ISA=cap)[0] == cap
