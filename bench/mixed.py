"""Mixed precision against uniform formats and against the hand rule, at the same average bits.

    python bench/mixed.py [--models tiny-llama,stories260K] [--target ort-qgraph] [--bits 4.5,4,3] [--sequential]

Models, samples and what is measured are those of bench/solvers.py: every MatMul is quantized, tables stay float, the
figures are KL(float || quantized) of the weights alone on held-out text, in nats per token. All columns have the same
formats to take from, and each weight in each format is solved once, by --solver with the inputs of the float model;
--sequential solves the mixtures and what they are compared with again, with the inputs of the quantized model.

The hand rule is llama.cpp's: the first and the last eighth of the blocks are one notch higher than the others, a notch
being twice the bits ("hand", where there are such), or the next of these formats ("step").
A mixture is judged against the smallest uniform format and the smallest of both hand rules with at least its bits. What
beats it with the fewest bits is said too.
--spearman N: the rank correlation of predicted and measured losses over N random assignments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "e2e"), str(ROOT / "bench")]

import int4_error  # noqa: E402
import real_data  # noqa: E402
import solvers  # noqa: E402

from qgraph import accuracy, data, files, pipeline, registry  # noqa: E402
from qgraph import recipe as recipes  # noqa: E402
from qgraph.evaluate import sessions  # noqa: E402
from qgraph.mixed import costs, items, knapsack, losses, mixtures, swaps  # noqa: E402
from qgraph.passes import assign_precision  # noqa: E402
from qgraph.spec import QuantSpec  # noqa: E402
from qgraph.spool import Spool  # noqa: E402

FORMATS = (
    "uint2.g64.asym.f16", "uint2.g32.asym.f16", "uint2.g16.asym.f16", "uint4.g128.asym.f16", "uint4.g64.asym.f16",
    "uint4.g32.asym.f16", "uint4.g16.asym.f16", "int8.g128.f16", "int4.g256.f16", "int4.g128.f16", "int4.g64.f16",
    "int4.g32.f16", "int4.g16.f16",
    "uint2.g64.asym", "uint2.g32.asym", "uint2.g16.asym", "uint4.g128.asym", "uint4.g64.asym",
    "uint4.g32.asym", "uint4.g16.asym", "int8.g128", "int8.g32",
    "uint3.g128.asym.f16", "uint3.g64.asym.f16", "uint3.g32.asym.f16", "int3.g128.f16", "int3.g64.f16",
)  # fmt: skip
JUDGED = {"tiny-llama": 32, "tiny-gpt": 32, "stories260K": 60}  # texts that are measured
MODELS = ("tiny-llama", "stories260K")
KINDS = ("uniform", "hand", "step")


def held_out(name: str) -> Iterator[dict[str, Any]]:
    """What is measured: nothing of it was calibrated on."""
    if name == "stories260K":
        path = real_data.data("text/tinystories/tinystories_0_699.json")
        encoder = real_data.SentencePieces(real_data.data("lm/stories260K/tok512.bin"))
        for story in json.loads(path.read_text("utf-8"))[600:]:
            yield {"input_ids": encoder.encode(story)[: real_data.CONTEXT][None]}
        return
    from qgraph.models import data as own

    tokens = own.eval_tokens()[solvers.SPLIT :]
    for start in range(0, len(tokens) - solvers.CONTEXT, solvers.CONTEXT):
        yield {"input_ids": tokens[start : start + solvers.CONTEXT][None]}


class Study:
    """One model: its items with losses, and what measures mixtures on held-out text.

    Args:
        name: of the model.
        folder: an empty folder.
        samples: calibration samples on which mixtures are measured while choosing.
        solver: of all weights.
        target: says which formats there are; not all take 3 bits.
    """

    def __init__(
        self, name: str, folder: Path, samples: int, solver: str, target: str = "ort"
    ) -> None:
        path = int4_error._located(solvers.MODELS[name].path)
        self.model, self.name = files.load(path), name
        self.recipe = recipes.load(recipe_of(FORMATS))
        given = list(solvers.MODELS[name].samples())
        self.dataset = data.load(given, data.inputs_of(path))
        checkpoint = accuracy.Checkpoint(stops=True)
        passes = pipeline.Pipeline(self.recipe.pipeline)
        goal = registry.get("target", target)
        ctx = pipeline.Context(goal, self.recipe, data=self.dataset)
        passes.run(files.load(path), ctx, [checkpoint])
        assert checkpoint.kept is not None
        self.trials = accuracy.Trials(passes, *checkpoint.kept)
        items._LEAST_PEAK = math.inf  # rivals with float32 scales too
        self.items = items.find(self.trials, self.recipe)
        kept = {o.choice for item in self.items for o in item.options}
        self.formats = [f for f in FORMATS if f in kept]
        found = [w for item in self.items for w in item.weights]
        model = self.trials.model
        seen, unseen = folder / "seen", folder / "unseen"
        seen.mkdir()
        unseen.mkdir()
        few = given[:: max(len(given) // samples, 1)][:samples]
        self.judged = judged = list(itertools.islice(held_out(name), JUDGED[name]))
        self.seen = mixtures.Mixtures(model, found, few, (), seen, 0, mixtures.loss)
        self.unseen = mixtures.Mixtures(model, found, judged, (), unseen, 0, mixtures.loss)
        costs.QUICK = solver
        solved = costs.solve(model, self.items, self.dataset, ctx, Spool(folder))
        self.seen.know(solved)
        self.unseen.know(solved)
        losses.measure(self.items, self.seen, lambda what, share: None)
        self.elements = sum(item.elements for item in self.items)

    def bits(self, chosen: Sequence[int]) -> float:
        return 8 * items.total(self.items, chosen) / self.elements

    def loss(self, chosen: Sequence[int]) -> float:
        return self.unseen.loss(losses.mixture(self.items, chosen))

    def uniform(self, text: str) -> list[int]:
        """One format for all; rows that are too short for its groups have shorter ones.

        Weights that are too small for a kernel of 3 bits have 4.
        """
        found = []
        for item in self.items:
            offered = [o.specs for o in item.options]
            ways = [
                tuple(str(assign_precision.fit_group(asked, w.shape[1])) for w in item.weights)
                for asked in map(QuantSpec.parse, (text, text.replace("int3", "int4")))
            ]
            found.append(offered.index(ways[0] if ways[0] in offered else ways[1]))
        return found

    def hand(self, low: str, high: str) -> list[int]:
        """A higher format in the first and the last eighth of the blocks."""
        blocks = [int(m[1]) if (m := re.search(r"\.(\d+)\.", i.label)) else -1 for i in self.items]
        count = max(blocks) + 1
        eighth = math.ceil(count / 8)
        raised = {*range(eighth), *range(count - eighth, count)}
        return [
            h if b in raised else l
            for b, l, h in zip(blocks, self.uniform(low), self.uniform(high), strict=True)
        ]

    def rivals(self) -> dict[str, list[int]]:
        """What mixtures are compared with, by title: all uniform formats and hand rules."""
        found = {f"uniform {f}": self.uniform(f) for f in self.formats}
        for low in self.formats:
            if low.startswith("uint2"):
                high = low.replace("uint2", "uint4")
            elif low.startswith("uint4"):
                group = "g32" if low == "uint4.g32.asym" else "g128"
                high = f"int8.{group}{'.f16' * low.endswith('.f16')}"
            else:
                continue
            found[f"hand {low}"] = self.hand(low, high)
        for scale in ("", ".f16"):
            ladder = [f for f in self.formats if "asym" in f and f.endswith(".f16") == bool(scale)]
            ladder = [
                *sorted(ladder, key=lambda f: self.bits(self.uniform(f))),
                f"int8.g128{scale}",
            ]
            found |= {f"step {a}": self.hand(a, b) for a, b in itertools.pairwise(ladder)}
        return found

    def size(self, bits: float) -> knapsack.Limit:
        sizes = [[float(o.nbytes) for o in item.options] for item in self.items]
        return knapsack.Limit(sizes, bits * self.elements / 8)

    def knapsack(self, bits: float) -> list[int]:
        """The least predicted loss for so many bits."""
        values = [[o.loss for o in item.options] for item in self.items]
        found = knapsack.solve(values, [self.size(bits)])
        assert found is not None
        return found

    def mixed(self, bits: float) -> tuple[list[int], swaps.Swaps]:
        """What qgraph chooses for so many bits."""
        size = self.size(bits)
        found = swaps.improve(
            self.items, self.knapsack(bits), self.seen,
            lambda values, chosen, moves: knapsack.solve(
                values, [size, knapsack.moves(values, chosen, moves)]
            ),
            lambda: False,
        )  # fmt: skip
        return found.chosen, found

    def sequential(self, chosen: Sequence[int]) -> float:
        """The same mixture solved with the inputs that the weights before it leave."""
        specs = losses.mixture(self.items, chosen)
        recipe = self.recipe.model_copy(update={"rules": (*pins(specs), self.recipe.rules[0])})
        with tempfile.TemporaryDirectory() as folder:
            work, _ = self.trials.run(recipe, Spool(folder), inspect=False)
            output = files.save(work, Path(folder) / "q.onnx")
            int4_error._use_float_activations(output)
            session = sessions.open_session(output)
            outputs = (session.run(None, feeds) for feeds in self.judged)
            return mixtures.loss(self.unseen._expected.judge(outputs)[0])


def recipe_of(formats: Sequence[str]) -> dict[str, Any]:
    rules = [
        {"id": "tables", "ops": ["Gather", "Slice"], "weights": "float", "reason": "as others do"},
        {"id": "linear", "weights": "uint4.g32.asym", "solver": "round-descent", "choices": list(formats)},
    ]  # fmt: skip
    return {"name": "pure", "rules": rules, "min_elements": 1}


def pins(specs: Mapping[str, str]) -> list[recipes.Rule]:
    held: dict[str, list[str]] = {}
    for name, spec in specs.items():
        held.setdefault(spec, []).append(name)
    return [
        recipes.Rule(names=tuple(names), weights=(spec,), solver="round-descent")
        for spec, names in held.items()
    ]


def spearman(study: Study, count: int) -> dict[str, Any]:
    """Predicted losses against those measured on held-out text, over random assignments."""
    from scipy import stats

    rng = np.random.default_rng(0)
    made = [[int(rng.integers(len(i.options))) for i in study.items] for _ in range(count)]
    predicted = [losses.predicted(study.items, c) for c in made]
    measured = [study.loss(c) for c in made]
    ratio = np.array(measured) / predicted
    return {
        "count": count,
        "spearman": float(stats.spearmanr(predicted, measured).statistic),
        "measured": [min(measured), max(measured)],
        "measured_over_predicted": [float(ratio.min()), float(ratio.max())],
    }


def study(name: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One model."""
    start = time.process_time()
    it = Study(name, folder, given.samples, given.solver, given.target)
    took = time.process_time() - start
    print(
        f"{name}: {len(it.items)} weights, sensitivities took {took:.0f} processor seconds",
        flush=True,
    )
    if given.spearman:
        ranks = spearman(it, given.spearman)
        print(f"{name}: {ranks}", flush=True)
    result = compared(it, [float(bits) for bits in given.bits.split(",")], given.sequential)
    return result | ({"ranks": ranks} if given.spearman else {})


