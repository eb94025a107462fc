"""How close the native operators come to the machine and to other engines: python bench/kernels.py --bars

All engines (bench/engines.py) run interleaved in one process. Numbers are medians of ratios: to what the machine can
do (the larger of the time to read the weights and to do the dot products, both probed in every round by bench/probe.py)
and to each rival. Rounds in which the probe shows a busy core, under 0.8 of the best products per second, do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import ggml  # noqa: E402
import onnxruntime  # noqa: E402
from engines import COLD_BYTES, GGML, engines  # noqa: E402
from probe import Probe  # noqa: E402

from qgraph import native  # noqa: E402

FEW_ROWS = 16  # up to these weights come from memory, beyond them from the cache
# Engine, rows, of what ("machine" or a rival), at least.
BARS = (
    *(("int4 g32", 1, of, least) for of, least in (("machine", 0.9), ("ort nb4 b32", 1.4))),
    *(("int4 g128", 1, of, least) for of, least in (("machine", 0.9), ("ort nb4 b32", 1.4))),
    *((f"int4 g{g}", m, of, 1.0) for g in (32, 128) for m in (1, 2, 4, 8, 16, 32) for of in GGML),
    *(("int4 g128", m, of, 1.4) for m in (128, 512) for of in GGML),
    ("ternary", 1, "ggml tq2_0", 1.0),
    *((f"int4 g{g}", 1, f"ov int4 g{g}", 1.0) for g in (32, 128)),
    *(
        (name, m, "machine", least)
        for m in (128, 512)
        for name, least in (("int4 g32", 0.70), ("int4 g32 a128", 0.77), ("int4 g128", 0.85))
    ),
    *(("int4 g128", m, of, 1.4) for m in (128, 512) for of in ("ort nb4 b128", "ov int4 g128")),
    *(
        (f"int4 g{g}", m, of, least)
        for m in (2, 4, 8, 16, 32)
        for g in (32, 128)
        for of, least in ((f"ort nb4 b{g}", 1.2), (f"ov int4 g{g}", 1.0))
    ),
    ("ternary", 1, "machine", 0.85),
    ("ternary", 1, "ort nb2 b64", 1.4),
    ("ternary", 128, "machine", 0.90),
    *(("int4 g32 float", m, "ort nb4 b32 float", 1.0) for m in (1, 2, 4, 8, 16, 32, 128, 512)),
)


def measure(chosen, m, k, n, threads, rounds):
    """Engine → ratios as medians over rounds, and how many rounds did not count."""
    probe = Probe(threads)
    for engine in chosen:
        nbytes = k * n * engine.bits / 8
        engine.build(m, k, n, threads, max(1, round(COLD_BYTES / nbytes)) if m <= FEW_ROWS else 1)
        engine.seconds()
    taken = []
    for _ in range(rounds):
        read, dot = probe.bytes_per_second(), probe.products_per_second()
        taken.append((read, dot, {e.name: e.seconds() for e in chosen}))
    best = max(dot for _, dot, _ in taken)
    quiet = [each for each in taken if each[1] >= 0.8 * best]
    found = {}
    for e in chosen:
        ratios = {"machine": []} | {rival: [] for rival in e.rivals if rival in taken[0][2]}
        for read, dot, took in quiet:
            memory = k * n * e.bits / 8 / read if m <= 2 * FEW_ROWS else 0.0
            ratios["machine"].append(max(memory, m * k * n / dot) / took[e.name])
            for rival in ratios.keys() - {"machine"}:
                ratios[rival].append(took[rival] / took[e.name])
        found[e.name] = {of: round(statistics.median(v), 3) for of, v in ratios.items()}
        e.close()
    return found, rounds - len(quiet)


def say_bars(results):
    """Each bar with its worst figure, over shapes and threads."""
    for name, m, of, least in BARS:
        figures = {
            f"{r['k']}x{r['n']} {r['threads']} thr.": r["engines"][name][of]
            for r in results
            if r["m"] == m and of in r["engines"].get(name, {})
        }
        if figures:
            where = min(figures, key=figures.get)
            verdict = "met" if figures[where] >= least else "MISSED"
            values = ", ".join(f"{v:.2f}" for v in figures.values())
            print(
                f"{verdict:6s} {name}, M={m}, of {of}: at least {least}, found {values} (least: {where})"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the ratios to this file")
    parser.add_argument("--rows", default="1,2,4,8,16,32,128,512")
    parser.add_argument("--shapes", default="4096x4096,4096x11008", help="KxN, ...")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument(
        "--engines", default="", help="parts of names, comma-separated; rivals come along"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bars", action="store_true", help="say which bars are met")
    given = parser.parse_args()
    wanted = [w.strip() for w in given.engines.split(",") if w.strip()]
    known = engines() + ggml.engines()
    chosen = [e for e in known if not wanted or any(w in e.name for w in wanted)]
    rivals = {r for e in chosen for r in e.rivals} - {e.name for e in chosen}
    chosen += [e for e in known if e.name in rivals]
    results = []
    for shape in given.shapes.split(","):
        k, n = map(int, shape.split("x"))
        for threads in map(int, given.threads.split(",")):
            for m in map(int, given.rows.split(",")):
                found, lost = measure(chosen, m, k, n, threads, given.rounds)
                results.append(
                    {
                        "k": k,
                        "n": n,
                        "threads": threads,
                        "m": m,
                        "lost_rounds": lost,
                        "engines": found,
                    }
                )
                print(f"K={k} N={n} threads={threads} M={m} ({lost} rounds lost)")
                for name, values in found.items():
                    print(
                        f"  {name:18s}", ", ".join(f"{v:.2f} of {of}" for of, v in values.items())
                    )
                sys.stdout.flush()
    if given.bars:
        say_bars(results)
    if given.json:
        about = {"isa": native.load().isa, "onnxruntime": onnxruntime.__version__}
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
