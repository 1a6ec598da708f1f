"""Exported graphs, run by ONNX Runtime and OpenVINO alone: the cache stays where the runtime keeps it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.exports.decoding import Decoder

GRAPHS = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
PAST, PRESENT = "input.past_key_values", "output.past_key_values"
INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


def open_export(folder: Path, threads: int | None = None) -> Decoder:
    """The decoder of an exported folder.

    Args:
        threads: for the runtime; by default those that PyTorch has.

    Raises:
        TwofoldError: if the folder holds no graph, or its runtime is not installed.
    """
    for name, decoder in DECODERS.items():
        if (folder / GRAPHS[name]).is_file():
            return decoder(folder / GRAPHS[name], threads)
    raise TwofoldError(f"{folder} holds no exported graph; make one with twofold export --to onnx or --to openvino")


def other_inputs(
    names: set[str],
    ids: np.ndarray,  # (batch, tokens)
    read: int,
) -> dict[str, np.ndarray]:
    """What a graph may ask for beside the tokens and the cache, after ``read`` tokens.

    Raises:
        TwofoldError: if it asks for anything else.
    """
    batch, tokens = ids.shape
    known = {
        "input_ids": ids,
        "position_ids": np.broadcast_to(np.arange(read, read + tokens, dtype=np.int64), (batch, tokens)),
        "cache_position": np.arange(read, read + tokens, dtype=np.int64),
        "attention_mask": np.ones((batch, read + tokens), dtype=np.int64),
        "beam_idx": np.arange(batch, dtype=np.int32),
    }
    if names - known.keys():
        raise TwofoldError(
            f"the graph asks for {', '.join(sorted(names - known.keys()))}, which no decoding of text has"
        )
    return {name: np.ascontiguousarray(known[name]) for name in names}


class OnnxDecoder:
    """A graph of ``twofold export --to onnx``, on the processor.

    Attributes:
        sizes: how many sequences and how many tokens of each it reads at once; None for any number.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self._outputs = [one.name for one in self._session.get_outputs()]
        self._past = [name for name in self._inputs if name.startswith(PAST)]
        self.sizes = tuple(size if isinstance(size, int) else None for size in self._inputs["input_ids"].shape)
        self.start()

    def start(self) -> None:
        self._cache: dict[str, Any] = {}
        self._read = 0

    def read(
        self,
        ids: Tensor,  # (batch, tokens)
    ) -> Tensor:  # (batch, 1 or tokens, vocabulary)
        cache = self._cache or {name: self._value(self._empty(name, len(ids))) for name in self._past}
        feed = other_inputs(self._inputs.keys() - set(self._past), ids.cpu().numpy(), self._read)
        values = {name: self._value(array) for name, array in feed.items()} | cache
        out = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, values), strict=True))
        self._read += ids.shape[1]
        self._cache = {name: out[PRESENT + name.removeprefix(PAST)] for name in self._past}
        return torch.from_numpy(out["logits"].numpy())

    def _empty(self, name: str, batch: int) -> np.ndarray:
        """A cache of no tokens: sizes that are no numbers are the batch, which comes first, and the tokens."""
        one = self._inputs[name]
        shape = [int(size) if str(size).isdigit() else 0 for size in one.shape]
        if shape:
            shape[0] = batch
        return np.zeros(shape, dtype=INTEGERS.get(one.type, np.float32))


class OpenVinoDecoder:
    """A graph of ``twofold export --to openvino``, on the processor, in float32.

    Attributes:
        sizes: how many sequences and how many tokens of each it reads at once; None for any number.
    """

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

    def read(
        self,
        ids: Tensor,  # (batch, tokens)
    ) -> Tensor:  # (batch, 1 or tokens, vocabulary)
        out = self._request.infer(other_inputs(self._names, ids.cpu().numpy(), self._read))
        self._read += ids.shape[1]
        return torch.from_numpy(np.array(out[self._logits]))


DECODERS: dict[str, type[OnnxDecoder | OpenVinoDecoder]] = {"onnx": OnnxDecoder, "openvino": OpenVinoDecoder}
