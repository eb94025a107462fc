"""What a command costs: wall time and memory of its process and of every process that it starts.

Memory is read from /proc every few milliseconds, so Linux only. Peak RSS counts pages of mapped files, which the
kernel can drop at any time; peak anonymous memory (with shared memory) is what really has to fit.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.005
_FIELDS = ("VmRSS", "RssAnon", "RssShmem")


@dataclass(frozen=True)
class Cost:
    """What one run cost; bytes are those of all its processes together, and so are seconds of processors."""

    seconds: float
    cpu_seconds: float
    peak_rss: int
    peak_anonymous: int
    output: str


class Failed(RuntimeError):
    """The command failed; the text is what it said."""


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end and watch it."""
    rss = anonymous = 0
    with tempfile.TemporaryFile("w+") as said:  # a pipe that nobody empties would stop the child
        start, before = time.perf_counter(), _children_seconds()
        child = subprocess.Popen(command, env=env, stdout=said, stderr=subprocess.STDOUT)
        while child.poll() is None:
            now = [_status(pid) for pid in _family(child.pid)]
            rss = max(rss, sum(s["VmRSS"] for s in now))
            anonymous = max(anonymous, sum(s["RssAnon"] + s["RssShmem"] for s in now))
            time.sleep(INTERVAL)
        seconds, cpu_seconds = time.perf_counter() - start, _children_seconds() - before
        said.seek(0)
        output = said.read()
    if child.returncode:
        raise Failed(f"{' '.join(command)} ended with {child.returncode}\n{output}")
    return Cost(seconds, cpu_seconds, rss, anonymous, output)


def _children_seconds() -> float:
    """Of processors, by the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median of a over the median of b."""
    return statistics.median(a) / statistics.median(b)


def _family(pid: int) -> list[int]:
    """The process and all below it that still live."""
    family, todo = [], [pid]
    while todo:
        each = todo.pop()
        family.append(each)
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                todo += map(int, children.read_text().split())
            except OSError:  # ended while we looked
                continue
    return family


def _status(pid: int) -> dict[str, int]:
    found = dict.fromkeys(_FIELDS, 0)
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # ended while we looked
        return found
    for line in lines:
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found
