"""ONNX, by transformers' own exporter, for ONNX Runtime: one graph, which reads a prompt or one token more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.checkpoint.beside import WHOLE
from twofold.exports.formats import Source, Written, export_format
from twofold.exports.graph import need_exporters, other_inputs, save_graph, trace

GRAPH = "model.onnx"
PAST, PRESENT = "input.past_key_values", "output.past_key_values"
INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


class OnnxDecoder:
    """A graph of ``twofold export --to onnx``, on the processor."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        self._session = open_session(path, threads)
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]
        self._past = [name for name in self._inputs if name.startswith(PAST)]
        self.sizes = tuple(size if isinstance(size, int) else None for size in self._inputs["input_ids"].shape)
        self.start()

    def start(self) -> None:
        self._cache: dict[str, Any] = {}
        self._read = 0

    def read(self, ids: Tensor) -> Tensor:  # (batch, 1 or tokens, vocabulary)
        cache = self._cache or {name: self._value(self._empty(name, len(ids))) for name in self._past}
        feed = other_inputs(self._inputs.keys() - set(self._past), ids.cpu().numpy(), self._read)
        values = {name: self._value(array) for name, array in feed.items()} | cache
        out = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, values), strict=True))
        self._read += ids.shape[1]
        self._cache = {name: out[PRESENT + name.removeprefix(PAST)] for name in self._past}
        return torch.from_numpy(out["logits"].numpy())

    def _empty(self, name: str, batch: int) -> np.ndarray:
        """Make a cache of no tokens: sizes that are no numbers are the batch, which comes first, and the tokens."""
        node = self._inputs[name]
        shape = [int(size) if str(size).isdigit() else 0 for size in node.shape]
        if shape:
            shape[0] = batch
        return np.zeros(shape, dtype=INTEGERS.get(node.type, np.float32))


def open_session(path: Path, threads: int | None = None) -> Any:
    """Open a graph in ONNX Runtime, on the processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@export_format(
    "onnx",
    needs=("onnx", "onnxscript", "onnxruntime"),
    weights=(".onnx", ".onnx.data"),
    dtypes=("float32",),
    beside=WHOLE,
    graph=GRAPH,
    decoder=OnnxDecoder,
)
def write_onnx(source: Source, folder: Path) -> Written:
    """Write the graph, its weights beside it, and the configuration."""
    need_exporters("onnx")
    from transformers.exporters import OnnxConfig, OnnxExporter

    exported = trace("onnx", OnnxExporter(), OnnxConfig(dynamic=True), source.model, source.loaded.name)
    forget_trace(exported.program)
    notes = save_graph(exported, weight_products(exported.program), source, folder)
    return Written(lambda: OnnxDecoder(folder / GRAPH), notes)


def weight_products(program: Any) -> int:
    """Count the products in a graph one side of which is a weight, turned round or not."""
    weights = set(program.graph.initializers)
    turned = {n.outputs[0].name for n in program.graph if n.op_type == "Transpose" and n.inputs[0].name in weights}
    return sum(
        n.op_type in ("MatMul", "Gemm") and any(i is not None and i.name in weights | turned for i in n.inputs)
        for n in program.graph
    )


def forget_trace(program: Any) -> None:
    """Drop where in which Python file each node came from: it is large, and names folders of this machine."""
    graphs = [program.graph, *(function.graph for function in program.functions.values())]
    for part in [program, *graphs, *(node for graph in graphs for node in graph)]:
        part.metadata_props.clear()
