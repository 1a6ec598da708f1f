"""OpenVINO, by transformers' own exporter: one graph, which keeps what it has read between calls."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.checkpoint.beside import WHOLE
from twofold.exports.formats import Source, Written, export_format
from twofold.exports.graph import need_exporters, other_inputs, save_graph, trace

GRAPH = "openvino_model.xml"


class OpenVinoDecoder:
    """A graph of ``twofold export --to openvino``, on the processor, in float32."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        os.environ.setdefault("OPENVINO_TELEMETRY", "0")
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        self._request = compiled.create_infer_request()
        ports = {next(iter(port.get_names())): port for port in compiled.inputs}
        self._names = set(ports)
        shape = ports["input_ids"].get_partial_shape()
        self.sizes = tuple(size.get_length() if size.is_static else None for size in shape)
        self._logits = next(port for port in compiled.outputs if "logits" in port.get_names())
        self.start()

    def start(self) -> None:
        self._request.reset_state()
        self._read = 0

    def read(self, ids: Tensor) -> Tensor:  # (batch, 1 or tokens, vocabulary)
        out = self._request.infer(other_inputs(self._names, ids.cpu().numpy(), self._read))
        self._read += ids.shape[1]
        return torch.from_numpy(np.array(out[self._logits]))


@export_format(
    "openvino",
    needs=("openvino",),
    weights=(".xml", ".bin"),
    dtypes=("float32",),
    beside=WHOLE,
    graph=GRAPH,
    decoder=OpenVinoDecoder,
)
def write_openvino(source: Source, folder: Path) -> Written:
    """Write the graph, its weights beside it, and the configuration."""
    need_exporters("openvino")
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    exported = trace("openvino", OpenVINOExporter(), OpenVINOConfig(dynamic=True), source.model, source.loaded.name)
    for parameter in exported.program.get_parameters():  # settings that the tracing has used up
        if not parameter.output(0).get_target_inputs():
            exported.program.remove_parameter(parameter)
    notes = save_graph(exported, weight_products(exported.program), source, folder)
    return Written(lambda: OpenVinoDecoder(folder / GRAPH), notes)


def weight_products(program: Any) -> int:
    """Count the products in a graph one side of which is a weight, converted or turned round or not."""

    def is_weight(node: Any) -> bool:
        while node.get_type_name() in ("Convert", "Transpose"):
            node = node.input_value(0).get_node()
        return bool(node.get_type_name() == "Constant")

    return sum(
        node.get_type_name() == "MatMul" and any(is_weight(i.get_source_output().get_node()) for i in node.inputs())
        for node in program.get_ops()
    )
