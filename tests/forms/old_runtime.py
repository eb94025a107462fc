"""The oldest ONNX Runtime that qgraph supports, in an interpreter of its own.

The environment variable QGRAPH_OLD_ORT_PYTHON names a Python that has this onnxruntime and numpy, nothing else. This
very file is what that Python runs: it answers one model and its inputs after the other.
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

VARIABLE = "QGRAPH_OLD_ORT_PYTHON"


class Refused(Exception):
    """The old runtime did not load or run the model, or died."""


class OldRuntime:
    """A resident process; it is started again if a model kills it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, model: bytes, feeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Outputs by name for each feed.

        Raises:
            Refused: with what ONNX Runtime says.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [os.environ[VARIABLE], __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            send(self._process.stdin, model)
            send(self._process.stdin, str(len(feeds)).encode())
            for feed in feeds:
                send(self._process.stdin, packed(feed))
            failure = receive(self._process.stdout).decode()
            if failure:
                raise Refused(failure)
            return [unpacked(receive(self._process.stdout)) for _ in feeds]
        except (EOFError, BrokenPipeError) as e:
            raise Refused(f"the process died with {self._process.wait()}") from e

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def is_available() -> bool:
    """Whether an old interpreter is named."""
    return bool(os.environ.get(VARIABLE))


def send(stream: BinaryIO, data: bytes) -> None:
    """One message: its length, then itself."""
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> bytes:
    """What `send` sent."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    return stream.read(struct.unpack("<Q", head)[0])


def packed(arrays: dict[str, Any]) -> bytes:
    """Arrays as bytes; names go apart, since they may hold any character. What is no array is left out."""
    kept = {k: np.asarray(v) for k, v in arrays.items() if not isinstance(v, (list, dict))}
    kept = {k: v for k, v in kept.items() if v.dtype.kind in "biuf" and v.dtype.isbuiltin}
    names = np.asarray(list(kept) or [""], np.str_)
    buffer = io.BytesIO()
    np.savez(buffer, names=names, **{f"a{i}": v for i, v in enumerate(kept.values())})
    return buffer.getvalue()


def unpacked(data: bytes) -> dict[str, Any]:
    """The inverse of `packed`."""
    with np.load(io.BytesIO(data)) as held:
        return {str(name): held[f"a{i}"] for i, name in enumerate(held["names"]) if f"a{i}" in held}


def serve() -> None:
    """The child: answer until the input ends."""
    import onnxruntime

    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            model = receive(incoming)
        except EOFError:
            return
        feeds = [unpacked(receive(incoming)) for _ in range(int(receive(incoming)))]
        try:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
            names = [o.name for o in session.get_outputs()]
            answers = [
                packed(dict(zip(names, session.run(names, feed), strict=True))) for feed in feeds
            ]
        except Exception as e:  # noqa: BLE001  whatever the runtime raises goes to the parent as text
            send(outgoing, (str(e) or type(e).__name__).encode())
            continue
        send(outgoing, b"")
        for answer in answers:
            send(outgoing, answer)


if __name__ == "__main__":
    serve()
