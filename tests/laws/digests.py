"""Prints the digest of every odd graph's (and two zoo models') result as JSON: `python digests.py THREADS`."""

from __future__ import annotations

import hashlib
import json
import sys

import qgraph
from qgraph import models, recipe
from qgraph.models.odd import ODD

ZOO = ("tiny-cnn", "tiny-llama")
RECIPES = ("int4", "int8-dynamic")


def digests(threads: int) -> dict[str, str]:
    """SHA-256 of each result's bytes, by model, recipe and target."""
    builders = {**ODD, **{name: lambda n=name: models.build(n) for name in ZOO}}
    found = {}
    for name, build in builders.items():
        for each in RECIPES:
            eager = recipe.PRESETS[each].model_copy(update={"min_elements": 0})
            for target in ("ort", "onnx"):
                result = qgraph.optimize(
                    build(), eager, target=target, threads=threads, verify="off", inspect=False
                )
                content = result.to_proto().SerializeToString(deterministic=True)
                found[f"{name} {each} {target}"] = hashlib.sha256(content).hexdigest()
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(digests(int(sys.argv[1]))))