def compared(it: Study, budgets: Sequence[float], sequential: bool) -> dict[str, Any]:
    """Mixtures and, from their own bits on upwards, their rivals: up to the first that is better."""
    name, others = it.name, it.rivals()
    rows: dict[str, dict[str, float]] = {}

    def row(title: str, mixture: list[int]) -> dict[str, float]:
        if title not in rows:
            rows[title] = {"bits": it.bits(mixture), "kl": it.loss(mixture)}
            print(f"{name:12s} {title:26s} {rows[title]}", flush=True)
        return rows[title]

    chosen = {}
    for bits in budgets:
        row(f"knapsack {bits:g}", it.knapsack(bits))
        title = f"mixed {bits:g}"
        chosen[title], found = it.mixed(bits)
        own = row(title, chosen[title])
        print(f"{name:12s} {found.tried} mixtures tried, {found.taken} taken", flush=True)
        kinds, is_beaten = set(KINDS), False
        for rival in sorted(others, key=lambda t: it.bits(others[t])):
            if it.bits(others[rival]) < own["bits"] or (is_beaten and not kinds):
                continue
            is_beaten |= row(rival, others[rival])["kl"] <= own["kl"]
            kinds.discard(rival.partition(" ")[0])
        print(f"{name}: {verdict(rows, title, 'kl')}", flush=True)
    for title in chosen if sequential else ():
        for each in (title, *nearest(rows, title).values()):
            if "sequential" not in rows[each]:
                rows[each]["sequential"] = it.sequential(chosen.get(each) or others[each])
                print(f"{name:12s} {each:26s} {rows[each]}", flush=True)
        print(f"{name}: {verdict(rows, title, 'sequential')}", flush=True)
    return {"rows": rows}


