"""Write the graphs of this folder anew: `python export.py [NAME ...]`, in an environment with torch and onnxscript.

A graph is stored as ONNX text. Float tensors of more than `SMALL` elements are not stored: they stand there as inputs
of the graph named `w.*`, and `load.py` draws them from a seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nets
import onnx
import onnx.printer
import torch

SMALL = 24
HERE = Path(__file__).parent
OPSETS = (18, 20, 23, 24)


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(14).reshape(2, 7)}


def masked() -> dict[str, torch.Tensor]:
    return tokens() | {"attention_mask": torch.ones(2, 7, dtype=torch.int64)}


def cached() -> dict[str, object]:
    return tokens() | {"past": [torch.randn(2, 2, 5, nets.HEAD) for _ in range(2)]}


BASE = {
    "llama": (nets.Llama, {}, tokens),
    "bert": (nets.Bert, {}, masked),
    "gpt": (nets.Gpt, {}, tokens),
    "vit": (nets.Vit, {}, lambda: {"image": torch.randn(2, 3, 16, 16)}),
}
MORE = {
    "llama_mha_tied": (nets.Llama, {"layers": 1, "kv_heads": 4, "tied": True}, tokens),
    "llama_bias": (nets.Llama, {"layers": 1, "bias": True}, tokens),
    "llama_qk_norm": (nets.Llama, {"layers": 1, "qk_norm": True}, tokens),
    "llama_parallel": (nets.Llama, {"layers": 1, "parallel": True}, tokens),
    "llama_sandwich": (nets.Llama, {"layers": 1, "sandwich": True}, tokens),
    "llama_experts": (nets.Llama, {"layers": 1, "experts": True}, tokens),
    "llama_cache": (nets.Llama, {"layers": 1, "cache": True}, cached),
    "gpt_parallel": (nets.Gpt, {"layers": 1, "parallel": True}, tokens),
    "torch_encoder": (nets.TorchEncoder, {}, lambda: {"x": torch.randn(2, 7, 12)}),
}


def dynamic(value: object, name: str) -> object:
    if isinstance(value, list):
        return [dynamic(v, "past") for v in value]
    auto = torch.export.Dim.DYNAMIC
    if name == "image":
        return {0: auto}
    return {0: auto, 2: auto} if name == "past" else {0: auto, 1: auto}


def export(name: str, opset: int) -> str:
    kind, options, make = (BASE | MORE)[name]
    torch.manual_seed(0)
    net = kind(**options).eval()
    with torch.no_grad():
        for p in net.parameters():  # no two alike: the exporter merges equal tensors
            p.add_(0.3 * torch.randn_like(p))
    feeds = make()
    shapes = {k: dynamic(v, k) for k, v in feeds.items()}
    program = torch.onnx.export(
        net,
        (),
        kwargs=feeds,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=shapes,
        verbose=False,
    )
    return text(program.model_proto)


def text(model: onnx.ModelProto) -> str:
    g = model.graph
    rename: dict[str, str] = {}
    stored = {t.name: t for t in g.initializer}
    for i, node in enumerate(g.node):
        node.name = f"n{i}"
        node.doc_string = ""
        del node.metadata_props[:]
        for out in node.output:
            rename[out] = f"v{len(rename)}"
    for t in stored.values():
        size = 1
        for d in t.dims:
            size *= d
        is_drawn = t.data_type == onnx.TensorProto.FLOAT and size > SMALL
        rename[t.name] = f"{'w' if is_drawn else 'c'}.{t.name.removeprefix('c.')}"
    for v in (*g.input, *g.output):
        rename[v.name] = v.name
    for node in g.node:
        node.input[:] = [rename[n] if n else n for n in node.input]
        node.output[:] = [rename[n] for n in node.output]
    infos = list(g.value_info)
    del g.value_info[:], g.initializer[:], g.metadata_props[:], model.metadata_props[:]
    for info in infos:
        if info.name in rename and info.name not in stored:
            info.name = rename[info.name]
            del info.metadata_props[:]
            g.value_info.append(info)
    for t in stored.values():
        name = rename[t.name]
        if name.startswith("w."):
            g.input.append(onnx.helper.make_tensor_value_info(name, t.data_type, list(t.dims)))
        else:
            t.name, t.doc_string = name, ""
            del t.metadata_props[:]
            g.initializer.append(t)
    for v in (*g.input, *g.output):
        del v.metadata_props[:]
    return str(onnx.printer.to_text(model)) + "\n"


def main(names: list[str]) -> None:
    for name in names or [*BASE, *MORE]:
        for opset in OPSETS if name in BASE else (20, 23):
            made = export(name, opset)
            onnx.parser.parse_model(made)
            (HERE / f"{name}_{opset}.txt").write_text(made)
            print(f"{name}_{opset}: {len(made)} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
