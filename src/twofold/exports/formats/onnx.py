"""ONNX, by transformers' own exporter, for ONNX Runtime: one graph, which reads a prompt or one token more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twofold.exports.base import Source, Written, export_format
from twofold.exports.formats.dense import save_beside
from twofold.exports.graph import need_exporters, products_note, trace
from twofold.exports.runtimes import GRAPHS, OnnxDecoder


@export_format("onnx", needs=("onnx", "onnxscript", "onnxruntime"))
def write_onnx(source: Source, folder: Path) -> Written:
    """The graph, its weights beside it, the configuration and the tokenizer."""
    need_exporters("onnx")
    from transformers.exporters import OnnxConfig, OnnxExporter

    exported = trace("onnx", OnnxExporter(), OnnxConfig(dynamic=True), source.model, source.loaded.name)
    program: Any = exported.program
    forget_trace(program)
    exported.save_pretrained(folder)
    finish_graph(source, folder)
    return Written(
        lambda: OnnxDecoder(folder / GRAPHS["onnx"]), [products_note(weight_products(program), source.model)]
    )


def weight_products(program: Any) -> int:
    """Products in a graph one side of which is a weight, turned round or not."""
    weights = set(program.graph.initializers)
    turned = {n.outputs[0].name for n in program.graph if n.op_type == "Transpose" and n.inputs[0].name in weights}
    return sum(
        n.op_type in ("MatMul", "Gemm") and any(i is not None and i.name in weights | turned for i in n.inputs)
        for n in program.graph
    )


def forget_trace(program: Any) -> None:
    """Drop where in which Python file each node came from: it is large, and names folders of this machine."""
    for graph in [program.graph, *(function.graph for function in program.functions.values())]:
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
    program.metadata_props.clear()


def finish_graph(source: Source, folder: Path) -> None:
    """The tokenizer, and a configuration that does not say that the folder is a factored checkpoint."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_beside(source, folder)
