"""What a graph is traced from: one forward that reads any number of tokens after any number that were read before.

transformers' exporters make two graphs for generation, of a prompt and of one token, each with a copy of the weights. One graph
of several tokens after a cache does for both, since an empty cache is a cache too. So the weights are on the disk once.
"""

from __future__ import annotations

import inspect
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from twofold.errors import TwofoldError
from twofold.exports.decoding import Decoder
from twofold.exports.formats import FORMATS, Source
from twofold.host.quiet import first_line
from twofold.model.written import write_generation
from twofold.task.causal_lm import need_writer


def trace(kind: str, exporter: Any, config: Any, model: Any, name: str) -> Any:
    """Export a model as one graph that gives the logits of the last token alone where the architecture can.

    Args:
        kind: the name of the format, for messages.
        exporter: one of transformers', with its configuration.

    Raises:
        TwofoldError: if the model does not decode with a cache, or has what the format can't express.
    """
    need_writer(model, name, f"and `to={kind}` takes models that do; use `to=dense` or `to=portable`")
    samples = torch.tensor([[3, 4, 5, 6, 7], [7, 6, 5, 4, 3]])  # rows and tokens, so that both sizes stay open
    from transformers.exporters.utils import decompose_for_generation

    with exporting(kind, model, name):
        stages = decompose_for_generation(
            model, {"input_ids": samples, "attention_mask": torch.ones_like(samples)}, multi_token_decode=True
        )
        inputs = stages["decode"][1]
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1
        return exporter.export(model, inputs, config)


def need_exporters(kind: str) -> None:
    """Refuse a transformers whose exporters do not write this.

    Raises:
        TwofoldError: naming the version that is known to.
    """
    try:
        from transformers.exporters import ExportedModel, OpenVINOExporter  # noqa: F401
    except ImportError as error:
        raise TwofoldError(
            f"`to={kind}` is written by exporters that this transformers does not have ({error}); install 5.23 or newer"
        ) from error


@contextmanager
def exporting(kind: str, model: Any, name: str) -> Iterator[None]:
    """Keep what an exporter says of itself out of our output, and tell in a sentence what it can't do.

    Raises:
        TwofoldError: for any error of its own.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
            yield
    except Exception as error:  # torch, onnxscript and openvino raise errors of their own
        deepest = error
        while isinstance(deepest.__cause__, Exception):
            deepest = deepest.__cause__
        refused = f"{name} ({type(model).__name__}) can't be exported to {kind}: {first_line(deepest)}"
        raise TwofoldError(f"{refused}; use `to=dense` or `to=portable`") from error
    finally:
        logging.disable(before)


def save_graph(exported: Any, products: int, source: Source, folder: Path) -> list[str]:
    """Save a traced graph with a configuration that does not say that it is a factored checkpoint.

    Args:
        products: with a weight, in the graph.

    Returns:
        A note that tells whether the factors are still two products.
    """
    exported.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_generation(source.model, folder)
    expected = sum(isinstance(module, nn.Linear | Conv1D) for module in source.model.modules())
    has = f"The graph has {products} products with a weight, "
    if products == expected:
        return [f"{has}one for each factor and each dense layer."]
    return [f"{has}the model has {expected} linear layers: the exporter has joined or split some."]


def open_export(folder: Path, threads: int | None = None) -> Decoder:
    """Open the decoder of an exported folder.

    Args:
        threads: for the runtime; by default those that PyTorch has.

    Raises:
        TwofoldError: if the folder holds no graph, or its runtime is not installed.
    """
    for kind in FORMATS.all():
        if kind.decoder is not None and (folder / kind.graph).is_file():
            return kind.decoder(folder / kind.graph, threads)
    raise TwofoldError(f"{folder} holds no exported graph; make one with twofold export --to onnx or --to openvino")


def other_inputs(
    names: set[str],
    ids: np.ndarray,  # (batch, tokens)
    read: int,
) -> dict[str, np.ndarray]:
    """Return what a graph may ask for beside the tokens and the cache, after ``read`` tokens.

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
    if unknown := names - known.keys():
        raise TwofoldError(f"the graph asks for {', '.join(sorted(unknown))}, which no decoding of text has")
    return {name: np.ascontiguousarray(known[name]) for name in names}
