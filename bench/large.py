"""Memory and time of a large generated decoder, quantized block by block; killed on the way and resumed if asked to.

    python bench/large.py 1b --work FOLDER --recipe int4-gptq --samples 2 --tokens 128
    python bench/large.py 1b --work FOLDER --kill-at block-0003.npz
    python bench/large.py 1b --work FOLDER --recipe bench/large_mixed.toml \\
        --kill-at choosing/block-0005.npz --kill-at choosing/measured.npz --kill-at block-0002.npz

With --kill-at the command is killed when its work folder holds that file, and begun again. FOLDER holds the model
(made where it is missing), the work folder and the result. Memory is looked at ten times a second. RSS counts pages of
mapped files, which the kernel can drop at any time; what is anonymous has to fit.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import decoders
import numpy as np

_FIELDS = ("VmRSS", "RssAnon", "RssFile", "RssShmem")
_INTERVAL = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scale", choices=decoders.SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers of the same width")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", default="int4-gptq")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of a sample")
    parser.add_argument(
        "--kill-at", action="append", default=[], help="SIGKILL when this file is there"
    )
    parser.add_argument("--max-time", type=float, default=300.0, help="of a choice of formats")
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    shape = decoders.SHAPES[given.scale]
    if given.layers:
        shape = decoders.replace(shape, layers=given.layers)
    model = given.work / f"{given.scale}{given.layers or ''}.onnx"
    given.work.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        decoders.write(model, shape)
    data = given.work / "tokens.npz"
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, (given.samples, given.tokens))
    np.savez(data, input_ids=tokens)
    out, kept = given.work / "out.onnx", given.work / "work"
    command = [sys.executable, "-m", "qgraph", "optimize", str(model), "-o", str(out), "--force"]
    command += ["--recipe", given.recipe, "--data", str(data), "--work-dir", str(kept), "--json"]
    for each in given.set:
        command += ["--set", each]
    command += ["--max-time", f"{given.max_time}"]
    for name in given.kill_at:
        print(json.dumps({"killed at": name, **watch(command, kept, name)}, indent=1), flush=True)
    found = watch(command, kept)
    print(json.dumps({"parameters": shape.parameters, "tokens": tokens.size, **found}, indent=1))


def watch(command: Sequence[str], kept: Path, kill_at: str = "") -> dict[str, object]:
    """Run a command, killing it when the work folder holds a file; what it took."""
    peaks: dict[str, dict[str, int]] = {}
    start, first = time.perf_counter(), _blocks(kept)
    blocks = first
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        now = _memory(child.pid)
        for field in ("VmRSS", "RssAnon"):
            if now[field] > peaks.get(field, {}).get(field, -1):
                peaks[field] = now
        blocks = _blocks(kept) or blocks
        if kill_at and (kept / kill_at).exists():
            child.send_signal(signal.SIGKILL)
            child.wait()
        time.sleep(_INTERVAL)
    return {
        "seconds": round(time.perf_counter() - start),
        "exit": child.returncode,
        "blocks before": first,
        "blocks after": blocks,
        "MiB at peak RSS": peaks["VmRSS"],
        "MiB at peak anonymous": peaks["RssAnon"],
    }


def _blocks(kept: Path) -> int:
    return sum(len(list(kept.glob(name))) for name in ("block-*.npz", "choosing/block-*.npz"))


def _memory(pid: int) -> dict[str, int]:
    found = dict.fromkeys(_FIELDS, 0)
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # ended while we looked
        return found
    for line in lines:
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) >> 10
    return found


if __name__ == "__main__":
    main()
