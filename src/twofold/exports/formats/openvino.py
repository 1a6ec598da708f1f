"""OpenVINO, by transformers' own exporter: one graph, which keeps what it has read between calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twofold.exports.base import Source, Written, export_format
from twofold.exports.formats.onnx import finish_graph
from twofold.exports.graph import need_exporters, products_note, trace
from twofold.exports.runtimes import GRAPHS, OpenVinoDecoder


@export_format("openvino", needs=("openvino",))
def write_openvino(source: Source, folder: Path) -> Written:
    """The graph, its weights beside it, the configuration and the tokenizer."""
    need_exporters("openvino")
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    exported = trace("openvino", OpenVINOExporter(), OpenVINOConfig(dynamic=True), source.model, source.loaded.name)
    for parameter in exported.program.get_parameters():  # settings that the tracing has used up
        if not parameter.output(0).get_target_inputs():
            exported.program.remove_parameter(parameter)
    found = weight_products(exported.program)
    exported.save_pretrained(folder)
    finish_graph(source, folder)
    return Written(lambda: OpenVinoDecoder(folder / GRAPHS["openvino"]), [products_note(found, source.model)])


def weight_products(program: Any) -> int:
    """Products in a graph one side of which is a weight, converted or turned round or not."""

    def is_weight(node: Any) -> bool:
        while node.get_type_name() in ("Convert", "Transpose"):
            node = node.input_value(0).get_node()
        return bool(node.get_type_name() == "Constant")

    return sum(
        node.get_type_name() == "MatMul" and any(is_weight(i.get_source_output().get_node()) for i in node.inputs())
        for node in program.get_ops()
    )
