"""The command line: `qgraph COMMAND`. Each command is a thin call into the library.

    app.py         commands, global options, from exceptions to exit codes
    options.py     options that several commands share
    terminal.py    what is printed: tables, diagnostics, progress, JSON

One file per group of commands beside them. Nothing heavy (numpy, onnx, onnxruntime) is imported before a command
runs, so that help appears at once.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

TERMINATED = 143  # as a shell reports SIGTERM


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    from qgraph.cli import app

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack "→"
    signal.signal(signal.SIGTERM, _terminate)
    app.app(prog_name="qgraph")
    sys.exit(0)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C, so that temporary files are removed."""
    sys.exit(TERMINATED)