def nearest(rows: Mapping[str, Mapping[str, float]], title: str) -> dict[str, str]:
    """Of each kind the smallest rival that has at least the bits of a mixture."""
    bits = rows[title]["bits"]
    found = {}
    for kind in KINDS:
        held = [(r["bits"], r["kl"], t) for t, r in rows.items() if t.startswith(kind)]
        found[kind] = min(h for h in held if h[0] >= bits)[2]
    return found


def verdict(rows: Mapping[str, Mapping[str, float]], title: str, key: str) -> str:
    """A mixture beside its rivals, in a line."""
    bits, kl = rows[title]["bits"], rows[title][key]
    told = [f"{title}, {key}: {bits:.3f} bits {kl:.4g}"]
    for rival in nearest(rows, title).values():
        other = rows[rival]
        said = "beats" if kl < other[key] else "LOSES TO"
        told.append(f"{said} {rival} {other['bits']:.3f} bits {other[key]:.4g}")
    better = [
        (r["bits"], t)
        for t, r in rows.items()
        if t.startswith(KINDS) and r["bits"] >= bits and r.get(key, math.inf) <= kl
    ]
    if better and key == "kl":
        more, rival = min(better)
        told.append(f"first beaten by {rival} {more:.3f} bits {rows[rival][key]:.4g}")
    return "; ".join(told)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--bits", default="4.5,4,3")
    parser.add_argument("--samples", type=int, default=16, help="on which mixtures are measured")
    parser.add_argument("--solver", default="round-descent")
    parser.add_argument("--target", default="ort")
    parser.add_argument(
        "--rounds", type=int, default=swaps.ROUNDS, help="of knapsacks with measured steps"
    )
    parser.add_argument("--spearman", type=int, default=0, metavar="N")
    parser.add_argument("--sequential", action="store_true", help="solve again in sequence")
    parser.add_argument("--json", type=Path, help="write the result there")
    given = parser.parse_args()
    swaps.ROUNDS = given.rounds
    result = {}
    for name in given.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            result[name] = study(name, given, Path(folder))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
